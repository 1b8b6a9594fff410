"""The parts of unCLIP as one model: what reads captions, the prior, the decoder."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diffusion_nb.denoisers import Denoiser, NetDenoiser, predict_x0
from diffusion_nb.emoji import words as words_of
from diffusion_nb.grids import edm_grid
from diffusion_nb.guidance import CFG
from diffusion_nb.nets.clip import EmbeddingReader, PriorNet, TextEncoder
from diffusion_nb.noise import Noise
from diffusion_nb.recipes.captions import CaptionRecipe, caption_denoiser
from diffusion_nb.samplers.linear import dpmpp_2m
from diffusion_nb.schedules import CosineSchedule
from diffusion_nb.util.checks import check_numbers


@dataclass(frozen=True)
class UnclipNets(CaptionRecipe):
    """The networks of unCLIP: the decoder, which is a model of captions that is told a vector instead, with a reader of `reading` units within;
    a prior of `prior_depth` layers of width `prior_width`; and a text encoder, `text_width` wide, of captions of up to `length` of the words, into a space of `dim` numbers.
    """

    dim: int = 48
    length: int = 8
    text_width: int = 48
    prior_width: int = 128
    prior_depth: int = 3
    reading: int = 256

    def __post_init__(self):
        super().__post_init__()
        check_numbers(dim=(self.dim, 1), length=(self.length, 1))


class Unclip(Denoiser):
    "A decoder, with what makes the vectors that it is told: the encoder of captions and the prior."

    def __init__(self, text: TextEncoder, prior: NetDenoiser, decoder: NetDenoiser):
        super().__init__()
        self.text, self.prior, self.decoder, self.schedule = text, prior, decoder, decoder.schedule

    @property
    def net(self):
        "The decoder's network, which knows what it is told."
        return self.decoder.net

    def forward(self, x_t, t, **cond):
        return self.decoder(x_t, t, **cond)

    @torch.no_grad()
    def vectors(self, captions: Sequence[str], first: int = 0) -> Float[Tensor, "n d"]:
        "What the decoder is told of these captions: for each a picture's vector, drawn by the prior; the i-th has seed `first` + i. Raises ValueError for unknown words."
        return stretched(draw_vectors(self.prior, self.text(self.text.reader.told(captions)), first=first))


def stretched(c: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    "Vectors of length 1 as vectors of length √d, whose coordinates are of size 1: as prior and decoder know them."
    return c * c.shape[-1] ** 0.5


@torch.no_grad()
def draw_vectors(
    prior: NetDenoiser, e: Float[Tensor, "n d"], w: float = 0.0, steps: int = 20, first: int = 0
) -> Float[Tensor, "n d"]:
    "A picture's vector of length 1 for each text, by DPM-Solver++ 2M with guidance weight w; the i-th has seed `first` + i."
    guided, ts = CFG(prior, w, prior.net.null) if w else prior, edm_grid(prior.schedule, steps, 0.02, 80.0)
    noise = Noise(range(first, first + len(e)), e.shape[1:], e.device)
    return F.normalize(dpmpp_2m(guided, prior.schedule(ts[0])[1].float() * noise(0), ts, y=stretched(e)), dim=1)


def unclip_model(r: UnclipNets, shape: Sequence[int]) -> Unclip:
    "The fresh networks of a recipe, for pictures of this shape, from the recipe's seed."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(r.seed)
        decoder = caption_denoiser(r, shape)
        decoder.net.label = EmbeddingReader(r.dim, 4 * r.width, r.reading)
        text = TextEncoder(r.dim, r.words, r.length, words_of, r.text_width)
        prior = NetDenoiser(PriorNet(r.dim, r.prior_width, r.prior_depth, r.dim), CosineSchedule(), predict_x0)
    return Unclip(text, prior, decoder)
