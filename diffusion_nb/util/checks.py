"""Checks of arguments, with errors that say what was expected."""

import difflib
import functools
import warnings
from collections.abc import Callable, Sequence
from numbers import Real

import torch
from torch import Tensor, nn


def default_device() -> torch.device:
    "The GPU where there is one, else the CPU."
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_device(device: torch.device) -> None:
    "Raise ValueError for an accelerator without float64, in which times and coefficients are computed."
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError) as e:  # as MPS and XPU say it
        if "64" not in str(e):
            raise
        raise ValueError(
            f"device: {device.type} has no float64, in which times and coefficients are computed; take device='cpu', or a GPU of CUDA or ROCm"
        ) from e


def expand_as(a: Tensor, x: Tensor) -> Tensor:
    "`a`, one number or one number per sample, in the dtype of `x` and shaped to multiply it: (B,) becomes (B, 1, …, 1)."
    return a.to(x.dtype).reshape(a.shape + (1,) * (x.ndim - 1)) if a.ndim else a.to(x.dtype)


def cpu_only(check: Callable) -> Callable:
    "A check of the values of tensors, made where looking costs nothing: not on a GPU, which it would stall, and not while compiling."

    @functools.wraps(check)
    def guarded(*args):
        if not torch.compiler.is_compiling() and all(
            a.device.type == "cpu" for a in args if isinstance(a, Tensor)
        ):
            check(*args)

    return guarded


GUARDED = cpu_only(print).__code__  # the code of all of them


@cpu_only
def check_time(t: Tensor) -> None:
    "Raise ValueError unless every t is in [0, 1]."
    if t.numel():
        t = t.detach()
        low, high = (float(v) for v in (t.aminmax() if t.ndim else (t, t)))
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"t: expected times in [0, 1] with the data at 0; got values from {low:g} to {high:g}"
            )


@cpu_only
def check_order(s: Tensor, t: Tensor) -> None:
    "Raise ValueError unless s < t in each step."
    if not (s < t).all():
        raise ValueError(
            f"expected s < t everywhere, time running from noise at 1 to data at 0; got s = {s}, t = {t}"
        )


def check_labels(y: Tensor, classes: int, any: bool = True) -> None:
    "Raise ValueError unless y holds integers below `classes`, or where there is `any`, `classes` itself, which means that. (The values are not looked at on a GPU.)"
    if not isinstance(y, Tensor) or y.is_floating_point():
        got = y.dtype if isinstance(y, Tensor) else f"{y!r}; for n pictures of one class, torch.full((n,), label)"
        raise ValueError(f"y: expected a tensor of integer labels, one for each picture; got {got}")
    check_range(y, classes, any)


@cpu_only
def check_range(y: Tensor, classes: int, any: bool) -> None:
    "Raise ValueError unless y is below `classes`, or where there is `any`, up to it."
    if ((y < 0) | (y >= classes + any)).any():
        or_any = f", or {classes} for any" if any else ""
        raise ValueError(f"y: expected labels from 0 to {classes - 1}{or_any}; got {y.min()} to {y.max()}")


def check_numbers(**named: tuple[int, int]) -> None:
    "Raise ValueError unless each is a whole number of at least so much: check_numbers(batch=(batch, 1))."
    for name, (value, least) in named.items():
        if isinstance(value, bool) or not isinstance(value, Real) or value != value // 1 or value < least:
            raise ValueError(f"{name}: expected a whole number of at least {least}, got {value}")


def check_rate(lr: Callable[[int], float], steps: int) -> None:
    "Raise ValueError unless the learning rate is a function of the step."
    if not callable(lr):
        raise ValueError(f"lr: expected a function of the step, such as warmup_cosine({lr}, 100, {steps}) or lambda step: {lr}; got {lr!r}")  # fmt: skip


def check_pictures(x0: Tensor) -> None:
    "Raise ValueError for NaN and infinities; warn of pictures whose range is not [-1, 1]."
    if not isinstance(x0, Tensor):
        raise ValueError(f"x0: expected a tensor, (n, …), got {type(x0).__name__}; torch.as_tensor makes one")
    if not len(x0):
        raise ValueError("x0: expected at least one picture, got none")
    check_finite(x0, "x0")
    if x0.ndim == 4 and x0.is_floating_point():
        low, high = (v.item() for v in x0[:4096].aminmax())
        if low >= 0 or high > 1.5:
            warnings.warn(
                f"x0: pictures are expected from -1 to 1, and these go from {low:g} to {high:g}. "
                "From [0, 1] take x0 * 2 - 1; from [0, 255], x0 / 127.5 - 1, or bytes as they are",
                stacklevel=3,
            )


