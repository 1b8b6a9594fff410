"""The Python of docs/guide.md runs as it stands, in order."""

import re
from pathlib import Path

GUIDE = Path(__file__).parents[1] / "docs/guide.md"


def test_the_guide_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    names = {"__name__": "guide"}
    for block in blocks:
        exec(compile(block, str(GUIDE), "exec"), names)
    assert len(blocks) == 7 and (tmp_path / "drawn.npz").exists() and (tmp_path / "digits.safetensors").exists()


def test_every_command_of_the_guide_is_understood():
    from diffusion_nb.cli.sample import Sample
    from diffusion_nb.cli.train import Train

    options = set(re.findall(r"(--[a-z0-9][a-z0-9-]+)", GUIDE.read_text(encoding="utf-8"))) - {"--nproc-per-node"}
    known = {f"--{n.rstrip('_').replace('_', '-')}" for kind in (Train, Sample) for n in kind.__dataclass_fields__} | {"--pictures"}  # fmt: skip
    assert options and options <= known, options - known
