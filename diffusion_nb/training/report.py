"""What a finished training draws, without a judge: pictures, and how near each is to one that it was trained on."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffusion_nb.training.batches import collate


class Nearest(NamedTuple):
    "The nearest training picture of each of n: how far it is, as the root mean square of the pixels, in [0, 2]; which it is; and itself."

    distance: Float[Tensor, " n"]
    index: Int[Tensor, " n"]
    picture: Float[Tensor, "n c h w"]


def all_pictures(data: Tensor | Dataset, size: int = 1000, workers: int = 0) -> Iterator[Float[Tensor, "m c h w"]]:
    "The pictures of a tensor or of a data set in parts, from -1 to 1."
    loader = (
        data.split(size)
        if isinstance(data, Tensor)
        else (x for x, _ in DataLoader(data, size, num_workers=workers, collate_fn=collate))
    )
    for x in loader:
        yield x.cpu() / 127.5 - 1 if x.dtype == torch.uint8 else x.cpu()


def nearest_pictures(
    x: Float[Tensor, "n c h w"],
    data: Tensor | Dataset,
    itself: Int[Tensor, " n"] | None = None,
    workers: int = 0,
) -> Nearest:
    "The nearest picture of the data to each of x; itself: which of the data each of x is, and may not be."
    flat, first = x.flatten(1), 0
    best = Nearest(torch.full((len(x),), torch.inf), torch.full((len(x),), -1), torch.zeros_like(x))
    for part in all_pictures(data, workers=workers):
        far = torch.cdist(flat, part.flatten(1)) / flat.shape[1] ** 0.5
        if itself is not None:
            far[torch.arange(first, first + len(part)) == itself[:, None]] = torch.inf
        here = far.min(1)
        closer = here.values < best.distance
        found = Nearest(here.values, here.indices + first, part[here.indices])
        best = Nearest(*(torch.where(closer.reshape(-1, *(1,) * (a.ndim - 1)), b, a) for a, b in zip(best, found, strict=True)))  # fmt: skip
        first += len(part)
    return best


def memory_check(x: Float[Tensor, "n c h w"], data: Tensor | Dataset, workers: int = 0) -> tuple[dict, Nearest]:
    """({what: number}, the nearest training pictures) for drawings x: whether a model draws or copies.

    The measure is how far as many training pictures are from their own nearest neighbours in the training data.
    """
    n = len(data)
    some = torch.arange(min(len(x), n)) * n // min(len(x), n)
    theirs = torch.stack([torch.as_tensor(row_picture(data, i)) for i in some.tolist()])
    own = nearest_pictures(theirs, data, itself=some, workers=workers).distance.median()
    found = nearest_pictures(x, data, workers=workers)
    said = {
        "distance to the nearest training picture": found.distance.median().item(),
        "the same of training pictures, to another one": own.item(),
        "share of drawings nearer than half of that": (found.distance < own / 2).double().mean().item(),
    }
    return {name: round(value, 4) for name, value in said.items()}, found


def row_picture(data: Tensor | Dataset, i: int) -> Float[Tensor, "c h w"]:
    "Picture i of the data, from -1 to 1."
    x = collate([data[i]])[0] if isinstance(data, Dataset) else data[i : i + 1]
    return (x / 127.5 - 1 if x.dtype == torch.uint8 else x)[0].cpu()
