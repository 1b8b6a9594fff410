"""Texts of other lengths by masks: words of five and seven letters, and lines of verse (notebook 26)."""

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
from diffusion_nb.experiments.words import word_list, word_net
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


def five_letters() -> Texts:
    "`word_list` as texts."
    words = word_list()
    return Texts(words.train, words.held_out, words.known)


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


def train_texts(r: WordsRecipe, texts: Texts, **options) -> tuple[dict, dict]:
    "The weights of a network of texts, in 8 bits, and its bounds in bits per text."
    net = words_trainer(r, r.tokens(texts.train), device="cpu", **options).fit()
    weights = in_bytes(net)
    net.load_state_dict(from_bytes(weights))
    said = {"held out": texts.held_out, "trained on": texts.train[:HELD_OUT]}
    bits = {name: round(bits_of_texts(r, net.eval(), some, 2).mean().item(), 3) for name, some in said.items()}
    return weights, {"bits per text": bits} | trained_on()


def train_seven(r: WordsRecipe, **options) -> tuple[dict, dict]:
    return train_texts(r, seven_letters(), **options)


def train_lines(r: WordsRecipe, **options) -> tuple[dict, dict]:
    return train_texts(r, verse(), **options)


def trained(name: str, make: Callable, r: WordsRecipe) -> tuple[WordsRecipe, TextNet]:
    "The recipe and the network of an artifact."
    net = r.fresh()
    net.load_state_dict(from_bytes(artifact(name, make, r)[0]))
    return r, net.eval().requires_grad_(False)


def text_nets() -> dict[str, tuple[Texts, WordsRecipe, TextNet]]:
    "{what is written: (the texts, the recipe, the network in eval mode)}: artifacts `words`, `texts_seven`, `texts_lines`."
    return {
        "words of 5 letters": (five_letters(), WordsRecipe(), word_net()),
        "words of 7 letters": (seven_letters(), *trained("texts_seven", train_seven, seven_recipe())),
        "lines of 36 letters": (verse(), *trained("texts_lines", train_lines, lines_recipe())),
    }


def draw_texts(r: WordsRecipe, net: TextNet, n: int, steps: int | None = None, first: int = 0) -> list[str]:
    "n texts, one letter per step or in so many steps; the i-th has seed first + i."
    x = torch.full((n, r.length), len(r.letters))
    return r.texts(fill_holes(r, net, x, torch.arange(n) + first, steps))
