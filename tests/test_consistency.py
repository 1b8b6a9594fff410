"""Consistency models: diffusers' scheduler step by step; the boundary; the losses on the exact teacher; levels; sampling; bad input."""

import math
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import CMStochasticIterativeScheduler
from diffusers.schedulers import scheduling_consistency_models
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffusion_nb.data import digits
from diffusion_nb.denoisers import (
    Clip,
    Consistency,
    DenoiserConsistency,
    NetDenoiser,
    VEView,
    boundary_scalings,
    predict_eps,
    predict_v,
    predict_x0,
)
from diffusion_nb.experiments.consistency import SIGMAS
from diffusion_nb.grids import edm_grid, sigma_grid, time_grid
from diffusion_nb.losses.consistency import (
    consistency_distillation,
    consistency_training,
    equal_weight,
    euler_step,
    heun_step,
    inverse_gap,
    lpips,
    mae,
    mse,
    perceptual,
    pseudo_huber,
)
from diffusion_nb.mixtures import GMMDenoiser, random_mixture
from diffusion_nb.models.model import About, Model
from diffusion_nb.nets.classifier import DigitClassifier
from diffusion_nb.nets.mlp import ScoreMLP
from diffusion_nb.noise import Noise
from diffusion_nb.recipes.consistency import train_consistency
from diffusion_nb.recipes.diffusion import recipe, recipe_denoiser
from diffusion_nb.samplers.consistency import consistency_sample, inpaint, super_resolve
from diffusion_nb.samplers.heun import heun
from diffusion_nb.samplers.linear import ddim
from diffusion_nb.schedules import (
    CosineSchedule,
    DDPMSchedule,
    EDMSchedule,
    RescaledSchedule,
    VESchedule,
    VPSchedule,
    linear_betas,
)
from diffusion_nb.time_samplers import (
    LevelSampler,
    constant_levels,
    doubling_levels,
    growing_decay,
    growing_levels,
    growing_number,
    log_normal,
)
from diffusion_nb.training.trainer import Trainer

F64 = torch.float64
MIXTURE = random_mixture(3)
SCHEDULE = EDMSchedule(0.001, 100)
TEACHER = GMMDenoiser(MIXTURE, SCHEDULE)
NOISE = Noise(range(20), (2,), dtype=F64)


def network(seed=0, width=16, **options) -> Consistency:
    torch.manual_seed(seed)
    return Consistency(ScoreMLP(2, width), options.pop("schedule", SCHEDULE), **options).double()


def stop_grid(n, smallest=0.02, largest=10.0):
    return edm_grid(SCHEDULE, n + 1, smallest, largest)[:-1]


def test_times_of_given_noise():
    ts = sigma_grid(SCHEDULE, 80.0, 5.0, 0.3)
    assert ts[-1] == 0
    torch.testing.assert_close(SCHEDULE(ts[:-1])[1], torch.tensor([80.0, 5.0, 0.3], dtype=F64), rtol=1e-12, atol=0)


# diffusers


