"""Defaults, dtypes and edges, each a line or two: what no other test would miss."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffusion_nb.data import _torchvision_files
from diffusion_nb.denoisers import (
    Consistency,
    DenoiserConsistency,
    Prediction,
    TimeWarped,
    X0EpsDenoiser,
    check_scale,
    edm_input,
    predict_edm,
)
from diffusion_nb.experiments.judge import digit_judge
from diffusion_nb.forward import offset_noise, q_sample
from diffusion_nb.grids import geometric_grid, logsnr_grid, respaced_grid, time_grid
from diffusion_nb.guidance import DynamicThreshold, check_same_schedule
from diffusion_nb.likelihood.bits import bits_per_dim, check_levels
from diffusion_nb.likelihood.continuous import vdm_bits
from diffusion_nb.likelihood.lossless import LosslessCodec, Stack, normal_tables
from diffusion_nb.losses.bound import bound_loss, discretised_log_prob, prior_kl, vlb_term
from diffusion_nb.losses.consistency import consistency_loss, inverse_gap, mse, perceptual
from diffusion_nb.losses.score import half_square, sliced_score_loss
from diffusion_nb.losses.vdm import scale_gradient_by_loss
from diffusion_nb.metrics.features import frechet_distance, in_balls, precision_recall
from diffusion_nb.metrics.samples import energy_distance, typicality
from diffusion_nb.mixtures import GMMDenoiser, ring_mixture
from diffusion_nb.nets.classifier import NoisyClassifier
from diffusion_nb.nets.conditioning import WithGuess
from diffusion_nb.nets.edm2 import EDM2UNet
from diffusion_nb.nets.mlp import ScoreMLP
from diffusion_nb.nets.song import FourierFeatures, Resample
from diffusion_nb.nets.unet import Down, UNet, cos_first_embedding, ddpm_init, parameters
from diffusion_nb.noise import BrownianPath, Noise
from diffusion_nb.samplers.langevin import langevin, langevin_step
from diffusion_nb.samplers.linear import dpmpp_2m_sde, invert
from diffusion_nb.samplers.sde import euler_maruyama, ratio_steps, reverse_diffusion, reverse_sde
from diffusion_nb.schedules import (
    CosineSchedule,
    DDPMSchedule,
    EDMSchedule,
    LearnedSchedule,
    LinearGamma,
    MonotoneNet,
    Schedule,
    TimeWarpedSchedule,
    VPSchedule,
    linear_betas,
)
from diffusion_nb.time_samplers import LevelSampler, LossSecondMomentSampler, growing_number
from diffusion_nb.util.checks import expand_as
from diffusion_nb.variances import fixed_small

F64 = torch.float64


def draw(n, shape):
    return Noise(range(n), shape, dtype=F64)(0)


@pytest.mark.parametrize("options, pad", [({}, (0, 1, 0, 1)), (dict(symmetric=True), (1, 1, 1, 1))])
def test_where_half_size_is_padded(options, pad):
    down, x = Down(4, **options).double(), draw(2, (4, 6, 6))
    assert down(x).equal(F.conv2d(F.pad(x, pad), down.conv.weight, down.conv.bias, stride=2))


def test_a_label_beyond_any_is_refused():
    net, x, t = UNet(1, 8, (1,), 1, (), classes=3), torch.zeros(1, 1, 4, 4), torch.ones(1)
    assert net(x, t, torch.tensor([3])).shape == x.shape
    with pytest.raises(ValueError, match="y: "):
        net(x, t, torch.tensor([4]))


def test_fourier_features_in_the_precision_of_the_time():
    features, t = FourierFeatures(8), torch.tensor([0.3], dtype=F64)
    angle = 2 * torch.pi * features.freqs.double() * t
    torch.testing.assert_close(features(t)[0], torch.cat([angle.sin(), angle.cos()]), rtol=0, atol=1e-13)


def test_langevin_passes_on_what_is_asked_for():
    denoiser, x, noise = (
        GMMDenoiser(ring_mixture(3), CosineSchedule()),
        draw(4, (2,)),
        Noise(range(4), (2,), dtype=F64),
    )
    t, y = torch.tensor(0.5, dtype=F64), torch.tensor([0, 1, 2, 0])
    got = langevin(denoiser, x, t, 1, 0.01, noise=noise, y=y)
    assert got.equal(langevin_step(denoiser(x, t, y=y), 0.01, noise(1)))


def test_nothing_is_added_in_a_step_to_the_data():
    *steps, last = reverse_diffusion(VPSchedule(), torch.tensor([0.5, 0.2, 0.0], dtype=F64))
    assert last[2] == 0 and all(c > 0 for *_, c in steps)


def test_the_last_level_is_drawn_where_shares_do_not_quite_reach_one():
    levels = LevelSampler(lambda step: torch.tensor([1.0, 0.5, 0.1, 0.0]))
    levels.reached *= 1 - 1e-9
    assert levels(torch.tensor([0.0, 1 - 1e-12], dtype=F64)).tolist() == pytest.approx([0.1, 1.0])


def test_the_middle_of_a_brownian_path():
    noise = Noise(range(3), (2,), dtype=F64)
    path = BrownianPath(noise, torch.tensor([1.0, 0.5, 0.0]))
    torch.testing.assert_close(path.at(2**19), noise(1) / 2 + noise(2) / 2)


def test_offset_noise_stretches_the_mean_alone():
    eps = draw(3, (2, 4, 4))
    mean = lambda x: x.mean((2, 3), keepdim=True)
    got = offset_noise(eps, 0.5)
    torch.testing.assert_close(mean(got), (1 + 0.25 * 16) ** 0.5 * mean(eps))
    torch.testing.assert_close(got - mean(got), eps - mean(eps))


def test_perceptual_distance_looks_after_each_activation():
    judge, (a, b) = digit_judge(), Noise(range(2), (2, 1, 8, 8))(0).transpose(0, 1)
    layers, h, g, want = list(judge.body), a, b, 0
    unit = lambda x: x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt()
    for layer in layers:
        h, g = layer(h), layer(g)
        if type(layer).__name__ == "SiLU":
            each = (unit(h) - unit(g)).square().sum(1)
            want = want + (each.mean((1, 2)) if each.ndim == 3 else each)
    torch.testing.assert_close(perceptual(judge)(a, b), want)


def test_gradients_keep_their_type_beside_a_finer_loss():
    v = torch.ones(2, requires_grad=True)
    scaled = v * 1
    scale_gradient_by_loss([scaled], torch.tensor([3.0, 5.0], dtype=F64))
    scaled.sum().backward()
    assert v.grad.tolist() == [6.0, 10.0] and v.grad.dtype == torch.float32


def test_steps_of_the_bound_are_looked_at():
    with pytest.raises(ValueError, match="steps"):
        bound_loss(1, 17)


def test_a_grid_of_two_levels():
    assert len(geometric_grid(VPSchedule(), 2, 5.0, 0.1)) == 3


@pytest.mark.parametrize("off, fits", [(5e-4, True), (1.5e-3, False)])
def test_how_far_off_the_grid_is_far(off, fits):
    history, x = LossSecondMomentSampler(10), torch.full((1, 1), 1 + off, dtype=F64) / 2 - 1
    if fits:
        check_levels(x, 5), history.weight(torch.tensor([(1 + off) / 10]))
    else:
        with pytest.raises(ValueError, match="grey levels"):
            check_levels(x, 5)
        with pytest.raises(ValueError, match="times of the chain"):
            history.weight(torch.tensor([(1 + off) / 10], dtype=F64))


def test_defaults():
    assert len(ring_mixture().weights) == 8
    assert parameters(MonotoneNet()) == parameters(MonotoneNet(1024))
    assert type(typicality(lambda x: x[:, 0], draw(4, (1,)), draw(5, (1,)))) is float
    assert Consistency(lambda x, t: x, EDMSchedule()).sigma_data == 1


def test_the_bound_passes_on_what_is_asked_for():
    denoiser, x0, eps = (
        GMMDenoiser(ring_mixture(3), CosineSchedule()),
        draw(3, (2,)).clamp(-1, 1).round(),
        draw(3, (2,)),
    )
    t, y = torch.tensor([0.2, 0.5, 0.9], dtype=F64), torch.tensor([0, 1, 2])
    pred = denoiser(q_sample(denoiser.schedule, x0, t, eps), t, y=y)
    want = vlb_term(denoiser.schedule, pred, x0, t, 10, 3, fixed_small, fixed_small)
    assert bound_loss(10, 3, fixed_small, fixed_small)(denoiser, x0, t, eps, y=y).equal(want)


def test_the_reverse_equation_passes_on_what_is_asked_for():
    denoiser, x, noise = (
        GMMDenoiser(ring_mixture(3), CosineSchedule()),
        draw(3, (2,)),
        Noise(range(3), (2,), dtype=F64),
    )
    ts, y = torch.tensor([0.5, 0.4], dtype=F64), torch.tensor([0, 1, 2])
    pred, ((a, b, c),) = denoiser(x, ts[0], y=y), euler_maruyama(denoiser.schedule, ts)
    torch.testing.assert_close(reverse_sde(denoiser, x, ts, noise=noise, y=y), a * x + b * pred.eps + c * noise(1))


def test_times_in_float32_serve_as_well():
    denoiser, x = GMMDenoiser(ring_mixture(3), CosineSchedule()), draw(3, (2,))
    ts, noise = torch.tensor([0.75, 0.5, 0.25]), Noise(range(3), (2,), dtype=F64)
    assert dpmpp_2m_sde(denoiser, x, ts, noise=noise).equal(dpmpp_2m_sde(denoiser, x, ts.double(), noise=noise))


def test_energy_distance_of_two_pairs():
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [5.0]])
    assert energy_distance(x, y) == pytest.approx(2 * (2 * (3 + 5 + 2 + 4) / 4 - 1 - 2))


def test_levels_grow_by_the_square():
    middle = (0.5 * (151**2 - 10**2) + 10**2) ** 0.5
    assert growing_number(10, 150, 1000)(500) == math.ceil(middle - 1) + 1


def test_weights_that_begin_at_zero_stay_there():
    net = ddpm_init(UNet(1, 8, (1,), 1, ()))
    assert not net.head[-1].weight.any()
    assert 0.8 < net.stem.weight.std() / (2 / (9 + 72)) ** 0.5 < 1.2


def test_more_defaults():
    assert LossSecondMomentSampler(5).memory == 10
    assert LinearGamma().ends.tolist() == LearnedSchedule().schedule.ends.tolist() == [-13.3, 5.0]
    assert 15 < FourierFeatures(8000).freqs.std() < 17
    assert NoisyClassifier(CosineSchedule()).blocks[0].time.out_features == 2 * 16  # a scale and a shift
    assert cos_first_embedding(torch.tensor([3.0]), 8).dtype == torch.float32
    assert ring_mixture(3).sample(4)[0].equal(ring_mixture(3).sample(4, seed=0)[0])
    assert predict_edm()(*torch.tensor([1.0, 2.0])) == predict_edm(0.5)(*torch.tensor([1.0, 2.0]))
    assert respaced_grid(30, 7).dtype == F64
    assert len(geometric_grid(VPSchedule(), 2, 100.0, 0.1)) == 3  # of at most 152
    assert DynamicThreshold(GMMDenoiser(ring_mixture(3), CosineSchedule()), largest=1.0).largest == 1


# what the default sample of mutants found untested


class Asks(nn.Module):
    "A denoiser that keeps what it was asked with; its guess leans on a condition."

    def __init__(self, schedule=None, twice=False):
        super().__init__()
        self.schedule, self.twice = schedule or CosineSchedule(), twice

    def forward(self, x_t, t, lean=None, **cond):
        self.t = t
        alpha, sigma = (expand_as(c, x_t) for c in self.schedule(t))
        x0 = x_t.tanh() + (0 if lean is None else lean)
        return Prediction(x_t, alpha, sigma, x0, *([x0] if self.twice else []))


def test_a_clock_is_asked_in_float64():
    inner = Asks()
    TimeWarped(inner, lambda t: t**2)(draw(1, (1, 2, 2)), 0.1)
    assert inner.t.dtype == F64 and abs(inner.t - 0.01) < 1e-15


@pytest.mark.parametrize("lean", [None, 0.5])
def test_a_network_that_says_both_is_told_the_condition(lean):
    x, t = draw(2, (1, 2, 2)), torch.tensor(0.4, dtype=F64)
    inner = Asks(twice=True)
    cond = {} if lean is None else {"lean": lean}
    said = inner(x, t, **cond)
    want = said.sigma**2 * said.x0 + said.alpha * (x - said.sigma * said.extra)
    torch.testing.assert_close(X0EpsDenoiser(inner)(x, t, **cond).x0, want)


def test_the_last_time_but_one_of_a_grid_even_in_log_snr():
    grid = logsnr_grid(CosineSchedule(), 5)
    assert grid[0] == 1 and abs(grid[-2] - 0.002) < 1e-9 and grid[-1] == 0


def test_schedules_that_part_only_later_are_told_apart():
    with pytest.raises(ValueError, match="has another schedule"):
        check_same_schedule(VPSchedule(0.1, 20.0), VPSchedule(0.1, 10.0), "it")
    assert check_same_schedule(VPSchedule(), VPSchedule(), "it") is None


def test_bits_take_times_of_less_precision_as_they_are():
    exact, x = GMMDenoiser(ring_mixture(3), CosineSchedule()), torch.tensor([[0.5, -0.5], [1.0, 0.0]], dtype=F64)
    rough = time_grid(10).float()
    got, want = (bits_per_dim(exact, x, ts, levels=5).total for ts in (rough, rough.double()))
    assert got.equal(want) and got.dtype == F64


def test_the_prior_of_a_codec_has_all_of_the_variance():
    schedule = TimeWarpedSchedule(CosineSchedule(), lambda t: 0.5 * t)  # which ends at half of the noise
    codec = LosslessCodec(Asks(schedule), time_grid(2), levels=3, var=fixed_small)
    stage = codec.stages()[-1]
    alpha, sigma = (c.item() for c in schedule(torch.ones((), dtype=F64)))
    made, want = codec.prior(stage, (1,))[0], normal_tables(stage.above, torch.zeros(1, dtype=F64), alpha**2 + sigma**2)[0]  # fmt: skip
    assert 0.3 < sigma < 0.9 and [made[i] for i in (1, 5, len(made) // 3)] == [
        want[i] for i in (1, 5, len(want) // 3)
    ]


def test_a_number_beyond_the_table_is_refused():
    stack = Stack(1 << 80)
    for i in (-1, 2, 3):
        with pytest.raises(ValueError, match="numbers: expected 0 to 1"):
            stack.push([i], [[0, 3, 4]])


def test_the_prior_s_cost_in_full_precision():
    schedule, x0 = DDPMSchedule(linear_betas()), draw(2, (1, 2, 2))
    alpha = (1 - linear_betas().double()).prod().sqrt()
    var = 1 - alpha**2
    want = 0.5 * (var + alpha**2 * x0**2 - 1 - var.log()).flatten(1).sum(1)
    torch.testing.assert_close(prior_kl(schedule, x0), want, rtol=1e-9, atol=0)


def test_a_consistency_loss_is_as_precise_as_its_pictures():
    f = DenoiserConsistency(Asks(EDMSchedule()))
    x, t, s = draw(2, (1, 2, 2)).float(), *(torch.full((2,), v, dtype=F64) for v in (0.8, 0.7))
    got = consistency_loss(f, lambda x_t: x_t, x, t, s, mse, None, inverse_gap, {})
    assert got.dtype == torch.float32


def test_sliced_score_matching_is_told_the_condition():
    x, t, v = draw(3, (2,)), torch.tensor(0.4, dtype=F64), draw(3, (2,))
    plain, leaning = (sliced_score_loss(Asks(), x, t, v, **cond) for cond in ({}, {"lean": 0.5}))
    want = half_square(Asks()(x, t, lean=0.5).score) - half_square(Asks()(x, t).score)
    torch.testing.assert_close(
        leaning - plain, want
    )  # the lean is the same everywhere, so that its derivative is 0


def test_a_distance_between_sets_that_lie_in_a_plane():
    a = draw(50, (2,)) @ draw(2, (8,))
    assert abs(frechet_distance(a, a)) < 1e-5 and frechet_distance(a, a + 1) == pytest.approx(8, abs=1e-5)


def test_balls_far_from_the_origin():
    x = 1e-3 * draw(60, (2,)) + 1e6
    assert precision_recall(x, x[:40]) == pytest.approx((1.0, precision_recall(x - 1e6, x[:40] - 1e6)[1]))
    assert in_balls(x, x[:40], 3).equal(in_balls(x - 1e6, x[:40] - 1e6, 3))


def test_a_ring_is_evenly_spread():
    mixture, around = ring_mixture(8, radius=2.0), math.pi / 4
    assert mixture.means[1].tolist() == pytest.approx([2 * math.cos(around), 2 * math.sin(around)])
    assert mixture.means.sum(0).abs().max() < 1e-9


def test_a_classifier_of_noise_halves_its_pictures_twice():
    net, seen = NoisyClassifier(CosineSchedule(), width=4), []
    net.head[0].register_forward_hook(lambda m, args, out: seen.append(tuple(args[0].shape)))
    net.logits(torch.zeros(1, 1, 16, 16), torch.tensor(0.5))
    assert seen == [(1, 16, 4, 4)]


def test_a_small_network_of_the_plane():
    net = ScoreMLP(width=8)
    assert net(torch.zeros(3, 2), torch.ones(3)).shape == (3, 2)
    assert [type(layer) for layer in net.body] == [nn.Linear, nn.SiLU] * 3 + [nn.Linear]


@pytest.mark.parametrize("up", [False, True])
def test_pictures_are_resampled_in_their_own_precision(up):
    x = draw(1, (2, 4, 4))
    assert Resample((1, 3, 3, 1), up=up)(x).dtype == F64
    torch.testing.assert_close(Resample((1, 3, 3, 1), up=up)(x), Resample((1, 3, 3, 1), up=up)(x.float()).double(), rtol=0, atol=1e-5)  # fmt: skip


def test_queries_keys_and_values_begin_as_three_matrices():
    torch.manual_seed(0)
    weight = ddpm_init(nn.Sequential(nn.Linear(64, 3 * 64))).get_parameter("0.weight").abs().max()
    assert (6 / (4 * 64)) ** 0.5 < weight <= (6 / (2 * 64)) ** 0.5  # by fan_in + fan_out of each


def test_pictures_are_encoded_at_the_times_of_less_precision_as_they_are():
    model, x, ts = Asks(), draw(2, (1, 2, 2)), time_grid(6, end=0.01).flip(0).float()
    assert invert(model, x, ts).equal(invert(model, x, ts.double()))


def test_a_step_by_the_ratio_of_two_norms():
    pred, z = Asks()(draw(2, (3,)), torch.tensor(0.4, dtype=F64)), 3 * draw(2, (3,))
    want = 2 * (0.2 * z.norm(dim=1).mean() / pred.score.norm(dim=1).mean()) ** 2
    torch.testing.assert_close(ratio_steps(0.2)(pred, z), want)


def test_the_files_of_cifar_10_are_six():
    files = _torchvision_files("CIFAR10")
    assert len({p.name for p, _ in files}) == 6 and all(len(md5) == 32 for _, md5 in files)


def test_the_scale_is_asked_at_more_than_one_time():
    class OneAtTheEnd(Schedule):
        def coefficients(self, t):
            return t, 1 + t

    with pytest.raises(ValueError, match="alpha = 1"):
        check_scale(OneAtTheEnd())


def test_data_of_edm_have_half_a_standard_deviation():
    assert edm_input()(torch.tensor(1.0), torch.tensor(0.0)) == 2


def test_the_smallest_level_of_a_consistency_function_is_a_number():
    assert isinstance(DenoiserConsistency(Asks(EDMSchedule())).smallest, float)


def test_large_seeds_have_times_of_their_own():
    seen, levels = [], torch.tensor([[-1.0, 1.0]]).expand(2, 2).double()
    model = Asks(CosineSchedule(10.0))
    model.register_forward_pre_hook(lambda m, args: seen.append(args[1]))
    vdm_bits(model, levels, 2, times=1, seeds=[2**30, 2**30 + 1])
    assert (seen[0].diff() % 1).item() == pytest.approx((5**0.5 - 1) / 2, abs=1e-6)


def test_the_bins_of_bytes_add_up():
    x = torch.linspace(-1, 1, 256, dtype=F64)
    total = discretised_log_prob(x, torch.tensor(0.1), torch.tensor(0.3)).exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-9)


def test_balls_reach_to_the_third_neighbour():
    x, y = draw(40, (3,)), draw(80, (3,))[40:]
    assert precision_recall(x, y) == precision_recall(x, y, 3) != precision_recall(x, y, 4)


def test_the_energy_distance_of_two_rows():
    x = torch.arange(3, dtype=F64)[:, None]
    assert energy_distance(x, x + 1) == pytest.approx(-2 / 3)


def test_a_network_with_a_guess_passes_on_the_condition():
    told = WithGuess(lambda x, t, y: x.sum((1, 2, 3)) + t + y)
    assert told(torch.ones(1, 1, 1, 1), torch.tensor([10.0]), y=torch.tensor([100.0])) == 111


def test_the_network_of_edm2_works_in_half_precision():
    net = EDM2UNet(1, 32, (1, 2), 1, (), classes=2).bfloat16()
    x, t, y = draw(1, (1, 4, 4)).bfloat16(), torch.ones(1), torch.tensor([1])
    assert net(x, t, y).dtype == torch.bfloat16


def test_noise_repeats_after_no_power_of_two():
    noise = Noise([0], (2,))
    assert all(not noise.bits(2**k).equal(noise.bits(0)) for k in range(24))


def test_a_cosine_of_little_log_snr():
    ends = CosineSchedule(0.5).logsnr(torch.tensor([0.0, 1.0], dtype=F64))
    assert ends.tolist() == pytest.approx([0.5, -0.5])


def test_soft_steps_begin_alike():
    net = MonotoneNet(8, height=0.3)
    assert F.softplus(net.w3).tolist() == pytest.approx([0.3] * 8)


def test_levels_are_looked_up_once():
    asked, counted, ts = [], [], torch.tensor([1.0, 0.5, 0.0])
    levels = LevelSampler(lambda k: asked.append(k) or ts, lambda ts: counted.append(ts) or torch.ones(2))
    levels(torch.rand(3), 7)
    assert asked == [0, 7] and len(counted) == 1
