"""The learned variance, the hybrid loss and times drawn by importance: against diffusers, torch.distributions and loops written out."""

import math
from types import SimpleNamespace as Namespace

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers import scheduling_ddpm
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributions import Normal, kl_divergence

from diffusion_nb.data import Pictures
from diffusion_nb.denoisers import Clip, NetDenoiser, Prediction, predict_v
from diffusion_nb.experiments import levels
from diffusion_nb.experiments.variance import WAYS, BoundsRecipe, bits_card, bounds_denoiser, fixed_steps
from diffusion_nb.forward import Step, posterior_steps, q_posterior, q_sample
from diffusion_nb.grids import time_grid
from diffusion_nb.likelihood.bits import bits_per_dim
from diffusion_nb.losses.bound import bound_loss, hybrid_loss, vlb_term
from diffusion_nb.losses.simple import denoising_loss
from diffusion_nb.mixtures import GMMDenoiser, ring_mixture
from diffusion_nb.nets.unet import UNet
from diffusion_nb.noise import Noise
from diffusion_nb.schedules import CosineSchedule, DDPMSchedule, cosine_betas, linear_betas
from diffusion_nb.time_samplers import LossSecondMomentSampler, chain_times, importance_weighted
from diffusion_nb.training.trainer import Trainer
from diffusion_nb.util.checks import expand_as
from diffusion_nb.variances import fixed_large, fixed_small, free_variance, learned_variance
from tools.kernels import SERVER

F64 = torch.float64
BETAS = {"linear": linear_betas(1000), "cosine": cosine_betas(1000)}


def draw(k, n=8, shape=(1, 4, 4)):
    return Noise(range(n), shape, dtype=F64)(k)


class Speaker(nn.Module):
    "A network of a few numbers whose two outputs depend on picture and time."

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.4, -0.2, 0.3]))

    def forward(self, x, t, y=None):
        first = self.w[0] * x + self.w[1] * t[:, None, None, None] / 1000
        return torch.cat([first, torch.tanh(self.w[2] * x)], dim=1)


# the variance, against diffusers


def scheduler(betas, **options) -> DDPMScheduler:
    "Theirs with its tables, which it keeps in float32, computed again in float64."
    theirs = DDPMScheduler(len(betas), clip_sample=False, **options)
    theirs.betas, theirs.one = betas, torch.ones((), dtype=F64)
    theirs.alphas = 1 - betas
    theirs.alphas_cumprod = theirs.alphas.cumprod(0)
    return theirs


@pytest.mark.parametrize("name", BETAS)
def test_variance_is_theirs_at_every_time(name):
    theirs, ours = scheduler(BETAS[name], variance_type="learned_range"), DDPMSchedule(BETAS[name])
    i = torch.arange(1, 1000, dtype=F64)  # at their index 0 β̃ is 0, theirs is clamped so that its logarithm exists
    step = posterior_steps(ours, i / 1000, (i + 1) / 1000)
    extra = draw(0, 999, (1,))[:, 0]
    got = learned_variance(Prediction(None, None, None, None, extra), step)
    want = [theirs._get_variance(k, predicted_variance=extra[k - 1]) for k in range(1, 1000)]  # its logarithm
    # theirs loses digits in 1 - ᾱ_t/ᾱ_s ≥ 4e-5 (relative 3e-12)
    torch.testing.assert_close(got.log(), torch.stack(want), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", BETAS)
def test_step_is_theirs(name, monkeypatch):
    theirs, ours = scheduler(BETAS[name], variance_type="learned_range"), DDPMSchedule(BETAS[name])
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: noise)
    x, eps, extra, noise = (draw(k, 2, (3, 4, 4)) for k in range(4))
    for i in [*range(1, 10), *range(10, 950, 50), 900, 990]:
        want = theirs.step(torch.cat([eps, extra], dim=1), i, x).prev_sample
        s, t = (torch.tensor(j / 1000, dtype=F64) for j in (i, i + 1))
        alpha, sigma = ours(t)
        pred = Prediction(x, alpha, sigma, (x - sigma * eps) / alpha, extra)
        mean, _ = q_posterior(ours, x, pred.x0, s, t)
        numbers = Step._make(c.item() for c in posterior_steps(ours, s, t))
        torch.testing.assert_close(mean + learned_variance(pred, numbers) ** 0.5 * noise, want, rtol=0, atol=1e-8)


