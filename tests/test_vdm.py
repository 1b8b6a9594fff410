"""Learned schedules: clocks that rise whatever their weights, one backward pass for two goals, bounds, resume, bad input."""

import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from waves import wave

from diffusion_nb.data import Pictures
from diffusion_nb.denoisers import (
    Denoiser,
    NetDenoiser,
    Prediction,
    TimeWarped,
    X0EpsDenoiser,
    predict_noise_change,
    predict_x0,
)
from diffusion_nb.likelihood.continuous import VDMBits, vdm_bits
from diffusion_nb.losses.bound import prior_kl, vlb_weight
from diffusion_nb.losses.simple import denoising_loss
from diffusion_nb.losses.vdm import decoder_nll, vdm_loss, vdm_weight
from diffusion_nb.mixtures import GMMDenoiser, random_mixture
from diffusion_nb.nets.conditioning import FourierFeatures, GammaConditioning
from diffusion_nb.nets.unet import UNet, parameters
from diffusion_nb.noise import Noise
from diffusion_nb.recipes.vdm import vdm_denoiser, vdm_recipe, vdm_trainer
from diffusion_nb.schedules import (
    CosineSchedule,
    DDPMSchedule,
    EDMSchedule,
    LearnedSchedule,
    LinearGamma,
    MonotoneNet,
    MonotoneWarp,
    TimeWarpedSchedule,
    TruncatedTime,
    VESchedule,
    VPSchedule,
    gamma_rate,
    linear_betas,
)

F64 = torch.float64
INSIDE = torch.linspace(0.05, 0.95, 19, dtype=F64)
TINY = replace(vdm_recipe("digits"), width=8, steps=6, batch=8, warmup=2, soft_steps=16)


def scrambled(net, seed, scale=2.0):
    "The module with random weights."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(scale * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return net


def pictures(n=32, shape=(1, 8, 8), levels=17):
    g = torch.Generator().manual_seed(0)
    x = 2 * torch.randint(levels, (n, *shape), generator=g) / (levels - 1) - 1
    return Pictures(x, torch.arange(n) % 10, x, torch.arange(n) % 10)


# clocks


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**6), width=st.integers(1, 8), scale=st.floats(0, 10), first=st.floats(0, 0.9))
def test_a_clock_rises_whatever_its_weights(seed, width, scale, first):
    net = MonotoneNet(width)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    scrambled(net, seed, scale)
    u = MonotoneWarp(net)(torch.linspace(first, 1, 101, dtype=F64))
    near = 1e-12  # sums of one time and of 101 may differ in their last bits
    assert -near <= u[0] and abs(u[-1] - 1) < near and (u.diff() > (0 if scale < 3 else -near)).all()
    assert abs(MonotoneWarp(net)(torch.zeros(1, dtype=F64)).item()) < near


def test_a_learned_schedule_starts_near_the_straight_line_and_keeps_its_ends():
    schedule, t = LearnedSchedule(-8.0, 6.0), torch.linspace(0, 1, 33, dtype=F64)
    assert ((schedule.warp(t) - t).abs() < 0.05).all()
    for seed in range(3):
        scrambled(schedule.warp, seed, 1.0)
        assert torch.allclose(schedule.logsnr(t[[0, -1]]), torch.tensor([8.0, -6.0], dtype=F64))
        assert (schedule.logsnr(t).diff() < 0).all()
        alpha, sigma = schedule(t)
        assert torch.allclose(alpha**2 + sigma**2, torch.ones(33, dtype=F64))


@pytest.mark.parametrize("end, inward", [(0.0, 1e-6), (1.0, -1e-6)])
def test_a_clock_runs_at_its_ends_too(end, inward):
    for seed in range(20):
        warp = MonotoneWarp(scrambled(MonotoneNet(33), seed, 0.5))
        _, rate = torch.func.jvp(warp, (torch.tensor([end], dtype=F64),), (torch.ones(1, dtype=F64),))
        here, near = warp(torch.tensor([end, end + inward], dtype=F64))
        assert rate.item() == pytest.approx(((near - here) / inward).item(), rel=1e-3)


# weights


