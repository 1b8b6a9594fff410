"""Pieces of a set of samples on disk."""

import itertools
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock
from jaxtyping import Bool
from torch import Tensor

from diffusion_nb.generation.formats import FORMS
from diffusion_nb.generation.record import check_record, digest, file_hash, read_record, write_record
from diffusion_nb.util.storage import load_tensors, save_tensors

PART = re.compile(r"(\d{12})-(\d+)\.safetensors")  # first seed and number of pictures


def pictures_in(part: Path) -> int:
    "How many pictures a part holds, by its name."
    return int(part.stem.partition("-")[2])


OURS = re.compile(
    r"\d{12}-\d+\.safetensors(\.\d+\.tmp)?|record\.json(\.\d+\.tmp)?|result(\.npz|\.safetensors)(\.\d+\.tmp)?|\d{6,}\.png|labels\.json"
)


def remove_ours(folder: Path) -> None:
    "Delete what generate wrote into a folder, and the folder where nothing else is in it."
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_file() and OURS.fullmatch(path.name):
            path.unlink()
        elif path.is_dir() and path.name == "result":
            remove_ours(path)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def check_free(out: Path) -> None:
    "Raise ValueError where there is something at `out` that no run has written."
    if out.exists() and (out.suffix or not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"{out} is there already, and no record beside it says of which run: name another place, or move it away"
        )


class ChunkStore:
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

    def files(self) -> list[Path]:
        "The finished chunks, by first seed; what else may lie beside them is not ours."
        return sorted(p for p in self.folder.glob("*.safetensors") if PART.fullmatch(p.name))

    def there(self, into: dict[str, Tensor] | None = None) -> Bool[Tensor, " n"]:
        "Which pictures are safe, copied to `into` if given. Damaged parts are named in a warning and deleted."
        safe = torch.zeros(self.n, dtype=torch.bool)
        for path in self.files():
            if (part := self.read(path)) is None:
                warnings.warn(f"{path.name} in {self.folder} is damaged: its pictures are made anew", stacklevel=3)
                path.unlink()
                continue
            i = part["seeds"] - self.first
            safe[i] = True
            if into is not None:
                for name, v in part.items():
                    into.setdefault(name, v.new_empty(self.n, *v.shape[1:]))[i] = v
        return safe

    def said(self) -> str:
        "How many pictures are safe, by the names of the files."
        count = sum(map(pictures_in, self.files()))
        return f"{count} of {self.n} pictures are safe in {self.folder}; the same call goes on from there"


def finished(parts: ChunkStore) -> bool:
    "Whether the result is complete, as its record says. Raises ValueError where it is of another run, or not what was written."
    here = read_record(parts.card)
    if here is None or not parts.out.exists():
        return False
    check_record(here, parts.about, parts.out)
    if file_hash(parts.out) != here.get("sha256"):
        raise ValueError(f"{parts.out} is not what was written (its checksum differs): delete it, and the same call makes it anew")  # fmt: skip
    remove_ours(parts.folder)
    return True


def record_of_chunks(parts: ChunkStore) -> dict | None:
    "The record of the finished chunks, None where there is none. A damaged one is written anew if the chunks are of this run, for each says of which it is."
    here = read_record(parts.begun)
    sizes = [pictures_in(p) for p in parts.files() if parts.read(p)] if here == {} else []
    if not sizes:
        return here
    warnings.warn(f"{parts.begun} is damaged; the pictures beside it are of this run, which goes on", stacklevel=3)
    write_record(parts.begun, parts.about | {"chunk": max(sizes)})
    return read_record(parts.begun)


def begin(parts: ChunkStore, chunk: int | None, fitting: Callable[[], int]) -> int:
    "Write the record where there is none; returns the size of the chunks. Raises ValueError where the place holds something else."
    if (here := record_of_chunks(parts)) is not None:
        check_record(here, parts.about, parts.folder)
        return chunk or here["chunk"]
    check_free(parts.out)
    chunk = chunk or fitting()
    write_record(parts.begun, parts.about | {"chunk": chunk})
    return chunk


def clear(parts: ChunkStore) -> None:
    "Delete a result or chunks of another run; move aside a result that is not as it was written. What has no record is left alone."
    try:
        finished(parts)
        if (here := record_of_chunks(parts)) is not None:
            check_record(here, parts.about, parts.folder)
    except ValueError:
        remove_ours(parts.folder)
        if (card := read_record(parts.card)) is not None:
            remove_result(parts.out, card.get("sha256"))
            parts.card.unlink()


def remove_result(out: Path, sha256: str | None) -> None:
    "Delete a result; one that somebody has changed, or put there, gets another name."
    if not out.exists():
        return
    if file_hash(out) != sha256:
        aside = next(
            p for i in itertools.count(1) if not (p := out.with_name(f"{out.stem}.kept-{i}{out.suffix}")).exists()
        )
        out.rename(aside)
        warnings.warn(f"{out} is not what was written there: it is now {aside.name}", stacklevel=4)
    elif out.is_dir():
        remove_ours(out)
    else:
        out.unlink()


def flush(path: Path) -> None:
    "To disk with a file, or with the files of a folder."
    for p in path.iterdir() if path.is_dir() else [path]:
        with open(p, "rb+") as f:
            os.fsync(f.fileno())


def put_in_place(draft: Path, out: Path, sha256: str) -> None:
    "Rename, unless something is there already: somebody may have put it there since the run began."
    if out.exists() and file_hash(out) == sha256:  # by a run that was killed before it wrote its record
        return
    check_free(out)
    if out.is_dir():
        out.rmdir()  # it is empty
    os.rename(draft, out)


def merge(parts: ChunkStore) -> bool:
    "Put the parts together if all are there, and delete them; says how many there are, if not."
    out = parts.out
    found: dict[str, Tensor] = {}
    if not (safe := parts.there(found)).all():
        print(f"{out.name}: {int(safe.sum())} of {parts.n} pictures are there; the others are another process's share, or the same call makes them")  # fmt: skip
        return False
    draft = parts.folder / f"result{out.suffix}"
    FORMS[out.suffix](draft, found)
    flush(draft)
    card = parts.about | {"sha256": file_hash(draft)}
    put_in_place(draft, out, card["sha256"])
    write_record(parts.card, card)
    remove_ours(parts.folder)
    return True
