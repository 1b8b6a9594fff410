"""The bound, the codec and the metrics, against other formulas and small examples."""

import math
from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal, kl_divergence

from diffusion_nb.data import digits
from diffusion_nb.denoisers import Denoiser, MeanDenoiser, NetDenoiser, Prediction, predict_eps
from diffusion_nb.experiments.evaluation import evaluate
from diffusion_nb.experiments.judge import digit_judge
from diffusion_nb.forward import chain_steps, posterior_steps, q_posterior
from diffusion_nb.grids import time_grid, truncated_grid
from diffusion_nb.likelihood.bits import Bits, bits_per_dim, fitted_variance
from diffusion_nb.likelihood.lossy import (
    Codec,
    arithmetic_decode,
    arithmetic_encode,
    decode,
    encode,
    equal_bits_grid,
    zipf_table,
)
from diffusion_nb.losses.bound import (
    bound_loss,
    discretised_log_prob,
    gaussian_kl,
    log_cdf,
    posterior_kl,
    prior_kl,
    step_kl,
    vlb_weight,
)
from diffusion_nb.losses.simple import min_snr, ones, truncated_snr
from diffusion_nb.metrics.cards import MetricCard, load_cards, save_cards, weights_hash
from diffusion_nb.metrics.features import density_coverage, frechet_distance, inception_score, precision_recall
from diffusion_nb.mixtures import GMMDenoiser, random_mixture
from diffusion_nb.noise import Noise
from diffusion_nb.schedules import CosineSchedule, DDPMSchedule, EDMSchedule, VESchedule, VPSchedule, linear_betas
from diffusion_nb.util.checks import expand_as
from diffusion_nb.variances import fixed_large, fixed_small

settings.register_profile("book", derandomize=True, deadline=None, database=None, max_examples=100)
settings.load_profile("book")

MIX = random_mixture(k=3, d=2)
BETAS = linear_betas(30)
EXACT = GMMDenoiser(MIX, DDPMSchedule(BETAS))
X = torch.linspace(0, 16, 22).round().flip(0).reshape(11, 2) / 8 - 1  # 17 levels
schedules = pytest.mark.parametrize(
    "f", [DDPMSchedule(BETAS), CosineSchedule(), VESchedule(), EDMSchedule()], ids=lambda f: type(f).__name__
)
close = torch.testing.assert_close


def F(x) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


def draw(*shape, seed=0) -> torch.Tensor:
    return Noise([seed], shape, dtype=torch.float64)(0)[0]


# divergences

means, variances = st.floats(-100, 100), st.floats(1e-4, 1e4)


@given(means, variances, means, variances)
def test_divergence_of_two_normals(m1, v1, m2, v2):
    got = gaussian_kl(*map(F, (m1, v1, m2, v2)))
    close(got, kl_divergence(Normal(F(m1), F(v1).sqrt()), Normal(F(m2), F(v2).sqrt())), rtol=1e-9, atol=1e-12)
    by_logs = (math.exp(math.log(v1 / v2)) - 1 + math.log(v2 / v1) + (m1 - m2) ** 2 * math.exp(-math.log(v2))) / 2
    assert math.isclose(got, by_logs, rel_tol=1e-9, abs_tol=1e-12)


@given(means, variances, st.floats(1e-3, 10), st.booleans())
def test_divergence_is_zero_where_they_agree_and_only_there(mean, var, change, of_mean):
    m, v = F(mean), F(var)
    assert gaussian_kl(m, v, m, v) == 0
    other = (m + change * v.sqrt(), v) if of_mean else (m, v * (1 + change))
    assert gaussian_kl(m, v, *other) > 0 and gaussian_kl(*other, m, v) > 0


@schedules
@pytest.mark.parametrize("var", [fixed_small, fixed_large])
def test_a_step_costs_the_divergence_of_the_two_conditionals(f, var):
    x0, eps = draw(4, 3), draw(4, 3, seed=1)
    s, t = F([0.1, 0.3, 0.5, 0.9]), F([0.2, 0.31, 0.9, 1.0])
    alpha, sigma = (c[:, None] for c in f(t))
    x_t = alpha * x0 + sigma * eps
    best = GMMDenoiser(random_mixture(k=3, d=3), f)
    (mean, v), (guess, _) = q_posterior(f, x_t, x0, s, t), q_posterior(f, x_t, best(x_t, t).x0, s, t)
    model = v if var is fixed_small else posterior_steps(f, s, t).large[:, None]
    want = kl_divergence(Normal(mean, v.sqrt()), Normal(guess, model.sqrt())).sum(1)
    close(step_kl(best, x0, s, t, eps, var), want, rtol=1e-8, atol=0)
    step = posterior_steps(f, s, t)
    step = type(step)._make(c[:, None] for c in step)
    assert torch.equal(posterior_kl(best(x_t, t), x0, step, var), step_kl(best, x0, s, t, eps, var))


