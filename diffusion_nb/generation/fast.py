"""Denoisers that run compiled and in bfloat16."""

import copy
from collections.abc import Callable
from itertools import chain
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_nb.denoisers import Denoiser, NetDenoiser, Prediction


def device_of(module: nn.Module) -> torch.device:
    "Where the module's numbers are; the CPU if it has none."
    return next((v.device for v in chain(module.parameters(), module.buffers())), torch.device("cpu"))


def in_dtype(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    "`net`, the layers of torch.nn that hold weights in `dtype`, to which they cast their input; all else, such as Fourier features and the embedding of time, computes as before."

    def cast(layer, args, kwargs):
        def to(v):
            return v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v

        return tuple(to(v) for v in args), {k: to(v) for k, v in kwargs.items()}

    for layer in net.modules():
        if (
            type(layer).__module__.startswith("torch.nn.")
            and next(layer.parameters(recurse=False), None) is not None
        ):
            layer.to(dtype).register_forward_pre_hook(cast, with_kwargs=True)
    return net


def own_code(method: Any) -> MethodType:
    "The method with a code object of its own: torch.compile counts recompilations by code object, and gives up on one after eight."
    f = method.__func__
    return MethodType(
        FunctionType(f.__code__.replace(), f.__globals__, f.__name__, f.__defaults__, f.__closure__),
        method.__self__,
    )


class CompiledDenoiser(Denoiser):
    """The guesses of `denoiser`, faster: from a copy, in eval mode and without gradients. Use it where many guesses of one shape are needed.

    Parameters
    ----------
    bf16: the layers of the networks in bfloat16, their weights cast once; everything around them stays as it is. compile: the whole call, on a GPU with CUDA graphs;
    by default on a GPU only. A new shape is compiled anew. options: for `torch.compile`, such as backend or mode.
    The guesses own their memory: the next call does not change them. Raises ValueError where bf16 finds no network.
    """

    def __init__(self, denoiser: Denoiser, bf16: bool = False, compile: bool | None = None, **options):
        super().__init__()
        self.denoiser = copy.deepcopy(denoiser).eval().requires_grad_(False)
        self.schedule, self.on_gpu = self.denoiser.schedule, device_of(denoiser).type == "cuda"
        nets = [m for m in self.denoiser.modules() if isinstance(m, NetDenoiser)] if bf16 else []
        if bf16 and not nets:
            raise ValueError(
                f"bf16: {type(denoiser).__name__} holds no NetDenoiser, whose network could be in bfloat16"
            )
        for m in nets:
            in_dtype(m.net, torch.bfloat16)
        if self.on_gpu:
            self.denoiser.to(memory_format=torch.channels_last)
        self.compiled = self.on_gpu if compile is None else compile
        self._call: Callable = self._guess
        if self.compiled:
            graphs = {"mode": "reduce-overhead"} if self.on_gpu else {}
            self._call = torch.compile(own_code(self._guess), dynamic=False, **graphs | options)

    def _guess(self, x_t, t, **cond):
        _, *rest = self.denoiser(x_t, t, **cond)
        return rest

    @torch.no_grad()
    def forward(self, x_t, t, **cond):
        x = x_t
        if self.on_gpu:
            torch.compiler.cudagraph_mark_step_begin()
            x = x_t.contiguous(memory_format=torch.channels_last) if x_t.ndim == 4 else x_t
        rest = self._call(x, t, **cond)
        if self.compiled:
            rest = [None if v is None else v.clone() for v in rest]
        return Prediction(x_t, *rest)
