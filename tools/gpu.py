"""Check a GPU and time it, within ten minutes, most important first: what it computes, that nothing waits for it, training, drawing.

    python tools/gpu.py [--minutes 10] [--only NAME ...] [--device cpu]

It needs PyTorch 2.11 or later and Python 3.11 or later; the few other packages are installed where they are missing, PyTorch never
(without a network: from wheels in the folder that PIP_FIND_LINKS names, with PIP_NO_INDEX=1). Each stage is a
process of its own with a limit of time: one that fails is written down, and the next goes on. $OUT, else benchmarks/results/gpu/, gets gpu.json, anew
after each stage, and of each stage its log, the tests' XML or the benchmark's JSON. --device cpu, at toy size, tries this script without a GPU.
"""

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
NEEDED = {  # module: packages, with what they stand on; they are installed without dependencies, which might be another PyTorch
    "numpy": "numpy", "jaxtyping": "jaxtyping wadler-lindig", "einops": "einops", "safetensors": "safetensors", "platformdirs": "platformdirs",
    "filelock": "filelock", "psutil": "psutil", "tqdm": "tqdm", "scipy": "scipy", "torchdiffeq": "torchdiffeq", "PIL": "pillow",
    "pytest": "pytest iniconfig pluggy packaging pygments",
}  # fmt: skip
OTHERS = (
    "diffusers",
    "denoising_diffusion_pytorch",
    "ema_pytorch",
)  # libraries that some benchmarks time beside ours
ABOUT = """
import json, platform, torch
cuda = torch.cuda.is_available()
p = torch.cuda.get_device_properties(0) if cuda else None
print(json.dumps(dict(torch=torch.__version__, python=platform.python_version(), cuda=torch.version.cuda,
                      cudnn=torch.backends.cudnn.version(), device=p.name if cuda else None,
                      memory_GiB=round(p.total_memory / 2**30, 1) if cuda else None)))
"""


class Stage(NamedTuple):
    "A command with a limit of seconds; others: whether it needs the other libraries."

    name: str
    limit: float
    words: list[str]
    others: bool = False


def stages(device: str, out: Path) -> list[Stage]:
    "What is done, in this order. The limits of what needs no other library add up to ten minutes."

    def tests(name, limit):
        alone = "-c /dev/null --rootdir tests/gpu --confcutdir tests/gpu -p no:cacheprovider -v --durations=10 --tb=short"  # no other conftest
        return Stage(name, limit, ["-m", "pytest", *alone.split(), f"--junitxml={out}/{name}.xml", f"tests/gpu/test_gpu_{name}.py"])  # fmt: skip

    def timed(name, limit, words, toy="--width=8 --batches 2 --rounds=1"):
        script, *options = words.split()
        options += [] if device == "cuda" else toy.split()
        return Stage(name, limit, [f"benchmarks/{script}.py", *options, f"--out={out}"], script != "gpu")

    toy = "--width=8 --batch=2 --rounds=1"
    return [
        tests("equal", 85), timed("train", 70, "gpu train --minutes 0.2"), timed("sample", 55, "gpu sample --minutes 0.2"),
        tests("training", 170), tests("syncs", 120), timed("guesses", 40, "gpu fast --minutes 0.1"), tests("fast", 60),
        timed("train-others", 150, "train --only diffusion_nb diffusers --rounds 3 --minutes 0.5", toy),
        timed("sample-others", 120, "sample --only diffusion_nb diffusers --rounds 2 --minutes 0.5", toy),
        timed("fifty-thousand", 90, "fifty_thousand --only ddim-50 dpmpp_2m-10 --minutes 0.25", "--width=8 --batch=2 --n=2"),
        timed("curves", 90, "curves --only diffusion_nb --batches 16 256 --sizes --steps --minutes 0.2", "--width=8 --batches 1 2 --turn=1"),
    ]  # fmt: skip


def missing(modules) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name) is None]


