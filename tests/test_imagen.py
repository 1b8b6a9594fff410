"""Imagen: what is read of a frozen encoder, phrasings, scenes and their ceilings, the order of layers; a model of free text saved, loaded and used by the command."""

import importlib.util
from fractions import Fraction

import pytest
import torch

from diffusion_nb.cli.main import main
from diffusion_nb.denoisers import NetDenoiser
from diffusion_nb.emoji import emoji
from diffusion_nb.experiments import imagen
from diffusion_nb.experiments.imagen import fit_tokens, packed_text, paraphrases, phrasings, tone_apart
from diffusion_nb.experiments.pictures import from_bytes
from diffusion_nb.experiments.scenes import SCENES, ceiling, pictures_of_scenes, scenes_seen
from diffusion_nb.models.minilm import PACKAGE, MiniLM
from diffusion_nb.models.model import About, Model
from diffusion_nb.nets.efficient import EfficientUNet
from diffusion_nb.nets.frozen import FrozenTokens, PooledTokens, principal
from diffusion_nb.nets.unet import UNet, parameters
from diffusion_nb.noise import Noise
from diffusion_nb.recipes import text
from diffusion_nb.recipes.latent import AutoencoderRecipe, fresh_codec
from diffusion_nb.recipes.text import TextRecipe, text_denoiser, text_trainer

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "apple", "green", "lady", "##s"]


def small_encoder() -> MiniLM:
    torch.manual_seed(0)
    return MiniLM(VOCABULARY, width=24, heads=3, layers=2, longest=12).eval().requires_grad_(False)


def reader(length=8, kept=5) -> FrozenTokens:
    torch.manual_seed(1)
    made = FrozenTokens(small_encoder().forward, length, 24, kept, 16)
    fit_tokens(made, ["a red apple", "green apples", "a lady", "red", "a green lady", "apple red"])
    made.known = {}
    return made


def test_tokens_are_components_with_nothing_behind_them():
    made, encoder = reader(), small_encoder()
    y = made.told(["red apple", "a"])
    x, there = encoder(["red apple"])
    assert torch.allclose(y[0, :4], (x[0] - made.mean) @ made.basis, atol=1e-5) and there.sum() == 4
    assert y.shape == (2, 8, 5) and not y[0, 4:].any() and not y[1, 3:].any() and y[1, :3].any(1).all()
    assert torch.allclose(made.told(["a"])[0], y[1], atol=1e-5)  # whatever is beside it
    assert torch.equal(made.null, torch.zeros(8, 5))
    made.check_y(y)
    with pytest.raises(ValueError, match="expected at most 8 tokens; got 9"):
        made.told(["a a a a a a a"])
    with pytest.raises(ValueError, match="y: expected"):
        made.check_y(y[:, :5])


def test_known_texts_need_no_encoder():
    made = reader()
    y = made.told(["a red apple", "a lady"])
    made.known = {"a red apple": y[0, :5], "a lady": y[1, :4]}
    made.encode = None
    assert torch.equal(made.told(["a lady", "a red apple"]), y.flip(0))


def test_the_mean_is_of_the_tokens_that_are_there():
    torch.manual_seed(0)
    pooled, y = PooledTokens(5, 12, 7), torch.zeros(2, 8, 5)
    y[0, :3] = torch.randn(3, 5)
    assert torch.allclose(pooled(y)[0], pooled.layers(y[0, :3].mean(0)))
    assert torch.allclose(pooled(y)[1], pooled.layers(torch.zeros(5)))


def test_principal_components_are_white_and_the_largest():
    x = Noise([0], (4000, 3), dtype=torch.float64)(0)[0] * torch.tensor([1.0, 5.0, 0.1]) + 2
    mean, basis = principal(x, 2)
    parts = (x.float() - mean) @ basis
    assert torch.allclose(torch.cov(parts.T), torch.eye(2), atol=1e-3)
    assert torch.corrcoef(torch.stack([parts[:, 0], x[:, 1].float()]))[0, 1].abs() > 0.99


def test_the_order_of_tokens_does_not_matter_to_attention():
    made = reader()
    torch.manual_seed(2)
    net = UNet(2, 16, (1,), 1, (0,), context=made, condition=PooledTokens(5, 64, 7))
    with torch.no_grad():
        for p in net.parameters():
            p += 0.1 * torch.randn_like(p)
    y, x, t = made.told(["a red apple", "green apples"]), Noise(range(2), (2, 4, 4))(0), torch.full((2,), 300.0)
    assert torch.allclose(net(x, t, y), net(x, t, y.flip(1)), atol=1e-5)
    assert not torch.allclose(net(x, t, y), net(x, t, y.flip(0)), atol=1e-3)


# texts


def test_captions_are_said_in_other_ways():
    assert tone_apart("woman firefighter medium-dark skin tone") == ("woman firefighter", "medium-dark")
    couple = "kiss man man light skin tone dark skin tone"
    assert tone_apart(couple) == (couple, "") and tone_apart("red apple") == ("red apple", "")
    for said in (phrasings("woman firefighter medium-dark skin tone"), phrasings("woman cook light skin tone")):
        assert len(set(said)) == 2 and any("female" in text for text in said)
        assert all("skin" in text and "tone tone" not in text for text in said)


