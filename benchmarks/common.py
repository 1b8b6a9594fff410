"""Timing and reporting for the benchmarks: contenders take turns in one run, the best of several rounds counts."""

import datetime
import json
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def seconds(contenders, rounds=7):
    "The shortest time of each contender over `rounds` rounds in which all take turns, after one round to warm up."
    best = dict.fromkeys(contenders, float("inf"))
    for i in range(rounds + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            elapsed = time.perf_counter() - start
            if i:
                best[name] = min(best[name], elapsed)
    return best


def machine():
    "What the numbers were measured on."
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        models = [
            line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = f"{models[0]}, {len(models)} cores"
    packages = {}
    for p in ("torch", "diffusers", "azula", "smalldiffusion"):
        try:
            packages[p] = version(p)
        except PackageNotFoundError:
            pass
    return dict(device=name, threads=torch.get_num_threads(), python=platform.python_version(), **packages)


def report(name, unit, rows, ratios=None):
    "Print the table and write it to benchmarks/results/NAME.json with the machine, the versions and the command."
    for row, value in rows.items():
        print(f"{row:50} {value:>10} {unit}" + (f"   × {ratios[row]}" if ratios and row in ratios else ""))
    result = dict(command="python " + " ".join(sys.argv), date=str(datetime.date.today()), machine=machine(), unit=unit,
                  results=rows, ratios=ratios)  # fmt: skip
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