def install() -> None:
    "Install what is missing of NEEDED, and nothing else; says so where that does not work."
    packages = [p for name in missing(NEEDED) for p in NEEDED[name].split()]
    if packages:
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--no-deps",
            "-c",
            str(ROOT / "constraints.txt"),
            *packages,
        ]
        if subprocess.run(command).returncode:
            print(f"could not be installed: {' '.join(packages)}; what needs them will fail", flush=True)


def about() -> dict:
    "Device and versions; an error where PyTorch cannot be asked."
    done = subprocess.run([sys.executable, "-c", ABOUT], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"PyTorch does not work in {sys.executable}:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    if tuple(int(v) for v in found["torch"].split(".")[:2]) < (2, 11):
        sys.exit(f"PyTorch {found['torch']} in {sys.executable}: expected 2.11 or later")
    return found


def end(process: subprocess.Popen) -> None:
    "Stop a process and its children: asked first, so that the tests say how far they came."
    for number, patience in ((signal.SIGINT, 8), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            process.wait(patience)
            return
        except subprocess.TimeoutExpired:
            continue


def ran(stage: Stage, limit: float, env: dict[str, str], log: Path) -> dict:
    "How a stage went: its command, seconds, how it ended, and the last line that it said."
    start = time.monotonic()
    with open(log, "w", encoding="utf-8") as f:
        process = subprocess.Popen([sys.executable, *stage.words], cwd=ROOT, env=env, stdout=f, stderr=subprocess.STDOUT,
                                   start_new_session=True)  # fmt: skip
        try:
            code = process.wait(limit)
            ended = "done" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {limit:.0f} s"
            end(process)
        except BaseException:
            end(process)
            raise
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return dict(command=shlex.join(["python", *stage.words]), ended=ended, seconds=round(time.monotonic() - start, 1),
                said=said[-1] if said else "", log=log.name)  # fmt: skip


def write(path: Path, result: dict) -> None:
    "Write it whole, or leave what was there."
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(draft, path)


def told(stage: Stage, left: float, env: dict[str, str], out: Path) -> dict:
    "How a stage went, or why it was left out, with so many seconds left."
    if lacking := missing(OTHERS if stage.others else ()):
        return dict(ended=f"left out: {', '.join(lacking)} missing", seconds=0)
    if left < 20:
        return dict(ended="left out: no time left", seconds=0)
    return ran(stage, min(stage.limit, left), env, out / f"{stage.name}.log")


def environment(device: str) -> dict[str, str]:
    "This environment, with the library from this folder and no plugins of pytest."
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | dict(PYTHONPATH=path, PYTHONUNBUFFERED="1", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", DIFFUSION_NB_GPU_TESTS_ON=device)  # fmt: skip


def run(args, out: Path) -> dict:
    "All stages, as far as the time goes; what is known is in gpu.json at any moment."
    finish = time.monotonic() + 60 * args.minutes - 10  # to stop the last one
    install()
    machine = about()
    if args.device == "cuda" and not machine["device"]:
        sys.exit("PyTorch sees no GPU; --device cpu tries this script without one")
    print(machine, flush=True)
    result = dict(command=shlex.join(["python", *sys.argv]), date=str(datetime.date.today()), machine=machine, stages={})  # fmt: skip
    for stage in stages(args.device, out):
        if not args.only or stage.name in args.only:
            row = told(stage, finish - time.monotonic(), environment(args.device), out)
            result["stages"][stage.name] = row
            write(out / "gpu.json", result)
            print(f"{stage.name}: {row['ended']}, {row['seconds']} s  {row.get('said', '')}", flush=True)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="for everything")
    parser.add_argument("--only", nargs="+", choices=[s.name for s in stages("cuda", ROOT)], help="some of the stages")  # fmt: skip
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    out = Path(os.environ.get("OUT") or ROOT / "benchmarks/results/gpu").resolve()
    out.mkdir(parents=True, exist_ok=True)
    rows = run(args, out)["stages"].values()
    print(f"written to {out}")
    return int(any(not row["ended"].startswith(("done", "left out")) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
