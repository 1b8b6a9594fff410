"""What a training run is made of, in a few words and hashes, so that another one is not taken for it."""

import hashlib
import re
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from diffusion_nb.denoisers import Denoiser
from diffusion_nb.util.storage import checksum

ROWS = 4096  # of the data that are looked at


def name_of(f) -> str:
    "What a function, a partial or an object is called, with the numbers and the frozen networks it was made with: `denoising_loss(weight=snr)`."
    if isinstance(f, partial):
        given = [name_of(v) for v in f.args] + [f"{k}={name_of(v)}" for k, v in f.keywords.items()]
        return f"{name_of(f.func)}({', '.join(given)})"
    if f is None or isinstance(f, bool | int | float | str):
        return repr(f)
    if isinstance(f, nn.Module):
        return type(f).__qualname__ + frozen_hash(f)
    if not hasattr(f, "__qualname__"):
        return type(f).__qualname__
    cells = zip(
        getattr(f, "__code__", name_of.__code__).co_freevars, getattr(f, "__closure__", None) or (), strict=True
    )
    told = bool, int, float, str, nn.Module
    inside = [f"{k}={name_of(c.cell_contents)}" for k, c in cells if isinstance(c.cell_contents, told)]
    return f.__qualname__ + (f"({', '.join(inside)})" if inside else "")


def course_of(lr: Callable[[int], float]) -> str:
    "What a learning rate is called, with its numbers but for the `steps`, of which there may be more when a run goes on."
    return re.sub(r"\bsteps=\d+", "steps", name_of(lr))


def frozen_hash(module: nn.Module) -> str:
    "A hash of the weights of a module that is not trained, such as a teacher; nothing for others."
    weights = dict(module.named_parameters())
    frozen = weights and not any(p.requires_grad for p in weights.values())
    return f" {checksum(weights, {})[:12]}" if frozen else ""


def data_hash(n: int, x0: Tensor, cond: dict[str, Tensor]) -> str:
    "A hash of n pictures and their conditions, by all rows that are given, or by 4096 evenly spread where there are more."
    digest = hashlib.sha256(str(n).encode())
    rows = torch.arange(0, len(x0), max(1, len(x0) // ROWS))
    for name, v in (("x0", x0), *sorted(cond.items())):
        digest.update(f"{name} {v.dtype} {tuple(v.shape)}".encode())
        digest.update(v[rows.to(v.device)].cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def numbers_of(module: nn.Module) -> dict:
    "The plain values among the attributes of a module, such as its heads of attention."
    plain = bool, int, float, str, tuple
    return {k: v for k, v in sorted(vars(module).items()) if isinstance(v, plain) and k[0] != "_" and k != "training"}  # fmt: skip


def network_hash(denoiser: Denoiser) -> str:
    "A hash of the network's layers, their shapes and numbers, of what it predicts, and of a schedule that does not learn."
    about = [[name, list(p.shape)] for name, p in denoiser.named_parameters()]
    about += [f"{name} {type(m).__qualname__} {m.extra_repr()} {numbers_of(m)}" for name, m in denoiser.named_modules()]  # fmt: skip
    about += [
        name_of(v)
        for m in denoiser.modules()
        for name, v in sorted(vars(m).items())
        if callable(v) and name[0] != "_"
    ]
    schedule = getattr(denoiser, "schedule", None)
    if schedule is not None and not any(True for _ in schedule.parameters()):
        at = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
        about += [f"{v:.9g}" for c in schedule(at) for v in c.tolist()]
    return hashlib.sha256(repr(about).encode()).hexdigest()[:16]
