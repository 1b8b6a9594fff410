"""The loop of progressive distillation."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_nb.denoisers import Clip, Denoiser
from diffusion_nb.losses.distillation import distillation_loss
from diffusion_nb.time_samplers import chain_times
from diffusion_nb.training.lr import linear_decay
from diffusion_nb.training.trainer import Trainer
from diffusion_nb.util.checks import default_device


def frozen(denoiser: Denoiser, device: torch.device, compile: bool = False) -> Denoiser:
    "A copy as a student's teacher: without gradients, on the device, laid out as its network likes best there, compiled if asked."
    layout = torch.channels_last if device.type == "cuda" else torch.preserve_format
    teacher = copy.deepcopy(denoiser).to(device, memory_format=layout).eval().requires_grad_(False)
    if compile:
        teacher.compile()
    return teacher


def halvings(n: int) -> list[int]:
    "[n, n/2, …, 1], for a power of two."
    return [n] if n == 1 else [n, *halvings(n // 2)]


def distill(teacher: Denoiser, x0: Float[Tensor, "k *d"], n_from: int, n_to: int = 1, *, steps: Callable[[int], int], lr: float,
            folder: Path | str | None = None, wrap: Callable = Clip, objective: Callable = distillation_loss, seed: int = 0,
            **options) -> dict[int, Denoiser]:  # fmt: skip
    """Progressive distillation: {n: the student of n steps} for n = n_from/2, n_from/4, …, n_to. (SUR-pd; Salimans and Ho 2022, algorithm 2)

    Parameters
    ----------
    teacher: a network that draws well in n_from steps of DDIM; it stays as it is. Each student starts from its teacher's weights and is the next one's teacher.
    steps: n ↦ how many training steps the student of n steps gets. lr: where its learning rate starts, to fall to 0 in a line.
    folder: where each stage keeps its checkpoint; run again, a distillation that was stopped goes on there, bit for bit.
    wrap: how a teacher is looked at, Denoiser ↦ Denoiser. objective: (teacher, n) ↦ an objective.
    seed: of everything. options: those of `Trainer`, such as cond, null, batch, ema, device, bf16, compile and save_every.
    Raises ValueError unless n_from is n_to times a power of two, above 1.
    """
    check_halving(n_from, n_to)
    teach = partial(frozen, device=torch.device(options.get("device") or default_device()), compile=options.get("compile", False))  # fmt: skip
    teacher, students, n = teach(teacher), {}, n_from
    while n > n_to:
        n //= 2
        student = copy.deepcopy(teacher).requires_grad_(True)
        trainer = Trainer(student, x0, steps=steps(n), lr=linear_decay(lr, steps(n)), time_sampler=chain_times(n), seed=1000 * seed + n,
                          loss=objective(wrap(teacher), n), checkpoint=folder and Path(folder) / f"student-{n}.safetensors", **options)  # fmt: skip
        students[n] = trainer.fit()
        teacher = teach(students[n])
    return students


def check_halving(n_from: int, n_to: int) -> None:
    "Raise ValueError unless halving n_from again and again leads to n_to."
    ratio = n_from // n_to if n_to >= 1 else 0
    if ratio < 2 or ratio * n_to != n_from or ratio & (ratio - 1):
        raise ValueError(f"n_from: expected n_to times 2, 4, 8, …, so that halving leads there; got n_from = {n_from}, n_to = {n_to}")  # fmt: skip
