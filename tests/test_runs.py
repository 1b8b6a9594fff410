"""What surrounds a training: logs, pictures, averages, weights from elsewhere, processes."""

import contextlib
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from diffusion_nb.denoisers import NetDenoiser, predict_v, predict_x0
from diffusion_nb.schedules import CosineSchedule, VESchedule
from diffusion_nb.training import hooks as training_hooks
from diffusion_nb.training.ema import (
    PowerEMA,
    power_decay,
    power_gamma,
    power_profile,
    profile_product,
    reconstruct,
    snapshot_weights,
    snapshots,
)
from diffusion_nb.training.hooks import (
    JsonLogger,
    SampleGrids,
    TensorBoard,
    Throughput,
    fixed_draws,
    read_rows,
    training_flops,
)
from diffusion_nb.training.sharding import process_group
from diffusion_nb.training.trainer import Trainer
from diffusion_nb.util.profiling import flops, matrix_peak
from diffusion_nb.util.storage import load_weights, read_weights, save_tensors

HANGS = 1800  # seconds: what takes so long on any machine, hangs

ROOT = Path(__file__).resolve().parents[1]
X0 = torch.linspace(-1, 1, 50).reshape(50, 1, 1, 1).expand(50, 1, 2, 2)


class Scale(nn.Module):
    "A network of four numbers, with dropout."

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[0.5, -0.2], [0.3, 0.7]]))

    def forward(self, x, t, y=None):
        return nn.functional.dropout(x @ self.w, 0.2, self.training)


def trainer(denoiser=None, **options) -> Trainer:
    denoiser = denoiser or NetDenoiser(Scale(), CosineSchedule(), predict_v)
    return Trainer(
        denoiser, X0, **dict(steps=20, lr=lambda k: 0.01 + k, batch=16, log_every=5, device="cpu") | options
    )


def at(step, loss=0.5, rank=0, **more):
    "A trainer as a hook sees it after this step, its loss just read."
    fake = dict(step=step, losses=[(step, loss)], rank=rank, steps=100, speed=7.0, state=SimpleNamespace(skip=False, shard=False), lr=lambda k: 10 * k,
                device=torch.device("cpu"))  # fmt: skip
    return SimpleNamespace(**fake | more)


# the log


def test_a_row_holds_what_was_read(tmp_path):
    run = trainer(hooks=[JsonLogger(tmp_path / "log")], skip=True)
    run.fit()
    rows = read_rows(tmp_path / "log")
    assert [(row["step"], row["loss"]) for row in rows] == run.losses and len(rows) == 4
    assert [row["lr"] for row in rows] == [4.01, 9.01, 14.01, 19.01]  # of the step that was taken
    assert all(row["pictures_per_second"] > 0 and row["skipped"] == 0 and row["seconds"] > 0 for row in rows)


def test_rows_later_than_the_resumed_step_are_dropped(tmp_path):
    path = tmp_path / "log"
    for steps, start in ((range(1, 8), 0), (range(5, 10), 100)):  # killed after 7, resumed from 4
        log = JsonLogger(path)
        for step in steps:
            log(at(step, loss=start + step))
    assert [row["step"] for row in read_rows(path)] == list(range(1, 10))
    assert [row["loss"] for row in read_rows(path)] == [1, 2, 3, 4, 105, 106, 107, 108, 109]


def test_the_same_hook_may_go_back(tmp_path):
    log = JsonLogger(tmp_path / "log")
    for step in (1, 2, 3, 2, 3, 4):
        log(at(step))
    assert [row["step"] for row in read_rows(tmp_path / "log")] == [1, 2, 3, 4]


@pytest.mark.parametrize("cut", (1, 5, -1))
def test_a_torn_line_is_repaired(tmp_path, cut):
    path = tmp_path / "log"
    for step in (1, 2):
        JsonLogger(path)(at(step))
    path.write_text(path.read_text() + json.dumps({"step": 3, "loss": 1.0})[:cut])
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    JsonLogger(path)(at(3))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_file_that_is_no_log_is_left_alone(tmp_path):
    path = tmp_path / "log"
    for text in (
        "buy milk\nand bread\n",
        '{"step": "x"}\n',
        "3\n",
        "buy milk",
        "3",
        '{"a": 1}',
        "{}",
    ):
        path.write_text(text)
        with pytest.raises(
            ValueError, match="is no log: expected a JSON object with a step in its first line; name another file"
        ):
            JsonLogger(path)(at(1))
        assert path.read_text() == text


