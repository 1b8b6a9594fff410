"""Timing and reporting for the benchmarks: contenders take turns in one run, the best of several rounds counts."""

import argparse
import datetime
import json
import math
import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

RESULTS = Path(__file__).parent / "results"
LOAD = round(os.getloadavg()[0], 2)  # before the benchmark adds to it
PACKAGES = ("torch", "diffusers", "azula", "smalldiffusion", "denoising-diffusion-pytorch", "ema-pytorch")


def sync(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def seconds(contenders, rounds=7, minutes=math.inf, clock=time.perf_counter, warm=1):
    """The shortest time of each contender over `rounds` rounds in which all take turns, after `warm` rounds to warm up.

    No round is begun after so many minutes, but one is always timed.
    """
    best, end = dict.fromkeys(contenders, math.inf), time.monotonic() + 60 * minutes
    for i in range(rounds + warm):
        if i > warm and time.monotonic() > end:
            break
        for name, run in contenders.items():
            start = clock()
            run()
            elapsed = clock() - start
            if i >= warm:
                best[name] = min(best[name], elapsed)
    return best


def clock(device):
    "On a CPU the processor time of this process, which runs on one thread: what else the machine does hardly changes it."
    return time.perf_counter if device == "cuda" else time.process_time


def flops(call):
    "The operations of the matrix products and convolutions in `call()`, attention's included; a multiplication and an addition are two."
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


class InDtype(torch.nn.Module):
    "The network in another dtype and layout than the walk, which stays in float32."

    def __init__(self, net, layout):
        super().__init__()
        self.net, self.layout, self.dtype = net, layout, next(net.parameters()).dtype

    def forward(self, x, t):
        return self.net(x.to(self.dtype, memory_format=self.layout), t)


def memory(device):
    "Bytes in use on a GPU; 0 on a CPU."
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def peak_memory(device, before, run):
    "The most GiB in use in `run()` beyond `before`, to three digits. None on a CPU, where it is not measured."
    if device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    run()
    return digits((torch.cuda.max_memory_allocated() - before) / 2**30, 3)


def peaks(device, dtype, n):
    """Operations per second in a product of two n×n matrices and in a 3×3 convolution of n/8 channels, each the best of ten rounds.

    A network cannot go beyond the larger. On some CPUs it is the convolution, since PyTorch takes the two from different libraries.
    """
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    c = n // 8
    x, w = (
        torch.randn(8, c, n // 64 or 1, 64, device=device).to(dtype),
        torch.randn(c, c, 3, 3, device=device).to(dtype),
    )
    x, w = (v.contiguous(memory_format=torch.channels_last) for v in (x, w))
    conv = lambda: torch.nn.functional.conv2d(x, w, padding=1)
    calls = {"product": (lambda: a @ b, 2 * n**3), "convolution": (conv, 2 * x.numel() * c * 9)}
    repeat = 5 if device == "cuda" else 1

    def timed(call):
        def run():
            for _ in range(repeat):
                call()
            sync(device)

        return run

    best = seconds({name: timed(call) for name, (call, _) in calls.items()}, rounds=10, clock=clock(device))
    return {name: repeat * work / best[name] for name, (_, work) in calls.items()}


def profile(path, contenders, device):
    "Where the time of one turn of each contender goes, as text."
    from torch.profiler import ProfilerActivity as Activity

    on_gpu = torch.device(device).type == "cuda"
    parts = []
    for name, run in contenders.items():
        with torch.profiler.profile(activities=[Activity.CPU] + [Activity.CUDA] * on_gpu) as p:
            run()
        order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        parts.append(f"{name}\n{p.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60)}")
    path.write_text("\n\n".join(parts), encoding="utf-8")
    print(f"where the time goes: {path}")


def arguments(doc, **defaults):
    "The options that the benchmarks of networks share."
    on_gpu = torch.cuda.is_available()
    args = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if on_gpu else "cpu")
    args.add_argument("--width", type=int, default=128, help="of the U-Net; small for a test")
    args.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=defaults.get("bf16", on_gpu))
    args.add_argument("--compile", action=argparse.BooleanOptionalAction, default=defaults.get("compile", on_gpu))
    args.add_argument("--rounds", type=int, default=5 if on_gpu else 3)
    args.add_argument("--minutes", type=float, default=math.inf, help="begin no round after so many")
    args.add_argument("--out", type=Path, default=RESULTS, help="the folder for the results")
    return args


def prepare(device):
    torch.manual_seed(0)
    if device == "cpu":
        torch.set_num_threads(1)
    else:
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # float32 is for the checks


def machine():
    "What the numbers were measured on."
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        models = [
            line.split(":")[1].strip()
            for line in info.read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ]
        name = f"{models[0]}, {len(models)} cores"
    packages = {}
    for p in PACKAGES:
        try:
            packages[p] = version(p)
        except PackageNotFoundError:
            pass
    return dict(device=name, threads=torch.get_num_threads(), load_before=LOAD, python=platform.python_version(), **packages)  # fmt: skip


def digits(value, n=4):
    return float(f"{value:.{n}g}")


def report(name, unit, rows, ratios=None, out=RESULTS, **about):
    "Print the table and write it to OUT/NAME.json with the machine, the versions and the command. A row is a number, or a dict of them."
    for row, value in rows.items():
        if isinstance(value, dict):
            print(f"{row:18}", ", ".join(f"{k}: {v}" for k, v in value.items()))
        else:
            print(f"{row:50} {value:>10} {unit}" + (f"   × {ratios[row]}" if ratios and row in ratios else ""))
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    result = dict(command=command, date=str(datetime.date.today()), machine=machine(), unit=unit,
                  results=rows, ratios=ratios, **about)  # fmt: skip
    out.mkdir(exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
