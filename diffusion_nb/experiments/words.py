"""Words of five letters, written by discrete diffusion (notebook 26)."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_nb.corruption import ChangeTokens, Corruption, MaskTokens, afresh, ancestral, as_uniform, kept
from diffusion_nb.experiments.artifacts import artifact
from diffusion_nb.experiments.pictures import from_bytes, in_bytes, trained_on
from diffusion_nb.losses.discrete import edit_loss, mask_loss
from diffusion_nb.nets.text import TextNet
from diffusion_nb.noise import Noise
from diffusion_nb.recipes.diffusion import Training
from diffusion_nb.recipes.settings import settings
from diffusion_nb.samplers.discrete import Drawn, TokenGuess, draw, one_change
from diffusion_nb.time_samplers import chain_times
from diffusion_nb.training.trainer import Trainer
from diffusion_nb.util.storage import shipped

LETTERS, LENGTH, HELD_OUT = 26, 5, 600
MASK = LETTERS


@dataclass(frozen=True)
class WordList:
    "Words to train on, words held out, and words that are rarer, which only say what is a word."

    train: list[str]
    held_out: list[str]
    rare: list[str]

    @property
    def known(self) -> set[str]:
        return {*self.train, *self.held_out, *self.rare}


def word_list() -> WordList:
    "The 5,106 common English words of five letters in data/words.txt, 600 of them held out, and 3,372 rarer ones."
    common, rare = (part.split() for part in shipped("words.txt").read_text(encoding="ascii").split("\n\n"))
    order = Noise(range(len(common)), (1,))(0)[:, 0].argsort().tolist()
    return WordList([common[i] for i in order[HELD_OUT:]], [common[i] for i in order[:HELD_OUT]], rare)


def as_tokens(words: Sequence[str]) -> Int[Tensor, "n L"]:
    "Letters as 0 … 25; _ or ? as the mask, 26. Raises ValueError for other letters and for words that differ in length."
    known = "abcdefghijklmnopqrstuvwxyz"
    if len({len(w) for w in words}) > 1 or set("".join(words)) - set(known + "_?"):
        raise ValueError(
            f"words: expected words of one length, of the letters a to z, _ for a mask; got {words!r}"
        )
    return torch.tensor([[known.find(c) % (MASK + 1) for c in w] for w in words])


def as_words(x: Int[Tensor, "n L"]) -> list[str]:
    "Tokens as words, masks as _."
    return ["".join("abcdefghijklmnopqrstuvwxyz_"[c] for c in row) for row in x.tolist()]


# networks


@dataclass(frozen=True)
class WordRecipe(Training):
    "A transformer of words, and its training. kind: whether letters are masked, or changed."

    width: int = 64
    depth: int = 3
    heads: int = 4
    dropout: float = 0.15
    kind: Literal["mask", "edit"] = "mask"
    steps: int = 5000
    batch: int = 128
    lr: float = 0.004
    warmup: int = 200
    beta2: float = 0.98

    def corruption(self) -> Corruption:
        return MaskTokens(LETTERS) if self.kind == "mask" else ChangeTokens(LETTERS)

    def loss(self) -> Callable:
        return partial(mask_loss if self.kind == "mask" else edit_loss, corruption=self.corruption())

    def fresh(self) -> TextNet:
        "The network, not trained, from the recipe's seed."
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            mask = self.kind == "mask"
            return TextNet(LETTERS, LENGTH, self.width, self.depth, self.heads, self.dropout, mask, not mask)


def word_trainer(r: WordRecipe, x: Int[Tensor, "n L"], **options) -> Trainer:
    "The trainer of a network of words x. options: those of `Trainer`."
    return Trainer(r.fresh(), x, loss=r.loss(), time_sampler=chain_times(LENGTH), device="cpu", **r.options(), **options)  # fmt: skip


def train_words(r: WordRecipe, **options) -> tuple[dict, dict]:
    "The weights of a network of words, in 8 bits, and its bounds in bits per word."
    words = word_list()
    net = word_trainer(r, as_tokens(words.train), **options).fit()
    weights = in_bytes(net)
    net.load_state_dict(from_bytes(weights))
    said = {"held out": words.held_out, "trained on": words.train[:HELD_OUT]}
    bits = {name: round(word_bits(r, net.eval(), as_tokens(w)).mean().item(), 3) for name, w in said.items()}
    return weights, {"bits per word": bits} | trained_on()


def word_net(edit: bool = False) -> TextNet:
    "The network of words with masks, or with changed letters (artifacts `words`, `words_edit`), in eval mode."
    r = word_recipe(edit)
    net = r.fresh()
    net.load_state_dict(from_bytes(artifact("words_edit" if edit else "words", train_words, r)[0]))
    return net.eval().requires_grad_(False)


def word_recipe(edit: bool = False) -> WordRecipe:
    return settings("26_discrete.edit" if edit else "26_discrete.mask", WordRecipe)


@torch.no_grad()
def word_bits(r: WordRecipe, net: Callable, x: Int[Tensor, "n L"], copies: int = 8, first: int = 0) -> Float[Tensor, " n"]:  # fmt: skip
    "The bound on -log2 p of each word: the mean of `copies` draws of noise at each time; the noise is that of the seeds first, first + 1, …"
    noise, loss = Noise(range(first, first + len(x)), (LENGTH,)), r.loss()
    terms = [
        loss(net, x, torch.full((len(x),), k / LENGTH), noise(LENGTH * c + k)).double()
        for c in range(copies)
        for k in range(1, LENGTH + 1)
    ]
    return torch.stack(terms).mean(0) / math.log(2)


# drawing


def draw_words(net: Callable, n: int, rule: Callable = one_change, *, grid: Sequence[int] = (5, 4, 3, 2, 1, 0), temperature: float = 1.0,
               edit: bool = False, start: Int[Tensor, "n L"] | None = None, first: int = 0, callback: Callable | None = None) -> Int[Tensor, "n L"]:  # fmt: skip
    """n words by a rule of `ancestral`: `kept` and `afresh` are given letters that are drawn, other rules probabilities.

    grid: how many letters are masked, or changed, after each step. start: words with masks to fill in, as many in each as grid[0]. The i-th word has seed first + i.
    """
    noise = Noise(range(first, first + n), (LENGTH,))
    guess = TokenGuess(net, None if edit else MASK, temperature)
    guess = Drawn(guess, noise) if rule in (afresh, kept) else guess
    if start is None:
        start = (as_uniform(noise(0)) * LETTERS).long() if edit else torch.full((n, LENGTH), MASK)
    kernel = ChangeTokens(LETTERS) if edit else MaskTokens(LETTERS)
    ts = torch.tensor(grid, dtype=torch.float64) / LENGTH
    return ancestral(kernel, guess, start, ts, rule, noise=noise, callback=callback)


def quality(x: Int[Tensor, "n L"], words: WordList) -> dict[str, float]:
    "Shares of drawn words: those that are words; of these, copies of the training list, and words that are not on it; and how many differ from each other."
    drawn, train, known = as_words(x), set(words.train), words.known
    share = lambda test: sum(map(test, drawn)) / len(drawn)
    return {
        "words": share(lambda w: w in known), "copies": share(lambda w: w in train),
        "new words": share(lambda w: w in known and w not in train), "distinct": len(set(drawn)) / len(drawn),
    }  # fmt: skip


# n-grams


class NGram:
    """Letters given the `order` - 1 letters before, counted in words, each order mixed with the one below: (count + strength · below)/(total + strength).

    x: the words to count, (n, L). strength: how many letters the lower order is worth. letters: how many there are.
    """

    def __init__(self, x: Int[Tensor, "n L"], order: int, strength: float, letters: int = LETTERS):
        self.order, self.strength, self.letters, self.length, self.found = order, strength, letters, x.shape[1], {}
        self.counts = defaultdict(Counter)
        for row in x.tolist():
            row = [letters] * (order - 1) + row
            for i in range(order - 1, len(row)):
                for m in range(order):
                    self.counts[tuple(row[i - m : i])][row[i]] += 1

    def next(self, before: tuple[int, ...]) -> Float[Tensor, " V"]:
        "The probabilities of the next letter."
        return self.given(((self.letters,) * (self.order - 1) + before)[len(before) :])

    def given(self, context: tuple[int, ...]) -> Float[Tensor, " V"]:
        "The counts of what followed these letters, mixed with what is expected after one letter less."
        if context not in self.found:
            flat = torch.full((self.letters,), 1 / self.letters, dtype=torch.float64)
            below = self.given(context[1:]) if context else flat
            seen = torch.zeros_like(below)
            for letter, times in self.counts.get(context, {}).items():
                seen[letter] = times
            self.found[context] = (seen + self.strength * below) / (seen.sum() + self.strength)
        return self.found[context]

    def bits(self, x: Int[Tensor, "n L"]) -> Float[Tensor, " n"]:
        "-log2 p of each word."
        return torch.tensor([-sum(self.next(tuple(w[:i]))[c].log2().item() for i, c in enumerate(w)) for w in x.tolist()])  # fmt: skip

    def draw(self, n: int, first: int = 0) -> Int[Tensor, "n L"]:
        "n words, letter by letter; the i-th has seed first + i."
        u, found = as_uniform(Noise(range(first, first + n), (self.length,))(0)), []
        for row in u:
            word = ()
            for v in row:
                word += (draw(self.next(word), v).item(),)
            found.append(word)
        return torch.tensor(found)


def best_ngram(x: Int[Tensor, "n L"], held: Int[Tensor, "m L"], letters: int = LETTERS, orders: Sequence[int] = (1, 2, 3, 4, 5), strengths: Sequence[float] = (2, 4, 8, 16, 32)) -> dict[int, tuple[NGram, float]]:  # fmt: skip
    "{order: (the n-gram of x, its bits per held-out text)}, each with the strength that is best for these held-out texts."
    found = {}
    for n in orders:
        models = [NGram(x, n, a, letters) for a in strengths]
        bits = [m.bits(held).mean().item() for m in models]
        found[n] = models[bits.index(min(bits))], min(bits)
    return found