@pytest.mark.parametrize("n", [2, 18, 40])
def test_the_levels_are_theirs(n):
    theirs = CMStochasticIterativeScheduler(n).sigmas
    ours = SCHEDULE(edm_grid(SCHEDULE, n, 0.002, 80))[1][:-1]
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("smallest", [0.0, 0.002, 0.3])
def test_the_scalings_are_theirs(smallest):
    theirs = CMStochasticIterativeScheduler(sigma_min=smallest or 0.002, sigma_data=0.5)
    sigma = torch.logspace(-2.5, 1.9, 50, dtype=F64)
    want = theirs.get_scalings_for_boundary_condition(sigma) if smallest else theirs.get_scalings(sigma)
    for ours, value in zip(boundary_scalings(sigma, smallest, 0.5), want, strict=True):
        torch.testing.assert_close(ours, value, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_sampling_is_theirs(steps, monkeypatch):
    "A random network under our wrapper and, bare, in their loop."
    theirs = CMStochasticIterativeScheduler(40, sigma_max=79.0, clip_denoised=False)
    theirs.set_timesteps(steps)
    sigmas = theirs.sigmas.double()
    sigmas[-1] = 0.002  # which they round to float32
    theirs.sigmas = sigmas
    end = sigma_grid(SCHEDULE, 0.002)[0].item()
    assert type(network().smallest) is float
    f = network(end=end, sigma_data=0.5)
    ts = torch.cat([sigma_grid(SCHEDULE, *sigmas[:-1].tolist())[:-1], torch.tensor([end], dtype=F64)])
    got = consistency_sample(f, 79 * NOISE(0), ts, noise=NOISE)
    drawn = iter(range(1, steps + 1))
    monkeypatch.setattr(scheduling_consistency_models, "randn_tensor", lambda *_, **__: NOISE(next(drawn)))
    x = 79 * NOISE(0)
    for t, label in zip(ts[:-1], theirs.timesteps, strict=True):
        out = f.net(theirs.scale_model_input(x, label), (1000 * t).float().expand(len(x)))
        x = theirs.step(out, label, x).prev_sample
    torch.testing.assert_close(got, x, rtol=0, atol=1e-6)  # time_at is good to 1e-9 or so of a sigma of 79


# the boundary


@settings(max_examples=30, deadline=None)
@given(
    st.floats(0, 0.9),
    st.floats(0.1, 3),
    st.sampled_from([SCHEDULE, VESchedule(), RescaledSchedule(CosineSchedule())]),
)
def test_nothing_is_changed_at_the_end(end, sigma_data, schedule):
    f = network(end=end, sigma_data=sigma_data, schedule=schedule)
    x = 3 * NOISE(0)
    torch.testing.assert_close(f(x, torch.tensor(end, dtype=F64)), x, rtol=1e-12, atol=1e-12)
    assert (f(x, torch.tensor(0.95)) - x).abs().max() > 1e-3


def test_times_one_for_all_or_one_a_sample():
    f, t = network(), torch.linspace(0.1, 1, 20, dtype=F64)
    each = torch.cat([f(x[None], time) for x, time in zip(NOISE(0), t, strict=True)])
    torch.testing.assert_close(f(NOISE(0), t), each, rtol=0, atol=1e-12)


@pytest.mark.parametrize("predict", [predict_v, predict_eps])
def test_a_denoiser_has_the_form(predict):
    "It leaves x as it is where there is no noise; one that predicts x0 does not."
    torch.manual_seed(1)
    schedule, t0 = DDPMSchedule(linear_betas()), torch.tensor(0.0, dtype=F64)
    f = DenoiserConsistency(NetDenoiser(ScoreMLP(2, 16), schedule, predict).double())
    torch.testing.assert_close(f(NOISE(0), t0), NOISE(0), rtol=0, atol=1e-12)
    plain = DenoiserConsistency(NetDenoiser(ScoreMLP(2, 16), schedule, predict_x0).double())
    assert (plain(NOISE(0), t0) - NOISE(0)).abs().max() > 0.1
    assert f.smallest == 0


# solver steps and losses


def test_steps_are_the_samplers():
    "A step of ours is a step of `ddim`, and of `heun`; and at time 0 both are the guess."
    ts, x = stop_grid(6), 10 * NOISE(0)
    a = b = x
    states = []
    heun(TEACHER, x, ts, callback=lambda i, x, pred: states.append(x))
    for i, (t, s) in enumerate(zip(ts[:-1], ts[1:], strict=True)):
        a, b = euler_step(TEACHER, a, t, s), heun_step(TEACHER, b, t, s)
        if i < len(ts) - 2:  # the last step of `heun` is Euler's
            torch.testing.assert_close(b, states[i], rtol=0, atol=1e-10)
    torch.testing.assert_close(a, ddim(TEACHER, x, ts), rtol=0, atol=1e-10)
    zero = torch.zeros((), dtype=F64)
    torch.testing.assert_close(heun_step(TEACHER, x, t, zero), euler_step(TEACHER, x, t, zero), rtol=0, atol=0)


@pytest.mark.parametrize("step", [euler_step, heun_step])
def test_steps_with_a_time_for_each(step):
    t, s = torch.linspace(0.3, 0.9, 20, dtype=F64), torch.linspace(0.0, 0.3, 20, dtype=F64)
    each = torch.cat([step(TEACHER, x[None], a, b) for x, a, b in zip(NOISE(0), t, s, strict=True)])
    torch.testing.assert_close(step(TEACHER, NOISE(0), t, s), each, rtol=0, atol=1e-10)


class Walk(nn.Module):
    "What a perfect student is: the solver's walk down the grid."

    schedule = SCHEDULE

    def __init__(self, ts, step):
        super().__init__()
        self.ts, self.step = ts, step

    def forward(self, x, t):
        rest = self.ts[self.ts <= t.max() + 1e-12]
        for upper, lower in zip(rest[:-1], rest[1:], strict=True):
            x = self.step(TEACHER, x, upper, lower)
        return x


@pytest.mark.parametrize("step", [euler_step, heun_step])
def test_the_solvers_walk_has_no_loss_and_others_have(step):
    ts = stop_grid(7)
    levels = LevelSampler(constant_levels(ts))
    x0, eps = MIXTURE.sample(20)[0], NOISE(0)
    for t in ts[:-1]:
        loss = consistency_distillation(TEACHER, levels, step, mae, weight=equal_weight)
        assert loss(Walk(ts, step), x0, t.expand(20), eps).abs().max() < 1e-12
    other = heun_step if step is euler_step else euler_step
    assert loss(Walk(ts, other), x0, ts[0].expand(20), eps).max() > 1e-4


def test_training_is_distillation_with_the_known_noise():
    "The lower point is x0 + sigma_s eps; written out here."
    ts, f = stop_grid(5), network()
    levels, x0, eps = LevelSampler(constant_levels(ts)), MIXTURE.sample(20)[0], NOISE(0)
    t, s = ts[1].expand(20), ts[2]
    want = f(x0 + SCHEDULE(t[0])[1] * eps, t) - f(x0 + SCHEDULE(s)[1] * eps, s)
    gap = SCHEDULE(t[0])[1] - SCHEDULE(s)[1]
    got = consistency_training(levels)(f, x0, t, eps)
    torch.testing.assert_close(got, want.square().mean(1) / gap, rtol=1e-10, atol=0)
    plain = consistency_training(levels, weight=equal_weight)(f, x0, t, eps)
    torch.testing.assert_close(plain, want.square().mean(1), rtol=1e-10, atol=0)


def test_no_gradient_through_the_target():
    f, other, ts = network(), network(seed=5), stop_grid(5)
    x0, eps, t = MIXTURE.sample(20)[0], NOISE(0), ts[0].expand(20)
    for make in (consistency_training, partial(consistency_distillation, TEACHER)):
        loss = make(LevelSampler(constant_levels(ts)), target=other)(f, x0, t, eps).sum()
        loss.backward()
        assert all(p.grad is None for p in other.parameters()) and all(p.grad is not None for p in f.parameters())
        own = make(LevelSampler(constant_levels(ts)))(f, x0, t, eps).sum()
        frozen = make(LevelSampler(constant_levels(ts)), target=network())(f, x0, t, eps).sum()  # the same weights
        for a, b in zip(*(torch.autograd.grad(v, list(f.parameters())) for v in (own, frozen)), strict=True):
            torch.testing.assert_close(a, b)


def test_gradients_meet_as_the_grid_grows():
    f, n = network(width=8), 4000
    x0, eps = MIXTURE.sample(n)[0], Noise(range(n), (2,), dtype=F64)(0)

    def gradient(make, h):
        ts = sigma_grid(SCHEDULE, 1.0, 1.0 - h)[:-1]
        loss = make(LevelSampler(constant_levels(ts)))(f, x0, ts[:1].expand(n), eps)
        return torch.cat(
            [
                torch.autograd.grad(v, list(f.parameters()), retain_graph=True)[0].flatten()
                for v in loss.view(40, -1).mean(1)
            ]
        ).view(40, -1)

    teacher = partial(consistency_distillation, TEACHER, step=euler_step)
    apart = gradient(consistency_training, 0.02) - gradient(teacher, 0.02)
    z = apart.mean(0).abs() / (apart.std(0) / 40**0.5 + 1e-12)
    assert z.max() < 6  # the same on average, for 80 numbers, up to a bias of order h
    assert apart.std() > 0  # but not sample by sample


# distances and weights


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-3, 3), st.integers(0, 100))
def test_pseudo_huber_is_between(c, seed):
    a, b = Noise([seed, seed + 1], (3, 4), dtype=F64)(0), Noise([seed, seed + 1], (3, 4), dtype=F64)(1)
    length = (a - b).flatten(1).norm(dim=1)
    got = pseudo_huber(c)(a, b)
    assert ((got <= length + 1e-12) & (got >= length - c - 1e-12)).all()
    torch.testing.assert_close(pseudo_huber(1e4)(a, b), length**2 / 2e4, rtol=1e-6, atol=0)
    assert pseudo_huber(c)(a, a).abs().max() < 1e-12