def check_null(null: dict[str, int | Tensor], cond: dict[str, Tensor]) -> None:
    "Raise ValueError where `null` stands for no condition, is not shaped like one, or is a label that pictures have."
    for name, value in null.items():
        if name not in cond:
            raise ValueError(
                f"null: there is no condition {name!r} to leave out; there are: {', '.join(cond) or 'none'}"
            )
        value, values = torch.as_tensor(value), cond[name]
        if value.ndim and value.shape != values.shape[1:]:
            raise ValueError(
                f"null: expected a number, or the shape of one {name}, {tuple(values.shape[1:])}; got {tuple(value.shape)}"
            )
        if values.ndim == 1 and not values.is_floating_point() and (taken := int((values == value).sum())):
            raise ValueError(
                f"{name}: {taken} of the labels are {int(value)}, which is null and means any; number the classes from 0 to {int(value) - 1}"
            )


def check_finite(x: Tensor, name: str) -> None:
    "Raise ValueError where `x` holds a NaN or an infinity."
    if not x.is_floating_point() and not x.is_complex():
        return
    if not all(part.isfinite().all() for part in x.split(4096) or [x]):
        bad = int((~torch.isfinite(x)).sum())
        raise ValueError(f"{name}: {bad} of its {x.numel()} values are NaN or infinite; clean or drop them first")


def check_samples(**sets: Tensor) -> None:
    "Raise ValueError unless each set holds two samples (n, f) or more, finite, of as many features; warn where there are no more samples than features."
    if len({x.shape[1:] for x in sets.values()}) > 1 or any(x.ndim != 2 for x in sets.values()):
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in sets.items())
        raise ValueError(f"expected sets of samples (n, f) with the same features; got {shapes}")
    for name, x in sets.items():
        check_finite(x, name)
        if len(x) < 2:
            raise ValueError(f"{name}: expected at least 2 samples, whose covariance is asked for; got {len(x)}")
        if len(x) <= x.shape[1]:
            warnings.warn(
                f"{name}: {len(x)} samples of {x.shape[1]} features have a singular covariance, and the distance says more of their number "
                f"than of what they are like; take several times {x.shape[1]}",
                stacklevel=3,
            )


def check_batch(x: Tensor, t: Tensor, **others: Tensor) -> None:
    "Raise ValueError unless x is floating-point, the others are shaped like it, and t is one time, or one per sample."
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


def check_eval(denoiser: nn.Module | None) -> None:
    "Raise ValueError where dropout is on or BatchNorm looks at the batch: no sample could be drawn twice."
    for name, m in denoiser.named_modules() if isinstance(denoiser, nn.Module) else ():
        is_on = (
            isinstance(m, nn.modules.dropout._DropoutNd)
            and m.p > 0
            or isinstance(m, nn.modules.batchnorm._BatchNorm)
        )
        if m.training and is_on:
            raise ValueError(
                f"denoiser: its {name}, {type(m).__name__}, is in training mode, so that the same call would not give the same twice; "
                "call denoiser.eval() first"
            )


def check_sampling(x: Tensor, ts: Tensor, noise: Callable | None, denoiser: nn.Module | None = None) -> None:
    "Raise ValueError unless x is finite, ts falls strictly within [0, 1], the noise is shaped like x, and the denoiser is in eval mode."
    check_device(x.device), check_finite(x, "x"), check_eval(denoiser)
    if not isinstance(ts, Tensor):
        raise ValueError(
            f"ts: expected the times at which to stop, such as time_grid(100) for 100 steps; got {ts!r}"
        )
    check_time(ts)
    if ts.ndim != 1 or len(ts) < 2 or not (ts.diff() < 0).all():
        raise ValueError(f"ts: expected times that fall from noise to data, such as time_grid(100); got {ts}")
    if noise is not None and noise(0).shape != x.shape:
        raise ValueError(f"noise: expected draws shaped like x, {tuple(x.shape)}; got {tuple(noise(0).shape)}")


def unknown_word(word: str, text: str, known: Sequence[str]) -> str:
    "What is said of a word that is none of the known ones: the nearest of those are offered."
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    offer = f"did you mean {', '.join(map(repr, near))}?" if near else "none of them is near"
    return f"{text!r}: {word!r} is none of the {len(known):,} known words; {offer}"
