"""Corruptions: what they do at both ends, per sample and together, the rules of a step back, restorers and their loss."""

import math

import pytest
import torch

from diffusion_nb.corruption import (
    Blur,
    Corruption,
    Degradation,
    Gaussian,
    Mask,
    Pool,
    Restorer,
    Snow,
    afresh,
    ancestral,
    block_means,
    dct_matrix,
    kept,
    posterior,
    restoration_loss,
)
from diffusion_nb.experiments.cold import blur_times, emoji_corruptions, first_axis, level_starts, loss_of_kinds
from diffusion_nb.grids import time_grid
from diffusion_nb.mixtures import GMMDenoiser, random_mixture
from diffusion_nb.noise import Noise
from diffusion_nb.samplers.linear import ddim, ddpm
from diffusion_nb.schedules import CosineSchedule, DDPMSchedule, EDMSchedule, linear_betas

F64 = torch.float64
SCHEDULES = [CosineSchedule(), DDPMSchedule(linear_betas()), EDMSchedule()]


def pictures(n, size=16, seed=0, dtype=F64):
    return Noise(range(seed, seed + n), (2, size, size), dtype=dtype)(0)


@pytest.fixture(params=["blur", "pool", "mask", "snow", "snow each"])
def corruption(request):
    flakes = pictures(5, seed=50)
    return {
        "blur": Blur(16),
        "pool": Pool((1, 2, 4, 16)),
        "mask": Mask(16),
        "snow": Snow(flakes[0]),
        "snow each": Snow(flakes),
    }[request.param]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_gaussian_corruption_is_ddim_and_ddpm_to_the_last_bit(schedule, dtype):
    denoiser, noise, ts = (
        GMMDenoiser(random_mixture(), schedule),
        Noise(range(20), (2,), dtype=dtype),
        time_grid(12),
    )
    x, guess = schedule(ts[0])[1].to(dtype) * noise(0), lambda x, t, **cond: denoiser(x, t, **cond).x0
    y = torch.arange(20) % 3
    assert torch.equal(ancestral(Gaussian(schedule), guess, x, ts, y=y), ddim(denoiser, x, ts, y=y))
    drawn = ancestral(Gaussian(schedule), guess, x, ts, posterior, noise=noise, y=y)
    assert torch.equal(drawn, ddpm(denoiser, x, ts, noise=noise, y=y))


def test_gaussian_steps_with_a_time_for_each_sample():
    corruption, x, x0, z = Gaussian(CosineSchedule()), *(pictures(3, 4, seed=s) for s in (0, 9, 18))
    t, s = torch.tensor([0.9, 0.5, 0.3], dtype=F64), torch.tensor([0.8, 0.1, 0.2], dtype=F64)
    for step in (kept, posterior, afresh):
        one = [step(corruption, x[i : i + 1], x0[i : i + 1], s[i], t[i], z[i : i + 1]) for i in range(3)]
        assert torch.allclose(step(corruption, x, x0, s, t, z), torch.cat(one), rtol=1e-12)


def test_afresh_forgets_where_it_was():
    corruption, x, x0, z = Gaussian(CosineSchedule()), *(pictures(3, 4, seed=s) for s in (0, 9, 18))
    s, t = torch.tensor(0.4, dtype=F64), torch.tensor(0.7, dtype=F64)
    assert torch.equal(afresh(corruption, x, x0, s, t, z), afresh(corruption, -x, x0, s, t, z))
    alpha, sigma = CosineSchedule()(s)
    assert torch.allclose(afresh(corruption, x, x0, s, t, z), alpha * x0 + sigma * z)


def test_nothing_happens_at_time_0_and_each_sample_has_its_time(corruption):
    x, t = pictures(5), torch.tensor([0.0, 0.1, 0.35, 0.8, 1.0], dtype=F64)
    assert torch.allclose(corruption.degrade(x, torch.zeros((), dtype=F64)), x, atol=1e-12)
    together = corruption.degrade(x, t)
    for i in range(5):
        alone = corruption.degrade(x, t[i])[i]
        assert torch.allclose(together[i], alone, atol=1e-12)


def test_corruptions_are_linear_but_for_the_snow(corruption):
    x, y, t = pictures(5), pictures(5, seed=9), torch.tensor(0.6, dtype=F64)
    nothing = corruption.degrade(0 * x, t)
    got = corruption.degrade(2 * x + y, t) - nothing
    assert torch.allclose(
        got, 2 * (corruption.degrade(x, t) - nothing) + corruption.degrade(y, t) - nothing, atol=1e-12
    )


