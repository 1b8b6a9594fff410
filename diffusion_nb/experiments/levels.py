"""The learned variance at 256 grey levels: MNIST (notebook 14)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_nb.data import data_set
from diffusion_nb.denoisers import Clip, NetDenoiser, predict_eps
from diffusion_nb.experiments.artifacts import artifact
from diffusion_nb.experiments.variance import WAYS, fixed_steps
from diffusion_nb.grids import time_grid
from diffusion_nb.likelihood.bits import bits_per_dim
from diffusion_nb.losses.bound import hybrid_loss
from diffusion_nb.losses.simple import denoising_loss
from diffusion_nb.nets.unet import UNet
from diffusion_nb.recipes.diffusion import Training
from diffusion_nb.recipes.settings import settings
from diffusion_nb.schedules import DDPMSchedule
from diffusion_nb.time_samplers import chain_times
from diffusion_nb.training.trainer import Trainer
from diffusion_nb.variances import fixed_large, fixed_small, learned_variance

FOUR = tuple(WAYS)[:4]  # both schedules, with L_simple and with L_hybrid


@dataclass(frozen=True)
class LevelsRecipe(Training):
    "Networks on MNIST, and how many held-out pictures are counted."

    steps: int = 1000
    lr: float = 0.002
    ema: float = 0.995
    T: int = 1000
    levels: int = 256
    width: int = 24
    judged: int = 64


def levels_denoiser(r: LevelsRecipe, betas: Callable, channels_out: int) -> NetDenoiser:
    "A fresh network that predicts the noise of MNIST's digits, y = 0…9 or 10 for any."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(r.seed)
        net = UNet(1, r.width, (1, 2), 1, (1,), classes=10, patch=2, channels_out=channels_out)
    return NetDenoiser(net, DDPMSchedule(betas(r.T)), predict_eps)


def levels_trainer(r: LevelsRecipe, way: str) -> Trainer:
    "The trainer of one network of FOUR."
    (betas, _, channels_out), data = WAYS[way], data_set("mnist").load()
    loss = hybrid_loss(r.T, r.levels) if channels_out > 1 else denoising_loss
    options = r.options() | {"time_sampler": chain_times(r.T), "loss": loss, "device": "cpu"}
    return Trainer(levels_denoiser(r, betas, channels_out), data.x, cond={"y": data.y}, null=10, **options)


def bits_of_variances(denoiser: NetDenoiser, r: LevelsRecipe, learned: bool) -> Float[Tensor, "n 4"]:
    """Bits per pixel of held-out digits over the whole chain with β̃, β, the best fixed variance (fitted to these very digits) and, where it is `learned`, the network's own (else NaN).

    The decoder has the learned variance in the last column, and in the others that of the papers' programs, β̃ of the step before.
    """
    data, model = data_set("mnist").load(), Clip(denoiser)
    x, y = data.x_test[: r.judged], data.y_test[: r.judged]
    var, own = (learned_variance, learned_variance) if learned else (fixed_large, fixed_small)
    count = partial(bits_per_dim, model, levels=r.levels)
    bits = count(x, time_grid(r.T), var=var, decoder_var=own, y=y)
    end = count(x, torch.tensor([1, 2 / r.T, 1 / r.T, 0], dtype=torch.float64), y=y)
    best = lambda pred, step: step.small + step.b**2 * bits.mse[:, :-1].mean(0)
    fixed = [fixed_steps(bits, denoiser.schedule, v) for v in (fixed_small, fixed_large, best)]
    whole = [bits.prior + s.sum(1) + end.decoder for s in fixed]
    return torch.stack(
        [*whole, bits.prior + bits.steps.sum(1) + bits.decoder if learned else whole[0] * math.nan], 1
    )


def run_levels(r: LevelsRecipe) -> tuple[dict, dict]:
    "The bits of each way, picture and variance, with what the card says of them."
    bits = torch.stack([bits_of_variances(levels_trainer(r, way).fit(), r, WAYS[way][2] > 1) for way in FOUR])
    said = lambda v: f"{v.mean():.3f} ± {v.std() / len(v) ** 0.5:.3f}"
    names = ("small", "large", "best fixed", "learned")
    return {"bits": bits}, {
        way: {name: said(v) for name, v in zip(names, row.T, strict=True) if not v.isnan().any()}
        for way, row in zip(FOUR, bits, strict=True)
    }


def bits_at_256_levels() -> Float[Tensor, "ways n 4"]:
    "What `run_levels` found (artifact `levels`, [bounds.mnist])."
    return artifact("levels", run_levels, settings("bounds.mnist", LevelsRecipe))[0]["bits"]
