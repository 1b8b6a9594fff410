"""Recipes of autoencoders, and of diffusion models of their latents."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_nb.codecs import Codec, latent_loss
from diffusion_nb.denoisers import NetDenoiser
from diffusion_nb.emoji import words as words_of
from diffusion_nb.losses.autoencoder import kl_loss, vq_loss
from diffusion_nb.losses.simple import denoising_loss
from diffusion_nb.nets.conditioning import TokenReader
from diffusion_nb.nets.latent import SmallAutoencoder, VectorQuantiser
from diffusion_nb.recipes.diffusion import Recipe, Training, chosen
from diffusion_nb.training.trainer import Trainer


@dataclass(frozen=True)
class AutoencoderRecipe(Training):
    "A small autoencoder and its training. weight: of the KL divergence. codes: of a quantiser instead, with none 0."

    data: str = "mnist"
    latent: int = 4
    widths: tuple[int, ...] = (16, 32)
    blocks: int = 1
    patch: int = 2
    weight: float = 0.01
    codes: int = 0
    steps: int = 3000
    lr: float = 0.003
    ema: float = 0.998

    def fresh(self, channels: int) -> SmallAutoencoder:
        "The network, not trained, from the recipe's seed."
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            quantiser = VectorQuantiser(self.codes, self.latent) if self.codes else None
            return SmallAutoencoder(channels, self.latent, self.widths, self.blocks, self.patch, quantiser)


def fresh_codec(r: AutoencoderRecipe, shape: Sequence[int]) -> Codec:
    "The codec of a recipe for pictures of this shape, to be filled with weights."
    return Codec(r.fresh(shape[0]), torch.zeros(r.latent, 1, 1), torch.ones(r.latent, 1, 1))


def restarts(trainer: Trainer, every: int = 50, share: float = 0.5) -> None:
    "A hook: codes that are not used begin anew every so many steps, in the first share of a training."
    if trainer.step % every == 0 and trainer.step <= share * trainer.steps:
        trainer.denoiser.quantiser.restart()


def autoencoder_trainer(r: AutoencoderRecipe, x: Tensor, *, denoiser: SmallAutoencoder | None = None, **options) -> Trainer:  # fmt: skip
    "The trainer of an autoencoder of pictures x. denoiser: the network, if not a fresh one. options: those of `Trainer`."
    loss = vq_loss if r.codes else partial(kl_loss, weight=r.weight)
    hooks = [*options.pop("hooks", []), *([restarts] if r.codes else [])]
    return Trainer(denoiser or r.fresh(x.shape[1]), x, loss=loss, hooks=hooks, **r.options(), **options)


@dataclass(frozen=True)
class LatentRecipe(Recipe):
    """A diffusion model of latents, and its training.

    words: what it knows to read, with cross-attention; of one letter each, texts are read letter by letter. length: the most of them in a text. dim: of a token.
    """

    data: str = "mnist"
    width: int = 32
    mults: tuple[int, ...] = (1,)
    attention: tuple[int, ...] = (0,)
    classes: int = 0
    dim: int = 32
    words: tuple[str, ...] = ()
    length: int = 5
    steps: int = 3000
    lr: float = 0.002
    warmup: int = 200
    ema: float = 0.998


def reader_of(r: LatentRecipe) -> TokenReader | None:
    "What reads the texts that a recipe's model is given; None where it knows no words."
    letters = all(len(word) == 1 for word in r.words)
    return TokenReader(r.words, r.length, r.dim, list if letters else words_of) if r.words else None


def latent_denoiser(r: LatentRecipe, shape: Sequence[int]) -> NetDenoiser:
    "The fresh network of a recipe, for latents of this shape."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(r.seed)
        reader = reader_of(r)
        return NetDenoiser(r.network(shape[0], scale_shift=True, context=reader), chosen(r)[0](), chosen(r)[1])


def latent_trainer(r: LatentRecipe, z: Float[Tensor, "n 2*c h w"], y: Tensor | Sequence[str] | None = None, *,
                   denoiser: NetDenoiser | None = None, **options) -> Trainer:  # fmt: skip
    """The trainer of a model of latents z, means and deviations as `latents` makes them.

    y: a text for each, or labels where the recipe knows classes. denoiser: where to start, if not from a fresh one. options: those of `Trainer`.
    """
    denoiser = denoiser or latent_denoiser(r, (z.shape[1] // 2, *z.shape[2:]))
    reader, loss = denoiser.net.context, partial(latent_loss, loss=partial(denoising_loss, weight=chosen(r)[2]))
    given = dict(cond={"y": reader.told(y)}, null=reader.null) if reader else r.labelled(y)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "x0: pictures are expected")  # latents go beyond [-1, 1]
        return Trainer(denoiser, z, loss=loss, **given, **r.options(), **options)
