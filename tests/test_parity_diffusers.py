"""The same numbers as diffusers: betas, q(x_t | x_0), every step of the reverse chain, the U-Net."""

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.schedulers import scheduling_ddpm
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from diffusion_nb.denoisers import Prediction
from diffusion_nb.forward import posterior_steps, q_posterior, q_sample
from diffusion_nb.models.diffusers import names
from diffusion_nb.nets.unet import ADM, IMPROVED, UNet, cos_first_embedding, parameters
from diffusion_nb.noise import Noise
from diffusion_nb.schedules import DDPMSchedule, cosine_betas, linear_betas, zero_terminal_snr
from diffusion_nb.util.checks import expand_as

T = 1000
BETAS = {"linear": linear_betas(T), "squaredcos_cap_v2": cosine_betas(T)}
F64 = torch.float64


def pictures(step, n, shape=(3, 4, 4)):
    return Noise(range(n), shape, dtype=F64)(step)


def scheduler(betas, **options) -> DDPMScheduler:
    "Theirs with its tables, which it keeps in float32, computed again in float64."
    theirs = DDPMScheduler(len(betas), clip_sample=False, **options)
    theirs.betas, theirs.one = betas, torch.ones((), dtype=F64)
    theirs.alphas = 1 - betas
    theirs.alphas_cumprod = theirs.alphas.cumprod(0)
    return theirs


# betas


@pytest.mark.parametrize("name", BETAS)
def test_betas(name):
    theirs = DDPMScheduler(T, beta_schedule=name).betas
    # Theirs are rounded to float32, half a unit in the last place (2^-24) or a few of them where linspace adds.
    torch.testing.assert_close(theirs.double(), BETAS[name], rtol=4 * 2**-24, atol=0)


@pytest.mark.parametrize("name", BETAS)
def test_betas_of_zero_terminal_snr(name):
    theirs = rescale_zero_terminal_snr(BETAS[name].float()).double()
    ours = zero_terminal_snr(BETAS[name])
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)  # theirs is computed in float32
    assert ours[-1] == 1 and DDPMSchedule(ours)(torch.ones((), dtype=F64))[0] == 0


def test_linear_betas_of_shorter_chains_keep_the_total_noise():
    theirs = DDPMScheduler(250, beta_start=4e-4, beta_end=0.08).betas
    torch.testing.assert_close(theirs.double(), linear_betas(250), rtol=4 * 2**-24, atol=0)


# q(x_t | x_0)


@pytest.mark.parametrize("name", BETAS)
def test_add_noise_at_every_time(name):
    theirs, ours = scheduler(BETAS[name]), DDPMSchedule(BETAS[name])
    i = torch.arange(T)
    x0, eps = pictures(0, T), pictures(1, T)
    want = theirs.add_noise(x0, eps, i)  # their index i is our time (i + 1) / T
    # Theirs takes 1 - ᾱ from ᾱ: an error of 1e-16 in 1 - ᾱ ≥ 4e-5, so 1e-14 in its root; times eps < 6.
    torch.testing.assert_close(
        q_sample(ours, x0, (i + 1) / T, eps), want, rtol=0, atol=3e-7
    )  # t rounded to float32
    torch.testing.assert_close(q_sample(ours, x0, (i + 1).double() / T, eps), want, rtol=0, atol=1e-13)


# q(x_s | x_t, x_0)


@pytest.mark.parametrize("kind", ["small", "large"])
@pytest.mark.parametrize("name", BETAS)
def test_one_reverse_step_at_every_time(name, kind, monkeypatch):
    theirs, ours = scheduler(BETAS[name], variance_type=f"fixed_{kind}"), DDPMSchedule(BETAS[name])
    x, eps, noise = pictures(0, T), pictures(1, T), pictures(2, T)
    t = torch.arange(1, T + 1, dtype=F64) / T
    s = torch.arange(T, dtype=F64) / T

    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: now)
    want = []
    for i in range(T):
        now = noise[i : i + 1]
        want.append(theirs.step(eps[i : i + 1], i, x[i : i + 1]).prev_sample)

    alpha, sigma = (expand_as(c, x) for c in ours(t))
    pred = Prediction(x, alpha, sigma, (x - sigma * eps) / alpha)
    mean, _ = q_posterior(ours, x, pred.x0, s, t)
    var = getattr(posterior_steps(ours, s, t), kind) * (
        s > 0
    )  # nothing is added by the step that ends at the data
    got = mean + expand_as(var.sqrt(), x) * noise
    # Theirs loses digits in 1 - ᾱ_t/ᾱ_s = β ≥ 4e-5 (relative error 1e-16 / 4e-5 = 3e-12), and multiplies that by x0,
    # which reaches 2e4 at the end of the cosine chain: so the tolerance is relative to that.
    size = 1 + pred.x0.abs().amax((1, 2, 3))
    error = (got - torch.cat(want)).abs().amax((1, 2, 3)) / size
    assert error.max() < 1e-11
    assert error[0] < 1e-11 and s[0] == 0  # the last step taken, to the data


