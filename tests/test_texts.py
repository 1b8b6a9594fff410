"""Texts of other lengths: what is held out, the bound, and the price of several letters per step."""

import math
from dataclasses import replace

import pytest
import torch

from diffusion_nb.experiments.texts import (
    HELD_OUT,
    Texts,
    bits_of_texts,
    draw_texts,
    lines_recipe,
    measured,
    seven_letters,
    seven_recipe,
    verse,
)
from diffusion_nb.nets.dit import MultiHead
from diffusion_nb.nets.text import Rotary, TextNet
from diffusion_nb.recipes.words import WordsRecipe

SMALL = WordsRecipe(letters="ab", length=3)


@pytest.mark.parametrize("texts, recipe, n", [(seven_letters, seven_recipe(), 8726), (verse, lines_recipe(), 5120)])  # fmt: skip
def test_held_out_texts_are_not_trained_on(texts, recipe, n):
    found = texts()
    assert len(found.held_out) == HELD_OUT and len({*found.train, *found.held_out}) == n
    assert not {*found.train} & {*found.held_out}
    assert recipe.texts(recipe.tokens(found.held_out)) == found.held_out
    assert found.share_of_words(found.train + found.held_out) == 1


def test_words_are_counted_not_texts():
    texts = Texts(["to be"], ["or not"], {"to", "be", "or", "not"})
    assert texts.share_of_words(["to be", "or xx", "yy"]) == 3 / 5


def test_a_network_that_knows_nothing_needs_a_bit_per_letter_of_two():
    "Exactly so, whatever the draw of the noise: all letters of L are masked L times as often as they count."
    flat = lambda x, t: torch.zeros(*x.shape, 2)
    bits = bits_of_texts(SMALL, flat, ["aba", "bbb"])
    assert torch.allclose(bits, torch.full((2,), 3.0, dtype=torch.float64), atol=1e-6)


def knows(x, t):
    "The network for data aaa and bbb."
    seen_a, seen_b = ((x == k).any(1, keepdim=True) for k in (0, 1))
    p = torch.stack([torch.where(seen_b, 0.0, 0.5 + 0.5 * seen_a), torch.where(seen_a, 0.0, 0.5 + 0.5 * seen_b)], -1)  # fmt: skip
    return p.log().expand(-1, x.shape[1], -1)


knows.training = False


def test_one_letter_per_step_keeps_what_goes_together_and_one_step_does_not():
    "Data aaa and bbb, a network that knows it: one by one all letters agree; at once a quarter do."

    alike = lambda texts: sum(len(set(t)) == 1 for t in texts) / len(texts)
    assert alike(draw_texts(SMALL, knows, 400)) == 1
    at_once = alike(draw_texts(SMALL, knows, 400, steps=1))
    assert abs(at_once - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 400)


def test_training_learns_the_two_texts_there_are():
    from diffusion_nb.experiments.texts import train_texts

    r = replace(SMALL, width=16, depth=1, heads=2, steps=150, batch=32, dropout=0.0, lr=0.01, warmup=5, ema=0.9)
    _, card = train_texts(r, Texts(["aaa", "bbb"] * 300, ["aaa", "bbb"] * 300, set()))
    assert 1.0 <= card["bits per text"]["held out"] < 1.2


def test_what_a_network_that_knows_all_is_worth():
    "One bit per text, as an n-gram of it costs, up to the strength of its lower orders; and words unless letters are written at once."
    found = measured(SMALL, knows, Texts(["aaa", "bbb"] * 300, ["aaa", "bbb"] * 300, {"aaa", "bbb"}), drawn=300)
    assert found["bits per text"]["held out"] == found["bits per text"]["trained on"] == 1
    assert 1 <= found["bits per text"]["3-gram"] < 1.01
    assert all(-0.01 < gap < 0.01 for gap in found["below the best n-gram"])
    assert found["words"]["one by one"] == found["words"]["at temperature 0.8"] == [1, 1, 1]
    at_once = sum(found["words"]["3 per step"]) / 3
    assert abs(at_once - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 300)


def test_attention_that_is_told_distances():
    "With the same content everywhere, q·k depends on the distance alone, and on it; a shift of all places changes no attention."
    torch.manual_seed(0)
    heads = Rotary(32, 4).double()
    q, k = (heads.turned(torch.randn(1, 4, 1, 8, dtype=torch.float64).expand(1, 4, 9, 8)) for _ in range(2))
    score = (q @ k.mT)[0, 0]
    assert torch.allclose(score[:5, :5], score[4:, 4:], atol=1e-6)
    assert (score[0, 3] - score[0, 4]).abs() > 0.01
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    q, k, v = (a.view(2, 6, 4, 8).transpose(1, 2) for a in heads.qkv(x).chunk(3, -1))
    by_hand = (heads.turned(q) @ heads.turned(k).mT / 8**0.5).softmax(-1) @ v
    assert torch.allclose(heads(x), heads.out(by_hand.transpose(1, 2).reshape(2, 6, 32)))
    plain = MultiHead(32, 4).double()
    plain.load_state_dict(heads.state_dict())
    assert torch.allclose(plain(x.flip(1)).flip(1), plain(x)) and not torch.allclose(
        heads(x.flip(1)).flip(1), heads(x)
    )


def test_a_network_that_is_told_distances_and_one_that_is_not_have_the_same_weights():
    plain, rotary = TextNet(3, 4, 16, 1, 2), TextNet(3, 4, 16, 1, 2, rotary=True)
    assert plain.state_dict().keys() == rotary.state_dict().keys()