def test_huber_c_of_the_paper():
    a = torch.zeros(1, 3, 32, 32, dtype=F64)
    b = a.clone()
    b[0, 0, 0, 0] = 0.03
    c = 0.00054 * (3 * 32 * 32) ** 0.5
    torch.testing.assert_close(pseudo_huber()(a, b).item(), math.sqrt(0.03**2 + c**2) - c)


def test_distances_are_means_over_the_coordinates():
    a, b = torch.tensor([[1.0, -2.0], [3.0, 3.0]]), torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert mse(a, b).tolist() == [2.5, 0.5] and mae(a, b).tolist() == [1.5, 0.5]


def test_perceptual_sees_shape_and_not_itself():
    torch.manual_seed(0)
    judge = DigitClassifier(8)
    assert judge.head.in_features == judge.features(torch.zeros(1, 1, 8, 8)).shape[1] == 16
    distance = perceptual(DigitClassifier(8).eval().requires_grad_(False))
    x = digits().x[:40]
    assert distance(x, x).abs().max() == 0
    assert (distance(x, x.roll(1, 0)) > distance(x, (x + 0.01).clamp(-1, 1))).all()
    torch.testing.assert_close(distance(x, x.roll(1, 0)), distance(x.roll(1, 0), x))


def test_weights():
    t, s = torch.tensor([3.0, 0.5]), torch.tensor([1.0, 0.25])
    assert inverse_gap(t, s).tolist() == [0.5, 4.0] and equal_weight(t, s).tolist() == [1.0, 1.0]


