"""Pieces of a set of samples on disk."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock
from jaxtyping import Bool
from torch import Tensor

from diffusion_nb.generation.formats import FORMS
from diffusion_nb.generation.record import check_record, digest, file_hash, read_record
from diffusion_nb.util.storage import load_tensors, save_tensors, write_atomically


class Parts:
    """Where a run keeps what it has: the result at `out`, its record in `out`.json, and until then the finished chunks, one file each, in `out`.parts.

    about: the record, to which the checksums belong; the seeds are first … first + n - 1.
    """

    def __init__(self, out: Path, about: dict):
        self.out, self.about, self.first, self.n = out, about, about["first"], about["n"]
        self.card, self.folder, lock = (out.with_name(f"{out.name}.{end}") for end in ("json", "parts", "lock"))
        self.begun, self.lock, self.mark = self.folder / "record.json", FileLock(lock), {"of": digest({}, about)}

    def add(self, tensors: dict[str, Tensor]) -> None:
        "Keep pictures and what else belongs to them, one row each, with their seeds (b,). Whole or not at all."
        name = f"{tensors['seeds'][0]:012d}-{len(tensors['seeds'])}.safetensors"
        save_tensors(self.folder / name, tensors, self.mark)

    def read(self, path: Path) -> dict[str, Tensor] | None:
        "The tensors of a part, or None where the file is cut off, damaged or of another run."
        try:
            tensors, mark = load_tensors(path)
        except ValueError:
            return None
        return tensors if mark == self.mark else None

    def there(self, into: dict[str, Tensor] | None = None) -> Bool[Tensor, " n"]:
        "Which pictures are safe, copied to `into` if given. Damaged parts are named in a warning and deleted."
        safe = torch.zeros(self.n, dtype=torch.bool)
        for path in sorted(self.folder.glob("*.safetensors")):
            if (part := self.read(path)) is None:
                warnings.warn(f"{path.name} in {self.folder} is damaged: its pictures are made anew", stacklevel=3)
                path.unlink()
                continue
            i = part["seeds"] - self.first
            safe[i] = True
            for name, v in part.items() if into is not None else ():
                into.setdefault(name, v.new_empty(self.n, *v.shape[1:]))[i] = v
        return safe

    def said(self) -> str:
        "How many pictures are safe, by the names of the files."
        count = sum(int(p.stem.partition("-")[2]) for p in self.folder.glob("*-*.safetensors"))
        return f"{count} of {self.n} pictures are safe in {self.folder}; the same call goes on from there"


def finished(parts: Parts) -> bool:
    "Whether the result is complete, as its record says. Raises ValueError where it is of another run, or not what was written."
    here = read_record(parts.card)
    if here is None or not parts.out.exists():
        return False
    check_record(here, parts.about, parts.out)
    if file_hash(parts.out) != here.get("sha256"):
        raise ValueError(f"{parts.out} is not what was written (its checksum differs): delete it, and the same call makes it anew")  # fmt: skip
    shutil.rmtree(parts.folder, ignore_errors=True)
    return True


def begin(parts: Parts, chunk: int | None, fitting: Callable[[], int]) -> int:
    "Write the record where there is none; returns the size of the chunks. Raises ValueError where the place holds something else."
    if (here := read_record(parts.begun)) is not None:
        check_record(here, parts.about, parts.folder)
        return chunk or here["chunk"]
    out = parts.out
    if out.exists() and (out.suffix or not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"{out} is there already, and no record beside it says of which run: name another place, or delete it"
        )
    chunk = chunk or fitting()
    write_atomically(parts.begun, lambda p: p.write_text(json.dumps(parts.about | {"chunk": chunk}, indent=1)))
    return chunk


def clear(parts: Parts) -> None:
    "Delete a result or chunks of another run, or not as they were written. What has no record is left alone."
    try:
        finished(parts)
        if (here := read_record(parts.begun)) is not None:
            check_record(here, parts.about, parts.folder)
    except ValueError:
        shutil.rmtree(parts.folder, ignore_errors=True)
        if parts.card.exists():
            shutil.rmtree(parts.out) if parts.out.is_dir() else parts.out.unlink(missing_ok=True)
            parts.card.unlink()


def merge(parts: Parts) -> bool:
    "Put the parts together if all are there, and delete them; says how many there are, if not."
    out, found = parts.out, {}
    if not (safe := parts.there(found)).all():
        print(f"{out.name}: {int(safe.sum())} of {parts.n} pictures are there; the others are another process's share, or the same call makes them")  # fmt: skip
        return False
    for draft in out.parent.glob(f"{out.name}.*.tmp"):  # of a merge that was killed
        draft.unlink()
    FORMS[out.suffix](out, found)
    card = parts.about | {"sha256": file_hash(out)}
    write_atomically(parts.card, lambda p: p.write_text(json.dumps(card, indent=1) + "\n"))
    shutil.rmtree(parts.folder)
    return True
