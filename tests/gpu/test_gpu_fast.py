"""Fast and generate on a GPU: the guesses and pictures of the plain denoiser, compiled for real, with CUDA graphs."""

import pytest
import torch
from cases import CLASSES, COMPILER, DEVICE, ON_GPU, SHAPE, Small, denoiser, in_use, near, ready, unet, walk
from safetensors.torch import load_file

from diffusion_nb.denoisers import Clip
from diffusion_nb.generation.fast import CompiledDenoiser
from diffusion_nb.generation.generate import generate
from diffusion_nb.grids import time_grid
from diffusion_nb.guidance import CFG
from diffusion_nb.noise import Noise
from diffusion_nb.samplers.linear import ddim, ddpm

WRAPS = {"plain": lambda d: d, "clipped": Clip, "guided": lambda d: Clip(CFG(d, 1.5, CLASSES))}
TOLERANCE = {False: 1e-4, True: 0.1}  # of a guess, relative: float32, bfloat16


@pytest.fixture
def y():
    return torch.arange(4, device=DEVICE)


def counters(of):
    return torch._dynamo.utils.counters[of]


def check_compiled(graphs):
    "So many graphs, all of them recorded as CUDA graphs."
    assert counters("stats")["unique_graphs"] == graphs
    if ON_GPU:
        assert not counters("inductor")["cudagraph_skips"] and not counters("graph_break")


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("wrap, net", [("guided", unet), ("plain", Small), ("clipped", Small)])
def test_a_fast_guess_is_the_guess(wrap, net, bf16, y):
    "At the call that compiles, at those that record, and at those that play back."
    model = ready(WRAPS[wrap](denoiser(net(), "cosine")))
    fast, noise = CompiledDenoiser(model, bf16=bf16, **COMPILER), Noise(range(4), SHAPE, DEVICE)
    kept = []
    for k in range(6):
        t = torch.tensor(1 - k / 6, dtype=torch.float64, device=DEVICE)
        with torch.no_grad():
            want = model(noise(k), t, y=y)
        kept.append((fast(noise(k), t, y=y), want))
    for got, want in kept:  # the later calls have not changed the earlier guesses
        for part in ("x_t", "alpha", "sigma", "x0"):
            near(getattr(got, part), getattr(want, part), TOLERANCE[bf16])
    check_compiled(1)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "heun", "dpmpp_2m", "dpmpp_2m_sde"])
def test_fast_walks(sampler, bf16):
    model = ready(Clip(denoiser(Small(), "cosine")))
    fast, noise = CompiledDenoiser(model, bf16=bf16, **COMPILER), Noise(range(4), SHAPE, DEVICE)
    want = walk(sampler, model, noise)
    for _ in range(3):
        near(walk(sampler, fast, noise), want, 3 * TOLERANCE[bf16])
    check_compiled(1)


def test_each_of_many_is_compiled(y):
    "PyTorch compiles one code object eight times, and then runs it as it is, without an error."
    noise, t = Noise(range(4), SHAPE, DEVICE), torch.tensor(0.5, dtype=torch.float64, device=DEVICE)
    for k in range(14):
        model = ready(denoiser(Small(seed=k), "cosine"))
        fast = CompiledDenoiser(model, **COMPILER)
        for i in range(4):
            near(fast(noise(i), t, y=y).x0, model(noise(i), t, y=y).x0, TOLERANCE[False])
        check_compiled(k + 1)


def test_memory_is_flat(y):
    fast, noise = CompiledDenoiser(ready(denoiser(Small(), "cosine")), **COMPILER), Noise(range(4), SHAPE, DEVICE)
    seen = []
    for _ in range(7):
        ddim(fast, noise(0), time_grid(50), y=y)
        seen.append(in_use())
    assert seen[-1] - seen[1] < 250 * (512 if ON_GPU else 3000)


# generate


def cond(seeds):
    return {"y": seeds % CLASSES}


def drawn(folder, model, chunk, n=10):
    "The pictures that `generate` writes, so many at a time."
    out = folder / f"{chunk}.safetensors"
    assert generate(out, model, ddpm, time_grid(6), n, SHAPE, cond=cond, chunk=chunk)
    found = load_file(out)
    assert found["seeds"].tolist() == list(range(n)) and found["labels"].equal(found["seeds"] % CLASSES)
    return found["pictures"]


@pytest.mark.parametrize("wrap", WRAPS)
def test_generate_draws_what_the_cpu_draws_whatever_the_chunk(wrap, tmp_path):
    model = WRAPS[wrap](denoiser(unet(), "cosine"))
    (tmp_path / "cpu").mkdir()
    want = drawn(tmp_path / "cpu", ready(model, torch.device("cpu")), 10)
    for chunk in (1, 4, 7, None):
        near(drawn(tmp_path, ready(model), chunk), want, 1e-3)


@pytest.mark.parametrize("bf16", [False, True])
def test_generate_with_a_fast_denoiser(bf16, tmp_path):
    "With another chunk the last places differ, which bfloat16 shows."
    model = ready(Clip(denoiser(Small(), "cosine")))
    want, fast = drawn(tmp_path, model, 5), CompiledDenoiser(model, bf16=bf16, **COMPILER)
    for chunk in (4, 7):
        (tmp_path / str(chunk)).mkdir()
        near(drawn(tmp_path / str(chunk), fast, chunk), want, 3 * TOLERANCE[bf16])
    check_compiled(2)  # a shape each


def test_generate_stopped_and_gone_on_with_is_the_same_bit_for_bit(tmp_path):
    model = ready(Clip(denoiser(unet(), "cosine")))
    want = drawn(tmp_path, model, 4)

    def stops(*args, **options):
        stops.calls += 1
        if stops.calls == 2:
            raise KeyboardInterrupt
        return ddpm(*args, **options)

    stops.calls = 0
    call = lambda: generate(tmp_path / "a.safetensors", model, stops, time_grid(6), 10, SHAPE, cond=cond, chunk=4)  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        call()
    assert call() and stops.calls == 4
    assert load_file(tmp_path / "a.safetensors")["pictures"].equal(want)