# levels


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(0, 1000))
def test_levels_are_steps_of_the_grid(n, seed):
    ts = edm_grid(SCHEDULE, n + 1, 0.02, 80)
    levels = LevelSampler(constant_levels(ts))
    u = torch.rand(50, generator=torch.Generator().manual_seed(seed), dtype=F64)
    t = levels(u)
    i = (ts[:, None] == t).nonzero()
    assert len(i) == 50 and (i[:, 0] <= n).all()
    where = (ts[:, None] == t).int().argmax(0)
    assert levels.below(t).equal(ts[where + 1])


def test_each_step_is_as_likely_as_asked():
    ts = edm_grid(SCHEDULE, 10, 0.02, 80)
    u = (torch.arange(100_000, dtype=F64) + 0.5) / 100_000
    for density in (None, log_normal(SCHEDULE)):
        drawn = LevelSampler(constant_levels(ts), density)(u)
        share = torch.stack([(drawn == t).double().mean() for t in ts[:-1]])
        odds = torch.ones(10, dtype=F64) if density is None else density(ts)
        torch.testing.assert_close(share, odds / odds.sum(), rtol=0, atol=2e-5)
    sigma = SCHEDULE(ts)[1].numpy()
    with np.errstate(divide="ignore"):
        z = (np.log(sigma) + 1.1) / (2 * 2**0.5)
    want = torch.erf(torch.tensor(z[:-1])) - torch.erf(torch.tensor(z[1:]))  # the paper's form, twice ours
    torch.testing.assert_close(2 * odds, want)


def test_the_grid_grows_by_doubling():
    count = doubling_levels(lambda n: n, 10, 80, 400)
    assert [count(k) for k in (0, 99, 100, 199, 200, 300, 399, 400)] == [10, 10, 20, 20, 40, 80, 80, 80]
    levels = LevelSampler(doubling_levels(lambda n: edm_grid(SCHEDULE, n, 0.02, 80), 2, 8, 3))
    for k, n in enumerate((2, 4, 8, 8)):
        levels(torch.rand(4, dtype=F64), k)
        assert len(levels.rising) == n + 1


def growing(**options) -> Trainer:
    "Twelve steps of consistency training while the grid grows."
    levels = LevelSampler(doubling_levels(lambda n: edm_grid(SCHEDULE, n, 0.02, 80), 2, 16, 12))
    return Trainer(network().float(), MIXTURE.sample(100)[0].float(), steps=12, batch=8, lr=lambda k: 1e-2, time_sampler=levels,
                   loss=consistency_training(levels), device="cpu", **options)  # fmt: skip


