"""Nothing waits for the GPU in a training step, nor in a step of a sampler."""

import pytest
import torch
from cases import (
    COMPILER,
    DEVICE,
    ON_GPU,
    SAMPLERS,
    SCHEDULES,
    SHAPE,
    TASKS,
    Small,
    Watch,
    denoiser,
    no_syncs,
    ready,
    simple,
    task,
    trainer,
    unet,
    walk,
)

from diffusion_nb.denoisers import Clip
from diffusion_nb.generation.fast import CompiledDenoiser
from diffusion_nb.guidance import CFG, interval
from diffusion_nb.losses.simple import truncated_snr
from diffusion_nb.noise import Noise


def looking(x):
    return x.sum().item()


def test_a_wait_is_noticed():
    x = torch.ones(3, device=DEVICE)
    with pytest.raises(RuntimeError if ON_GPU else AssertionError, match="synchronizing" if ON_GPU else "looking"):
        with no_syncs():
            looking(x)


FUSED = {} if ON_GPU else dict(skip=True)  # with it a CPU, too, takes the fused optimiser, which does not look


def step_without_waiting(given, **options):
    "Two steps to compile and warm up, and two that must not wait."
    run = trainer(given, **FUSED | options)
    run.train_step(), run.train_step()
    with no_syncs():
        run.train_step(), run.train_step()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_training_step_under_every_schedule(schedule):
    step_without_waiting(simple(unet, schedule, truncated_snr))


@pytest.mark.parametrize("name", TASKS)
def test_a_training_step_of_every_objective(name):
    step_without_waiting(task(name))


OPTIONS = {
    "bf16, compiled": dict(bf16=True, compile=True),
    "in parts": dict(accumulate=2),
    "left out": dict(skip=True),
}


@pytest.mark.parametrize("options", OPTIONS)
def test_a_training_step_however_it_is_done(options):
    step_without_waiting(task("v"), **OPTIONS[options])


def walk_without_waiting(sampler, model, warm=0):
    "A walk whose first step may wait; before it, so many to compile and warm up."
    noise, watch = Noise(range(4), SHAPE, DEVICE), Watch()
    for _ in range(warm):
        walk(sampler, model, noise)
    try:
        walk(sampler, model, noise, callback=lambda i, x, pred: watch.start() if i == 0 else None)
    finally:
        watch.stop()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_samplers_step_under_every_schedule(sampler, schedule):
    walk_without_waiting(sampler, ready(denoiser(Small(), schedule)))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_samplers_step_with_guidance(sampler):
    walk_without_waiting(sampler, ready(Clip(CFG(denoiser(unet(), "cosine"), interval(1.5, 0.2, 0.8), 10))))


@pytest.mark.skipif(not ON_GPU, reason="counting waits on a CPU stops what is compiled")
@pytest.mark.parametrize("sampler", ["ddim", "heun, churn", "dpmpp_2m_sde"])
def test_a_samplers_step_with_cuda_graphs(sampler):
    fast = CompiledDenoiser(ready(Clip(CFG(denoiser(Small(), "cosine"), 1.5, 10))), bf16=True, **COMPILER)
    walk_without_waiting(sampler, fast, warm=2)
