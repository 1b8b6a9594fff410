"""The parts of a training step, one by one."""

import math
import shutil
import signal
import threading
from pathlib import Path

import psutil
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from diffusion_nb.denoisers import NetDenoiser, predict_v
from diffusion_nb.losses.bound import bound_loss
from diffusion_nb.losses.simple import denoising_loss
from diffusion_nb.losses.vdm import vdm_loss
from diffusion_nb.nets.unet import UNet
from diffusion_nb.noise import Noise
from diffusion_nb.recipes.diffusion import TARGETS
from diffusion_nb.schedules import CosineSchedule, VPSchedule
from diffusion_nb.time_samplers import chain_times, continuous_times
from diffusion_nb.training.batches import flip_half
from diffusion_nb.training.identity import name_of
from diffusion_nb.training.lr import warmup_constant, warmup_cosine
from diffusion_nb.training.trainer import Trainer
from diffusion_nb.util.images import as_bytes
from diffusion_nb.util.profiling import largest_that_fits
from diffusion_nb.util.storage import load_tensors

N = 50
PICTURES = torch.arange(N).reshape(N, 1, 1, 1).expand(N, 1, 2, 2) / N
LABELS = torch.arange(N)


class Scale(nn.Module):
    "A network of one number."

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(3.0))

    def forward(self, x, t, y=None):
        return self.w * x


def trainer(denoiser=None, x0=PICTURES, **options) -> Trainer:
    denoiser = denoiser or NetDenoiser(Scale(), CosineSchedule())
    return Trainer(denoiser, x0, **dict(steps=20, lr=lambda k: 0.1, batch=16, device="cpu") | options)


def test_average_follows_its_recursion():
    run = trainer(ema=0.3)
    want = run.state.params[0].item()
    for k in range(20):
        run.train_step()
        decay = min(0.3, (1 + k) / (10 + k))
        want = decay * want + (1 - decay) * run.state.params[0].item()
        assert abs(run.state.averages[0].item() - want) < 1e-5


def test_the_decay_may_be_a_function_of_the_step():
    decays = [0.0, 0.5, 0.9, 0.2]
    run = trainer(ema=lambda k: decays[min(k, 3)], steps=4)
    want = run.state.params[0].item()
    for decay in decays:
        run.train_step()
        want = decay * want + (1 - decay) * run.state.params[0].item()
        assert abs(run.state.averages[0].item() - want) < 1e-5
    assert run.identity()["ema"] == 0.2 and trainer(ema=0.3).identity()["ema"] == 0.3
    for bad, said in (
        (1.0, "ema: expected a decay"),
        (-0.1, "ema: expected a decay"),
        (lambda k: 2.0, "expected ema"),
    ):
        with pytest.raises(ValueError, match=said):
            trainer(ema=bad)


def test_the_average_carries_no_graph():
    "An average that is updated where gradients are recorded keeps every step's graph alive, and cannot be copied."
    average = trainer(steps=3).fit()
    assert all(p.is_leaf and p.grad_fn is None and not p.requires_grad for p in average.parameters())


class Layers(nn.Sequential):
    def forward(self, x, t):
        return super().forward(x)


class Buffered(nn.Module):
    "A network with statistics of BatchNorm, and with random frequencies that are a buffer."

    def __init__(self):
        super().__init__()
        self.norm, self.layer = nn.BatchNorm1d(4), nn.Linear(8, 4)
        self.register_buffer("frequencies", torch.randn(4))

    def forward(self, x, t):
        wave = (t[:, None] * self.frequencies).cos()
        return self.layer(torch.cat([self.norm(x.flatten(1)), wave], 1)).reshape(x.shape)


def test_buffers_are_in_the_checkpoint_and_in_the_average(tmp_path):
    def run(checkpoint=None):
        return trainer(NetDenoiser(Buffered(), CosineSchedule()), steps=20, checkpoint=checkpoint)

    first = run(tmp_path / "c")
    first.fit()
    again = run(tmp_path / "c")
    end = again.fit()
    assert end.net.norm.num_batches_tracked == 20 and end.net.norm.running_mean.abs().max() > 0
    for name, v in first.denoiser.named_buffers():
        for other in (first.average, again.denoiser, again.average):
            assert other.get_buffer(name).equal(v), name


