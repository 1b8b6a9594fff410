"""What is measured and shown, against small examples and other formulas."""

import torch

from diffusion_nb.metrics.features import frechet_distance, nearest_distance
from diffusion_nb.metrics.samples import energy_distance
from diffusion_nb.noise import Noise
from diffusion_nb.util.images import to_bytes


def test_bytes_come_back():
    levels = torch.arange(256)
    for nudge in (-0.4, 0, 0.4):
        assert torch.equal(to_bytes((levels + nudge) / 127.5 - 1).long(), levels)
    assert to_bytes(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_frechet_distance():
    a, b = (Noise(range(200), (3,), dtype=torch.float64)(k) for k in range(2))
    b = b @ torch.tensor([[1.0, 2, 0], [0, 1, 0], [-1, 0, 3]]).double() + 0.5
    c1, c2 = a.T.cov(), b.T.cov()
    cross = torch.linalg.eigvals(c1 @ c2).real.sqrt().sum()  # the trace of (c1 c2)^½, with no symmetric product
    want = (a.mean(0) - b.mean(0)).square().sum() + (c1 + c2).trace() - 2 * cross
    assert abs(frechet_distance(a, b) - want) < 1e-9 and abs(frechet_distance(a, a)) < 1e-9


def test_nearest_distance():
    x, reference = (torch.tensor(v).reshape(-1, 1, 1, 1) for v in ([0.0, 10.0], [1.0, 10.0, 11.0, 50.0]))
    assert nearest_distance(x, reference) == 0.5  # 1 from the first, 0 from the second


def test_energy_distance():
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [3.0]])
    assert energy_distance(x, y) == 2 * (
        2 * 1.5 - 1 - 3
    )  # across 0 3 1 2, within 1 and 3; a point with itself is no pair