def test_looking_at_a_batch_changes_nothing():
    "Drawing is a function of the step: a hook that draws leaves the training as it is, while the grid grows."
    plain, watched = (
        growing(hooks=hooks).fit() for hooks in ([], [lambda trainer: list(trainer.batches(trainer.step))])
    )
    assert all(a.equal(b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))


def test_the_number_of_the_step_survives_a_kill(tmp_path):
    "A training that stops and goes on is the training that did not stop, while the grid grows."
    whole = growing().fit()
    first = growing(checkpoint=tmp_path / "c.safetensors")
    for _ in range(7):
        first.train_step()
    first.save()
    second = growing(checkpoint=tmp_path / "c.safetensors")
    assert second.step == 7
    second.train_step()
    assert len(second.time_sampler.rising) == 9  # step 7 of 12: the grid has grown twice
    for a, b in zip(whole.parameters(), second.fit().parameters(), strict=True):
        assert a.equal(b)


# sampling


def test_calls_noise_and_callbacks():
    f, seen, asked = network(), [], []
    f.register_forward_pre_hook(lambda m, args: asked.append(float(args[1])))
    ts = sigma_grid(SCHEDULE, 80.0, 5.0, 1.0)
    x = consistency_sample(f, 80 * NOISE(0), ts, noise=NOISE, callback=lambda i, x: seen.append((i, x)))
    assert asked == ts[:-1].tolist() and [i for i, _ in seen] == [0, 1, 2] and seen[-1][1].equal(x)
    y = f(80 * NOISE(0), ts[0])
    y = f(y + (25 - f.smallest**2) ** 0.5 * NOISE(1), ts[1])
    torch.testing.assert_close(x, f(y + (1 - f.smallest**2) ** 0.5 * NOISE(2), ts[2]), rtol=0, atol=1e-7)


def test_a_picture_depends_on_its_seed_alone():
    f, few, ts = network(), Noise([5, 17], (2,), dtype=F64), sigma_grid(SCHEDULE, 80.0, 5.0)
    both = [consistency_sample(f, 80 * n(0), ts, noise=n) for n in (NOISE, few)]
    torch.testing.assert_close(both[0][[5, 17]], both[1], rtol=0, atol=1e-12)


def test_edits():
    x, known = Noise(range(5), (1, 8, 8))(0), Noise(range(5), (1, 8, 8))(1)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:4] = True
    out = inpaint(known, mask)(x)
    assert out[:, :, :4].equal(known[:, :, :4]) and out[:, :, 4:].equal(x[:, :, 4:])
    coarse = nn.functional.avg_pool2d(known, 2)
    out = super_resolve(coarse)(x)
    torch.testing.assert_close(nn.functional.avg_pool2d(out, 2), coarse, rtol=0, atol=1e-6)
    torch.testing.assert_close(super_resolve(coarse)(out), out, rtol=0, atol=1e-6)
    torch.testing.assert_close(super_resolve(nn.functional.avg_pool2d(x, 2))(x), x, rtol=0, atol=1e-6)
    f, ts = network(), sigma_grid(SCHEDULE, 80.0, 5.0)
    mask = torch.tensor([True, False])
    got = consistency_sample(f, 80 * NOISE(0), ts, noise=NOISE, edit=inpaint(NOISE(7), mask))
    assert got[:, 0].equal(NOISE(7)[:, 0]) and not got[:, 1].equal(NOISE(7)[:, 1])


def test_sigmas_of_the_book_fall():
    for n, sigmas in SIGMAS.items():
        assert len(sigmas) == n and (sigma_grid(RescaledSchedule(CosineSchedule()), *sigmas).diff() < 0).all()


# the trainers


@pytest.mark.parametrize("distil", [True, False])
@pytest.mark.parametrize("classes", [10, 0])
def test_a_model_from_the_folder_of_a_teacher(tmp_path, monkeypatch, distil, classes):
    "At toy size: the command for the larger sets."
    r = replace(recipe("digits"), width=4, classes=classes)
    teacher = recipe_denoiser(r, (1, 8, 8))
    Model(teacher, About("diffusion", r, (1, 8, 8), 17)).save(tmp_path)
    short = ";".join(f"consistency.mnist.{item}" for item in ("data=digits", "steps=3", "batch=4"))
    monkeypatch.setenv("DIFFUSION_NB_SET", short)
    f = train_consistency("mnist", Model.load(tmp_path).denoiser, classes, distil, device="cpu")
    Model(f, About("consistency", r, (1, 8, 8), 17)).save(tmp_path / "consistency")
    again = Model.load(tmp_path / "consistency").denoiser
    y = dict(y=torch.arange(3)) if classes else {}
    x, z = (
        consistency_sample(g.eval(), 40 * Noise(range(3), (1, 8, 8))(0), sigma_grid(g.schedule, 40.0), **y)
        for g in (f, again)
    )
    assert torch.isfinite(x).all() and x.equal(z)


