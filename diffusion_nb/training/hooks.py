"""What can be called after each training step: logs, grids of samples, speed."""

import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from diffusion_nb.denoisers import Clip, Denoiser
from diffusion_nb.grids import time_grid
from diffusion_nb.noise import Noise
from diffusion_nb.samplers.linear import ddim
from diffusion_nb.training.trainer import Trainer
from diffusion_nb.util.images import picture_grid
from diffusion_nb.util.profiling import flops
from diffusion_nb.util.storage import write_atomically


def has_read(trainer: Trainer) -> bool:
    "Whether the loss was read after this step: the moment to write it down."
    return bool(trainer.losses) and trainer.losses[-1][0] == trainer.step


def numbers(trainer: Trainer) -> dict[str, float]:
    "What a reading tells: step, loss (mean since the reading before), learning rate, pictures per second, GiB of this GPU at most, steps left out."
    step, loss = trainer.losses[-1]
    row = dict(step=step, loss=loss, lr=trainer.lr(step - 1), pictures_per_second=trainer.speed)
    if trainer.device.type == "cuda":
        row["gpu_gib"] = torch.cuda.max_memory_allocated(trainer.device) / 2**30
    if trainer.state.skip:
        row["skipped"] = int(trainer.state.skipped)
    return row


def row_of(line: bytes) -> dict | None:
    "The row in a line of a log; None where it holds none."
    try:
        row = dict(json.loads(line))
        row["step"] + 0
    except (ValueError, TypeError, KeyError):
        return None
    return row


def read_rows(path: Path | str) -> list[dict]:
    """The rows of a file that `JsonLogger` wrote, without a last line that was cut short; damaged lines are named in a warning and left out.

    Raises ValueError for a file that does not begin with a row: it is no log.
    """
    *lines, last = Path(path).read_bytes().split(b"\n")
    rows = [row_of(line) for line in lines]
    begins, opening = rows[0] if rows else None, b'{"step": '
    if begins is None and (lines or last[: len(opening)] != opening[: len(last)]):
        raise ValueError(
            f"{path} is no log: expected a JSON object with a step in its first line; name another file, or move this one away"
        )
    if damaged := [str(i) for i, row in enumerate(rows, 1) if row is None]:
        warnings.warn(
            f"{path}: of {len(rows)} lines these are damaged, and left out: {', '.join(damaged)}", stacklevel=3
        )
    return [row for row in (*rows, row_of(last)) if row is not None]


class JsonLogger:
    """A hook: one JSON line at each reading of the loss, on the first process only. `read_rows` reads them.

    path: the file. Where it exists, rows later than the step at which the training goes on are dropped first, and so is a torn last line: a run
    that was killed and resumed holds each step once. `seconds` counts from the making of this hook. Numbers that are not finite are null.
    Damaged lines are left out with a warning. Raises ValueError where the file is no log.
    """

    def __init__(self, path: Path | str):
        self.path, self.start, self.last = Path(path), time.perf_counter(), -1

    def __call__(self, trainer: Trainer) -> None:
        if trainer.rank:
            return
        if trainer.step != self.last + 1:
            self.rewind(trainer.step)
        self.last = trainer.step
        if has_read(trainer):
            row = numbers(trainer) | dict(seconds=round(time.perf_counter() - self.start, 3))
            row = {k: v if math.isfinite(v) else None for k, v in row.items()}
            with open(self.path, "a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")

    def rewind(self, step: int) -> None:
        "Leave only the rows before `step`."
        rows = [row for row in read_rows(self.path) if row["step"] < step] if self.path.exists() else []
        write_atomically(
            self.path, lambda p: p.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        )


class TensorBoard:
    """A hook: the same numbers for TensorBoard, on the first process only; `tensorboard --logdir FOLDER` shows them.

    Steps that a resumed run does again replace those of before. Raises ImportError where the package tensorboard is missing.
    """

    def __init__(self, folder: Path | str):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as e:
            raise ImportError(
                "TensorBoard needs a package that is not there: pip install tensorboard (JsonLogger needs none)"
            ) from e
        self.make, self.folder, self.last, self.writer = SummaryWriter, str(folder), -1, None

    def at(self, trainer: Trainer):
        "The writer, which forgets what was written of this step and later ones where the training does not just go on."
        if trainer.step not in (self.last, self.last + 1):
            self.writer = self.make(self.folder, purge_step=trainer.step)
        self.last = trainer.step
        return self.writer

    def __call__(self, trainer: Trainer) -> None:
        if trainer.rank:
            return
        writer = self.at(trainer)
        if has_read(trainer):
            for name, value in numbers(trainer).items():
                writer.add_scalar(name, value, trainer.step)
            writer.flush()