def test_the_kept_rule_with_the_right_guess_is_on_the_path(corruption):
    x0, t, s = pictures(5), torch.tensor(0.9, dtype=F64), torch.tensor(0.4, dtype=F64)
    corruption.sigma, eps = 0.3, pictures(5, seed=9)
    x_t = corruption.q_sample(x0, t, eps)
    assert torch.allclose(kept(corruption, x_t, x0, s, t, None), corruption.q_sample(x0, s, eps), atol=1e-12)
    assert not torch.allclose(corruption.q_sample(x0, s, eps), corruption.degrade(x0, s))


def test_snow_is_taken_away_whatever_is_guessed():
    snow, x0, ts = Snow(pictures(1, seed=7)[0]), pictures(4), time_grid(9)
    end = ancestral(snow, lambda x, t: 0.5 * x.flip(3) + 1, snow.q_sample(x0, ts[0]), ts)
    assert torch.allclose(end, x0, atol=1e-12)


def test_the_cosine_transform():
    C = dct_matrix(16)
    assert torch.allclose(C @ C.T, torch.eye(16, dtype=F64), atol=1e-12)
    k, n = torch.arange(16, dtype=F64)[:, None], torch.arange(16, dtype=F64)
    rows = (math.pi * k * (2 * n + 1) / 32).cos()
    assert torch.allclose(C, rows / rows.norm(dim=1, keepdim=True), atol=1e-12)


def test_the_blur_is_a_gaussian_with_mirrored_borders():
    x, width, reach = pictures(2, 32), 2.5, 20
    kernel = (-torch.arange(-reach, reach + 1, dtype=F64).square() / (2 * width**2)).exp()
    kernel /= kernel.sum()

    def along_rows(x):
        mirrored = torch.cat([x.flip(3), x, x.flip(3)], 3)[..., 32 - reach : 64 + reach]
        return torch.nn.functional.conv1d(mirrored.reshape(-1, 1, 32 + 2 * reach), kernel[None, None]).reshape(
            x.shape
        )

    want = along_rows(along_rows(x).mT).mT
    assert torch.allclose(Blur(32, width).degrade(x, torch.ones((), dtype=F64)), want, atol=1e-6)
    assert torch.allclose(Blur(32, 4 * width).degrade(x, torch.tensor(0.5, dtype=F64)), want, atol=1e-6)


def test_a_full_blur_leaves_the_mean_of_a_channel():
    x = pictures(3, 8)
    end = Blur(8).degrade(x, torch.ones((), dtype=F64))
    assert torch.allclose(end, x.mean((2, 3), keepdim=True).expand_as(x), atol=2e-3)
    assert torch.allclose(Pool((1, 2, 4, 8)).degrade(x, torch.ones(())), x.mean((2, 3), keepdim=True).expand_as(x))
    assert not Mask(8).degrade(x, torch.ones(())).any()


def test_pooling_passes_through_its_block_sizes():
    x = pictures(3)
    pool = Pool((1, 2, 8))
    assert torch.equal(pool.degrade(x, torch.tensor(0.5)), block_means(x, 2))
    between = pool.degrade(x, torch.tensor(0.75, dtype=F64))
    assert torch.allclose(between, (block_means(x, 2) + block_means(x, 8)) / 2)


def test_the_mask_grows_from_the_middle():
    ones, mask = torch.ones(1, 1, 33, 33, dtype=F64), Mask(33, soft=2.0)
    shares = [mask.degrade(ones, torch.tensor(t, dtype=F64)) for t in (0.0, 0.25, 0.5, 0.75, 1.0)]
    for earlier, later in zip(shares, shares[1:], strict=False):
        assert (later <= earlier).all() and later.sum() < earlier.sum()
    assert shares[1][0, 0, 16, 16] == 0 and shares[1][0, 0, 0, 0] == 1


def test_the_walk_calls_back_and_counts_its_noise():
    corruption, seen, asked = Blur(16, sigma=0.1), [], []
    noise = Noise(range(2), (2, 16, 16), dtype=F64)

    def counted(k):
        asked.append(k)
        return noise(k)

    end = ancestral(corruption, lambda x, t: x / 2, pictures(2), time_grid(3), afresh, noise=counted,
                    callback=lambda i, x, x0_hat: seen.append((i, x, x0_hat)))  # fmt: skip
    assert asked[-3:] == [1, 2, 3] and [i for i, *_ in seen] == [0, 1, 2]
    assert torch.equal(seen[-1][1], end) and torch.equal(seen[0][2], pictures(2) / 2)


