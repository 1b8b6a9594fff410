"""What importing the library costs beside importing torch: the best of several fresh processes, taking turns.

Run: python benchmarks/imports.py   (writes benchmarks/results/imports.json)
"""

import subprocess
import sys

from common import report, seconds

MODULES = "core data forward posterior denoiser nets.unet samplers.ddpm training".split()


def python(code):
    return lambda: subprocess.run([sys.executable, "-c", code], check=True)


def main():
    everything = "; ".join(f"import diffusion_nb.{m}" for m in MODULES)
    times = seconds({
        "import torch": python("import torch"),
        "import torch, diffusion_nb": python("import torch, diffusion_nb"),
        "import torch and every module": python(f"import torch; {everything}"),
    }, rounds=6)  # fmt: skip
    rows = {name: round(s, 3) for name, s in times.items()}
    base = times["import torch"]
    report("imports", "s", rows | {f"added by {name[13:]}": round(s - base, 3) for name, s in times.items() if s != base})


if __name__ == "__main__":
    main()
