"""What holds for every schedule, every time and every seed."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from diffusion_nb.denoisers import Clip, NetDenoiser, Prediction, predict_eps, predict_score, predict_v, predict_x0
from diffusion_nb.forward import posterior_steps, q_posterior, q_step, transition
from diffusion_nb.grids import time_grid
from diffusion_nb.mixtures import GaussianMixture, GMMDenoiser, random_mixture, swiss_roll, two_moons
from diffusion_nb.noise import GAMMA, Noise
from diffusion_nb.samplers.heun import heun
from diffusion_nb.samplers.linear import ddim, ddpm, dpmpp_2m, dpmpp_2m_sde
from diffusion_nb.schedules import (
    CosineSchedule,
    DDPMSchedule,
    EDMSchedule,
    VESchedule,
    VPSchedule,
    cosine_betas,
    linear_betas,
)

settings.register_profile("book", derandomize=True, deadline=None, database=None, max_examples=100)
settings.load_profile("book")

VP = {
    "linear": DDPMSchedule(linear_betas()),
    "cosine": DDPMSchedule(cosine_betas()),
    "ten steps": DDPMSchedule(cosine_betas(10)),
    "one step": DDPMSchedule([0.3]),
    "continuous": VPSchedule(),
    "continuous cosine": CosineSchedule(),
}
VE = {"geometric": VESchedule(), "edm": EDMSchedule()}
every = pytest.mark.parametrize("name", [*VP, *VE])
variance_preserving = pytest.mark.parametrize("name", VP)

N = 2**16
ticks = st.integers(0, N)  # times are multiples of 1/N: two that differ, differ by enough to be told apart
seeds = st.integers(-(2**63), 2**63 - 1)
betas = st.lists(st.floats(1e-6, 0.999), min_size=1, max_size=40)
EXACT = dict(rtol=0, atol=0)


def F(x) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


def schedule(name):
    return {**VP, **VE}[name]


@every
def test_a_step_from_one_noise_to_more(name):
    f, x, eps, s = schedule(name), POINTS, NOISE(1), torch.linspace(0.1, 0.5, 50, dtype=torch.float64)
    (a, b), (c, d) = f(s), f(s + 0.3)  # alpha and sigma before and after
    want = (c / a)[:, None] * x + (d**2 - (c / a * b) ** 2).sqrt()[:, None] * eps
    torch.testing.assert_close(q_step(f, x, s, s + 0.3, eps), want)


@every
def test_times_may_be_python_numbers(name):
    "None of which is rounded to float32 on the way."
    for coefficients in (transition, posterior_steps):
        got, want = coefficients(schedule(name), 0.3, 0.7), coefficients(schedule(name), F(0.3), F(0.7))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# schedules


@every
@given(st.lists(ticks, min_size=2, max_size=20, unique=True))
def test_logsnr_falls_strictly(name, ks):
    logsnr = schedule(name).logsnr(F(sorted(ks)) / N)
    assert (logsnr[1:] < logsnr[:-1]).all()


@given(betas, st.lists(ticks, min_size=2, max_size=20, unique=True))
def test_logsnr_of_any_chain_falls_strictly(betas, ks):
    logsnr = DDPMSchedule(betas).logsnr(F(sorted(ks)) / N)
    # Past log SNR = -36 the noise is 1 to the last digit, but alpha still falls, and so must this.
    assert (logsnr[1:] < logsnr[:-1]).all()


@variance_preserving
@given(st.floats(0, 1))
def test_variance_is_preserved(name, t):
    alpha, sigma = schedule(name)(F(t))
    assert abs(alpha**2 + sigma**2 - 1) < 4e-16 * 4  # two roots, two squares and a sum, each rounded once


@pytest.mark.parametrize("name", VE)
@given(st.floats(0, 1))
def test_signal_is_kept_where_variance_explodes(name, t):
    alpha, sigma = schedule(name)(F(t))
    assert alpha == 1 and (sigma > 0 or t < 1e-30)  # EDM's, t⁷, runs out of float64


def test_ends_of_the_schedules():
    for name in VP:
        alpha, sigma = schedule(name)(F(0.0))
        assert alpha > 0.9999 and sigma < 1e-4
    for name, low, high in (("geometric", 0.01, 50.0), ("edm", 0.0, 80.0)):
        _, sigma = schedule(name)(F([0.0, 1.0]))
        torch.testing.assert_close(sigma, F([low, high]), rtol=1e-14, atol=0)


@every
@given(st.lists(st.floats(0, 1, width=32), max_size=9))
def test_shape_and_dtype_of_times(name, ts):
    f = schedule(name)
    together = f(torch.tensor(ts, dtype=torch.float32))
    for c in together:
        assert c.shape == (len(ts),) and c.dtype == torch.float64
    for i, t in enumerate(ts):
        one32, one64 = f(torch.tensor(t, dtype=torch.float32)), f(F(t))
        for whole, a, b in zip(together, one32, one64, strict=True):
            assert a.shape == b.shape == ()
            torch.testing.assert_close(a, b, **EXACT)  # a float32 is a float64
            torch.testing.assert_close(
                whole[i], b, rtol=1e-14, atol=0
            )  # alone or in a vector: rounding of exp, pow


@given(betas, st.data())
def test_chain_at_its_own_times(betas, data):
    f, T = DDPMSchedule(betas), len(betas)
    i = data.draw(st.integers(0, T))
    abar, noise = 1.0, 0.0
    for beta in betas[:i]:  # the recursion of the chain itself, not the closed form
        abar, noise = abar * (1 - beta), noise * (1 - beta) + beta
    alpha, sigma = f(F(i / T))
    # i / T · T misses i by an ulp, i.e. log ᾱ by 1e-15 of a step; sums of 40 logs lose as much.
    assert math.isclose(alpha**2, abar, rel_tol=1e-12) and math.isclose(sigma**2, noise, rel_tol=1e-12)


@given(st.integers(0, 1000))
def test_ddpm_chain_at_its_own_times(i):
    for f, beta in ((VP["linear"], linear_betas()), (VP["cosine"], cosine_betas())):
        abar = (1 - beta[:i]).prod()
        alpha, sigma = f(F(i) / 1000)
        torch.testing.assert_close(alpha**2, abar, rtol=1e-12, atol=0)
        torch.testing.assert_close(sigma**2, 1 - abar, rtol=0, atol=1e-13)  # 1 - ᾱ loses what sigma keeps


def test_little_noise_keeps_its_digits():
    _, sigma = DDPMSchedule([1e-9, 0.5])(F(0.5))
    torch.testing.assert_close(sigma**2, F(1e-9), rtol=1e-14, atol=0)


# q(x_t | x_s) and q(x_s | x_t, x_0)

three_times = st.lists(ticks, min_size=3, max_size=3, unique=True).map(lambda ks: F(sorted(ks)) / N)


@every
@given(three_times)
def test_transitions_compose(name, times):
    s, u, t = times
    f = schedule(name)
    (a_us, v_us), (a_tu, v_tu), (a_ts, v_ts) = transition(f, s, u), transition(f, u, t), transition(f, s, t)
    torch.testing.assert_close(a_tu * a_us, a_ts, rtol=1e-13, atol=0)
    # var = σ_t² (1 - exp(λ_t - λ_s)): each λ is right to some 1e-15 |λ|, |λ| < 50 here
    torch.testing.assert_close(a_tu**2 * v_us + v_tu, v_ts, rtol=0, atol=1e-13 * float(f(t)[1]) ** 2)
    assert (v_us >= 0) and (v_tu > 0) and (v_ts > 0)


@every
@given(three_times)
def test_transition_keeps_the_marginals(name, times):
    _, s, t = times
    (alpha_s, sigma_s), (alpha_t, sigma_t) = schedule(name)(s), schedule(name)(t)
    a, v = transition(schedule(name), s, t)
    torch.testing.assert_close(a * alpha_s, alpha_t, rtol=1e-14, atol=0)
    torch.testing.assert_close(a**2 * sigma_s**2 + v, sigma_t**2, rtol=1e-13, atol=0)


@every
@given(three_times, st.floats(-3, 3))
def test_posterior_keeps_the_marginals(name, times, x0):
    s, _, t = times
    f = schedule(name)
    (alpha_s, sigma_s), (alpha_t, sigma_t) = f(s), f(t)
    step = posterior_steps(f, s, t)
    torch.testing.assert_close(step.a * alpha_t + step.b, alpha_s, rtol=1e-12, atol=0)
    torch.testing.assert_close(step.a**2 * sigma_t**2 + step.small, sigma_s**2, rtol=1e-12, atol=1e-300)
    # Bayes: x_t and x_s have the same joint law forwards and backwards, so the same covariance
    a_ts, v_ts = transition(f, s, t)
    torch.testing.assert_close(step.a * sigma_t**2, a_ts * sigma_s**2, rtol=1e-12, atol=1e-300)
    torch.testing.assert_close(step.large, v_ts, rtol=1e-12, atol=0)
    x0 = F([[x0, 1.0]])
    mean, var = q_posterior(f, alpha_t * x0, x0, s, t)
    torch.testing.assert_close(mean, alpha_s * x0, rtol=1e-12, atol=1e-15)
    assert var == step.small


@every
def test_a_grid_of_steps_is_its_steps(name):
    grid = torch.linspace(0, 1, 8, dtype=torch.float64)
    together = posterior_steps(schedule(name), grid[:-1], grid[1:])
    for i in range(7):
        one = posterior_steps(schedule(name), grid[i], grid[i + 1])
        for a, b in zip(together, one, strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-12, atol=0)


# conversions

scales = st.floats(1e-3, 1e3)
values = st.floats(-10, 10)
ROWS = {
    predict_x0: lambda x0, eps, alpha, sigma: x0,
    predict_eps: lambda x0, eps, alpha, sigma: eps,
    predict_v: lambda x0, eps, alpha, sigma: alpha * eps - sigma * x0,
    predict_score: lambda x0, eps, alpha, sigma: -eps / sigma,
}
READ = {predict_x0: "x0", predict_eps: "eps", predict_v: "v", predict_score: "score"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.__name__)
@given(scales, scales, values, values)
def test_targets_round_trip(row, alpha, sigma, x0, eps):
    alpha, sigma, x0, eps = F(alpha), F(sigma), F([[x0]]), F([[eps]])
    x_t = alpha * x0 + sigma * eps
    target = ROWS[row](x0, eps, alpha, sigma)
    c_skip, c_out = row(alpha, sigma)
    guess = c_skip * x_t + c_out * target
    # The two terms cancel: rounding is 1e-16 of the larger, not of what is left of them.
    tol = 1e-14 * float((c_skip * x_t).abs() + (c_out * target).abs() + x0.abs()) + 1e-300
    torch.testing.assert_close(guess, x0, rtol=0, atol=tol)
    # And the net's target read backwards: from the guess of x0, by Prediction's own conversions
    pred = Prediction(x_t, alpha, sigma, x0)
    rounding = 1e-15 * float((x_t.abs() + (alpha * x0).abs()) / sigma)  # of eps
    factor = {"x0": 0.0, "eps": 1.0, "v": float(alpha), "score": 1 / float(sigma)}[READ[row]]
    tol = 4 * rounding * factor + 1e-14 * float(target.abs() + (sigma * x0).abs()) + 1e-300
    torch.testing.assert_close(getattr(pred, READ[row]), target, rtol=0, atol=tol)


@given(scales, scales, values, values)
def test_the_row_undoes_the_reading(alpha, sigma, x0, other):
    "x0 guessed from x_t, any x_t: read as eps, v or score, then turned back by its row."
    alpha, sigma, x0, x_t = F(alpha), F(sigma), F([[x0]]), F([[other]])
    pred = Prediction(x_t, alpha, sigma, x0)
    for row, name in READ.items():
        c_skip, c_out = row(alpha, sigma)
        a, b = c_skip * x_t, c_out * getattr(pred, name)
        tol = 1e-14 * float(a.abs() + b.abs() + x0.abs() + x_t.abs() / alpha) + 1e-300
        torch.testing.assert_close(a + b, x0, rtol=0, atol=tol)


# mixtures and denoisers, in three dimensions: the axes of a 2×2 covariance may come out as a symmetric matrix

SOLID = random_mixture(k=3, d=3)
NOISE = Noise(range(50), (3,), dtype=torch.float64)
POINTS = NOISE(0)


def in_torch(mixture: GaussianMixture) -> MixtureSameFamily:
    return MixtureSameFamily(Categorical(mixture.weights), MultivariateNormal(mixture.means, mixture.covs))


def test_density_of_a_mixture():
    torch.testing.assert_close(SOLID.log_prob(POINTS), in_torch(SOLID).log_prob(POINTS))


def test_exact_denoiser_has_the_score_of_the_noised_mixture():
    t, x = F(0.4), POINTS.clone().requires_grad_()
    best = GMMDenoiser(SOLID, VPSchedule())
    alpha, sigma = best.schedule(t)
    covs = alpha**2 * SOLID.covs + sigma**2 * torch.eye(3)
    log_prob = in_torch(GaussianMixture(SOLID.weights, alpha * SOLID.means, covs)).log_prob(x)
    torch.testing.assert_close(best.log_prob(POINTS, t), log_prob)
    torch.testing.assert_close(best(POINTS, t).score, torch.autograd.grad(log_prob.sum(), x)[0])


def test_covariance_of_what_the_picture_may_be_is_the_slope_of_the_guess():
    t, best, y = F(0.4), GMMDenoiser(SOLID, VPSchedule()), torch.arange(50) % 4  # 3 means any
    alpha, sigma = best.schedule(t)
    for cond in ({}, {"y": y}):
        slope = torch.func.jacrev(lambda x, cond=cond: best(x, t, **cond).x0.sum(0))(POINTS).transpose(0, 1)
        torch.testing.assert_close(best.covariance(POINTS, t, **cond), sigma**2 / alpha * slope)


def test_clip_holds_guesses_on_both_sides_and_passes_labels_on():
    best, t, y = GMMDenoiser(SOLID, VPSchedule()), F(0.1), torch.arange(50) % 4
    free = best(POINTS, t, y=y).x0
    held = Clip(best, -0.5, 0.5)(POINTS, t, y=y).x0
    assert free.min() < -0.5 and free.max() > 0.5
    assert torch.equal(held, free.clamp(-0.5, 0.5))


def test_rows_where_variance_is_not_preserved():
    alpha, sigma = F(3.0), F(4.0)
    rows = {
        predict_x0: (0, 1),
        predict_eps: (1 / 3, -4 / 3),
        predict_v: (3 / 25, -4 / 25),
        predict_score: (1 / 3, 16 / 3),
    }
    for predict, row in rows.items():
        torch.testing.assert_close(torch.stack(predict(alpha, sigma)), F(row).double())


def test_network_sees_its_input_scaled():
    scaled = NetDenoiser(lambda x, time: x, EDMSchedule(), predict_x0, c_in=lambda alpha, sigma: 1 / sigma)
    torch.testing.assert_close(scaled(POINTS, F(0.5)).x0, POINTS / scaled.schedule(F(0.5))[1])


def test_the_last_step_adds_no_noise():
    best, ts = GMMDenoiser(SOLID, EDMSchedule()), F([0.5, 0.0])
    step = posterior_steps(best.schedule, ts[1], ts[0])
    want = step.a * POINTS + step.b * best(POINTS, ts[0]).x0
    torch.testing.assert_close(ddpm(best, POINTS, ts, noise=NOISE, var=lambda pred, step: step.large), want)


def test_the_sampler_passes_labels_on():
    alone = GaussianMixture([1.0], SOLID.means[1:2], SOLID.covs[1:2])
    got, want = (
        ddpm(GMMDenoiser(mixture, VPSchedule()), POINTS, time_grid(5), noise=NOISE, **cond)
        for mixture, cond in ((SOLID, {"y": torch.ones(50).long()}), (alone, {}))
    )
    torch.testing.assert_close(got, want)


def test_two_moons_are_half_circles():
    x = two_moons(100, noise=0.0) + F([0.5, 0.25])
    radii = torch.stack([x.norm(dim=1), (x - F([1, 0.5])).norm(dim=1)])
    torch.testing.assert_close((radii - 1).abs().amin(0), torch.zeros(100).double())


def test_a_swiss_roll_winds_out_evenly():
    x = swiss_roll(100, noise=0.0)
    r = x.norm(dim=1)  # a tenth of the angle
    torch.testing.assert_close(x, r[:, None] * torch.stack([(10 * r).cos(), (10 * r).sin()], 1))
    assert 1.5 * math.pi < 10 * r.min() and 10 * r.max() < 4.5 * math.pi


@pytest.mark.parametrize("draw, noise", [(two_moons, 0.05), (swiss_roll, 0.5)])
def test_points_are_those_of_their_seed(draw, noise):
    assert (
        draw(9).equal(draw(9, 0, noise)) and not draw(9).equal(draw(9, 1)) and not draw(9).equal(draw(9, 0, 0.0))
    )


# noise


@given(st.lists(seeds, min_size=1, max_size=12), st.data())
def test_noise_of_a_sample_does_not_depend_on_its_batch(ss, data):
    shape = data.draw(st.lists(st.integers(1, 7), max_size=3))
    step = data.draw(st.integers(-5, 10_000))
    pick = data.draw(st.lists(st.integers(0, len(ss) - 1), min_size=1, max_size=12))
    whole = Noise(ss, shape)(step)
    assert whole.shape == (len(ss), *shape) and whole.isfinite().all()
    assert torch.equal(whole[pick], Noise([ss[i] for i in pick], shape)(step))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1,), (2,), (3,), (17, 19), (1, 8, 8)])
def test_noise_in_big_batches(shape):
    one = Noise(range(300), shape)(7)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # the larger of these are then parted between threads
    try:
        whole = Noise(range(300), shape)(7)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole, one)
    for pick in (range(1), range(299, 300), range(5, 20), range(0, 300, 7)):
        assert torch.equal(whole[list(pick)], Noise(pick, shape)(7))


@given(seeds, st.integers(0, 2**20), st.integers(0, 2**20))
def test_noise_is_a_function_of_seed_and_step(seed, j, k):
    noise = Noise([seed], (4,))
    first, other = noise(j), noise(k)
    assert torch.equal(first, noise(j))  # not of what was drawn between
    assert torch.equal(first, other) == (j == k)


@given(seeds, seeds)
def test_noise_of_other_seeds_differs(a, b):
    assert torch.equal(Noise([a], (4,))(0), Noise([b], (4,))(0)) == (a == b)


@given(st.integers(-(2**62), 2**62), st.integers(-8, 8).filter(bool))
def test_noise_of_seeds_a_stride_apart_shares_nothing(seed, k):
    "Numbers come from counters GAMMA apart: seeds that differ by a multiple of it must not be shifted copies."
    other = (seed + k * GAMMA + 2**63) % 2**64 - 2**63
    a, b = (Noise([s], (64,)).bits(0)[0].tolist() for s in (seed, other))
    assert not set(a) & set(b)


@given(st.lists(seeds, min_size=1, max_size=3), st.integers(0, 100))
def test_noise_in_float64_is_the_same_numbers(ss, step):
    wide = Noise(ss, (5,), dtype=torch.float64)(step)
    assert wide.dtype == torch.float64 and torch.equal(wide, Noise(ss, (5,))(step).double())


@pytest.mark.parametrize("ss", [range(2000), range(-(2**63), -(2**63) + 2000), range(2**63 - 2000, 2**63)])
def test_noise_is_standard_normal_over_neighbouring_seeds_and_steps(ss):
    z = torch.stack([Noise(ss, (3,), dtype=torch.float64)(k) for k in range(4)])
    n = z.numel()  # 24,000 numbers: five standard errors
    assert abs(z.mean()) < 5 / n**0.5
    assert abs((z**2).mean() - 1) < 5 * (2 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 5 * (96 / n) ** 0.5
    flat = z.permute(0, 2, 1).reshape(12, -1)  # steps and coordinates, over seeds
    assert (flat.corrcoef() - torch.eye(12, dtype=torch.float64)).abs().max() < 5 / 2000**0.5
    assert abs((z[:, 1:] * z[:, :-1]).mean()) < 5 / n**0.5  # neighbouring seeds


def test_a_chain_that_ends_with_nothing_of_the_data():
    "Zero terminal SNR: the last beta is 1. Samplers start from noise alone, and Heun's first step is Euler's."
    betas = linear_betas(50).clone()
    betas[-1] = 1.0
    schedule, mixture = DDPMSchedule(betas), random_mixture(2)
    alpha, sigma = schedule(torch.linspace(0, 1, 501, dtype=torch.float64))
    assert (
        alpha[-1] == 0
        and sigma[-1] == 1
        and (alpha.diff() < 0).all()
        and (alpha**2 + sigma**2 - 1).abs().max() < 1e-12
    )
    best, noise = GMMDenoiser(mixture, schedule), Noise(range(4000), (2,), dtype=torch.float64)
    truth = mixture.sample(4000)[0]
    for sampler in (ddpm, ddim, heun, dpmpp_2m, dpmpp_2m_sde):
        x = sampler(best, noise(0), time_grid(50), noise=noise)
        assert x.isfinite().all() and (x.mean(0) - truth.mean(0)).abs().max() < 0.2, sampler.__name__
        assert (x.std(0) / truth.std(0) - 1).abs().max() < 0.1, sampler.__name__