@pytest.mark.parametrize("name", BETAS)
def test_variances_at_every_time(name):
    theirs, ours = scheduler(BETAS[name]), DDPMSchedule(BETAS[name])
    i = torch.arange(T, dtype=F64)
    step = posterior_steps(ours, i / T, (i + 1) / T)
    small = torch.stack([theirs._get_variance(k, variance_type="fixed_small") for k in range(T)])
    large = torch.stack([theirs._get_variance(k, variance_type="fixed_large") for k in range(T)])
    torch.testing.assert_close(step.large, BETAS[name], rtol=1e-10, atol=0)
    torch.testing.assert_close(step.large, large, rtol=1e-10, atol=0)
    torch.testing.assert_close(step.small[1:], small[1:], rtol=1e-10, atol=0)
    # At the last step q(x_0 | x_1, x_0) is a point: the variance is 0. Theirs is clamped so that its logarithm exists.
    assert step.small[0] == 0 and small[0] == 1e-20


def test_steps_that_skip_times(monkeypatch):
    theirs, ours = scheduler(BETAS["linear"], variance_type="fixed_small"), DDPMSchedule(BETAS["linear"])
    theirs.set_timesteps(50)  # 980, 960, …, 0
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: noise)
    x, eps, noise = (pictures(k, 1) for k in range(3))
    for i in theirs.timesteps.tolist():
        t, s = (torch.tensor((j + 1) / T, dtype=F64) for j in (i, max(i - 20, -1)))
        alpha, sigma = ours(t)
        mean, var = q_posterior(ours, x, (x - sigma * eps) / alpha, s, t)
        want = theirs.step(eps, i, x).prev_sample
        torch.testing.assert_close(mean + var.sqrt() * noise, want, rtol=0, atol=1e-11)


# the U-Net

DDPM = dict(downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6)
OTHER = dict(
    downsample_padding=1,
    flip_sin_to_cos=True,
    freq_shift=0,
    norm_eps=1e-5,
    num_class_embeds=7,
    attention_head_dim=32,
)


