"""What the GPU computes is what the CPU computes: random bits exactly, all else to rounding."""

import pytest
import torch
from cases import (
    DEVICE,
    LEVELS,
    SAMPLERS,
    SCHEDULES,
    SHAPE,
    TASKS,
    Small,
    denoiser,
    near,
    pictures,
    ready,
    task,
    trainer,
    unet,
    walk,
)

from diffusion_nb.denoisers import Clip, DenoiserConsistency
from diffusion_nb.grids import time_grid
from diffusion_nb.guidance import CFG, interval
from diffusion_nb.likelihood.bits import bits_per_dim
from diffusion_nb.noise import Noise
from diffusion_nb.samplers.consistency import consistency_sample
from diffusion_nb.samplers.linear import invert
from diffusion_nb.samplers.sde import probability_flow

CPU = torch.device("cpu")
# Relative, of a walk of a few steps; on an H200 up to 1.7e-10, by dpmpp_2s on cosine betas, where alpha(1) is 5e-5.
FLOAT64, FLOAT32 = 1e-9, 1e-4


def drawn(dtype=torch.float32, device=DEVICE, n=4):
    "Noise whose numbers are the CPU's, on the device."
    noise = Noise(range(n), SHAPE)
    return lambda k: noise(k).to(device, dtype)


@pytest.mark.parametrize("step", [0, 1, 999, 2**24 - 1])
def test_bits_are_the_same(step):
    seeds = torch.cat([torch.arange(100), torch.tensor([2**40, 2**62, -1])])
    here, there = (Noise(seeds.to(d), (3, 5, 7), d) for d in (CPU, DEVICE))
    assert there.bits(step).device.type == DEVICE.type
    assert there.bits(step).cpu().equal(here.bits(step))
    near(there(step), here(step), 3e-6)  # of log and cos in float32, of numbers up to 6.7


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name):
    here, t = SCHEDULES[name](), torch.linspace(0, 1, 1001, dtype=torch.float64)
    there = SCHEDULES[name]().to(DEVICE)
    for a, b in zip(there(t.to(DEVICE)), here(t), strict=True):
        near(a, b, 1e-12)
    inside = t[1:-1]
    near(there.logsnr(inside.to(DEVICE)), here.logsnr(inside), 1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_in_float64(sampler, schedule):
    model = denoiser(Small(), schedule)
    ends = [
        walk(sampler, ready(model, device, torch.float64), drawn(torch.float64, device), device)
        for device in (DEVICE, CPU)
    ]
    near(*ends, FLOAT64)


WRAPS = {"plain": lambda d: d, "clipped": Clip, "guided": lambda d: Clip(CFG(d, interval(1.5, 0.2, 0.8), 10))}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_with_a_unet_in_float32(sampler, wrap):
    model = WRAPS[wrap](denoiser(unet(), "cosine"))
    ends = [walk(sampler, ready(model, d), drawn(device=d), d) for d in (DEVICE, CPU)]
    near(*ends, FLOAT32)


def test_flow_inversion_and_consistency():
    model, ts = denoiser(Small(), "cosine"), time_grid(5, start=0.9, end=0.1)
    ends = []
    for d in (DEVICE, CPU):
        there, z = ready(model, d, torch.float64), drawn(torch.float64, d)
        y = torch.arange(4, device=d)
        ends.append([
            probability_flow(there, z(0), ts, y=y),
            invert(there, z(0), ts.flip(0), y=y),
            consistency_sample(DenoiserConsistency(there), z(0), ts, noise=z, y=y),
        ])  # fmt: skip
    for (got, want), rtol in zip(zip(*ends, strict=True), (1e-4, FLOAT64, FLOAT64), strict=True):
        near(got, want, rtol)  # the flow to its solver's tolerance


@pytest.mark.parametrize("name", TASKS)
def test_losses_and_gradients(name):
    "In float32, of the first step: one loss a picture, and the gradient of their mean."
    got = []
    for d in (DEVICE, CPU):
        run = trainer(task(name, d), d)
        x0, t, eps, cond = next(run.batches(0))
        model = run.denoiser.eval()
        losses = run.loss(model, x0, t, eps, **cond)
        losses.mean().backward()
        got.append([losses, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(got[0]) == len(got[1]) > 20
    for a, b in zip(*got, strict=True):
        assert (a.cpu() - b).norm() <= 1e-3 * b.norm() + 1e-6


def test_bits_per_dim():
    model, x0, y = denoiser(Small(), "linear betas"), pictures(4), torch.arange(4)
    got = [bits_per_dim(ready(model, d), x0.to(d), time_grid(10), levels=LEVELS, y=y.to(d)) for d in (DEVICE, CPU)]
    for a, b in zip(*got, strict=True):
        near(a, b, FLOAT32)
