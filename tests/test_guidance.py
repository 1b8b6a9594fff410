"""Guidance: diffusers' numbers in both of its conventions, what a wrapper must keep, one call for two guesses, bad input."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from diffusers.guiders import ClassifierFreeGuidance
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from diffusion_nb.data import digits
from diffusion_nb.denoisers import Clip, Denoiser, NetDenoiser, Prediction, predict_v
from diffusion_nb.experiments.evaluation import variety
from diffusion_nb.forward import q_sample
from diffusion_nb.grids import even_logsnr_grid, time_grid
from diffusion_nb.guidance import (
    CFG,
    AutoGuidance,
    ClassifierGuidance,
    DynamicThreshold,
    SelfConditioned,
    Unconditional,
    interval,
)
from diffusion_nb.losses.simple import denoising_loss, self_conditioned
from diffusion_nb.mixtures import GMMDenoiser, random_mixture
from diffusion_nb.nets.classifier import NoisyClassifier, classifier_loss
from diffusion_nb.nets.conditioning import WithGuess
from diffusion_nb.nets.unet import UNet
from diffusion_nb.noise import Noise
from diffusion_nb.samplers.guided import guided_ddpm
from diffusion_nb.samplers.linear import ddim, ddpm, dpmpp_2m
from diffusion_nb.schedules import CosineSchedule, DDPMSchedule, EDMSchedule, VESchedule, VPSchedule, linear_betas
from diffusion_nb.training.lr import warmup_cosine
from diffusion_nb.training.trainer import Trainer
from diffusion_nb.variances import fixed_large, fixed_small

F64 = torch.float64
MIXTURE, ANY = random_mixture(3), 3
CHAIN = DDPMSchedule(linear_betas(1000))
SCHEDULES = {
    "chain": CHAIN,
    "vp": VPSchedule(),
    "ve": VESchedule(),
    "edm": EDMSchedule(0.002),
    "cosine": CosineSchedule(),
}
every = pytest.mark.parametrize("name", SCHEDULES)
NOISE = Noise(range(12), (2,), dtype=F64)
Y = torch.arange(12) % 3
HALF = torch.tensor(0.5, dtype=F64)


def states(schedule, t=HALF):
    return q_sample(schedule, MIXTURE.sample(12, 5)[0], t, NOISE(0))


def read_off(best):
    return lambda x, t, y: best.class_probs(x, t).log().gather(1, y[:, None])[:, 0]


class Echo(Denoiser):
    "Says what it was told, and remembers how it was called: x0 is y, aux is minus y."

    def __init__(self, schedule=SCHEDULES["cosine"]):
        super().__init__()
        self.schedule, self.calls = schedule, []

    def forward(self, x_t, t, y, **cond):
        self.calls.append((len(x_t), t, y, cond))
        alpha, sigma = (c.reshape(-1, 1) if c.ndim else c for c in self.schedule(t))
        said = y.to(x_t.dtype).reshape(len(x_t), -1)[:, :1].expand_as(x_t)
        return Prediction(x_t, alpha, sigma, said, -said)


# diffusers


@pytest.mark.parametrize("w", [-0.5, 0.5, 3.0])
def test_weights_of_diffusers(w):
    best, x = GMMDenoiser(MIXTURE, CHAIN), states(CHAIN)
    told, free, ours = best(x, HALF, y=Y).eps, best(x, HALF).eps, CFG(best, w, ANY)(x, HALF, y=Y).eps
    for guider in (ClassifierFreeGuidance(w + 1), ClassifierFreeGuidance(w, use_original_formulation=True)):
        torch.testing.assert_close(guider.forward(told, free).pred, ours, rtol=1e-12, atol=1e-12)


def test_a_guided_walk_is_theirs():
    "Their DDIM with their guider, against our `ddim` with our wrapper."
    theirs = DDIMScheduler(1000, clip_sample=False, timestep_spacing="trailing")
    theirs.alphas_cumprod, theirs.final_alpha_cumprod = (
        (1 - linear_betas(1000)).cumprod(0),
        torch.ones((), dtype=F64),
    )
    theirs.set_timesteps(20)
    best, guider, x = GMMDenoiser(MIXTURE, CHAIN), ClassifierFreeGuidance(3.0), NOISE(0)
    seen = []
    ddim(CFG(best, 2.0, ANY), x, time_grid(20), y=Y, callback=lambda i, x, pred: seen.append(x))
    for i, step in enumerate(theirs.timesteps):
        t = (step + 1).double() / 1000
        eps = guider.forward(best(x, t, y=Y).eps, best(x, t).eps).pred
        x = theirs.step(eps, step, x).prev_sample
        torch.testing.assert_close(x, seen[i], rtol=1e-9, atol=1e-9)


# what must hold


@every
def test_bayes(name):
    best = GMMDenoiser(MIXTURE, SCHEDULES[name])
    for t in (torch.tensor(0.2, dtype=F64), torch.linspace(0.2, 0.9, 12, dtype=F64)):
        x = states(best.schedule, t)
        got = ClassifierGuidance(Unconditional(best, ANY), read_off(best))(x, t, y=Y)
        torch.testing.assert_close(got.x0, best(x, t, y=Y).x0, rtol=1e-9, atol=1e-9)


@every
def test_cfg_is_guidance_by_the_implicit_classifier(name):
    best, t = GMMDenoiser(MIXTURE, SCHEDULES[name]), torch.linspace(0.2, 0.9, 12, dtype=F64)
    x = states(best.schedule, t)
    for w in (1.5, lambda t: 3 * t):
        got = CFG(best, w, ANY)(x, t, y=Y)
        torch.testing.assert_close(
            got.x0, ClassifierGuidance(best, read_off(best), w)(x, t, y=Y).x0, rtol=1e-9, atol=1e-9
        )
        torch.testing.assert_close(got.x0, AutoGuidance(best, Unconditional(best, ANY), w)(x, t, y=Y).x0)


@given(w=st.floats(-3, 20), t=st.floats(0.05, 1), name=st.sampled_from(sorted(SCHEDULES)))
def test_one_weight_in_every_language(w, t, name):
    best, t = GMMDenoiser(MIXTURE, SCHEDULES[name]), torch.tensor(t, dtype=F64)
    x = states(best.schedule, t)
    told, free, got = best(x, t, y=Y), best(x, t), CFG(best, w, ANY)(x, t, y=Y)
    for kind in ("x0", "eps", "v", "score"):
        want = (w + 1) * getattr(told, kind) - w * getattr(free, kind)
        torch.testing.assert_close(
            getattr(got, kind), want, rtol=1e-8, atol=1e-8 * (1 + abs(w)) * float(1 + want.abs().max())
        )


def test_each_sample_is_guided_alone():
    best, t = GMMDenoiser(MIXTURE, CHAIN), torch.linspace(0.1, 1, 12, dtype=F64)
    x = states(CHAIN, t)
    for guided in (CFG(best, 2.0, ANY), ClassifierGuidance(best, read_off(best), 2.0)):
        whole = guided(x, t, y=Y).x0
        torch.testing.assert_close(
            whole, torch.cat([guided(x[i : i + 1], t[i], y=Y[i : i + 1]).x0 for i in range(12)])
        )


def test_one_call_with_everything_doubled():
    echo, low = Echo(), torch.arange(4.0)[:, None]
    pred = CFG(echo, 2.0, 10)(torch.zeros(4, 3), HALF, y=torch.tensor([1, 2, 3, 4]), low=low, size=8)
    ((n, t, y, cond),) = echo.calls
    assert n == 8 and t.ndim == 0 and y.tolist() == [1, 2, 3, 4, 10, 10, 10, 10]
    assert cond["low"].equal(torch.cat([low, low])) and cond["size"] == 8
    assert pred.x0[:, 0].tolist() == [3 * k - 20 for k in (1, 2, 3, 4)] and pred.x0.shape == pred.x_t.shape == (
        4,
        3,
    )
    assert pred.extra[:, 0].tolist() == [-1, -2, -3, -4]  # that of the half that was told y


def test_guidance_adds_nothing_to_what_is_saved():
    assert not CFG(Echo(), 2.0, 10).state_dict()


def test_one_time_a_sample_is_doubled_too():
    echo, t = Echo(), torch.linspace(0.1, 0.9, 4, dtype=F64)
    pred = CFG(echo, lambda t: t, 10)(torch.zeros(4, 3, dtype=F64), t, y=torch.ones(4, dtype=torch.long))
    assert echo.calls[0][1].equal(torch.cat([t, t])) and pred.alpha.shape == pred.sigma.shape == (4, 1)
    torch.testing.assert_close(pred.x0[:, 0], 1 - 9 * t)


def test_labels_may_be_sequences():
    "As the words of a text are: null is then shaped like the words of one sample."
    echo, words = Echo(), torch.tensor([[1, 5], [0, 7]])
    CFG(echo, 1.0, torch.tensor([0, 0]))(torch.zeros(2, 3), HALF, y=words)
    assert echo.calls[0][2].tolist() == [[1, 5], [0, 7], [0, 0], [0, 0]]


def test_unlabelled():
    echo = Echo()
    Unconditional(echo, 10)(torch.zeros(2, 3), HALF, y=torch.tensor([1, 2]))
    assert echo.calls[0][2].tolist() == [10, 10]
    net = NetDenoiser(UNet(1, 4, (1,), 1, ()), CosineSchedule(), predict_v)  # a network without classes
    x = torch.zeros(2, 1, 8, 8)
    assert Unconditional(net)(x, HALF, y=torch.tensor([1, 2])).x0.equal(net(x, HALF).x0)


def test_interval():
    t = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=F64)
    assert interval(0.3, 0.3, 0.7)(t).tolist() == [0, 0, 0.3, 0.3, 0]  # float64: 0.3 is 0.3
    assert interval(2.0, 0.0, 1.0)(torch.tensor(1.0)) == 2
    best, x = GMMDenoiser(MIXTURE, CHAIN), states(CHAIN)
    part = CFG(best, interval(4.0, 0.3, 0.6), ANY)
    assert part(x, HALF, y=Y).x0.equal(CFG(best, 4.0, ANY)(x, HALF, y=Y).x0)
    assert part(x, HALF + 0.2, y=Y).x0.equal(CFG(best, 0.0, ANY)(x, HALF + 0.2, y=Y).x0)


def test_gradients():
    "The classifier's is found where gradients are off; the denoiser's passes through, as distillation needs; no weight collects any."
    net = NetDenoiser(UNet(1, 4, (1,), 1, (), classes=10), CosineSchedule(), predict_v)
    classifier, x, y = NoisyClassifier(CosineSchedule(), 4), Noise(range(3), (1, 8, 8))(0), torch.tensor([1, 2, 3])
    nn.init.normal_(net.net.head[2].weight)
    guided = ClassifierGuidance(net, classifier, 2.0)
    with torch.no_grad():
        off = guided(x, HALF, y=y)
    on = guided(x, HALF, y=y)
    assert not x.requires_grad and not off.x0.requires_grad and off.x0.equal(on.x0.detach())
    assert all(p.grad is None for p in guided.parameters())
    for wrapper in (guided, CFG(net, 2.0, 10)):
        net.zero_grad()
        wrapper(x, HALF, y=y).x0.square().sum().backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_clip_around_guidance_holds_the_walk():
    best, ts = GMMDenoiser(MIXTURE, CosineSchedule()), even_logsnr_grid(CosineSchedule(), 10)
    wild = dpmpp_2m(CFG(best, 8.0, ANY), NOISE(0), ts, y=Y)
    held = dpmpp_2m(Clip(CFG(best, 8.0, ANY), -0.5, 0.5), NOISE(0), ts, y=Y)
    assert wild.abs().max() > 1 and held.abs().max() < 0.51


# the classifier


def test_classifier():
    torch.manual_seed(0)
    classifier, x, y = NoisyClassifier(CosineSchedule(), 8), digits().x[:20], digits().y[:20]
    t, eps = torch.linspace(0.05, 1, 20, dtype=F64), Noise(range(20), (1, 8, 8))(0)
    total = sum(classifier(x, t, torch.full((20,), k)).exp() for k in range(10))
    torch.testing.assert_close(total, torch.ones(20))
    logits = classifier.logits(q_sample(classifier.schedule, x, t, eps), t)
    torch.testing.assert_close(
        classifier_loss(classifier, x, t, eps, y), F.cross_entropy(logits, y, reduction="none")
    )
    nn.init.normal_(classifier.blocks[1].conv2.weight)  # which is zero at first
    assert not classifier.logits(x, HALF).allclose(classifier.logits(x, HALF / 2))  # it is told the time
    assert classifier.logits(torch.zeros(2, 1, 28, 28), HALF).shape == (2, 10)


def test_what_the_classifier_makes_of_the_time():
    torch.manual_seed(0)
    c = NoisyClassifier(CosineSchedule(), 8)
    first, second = c.embed[0], c.embed[2]
    v = torch.randn(3, 8)
    torch.testing.assert_close(c.embed(v), F.silu(second(F.silu(first(v)))))


def test_classifier_learns():
    torch.manual_seed(0)
    data = digits()
    trainer = Trainer(NoisyClassifier(CosineSchedule(), 8), data.x, steps=60, batch=32, lr=warmup_cosine(5e-3, 5, 60),
                      loss=classifier_loss, cond={"y": data.y}, device="cpu")  # fmt: skip
    trainer.fit()
    with torch.no_grad():
        guess = trainer.denoiser.eval().logits(data.x_test, torch.tensor(0.02)).argmax(1)
    assert (guess == data.y_test).float().mean() > 0.5


def test_variety():
    y = torch.arange(40_000) % 2
    x = torch.randn(40_000, 3, generator=torch.Generator().manual_seed(0)) * 2 + 100 * y[:, None]
    assert abs(variety(x, y) - 12) < 0.5


# bad input


@pytest.mark.parametrize("w", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(w):
    best = GMMDenoiser(MIXTURE, CHAIN)
    for make in (lambda: CFG(best, w, ANY), lambda: ClassifierGuidance(best, read_off(best), w), lambda: AutoGuidance(best, best, w),
                 lambda: interval(w, 0.1, 0.5)):  # fmt: skip
        with pytest.raises(ValueError, match="w: expected a finite number"):
            make()


def test_labels_that_are_none_or_too_few():
    best, x = GMMDenoiser(MIXTURE, CHAIN), states(CHAIN)
    for guided in (CFG(best, 1.0, ANY), ClassifierGuidance(best, read_off(best))):
        with pytest.raises(ValueError, match="one label for each of 12 samples; got none"):
            guided(x, HALF)
        with pytest.raises(ValueError, match="one label for each of 12 samples; got 3"):
            guided(x, HALF, y=Y[:3])


def test_any_is_no_direction():
    best, x, y = GMMDenoiser(MIXTURE, CHAIN), states(CHAIN), Y.clone()
    y[4] = ANY
    with pytest.raises(ValueError, match="got 3, which means any"):
        CFG(best, 1.0, ANY)(x, HALF, y=y)
    with pytest.raises(ValueError, match="classes from 0 to 9"):
        NoisyClassifier(CosineSchedule(), 4)(torch.zeros(2, 1, 8, 8), HALF, torch.tensor([0, 10]))


def test_classifiers_that_are_broken():
    best, x = GMMDenoiser(MIXTURE, CHAIN), states(CHAIN)
    with pytest.raises(ValueError, match=r"log_prob: 12 of its 12 values are NaN"):
        ClassifierGuidance(best, lambda x, t, y: x[:, 0] * float("nan"))(x, HALF, y=Y)
    with pytest.raises(ValueError, match="the gradient of log_prob: .* NaN"):
        ClassifierGuidance(best, lambda x, t, y: (x - x.detach()).square().sum(1).sqrt())(x, HALF, y=Y)
    with pytest.raises(ValueError, match=r"one number per sample, \(12,\); got \(12, 2\)"):
        ClassifierGuidance(best, lambda x, t, y: x)(x, HALF, y=Y)


def test_schedules_must_agree():
    best = GMMDenoiser(MIXTURE, CHAIN)
    with pytest.raises(ValueError, match="the bad version has another schedule"):
        AutoGuidance(best, GMMDenoiser(MIXTURE, VESchedule()), 1.0)
    with pytest.raises(ValueError, match="the classifier has another schedule"):
        ClassifierGuidance(best, NoisyClassifier(CosineSchedule(), 4))
    AutoGuidance(best, GMMDenoiser(MIXTURE, DDPMSchedule(linear_betas(1000))), 1.0)  # equal will do


@pytest.mark.parametrize("low, high", [(0.5, 0.5), (0.7, 0.3), (-0.1, 0.5), (0.5, 1.1)])
def test_intervals_that_are_none(low, high):
    with pytest.raises(ValueError, match="0 <= low < high <= 1"):
        interval(1.0, low, high)


# algorithm 1


@pytest.mark.parametrize("var", [fixed_small, fixed_large])
def test_algorithm_1_moves_the_mean_by_the_variance_times_the_gradient(var):
    "Step by step, in DDPM's letters; in the last step, where β̃ is 0, the paper's program takes that of the step before."
    betas, w, T = linear_betas(1000), 2.5, 4
    best = GMMDenoiser(MIXTURE, DDPMSchedule(betas[:T]))
    guided, abar = (
        ClassifierGuidance(Unconditional(best, ANY), read_off(best), w),
        (1 - betas[:T]).cumprod(0).double(),
    )
    x, seen = NOISE(0), []
    guided_ddpm(guided, x, time_grid(T), noise=NOISE, y=Y, var=var, callback=lambda i, x, pred: seen.append(x))
    for i in range(T, 0, -1):
        t, before = torch.tensor(i / T, dtype=F64), abar[i - 2] if i > 1 else torch.ones((), dtype=F64)
        x_in = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(read_off(best)(x_in, t, Y).sum(), x_in)
        beta, guess = betas[i - 1].double(), best(x, t, y=torch.full((12,), ANY)).x0
        mean = (
            before.sqrt() * beta / (1 - abar[i - 1]) * guess
            + (1 - beta).sqrt() * (1 - before) / (1 - abar[i - 1]) * x
        )
        tilde = (
            (1 - before) / (1 - abar[i - 1]) * beta if i > 1 else (1 - abar[0]) / (1 - abar[1]) * betas[1].double()
        )
        v = tilde if var is fixed_small else beta
        x = mean + v * w * slope + (v.sqrt() * NOISE(T - i + 1) if i > 1 else 0)
        torch.testing.assert_close(seen[T - i], x, rtol=1e-9, atol=1e-9)


def test_algorithm_1_without_weight_is_ddpm():
    best = GMMDenoiser(MIXTURE, CHAIN)
    guided = ClassifierGuidance(Unconditional(best, ANY), read_off(best), 0.0)
    got = guided_ddpm(guided, NOISE(0), time_grid(5), noise=NOISE, y=Y)
    torch.testing.assert_close(got, ddpm(Unconditional(best, ANY), NOISE(0), time_grid(5), noise=NOISE))
    with pytest.raises(ValueError, match="one label for each of 12 samples"):
        guided_ddpm(guided, NOISE(0), time_grid(5), noise=NOISE, y=Y[:3])


# dynamic thresholding


class Loud(Denoiser):
    "Guesses ten times its input."

    schedule = VPSchedule()

    def forward(self, x_t, t, **cond):
        return Prediction(x_t, *self.schedule(t), 10 * x_t, None)


@pytest.mark.parametrize("share, largest", [(0.995, 1.5), (0.9, 100.0), (0.5, 3.0)])
def test_dynamic_thresholding_is_theirs(share, largest):
    theirs = DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=share, sample_max_value=largest)
    x = (
        torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-2, 1, 6)[:, None, None, None]
    )
    got = DynamicThreshold(Loud(), share, largest)(x, torch.tensor(0.5)).x0
    torch.testing.assert_close(got, theirs._threshold_sample(10 * x), rtol=1e-6, atol=1e-6)
    assert got.abs().max() <= 1 and got[0].equal(10 * x[0])  # a quiet guess stays as it is


def test_dynamic_thresholding_keeps_the_order_where_clip_does_not():
    x = torch.linspace(-0.5, 0.5, 64).reshape(1, 1, 8, 8)
    dynamic, clipped = (wrapper(Loud())(x, torch.tensor(0.5)).x0.flatten() for wrapper in (DynamicThreshold, Clip))
    assert (dynamic.diff() > 0).sum() == 63 and (clipped.diff() > 0).sum() < 20
    for bad in (dict(share=0.0), dict(share=1.1), dict(largest=0.5)):
        with pytest.raises(ValueError, match="expected a share"):
            DynamicThreshold(Loud(), **bad)


# self-conditioning


class Remembers(nn.Module):
    "A network of pictures and guesses whose answer depends on both; keeps the guesses that it saw."

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, both, t, y=None):
        x, guess = both.chunk(2, dim=1)
        self.seen.append(guess.clone())
        return 0.5 * x + 0.3 * guess + (0 if y is None else 0.1 * y.reshape(-1, 1, 1, 1))


def test_a_walk_tells_the_network_its_last_guess():
    net, x = Remembers(), torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    inner = NetDenoiser(WithGuess(net), CosineSchedule(), predict_v)
    model, guesses = SelfConditioned(inner), []
    for _ in range(2):  # the second walk begins afresh
        del net.seen[:], guesses[:]
        ddim(model, x, time_grid(4), callback=lambda i, x, pred: guesses.append(pred.x0), y=torch.arange(3))
        assert not net.seen[0].any() and len(net.seen) == 4
        assert all(told.equal(said) for told, said in zip(net.seen[1:], guesses[:-1], strict=True))
    model(x[:2], torch.tensor(0.01))  # another number of pictures
    assert not net.seen[-1].any()


def test_half_of_a_batch_is_trained_with_its_own_guess():
    torch.manual_seed(0)
    net, n = Remembers(), 400
    model = NetDenoiser(WithGuess(net), CosineSchedule(), predict_v)
    x0, eps = torch.randn(2, n, 1, 2, 2)
    t, y = torch.rand(n, dtype=torch.float64).clamp_min(0.1), torch.arange(n) % 3
    scale = torch.ones((), requires_grad=True)
    model.net.register_forward_pre_hook(lambda m, args, kw: ((scale * args[0], *args[1:]), kw), with_kwargs=True)
    loss = self_conditioned(denoising_loss)(model, x0, t, eps, y=y)
    first, second = net.seen
    own = model(q_sample(model.schedule, x0, t, eps), t, y=y).x0
    told = second.flatten(1).any(1)
    assert not first.any() and second[told].allclose(own[told]) and abs(told.double().mean() - 0.5) < 0.125
    want = denoising_loss(model, x0, t, eps, guess=second.detach(), y=y)
    torch.testing.assert_close(loss, want)
    slopes = [torch.autograd.grad(v.sum(), scale)[0] for v in (loss, want)]  # the guess is a constant
    torch.testing.assert_close(*slopes)
