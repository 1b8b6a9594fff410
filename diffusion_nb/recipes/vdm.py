"""Recipes of variational diffusion models."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from diffusion_nb.denoisers import NetDenoiser, TimeWarped, predict_eps, predict_noise_change
from diffusion_nb.likelihood.bits import check_levels
from diffusion_nb.losses.vdm import vdm_loss
from diffusion_nb.nets.conditioning import FourierFeatures, GammaConditioning
from diffusion_nb.recipes.diffusion import NetRecipe
from diffusion_nb.recipes.settings import settings
from diffusion_nb.schedules import LearnedSchedule
from diffusion_nb.training.trainer import Trainer


@dataclass(frozen=True)
class VDMRecipe(NetRecipe):
    """A model on a learned schedule, γ = -log SNR from `first` to `last`, both learned.

    exponents: of the Fourier features; soft_steps: the width of the monotone network; levels: grey levels. change: 1 where the
    network says what to add to its input to give the noise, as in VDM's program.
    """

    steps: int = 1500
    ema: float = 0.995
    first: float = -7.5
    last: float = 6.0
    soft_steps: int = 1024
    exponents: tuple[int, ...] = (3, 4)
    levels: int = 17
    change: int = 0


def vdm_recipe(name: str) -> VDMRecipe:
    "The recipe of settings.ini under [vdm.NAME]."
    return settings(f"vdm.{name}", VDMRecipe)


def vdm_denoiser(r: VDMRecipe, shape: Sequence[int]) -> TimeWarped:
    "The fresh model of a recipe, for pictures of this shape: a network told γ, with Fourier features, on a learned clock."
    channels, schedule = shape[0], LearnedSchedule(r.first, r.last, r.soft_steps)
    net, line = r.network(channels * (1 + 2 * len(r.exponents)), channels_out=channels), schedule.schedule
    predict = predict_noise_change if r.change else predict_eps
    return TimeWarped(
        NetDenoiser(FourierFeatures(net, r.exponents), line, predict, c_noise=GammaConditioning(line)),
        schedule.warp,
    )


def vdm_trainer(
    r: VDMRecipe,
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
    check_levels(x[:1000], r.levels)
    model = denoiser or vdm_denoiser(r, x.shape[1:])
    trainer = Trainer(model, x, loss=vdm_loss(r.levels), **r.options(), **r.labelled(y), **options)
    if compile:
        trainer.denoiser.denoiser.net.compile()
    return trainer
