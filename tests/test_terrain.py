"""The published consistency model of terrain: what its network is told; its own numbers, where its package is installed."""

import importlib.util

import pytest
import torch

from diffusion_nb.grids import sigma_grid
from diffusion_nb.models import terrain
from diffusion_nb.models.terrain import PACKAGE, TerrainConsistency, load_terrain
from diffusion_nb.noise import Noise
from diffusion_nb.samplers.consistency import consistency_sample


class Session:
    "Stands in for the network; keeps what it was told."

    def run(self, names, inputs):
        assert names == ["denoised"]
        self.told = inputs
        return [inputs["noisy"] / inputs["sigma"][:, None, None, None]]


def test_what_the_network_is_told():
    f, x = TerrainConsistency(session := Session()), torch.ones(2, 1, 4, 4)
    t = torch.tensor([1.0, 0.5], dtype=torch.float64)
    out = f(x, t, y=torch.tensor([1, 100]))
    sigma = f.schedule(t)[1]
    assert session.told["sigma"].tolist() == pytest.approx(sigma.tolist()) and abs(sigma[0] - 80) < 1e-4
    assert session.told["difficulty"].tolist() == [0.0, 1.0] and all(v.dtype.name == "float32" for v in session.told.values())  # fmt: skip
    torch.testing.assert_close(out, x / sigma[:, None, None, None].float())
    for y in (torch.tensor([0, 1]), torch.tensor([1, 101]), torch.tensor([0.5, 1.0])):
        with pytest.raises(ValueError, match="whole numbers from 1 to 100"):
            f(x, t, y=y)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(terrain, "PACKAGE", "no_such_package")
    with pytest.raises(ImportError, match="pip install adaptive-terrain-diffusion onnxruntime"):
        load_terrain()


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, (PACKAGE, "onnxruntime"))),
    reason="needs pip install adaptive-terrain-diffusion onnxruntime",
)
def test_terrain_in_one_call():
    "At its smallest noise it returns what it is given, its boundary condition; a rougher one has steeper slopes; one call and two draw alike, not the same."
    f, noise, y = load_terrain(), Noise(range(4), (1, 128, 128)), torch.tensor([5, 5, 95, 95])
    once, twice = (consistency_sample(f, 80 * noise(0), sigma_grid(f.schedule, *sigmas), noise=noise, y=y) for sigmas in ([80.0], [80.0, 0.5]))  # fmt: skip
    assert (f(once, torch.tensor(0.0), y=y) - once).abs().max() < 1e-6
    slope = once.diff(dim=3).abs().mean((1, 2, 3))
    assert slope[2:].min() > slope[:2].max() and once.abs().max() < 1.2
    assert 0.01 < (twice - once).square().mean().sqrt() < 0.4 < once.std() * 2
