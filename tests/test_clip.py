"""CLIP and unCLIP: the contrastive loss, the encoders, guidance by agreement, the prior's network, captions and their variants."""

import math

import pytest
import torch
import torch.nn.functional as F

import diffusion_nb.experiments.clip as lab
from diffusion_nb.denoisers import NetDenoiser, Prediction, predict_v
from diffusion_nb.emoji import words
from diffusion_nb.guidance import ClassifierGuidance
from diffusion_nb.losses.clip import clip_loss, info_nce
from diffusion_nb.nets.clip import (
    CLIP,
    Agreement,
    EmbeddingReader,
    PictureEncoder,
    PriorNet,
    TextEncoder,
    at_guess,
)
from diffusion_nb.nets.unet import UNet
from diffusion_nb.noise import Noise
from diffusion_nb.schedules import CosineSchedule, DDPMSchedule, linear_betas

VOCABULARY = ("cat", "dog", "left", "of", "red")


def small_clip(seed=0) -> CLIP:
    "A CLIP with weights that are moved off their zeros, so that all of its inputs matter."
    torch.manual_seed(seed)
    clip = CLIP(
        PictureEncoder(6, size=16, widths=(8, 8), patch=4),
        TextEncoder(6, VOCABULARY, 4, width=8),
        CosineSchedule(),
    ).eval()
    for p in clip.picture.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return clip


def pictures(n=3):
    return Noise(range(n), (3, 16, 16))(0)


# the loss


def test_the_loss_is_the_mean_of_two_cross_entropies():
    scores, right = Noise([0], (5, 5), dtype=torch.float64)(0)[0], torch.arange(5)
    both = [F.cross_entropy(s, right, reduction="none") for s in (scores, scores.T)]
    assert torch.allclose(info_nce(scores), sum(both) / 2)


def test_the_loss_of_a_guess_is_log_n_and_of_a_batch_of_batches_theirs():
    assert torch.allclose(info_nce(torch.zeros(7, 7)), torch.full((7,), math.log(7)))
    scores = Noise(range(2), (4, 4))(0)
    assert torch.allclose(info_nce(scores), torch.stack([info_nce(s) for s in scores]))


def test_pairs_that_are_right_by_coincidence_are_left_out():
    scores = Noise([0], (3, 3), dtype=torch.float64)(0)[0]
    same = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()
    loss = info_nce(scores, same)
    assert torch.allclose(loss[0], (F.cross_entropy(scores[0, [0, 2]], torch.tensor(0)) + F.cross_entropy(scores[[0, 2], 0], torch.tensor(0))) / 2)  # fmt: skip
    assert torch.allclose(info_nce(scores, torch.eye(3).bool()), info_nce(scores))


def test_hard_texts_join_the_rows_alone():
    scores, hard = Noise([0], (3, 3))(0)[0], torch.tensor([[2.0], [-math.inf], [-math.inf]])
    loss, plain = info_nce(scores, hard=hard), info_nce(scores)
    more = torch.cat([scores[0], hard[0]]).logsumexp(0) - scores[0].logsumexp(0)
    assert torch.allclose(loss - plain, torch.stack([more / 2, more * 0, more * 0]), atol=1e-6)


def test_the_loss_of_a_clip_sees_noisy_pictures_and_empty_hard_texts_do_nothing():
    clip, x, y = small_clip(), pictures(), torch.tensor([[1, 0, 0, 0], [2, 0, 0, 0], [1, 3, 4, 2]])
    t, eps = torch.tensor([0.0, 0.3, 0.9]), pictures() * 0.5
    alpha, sigma = (v.float()[:, None, None, None] for v in clip.schedule(t))
    want = info_nce(clip(alpha * x + sigma * eps, y, t))
    assert torch.allclose(clip_loss(clip, x, t, eps, y), want, atol=1e-6)
    assert torch.allclose(clip_loss(clip, x, t, eps, y, hard=torch.zeros_like(y)), want, atol=1e-6)
    assert (clip_loss(clip, x, t, eps, y, hard=y.flip(0)) - want)[[0, 2]].min() > 0
    assert torch.allclose(clip_loss(clip, x, t, eps, y, key=torch.arange(3)), want, atol=1e-6)
    assert torch.allclose(clip_loss(clip, x, t, eps, y, key=torch.zeros(3)), torch.zeros(3), atol=1e-6)


