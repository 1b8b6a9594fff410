"""Recipes of diffusion transformers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from diffusion_nb.denoisers import NetDenoiser
from diffusion_nb.nets.dit import AdaLNZero, CrossAttend, DiT, InContext
from diffusion_nb.nets.words import BagOfWords
from diffusion_nb.recipes.diffusion import Recipe, chosen
from diffusion_nb.recipes.settings import settings
from diffusion_nb.util.checks import check_numbers

BLOCKS = {"adaln-zero": AdaLNZero, "in-context": InContext, "cross-attention": CrossAttend}


@dataclass(frozen=True)
class DiTRecipe(Recipe):
    "A diffusion transformer of `blocks` blocks of one kind, `width` channels and `heads` heads on patches of `patch` × `patch`, and its training; waves: how many numbers tell the time. It reads nothing of the U-Net's other settings."

    data: str = "mnist"
    width: int = 56
    blocks: int = 4
    patch: int = 4
    heads: int = 4
    waves: int = 64
    kind: Literal[*BLOCKS] = "adaln-zero"
    steps: int = 6000
    batch: int = 96
    lr: float = 0.004
    warmup: int = 200
    ema: float = 0.998

    def __post_init__(self):
        super().__post_init__()
        check_numbers(heads=(self.heads, 1), waves=(self.waves, 2))

    def told(self) -> dict:
        "What `DiT` is told of its condition."
        return {"classes": self.classes}


def dit_recipe(name: str) -> DiTRecipe:
    "The recipe of settings.ini under [dit.NAME]."
    return settings(f"dit.{name}", DiTRecipe)


@dataclass(frozen=True)
class DiTCaptionRecipe(DiTRecipe):
    "A diffusion transformer of captioned pictures, which knows these words; hidden: the width within the layers that read them."

    data: str = "emoji"
    classes: int = 0
    hidden: int = 256
    words: tuple[str, ...] = ()

    def told(self) -> dict:
        return {"classes": 0, "condition": BagOfWords(self.words, self.width, self.hidden)}


def dit_denoiser(r: DiTRecipe, shape: Sequence[int]) -> NetDenoiser:
    "The fresh network of a recipe, for square pictures of this shape. Raises ValueError for others."
    channels, height, width = shape
    if height != width:
        raise ValueError(f"shape: expected square pictures; got {height}×{width}")
    schedule, predict, _ = chosen(r)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(r.seed)
        net = DiT(
            channels, height, r.patch, r.width, r.blocks, r.heads, block=BLOCKS[r.kind], waves=r.waves, **r.told()
        )
    return NetDenoiser(net, schedule(), predict)