def test_a_damaged_line_costs_a_warning(tmp_path):
    path = tmp_path / "log"
    for step in range(1, 5):
        JsonLogger(path)(at(step))
    lines = path.read_text().splitlines()
    for damage in ("[1]", "", lines[1][:9], lines[1].replace("step", "stop")):
        path.write_text("\n".join([lines[0], damage, *lines[2:]]) + "\n")
        with pytest.warns(UserWarning, match="of 4 lines these are damaged, and left out: 2"):
            assert [row["step"] for row in read_rows(path)] == [1, 3, 4]
    with pytest.warns(UserWarning, match="damaged"):
        JsonLogger(path)(at(5))
    assert [row["step"] for row in read_rows(path)] == [1, 3, 4, 5]


def test_nothing_is_written_between_readings_or_by_other_processes(tmp_path):
    JsonLogger(tmp_path / "other")(at(1, rank=1))
    assert not (tmp_path / "other").exists()
    log = JsonLogger(tmp_path / "log")
    log(at(3))
    log(at(4, losses=[(3, 0.5)]))
    log(at(5, loss=math.nan))
    assert [(row["step"], row["loss"]) for row in read_rows(tmp_path / "log")] == [(3, 0.5), (5, None)]


def test_tensorboard_replaces_what_is_done_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps, start in ((range(1, 8), 0), (range(5, 10), 100)):
        board = TensorBoard(tmp_path)
        grids = SampleGrids(tmp_path / "grids", lambda d: torch.zeros(4, 1, 3, 3), every=3, board=board)
        for step in steps:
            board(at(step, loss=start + step))
            grids(at(step, average=None))
        board.writer.close()
    seen = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in seen.Scalars("loss")] == [(k, k + 100 * (k > 4)) for k in range(1, 10)]
    assert [e.step for e in seen.Images("drawn")] == [3, 6, 9]
    board(at(1, rank=1))


def test_tensorboard_names_the_package_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        TensorBoard(tmp_path)


# the pictures


def test_grids_do_not_disturb_and_can_be_compared(tmp_path):
    draw = fixed_draws((1, 2, 2), n=4, calls=3)
    plain, watched = trainer(), trainer(hooks=[SampleGrids(tmp_path, draw, every=8)])
    plain.fit(), watched.fit()
    assert plain.state.params[0].equal(watched.state.params[0])
    assert [p.name for p in sorted(tmp_path.glob("*.png"))] == [
        "step-00000008.png",
        "step-00000016.png",
        "step-00000020.png",
    ]
    assert Image.open(tmp_path / "step-00000020.png").size == (5, 5)
    assert draw(plain.average).equal(draw(watched.average)) and not draw(plain.average).equal(
        fixed_draws((1, 2, 2), n=4, calls=3, first=4)(plain.average)
    )


def test_grids_leave_the_random_numbers_alone(tmp_path):
    torch.manual_seed(3)
    want = torch.rand(5)
    torch.manual_seed(3)
    SampleGrids(tmp_path, lambda denoiser: torch.rand(1, 1, 2, 2), every=1)(at(1, average=None))
    assert torch.rand(5).equal(want)


def test_grids_start_at_the_schedules_noise_and_tell_the_labels(tmp_path):
    asked = []

    class Asks(NetDenoiser):
        def forward(self, x_t, t, **cond):
            asked.append((x_t, cond))
            return super().forward(x_t, t)

    fixed_draws((16, 2, 2), n=64, classes=2, calls=2)(Asks(Scale(), VESchedule(0.1, 50.0), predict_x0))
    x, cond = asked[0]
    assert cond["y"].tolist() == [0] * 32 + [1] * 32
    assert abs(x.std().item() / 50 - 1) < 5 / (2 * 64**2) ** 0.5


