"""The trainer: a network, its average, checkpoints, several processes."""

import copy
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from diffusion_nb.denoisers import Denoiser, check_cond
from diffusion_nb.losses.simple import denoising_loss
from diffusion_nb.noise import Noise
from diffusion_nb.time_samplers import continuous_times
from diffusion_nb.training.checkpoints import Checkpoints
from diffusion_nb.training.identity import data_hash, name_of, network_hash
from diffusion_nb.training.sharding import Objective, divide, put, whole
from diffusion_nb.util.checks import check_null, check_numbers, check_pictures, default_device
from diffusion_nb.util.interrupts import deferred_interrupt
from diffusion_nb.util.profiling import largest_that_fits
from diffusion_nb.util.storage import check_fits


class Trainer:
    """Fits a denoiser to pictures: `Trainer(denoiser, x0, …).fit()` returns a copy with averaged weights. (DDPM-A1)

    Parameters
    ----------
    denoiser: trained in place. x0: the data, (n, …), finite; bytes stand for [-1, 1]. Kept on the device where it fits.
    steps, batch, lr: how many steps, pictures a step, and k ↦ learning rate (such as `warmup_cosine(3e-3, 100, steps)`).
    cond: what belongs to each picture, e.g. {"y": labels}. null: what stands for "any" in place of y, or {name: that} for several conditions; each
    picture's are replaced by it with probability `drop`, all at once, or each by itself with `apart`.
    times: (u, step) ↦ t (`continuous_times`, `chain_times(T)`); if a module, its buffers are kept in the checkpoint, and its `update()`, if it has one, is called after each step.
    loss: as `denoising_loss`, one number a sample.
    augment: (pictures, uniform numbers (b,)) ↦ pictures, such as `flip_half`; conditions that are pictures are changed alike.
    ema: the decay of the averaged weights. clip: the largest gradient norm. betas: of AdamW. seed: of everything.
    device: the GPU if there is one. bf16: autocast. compile: torch.compile the network.
    checkpoint: a file, written every `every` steps and at the end, the `keep` last ones beside it as FILE.1, …; training goes on from the newest that is whole.
    accumulate: a step's pictures are done in so many parts, one after the other. read: how many steps between looks at the loss.
    skip: leave out, and count, the steps whose gradient is not finite. hooks: called with the trainer after each step; the buffers of one that is a module are kept in the checkpoint.
    shard: divide the weights among the processes, too (FSDP2). Where torch.distributed has been set up, its processes share each batch (DDP); the averaged copy is then
    the same on all of them, with `shard` on the CPU. Randomness belongs to a picture's place in the batch, dropout aside: neither parts nor processes change what is learned.
    Raises ValueError for data with NaN, a wrong number of conditions, a batch that cannot be shared out, and checkpoints that are damaged or of another run; OSError where they
    cannot be written; FloatingPointError where the loss stops being finite; MemoryError, with a batch that would fit; KeyboardInterrupt after Ctrl-C or SIGTERM, once the checkpoint is written.
    """

    def __init__(self, denoiser: Denoiser, x0: Tensor, *, steps: int, lr: Callable[[int], float],
                 batch: int = 128, cond: dict[str, Tensor] | None = None, null: int | Tensor | dict | None = None, drop: float = 0.1, apart: bool = False,
                 times: Callable = continuous_times, loss: Callable = denoising_loss, augment: Callable | None = None,
                 ema: float = 0.9999, clip: float = 1.0, betas: tuple[float, float] = (0.9, 0.999), seed: int = 0,
                 device=None, bf16: bool = False, compile: bool = False, checkpoint: Path | str | None = None,
                 every: int = 1000, keep: int = 2, accumulate: int = 1, read: int = 50, skip: bool = False,
                 hooks: Sequence[Callable] = (), shard: bool = False):  # fmt: skip
        self.null = null if isinstance(null, dict) else {} if null is None else {"y": null}
        check_pictures(x0)
        check_cond(denoiser, len(x0), cond or {})
        check_null(self.null, cond or {})
        check_numbers(
            steps=(steps, 0), batch=(batch, 1), every=(every, 1), accumulate=(accumulate, 1), read=(read, 1)
        )
        if not (0 <= ema < 1 and 0 <= drop <= 1 and clip > 0 and math.isfinite(lr(0)) and lr(0) >= 0):
            raise ValueError(f"expected ema in [0, 1), drop in [0, 1], clip above 0 and a learning rate of 0 or more; got {ema}, {drop}, {clip}, {lr(0)}")  # fmt: skip
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.device = torch.device(device) if device else default_device()
        self.steps, self.lr, self.batch, self.drop, self.apart, self.times = steps, lr, batch, drop, apart, times
        self.loss, self.augment, self.decay, self.clip, self.seed, self.bf16 = loss, augment, ema, clip, seed, bf16
        self.betas = betas
        self.accumulate, self.read, self.skip, self.hooks, self.shard = accumulate, read, skip, hooks, shard
        on_cpu = self.device.type == "cpu"  # torch.manual_seed also queues calls for a GPU that is not used
        self.reseed = (
            torch.default_generator.manual_seed if on_cpu else torch.get_device_module(self.device).manual_seed
        )
        self.network = network_hash(denoiser)
        self._place_network(denoiser, betas, compile)
        self._place_data(x0, cond or {})
        keeps = {"times": times} | {f"hook{i}": hook for i, hook in enumerate(hooks)}
        self.memory = {f"{of}.{name}": v for of, m in keeps.items() if isinstance(m, nn.Module)
                       for name, v in m.to(self.device).state_dict().items()}  # fmt: skip
        self.step, self.losses, self.skipped = 0, [], torch.zeros((), device=self.device)
        self.checkpoints, self.every, self.saved = checkpoint and Checkpoints(checkpoint, keep), every, None
        if self.checkpoints and self.checkpoints.exist():
            self.restore()
        if self.world > 1:
            dist.all_gather_object(steps := [0] * self.world, self.step)
            if len(set(steps)) > 1:
                raise ValueError(
                    f"the processes found checkpoints of different steps, {steps}: put {checkpoint} where all of them see it"
                )

    def _place_network(self, denoiser: Denoiser, betas: tuple[float, float], compile: bool) -> None:
        "The network on its device, its averaged copy, and what divides the work among processes."
        on_gpu = self.device.type == "cuda"
        self.layout = torch.channels_last if on_gpu else torch.preserve_format
        self.denoiser = denoiser.to(self.device, memory_format=self.layout).train()
        self.average = copy.deepcopy(denoiser).eval().requires_grad_(False)
        if compile:
            denoiser.compile()
        self.model, self.sync = Objective(denoiser, lambda *a, **kw: self.loss(*a, **kw)), lambda last: None
        if self.shard:
            if not dist.is_initialized():
                raise ValueError(
                    "shard: the weights are divided among processes; start them with torchrun or accelerate launch"
                )
            divide(self.model)
            self.average, self.sync = self.average.cpu(), self.model.set_requires_gradient_sync
        elif self.world > 1:
            with warnings.catch_warnings(
                action="ignore", category=FutureWarning
            ):  # PyTorch 2.14 renames the option
                self.model = DistributedDataParallel(self.model, broadcast_buffers=False)
            self.sync = partial(setattr, self.model, "require_backward_grad_sync")
        self.names, self.params = zip(*denoiser.named_parameters(), strict=True)
        self.buffers, self.average_buffers = list(denoiser.buffers()), list(self.average.buffers())
        self.averages = (
            [p.detach().clone() for p in self.params] if self.shard else list(self.average.parameters())
        )
        self.optimizer = torch.optim.AdamW(
            self.params, self.lr(0), betas, weight_decay=0.0, fused=on_gpu or self.skip
        )
        for p in self.params:  # made now, so that memory runs out at once if it does
            moments = {name: torch.zeros_like(p, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[p] = {"step": torch.zeros((), device=self.device)} | moments

    def _place_data(self, x0: Tensor, cond: dict[str, Tensor]) -> None:
        "The data on the device where it fits, and this process's parts of a batch: which slots, and their noise."
        fits = self.device.type == "cpu" or x0.nbytes < torch.cuda.mem_get_info(self.device)[0] / 2
        home = self.device if fits else torch.device("cpu")
        self.x0, self.cond = x0.to(home), {name: values.to(home) for name, values in cond.items()}
        self.null = {
            name: torch.as_tensor(v, dtype=cond[name].dtype, device=home) for name, v in self.null.items()
        }
        far = 2**40 * (self.seed + 1)  # from the seeds that people give to samples
        slots = torch.arange(self.batch) + far
        self.choices = Noise(slots, (8 + 2 * len(self.null),), home)  # two numbers a column of bits
        size, left = divmod(self.batch, self.world * self.accumulate)
        if left or not size:
            raise ValueError(f"batch: {self.batch} pictures cannot be shared out to {self.world} processes × {self.accumulate} parts; "
                             "take a multiple")  # fmt: skip
        mine = range(self.rank * self.accumulate, (self.rank + 1) * self.accumulate)
        self.parts = [(i, slice(i * size, (i + 1) * size)) for i in mine]
        self.noises = [Noise(slots[where], tuple(x0.shape[1:]), self.device) for _, where in self.parts]

    def draw(self, k: int) -> Iterator[tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]]:
        "The pictures, times, noise and conditions of step k, part by part: a function of the seed and k. Lines 2 to 4 of Algorithm 1."
        uniform = ((self.choices.bits(k) >> 11) & (2**53 - 1)).double() * 2.0**-53
        pick = (uniform[:, 0] * len(self.x0)).long()
        slot = torch.arange(self.batch, device=uniform.device, dtype=torch.float64) / self.batch
        t = self.times(((uniform[0, 3] + slot) % 1).to(self.device), k)
        for (_, mine), noise in zip(self.parts, self.noises, strict=True):
            cond = {name: values[pick[mine]] for name, values in self.cond.items()}
            for i, (name, null) in enumerate(self.null.items()):
                left_out = uniform[mine, 3 + i if self.apart and i else 1] < self.drop
                cond[name] = torch.where(left_out.reshape(-1, *(1,) * (cond[name].ndim - 1)), null, cond[name])
            turn = uniform[mine, 2].to(self.device, non_blocking=True)
            cond = {
                name: self._picture(v, turn) if v.ndim == 4 else v.to(self.device, non_blocking=True)
                for name, v in cond.items()
            }
            yield self._picture(self.x0[pick[mine]], turn), t[mine], noise(k), cond

    def _picture(self, x: Tensor, turn: Tensor) -> Tensor:
        "x on the device, from -1 to 1, augmented and laid out for the network."
        x = x.to(self.device, non_blocking=True)
        if x.dtype == torch.uint8:
            x = x / 127.5 - 1
        if self.augment:
            x = self.augment(x, turn)
        return x.to(memory_format=self.layout) if x.ndim == 4 else x

    def train_step(self) -> Tensor:
        "One step; returns the loss of this process's pictures without waiting for it."
        total = 0.0
        for (i, _), (x0, t, eps, cond) in zip(self.parts, self.draw(self.step), strict=True):
            self.reseed(self.step + 2**32 * i)  # for dropout
            self.sync(i == self.parts[-1][0])
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                loss = self.model(x0, t, eps, **cond).mean() / self.accumulate
            loss.backward()
            total = total + loss.detach()
        norm = nn.utils.clip_grad_norm_(self.params, self.clip)
        if self.skip:
            bad = ~whole(norm).isfinite()
            self.optimizer.found_inf = bad.float()  # where it is 1, a fused step changes nothing
            self.skipped += bad
        self.optimizer.param_groups[0]["lr"] = self.lr(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = min(self.decay, (1 + self.step) / (10 + self.step))  # short memory at first
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.params, 1 - decay)
            if self.buffers:
                torch._foreach_copy_(self.average_buffers, self.buffers)
        if update := getattr(self.times, "update", None):
            update()
        self.step += 1
        return total

    def fit(self, minutes: float | None = None) -> Denoiser:
        "Train to the last step, or for so many minutes, with a progress bar; returns the denoiser with averaged weights."
        if minutes is not None and not minutes > 0:
            raise ValueError(f"minutes: expected a positive number, got {minutes}")
        end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        if self.checkpoints and self.rank == 0:
            self.checkpoints.check_room(sum(v.nbytes for v in self._tensors().values()))
        out_of_memory = False
        with (
            torch.random.fork_rng([self.device] if self.device.type == "cuda" else []),
            deferred_interrupt() as stop,
            tqdm(
                total=self.steps, initial=self.step, desc="training", **{"disable": True} if self.rank else {}
            ) as bar,
        ):
            try:
                self._loop(bar, lambda: stop.is_set() or time.monotonic() >= end)
            except torch.OutOfMemoryError:
                out_of_memory = True  # the memory is free only once the exception is gone
            except RuntimeError as e:
                if self.world == 1:
                    raise
                raise RuntimeError(f"process {self.rank} of {self.world} stops after step {self.step}: {e}\nIf another process died, the same command "
                                   f"goes on from the last checkpoint{f', step {self.saved}' if self.saved else ''}") from e  # fmt: skip
        if out_of_memory:
            raise MemoryError(self._advice())
        if self.checkpoints and self.saved != self.step:
            self.save()
        if stop.is_set():
            raise KeyboardInterrupt(f"stopped after step {self.step} of {self.steps}; "
                                    + (f"run again to go on from {self.checkpoints.path}" if self.checkpoints else "nothing was saved"))  # fmt: skip
        if self.shard:
            with torch.no_grad():
                for average, v in zip(self.average.parameters(), self.averages, strict=True):
                    average.copy_(whole(v))
        return self.average

    def _loop(self, bar, enough: Callable[[], bool]) -> None:
        recent, done, self.since = [], False, (time.perf_counter(), self.step)
        while self.step < self.steps and not done:
            recent.append(self.train_step())
            bar.update()
            saves = bool(self.checkpoints) and self.step % self.every == 0
            if saves or self.step % self.read == 0 or self.step == self.steps or (self.world == 1 and enough()):
                done = self._read(recent, bar, enough())
            for hook in self.hooks:
                hook(self)
            if saves:
                self._save_or_warn()

    def _read(self, recent: list[Tensor], bar, enough: bool) -> bool:
        "The mean loss since the last look, and whether any process has had enough: the only place that waits for the GPU."
        values = torch.stack([*recent, torch.full_like(recent[0], float(enough))])
        if self.world > 1:
            dist.all_reduce(values)
        losses, enough = values[:-1] / self.world, bool(values[-1])
        value = (losses[losses.isfinite()] if self.skip else losses).mean().item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value} between steps {self.step - len(recent)} and {self.step}: lower the learning rate, or look at the data"
                                     + ("" if self.skip else "; skip=True leaves such steps out")
                                     + (f". {self.checkpoints.path} holds step {self.saved}" if self.saved else ""))  # fmt: skip
        now, (then, step) = time.perf_counter(), self.since
        self.speed, self.since = self.batch * (self.step - step) / (now - then), (now, self.step)
        recent.clear()
        self.losses.append((self.step, value))
        bar.set_postfix_str(f"loss {value:.4f}, {self.speed:.0f} pictures/s")
        return enough

    def _advice(self) -> str:
        "What would fit into memory."
        size = self.batch // self.world // self.accumulate
        need = f"{size} pictures at a time need more memory than there is on {self.device}: "
        if self.shard:
            return need + "raise accumulate, or take a smaller batch"

        def attempt(n):
            x0, t, eps, cond = next(self.draw(self.step))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                loss = self.loss(
                    self.denoiser, x0[:n], t[:n], eps[:n], **{name: v[:n] for name, v in cond.items()}
                )
            loss.mean().backward()

        self.optimizer.zero_grad()
        n = largest_that_fits(attempt, size // 2)
        parts = min(
            a
            for a in range(1, self.batch + 1)
            if self.batch % (self.world * a) == 0 and self.batch <= n * self.world * a
        )
        smaller = n * self.world * self.accumulate
        return need + f"{n} fit. accumulate={parts} trains the same batch in parts; or take batch={smaller}"

    def _run(self) -> dict:
        "What makes this run another than others. More steps are the same run, gone on with."
        return dict(seed=self.seed, batch=self.batch, data=list(self.x0.shape), pictures=data_hash(self.x0, self.cond),
                    network=self.network, loss=name_of(self.loss), times=name_of(self.times), lr=self.lr(0), ema=self.decay,
                    clip=self.clip, betas=list(self.betas), drop=self.drop, null={k: v.tolist() for k, v in self.null.items()},
                    augment=name_of(self.augment))  # fmt: skip

    def _tensors(self) -> dict[str, Tensor]:
        "Weights, averages, the optimiser's moments, and the memory of `times` and hooks, by name."
        state = [self.optimizer.state[p] for p in self.params]
        parts = dict(net=self.params, average=self.averages) | {
            m: [s[m] for s in state] for m in ("exp_avg", "exp_avg_sq")
        }
        return {f"{part}.{name}": v.detach() for part, values in parts.items()
                for name, v in zip(self.names, values, strict=True)} | {
                f"buffer.{name}": v for name, v in self.denoiser.named_buffers()} | self.memory  # fmt: skip

    def save(self) -> None:
        "Write the checkpoint, whole or not at all. Raises OSError where it cannot be written: those before are as they were."
        tensors = {name: whole(v) for name, v in self._tensors().items()}  # from all processes
        if self.rank == 0:
            about = dict(step=self.step, skipped=int(self.skipped), run=self._run(), losses=self.losses)
            try:
                self.checkpoints.save(tensors, {k: json.dumps(v) for k, v in about.items()})
            except OSError as e:
                before = "There is none yet." if self.saved is None else f"That of step {self.saved} is whole."
                raise OSError(f"the checkpoint of step {self.step} could not be written: {e}. {before}") from e
        self.saved = self.step

    def _save_or_warn(self) -> None:
        try:
            self.save()
        except OSError as e:
            warnings.warn(f"{e} Training goes on, and tries again after {self.every} steps", stacklevel=2)

    def restore(self) -> None:
        "Go on from the newest checkpoint that is whole. Raises ValueError where none is, and where it is of another run."
        tensors, about = self.checkpoints.load()
        about = {k: json.loads(v) for k, v in about.items()}
        now, own, file = self._run(), self._tensors(), self.checkpoints.path
        names = {k for k in own.keys() | tensors.keys() if not k.startswith(("average.", "exp_avg"))}
        check_fits(*({k: part[k] for k in names & part.keys()} for part in (own, tensors)), str(file))
        if differ := [f"{k} {about['run'].get(k)} → {v}" for k, v in now.items() if about["run"].get(k) != v]:
            raise ValueError(f"{file} is of another run ({', '.join(differ)}); name another file, or delete it")
        if about["step"] > self.steps:
            raise ValueError(f"{file} is of step {about['step']}, and {self.steps} were asked for; name another file, or delete it")  # fmt: skip
        for name, v in own.items():
            put(v, tensors[name])
        for average, v in zip(self.average_buffers, self.buffers, strict=True):
            average.copy_(v)
        self.step = self.saved = about["step"]
        self.losses = [tuple(row) for row in about["losses"]]
        self.skipped.fill_(about["skipped"])
        for state in self.optimizer.state.values():
            state["step"].fill_(self.step - about["skipped"])


def flip_half(x: Float[Tensor, "b c h w"], u: Float[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
    "Mirror the pictures whose u is below a half: DDPM's augmentation of CIFAR-10."
    return torch.where(u[:, None, None, None] < 0.5, x.flip(3), x)
