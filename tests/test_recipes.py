"""Every section of settings.ini can be read, in both profiles, and every recipe in it builds what it describes."""

import configparser
from dataclasses import is_dataclass, replace
from pathlib import Path

import pytest
import torch

from diffusion_nb.cli.systems import like
from diffusion_nb.codecs import latents
from diffusion_nb.data import DATA_SETS, Pictures
from diffusion_nb.denoisers import DenoiserConsistency
from diffusion_nb.experiments.catalogue import artifact_makers
from diffusion_nb.experiments.words import word_recipe
from diffusion_nb.nets.unet import parameters
from diffusion_nb.noise import Noise
from diffusion_nb.recipes import consistency, distillation, vdm
from diffusion_nb.recipes.captions import CaptionRecipe, caption_trainer
from diffusion_nb.recipes.cascade import UpsamplerRecipe, upsampler_trainer
from diffusion_nb.recipes.diffusion import recipe, recipe_denoiser, recipe_trainer
from diffusion_nb.recipes.dit import DiTCaptionRecipe, dit_denoiser, dit_recipe
from diffusion_nb.recipes.latent import (
    AutoencoderRecipe,
    LatentRecipe,
    autoencoder_trainer,
    fresh_codec,
    latent_trainer,
)
from diffusion_nb.recipes.settings import settings
from diffusion_nb.recipes.words import WordsRecipe

INI = configparser.ConfigParser(interpolation=None)
INI.read(Path(__file__).parents[1] / "settings.ini", encoding="utf-8")
SIZES = {d.name: (d.shape, d.levels) for d in DATA_SETS}
SIZES["pictures"] = ((3, 32, 32), 256)  # of one's own
NAMES = [s for s in INI.sections() if not s.endswith(".gpu")]


def pictures(name, classes) -> Pictures:
    "Four black pictures of the size of a data set."
    (shape, _), y = SIZES[name], torch.zeros(4, dtype=torch.long)
    return Pictures(torch.full((4, *shape), -1.0), y, torch.full((4, *shape), -1.0), y)


def trainer(name, make, r):
    return make(replace(r, batch=2), *pictures(r.data, r.classes)[:2], device="cpu")


@pytest.fixture(params=["cpu", "gpu"])
def profile(request, monkeypatch):
    monkeypatch.setenv("DIFFUSION_NB_PROFILE", request.param)


def kind(start):
    return [s.partition(".")[2] for s in NAMES if s.startswith(f"{start}.")]


@pytest.mark.parametrize("name", [n for n in kind("recipe") if n != "emoji"])
def test_recipes(name, profile):
    made = trainer(name, recipe_trainer, recipe(name))
    x0, t, eps, cond = next(made.batches(0))
    with torch.no_grad():
        assert made.denoiser(x0, t, **cond).x0.shape == x0.shape


@pytest.mark.parametrize("name", kind("vdm"))
def test_vdm_recipes(name, profile):
    trainer(name, vdm.vdm_trainer, vdm.vdm_recipe(name))


@pytest.mark.parametrize("name", [n for n in kind("dit") if not n.startswith("emoji")])
def test_dit_recipes(name, profile):
    r = dit_recipe(name)
    denoiser = dit_denoiser(replace(r, blocks=1), SIZES[r.data][0])
    recipe_trainer(replace(r, batch=2), *pictures(r.data, r.classes)[:2], denoiser=denoiser, device="cpu")


PUBLISHED = {
    384: 32_963_360,
    768: 130_512_416,
}  # DiT-S/2 and B/2 of latents (4, 32, 32), with noise and covariance


