"""The stochastic differential equations by other formulas: finite differences, closed forms, walks."""

import math
import re

import pytest
import torch

from diffusion_nb.book.claims import monte_carlo, oracle
from diffusion_nb.denoisers import Denoiser, Prediction
from diffusion_nb.grids import time_grid
from diffusion_nb.likelihood.flow import exact_divergence, flow_bits, hutchinson, log_likelihood
from diffusion_nb.mixtures import GaussianMixture, GMMDenoiser, random_mixture
from diffusion_nb.noise import Noise
from diffusion_nb.samplers.sde import (
    euler_maruyama,
    predictor_corrector,
    probability_flow,
    rates,
    ratio_steps,
    reverse_diffusion,
    reverse_sde,
    sigma_steps,
    solve,
    velocity,
)
from diffusion_nb.schedules import (
    CosineSchedule,
    DDPMSchedule,
    EDMSchedule,
    SubVPSchedule,
    VESchedule,
    VPSchedule,
    cosine_betas,
    linear_betas,
)

SCHEDULES = {
    "vp": VPSchedule(),
    "sub-vp": SubVPSchedule(),
    "cosine": CosineSchedule(),
    "ve": VESchedule(),
    "edm": EDMSchedule(),
    "linear chain": DDPMSchedule(linear_betas()),
    "cosine chain": DDPMSchedule(cosine_betas()),
}
SMOOTH = ("vp", "cosine", "ve", "edm")
every = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
smooth = pytest.mark.parametrize("schedule", [SCHEDULES[k] for k in SMOOTH], ids=SMOOTH)
MIXTURE = random_mixture(3)
GAUSS = GaussianMixture([1.0], [[0.3, -0.2]], [[[0.5, 0.2], [0.2, 0.3]]])


