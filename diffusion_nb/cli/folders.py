"""Folders that commands write, and whose files are in them."""

import json
from collections.abc import Iterable
from pathlib import Path


def recorded(out: Path, mark: str) -> bool:
    "Whether run.json of a folder is the record of a command that notes `mark`."
    try:
        return mark in json.loads((out / "run.json").read_bytes())
    except (FileNotFoundError, ValueError, TypeError):
        return False


def check_own(out: Path, names: Iterable[str], mark: str) -> None:
    "Raise FileExistsError where a folder holds files of these names, which are to be written, and no record with `mark` says that they were written by the same command."
    there = [name for name in names if (out / name).exists()]
    if there and not recorded(out, mark):
        few = ", ".join(there[:3]) + (" …" if len(there) > 3 else "")
        raise FileExistsError(f"--out: {out} holds {few}, which this command did not write; name another folder, or move them away")  # fmt: skip