@pytest.mark.parametrize("schedule", [VPSchedule(), CosineSchedule(), VESchedule(), EDMSchedule(), LinearGamma(-8, 6), LearnedSchedule(-8, 6)],
                         ids=lambda s: type(s).__name__)  # fmt: skip
def test_weight_is_the_slope_of_the_signal_to_noise_ratio(schedule):
    h = 1e-6
    slope = (schedule.logsnr(INSIDE - h).exp() - schedule.logsnr(INSIDE + h).exp()) / (2 * h)
    assert torch.allclose(vdm_weight(schedule, INSIDE), slope / 2, rtol=1e-5)
    assert torch.allclose(
        vdm_weight(schedule, INSIDE), 1e6 * vlb_weight(10**6)(schedule, INSIDE + 5e-7), rtol=1e-4
    )


def test_weight_can_be_differentiated_by_what_the_schedule_learns():
    schedule, h = LearnedSchedule(-4.0, 3.0, 8), 1e-6
    scrambled(schedule.warp, 0, 0.5)
    for p in schedule.parameters():
        slope = torch.autograd.grad(vdm_weight(schedule, INSIDE).sum(), p)[0].flatten()[0].item()
        values = []
        for step in (h, -2 * h):
            with torch.no_grad():
                p.view(-1)[0] += step
                values.append(vdm_weight(schedule, INSIDE).sum().item())
        assert slope == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-4, abs=1e-5)


def test_another_clock_is_another_weight_and_the_same_integral():
    line, clock = LinearGamma(-6.0, 6.0), MonotoneWarp(scrambled(MonotoneNet(16), 3, 0.5))
    t = (torch.arange(20_000, dtype=F64) + 0.5) / 20_000
    f = lambda schedule: (vdm_weight(schedule, t) * schedule(t)[1] ** 2).mean()
    assert f(TimeWarped(GMMDenoiser(random_mixture(2), line), clock).schedule).item() == pytest.approx(
        f(line).item(), rel=1e-5
    )


def test_large_and_small_ratios():
    alpha, sigma = LinearGamma(-18.4, 18.4)(torch.tensor([0.0, 1.0]))
    small = math.exp(-9.2) / math.sqrt(1 + math.exp(-18.4))
    assert sigma[0].item() == pytest.approx(small, rel=1e-12)
    assert alpha[1].item() == pytest.approx(small, rel=1e-12)
    x, eps = pictures(4, levels=256).x, Noise(range(4), (1, 8, 8))(0)
    for first in (-18.4, -13.3, -8.0):  # float32 against float64
        line = LinearGamma(first, 5.0)
        exact = decoder_nll(line, x.double(), eps.double(), 256)
        assert torch.allclose(decoder_nll(line, x, eps, 256).double(), exact, rtol=1e-4, atol=1e-4)


# one backward pass


def test_one_backward_pass_gives_the_ends_the_mean_and_the_clock_the_mean_square():
    model = vdm_denoiser(TINY, (1, 8, 8))
    scrambled(model.denoiser.net, 1, 0.1), scrambled(model.warp, 2, 0.3)
    x0, y = pictures(8).x, torch.arange(8)
    t, eps = (torch.arange(8, dtype=F64) + 0.3) / 8, Noise(range(8), (1, 8, 8))(0)
    loss, line = vdm_loss(17)(model, x0, t, eps, y=y), model.denoiser.schedule
    diffusion = denoising_loss(model, x0, t, eps, vdm_weight, y=y)
    ends = (prior_kl(line, x0) + decoder_nll(line, x0, eps.roll(1, 0), 17)) / 64
    assert torch.allclose(loss, diffusion + ends, rtol=1e-4)
    loss.mean().backward()
    (by_mean,) = torch.autograd.grad((diffusion + ends).mean(), line.ends, retain_graph=True)
    assert torch.allclose(line.ends.grad, by_mean, rtol=1e-3, atol=1e-6)
    clock = list(model.warp.parameters())
    for p, g in zip(clock, torch.autograd.grad(diffusion.double().square().mean(), clock), strict=True):
        assert torch.allclose(p.grad, g, rtol=1e-3, atol=1e-3 * g.abs().max().item())


