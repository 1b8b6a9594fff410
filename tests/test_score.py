"""Score matching and Langevin dynamics, against quadrature, formulas for Gaussians and loops written out."""

import math

import pytest
import torch
from torch import nn

from diffusion_nb.book.claims import monte_carlo
from diffusion_nb.denoisers import NetDenoiser, VEView, unit_input
from diffusion_nb.grids import geometric_grid, time_grid
from diffusion_nb.losses.score import denoising_score_loss, explicit_score_loss, sliced_score_loss
from diffusion_nb.losses.simple import denoising_loss
from diffusion_nb.mixtures import GaussianMixture, GMMDenoiser, random_mixture
from diffusion_nb.nets.mlp import ScoreMLP
from diffusion_nb.noise import Noise
from diffusion_nb.samplers.langevin import annealed_langevin, langevin, langevin_step
from diffusion_nb.schedules import (
    CosineSchedule,
    DDPMSchedule,
    EDMSchedule,
    RescaledSchedule,
    VESchedule,
    VPSchedule,
    linear_betas,
)

SCHEDULES = [DDPMSchedule(linear_betas()), VPSchedule(), CosineSchedule(), VESchedule(), EDMSchedule()]
by_name = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
T = torch.tensor(0.4, dtype=torch.float64)
PLANE = GMMDenoiser(random_mixture(3), CosineSchedule())


def normal(n, d=2, step=0):
    return Noise(range(n), (d,), dtype=torch.float64)(step)


class Tilted(GMMDenoiser):
    "A wrong score, whose values are known: the right one plus (x₂, -x₁²)."

    def forward(self, x_t, t):
        pred = super().forward(x_t, t)
        extra = torch.stack([x_t[:, 1], -(x_t[:, 0] ** 2)], dim=1)
        return pred._replace(x0=pred.x0 + pred.sigma**2 / pred.alpha * extra)


WRONG = Tilted(PLANE.mixture, PLANE.schedule)


# losses


def test_explicit_loss():
    x = normal(20)
    score = PLANE(x, T).score
    assert explicit_score_loss(PLANE, x, T, score).abs().max() == 0
    want = (x[:, 1] ** 2 + x[:, 0] ** 4) / 2
    assert torch.allclose(explicit_score_loss(WRONG, x, T, score), want)


def test_denoising_loss_is_that_of_the_noise_over_sigma_squared():
    x0, eps = normal(20), normal(20, step=1)
    for schedule in SCHEDULES:
        exact = GMMDenoiser(PLANE.mixture, schedule)
        t = torch.linspace(0.1, 0.9, 20, dtype=torch.float64)
        sigma = schedule(t)[1]
        want = denoising_loss(exact, x0, t, eps) * 2 / 2 / sigma**2  # two coordinates, half a square
        assert torch.allclose(denoising_score_loss(exact, x0, t, eps), want)


def test_sliced_loss_against_differences():
    x, v, h = normal(20), normal(20, step=1), 1e-5
    score = WRONG(x, T).score
    change = (WRONG(x + h * v, T).score - WRONG(x - h * v, T).score) / (2 * h)
    want = score.square().sum(1) / 2 + (v * change).sum(1)
    assert torch.allclose(sliced_score_loss(WRONG, x, T, v), want, atol=1e-5)


def test_losses_differ_by_half_the_fisher_information_on_a_line():
    one = GaussianMixture(torch.ones(1), torch.tensor([[0.3]]), torch.full((1, 1, 1), 0.5))
    exact = GMMDenoiser(one, VESchedule(0.1, 10.0))
    sigma = exact.schedule(T)[1]
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)[:, None]
    p = exact.log_prob(x, T).exp() * 24 / 4000
    assert (p @ sliced_score_loss(exact, x, T, torch.ones_like(x)) + 1 / (2 * (0.5 + sigma**2))).abs() < 1e-8
    x0, eps = one.sample(20_000)[0], normal(20_000, 1)
    floor = 1 / (2 * sigma**2) - 1 / (2 * (0.5 + sigma**2))
    assert monte_carlo(denoising_score_loss(exact, x0, T, eps), floor).holds


def test_one_loss_a_sample_with_gradients_for_pictures_too():
    net = NetDenoiser(nn.Sequential(), VESchedule())
    net.net = nn.Conv2d(1, 1, 3, padding=1)
    net.net.forward = lambda x, time, f=net.net.forward: f(x)
    x, v = torch.randn(5, 1, 8, 8), torch.randn(5, 1, 8, 8)
    for loss in (
        denoising_score_loss(net, x, T, v),
        sliced_score_loss(net, x, T, v),
        explicit_score_loss(net, x, T, v),
    ):
        assert loss.shape == (5,)
        (gradient,) = torch.autograd.grad(loss.sum(), net.net.weight)
        assert gradient.abs().max() > 0


