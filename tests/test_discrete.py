"""Discrete diffusion: masks and edits of tokens, their bounds and samplers, and words of five letters."""

import math

import pytest
import torch

from diffusion_nb.corruption import (
    ChangeTokens,
    MaskEach,
    MaskTokens,
    ReplaceTokens,
    afresh,
    ancestral,
    as_uniform,
    in_order,
    kept,
)
from diffusion_nb.experiments.words import (
    LENGTH,
    LETTERS,
    MASK,
    NGram,
    WordList,
    WordRecipe,
    as_tokens,
    as_words,
    draw_words,
    quality,
    word_bits,
    word_list,
    word_trainer,
)
from diffusion_nb.losses.discrete import edit_loss, log_changes, log_probability, mask_loss
from diffusion_nb.nets.text import TextNet
from diffusion_nb.noise import Noise
from diffusion_nb.samplers.discrete import (
    Drawn,
    TokenGuess,
    changes,
    draw,
    noisy_surest,
    one_change,
    reveal_surest,
    surest,
)

V, L, N = 5, 6, 300
KERNELS = (MaskTokens(V), ReplaceTokens(V), ChangeTokens(V))
X0 = torch.arange(N * L).reshape(N, L) * 7 % V
NOISE = Noise(range(N), (L,))
TS = torch.arange(L, -1, -1, dtype=torch.float64) / L


def level(x, t):
    "Logits of nothing: all tokens alike."
    return torch.zeros(*x.shape, V)


def stirred(x, t):
    "Logits that depend on the whole text."
    return torch.sin(torch.arange(V) * (1.0 + x.sum(1, keepdim=True)))[:, None] + torch.zeros(*x.shape, V)


def test_orders_are_even():
    orders = in_order(as_uniform(Noise(range(60_000), (3,))(0)))
    counts = (orders @ torch.tensor([9, 3, 1])).bincount()
    counts = counts[counts > 0].double() / 60_000
    assert len(counts) == 6 and (counts - 1 / 6).abs().max() < 0.008


@pytest.mark.parametrize("k", range(L + 1))
def test_so_many_are_masked(k):
    x = KERNELS[0].q_sample(X0, torch.tensor(k / L), NOISE(0))
    assert ((x == V).sum(1) == k).all() and ((x == V) | (x == X0)).all()


@pytest.mark.parametrize("k", range(L + 1))
def test_changed_tokens_differ(k):
    x = KERNELS[2].q_sample(X0, torch.tensor(k / L), NOISE(0))
    assert ((x != X0).sum(1) == k).all() and x.min() >= 0 and x.max() < V


def test_random_tokens_may_be_what_they_were():
    x = KERNELS[1].q_sample(X0, torch.tensor(1.0), NOISE(0))
    assert abs((x == X0).double().mean() - 1 / V) < 0.04 and x.max() < V


def test_each_sample_has_its_own_time():
    k = torch.arange(N) % (L + 1)
    x = KERNELS[2].q_sample(X0, k / L, NOISE(0))
    assert torch.equal((x != X0).sum(1), k)


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_known_is_kept(kernel):
    "With x_0 itself as the guess, fewer places are spoiled, and those as they were."
    s, t = torch.tensor(2 / L), torch.tensor(5 / L)
    x_t = kernel.q_sample(X0, t, NOISE(0))
    x_s = kernel.re_corrupt(x_t, X0, s, t, NOISE(1))
    assert ((x_s == X0) | (x_s == x_t)).all()
    spoiled = (x_s != X0).sum(1)
    assert (spoiled <= 2).all() if type(kernel) is ReplaceTokens else (spoiled == 2).all()


def test_each_mask_stays_with_its_probability():
    kernel, s, t = MaskEach(V, lambda t: t**2), torch.tensor(0.5), torch.tensor(0.8)
    x = torch.zeros(4000, L, dtype=torch.long)
    x_t = kernel.q_sample(x, t, Noise(range(4000), (L,))(0))
    x_s = kernel.re_corrupt(x_t, x, s, t, Noise(range(4000), (L,))(1))
    for y, m in ((x_t, 0.64), (x_s, 0.25)):
        assert abs((y == V).double().mean() - m) < 0.013
    assert not ((x_s == V) & (x_t != V)).any()


def test_a_long_chain_weighs_like_continuous_time():
    t, share = torch.tensor([0.3, 0.9], dtype=torch.float64), lambda t: 1 - torch.cos(torch.pi * t / 2)
    assert torch.allclose(MaskEach(V, share, 10**6).weight(t), MaskEach(V, share).weight(t), rtol=1e-5)
    assert torch.equal(MaskEach(V, share, 1).weight(torch.ones(1)), torch.ones(1))