def test_no_gradients_no_hooks():
    model = vdm_denoiser(TINY, (1, 8, 8)).requires_grad_(False)
    assert (
        vdm_loss(17)(
            model, pictures(2).x, torch.tensor([0.2, 0.7]), torch.zeros(2, 1, 8, 8), y=torch.tensor([1, 2])
        )
        .isfinite()
        .all()
    )


# bits


def test_bits_of_a_picture_do_not_depend_on_its_batch():
    model, d = vdm_denoiser(TINY, (1, 8, 8)).requires_grad_(False), pictures(6)
    whole, parts = (vdm_bits(model, d.x, 17, times=5, batch=b, y=d.y) for b in (6, 4))
    alone = vdm_bits(model, d.x[3:4], 17, times=5, seeds=[3], y=d.y[3:4])
    for a, b, c in zip(whole, parts, alone, strict=True):
        assert torch.allclose(a, b, rtol=1e-5) and torch.allclose(a[3:4], c, rtol=1e-5)


class Knows(Denoiser):
    "Errs by a fixed amount of noise."

    def __init__(self, schedule, x0, off):
        super().__init__()
        self.schedule, self.x0, self.off = schedule, x0, off

    def forward(self, x_t, t):
        alpha, sigma = (c.to(x_t.dtype).reshape(-1, 1, 1, 1) for c in self.schedule(t))
        return Prediction(x_t, alpha, sigma, self.x0 + self.off * sigma / alpha)


@pytest.mark.parametrize("steps", [None, 7])
def test_bits_of_a_known_error(steps):
    line, x = LinearGamma(-7.0, 5.0), pictures(5).x.double()
    bits = vdm_bits(Knows(line, x, 0.3), x, 17, times=7, steps=steps)
    wanted = (
        0.09 * (6 if steps is None else 7 * math.expm1(12 / 7) / 2) / math.log(2)
    )  # ½ (γ1 - γ0), or of each step ½ expm1
    assert torch.allclose(bits.diffusion, torch.full((5,), wanted, dtype=F64))
    assert torch.allclose(bits.prior, prior_kl(line, x) / 64 / math.log(2)) and torch.equal(bits.total, sum(bits))


def test_bits_are_counted_in_float64():
    line, x = LinearGamma(-7.0, 5.0), pictures(5).x
    a, b = (vdm_bits(Knows(line, y, 0.3), y, 17, times=1).decoder for y in (x, x.double()))
    assert a.dtype == F64 and a.equal(b)


def test_bits_in_words():
    bits = VDMBits(*(torch.tensor(v, dtype=F64) for v in ([0.1, 0.3], [3.0, 5.0], [0.5, 1.5])))
    assert str(bits) == "5.200 ± 3.200 bits/dim = prior 0.2000 + diffusion 4.000 + decoder 1.000"
    assert "± inf" in str(VDMBits(*(v[:1] for v in bits)))


def test_decoder_is_bayes_rule_with_equal_levels():
    line, levels = LinearGamma(-3.0, 5.0), torch.tensor([-1.0, 0.0, 1.0], dtype=F64)
    alpha, sigma = line(torch.zeros(()))
    for x in levels:
        z = alpha * x + 0.7 * sigma
        density = torch.exp(-((z - alpha * levels) ** 2) / (2 * sigma**2))
        wanted = -(density[levels == x] / density.sum()).log()
        got = decoder_nll(line, x.reshape(1, 1), torch.tensor([[0.7]], dtype=F64), 3)
        assert torch.allclose(got, wanted)


# networks


def test_a_monotone_network_written_out():
    net, t = scrambled(MonotoneNet(3), 0), torch.linspace(0, 1, 5, dtype=F64)
    w1, w2, w3 = (torch.nn.functional.softplus(w) for w in (net.w1, net.w2, net.w3))
    line = w1 * t + net.b1
    steps = sum(w3[k] / (1 + (-w2[k] * line - net.b2[k]).exp()) for k in range(3)) / 3
    assert torch.allclose(net(t), line + steps)


def test_a_warped_schedule_takes_python_numbers():
    line, warp = VPSchedule(), TruncatedTime(0.2)
    assert TimeWarpedSchedule(line, warp).logsnr(0.3) == line.logsnr(torch.tensor(0.44, dtype=F64))
    straight = LinearGamma(-7.0, 5.0)
    assert straight.logsnr(0.3) == straight.logsnr(torch.tensor(0.3, dtype=F64))