def test_a_sample_does_not_depend_on_its_batch():
    walk = lambda seeds: ancestral(Blur(16, sigma=0.1), lambda x, t: x * 0.7, pictures(1).expand(len(seeds), -1, -1, -1), time_grid(4), afresh,
                                   noise=Noise(seeds, (2, 16, 16), dtype=F64))  # fmt: skip
    assert torch.equal(walk([3, 4, 5])[1:2], walk([4]))


def test_wrong_times_and_noise_are_refused():
    x = pictures(2)
    with pytest.raises(ValueError, match="fall"):
        ancestral(Blur(16), lambda x, t: x, x, torch.linspace(0, 1, 4))
    with pytest.raises(ValueError, match="noise"):
        ancestral(Blur(16), lambda x, t: x, x, time_grid(3), noise=Noise(range(3), (2, 16, 16)))
    for unfinished in (
        lambda: Corruption().q_sample(x, x, x),
        lambda: Corruption().re_corrupt(x, x, x, x),
        lambda: Degradation().degrade(x, x),
    ):
        with pytest.raises(NotImplementedError):
            unfinished()


class Doubling(torch.nn.Module):
    def forward(self, x, time, **cond):
        assert time.shape == (len(x),)
        return x * time[:, None, None, None] / 1000


def test_the_loss_is_the_mean_absolute_error_of_the_restored_pixels():
    restorer, x0, eps = Restorer(Doubling(), Blur(16, sigma=0.2)), pictures(3), pictures(3, seed=9)
    t = torch.tensor([0.1, 0.4, 0.9], dtype=F64)
    x_t = restorer.corruption.degrade(x0, t) + 0.2 * eps
    guess = x_t * (1 + t.float().double()[:, None, None, None])
    want = (guess - x0).abs().mean((1, 2, 3))
    assert torch.allclose(restoration_loss(restorer, x0, t, eps), want, rtol=1e-5)


def test_each_emoji_is_corrupted_as_its_label_says():
    kinds = list(emoji_corruptions(0.1).values())
    x0, eps, t = (Noise(range(s, s + 3), (3, 32, 32))(0) for s in (0, 9, 18))
    t, y = torch.tensor([0.5, 0.6, 0.7]), torch.tensor([2, 0, 1])
    restorer = Restorer(Doubling(), kinds[0])
    got = loss_of_kinds(restorer, x0, t, eps, y)
    want = [
        restoration_loss(Restorer(Doubling(), kinds[k]), x0[i : i + 1], t[i : i + 1], eps[i : i + 1])
        for i, k in enumerate(y)
    ]
    assert torch.allclose(got, torch.cat(want), rtol=1e-5)


def test_times_of_a_blur_and_starts_without_pictures():
    ts = blur_times(Blur(8), 24)
    widths = 10 * ts.square()
    assert ts[0] == 1 and len(ts) == 24 and widths[-1].item() == pytest.approx(0.35)
    assert torch.allclose(widths[1:] / widths[:-1], widths[1] / widths[0])
    x = torch.stack([torch.full((1, 4, 4), float(v)) for v in (0, 2, 10, 14)])
    y = torch.tensor([0, 0, 1, 1])
    wanted = torch.tensor([0, 1]).repeat(500)
    starts = level_starts(x, y, wanted, range(1000))
    assert torch.equal(starts, starts[:, :, :1, :1].expand(-1, -1, 4, 4))
    levels = starts[:, 0, 0, 0]
    assert levels[wanted == 0].mean() == pytest.approx(1, abs=0.3)
    assert levels[wanted == 1].std() == pytest.approx(8**0.5, rel=0.1)


def test_the_first_axis_of_a_line_and_of_a_ball():
    y = torch.zeros(400, dtype=torch.long)
    line = torch.randn(400, 1, generator=torch.Generator().manual_seed(0)) * torch.ones(5) + 3
    assert first_axis(line, y) == pytest.approx(1, abs=1e-5)
    ball = torch.randn(400, 5, generator=torch.Generator().manual_seed(0))
    assert 0.2 <= first_axis(ball, y) < 0.3
