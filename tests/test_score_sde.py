"""The published weights of score SDE: names and numbers of its program, what its networks say, averages, what is refused."""

import hashlib

import pytest
import torch
from torch import nn
from waves import wave

from diffusion_nb.models import score_sde
from diffusion_nb.models.model import fill
from diffusion_nb.models.score_sde import (
    PUBLISHED,
    RES,
    averaged,
    from_score_sde,
    in_their_order,
    load_score_sde,
    score_sde_denoiser,
)
from diffusion_nb.nets.song import SongUNet
from diffusion_nb.nets.unet import Attention, ResBlock
from diffusion_nb.schedules import SubVPSchedule, VESchedule, VPSchedule

F64 = torch.float64


def theirs_of(net: SongUNet) -> dict[str, torch.Size]:
    "The names of their tensors, in their order, with shapes."
    own, found = {k: v.shape for k, v in net.state_dict().items()}, {}
    for k, (name, part) in enumerate(in_their_order(net)):
        at = f"all_modules.{k}."
        if name == "fourier":
            found[f"{at}W"] = own["fourier.freqs"]
        elif isinstance(part, ResBlock):
            kept = {a: b for a, b in RES.items() if f"{name}.{a}.weight" in own}
            found |= {f"{at}{b}.{p}": own[f"{name}.{a}.{p}"] for a, b in kept.items() for p in ("weight", "bias")}
        elif isinstance(part, Attention):
            c = own[f"{name}.norm.weight"][0]
            found |= {f"{at}GroupNorm_0.{p}": (c,) for p in ("weight", "bias")}
            found |= {f"{at}NIN_{i}.{p}": shape for i in range(4) for p, shape in (("W", (c, c)), ("b", (c,)))}
        else:
            inner = "Conv2d_0." if name.startswith("pyramid") else ""
            found |= {f"{at}{inner}{p}": own[f"{name}.{p}"] for p in ("weight", "bias")}
    return {name: torch.Size(shape) for name, shape in found.items()}


@pytest.mark.parametrize("name, tensors, numbers, digest", [
    ("cifar10_ncsnpp_continuous", 571, 62_758_787, "49574aa4b07959c6"),
    ("cifar10_ncsnpp_deep_continuous", 963, 107_586_947, "28c7aa40f05e0cbb"),
    ("cifar10_ddpmpp_continuous_vp", 564, 61_804_419, "1b0c553be0fbaf79"),
    ("cifar10_ddpmpp_deep_continuous_subvp", 956, 106_632_579, "7abec93f0fb9a243"),
])  # fmt: skip
def test_the_networks_have_their_names_and_numbers(name, tensors, numbers, digest):
    "As their program makes them."
    blocks, ncsn, _ = PUBLISHED[name]
    with torch.device("meta"):
        net = SongUNet(3, 128, (1, 2, 2, 2), blocks, (1,), ncsn=ncsn)
    names = theirs_of(net)
    assert len(names) == tensors and sum(p.numel() for p in net.parameters()) == numbers
    assert hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:16] == digest


# What their program prints for weights and pictures that are waves.
PRINTED = {
    True: [4.323877322770405, 3.330135660680418, -6.173107488471783, 13.368218158047442, 1.1049709514329336, -0.41488763458119027],
    False: [0.7767558114260649, -10.145212994947608, 1.2350486997470658, -5.482283639604176, 5.088101460304792, 1.5878478139026901],
}  # fmt: skip


def waves(net: SongUNet) -> dict[str, torch.Tensor]:
    shapes = theirs_of(net)
    return {name: 0.2 * wave(*shapes[name], k=k) + (len(shapes[name]) == 1 and name.endswith("weight"))
            for k, name in enumerate(sorted(shapes))}  # fmt: skip


