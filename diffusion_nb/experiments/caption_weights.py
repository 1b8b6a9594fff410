"""What a larger weight of guidance brings to captions, and what it costs in variety (notebook 21)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from diffusion_nb.emoji import emoji
from diffusion_nb.experiments.artifacts import artifact
from diffusion_nb.experiments.emoji import draw_captions, emoji_denoiser, emoji_judge, judge_captions
from diffusion_nb.metrics.features import density_coverage, precision_recall
from diffusion_nb.recipes.settings import settings

OBEYED = ("right role", "right gender", "right tone", "true picture nearest")
LOOKED_AT = (*OBEYED, "precision", "coverage")


@dataclass(frozen=True)
class CaptionWeights:
    "Weights of guidance, seeds, and the neighbours whose distance is the radius of a picture's ball."

    weights: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
    seeds: tuple[int, ...] = (1, 2, 3)
    k: int = 3


@torch.no_grad()
def run_caption_weights(r: CaptionWeights) -> tuple[dict, dict]:
    "Of the model of emoji at 32×32, for each weight and seed: LOOKED_AT of drawings of all held-out combinations; balls are of the judge's features."
    data, judge, denoiser = emoji(32), emoji_judge(), emoji_denoiser()
    which = data.held_combinations.nonzero()[:, 0].tolist()
    captions, seen = [data.captions[i] for i in which], lambda x: normalize(judge.features(x), dim=1)
    real = seen(data.x[which])

    def looked_at(w: float, seed: int) -> list[float]:
        x = draw_captions(denoiser, captions, w, first=seed * 2**20)
        said, fake = judge_captions(judge, data, x, which), seen(x)
        return [
            *(said[q] for q in OBEYED),
            precision_recall(real, fake, r.k)[0],
            density_coverage(real, fake, r.k)[1],
        ]

    return {"table": torch.tensor([[looked_at(w, seed) for seed in r.seeds] for w in r.weights])}, {}


def caption_weights() -> Float[Tensor, "weight seed 6"]:
    "The table of `run_caption_weights` (artifact `caption_weights`)."
    return artifact("caption_weights", run_caption_weights, settings("21_imagen.weights", CaptionWeights))[0]["table"]  # fmt: skip