def both(channels: tuple[int, ...], layers: int, attention: tuple[int, ...], conventions: dict = DDPM, **options) -> tuple[UNet, UNet2DModel]:  # fmt: skip
    "Our network and theirs with the same weights, in float64."
    levels = len(channels)
    down = ["AttnDownBlock2D" if i in attention else "DownBlock2D" for i in range(levels)]
    up = ["AttnUpBlock2D" if i in attention else "UpBlock2D" for i in reversed(range(levels))]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = UNet2DModel(
            sample_size=32, layers_per_block=layers, block_out_channels=channels, down_block_types=down,
            up_block_types=up, norm_num_groups=32, act_fn="silu", time_embedding_type="positional",
            **{"attention_head_dim": None} | conventions,
        ).double().eval()  # fmt: skip
        for (
            name,
            p,
        ) in theirs.named_parameters():  # norms start as the identity, which any norm's weights would match
            if "norm" in name:
                torch.nn.init.normal_(p, mean=float(name.endswith("weight")), std=0.3)
    ours = UNet(3, channels[0], [c // channels[0] for c in channels], layers, attention, **options).double().eval()
    weights = theirs.state_dict()
    table = names(levels, layers, attention, set(ours.state_dict()))
    used = [name for group in table.values() for name in group]
    assert len(used) == len(set(used)) and set(used) == set(weights), "each of their parameters, once"
    assert set(table) == set(ours.state_dict()), "each of ours"
    ours.load_state_dict({name: torch.cat([weights[n] for n in group]) for name, group in table.items()})
    return ours, theirs


def agree(ours, theirs, x, t, y=None):
    "Outputs, and the gradients of a loss with respect to the input, agree."
    results = []
    for net in (lambda x, t: ours(x, t.float(), y), lambda x, t: theirs(x, t, class_labels=y).sample):
        x = x.detach().requires_grad_()
        out = net(x, t)
        out.square().mean().backward()
        results.append((out.detach(), x.grad))
    (out, grad), (out_theirs, grad_theirs) = results
    assert out_theirs.std() > 0.1 and grad_theirs.abs().max() > 1e-6  # the agreement is not one of zeros
    # The time's sines are the same float32 numbers in both; the rest is float64, and differs by 1e-14 (sums in another
    # order, over some 20 layers). At 1e-5 the epsilon of a norm could be wrong unnoticed, so 1e-9.
    torch.testing.assert_close(out, out_theirs, rtol=0, atol=1e-9)
    torch.testing.assert_close(grad, grad_theirs, rtol=0, atol=1e-9 * grad_theirs.abs().max().item())


def test_small_unet_agrees():
    ours, theirs = both((128, 256), layers=1, attention=(0,))
    agree(ours, theirs, pictures(0, 3, (3, 8, 8)), torch.tensor([0.0, 37.0, 999.0], dtype=F64))


def test_unet_with_the_conventions_of_the_later_programs_agrees():
    "The time by cos, then sin, at frequencies i/half; what is added to a variance; padding on all sides; the label behind the time; several heads."
    conventions = dict(
        time_embedding=cos_first_embedding, eps=1e-5, symmetric=True, label_after=True, head_width=32
    )
    ours, theirs = both((128, 256), 1, (0,), OTHER, classes=7, **conventions)
    x, t, y = pictures(0, 3, (3, 8, 8)), torch.tensor([0.0, 37.0, 999.0], dtype=F64), torch.tensor([0, 3, 6])
    agree(ours, theirs, x, t, y)
    with pytest.raises(ValueError, match="expected labels from 0 to 6; got 0 to 7"):
        ours(x, t, torch.tensor([0, 3, 7]))
    heads = UNet(3, 128, (1, 2), 1, (0,), classes=7, **conventions | dict(head_width=0, heads=4)).double().eval()
    heads.load_state_dict(ours.state_dict())
    assert (
        heads.down[0][1].heads == 4 == ours.down[0][1].heads and heads.middle[1].heads == 4 != ours.middle[1].heads
    )


@pytest.mark.parametrize("published, options, conventions", [  # parameters, from the programs themselves
    (295_904_454, (192, (1, 2, 3, 4), 3, (1, 2, 3)), ADM | dict(classes=1000)),
    (421_529_606, (256, (1, 1, 2, 3, 4), 2, (2, 3, 4)), ADM | dict(classes=1000, head_width=0, heads=4)),
    (553_838_086, (256, (1, 1, 2, 2, 4, 4), 2, (3, 4, 5)), ADM | dict(classes=1000)),
    (552_814_086, (256, (1, 1, 2, 2, 4, 4), 2, (3, 4, 5)), ADM),
    (52_546_438, (128, (1, 2, 2, 2), 3, (1, 2)), IMPROVED),
    (121_063_942, (128, (1, 2, 3, 4), 3, (2, 3)), IMPROVED),
])  # fmt: skip
def test_the_published_networks_have_their_number_of_parameters(published, options, conventions):
    with torch.device("meta"):
        assert parameters(UNet(3, *options, channels_out=6, **conventions)) == published


def test_the_network_of_lsun_and_celeba_has_its_number_of_parameters():
    with torch.device("meta"):
        assert parameters(UNet(3, 128, (1, 1, 2, 2, 4, 4), 2, (4,))) == 113_673_219


def test_widths_may_be_halved():
    net = UNet(1, 16, (0.5, 1), 1, ())
    assert net.stem.out_channels == 8 and net.embed[0].in_features == 16
    assert net(torch.zeros(2, 1, 8, 8), torch.zeros(2)).shape == (2, 1, 8, 8)


def test_unet_in_the_cifar10_configuration_agrees():
    ours, theirs = both((128, 256, 256, 256), layers=2, attention=(1,))
    assert parameters(ours) == parameters(theirs) == 35_746_307
    agree(ours, theirs, pictures(0, 1, (3, 32, 32)), torch.tensor([500.0], dtype=F64))
