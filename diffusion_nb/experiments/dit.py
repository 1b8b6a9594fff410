"""Diffusion transformers beside the U-Net (notebook 24)."""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_nb.codecs import Codec, latents
from diffusion_nb.data import Pictures, data_set, digits
from diffusion_nb.denoisers import Clip, Denoiser, NetDenoiser, predict_eps, predict_v
from diffusion_nb.experiments.artifacts import artifact
from diffusion_nb.experiments.digits import draw_digits
from diffusion_nb.experiments.evaluation import evaluate, reference
from diffusion_nb.experiments.judge import digit_judge, mnist_judge
from diffusion_nb.experiments.latent import mnist_codec
from diffusion_nb.experiments.pictures import OF_MNIST, halved, judge_pictures, trained_on
from diffusion_nb.experiments.reference import reference as mnist_reference
from diffusion_nb.experiments.variance import LEVELS, fixed_steps, handover
from diffusion_nb.grids import edm_grid, truncated_grid
from diffusion_nb.likelihood.bits import bits_per_dim
from diffusion_nb.losses.bound import hybrid_loss
from diffusion_nb.losses.simple import denoising_loss, snr_plus_one
from diffusion_nb.metrics.features import frechet_distance
from diffusion_nb.nets.dit import AdaLNZero, CrossAttend, DiT, InContext
from diffusion_nb.nets.unet import UNet, parameters
from diffusion_nb.noise import Noise
from diffusion_nb.recipes.diffusion import Training, recipe_trainer
from diffusion_nb.recipes.dit import DiTRecipe, dit_denoiser, dit_recipe
from diffusion_nb.recipes.settings import settings
from diffusion_nb.samplers.linear import ddpm, dpmpp_2m
from diffusion_nb.schedules import CosineSchedule, DDPMSchedule, cosine_betas
from diffusion_nb.time_samplers import chain_times
from diffusion_nb.training.trainer import Trainer
from diffusion_nb.util.profiling import flops
from diffusion_nb.variances import fixed_large, fixed_small, learned_variance


@dataclass(frozen=True)
class DiTComparison(Training):
    """How the networks of the comparison are trained; `pilot` steps of another seed, at each of `rates`, say what the learning rate does.

    They are looked at after steps / k steps for k in `parts`, by `drawn` drawings of `calls` calls.
    """

    steps: int = 400
    warmup: int = 50
    lr: float = 0.008
    ema: float = 0.995
    seeds: int = 3
    rates: tuple[float, ...] = (0.002, 0.004, 0.008, 0.016)
    pilot: int = 80
    parts: tuple[int, ...] = (4, 2, 1)
    drawn: int = 300
    calls: int = 20


SIZES = ("adaLN-Zero, small", "adaLN-Zero", "adaLN-Zero, large")
KINDS = ("U-Net", "adaLN-Zero", "cross-attention", "in-context")
CONTENDERS = (*KINDS, SIZES[0], SIZES[2])
TRANSFORMERS = {  # block and width
    "adaLN-Zero": (AdaLNZero, 36), "cross-attention": (CrossAttend, 32), "in-context": (InContext, 32),
    "adaLN-Zero, small": (AdaLNZero, 20), "adaLN-Zero, large": (AdaLNZero, 72),
}  # fmt: skip


def contender(name: str, shape: tuple[int, int, int], seed: int, patch: int = 2, classes: int = 10) -> nn.Module:
    "A fresh network of CONTENDERS for pictures, or latents, of this shape. On 8×8 digits the KINDS need about as many operations."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "U-Net":
            return UNet(shape[0], 8, (1, 2), 1, (1,), classes=classes)
        block, width = TRANSFORMERS[name]
        return DiT(shape[0], shape[1], patch, width, 4, 4, classes, block, waves=64)


@torch.no_grad()
def held_out_loss(denoiser: Denoiser, x: Float[Tensor, "n c h w"], y: Tensor, copies: int = 8) -> float:
    "The mean loss of v on held-out pictures, each at `copies` times: the same times and noise for every denoiser."
    x, y = x.repeat(copies, 1, 1, 1), y.repeat(copies)
    t = (torch.arange(len(x)) * 0.6180339887498949 + 0.5 / len(x)) % 1  # evenly spread over the copies of each
    noise = Noise(torch.arange(len(x)) + 2**21, x.shape[1:])(0)
    return denoising_loss(denoiser, x, t.clamp(min=1e-3), noise, weight=snr_plus_one, y=y).mean().item()


