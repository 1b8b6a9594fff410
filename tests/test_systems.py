"""The command line on systems of several parts: latents and their codec, captions, controls of models of captions."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import normalize

from diffusion_nb.cli import sample as cli_sample
from diffusion_nb.cli import systems, tasks
from diffusion_nb.cli.main import main
from diffusion_nb.cli.models import load_model
from diffusion_nb.cli.stages import in_stages
from diffusion_nb.cli.texts import written
from diffusion_nb.codecs import fit_codec
from diffusion_nb.data import digits
from diffusion_nb.denoisers import Clip, NetDenoiser, predict_v
from diffusion_nb.experiments import clip as lab
from diffusion_nb.experiments.cascade import emoji_upsampler, enlarge_emoji
from diffusion_nb.experiments.cold import cold_mnist, draw_cold
from diffusion_nb.experiments.pictures import by_2m
from diffusion_nb.experiments.words import as_tokens, as_words, draw_words, word_net
from diffusion_nb.generation.generate import draw, generate
from diffusion_nb.grids import even_logsnr_grid
from diffusion_nb.models.model import About, Model
from diffusion_nb.nets.unet import UNet
from diffusion_nb.noise import Noise
from diffusion_nb.recipes.cascade import UpsamplerRecipe, upsampler_denoiser
from diffusion_nb.recipes.cold import ColdModel, ColdRecipe, grey_levels
from diffusion_nb.recipes.unclip import UnclipNets, unclip_model
from diffusion_nb.recipes.words import WordsRecipe, fill_holes
from diffusion_nb.samplers.linear import dpmpp_2m
from diffusion_nb.schedules import CosineSchedule

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
        ("train --data emoji --vdm", "--vdm: emoji have captions, not labels"),
        ("train --data emoji --cold", "--cold: emoji have captions, not labels"),
        ("train --data words --codec", "--codec: not for texts"),
        ("train --data words --report", "not of family words"),
        ("train --data digits --upsampler --from digits", "--from: not with --upsampler"),
        ("train --data digits --cold", "has no section [25_cold.digits]"),
        ("sample --model digits --large digits", "--large: expected emoji-upsampler"),
        ("sample --model digits --large emoji-upsampler", "draws pictures of shape (3, 64, 64)"),
        ("sample --model {}/model --large emoji-upsampler", "this model draws latents"),
        ("sample --model emoji-upsampler", "say --large emoji-upsampler"),
        ("sample --model digits --film --large emoji-upsampler", "--film: not with --large"),
        ("sample --model cold-mnist --sampler ddpm", "a cold model draws with the sampler cold"),
        (
            "sample --model digits --sampler cold",
            "a cold model draws with the sampler cold, and no other model does",
        ),
        ("sample --model cold-mnist --guidance 1", "not for a cold model"),
        ("sample --model words --prompt xx", "expected texts of 5 of the letters"),
        ("sample --model words --prompt ;", "expected a text with holes, such as s___e; got none"),
        ("sample --model words --film --label 3", "--label, --film: not for a network of texts"),
        ("bits --model words", "one of captions, of latents"),
        ("bits --model cold-mnist", "a cold model is no denoiser of a chain"),
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


def test_a_transformer_draws_from_captions(two_captions, tmp_path):
    model = str(tmp_path / "model")
    assert main(["train", "--data", "emoji", "--dit", "--width", "16", *SHORT, "--out", model]) == 0
    made = Model.load(model)
    assert made.about.family == "dit-captions" and set(made.about.recipe.words) == {
        "red",
        "apple",
        "green",
        "heart",
    }
    assert main(["sample", "--model", model, "--prompt", "red heart", "--n", "1", "--steps", "2", "--out", str(tmp_path / "x"), *CPU]) == 0  # fmt: skip
    net, x, t = made.denoiser.net, Noise(range(2), (3, 32, 32))(0), torch.full((2,), 300.0)
    torch.nn.init.normal_(net.head.weight), torch.nn.init.normal_(net.blocks[0].modulation.linear.weight)
    a, b = net(x, t, net.label.told(["red apple", "green heart"])), net(x, t, net.label.told(["red apple", "red apple"]))  # fmt: skip
    assert torch.equal(a[0], b[0]) and not torch.allclose(a[1], b[1])
    with pytest.raises(ValueError, match="expected a label for each picture"):
        net(x, t)


# stages that enlarge


def test_a_stage_is_trained_and_enlarges(tmp_path, two_captions):
    stage, model = str(tmp_path / "stage"), str(tmp_path / "model")
    assert main(["train", "--data", "emoji", "--upsampler", "--width", "8", *SHORT, "--out", stage]) == 0
    assert Model.load(stage).about.family == "upsampler"
    assert main(["train", "--data", "digits", *SHORT, "--out", model]) == 0
    drawn = ["sample", "--model", model, "--n", "1", "--out", str(tmp_path / "x"), *CPU]
    assert main([*drawn, "--large", stage]) == 1


def test_large_pictures_are_those_of_the_notebook(tmp_path):
    draw_it = [
        "sample",
        "--model",
        "emoji",
        "--prompt",
        "red apple",
        "--n",
        "2",
        "--seed",
        "7",
        "--steps",
        "4",
        *CPU,
    ]
    assert main([*draw_it, "--out", str(tmp_path / "small")]) == 0
    assert main([*draw_it, "--large", "emoji-upsampler", "--out", str(tmp_path / "large")]) == 0
    small, large = (load_file(tmp_path / f"{name}/samples.safetensors")["pictures"] for name in ("small", "large"))
    want = enlarge_emoji(emoji_upsampler(), small, first=7)
    assert large.shape == (2, 3, 64, 64)
    assert (large.clamp(-1, 1) - want).abs().max() < 1e-3
    assert main([*draw_it[:-4], "--n", "1", "--steps", "4", "--seed", "8", "--large", "emoji-upsampler", "--out", str(tmp_path / "one"), *CPU]) == 0  # fmt: skip
    assert torch.allclose(load_file(tmp_path / "one/samples.safetensors")["pictures"][0], large[1], atol=1e-3)


# unCLIP


@pytest.fixture
def small_unclip():
    r = UnclipNets(width=8, mults=(1,), attention=(), words=("apple", "red"), dim=6, length=3, text_width=8, prior_width=8, prior_depth=1, reading=8)  # fmt: skip
    return Model(unclip_model(r, (3, 8, 8)).eval(), About("unclip", r, (3, 8, 8)))


def test_unclip_comes_back(small_unclip, tmp_path):
    small_unclip.save(tmp_path)
    back = Model.load(tmp_path)
    captions = ["red apple", "apple"]
    v = small_unclip.denoiser.vectors(captions, 3)
    assert torch.equal(back.denoiser.vectors(captions, 3), v) and torch.allclose(v.norm(dim=1), torch.tensor(6.0).sqrt())  # fmt: skip
    assert torch.allclose(small_unclip.denoiser.vectors(["apple"], 4)[0], v[1], atol=1e-5)
    x, t = Noise(range(2), (3, 8, 8))(0), torch.tensor(0.4)
    assert torch.equal(back.denoiser(x, t, y=v).x0, small_unclip.denoiser(x, t, y=v).x0)
    with pytest.raises(ValueError, match="aple"):
        back.denoiser.vectors(["aple"])
    assert main(["sample", "--model", str(tmp_path), "--prompt", "red", "--n", "2", "--steps", "2", "--out", str(tmp_path / "x"), *CPU]) == 0  # fmt: skip


def test_unclip_of_the_book_is_that_of_the_notebook():
    model = load_model("emoji-unclip")
    prior, captions = lab.emoji_prior(), ["red apple", "firefighter"]
    e = lab.texts_read(lab.emoji_clip(), captions)
    c = normalize(by_2m(prior, 2, e.shape[1:], 20, 5, y=lab.stretched(e)), dim=1)
    v = model.denoiser.vectors(captions, 5)
    assert torch.allclose(v, lab.stretched(c), atol=1e-4)
    fresh = model.about.fresh()
    assert {k: p.shape for k, p in fresh.state_dict().items()} == {k: p.shape for k, p in model.denoiser.state_dict().items()}  # fmt: skip
    assert cli_sample.weight_of(cli_sample.Sample(), model) == 1


# cold diffusion


def test_cold_digits_of_the_book_are_those_of_the_notebook(tmp_path):
    assert main(["sample", "--model", "cold-mnist", "--n", "3", "--label", "3", "--seed", "9", "--out", str(tmp_path), "--film", *CPU]) == 0  # fmt: skip
    want = draw_cold(*cold_mnist(), torch.full((3,), 3), first=9)
    assert torch.allclose(load_file(tmp_path / "samples.safetensors")["pictures"], want, atol=1e-4)
    assert (tmp_path / "film.gif").stat().st_size > 1000
    assert json.loads((tmp_path / "run.json").read_text())["steps"] == 24


def test_a_restorer_is_trained_kept_and_draws(tmp_path):
    model = str(tmp_path / "model")
    assert main(["train", "--data", "digits", "--cold", "--recipe", "mnist", "--width", "8", *SHORT, "--out", model]) == 0  # fmt: skip
    made, x, y = Model.load(model), digits().x, digits().y
    assert made.about.family == "cold" and torch.allclose(made.denoiser.levels, grey_levels(x, y))
    assert torch.allclose(made.denoiser.levels[3, 0, 0], x[y == 3].mean())
    assert main(["sample", "--model", model, "--n", "2", "--steps", "3", "--out", str(tmp_path / "x"), *CPU]) == 0
    found = load_file(tmp_path / "x/samples.safetensors")
    assert found["pictures"].shape == (2, 1, 8, 8) and found["labels"].tolist() == [0, 1]
    assert main(["sample", "--model", model, "--n", "1", "--steps", "1", "--out", str(tmp_path / "y"), *CPU]) == 0


def test_grey_levels_without_classes():
    x = Noise(range(6), (3, 4, 4))(0)
    levels = grey_levels(x, None)
    assert levels.shape == (1, 3, 2) and torch.allclose(levels[0, :, 0], x.mean((0, 2, 3)))
    r = ColdRecipe(classes=0, width=8, mults=(1,), attention=(), patch=1)
    start = ColdModel(r, (3, 4, 4), levels).start(Noise([4, 5], (3, 4, 4)), None)
    assert start.shape == (2, 3, 1, 1) and not torch.equal(start[0], start[1])
    with pytest.raises(ValueError, match="expected square pictures; got 4×5"):
        ColdModel(r, (3, 4, 5))


# texts


def test_holes_of_words_are_filled(tmp_path, capsys):
    assert main(["sample", "--model", "words", "--prompt", "s___e; _____", "--n", "6", "--seed", "3", "--out", str(tmp_path), *CPU]) == 0  # fmt: skip
    found = (tmp_path / "samples.txt").read_text().split()
    assert len(found) == 6 and all(w[0] == "s" and w[4] == "e" for w in found[::2])
    assert found[0] in capsys.readouterr().out
    assert json.loads((tmp_path / "run.json").read_text())["recipe"]["length"] == 5
    free = draw_words(word_net(), 6, first=3)
    assert found[1::2] == as_words(free)[1::2]  # the i-th word depends on its seed alone
    held = draw_words(word_net(), 6, start=as_tokens(["s___e"] * 6), grid=(3, 2, 1, 0), first=3)
    assert found[::2] == as_words(held)[::2]
    assert main(["sample", "--model", "words", "--prompt", "s___e", "--n", "2", "--steps", "1", "--out", str(tmp_path), *CPU]) == 0  # fmt: skip
    assert len((tmp_path / "samples.txt").read_text().split()) == 2


def test_lines_of_ones_own(tmp_path):
    (tmp_path / "names.txt").write_text("anna\nbo\n\neva \n" * 6, encoding="utf-8")
    model = str(tmp_path / "model")
    assert main(["train", "--data", str(tmp_path / "names.txt"), "--width", "16", *SHORT, "--out", model]) == 0
    about = Model.load(model).about
    assert about.family == "words" and about.recipe.letters == " abenov" and about.recipe.length == 4
    assert main(["sample", "--model", model, "--prompt", "a__a;b", "--n", "4", "--out", str(tmp_path / "x"), *CPU]) == 0  # fmt: skip
    found = (tmp_path / "x/samples.txt").read_text().splitlines()
    assert found[0][0] == found[0][3] == "a" and found[1] == "b"
    for text, said in (("a_b\n", "stands for a letter"), ("\n", "has none")):
        (tmp_path / "bad.txt").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=said):
            tasks.asked_texts(str(tmp_path / "bad.txt"))


def test_texts_and_their_numbers():
    r = WordsRecipe(letters=" ab", length=3)
    assert r.tokens(["a", "b_b"]).tolist() == [[1, 0, 0], [2, 3, 2]] and r.texts(r.tokens(["a", "b_b"])) == ["a", "b_b"]  # fmt: skip
    with pytest.raises(ValueError, match="got 'abab'"):
        r.tokens(["abab"])
    with pytest.raises(ValueError, match="expected texts of 3"):
        replace(r, letters="ab").tokens(["a"])
    with pytest.raises(ValueError, match="as many masks in each text; got 0, 1"):
        fill_holes(r, r.fresh().eval(), r.tokens(["aaa", "b_b"]), torch.arange(2))
    with pytest.raises(ValueError, match="expected a multiple of heads"):
        WordsRecipe(width=10, heads=4)


def test_a_recipe_like_another():
    made = systems.like(WordsRecipe, WordsRecipe(width=8, length=2), length=7)
    assert (made.width, made.length) == (8, 7)


def test_each_text_has_its_seed():
    r = WordsRecipe(letters="ab", length=4, width=8, heads=2, depth=1)
    net = r.fresh().eval()
    whole = written(net, r, ["____", "a__b", "____", "a__b"], 10, None)
    assert [written(net, r, [w], 10 + i, None)[0] for i, w in enumerate(["____", "a__b", "____", "a__b"])] == whole


def test_a_low_temperature_takes_the_likeliest_letters():
    r = WordsRecipe(letters="ab", length=3, width=8, heads=2, depth=1)
    net = lambda x, t: torch.tensor([0.0, 1.0]).expand(*x.shape, 2)
    net.training = False
    share = lambda temperature: fill_holes(r, net, torch.full((1500, 3), 2), torch.arange(1500), None, temperature).double().mean()  # fmt: skip
    assert share(0.01) == 1
    for temperature in (0.5, 1.0):
        p = 1 / (1 + math.exp(-1 / temperature))
        assert abs(share(temperature) - p) < 4 * math.sqrt(p * (1 - p) / 4500)


@pytest.mark.parametrize("model, temperature, said", [("digits", "0.5", "for networks that write"), ("words", "0", "expected a number above 0")])  # fmt: skip
def test_a_temperature_that_is_none(tmp_path, model, temperature, said, capsys):
    assert main(["sample", "--model", model, "--temperature", temperature, "--n", "1", "--out", str(tmp_path), *CPU]) == 1  # fmt: skip
    assert said in capsys.readouterr().err


def test_in_two_stages_by_hand():
    "With a stage that only looks: the small pictures are those of the sampler alone, and are noised to the time that is said."
    torch.manual_seed(0)
    seen, stage = {}, upsampler_denoiser(UpsamplerRecipe(width=8, mults=(1,), patch=1), 1).eval()
    first = NetDenoiser(UNet(1, 8, (1,), 1, ()), CosineSchedule(), predict_v).eval()
    torch.nn.init.normal_(first.net.head[-1].weight)
    stage.net.register_forward_pre_hook(lambda net, args, kw: seen.update(kw), with_kwargs=True)
    noise, ts = Noise([3, 4], (1, 8, 8)), even_logsnr_grid(first.schedule, 3)
    x = in_stages(first, noise(0), ts, noise=noise, sampler=dpmpp_2m, stage=stage, s=0.1, calls=2)
    low = draw(first, dpmpp_2m, ts, torch.tensor([3, 4]), (1, 4, 4), {})
    alpha, sigma = (v.float() for v in stage.schedule(torch.tensor(0.1)))
    given = alpha * low + sigma * Noise([3, 4], (1, 4, 4))(2**20)
    assert torch.allclose(seen["low"], given, atol=1e-5) and torch.allclose(seen["s"], torch.tensor([0.1, 0.1]))
    assert torch.allclose(torch.nn.functional.avg_pool2d(x, 2), low, atol=1e-4)


def told_by_letters(texts):
    "In place of the published encoder: as many tokens as words, each a fixed vector of its word and its text."
    words = [text.split() for text in texts]
    found = torch.zeros(len(texts), max(map(len, words)), 384)
    there = torch.zeros(found.shape[:2], dtype=torch.bool)
    for row, (some, flags) in enumerate(zip(words, there, strict=True)):
        flags[: len(some)] = True
        for k, word in enumerate(some):
            g = torch.Generator().manual_seed(sum(i * ord(c) for i, c in enumerate(word + texts[row], 1)))
            found[row, k] = torch.randn(384, generator=g)
    return found, there


def test_a_model_that_reads_a_frozen_encoder_is_trained_and_draws(monkeypatch, tmp_path):
    "`train --text`: the same latents as `--latent`, tokens in place of learned words; the folder holds all that it needs but the encoder."
    from diffusion_nb.emoji import emoji
    from diffusion_nb.recipes import text

    some = emoji(64)
    pictures = tasks.Asked(some.x[:80], None, list(some.captions[:80]), None, (3, 64, 64), 256)
    monkeypatch.setattr(text, "encoder", lambda: told_by_letters)
    monkeypatch.setattr(tasks, "asked_pictures", lambda args: pictures)
    words = ["train", "--data", "emoji", "--size", "64", "--text", "emoji-codec", "--width", "16", *SHORT]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    model = Model.load(tmp_path / "run")
    reader = model.denoiser.net.context
    assert model.about.family == "text" and model.codec.about.family == "codec"
    assert reader.tokens(some.captions[:80])[0].shape[1] == model.about.recipe.kept
    tokens = torch.cat(reader.tokens(some.captions[:80]))
    assert tokens.mean(0).abs().max() < 0.02  # as `fit_tokens` centres them
    assert main(["sample", "--model", str(tmp_path / "run"), "--prompt", some.captions[0], "--n", "1", "--steps", "2", "--out", str(tmp_path / "drawn"), *CPU]) == 0  # fmt: skip
    assert load_file(tmp_path / "drawn/samples.safetensors")["pictures"].shape == (1, 3, 64, 64)


def test_text_needs_captions(capsys):
    assert main(["train", "--data", "digits", "--text", "emoji-codec"]) == 1
    assert "--text: expected captions" in capsys.readouterr().err