@pytest.mark.parametrize("k", [1, 4, 6])
def test_losses_of_a_network_that_knows_nothing(k):
    t = torch.full((N,), k / L)
    masked = mask_loss(level, X0, t, NOISE(0), corruption=KERNELS[0])
    assert torch.allclose(masked, torch.full((N,), L * math.log(V)))
    edited = edit_loss(level, X0, t, NOISE(0), corruption=KERNELS[2])
    want = L * (math.log(L * (V - 1) / k) + math.log(V / (V - 1)))
    assert torch.allclose(edited, torch.full((N,), want))


def test_log_changes_are_one_distribution():
    x = X0[:7]
    p = log_changes(stirred(x, None), x).exp()
    assert torch.allclose(p.sum((1, 2)), torch.ones(7)) and (p.gather(2, x[..., None]) == 0).all()
    assert torch.allclose(
        p, changes(stirred(x, None).softmax(-1), x), atol=1e-6
    )  # here all places have the same logits


def test_tokens_are_drawn_by_their_cumulative_sum():
    p = torch.tensor([0.25, 0.0, 0.5, 0.25])
    u = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1.0])
    assert draw(p.expand(6, 4), u.double()).tolist() == [0, 0, 2, 2, 3, 3]


def test_rare_tokens_are_drawn():
    "One of 4,000,000 tokens of almost no probability each: float32 loses them all."
    p = torch.full((1, 2**20), 1e-12, dtype=torch.float64)
    p[0, 0] = 1
    assert draw(p, torch.tensor([1 - 1e-7], dtype=torch.float64)).item() > 2**19


def test_one_change_changes_one_place():
    for kernel in (KERNELS[0], KERNELS[2]):
        s, t = torch.tensor(3 / L), torch.tensor(4 / L)
        x_t = kernel.q_sample(X0, t, NOISE(0))
        x_s = one_change(kernel, x_t, TokenGuess(stirred)(x_t.clamp(max=V - 1), t), s, t, NOISE(1))
        assert ((x_s != x_t).sum(1) == 1).all() and x_s[x_s != x_t].max() < V
        with pytest.raises(ValueError, match="one change is a step of 1/6"):
            one_change(kernel, x_t, level(x_t, t), torch.tensor(2 / L), t, NOISE(1))


def test_the_surest_are_shown():
    x = torch.tensor([[3, 3, 0, 3]])
    p = torch.tensor([[[0.5, 0.4, 0.1], [0.9, 0.05, 0.05], [1.0, 0, 0], [0.2, 0.7, 0.1]]])
    assert reveal_surest(x, p, torch.tensor([[0, 0, 2, 1]]), 1, 3).tolist() == [[3, 0, 0, 1]]
    assert reveal_surest(x, p, torch.tensor([[0, 1, 2, 1]]), 2, 3).tolist() == [[3, 3, 0, 1]]


def test_without_noise_the_noisy_choice_is_the_surest():
    guess, start = TokenGuess(stirred, mask=V), torch.full((N, L), V)
    ts = torch.tensor([6, 4, 1, 0]) / L
    run = lambda rule: ancestral(KERNELS[0], guess, start, ts, rule, noise=NOISE)
    assert torch.equal(run(noisy_surest(0.0)), run(surest)) and not torch.equal(
        run(noisy_surest(5.0)), run(surest)
    )


def test_much_noise_makes_the_choice_even():
    "Which place is shown first does not depend on how sure its token is, nor on which token was drawn."
    n, noise = 20_000, Noise(range(20_000), (2,))
    p = torch.tensor([[0.9, 0.1], [0.5, 0.5]], dtype=torch.float64).expand(n, 2, 2)
    half, one = torch.tensor(0.5), torch.tensor(1.0)
    x = noisy_surest(1e6)(MaskTokens(2), torch.full((n, 2), 2), p, half, one, noise(0))
    shares = [(x[:, i] == v).double().mean() for i in (0, 1) for v in (0, 1)]
    assert ((x == 2).sum(1) == 1).all() and torch.allclose(torch.stack(shares), p[0].flatten() / 2, atol=0.012)


def test_the_probabilities_of_all_texts_are_one():
    texts = torch.cartesian_prod(*[torch.arange(V)] * 3)
    assert abs(log_probability(stirred, texts, V).exp().sum() - 1) < 1e-6  # stirred is in float32


def test_the_loss_bounds_the_probability():
    orders = torch.cartesian_prod(*[torch.arange(3)] * 3)
    orders = orders[(orders.sort(1).values == torch.arange(3)).all(1)]  # all 6
    x0, noise = torch.tensor([[0, 3, 1]]).expand(6, 3), torch.special.ndtri((orders + 0.5) / 3)
    terms = [mask_loss(stirred, x0, torch.full((6,), k / 3), noise, corruption=KERNELS[0]) for k in (1, 2, 3)]
    exact = -log_probability(stirred, x0[:1], V)
    assert torch.stack(terms).mean() > exact > torch.stack(terms).mean() - 2