def test_sliced_loss_trains_a_network():
    "A linear score learns -x / variance from samples alone."
    data, weight = 2 * normal(4000), torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)

    class Linear(GMMDenoiser):
        def forward(self, x_t, t):
            pred = super().forward(x_t, t)
            return pred._replace(x0=(x_t + pred.sigma**2 * (x_t @ weight)) / pred.alpha)

    model = Linear(PLANE.mixture, VESchedule())
    optimizer = torch.optim.LBFGS([weight], max_iter=30)

    def closure():
        optimizer.zero_grad()
        loss = sliced_score_loss(model, data, T, normal(4000, step=1).sign()).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert (weight.detach() + torch.eye(2) / 4).abs().max() < 0.02


# Langevin dynamics


def test_one_step():
    x, eps = normal(6), normal(6, step=1)
    pred = PLANE(x, T)
    assert torch.allclose(langevin_step(pred, 0.3, eps), x + 0.15 * pred.score + math.sqrt(0.3) * eps)


@pytest.mark.parametrize("delta", [0.25, 1.0, 2.0])
def test_stationary_variance(delta):
    "v / (1 - δ/(4v)) for N(0, v), here v = 1."
    one = GaussianMixture(torch.ones(1), torch.zeros(1, 1), torch.full((1, 1, 1), 0.75))
    noise = Noise(range(20_000), (1,), dtype=torch.float64)
    t = torch.tensor(0.0, dtype=torch.float64)
    x = langevin(GMMDenoiser(one, VESchedule(0.5, 5.0)), noise(0), t, 40, delta, noise=noise)
    assert monte_carlo(x**2, 1 / (1 - delta / 4)).holds


