"""EDM2's network: the names, numbers and answers of its program; what keeps its magnitude; what is refused."""

import hashlib

import pytest
import torch
from waves import wave

from diffusion_nb.models import edm
from diffusion_nb.models.edm import WIDTHS, edm2_names, load_edm2
from diffusion_nb.models.model import fill
from diffusion_nb.nets.edm2 import EDM2UNet, MPConv, mp_cat, mp_silu, mp_sum, unit

F64 = torch.float64


def waves(net: EDM2UNet, size: int) -> dict[str, torch.Tensor]:
    "Their tensors by our names, each a wave that begins at its place in the list of their names."
    own, table = net.state_dict(), edm2_names(net, size)
    places = {name: k for k, name in enumerate(sorted(table.values()))}
    made = {a: wave(*own[a].shape, k=places[b]) for a, b in table.items()}
    return {a: 0.5 + 0.2 * v if v.ndim == 0 else v for a, v in made.items()}


@pytest.mark.parametrize("width, classes, channels, tensors, numbers, digest", [
    ("xs", 1000, 4, 200, 124_713_125, "9270a616814772fa"),
    ("s", 1000, 4, 200, 280_212_709, "9270a616814772fa"),
    ("s", 0, 4, 199, 279_444_709, "3c06e3079b9f96e6"),
    ("xxl", 1000, 4, 200, 1_523_164_645, "9270a616814772fa"),
    ("s", 1000, 3, 200, 280_209_253, "9270a616814772fa"),
])  # fmt: skip
def test_the_network_has_their_names_and_numbers(width, classes, channels, tensors, numbers, digest):
    "As their program makes them."
    with torch.device("meta"):
        net = EDM2UNet(channels, WIDTHS[width], classes=classes)
    names = sorted(edm2_names(net, 64).values())
    assert len(names) == tensors and sum(p.numel() for p in net.parameters()) == numbers
    assert hashlib.sha256("\n".join(names).encode()).hexdigest()[:16] == digest


# What their program prints for weights and pictures that are waves. In training it makes the stored weights of unit length first, which rounds otherwise.
PRINTED = {
    False: [83.73928256300745, 449.35957305828646, -462.3364940641847, 318.7153089987102, -391.7595232336507, 268.1199200954196],
    True: [83.84840289596798, 449.3635700150144, -462.2757303126177, 318.64652097986675, -390.44975471897277, 264.13559598776413],
}  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
def test_the_network_says_what_its_program_says(training):
    net = EDM2UNet(3, 16, (1, 2), 1, (1,), 8, classes=5).double().train(training)
    fill(net, waves(net, 16), "waves")
    out = net(wave(2, 3, 16, 16), torch.tensor([0.3, 7.0], dtype=F64).log() / 4, torch.tensor([1, 4]))
    torch.testing.assert_close(out.flatten()[::241][:6].detach(), torch.tensor(PRINTED[training], dtype=F64), rtol=1e-9, atol=0)  # fmt: skip
    lengths = [m.weight.square().flatten(1).mean(1) for m in net.modules() if isinstance(m, MPConv)]
    assert all((v - 1).abs().max() < 1e-3 for v in lengths) == training


def test_what_keeps_its_magnitude():
    "Mean squares of 40,000 normal numbers: 1, within five standard errors; of SiLU, 0.596² by quadrature."
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 200, 200, generator=g, dtype=F64)
    size = lambda v: v.square().mean()
    for v in (mp_sum(a, b), mp_sum(a, b, 0.3), mp_silu(a)):
        assert abs(size(v) - 1) < 5 * v.square().std() / v.numel() ** 0.5 + 2e-3
    torch.testing.assert_close(size(unit(a, (1,))), torch.ones((), dtype=F64), rtol=1e-3, atol=0)
    both = mp_cat(a.reshape(1, 200, 200, 1), b[:50].reshape(1, 50, 200, 1))
    assert both.shape == (1, 250, 200, 1)
    first, second = both[:, :200].square().sum(), both[:, 200:].square().sum()
    assert abs(first / second - 1) < 0.1 and abs(size(both) - 1) < 0.1
    for net in (MPConv(200, 30), MPConv(200, 30).train()):
        out = net.double()(a)
        assert abs(size(out) - 1) < 0.1 and size(net(a, gain=3.0)).item() == pytest.approx(9 * size(out).item())


def test_the_published_file_becomes_a_denoiser(tmp_path, monkeypatch):
    monkeypatch.setattr(edm, "EDM2UNet", lambda channels, width, classes: EDM2UNet(channels, width, (1, 2), 1, (1,), 8, classes=classes))  # fmt: skip
    net = EDM2UNet(3, 16, (1, 2), 1, (1,), 8, classes=5)
    table = edm2_names(net, 64)
    saved = {table[a]: v.half() for a, v in waves(net, 64).items()} | {"logvar_linear.weight": torch.ones(1, 128)}
    torch.save(saved, tmp_path / "edm2.pt")
    model = load_edm2(tmp_path / "edm2.pt", width=16, channels=3, classes=5)
    assert all(v.equal(saved[table[a]].float()) for a, v in model.net.state_dict().items() if a in table)
    x, t, y = wave(1, 3, 8, 8).float(), torch.tensor(0.5, dtype=F64), torch.tensor([2])
    sigma = model.schedule(t)[1].item()
    inside = model.net(x / (sigma**2 + 0.25) ** 0.5, torch.tensor([sigma]).log() / 4, y)
    want = 0.25 / (sigma**2 + 0.25) * x + sigma * 0.5 / (sigma**2 + 0.25) ** 0.5 * inside
    torch.testing.assert_close(model(x, t, y=y).x0, want, rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="width: expected one of xs, s, m, l, xl, xxl"):
        load_edm2(tmp_path / "edm2.pt", width="xsmall")
    with pytest.raises(ValueError, match="edm2.pt"):
        load_edm2(tmp_path / "edm2.pt", width=16, channels=4, classes=5)


def test_what_the_network_refuses():
    net, x, t = EDM2UNet(3, 8, (1, 2), 1, (), 8, classes=2), torch.zeros(1, 3, 8, 8), torch.zeros(1)
    free = EDM2UNet(3, 8, (1, 2), 1, (), 8)
    assert net(x, t, torch.tensor([2])).shape == free(x, t).shape == x.shape
    for call, said in ((lambda: net(x, t), "expected a label"), (lambda: net(x, t, torch.tensor([3])), "y: "),
                       (lambda: free(x, t, torch.tensor([0])), "without classes"), (lambda: free(x[..., :7], t), "multiples of 2; got 8×7")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            call()