def test_grids_refuse_sharded_weights(tmp_path):
    with pytest.raises(ValueError, match="shard=True the averaged weights are whole only at the end"):
        SampleGrids(tmp_path, None, every=1)(at(1, state=SimpleNamespace(shard=True)))


# the speed


def test_operations_are_counted():
    a, b = torch.ones(3, 4), torch.ones(4, 5, requires_grad=True)
    assert flops(lambda: a @ b) == 120 and flops(lambda: (a @ b).sum().backward()) == 240
    run = trainer()
    assert training_flops(run) == 3 * 2 * 2 * 2 * 2
    assert 1e7 < matrix_peak("cpu", n=64, seconds=0.01) < 1e15


def test_the_peak_counts_multiplying_and_adding(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(training_hooks.time, "perf_counter", lambda: float(next(clock)))
    assert matrix_peak("cpu", n=8) == 2 * 8**3


def test_speed_says_which_share_was_used(capsys):
    run = trainer(hooks=[hook := Throughput(peak=1e6)])
    run.world, run.speed = 1, 1.0
    hook.speeds = [1000.0, 10_000.0, 50.0]
    assert hook.report(run) == "1,000 pictures/s, 4.8e-08 GFLOP a picture, 5% of what the device can do"
    run.fit()
    assert capsys.readouterr().out.count("pictures/s") == 1


# the averages


def test_gamma_of_a_width():
    assert power_gamma(0.05) == pytest.approx(16.97, abs=0.01) and power_gamma(0.1) == pytest.approx(
        6.94, abs=0.01
    )
    assert power_gamma(12**-0.5 - 1e-9) == pytest.approx(0, abs=1e-6)
    for bad in (0, -0.1, 0.3, math.nan):
        with pytest.raises(ValueError, match="sigma_rel: expected a width between 0 and"):
            power_gamma(bad)


def test_the_first_step_forgets_the_start():
    assert power_decay(3.0, 1) == 0 and power_decay(1.0, 2) == 0.25
    assert power_profile(1.0, 2, 3).tolist() == [0.25, 0.75, 0]


def test_products_are_integrals():
    tau = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 1000
    for t, g, s, d in ((100.0, 3.0, 40.0, 9.0), (20.0, 1.5, 80.0, 0.5)):
        p, q = ((e + 1) / at * (tau / at) ** e * (tau < at) for at, e in ((t, g), (s, d)))
        got = profile_product(*(torch.tensor(v, dtype=torch.float64) for v in (t, g, s, d)))
        assert got.item() == pytest.approx((p * q).sum().item() / 1000, rel=1e-5)


@pytest.mark.parametrize("step", (60, 100))
def test_shares_sum_to_one_and_fit(step):
    steps, gammas = [20 * (k // 2 + 1) for k in range(10)], [power_gamma((0.05, 0.1)[k % 2]) for k in range(10)]
    steps, gammas = zip(*((s, g) for s, g in zip(steps, gammas, strict=True) if s <= step), strict=True)
    shares = snapshot_weights(steps, gammas, step, power_gamma(0.07))
    assert shares.sum().item() == pytest.approx(1, abs=1e-9)
    mixed = sum(x * power_profile(g, s, 100) for x, s, g in zip(shares.tolist(), steps, gammas, strict=True))
    want = power_profile(power_gamma(0.07), step, 100)
    assert ((mixed - want).norm() / want.norm()).item() < 0.05


@pytest.fixture
def walk(tmp_path):
    "A training of 120 steps as PowerEMA sees it, its weights, and the hook."
    g, denoiser = (
        torch.Generator().manual_seed(0),
        NetDenoiser(nn.Linear(3, 3).double(), CosineSchedule(), predict_v),
    )
    names, params = zip(*denoiser.named_parameters(), strict=True)
    hook, path = PowerEMA(denoiser, (0.05, 0.1, 0.07), tmp_path, every=30), []
    for step in range(1, 121):
        for p in params:
            p.data += torch.randn(p.shape, generator=g, dtype=torch.float64)
        path.append(params[0].detach().clone())
        hook(SimpleNamespace(step=step, steps=120, rank=0, denoiser=denoiser))
    return SimpleNamespace(folder=tmp_path, path=torch.stack(path), hook=hook, name=names[0], denoiser=denoiser)


def test_the_average_has_its_profile(walk):
    for width in (0.05, 0.1, 0.07):
        want = torch.einsum("k,kij->ij", power_profile(power_gamma(width), 120, 120), walk.path)
        torch.testing.assert_close(walk.hook.average(width)[walk.name], want, rtol=1e-10, atol=1e-10)


def test_reconstruction_follows_the_mixture_of_profiles(walk):
    found = snapshots(walk.folder)
    assert [(s.step, s.sigma_rel) for s in found] == [(t, w) for t in (30, 60, 90, 120) for w in (0.05, 0.07, 0.1)]
    for width, step in ((0.07, 90), (0.1, 120)):  # is one of them: exactly
        want = torch.einsum("k,kij->ij", power_profile(power_gamma(width), step, 120), walk.path)
        torch.testing.assert_close(reconstruct(found, width, step)[walk.name], want.float(), rtol=1e-5, atol=1e-5)
    two = [s for s in found if s.sigma_rel != 0.07]
    shares = snapshot_weights(
        [s.step for s in two], [power_gamma(s.sigma_rel) for s in two], 120, power_gamma(0.07)
    )
    mixed = sum(
        x * power_profile(power_gamma(s.sigma_rel), s.step, 120) for x, s in zip(shares.tolist(), two, strict=True)
    )
    torch.testing.assert_close(
        reconstruct(two, 0.07)[walk.name],
        torch.einsum("k,kij->ij", mixed, walk.path).float(),
        rtol=1e-5,
        atol=1e-5,
    )


def test_snapshots_that_are_not_there_or_damaged(walk, tmp_path):
    with pytest.raises(ValueError, match="step: expected one from 30 to 120"):
        reconstruct(snapshots(walk.folder), 0.1, step=20)
    with pytest.raises(ValueError, match="another denoiser"):
        other = NetDenoiser(nn.Sequential(nn.Linear(3, 3)), CosineSchedule(), predict_v)
        walk.hook(SimpleNamespace(step=1, denoiser=other))
    with pytest.raises(ValueError, match="found: expected snapshots"):
        reconstruct([], 0.1)
    with pytest.raises(
        ValueError, match="expected a width that is followed, 0.05, 0.1, 0.07; got 0.2; reconstruct"
    ):
        walk.hook.average(0.2)
    odd = walk.folder / "power-0.1-00000130.safetensors"
    for other in ({"w": torch.ones(2)}, {"net.weight": torch.ones(3), "net.bias": torch.ones(3)}):
        save_tensors(odd, other, dict(step="130", sigma_rel="0.1"))
        with pytest.raises(ValueError, match="130.safetensors, mixed with snapshots before it, does not fit"):
            reconstruct(snapshots(walk.folder), 0.07)
    save_tensors(odd, other, dict(step="many", sigma_rel="0.1"))
    with pytest.raises(ValueError, match="130.safetensors is damaged, or was not written by PowerEMA"):
        snapshots(walk.folder)
    odd.unlink()
    (walk.folder / "power-0.1-00000007.safetensors").write_bytes(b"abc")
    with pytest.raises(ValueError, match="00000007.safetensors is damaged, or was not written by PowerEMA"):
        snapshots(walk.folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no snapshots"):
        snapshots(tmp_path / "empty")


def test_averages_are_in_the_checkpoint(tmp_path):
    def run(folder, until=20):
        torch.manual_seed(0)
        denoiser = NetDenoiser(Scale(), CosineSchedule(), predict_v)
        hook = PowerEMA(denoiser, (0.1, 0.2), folder / "snapshots", every=10)

        def stop(t):
            if t.step == until < 20:
                raise ConnectionError("stopped")

        done = trainer(denoiser, hooks=[hook, stop], checkpoint=folder / "c", save_every=5, lr=lambda k: 0.01)
        with contextlib.suppress(ConnectionError):
            done.fit()
        assert done.step == until
        return hook.average(0.1)["net.w"]

    run(tmp_path / "cut", until=13)
    assert run(tmp_path / "cut").equal(run(tmp_path / "whole"))
    assert len(snapshots(tmp_path / "cut/snapshots")) == 4


# weights from elsewhere


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ("model.safetensors", "model.pt", "model.bin"))
@pytest.mark.parametrize("how", ("pickle", "torch", "old torch"))
def test_a_pickles_program_is_not_run(tmp_path, name, how):
    path, trap = tmp_path / name, {"weight": Trap(tmp_path / "ran")}
    if how == "pickle":
        path.write_bytes(pickle.dumps(trap))
    else:
        torch.save(trap, path, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(
        ValueError,
        match="is a pickle, which can run code as it is read: expected safetensors; .* allow_pickle=True",
    ):
        read_weights(path)
    with pytest.raises(ValueError, match="holds more than tensors, which is not run"):
        read_weights(path, allow_pickle=True)
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(trap))
    assert (tmp_path / "ran").exists()  # the trap works


def test_weights_fill_the_module_whatever_the_file(tmp_path):
    source = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    save_file(source.state_dict(), tmp_path / "a")
    torch.save(source.state_dict(), tmp_path / "b")
    for name in "ab":
        target = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        load_weights(tmp_path / name, target, allow_pickle=True)
        assert all(v.equal(source.state_dict()[k]) for k, v in target.state_dict().items())


def test_a_header_that_looks_like_a_pickle(tmp_path):
    "The length of a safetensors header may be 0x0280, whose bytes start as a pickle of version 2 does."
    for extra in range(640):
        save_file({"w": torch.ones(2)}, tmp_path / "w", metadata={"a": "x" * extra})
        if (tmp_path / "w").read_bytes()[:2] == b"\x80\x02":
            break
    else:
        raise AssertionError("no such header")
    assert read_weights(tmp_path / "w")["w"].tolist() == [1, 1]


def test_files_that_cannot_be_read(tmp_path):
    layer = nn.Linear(3, 2)
    before = layer.weight.clone()
    save_file(layer.state_dict(), tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    for bad in (content[:-1], content[:20], b"", b"hello", b"\xff" * 100):
        (tmp_path / "bad").write_bytes(bad)
        with pytest.raises(ValueError, match="bad is no whole safetensors file"):
            load_weights(tmp_path / "bad", layer)
    torch.save(layer.state_dict(), tmp_path / "p")
    (tmp_path / "p").write_bytes((tmp_path / "p").read_bytes()[:-200])
    with pytest.raises(ValueError, match="p is damaged"):
        load_weights(tmp_path / "p", layer, allow_pickle=True)
    torch.save({"state_dict": layer.state_dict(), "epoch": 3}, tmp_path / "n")
    with pytest.raises(ValueError, match="expected a dictionary of tensors; it holds state_dict, epoch"):
        load_weights(tmp_path / "n", layer, allow_pickle=True)
    with pytest.raises(FileNotFoundError, match="there is no such file of weights"):
        load_weights(tmp_path / "none", layer)
    save_file({"weight": torch.ones(2, 4), "more": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(ValueError) as said:
        load_weights(tmp_path / "other", layer)
    assert all(word in str(said.value) for word in ("weight", "(2, 4)", "(2, 3)", "bias", "missing", "more"))
    assert layer.weight.equal(before)


# processes

JOINS = """
import torch
from diffusion_nb.training.sharding import process_group
with process_group() as team:
    total = torch.full((), 1.0 + team.rank)
    torch.distributed.all_reduce(total)
assert not torch.distributed.is_initialized()
print(f"{team.rank} of {team.world} on {team.device.type}: {total:g}\\n", end="")
"""


def test_a_process_by_itself_is_a_team_of_one():
    with process_group(cpu=True) as team:
        assert team == (torch.device("cpu"), 0, 1)
        assert not torch.distributed.is_initialized()


def test_processes_join_and_part(tmp_path):
    (tmp_path / "joins.py").write_text(JOINS)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(tmp_path / "joins.py"),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["0 of 2 on cpu: 3", "1 of 2 on cpu: 3"]


@pytest.mark.parametrize(
    "make", [lambda: SampleGrids("nowhere", None, every=0), lambda: PowerEMA(trainer().denoiser, every=0)]
)
def test_every_no_step(make):
    with pytest.raises(ValueError, match="every: expected at least 1 step, got 0"):
        make()
