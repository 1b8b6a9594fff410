"""What changes in a training: weights, their average, the optimiser's moments; on one device or many."""

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from diffusion_nb.denoisers import Denoiser
from diffusion_nb.training.sharding import shard_module, share_work, whole
from diffusion_nb.util.storage import check_fits, own_tensors

ADAM = ("step", "exp_avg", "exp_avg_sq")


def by_dtype(*lists: list[Tensor]) -> list[tuple[tuple[Tensor, ...], ...]]:
    "The lists, parted by dtype: an operation on many tensors at once goes through mixed ones one by one."
    rows = {}
    for row in zip(*lists, strict=True):
        rows.setdefault(row[0].dtype, []).append(row)
    return [tuple(zip(*alike, strict=True)) for alike in rows.values()]


class State:
    """A network in training, its average, its optimiser.

    `tensors()` is all of it by name, the same for any number of processes; `load` puts it back.

    Parameters
    ----------
    denoiser: trained in place. memory: {name: module} of what else has buffers that change.
    shard: divide the weights among the processes. skip: leave out, and count, steps whose gradient is not finite.
    """

    def __init__(self, denoiser: Denoiser, *, lr: float, betas: tuple[float, float], memory: dict[str, nn.Module],
                 device: torch.device, compile: bool, shard: bool, skip: bool):  # fmt: skip
        on_gpu, self.skip, self.shard = device.type == "cuda", skip, shard
        layout = torch.channels_last if on_gpu else torch.preserve_format
        self.denoiser = denoiser.to(device, memory_format=layout).train()
        self.average = copy.deepcopy(denoiser).eval().requires_grad_(False)
        self.result = copy.deepcopy(self.average).cpu() if shard else self.average
        if compile:
            denoiser.compile()
        self.model, self.sync = share_work(denoiser, shard)
        if shard:
            shard_module(self.average)
        self.params, self.averages = (list(m.parameters()) for m in (denoiser, self.average))
        self.alike = by_dtype(self.averages, self.params)
        self.buffers, self.average_buffers = (list(m.buffers()) for m in (denoiser, self.average))
        self.optimizer = torch.optim.AdamW(self.params, lr, betas, weight_decay=0.0, fused=on_gpu or skip)
        for p in self.params:  # made now, so that memory runs out at once if it does
            moments = {name: torch.zeros_like(p, requires_grad=False) for name in ADAM[1:]}
            self.optimizer.state[p] = {"step": torch.zeros((), device=device)} | moments
        self.memory = {of: m.to(device, memory_format=layout) for of, m in memory.items()}
        self.skipped = torch.zeros((), device=device)

    def objective(self, loss: Callable) -> Callable:
        "(x0, t, eps, **cond) ↦ the loss of this denoiser, whose gradients all processes share."
        return partial(self.model, loss) if self.model else partial(loss, self.denoiser)

    def update(self, lr: float, clip: float, decay: float) -> None:
        "One step of the optimiser along the gradients that are there, and of the average."
        norm = nn.utils.clip_grad_norm_(self.params, clip)
        if self.skip:
            bad = ~whole(norm).isfinite()
            self.optimizer.found_inf = bad.float()  # where it is 1, a fused step changes nothing
            self.skipped += bad
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for averages, params in self.alike:
                torch._foreach_lerp_(averages, params, 1 - decay)
            if self.buffers:
                torch._foreach_copy_(self.average_buffers, self.buffers)

    def finite(self) -> Tensor:
        "Whether all weights are, as a tensor, so that nobody waits for it."
        return whole(nn.utils.get_total_norm([p.detach() for p in self.params])).isfinite()

    def averaged(self) -> Denoiser:
        "The averaged network; a copy on the CPU where the weights are divided among processes."
        if self.shard:
            set_model_state_dict(self.result, get_model_state_dict(self.average, options=options()))
        return self.result

    def nbytes(self) -> int:
        "About how large a checkpoint is."
        return 4 * sum(p.numel() * p.element_size() for p in self.params)

    def tensors(self) -> dict[str, Tensor]:
        "Weights, averages, moments, and the buffers of `memory`, by name."
        adam = get_optimizer_state_dict(self.denoiser, self.optimizer, options=options())["state"]
        parts = {
            "net": whole_tensors(self.denoiser),
            "average": whole_tensors(self.average),
        } | self.memory_tensors()
        parts |= {m: {name: v[m] for name, v in adam.items()} for m in ADAM}
        return {f"{part}.{name}": v.detach() for part, values in parts.items() for name, v in values.items()}

    def memory_tensors(self) -> dict[str, dict[str, Tensor]]:
        return {of: m.state_dict() for of, m in self.memory.items()} | {"skipped": {"steps": self.skipped}}

    def check_fits(self, tensors: dict[str, Tensor], file: str) -> None:
        "Raise ValueError unless weights and memory have the names and shapes of these. (What is left out has those of the weights.)"
        check_fits(*({k: v for k, v in part.items() if not k.startswith(("average.", *ADAM))} for part in (self.tensors(), tensors)), file)  # fmt: skip

    def load(self, tensors: dict[str, Tensor]) -> None:
        "Put back what `tensors` gave."
        parts = {}
        for name, v in tensors.items():
            part, _, name = name.partition(".")
            parts.setdefault(part, {})[name] = v
        for module, part in ((self.denoiser, "net"), (self.average, "average")):
            set_model_state_dict(module, parts[part], options=options())
        adam = get_optimizer_state_dict(self.denoiser, self.optimizer, options=options())
        adam["state"] = {name: {m: parts[m][name] for m in ADAM} for name in parts["exp_avg"]}
        set_optimizer_state_dict(self.denoiser, self.optimizer, adam, options=options())
        for p, moments in self.optimizer.state.items():  # in memory as the weights are, which a fused step needs
            moments |= {m: torch.empty_like(p, requires_grad=False).copy_(moments[m]) for m in ADAM[1:]}
        for part, values in self.memory_tensors().items():
            for name, v in values.items():
                v.copy_(parts[part][name])


def options() -> StateDictOptions:
    "Whole tensors, wherever their shards are."
    return StateDictOptions(full_state_dict=dist.is_initialized(), strict=False)


def whole_tensors(module: nn.Module) -> dict[str, Tensor]:
    "The parameters and persistent buffers of a module, from all processes that hold a part of them."
    return own_tensors(module, get_model_state_dict(module, options=options()))
