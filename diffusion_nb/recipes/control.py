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
    """A controlled model: the network of its base, and the training of the control.

    words: those of a base that reads captions, none for labels. hint: the channels of the hint. levels, dropped: as in `ControlTraining`.
    """

    hint: int = 1
    levels: int = 0
    dropped: float = 0.1


def control_denoiser(r: ControlRecipe, shape: tuple[int, ...]) -> NetDenoiser:
    "The fresh network of a recipe, to be filled with weights."
    base = caption_denoiser(r, shape) if r.words else recipe_denoiser(r, shape)
    return NetDenoiser(ControlNet(base.net, r.hint, r.levels), base.schedule, base.predict)


def controlled(base: NetDenoiser, channels: int, levels: int = 0) -> NetDenoiser:
    "A trained model with a fresh control. Raises ValueError for a base that is not trained."
    net = ControlNet(base.net, channels, levels)
    check_trained(net.base)
    return NetDenoiser(net, base.schedule, base.predict, base.c_in, base.c_noise)


def control_trainer(
    r: ControlTraining | ControlRecipe,
    x: Tensor,
    y: Tensor | None = None,
    *,
    denoiser: NetDenoiser,
    hint: Tensor,
    null=None,
    **options,
) -> Trainer:
    """The trainer of a control, by the error of the velocity, for pictures x, their hints, and labels or captions y.

    denoiser: as `controlled` makes it. null: what takes the place of some y, if not the number of classes. options: those of `Trainer`.
    """
    cond = {"hint": hint} | ({} if y is None else {"y": y})
    null = null if null is not None or y is None else denoiser.net.label.num_embeddings - 1
    loss = partial(denoising_loss, weight=snr_plus_one)
    return Trainer(denoiser, x, loss=loss, cond=cond, null=null, cond_dropout=r.dropped, **r.options(), **options)
