"""Scenes of two coloured digits with captions, a judge of them that needs no training of its own, and models that draw them (notebook 21)."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import product
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_nb.data import digits
from diffusion_nb.denoisers import Clip, NetDenoiser
from diffusion_nb.experiments.artifacts import artifact
from diffusion_nb.experiments.judge import digit_judge
from diffusion_nb.experiments.latent import rounded
from diffusion_nb.experiments.pictures import by_2m, from_bytes, in_bytes, trained_on
from diffusion_nb.guidance import CFG
from diffusion_nb.recipes.captions import CaptionRecipe, caption_denoiser
from diffusion_nb.recipes.diffusion import Recipe, recipe_trainer
from diffusion_nb.recipes.latent import LatentRecipe, latent_denoiser
from diffusion_nb.recipes.settings import settings
from diffusion_nb.util.checks import default_device

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


# models that draw scenes from their captions, word by word or from a bag of words

WORDS = ("a", "left", "of", "above", *COLOURS, *DIGITS)
SHAPE = (3, 16, 16)
HELD_OUT, EACH = 400, 20  # scenes that training never sees, and pictures of each of the others


def split_scenes() -> tuple[list[Scene], list[Scene]]:
    "The scenes to train with, and those that are held out, chosen at random."
    order = torch.randperm(len(SCENES), generator=torch.Generator().manual_seed(0)).tolist()
    return [SCENES[i] for i in sorted(order[HELD_OUT:])], [SCENES[i] for i in sorted(order[:HELD_OUT])]


def scene_denoiser(r: LatentRecipe) -> NetDenoiser:
    "The fresh network that reads captions word by word."
    return latent_denoiser(replace(r, words=WORDS), SHAPE)


def scene_bag_denoiser(r: CaptionRecipe) -> NetDenoiser:
    "The fresh network that reads how often each word is in a caption."
    return caption_denoiser(replace(r, words=WORDS), SHAPE)


def train_on_scenes(r: Recipe, denoiser: NetDenoiser, reader: nn.Module, **options) -> NetDenoiser:
    "The network, trained on EACH pictures of each scene of the training set, and their captions."
    scenes = split_scenes()[0] * EACH
    told = reader.told([s.caption for s in scenes])
    trainer = recipe_trainer(
        r, pictures_of_scenes(scenes), denoiser=denoiser, cond={"y": told}, null=reader.null, device=default_device(), **options
    )  # fmt: skip
    return trainer.fit().cpu().eval()


@torch.no_grad()
def draw_scenes(denoiser: NetDenoiser, reader: nn.Module, captions: Sequence[str], w: float = 2.0, steps: int = 20, first: int = 0) -> Float[Tensor, "n 3 16 16"]:  # fmt: skip
    "Pictures of captions by DPM-Solver++ 2M with guidance weight w; the i-th has seed `first` + i."
    guided = Clip(CFG(denoiser, w, reader.null) if w else denoiser)
    return by_2m(guided, len(captions), SHAPE, steps, first, batch=200, y=reader.told(captions)).clamp(-1, 1)


def obeyed(seen: Sequence[Scene], asked: Sequence[Scene]) -> dict[str, float]:
    "The shares of pictures that show what was asked: the place, a colour, a digit (of the two, on average), and all five."
    right = torch.tensor(
        [[a == b for a, b in zip(s, t, strict=True)] for s, t in zip(seen, asked, strict=True)]
    ).double()
    digit, colour, place, other, other_colour = right.mean(0).tolist()
    return {"place": place, "colour": (colour + other_colour) / 2, "digit": (digit + other) / 2, "all five": right.prod(1).mean().item()}  # fmt: skip


def judged_scenes(denoiser: NetDenoiser, reader: nn.Module) -> dict[str, dict[str, float]]:
    "What the judge says of drawings of held-out captions, with and without guidance, and of as many that were trained on."
    known, held = split_scenes()
    said = {}
    for kind, scenes, w in (("held-out captions, w = 0", held, 0.0), ("held-out captions", held, 2.0), ("known captions", known[::3][:HELD_OUT], 2.0)):  # fmt: skip
        x = draw_scenes(denoiser, reader, [s.caption for s in scenes], w, first=2**20)
        said[kind] = obeyed(scenes_seen(x), scenes)
    return rounded(said)


def train_scenes(r: LatentRecipe, **options) -> tuple[dict, dict]:
    "The model that reads captions word by word, in 8 bits, and how it obeys."
    denoiser = scene_denoiser(r)
    denoiser = train_on_scenes(r, denoiser, denoiser.net.context, **options)
    weights = in_bytes(denoiser.net)
    denoiser.net.load_state_dict(from_bytes(weights))
    return weights, judged_scenes(denoiser, denoiser.net.context) | trained_on()


def train_scenes_bag(r: CaptionRecipe, **options) -> tuple[dict, dict]:
    "How the model obeys that reads bags of words, and drawings of some held-out captions as bytes."
    denoiser = scene_bag_denoiser(r)
    denoiser = train_on_scenes(r, denoiser, denoiser.net.label, **options)
    some = draw_scenes(denoiser, denoiser.net.label, [s.caption for s in split_scenes()[1][::25]], first=2**20)
    return {"drawn": ((some + 1) * 127.5).round().byte()}, judged_scenes(
        denoiser, denoiser.net.label
    ) | trained_on()


def scene_model() -> tuple[NetDenoiser, LatentRecipe]:
    "The model that reads captions of scenes word by word (artifact `scenes`), in eval mode, and its recipe with its words; `known` of its reader are some captions that were held out."
    r = settings("scenes.words", LatentRecipe)
    denoiser = scene_denoiser(r)
    denoiser.net.load_state_dict(from_bytes(artifact("scenes", train_scenes, r)[0]))
    denoiser.net.context.known = [s.caption for s in split_scenes()[1][::25]]
    return denoiser.eval().requires_grad_(False), replace(r, words=WORDS)


def scene_scores() -> dict[str, dict]:
    "What the judge says of either model, by what it reads: words in their order, or a bag of them (artifacts `scenes`, `scenes_bag`)."
    words = artifact("scenes", train_scenes, settings("scenes.words", LatentRecipe))[1]
    bag = artifact("scenes_bag", train_scenes_bag, settings("scenes.bag", CaptionRecipe))[1]
    return {"words in their order": words["metrics"], "bag of words": bag["metrics"]}


def scenes_by_bag() -> tuple[list[Scene], Float[Tensor, "16 3 16 16"]]:
    "Held-out scenes, and what the model of bags drew for their captions."
    drawn = artifact("scenes_bag", train_scenes_bag, settings("scenes.bag", CaptionRecipe))[0]["drawn"]
    return split_scenes()[1][::25], drawn / 127.5 - 1