@pytest.mark.parametrize("other", [
    dict(x0=-PICTURES), dict(ema=0.5), dict(lr=lambda k: 0.2), dict(loss=lambda *a, **k: denoising_loss(*a, **k)), dict(clip=2.0),
    dict(denoiser=NetDenoiser(Scale(), CosineSchedule(), predict_v)), dict(denoiser=NetDenoiser(Scale(), VPSchedule())),
    dict(seed=1), dict(batch=8), dict(augment=flip_half), dict(time_sampler=chain_times(10)), dict(loss=bound_loss(10, 17)), dict(betas=(0.9, 0.9)),
], ids=lambda d: next(iter(d)))  # fmt: skip
def test_another_run_is_refused(tmp_path, other):
    trainer(checkpoint=tmp_path / "c").fit()
    with pytest.raises(ValueError, match="is of another run"):
        trainer(checkpoint=tmp_path / "c", **other)


def test_a_loss_made_with_other_numbers_is_another_loss(tmp_path):
    trainer(checkpoint=tmp_path / "c", time_sampler=chain_times(10)).fit()
    with pytest.raises(ValueError, match=r"is of another run \(times .*T=10.* → .*T=20"):
        trainer(checkpoint=tmp_path / "c", time_sampler=chain_times(20))
    assert name_of(bound_loss(10, 17)) != name_of(bound_loss(10, 256)) and name_of(vdm_loss(17)) != name_of(
        vdm_loss(256)
    )


def test_more_steps_go_on_and_fewer_are_refused(tmp_path):
    trainer(checkpoint=tmp_path / "c").fit()
    longer = trainer(checkpoint=tmp_path / "c", steps=30)
    assert longer.step == 20
    whole = trainer(steps=30)
    assert all(a.equal(b) for a, b in zip(longer.fit().parameters(), whole.fit().parameters(), strict=True))
    with pytest.raises(ValueError, match="is of step 30, and 20 were asked for"):
        trainer(checkpoint=tmp_path / "c")


COLUMNS = torch.arange(16.0).repeat(N, 1) + 1


@pytest.mark.parametrize("null", [0, torch.zeros(16)], ids=["a number", "one of its shape"])
def test_conditions_of_any_shape_are_left_out_row_by_row(null):
    "As many columns as pictures in the batch: a mask that is not reshaped would fall on the columns."
    run = trainer(cond={"y": COLUMNS}, null=null, cond_dropout=0.4)
    gone = torch.cat([(run_y["y"] == 0) for k in range(20) for *_, run_y in run.batches(k)])
    assert (gone.all(1) | ~gone.any(1)).all()
    assert abs(gone[:, 0].double().mean().item() - 0.4) < 4 * (0.24 / 320) ** 0.5


@pytest.mark.parametrize("apart", [False, True])
def test_several_conditions_are_left_out_together_or_apart(apart):
    run = trainer(cond={"y": LABELS, "text": COLUMNS}, null={"y": N, "text": 0.0}, cond_dropout=0.4, apart=apart)
    both = [(c["y"] == N, (c["text"] == 0).all(1)) for k in range(20) for *_, c in run.batches(k)]
    y, text = (torch.cat(v).double() for v in zip(*both, strict=True))
    for share in (y, text):
        assert abs(share.mean().item() - 0.4) < 4 * (0.24 / 320) ** 0.5
    assert y.equal(text) != apart
    assert not apart or abs((y * text).mean().item() - 0.16) < 4 * (0.16 * 0.84 / 320) ** 0.5


