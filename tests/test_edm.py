"""EDM's preconditioning and times: diffusers' numbers, variance one, and the same function under any scale."""

import math

import pytest
import torch
from diffusers import EDMEulerScheduler
from torch import nn

from diffusion_nb.denoisers import NetDenoiser, edm_input, edm_time, predict_edm, predict_v
from diffusion_nb.grids import edm_grid
from diffusion_nb.nets.song import SongUNet
from diffusion_nb.noise import Noise
from diffusion_nb.schedules import CosineSchedule, EDMSchedule, VPSchedule
from diffusion_nb.time_samplers import log_normal_times
from diffusion_nb.training.augment import edm_augment, turned, warped
from diffusion_nb.training.batches import flip_half
from diffusion_nb.training.trainer import Trainer

F64 = torch.float64
X = Noise(range(6), (1, 4, 4), dtype=F64)


class Told(nn.Module):
    "Answers with a function of its input and of the time it is told, and keeps both."

    def forward(self, x, time):
        self.x, self.time = x, time
        return (3 * x).sin() + time.reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("sigma", [0.002, 0.3, 5.0, 80.0])
def test_the_numbers_of_diffusers(sigma):
    theirs = EDMEulerScheduler(sigma_data=0.5)
    schedule, net, x = EDMSchedule(0.001, 100), Told(), sigma * X(0)
    t = torch.tensor(((sigma ** (1 / 7)) - 0.001 ** (1 / 7)) / (100 ** (1 / 7) - 0.001 ** (1 / 7)), dtype=F64)
    got = NetDenoiser(net, schedule, predict_edm(0.5), edm_input(0.5), edm_time(schedule))(x, t).x0
    torch.testing.assert_close(net.x, theirs.precondition_inputs(x, sigma), rtol=1e-9, atol=0)
    torch.testing.assert_close(net.time[0].item(), theirs.precondition_noise(sigma).item(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        got, theirs.precondition_outputs(x, net(net.x, net.time), sigma), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("schedule", [VPSchedule(), CosineSchedule(), EDMSchedule()])
@pytest.mark.parametrize("t", [0.05, 0.5, 0.95])
def test_input_and_target_have_variance_one(schedule, t):
    s, (alpha, sigma) = 0.7, schedule(torch.tensor(t, dtype=F64))
    c_skip, c_out = predict_edm(s)(alpha, sigma)
    assert (edm_input(s)(alpha, sigma) ** 2 * (alpha**2 * s**2 + sigma**2)).item() == pytest.approx(1)
    assert (((1 - c_skip * alpha) ** 2 * s**2 + c_skip**2 * sigma**2) / c_out**2).item() == pytest.approx(1)


def test_for_data_of_variance_one_it_is_the_velocity_turned_round():
    alpha, sigma = CosineSchedule()(torch.linspace(0.01, 1, 9, dtype=F64))
    ours, v = predict_edm(1.0)(alpha, sigma), predict_v(alpha, sigma)
    torch.testing.assert_close(ours[0], v[0]), torch.testing.assert_close(ours[1], -v[1])


@pytest.mark.parametrize("schedule", [EDMSchedule(), VPSchedule()])
def test_log_sigma_is_normal(schedule):
    u = (torch.arange(4001, dtype=F64) + 0.5) / 4001
    t = log_normal_times(schedule, -1.0, 0.8)(u, 7)
    alpha, sigma = schedule(t)
    log = (sigma / alpha).log()
    assert log.mean().item() == pytest.approx(-1.0, abs=1e-3) and log.std().item() == pytest.approx(0.8, rel=2e-3)
    assert (t.diff() > 0).all()


def test_edms_grid_on_edms_schedule():
    "Equation 5 of Karras et al. 2022: 80 to 0.002, then 0."
    i = torch.arange(18, dtype=torch.float64)
    want = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    alpha, sigma = EDMSchedule()(edm_grid(EDMSchedule(), 18, 0.002, 80.0))
    torch.testing.assert_close(sigma, torch.cat([want, torch.zeros(1, dtype=torch.float64)]), rtol=1e-12, atol=0)
    assert (alpha == 1).all()


# augmentation


def wave(x, y):
    return torch.sin(3 * x) * torch.cos(2 * y + 1) + 0.3 * y


def sampled(at=lambda p: p, n: int = 64):
    "A smooth picture (1, 1, n, n), looked at where `at` says, in units of half its width."
    places = (torch.arange(n, dtype=F64) - (n - 1) / 2) / (n / 2)
    p = at(torch.stack(torch.meshgrid(places, places, indexing="xy"), dim=-1))  # (n, n, 2): x, y
    return wave(p[..., 0], p[..., 1])[None, None]


@pytest.mark.parametrize("inverse, shift", [
    (torch.eye(2, dtype=F64), (4.0, 0.0)),
    (torch.eye(2, dtype=F64), (0.0, -2.5)),
    (turned(torch.tensor([0.4], dtype=F64))[0], (0.0, 0.0)),
    (torch.tensor([[1.2, 0.1], [-0.2, 0.7]], dtype=F64), (1.5, -2.0)),
])  # fmt: skip
def test_a_picture_is_looked_at_elsewhere(inverse, shift):
    shift = torch.tensor(shift, dtype=F64)
    want = sampled(lambda p: p @ inverse.T + shift / 32)
    got = warped(sampled(), inverse[None], shift[None])
    assert (
        (got - want)[..., 20:-20, 20:-20].abs().max()
        < 1e-2
        < 5e-2
        < (sampled() - want)[..., 20:-20, 20:-20].abs().max()
    )
    same = warped(sampled(), torch.eye(2, dtype=F64)[None], torch.zeros(1, 2, dtype=F64))
    torch.testing.assert_close(same, sampled(), rtol=0, atol=1e-12)


def told_of(n: int = 20_000, p: float = 0.12):
    u = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=F64)
    return edm_augment(torch.zeros(n, 1, 2, 2), u, p)[1]["augment"].double()


def test_how_often_and_how_far_pictures_are_augmented():
    "The nine numbers, as EDM's program has them: bounds of five standard errors, n = 20,000."
    told, n = told_of(), 20_000
    for column, share in {0: 0.5, 1: 0.06, 2: 0.12, 4: 0.12, 7: 0.12, 8: 0.12}.items():
        seen = (told[:, column] != 0).double().mean()
        assert abs(seen - share) < 5 * (share * (1 - share) / n) ** 0.5, column
    stretched = told[:, 5:7].norm(dim=1)
    for v in (told[:, 2], told[:, 7], told[:, 8], stretched):
        v = v[v != 0]
        assert abs(v.square().mean() - 1) < 5 * (2 / len(v)) ** 0.5  # standard normal
    cos, sin = told[:, 3] + 1, told[:, 4]
    assert (cos**2 + sin**2 - 1).abs().max() < 1e-6
    angle = torch.atan2(sin, cos)[sin != 0]
    assert abs(angle.abs().mean() - math.pi / 2) < 5 * math.pi / 12**0.5 / len(angle) ** 0.5
    some = stretched != 0
    assert (
        abs((told[some, 6] == 0).double().mean() - 0.5) < 5 * 0.5 / some.sum() ** 0.5
    )  # every second one along an axis
    assert ((told[:, 7] != 0) == (told[:, 8] != 0)).all()


def undone(row, sign):
    "Where a picture that was augmented as `row` says is looked at. sign: of the stretch, which the numbers do not tell where its axis is a random one."
    mirrored, upside_down, size, cos, sin, *stretch, tx, ty = row
    along_x = stretch[1] == 0
    axis = 0 * size if along_x else torch.atan2(stretch[1], stretch[0])
    stretch = sign * (stretch[0] if along_x else torch.stack(stretch).norm())
    along = torch.diag(torch.stack([-0.2 * stretch, 0.2 * stretch]).exp2())
    inverse = (-0.2 * size).exp2() * turned(torch.atan2(sin, cos + 1)[None])[0] @ turned(-axis[None])[0] @ along @ turned(axis[None])[0]  # fmt: skip
    flips, by = torch.stack([1 - 2 * mirrored, 1 - 2 * upside_down]), torch.stack([tx, ty]) / 4
    return lambda p: ((p - by) @ inverse.T) * flips


def test_what_the_network_is_told_is_what_was_done():
    "Read back from a smooth picture: mirrored, upside down, and then as the other seven numbers say."
    u = torch.rand(400, generator=torch.Generator().manual_seed(1), dtype=F64)
    made, about = edm_augment(sampled().expand(400, -1, -1, -1), u, p=0.5)
    rows, middle = about["augment"].double(), (..., slice(24, 40), slice(24, 40))
    off = torch.tensor([[(y - sampled(undone(row, sign)))[middle].abs().max() for sign in (1, -1)] for y, row in zip(made, rows, strict=True)])  # fmt: skip
    assert (off.amin(1) < 2e-2).sum() > 370  # all but those that were moved so far that the border is seen
    along_x = (rows[:, 6] == 0) & (rows[:, 5] != 0)  # here the sign is told
    assert (off[along_x, 0] < 2e-2).double().mean() > 0.9 > 0.3 > (off[along_x, 1] < 2e-2).double().mean()


def test_augmented_pictures_depend_on_their_number_alone():
    u = torch.rand(6, generator=torch.Generator().manual_seed(2), dtype=F64)
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    whole, about = edm_augment(x, u)
    part, about_part = edm_augment(x[2:3], u[2:3])
    torch.testing.assert_close(part[0], whole[2])
    assert about_part["augment"][0].equal(about["augment"][2])


def test_a_training_whose_network_is_told_how_pictures_were_augmented():
    torch.manual_seed(0)
    net = SongUNet(1, 8, (1,), 1, (), augment=9)
    nn.init.normal_(net.head[2].weight)
    x = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    options = dict(steps=2, lr=lambda k: 0.01, batch=4, seed=1, device="cpu")
    trainer = Trainer(NetDenoiser(net, CosineSchedule(), predict_v), x, augment=edm_augment, **options)
    (seen, _, _, cond), *_ = trainer.batches(0)
    turn = trainer.batches.uniform(0)[:, 2]
    want, about = edm_augment(x[trainer.batches.pick(trainer.batches.uniform(0))], turn)
    assert (seen - want).abs().max() < 1e-5 and cond["augment"].equal(about["augment"])
    before = net.augment.weight.clone()
    trainer.train_step(), trainer.train_step()  # the first one moves only what begins at zero
    assert not net.augment.weight.equal(before)
    assert Trainer(NetDenoiser(net, CosineSchedule(), predict_v), x, augment=flip_half, **options).train_step().isfinite()  # fmt: skip
