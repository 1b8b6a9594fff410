"""Checkpoint files, their checksums and their fallbacks."""

import json
import os
import re
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from torch import Tensor

from diffusion_nb.util.storage import load_tensors, save_tensors, write_atomically


class Checkpoints:
    """The `keep` last states of a run: the newest in the file `path`, those before it in `path`.1, `path`.2, …

    Each is written whole or not at all, with a checksum, while the training goes on; `load` passes over one that is damaged.
    writes: False in all processes of a team but one.
    """

    def __init__(self, path: Path | str, keep: int = 2, writes: bool = True):
        if keep < 1:
            raise ValueError(f"keep: expected at least 1 checkpoint to keep, got {keep}")
        self.path, self.damaged, self.writes = Path(path), [], writes
        self.begun = self.saved = None  # the steps of the last that was begun, and of the newest that is whole
        self.pool, self.writing = ThreadPoolExecutor(1), None
        self.files = [self.path.with_name(self.path.name + (f".{i}" if i else "")) for i in range(keep)]

    def exist(self) -> bool:
        return any(p.exists() for p in self.files)

    def begin(self, tensors: dict[str, Tensor], about: dict) -> None:
        "Copy the tensors, and write them in the background. A warning says so where those of the last `begin` could not be written."
        try:
            self.end()
        except OSError as e:
            warnings.warn(f"{e} Training goes on, and tries again with step {about['step']}", stacklevel=4)
        self.begun = about["step"]
        if self.writes:
            copies = {name: v.detach().to("cpu", copy=True) for name, v in tensors.items()}
            self.writing = self.pool.submit(self.save, copies, about)
        else:
            self.saved = self.begun

    def end(self) -> None:
        "Wait for what `begin` began. Raises OSError where it could not be written; the checkpoints before are as they were."
        writing, self.writing = self.writing, None
        if writing:
            writing.result()

    def newest(self) -> int | None:
        "The step of the newest that is whole, when nothing is being written any more."
        with suppress(OSError):
            self.end()
        return self.saved

    def save(self, tensors: dict[str, Tensor], about: dict) -> None:
        "Write a checkpoint, whole or not at all. Raises OSError where it cannot be written; those before are as they were."
        try:
            self.write(tensors, {k: json.dumps(v) for k, v in about.items()})
        except OSError as e:
            before = "There is none yet." if self.saved is None else f"That of step {self.saved} is whole."
            raise OSError(f"the checkpoint of step {about['step']} could not be written: {e}. {before}") from e
        self.saved = about["step"]

    def write(self, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
        draft = self.path.with_name(self.path.name + ".new")
        for rest in self.path.parent.glob(f"{draft.name}.*.tmp"):  # of a process that was killed as it wrote
            if re.fullmatch(re.escape(draft.name) + r"\.\d+\.tmp", rest.name):
                rest.unlink()
        save_tensors(draft, tensors, about)
        for path in self.damaged:
            path.unlink(missing_ok=True)
        for newer, older in reversed(list(pairwise(self.files))):
            if newer.exists():
                os.replace(newer, older)
        os.replace(draft, self.path)
        self.damaged = []

    def load(self) -> tuple[dict[str, Tensor], dict]:
        "The newest that is whole; a warning names the damaged ones. Raises ValueError where none is whole."
        problems = []
        for path in (p for p in self.files if p.exists()):
            try:
                tensors, about = load_tensors(path)
            except ValueError as e:
                problems.append(str(e))
                self.damaged.append(path)
                continue
            if problems:
                warnings.warn(f"{'; '.join(problems)}; going on from {path.name}", stacklevel=4)
            about = {k: json.loads(v) for k, v in about.items()}
            self.begun = self.saved = about["step"]
            return tensors, about
        raise ValueError(f"{'; '.join(problems)}; delete it to start again")

    def check_room(self, size: int) -> None:
        "Raise OSError now rather than in an hour, if checkpoints of `size` bytes cannot be written."
        folder, probe = self.path.parent, self.path.with_name(f"{self.path.name}.try")
        try:
            write_atomically(probe, Path.touch)
            probe.unlink(missing_ok=True)
        except OSError as e:
            raise OSError(
                f"{folder}: no checkpoint can be written there ({e.strerror}); name another folder"
            ) from e
        number, free = len(self.files) + 1 - sum(p.exists() for p in self.files), shutil.disk_usage(folder).free
        if free < number * size:
            raise OSError(f"{folder}: there must be room for {number} checkpoints of {size / 2**20:.1f} MiB, but only "
                          f"{free / 2**20:.1f} MiB are free; make room, or name another folder")  # fmt: skip


def check_run(about: dict, run: dict, steps: int, file: Path) -> None:
    "Raise ValueError where a checkpoint is of another run, or of more than `steps` steps."
    if differ := [f"{k} {about['run'].get(k)} → {v}" for k, v in run.items() if about["run"].get(k) != v]:
        raise ValueError(f"{file} is of another run ({', '.join(differ)}); name another file, or delete it")
    if about["step"] > steps:
        raise ValueError(f"{file} is of step {about['step']}, and {steps} were asked for; name another file, or delete it")  # fmt: skip
