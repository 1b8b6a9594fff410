"""What a training step learns from: pictures, times, noise and conditions, as a function of the seed and the step."""

from collections.abc import Callable, Iterator
from itertools import count

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from diffusion_nb.denoisers import Denoiser, check_cond
from diffusion_nb.noise import Noise
from diffusion_nb.training.identity import data_hash, name_of
from diffusion_nb.util.checks import check_null, check_pictures
from diffusion_nb.util.images import as_bytes

Row = tuple[Tensor, dict[str, Tensor]]  # pictures and their conditions
LOOKED = 256  # items of a data set that are looked at before a training


class InMemory:
    "Rows of tensors, as bytes where that loses nothing, on the device where they fit: `rows(step, pick, parts)` yields (pictures, conditions) for each part of a batch."

    def __init__(self, x0: Tensor, cond: dict[str, Tensor], device: torch.device):
        x0 = as_bytes(x0) if x0.is_floating_point() else x0
        fits = device.type == "cpu" or x0.nbytes < torch.cuda.mem_get_info(device)[0] / 2
        self.home = device if fits else torch.device("cpu")
        self.x0, self.cond = x0.to(self.home), {name: v.to(self.home) for name, v in cond.items()}
        self.n, self.shape = len(x0), tuple(x0.shape[1:])

    def rows(self, step: int, pick: Tensor, parts: list[slice]) -> Iterator[Row]:
        for mine in parts:
            yield self.x0[pick[mine]], {name: v[pick[mine]] for name, v in self.cond.items()}

    def hash(self) -> str:
        return data_hash(self.n, self.x0, self.cond)


