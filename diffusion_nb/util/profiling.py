"""Time, operations, memory and waits for a GPU."""

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from diffusion_nb.util.checks import GUARDED, default_device


def largest_that_fits(attempt: Callable[[int], object], n: int) -> int:
    "The largest of n, n/2, n/4, … for which `attempt` does not run out of memory. Raises MemoryError where not even 1 does."
    while n:
        try:
            attempt(n)
            return n
        except torch.OutOfMemoryError:
            pass  # the memory is free only once the exception is gone
        n //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    raise MemoryError("not even a batch of one fits into memory: take a smaller network, or bf16")


def flops(call: Callable[[], object]) -> int:
    """The floating-point operations of all convolutions and matrix products while `call()` runs; a multiplication and an addition are two.

    Attention is done step by step meanwhile, since the counter overlooks the fused one of CPUs. Call the network itself, not a compiled one, whose
    kernels nobody sees. Works on the meta device, where nothing is computed.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


def matrix_peak(device=None, dtype: torch.dtype = torch.float32, n: int = 0, seconds: float = 0.2) -> float:
    "Operations per second of this device in a product of two n×n matrices (8192 on a GPU, 1024 on a CPU), the best of many: what a network could reach at most."
    device = torch.device(device) if device else default_device()
    n = n or (8192 if device.type == "cuda" else 1024)
    made = torch.Generator().manual_seed(0)  # the global one is left alone
    a, b = (torch.randn(n, n, generator=made).to(device, dtype) for _ in range(2))
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        wait()
        start = time.perf_counter()
        a @ b
        wait()
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


def seconds(call: Callable[[], object], repeats: int = 5) -> float:
    "The shortest time of `call()` in `repeats`, after one to warm up, which counts only where there is no other. Waits for the GPU."
    wait, times = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None, []
    for _ in range(repeats + 1):
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    return min(times[1:] or times)


def utilisation(call: Callable[[], object], peak: float, done: int | None = None) -> float:
    "The model FLOP utilisation: FLOP/s of `call()` as a share of `peak`. done: its FLOP, where `flops(call)` cannot see them (compiled)."
    return (done or flops(call)) / seconds(call) / peak


LOOKS = ("tolist", "numpy", "cpu", "__array__")  # methods of a tensor; and operators:
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "equal", "allclose", "_unique2")
OWN = ("__torch_dispatch__", "__torch_function__", "note")


def caller() -> str | None:
    "The line at work, 'function, file:line', outside PyTorch and this counter; None in a check that is skipped on a GPU."
    frame: FrameType | None = sys._getframe(2)
    place, torch_home = None, str(Path(torch.__file__).parent)
    while frame:
        name, file = frame.f_code.co_name, frame.f_code.co_filename
        if frame.f_code is GUARDED:
            return None
        if not (place or name in OWN or file.startswith(torch_home)):
            place = f"{name}, {Path(file).name}:{frame.f_lineno}"
        frame = frame.f_back
    return place


def waits(name: str, args: tuple) -> bool:
    "Whether an operator makes the host wait: for a number, or for how many entries a mask selects."
    masks = args[1] if name == "index" else ()
    return name in WAITS or any(m is not None and m.dtype in (torch.bool, torch.uint8) for m in masks)


class HostSyncs:
    """Inside `with HostSyncs() as syncs`, counts on any device what would make the host wait for a GPU: reading numbers off tensors, making
    tensors of Python's numbers, and selecting by a mask. `syncs.places`: how often which line did; checks that are `cpu_only` are left out,
    since they skip a GPU. `x.to("cpu")` is not seen: on a CPU nothing happens.
    """

    def __init__(self):
        self.places, note = Counter(), self.note

        class Methods(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                note(getattr(func, "__name__", "") in LOOKS)
                return func(*args, **(kwargs or {}))

        class Operators(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                note(waits(func.overloadpacket.__name__, args))
                return func(*args, **(kwargs or {}))

        self.modes = contextlib.ExitStack(), Methods(), Operators()

    def note(self, looked: bool) -> None:
        if looked and (place := caller()):
            self.places[place] += 1

    def __enter__(self):
        stack, *modes = self.modes
        for mode in modes:
            stack.enter_context(mode)
        return self

    def __exit__(self, *error):
        self.modes[0].close()

    @property
    def count(self) -> int:
        return self.places.total()