@settings(max_examples=50, deadline=None)
@given(t=st.floats(0.02, 1), part=st.floats(0.05, 0.95), frac=st.floats(0, 1))
def test_variance_is_between_and_numbers_and_tensors_agree(t, part, frac):
    schedule = CosineSchedule()
    step = posterior_steps(schedule, torch.tensor(t * part, dtype=F64), torch.tensor(t, dtype=F64))
    pred = Prediction(None, None, None, None, torch.tensor([2 * frac - 1], dtype=F64))
    v = learned_variance(pred, step)
    assert step.small * (1 - 1e-9) <= v <= step.large * (1 + 1e-9)
    assert learned_variance(pred, Step._make(c.item() for c in step)).item() == pytest.approx(v.item(), rel=1e-12)
    assert v.item() == pytest.approx(step.large.item() ** frac * step.small.item() ** (1 - frac), rel=1e-9)


# the bound, against torch.distributions


@pytest.mark.parametrize("decoder", [learned_variance, fixed_small, fixed_large])
@pytest.mark.parametrize("name", BETAS)
def test_bound_terms_are_those_of_torch_distributions(name, decoder):
    T, levels = 1000, 17
    schedule, t = DDPMSchedule(BETAS[name]), torch.tensor([1, 2, 3, 20, 200, 500, 800, 950], dtype=F64) / 1000
    x0 = (draw(0).clamp(-1, 1) * 8).round() / 8
    x_t = q_sample(schedule, x0, t, draw(1))
    alpha, sigma = (expand_as(c, x0) for c in schedule(t))
    pred = Prediction(x_t, alpha, sigma, x0 + expand_as(torch.where(t < 0.0015, 0.02, 0.1), x0) * draw(2), draw(3))
    got = vlb_term(schedule, pred, x0, t, T, levels, learned_variance, decoder)
    for i, (k, own) in enumerate(zip((t * T).round().int().tolist(), t, strict=True)):
        abar = (1 - BETAS[name]).cumprod(0)
        beta, now, before = BETAS[name][k - 1], abar[k - 1], abar[k - 2] if k > 1 else torch.ones((), dtype=F64)
        tilde = (1 - before) / (1 - now) * beta if k > 1 else (1 - now) / (1 - abar[1]) * BETAS[name][1]
        frac = {learned_variance: (pred.extra[i] + 1) / 2, fixed_small: 0, fixed_large: 1}[
            decoder if k == 1 else learned_variance
        ]
        v = (frac * beta.log() + (1 - frac) * tilde.log()).exp()
        a, b = (1 - beta).sqrt() * (1 - before) / (1 - now), before.sqrt() * beta / (1 - now)
        mean, guess = a * x_t[i] + b * x0[i], a * x_t[i] + b * pred.x0[i]
        if k == 1:
            p, half = Normal(guess, v.sqrt()), 1 / (levels - 1)
            right = torch.where(x0[i] > 0.99, 1.0, p.cdf(x0[i] + half))
            left = torch.where(x0[i] < -0.99, 0.0, p.cdf(x0[i] - half))
            want = -(right - left).log().mean()
        else:
            want = kl_divergence(Normal(mean, tilde.sqrt()), Normal(guess, v.sqrt())).mean()
        assert got[i].item() == pytest.approx(T * want.item(), rel=1e-7), own


def test_a_free_variance_is_what_the_network_says():
    schedule, t = DDPMSchedule(BETAS["linear"]), torch.tensor([20, 500], dtype=F64) / 1000
    x0, extra = draw(0, 2).clamp(-1, 1), draw(3, 2)
    alpha, sigma = (expand_as(c, x0) for c in schedule(t))
    pred = Prediction(q_sample(schedule, x0, t, draw(1, 2)), alpha, sigma, x0 + 0.1 * draw(2, 2), extra)
    step = Step._make(expand_as(c, x0) for c in posterior_steps(schedule, t - 1e-3, t))
    wrong = Normal(step.b * (pred.x0 - x0), (extra / 2).exp())  # the mean of the step, less the true one
    want = 1000 * kl_divergence(Normal(torch.zeros_like(x0), step.small.sqrt()), wrong).flatten(1).mean(1)
    torch.testing.assert_close(vlb_term(schedule, pred, x0, t, 1000, 17, free_variance), want)


