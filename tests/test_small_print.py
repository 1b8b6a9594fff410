"""Defaults, dtypes and edges, each a line or two: what no other test would miss."""

import math

import pytest
import torch
import torch.nn.functional as F

from diffusion_nb.denoisers import Consistency, predict_edm
from diffusion_nb.experiments.judge import digit_judge
from diffusion_nb.forward import offset_noise, q_sample
from diffusion_nb.grids import geometric_grid, respaced_grid
from diffusion_nb.guidance import DynamicThreshold
from diffusion_nb.likelihood.bits import check_levels
from diffusion_nb.losses.bound import bound_loss, vlb_term
from diffusion_nb.losses.consistency import perceptual
from diffusion_nb.losses.vdm import scale_gradient_by_loss
from diffusion_nb.metrics.samples import energy_distance, typicality
from diffusion_nb.mixtures import GMMDenoiser, ring_mixture
from diffusion_nb.nets.classifier import NoisyClassifier
from diffusion_nb.nets.song import FourierFeatures
from diffusion_nb.nets.unet import Down, UNet, cos_first_embedding, ddpm_init, parameters
from diffusion_nb.noise import BrownianPath, Noise
from diffusion_nb.samplers.langevin import langevin, langevin_step
from diffusion_nb.samplers.linear import dpmpp_2m_sde
from diffusion_nb.samplers.sde import euler_maruyama, reverse_diffusion, reverse_sde
from diffusion_nb.schedules import (
    CosineSchedule,
    EDMSchedule,
    LearnedSchedule,
    LinearGamma,
    MonotoneNet,
    VPSchedule,
)
from diffusion_nb.time_samplers import LevelSampler, LossSecondMomentSampler, growing_number
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
