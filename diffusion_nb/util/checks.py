"""Checks of arguments, with errors that say what was expected."""

from collections.abc import Callable

import torch
from torch import Tensor


def default_device() -> torch.device:
    "The GPU where there is one, else the CPU."
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def like(a: Tensor, x: Tensor) -> Tensor:
    "`a`, one number or one number a sample, in the dtype of `x` and shaped to multiply it: (B,) becomes (B, 1, …, 1)."
    return a.to(x.dtype).reshape(a.shape + (1,) * (x.ndim - 1)) if a.ndim else a.to(x.dtype)


def check_time(t: Tensor) -> None:
    "Raise ValueError unless every t is in [0, 1]. (On a GPU nothing is checked: looking would stall it.)"
    if t.device.type == "cpu" and not torch.compiler.is_compiling() and t.numel():
        t = t.detach()
        low, high = (float(v) for v in (t.aminmax() if t.ndim else (t, t)))
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"t: expected times in [0, 1] with the data at 0; got values from {low:g} to {high:g}"
            )


def check_labels(y: Tensor, classes: int) -> None:
    "Raise ValueError unless y holds integers from 0 to `classes`, the last of which means any. (Not checked on a GPU.)"
    if y.is_floating_point():
        raise ValueError(f"y: expected integer labels; got {y.dtype}")
    if y.device.type == "cpu" and not torch.compiler.is_compiling() and ((y < 0) | (y > classes)).any():
        raise ValueError(
            f"y: expected labels from 0 to {classes - 1}, or {classes} for any; got {y.min()} to {y.max()}"
        )


def check_finite(x: Tensor, name: str) -> None:
    "Raise ValueError where `x` holds a NaN or an infinity."
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).sum())
        raise ValueError(f"{name}: {bad} of its {x.numel()} values are NaN or infinite; clean or drop them first")


def check_batch(x: Tensor, t: Tensor, **others: Tensor) -> None:
    "Raise ValueError unless x is floating-point, the others are shaped like it, and t is one time, or one a sample."
    if not x.is_floating_point():
        raise ValueError(f"expected pictures as floating-point numbers, [-1, 1] for black to white; got {x.dtype}")
    for name, other in others.items():
        if other.shape != x.shape:
            raise ValueError(
                f"{name}: expected the shape of the pictures, {tuple(x.shape)}; got {tuple(other.shape)}"
            )
    times = torch.as_tensor(t).shape
    if times and times != x.shape[:1]:
        raise ValueError(f"t: expected one time, or one for each of {len(x)} pictures; got shape {tuple(times)}")


def check_sampling(x: Tensor, ts: Tensor, noise: Callable | None) -> None:
    "Raise ValueError unless x is finite, ts falls strictly within [0, 1], and the noise is shaped like x."
    check_finite(x, "x")
    check_time(ts)
    if ts.ndim != 1 or len(ts) < 2 or not (ts.diff() < 0).all():
        raise ValueError(f"ts: expected times that fall from noise to data, such as time_grid(100); got {ts}")
    if noise is not None and noise(0).shape != x.shape:
        raise ValueError(f"noise: expected draws shaped like x, {tuple(x.shape)}; got {tuple(noise(0).shape)}")