@pytest.mark.parametrize("name", ["cifar10-s2", "cifar10-b2", "emoji", "emoji-b2"])
def test_transformers_for_a_gpu(name, monkeypatch):
    "Their parameters are the published ones but for layers in and out, places, and what is told; and they train."
    monkeypatch.setenv("DIFFUSION_NB_PROFILE", "gpu")
    r = settings(f"dit.{name}", DiTCaptionRecipe) if name.startswith("emoji") else dit_recipe(name)
    emoji, d, words = name.startswith("emoji"), r.width, ("red", "apple")
    shape = (3, 64, 64) if emoji else (3, 32, 32)
    r = replace(r, words=words) if emoji else r
    net = dit_denoiser(replace(r, blocks=1), shape).net
    found = parameters(net) + (r.blocks - 1) * parameters(net.blocks[0])
    told = (2 + 1) * r.hidden + (r.hidden + 1) * d if emoji else 11 * d
    ends = (17 - 13) * d, 1001 * d - told, 32 * (d + 1) - 12 * (d + 1), 256 * d
    assert (d, r.blocks, r.patch) in ((384, 12, 2), (768, 12, 2)) and found == PUBLISHED[d] - sum(ends)
    small = replace(r, blocks=1, batch=2, steps=2)
    x = Noise(range(4), (3, 16, 16))(0).tanh()
    if emoji:
        trained = caption_trainer(
            small, x, ["red apple", "red"] * 2, denoiser=dit_denoiser(small, (3, 16, 16)), device="cpu"
        ).fit()
    else:
        trained = recipe_trainer(
            small, x, torch.zeros(4, dtype=torch.long), denoiser=dit_denoiser(small, (3, 16, 16)), device="cpu"
        ).fit()
    assert all(p.isfinite().all() for p in trained.parameters())


def test_recipes_of_stages_that_enlarge(profile):
    r, x = settings("20_cascade.pictures", UpsamplerRecipe), Noise(range(4), (3, 16, 16))(0).tanh()
    made = upsampler_trainer(replace(r, batch=2), x, x[..., ::2, ::2], device="cpu")
    assert made.steps == r.steps


def test_the_recipe_of_texts_is_that_of_the_words_of_the_book(profile):
    assert like(WordsRecipe, word_recipe()) == settings("words.english", WordsRecipe)


def test_the_recipe_of_captions(profile):
    r = replace(settings("recipe.emoji", CaptionRecipe), words=("red", "apple"))
    made = caption_trainer(replace(r, batch=2), pictures("pictures", 0).x, ["red apple", "red"] * 2, device="cpu")
    assert (r.data, made.steps) == ("emoji", r.steps) and made.denoiser.net.label.null.shape == (2,)


SIDES = {"emoji": (3, 64, 64), "pictures": (3, 64, 64), "mnist": (1, 28, 28)}


@pytest.mark.parametrize("name", kind("codec"))
def test_recipes_of_codecs_and_of_their_latents(name, profile):
    r = settings(f"codec.{name}", AutoencoderRecipe)
    x = torch.full((4, *SIDES[r.data]), -1.0)
    autoencoder_trainer(replace(r, batch=2), x, device="cpu")
    z = latents(fresh_codec(r, SIDES[r.data]), x)
    of_latents = settings(f"latent.{name.removesuffix('-vq')}", LatentRecipe)
    made = latent_trainer(replace(of_latents, batch=2, classes=10), z, torch.zeros(4, dtype=torch.long), device="cpu")  # fmt: skip
    assert z.shape[1] == 2 * r.latent and made.steps == of_latents.steps


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_consistency_recipes(name, profile):
    r, teacher = settings(f"consistency.{name}", consistency.ConsistencyRecipe), recipe(name)
    f = DenoiserConsistency(recipe_denoiser(teacher, SIZES[r.data][0]))
    consistency.consistency_trainer(replace(r, batch=2), pictures(r.data, 0), f, consistency.consistency_training, teacher.classes, device="cpu")  # fmt: skip


@pytest.mark.parametrize("name", [n for n in kind("distill") if n != "guided"])
def test_distillation_recipes(name, profile):
    r = settings(f"distill.{name}", distillation.Distillation)
    assert r.n_from % 2 == 0 and recipe(r.teacher).data in SIZES


def test_no_section_is_left_out():
    "What is not a recipe is a notebook's, or an artifact's."
    makers = artifact_makers()
    assert makers and all(is_dataclass(r) for _, r in makers.values())
    others = [
        s
        for s in NAMES
        if not s.startswith(
            ("recipe.", "vdm.", "dit.", "codec.", "latent.", "consistency.", "distill.", "text.", "words.")
        )
        and s != "20_cascade.pictures"
    ]
    text = "".join(
        p.read_text()
        for folder in ("nbs", "diffusion_nb")
        for p in (Path(__file__).parents[1] / folder).rglob("*")
        if p.suffix in (".py", ".ipynb")
    )
    assert not [
        s
        for s in others
        if f'settings("{s}"' not in text and f'settings(\\"{s}\\"' not in text and f'of("{s}"' not in text
    ]
