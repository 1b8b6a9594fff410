"""How all experiments on digits are judged."""

from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_nb.data import digits
from diffusion_nb.experiments.judge import accuracy_of, digit_judge
from diffusion_nb.metrics.features import (
    density_coverage,
    frechet_distance,
    nearest_distance,
    precision_recall,
    radii,
)


def variety(x: Float[Tensor, "n *d"], y: Int[Tensor, " n"]) -> float:
    "The variance within a class, summed over the pixels, mean over the classes that occur (twice at least)."
    return torch.stack([x[y == k].flatten(1).var(0).sum() for k in y.unique()]).mean().item()


class Scores(NamedTuple):
    "What `evaluate` finds, one number a group: variety, and nearest (the distance to the nearest training digit), are 1 for real digits."

    recognised: Float[Tensor, " groups"]
    frechet: Float[Tensor, " groups"]
    precision: Float[Tensor, " groups"]
    recall: Float[Tensor, " groups"]
    density: Float[Tensor, " groups"]
    coverage: Float[Tensor, " groups"]
    variety: Float[Tensor, " groups"]
    nearest: Float[Tensor, " groups"]


class Reference(NamedTuple):
    "The training digits as the judge sees them, with what all scores share: the radii of their 3 and of their 5 nearest."

    features: Float[Tensor, "n f"]
    radii3: Float[Tensor, " n"]
    radii5: Float[Tensor, " n"]
    variety: float
    nearest: float


@cache
def reference() -> Reference:
    "The training digits' own numbers, worked out once."
    data = digits()
    f = digit_judge().features(data.x)
    return Reference(
        f,
        radii(f.double(), 3),
        radii(f.double(), 5),
        variety(data.x, data.y),
        nearest_distance(data.x_test, data.x),
    )


@torch.no_grad()
def evaluate(x: Float[Tensor, "n 1 8 8"], y: Int[Tensor, " n"], size: int = 300) -> Scores:
    """The scores of digits x that are meant to be y, against the training digits: the one judgement of all the book's experiments on digits.

    In groups of `size`, since a Fréchet distance depends on how many digits there are.
    """
    judge, data, real = digit_judge(), digits(), reference()

    def scores(x, y):
        f = judge.features(x)
        return [accuracy_of(judge, x, y), frechet_distance(f, real.features), *precision_recall(real.features, f, radius=real.radii3),
                *density_coverage(real.features, f, radius=real.radii5), variety(x, y) / real.variety, nearest_distance(x, data.x) / real.nearest]  # fmt: skip

    return Scores(*torch.tensor([scores(*group) for group in zip(x.split(size), y.split(size), strict=True)]).T)