@pytest.mark.parametrize("cond, null, said", [
    ({"y": LABELS}, 3, r"y: 1 of the labels are 3, which is null and means any"),
    ({}, 3, "there is no condition 'y' to leave out; there are: none"),
    ({"y": COLUMNS}, torch.zeros(3), r"the shape of one y, \(16,\); got \(3,\)"),
])  # fmt: skip
def test_a_null_that_cannot_be_meant(cond, null, said):
    with pytest.raises(ValueError, match=said):
        trainer(cond=cond, null=null)


def test_conditions_that_are_pictures_are_augmented_alike():
    slope = torch.linspace(-1, 1, 4).expand(N, 1, 4, 4) * torch.linspace(0.5, 1, N).reshape(N, 1, 1, 1)
    run = Trainer(NetDenoiser(Scale(), CosineSchedule()), slope, steps=1, lr=lambda k: 0.1, batch=32, device="cpu",
                  cond={"low": 0.5 * slope}, augment=flip_half)  # fmt: skip
    ((x0, _, _, cond),) = run.batches(0)
    assert cond["low"].equal(0.5 * x0) and 0 < (x0[..., 0] > 0).double().mean() < 1


@pytest.mark.parametrize(
    "x0, says", [((PICTURES + 1) / 2, "from 0.5 to 0.99"), (255 * PICTURES, "from 0 to 249.9")]
)
def test_pictures_in_another_range_are_warned_of(x0, says):
    with pytest.warns(UserWarning, match=f"expected from -1 to 1, and these go {says}.*x0 / 127.5 - 1"):
        trainer(x0=x0)


@pytest.mark.parametrize("wrong", [
    dict(steps=-1), dict(steps=1.5), dict(batch=0), dict(save_every=0), dict(log_every=0), dict(ema=1.0), dict(ema=math.nan), dict(ema=-0.1),
    dict(cond_dropout=1.5), dict(clip=0.0), dict(lr=lambda k: math.nan), dict(lr=lambda k: -1.0), dict(accumulate=0),
], ids=lambda d: f"{next(iter(d))}")  # fmt: skip
def test_numbers_are_checked_at_the_door(wrong):
    with pytest.raises(ValueError, match="expected"):
        trainer(**wrong)


def test_memory_is_flat_over_steps():
    net = Layers(*(nn.Linear(2, 2) for _ in range(10)))
    run = trainer(steps=1100, denoiser=NetDenoiser(net, CosineSchedule()))
    for _ in range(100):
        run.train_step()
    kept, queued = psutil.Process().memory_info().rss, len(torch.cuda._queued_calls)
    for _ in range(1000):
        run.train_step()
    grown = psutil.Process().memory_info().rss - kept
    assert grown < 1000 * 2000, (
        f"{grown / 1000:.0f} bytes a step stay behind; nodes of the graph of 20 tensors take 11,000"
    )
    assert len(torch.cuda._queued_calls) == queued


def test_learning_rates():
    cosine, constant = warmup_cosine(2.0, 10, 1000), warmup_constant(2.0, 10)
    assert [cosine(k) for k in (0, 4, 500, 1000)] == pytest.approx([0.2, 1.0, 1.0, 0.0])
    assert [constant(k) for k in (0, 4, 9, 1000)] == pytest.approx([0.2, 1.0, 2.0, 2.0])
    run = trainer(lr=lambda k: 0.1 + k)
    for k in range(3):
        run.train_step()
        assert run.state.optimizer.param_groups[0]["lr"] == 0.1 + k


def test_gradients_are_clipped():
    run = trainer(clip=0.01)
    run.train_step()
    assert run.state.optimizer.state[run.state.params[0]]["exp_avg"].abs().item() == pytest.approx(
        0.001
    )  # 0.1 of the gradient


def test_labels_belong_to_their_pictures():
    x0, _, _, cond = next(trainer(cond={"y": LABELS}).batches(0))
    assert torch.equal(x0, PICTURES[cond["y"]]) and len(cond["y"].unique()) > 5


def test_share_of_labels_dropped():
    run = trainer(cond={"y": LABELS}, null=N, cond_dropout=0.2, batch=20_000)
    share = (next(run.batches(0))[3]["y"] == N).double().mean()
    assert abs(share - 0.2) < 5 * (0.2 * 0.8 / 20_000) ** 0.5