def fixed_draws(
    shape: tuple[int, ...], n: int = 40, classes: int = 0, calls: int = 20, first: int = 0
) -> Callable:
    """denoiser ↦ n pictures of this shape, always from the same noise (seeds first, first + 1, …), in so many steps of DDIM.

    classes: if not 0, the labels run through them, n/classes pictures each.
    """

    def draw(denoiser: Denoiser) -> Float[Tensor, "n *shape"]:
        device = next(denoiser.parameters()).device
        cond = {"y": torch.arange(n, device=device) * classes // n} if classes else {}
        start = denoiser.schedule(torch.ones((), dtype=torch.float64))[1].item() * Noise(
            range(first, first + n), shape, device
        )(0)
        return ddim(Clip(denoiser), start, time_grid(calls), **cond)

    return draw


def check_every(every: int) -> None:
    "Raise ValueError unless it is a number of steps."
    if every < 1:
        raise ValueError(f"every: expected at least 1 step, got {every}")


class SampleGrids:
    """A hook: a PNG of what the averaged weights draw, `step-00001000.png`, every so many steps and at the end, on the first process only.

    draw: denoiser ↦ pictures (n, c, h, w), such as `fixed_draws`. The training is not disturbed: its random numbers are those without this hook.
    board: a `TensorBoard` that gets the grids too. Raises ValueError where the weights are sharded, since then there is no average before the end.
    """

    def __init__(
        self,
        folder: Path | str,
        draw: Callable,
        every: int = 1000,
        columns: int = 0,
        board: TensorBoard | None = None,
    ):
        check_every(every)
        self.folder, self.draw, self.every, self.columns, self.board = Path(folder), draw, every, columns, board

    def __call__(self, trainer: Trainer) -> None:
        if trainer.step % self.every and trainer.step != trainer.steps:
            return
        if trainer.state.shard:
            raise ValueError(
                "SampleGrids: with shard=True the averaged weights are whole only at the end; draw from a checkpoint, or train without shard"
            )
        if trainer.rank:
            return
        with torch.random.fork_rng([trainer.device] if trainer.device.type == "cuda" else []), torch.no_grad():
            grid = picture_grid(self.draw(trainer.average), self.columns)
        write_atomically(self.folder / f"step-{trainer.step:08d}.png", lambda p: _write_png(grid, p))
        if self.board:
            self.board.at(trainer).add_image("drawn", grid.numpy(), trainer.step, dataformats="HWC")


def _write_png(grid: Tensor, path: Path) -> None:
    from PIL import Image

    Image.fromarray(grid.squeeze(-1).numpy()).save(path, "PNG")


def training_flops(trainer: Trainer) -> float:
    "Operations that a training step takes for one picture: three times those of the forward pass."
    x0, t, eps, cond = next(trainer.batches(max(trainer.step - 1, 0)))
    whole = trainer.state.result  # the average itself may be divided among processes
    home = next(whole.parameters()).device
    x0, t, eps, cond = (
        x0[:1].to(home),
        t[:1].to(home),
        eps[:1].to(home),
        {name: v[:1].to(home) for name, v in cond.items()},
    )
    with torch.no_grad():
        return 3 * flops(lambda: trainer.loss(whole, x0, t, eps, **cond))


class Throughput:
    "A hook that says at the end how fast it went: pictures per second (the median reading), operations per picture, and with `peak` (as `matrix_peak` gives it, of one device) the share of it that was used."

    def __init__(self, peak: float | None = None):
        self.peak, self.speeds = peak, []

    def __call__(self, trainer: Trainer) -> None:
        if has_read(trainer):
            self.speeds.append(trainer.speed)
        if trainer.step == trainer.steps and not trainer.rank:
            tqdm.write(self.report(trainer))

    def report(self, trainer: Trainer) -> str:
        speed, each = float(np.median(self.speeds)), training_flops(trainer)
        said = f"{speed:,.0f} pictures/s, {each / 1e9:.3g} GFLOP a picture"
        if trainer.device.type == "cuda":
            said += f", {torch.cuda.max_memory_allocated(trainer.device) / 2**30:.1f} GiB at most"
        return said + (
            f", {speed * each / (self.peak * trainer.world):.0%} of what the device can do" if self.peak else ""
        )