def F(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def doubles(n, shape=(2,)):
    return Noise(range(n), shape, dtype=torch.float64)


def refused(*says: str):
    "ValueError whose message holds all of these."
    return pytest.raises(ValueError, match="(?s)" + "".join(f"(?=.*{re.escape(s)})" for s in says))


def same(got, want, tol=1e-9):
    evidence = oracle(got, want, tol)
    assert evidence.holds, evidence


# rates


@every
def test_rates_against_finite_differences(schedule):
    t, d = torch.linspace(0.05, 0.95, 10, dtype=torch.float64) + 0.0004, 1e-5
    (a1, s1), (a0, s0), (a, s) = schedule(t + d), schedule(t - d), schedule(t)
    r = rates(schedule, t)
    same(r.alpha, a), same(r.sigma, s)
    same(r.d_alpha, (a1 - a0) / (2 * d), 1e-6)
    same(r.d_sigma, (s1 - s0) / (2 * d), 1e-6)
    same(r.f, (a1 / a0).log() / (2 * d), 1e-6)
    same(r.g2, ((s1**2 - s0**2) - (a1 / a0).log() * 2 * s**2) / (2 * d), 1e-6)


def test_vp_rates_are_beta():
    t = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    r, beta = rates(VPSchedule(0.2, 11.0), t), 0.2 + 10.8 * t
    same(r.f, -beta / 2, 1e-12), same(r.g2, beta, 1e-12)


def test_rates_of_one_time_and_of_float32():
    same(rates(VPSchedule(), torch.tensor(0.5)).g2, 0.1 + 19.9 * 0.5)
    assert rates(EDMSchedule(), torch.tensor([0.1, 0.2])).g2.dtype == torch.float64


@pytest.mark.parametrize("t", [0.0, [0.5, 0.0]])
@pytest.mark.parametrize("name", ["vp", "linear chain", "cosine chain"])
def test_rates_at_the_singular_end(name, t):
    with refused("no finite rates at t = [0.0]", "stay inside"):
        rates(SCHEDULES[name], torch.tensor(t))


@every
@pytest.mark.parametrize("t", [-0.1, 1.1, float("nan")])
def test_rates_outside(schedule, t):
    with refused("expected times in [0, 1]"):
        rates(schedule, F(t))


# the flow


@every
def test_velocity_is_the_textbooks(schedule):
    best, x, t = GMMDenoiser(MIXTURE, schedule), doubles(20)(0), F(0.4003)[0]
    r = rates(schedule, t)
    same(velocity(best, x, t), r.f * x - r.g2 / 2 * best(x, t).score)


def gaussian_flow(schedule, x, t, s):
    "Where the flow of GAUSS carries x from time t to s: along each axis of the covariance, the standard score is kept."
    (at, st), (as_, ss) = schedule(F(t)), schedule(F(s))
    axes, v, m = GAUSS.axes[0], GAUSS.variances[0], GAUSS.means[0]
    z = (x - at * m) @ axes / (at**2 * v + st**2).sqrt()
    return as_ * m + (z * (as_**2 * v + ss**2).sqrt()) @ axes.T


@smooth
def test_flow_of_a_gaussian_in_closed_form(schedule):
    best, start = GMMDenoiser(GAUSS, schedule), schedule(F(1.0))[1] * doubles(10)(0)
    seen = {}
    end = probability_flow(
        best, start, F(1.0, 0.3, 1e-3), rtol=1e-8, atol=1e-8, callback=lambda i, x, pred: seen.update({i: x})
    )
    same(end, gaussian_flow(schedule, start, 1.0, 1e-3), 1e-6)
    same(seen[0], gaussian_flow(schedule, start, 1.0, 0.3), 1e-6)
    assert seen[1].equal(end) and len(seen) == 2


def test_the_solver_steps_on_each_time():
    seen, ts = [], F(0.9, 0.61, 0.37, 0.2)
    states = solve(lambda t, x: seen.append(t.item()) or -x, F(1.0), ts, 1e-3, 1e-3)
    assert (F(*seen)[:, None] - ts).abs().amin(0).max() < 1e-9 and min(seen) >= 0.2
    same(states[:, 0], (0.9 - ts).exp(), tol=1e-2)


def test_flow_of_a_chain_and_of_float32():
    chain = SCHEDULES["linear chain"]
    best, start = GMMDenoiser(GAUSS, chain), doubles(10)(0)
    same(
        probability_flow(best, start, F(1.0, 1e-3), rtol=1e-6, atol=1e-6),
        gaussian_flow(chain, start, 1.0, 1e-3),
        1e-3,
    )
    x = probability_flow(best, start.float(), F(1.0, 1e-3))
    assert x.dtype == torch.float32
    same(x, gaussian_flow(chain, start, 1.0, 1e-3), 1e-2)


# the likelihood


@smooth
def test_likelihood_of_a_gaussian_in_closed_form(schedule):
    best, x, t = GMMDenoiser(GAUSS, schedule), doubles(10)(3), 0.01
    alpha, sigma = schedule(F(t)[0])
    cov = alpha**2 * GAUSS.covs[0] + sigma**2 * torch.eye(2)
    want = torch.distributions.MultivariateNormal(alpha * GAUSS.means[0], cov).log_prob(x)
    known = lambda y: best.log_prob(y, F(1.0))  # noqa: E731
    same(log_likelihood(best, x, t, prior=known, rtol=1e-7, atol=1e-7), want, 1e-4)
    early = log_likelihood(best, x, t, end=0.6, prior=lambda y: best.log_prob(y, F(0.6)), rtol=1e-7, atol=1e-7)
    same(early, want, 1e-4)


def test_the_usual_prior_is_normal_with_the_variance_of_noise_and_unit_data():
    wide = GaussianMixture([1.0], [[0.0, 0.0]], [torch.eye(2).tolist()])
    for schedule in (VPSchedule(), VESchedule(0.01, 2.0)):
        best, x = GMMDenoiser(wide, schedule), doubles(10)(0)
        same(log_likelihood(best, x, 0.05, rtol=1e-7, atol=1e-7), best.log_prob(x, F(0.05)), 1e-4)


class Pictures(Denoiser):
    "The exact denoiser for pixels that are independent and normal; y shifts their mean."

    def __init__(self, schedule, var=0.25):
        super().__init__()
        self.schedule, self.var = schedule, var

    def forward(self, x_t, t, y=0.0):
        alpha, sigma = self.schedule(t)
        gain = alpha * self.var / (alpha**2 * self.var + sigma**2)
        return Prediction(
            x_t, alpha.to(x_t.dtype), sigma.to(x_t.dtype), (y + gain * (x_t - alpha * y)).to(x_t.dtype)
        )


def test_likelihood_of_pictures_with_a_condition():
    model, x = Pictures(CosineSchedule()), doubles(5, (1, 3, 3))(0)
    want = torch.distributions.Normal(0.2, 0.5).log_prob(x).flatten(1).sum(1)
    same(log_likelihood(model, x, 0.0, rtol=1e-7, atol=1e-7, y=0.2), want, 1e-4)


def test_divergences_of_a_known_matrix():
    A, x = doubles(1, (6, 6))(0)[0], doubles(4, (1, 2, 3))(0)
    v = lambda x: (x.flatten(1) @ A.T).reshape(x.shape)  # noqa: E731
    out, div = exact_divergence(v, x)
    same(out, v(x)), same(div, A.trace().expand(4))
    z = doubles(4, (1, 2, 3))(1)
    same(hutchinson(z)(v, x)[1], torch.einsum("bi,ij,bj->b", z.flatten(1), A, z.flatten(1)))
    many = hutchinson(doubles(4000, (1, 2, 3))(2))(v, x[:1].expand(4000, 1, 2, 3))[1]
    evidence = monte_carlo(many, A.trace())
    assert evidence.holds, evidence


def test_bad_likelihoods():
    best = GMMDenoiser(MIXTURE, VPSchedule())
    x = doubles(3)(0)
    for bad in (float("nan"), float("inf")):
        with refused("x: 6 of its 6 values"):
            log_likelihood(best, 0 * x + bad, 0.1)
    for t, end in ((0.5, 0.5), (0.5, 0.1), (float("nan"), 1.0)):
        with refused("expected t < end"):
            log_likelihood(best, x, t, end)
    with refused("no finite rates"):
        log_likelihood(best, x, 0.0)


# the samplers


@pytest.mark.parametrize("name, start", [("vp", 1.0), ("cosine", 0.98), ("ve", 1.0)])
def test_reverse_sde_draws_from_the_mixture(name, start):
    schedule, noise = SCHEDULES[name], doubles(4000)
    x = reverse_sde(
        GMMDenoiser(MIXTURE, schedule), schedule(F(start))[1] * noise(0), time_grid(400, start=start), noise=noise
    )
    mean = MIXTURE.weights @ MIXTURE.means
    second = (
        MIXTURE.weights[:, None, None] * (MIXTURE.covs + MIXTURE.means[:, :, None] * MIXTURE.means[:, None])
    ).sum(0)
    for samples, want in (
        (x, mean),
        (x[:, :, None] * x[:, None], second),
        (MIXTURE.log_prob(x), MIXTURE.log_prob(MIXTURE.sample(400_000)[0]).mean()),
    ):
        evidence = monte_carlo(samples, want)
        assert evidence.holds, evidence


def test_one_step_written_out():
    best, noise, ts = GMMDenoiser(MIXTURE, VPSchedule()), doubles(5), F(0.6, 0.5, 0.4)
    x, h, r = noise(0), 0.1, rates(VPSchedule(), F(0.6)[0])
    drift = r.f * x - r.g2 * best(x, F(0.6)[0]).score
    want = x - h * drift + (h * r.g2) ** 0.5 * noise(1)
    same(reverse_sde(best, x, ts[:2], noise=noise), want)
    now, z = best(want, F(0.5)[0]), noise(2 + 1)
    length = 2 * (0.3 * now.sigma) ** 2
    want = want + length * now.score + (2 * length) ** 0.5 * z
    seen = []
    predictor_corrector(best, x, ts, noise=noise, callback=lambda i, x, pred: seen.append(x))
    same(seen[0], want)


def test_sub_vp_is_vp_with_less_noise():
    t = torch.linspace(0.1, 1, 10, dtype=torch.float64)
    beta, integral, r = 0.1 + 19.9 * t, 0.1 * t + 19.9 * t**2 / 2, rates(SubVPSchedule(), t)
    same(r.alpha, (-integral / 2).exp())
    same(r.sigma, 1 - (-integral).exp())
    same(r.f, -beta / 2)
    same(r.g2, beta * (1 - (-2 * integral).exp()))


def test_reverse_diffusion_is_the_paper_s_in_its_two_cases():
    noise, betas = doubles(5), linear_betas(100).double()
    chain, ve, x, z = DDPMSchedule(linear_betas(100)), VESchedule(), noise(0), noise(1)
    best, ts, beta = GMMDenoiser(MIXTURE, chain), F(0.4, 0.39), betas[39]
    got = predictor_corrector(best, x, ts, noise=noise, corrections=0, predictor=reverse_diffusion)
    same(got, (2 - (1 - beta).sqrt()) * x + beta * best(x, ts[0]).score + beta.sqrt() * z)
    best, (sigma_t, sigma_s) = GMMDenoiser(MIXTURE, ve), ve(ts)[1]
    got = predictor_corrector(best, x, ts, noise=noise, corrections=0, predictor=reverse_diffusion)
    gap = sigma_t**2 - sigma_s**2
    same(got, x + gap * best(x, ts[0]).score + gap.sqrt() * z)


@pytest.mark.parametrize("schedule", [VPSchedule(), VESchedule(0.02, 10.0)], ids=["vp", "ve"])
def test_both_predictors_end_in_one_place_as_steps_get_short(schedule):
    best, noise = GMMDenoiser(GAUSS, schedule), doubles(400)
    apart = []
    for n in (50, 500):
        ts = time_grid(n, end=0.05)
        a, b = (predictor_corrector(best, schedule(ts[0])[1] * noise(0), ts, noise=noise, corrections=0, predictor=p) for p in (euler_maruyama, reverse_diffusion))  # fmt: skip
        apart.append((a - b).norm(dim=1).mean().item())
    assert apart[1] < apart[0] / 5 and apart[0] > 1e-4


def test_a_walk_tells_its_steps():
    best, noise, ts, seen = GMMDenoiser(MIXTURE, VPSchedule()), doubles(5), F(0.6, 0.5, 0.4), []
    last = reverse_sde(best, noise(0), ts, noise=noise, callback=lambda *told: seen.append(told))
    assert [i for i, *_ in seen] == [0, 1] and last.equal(seen[1][1])
    same(seen[0][1], reverse_sde(best, noise(0), ts[:2], noise=noise))
    same(seen[1][2].x0, best(seen[0][1], ts[1]).x0)


def test_no_noise_into_time_0_and_the_denoiser_is_not_called_there():
    called = []

    class Watched(GMMDenoiser):
        def forward(self, x_t, t):
            called.append(float(t))
            return super().forward(x_t, t)

    best, x = Watched(MIXTURE, VPSchedule()), doubles(5)(0)
    a, b = (
        predictor_corrector(
            best, x, F(0.2, 0.1, 0.0), corrections=2, noise=lambda k, s=s: doubles(5)(k + s * (k == 2))
        )
        for s in (0, 50)
    )
    assert a.equal(b) and called == [0.2, 0.1, 0.1, 0.1] * 2


def test_every_draw_of_noise_is_used_once():
    taken, noise = [], doubles(2)

    def watched(k):
        taken.append(k)
        return noise(k)

    predictor_corrector(
        GMMDenoiser(MIXTURE, VPSchedule()), noise(0), time_grid(5, end=0.1), noise=watched, corrections=3
    )
    steps = [k for k in taken if k]
    assert len(steps) == len(set(steps)) == 5 + 4 * 3


def test_a_sample_does_not_depend_on_its_company():
    best, noise, few, ts = (
        GMMDenoiser(MIXTURE, VPSchedule()),
        doubles(20),
        Noise([3, 11], (2,), dtype=torch.float64),
        time_grid(20),
    )
    for sampler in (reverse_sde, predictor_corrector):
        same(sampler(best, few(0), ts, noise=few), sampler(best, noise(0), ts, noise=noise)[[3, 11]])


def test_corrections_keep_the_distribution():
    "At one time, with steps that are not too long: what starts as p_t stays p_t."
    schedule, noise, t = VPSchedule(), doubles(4000), F(0.5)[0]
    best, (alpha, sigma) = GMMDenoiser(MIXTURE, schedule), schedule(t)
    x = alpha * MIXTURE.sample(4000)[0] + sigma * noise(0)
    for k in range(30):
        pred, z = best(x, t), noise(k + 1)
        length = sigma_steps(0.15)(pred, z)
        x = x + length * pred.score + (2 * length) ** 0.5 * z
    mean = alpha * (MIXTURE.weights @ MIXTURE.means)
    assert monte_carlo(x, mean).holds
    truth = alpha * MIXTURE.sample(200_000, seed=1)[0] + sigma * doubles(200_000)(99)
    assert monte_carlo(best.log_prob(x, t), best.log_prob(truth, t).mean()).holds


def test_lengths_of_corrections():
    pred = Prediction(x_t=F(3.0, 4.0)[None], alpha=F(0.0)[0], sigma=F(2.0)[0], x0=F(0.0, 0.0)[None])
    z = F(1.0, 0.0)[None]
    same(sigma_steps(0.5)(pred, z), 2.0)
    same(ratio_steps(0.5)(pred, z), 2 * (0.5 / 1.25) ** 2)  # the score is -x/4, its norm 5/4


def test_bad_walks():
    best, noise = GMMDenoiser(MIXTURE, VPSchedule()), doubles(3)
    for sampler in (reverse_sde, predictor_corrector, probability_flow):
        with refused("times that fall"):
            sampler(best, noise(0), F(0.1, 0.5), noise=noise)
        with refused("x: 6 of its 6 values"):
            sampler(best, noise(0) / 0, F(0.5, 0.1), noise=noise)
        with refused("draws shaped like x"):
            sampler(best, noise(0), F(0.5, 0.1), noise=doubles(2))
    with refused("no finite rates at t = [0.0]"):
        probability_flow(best, noise(0), time_grid(5))
    with refused("from t = 1 to 0.99 is too long"):
        reverse_sde(GMMDenoiser(MIXTURE, CosineSchedule()), noise(0), time_grid(100), noise=noise)
    euler_maruyama(CosineSchedule(), time_grid(100, start=0.98))


def test_steps_that_overshoot_are_refused_just_where_they_would():
    "On data that are a point at 0 the exact score is -x/sigma², and Euler's factor is 1 - h (f + g²/sigma²)."
    schedule = VESchedule(0.01, 50.0)  # g²/sigma² = 2 log 5000 = 17.03
    h = 2 / (2 * math.log(5000))
    assert abs(euler_maruyama(schedule, F(0.9, 0.9 - 0.99 * h))[0][0] - 1) < 1e-12
    with refused("too long"):
        euler_maruyama(schedule, F(0.9, 0.9 - 1.01 * h))


def test_the_program_s_order_corrects_at_the_first_time_too():
    best, noise = GMMDenoiser(MIXTURE, VPSchedule()), Noise(range(9), (2,), dtype=torch.float64)
    ts = time_grid(4, start=0.4, end=0.3)
    x, ratio = noise(0), sigma_steps(0.3)
    for j in range(2):
        pred, z = best(x, ts[0]), noise(4 * 3 + j + 1)
        length = ratio(pred, z)
        x = x + length * pred.score + (2 * length) ** 0.5 * z
    options = dict(noise=noise, corrections=2)
    want = predictor_corrector(best, x, ts, **options)
    assert predictor_corrector(best, noise(0), ts, at_start=True, **options).equal(want)
    assert not predictor_corrector(best, noise(0), ts, **options).equal(want)


def test_bits_by_the_flow_are_those_of_the_bins():
    "A Gaussian in bins: the bound is above the truth, by little where the bins are narrow."
    data = GaussianMixture([1.0], [[0.1, -0.2]], [[[0.09, 0.0], [0.0, 0.16]]])
    best, levels = GMMDenoiser(data, VPSchedule()), 65
    x = (data.sample(400, seed=1)[0].clamp(-1, 1) * 32).round() / 32
    u = torch.rand(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    known = lambda y: best.log_prob(y, torch.tensor(1.0, dtype=torch.float64))
    got = flow_bits(best, x, levels, u, 1e-5, prior=known, rtol=1e-7, atol=1e-7)
    by_density = -(data.log_prob(x + (u - 0.5) / 32) / 2 - math.log(32)) / math.log(2)
    torch.testing.assert_close(got, by_density, rtol=0, atol=5e-4)
    edges = [(x + s / 64 - data.means[0]) / data.covs[0].diagonal().sqrt() for s in (-1, 1)]
    want = -(torch.special.ndtr(edges[1]) - torch.special.ndtr(edges[0])).log2().mean(1)
    inside = (x.abs() < 1).all(1)
    gap = (got - want)[inside]
    assert abs(gap.mean()) < 5 * gap.std() / len(gap) ** 0.5 + 0.002 and gap.std() < 0.1