@schedules
def test_the_prior_costs_the_divergence_from_the_noise(f):
    x0 = draw(5, 2, 3)
    alpha, sigma = f(F(1.0))
    q, p = Normal(alpha * x0, sigma), Normal(F(0.0), (alpha**2 + sigma**2).sqrt())
    close(prior_kl(f, x0), kl_divergence(q, p).sum((1, 2)), rtol=1e-6, atol=1e-14)


@schedules
@pytest.mark.parametrize("var", [fixed_small, fixed_large])
def test_weight_of_the_bound(f, var):
    "What an error of the guess adds to the cost of a step, over its square."
    T, t, x0, eps = 30, F([2, 7, 15, 30]) / 30, draw(4, 3), draw(4, 3, seed=1)

    class Off(Denoiser):
        def __init__(self, error):
            super().__init__()
            self.schedule, self.error = f, error

        def forward(self, x_t, t):
            return Prediction(x_t, *(expand_as(c, x_t) for c in self.schedule(t)), x0 + self.error)

    costs = [step_kl(Off(error), x0, t - 1 / T, t, eps, var) for error in (0.0, 0.5)]
    close(vlb_weight(T, var)(f, t) * 3 * 0.5**2, costs[1] - costs[0], rtol=1e-6, atol=1e-15)


@schedules
def test_weights_of_the_picture_and_the_truncated_one(f):
    t = F([0.01, 0.3, 0.6, 1.0])
    alpha, sigma = f(t)
    assert ones(f, t).tolist() == [1, 1, 1, 1] and ones(f, t.float()).dtype == t.dtype
    ratio = alpha**2 / sigma**2
    assert ratio[0] > 1 > ratio[-1]
    close(truncated_snr(f, t), torch.where(ratio > 1, ratio, ones(f, t)), rtol=1e-12, atol=0)


# masses of levels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(st.integers(2, 300), st.floats(-1.5, 1.5), st.floats(0.01, 30))
def test_masses_of_all_levels_add_up_to_one(dtype, levels, mean, std):
    x, eps = torch.linspace(-1, 1, levels, dtype=dtype), torch.finfo(dtype).eps
    mean, deviation = torch.tensor(mean, dtype=dtype), torch.tensor(std, dtype=dtype)
    total = discretised_log_prob(x, mean, deviation, levels).double().exp().sum()
    # The edges of a bin are known to a unit in the last place, so its mass, a difference, to eps / std of density: levels times
    # in all. And an edge between two bins has two places, a unit in the last place apart.
    assert abs(total - 1) < 2 * eps * (levels + 1 / std)