@pytest.mark.parametrize("ncsn", [True, False])
def test_the_networks_say_what_its_program_says(ncsn):
    net = SongUNet(3, 128, (1, 2), 1, (1,), ncsn=ncsn).double().eval()
    fill(net, from_score_sde(net, waves(net)), "waves")
    x, told = wave(2, 3, 8, 8), torch.tensor([0.3, 7.0] if ncsn else [0.3, 0.9], dtype=F64)
    out = net(x, told.log() if ncsn else 999 * told)
    torch.testing.assert_close(out.flatten()[::53][:6].detach(), torch.tensor(PRINTED[ncsn], dtype=F64), rtol=0, atol=1e-5)  # fmt: skip


class Says(SongUNet):
    "A network whose answer is its input and its time; fourier: NCSN++ or not."

    def __init__(self, ncsn: bool):
        nn.Module.__init__(self)
        self.fourier = nn.Identity() if ncsn else None

    def forward(self, x, t):
        self.told = t
        return x.sin()


def test_the_guess_is_that_of_their_score():
    "VE in their space, [0, 1]: the score is the network's answer over sigma, the guess x + sigma² score. VP: the answer is the noise."
    t, x = torch.tensor([0.3, 0.8], dtype=F64), wave(2, 3, 4, 4)
    model = score_sde_denoiser(Says(True), schedule := VESchedule(0.02, 100.0))
    sigma = schedule(t)[1][:, None, None, None] / 2
    theirs = (x + 1) / 2 + sigma**2 * (x.sin() / sigma)
    torch.testing.assert_close(model(x, t).x0, 2 * theirs - 1)
    torch.testing.assert_close(model.net.told, sigma.flatten().log())
    model = score_sde_denoiser(Says(False), VPSchedule())
    torch.testing.assert_close(model(x, t).eps, x.sin())
    torch.testing.assert_close(model.net.told, 999 * t)


def test_a_checkpoint_of_theirs_is_read_with_its_averages(tmp_path, monkeypatch):
    small = SongUNet(3, 16, (1, 2), 1, (1,), ncsn=True)
    monkeypatch.setattr(score_sde, "SongUNet", lambda *a, **kw: SongUNet(3, 16, (1, 2), 1, (1,), ncsn=kw["ncsn"]))
    theirs = {f"module.{k}": v.float() for k, v in waves(small).items()}
    trained = [k for k in theirs if not (k.endswith(".W") and theirs[k].ndim == 1)]
    shadow = [theirs[k] + 1 for k in trained]
    file, saved = tmp_path / "checkpoint.pth", {"model": {"module.sigmas": torch.ones(3), **theirs}, "step": 7,
                                                "ema": {"decay": 0.999, "num_updates": 3, "shadow_params": shadow}}  # fmt: skip
    torch.save(saved, file)
    model = load_score_sde(file, "cifar10_ncsnpp_continuous")
    own, want = model.net.state_dict(), from_score_sde(small, waves(small))
    assert own["fourier.freqs"].allclose(want["fourier.freqs"].float())  # no average is kept of it
    assert all(own[k].allclose(want[k].float() + 1) for k in own if k != "fourier.freqs")
    alpha, sigma = model.schedule(torch.tensor([0.0, 1.0]))
    assert sigma.tolist() == pytest.approx([0.02, 100.0]) and not model.training
    assert isinstance(load_score_sde(file, "cifar10_ncsnpp_deep_continuous").schedule, VESchedule)
    assert PUBLISHED["cifar10_ddpmpp_continuous_subvp"].schedule is SubVPSchedule
    saved["ema"]["shadow_params"] = shadow[:-1]
    with pytest.raises(ValueError, match="expected as many averages as trained tensors"):
        averaged(saved)
    torch.save(saved, file)
    (tmp_path / "half.pth").write_bytes(file.read_bytes()[:1000])
    for wrong, name, said in ((file, "cifar10_ncsnpp_continuous", "no checkpoint of cifar10_ncsnpp_continuous"),
                              (tmp_path / "half.pth", "cifar10_ncsnpp_continuous", "is damaged"), (file, "mine", "there are cifar10_ncsnpp_continuous")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            load_score_sde(wrong, name)
    with pytest.raises(FileNotFoundError):
        load_score_sde(tmp_path / "none.pth", "cifar10_ncsnpp_continuous")
