"""Recipes of diffusion models: network, schedule, target, training."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffusion_nb.denoisers import NetDenoiser, predict_eps, predict_v
from diffusion_nb.losses.simple import denoising_loss, snr, snr_plus_one
from diffusion_nb.nets.unet import UNet
from diffusion_nb.recipes.settings import ints, one_of, settings
from diffusion_nb.schedules import CosineSchedule, DDPMSchedule, linear_betas
from diffusion_nb.training.batches import flip_half
from diffusion_nb.training.lr import warmup_constant, warmup_cosine
from diffusion_nb.training.trainer import Trainer
from diffusion_nb.util.checks import check_numbers
from diffusion_nb.util.images import as_bytes

SCHEDULES = {"cosine": CosineSchedule, "linear": lambda: DDPMSchedule(linear_betas())}
TARGETS = {
    "eps": (predict_eps, snr),
    "v": (predict_v, snr_plus_one),
}  # what to predict, and the weight that makes it plain
RECIPE = dict(data=str, width=int, mults=ints, blocks=int, attention=ints, classes=int, dropout=float, patch=int,
              schedule=one_of(*SCHEDULES), target=one_of(*TARGETS), steps=int, batch=int, lr=float, warmup=int,
              decay=one_of("cosine", "constant"), ema=float, beta2=float, flip=int, seed=int)  # fmt: skip


def chosen(r: dict) -> tuple[Callable, Callable, Callable]:
    "What a recipe names: how the schedule is made, what the network predicts, the weight of the loss."
    return SCHEDULES[r["schedule"]], *TARGETS[r["target"]]


def recipe(name: str) -> dict:
    "The recipe of settings.ini under [recipe.NAME]."
    return vars(settings(f"recipe.{name}", **RECIPE))


def recipe_denoiser(r: dict, shape: Sequence[int]) -> NetDenoiser:
    "The fresh network of a recipe, for pictures of this shape. Raises ValueError for numbers that cannot be meant."
    check_numbers(width=(r["width"], 1), steps=(r["steps"], 1), batch=(r["batch"], 1), warmup=(r["warmup"], 1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(r["seed"])
        net = UNet(shape[0], r["width"], r["mults"], r["blocks"], r["attention"], classes=r["classes"],
                   dropout=r["dropout"], patch=r["patch"])  # fmt: skip
    schedule, predict, _ = chosen(r)
    return NetDenoiser(net, schedule(), predict)


def labelled(r: dict, y: Tensor | None) -> dict:
    "The labels as a `Trainer` takes them, if the network of this recipe knows any; y: None where they come with the pictures."
    return (dict(null=r["classes"]) | ({} if y is None else dict(cond={"y": y}))) if r["classes"] else {}


def learning_rate(r: dict) -> Callable[[int], float]:
    "step ↦ the learning rate of a recipe."
    rise = {"cosine": partial(warmup_cosine, steps=r["steps"]), "constant": warmup_constant}[r["decay"]]
    return rise(r["lr"], r["warmup"])


def recipe_trainer(
    r: dict, x: Tensor | Dataset, y: Tensor | None = None, *, denoiser: NetDenoiser | None = None, **options
) -> Trainer:
    """The trainer that a recipe describes, for pictures x and labels y, or a data set of both.

    denoiser: where to start, if not from a fresh one. options: those of `Trainer`, such as device, bf16, compile, checkpoint, save_every.
    """
    x = as_bytes(x) if isinstance(x, Tensor) else x
    denoiser = denoiser or recipe_denoiser(r, x.shape[1:])
    loss = partial(denoising_loss, weight=chosen(r)[2])
    return Trainer(denoiser, x, loss=loss, steps=r["steps"], lr=learning_rate(r), batch=r["batch"], ema=r["ema"], betas=(0.9, r["beta2"]),
                   seed=r["seed"], augment=flip_half if r["flip"] else None, **labelled(r, y), **options)  # fmt: skip
