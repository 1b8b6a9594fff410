"""How many calls of the library lie between a user and the denoiser: few, so that a traceback can be read."""

import sys

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from diffusion_nb.cli.main import main
from diffusion_nb.denoisers import Denoiser
from diffusion_nb.experiments.digits import digit_denoiser
from diffusion_nb.grids import time_grid
from diffusion_nb.samplers.linear import ddim


@pytest.fixture
def stacks():
    "The names of the library's functions at work, for each call of a denoiser by something else."
    seen = []

    def note(module, args):
        if isinstance(module, Denoiser):
            frame, names = sys._getframe(1), []
            while frame:
                if "/diffusion_nb/" in frame.f_code.co_filename:
                    names.append(frame.f_code.co_name)
                frame = frame.f_back
            if names[0] not in ("forward", "_guess"):  # a wrapper's
                seen.append(names)

    hook = register_module_forward_pre_hook(note)
    yield seen
    hook.remove()


def test_a_sampler(stacks):
    ddim(digit_denoiser(), torch.randn(2, 1, 8, 8), time_grid(3), y=torch.arange(2))
    assert set(map(tuple, stacks)) == {("linear_walk", "ddim")}


def test_train(stacks, tmp_path):
    assert main(["train", "--steps", "2", "--width", "8", "--device", "cpu", "--out", str(tmp_path)]) == 0
    steps = [s for s in stacks if "train_step" in s]
    assert len(steps) == 2 and max(map(len, steps)) <= 6, steps


def test_sample(stacks, tmp_path):
    assert main(["sample", "--n", "2", "--steps", "2", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert len(stacks) == 2 and max(map(len, stacks)) <= 6, stacks
