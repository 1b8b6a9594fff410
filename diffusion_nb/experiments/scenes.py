"""Scenes of two coloured digits with captions, and a judge of them that needs no training of its own (notebook 21)."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import product
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_nb.data import digits
from diffusion_nb.experiments.judge import digit_judge

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = ("red", "green", "blue")
PLACES = {"left of": ((4, 0), (4, 8)), "above": ((0, 4), (8, 4))}  # row and column of the first and of the second


class Scene(NamedTuple):
    "A digit in a colour, where it is, another digit in its colour."

    digit: int
    colour: int
    place: str
    other: int
    other_colour: int

    @property
    def caption(self) -> str:
        return f"a {COLOURS[self.colour]} {DIGITS[self.digit]} {self.place} a {COLOURS[self.other_colour]} {DIGITS[self.other]}"


SCENES = tuple(Scene(*s) for s in product(range(10), range(3), PLACES, range(10), range(3)))


def pictures_of_scenes(
    scenes: Sequence[Scene], held_out: bool = False, seed: int = 0
) -> Float[Tensor, "n 3 16 16"]:
    "A picture of each scene, of digits of scikit-learn chosen by the seed."
    data, g = digits(), torch.Generator().manual_seed(seed)
    x, y = (data.x_test, data.y_test) if held_out else (data.x, data.y)
    of = [x[y == d, 0] for d in range(10)]
    found = torch.full((len(scenes), 3, 16, 16), -1.0)
    for picture, s in zip(found, scenes, strict=True):
        for (row, column), digit, colour in zip(PLACES[s.place], (s.digit, s.other), (s.colour, s.other_colour), strict=True):  # fmt: skip
            picture[colour, row : row + 8, column : column + 8] = of[digit][torch.randint(len(of[digit]), (), generator=g)]  # fmt: skip
    return found


@torch.no_grad()
def scenes_seen(x: Float[Tensor, "n 3 16 16"]) -> list[Scene]:
    "The scene that each picture shows: place by the ink in the corners, digits by the judge of digits, a colour by the brightest channel."
    judge, ink, crops = digit_judge(), x.amax(1) + 1, []
    sides = ink[:, 4:12, :4].sum((1, 2)) + ink[:, 4:12, 12:].sum((1, 2))
    ends = ink[:, :4, 4:12].sum((1, 2)) + ink[:, 12:, 4:12].sum((1, 2))
    places = ["left of" if beside else "above" for beside in (sides > ends).tolist()]
    for k in (0, 1):
        crops.append(torch.stack([p[:, r : r + 8, c : c + 8] for p, place in zip(x, places, strict=True) for r, c in [PLACES[place][k]]]))  # fmt: skip
    digit, other = (judge(c.amax(1, keepdim=True)).argmax(1).tolist() for c in crops)
    colour, other_colour = (c.sum((2, 3)).argmax(1).tolist() for c in crops)
    return [Scene(*s) for s in zip(digit, colour, places, other, other_colour, strict=True)]


def ceiling(read: Callable[[str], object], asked: Callable[[Scene], object]) -> Fraction:
    "The largest share of scenes of which `asked` can be told from what `read` makes of the caption: the most frequent answer counts."
    found = defaultdict(lambda: defaultdict(int))
    for scene in SCENES:
        found[read(scene.caption)][asked(scene)] += 1
    return Fraction(sum(max(answers.values()) for answers in found.values()), len(SCENES))
