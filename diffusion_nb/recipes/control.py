"""Recipes of controls: a hint that steers a trained model."""

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from diffusion_nb.denoisers import NetDenoiser
from diffusion_nb.losses.simple import denoising_loss, snr_plus_one
from diffusion_nb.nets.controlnet import ControlNet, check_trained
from diffusion_nb.recipes.captions import CaptionRecipe, caption_denoiser
from diffusion_nb.recipes.diffusion import Training, recipe_denoiser
from diffusion_nb.training.trainer import Trainer


@dataclass(frozen=True)
class ControlTraining(Training):
    "A control of a model, and its training; levels: how many of the encoder's are copied (0: all, and the middle); dropped: the share of pictures that are trained without label or caption."

    steps: int = 400
    lr: float = 0.002
    warmup: int = 20
    levels: int = 0
    dropped: float = 0.1


@dataclass(frozen=True)
class ControlRecipe(CaptionRecipe):
    "What `Model` needs to know of a controlled model: the recipe of its base (of captions, where there are words), the channels of the hint, and the levels that are copied."

    hint: int = 1
    levels: int = 0


def control_denoiser(r: ControlRecipe, shape: tuple[int, ...]) -> NetDenoiser:
    "The fresh network of a recipe, to be filled with weights."
    base = caption_denoiser(r, shape) if r.words else recipe_denoiser(r, shape)
    return NetDenoiser(ControlNet(base.net, r.hint, r.levels), base.schedule, base.predict)


def controlled(base: NetDenoiser, channels: int, levels: int = 0) -> NetDenoiser:
    "A trained model with a fresh control. Raises ValueError for a base that is not trained."
    check_trained(base.net)
    return NetDenoiser(ControlNet(base.net, channels, levels), base.schedule, base.predict, base.c_in, base.c_noise)


def control_trainer(r: ControlTraining, control: NetDenoiser, x: Tensor, hint: Tensor, y: Tensor | None = None, null=None, **options) -> Trainer:  # fmt: skip
    "The trainer of a control, by the velocity's error, for pictures x, their hints, and labels or captions y, of which some become `null`. options: those of `Trainer`."
    cond = {"hint": hint} | ({} if y is None else {"y": y})
    loss = partial(denoising_loss, weight=snr_plus_one)
    return Trainer(control, x, loss=loss, cond=cond, null=null, cond_dropout=r.dropped, **r.options(), **options)
