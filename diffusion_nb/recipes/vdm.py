"""Recipes of variational diffusion models."""

from collections.abc import Sequence

import torch

from diffusion_nb.data import Pictures
from diffusion_nb.denoisers import NetDenoiser, Warped, predict_eps
from diffusion_nb.likelihood.bits import check_levels
from diffusion_nb.losses.vdm import vdm_loss
from diffusion_nb.nets.conditioning import FourierFeatures, TellGamma
from diffusion_nb.nets.unet import UNet
from diffusion_nb.recipes.settings import ints, one_of, settings
from diffusion_nb.schedules import LearnedSchedule
from diffusion_nb.training.lr import warmup_constant, warmup_cosine
from diffusion_nb.training.trainer import Trainer

VDM = dict(data=str, width=int, mults=ints, blocks=int, attention=ints, classes=int, dropout=float, patch=int,
           first=float, last=float, soft_steps=int, exponents=ints, levels=int, steps=int, batch=int, lr=float,
           warmup=int, decay=one_of("cosine", "constant"), ema=float, beta2=float, seed=int)  # fmt: skip


def vdm_recipe(name: str) -> dict:
    "The recipe of settings.ini under [vdm.NAME]."
    return vars(settings(f"vdm.{name}", **VDM))


def vdm_denoiser(r: dict, shape: Sequence[int]) -> Warped:
    "The fresh model of a recipe, for pictures of this shape: a network told γ, with Fourier features, on a learned clock."
    channels, schedule = shape[0], LearnedSchedule(r["first"], r["last"], r["soft_steps"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(r["seed"])
        net = UNet(channels * (1 + 2 * len(r["exponents"])), r["width"], r["mults"], r["blocks"], r["attention"], classes=r["classes"],
                   dropout=r["dropout"], patch=r["patch"], channels_out=channels)  # fmt: skip
    line = schedule.schedule
    return Warped(
        NetDenoiser(FourierFeatures(net, r["exponents"]), line, predict_eps, c_noise=TellGamma(line)),
        schedule.warp,
    )


def vdm_trainer(r: dict, pictures: Pictures, *, compile: bool = False, **options) -> Trainer:
    "The trainer that a recipe describes. compile: the network. options: device, bf16, checkpoint, save_every. Raises ValueError for pictures off the grid of levels."
    check_levels(pictures.x[:1000], r["levels"])
    lr = {
        "cosine": warmup_cosine(r["lr"], r["warmup"], r["steps"]),
        "constant": warmup_constant(r["lr"], r["warmup"]),
    }[r["decay"]]
    trainer = Trainer(vdm_denoiser(r, pictures.x.shape[1:]), pictures.x, loss=vdm_loss(r["levels"]), steps=r["steps"], lr=lr,
                      batch=r["batch"], ema=r["ema"], betas=(0.9, r["beta2"]), seed=r["seed"],
                      **(dict(cond={"y": pictures.y}, null=r["classes"]) if r["classes"] else {}), **options)  # fmt: skip
    if compile:
        trainer.denoiser.denoiser.net.compile()
    return trainer