def test_training_never_draws_time_0():
    t = continuous_times(torch.tensor([0.0, 0.25, 1 - 2**-53], dtype=torch.float64))
    assert t.tolist() == [1, 0.75, 2**-53]


def test_half_of_the_pictures_are_mirrored():
    x = torch.arange(8.0).reshape(2, 1, 2, 2)
    assert flip_half(x, torch.tensor([0.1, 0.9])).flatten().tolist() == [1, 0, 3, 2, 4, 5, 6, 7]


@pytest.mark.parametrize("target", TARGETS)
def test_a_recipes_loss_is_the_plain_error_of_its_target(target):
    row, weight = TARGETS[target]
    model, eps, t = NetDenoiser(Scale(), CosineSchedule(), row), Noise(range(N), (1, 2, 2))(0), torch.tensor(0.3)
    alpha, sigma = (c.item() for c in model.schedule(t))
    truth = {"eps": eps, "v": alpha * eps - sigma * PICTURES}[target]
    error = model.net(alpha * PICTURES + sigma * eps, t) - truth
    got = denoising_loss(model, PICTURES, t, eps, weight)
    torch.testing.assert_close(got, error.square().flatten(1).mean(1), rtol=1e-4, atol=1e-6)


# parts of a batch


def test_parts_draw_what_the_whole_batch_draws():
    options = dict(cond={"y": LABELS}, null=N, batch=24)
    (whole,) = trainer(**options).batches(7)
    parts = list(trainer(accumulate=3, **options).batches(7))
    assert [len(p[0]) for p in parts] == [8, 8, 8]
    for i in range(3):
        assert torch.equal(torch.cat([p[i] for p in parts]), whole[i])
    assert torch.equal(torch.cat([p[3]["y"] for p in parts]), whole[3]["y"])


def test_times_with_a_memory_are_asked_once_a_step():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, u, step):
            self.calls += 1
            return 1 - u

    run = trainer(accumulate=4, time_sampler=Counting())
    for _ in range(3):
        run.train_step()
    assert run.time_sampler.calls == 3


def test_accumulated_gradient_is_that_of_the_batch():
    one, parts = trainer(clip=1e9), trainer(clip=1e9, accumulate=8)
    for _ in range(3):
        torch.testing.assert_close(one.train_step(), parts.train_step(), rtol=1e-6, atol=0)
    for m in ("exp_avg", "exp_avg_sq"):
        a, b = (r.state.optimizer.state[r.state.params[0]][m] for r in (one, parts))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)


@pytest.mark.parametrize("batch, parts", [(16, 3), (2, 4)])
def test_a_batch_that_cannot_be_shared_out(batch, parts):
    with pytest.raises(
        ValueError, match=f"batch: {batch} pictures cannot be shared out to 1 processes × {parts} parts"
    ):
        trainer(batch=batch, accumulate=parts)


# bytes


def test_bytes_stand_for_the_pictures_they_were_made_from():
    x = torch.randint(0, 256, (N, 1, 4, 4), generator=torch.Generator().manual_seed(0)) / 127.5 - 1
    small = as_bytes(x)
    assert small.dtype == torch.uint8 and small.nbytes == x.nbytes // 4
    runs = [Trainer(NetDenoiser(Scale(), CosineSchedule()), data, steps=5, lr=lambda k: 0.1, batch=8, device="cpu") for data in (x, small)]  # fmt: skip
    a, b = (next(r.batches(3)) for r in runs)
    assert all(r.batches.source.x0.dtype == torch.uint8 for r in runs)
    assert a[0].equal(b[0]) and b[0].dtype == torch.float32
    assert torch.isin(a[0], x).all()  # the very numbers of the pictures
    assert runs[0].train_step() == runs[1].train_step()


def test_pictures_that_bytes_would_round_stay_as_they_are():
    assert as_bytes(PICTURES) is PICTURES


# steps that go wrong


