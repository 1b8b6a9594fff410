"""Pictures as codes, written by a transformer of masks."""

import math
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from diffusion_nb.corruption import kept
from diffusion_nb.experiments.codes import (
    CLASSES,
    CODES,
    LENGTH,
    MASK,
    CodeRecipe,
    as_codes,
    as_pictures,
    bits_by_counts,
    code_trainer,
    draw_codes,
    guided,
    labelled_loss,
    masked_counts,
)
from diffusion_nb.experiments.latent import mnist_codec
from diffusion_nb.nets.text import TextNet
from diffusion_nb.samplers.discrete import noisy_surest

SMALL = CodeRecipe(width=16, depth=1, heads=2, steps=3, batch=8, warmup=1)


def test_how_many_codes_are_masked_after_each_step():
    assert masked_counts(LENGTH) == list(range(LENGTH, -1, -1))
    assert masked_counts(8) == [49, 48, 45, 40, 34, 27, 18, 9, 0]


def test_guided_logits_go_beyond_those_of_the_label():
    net, x, t = SMALL.fresh().eval(), torch.full((3, LENGTH), MASK), torch.ones(3)
    y, any_label = torch.tensor([1, 4, 7]), torch.full((3,), CLASSES)
    with torch.no_grad():
        told, free = net(x, t, y), net(x, t, any_label)
        assert_close(guided(net, y, 2.0)(x, t), told + 2 * (told - free), atol=1e-5, rtol=0)
        assert_close(guided(net, y, 0.0)(x, t), told, atol=0, rtol=0)
    assert (told - free).abs().max() > 1e-3


def test_a_label_is_added_to_each_token():
    net = TextNet(5, 3, 8, 1, 2, classes=2).eval()
    x, t = torch.tensor([[0, 1, 5]]), torch.ones(1)
    with torch.no_grad():
        before = net(x, t, torch.tensor([1]))
        net.token.weight += net.label.weight[1]
        net.label.weight[1] = 0
        assert_close(net(x, t, torch.tensor([1])), before, atol=1e-6, rtol=0)


def test_a_network_that_knows_nothing_needs_eight_bits_per_code():
    even = lambda x, t, y: torch.zeros(*x.shape, CODES)
    codes, y = torch.arange(2 * LENGTH).view(2, LENGTH) % CODES, torch.tensor([0, 1])
    loss = labelled_loss(even, codes, torch.tensor([1.0, 1.0]), torch.randn(2, LENGTH), y)
    assert_close(loss, torch.full((2,), LENGTH * math.log(CODES)), rtol=1e-5, atol=0)


def test_codes_counted_by_hand():
    codes, y = torch.full((3, LENGTH), 7), torch.tensor([2, 2, 5])
    bits = bits_by_counts(codes, y, codes[:1], torch.tensor([2]))
    assert bits.item() == pytest.approx(-LENGTH * math.log2(2.5 / (2 + CODES / 2)))


def test_codes_of_pictures_are_their_nearest_vectors():
    codec, held, _ = mnist_codec("vq")
    codes = as_codes(codec, held[:4])
    assert codes.shape == (4, LENGTH) and 0 <= codes.min() and codes.max() < CODES
    with torch.no_grad():
        assert_close(
            as_pictures(codec, codes), codec.decode(codec.encode(held[:4])).clamp(-1, 1), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("rule", [kept, noisy_surest(4.5)])
def test_each_drawing_has_its_own_seed(rule):
    net = SMALL.fresh().eval()
    y = torch.tensor([3, 1, 4])
    seen = []
    together = draw_codes(
        net, y, rule, first=20, callback=lambda i, x, guess: seen.append((x == MASK).sum(1).tolist())
    )
    assert torch.equal(draw_codes(net, y[1:], rule, first=21), together[1:])
    assert seen == [[k] * 3 for k in masked_counts(8)[1:]] and together.max() < CODES


def test_a_short_training_tells_labels():
    codes, y = torch.randint(0, CODES, (16, LENGTH)), torch.arange(16) % CLASSES
    trainer = code_trainer(SMALL, codes, y)
    net = trainer.fit()
    assert net.label.weight.shape == (CLASSES + 1, 16) and trainer.step == 3
    moved = partial(net, torch.full((1, LENGTH), MASK), torch.ones(1))
    assert (moved(torch.tensor([0])) - moved(torch.tensor([1]))).abs().max() > 1e-3
