"""ControlNet: the identity at the start, the formula, what is frozen, what moves; recipes, the model in a folder, the commands; bad input."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from diffusion_nb.cli.main import main
from diffusion_nb.denoisers import NetDenoiser, predict_v
from diffusion_nb.guidance import CFG
from diffusion_nb.losses.simple import denoising_loss, snr_plus_one
from diffusion_nb.models.model import About, Model
from diffusion_nb.nets.controlnet import ControlNet, check_trained, outlines, strokes
from diffusion_nb.nets.song import SongUNet
from diffusion_nb.nets.unet import UNet
from diffusion_nb.nets.words import BagOfWords
from diffusion_nb.noise import Noise
from diffusion_nb.recipes.control import (
    ControlRecipe,
    ControlTraining,
    control_denoiser,
    control_trainer,
    controlled,
)
from diffusion_nb.schedules import CosineSchedule

NETS = {
    "labels": dict(channels=1, width=8, mults=(1, 2), blocks=1, attention=(1,), classes=3),
    "patches, three levels": dict(
        channels=2, width=8, mults=(1, 2, 3), blocks=2, attention=(0, 2), patch=2, scale_shift=True
    ),
    "ADM's changes of size": dict(
        channels=1, width=8, mults=(1, 2), blocks=1, attention=(1,), classes=3, biggan=True
    ),
}


def base_of(name="labels", dtype=torch.float64):
    "A network whose weights are all waves, none zero, as if trained."
    net = UNet(**NETS[name]).to(dtype)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(
                0.3
                * torch.randn(p.shape, generator=g, dtype=dtype)
                / max(1, p[0].numel() if p.ndim > 1 else 1) ** 0.5
                + (0.5 if p.ndim == 1 else 0)
            )
    return net


def inputs(name="labels", channels=1, n=3, dtype=torch.float64):
    x = Noise(range(n), (NETS[name]["channels"], 16, 16), dtype=dtype)(0)
    y = torch.arange(n) % 3 if "classes" in NETS[name] else None
    return (
        x,
        torch.linspace(30, 900, n, dtype=dtype),
        y,
        (Noise(range(n), (channels, 16, 16), dtype=dtype)(1) > 0).to(dtype),
    )


def waved(control, scale=0.2):
    "The control with all of its own weights moved, the joints too."
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in control.named_parameters():
            if not name.startswith("base."):
                p += scale * torch.randn(p.shape, generator=g, dtype=p.dtype)
    return control


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("levels", [0, 1, 2])
def test_a_fresh_control_changes_no_bit(name, levels):
    base = base_of(name, torch.float32)
    x, t, y, hint = inputs(name, 2, dtype=torch.float32)
    control = ControlNet(base, 2, levels)
    assert torch.equal(control(x, t, y, hint), base(x, t, y))
    waved(control)
    assert torch.equal(control(x, t, y), base(x, t, y))  # without a hint
    assert (control(x, t, y, hint) - base(x, t, y)).abs().max() > 0.01
    control.strength = 0.0
    assert torch.equal(control(x, t, y, hint), base(x, t, y))


class HintedStem(nn.Module):
    def __init__(self, stem, added):
        super().__init__()
        self.stem, self.added = stem, added

    def forward(self, x):
        return self.stem(x) + self.added


@pytest.mark.parametrize("strength", [1.0, 0.7])
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("levels", [0, 1, 2])
def test_the_formula(name, levels, strength):
    "A whole network put together from the copy's parts makes the features; each passes its joint."
    base = base_of(name)
    x, t, y, hint = inputs(name, 2)
    control = waved(ControlNet(base, 2, levels, strength))
    twin = copy.deepcopy(base)
    twin.stem = HintedStem(control.stem, control.read(F.pixel_unshuffle(hint, base.patch)))
    twin.down = nn.ModuleList([*control.down, *twin.down[len(control.down) :]])
    copied = len(control.down) == len(base.down)
    twin.middle = control.middle if copied else twin.middle
    h_c, pile_c, _ = twin.encode(x, t, y)
    h, pile, told = base.encode(x, t, y)
    for k in range(len(control.down) + 1):
        pile[k] = pile[k] + strength * control.out[k](pile_c[k])
    h = h + strength * control.out[-1](h_c) if copied else h
    assert len(control.out) == len(control.down) + 1 + copied
    assert torch.allclose(control(x, t, y, hint), base.decode(h, pile, told), atol=1e-12, rtol=0)


def test_levels_end_behind_their_change_of_size():
    name = "patches, three levels"  # two blocks, a change of size, and so on
    assert [len(ControlNet(base_of(name), 1, levels).down) for levels in (0, 1, 2, 3)] == [8, 3, 6, 8]
    assert [bool(ControlNet(base_of(name), 1, levels).middle) for levels in (0, 1, 2, 3)] == [
        True,
        False,
        False,
        True,
    ]


def step_of(control, hint, y, lr=0.05):
    "One step of gradient descent; which of the control's weights have a gradient."
    net, x0 = control.net, Noise(range(4), (1, 8, 8), dtype=torch.float64)(2)
    loss = denoising_loss(
        control,
        x0,
        torch.tensor([0.2, 0.4, 0.6, 0.8]),
        Noise(range(4), (1, 8, 8), dtype=torch.float64)(3),
        weight=snr_plus_one,
        y=y,
        hint=hint,
    ).mean()
    net.zero_grad()
    loss.backward()
    found = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    with torch.no_grad():
        for p in net.parameters():
            if p.grad is not None:
                p -= lr * p.grad
    return found, [p.grad.clone() for p in net.out.parameters()]


def test_first_the_joints_move_then_all_and_never_the_base():
    y, hint = torch.arange(4) % 3, (Noise(range(4), (1, 8, 8), dtype=torch.float64)(1) > 0).double()
    control = controlled(NetDenoiser(base_of(), CosineSchedule(), predict_v), 1)
    names = {name for name, _ in control.net.named_parameters() if not name.startswith("base.")}
    first, grads = step_of(control, hint, y)
    second, _ = step_of(control, hint, y)
    assert first == {n for n in names if n.startswith("out.")} and len(first) == 2 * len(control.net.out)
    assert second == names
    other, theirs = step_of(controlled(NetDenoiser(base_of(), CosineSchedule(), predict_v), 1), 0 * hint, y)
    assert other == first and all(
        torch.equal(g, h) for g, h in zip(grads, theirs, strict=True)
    )  # the hint is not known yet


def test_training_leaves_the_base_as_it_is(tmp_path):
    x = Noise(range(20), (1, 8, 8))(0).clamp(-1, 1)
    control = controlled(NetDenoiser(base_of("labels", torch.float32), CosineSchedule(), predict_v), 1)
    before, r = copy.deepcopy(control.state_dict()), ControlTraining(steps=6, batch=8, dropped=0.5)
    make = lambda control, steps=6: control_trainer(
        replace(r, steps=steps),
        x,
        torch.arange(20) % 3,
        denoiser=control,
        hint=strokes(x),
        device="cpu",
        checkpoint=tmp_path / "c.safetensors",
        save_every=3,
    )
    again = copy.deepcopy(control)
    trained = make(control).fit()
    for net in (trained, control):
        for name, v in net.state_dict().items():
            assert torch.equal(v, before[name]) == name.startswith("net.base."), name
    assert not any(p.requires_grad for p in trained.parameters()) and not control.net.base.training
    whole = make(again, 6)  # goes on from the checkpoint, whose last step it finds
    assert whole.step == 6 and torch.equal(whole.denoiser.net.read.weight, control.net.read.weight)
    assert whole.batches.null["y"] == 3


def test_the_base_stays_in_eval_mode():
    net = UNet(1, 8, (1, 2), 1, (1,), dropout=0.5)
    control = ControlNet(net).train()
    assert control.training and control.down.training and not any(m.training for m in net.modules())
    assert not any(p.requires_grad for p in net.parameters())
    assert all(p.requires_grad for name, p in control.named_parameters() if not name.startswith("base."))


def test_own_state_is_all_but_the_base():
    control = waved(ControlNet(base_of()))
    x, t, y, hint = inputs()
    other = ControlNet(base_of())
    said = other.load_state_dict(control.own_state(), strict=False)
    assert all(name.startswith("base.") for name in said.missing_keys) and not said.unexpected_keys
    assert torch.equal(other(x, t, y, hint), control(x, t, y, hint))


def test_guidance_takes_the_hint_to_both_sides():
    control = NetDenoiser(waved(ControlNet(base_of())), CosineSchedule(), predict_v)
    x, _, y, hint = inputs()
    t = torch.tensor(0.5, dtype=torch.float64)
    told, free = control(x, t, y=y, hint=hint), control(x, t, y=torch.full_like(y, 3), hint=hint)
    assert torch.allclose(
        CFG(control, 2.0, 3)(x, t, y=y, hint=hint).x0, told.x0 + 2 * (told.x0 - free.x0), atol=1e-12
    )


def test_hints():
    x = torch.tensor([[-1.0, -0.3], [0.0, 0.5]]).reshape(1, 1, 2, 2)
    assert strokes(x).tolist() == [[[[0, 0], [0, 1]]]]
    colour = torch.cat([x, torch.full_like(x, -1.0), torch.full_like(x, -0.9)], 1)
    assert outlines(colour).tolist() == [[[[1, 1], [0, 0]]]]
    assert outlines(colour, -0.5).tolist() == [[[[1, 0], [0, 0]]]]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (lambda c, x, t, y, h: c(x, t, y, h[:, :, :8]), "hint: expected floats"),
        (lambda c, x, t, y, h: c(x, t, y, h > 0), "hint: expected floats"),
        (lambda c, x, t, y, h: c(x, t, y, h[:1]), "hint: expected floats"),
        (lambda c, x, t, y, h: c(x, t, None, h), "y: expected a label"),
        (lambda c, x, t, y, h: c(x, t, y + 9, h), "y"),
        (lambda c, x, t, y, h: ControlNet(base_of(), 1, 3), "levels from 0 to 2"),
        (lambda c, x, t, y, h: ControlNet(base_of(), 0), "channels from 1"),
        (lambda c, x, t, y, h: ControlNet(nn.Conv2d(1, 1, 1)), "expected a UNet, got Conv2d"),
        (lambda c, x, t, y, h: check_trained(UNet(1, 8, (1, 2), 1)), "expected a trained network"),
        (
            lambda c, x, t, y, h: controlled(
                NetDenoiser(SongUNet(1, 8, (1, 1), 1, ()), CosineSchedule(), predict_v), 1
            ),
            "expected a UNet",
        ),
    ],
)
def test_bad_input(bad, said):
    with pytest.raises(ValueError, match=said):
        bad(ControlNet(base_of()), *inputs())


@pytest.mark.parametrize("words", [(), ("apple", "red")])
def test_a_controlled_model_in_a_folder(words, tmp_path):
    r = ControlRecipe(
        width=8, mults=(1, 2), attention=(1,), classes=0 if words else 3, words=words, levels=1, hint=2
    )
    made = control_denoiser(r, (1, 16, 16))
    waved(made.net)
    Model(made, About("control", r, (1, 16, 16))).save(tmp_path)
    loaded = Model.load(tmp_path).denoiser
    x, t, _, hint = inputs(channels=2, dtype=torch.float32)
    assert isinstance(made.net.label, BagOfWords if words else nn.Embedding)
    y = made.net.label.told(["red apple"] * 3) if words else torch.arange(3)
    assert torch.equal(loaded.net(x, t, y, hint), made.net(x, t, y, hint))


def test_the_commands(tmp_path, monkeypatch, capsys):
    "Train a control of a model of digits, and draw with it from a picture."
    monkeypatch.chdir(tmp_path)
    assert main("train --control digits --steps 2 --batch 4 --device cpu".split()) == 0
    model = Model.load("runs/control-digits")  # a folder of its own, beside runs/digits
    assert model.about.family == "control" and model.about.start == "digits" and model.about.recipe.steps == 2
    white = np.zeros((8, 8), np.uint8)
    white[2:6, 3] = 255
    Image.fromarray(white).save("strokes.png")
    draw = "sample --model runs/control-digits --n 3 --steps 2 --sampler ddim --device cpu"
    assert main(f"{draw} --hint strokes.png --out a".split()) == 0 and main(f"{draw} --out b".split()) == 0
    assert (
        main("sample --model digits --hint strokes.png".split()) != 0
        and "takes no hint" in capsys.readouterr().err
    )
    assert main(f"{draw} --hint nothing --out c".split()) != 0 and "expected a picture" in capsys.readouterr().err
    assert (
        main("train --control mnist --data digits".split()) != 0
        and "pictures of shape (1, 8, 8)" in capsys.readouterr().err
    )
    for other in ("--vdm", "--dit"):
        assert main(f"train --control digits {other}".split()) != 0 and "say one" in capsys.readouterr().err
