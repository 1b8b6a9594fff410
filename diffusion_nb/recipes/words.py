"""Recipes of networks that write texts of one length, a letter at a time, by masks."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor

from diffusion_nb.corruption import MaskTokens, ancestral, kept
from diffusion_nb.losses.discrete import mask_loss
from diffusion_nb.nets.text import TextNet
from diffusion_nb.noise import Noise
from diffusion_nb.recipes.diffusion import Training
from diffusion_nb.samplers.discrete import Drawn, TokenGuess, one_change
from diffusion_nb.time_samplers import chain_times
from diffusion_nb.training.trainer import Trainer
from diffusion_nb.util.checks import check_numbers

HOLE = "_"


def letters_of(texts: Sequence[str]) -> str:
    "The letters of texts, in order; with the space where texts differ in length, for shorter ones are filled up. Raises ValueError where the sign for a mask is one of them."
    letters = set("".join(texts)) | ({" "} if len(set(map(len, texts))) > 1 else set())
    if HOLE in letters:
        raise ValueError(f"{HOLE} stands for a letter that is to be found, and is in the texts")
    return "".join(sorted(letters))


@dataclass(frozen=True)
class WordsRecipe(Training):
    "A transformer of texts of `length` of these letters, whose letters are masked, and its training."

    data: str = "words"
    letters: str = "abcdefghijklmnopqrstuvwxyz"
    length: int = 5
    width: int = 64
    depth: int = 3
    heads: int = 4
    dropout: float = 0.1
    rotary: bool = False
    steps: int = 5000
    batch: int = 128
    lr: float = 0.004
    warmup: int = 200
    beta2: float = 0.98

    def __post_init__(self):
        super().__post_init__()
        check_numbers(length=(self.length, 1), width=(self.width, 1), depth=(self.depth, 1), heads=(self.heads, 1))
        if self.width % self.heads:
            raise ValueError(f"width: expected a multiple of heads, {self.heads}; got {self.width}")

    def fresh(self) -> TextNet:
        "The network, not trained, from the recipe's seed."
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return TextNet(len(self.letters), self.length, self.width, self.depth, self.heads, self.dropout, rotary=self.rotary)  # fmt: skip

    def tokens(self, texts: Sequence[str]) -> Int[Tensor, "n L"]:
        "Texts as numbers of letters, shorter ones filled up with spaces where the space is a letter; _ is the mask. Raises ValueError for what does not fit."
        known = {c: i for i, c in enumerate(self.letters)} | {HOLE: len(self.letters)}
        filled = [text.ljust(self.length) if " " in known else text for text in texts]
        for text in filled:
            if len(text) != self.length or set(text) - known.keys():
                raise ValueError(f"expected texts of {self.length} of the letters {self.letters!r}, with _ for a letter that is to be found; got {text!r}")  # fmt: skip
        return torch.tensor([[known[c] for c in text] for text in filled])

    def texts(self, x: Int[Tensor, "n L"]) -> list[str]:
        "The texts of such numbers, without spaces at their ends."
        return ["".join((self.letters + HOLE)[i] for i in row).rstrip(" ") for row in x.tolist()]


def words_trainer(r: WordsRecipe, x: Int[Tensor, "n L"], *, denoiser: TextNet | None = None, **options) -> Trainer:
    "The trainer of a network of texts x. options: those of `Trainer`."
    loss = partial(mask_loss, corruption=MaskTokens(len(r.letters)))
    return Trainer(denoiser or r.fresh(), x, loss=loss, time_sampler=chain_times(r.length), **r.options(), **options)  # fmt: skip


@torch.no_grad()
def fill_holes(r: WordsRecipe, net: TextNet, x: Int[Tensor, "n L"], seeds: Int[Tensor, " n"], steps: int | None = None, temperature: float = 1.0) -> Int[Tensor, "n L"]:  # fmt: skip
    """Texts with their masks, as many in each, replaced: one by one, in an order that is drawn; in fewer steps, several at a time, which then do not see each other. The i-th has seed seeds[i]. temperature: logits are divided by it.

    Raises ValueError where texts differ in their number of masks.
    """
    mask = len(r.letters)
    holes = (x == mask).sum(1).unique().tolist()
    if len(holes) != 1:
        raise ValueError(f"x: expected as many masks in each text; got {', '.join(map(str, holes))}")
    m, noise = holes[0], Noise(seeds, (r.length,), x.device)
    guess = TokenGuess(net, mask, temperature)
    if steps is None or steps >= m:
        return ancestral(MaskTokens(mask), guess, x, torch.arange(m, -1, -1) / r.length, one_change, noise=noise) if m else x  # fmt: skip
    grid = torch.linspace(m, 0, steps + 1, dtype=torch.float64).round()
    return ancestral(MaskTokens(mask), Drawn(guess, noise), x, grid / r.length, kept, noise=noise)
