"""The rule between kept and afresh, the straight path, and texts whose tokens are points that are learned."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from diffusion_nb.corruption import Blur, Gaussian, afresh, ancestral, kept, partly_fresh, share_of
from diffusion_nb.denoisers import NetDenoiser, predict_velocity, velocity
from diffusion_nb.experiments.encoder import (
    EncoderRecipe,
    compared,
    draw_encoded,
    encoder_trainer,
    loaded,
    mean_over_words,
    root_mean_square,
)
from diffusion_nb.experiments.pictures import halved
from diffusion_nb.experiments.words import as_tokens
from diffusion_nb.forward import q_sample
from diffusion_nb.grids import time_grid
from diffusion_nb.losses.bound import prior_kl
from diffusion_nb.losses.encoded import encoded_bound, token_loss
from diffusion_nb.losses.simple import denoising_loss, velocity_weight
from diffusion_nb.mixtures import GMMDenoiser, random_mixture
from diffusion_nb.nets.text import EmbeddedText
from diffusion_nb.noise import Noise
from diffusion_nb.samplers.linear import ddim
from diffusion_nb.schedules import (
    CosineSchedule,
    DDPMSchedule,
    LinearGamma,
    StraightSchedule,
    VPSchedule,
    linear_betas,
)

F64 = torch.float64
T = lambda v: torch.tensor(v, dtype=F64)
WORDS = as_tokens(["plane", "other", "words", "seven", "learn", "crane"])
TINY = EncoderRecipe(d=3, width=8, depth=1, heads=2, steps=4, batch=4, short=3, seeds=1, every=2)


@pytest.mark.parametrize("kernel", [Gaussian(CosineSchedule()), Blur(8, sigma=0.2)], ids=["noise", "blur"])
def test_the_rule_lies_between_kept_and_afresh(kernel):
    x, guess, z = (Noise(range(4), (1, 8, 8), dtype=F64)(k) for k in range(3))
    step = (kernel, x, guess, T(0.4), T(0.6), z)
    old, new, bare = kept(*step), afresh(*step), kernel.q_sample(guess, T(0.4), torch.zeros_like(z))
    assert torch.allclose(partly_fresh(lambda s, t: T(0.0))(*step), old)
    assert torch.allclose(partly_fresh(lambda s, t: T(1.0))(*step), new)
    assert torch.allclose(partly_fresh(lambda s, t: T(0.6))(*step), bare + 0.8 * (old - bare) + 0.6 * (new - bare))


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("schedule", [DDPMSchedule(linear_betas()), StraightSchedule()], ids=["chain", "straight"])
def test_partly_fresh_is_ddim_with_eta(schedule, eta):
    denoiser, noise, ts = (
        GMMDenoiser(random_mixture(), schedule),
        Noise(range(9), (2,), dtype=F64),
        time_grid(7, 0.95),
    )
    x = ancestral(Gaussian(schedule), lambda x, t: denoiser(x, t).x0, noise(0), ts, partly_fresh(share_of(schedule, eta)), noise=noise)  # fmt: skip
    assert torch.allclose(x, ddim(denoiser, noise(0), ts, eta, noise=noise), rtol=0, atol=1e-9)


def test_nothing_is_fresh_in_the_last_step():
    assert share_of(VPSchedule(), 1.0)(T(0.0), T(0.1)) == 0 < share_of(VPSchedule(), 1.0)(T(0.05), T(0.1)) <= 1


def test_the_straight_path():
    t = T([0.0, 0.25, 1.0])
    alpha, sigma = StraightSchedule()(t)
    assert torch.equal(alpha, 1 - t) and torch.equal(sigma, t)
    assert StraightSchedule().logsnr(t).tolist() == [math.inf, pytest.approx(2 * math.log(3)), -math.inf]


@pytest.mark.parametrize("schedule", [StraightSchedule(), CosineSchedule()], ids=["straight", "cosine"])
def test_a_network_may_predict_the_velocity(schedule):
    class Net(nn.Module):
        def forward(self, x, time):
            return torch.sin(3 * x)

    x = Noise(range(5), (2,), dtype=F64)(0)
    pred = NetDenoiser(Net(), schedule, predict_velocity)(x, T(0.3))
    assert torch.allclose(velocity(pred), torch.sin(3 * x))
    assert torch.allclose(pred.alpha * pred.x0 + pred.sigma * pred.eps, x)


@pytest.mark.parametrize("schedule", [StraightSchedule(), CosineSchedule()], ids=["straight", "cosine"])
def test_the_weight_makes_it_the_error_of_the_velocity(schedule):
    denoiser = GMMDenoiser(random_mixture(), schedule)
    x0, eps = (Noise(range(6), (2,), dtype=F64)(k) for k in (0, 1))
    t = T([0.1, 0.3, 0.5, 0.6, 0.8, 0.9])
    error = velocity(denoiser(q_sample(schedule, x0, t, eps), t)) - (eps - x0)
    assert torch.allclose(denoising_loss(denoiser, x0, t, eps, velocity_weight), error.square().mean(1))


def test_on_the_straight_path_the_weight_is_one_over_t_squared():
    assert torch.allclose(velocity_weight(StraightSchedule(), T([0.1, 0.5])), T([100.0, 4.0]))


# points that are learned


@pytest.fixture
def net():
    return TINY.fresh().eval().requires_grad_(False)


def test_points_have_mean_square_1_if_asked(net):
    free = replace(TINY, unit=False).fresh()
    assert root_mean_square(net) == pytest.approx(1, abs=1e-6) and abs(root_mean_square(free) - 1) > 1e-3
    assert torch.equal(free.embeddings(), free.points)


def test_what_is_almost_clean_is_read_off_the_points(net):
    clean = LinearGamma(-14.0, 4.0).requires_grad_(False)
    sharp = EmbeddedText(26, 5, clean, d=3, width=8, depth=1, heads=2).eval()
    x = q_sample(clean, sharp.encode(WORDS), T(0.0), Noise(range(6), (5, 3))(0)).float()
    assert torch.equal(sharp(x, T(0.0)).argmax(-1), WORDS)


def test_logits_are_those_of_the_normal_density_and_what_the_network_adds(net):
    x, t = Noise(range(6), (5, 3))(0), T(0.5)
    alpha, sigma = (c.float() for c in net.schedule(t))
    with torch.no_grad():
        density = -0.5 * ((x[:, :, None] - alpha * net.embeddings()) / sigma).square().sum(-1)
        for module in (net.head[1].weight, net.head[1].bias):
            module.zero_()
        assert torch.allclose(net(x, t).log_softmax(-1), density.log_softmax(-1), atol=1e-4)


def test_each_text_has_its_own_time(net):
    x, t = Noise(range(6), (5, 3))(0), torch.linspace(0.1, 0.9, 6)
    together = net(x, t)
    for i in range(6):
        assert torch.allclose(together[i], net(x[i : i + 1], t[i])[0], atol=1e-5)
    assert not torch.allclose(together, net(x, t.flip(0)), atol=1e-2)


def test_the_loss_sees_the_corrupted_text_only(net):
    noise = Noise(range(6), (5, 3))
    late = torch.full((6,), 0.9)
    assert not torch.allclose(token_loss(net, WORDS, late, noise(0)), token_loss(net, WORDS, late, noise(1)))
    x_t = q_sample(net.schedule, net.encode(WORDS), late, noise(0))
    by_hand = -net(x_t, late).log_softmax(-1).gather(-1, WORDS[..., None]).sum((1, 2))
    assert torch.allclose(token_loss(net, WORDS, late, noise(0)), by_hand)


def test_the_bound_has_three_terms(net):
    noise, t = Noise(range(6), (5, 3))(0), torch.full((6,), 0.3)
    encoded, schedule = net.encode(WORDS), net.schedule
    error = (encoded - net.guess(q_sample(schedule, encoded, t, noise), t)).square().sum((1, 2))
    h = 1e-5
    falls = (schedule.logsnr(T(0.3 - h)).exp() - schedule.logsnr(T(0.3 + h)).exp()) / (2 * h)
    want = prior_kl(schedule, encoded) + 0.5 * falls * error + token_loss(net, WORDS, 0 * t, noise)
    assert torch.allclose(encoded_bound(net, WORDS, t, noise), want.double(), rtol=1e-4)


def test_a_seed_gives_the_same_word_in_any_batch(net):
    assert torch.equal(draw_encoded(net, 5, steps=6)[3:], draw_encoded(net, 2, steps=6, first=3))


def test_training_is_a_function_of_its_seed():
    before = torch.random.get_rng_state()
    one, two = (encoder_trainer(TINY, WORDS).fit() for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(one.points, TINY.fresh().points)
    assert torch.equal(one.schedule.ends, TINY.fresh().schedule.ends)


def test_the_loss_is_that_of_points_with_noise_of_their_own_and_the_prior_term_if_asked(net):
    t, eps = torch.full((6,), 0.5), torch.zeros(6, 5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        noise = torch.randn(6, 5, TINY.d)
        torch.manual_seed(3)
        plain = TINY.loss(net, WORDS, t, eps)
        torch.manual_seed(3)
        more = replace(TINY, prior=True).loss(net, WORDS, t, eps) - plain
    assert torch.allclose(plain, token_loss(net, WORDS, t, noise))
    assert torch.allclose(more, prior_kl(net.schedule, net.encode(WORDS)), atol=1e-4)


def test_comparison_and_weights():
    sizes, ends = compared(TINY, WORDS, WORDS[:2])
    assert sizes.shape == (3, 1, 2) and ends.shape == (3, 1, 3) and ends.isfinite().all()
    assert torch.allclose(sizes[2], torch.ones(1, 2)) and torch.allclose(sizes[0, :, 0], sizes[1, :, 0])
    net = encoder_trainer(TINY, WORDS).fit().eval()
    again = loaded(TINY, {k: v for k, v in halved(net).items() if not k.startswith("schedule")})
    assert (again.points - net.points).abs().max() < 2e-3
    assert mean_over_words(token_loss, again, WORDS, 4).shape == (6,)