@pytest.mark.parametrize("levels", [2, 3, 17, 256])
@pytest.mark.parametrize("std", [0.03, 0.4, 5.0])
def test_mass_of_a_level(levels, std):
    x, mean = torch.linspace(-1, 1, levels, dtype=torch.float64), draw(levels) / 2
    got = discretised_log_prob(x, mean, F(std), levels).exp()

    def cdf(v):
        return math.erfc(-v / (std * 2**0.5)) / 2

    for k in range(levels):
        edges = [-math.inf, *((2 * j + 1) / (levels - 1) - 1 for j in range(levels - 1)), math.inf]
        low, high = edges[k] - mean[k], edges[k + 1] - mean[k]
        want = cdf(high) - cdf(low) if low + high < 0 else cdf(-low) - cdf(-high)
        assert math.isclose(got[k], want, rel_tol=1e-9, abs_tol=1e-300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mass_and_its_gradients_are_finite_for_any_deviation_and_mean(dtype):
    "A bin of a deviation far smaller than itself holds all or nothing; of one far larger, its width times the density."
    stds = torch.tensor([1e-30, 1e-12, 1e-7, 1e-5, 1e-2, 1.0, 1e4, 1e9], dtype=dtype)
    means = torch.tensor([-1e6, -100.0, -1.0, -0.5, 1e-3, 0.49, 1.0, 3.0, 1e6], dtype=dtype)
    x, mean, std = torch.meshgrid(torch.linspace(-1, 1, 17, dtype=dtype), means, stds, indexing="ij")
    mean, std = mean.clone().requires_grad_(), std.clone().requires_grad_()
    log_p = discretised_log_prob(x, mean, std, 17)
    log_p.sum().backward()
    assert all(v.isfinite().all() for v in (log_p, mean.grad, std.grad)) and (log_p <= 0).all()
    own = ((8 * mean.clamp(-1, 1)).round() / 8 == x)[:, :, :4]
    assert (log_p[:, :, :4][own] == 0).all() and (log_p[:, :, :4][~own] < -100).all()
    wide = log_p[1:-1, 2:-1, -2].exp() * 1e4  # in bins that end, means near 0
    close(wide, torch.full_like(wide, 0.125 / (2 * math.pi) ** 0.5), rtol=2e-2, atol=0)


def test_far_from_the_mean_the_mass_keeps_its_digits_and_a_gradient():
    z = torch.cat(
        [-torch.logspace(-2, 3.5, 200), torch.tensor([-1.0])]
    ).requires_grad_()  # where the branches meet, too
    log_cdf(z).sum().backward()
    exact = torch.special.log_ndtr(z.double())
    slope = (-(z.double() ** 2) / 2 - exact).exp() / math.sqrt(2 * math.pi)
    close(log_cdf(z).double(), exact, rtol=1e-6, atol=0)
    close(z.grad.double(), slope, rtol=2e-6, atol=0)
    for x in (-1.0, 0.0, 1.0):
        mean = torch.tensor([-30.0, 30.0], requires_grad=True)
        log_p = discretised_log_prob(torch.tensor([x, x]), mean, torch.tensor(0.01), 17)
        log_p.sum().backward()
        near = (mean.detach() - x).abs() - 1 / 16  # to the nearer edge of the bin, or 0 in an open one
        open_end = torch.tensor([x == -1, x == 1])
        want = torch.where(open_end, 0, -((near / 0.01) ** 2) / 2)
        close(log_p, want, rtol=1e-5, atol=0)
        close(mean.grad, torch.where(open_end, 0, -near * mean.detach().sign() / 0.01**2), rtol=1e-3, atol=0)


# the bound


def by_hand(x0, T, model_var, decoder_var):
    "(prior, steps, decoder), nats a picture: the chain of BETAS[:T] one step at a time, by torch.distributions, in float64."
    betas = BETAS.tolist()
    abar = [math.prod(1 - b for b in betas[:i]) for i in range(len(betas) + 1)]
    noise = Noise(range(len(x0)), (2,), dtype=torch.float64)
    prior = kl_divergence(Normal(abar[T] ** 0.5 * x0, (1 - abar[T]) ** 0.5), Normal(F(0.0), F(1.0))).sum(1)
    steps = []
    for i in range(T, 0, -1):
        x_t = (abar[i] ** 0.5 * x0 + (1 - abar[i]) ** 0.5 * noise(T - i)).requires_grad_()
        covs = abar[i] * MIX.covs + (1 - abar[i]) * torch.eye(2, dtype=torch.float64)
        parts = MultivariateNormal(abar[i] ** 0.5 * MIX.means, covs)
        log_p = MixtureSameFamily(Categorical(MIX.weights), parts).log_prob(x_t).sum()
        (score,) = torch.autograd.grad(log_p, x_t)
        guess = (x_t.detach() + (1 - abar[i]) * score) / abar[i] ** 0.5
        beta, before = betas[i - 1], abar[i - 1]
        to_x0, to_x_t = before**0.5 * beta / (1 - abar[i]), (1 - beta) ** 0.5 * (1 - before) / (1 - abar[i])
        posterior = (1 - before) / (1 - abar[i]) * beta
        mean = to_x0 * guess + to_x_t * x_t.detach()
        if i > 1:
            q = Normal(to_x0 * x0 + to_x_t * x_t.detach(), posterior**0.5)
            steps.append(kl_divergence(q, Normal(mean, model_var(beta, posterior) ** 0.5)).sum(1))
    model = Normal(mean, decoder_var(beta) ** 0.5)
    upper = torch.where(x0 > 0.99, 1.0, model.cdf(x0 + 1 / 16))
    lower = torch.where(x0 < -0.99, 0.0, model.cdf(x0 - 1 / 16))
    return prior, torch.stack(steps, 1), -(upper - lower).log().sum(1)


@pytest.mark.parametrize("var", [fixed_small, fixed_large])
def test_bound_of_an_exact_denoiser_by_hand(var):
    x0 = X.double() * 0.5
    x0 = (x0 * 8).round() / 8  # near the mixture
    got = bits_per_dim(EXACT, x0, time_grid(30), levels=17, var=var, decoder_var=lambda pred, step: 4 * step.large)
    want = by_hand(
        x0,
        30,
        (lambda beta, post: post) if var is fixed_small else (lambda beta, post: beta),
        lambda beta: 4 * beta,
    )
    bit = math.log(2) * 2
    close(got.prior * bit, want[0], rtol=1e-6, atol=1e-12)
    close(got.steps * bit, want[1], rtol=1e-7, atol=1e-11)
    close(got.decoder * bit, want[2], rtol=1e-7, atol=0)
    close(got.total * bit, want[0] + want[1].sum(1) + want[2], rtol=1e-7, atol=0)


def test_bits_of_a_picture_are_its_own():
    ts, y = time_grid(6), torch.arange(11) % 3
    whole = bits_per_dim(EXACT, X, ts, levels=17, y=y)
    assert whole.steps.shape == (11, 5) and whole.mse.shape == (11, 6)
    for batch in (1, 3, 11):
        for got, want in zip(bits_per_dim(EXACT, X, ts, levels=17, batch=batch, y=y), whole, strict=True):
            close(got, want, rtol=1e-5, atol=1e-12)
    pick = [7, 2, 2]
    some = bits_per_dim(EXACT, X[pick], ts.float(), levels=17, seeds=pick, y=y[pick].to(torch.uint8))
    close(some.total, whole.total[pick], rtol=1e-5, atol=0)
    close(bits_per_dim(EXACT, X.double(), ts, levels=17, y=y).total, whole.total, rtol=1e-4, atol=0)
    other = bits_per_dim(EXACT, X, ts, levels=17, y=(y + 1) % 3)
    assert (other.total - whole.total).abs().min() > 1e-3


def test_each_step_has_its_noise():
    seen = []

    class Watched(Denoiser):
        schedule = EXACT.schedule

        def forward(self, x_t, t):
            alpha, sigma = self.schedule(t)
            seen.append((x_t - alpha * X.double()) / sigma)
            return EXACT(x_t, t)

    bits_per_dim(Watched(), X.double(), time_grid(4), levels=17, seeds=range(5, 16))
    noise = Noise(range(5, 16), (2,), dtype=torch.float64)
    for k in range(4):
        close(seen[k + 1], noise(k), rtol=0, atol=1e-9)  # the first call is on one picture, for the decoder


def test_variance_may_be_a_tensor():
    full = bits_per_dim(EXACT, X, time_grid(5), levels=17, var=lambda pred, step: pred.x0 * 0 + step.large,
                        decoder_var=lambda pred, step: pred.x0 * 0 + step.large)  # fmt: skip
    close(
        full.total, bits_per_dim(EXACT, X, time_grid(5), levels=17, var=fixed_large, decoder_var=fixed_large).total
    )


def test_the_decoder_has_the_variance_that_ddpm_s_program_gives_it():
    "β̃ of the step before, for either variance of the steps. With the error that DDPM reports, 0.95 of 255, it gives the 1.97 bits that DDPM reports; β of the last step would give 2.09."
    seen = []

    def decoder(pred, step):
        seen.append(step)
        return fixed_small(pred, step)

    for var in (fixed_small, fixed_large):
        default, named = (bits_per_dim(EXACT, X, time_grid(30), levels=17, var=var, **own) for own in ({}, dict(decoder_var=decoder)))  # fmt: skip
        assert default.decoder.equal(named.decoder)
    betas, abar = BETAS, (1 - BETAS).cumprod(0)
    assert seen[0].clipped == pytest.approx(((1 - abar[0]) / (1 - abar[1]) * betas[1]).item(), rel=1e-9)
    assert seen[0].small == 0 and seen[0].large == pytest.approx(betas[0].item(), rel=1e-9)
    step = chain_steps(DDPMSchedule(linear_betas()), time_grid(1000))
    assert step.clipped[-1].item() == pytest.approx(5.4532e-5, rel=1e-4)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(20, 236, (100_000,), generator=generator).double() / 127.5 - 1
    mean = x + 0.95 / 127.5 * torch.randn(100_000, generator=generator, dtype=torch.float64)
    small, large = (
        -discretised_log_prob(x, mean, v.sqrt()).mean().item() / math.log(2)
        for v in (step.clipped[-1], step.large[-1])
    )
    assert small == pytest.approx(1.973, abs=0.01) and large == pytest.approx(2.092, abs=0.01)


BITS = Bits(F([0.1, 0.3]), F([[1.0, 2, 4], [3, 4, 6]]), F([0.5, 1.5]), F([[4.0, 3, 2, 1], [2, 1, 0, 1]]),
            F([1, 0.8, 0.4, 0.2, 0]))  # fmt: skip


def test_sums_of_the_parts():
    close(BITS.total, F([7.6, 14.8]))
    close(BITS.rate(), F([0.2, 2.2, 5.2, 10.2]))
    assert str(BITS) == "11.200 ± 7.200 bits/dim = prior 2.0e-01 + steps 10.000 + decoder 1.000"


def test_times_of_equal_bits():
    # rates 0.2 2.2 5.2 10.2 at 1 0.8 0.4 0.2; goals 0 2.55 5.1 7.65 10.2, then 0 2.6 5.2
    want = F([1.0, 0.8 - 0.4 * 0.35 / 3, 0.8 - 0.4 * 2.9 / 3, 0.4 - 0.2 * 2.45 / 5, 0.2])
    close(equal_bits_grid(BITS, 4, 10.2 / 11.2), want)
    close(equal_bits_grid(BITS, 2, 5.2 / 11.2), F([1.0, 0.8 - 0.4 * 0.4 / 3, 0.4]))


def test_stop_early():
    close(truncated_grid(4, 0.1), F([1.0, 0.7, 0.4, 0.1, 0.0]))
    close(truncated_grid(4, 0), F([1.0, 0.75, 0.5, 0.25, 0.0]))


def test_fitted_variance_is_the_best_for_what_it_was_fitted_on():
    ts = time_grid(8)
    best = fitted_variance(bits_per_dim(EXACT, X.double(), ts, levels=17, var=fixed_large))

    def steps(factor):
        return bits_per_dim(EXACT, X.double(), ts, levels=17, var=lambda p, s: factor * best(p, s)).steps.mean(0)

    at_best = steps(1.0)
    for factor in (0.95, 1.05):
        assert (steps(factor) > at_best).all()
    with pytest.raises(KeyError):
        bits_per_dim(EXACT, X, time_grid(7), levels=17, var=best)


# the bound as a loss


@pytest.mark.parametrize("var", [fixed_small, fixed_large])
def test_the_loss_over_all_times_is_the_bound(var):
    T, x0 = 12, X.double()
    want = bits_per_dim(EXACT, x0, time_grid(T), levels=17, var=var)
    noise, loss = Noise(range(11), (2,), dtype=torch.float64), bound_loss(T, 17, var)
    losses = torch.stack(
        [loss(EXACT, x0, torch.full((11,), (T - k) / T, dtype=torch.float64), noise(k)) for k in range(T)]
    )
    close(losses.mean(0) / math.log(2), want.total - want.prior, rtol=1e-9, atol=0)
    terms = torch.cat([want.steps, want.decoder[:, None]], 1).T
    close(losses / (T * math.log(2)), terms, rtol=1e-6, atol=1e-12)
    close(loss(EXACT, x0, F(1 / T), noise(T - 1)), losses[-1])  # one time for all


@pytest.mark.parametrize("T", [2, 7, 30, 1000])
def test_the_loss_with_times_in_float32(T):
    denoiser, noise = GMMDenoiser(MIX, VPSchedule()), Noise(range(11), (2,))
    for i in {1, 2, T // 2 + 1, T}:
        t = torch.full((11,), i / T, dtype=torch.float64)
        got, want = (bound_loss(T, 17)(denoiser, X, v, noise(0)) for v in (t.float(), t))
        close(got, want, rtol=2e-3, atol=1e-6)


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, time):
        return self.w * x


@pytest.mark.parametrize(
    "var", [fixed_small, fixed_large, lambda pred, step: (step.small * step.large).sqrt() + 0 * pred.x0]
)
def test_gradient_of_the_loss_is_that_of_its_terms(var):
    "Also at the last step, where the variance of the posterior is 0."
    denoiser, T = NetDenoiser(Linear(), DDPMSchedule(BETAS), predict_eps), 30
    t, noise, w = torch.arange(1, 12) / T, Noise(range(11), (2,)), denoiser.net.w
    whole = torch.autograd.grad(bound_loss(T, 17, var)(denoiser, X, t, noise(0)).sum(), w)[0]
    alone = [
        torch.autograd.grad(bound_loss(T, 17, var)(denoiser, X[i, None], t[i, None], noise(0)[i, None]).sum(), w)[
            0
        ]
        for i in range(11)
    ]
    assert torch.stack(alone).isfinite().all()
    close(whole, sum(alone), rtol=1e-4, atol=0)


# the code

tables = st.builds(zipf_table, st.integers(1, 60), st.floats(0, 20))


@given(st.lists(st.tuples(tables, st.integers(0, 10**6)), max_size=30))
def test_a_message_stays_in_its_interval_and_is_undone_exactly(pairs):
    pairs = [(table, i % (len(table) - 1)) for table, i in pairs]
    tables, numbers = [table for table, _ in pairs], [i for _, i in pairs]
    message, low, width = arithmetic_encode(numbers, tables), Fraction(0), Fraction(1)
    for table, i in pairs:
        low, width = (
            low + width * Fraction(table[i], table[-1]),
            width * Fraction(table[i + 1] - table[i], table[-1]),
        )
    first = Fraction(int(message, 2), 2 ** len(message))  # with zeros after it, or ones:
    assert low <= first and first + Fraction(1, 2 ** len(message)) <= low + width
    assert len(message) <= max(1, 2 - math.log2(width))
    assert arithmetic_decode(message, tables) == numbers


@given(st.lists(st.integers(0, 19), min_size=1, max_size=9), st.integers(0, 10**6), st.text("01", min_size=1))
def test_digits_lost_or_added_are_noticed(numbers, cut, more):
    tables = [zipf_table(20, 3.0)] * len(numbers)
    message = arithmetic_encode(numbers, tables)
    for other in (message + more, message[: cut % len(message)] or "0" * (len(message) + 1)):
        with pytest.raises(ValueError, match="the message is damaged, or was made by another codec"):
            arithmetic_decode(other, tables)


@given(st.integers(2, 2000), st.floats(0, 20))
def test_frequencies_fall_as_a_power(n, bits):
    counts = [b - a for a, b in pairwise(zipf_table(n, bits))]
    power = 1 + 1 / (bits + 1 / (math.e * math.log(2)) + 1)
    assert len(counts) == n and min(counts) >= 1 and 2**40 <= sum(counts) <= 2**40 + n
    for i in (1, n - 1):
        assert math.isclose(counts[0] / counts[i], (i + 1) ** power, rel_tol=1 / counts[i])


class Seen(Denoiser):
    "A denoiser that keeps what it was shown."

    def __init__(self, denoiser):
        super().__init__()
        self.denoiser, self.schedule, self.states = denoiser, denoiser.schedule, []

    def forward(self, x_t, t, **cond):
        self.states.append(x_t)
        return self.denoiser(x_t, t, **cond)


@pytest.mark.parametrize(
    "candidates, var, y",
    [(1, fixed_small, None), (2, fixed_large, 0), (37, fixed_small, 2), (500, fixed_small, None)],
)
def test_what_is_decoded_is_what_was_encoded(candidates, var, y):
    sender, receiver = Seen(EXACT), Seen(EXACT)
    codec = Codec(sender, time_grid(8, end=0.1), var, 2.0, candidates)
    cond = {} if y is None else {"y": torch.tensor([y])}
    message, rate = encode(codec, X[:1], seed=3, **cond)
    got = decode(codec._replace(denoiser=receiver), message, (2,), seed=3, **cond)
    assert len(sender.states) == 8 and len(receiver.states) == 9
    for a, b in zip(sender.states, receiver.states[:-1], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(got, EXACT(receiver.states[-1], F(0.1), **cond).x0)
    costs, ts = [], codec.ts
    for x_t, s, t in zip(sender.states, ts[1:], ts[:-1], strict=True):
        costs.append(posterior_kl(EXACT(x_t, t, **cond), X[:1], posterior_steps(EXACT.schedule, s, t), var).item())
    assert math.isclose(rate, sum(costs) / math.log(2), rel_tol=1e-5)


class Zero(Denoiser):
    "Guesses 0, and at the end what it sees."

    schedule = VPSchedule()

    def forward(self, x_t, t):
        return Prediction(x_t, *(expand_as(c, x_t) for c in self.schedule(t)), x_t if t < 0.5 else 0 * x_t)


def test_a_state_is_sent_as_if_drawn_from_the_posterior():
    ts = F([1.0, 0.4])
    codec, n = Codec(Zero(), ts, fixed_large, 3.0, 2000), 300
    step = codec.steps()[0]
    x0 = torch.tensor([[1.0, -1.0]])
    z = []
    for seed in range(n):
        start = codec.noise(seed, (2,))(0)[:1]
        got = decode(codec, encode(codec, x0, seed)[0], (2,), seed)
        z.append((got - step.a * start - step.b * x0) / step.small**0.5)
    z = torch.cat(z).double()
    assert z.mean(0).abs().max() < 5 / n**0.5  # five standard errors
    assert (z.square().mean() - 1).abs() < 5 * (2 / (2 * n)) ** 0.5


def test_little_news_is_sent_by_the_first_of_the_list():
    codec = Codec(Zero(), F([1.0, 0.9999]), fixed_small, 1.0, 1000)
    for seed in range(10):
        message, rate = encode(codec, X[:1] * 0, seed)
        assert rate == 0 and arithmetic_decode(message, [zipf_table(1000, 1.0)]) == [0]


# metrics


def line(*x):
    return torch.tensor(x)[:, None]


def test_precision_and_recall_on_a_line():
    real, fake = line(0.0, 1.0, 3.0, 10.0), line(0.5, 2.5, 4.9, 100.0)
    # radii of the real points, k = 1: 1, 1, 2, 7; of the fake ones: 2, 2, 2.4, 95.1. The ball of 10 begins at 3.
    assert precision_recall(real, fake, 1) == (0.75, 1.0)
    assert precision_recall(fake, real, 1) == (1.0, 0.75)
    # without 100: radii of the fake points 2, 2, 2.4, so that only 10 is outside
    assert precision_recall(real, fake[:3], 1) == (1.0, 0.75)


def test_density_and_coverage_on_a_line():
    real, fake = line(0.0, 1.0, 3.0, 10.0), line(0.5, 0.6)
    # k = 1: both lie in the balls of 0 and 1, none in those of 3 (1 to 5) and 10 (3 to 17)
    assert density_coverage(real, fake, 1) == (2.0, 0.5)
    assert all(type(v) is float for v in (*density_coverage(real, fake, 1), *precision_recall(real, fake, 1)))
    # k = 2: radii 3, 2, 3, 9; balls of 0, 1, 3 (0 to 6)
    assert density_coverage(real, fake, 2) == (1.5, 0.75)


@pytest.mark.parametrize("k", [1, 4])
def test_balls_counted_one_by_one(k):
    real, fake = draw(30, 5), draw(20, 5, seed=1) * 1.3

    def ball(points, i):
        return sorted(math.dist(points[i], q) for j, q in enumerate(points) if j != i)[k - 1]

    def inside(points, others):
        return [[math.dist(p, q) < ball(points, i) for q in others] for i, p in enumerate(points)]

    r, f = real.tolist(), fake.tolist()
    of_real, of_fake = inside(r, f), inside(f, r)
    precision = sum(any(row[j] for row in of_real) for j in range(20)) / 20
    recall = sum(any(row[i] for row in of_fake) for i in range(30)) / 30
    density, coverage = sum(map(sum, of_real)) / (k * 20), sum(map(any, of_real)) / 30
    assert 0 < coverage < 1 and 0 < precision
    close(
        F([*precision_recall(real, fake, k), *density_coverage(real, fake, k)]),
        F([precision, recall, density, coverage]),
    )


def test_the_digits_are_judged_by_these_measures():
    data, y = digits(), torch.arange(80) % 10
    x = torch.cat([data.x_test[:120], data.x_test[120:160] + 0.5])
    scores = evaluate(x, y.repeat(2), 80)
    real = digit_judge().features(data.x)
    for group, part in enumerate(x.split(80)):
        f = digit_judge().features(part)
        own = [frechet_distance(f, real), *precision_recall(real, f), *density_coverage(real, f)]
        close(torch.stack(scores)[1:6, group].double(), F(own), atol=1e-5, rtol=1e-6)


def test_inception_score():
    assert (
        inception_score(torch.zeros(9, 4)) == pytest.approx(1)
        and type(inception_score(torch.zeros(9, 4))) is float
    )
    assert inception_score(100 * torch.eye(5).repeat(3, 1)) == pytest.approx(5)
    assert inception_score(100 * torch.eye(5)[[0, 0, 1, 1]]) == pytest.approx(2)
    p = F([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4], [0.3, 0.3, 0.4]])
    q = [sum(row[j] for row in p.tolist()) / 4 for j in range(3)]
    want = sum(a * math.log(a / b) for row in p.tolist() for a, b in zip(row, q, strict=True)) / 4
    assert inception_score(p.log() + 3) == pytest.approx(math.exp(want))


def test_cards_come_back(tmp_path):
    cards = [
        MetricCard("FID", 12.5, 100, "1,797 digits", "judge 0af3"),
        MetricCard("π", 1 / 3, 7, "none", "–", "bilinear", 5, 0.25),
    ]
    save_cards(cards, tmp_path / "new" / "cards.json")
    assert load_cards(tmp_path / "new" / "cards.json") == cards
    assert '"π"' in (tmp_path / "new" / "cards.json").read_text(encoding="utf-8")
    assert str(cards[0]) == "FID 12.5 (n = 100, against 1,797 digits, resize none, by judge 0af3)"
    assert str(cards[1]) == "π 0.3333 ± 0.25 (n = 7, against none, resize bilinear, by –, seed 5)"


def test_hash_of_weights():
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    first = weights_hash(net)
    assert first == weights_hash(net) and len(first) == 16 and int(first, 16)
    other = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    other.load_state_dict(net.state_dict())
    assert weights_hash(other) == first
    other[1].running_mean[0] = 1e-6
    assert weights_hash(other) != first
    assert weights_hash(nn.Sequential(net[0])) != weights_hash(nn.ModuleDict({"a": net[0]}))


def test_network_that_predicts_the_mean_of_a_step():
    f, T, t, x0, x_t = DDPMSchedule(BETAS), 30, F([1, 2, 15, 30]) / 30, draw(4, 2), draw(4, 2, seed=1)
    told = SimpleNamespace()

    def net(x, time):
        told.time = time
        return q_posterior(f, x, x0, (t - 1 / T).clamp(min=0), t)[0]

    close(MeanDenoiser(net, f, T)(x_t, t).x0, x0, rtol=1e-9, atol=1e-12)
    close(told.time, 1000 * t)


def test_points_that_are_all_the_same():
    same = torch.ones(30, 2)
    assert precision_recall(same, same, 3) == (1.0, 1.0)
    assert density_coverage(same, same, 5) == (30 / 5, 1.0)


def test_gradient_of_the_loss_is_finite_however_far_the_guess():
    guess = torch.full((2, 4), 1e6, requires_grad=True)

    class Far(Denoiser):
        schedule = DDPMSchedule(linear_betas(1000))

        def forward(self, x_t, t):
            alpha, sigma = (c.reshape(-1, 1).to(x_t.dtype) for c in self.schedule(t))
            return Prediction(x_t, alpha, sigma, guess)

    t = torch.tensor([0.002, 0.5], dtype=torch.float64)
    bound_loss(1000, 17)(Far(), torch.zeros(2, 4), t, torch.ones(2, 4)).sum().backward()
    assert guess.grad.isfinite().all()


def test_min_snr_is_the_lesser():
    t = torch.tensor([0.05, 0.3, 0.9], dtype=torch.float64)
    alpha, sigma = VPSchedule()(t)
    close(
        min_snr(2.0)(VPSchedule(), t),
        torch.minimum(alpha**2 / sigma**2, torch.full((3,), 2.0, dtype=torch.float64)),
    )
    assert min_snr()(VPSchedule(), t)[0] == 5 > min_snr()(VPSchedule(), t)[2]
