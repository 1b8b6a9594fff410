"""What importing the library costs beside importing torch: the best of several fresh processes, taking turns.

Run: python benchmarks/imports.py   (writes benchmarks/results/imports.json)
"""

import subprocess
import sys

from common import report, seconds

EVERYTHING = "import torch, diffusion_nb as dn; [getattr(dn, name) for name in dn.__all__]"


def python(code):
    return lambda: subprocess.run([sys.executable, "-c", code], check=True)


def main():
    times = seconds({
        "torch": python("import torch"),
        "diffusion_nb": python("import torch, diffusion_nb"),
        "every name of diffusion_nb": python(EVERYTHING),
    }, rounds=6)  # fmt: skip
    base = times.pop("torch")
    added = {f"added by {name}": round(s - base, 3) for name, s in times.items()}
    report("imports", "s", {"import torch": round(base, 3)} | added)


if __name__ == "__main__":
    main()
