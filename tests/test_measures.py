"""What is measured and shown, against small examples and other formulas."""

import sys
from types import SimpleNamespace

import pytest
import torch

from diffusion_nb import data
from diffusion_nb.metrics.features import frechet_distance, inception_fid, nearest_distance
from diffusion_nb.metrics.samples import energy_distance, typicality
from diffusion_nb.noise import Noise
from diffusion_nb.util.images import to_bytes


def test_bytes_come_back():
    levels = torch.arange(256)
    for nudge in (-0.4, 0, 0.4):
        assert torch.equal(to_bytes((levels + nudge) / 127.5 - 1).long(), levels)
    assert to_bytes(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_too_few_samples_are_said():
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="b: 8 samples of 8 features have a singular covariance"):
        frechet_distance(x, x[:8])
    for bad, said in (
        (x[:1], "at least 2 samples"),
        (x[:, :5], "same features"),
        (x / 0, "NaN or infinite"),
        (x[0], "same features"),
    ):
        with pytest.raises(ValueError, match=said):
            frechet_distance(x, bad)


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
    assert type(energy_distance(x, y)) is float
    assert energy_distance(x, y) == 2 * (
        2 * 1.5 - 1 - 3
    )  # across 0 3 1 2, within 1 and 3; a point with itself is no pair


def test_a_typical_set():
    x, y = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0, 4.0])  # means 1 and 2, variances 2 and 3
    assert abs(typicality(lambda x: x, x, y) + 1 / 2**0.5) < 1e-6


def test_what_the_fid_is_told(monkeypatch):
    told = []

    class Fid:
        def __init__(self, normalize):
            assert normalize

        def to(self, device):
            return self

        def update(self, x, real):
            told.append((x, real))

        def compute(self):
            return torch.tensor(3.0)

    monkeypatch.setitem(sys.modules, "torchmetrics", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torchmetrics.image", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", SimpleNamespace(FrechetInceptionDistance=Fid))
    real, fake = torch.linspace(-1, 1, 12).reshape(3, 1, 2, 2), torch.full((2, 1, 2, 2), 3.0)
    card = inception_fid(real, fake, batch=2)
    assert [(len(x), is_real) for x, is_real in told] == [(2, True), (1, True), (2, False)]
    torch.testing.assert_close(torch.cat([x for x, _ in told[:2]]), (real + 1).expand(-1, 3, -1, -1) / 2)
    assert told[2][0].eq(1).all() and (card.value, card.n) == (3, 2) and isinstance(card.value, float | int)


def test_pictures_held_out_are_always_the_same():
    d = data.digits()
    assert d.y_test[:10].tolist() == [4, 0, 7, 8, 7, 2, 3, 6, 1, 5] and d.y[:5].tolist() == [4, 8, 4, 9, 1]


def test_colours_of_cifar10(monkeypatch):
    def part(root, train):
        return SimpleNamespace(
            data=torch.arange(12).reshape(1, 2, 2, 3).byte().numpy() + 20 * (not train), targets=[3 + train]
        )

    monkeypatch.setattr("torchvision.datasets.CIFAR10", part)
    monkeypatch.setattr(data, "_fetch", lambda name: None)
    d = data.cifar10()
    assert torch.allclose((d.x[0, 1] + 1) * 127.5, torch.tensor([[1.0, 4], [7, 10]]))  # green
    assert torch.allclose((d.x_test - d.x) * 127.5, torch.tensor(20.0)) and (d.y.item(), d.y_test.item()) == (4, 3)