class Spoilt(Scale):
    "Its output is not a number in some of the calls."

    def __init__(self, bad):
        super().__init__()
        self.bad, self.calls = bad, 0

    def forward(self, x, t, y=None):
        self.calls += 1
        return self.w * x * (torch.nan if self.calls - 1 in self.bad else 1.0)


def spoilt(bad, **options):
    return Trainer(NetDenoiser(Spoilt(bad), CosineSchedule()), PICTURES, **dict(steps=20, lr=lambda k: 0.1, batch=16, device="cpu", log_every=5) | options)  # fmt: skip


def test_a_step_that_is_not_a_number_is_left_out_and_counted():
    run = spoilt({3, 4}, skip=True)
    for _ in range(3):
        run.train_step()
    before = {k: v.clone() for k, v in run.state.tensors().items() if not k.startswith(("average", "skipped"))}
    run.train_step(), run.train_step()
    assert all(v.equal(before[k]) for k, v in run.state.tensors().items() if k in before)
    assert run.state.skipped == 2 and run.state.optimizer.state[run.state.params[0]]["step"] == 3
    run.train_step()
    assert run.state.params[0].isfinite() and run.state.params[0] != before["net.net.w"]


def test_the_losses_of_left_out_steps_are_not_averaged():
    run = spoilt({3, 4}, skip=True)
    run.fit()
    assert [k for k, _ in run.losses] == [5, 10, 15, 20]
    plain = spoilt(set(), skip=True)
    first = [plain.train_step().item() for _ in range(3)]
    assert run.losses[0][1] == pytest.approx(sum(first) / 3)


def test_nothing_but_bad_steps_stops_even_so():
    with pytest.raises(FloatingPointError, match="the loss is nan between steps 5 and 10"):
        spoilt(set(range(5, 99)), skip=True).fit()


def test_without_skip_a_bad_step_stops_before_it_is_saved(tmp_path):
    file = tmp_path / "run.safetensors"
    run = spoilt({7}, checkpoint=file, save_every=3)
    with pytest.raises(
        FloatingPointError, match=r"between steps 6 and 9: .*skip=True leaves such steps out.*holds step 6"
    ):
        run.fit()
    again = spoilt(set(), checkpoint=file, save_every=3)
    assert again.step == 6 and all(v.isfinite().all() for v in again.state.tensors().values())


def test_a_gradient_that_spoils_the_weights_alone_stops_before_it_is_saved(tmp_path):
    "The loss of step 6 is finite, its gradient is not: the root of 0."
    file, steps = tmp_path / "run.safetensors", []

    def rooted(denoiser, x0, t, eps):
        steps.append(0)
        bad = (denoiser.net.w * 0).abs().sqrt() if len(steps) == 6 else 0
        return denoising_loss(denoiser, x0, t, eps) + bad

    with pytest.raises(FloatingPointError, match="weights are not finite, between steps 5 and 6: .*holds step 3"):
        spoilt(set(), loss=rooted, checkpoint=file, save_every=3).fit()


def test_skipped_steps_are_remembered(tmp_path):
    whole, first = (spoilt({2}, skip=True, checkpoint=tmp_path / f"{i}.safetensors") for i in range(2))
    for _ in range(8):
        whole.train_step()
    for _ in range(5):
        first.train_step()
    first.save()
    second = spoilt(set(), skip=True, checkpoint=tmp_path / "1.safetensors")
    for _ in range(3):
        second.train_step()
    assert second.state.skipped == 1
    assert all(v.equal(whole.state.tensors()[k]) for k, v in second.state.tensors().items())


def test_a_fused_step_goes_on_with_weights_in_channels_last(tmp_path):
    "Its moments must lie in memory as the weights do: an H200 refused them after a checkpoint, and a CPU went on to other bits."

    def run(name, steps):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = UNet(1, 8, (1, 2), 1, (1,)).to(memory_format=torch.channels_last)
            nn.init.normal_(net.head[-1].weight, std=0.1)
        denoiser, x0 = NetDenoiser(net, CosineSchedule(), predict_v), PICTURES.repeat(1, 1, 2, 2)
        return trainer(denoiser, x0, steps=steps, batch=8, skip=True, checkpoint=tmp_path / name)

    whole = run("whole", 4)
    whole.fit()
    run("parts", 2).fit()
    again = run("parts", 4)
    again.fit()
    for p, moments in again.state.optimizer.state.items():
        assert moments["exp_avg"].stride() == moments["exp_avg_sq"].stride() == p.stride()
    want = whole.state.tensors()
    assert all(v.equal(want[k]) for k, v in again.state.tensors().items())