def test_hybrid_loss_is_the_sum_and_its_guess_hears_only_the_first():
    T, weight = 50, 0.01
    denoiser = NetDenoiser(Speaker().double(), DDPMSchedule(linear_betas(50)), predict_v)
    x0, eps, t = (draw(0).clamp(-1, 1) * 8).round() / 8, draw(1), chain_times(T)(torch.rand(8, dtype=F64))
    got = hybrid_loss(T, 17, weight)(denoiser, x0, t, eps)
    bound = bound_loss(T, 17, learned_variance, learned_variance)
    want = denoising_loss(denoiser, x0, t, eps) + weight * bound(denoiser, x0, t, eps) / math.log(2)
    torch.testing.assert_close(got, want)
    w = denoiser.net.w
    (hybrid,), (simple,) = (
        torch.autograd.grad(loss(denoiser, x0, t, eps).mean(), w)
        for loss in (hybrid_loss(T, 17, weight), denoising_loss)
    )
    assert hybrid[:2].equal(simple[:2])
    assert simple[2] == 0 != hybrid[2]
    usual, thousandth = (hybrid_loss(T, 17, *w)(denoiser, x0, t, eps) for w in ((), (0.001,)))
    assert usual.equal(thousandth)


def test_fixed_steps_are_what_bits_per_dim_counts():
    x = (draw(0).float().clamp(-1, 1) * 8).round() / 8
    denoiser = NetDenoiser(Speaker(), DDPMSchedule(linear_betas(50)), predict_v)
    bits = {
        var: bits_per_dim(denoiser, x, time_grid(50), levels=17, var=var)
        for var in (learned_variance, fixed_small, fixed_large)
    }
    for var in (fixed_small, fixed_large):
        torch.testing.assert_close(
            fixed_steps(bits[learned_variance], denoiser.schedule, var), bits[var].steps, rtol=1e-5, atol=1e-6
        )


# times by importance


def filled(T=10, **options) -> LossSecondMomentSampler:
    history = LossSecondMomentSampler(T, **dict(memory=2, uniform=0.1) | options)
    for k in range(history.memory):
        history.remember(torch.arange(1, T + 1, dtype=F64) / T, torch.arange(1.0, T + 1) * (k + 1))
        history.update()
    return history


def test_uniform_until_every_t_was_seen_often_enough():
    history = LossSecondMomentSampler(4, memory=3)
    t = torch.arange(1, 5, dtype=F64) / 4
    for _ in range(2):
        history.remember(t, torch.tensor([1.0, 2.0, 3.0, 4.0]))
        history.update()
    history.remember(t[:3], torch.tensor([1.0, 2.0, 3.0]))
    history.update()
    assert (history.probabilities() - 1 / 4).abs().max() < 1e-15
    history.remember(t[3:], torch.tensor([4.0]))
    history.update()
    want = 0.999 * torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64) + 0.001 / 4
    torch.testing.assert_close(history.probabilities(), want)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=60), st.integers(1, 5), st.integers(1, 60), st.integers(1, 9)
)
def test_the_last_losses_are_kept_however_they_are_fed(places, memory, batch, part):
    history, T = LossSecondMomentSampler(6, memory), 6
    t, losses = torch.tensor(places, dtype=F64) / T, torch.arange(1.0, len(places) + 1)
    for step, values in zip(t.split(batch), losses.split(batch), strict=True):
        for mine, own in zip(step.split(part), values.split(part), strict=True):
            history.remember(mine, own)
        history.update()
    for k in range(1, 7):
        own = losses[t == k / T].double()
        assert history.count[k - 1] == len(own)
        kept = torch.zeros(memory, dtype=F64)
        for i, loss in enumerate(own):  # one after the other, the oldest makes room
            kept[i % memory] = loss
        assert history.last[k - 1].equal(kept)


def test_p_follows_the_root_of_the_mean_square():
    history, t = LossSecondMomentSampler(2, memory=2), torch.tensor([0.5, 1.0], dtype=F64)
    for losses in ([3.0, 5.0], [4.0, 0.0]):  # √((9 + 16) / 2) twice, but means of 3.5 and 2.5
        history.remember(t, torch.tensor(losses))
        history.update()
    assert history.probabilities().tolist() == [0.5, 0.5]


def test_a_step_of_which_nothing_was_remembered_is_refused():
    with pytest.raises(ValueError, match=r"train on importance_weighted\(loss, history\)"):
        LossSecondMomentSampler(3).update()


def remember_in_a_team(rank, world, folder, t, losses):
    "One process of `world`, which remembers its share of the batch."
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/team", rank=rank, world_size=world)
    history = LossSecondMomentSampler(4, memory=3)
    for times, values in zip(t, losses, strict=True):
        history.remember(times.chunk(world)[rank], values.chunk(world)[rank])
        history.update()
    save_file(history.state_dict(), f"{folder}/{rank}.safetensors")


