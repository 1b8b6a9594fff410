"""Recipes of stages that enlarge pictures."""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_nb.denoisers import NetDenoiser
from diffusion_nb.losses.cascade import augmented_loss, noised
from diffusion_nb.losses.simple import denoising_loss
from diffusion_nb.nets.upsampler import LevelReader, Upsampler
from diffusion_nb.recipes.diffusion import Recipe, chosen
from diffusion_nb.training.trainer import Trainer


@dataclass(frozen=True)
class UpsamplerRecipe(Recipe):
    "A stage that enlarges pictures to twice their size, and its training; most: the time up to which the small picture is noised at most."

    data: str = "emoji"
    width: int = 32
    mults: tuple[int, ...] = (1, 1)
    attention: tuple[int, ...] = ()
    classes: int = 0
    patch: int = 2
    steps: int = 1500
    batch: int = 16
    lr: float = 0.002
    ema: float = 0.995
    most: float = 0.5


def upsampler_denoiser(r: UpsamplerRecipe, channels: int) -> NetDenoiser:
    "The fresh stage of a recipe."
    schedule, predict, _ = chosen(r)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(r.seed)
        reader = LevelReader(4 * r.width, r.classes)
    net = r.network(2 * channels, channels_out=channels, scale_shift=True, condition=reader)
    return NetDenoiser(Upsampler(net), schedule(), predict)


def upsampler_trainer(
    r: UpsamplerRecipe, x: Float[Tensor, "n c h w"], low: Float[Tensor, "n c h/2 w/2"], y: Tensor | None = None, **options
) -> Trainer:  # fmt: skip
    "The trainer of a stage, for pictures x, their small versions, which it noises afresh in each step, and labels. options: those of `Trainer`; augment_low: another change of the small ones than `noised`."
    denoiser = upsampler_denoiser(r, x.shape[1])
    augment = options.pop("augment_low", None) or partial(noised, schedule=denoiser.schedule, most=r.most)
    plain = partial(denoising_loss, weight=chosen(r)[2])
    loss = partial(augmented_loss, augment=augment, loss=plain)
    labels, cond = r.labelled(y), {"low": low} | ({} if y is None else {"y": y})
    return Trainer(denoiser, x, loss=loss, **labels | {"cond": cond}, **r.options(), **options)
