import torch
from collections.abc import Callable, Sequence
from jaxtyping import Bool, Float
from torch import Tensor, nn
from diffusion_nb.nets.conditioning import CrossAttention

class FrozenTokens(nn.Module):
    """Tokens of a frozen encoder ↦ tokens that a `UNet` attends to; its `context`. y: their first `kept` principal components, rows of 0 behind the last one.

    encode: texts ↦ (tokens (n, m, width), which are there (n, m)). length: the most tokens of a text. dim: of what is attended to.
    known: texts whose tokens are at hand, so that they need no encoder.
    """

    def __init__(self, encode: Callable, length: int, width: int, kept: int, dim: int):
        super().__init__()
        self.encode, self.length, self.dim, self.known = encode, length, dim, {}
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("basis", torch.eye(width)[:, :kept].clone())
        self.read = nn.Linear(kept, dim)

    def forward(self, y: Float[Tensor, "b m k"]) -> Float[Tensor, "b m d"]:
        return self.read(y)

    def attention(self, channels: int) -> CrossAttention:
        "The layer by which a level of this width reads the tokens."
        return CrossAttention(channels, self.dim)

    @property
    def null(self) -> Float[Tensor, "m k"]:
        return torch.zeros(self.length, self.basis.shape[1])

    @torch.no_grad()
    def tokens(self, texts: Sequence[str]) -> list[Float[Tensor, "_ k"]]:
        "The components of the tokens of each text."
        parts = [self.encode(texts[i : i + 100]) for i in range(0, len(texts), 100)]
        return [(x[kept] - self.mean) @ self.basis for found, there in parts for x, kept in zip(found, there, strict=True)]

    def told(self, texts: Sequence[str]) -> Float[Tensor, "n m k"]:
        "The texts as this module reads them. Raises ValueError for those that are too long."
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        found = self.known | (dict(zip(new, self.tokens(new), strict=True)) if new else {})
        y = self.null.repeat(len(texts), 1, 1)
        for row, text in zip(y, texts, strict=True):
            if len(found[text]) > self.length:
                raise ValueError(f"{text!r}: expected at most {self.length} tokens; got {len(found[text])}")
            row[: len(found[text])] = found[text]
        return y

    def check_y(self, y: Tensor) -> None:
        "Raise ValueError unless these are components of tokens."
        if y.ndim != 3 or y.shape[1:] != self.null.shape or not y.is_floating_point():
            raise ValueError(f"y: expected {tuple(self.null.shape)} numbers for each picture; got {y.dtype} {tuple(y.shape)}")  # fmt: skip


class PooledTokens(nn.Module):
    "The mean of the tokens that are there ↦ `width` numbers, by one hidden layer; a `condition` of `UNet`, which adds them to its time. (Saharia et al. 2022, appendix B)"

    def __init__(self, kept: int, width: int, hidden: int = 192):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(kept, hidden), nn.SiLU(), nn.Linear(hidden, width))

    def forward(self, y: Float[Tensor, "b m k"]) -> Float[Tensor, "b e"]:
        there = (y != 0).any(2).sum(1, keepdim=True).clamp_min(1)
        return self.layers(y.sum(1) / there)

    def check_y(self, y: Tensor) -> None:
        "What the context beside it checks."


def principal(tokens: Float[Tensor, "n e"], kept: int) -> tuple[Float[Tensor, " e"], Float[Tensor, "e k"]]:
    "The mean of tokens, and a basis: (tokens - mean) @ basis are their first `kept` principal components, each of variance 1."
    mean = tokens.double().mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(tokens.double().T))
    return mean.float(), (vectors.flip(1)[:, :kept] / values.flip(0)[:kept].sqrt()).float()