@by_name
def test_annealed_walk_step_by_step(schedule):
    "Against the loop written out for y = x / alpha, where nothing happens between the levels."
    denoiser, ts = GMMDenoiser(PLANE.mixture, schedule), torch.tensor([0.8, 0.7, 0.55, 0.3], dtype=torch.float64)
    noise, seen = Noise(range(4), (2,), dtype=torch.float64), []
    alpha, sigma = schedule(ts)
    epsilon = 0.3 * sigma[2].item() ** 2
    got = annealed_langevin(denoiser, alpha[0] * normal(4), ts, steps=2, epsilon=epsilon, noise=noise,
                            callback=lambda i, x, pred: seen.append((i, x)))  # fmt: skip
    y = normal(4)
    for i in range(6):
        k = i // 2
        delta = 0.3 * (sigma[k] / alpha[k]) ** 2
        y = y + delta / 2 * alpha[k] * denoiser(alpha[k] * y, ts[k]).score + delta.sqrt() * noise(i + 1)
        assert seen[i][0] == i and torch.allclose(seen[i][1], alpha[(i + 1) // 2] * y, rtol=1e-9)
    assert torch.equal(got, seen[-1][1])


def test_the_last_time_is_never_asked_about():
    asked = []

    class Listening(GMMDenoiser):
        def forward(self, x_t, t):
            asked.append(t.item())
            return super().forward(x_t, t)

    noise = Noise(range(3), (2,), dtype=torch.float64)
    annealed_langevin(
        Listening(PLANE.mixture, PLANE.schedule), noise(0), time_grid(4), steps=2, epsilon=1e-3, noise=noise
    )
    assert asked == [1.0, 1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]


def test_walkers_do_not_depend_on_their_company():
    many, few = Noise(range(9), (2,), dtype=torch.float64), Noise([2, 5], (2,), dtype=torch.float64)
    ts = geometric_grid(PLANE.schedule, 4, 3.0, 0.2)
    walk = lambda noise: annealed_langevin(PLANE, noise(0), ts, steps=3, epsilon=0.01, noise=noise)
    assert torch.allclose(walk(many)[[2, 5]], walk(few), rtol=1e-12)


@by_name
def test_ladder_is_geometric(schedule):
    ts = geometric_grid(schedule, 7, 5.0, 0.05)
    alpha, sigma = schedule(ts[:-1])
    want = 5.0 * 0.01 ** (torch.arange(7, dtype=torch.float64) / 6)
    assert torch.allclose(sigma / alpha, want, rtol=1e-9)
    assert ts[-1] == 0 and (ts.diff() < 0).all()


# one network, seen twice


@by_name
def test_as_ve(schedule):
    denoiser, x = GMMDenoiser(PLANE.mixture, schedule), normal(5)
    alpha, sigma = schedule(T)
    pred = VEView(denoiser)(x / alpha, T)
    assert torch.allclose(pred.x0, denoiser(x, T).x0) and torch.allclose(pred.eps, denoiser(x, T).eps)
    assert pred.alpha == 1 and torch.allclose(pred.sigma, sigma / alpha)
    assert torch.allclose(
        torch.stack(RescaledSchedule(schedule)(T)), torch.stack([torch.ones_like(alpha), sigma / alpha])
    )
    each = VEView(denoiser)(x / alpha, T.expand(5))  # a time for each
    assert torch.allclose(each.x0, pred.x0) and torch.allclose(each.score, pred.score)


def test_input_of_unit_variance():
    got = unit_input(torch.tensor([3.0, 0.6]), torch.tensor([4.0, 0.8]))
    assert torch.allclose(got, torch.tensor([0.2, 1.0]))


def test_score_mlp_knows_the_time():
    net, x = ScoreMLP(3, 16), torch.randn(4, 3)
    out = net(x, torch.full((4,), 10.0))
    assert out.shape == (4, 3) and not torch.allclose(out, net(x, torch.full((4,), 900.0)))
    net.body = torch.nn.Identity()
    s, c, d = (f(0.3 * math.pi) for f in (math.sin, math.cos, lambda a: math.sin(2 * a)))
    want = torch.tensor([0.3, s, d, 2 * d * (c**2 - s**2), c, c**2 - s**2, 2 * (c**2 - s**2) ** 2 - 1])
    torch.testing.assert_close(net(x, torch.full((4,), 300.0)), torch.cat([x, want.expand(4, 7)], 1))


# bad input


NOISE = Noise(range(4), (2,), dtype=torch.float64)
DOWN = geometric_grid(PLANE.schedule, 4, 3.0, 0.2)


@pytest.mark.parametrize(
    ("says", "call"),
    [
        ("steps", lambda: langevin(PLANE, NOISE(0), T, 0, 0.1, noise=NOISE)),
        ("delta", lambda: langevin(PLANE, NOISE(0), T, 3, 0.0, noise=NOISE)),
        ("delta", lambda: langevin(PLANE, NOISE(0), T, 3, math.nan, noise=NOISE)),
        ("delta", lambda: langevin(PLANE, NOISE(0), T, 3, math.inf, noise=NOISE)),
        ("x:", lambda: langevin(PLANE, NOISE(0) / 0, T, 3, 0.1, noise=NOISE)),
        ("t:", lambda: langevin(PLANE, NOISE(0), T + 1, 3, 0.1, noise=NOISE)),
        ("noise", lambda: langevin(PLANE, NOISE(0)[:2], T, 3, 0.1, noise=NOISE)),
        ("noise", lambda: annealed_langevin(PLANE, NOISE(0)[:2], DOWN, steps=1, epsilon=0.01, noise=NOISE)),
        ("ts", lambda: annealed_langevin(PLANE, NOISE(0), DOWN.flip(0), steps=1, epsilon=0.01, noise=NOISE)),
        ("steps", lambda: annealed_langevin(PLANE, NOISE(0), DOWN, steps=0, epsilon=0.01, noise=NOISE)),
        ("epsilon", lambda: annealed_langevin(PLANE, NOISE(0), DOWN, steps=1, epsilon=-0.01, noise=NOISE)),
        ("epsilon", lambda: annealed_langevin(PLANE, NOISE(0), DOWN, steps=1, epsilon=0.5, noise=NOISE)),
        ("smallest", lambda: geometric_grid(PLANE.schedule, 4, 0.2, 3.0)),
        ("smallest", lambda: geometric_grid(PLANE.schedule, 4, 3.0, 0.0)),
        ("largest", lambda: geometric_grid(VESchedule(0.1, 5.0), 4, 6.0, 0.2)),
        ("n = 1", lambda: geometric_grid(PLANE.schedule, 1, 3.0, 0.2)),
        ("score", lambda: explicit_score_loss(PLANE, NOISE(0), T, NOISE(1)[:2])),
        ("eps", lambda: denoising_score_loss(PLANE, NOISE(0), T, NOISE(1)[:2])),
        ("v:", lambda: sliced_score_loss(PLANE, NOISE(0), T, NOISE(1)[:2])),
    ],
)
def test_bad_input_is_refused(says, call):
    with pytest.raises(ValueError, match=says):
        call()
