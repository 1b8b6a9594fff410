"""Recipes of models of latents that read the tokens of a frozen text encoder."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from diffusion_nb.codecs import latent_loss
from diffusion_nb.denoisers import NetDenoiser
from diffusion_nb.losses.simple import denoising_loss
from diffusion_nb.nets.frozen import FrozenTokens, PooledTokens
from diffusion_nb.recipes.diffusion import chosen
from diffusion_nb.recipes.latent import LatentRecipe
from diffusion_nb.training.trainer import Trainer


@dataclass(frozen=True)
class TextRecipe(LatentRecipe):
    """A diffusion model of latents that reads the tokens of a frozen encoder, and its training.

    encoded: the width of the encoder. kept: how many principal components of its tokens. hidden: the width of the layers behind their mean. looks: after how many steps it is judged.
    """

    data: str = "emoji"
    width: int = 48
    dim: int = 48
    length: int = 24
    encoded: int = 384
    kept: int = 96
    hidden: int = 192
    looks: tuple[int, ...] = ()
    steps: int = 7000
    decay: Literal["cosine", "constant"] = "constant"
    ema: float = 0.999


@cache
def encoder() -> nn.Module:
    "The published text encoder, loaded once."
    from diffusion_nb.models.minilm import load_minilm

    return load_minilm()


@torch.no_grad()
def encoded(texts: Sequence[str]) -> tuple[Float[Tensor, "n m e"], Bool[Tensor, "n m"]]:
    "The tokens of texts by the published encoder, and which are there. Raises ImportError where it is not installed."
    return encoder()(texts)


def text_denoiser(r: TextRecipe, shape: Sequence[int]) -> NetDenoiser:
    "The fresh network of a recipe, for latents of this shape: tokens by cross-attention, and their mean beside the time."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(r.seed)
        tokens = FrozenTokens(encoded, r.length, r.encoded, r.kept, r.dim)
        mean = PooledTokens(r.kept, 4 * r.width, r.hidden)
    schedule, predict, _ = chosen(r)
    return NetDenoiser(r.network(shape[0], scale_shift=True, context=tokens, condition=mean), schedule(), predict)


def text_trainer(
    r: TextRecipe, z: Float[Tensor, "n 2*c h w"], y: Tensor, denoiser: NetDenoiser, **options
) -> Trainer:
    "The trainer of a model of latents z, means and deviations as `latents` makes them, told y. options: those of `Trainer`."
    loss = partial(latent_loss, loss=partial(denoising_loss, weight=chosen(r)[2]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "x0: pictures are expected")  # latents go beyond [-1, 1]
        return Trainer(
            denoiser, z, loss=loss, cond={"y": y}, null=denoiser.net.context.null, **r.options(), **options
        )