def test_paraphrases_are_new():
    data = emoji(32)
    said = {text for i in data.train.nonzero()[:, 0].tolist() for text in (data.captions[i], *phrasings(data.captions[i]))}  # fmt: skip
    known = {word for text in said for word in text.split()}
    found = paraphrases(data, 30)
    for texts, which in found.values():
        assert len(texts) == len(set(texts)) == len(which) == 30 and not set(texts) & said
        for one, i in zip(texts, which, strict=True):
            assert data.tones[i][0] in one
    for kind in ("new words for gender", "new words for roles"):
        assert all(set(one.split()) - known for one in found[kind][0]), kind


# scenes


def test_the_ceiling_of_a_bag_of_words():
    bag = lambda caption: tuple(sorted(caption.split()))
    assert ceiling(bag, lambda s: s.colour) == Fraction(2, 3) and ceiling(bag, lambda s: s.digit) == Fraction(
        11, 20
    )
    assert ceiling(bag, lambda s: s) == Fraction(11, 30) and ceiling(bag, lambda s: s.place) == 1
    assert ceiling(str, lambda s: s) == 1 and ceiling(len, lambda s: s.place) < 1


def test_the_judge_reads_real_scenes():
    some = SCENES[::11]
    assert scenes_seen(pictures_of_scenes(some, held_out=True)) == list(some)


# the order of layers


def test_both_orders_have_the_same_weights_and_other_sizes():
    early, late = EfficientUNet(3, 8, (1, 2), (1, 2)), EfficientUNet(3, 8, (1, 2), (1, 2), late=True)
    late.load_state_dict(early.state_dict())
    assert parameters(early) == parameters(late)
    x, t, sides = Noise(range(2), (3, 16, 16))(0), torch.full((2,), 200.0), {}
    for net in (early, late):
        for level in (*net.down, *net.up):
            for block in level:
                block.register_forward_hook(lambda m, given, out, net=net: sides.setdefault(net, []).append(out.shape[2]))  # fmt: skip
        assert net(x, t).shape == x.shape and not net(x, t).any()  # nothing before training
    assert sides[early][:6] == [8, 4, 4, 4, 4, 8] and sides[late][:6] == [16, 8, 8, 8, 8, 16]


def test_residual_sums_are_divided():
    net = EfficientUNet(1, 8, (1,), (1,))
    assert all(block.rescale for level in (*net.down, *net.up) for block in level)
    with pytest.raises(ValueError, match="blocks: expected a number for each of 2 levels"):
        EfficientUNet(1, 8, (1, 2), (1,))


# the model


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.setattr(text, "encoder", small_encoder)
    return TextRecipe(width=8, dim=8, length=8, encoded=24, kept=5, hidden=8, steps=3, batch=4)


def test_a_model_of_texts_learns_and_packs(recipe):
    denoiser = text_denoiser(recipe, (2, 4, 4))
    tokens, texts = denoiser.net.context, ["a red apple", "a green apple", "lady", "a lady"]
    fit_tokens(tokens, texts)
    made = text_trainer(recipe, Noise(range(4), (4, 4, 4))(0), tokens.told(texts), denoiser, device="cpu").fit()
    packed = packed_text(made.net)
    assert packed["context.basis"].dtype == torch.float16 and packed["stem.weight"].dtype == torch.int8
    back = text_denoiser(recipe, (2, 4, 4))
    back.net.load_state_dict(from_bytes(packed))
    assert torch.equal(back.net.context.basis, tokens.basis)  # it was rounded before the training
    assert isinstance(back, NetDenoiser)


def saved(recipe, folder):
    denoiser = text_denoiser(recipe, (2, 4, 4))
    fit_tokens(denoiser.net.context, ["a red apple", "a lady", "green"])
    codec = fresh_codec(AutoencoderRecipe(latent=2, widths=(8, 8), patch=2), (3, 16, 16))
    about = About("codec", AutoencoderRecipe(latent=2, widths=(8, 8), patch=2), (3, 16, 16))
    Model(denoiser, About("text", recipe, (2, 4, 4)), Model(codec, about)).save(folder)


def test_the_command_draws_what_is_asked_for(recipe, tmp_path, capsys):
    saved(recipe, tmp_path / "model")
    given = ["sample", "--model", str(tmp_path / "model"), "--n", "2", "--steps", "2", "--device", "cpu", "--out", str(tmp_path / "out")]  # fmt: skip
    assert main([*given, "--prompt", "a lady; strange new words"]) == 0, capsys.readouterr().err
    assert (tmp_path / "out" / "grid.png").exists()
    assert main([*given, "--prompt", "a a a a a a a a", "--replace"]) == 1
    assert "expected at most 8 tokens" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is not None, reason="the encoder is installed")
def test_without_the_encoder_it_says_what_to_install(tmp_path, capsys):
    given = ["sample", "--model", "emoji-text", "--n", "1", "--steps", "2", "--device", "cpu", "--out", str(tmp_path / "out")]  # fmt: skip
    assert main([*given, "--prompt", "an animal that says miaow"]) == 1
    assert "diffusion_nb[text]" in capsys.readouterr().err
    assert main([*given, "--prompt", imagen.SOME_TEXTS[0]]) == 0  # whose tokens are shipped


@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason='needs pip install "diffusion_nb[text]"')
def test_what_is_shipped_is_what_the_encoder_says():
    for sentence, tokens in imagen.sentence_tokens().items():
        assert torch.allclose(text.encoded([sentence])[0][0], tokens, atol=0.01)
    denoiser, _ = imagen.emoji_text_model()
    shipped, denoiser.net.context.known = denoiser.net.context.known, {}
    for one in imagen.SOME_TEXTS[:5]:
        assert torch.allclose(denoiser.net.context.tokens([one])[0], shipped[one], atol=0.1)
