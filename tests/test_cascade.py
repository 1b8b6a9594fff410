"""Cascades: the stage that enlarges and what it is told, the augmented loss, the blur, stopped walks; bad input."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from diffusion_nb.denoisers import Denoiser, Edited, NetDenoiser, Prediction, predict_v
from diffusion_nb.experiments.cascade import (
    UpsamplerRecipe,
    detail,
    quarters,
    upsampler_denoiser,
    upsampler_trainer,
)
from diffusion_nb.grids import stopped_grid, time_grid
from diffusion_nb.losses.cascade import augmented_loss, blur, blurred, noised
from diffusion_nb.losses.simple import denoising_loss
from diffusion_nb.nets.unet import UNet, parameters
from diffusion_nb.nets.upsampler import LevelReader, Upsampler, enlarged
from diffusion_nb.noise import Noise
from diffusion_nb.samplers.cascade import upsample
from diffusion_nb.samplers.consistency import super_resolve
from diffusion_nb.samplers.linear import ddpm, dpmpp_2m
from diffusion_nb.schedules import CosineSchedule


def stage(classes=0, channels=1):
    "A stage whose weights are all moved, none zero, as if trained."
    torch.manual_seed(0)
    net = UNet(2 * channels, 8, (1, 2), 1, (), channels_out=channels, condition=LevelReader(32, classes))
    with torch.no_grad():
        for p in net.parameters():
            p += 0.1 * torch.randn_like(p)
    return Upsampler(net).eval()


def inputs(n=3, channels=1):
    x, low = (Noise(range(n), (channels, size, size))(0) for size in (8, 4))
    return x, torch.linspace(30, 900, n), low, torch.linspace(0, 0.5, n)


def test_the_small_picture_is_enlarged_as_bilinear_interpolation_does():
    low = torch.arange(4.0).reshape(1, 1, 1, 4).expand(1, 1, 2, 4)
    row = torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])  # pixel centres lie a quarter from the old ones
    assert torch.allclose(enlarged(low), row.expand(1, 1, 4, 8))
    assert enlarged(low, 4).shape == (1, 1, 8, 16)


def test_a_stage_is_its_network_on_both_pictures_and_reads_the_level_of_each():
    net, (x, t, low, s) = stage(), inputs()
    out = net(x, t, low, s)
    assert torch.equal(out, net.net(torch.cat([x, enlarged(low)], 1), t, (s, None)))
    alone = torch.cat([net(x[i : i + 1], t[i : i + 1], low[i : i + 1], s[i]) for i in range(3)])
    assert torch.allclose(out, alone, atol=1e-5)  # one level for all is one for each
    other = net(x, t, low, s.flip(0))
    assert not torch.allclose(out[0], other[0], atol=1e-4) and torch.allclose(out[1], other[1], atol=1e-6)


def test_a_fresh_stage_does_not_read_level_and_label_yet():
    reader = LevelReader(16, 3)
    assert not reader((torch.rand(4), torch.arange(4))).any()
    assert reader.check_y((torch.rand(4), torch.arange(4))) is None


def test_labels_reach_the_network():
    net, (x, t, low, s) = stage(classes=3), inputs()
    a, b = (net(x, t, low, s, torch.tensor(y)) for y in ([0, 1, 2], [0, 2, 3]))
    assert torch.allclose(a[0], b[0], atol=1e-6) and not torch.allclose(a[1:], b[1:], atol=1e-4)


@pytest.mark.parametrize("change, said", [
    (dict(low=torch.zeros(3, 1, 8, 8)), r"low: expected \(3, 1, 4, 4\)"),
    (dict(low=torch.zeros(2, 1, 4, 4)), r"low: expected"),
    (dict(s=torch.tensor([0.0, 0.5, 1.5])), "s: expected a time from 0 to 1"),
    (dict(s=torch.tensor([0.0, float("nan"), 0.5])), "s: expected a time from 0 to 1"),
    (dict(y=torch.tensor([0, 1, 2])), "knows no labels"),
])  # fmt: skip
def test_bad_input_is_named(change, said):
    x, t, low, s = inputs()
    with pytest.raises(ValueError, match=said):
        stage()(x, t, **(dict(low=low, s=s) | change))


def test_missing_and_unknown_labels_are_named():
    x, t, low, s = inputs()
    with pytest.raises(ValueError, match="y: expected a label"):
        stage(classes=3)(x, t, low, s)
    with pytest.raises(ValueError, match="y"):
        stage(classes=3).check_y(torch.tensor([0, 4]))


def test_noised_pictures_come_with_the_time_they_were_noised_to():
    torch.manual_seed(0)
    low = torch.full((4000, 1, 4, 4), 2.0)
    schedule = CosineSchedule()
    given, s = noised(low, schedule, 0.8)
    assert 0 <= s.min() < 0.01 and 0.79 < s.max() <= 0.8 and abs(s.mean() - 0.4) < 0.02
    alpha, sigma = (c.float()[:, None, None, None] for c in schedule(s))
    eps = ((given - alpha * low) / sigma)[s > 0.05]
    assert abs(eps.mean()) < 0.02 and abs(eps.var() - 1) < 0.03
    assert (
        abs((eps.square().mean((1, 2, 3)) * (s[s > 0.05] > 0.4)).sum() / (s > 0.4).sum() - 1) < 0.05
    )  # late times, too


class Recorder(Denoiser):
    "Guesses zeros, and keeps what it was given."

    def __init__(self):
        super().__init__()
        self.schedule, self.given = CosineSchedule(), []

    def forward(self, x_t, t, **cond):
        self.given.append(cond)
        alpha, sigma = (torch.as_tensor(c).to(x_t.dtype).reshape(-1, 1, 1, 1) for c in self.schedule(t))
        return Prediction(x_t, alpha, sigma, torch.zeros_like(x_t))


def test_the_augmented_loss_is_the_loss_with_what_the_augmentation_gives():
    x, low, eps = Noise(range(3), (1, 8, 8))(0), Noise(range(3), (1, 4, 4))(1), Noise(range(3), (1, 8, 8))(2)
    seen, t = Recorder(), torch.tensor([0.2, 0.5, 0.8])
    halves = lambda low: (low / 2, torch.full((3,), 0.25))
    got = augmented_loss(seen, x, t, eps, low, augment=halves, y=torch.arange(3))
    want = denoising_loss(Recorder(), x, t, eps)
    assert torch.equal(got, want) and torch.equal(seen.given[0]["low"], low / 2)
    assert torch.equal(seen.given[0]["s"], torch.full((3,), 0.25)) and torch.equal(
        seen.given[0]["y"], torch.arange(3)
    )


def test_the_blur_is_the_gaussian_of_its_width():
    dot = torch.zeros(2, 2, 5, 5)
    dot[:, :, 2, 2] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    width = torch.tensor([0.4, 0.6])
    got = blur(dot, width)
    side = torch.exp(-0.5 / width**2)
    for i in range(2):
        line = torch.stack([side[i], torch.tensor(1.0), side[i]]) / (1 + 2 * side[i])
        kernel = F.pad(line[:, None] * line, (1, 1, 1, 1))
        assert torch.allclose(got[i], dot[i, :, 2, 2][:, None, None] * kernel, atol=1e-6)
    flat = torch.full((2, 1, 4, 6), 0.7)
    assert torch.allclose(blur(flat, width), flat)  # edges repeat


def test_half_of_the_pictures_are_blurred_and_nobody_is_told():
    torch.manual_seed(0)
    low = Noise(range(1000), (1, 4, 4))(0)
    given, s = blurred(low)
    same = (given == low).flatten(1).all(1)
    assert not s.any() and abs(same.float().mean() - 0.5) < 0.05
    least, most = (blur(low, torch.full((1000,), w)) for w in (0.4, 0.6))
    spread = lambda x: x.flatten(1).var(1)[~same]
    assert (spread(given) <= spread(least) * 1.001).float().mean() > 0.95 and (spread(given) >= spread(most) * 0.999).float().mean() > 0.95  # fmt: skip


def test_a_stopped_grid_ends_at_s():
    assert stopped_grid(time_grid(4), 0.6).tolist() == [1, 0.75, 0.6]
    assert stopped_grid(time_grid(4), 0.5).tolist() == [1, 0.75, 0.5]
    assert stopped_grid(time_grid(4), 0.0).tolist() == time_grid(4).tolist()
    for s in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="s: expected a time"):
            stopped_grid(time_grid(4), s)


@pytest.mark.parametrize("sampler", [ddpm, dpmpp_2m])
def test_upsampling_is_sampling_with_two_conditions(sampler):
    net = NetDenoiser(stage(), CosineSchedule(), predict_v).eval()
    _, _, low, _ = inputs()
    noise, ts = Noise(range(3), (1, 8, 8)), time_grid(5)
    got = upsample(net, low, 0.3, ts, noise=noise, sampler=sampler)
    start = net.schedule(ts[0])[1].float() * noise(0)
    assert torch.equal(got, sampler(net, start, ts, noise=noise, low=low, s=torch.full((3,), 0.3)))
    alone = upsample(net, low[1:2], 0.3, ts, noise=Noise([1], (1, 8, 8)), sampler=sampler)
    assert torch.allclose(got[1:2], alone, atol=1e-5)


def test_kept_means_are_those_of_the_small_picture_and_nothing_else_moves():
    x, small = Noise(range(3), (2, 8, 8))(0), Noise(range(3), (2, 4, 4))(1)
    plain = ExactlyHalf()
    kept = Edited(plain, super_resolve(small)).eval()(x, torch.tensor(0.5), low=small)
    assert torch.allclose(F.avg_pool2d(kept.x0, 2), small, atol=1e-6)
    assert torch.allclose(detail(kept.x0), detail(plain(x, torch.tensor(0.5), low=small).x0), atol=1e-6)
    assert kept.x_t is x and plain.given["low"] is small


class ExactlyHalf(Denoiser):
    "Guesses half of x_t."

    def __init__(self):
        super().__init__()
        self.schedule, self.given = CosineSchedule(), None

    def forward(self, x_t, t, **cond):
        self.given = cond
        return Prediction(x_t, *self.schedule(t), x_t / 2)


def test_a_recipe_trains_a_stage_that_uses_the_small_picture():
    "On pictures of one grey each, which the small picture tells."
    r = UpsamplerRecipe(width=8, mults=(1,), patch=2, steps=60, batch=16, lr=0.01, ema=0.9, classes=2, warmup=5)
    grey = torch.linspace(-1, 1, 64).reshape(-1, 1, 1, 1)
    x, low, y = grey.expand(-1, 1, 8, 8), grey.expand(-1, 1, 4, 4), torch.arange(64) % 2
    augment = partial(noised, schedule=CosineSchedule(), most=0.2)
    denoiser = upsampler_trainer(r, x, low, y, device="cpu", augment_low=augment).fit().eval()
    with torch.no_grad():
        noise, t = Noise(range(64), (1, 8, 8))(0), torch.tensor(0.999)
        right, wrong = (denoiser(noise, t, low=given, s=torch.zeros(64), y=y).x0 for given in (low, low.flip(0)))
    assert (right - x).square().mean() < 0.7 * x.square().mean() and (
        wrong - x
    ).square().mean() > x.square().mean()


def test_detail_and_quarters():
    x = Noise(range(2), (3, 8, 8))(0)
    assert torch.allclose(F.avg_pool2d(detail(x), 2), torch.zeros(2, 3, 4, 4), atol=1e-6)
    assert torch.allclose(
        detail(x)[:, :, :2, :2], x[:, :, :2, :2] - x[:, :, :2, :2].mean((2, 3), keepdim=True), atol=1e-6
    )
    assert torch.equal(quarters(x)[2:4], x[:, :, :4, 4:]) and quarters(x).shape == (8, 3, 4, 4)


def test_the_shipped_recipe_has_the_shipped_size():
    assert parameters(upsampler_denoiser(UpsamplerRecipe(), 3).net) == 347_500
