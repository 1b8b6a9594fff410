"""Folders that commands write, and whose files are in them."""

import json
from collections.abc import Sequence
from pathlib import Path


def recorded(out: Path) -> bool:
    "Whether a folder holds a record, run.json, or a checkpoint that `train` or `sample` wrote."
    try:
        return (out / "checkpoint.safetensors").exists() or "recipe" in json.loads((out / "run.json").read_bytes())
    except (FileNotFoundError, ValueError, TypeError):
        return False


def check_own(out: Path, names: Sequence[str]) -> None:
    "Raise FileExistsError where a folder holds files of these names, which are to be written, and nothing says that they are ours."
    there = [name for name in names if (out / name).exists()]
    if there and not recorded(out):
        raise FileExistsError(
            f"--out: {out} holds {', '.join(there)}, not written by this program; name another folder, or move them away"
        )
