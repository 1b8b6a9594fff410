"""Recipes of diffusion models: network, schedule, target, training."""

from collections.abc import Sequence
from functools import partial

import torch

from diffusion_nb.data import Pictures
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
    return NetDenoiser(net, SCHEDULES[r["schedule"]](), TARGETS[r["target"]][0])


def recipe_trainer(r: dict, pictures: Pictures, **options) -> Trainer:
    "The trainer that a recipe describes. options: those of `Trainer`, such as device, bf16, compile, checkpoint, save_every."
    denoiser = recipe_denoiser(r, pictures.x.shape[1:])
    lr = {
        "cosine": warmup_cosine(r["lr"], r["warmup"], r["steps"]),
        "constant": warmup_constant(r["lr"], r["warmup"]),
    }[r["decay"]]
    loss = partial(denoising_loss, weight=TARGETS[r["target"]][1])
    return Trainer(denoiser, as_bytes(pictures.x), loss=loss, steps=r["steps"], lr=lr, batch=r["batch"], ema=r["ema"],
                   betas=(0.9, r["beta2"]), seed=r["seed"], augment=flip_half if r["flip"] else None,
                   **(dict(cond={"y": pictures.y}, null=r["classes"]) if r["classes"] else {}), **options)  # fmt: skip