def test_a_clock_that_starts_later():
    assert torch.allclose(
        TruncatedTime(0.2)(torch.tensor([0.0, 0.5, 1.0], dtype=F64)), torch.tensor([0.2, 0.6, 1.0], dtype=F64)
    )


def test_fourier_features_of_every_channel():
    class Sees(torch.nn.Module):
        def forward(self, x, t, y=None):
            return x

    x = torch.rand(2, 3, 4, 4)
    seen = FourierFeatures(Sees(), (7, 8))(x, torch.zeros(2))
    assert seen.shape == (2, 15, 4, 4) and seen[:, :3].equal(x)
    assert torch.allclose(seen[:, 3:6], torch.sin(128 * math.pi * x)) and torch.allclose(
        seen[:, 12:], torch.cos(256 * math.pi * x)
    )


def test_a_network_is_told_gamma_and_not_the_time():
    line = LinearGamma(-8.0, 6.0)
    tell = GammaConditioning(line)
    assert tell(torch.tensor([0.0, 0.5, 1.0])).tolist() == pytest.approx([0, 500, 1000])
    with torch.no_grad():
        line.ends.copy_(torch.tensor([-1.0, 13.0]))  # now γ = 6 is half way
    assert tell(torch.tensor([0.5])).item() == pytest.approx(1000)


@pytest.mark.parametrize("t", [0.0, 0.2, 0.9, 1.0])
def test_joint_blends_the_two_guesses(t):
    class Says(torch.nn.Module):
        def forward(self, x, t):
            return torch.cat([0 * x + 0.5, 0 * x - 2.0], dim=1)

    schedule, x = CosineSchedule(), torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    alpha, sigma = schedule(torch.tensor(t))
    pred = X0EpsDenoiser(NetDenoiser(Says(), schedule, predict_x0))(x, torch.tensor(t))
    assert torch.allclose(pred.x0, sigma**2 * 0.5 + alpha**2 * (x - sigma * -2.0) / alpha) and pred.extra is None


@pytest.mark.parametrize("name, changes, shape", [
    ("digits", {}, (1, 8, 8)),
    ("cifar10", dict(width=8, mults=(1, 2), blocks=1, soft_steps=16), (3, 8, 8)),
])  # fmt: skip
def test_both_recipes_train_at_toy_size(name, changes, shape):
    r = replace(vdm_recipe(name), **{"steps": 3, "batch": 4} | changes)
    trainer = vdm_trainer(r, *pictures(8, shape, r.levels)[:2], device="cpu")
    before = {n: p.detach().clone() for n, p in trainer.denoiser.named_parameters()}
    trainer.fit()
    moved = {n for n, p in trainer.denoiser.named_parameters() if not p.equal(before[n])}
    assert {"denoiser.schedule.ends", "warp.net.w2", "warp.net.w3"} <= moved and math.isfinite(
        trainer.losses[-1][1]
    )
    assert trainer.average.schedule.warp is trainer.average.warp  # one clock, averaged once
    assert trainer.average.denoiser.c_noise.schedule is trainer.average.denoiser.schedule


def test_resumed_training_is_the_same_and_keeps_float64(tmp_path):
    d, file = pictures(), tmp_path / "c.safetensors"
    whole = vdm_trainer(TINY, d.x, d.y, device="cpu").fit()
    first = vdm_trainer(TINY, d.x, d.y, device="cpu", checkpoint=file, save_every=3)
    with torch.random.fork_rng():
        for _ in range(3):
            first.train_step()
    first.save()
    saved = load_file(file)
    assert {
        saved[f"{part}.{name}"].dtype
        for part in ("net", "average", "exp_avg")
        for name in ("denoiser.schedule.ends", "warp.net.w3")
    } == {F64}
    resumed = vdm_trainer(TINY, d.x, d.y, device="cpu", checkpoint=file, save_every=3)
    assert resumed.step == 3
    for (name, p), (_, q) in zip(whole.named_parameters(), resumed.fit().named_parameters(), strict=True):
        assert p.equal(q), name


# bad input


class Plain(torch.nn.Module):
    def forward(self, x, t):
        return x