def test_a_guess_keeps_what_is_shown_and_can_be_cold():
    x = torch.tensor([[0, V, 2, V, V, 4]])
    p = TokenGuess(stirred, mask=V)(x, torch.tensor(0.5))
    assert (
        p.dtype == torch.float64
        and p[0, 0].tolist() == [1, 0, 0, 0, 0]
        and torch.allclose(p.sum(-1), torch.ones(1, L).double())
    )
    cold = TokenGuess(stirred, mask=V, temperature=0.01)(x, torch.tensor(0.5))
    assert cold[0, 1].max() > 0.8 > 0.5 > p[0, 1].max()
    with pytest.raises(ValueError, match="training mode"):
        TokenGuess(TextNet(V, L, 8, 1, 2, dropout=0.1))


@pytest.mark.parametrize("rule", [afresh, kept, one_change, surest, noisy_surest(4.5)])
def test_samples_do_not_depend_on_their_batch(rule):
    def run(seeds):
        noise, guess = Noise(seeds, (L,)), TokenGuess(stirred, mask=V)
        guess = Drawn(guess, noise) if rule in (afresh, kept) else guess
        start = torch.full((len(seeds), L), V)
        return ancestral(KERNELS[0], guess, start, TS, rule, noise=noise)

    x = run(range(20))
    assert torch.equal(x[7:9], run([7, 8])) and x.max() < V and len(x.unique(dim=0)) > 10


def test_the_network_reads_masks_or_times():
    masked, timed = TextNet(V, L, 16, 2, 4).eval(), TextNet(V, L, 16, 2, 4, masked=False, timed=True).eval()
    x, t = X0[:3], torch.tensor([1 / 6, 0.5, 1.0])
    assert masked(torch.full((3, L), V), t).shape == (3, L, V) and not torch.equal(
        masked(x, t), masked(x.flip(1), t).flip(1)
    )
    assert torch.equal(masked(x, t), masked(x, t.flip(0))) and not torch.allclose(timed(x, t), timed(x, t.flip(0)))
    with pytest.raises(IndexError):
        timed(torch.full((3, L), V), t)


# words


def test_the_list_of_words():
    words = word_list()
    assert (len(words.train), len(words.held_out), len(words.rare)) == (4506, 600, 3372)
    assert len(words.known) == 8478 and all(len(w) == LENGTH for w in words.known)
    assert as_words(as_tokens(words.held_out)) == words.held_out


def test_letters_and_holes():
    assert as_tokens(["ab_z", "?bcd"]).tolist() == [[0, 1, MASK, 25], [MASK, 1, 2, 3]] and as_words(
        torch.tensor([[25, MASK]])
    ) == ["z_"]
    for wrong in (["abc", "ab"], ["Ab"], ["naïf"]):
        with pytest.raises(ValueError, match="words: expected words of one length"):
            as_tokens(wrong)


def test_quality_by_hand():
    words = WordList(["aaaaa", "bbbbb"], ["ccccc"], ["ddddd"])
    drawn = as_tokens(["aaaaa", "aaaaa", "ccccc", "zzzzz"])
    assert quality(drawn, words) == {"words": 0.75, "copies": 0.5, "new words": 0.25, "distinct": 0.75}


def test_an_ngram_by_hand():
    gram = NGram(as_tokens(["ab", "ac", "ab"]), 2, 1.0)
    below = (torch.tensor([3, 2, 1], dtype=torch.float64) + 1 / 26) / 7  # letters a, b, c anywhere
    got = gram.next((0,))
    assert torch.allclose(got[:3], (torch.tensor([0, 2, 1]) + below) / 4) and abs(got.sum() - 1) < 1e-12
    assert torch.allclose(gram.bits(as_tokens(["ab"])), -(gram.next(())[0] * got[1]).log2().float()[None])
    assert torch.equal(gram.draw(5)[2:4], gram.draw(2, first=2))


@pytest.mark.parametrize("kind", ["mask", "edit"])
def test_a_short_training_learns_and_draws(kind):
    r = WordRecipe(kind=kind, steps=30, width=16, depth=1, warmup=5, ema=0.9, lr=0.01)
    x = as_tokens(["plane", "crane", "brand", "grand"] * 4)
    net = word_trainer(r, x).fit().eval()
    assert word_bits(r, net, x).mean() < word_bits(r, r.fresh().eval(), x).mean() - 1
    drawn = draw_words(net, 6, edit=kind == "edit")
    assert (
        drawn.shape == (6, LENGTH)
        and drawn.max() < LETTERS
        and torch.equal(drawn[2:], draw_words(net, 4, edit=kind == "edit", first=2))
    )


def test_holes_are_filled_and_the_rest_stays():
    net = TextNet(LETTERS, LENGTH, 16, 1, 4).eval()
    start = as_tokens(["_ight"] * 5)
    filled = draw_words(net, 5, grid=(1, 0), start=start)
    assert torch.equal(filled[:, 1:], start[:, 1:]) and filled.max() < LETTERS
