"""The optimal reverse variance: its bounds, the paper's letters, Gaussian data, batches, repriced bits, bad input."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_nb.book.claims import monte_carlo
from diffusion_nb.denoisers import Denoiser, Prediction
from diffusion_nb.forward import Step, posterior_steps, q_sample
from diffusion_nb.grids import time_grid, truncated_grid
from diffusion_nb.likelihood.bits import bits_per_dim, bits_with_variance, fitted_variance
from diffusion_nb.losses.bound import gaussian_kl
from diffusion_nb.mixtures import GaussianMixture, GMMDenoiser, random_mixture
from diffusion_nb.noise import Noise
from diffusion_nb.samplers.linear import ddpm
from diffusion_nb.schedules import CosineSchedule, DDPMSchedule, VESchedule, VPSchedule, linear_betas
from diffusion_nb.util.checks import expand_as
from diffusion_nb.variances import (
    Moments,
    analytic_variance,
    best_trajectory,
    expected_eps2,
    fixed_large,
    fixed_small,
)

F64, INF = torch.float64, math.inf
SCHEDULES = {
    "linear": DDPMSchedule(linear_betas()),
    "cosine": CosineSchedule(),
    "vp": VPSchedule(),
    "ve": VESchedule(),
}
every = pytest.mark.parametrize("name", SCHEDULES)


class Shrinks(Denoiser):
    "A poor guess: x_t times a number that its label names. Knows its calls."

    def __init__(self, schedule):
        super().__init__()
        self.schedule, self.times = schedule, []

    def forward(self, x_t, t, y):
        self.times.append(float(t))
        alpha, sigma = (expand_as(c, x_t) for c in self.schedule(t))
        return Prediction(x_t, alpha, sigma, x_t * expand_as(y / 10, x_t))


def steps_of(schedule, ts):
    coefficients = posterior_steps(schedule, ts[1:], ts[:-1])
    return [Step._make(row) for row in zip(*(c.tolist() for c in coefficients), strict=True)]


def pictures(n, levels=17):
    u = torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return (u * (levels - 1)).round() / (levels - 1) * 2 - 1


def moments(gamma, ratio):
    one = torch.ones(1, dtype=F64)
    return Moments(0.5 * one, ratio * one, gamma * torch.ones(2, 1, dtype=F64), 0.3 * torch.ones(2, 1, dtype=F64))


# the formula and its bounds


@settings(deadline=None, max_examples=50)
@given(st.floats(-1, 3), st.floats(1e-6, 1e6), st.floats(0.01, 10))
def test_spread_is_the_formula_where_the_bounds_allow_it(gamma, ratio, half):
    got, plain = moments(gamma, ratio).spread(-half, half).item(), ratio * (1 - gamma)
    assert 0 <= got <= min(ratio, half**2) * (1 + 1e-9)
    assert got == pytest.approx(min(max(plain, 0), ratio, half**2), rel=1e-6, abs=1e-9 * ratio)


@pytest.mark.parametrize("gamma", [-0.5, 0.3, 1.2])
def test_the_range_of_the_data_counts_by_half_its_width(gamma):
    assert moments(gamma, 1e9).spread(0, 3).item() in (0.0, pytest.approx(2.25))
    assert moments(gamma, 1e9).spread().item() in (0.0, 1.0)  # pictures are in [-1, 1]


@every
def test_between_its_bounds_on_every_schedule(name):
    schedule, ts, x0 = SCHEDULES[name], truncated_grid(12, 0.03), pictures(6)
    var = analytic_variance(expected_eps2(Shrinks(schedule), x0, ts, y=torch.arange(6)))
    for step in steps_of(schedule, ts):
        alpha, sigma = (c.item() for c in schedule(torch.tensor(step.t, dtype=F64)))
        v = var(None, step)
        assert step.small <= v <= (step.small + step.b**2 * min(1, (sigma / alpha) ** 2)) * (1 + 1e-9)


def test_the_paper_in_its_own_letters():
    "σ_n² = λ_n² + (√(β̄_n/α_n) - √(β̄_{n-1} - λ_n²))² (1 - β̄_n Γ_n) on a strided linear chain, Γ_n the squared score."
    schedule, ts = SCHEDULES["linear"], time_grid(20)
    found = expected_eps2(GMMDenoiser(random_mixture(3), schedule), random_mixture(3).sample(500)[0], ts)
    abar = torch.cat([torch.ones(1, dtype=F64), (1 - linear_betas()).cumprod(0)])[::50].flip(0)
    bbar, ratio = 1 - abar, abar[:-1] / abar[1:]  # from noise to data; ratio: α_n of the strided chain
    lam2 = bbar[1:] / bbar[:-1] * (1 - ratio)
    score2 = found.gamma / bbar[:-1]
    want = lam2 + ((bbar[:-1] / ratio).sqrt() - (bbar[1:] - lam2).sqrt()) ** 2 * (
        1 - bbar[:-1] * score2
    ).clamp_min(0)
    got = torch.tensor(
        [analytic_variance(found, -INF, INF)(None, step) for step in steps_of(schedule, ts)], dtype=F64
    )
    assert torch.allclose(got, want, rtol=1e-8)


@pytest.mark.parametrize("name", ["linear", "cosine", "vp"])
def test_beta_for_standard_normal_data(name):
    schedule, ts, n = SCHEDULES[name], torch.tensor([0.7, 0.4, 0.2, 0.0], dtype=F64), 4000
    normal = GaussianMixture([1.0], [[0.0, 0.0]], torch.eye(2)[None])
    found = expected_eps2(GMMDenoiser(normal, schedule), normal.sample(n)[0], ts)
    sigma = schedule(found.ts)[1]
    assert monte_carlo(found.eps2, sigma**2).holds  # Γ = σ², so that m = σ²
    error = found.eps2.std(0) / n**0.5
    assert torch.allclose(found.error, error)
    var = analytic_variance(found, -INF, INF)
    for step, ratio, e in zip(steps_of(schedule, ts), found.ratio, error, strict=True):
        assert abs(var(None, step) - step.large) <= 5 * step.b**2 * ratio * e


@every
def test_an_exact_denoiser_makes_it_the_fitted_variance(name):
    mixture = random_mixture(3)
    found = expected_eps2(GMMDenoiser(mixture, SCHEDULES[name]), mixture.sample(3000)[0], time_grid(5, end=0.05))
    assert monte_carlo(found.ratio * (1 - found.eps2) - found.mse, 0.0).holds


# the code


def test_moments_depend_on_no_batch_and_take_each_picture_with_its_own_noise_and_label():
    x0, y, ts = pictures(7), torch.arange(7), time_grid(4)
    whole = expected_eps2(Shrinks(SCHEDULES["cosine"]), x0, ts, y=y)
    for batch in (1, 3):
        parts = expected_eps2(Shrinks(SCHEDULES["cosine"]), x0, ts, batch=batch, y=y)
        assert torch.equal(parts.eps2, whole.eps2) and torch.equal(parts.mse, whole.mse)
    some = expected_eps2(Shrinks(SCHEDULES["cosine"]), x0[4:], ts, seeds=range(4, 7), y=y[4:])
    assert torch.equal(some.eps2, whole.eps2[4:])
    alpha, sigma = SCHEDULES["cosine"](ts[1])
    x_t = q_sample(SCHEDULES["cosine"], x0, ts[1], Noise(range(7), (1, 4, 4))(1))
    guess = x_t * (y / 10)[:, None, None, None]
    assert torch.allclose(whole.mse[:, 1], (guess - x0).double().square().flatten(1).mean(1), atol=1e-6)
    eps = (x_t - alpha.float() * guess) / sigma.float()
    assert torch.allclose(whole.eps2[:, 1], eps.double().square().flatten(1).mean(1), atol=1e-6)


def test_a_sampler_grid_is_asked_at_all_but_the_last_time():
    model, ts = Shrinks(SCHEDULES["cosine"]), time_grid(4)
    found = expected_eps2(model, pictures(2), ts, y=torch.arange(2))
    assert model.times == ts[:-1].tolist() == found.ts.tolist() and found.eps2.shape == (2, 4)
    assert expected_eps2(model, pictures(2), ts[:-1], y=torch.arange(2)).ts.tolist() == ts[:-1].tolist()


def test_it_is_a_variance_for_the_sampler_and_for_the_bound():
    ts, y, x0 = time_grid(6), torch.arange(8), pictures(8)
    model, noise = Shrinks(SCHEDULES["cosine"]), Noise(range(8), (1, 4, 4))
    found = expected_eps2(model, x0, ts, y=y)
    drawn = [
        ddpm(model, noise(0), ts, noise=noise, var=v(found), y=y) for v in (analytic_variance, fitted_variance)
    ]
    assert all(torch.isfinite(x).all() and x.dtype == torch.float32 for x in drawn) and not drawn[0].equal(
        drawn[1]
    )
    bits = bits_per_dim(
        model, x0, ts, levels=17, var=analytic_variance(found), decoder_var=analytic_variance(found), y=y
    )
    assert torch.isfinite(bits.total).all()


@every
def test_repriced_bits_are_those_of_a_new_pass(name):
    schedule, ts, y, x0 = SCHEDULES[name], truncated_grid(8, 0.05), torch.arange(8), pictures(8)
    first = bits_per_dim(Shrinks(schedule), x0, ts, levels=17, var=fixed_large, y=y)
    found = expected_eps2(Shrinks(schedule), x0, ts, y=y)
    for var in (fixed_small, fixed_large, fitted_variance(first), analytic_variance(found)):
        again = bits_per_dim(Shrinks(schedule), x0, ts, levels=17, var=var, y=y)
        mine = bits_with_variance(first, schedule, var)
        assert torch.allclose(mine.steps, again.steps, rtol=1e-4, atol=1e-5)
        assert torch.equal(mine.decoder, again.decoder) and torch.equal(mine.prior, again.prior)


# bad input


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda m, x: expected_eps2(m, x[:1], time_grid(3), y=torch.arange(1)), "two pictures"),
        (lambda m, x: expected_eps2(m, x, torch.tensor([0.5, -0.1]), y=torch.arange(4)), "times above 0"),
        (lambda m, x: expected_eps2(m, x, torch.tensor([0.0]), y=torch.arange(4)), "times above 0"),
        (lambda m, x: expected_eps2(m, x, torch.tensor([1.5, 0.5]), y=torch.arange(4)), r"times in \[0, 1\]"),
        (lambda m, x: expected_eps2(m, x, time_grid(3), seeds=range(9), y=torch.arange(4)), "seeds: expected 4"),
        (lambda m, x: expected_eps2(m, x, time_grid(3), y=torch.arange(3)), "y: expected 4"),
        (lambda m, x: expected_eps2(m, x.to(torch.uint8), time_grid(3), y=torch.arange(4)), "floating-point"),
        (lambda m, x: analytic_variance(expected_eps2(m, x, time_grid(3), y=torch.arange(4)), 1, 1), "low < high"),
    ],
)
def test_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call(Shrinks(SCHEDULES["cosine"]), pictures(4))


def test_a_time_without_moments_is_named():
    var = analytic_variance(
        expected_eps2(Shrinks(SCHEDULES["cosine"]), pictures(4), time_grid(4), y=torch.arange(4))
    )
    with pytest.raises(KeyError, match="0.3"):
        var(None, steps_of(SCHEDULES["cosine"], torch.tensor([0.3, 0.1], dtype=F64))[0])


def test_the_best_trajectory_is_the_best_of_all():
    schedule, ts = CosineSchedule(), torch.tensor([1.0, 0.8, 0.75, 0.5, 0.3, 0.1, 0.02], dtype=torch.float64)
    alpha, sigma = schedule(ts)
    gamma = torch.tensor([0.999, 0.9, 0.88, 0.7, 0.6, 0.3, 0.2], dtype=torch.float64)
    moments = Moments(ts, (sigma / alpha) ** 2, gamma[None], gamma[None])
    spread = dict(zip(ts.tolist(), moments.spread().tolist(), strict=True))

    def price(way):
        total = 0.0
        for t, s in itertools.pairwise(way):
            step = posterior_steps(schedule, torch.tensor(s), torch.tensor(t))
            best = step.small + step.b**2 * spread[t]
            total += gaussian_kl(torch.zeros(()), step.small, torch.zeros(()), best).item() + (step.b**2 * spread[t] / best / 2).item()  # fmt: skip
        return total

    for n in range(1, 7):
        ways = [(1.0, *middle, 0.02) for middle in itertools.combinations(ts[1:-1].tolist(), n - 1)]
        got = best_trajectory(moments, schedule, n)
        assert got.tolist() == pytest.approx(min(ways, key=price)), n
    for n in (0, 7):
        with pytest.raises(ValueError, match="n: expected 1 to 6 steps, of 7 times"):
            best_trajectory(moments, schedule, n)
