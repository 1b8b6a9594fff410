"""Recipes of diffusion models: network, schedule, target, training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from diffusion_nb.denoisers import NetDenoiser, predict_eps, predict_v
from diffusion_nb.losses.simple import denoising_loss, snr, snr_plus_one
from diffusion_nb.nets.unet import UNet, ddpm_init
from diffusion_nb.recipes.settings import settings
from diffusion_nb.schedules import CosineSchedule, DDPMSchedule, linear_betas
from diffusion_nb.training.batches import flip_half
from diffusion_nb.training.lr import warmup_constant, warmup_cosine
from diffusion_nb.training.trainer import Trainer
from diffusion_nb.util.checks import check_numbers

SCHEDULES = {"cosine": CosineSchedule, "linear": lambda: DDPMSchedule(linear_betas())}
TARGETS = {
    "eps": (predict_eps, snr),
    "v": (predict_v, snr_plus_one),
}  # what to predict, and the weight that makes it plain


def unet(r: "NetRecipe", channels: int, **options) -> nn.Module:
    return UNet(
        channels,
        r.width,
        r.mults,
        r.blocks,
        r.attention,
        classes=r.classes,
        dropout=r.dropout,
        patch=r.patch,
        **options,
    )


def ddpm_unet(r: "NetRecipe", channels: int, **options) -> nn.Module:
    return ddpm_init(unet(r, channels, **options))


NETWORKS = {"unet": unet, "ddpm": ddpm_unet}  # (recipe, channels, **options) ↦ the fresh network


@dataclass(frozen=True)
class Training:
    "How a network is trained. Raises ValueError for numbers that cannot be meant."

    steps: int = 2200
    batch: int = 64
    lr: float = 0.0045
    warmup: int = 100
    decay: Literal["cosine", "constant"] = "cosine"
    ema: float = 0.998
    beta2: float = 0.99
    seed: int = 0

    def __post_init__(self):
        check_numbers(steps=(self.steps, 1), batch=(self.batch, 1), warmup=(self.warmup, 1))
        if not 0 < self.lr < float("inf") or not 0 <= self.ema < 1 or not 0 <= self.beta2 < 1:
            raise ValueError(
                f"expected lr > 0, and ema and beta2 from 0 to below 1; got {self.lr}, {self.ema} and {self.beta2}"
            )

    def learning_rate(self) -> Callable[[int], float]:
        "step ↦ the learning rate."
        rise = {"cosine": partial(warmup_cosine, steps=self.steps), "constant": warmup_constant}[self.decay]
        return rise(self.lr, self.warmup)

    def options(self) -> dict:
        "What `Trainer` is told of it."
        return dict(
            steps=self.steps,
            lr=self.learning_rate(),
            batch=self.batch,
            ema=self.ema,
            betas=(0.9, self.beta2),
            seed=self.seed,
        )


@dataclass(frozen=True)
class NetRecipe(Training):
    "A network for a data set, and its training."

    data: str = "digits"
    net: Literal[*NETWORKS] = "unet"
    width: int = 16
    mults: tuple[int, ...] = (1, 2)
    blocks: int = 1
    attention: tuple[int, ...] = (1,)
    classes: int = 10
    dropout: float = 0.0
    patch: int = 1

    def __post_init__(self):
        super().__post_init__()
        check_numbers(
            width=(self.width, 1), blocks=(self.blocks, 1), classes=(self.classes, 0), patch=(self.patch, 1)
        )
        if not self.mults:
            raise ValueError("mults: expected the multiple of a level, or of more; got none")

    def network(self, channels: int, **options) -> nn.Module:
        "The fresh network, from the recipe's seed."
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return chosen_network(self)(self, channels, **options)

    def labelled(self, y: Tensor | None) -> dict:
        "The labels as a `Trainer` takes them, if the network knows any; y: None where they come with the pictures."
        return (dict(null=self.classes) | ({} if y is None else dict(cond={"y": y}))) if self.classes else {}


@dataclass(frozen=True)
class Recipe(NetRecipe):
    "A diffusion model: its network, schedule, target and training. flip: 1 to mirror half of the pictures."

    schedule: Literal[*SCHEDULES] = "cosine"
    target: Literal[*TARGETS] = "v"
    flip: int = 0


def chosen_network(r: NetRecipe) -> Callable:
    "What makes the network of a recipe."
    return NETWORKS[r.net]


def chosen(r: Recipe) -> tuple[Callable, Callable, Callable]:
    "What a recipe names: how the schedule is made, what the network predicts, the weight of the loss."
    return SCHEDULES[r.schedule], *TARGETS[r.target]


def recipe(name: str) -> Recipe:
    "The recipe of settings.ini under [recipe.NAME]."
    return settings(f"recipe.{name}", Recipe)


def recipe_denoiser(r: Recipe, shape: Sequence[int]) -> NetDenoiser:
    "The fresh network of a recipe, for pictures of this shape."
    schedule, predict, _ = chosen(r)
    return NetDenoiser(r.network(shape[0]), schedule(), predict)


def recipe_trainer(
    r: Recipe, x: Tensor | Dataset, y: Tensor | None = None, *, denoiser: NetDenoiser | None = None, **options
) -> Trainer:
    """The trainer that a recipe describes, for pictures x and labels y, or a data set of both.

    denoiser: where to start, if not from a fresh one. options: those of `Trainer`, such as device, bf16, compile, checkpoint, save_every.
    """
    denoiser = denoiser or recipe_denoiser(r, x.shape[1:])
    loss = partial(denoising_loss, weight=chosen(r)[2])
    return Trainer(
        denoiser, x, loss=loss, augment=flip_half if r.flip else None, **r.options(), **r.labelled(y), **options
    )