# the encoders


def test_vectors_have_length_1_and_scores_are_scaled_cosines():
    clip, x, y = small_clip(), pictures(), torch.tensor([[1, 0, 0, 0], [5, 2, 0, 0]])
    c, e = clip.picture(x), clip.text(y)
    assert torch.allclose(c.norm(dim=1), torch.ones(3)) and torch.allclose(e.norm(dim=1), torch.ones(2))
    assert torch.allclose(clip(x, y), clip.scale * c @ e.T) and torch.isclose(clip.scale, torch.tensor(14.3))
    with torch.no_grad():
        clip.log_scale.fill_(9.0)
    assert clip.scale == 100


def test_no_time_is_time_0_and_time_matters():
    encoder, x = small_clip().picture, pictures()
    assert torch.equal(encoder(x), encoder(x, torch.zeros(3))) and torch.equal(
        encoder(x, torch.tensor(0.4)), encoder(x, torch.full((3,), 0.4))
    )
    with torch.no_grad():
        for level in encoder.levels:  # the last convolutions start at zero
            torch.nn.init.normal_(level[0].conv2.weight)
    assert not torch.allclose(encoder(x), encoder(x, torch.full((3,), 0.9)))


def test_the_order_of_words_matters_by_their_places_alone():
    text = small_clip().text
    y = torch.tensor([[1, 3, 4, 2], [2, 3, 4, 1]])
    assert not torch.allclose(*text(y), atol=1e-3)
    with torch.no_grad():
        text.reader.place.zero_()
    assert torch.allclose(*text(y), atol=1e-6)


def test_what_stands_behind_the_last_word_is_not_in_the_mean():
    text = small_clip().text
    with torch.no_grad():
        h = text.reader(torch.tensor([[1, 2, 0, 0]]))[:, :2].mean(1)
        assert torch.allclose(text(torch.tensor([[1, 2, 0, 0]])), F.normalize(text.head(h), dim=1))
        assert text(torch.zeros(1, 4, dtype=torch.long)).isfinite().all()


# guidance


class Half(torch.nn.Module):
    "A denoiser that guesses half of what it sees."

    schedule = CosineSchedule()

    def forward(self, x_t, t, **cond):
        alpha, sigma = (v.to(x_t.dtype) for v in self.schedule(t))
        return Prediction(x_t, alpha, sigma, x_t / 2)


def test_agreement_is_the_scaled_cosine_of_the_noisy_picture():
    clip, x, e = small_clip(), pictures(), F.normalize(Noise(range(3), (6,))(0), dim=1)
    t = torch.tensor(0.3, dtype=torch.float64)
    got = Agreement(clip, e)(x, t)
    assert torch.allclose(got, 14.3 * (clip.picture(x, torch.full((3,), 0.3)) * e).sum(1), atol=1e-5)


def test_at_guess_reads_the_guess_as_clean():
    seen = []
    read = lambda x, t, y: seen.append((x, t, y)) or x.flatten(1).sum(1)
    x, y = pictures(), torch.arange(3)
    at_guess(Half(), read)(x, torch.tensor(0.3), y)
    assert torch.equal(seen[0][0], x / 2) and seen[0][1] == 0 and seen[0][2] is y


def test_a_guide_moves_the_guess_and_must_have_the_schedule():
    clip, x, e = small_clip(), pictures(), F.normalize(Noise(range(3), (6,))(0), dim=1)
    t, score = torch.tensor(0.5, dtype=torch.float64), Agreement(clip, e)
    alpha, sigma = Half.schedule(t)
    moved = ClassifierGuidance(Half(), score, 2.0)(x, t, y=torch.zeros(3, dtype=torch.long)).x0 - x / 2
    x.requires_grad_()
    (grad,) = torch.autograd.grad(score(x, t).sum(), x)
    assert torch.allclose(moved, (2 * sigma**2 / alpha).float() * grad, atol=1e-6)
    clip.schedule = DDPMSchedule(linear_betas())
    with pytest.raises(ValueError, match="another schedule"):
        ClassifierGuidance(Half(), Agreement(clip, e))