@pytest.mark.parametrize("bad, says", [
    (lambda: LinearGamma(5.0, -5.0), "first < last, -log SNR at the data and at the noise; got 5.0 and -5.0"),
    (lambda: LinearGamma(-math.inf, 5.0), "got -inf"),
    (lambda: LinearGamma(5.0, 5.0), "expected first < last"),
    (lambda: MonotoneNet(0), "width: expected one soft step or more; got 0"),
    (lambda: X0EpsDenoiser(NetDenoiser(Plain(), CosineSchedule(), predict_x0))(torch.zeros(2, 1, 4, 4), torch.tensor(0.5)), "channels_out=2 * C"),
    (lambda: vdm_loss(17)(GMMDenoiser(random_mixture(2), CosineSchedule()), torch.zeros(2, 2), torch.tensor([0.5, 0.6]), torch.zeros(2, 2)),
     "expected a TimeWarped denoiser over a LinearGamma schedule; got GMMDenoiser over NoneType"),
    (lambda: vdm_loss(17)(TimeWarped(GMMDenoiser(random_mixture(2), CosineSchedule()), TruncatedTime(0.1)), torch.zeros(2, 2), torch.ones(2), torch.zeros(2, 2)),
     "got TimeWarped over CosineSchedule"),
    (lambda: vdm_bits(GMMDenoiser(random_mixture(2), DDPMSchedule(linear_betas())), torch.zeros(2, 2), 3), "log SNR is [inf,"),
    (lambda: vdm_bits(GMMDenoiser(random_mixture(2), CosineSchedule()), torch.zeros(2, 2), 4), "expected pictures of 4 grey levels"),
    (lambda: vdm_bits(GMMDenoiser(random_mixture(2), CosineSchedule()), torch.zeros(2, 2), 3, seeds=[1]), "seeds: expected 2, one for each picture; got 1"),
    (lambda: vdm_trainer(TINY, *pictures(levels=256)[:2], device="cpu"), "expected pictures of 17 grey levels"),
    (lambda: gamma_rate(CosineSchedule(), torch.tensor([1.5])), "expected times in [0, 1]"),
])  # fmt: skip
def test_what_is_refused(bad, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        bad()


# the network of VDM's program


def test_the_network_says_what_vdm_s_program_says():
    "Weights that are waves, the scales of normalisations about 1; theirs has no bias where the time enters."
    net = UNet(15, 128, (1,), 2, (), channels_out=3).double().eval()
    for k, (name, v) in enumerate(sorted(net.state_dict().items())):
        made = 0.2 * wave(*v.shape, k=k) + (v.ndim == 1 and name.endswith("weight"))
        v.copy_(made * (not name.endswith("time.bias")))
    t, line = torch.tensor([0.3, 0.9], dtype=torch.float64), LinearGamma(-13.3, 5.0)
    denoiser = NetDenoiser(
        FourierFeatures(net, (7, 8)), line, predict_noise_change, c_noise=GammaConditioning(line)
    )
    eps = denoiser(wave(2, 3, 8, 8), t).eps
    printed = [2.8152107502, 6.5715766117, -8.3410340850, -0.8359659067, -0.0986921962, -2.8482732983, 6.8182938245, -8.4000508448]  # fmt: skip
    torch.testing.assert_close(eps.flatten()[::53].detach(), torch.tensor(printed, dtype=torch.float64), rtol=0, atol=1e-6)  # fmt: skip


def test_the_paper_s_recipe_has_the_paper_s_network():
    "As many numbers as in their program, counted there at two blocks (3,486,979): its input of labels, 4 × 128, ours biases where the time enters."
    assert parameters(UNet(15, 128, (1,), 2, (), channels_out=3)) - 7 * 128 + 4 * 128 == 3_486_979
    r = vdm_recipe("cifar10-paper")
    with torch.device("meta"):
        net = r.network(15, channels_out=3)
    assert len(net.down) == 32 and len(net.up) == 33 and r.attention == () and r.mults == (1,)
    small = replace(r, width=8, blocks=1)
    model = vdm_denoiser(small, (3, 8, 8))
    assert model.denoiser.predict is predict_noise_change and model.denoiser.net.exponents == (7, 8)