class Hungry(Scale):
    "Runs out of memory with more than `most` pictures."

    def __init__(self, most):
        super().__init__()
        self.most = most

    def forward(self, x, t, y=None):
        if len(x) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return self.w * x


@pytest.mark.parametrize("batch, most, parts", [(32, 9, 4), (32, 31, 2), (30, 8, 5)])
def test_out_of_memory_says_what_would_fit(batch, most, parts):
    options = dict(steps=2, lr=lambda k: 0.1, batch=batch, device="cpu")
    with pytest.raises(MemoryError, match=rf"accumulate={parts} trains the same batch in parts"):
        Trainer(NetDenoiser(Hungry(most), CosineSchedule()), PICTURES, **options).fit()
    Trainer(NetDenoiser(Hungry(most), CosineSchedule()), PICTURES, accumulate=parts, **options).fit()


def test_not_even_one_fits():
    with pytest.raises(MemoryError, match="not even a batch of one"):
        Trainer(
            NetDenoiser(Hungry(0), CosineSchedule()), PICTURES, steps=2, lr=lambda k: 0.1, batch=8, device="cpu"
        ).fit()


def test_largest_that_fits():
    tried = []

    def attempt(n):
        tried.append(n)
        if n > 20:
            raise torch.OutOfMemoryError
        if n == 0:
            raise AssertionError

    assert largest_that_fits(attempt, 100) == 12 and tried == [100, 50, 25, 12]


# hooks


class Watch(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(()))
        self.steps = []

    def forward(self, run):
        self.steps.append(run.step)
        self.total += run.state.params[0].detach()


def test_hooks_see_each_step_and_their_buffers_are_kept(tmp_path):
    watch, again, whole = Watch(), Watch(), Watch()
    options = dict(checkpoint=tmp_path / "run.safetensors", save_every=4)
    stopped = trainer(hooks=[watch, lambda run: run.step == 10 and signal.raise_signal(signal.SIGTERM)], **options)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 11 of 20; run again"):
        stopped.fit()
    trainer(hooks=[again, lambda run: None], **options).fit()
    trainer(hooks=[whole]).fit()
    assert watch.steps == list(range(1, 12)) and again.steps == list(range(12, 21))
    assert again.total == whole.total != watch.total


# checkpoints


def files(folder):
    return sorted(p.name for p in folder.iterdir())


def test_the_last_checkpoints_are_kept(tmp_path):
    trainer(checkpoint=tmp_path / "run.safetensors", save_every=3, keep_checkpoints=3).fit()
    assert files(tmp_path) == ["run.safetensors", "run.safetensors.1", "run.safetensors.2"]
    steps = [load_tensors(tmp_path / f)[1]["step"] for f in files(tmp_path)]
    assert steps == ["20", "18", "15"]


@pytest.mark.parametrize(
    "harm", [lambda b: b[:-7], lambda b: b[:100], lambda b: b"", lambda b: b[:-1] + bytes([b[-1] ^ 4])]
)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, harm):
    file = tmp_path / "run.safetensors"
    first = trainer(checkpoint=file, save_every=5)
    for _ in range(10):
        first.train_step()
        if first.step % 5 == 0:
            first.save()
    file.write_bytes(harm(file.read_bytes()))
    with pytest.warns(UserWarning, match=r"run.safetensors is damaged .*; going on from run.safetensors.1"):
        second = trainer(checkpoint=file, save_every=5)
    assert second.step == 5
    second.train_step()
    second.save()
    assert [load_tensors(p)[1]["step"] for p in (file, Path(f"{file}.1"))] == ["6", "5"]
    for p in (file, Path(f"{file}.1")):
        p.write_bytes(b"x")
    with pytest.raises(
        ValueError, match="run.safetensors is damaged.*run.safetensors.1 is damaged.*delete it to start again"
    ):
        trainer(checkpoint=file)


