"""Recipes of consistency models."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from diffusion_nb.data import Pictures, data_set
from diffusion_nb.denoisers import Clip, DenoiserConsistency, NetDenoiser, VEView
from diffusion_nb.grids import edm_grid
from diffusion_nb.losses.consistency import consistency_distillation, consistency_training
from diffusion_nb.recipes.diffusion import Training
from diffusion_nb.recipes.settings import settings
from diffusion_nb.time_samplers import LevelSampler, constant_levels
from diffusion_nb.training.distill import frozen
from diffusion_nb.training.trainer import Trainer
from diffusion_nb.util.checks import default_device


@dataclass(frozen=True)
class ConsistencyRecipe(Training):
    "A consistency model of a data set: `levels` steps of σ from `largest` to `smallest`, the last one down to 0, and its training."

    lr: float = 0.0002
    warmup: int = 50
    ema: float = 0.99
    data: str = "digits"
    levels: int = 10
    smallest: float = 0.2
    largest: float = 20.0


def consistency_trainer(
    r: ConsistencyRecipe, pictures: Pictures, f: nn.Module, make_loss: Callable, classes: int = 0, **options
) -> Trainer:
    """The trainer that a recipe describes: `make_loss(levels)` is the loss. options: device, bf16, compile, checkpoint, save_every.

    With classes, one label in ten becomes "any".
    """
    levels = LevelSampler(constant_levels(edm_grid(f.schedule, r.levels, r.smallest, r.largest)))
    labels = dict(cond={"y": pictures.y}, null=classes) if classes else {}
    return Trainer(f, pictures.x, time_sampler=levels, loss=make_loss(levels), **r.options(), **labels, **options)


def train_consistency(
    name: str, teacher: NetDenoiser, classes: int = 0, distil: bool = True, **options
) -> DenoiserConsistency:
    """A one-step model of MNIST or CIFAR-10, by [consistency.NAME] of settings.ini, that starts from the weights of a teacher.

    classes: how many the teacher knows. distil: whether to follow the teacher, too. options: device, bf16, compile, checkpoint, save_every.
    """
    r = settings(f"consistency.{name}", ConsistencyRecipe)
    f = DenoiserConsistency(copy.deepcopy(teacher).requires_grad_(True))
    device = torch.device(options.get("device") or default_device())
    teacher = frozen(VEView(Clip(teacher)), device, options.get("compile", False))
    make = partial(consistency_distillation, teacher) if distil else consistency_training
    return consistency_trainer(r, data_set(r.data).load(), f, make, classes, **options).fit()