def test_processes_share_one_memory(tmp_path):
    t = torch.randint(1, 5, (5, 8), generator=torch.Generator().manual_seed(0)).double() / 4
    losses, alone = torch.arange(1.0, 41).reshape(5, 8), LossSecondMomentSampler(4, memory=3)
    for times, values in zip(t, losses, strict=True):
        alone.remember(times, values)
        alone.update()
    team = [SERVER.Process(target=remember_in_a_team, args=(rank, 2, tmp_path, t, losses)) for rank in range(2)]
    for process in team:
        process.start()
    for process in team:
        process.join()
    for rank in range(2):
        theirs = load_file(tmp_path / f"{rank}.safetensors")
        assert all(theirs[name].equal(value) for name, value in alone.state_dict().items())


def test_times_are_the_inverse_of_the_distribution():
    history, u = filled(), (torch.arange(100_000, dtype=F64) + 0.5) / 100_000
    t = history(u)
    assert set((t * 10).round().int().tolist()) == set(range(1, 11)) and (t.diff() >= 0).all()
    share = torch.bincount((t * 10).round().long() - 1) / len(t)
    torch.testing.assert_close(share.double(), history.probabilities(), rtol=0, atol=2e-5)
    torch.testing.assert_close(history.weight(t), 1 / (10 * history.probabilities()[(t * 10).round().long() - 1]))
    assert history(torch.tensor([0.0, 1 - 2**-53], dtype=F64)).tolist() == [0.1, 1.0]


def test_a_history_of_zeros_stays_uniform():
    history = LossSecondMomentSampler(3, memory=1)
    history.remember(torch.arange(1, 4, dtype=F64) / 3, torch.zeros(3))
    history.update()
    assert (history.probabilities() - 1 / 3).abs().max() < 1e-15


def test_weighted_weighs_by_the_p_that_drew_and_then_remembers():
    history = filled()
    t, losses = history(torch.tensor([0.1, 0.5, 0.5, 0.9])), torch.tensor([5.0, 6.0, 7.0, 8.0])
    want = losses * history.weight(t).float()
    parts = [
        importance_weighted(lambda *_, v=v: v, history)(None, None, u, None)
        for u, v in zip(t.split(2), losses.split(2), strict=True)
    ]
    got = torch.cat(parts)
    assert (
        got.equal(want) and got.dtype == torch.float32
    )  # however many parts: the memory takes them in after the step
    history.update()
    assert history.count.sum() == 24 and not (losses * history.weight(t).float()).equal(want)


def test_expectation_by_enumeration():
    losses, history = draw(0, 10, (30,)).square(), filled()
    p = history.probabilities()
    t = torch.arange(1, 11, dtype=F64) / 10
    total = sum((p * history.weight(t) * losses[:, j]).sum() for j in range(30)) / 30
    assert total.item() == pytest.approx(losses.mean().item(), rel=1e-12)
    history = LossSecondMomentSampler(10, memory=30)
    for column in losses.T:
        history.remember(t, column)
        history.update()
    second = lambda p: (losses.square().mean(1) / (100 * p)).sum()
    assert second(history.probabilities()) < second(torch.full((10,), 0.1)) and second(
        history.probabilities()
    ) < second(p)


# training


def trainer(path, steps=40) -> Trainer:
    history, T = LossSecondMomentSampler(20, memory=2), 20
    schedule = DDPMSchedule(linear_betas(T).clamp(max=0.5)) if T >= 21 else CosineSchedule()
    x0 = (draw(0, 30).float().clamp(-1, 1) * 8).round() / 8
    return Trainer(NetDenoiser(Speaker(), schedule, predict_v), x0, steps=steps, lr=lambda k: 0.01, batch=8, time_sampler=history, device="cpu",
                   loss=importance_weighted(bound_loss(T, 17, learned_variance), history), checkpoint=path, save_every=15)  # fmt: skip


def test_training_resumes_with_its_memory_bit_for_bit(tmp_path):
    whole, cut = trainer(tmp_path / "whole"), trainer(tmp_path / "cut")
    whole.fit()
    for _ in range(25):
        cut.train_step()
    cut.save()
    del cut
    again = trainer(tmp_path / "cut")
    assert again.step == 25 and again.time_sampler.count.sum() == 25 * 8
    assert not again.time_sampler.probabilities().allclose(
        torch.tensor(1 / 20, dtype=F64)
    )  # importance was at work
    again.fit()
    assert all(a.equal(b) for a, b in zip(again.state.averages, whole.state.averages, strict=True))
    assert again.time_sampler.last.equal(whole.time_sampler.last) and again.time_sampler.count.equal(
        whole.time_sampler.count
    )