def test_a_writer_killed_between_its_two_renames(tmp_path):
    file = tmp_path / "run.safetensors"
    trainer(checkpoint=file, save_every=10).fit()
    file.rename(f"{file}.1")
    assert trainer(checkpoint=file).step == 20


def test_rubbish_of_a_killed_writer_is_cleared(tmp_path):
    file = tmp_path / "run.safetensors"
    (tmp_path / "run.safetensors.new.123.tmp").write_bytes(b"half")
    trainer(checkpoint=file).fit()
    assert files(tmp_path) == ["run.safetensors"]


def test_a_checkpoint_of_another_network_names_what_differs(tmp_path):
    class Two(Scale):
        def __init__(self):
            super().__init__()
            self.w, self.b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(()))

        def forward(self, x, t, y=None):
            return self.w.sum() * x + self.b

    file = tmp_path / "run.safetensors"
    trainer(checkpoint=file).fit()
    with pytest.raises(
        ValueError,
        match=r"does not fit the network: net.net.b missing, expected \(\).*net.net.w \(\), expected \(2,\)",
    ):
        Trainer(
            NetDenoiser(Two(), CosineSchedule()),
            PICTURES,
            steps=20,
            lr=lambda k: 0.1,
            batch=16,
            device="cpu",
            checkpoint=file,
        )


def test_a_checkpoint_is_written_while_the_training_goes_on(tmp_path, monkeypatch):
    file, go_on, straight = tmp_path / "run.safetensors", threading.Event(), trainer()

    def slow(*args, **options):
        assert go_on.wait(600), "the training waited for the disk"
        save_file(*args, **options)

    monkeypatch.setattr("diffusion_nb.util.storage.save_file", slow)
    run = trainer(checkpoint=file, save_every=4)
    for _ in range(4):
        straight.train_step(), run.train_step()
    run.save(wait=False)
    for _ in range(3):
        run.train_step()
    assert not file.exists() and run.checkpoints.saved is None
    go_on.set()
    assert run.checkpoints.newest() == 4
    tensors, about = load_tensors(file)
    assert about["step"] == "4" and all(v.equal(tensors[k]) for k, v in straight.state.tensors().items())


def test_a_disk_that_fills_up_costs_no_step(tmp_path, monkeypatch):
    file, run = tmp_path / "run.safetensors", None
    whole = trainer().fit()

    def full(*args, **options):
        if 5 <= int(options["metadata"]["step"]) < 15:
            raise SafetensorError("No space left on device (os error 28)")
        save_file(*args, **options)

    monkeypatch.setattr("diffusion_nb.util.storage.save_file", full)
    run = trainer(checkpoint=file, save_every=4)
    with pytest.warns(
        UserWarning,
        match=r"the checkpoint of step 12 could not be written: .*No space left.* That of step 4 is whole. Training goes on",
    ):
        fitted = run.fit()
    assert all(a.equal(b) for a, b in zip(fitted.parameters(), whole.parameters(), strict=True))
    assert [load_tensors(p)[1]["step"] for p in (file, Path(f"{file}.1"))] == ["20", "16"]


def test_too_little_room_is_said_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(100, 92, 8))
    run = trainer(checkpoint=tmp_path / "run.safetensors")
    with pytest.raises(OSError, match="room for 3 checkpoints"):
        run.fit()
    assert run.step == 0


def test_a_place_that_cannot_be_written_is_said_before_the_first_step(tmp_path):
    (tmp_path / "file").touch()
    run = trainer(checkpoint=tmp_path / "file" / "run.safetensors")
    with pytest.raises(OSError, match="no checkpoint can be written there"):
        run.fit()
    assert run.step == 0
