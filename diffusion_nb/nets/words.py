"""A reader of captions for a U-Net."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_nb.emoji import bag_of_words


class BagOfWords(nn.Module):
    """How often each of its `words` is in a caption ↦ `width` numbers, by one hidden layer. `UNet(condition=…)` adds them to its time.

    null: what stands for any caption, a row of zeros.
    """

    def __init__(self, words: Sequence[str], width: int, hidden: int = 256):
        super().__init__()
        self.words = tuple(words)
        self.layers = nn.Sequential(nn.Linear(len(words), hidden), nn.SiLU(), nn.Linear(hidden, width))

    def forward(self, y: Float[Tensor, "n V"]) -> Float[Tensor, "n e"]:
        return self.layers(y)

    @property
    def null(self) -> Float[Tensor, " V"]:
        return torch.zeros(len(self.words))

    def told(self, captions: Sequence[str]) -> Float[Tensor, "n V"]:
        "The captions as this module reads them. Raises ValueError for words that it does not know, and offers the nearest."
        return bag_of_words(captions, self.words)

    def check_y(self, y: Tensor) -> None:
        "Raise ValueError unless y counts these words."
        if y.ndim != 2 or y.shape[1] != len(self.words) or not y.is_floating_point():
            raise ValueError(f"y: expected the counts of {len(self.words)} words for each picture; got {y.dtype} {tuple(y.shape)}")  # fmt: skip
