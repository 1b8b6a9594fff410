"""The command line on systems of several parts: latents and their codec, captions, controls of models of captions."""

import json

import pytest
import torch
from safetensors.torch import load_file

from diffusion_nb.cli import tasks
from diffusion_nb.cli.main import main
from diffusion_nb.codecs import fit_codec
from diffusion_nb.data import digits
from diffusion_nb.denoisers import Clip
from diffusion_nb.generation.generate import draw, generate
from diffusion_nb.grids import even_logsnr_grid
from diffusion_nb.models.model import Model
from diffusion_nb.noise import Noise
from diffusion_nb.samplers.linear import dpmpp_2m

CPU = ["--device", "cpu"]
SHORT = ["--steps", "3", "--batch", "8", *CPU]


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    "A codec of digits and a model of its latents, trained for three steps."
    folder = tmp_path_factory.mktemp("latent")
    train = ["train", "--data", "digits", "--recipe", "mnist", *SHORT]
    assert main([*train, "--codec", "--out", str(folder / "codec")]) == 0
    assert main([*train, "--latent", str(folder / "codec"), "--out", str(folder / "model")]) == 0
    return folder


def test_a_codec_comes_back_as_it_was_fitted(latent):
    x, model = digits().x, Model.load(latent / "codec")
    assert model.about.family == "codec" and model.about.shape == (1, 8, 8)
    z = model.denoiser.encode(x)
    again = fit_codec(model.denoiser.autoencoder, x)
    assert torch.allclose(again.shift, model.denoiser.shift, atol=1e-6)
    assert torch.allclose(again.scale, model.denoiser.scale, rtol=1e-5)
    assert z.shape == (len(x), 4, 2, 2) and z.mean((0, 2, 3)).abs().max() < 1e-4


def test_what_is_drawn_of_latents_is_decoded(latent, tmp_path):
    assert main(["sample", "--model", str(latent / "model"), "--n", "3", "--label", "7", "--steps", "4", "--film", "--out", str(tmp_path), *CPU]) == 0  # fmt: skip
    found, model = load_file(tmp_path / "samples.safetensors"), Model.load(latent / "model")
    assert model.about.shape == (4, 2, 2) and model.about.recipe.classes == 10
    ts = even_logsnr_grid(model.denoiser.schedule, 4)
    z = draw(Clip(model.denoiser, -6, 6), dpmpp_2m, ts, torch.arange(3), (4, 2, 2), {"y": torch.full((3,), 7)})
    with torch.no_grad():
        want = model.codec.denoiser.decode(z)
    assert torch.allclose(found["pictures"], want, atol=1e-5) and found["labels"].tolist() == [7, 7, 7]
    assert (tmp_path / "film.gif").stat().st_size > 1000
    assert json.loads((tmp_path / "run.json").read_text())["sampler"] == "dpmpp_2m"


def test_another_codec_is_another_run(latent, tmp_path):
    model = Model.load(latent / "model")
    ts, codec = even_logsnr_grid(model.denoiser.schedule, 2), model.codec.denoiser
    options = dict(cond={"y": torch.arange(2)}, decode=codec.decode)
    assert generate(tmp_path / "a.npz", model.denoiser, dpmpp_2m, ts, 2, (4, 2, 2), **options)
    codec.scale.mul_(2)
    with pytest.raises(ValueError, match="holds another run .sampler"):
        generate(tmp_path / "a.npz", model.denoiser, dpmpp_2m, ts, 2, (4, 2, 2), **options)


def test_latents_that_decode_to_no_pictures(latent, tmp_path):
    model = Model.load(latent / "model")
    ts = even_logsnr_grid(model.denoiser.schedule, 2)
    with pytest.raises(ValueError, match=r"decode: expected pictures \(2, c, h, w\); got \(2,\)"):
        generate(tmp_path / "a.npz", model.denoiser, dpmpp_2m, ts, 2, (4, 2, 2), cond={"y": torch.arange(2)}, decode=lambda z: z.sum((1, 2, 3)))  # fmt: skip


@pytest.mark.parametrize(
    "words, said",
    [
        ("train --data digits --latent digits", "expected a codec of pictures of shape (1, 8, 8)"),
        ("train --data digits --latent {}/codec --codec", "--codec and --latent are kinds of models: say one"),
        ("train --data digits --codec --recipe mnist --report", "not of family codec"),
        ("train --data digits --codec --recipe mnist --from digits", "--from: not with --codec"),
        ("train --data digits --codec --recipe mnist --width 8", "--width: this kind of model has several"),
        ("train --data digits --codec", "has no section [codec.digits]"),
        ("train --data emoji --dit", "--dit: emoji have captions, not labels"),
        ("train --data emoji --size 48", "emoji are 32 or 64 pixels wide; got 48"),
        ("sample --model {}/codec", "a codec draws nothing by itself; train --latent"),
        ("bits --model {}/model", "one of captions, of latents, or with a control has none here"),
    ],
)
def test_what_does_not_go_together(words, said, latent, capsys):
    assert main(words.format(latent, latent).split()) == 1
    assert said in capsys.readouterr().err


@pytest.fixture
def two_captions(monkeypatch):
    "Sixteen pictures of two captions, instead of those of all emoji."
    x = Noise(range(16), (3, 32, 32))(0).tanh()
    asked = tasks.Asked(x, None, ["red apple", "green heart"] * 8, None, (3, 32, 32), 256)
    monkeypatch.setattr(tasks, "asked_emoji", lambda size: asked)


def test_a_model_of_captions_and_its_control(two_captions, tmp_path):
    model, control, drawn = (str(tmp_path / name) for name in ("model", "control", "drawn"))
    train = ["train", "--data", "emoji", *SHORT]
    assert main([*train, "--width", "8", "--out", model]) == 0
    about = Model.load(model).about
    assert about.family == "captions" and set(about.recipe.words) == {"red", "apple", "green", "heart"}
    assert main([*train, "--control", model, "--out", control]) == 0
    net, base = Model.load(control).denoiser.net, Model.load(model).denoiser.net
    assert all(torch.equal(v, base.state_dict()[k]) for k, v in net.base.state_dict().items())
    assert any(z.weight.abs().max() > 0 for z in net.out)
    assert main(["sample", "--model", control, "--prompt", "red heart", "--n", "1", "--steps", "2", "--out", drawn, *CPU]) == 0  # fmt: skip
    assert load_file(f"{drawn}/samples.safetensors")["pictures"].isfinite().all()


def test_a_control_of_the_wrong_kind(two_captions, capsys):
    assert main(["train", "--data", "emoji", "--control", "cifar10", *SHORT]) == 1
    assert "expected a captions model of pictures of shape (3, 32, 32); got a diffusion model" in capsys.readouterr().err  # fmt: skip