def test_networks_of_the_table_differ_in_the_outputs_alone():
    r = BoundsRecipe(T=50, width=8)
    sizes = [sum(p.numel() for p in bounds_denoiser(r, linear_betas, c).parameters()) for c in (1, 2)]
    assert sizes[1] - sizes[0] == 8 * 9 + 1
    assert bounds_denoiser(r, cosine_betas, 2, seed=3).net.stem.weight.equal(
        bounds_denoiser(r, linear_betas, 1, seed=3).net.stem.weight
    )
    row = torch.tensor([[[1.0, 2.0, 3.0, math.nan]] * 2, [[1.0, 4.0, 3.0, math.nan]] * 2])
    assert bits_card(row)["large, whole chain"] == "3.000 ± 1.414" and "learned, whole chain" not in bits_card(row)
    assert len(WAYS) == 6


# bad input


def test_a_network_that_says_nothing():
    ring = GMMDenoiser(ring_mixture(3), CosineSchedule())
    step = posterior_steps(ring.schedule, torch.tensor(0.4, dtype=F64), torch.tensor(0.5, dtype=F64))
    with pytest.raises(
        ValueError, match=r"says nothing about the variance.*expected a network with twice the channels"
    ):
        learned_variance(ring(draw(0, 4, (2,)), torch.tensor(0.5, dtype=F64)), step)


@pytest.mark.parametrize(
    "options", [dict(T=0), dict(memory=0), dict(uniform=0.0), dict(uniform=1.5), dict(uniform=math.nan)]
)
def test_histories_that_make_no_sense(options):
    with pytest.raises(ValueError, match=r"expected T and memory of 1 or more, and uniform in \(0, 1\]; got"):
        LossSecondMomentSampler(**dict(T=10) | options)


@pytest.mark.parametrize("t", [0.0, 0.15, 1.1, math.nan])
def test_times_that_are_not_on_the_chain(t):
    history = LossSecondMomentSampler(10)
    with pytest.raises(ValueError, match=r"t: expected times of the chain, 1/10, 2/10, …, 1; got"):
        history.weight(torch.tensor([0.5, t]))
    with pytest.raises(ValueError, match="times of the chain"):
        history.remember(torch.tensor([0.5, t]), torch.ones(2))
        history.update()


def test_two_channels_of_a_unet_arrive_as_aux():
    net = UNet(1, 8, (1,), 1, (), channels_out=2)
    nn.init.normal_(net.head[-1].weight)
    pred = NetDenoiser(net, CosineSchedule(), predict_v)(draw(0).float(), torch.tensor(0.5))
    assert pred.extra.equal(net(draw(0).float(), torch.full((8,), 500.0))[:, 1:])


def test_bits_of_four_variances_are_those_of_the_bound_with_each(monkeypatch):
    "Another route: the bound with each variance by itself. The decoder of fixed variances has noise of its own, so these are compared by their differences."
    x = Noise(range(6), (1, 28, 28))(0).tanh().mul(127.5).add(127.5).round() / 127.5 - 1
    y, r = torch.arange(6), levels.LevelsRecipe(T=6, width=8, judged=4)
    monkeypatch.setattr(levels, "data_set", lambda name: Namespace(load=lambda: Pictures(x, y, x, y)))
    denoiser = levels.levels_denoiser(r, cosine_betas, 2).eval()
    nn.init.normal_(denoiser.net.head[-1].weight, std=0.05)
    small, large, best, own = levels.bits_of_variances(denoiser, r, learned=True).T
    count = lambda **var: bits_per_dim(Clip(denoiser), x[:4], time_grid(6), levels=256, y=y[:4], **var)
    by_small, by_large = count(var=fixed_small), count(var=fixed_large)
    assert torch.allclose(own, count(var=learned_variance, decoder_var=learned_variance).total, atol=1e-6)
    assert torch.allclose(large - small, (by_large.steps - by_small.steps).sum(1), atol=1e-5)
    assert (small - by_small.total).abs().max() < 0.2 < (large - small).abs().min()
    assert best.mean() < small.mean() and best.mean() < large.mean()
    assert (
        levels.bits_of_variances(levels.levels_denoiser(r, cosine_betas, 1).eval(), r, learned=False)[:, 3]
        .isnan()
        .all()
    )
