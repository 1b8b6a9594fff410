"""Recipes of variational diffusion models."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_nb.denoisers import NetDenoiser, TimeWarped, predict_eps
from diffusion_nb.likelihood.bits import check_levels
from diffusion_nb.losses.vdm import vdm_loss
from diffusion_nb.nets.conditioning import FourierFeatures, GammaConditioning
from diffusion_nb.nets.unet import UNet
from diffusion_nb.recipes.diffusion import labelled, learning_rate
from diffusion_nb.recipes.settings import ints, one_of, settings
from diffusion_nb.schedules import LearnedSchedule
from diffusion_nb.training.trainer import Trainer

VDM = dict(data=str, width=int, mults=ints, blocks=int, attention=ints, classes=int, dropout=float, patch=int,
           first=float, last=float, soft_steps=int, exponents=ints, levels=int, steps=int, batch=int, lr=float,
           warmup=int, decay=one_of("cosine", "constant"), ema=float, beta2=float, seed=int)  # fmt: skip


def vdm_recipe(name: str) -> dict:
    "The recipe of settings.ini under [vdm.NAME]."
    return vars(settings(f"vdm.{name}", **VDM))


def vdm_denoiser(r: dict, shape: Sequence[int]) -> TimeWarped:
    "The fresh model of a recipe, for pictures of this shape: a network told γ, with Fourier features, on a learned clock."
    channels, schedule = shape[0], LearnedSchedule(r["first"], r["last"], r["soft_steps"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(r["seed"])
        net = UNet(channels * (1 + 2 * len(r["exponents"])), r["width"], r["mults"], r["blocks"], r["attention"], classes=r["classes"],
                   dropout=r["dropout"], patch=r["patch"], channels_out=channels)  # fmt: skip
    line = schedule.schedule
    return TimeWarped(
        NetDenoiser(FourierFeatures(net, r["exponents"]), line, predict_eps, c_noise=GammaConditioning(line)),
        schedule.warp,
    )


def vdm_trainer(
    r: dict,
    x: Tensor,
    y: Tensor | None = None,
    *,
    denoiser: TimeWarped | None = None,
    compile: bool = False,
    **options,
) -> Trainer:
    """The trainer that a recipe describes, for pictures x and labels y. Raises ValueError for pictures off the grid of levels.

    denoiser: where to start, if not from a fresh one. compile: the network. options: device, bf16, checkpoint, save_every.
    """
    if not isinstance(x, Tensor):
        raise ValueError("x: expected the pictures as a tensor, (n, c, h, w)")
    check_levels(x[:1000], r["levels"])
    trainer = Trainer(denoiser or vdm_denoiser(r, x.shape[1:]), x, loss=vdm_loss(r["levels"]), steps=r["steps"], lr=learning_rate(r),
                      batch=r["batch"], ema=r["ema"], betas=(0.9, r["beta2"]), seed=r["seed"], **labelled(r, y), **options)  # fmt: skip
    if compile:
        trainer.denoiser.denoiser.net.compile()
    return trainer
