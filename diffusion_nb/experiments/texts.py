"""Longer texts by masks: words of seven letters, and lines of verse (notebook 26)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from string import ascii_lowercase

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_nb.corruption import MaskTokens
from diffusion_nb.experiments.artifacts import artifact
from diffusion_nb.experiments.pictures import from_bytes, in_bytes, trained_on
from diffusion_nb.experiments.words import best_ngram
from diffusion_nb.losses.discrete import mask_loss
from diffusion_nb.nets.text import TextNet
from diffusion_nb.noise import Noise
from diffusion_nb.recipes.settings import settings
from diffusion_nb.recipes.words import WordsRecipe, fill_holes, words_trainer
from diffusion_nb.util.storage import shipped

HELD_OUT = 600


@dataclass(frozen=True)
class Texts:
    "Texts to train on, texts held out, and what is a word."

    train: list[str]
    held_out: list[str]
    words: set[str]

    def share_of_words(self, drawn: Sequence[str]) -> float:
        "How many of the words in these texts are words."
        found = [w for text in drawn for w in text.split()]
        return sum(w in self.words for w in found) / len(found)


def shuffled(texts: Sequence[str]) -> list[str]:
    order = Noise(range(len(texts)), (1,))(0)[:, 0].argsort().tolist()
    return [texts[i] for i in order]


def seven_letters() -> Texts:
    "The 8,726 common English words of seven letters in data/words7.txt, 600 of them held out; 9,742 rarer ones are words, too."
    common, rare = (part.split() for part in shipped("words7.txt").read_text(encoding="ascii").split("\n\n"))
    texts = shuffled(common)
    return Texts(texts[HELD_OUT:], texts[:HELD_OUT], {*common, *rare})


def verse() -> Texts:
    "The 5,120 lines of Shakespeare of 20 to 36 letters in data/lines.txt, 600 of them held out; words are those of all lines."
    lines = shuffled(shipped("lines.txt").read_text(encoding="ascii").splitlines())
    return Texts(lines[HELD_OUT:], lines[:HELD_OUT], {w for line in lines for w in line.split()})


def seven_recipe() -> WordsRecipe:
    return settings("26_discrete.seven", WordsRecipe)


def lines_recipe() -> WordsRecipe:
    return replace(settings("26_discrete.lines", WordsRecipe), letters=" '" + ascii_lowercase)


@torch.no_grad()
def bits_of_texts(r: WordsRecipe, net: Callable, texts: Sequence[str], copies: int = 8) -> Float[Tensor, " n"]:
    "The bound on -log2 p of each text: the mean of `copies` draws of noise at each time."
    x = r.tokens(texts)
    noise, loss = Noise(range(len(x)), (r.length,)), partial(mask_loss, corruption=MaskTokens(len(r.letters)))
    times = [k for k in range(1, r.length + 1) for _ in range(copies)]
    terms = [loss(net, x, torch.full((len(x),), k / r.length), noise(i)).double() for i, k in enumerate(times)]
    return torch.stack(terms).mean(0) / math.log(2)


def draw_texts(r: WordsRecipe, net: TextNet, n: int, steps: int | None = None, first: int = 0, temperature: float = 1.0) -> list[str]:  # fmt: skip
    "n texts, one letter per step or in so many steps; the i-th has seed first + i. temperature: logits are divided by it."
    x = torch.full((n, r.length), len(r.letters))
    return r.texts(fill_holes(r, net, x, torch.arange(n) + first, steps, temperature))


def in_groups(values: Float[Tensor, " n"]) -> list[float]:
    "The means of three groups."
    return [round(part.mean().item(), 4) for part in values.chunk(3)]


def measured(r: WordsRecipe, net: TextNet, texts: Texts, drawn: int = 900) -> dict[str, dict]:
    """What a network of texts is worth: its bounds in bits per text beside those of n-grams, and the shares of words in what it writes, in three groups.

    One letter per step at two temperatures, several per step, and by the n-gram that is best in bits.
    """
    held = r.tokens(texts.held_out)
    costs = {"held out": bits_of_texts(r, net, texts.held_out, 2), "trained on": bits_of_texts(r, net, texts.train[:HELD_OUT], 2)}  # fmt: skip
    grams = best_ngram(r.tokens(texts.train), held, len(r.letters), (3, 4, 5), (4, 8, 16))
    best = min(grams, key=lambda n: grams[n][1])
    bits = {name: round(b.mean().item(), 3) for name, b in costs.items()} | {f"{n}-gram": round(grams[n][1], 3) for n in grams}  # fmt: skip
    ways = {"one by one": (1, 1.0), "at temperature 0.8": (1, 0.8)} | {f"{k} per step": (k, 1.0) for k in (2, 4, r.length)}  # fmt: skip
    made = {way: draw_texts(r, net, drawn, -(-r.length // k), 9000, hot) for way, (k, hot) in ways.items()}
    made["the n-gram"] = r.texts(grams[best][0].draw(drawn, 9000))
    words = {way: [round(texts.share_of_words(some[i::3]), 4) for i in range(3)] for way, some in made.items()}
    return {"bits per text": bits, "below the best n-gram": in_groups(grams[best][0].bits(held) - costs["held out"]), "words": words}  # fmt: skip


def train_texts(r: WordsRecipe, texts: Texts, **options) -> tuple[dict, dict]:
    "The weights of a network of texts, in 8 bits, and what it is worth."
    net = words_trainer(r, r.tokens(texts.train), device="cpu", **options).fit()
    weights = in_bytes(net)
    net.load_state_dict(from_bytes(weights))
    return weights, measured(r, net.eval(), texts) | trained_on()


def train_seven(r: WordsRecipe, **options) -> tuple[dict, dict]:
    return train_texts(r, seven_letters(), **options)


def train_lines(r: WordsRecipe, **options) -> tuple[dict, dict]:
    return train_texts(r, verse(), **options)


def trained(name: str, make: Callable, r: WordsRecipe) -> tuple[TextNet, dict]:
    "The network of an artifact, in eval mode, and what it is worth."
    net, (weights, card) = r.fresh(), artifact(name, make, r)
    net.load_state_dict(from_bytes(weights))
    return net.eval().requires_grad_(False), card["metrics"]


def seven_net() -> tuple[TextNet, dict]:
    "Artifact `texts_seven`."
    return trained("texts_seven", train_seven, seven_recipe())


def lines_net() -> tuple[TextNet, dict]:
    "Artifact `texts_lines`."
    return trained("texts_lines", train_lines, lines_recipe())
