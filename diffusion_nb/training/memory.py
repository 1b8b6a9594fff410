"""What in a training has a memory of its own, and what to do where the device's is too small."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from diffusion_nb.util.profiling import largest_that_fits


def with_memory(time_sampler: Callable, hooks: Sequence[Callable]) -> dict[str, nn.Module]:
    "The modules among them, by name: `time_sampler`, and for a hook its class, numbered where a class comes twice."
    found = {"time_sampler": time_sampler} if isinstance(time_sampler, nn.Module) else {}
    for hook in hooks:
        if isinstance(hook, nn.Module):
            name, n = type(hook).__name__, sum(type(h) is type(hook) for h in found.values())
            found[f"{name}{n + 1}" if n else name] = hook
    return found


def what_fits(trainer) -> str:
    "What would fit into the memory that a training step ran out of, in words."
    size = trainer.batch // trainer.world // trainer.accumulate
    need = f"{size} pictures at a time need more memory than there is on {trainer.device}: "
    if trainer.state.shard:
        return need + "raise accumulate, or take a smaller batch"

    def attempt(n):
        x0, t, eps, cond = next(trainer.batches(trainer.step))
        with torch.autocast(trainer.device.type, torch.bfloat16, enabled=trainer.bf16):
            part = {name: v[:n] for name, v in cond.items()}
            trainer.loss(trainer.denoiser, x0[:n], t[:n], eps[:n], **part).mean().backward()

    trainer.state.optimizer.zero_grad()
    n = largest_that_fits(attempt, size // 2)
    batch, world = trainer.batch, trainer.world
    parts = min(a for a in range(1, batch + 1) if batch % (world * a) == 0 and batch <= n * world * a)
    return (
        need
        + f"{n} fit. accumulate={parts} trains the same batch in parts; or take batch={n * world * trainer.accumulate}"
    )
