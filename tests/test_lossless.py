"""The lossless codec: the stack, its tables, and messages that come back bit for bit or are refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_nb.denoisers import Prediction
from diffusion_nb.forward import q_posterior, q_sample
from diffusion_nb.grids import truncated_grid
from diffusion_nb.likelihood.lossless import (
    FLOOR,
    WHOLE,
    Grid,
    LosslessCodec,
    NormalTable,
    Stack,
    lossless_decode,
    lossless_encode,
    pop_pictures,
    push_pictures,
)
from diffusion_nb.losses.bound import discretised_log_prob
from diffusion_nb.mixtures import GMMDenoiser, random_mixture
from diffusion_nb.noise import Noise
from diffusion_nb.schedules import CosineSchedule, DDPMSchedule, EDMSchedule, VESchedule, VPSchedule, linear_betas
from diffusion_nb.variances import fixed_large, fixed_small

settings.register_profile("book", derandomize=True, deadline=None, database=None, max_examples=100)
settings.load_profile("book")

X = (torch.arange(24).reshape(6, 4) * 7 % 17) / 8 - 1  # 17 levels
Y = torch.tensor([0, 2, 1, 1, 0, 2])
TS = truncated_grid(4, 0.1)


def codec(schedule=None, **options) -> LosslessCodec:
    exact = GMMDenoiser(random_mixture(k=3, d=4), schedule or VPSchedule())
    return LosslessCodec(exact, TS, 17, fixed_large)._replace(**options)


# the stack


def test_a_stack_begins_with_as_many_bits_as_it_says():
    for initial in (203, 1021):
        first = codec(initial=initial).start().state
        assert first.bit_length() == initial + 1 and bin(first).count("1") > initial / 3


tables = st.lists(st.integers(1, 10**6), min_size=1, max_size=20).map(
    lambda widths: [0, *torch.tensor(widths).cumsum(0).tolist()]
)


@settings(max_examples=30)
@given(st.lists(st.tuples(tables, st.integers(0, 10**6)), max_size=30), st.integers(FLOOR, FLOOR**3))
def test_what_is_pushed_is_popped_and_costs_its_information(rows, state):
    chosen = [t for t, _ in rows]
    numbers = [i % (len(t) - 1) for t, i in rows]
    stack = Stack(state)
    stack.push(numbers, chosen)
    information = sum(math.log2(t[-1] / (t[i + 1] - t[i])) for i, t in zip(numbers, chosen, strict=True))
    assert math.isclose(math.log2(stack.state) - math.log2(state), information, abs_tol=1e-6)
    assert stack.pop(chosen) == numbers and stack.state == state


@settings(max_examples=30)
@given(st.lists(tables, max_size=30), st.integers(FLOOR**12, FLOOR**13))
def test_what_is_popped_can_be_pushed_back(chosen, state):
    stack = Stack(state)
    stack.push(stack.pop(chosen), chosen)
    assert stack.state == state


def test_a_pop_draws_in_proportion():
    stack, table = Stack(int.from_bytes(torch.randint(256, (4000,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy().tobytes(), "big")), [0, 1, 4, 20]  # fmt: skip
    drawn = torch.tensor(stack.pop([table] * 20000))
    share, p = torch.bincount(drawn, minlength=3) / 20000, torch.tensor([1, 3, 16]) / 20
    assert ((share - p).abs() < 5 * (p * (1 - p) / 20000).sqrt()).all()


@given(st.floats(-1e3, 1e3), st.floats(1e-6, 1e6), st.integers(2, 300), st.floats(1e-3, 1), st.floats(-5, 5))
def test_every_bin_of_a_normal_table_has_a_place(mean, std, n, step, low):
    places = torch.tensor(list(NormalTable(Grid(low, step, n), mean, std)))
    assert places[0] == 0 and places[-1] == WHOLE and len(places) == n + 1 and (places.diff() >= 1).all()


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.3), (0.9, 0.05), (-2.0, 0.5), (0.3, 20.0)])
def test_normal_tables_are_the_discretised_decoder(mean, std):
    grid = Grid(-1 - 1 / 16, 1 / 8, 17)
    table = NormalTable(grid, mean, std)
    assert len(table) == len(list(table)) == 18
    got = torch.tensor(list(table)).diff() / WHOLE
    want = discretised_log_prob(grid.centre(torch.arange(17)), torch.tensor(mean), torch.tensor(std), 17).exp()
    torch.testing.assert_close(got, want.float(), rtol=0, atol=1e-6)


# the chain


@pytest.mark.parametrize("schedule", [VPSchedule(), CosineSchedule(), VESchedule(), EDMSchedule(), DDPMSchedule(linear_betas(50))], ids=lambda f: type(f).__name__)  # fmt: skip
def test_stages_are_the_forward_process_and_its_posteriors(schedule):
    "Stage by stage, q(above | below) leads to the marginals of q_sample, and the step back is q's own posterior."
    stages = codec(schedule).stages()
    x = torch.tensor([[0.5]], dtype=torch.float64)
    mean, var = x, torch.zeros(1, dtype=torch.float64)
    for stage in stages:
        mean, var = stage.alpha * mean, stage.alpha**2 * var + stage.var
        t = torch.tensor([stage.step.t], dtype=torch.float64)
        torch.testing.assert_close(mean, q_sample(schedule, x, t, 0 * x), rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(var.sqrt(), schedule(t)[1], rtol=1e-6, atol=0)
        above = mean + var.sqrt()
        back, small_var = q_posterior(schedule, above, x, torch.tensor([stage.step.s], dtype=torch.float64), t)
        torch.testing.assert_close(stage.step.a * above + stage.step.b * x, back)
        assert math.isclose(stage.step.small, small_var.item(), rel_tol=1e-6, abs_tol=1e-12)
        assert stage.above.step <= 0.25 * stage.var**0.5 and stage.above.n * stage.above.step >= 2 * (mean.abs() + 4 * var.sqrt())  # fmt: skip
    assert [s.above for s in stages[:-1]] == [s.below for s in stages[1:]] and len(stages) == 4


@pytest.mark.parametrize("schedule", [VPSchedule(), CosineSchedule(), VESchedule(), EDMSchedule(), DDPMSchedule(linear_betas(50))], ids=lambda f: type(f).__name__)  # fmt: skip
@pytest.mark.parametrize("batch", [1, 4])
def test_pictures_and_labels_come_back(schedule, batch):
    c = codec(schedule, batch=batch, classes=3)
    x, y = lossless_decode(c, lossless_encode(c, X, Y), X.shape)
    assert torch.equal(x, X) and torch.equal(y, Y)
    plain = codec(schedule, batch=batch)
    x, y = lossless_decode(plain, lossless_encode(plain, X), X.shape)
    assert torch.equal(x, X) and y is None


@given(st.lists(st.integers(0, 255), min_size=4, max_size=4), st.integers(0, 10))
def test_any_pixels_of_a_byte_come_back(pixels, k):
    c = codec(levels=256, fineness=0.1 + 0.2 * k)
    x = torch.tensor([pixels]) / 127.5 - 1
    back, _ = lossless_decode(c, lossless_encode(c, x), x.shape)
    assert ((back + 1) * 127.5).round().int().tolist() == [pixels]


def test_a_variance_may_be_a_tensor():
    c = codec(var=lambda pred, step: step.small + (step.large - step.small) * pred.x0.sigmoid())
    assert torch.equal(lossless_decode(c, lossless_encode(c, X), X.shape)[0], X)


def test_the_length_is_the_log_ratio_along_the_path():
    "What the stack grew by, against densities at the states that it sent; fine bins, so that a mass is a density times a width."
    c = codec(fineness=1 / 32, initial=4096, batch=6)

    class Recorder(Stack):
        seen = ()

        def pop(self, tables):
            numbers = super().pop(tables)
            self.seen = (*self.seen, tables[0].grid.centre(torch.tensor(numbers)).reshape(6, 4))
            return numbers

    stack = Recorder(c.start().state)
    before = math.log2(stack.state)
    push_pictures(c, stack, X)
    normal, bits, below = torch.distributions.Normal, 0.0, X.double()
    for k, (stage, z) in enumerate(zip(c.stages(), stack.seen, strict=True)):
        t = torch.tensor(stage.step.t, dtype=torch.float64)
        mean = stage.step.a * z + stage.step.b * c.denoiser(z, t).x0
        bits = bits + normal(stage.alpha * below, stage.var**0.5).log_prob(z).sum()
        if k:
            bits = bits - normal(mean, stage.step.large**0.5).log_prob(below).sum()
        else:
            bits = bits - discretised_log_prob(X.double(), mean, torch.tensor(stage.step.large**0.5), 17).sum()
        below = z
    bits = bits - normal(0.0, 1.0).log_prob(below).sum()
    assert math.isclose(math.log2(stack.state) - before, bits.item() / math.log(2), abs_tol=0.2)
    assert torch.equal(pop_pictures(c, stack, (6, 4)), X) and stack.state == c.start().state


def test_the_variances_are_in_their_places():
    c, i = codec(decoder_var=lambda pred, step: 0.7), torch.zeros(1, 4)
    first, second, *_ = c.stages()
    assert math.isclose(c.below(first, i, {})[0].scale, -((2 * 0.7) ** -0.5))
    assert math.isclose(c.below(second, i, {})[3].scale, -((2 * second.step.large) ** -0.5))


def test_few_bits_to_begin_with():
    "In turns, the stack never lends more than the latents of two levels, however many levels there are."
    c = codec(ts=truncated_grid(40, 0.1), initial=200)
    assert torch.equal(lossless_decode(c, lossless_encode(c, X[:1]), (1, 4))[0], X[:1])


# what is refused

GOOD = lossless_encode(codec(classes=3), X, Y)


@given(st.integers(0, 8 * len(GOOD) - 1))
def test_every_flipped_bit_is_noticed(bit):
    damaged = (int.from_bytes(GOOD, "big") ^ (1 << bit)).to_bytes(len(GOOD), "big")
    with pytest.raises(ValueError, match="damaged"):
        lossless_decode(codec(classes=3), damaged, X.shape)


@pytest.mark.parametrize(
    "other",
    [dict(fineness=0.3), dict(var=fixed_small), dict(ts=truncated_grid(5, 0.1)), dict(levels=33), dict(initial=1000), dict(classes=4), dict(batch=2)],
    ids=lambda o: next(iter(o)),
)  # fmt: skip
def test_another_codec_is_noticed(other):
    with pytest.raises(ValueError, match="another codec|not of this codec"):
        lossless_decode(codec(classes=3)._replace(**other), GOOD, X.shape)


@pytest.mark.parametrize("n", [5, 7])
def test_another_number_of_pictures_is_noticed(n):
    with pytest.raises(ValueError, match="not of so many pictures|damaged"):
        lossless_decode(codec(classes=3), GOOD, (n, 4))


@pytest.mark.parametrize(
    ("options", "x", "y", "message"),
    [
        (dict(initial=80), X, None, "run out of bits"),
        (dict(initial=10), X, None, "too short"),
        ({}, X + 0.01, None, "grey levels"),
        ({}, X, Y, "expected none"),
        (dict(classes=3), X, None, "expected 6 labels"),
        (dict(classes=3), X, Y[:5], "expected 6 labels"),
        (dict(classes=2), X, Y, "expected integer labels from 0 to 1"),
        (dict(ts=TS.flip(0)), X, None, "fall"),
        (dict(ts=TS[:-1]), X, None, "from 1 to 0"),
        (dict(fineness=0.0), X, None, "positive fineness"),
        (dict(decoder_var=lambda pred, step: 0.0), X, None, "positive variance"),
    ],
)  # fmt: skip
def test_bad_input(options, x, y, message):
    with pytest.raises(ValueError, match=message):
        lossless_encode(codec(**options), x, y)


def test_a_guess_that_is_no_number_is_named():
    class Broken(GMMDenoiser):
        def forward(self, x_t, t):
            pred = super().forward(x_t, t)
            return Prediction(x_t, pred.alpha, pred.sigma, pred.x0 / 0)

    with pytest.raises(ValueError, match="the denoiser's guess"):
        lossless_encode(codec(denoiser=Broken(random_mixture(k=3, d=4), VPSchedule())), X)


def test_messages_are_short_for_likely_pictures():
    x = (random_mixture(k=3, d=4).sample(50)[0].clamp(-1, 1) * 8).round() / 8
    noise = ((Noise([0], (50, 4))(0)[0].clamp(-1, 1)) * 8).round() / 8
    c = codec(ts=truncated_grid(20, 0.1))
    assert len(lossless_encode(c, x)) < len(lossless_encode(c, noise))