# bad input


def test_bad_schedules():
    for schedule in (VPSchedule(), CosineSchedule()):
        with pytest.raises(ValueError, match="expected a schedule with alpha = 1"):
            network(schedule=schedule)
        with pytest.raises(ValueError, match="expected a schedule with alpha = 1"):
            consistency_distillation(GMMDenoiser(MIXTURE, schedule), LevelSampler(constant_levels(stop_grid(3))))
    consistency_distillation(
        VEView(Clip(GMMDenoiser(MIXTURE, VPSchedule()))), LevelSampler(constant_levels(stop_grid(3)))
    )


def test_bad_levels():
    for ts in (time_grid(5).flip(0), torch.ones(3), torch.ones(1), torch.ones(2, 2)):
        with pytest.raises(ValueError, match="times that fall"):
            LevelSampler(constant_levels(ts))
    with pytest.raises(ValueError, match="above the lowest level"):
        LevelSampler(constant_levels(stop_grid(3))).below(stop_grid(3)[-1:])


def test_bad_sampling():
    f, ts = network(), sigma_grid(SCHEDULE, 80.0, 5.0)
    with pytest.raises(ValueError, match="puts noise back, so say which"):
        consistency_sample(f, NOISE(0), ts)
    with pytest.raises(ValueError, match="times that fall"):
        consistency_sample(f, NOISE(0), ts.flip(0), noise=NOISE)
    with pytest.raises(ValueError, match="NaN or infinite"):
        consistency_sample(f, NOISE(0) / 0, ts, noise=NOISE)
    with pytest.raises(ValueError, match="shaped like x"):
        consistency_sample(f, NOISE(0)[:3], ts, noise=NOISE)
    consistency_sample(f, NOISE(0), sigma_grid(SCHEDULE, 80.0))  # one step needs none


def test_levels_grow_as_in_the_paper():
    "N(k) and μ(k) of Song et al. 2023, appendix C, by hand."
    K, s0, s1, mu0 = 800, 2, 150, 0.9
    number, decay = growing_number(s0, s1, K), growing_decay(s0, s1, K, mu0)
    for k in (0, 1, 10, 400, 799, 800):
        want = math.ceil(math.sqrt(k / K * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1) + 1
        assert number(k) == want and decay(k) == pytest.approx(math.exp(s0 * math.log(mu0) / want))
    assert (number(0), number(K), number(10 * K)) == (s0, s1 + 1, s1 + 1)
    seen = []
    levels = growing_levels(lambda n: seen.append(n) or time_grid(n), s0, s1, K)
    assert [len(levels(k)) for k in (0, 0, 400, 800)] == [2, 2, number(400), 151] and seen == [
        1,
        number(400) - 1,
        150,
    ]


class Gap(nn.Module):
    "How far apart the mean colours of two pictures are, one number each, as LPIPS gives them; remembers what it was shown."

    def forward(self, a, b):
        self.shown = a.shape
        return (a.mean((2, 3)) - b.mean((2, 3))).square().sum(1)[:, None, None, None]


def test_lpips_is_shown_large_pictures_in_colour():
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    x[0], y = 0.5, torch.zeros(3, 1, 8, 8)
    net = Gap()
    got = lpips(net, size=32)(x, y)
    assert net.shown == (3, 3, 32, 32) and got.shape == (3,) and abs(got[0] - 0.75) < 1e-6
    large = lpips(net, size=8)(x, y)
    assert net.shown == (3, 3, 8, 8)
    torch.testing.assert_close(large, 3 * x.mean((1, 2, 3)) ** 2)


def test_lpips_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match="pip install lpips"):
        lpips()

    def offline(**options):
        raise OSError("no network")

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=offline))
    with pytest.raises(ConnectionError, match="could not be downloaded .no network."):
        lpips()