def latent_contender(name: str, shape: tuple[int, int, int], seed: int) -> nn.Module:
    "The same for latents of 7×7: each latent pixel is a token, and the U-Net, of one level, is as wide as makes its operations equal."
    if name != "U-Net":
        return contender(name, shape, seed, patch=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet(shape[0], 24, (1,), 1, (0,), classes=10)


def trained(r: DiTComparison, name: str, data: Pictures, look: Callable | None = None, build: Callable = contender) -> Denoiser:  # fmt: skip
    "A contender, trained; `look(trainer)` after each step. build: (name, shape, seed) ↦ its fresh network."
    denoiser = NetDenoiser(build(name, tuple(data.x.shape[1:]), r.seed), CosineSchedule(), predict_v)
    options = r.options() | dict(loss=partial(denoising_loss, weight=snr_plus_one))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "x0: pictures are expected")  # latents go beyond [-1, 1]
        return Trainer(
            denoiser, data.x, cond={"y": data.y}, null=10, device="cpu", hooks=[look] if look else [], **options
        ).fit()


def by_rate(r: DiTComparison, name: str, data: Pictures, build: Callable = contender) -> Float[Tensor, " rates"]:
    "The held-out loss of short trainings at each of the rates."
    short = replace(r, steps=r.pilot, warmup=min(r.warmup, r.pilot // 3), seed=99)
    ends = [trained(replace(short, lr=lr), name, data, build=build) for lr in r.rates]
    return torch.tensor([held_out_loss(denoiser, data.x_test, data.y_test) for denoiser in ends])


def course(r: DiTComparison, name: str, seed: int, data: Pictures, score: Callable, build: Callable = contender) -> tuple[Tensor, Tensor]:  # fmt: skip
    "One training: (step, processor seconds, held-out loss, score(averaged denoiser)[0]) at each mark, and score(…)[1] at the end."
    marks, rows, spent, since, last = [r.steps // k for k in r.parts], [], 0.0, time.process_time(), None

    def look(trainer):
        nonlocal spent, since, last
        if trainer.step in marks:
            spent += time.process_time() - since
            value, last = score(trainer.average.eval())
            rows.append([trainer.step, spent, held_out_loss(trainer.average, data.x_test, data.y_test), value])
            since = time.process_time()

    trained(replace(r, seed=seed), name, data, look, build)
    return torch.tensor(rows), last


@torch.no_grad()
def score_digits(r: DiTComparison, denoiser: Denoiser) -> tuple[float, Tensor]:
    "The Fréchet distance of drawn digits to the training digits, and 40 of the drawings as their grey levels, 0 to 16."
    x, _ = draw_digits(denoiser, torch.arange(r.drawn) + 2**20, r.calls)
    found = frechet_distance(digit_judge().features(x.clamp(-1, 1)), reference().features)
    return found, (8 * (x[:40].clamp(-1, 1) + 1)).round().to(torch.uint8)


def compare(r: DiTComparison, data: Pictures, score: Callable, build: Callable = contender, names: Sequence[str] = CONTENDERS) -> dict[str, Tensor]:  # fmt: skip
    "These contenders and all seeds on pictures, or latents: the losses of the pilots, the courses (contenders, seeds, marks, 4), and what the first seed of each drew."
    rates = torch.stack([by_rate(r, name, data, build) for name in names])
    runs = [[course(r, name, seed, data, score, build) for seed in range(r.seeds)] for name in names]
    return {
        "rates": rates,
        "courses": torch.stack([torch.stack([rows for rows, _ in of_one]) for of_one in runs]),
        "drawings": torch.stack([of_one[0][1] for of_one in runs]),
    }


def sizes(shape: tuple[int, int, int], build: Callable = contender) -> Float[Tensor, "contenders 2"]:
    "Parameters, and floating-point operations of one call with one picture, of each contender."
    counts = []
    for name in CONTENDERS:
        net = build(name, shape, 0)
        given = torch.zeros(1, *shape), torch.zeros(1), torch.zeros(1, dtype=torch.long)
        counts.append([parameters(net), flops(lambda net=net, given=given: net(*given))])
    return torch.tensor(counts, dtype=torch.float64)


def last_of(found: dict[str, Tensor], names: Sequence[str] = CONTENDERS) -> dict[str, dict]:
    "The mean of each contender's last loss and Fréchet distance."
    ends = found["courses"][:, :, -1].mean(1)
    return {
        name: {"loss": round(row[2].item(), 4), "Fréchet distance": round(row[3].item(), 2), "seconds": round(row[1].item(), 1)}
        for name, row in zip(names, ends, strict=True)
    }  # fmt: skip


def run_comparison(r: DiTComparison) -> tuple[dict, dict]:
    "The comparison on digits, and how it ended."
    found = compare(r, digits(), partial(score_digits, r))
    return found, last_of(found)


def comparison() -> dict[str, Tensor]:
    "What `compare` found on digits (artifact `dit`, [24_dit])."
    return artifact("dit", run_comparison, settings("24_dit", DiTComparison))[0]


# the same in latents


def mnist_latents(codec: Codec, n: int = 20_000) -> Pictures:
    "Latents of n pictures of MNIST and of 1,000 held out, each drawn once from its normal distribution, as if they were pictures."
    data = data_set("mnist").load()

    def drawn(x, first):
        mean, sd = latents(codec, x).chunk(2, dim=1)
        return mean + sd * Noise(range(first, first + len(x)), mean.shape[1:])(0)

    return Pictures(drawn(data.x[:n], 0), data.y[:n], drawn(data.x_test[:1000], 2**20), data.y_test[:1000])


@torch.no_grad()
def score_latents(r: DiTComparison, codec: Codec, denoiser: Denoiser) -> tuple[float, Tensor]:
    "The Fréchet distance of drawn and decoded digits to training digits, and 40 of the drawings as bytes."
    seeds, ts = torch.arange(r.drawn) + 2**20, edm_grid(denoiser.schedule, r.calls, 0.02, 80.0)
    start = denoiser.schedule(ts[0])[1].float() * Noise(seeds, (4, 7, 7))(0)
    x = codec.decode(dpmpp_2m(Clip(denoiser, -6.0, 6.0), start, ts, y=seeds % 10)).clamp(-1, 1)
    found = frechet_distance(mnist_judge().features(x), mnist_reference("mnist").real.float())
    return found, (127.5 * (x[:40] + 1)).round().to(torch.uint8)


def run_in_latents(r: DiTComparison) -> tuple[dict, dict]:
    "The comparison of the KINDS on latents of MNIST, and how it ended."
    codec = mnist_codec()[0]
    found = compare(r, mnist_latents(codec), partial(score_latents, r, codec), latent_contender, KINDS)
    return found, last_of(found, KINDS)


def comparison_in_latents() -> dict[str, Tensor]:
    "What `compare` found on latents of MNIST (artifact `dit_latents`, [24_dit.latents])."
    return artifact("dit_latents", run_in_latents, settings("24_dit.latents", DiTComparison))[0]


# the covariance head


@dataclass(frozen=True)
class CovarianceRecipe(Training):
    """Transformers of digits that predict noise and covariance, trained by L_hybrid, `seeds` times; and how they are measured.

    T: steps of the chain. grids: numbers of steps of shorter chains. counted: held-out digits for the bits; drawn: drawings for the Fréchet distance.
    """

    steps: int = 1200
    lr: float = 0.004
    ema: float = 0.995
    T: int = 1000
    width: int = 48
    depth: int = 4
    seeds: int = 3
    grids: tuple[int, ...] = (10, 25, 50)
    counted: int = 100
    drawn: int = 300


def middle_variance(pred, step) -> Tensor:
    "Half way between β̃ and β, in their logarithms: what a head that has learned nothing says."
    return (step.small * step.large) ** 0.5


VARIANCES = {"β̃": fixed_small, "β": fixed_large, "middle": middle_variance, "learned": learned_variance}
COUNTED = (*VARIANCES, "best fixed")


def covariance_denoiser(r: CovarianceRecipe, seed: int) -> NetDenoiser:
    "A fresh transformer of adaLN-Zero with twice the channels out, on the cosine schedule of T steps."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = DiT(1, 8, 2, r.width, r.depth, 4, 10, AdaLNZero, channels_out=2, waves=64)
    return NetDenoiser(net, DDPMSchedule(cosine_betas(r.T)), predict_eps)


def covariance_trainer(r: CovarianceRecipe, seed: int) -> Trainer:
    "The trainer of one of them."
    data = digits()
    return Trainer(covariance_denoiser(r, seed), data.x, loss=hybrid_loss(r.T, LEVELS), time_sampler=chain_times(r.T), cond={"y": data.y}, null=10,
                   device="cpu", **replace(r, seed=seed).options())  # fmt: skip


@torch.no_grad()
def bits_by_variance(r: CovarianceRecipe, denoiser: NetDenoiser) -> Float[Tensor, "grids 5 n"]:
    "Bits per pixel of prior and steps, for each of COUNTED and each held-out digit; the last step, of all the same, is left out."
    data, end, found = digits(), handover(denoiser.schedule) / r.T, []
    x, y = data.x_test[: r.counted], data.y_test[: r.counted]
    for steps in r.grids:
        ts = truncated_grid(steps, end)
        bits = bits_per_dim(Clip(denoiser), x, ts, levels=LEVELS, var=learned_variance, y=y)
        best = lambda pred, step, m=bits.mse[:, :-1].mean(0): step.small + step.b**2 * m
        fixed = [fixed_steps(bits, denoiser.schedule, v) for v in (fixed_small, fixed_large, middle_variance)]
        rows = [*fixed, bits.steps, fixed_steps(bits, denoiser.schedule, best)]
        found.append(torch.stack([bits.prior + row.sum(1) for row in rows]))
    return torch.stack(found)


@torch.no_grad()
def draw_by_variance(r: CovarianceRecipe, denoiser: NetDenoiser, var: Callable, steps: int) -> Float[Tensor, "n 1 8 8"]:  # fmt: skip
    "Digits 0, 1, …, 9, 0, … by so many steps of DDPM with this variance; the noise is the same for all variances."
    noise, ts = Noise(torch.arange(r.drawn) + 2**20, (1, 8, 8)), truncated_grid(steps, handover(denoiser.schedule) / r.T)  # fmt: skip
    x = ddpm(Clip(denoiser), noise(0), ts, noise=noise, var=var, y=torch.arange(r.drawn) % 10)
    return (8 * x.clamp(-1, 1)).round() / 8


def run_covariance(r: CovarianceRecipe) -> tuple[dict, dict]:
    "Of each seed: bits (seeds, grids, COUNTED, n), and Fréchet distances (seeds, grids, VARIANCES); the first seed's drawings by the fewest steps, as grey levels."
    denoisers = [covariance_trainer(r, seed).fit().eval() for seed in range(r.seeds)]
    y = torch.arange(r.drawn) % 10
    drawn = [[[draw_by_variance(r, d, v, k) for v in VARIANCES.values()] for k in r.grids] for d in denoisers]
    distance = lambda x: evaluate(x, y, r.drawn).frechet.mean()
    found = {
        "bits": torch.stack([bits_by_variance(r, d) for d in denoisers]).float(),
        "Fréchet": torch.stack([torch.stack([torch.stack([distance(x) for x in row]) for row in of]) for of in drawn]).float(),
        "drawings": torch.stack([(8 * (x[:20] + 1)).round().to(torch.uint8) for x in drawn[0][0]]),
    }  # fmt: skip
    bits, distances = found["bits"].mean((0, 3)), found["Fréchet"].mean(0)
    said = lambda names, row: {name: round(v, 3) for name, v in zip(names, row.tolist(), strict=True)}
    return found, {f"{k} steps": {"bits per pixel": said(COUNTED, bits[i]), "Fréchet distance": said(VARIANCES, distances[i])} for i, k in enumerate(r.grids)}  # fmt: skip


def covariance() -> dict[str, Tensor]:
    "What `run_covariance` found (artifact `dit_covariance`, [24_dit.covariance])."
    return artifact("dit_covariance", run_covariance, settings("24_dit.covariance", CovarianceRecipe))[0]


# digits of 28×28


def train_mnist_dit(r: DiTRecipe) -> tuple[dict, dict]:
    "The weights of a transformer that draws MNIST, in float16, and the judge's verdict."
    data = data_set(r.data).load()
    fresh = dit_denoiser(r, tuple(data.x.shape[1:]))
    denoiser = recipe_trainer(r, data.x, data.y, denoiser=fresh).fit()
    return halved(denoiser.net), judge_pictures(denoiser, data, mnist_judge(), OF_MNIST) | trained_on()


def mnist_dit() -> NetDenoiser:
    "The transformer that draws MNIST, y = 0…9 or 10 for any (artifact `mnist_dit`, [dit.mnist-small]), in eval mode, without gradients."
    r = dit_recipe("mnist-small")
    denoiser = dit_denoiser(r, (1, 28, 28))
    denoiser.net.load_state_dict(artifact("mnist_dit", train_mnist_dit, r)[0])
    return denoiser.eval().requires_grad_(False)
