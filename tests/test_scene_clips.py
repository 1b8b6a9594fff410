"""CLIPs of scenes of two digits: which captions are wrong, and how what they find is counted."""

from types import SimpleNamespace

import torch

from diffusion_nb.experiments.clip import ClipRecipe
from diffusion_nb.experiments.scene_clips import (
    exchanges,
    scene_clip,
    scene_clip_scores,
    scores_of_scenes,
    wrong_texts,
)
from diffusion_nb.experiments.scenes import Scene, scenes_seen, split_scenes

SCENE = Scene(3, 0, "left of", 7, 2)


def test_wrong_captions_say_the_same_words_in_another_order():
    colours, digits = exchanges(SCENE)
    assert colours.caption == "a blue three left of a red seven"
    assert digits.caption == "a red seven left of a blue three"
    assert sorted(colours.caption.split()) == sorted(digits.caption.split()) == sorted(SCENE.caption.split())


def test_an_exchange_that_changes_nothing_is_no_wrong_caption():
    clip = scene_clip(ClipRecipe(patch=2))
    wrong = wrong_texts(clip, [SCENE, Scene(3, 1, "above", 7, 1), Scene(5, 0, "above", 5, 2)])
    assert (wrong > 0).any(-1).tolist() == [[True, True], [False, True], [True, False]]
    told = clip.text.reader.told([s.caption for s in exchanges(SCENE)])
    assert wrong[0].equal(told)


class Text:
    "Captions ↦ a vector for each thing that `of` keeps of the words."

    def __init__(self, of):
        self.of, self.reader, self.known = of, scene_clip(ClipRecipe(patch=2)).text.reader, {}

    def vector(self, words):
        seed = self.known.setdefault(self.of(words), len(self.known))
        return torch.nn.functional.normalize(torch.randn(64, generator=torch.Generator().manual_seed(seed)), dim=0)

    def __call__(self, y):
        words = ["", *self.reader.vocabulary]
        return torch.stack([self.vector([words[i] for i in row if i]) for row in y.tolist()])


def test_a_reader_of_order_finds_all_and_a_bag_of_words_guesses():
    "Both see each scene as it is, and read of a caption all or its bag of words."
    held = split_scenes()[1]
    for of, share in ((tuple, 1.0), (lambda words: tuple(sorted(words)), 0.5)):
        text = Text(of)
        picture = lambda x, t=None, text=text: torch.stack(
            [text.vector(s.caption.split()) for s in scenes_seen(x)]
        )
        found = scores_of_scenes(SimpleNamespace(picture=picture, text=text), held)
        assert all(abs(v - share) < 0.03 for v in found[2:]) and (min(found[:2]) > 0.97) == (share == 1)


def test_the_stored_scores_cross_what_a_bag_can():
    without, hard = scene_clip_scores().mean(1)
    assert hard.min() > 0.95 > without[2:].max() and without[:2].min() > 0.7
