"""Models of scenes of two digits: what is held out, how obedience is counted, and that word order is read."""

from types import SimpleNamespace

import torch
from torch import nn

from diffusion_nb.experiments import scenes
from diffusion_nb.experiments.scenes import (
    EACH,
    HELD_OUT,
    SCENES,
    Scene,
    draw_scenes,
    obeyed,
    scene_denoiser,
    scene_model,
    scenes_seen,
    split_scenes,
    train_on_scenes,
)
from diffusion_nb.recipes.latent import LatentRecipe
from diffusion_nb.recipes.settings import settings

ASKED = Scene(3, 0, "left of", 7, 2)


def test_held_out_scenes_are_not_trained_on():
    known, held = split_scenes()
    assert len(held) == HELD_OUT == 400 and not set(known) & set(held) and set(known) | set(held) == set(SCENES)
    assert split_scenes() == (known, held)
    words = {word for s in known for word in s.caption.split()}
    assert {word for s in held for word in s.caption.split()} <= words


def test_training_sees_each_known_scene_equally_often(monkeypatch):
    seen = {}

    def trainer(r, x, **options):
        seen.update(x=x, y=options["cond"]["y"])
        return SimpleNamespace(fit=nn.Identity)

    reader = scene_denoiser(settings("scenes.words", LatentRecipe)).net.context
    monkeypatch.setattr(scenes, "recipe_trainer", trainer)
    monkeypatch.setattr(scenes, "pictures_of_scenes", lambda wanted: torch.zeros(len(wanted), 1))
    train_on_scenes(LatentRecipe(), None, reader)
    told = {tuple(row) for row in seen["y"].tolist()}
    assert len(seen["x"]) == len(seen["y"]) == 1400 * EACH and len(told) == 1400
    assert not told & {tuple(row) for row in reader.told([s.caption for s in split_scenes()[1]]).tolist()}


def test_obedience_is_counted_part_by_part():
    swapped = Scene(3, 2, "left of", 7, 0)  # colours changed places
    above = Scene(3, 0, "above", 7, 2)
    one_off = Scene(3, 0, "left of", 8, 2)
    assert obeyed([ASKED, swapped, above, one_off], [ASKED] * 4) == {"place": 0.75, "colour": 0.75, "digit": 0.875, "all five": 0.25}  # fmt: skip


def test_the_model_reads_the_order_of_words():
    "The same noise, and captions with one bag of words: the scene asked for is drawn each time."
    one = [Scene(3, 0, "left of", 7, 2), Scene(7, 2, "left of", 3, 0), Scene(3, 2, "left of", 7, 0), Scene(7, 0, "left of", 3, 2)]  # fmt: skip
    assert len({tuple(sorted(s.caption.split())) for s in one}) == 1
    net = scene_model()[0]
    right = [obeyed(scenes_seen(draw_scenes(net, net.net.context, [s.caption for s in one], first=4 * k)), one) for k in range(3)]  # fmt: skip
    assert sum(r["all five"] for r in right) / 3 >= 11 / 12
    assert all(r["colour"] == 1.0 for r in right)