# the networks of unCLIP


def test_the_prior_reads_vector_time_and_text():
    torch.manual_seed(0)
    net = PriorNet(6, 16, 2, 4).eval()
    x, t, y = Noise(range(2), (6,))(0), torch.tensor([10.0, 600.0]), Noise(range(2), (4,))(1)
    out = net(x, t, y)
    assert out.shape == x.shape and torch.equal(net.null, torch.zeros(4))
    for other in (net(x + 1, t, y), net(x, t + 100, y), net(x, t, y + 1)):
        assert not torch.allclose(out, other)


def test_a_decoder_is_a_unet_told_vectors():
    torch.manual_seed(0)
    reader = EmbeddingReader(6, 32, hidden=8)
    net = NetDenoiser(UNet(3, 8, (1, 2), 1, (1,), condition=reader), CosineSchedule(), predict_v)
    assert net(pictures(2), torch.tensor(0.5), y=torch.ones(2, 6)).x0.shape == (2, 3, 16, 16)
    assert torch.equal(reader.null, torch.zeros(6))
    for wrong in (torch.ones(2, 5), torch.ones(2, 6, dtype=torch.long), torch.ones(6)):
        with pytest.raises(ValueError, match="expected 6 numbers"):
            reader.check_y(wrong)


# captions


def test_captions_without_tones_and_gender():
    caption = "woman firefighter dark skin tone"
    assert [lab.shorter(caption, "woman", k) for k in range(4)] == [caption, "woman firefighter", "firefighter dark skin tone", "firefighter"]  # fmt: skip
    assert lab.shorter("woman", "woman", 3) == "woman"
    assert (
        lab.shorter("woman and man holding hands light skin tone dark skin tone", "woman man", 3)
        == "holding hands"
    )


def test_captions_in_another_order():
    pair = ["kiss dark skin tone light skin tone", "kiss light skin tone dark skin tone"]
    assert lab.reordered([*pair, "pizza"]) == [pair[1], pair[0], ""]
    assert lab.exchanged(pair[0]) == pair[1]
    assert words(lab.other_tone("cook medium-dark skin tone")) == ["cook", "tone:medium-light"]


def test_each_shorter_variant_has_its_share():
    torch.manual_seed(0)
    y = torch.arange(4)[None, :, None].expand(20_000, 4, 2)
    share = torch.bincount(lab.chosen_variant(y, 0.1)[:, 0], minlength=4) / 20_000
    assert torch.allclose(share, torch.tensor([0.7, 0.1, 0.1, 0.1]), atol=0.015)


def test_retrieval_counts_both_directions():
    scores = torch.tensor([[3.0, 1.0, 0.0], [4.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    assert lab.retrieval(scores, [{0}, {1}, {2}]) == (2 / 3, 2 / 3)
    assert lab.retrieval(scores, [{0}, {0, 1}, {2}]) == (1, 2 / 3)


def test_a_vector_is_turned_on_the_sphere_and_not_at_all_by_0():
    a, b, c = F.normalize(Noise(range(3), (3, 6))(0), dim=2)
    assert torch.equal(lab.turned(a, b, c, 0.0), a)
    assert torch.allclose(lab.turned(a, b, c, 0.3).norm(dim=1), torch.ones(3), atol=1e-5)
    assert torch.allclose(lab.turned(a, b, c, 1.0), F.normalize(c - b, dim=1), atol=1e-5)


def test_the_mean_is_what_the_prior_predicts_from_noise_and_draws_have_length_1():
    torch.manual_seed(0)
    prior = lab.prior_denoiser(lab.PriorRecipe(width=16, depth=1, clip=lab.ClipRecipe(dim=6)))
    e = F.normalize(Noise(range(4), (6,))(0), dim=1)
    assert lab.regressed_vectors(prior, e).shape == (4, 6)
    drawn = lab.draw_vectors(prior, e, steps=4)
    assert torch.allclose(drawn.norm(dim=1), torch.ones(4), atol=1e-5)
    assert torch.allclose(drawn[2:3], lab.draw_vectors(prior, e[2:3], steps=4, first=2), atol=1e-5)
    assert not torch.allclose(drawn, lab.draw_vectors(prior, e, w=2.0, steps=4))
