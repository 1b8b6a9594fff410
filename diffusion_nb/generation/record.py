"""What a set of samples was drawn with, and whether it is the same."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_nb.denoisers import Denoiser
from diffusion_nb.util.storage import checksum, write_atomically


def digest(tensors: dict[str, Tensor], about: Any = None) -> str:
    "The first 16 digits of `core.checksum`."
    return checksum(tensors, about)[:16]


def code_of(code: CodeType) -> list:
    "What a function does, without the place where it is written."
    consts = [code_of(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return [code.co_code.hex(), code.co_names, *consts]


def described(value, depth: int = 6) -> str:
    "A value as it stands in the record, the same in every process: tensors and modules by a hash, functions by name and by what they hold on to."
    if isinstance(value, Tensor):
        return digest({"": value})
    if not depth:
        return type(value).__qualname__
    if isinstance(value, nn.Module):
        return f"{type(value).__qualname__} {identity(value, depth - 1)}"
    if isinstance(value, partial):
        inside = value.func, *value.args, *sorted(value.keywords.items())
        return " ".join(described(v, depth - 1) for v in inside)
    if isinstance(value, tuple | list | dict):
        items = list(value.items()) if isinstance(value, dict) else list(value)
        return f"({', '.join(described(v, depth - 1) for v in items)})"
    if isinstance(value, FunctionType) and "<" in value.__qualname__:  # a lambda, or a function made by another
        closure = [c.cell_contents for c in value.__closure__ or ()]
        held = closure, value.__defaults__, value.__kwdefaults__
        return f"{value.__qualname__} {digest({}, code_of(value.__code__))} {described(held, depth - 1)}"
    if isinstance(value, MethodType):
        return f"{value.__func__.__qualname__} of {described(value.__self__, depth - 1)}"
    if hasattr(value, "__qualname__"):
        return value.__qualname__
    if hasattr(value, "__dict__"):
        return f"{type(value).__qualname__} {described(vars(value), depth - 1)}"
    return re.sub(" at 0x[0-9a-f]+", "", repr(value))


def identity(module: nn.Module, depth: int = 6) -> str:
    "A hash of what a module computes with: classes, their numbers, words and functions, and all weights and buffers."

    def own(m):  # a method of its own that somebody has set, as accelerate does, leads back to the module
        found = {k: v for k, v in vars(m).items() if k[0] != "_" and k != "training"}
        return {
            k: described(v.__func__ if getattr(v, "__self__", None) is m else v, depth) for k, v in found.items()
        }

    parts = [(name, type(m).__qualname__, own(m)) for name, m in module.named_modules()]
    return digest(dict(chain(module.named_parameters(), module.named_buffers())), parts)


def check_rows(cond: dict[str, Tensor], n: int) -> None:
    "Raise ValueError unless `cond` has names, and tensors of n rows."
    if not isinstance(cond, dict):
        raise ValueError(f"cond: expected a dict of tensors by name; got {type(cond).__name__}")
    for name, v in cond.items():
        got = len(v) if isinstance(v, Tensor) and v.ndim else f"{type(v).__name__}, not a tensor with rows"
        if got != n:
            raise ValueError(f"cond: expected {n} values of {name!r}, one for each picture; got {got}")


def conditions(cond: Callable | dict[str, Tensor], n: int, first: int) -> Callable[[Tensor], dict[str, Tensor]]:
    "Numbers of pictures (b,), from 0 ↦ what the denoiser is told. Raises ValueError where a tensor has not one row per picture."
    if not callable(cond):
        check_rows(cond, n)

    def told(i):
        rows = cond(i + first) if callable(cond) else {name: v[i.to(v.device)] for name, v in cond.items()}
        check_rows(rows, len(i))
        return rows

    return told


def record(denoiser: Denoiser, sampler: Callable | tuple[Callable, ...], ts: Tensor, n: int, shape: Sequence[int], cond: Callable | dict, first: int) -> dict:  # fmt: skip
    "What is being generated: equal for two calls that draw the same pictures. Of a `cond` that is a function, 16 values are looked at."
    seeds = torch.arange(n) if isinstance(cond, dict) else torch.linspace(0, n - 1, min(n, 16)).long()
    return dict(n=n, first=first, shape=list(shape), sampler=described(sampler), steps=len(ts) - 1, times=digest({"": ts.double()}),
                weights=identity(denoiser), conditions=digest(conditions(cond, n, first)(seeds)))  # fmt: skip


def write_record(path: Path, about: dict) -> None:
    "Write a record, with a checksum of its own."
    text = json.dumps(about | {"checksum": digest({}, about)}, indent=1) + "\n"
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def read_record(path: Path) -> dict | None:
    "The record in a file; None where there is no file, and an empty one where it is damaged."
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        return about if about.pop("checksum") == digest({}, about) else {}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def check_record(here: dict, now: dict, place: Path) -> None:
    "Raise ValueError, naming what differs, where `place` holds another run, or nobody knows which."
    if not here:
        raise ValueError(
            f"the record of {place} is damaged, so that nobody knows of which run it is: name another place, or delete it"
        )
    differ = [f"{k}: {here.get(k, 'nothing')} there, {v} now" for k, v in now.items() if here.get(k) != v]
    if differ:
        raise ValueError(f"{place} holds another run ({'; '.join(differ)}): name another place, or delete it")


def file_hash(path: Path) -> str:
    "A hash of a file, or of all files in a folder and below it, by their names."
    sha = hashlib.sha256()
    for p in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        sha.update(p.relative_to(path).as_posix().encode() if path.is_dir() else b"")
        sha.update(p.read_bytes())
    return sha.hexdigest()[:16]