class FromDataset:
    """Rows of a map-style data set, read ahead by worker processes.

    data: its items are pictures, (picture, label) or (picture, {name: condition}), all of one shape, and functions of their index.
    picks: step ↦ which items are in the places of its batch. Raises ValueError for items that are no pictures or differ in shape.
    """

    def __init__(self, data: Dataset, picks: Callable[[int], Tensor], workers: int, device: torch.device):
        self.data, self.picks, self.n, self.home = data, picks, len(data), torch.device("cpu")
        self.options = dict(num_workers=workers, pin_memory=device.type == "cuda", collate_fn=collate)
        if not self.n:
            raise ValueError("x0: expected at least one picture, got none")
        looked = [as_row(data[i]) for i in range(0, self.n, max(1, self.n // LOOKED))]
        if len(shapes := {tuple(x.shape) for x, _ in looked}) > 1:
            raise ValueError(
                f"x0: expected pictures of one shape, got {sorted(shapes)}; crop or resize them in the data set"
            )
        self.x0, self.cond = default_collate(looked)
        self.shape, self.at, self.reader = tuple(self.x0.shape[1:]), None, None

    def rows(self, step: int, pick: Tensor, parts: list[slice]) -> Iterator[Row]:
        if step != self.at:  # the first step, or another one was looked at
            self.reader = iter(DataLoader(self.data, batch_sampler=self.ahead(step, parts), generator=torch.Generator(), **self.options))  # fmt: skip
        self.at = step + 1
        return iter([next(self.reader) for _ in parts])

    def ahead(self, first: int, parts: list[slice]) -> Iterator[list[int]]:
        for step in count(first):
            pick = self.picks(step)
            yield from (pick[mine].tolist() for mine in parts)

    def hash(self) -> str:
        return data_hash(self.n, self.x0, self.cond)


def as_row(item) -> Row:
    "An item of a data set as (picture, conditions)."
    x, about = item if isinstance(item, tuple | list) else (item, {})
    return torch.as_tensor(x), about if isinstance(about, dict) else {"y": about}


def collate(items: list) -> Row:
    "Items of a data set as one batch."
    return default_collate([as_row(item) for item in items])


class Batches:
    """`batches(k)` yields the pictures, times, noise and conditions of step k, part by part. Lines 2 to 4 of Algorithm 1. (DDPM-A1)

    x0: a tensor (n, …) or a map-style data set whose items are pictures, (picture, label) or (picture, {name: condition}).
    Randomness belongs to a picture's place in the batch, so it depends neither on the parts nor on the processes. The other arguments are those of `Trainer`.
    """

    def __init__(self, x0: Tensor | Dataset, denoiser: Denoiser, *, batch: int, cond: dict[str, Tensor], null: dict, cond_dropout: float, apart: bool,
                 time_sampler: Callable, augment: Callable | None, seed: int, device: torch.device, rank: int, world: int, accumulate: int, workers: int):  # fmt: skip
        in_memory = isinstance(x0, Tensor)
        self.source = (
            InMemory(x0, cond, device)
            if in_memory
            else FromDataset(x0, lambda k: self.pick(self.uniform(k)), workers, device)
        )
        check_pictures(self.source.x0)
        check_cond(denoiser, len(self.source.x0), self.source.cond)
        check_null(null, self.source.cond)
        self.batch, self.dropout, self.apart, self.device = batch, cond_dropout, apart, device
        self.time_sampler, self.augment = time_sampler, augment
        dtypes = {name: v.dtype for name, v in self.source.cond.items()}
        self.null = {k: torch.as_tensor(v, dtype=dtypes[k], device=self.source.home) for k, v in null.items()}
        slots = torch.arange(batch) + 2**40 * (seed + 1)  # far from the seeds that people give to samples
        self.choices = Noise(slots, (8 + 2 * len(self.null),), self.source.home)  # two numbers a column of bits
        size, left = divmod(batch, world * accumulate)
        if left or not size:
            raise ValueError(f"batch: {batch} pictures cannot be shared out to {world} processes × {accumulate} parts; take a multiple")  # fmt: skip
        self.places = range(rank * accumulate, (rank + 1) * accumulate)
        self.parts = [slice(i * size, (i + 1) * size) for i in self.places]
        self.noises = [Noise(slots[mine], self.source.shape, device) for mine in self.parts]
        on_gpu = device.type == "cuda"
        self.layout = torch.channels_last if on_gpu else torch.preserve_format

    def uniform(self, step: int) -> Tensor:
        "Numbers on [0, 1), a row for each place of the batch: which picture, without its condition or not, how augmented, (the first row's) where the times begin."
        return ((self.choices.bits(step) >> 11) & (2**53 - 1)).double() * 2.0**-53

    def pick(self, uniform: Tensor) -> Tensor:
        "Which picture is in each place."
        return (uniform[:, 0] * self.source.n).long()

    def __call__(self, step: int) -> Iterator[tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]]:
        uniform = self.uniform(step)
        place = torch.arange(self.batch, device=uniform.device, dtype=torch.float64) / self.batch
        t = self.time_sampler(((uniform[0, 3] + place) % 1).to(self.device), step)
        rows = self.source.rows(step, self.pick(uniform), self.parts)
        for mine, noise, (x, cond) in zip(self.parts, self.noises, rows, strict=True):
            turn = uniform[mine, 2].to(self.device, non_blocking=True)
            cond = {
                name: self.picture(v, turn)[0] if v.ndim == 4 else v.to(self.device, non_blocking=True)
                for name, v in self.without(cond, uniform[mine]).items()
            }
            x, told = self.picture(x, turn)
            yield x, t[mine], noise(step), cond | told

    def without(self, cond: dict[str, Tensor], uniform: Tensor) -> dict[str, Tensor]:
        "The conditions, some replaced by what stands for none."
        cond = dict(cond)
        for i, (name, null) in enumerate(self.null.items()):
            left_out = uniform[:, 3 + i if self.apart and i else 1] < self.dropout
            cond[name] = torch.where(left_out.reshape(-1, *(1,) * (cond[name].ndim - 1)), null, cond[name])
        return cond

    def picture(self, x: Tensor, turn: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        "x on the device, from -1 to 1, augmented and laid out for the network, and what the network is told of that."
        x = x.to(self.device, non_blocking=True)
        if x.dtype == torch.uint8:
            x = x / 127.5 - 1
        made = self.augment(x, turn) if self.augment else x
        x, told = made if isinstance(made, tuple) else (made, {})
        return x.to(memory_format=self.layout) if x.ndim == 4 else x, told

    def identity(self) -> dict:
        "What makes these batches another run's."
        nulls = {name: v.tolist() for name, v in self.null.items()}
        return dict(batch=self.batch, data=[self.source.n, *self.source.shape], pictures=self.source.hash(), times=name_of(self.time_sampler),
                    cond_dropout=self.dropout, null=nulls, augment=name_of(self.augment))  # fmt: skip


def flip_half(x: Tensor, u: Tensor) -> Tensor:
    "Mirror the pictures (b, c, h, w) whose u is below a half: DDPM's augmentation of CIFAR-10."
    return torch.where(u[:, None, None, None] < 0.5, x.flip(3), x)
