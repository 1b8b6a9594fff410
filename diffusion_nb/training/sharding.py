"""Work and weights that are divided among processes, and starting those."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diffusion_nb.denoisers import Denoiser


def whole(v: Tensor) -> Tensor:
    "All of v, from all processes that hold a part of it."
    return v.full_tensor() if hasattr(v, "full_tensor") else v


def shard_module(module: nn.Module, least: int = 2**20) -> None:
    "Divide the parameters among the processes (FSDP2), in units of `least` numbers or more; the last unit is the rest."
    from torch.distributed.fsdp import fully_shard

    for part in reversed(list(module.modules())):  # the inner ones first
        own = sum(p.numel() for p in part.parameters() if not hasattr(p, "full_tensor"))
        if part is module or own >= least and not isinstance(part, nn.ModuleList | nn.ModuleDict):
            fully_shard(part)


class Objective(nn.Module):
    "A loss of a denoiser as a module, which is what PyTorch's wrappers for many processes wrap."

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, loss, x0, t, eps, **cond):
        return loss(self.denoiser, x0, t, eps, **cond)


def share_work(denoiser: Denoiser, shard: bool) -> tuple[nn.Module | None, Callable[[bool], None]]:
    "(loss, x0, t, eps, **cond) ↦ the loss, of all processes together, and what says whether they exchange gradients in the next backward pass; None for one process alone."
    model = Objective(denoiser)
    if shard:
        if not dist.is_initialized():
            raise ValueError(
                "shard: the weights are divided among processes; start them with torchrun or accelerate launch"
            )
        shard_module(model)
        return model, model.set_requires_gradient_sync
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None, lambda last: None
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # PyTorch 2.14 renames the option
        model = DistributedDataParallel(model, broadcast_buffers=False)
    return model, partial(setattr, model, "require_backward_grad_sync")


def check_same_step(step: int, world: int, checkpoint) -> None:
    "Raise ValueError unless all processes go on from the same step."
    if world > 1:
        dist.all_gather_object(found := [0] * world, step)
        if len(set(found)) > 1:
            raise ValueError(f"the processes found checkpoints of different steps, {found}: put {checkpoint} where all of them see it")  # fmt: skip


class Process(NamedTuple):
    "One process among `world`: its device, and its rank from 0."

    device: torch.device
    rank: int
    world: int


@contextlib.contextmanager
def process_group(cpu: bool = False) -> Iterator[Process]:
    """`with process_group() as team:` joins the processes that torchrun or accelerate launch have started, and parts from them at the end.

    Each has its own GPU (nccl), or all share the CPU (gloo) where there is none or `cpu` says so. A process by itself is a team of one.
    Once in a process; processes that have been joined before are left joined. After an error a process leaves without a word: the others may be waiting for it.

        torchrun --nproc-per-node 8 -m diffusion_nb train --data cifar10 --bf16 --compile
        accelerate launch --num_processes 8 -m diffusion_nb train --data cifar10 --bf16 --compile
        torchrun --nproc-per-node 8 -m diffusion_nb train --data cifar10 --bf16 --shard
    """
    from accelerate import PartialState

    joined = torch.distributed.is_initialized()
    state = PartialState(cpu=cpu or not torch.cuda.is_available())

    def leave():
        if torch.distributed.is_initialized() and not joined:
            torch.distributed.destroy_process_group()
            PartialState._reset_state()

    try:
        yield Process(state.device, state.process_index, state.num_processes)
    except KeyboardInterrupt:  # which all of them get
        leave()
        raise
    leave()
