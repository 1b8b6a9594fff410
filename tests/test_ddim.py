"""DDIM: the same states as diffusers at every step, the marginals, there and back, bad input."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from diffusion_nb.book.claims import monte_carlo
from diffusion_nb.denoisers import Clip, Denoiser, Prediction
from diffusion_nb.forward import posterior_steps, q_sample
from diffusion_nb.grids import logsnr_grid, quadratic_grid, respaced_grid, strided_grid, time_grid
from diffusion_nb.mixtures import GaussianMixture, GMMDenoiser, random_mixture
from diffusion_nb.noise import Noise
from diffusion_nb.samplers.linear import ddim, ddpm, invert, slerp
from diffusion_nb.schedules import (
    CosineSchedule,
    DDPMSchedule,
    EDMSchedule,
    VESchedule,
    VPSchedule,
    cosine_betas,
    linear_betas,
)
from diffusion_nb.util.checks import expand_as

F64, T, S = torch.float64, 1000, 20
NOISE = Noise(range(8), (2,), dtype=F64)
BETAS = {"linear": linear_betas(T), "cosine": cosine_betas(T)}
SCHEDULES = {
    "linear": DDPMSchedule(linear_betas()),
    "cosine betas": DDPMSchedule(cosine_betas()),
    "cosine": CosineSchedule(),
    "vp": VPSchedule(),
    "ve": VESchedule(),
    "edm": EDMSchedule(),
}
every = pytest.mark.parametrize("name", SCHEDULES)


def best(schedule=SCHEDULES["linear"]):
    return GMMDenoiser(random_mixture(3), schedule)


def start(schedule, t=1.0, noise=NOISE):
    return schedule(torch.tensor(t, dtype=F64))[1] * noise(0)


def states(sampler, *args, **options):
    found = []
    sampler(*args, **options, callback=lambda i, x, pred: found.append(x))
    return torch.stack(found)


class Knows(Denoiser):
    "A denoiser that has seen the answer, and counts its calls."

    def __init__(self, x0, schedule):
        super().__init__()
        self.x0, self.schedule, self.times = x0, schedule, []

    def forward(self, x_t, t):
        self.times.append(float(t))
        alpha, sigma = (expand_as(c, x_t) for c in self.schedule(t))
        return Prediction(x_t, alpha, sigma, self.x0)


# diffusers


def scheduler(betas, spacing, **options) -> DDIMScheduler:
    "Theirs with its tables, which it keeps in float32, computed again in float64."
    theirs = DDIMScheduler(T, timestep_spacing=spacing, **({"clip_sample": False} | options))
    theirs.alphas_cumprod = (1 - betas).cumprod(0)
    theirs.final_alpha_cumprod = torch.ones((), dtype=F64)
    theirs.set_timesteps(S)
    return theirs


def time(i: int) -> float:
    "Our time of their index; all indices before the first stand for the data."
    return max(i + 1, 0) / T


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("betas", BETAS)
def test_every_step_of_diffusers(betas, spacing, eta):
    theirs, ours = scheduler(BETAS[betas], spacing), best(DDPMSchedule(BETAS[betas]))
    x = NOISE(0)
    for k, i in enumerate(theirs.timesteps.tolist()):
        # Theirs steps by T // S whatever the spacing, so that with linspace a step does not end where the next begins.
        ts = torch.tensor([time(i), time(max(i - T // S, -1))], dtype=F64)
        got = ddim(ours, x, ts, eta, noise=lambda j, k=k: NOISE(k + j))
        eps = ours(x, ts[0]).eps
        x = theirs.step(eps, i, x, eta=eta, variance_noise=NOISE(k + 1)).prev_sample
        # x̂0 is up to 2e4 at the end of the cosine chain, as x/α; then 1e-12 of that is what rounding leaves
        torch.testing.assert_close(got, x, rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_whole_walks_of_diffusers(spacing, eta):
    theirs, ours = scheduler(BETAS["linear"], spacing), best()
    ts = torch.tensor([time(i) for i in theirs.timesteps.tolist()] + [0.0], dtype=F64)
    got, x = states(ddim, ours, NOISE(0), ts, eta=eta, noise=NOISE), NOISE(0)
    for k, i in enumerate(theirs.timesteps.tolist()):
        eps = ours(x, torch.tensor(time(i), dtype=F64)).eps
        x = theirs.step(eps, i, x, eta=eta, variance_noise=NOISE(k + 1)).prev_sample
        torch.testing.assert_close(got[k], x, rtol=0, atol=1e-10)
    assert len(got) == S and got[-1].std() > 0.1


def test_clipped_walk_of_diffusers():
    theirs, ours = scheduler(BETAS["linear"], "trailing", clip_sample=True), best()
    ts = torch.tensor([time(i) for i in theirs.timesteps.tolist()] + [0.0], dtype=F64)
    got, x = states(ddim, Clip(ours), NOISE(0), ts, eta=0.3, noise=NOISE), NOISE(0)
    assert got[-1].abs().max() == 1  # something was clipped
    for k, i in enumerate(theirs.timesteps.tolist()):
        eps = ours(x, torch.tensor(time(i), dtype=F64)).eps
        step = theirs.step(eps, i, x, eta=0.3, use_clipped_model_output=True, variance_noise=NOISE(k + 1))
        x = step.prev_sample
        torch.testing.assert_close(got[k], x, rtol=0, atol=1e-10)


# the family


@every
def test_eta_one_is_ddpm(name):
    denoiser = best(SCHEDULES[name])
    x, ts = start(denoiser.schedule), time_grid(15)
    torch.testing.assert_close(
        states(ddim, denoiser, x, ts, eta=1.0, noise=NOISE),
        states(ddpm, denoiser, x, ts, noise=NOISE),
        rtol=1e-9,
        atol=1e-9,
    )


@every
def test_without_fresh_noise_the_first_noise_stays(name):
    schedule, x0 = SCHEDULES[name], random_mixture(3).sample(8)[0]
    ts = time_grid(12)
    x = q_sample(schedule, x0, ts[0], NOISE(0))
    got = states(ddim, Knows(x0, schedule), x, ts)
    for x, s in zip(got, ts[1:], strict=True):
        torch.testing.assert_close(x, q_sample(schedule, x0, s, NOISE(0)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.5, 1.0, 1.1])
@every
def test_marginals_at_every_step(name, eta):
    n, schedule = 20_000, SCHEDULES[name]
    noise, x0 = Noise(range(n), (2,), dtype=F64), random_mixture(3).sample(n)[0]
    ts = torch.linspace(0.6, 0.2, 41, dtype=F64)
    got = states(ddim, Knows(x0, schedule), q_sample(schedule, x0, ts[0], noise(0)), ts, eta=eta, noise=noise)
    for x, s in list(zip(got, ts[1:], strict=True))[::10]:
        alpha, sigma = schedule(s)
        rest = (x - alpha * x0) / sigma
        assert monte_carlo(torch.cat([rest, rest**2 - 1, rest * x0, rest[:, :1] * rest[:, 1:]], dim=1), 0.0).holds


@every
def test_gaussian_data_keep_their_width(name):
    "For data N(0, c²) the deterministic flow is x_t ∝ sd(x_t), exactly; Euler's method gets there to first order."
    schedule, c = SCHEDULES[name], 0.5
    one = GaussianMixture(torch.ones(1), torch.zeros(1, 2), c**2 * torch.eye(2, dtype=F64)[None])
    errors = []
    for n in (400, 800):
        ts = time_grid(n, end=0.01)
        x = ddim(GMMDenoiser(one, schedule), start(schedule), ts)
        (a1, s1), (a0, s0) = schedule(ts[0]), schedule(ts[-1])
        want = start(schedule) * ((a0**2 * c**2 + s0**2) / (a1**2 * c**2 + s1**2)).sqrt()
        errors.append((x - want).abs().max().item())
    assert errors[1] < 0.03 and 1.7 < errors[0] / errors[1] < 2.3


def test_only_the_steps_noise_is_used():
    "One step from nothing: what arrives is eta √β̃ noise(1)."
    ts = torch.tensor([0.5, 0.4], dtype=F64)
    step = posterior_steps(SCHEDULES["linear"], ts[1], ts[0])
    for eta in (0.25, 0.5, 1.0):
        got = ddim(Knows(torch.zeros(8, 2, dtype=F64), SCHEDULES["linear"]), 0 * NOISE(0), ts, eta, noise=NOISE)
        torch.testing.assert_close(got, eta * step.small.sqrt() * NOISE(1), rtol=1e-12, atol=0)


# what a sampler promises


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_cut_in_two_and_alone(eta):
    ts, full = time_grid(20), ddim(best(), NOISE(0), time_grid(20), eta, noise=NOISE)
    half = ddim(best(), NOISE(0), ts[:9], eta, noise=NOISE)
    assert ddim(best(), half, ts[8:], eta, noise=lambda k: NOISE(8 + k)).allclose(full, rtol=0, atol=1e-12)
    alone = Noise([5], (2,), dtype=F64)
    torch.testing.assert_close(ddim(best(), alone(0), ts, eta, noise=alone), full[5:6], rtol=0, atol=1e-10)


def test_calls_callback_and_dtype():
    knows, seen = Knows(torch.zeros(8, 2), SCHEDULES["linear"]), []
    x = ddim(knows, NOISE(0).float(), time_grid(5), callback=lambda i, x, pred: seen.append((i, pred.x_t)))
    assert knows.times == time_grid(5)[:-1].tolist()  # never at the last time
    assert [i for i, _ in seen] == [0, 1, 2, 3, 4] and seen[0][1].equal(NOISE(0).float())
    assert x.dtype == torch.float32
    knows.times.clear()
    up = time_grid(5, end=0.01).flip(0)
    assert invert(knows, NOISE(0).float(), up).dtype == torch.float32
    assert knows.times == up[:-1].tolist()


def test_labels_reach_the_denoiser():
    y = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    free, told = (ddim(best(), NOISE(0), time_grid(50), **c) for c in ({}, {"y": y}))
    assert (free - told)[3].abs().max() < 1e-12 < (free - told).abs().max()  # 3: any
    up = time_grid(5, end=0.01).flip(0)
    assert not invert(best(), NOISE(0), up, y=y).allclose(invert(best(), NOISE(0), up))


# there and back


@every
def test_there_and_back(name):
    schedule, x0 = SCHEDULES[name], random_mixture(3).sample(64)[0]
    errors = []
    for n in (100, 200, 400):
        ts = time_grid(n, end=0.05)
        z = invert(best(schedule), x0, ts.flip(0))
        errors.append((ddim(best(schedule), z, ts) - x0).square().mean().sqrt().item())
    assert errors[2] < 0.05 and errors[0] > 1.7 * errors[1] > 2.9 * errors[2]


@every
def test_there_and_back_is_exact_where_the_guess_does_not_change(name):
    schedule, ts = SCHEDULES[name], time_grid(7, end=0.05)
    knows = Knows(random_mixture(3).sample(8)[0], schedule)
    x = start(schedule, 0.05)
    z = invert(knows, x, ts.flip(0))
    torch.testing.assert_close(ddim(knows, z, ts), x, rtol=0, atol=1e-9)
    alpha, sigma = schedule(ts)
    want = alpha[0] * knows.x0 + sigma[0] * (x - alpha[-1] * knows.x0) / sigma[-1]
    torch.testing.assert_close(z, want, rtol=1e-9, atol=1e-9)


# grids and arcs


@every
@pytest.mark.parametrize("n", [2, 3, 25])
def test_grids(name, n):
    schedule = SCHEDULES[name]
    for ts in (quadratic_grid(n), logsnr_grid(schedule, n), logsnr_grid(schedule, n, near=0.05)):
        assert ts.dtype == F64 and len(ts) == n + 1 and ts[0] == 1 and ts[-1] == 0 and (ts.diff() < 0).all()
    assert ts[-2] == 0.05
    gaps = schedule.logsnr(ts[:-1]).diff()
    torch.testing.assert_close(gaps, gaps.mean().expand(n - 1), rtol=1e-8, atol=1e-8)
    assert quadratic_grid(4).tolist() == [1, 0.5625, 0.25, 0.0625, 0]


@pytest.mark.parametrize("T, n", [(1000, 25), (1000, 1), (4000, 50), (100, 100), (10, 3)])
def test_grids_of_the_published_programs(T, n):
    "Evenly from the first step to the last, as diffusers' spacing `linspace`; every k-th from the first, as `leading`."
    both_ends = [int(v) + 1 for v in np.linspace(0, T - 1, n).round()][::-1]
    assert (T * respaced_grid(T, n)).round().int().tolist() == [*both_ends, 0]
    parts = (T * respaced_grid(T, 1, 2, 2)).round().int().tolist()
    assert parts == sorted(set(parts), reverse=True) and len(parts) == 6 and parts[-2:] == [1, 0] and parts[0] == T
    if T % n == 0:
        leading = [k * (T // n) + 1 for k in range(n)][::-1]
        assert (T * strided_grid(T, n)).round().int().tolist() == [*leading, 0]


def test_grids_that_there_are_not():
    with pytest.raises(ValueError, match="expected 1 to 5 steps in a stretch of 5 of T = 10; got 6"):
        respaced_grid(10, 5, 6)
    with pytest.raises(ValueError, match="no whole stride takes 300 of 1000 steps"):
        strided_grid(1000, 300)


def test_slerp():
    a, b = torch.tensor([[3.0, 0, 0]], dtype=F64), torch.tensor([[0.0, 3, 0]], dtype=F64)
    w = torch.linspace(0, 1, 7, dtype=F64)
    arc = slerp(a.expand(7, 3), b.expand(7, 3), w)
    want = 3 * torch.stack([(w * torch.pi / 2).cos(), (w * torch.pi / 2).sin(), 0 * w], dim=1)
    torch.testing.assert_close(arc, want, rtol=0, atol=1e-12)
    pictures = Noise(range(4), (1, 8, 8))
    torch.testing.assert_close(slerp(pictures(0), pictures(1), 1.0), pictures(1))
    torch.testing.assert_close(slerp(pictures(0), 2 * pictures(0), 0.5), 1.5 * pictures(0), rtol=0, atol=1e-5)


# bad input


@pytest.mark.parametrize(
    "match, call",
    {
        "noise: eta > 0": lambda: ddim(best(), NOISE(0), time_grid(5), 0.5),
        "eta: .* got -0.1": lambda: ddim(best(), NOISE(0), time_grid(5), -0.1, noise=NOISE),
        "eta: .* got nan": lambda: ddim(best(), NOISE(0), time_grid(5), float("nan"), noise=NOISE),
        "eta: .* got 3": lambda: ddim(best(), NOISE(0), time_grid(5), 3.0, noise=NOISE),
        "ts: .* fall": lambda: ddim(best(), NOISE(0), time_grid(5).flip(0)),
        "ts: expected times that fall": lambda: ddim(best(), NOISE(0), time_grid(5)[:1]),
        "t: .* from 0 to 2": lambda: ddim(best(), NOISE(0), 2 * time_grid(5)),
        "x: 16 of": lambda: ddim(best(), NOISE(0) * float("nan"), time_grid(5)),
        "noise: expected draws": lambda: ddim(best(), NOISE(0)[:3], time_grid(5), 0.5, noise=NOISE),
        "ts: .* rise": lambda: invert(best(), NOISE(0), time_grid(5, end=0.01)),
        "no noise to predict": lambda: invert(best(), NOISE(0), time_grid(5).flip(0)),
        "from 0.03 to 3": lambda: invert(best(), NOISE(0), 3 * time_grid(5, end=0.01).flip(0)),
        "x: 1 of": lambda: invert(best(), NOISE(0).index_fill(0, torch.tensor(0), torch.inf)[:1, :1], time_grid(5, end=0.01).flip(0)),
        "same shape": lambda: slerp(NOISE(0), NOISE(0)[:1], 0.5),
        "opposite": lambda: slerp(NOISE(0), -2 * NOISE(0), 0.5),
        "got n = 1": lambda: logsnr_grid(SCHEDULES["linear"], 1),
        "near = 0": lambda: logsnr_grid(SCHEDULES["linear"], 5, near=0),
        "near = 0.5": lambda: logsnr_grid(SCHEDULES["linear"], 5, near=0.5, start=0.5),
    }.items(),
)  # fmt: skip
def test_bad_input(match, call):
    with pytest.raises(ValueError, match=match):
        call()


def test_an_eta_of_one_is_never_refused():
    "Where a step loses nearly all its noise, β̃ is σ_s² up to rounding."
    for schedule in SCHEDULES.values():
        for ts in (time_grid(1), time_grid(2), torch.tensor([1.0, 1e-3, 0.0], dtype=F64)):
            ddim(best(schedule), start(schedule), ts, 1.0, noise=NOISE)
