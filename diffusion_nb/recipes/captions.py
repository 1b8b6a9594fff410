"""Recipes of models that draw from captions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_nb.denoisers import NetDenoiser
from diffusion_nb.nets.words import BagOfWords
from diffusion_nb.recipes.diffusion import Recipe, chosen, recipe_trainer
from diffusion_nb.training.trainer import Trainer


@dataclass(frozen=True)
class CaptionRecipe(Recipe):
    "A model of captioned pictures, which knows these words, and its training; hidden: the width within the layers that read them."

    data: str = "emoji"
    width: int = 32
    mults: tuple[int, ...] = (1, 2, 4)
    attention: tuple[int, ...] = (2,)
    classes: int = 0
    patch: int = 2
    hidden: int = 256
    words: tuple[str, ...] = ()
    steps: int = 20_000
    lr: float = 0.002
    warmup: int = 200
    ema: float = 0.999


def caption_denoiser(r: CaptionRecipe, shape: Sequence[int]) -> NetDenoiser:
    "The fresh network of a recipe, for pictures of this shape."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(r.seed)
        reader = BagOfWords(r.words, 4 * r.width, r.hidden)
    schedule, predict, _ = chosen(r)
    return NetDenoiser(r.network(shape[0], scale_shift=True, condition=reader), schedule(), predict)


def caption_trainer(r: CaptionRecipe, x: Tensor, captions: Sequence[str], **options) -> Trainer:
    "The trainer of captioned pictures x. options: those of `recipe_trainer`. Raises ValueError for words that the recipe does not name."
    denoiser = options.pop("denoiser", None) or caption_denoiser(r, x.shape[1:])
    reader = denoiser.net.label
    return recipe_trainer(r, x, denoiser=denoiser, cond={"y": reader.told(captions)}, null=reader.null, **options)
