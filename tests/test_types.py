"""The types of the library: what mypy says of it, and of a program that uses it rightly and wrongly."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAM = """
from pathlib import Path
from typing import assert_type
import torch
from torch import Tensor
import diffusion_nb as dn

noise = dn.Noise(seeds=range(4), shape=(1, 8, 8))
model: dn.Denoiser = dn.Clip(dn.digit_denoiser())
assert_type(noise(0), Tensor)
assert_type(dn.ddpm(model, noise(0), dn.time_grid(10), noise=noise, y=torch.arange(4)), Tensor)
assert_type(dn.generate("out.npz", dn.CompiledDenoiser(model), dn.ddim, dn.time_grid(4), n=2, shape=(1, 8, 8)), bool)
schedule: dn.Schedule = dn.DDPMSchedule(dn.linear_betas())
trainer = dn.Trainer(dn.NetDenoiser(dn.UNet(1, 8, (1, 2)), schedule, dn.predict_v), noise(0), steps=2, batch=2, lr=lambda step: 1e-3)
dn.Model.load(Path("folder"))

dn.ddpm(3, noise(0), dn.time_grid(10), noise=noise)  # wrong: arg-type
dn.ddpm(model, noise(0), 10, noise=noise)  # wrong: arg-type
dn.ddim(model, noise(0))  # wrong: call-arg
dn.Noise(range(4), "1 8 8")  # wrong: arg-type
dn.CosineSchedule(nonsense=1)  # wrong: call-arg
dn.ddpmm  # wrong: attr-defined
label: int = dn.time_grid(10)  # wrong: assignment
"""


def test_mypy_is_clean_and_sees_what_a_user_does_wrong(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--python-executable", sys.executable, "diffusion_nb", program],
        cwd=ROOT,
        env=os.environ | {"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    found = re.findall(r"^(\S+?):(\d+): error: .*\[([a-z-]+)\]$", done.stdout, re.MULTILINE)
    assert found or done.returncode == 0, done.stdout + done.stderr
    lines = enumerate(PROGRAM.splitlines(), 1)
    wrong = [(str(n), line.rpartition("# wrong: ")[2]) for n, line in lines if "# wrong: " in line]
    assert [(n, kind) for path, n, kind in found if path.endswith("program.py")] == wrong, done.stdout
    assert all(path.endswith("program.py") for path, _, _ in found), done.stdout


def test_editors_know_the_names_at_the_top():
    done = subprocess.run([sys.executable, ROOT / "tools/stub.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
