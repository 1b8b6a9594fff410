"""The trainer: Algorithm 1 with an average of the weights, checkpoints, and any number of processes."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from diffusion_nb.denoisers import Denoiser
from diffusion_nb.losses.simple import denoising_loss
from diffusion_nb.time_samplers import continuous_times
from diffusion_nb.training.batches import Batches
from diffusion_nb.training.checkpoints import Checkpoints, check_run
from diffusion_nb.training.identity import course_of, name_of, network_hash
from diffusion_nb.training.lr import warmed_up
from diffusion_nb.training.memory import what_fits, with_memory
from diffusion_nb.training.sharding import check_same_step
from diffusion_nb.training.state import State
from diffusion_nb.util.checks import check_device, check_numbers, check_rate, default_device
from diffusion_nb.util.interrupts import deferred_interrupt


def reseed(device: torch.device, seed: int) -> None:
    "Seed this device's generator. (torch.manual_seed also queues calls for a GPU that is not used.)"
    (torch.default_generator if device.type == "cpu" else torch.get_device_module(device)).manual_seed(seed)


def mean_loss(recent: list[Tensor], enough: bool, whole: Tensor, world: int, skip: bool) -> tuple[float, bool, bool]:  # fmt: skip
    "The mean of the losses of all processes, whether any of them has had enough, and whether the weights of all are `whole`. skip: leave out losses that are not finite."
    values = torch.stack([*recent, torch.full_like(recent[0], float(enough)), (~whole).to(recent[0].dtype)])
    if world > 1:
        dist.all_reduce(values)
    losses, (stop, broken) = values[:-2] / world, values[-2:].tolist()
    return (losses[losses.isfinite()] if skip else losses).mean().item(), stop > 0, broken == 0


class Trainer:
    """Fits a denoiser to pictures: `Trainer(denoiser, x0, …).fit()` returns a copy with averaged weights. (DDPM-A1)

    Parameters
    ----------
    denoiser: trained in place. x0: the data, (n, …), finite; bytes stand for [-1, 1]. Or a map-style data set larger than memory, whose items are pictures,
    (picture, label) or (picture, {name: condition}), read ahead by `workers` processes.
    steps, batch, lr: how many steps, pictures per step, and k ↦ learning rate (such as `warmup_cosine(3e-3, 100, steps)`).
    cond: what belongs to each picture, e.g. {"y": labels}. null: what stands for "any" in place of y, or {name: that} for several conditions; each
    picture's are replaced by it with probability `cond_dropout`, all at once, or each by itself with `apart`.
    time_sampler: (u, step) ↦ t (`continuous_times`, `chain_times(T)`); if a module, its buffers are kept in the checkpoint, and its `update()`, if it has one, is called after each step.
    loss: as `denoising_loss`, one number per sample. augment: (pictures, uniform numbers (b,)) ↦ pictures, such as `flip_half`, or (pictures, conditions that tell how), such as `edm_augment`; conditions that are pictures are changed alike.
    ema: the decay of the averaged weights, with a short memory at first, or a function step ↦ decay. clip: the largest gradient norm. betas: of AdamW. seed: of everything. device: the GPU if there is one. bf16: autocast. compile: torch.compile the network.
    checkpoint: a file, written every `save_every` steps and at the end, the `keep_checkpoints` last ones beside it as FILE.1, …; training goes on from the newest that is whole.
    accumulate: a step's pictures are done in so many parts, one after the other. log_every: how many steps between looks at the loss. skip: leave out, and count, the steps whose gradient is not finite. hooks: called with the trainer after each step; the buffers of one that is a module are kept in the checkpoint.
    shard: divide the weights among the processes, too (FSDP2). Where torch.distributed has been set up, its processes share each batch (DDP); the averaged copy is then
    the same on all of them, with `shard` on the CPU. Randomness belongs to a picture's place in the batch, dropout aside: neither parts nor processes change what is learned.
    Raises ValueError for data with NaN, a wrong number of conditions, a batch that cannot be shared out, and checkpoints that are damaged or of another run; OSError where they
    cannot be written; FloatingPointError where the loss or the weights stop being finite; MemoryError, with a batch that would fit; KeyboardInterrupt after Ctrl-C or SIGTERM, once the checkpoint is written.
    """

    def __init__(self, denoiser: Denoiser, x0: Tensor | Dataset, *, steps: int, lr: Callable[[int], float],
                 batch: int = 128, cond: dict[str, Tensor] | None = None, null: int | Tensor | dict | None = None, cond_dropout: float = 0.1, apart: bool = False,
                 time_sampler: Callable = continuous_times, loss: Callable = denoising_loss, augment: Callable | None = None,
                 ema: float | Callable[[int], float] = 0.9999, clip: float = 1.0, betas: tuple[float, float] = (0.9, 0.999), seed: int = 0,
                 device=None, bf16: bool = False, compile: bool = False, checkpoint: Path | str | None = None, save_every: int = 1000,
                 keep_checkpoints: int = 2, accumulate: int = 1, log_every: int = 50, skip: bool = False, workers: int = 0,
                 hooks: Sequence[Callable] = (), shard: bool = False):  # fmt: skip
        check_numbers(steps=(steps, 0), batch=(batch, 1), save_every=(save_every, 1), accumulate=(accumulate, 1), log_every=(log_every, 1), workers=(workers, 0))  # fmt: skip
        check_rate(lr, steps)
        ema = ema if callable(ema) else warmed_up(ema)
        if not (0 <= ema(steps) <= 1 and 0 <= cond_dropout <= 1 and clip > 0 and 0 <= lr(0) < math.inf):
            raise ValueError(f"expected ema and cond_dropout in [0, 1], clip above 0 and a learning rate of 0 or more; got {ema(steps)}, {cond_dropout}, {clip}, {lr(0)}")  # fmt: skip
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.device = torch.device(device) if device else default_device()
        check_device(self.device)
        self.steps, self.lr, self.batch, self.loss, self.seed = steps, lr, batch, loss, seed
        self.ema, self.clip, self.betas, self.bf16, self.accumulate = ema, clip, betas, bf16, accumulate
        self.log_every, self.save_every, self.hooks, self.time_sampler = log_every, save_every, hooks, time_sampler
        null = null if isinstance(null, dict) else {} if null is None else {"y": null}
        self.batches = Batches(x0, denoiser, batch=batch, cond=cond or {}, null=null, cond_dropout=cond_dropout, apart=apart, time_sampler=time_sampler,
                               augment=augment, seed=seed, device=self.device, rank=self.rank, world=self.world, accumulate=accumulate, workers=workers)  # fmt: skip
        self.names, self.step, self.losses = dict(network=network_hash(denoiser), loss=name_of(loss)), 0, []
        self.state = State(denoiser, lr=lr(0), betas=betas, memory=with_memory(time_sampler, hooks),
                           device=self.device, compile=compile, shard=shard, skip=skip)  # fmt: skip
        self.denoiser, self.average = self.state.denoiser, self.state.average
        self.checkpoints = checkpoint and Checkpoints(checkpoint, keep_checkpoints, writes=self.rank == 0)
        if self.checkpoints and self.checkpoints.exist():
            self.restore()
        check_same_step(self.step, self.world, checkpoint)

    def train_step(self) -> Tensor:
        "One step; returns the loss of this process's pictures without waiting for it."
        total, places, objective = 0.0, self.batches.places, self.state.objective(self.loss)
        for i, (x0, t, eps, cond) in zip(places, self.batches(self.step), strict=True):
            reseed(self.device, self.step + 2**32 * i)  # for dropout
            self.state.sync(i == places[-1])
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                loss = objective(x0, t, eps, **cond).mean() / self.accumulate
            loss.backward()
            total = total + loss.detach()
        self.state.update(self.lr(self.step), self.clip, self.ema(self.step))
        if update := getattr(self.time_sampler, "update", None):
            update()
        self.step += 1
        return total

    def fit(self, minutes: float | None = None) -> Denoiser:
        "Train to the last step, or for so many minutes, with a progress bar; returns the denoiser with averaged weights."
        if minutes is not None and not minutes > 0:
            raise ValueError(f"minutes: expected a positive number, got {minutes}")
        end, fits = math.inf if minutes is None else time.monotonic() + 60 * minutes, True
        if self.checkpoints and self.rank == 0:
            self.checkpoints.check_room(self.state.nbytes())
        bar = tqdm(total=self.steps, initial=self.step, desc="training", disable=self.rank > 0)
        with (
            torch.random.fork_rng([self.device] if self.device.type == "cuda" else []),
            deferred_interrupt() as stop,
            bar,
        ):
            try:
                self._loop(bar, lambda: stop.is_set() or time.monotonic() >= end)
            except torch.OutOfMemoryError:
                fits = False  # the memory is free only once the exception is gone
            except RuntimeError as e:
                if self.world == 1:
                    raise
                raise RuntimeError(f"process {self.rank} of {self.world} stops after step {self.step}: {e}\n"
                                   f"If another process died, the same command goes on{self._saved(' from the last checkpoint, step {1}')}") from e  # fmt: skip
        if not fits:
            raise MemoryError(what_fits(self))
        if self.checkpoints:
            self.checkpoints.end() if self.checkpoints.begun == self.step else self.save()
        if stop.is_set():
            how = f"run again to go on from {self.checkpoints.path}" if self.checkpoints else "nothing was saved"
            raise KeyboardInterrupt(f"stopped after step {self.step} of {self.steps}; {how}")
        return self.state.averaged()

    def _loop(self, bar, enough: Callable[[], bool]) -> None:
        recent, done, self.since = [], False, (time.perf_counter(), self.step)
        while self.step < self.steps and not done:
            recent.append(self.train_step())
            bar.update()
            saves = bool(self.checkpoints) and self.step % self.save_every == 0
            reads = saves or self.step % self.log_every == 0 or self.step == self.steps
            if reads or (self.world == 1 and enough()):
                done = self._read(recent, bar, enough())
            for hook in self.hooks:
                hook(self)
            if saves:
                self.save(wait=False)

    def _read(self, recent: list[Tensor], bar, enough: bool) -> bool:
        "Note the mean loss since the last look, and return whether any process has had enough: the only place that waits for the GPU."
        value, enough, whole = mean_loss(recent, enough, self.state.finite(), self.world, self.state.skip)
        if not (whole and math.isfinite(value)):
            raise FloatingPointError(f"the loss is {value}{'' if whole else ', and weights are not finite,'} between steps {self.step - len(recent)} and {self.step}: lower the learning rate, or look at the data"
                                     + ("" if self.state.skip else "; skip=True leaves such steps out") + self._saved(". {} holds step {}"))  # fmt: skip
        now, (then, step) = time.perf_counter(), self.since
        self.speed, self.since = self.batch * (self.step - step) / (now - then), (now, self.step)
        recent.clear()
        self.losses.append((self.step, value))
        bar.set_postfix_str(f"loss {value:.4f}, {self.speed:.0f} pictures/s")
        return enough

    def _saved(self, text: str) -> str:
        "The text with file and step of the last checkpoint; nothing where there is none."
        step = self.checkpoints and self.checkpoints.newest()
        return text.format(self.checkpoints.path, step) if step else ""

    def identity(self) -> dict:
        "What makes this run another than others. More steps are the same run, gone on with."
        rates = dict(lr=[self.lr(0), course_of(self.lr)], ema=self.ema(10**15))
        own = dict(seed=self.seed, clip=self.clip, betas=list(self.betas)) | rates
        return own | self.names | self.batches.identity()

    def save(self, wait: bool = True) -> None:
        "Write the checkpoint, whole or not at all; in the background, unless `wait`. Raises OSError where it cannot be written: those before are as they were."
        about = dict(step=self.step, run=self.identity(), losses=list(self.losses))
        self.checkpoints.begin(self.state.tensors(), about)  # from all processes
        if wait:
            self.checkpoints.end()

    def restore(self) -> None:
        "Go on from the newest checkpoint that is whole. Raises ValueError where none is, and where it is of another run."
        (tensors, about), file = self.checkpoints.load(), self.checkpoints.path
        self.state.check_fits(tensors, str(file))
        check_run(about, self.identity(), self.steps, file)
        self.state.load(tensors)
        self.step, self.losses = about["step"], [tuple(row) for row in about["losses"]]
