"""Sampling at scale: operations counted, looks counted, the fast denoiser, and pictures that no kill, damage or division of labour changes."""

import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_nb.denoisers import Clip, Denoiser, NetDenoiser, Prediction, predict_v
from diffusion_nb.generation import generate as generating
from diffusion_nb.generation import record as records
from diffusion_nb.generation import store
from diffusion_nb.generation.fast import CompiledDenoiser
from diffusion_nb.generation.generate import generate
from diffusion_nb.generation.record import identity
from diffusion_nb.grids import time_grid
from diffusion_nb.guidance import CFG, interval
from diffusion_nb.losses.score import denoising_score_loss
from diffusion_nb.losses.simple import denoising_loss, truncated_snr
from diffusion_nb.mixtures import GMMDenoiser
from diffusion_nb.nets.conditioning import FourierFeatures
from diffusion_nb.nets.unet import UNet
from diffusion_nb.noise import Noise
from diffusion_nb.recipes.diffusion import recipe, recipe_trainer
from diffusion_nb.samplers.heun import heun
from diffusion_nb.samplers.linear import ddim, ddpm, dpmpp_2m, dpmpp_2m_sde
from diffusion_nb.schedules import CosineSchedule, DDPMSchedule, EDMSchedule, VESchedule, VPSchedule, linear_betas
from diffusion_nb.training.trainer import Trainer
from diffusion_nb.util import profiling
from diffusion_nb.util.checks import cpu_only
from diffusion_nb.util.images import to_bytes
from diffusion_nb.util.profiling import HostSyncs, flops, utilisation
from diffusion_nb.variances import fixed_large, fixed_small
from tools.kernels import SERVER

TS, SHAPE = time_grid(4), (1, 8, 8)


class Tiny(nn.Module):
    "Two convolutions that are told the time and a label."

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.one, self.two, self.label = (
                nn.Conv2d(1, 4, 3, padding=1),
                nn.Conv2d(4, 1, 3, padding=1),
                nn.Embedding(11, 4),
            )

    def forward(self, x, t, y):
        h = self.one(x) + self.label(y)[:, :, None, None] + (t.to(x.dtype) / 1000)[:, None, None, None]
        return self.two(torch.nn.functional.silu(h))


def tiny(seed=0):
    return NetDenoiser(Tiny(seed), DDPMSchedule(linear_betas()), predict_v).eval().requires_grad_(False)


class Counted(Denoiser):
    "Counts calls, and raises at the so-manieth."

    def __init__(self, denoiser, at=0, error=KeyboardInterrupt):
        super().__init__()
        self.denoiser, self.schedule, self._calls, self._at, self._error = (
            denoiser,
            denoiser.schedule,
            0,
            at,
            error,
        )

    def forward(self, x_t, t, **cond):
        self._calls += 1
        if self._calls == self._at:
            raise self._error
        return self.denoiser(x_t, t, **cond)


def labels(seeds):
    return {"y": seeds % 10}


def make(out, denoiser=None, sampler=ddpm, n=10, cond=labels, **options):
    return generate(out, denoiser or Counted(tiny()), sampler, TS, n, SHAPE, cond=cond, **options)


def drawn(seeds, denoiser=None):
    "The pictures of these seeds without `generate`."
    seeds = torch.as_tensor(seeds)
    noise = Noise(seeds, SHAPE)
    return ddpm(denoiser or tiny(), noise(0), TS, noise=noise, y=seeds % 10)


# counting


@pytest.mark.parametrize("c, d, k, stride, b", [(1, 1, 1, 1, 1), (3, 5, 3, 1, 2), (4, 8, 3, 2, 3)])
def test_a_convolution_counted_by_hand(c, d, k, stride, b):
    conv = nn.Conv2d(c, d, k, stride)
    out = (12 - k) // stride + 1
    assert flops(lambda: conv(torch.zeros(b, c, 12, 12))) == 2 * k * k * c * d * out * out * b


def test_attention_is_counted_on_every_device():
    n, c = 16, 8
    q = torch.zeros(1, 1, n, c)
    assert flops(lambda: nn.functional.scaled_dot_product_attention(q, q, q)) == 4 * n * n * c
    meta = q.to("meta")
    assert flops(lambda: nn.functional.scaled_dot_product_attention(meta, meta, meta)) == 4 * n * n * c


def test_a_backward_pass_is_two_forward_passes():
    layer, x = nn.Linear(6, 7, bias=False), torch.ones(5, 6, requires_grad=True)
    assert flops(lambda: layer(x).sum().backward()) == 3 * 2 * 5 * 6 * 7


def test_utilisation_is_work_by_time_by_peak(monkeypatch):
    monkeypatch.setattr(profiling, "seconds", lambda call: 0.5)
    layer, x = nn.Linear(10, 10), torch.zeros(5, 10)
    assert utilisation(lambda: layer(x), peak=4000) == pytest.approx(2 * 5 * 10 * 10 / 0.5 / 4000)
    assert utilisation(lambda: None, peak=4000, done=600) == pytest.approx(0.3)


def test_seconds_leaves_the_first_out():
    waits = iter([0.2, 0.0, 0.0])
    assert profiling.seconds(lambda: time.sleep(next(waits)), 2) < 0.1


# looks


@pytest.mark.parametrize("look", [
    lambda x: x[0].item(), lambda x: x.tolist(), lambda x: bool(x[0] > 0), lambda x: float(x[0]), lambda x: int(x[0]), lambda x: x.cpu(),
    lambda x: x.numpy(), lambda x: x.nonzero(), lambda x: x.new_tensor(0.3), lambda x: torch.tensor([1.0]), lambda x: 1 if x[0] else 0,
    lambda x: x[x > 0.5], lambda x: torch.equal(x, x), lambda x: torch.allclose(x, x), lambda x: x.unique(),
])  # fmt: skip
def test_a_look_is_counted_with_its_line(look):
    x = torch.ones(3)
    with HostSyncs() as syncs:
        look(x)
    assert syncs.count == 1
    assert "test_scale.py:" in next(iter(syncs.places))


def test_arithmetic_and_checks_are_no_looks():
    check_it = cpu_only(lambda x: bool(x.sum() > 0))

    def check_named_like_one(x):
        bool(x.sum() > 0)

    x = torch.ones(3)
    with HostSyncs() as syncs:
        (2 * x + x.mean()).clamp(0, 1).cumsum(0)
        check_it(x)
    assert syncs.count == 0
    x.tolist()  # outside nothing is counted
    assert syncs.count == 0
    with HostSyncs() as syncs:
        check_named_like_one(x)
    assert syncs.count == 1
    with pytest.raises(ZeroDivisionError):
        cpu_only(lambda x: 1 / 0)(x)
    cpu_only(lambda x: 1 / 0)(x.to("meta"))  # not on another device


@pytest.mark.parametrize(
    "sampler", [ddpm, ddim, partial(ddim, eta=1.0), dpmpp_2m, dpmpp_2m_sde, heun, partial(heun, s_churn=2.0)]
)
@pytest.mark.parametrize(
    "wrap", [lambda d: d, lambda d: Clip(CFG(d, 1.0, 10)), lambda d: CFG(d, interval(1.0, 0.2, 0.8), 10)]
)
def test_no_sampler_looks_in_its_loop(sampler, wrap):
    syncs, steps = HostSyncs(), time_grid(5)
    inner = wrap(
        NetDenoiser(UNet(1, 4, (1, 2), 1, (), classes=10), DDPMSchedule(linear_betas()), predict_v).eval()
    )

    def callback(i, x, pred):
        if i == 0:
            syncs.__enter__()

    noise = Noise(range(3), SHAPE)
    with torch.no_grad():
        sampler(inner, noise(0), steps, noise=noise, callback=callback, y=torch.arange(3))
    syncs.__exit__()
    assert not syncs.places


def trained_on_noise(**options):
    "The trainer of CIFAR-10's recipe, small, its first step done."
    x, y = Noise(range(40), (3, 32, 32))(0).clamp(-1, 1), torch.zeros(40, dtype=torch.long)
    trainer = recipe_trainer(replace(recipe("cifar10"), width=16, batch=16), x, y, device="cpu", skip=True, accumulate=2, **options)  # fmt: skip
    trainer.train_step()
    return trainer


class Made(TorchDispatchMode):
    "Counts the tensors that are made from Python's numbers: on a GPU each is a copy that waits."

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        self.count += f.__name__.startswith("lift_fresh")
        return f(*args, **(kwargs or {}))


ENDS_AT_NOTHING = torch.cat([linear_betas(50)[:-1], torch.ones(1, dtype=torch.float64)])


@pytest.mark.parametrize("schedule", [CosineSchedule(), VPSchedule(), EDMSchedule(), VESchedule(), DDPMSchedule(linear_betas()),
                                      DDPMSchedule(ENDS_AT_NOTHING)], ids=lambda s: type(s).__name__)  # fmt: skip
@pytest.mark.parametrize(
    "objective", [denoising_loss, partial(denoising_loss, weight=truncated_snr), denoising_score_loss]
)
def test_no_step_makes_a_tensor_of_python_numbers(schedule, objective):
    denoiser = NetDenoiser(
        UNet(1, 4, (1, 2), 1, (), classes=10), schedule, predict_v, c_in=lambda a, b: (a**2 + b**2).rsqrt()
    )
    trainer = Trainer(denoiser, torch.rand(32, 1, 8, 8) * 2 - 1, steps=3, lr=lambda k: 1e-3, batch=8, loss=objective,
                      cond={"y": torch.arange(32) % 10}, null=10, device="cpu")  # fmt: skip
    trainer.train_step()
    made = Made()
    made.count = 0
    with made:
        trainer.train_step()
    assert made.count == 0


def test_a_training_step_makes_no_look():
    "skip=True takes the fused optimiser, which is a GPU's."
    trainer = trained_on_noise()
    with HostSyncs() as syncs:
        trainer.train_step()
    assert not syncs.places
    learned = trainer.loss

    def nosy(*args, **cond):
        loss = learned(*args, **cond)
        return loss if loss.mean() > 0 else -loss

    trainer.loss = nosy
    with HostSyncs() as syncs:
        trainer.train_step()
    ((place, count),) = syncs.places.items()
    assert count == 2 and place.startswith("nosy, test_scale.py:")  # one a part


# the fast denoiser


def traced(denoiser, **options):
    return CompiledDenoiser(denoiser, compile=True, backend="aot_eager", **options)


def test_the_denoiser_is_left_as_it_was():
    torch._dynamo.reset()
    denoiser = Clip(CFG(tiny().train().requires_grad_(True), 1.0, 10))
    before = {k: v.clone() for k, v in denoiser.state_dict().items()}
    layers = [type(m) for m in denoiser.modules()]
    drawn = ddim(traced(denoiser, bf16=True), Noise(range(2), SHAPE)(0), TS, y=torch.arange(2))
    assert drawn.dtype == torch.float32
    assert denoiser.training and all(p.requires_grad and p.dtype == torch.float32 for p in denoiser.parameters())
    assert layers == [type(m) for m in denoiser.modules()]
    assert all(v.equal(before[k]) for k, v in denoiser.state_dict().items())


@pytest.mark.parametrize("wrap", [lambda d: d, Clip, lambda d: Clip(CFG(d, 1.5, 10))])
def test_a_fast_guess_is_the_guess(wrap):
    torch._dynamo.reset()
    denoiser, t = wrap(tiny()), torch.tensor(0.4, dtype=torch.float64)
    x, y = Noise(range(5), SHAPE)(0), torch.arange(5)
    with torch.no_grad():
        want = denoiser(x, t, y=y)
    got = traced(denoiser)(x, t, y=y)
    for name in ("x_t", "alpha", "sigma", "x0", "eps", "v", "score"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-5, atol=1e-5)
    rough = CompiledDenoiser(denoiser, bf16=True, compile=False)(x, t, y=y)
    assert 0 < (rough.x0 - want.x0).abs().max() < 0.05
    assert rough.alpha.dtype == rough.x0.dtype == torch.float32 and rough.alpha.equal(want.alpha)


def test_what_the_network_says_besides_comes_along():
    class Two(nn.Module):
        def forward(self, x, t):
            return torch.cat([x, 3 * x], dim=1)

    torch._dynamo.reset()
    denoiser, x = NetDenoiser(Two(), DDPMSchedule(linear_betas()), predict_v), Noise(range(2), SHAPE)(0)
    assert traced(denoiser)(x, torch.tensor(0.5)).extra.equal(3 * x)


def test_bf16_casts_weights_once_and_what_layers_are_given():
    seen = []

    class Nosy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 64)
            self.register_buffer("frequencies", torch.randn(8))

        def forward(self, x, t, y, e):
            h = self.layer(e)
            seen.append(
                (x.dtype, t.dtype, y.dtype, e.dtype, h.dtype, self.layer.weight.dtype, self.frequencies.dtype)
            )
            return x + h.reshape(x.shape)

    denoiser = NetDenoiser(Nosy(), DDPMSchedule(linear_betas()), predict_v)
    fast = CompiledDenoiser(denoiser, bf16=True)
    fast(Noise(range(2), SHAPE)(0), torch.tensor(0.5), y=torch.arange(2), e=torch.ones(2, 3))
    rough, fine, whole = torch.bfloat16, torch.float32, torch.int64
    assert seen == [(fine, fine, whole, fine, rough, rough, fine)]
    assert fast.denoiser.schedule.log_abar.dtype == torch.float64


def test_bf16_leaves_fourier_features_their_digits():
    "sin(2⁷πx) of an x that was rounded to three digits would be noise."
    seen = []

    class Nosy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(5, 1, 1)

        def forward(self, x, t):
            seen.append(x)
            return self.layer(x)

    x = Noise(range(4), SHAPE)(0)
    denoiser = NetDenoiser(FourierFeatures(Nosy(), (6, 7)), CosineSchedule(), predict_v)
    for bf16 in (False, True):
        CompiledDenoiser(denoiser, bf16=bf16)(x, torch.tensor(0.1))
    assert seen[0].equal(seen[1])


def test_bf16_without_a_network_is_refused():
    from diffusion_nb.mixtures import random_mixture

    with pytest.raises(ValueError, match="GMMDenoiser holds no NetDenoiser"):
        CompiledDenoiser(GMMDenoiser(random_mixture(), CosineSchedule()), bf16=True)


def test_a_walk_is_compiled_once_and_a_new_shape_again():
    compiled = []

    def backend(graph, example):
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    fast = CompiledDenoiser(Clip(CFG(tiny(), 1.0, 10)), compile=True, backend=backend)
    for n in (4, 4, 3):
        noise = Noise(range(n), SHAPE)
        dpmpp_2m(fast, noise(0), time_grid(7), y=torch.arange(n))
        heun(fast, noise(0), time_grid(4), y=torch.arange(n))
    assert len(compiled) == 2


def test_a_guess_outlives_the_next_one():
    "A backend that writes its results to the same memory at each call, as CUDA graphs do."

    def replayed(graph, example):
        kept = []

        def run(*args):
            out = graph.forward(*args)
            if not kept:
                kept.extend(v.clone() for v in out)
            for a, b in zip(kept, out, strict=True):
                a.copy_(b)
            return tuple(kept)

        return run

    torch._dynamo.reset()
    denoiser = Clip(tiny())
    fast, noise, y = (
        CompiledDenoiser(denoiser, compile=True, backend=replayed),
        Noise(range(4), SHAPE),
        torch.arange(4),
    )
    first = fast(noise(0), torch.tensor(0.9), y=y)
    kept = first.x0.clone()
    fast(noise(1), torch.tensor(0.3), y=y)
    assert first.x0.equal(kept) and first.alpha < 0.5
    torch.testing.assert_close(dpmpp_2m(fast, noise(0), time_grid(6), y=y), dpmpp_2m(denoiser, noise(0), time_grid(6), y=y), rtol=1e-5, atol=1e-5)  # fmt: skip


@functools.cache
def compiler_fails() -> str:
    "What torch.compile says here of a function of one line; nothing where it works."
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8))
    except Exception as e:  # it has many kinds, one of each of its stages
        return str(e).strip().splitlines()[0]
    return ""


def test_compiled_for_real():
    torch._dynamo.reset()
    if said := compiler_fails():
        pytest.skip(f"torch.compile does not work on this machine: {said}")
    noise, y = Noise(range(4), SHAPE), torch.arange(4)
    denoiser = tiny()
    fast = CompiledDenoiser(denoiser, compile=True)
    torch.testing.assert_close(
        ddim(fast, noise(0), TS, y=y), ddim(denoiser, noise(0), TS, y=y), rtol=1e-5, atol=1e-5
    )


# the size of a chunk


def test_the_chunk_is_found_once_and_kept(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(generating, "fitting_chunk", lambda *a: asked.append(a[-1]) or 3)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "a.npz", Counted(tiny(), at=6), rank=0, world=2)
    make(tmp_path / "a.npz", rank=0, world=2), make(tmp_path / "a.npz", rank=1, world=2)
    assert asked == [5]  # at most a share, and only by the first


def test_on_a_gpu_the_chunk_is_tried_with_the_denoiser_that_is_not_compiled(monkeypatch):
    tried = []

    def draw(denoiser, sampler, ts, seeds, shape, cond):
        tried.append((type(denoiser), len(ts), len(seeds), len(cond["y"])))
        if len(seeds) > 300:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(generating, "draw", draw)
    monkeypatch.setattr(generating, "device_of", lambda module: torch.device("cuda"))
    monkeypatch.setattr(
        CompiledDenoiser, "__init__", lambda self, d: (Denoiser.__init__(self), setattr(self, "denoiser", d))[0]
    )
    assert generating.fitting_chunk(CompiledDenoiser(tiny()), ddpm, time_grid(9), SHAPE, labels, 5000) == 256
    assert tried == [(NetDenoiser, 3, n, n) for n in (1024, 512, 256)]


def test_a_chunk_is_no_larger_than_asked():
    assert [generating.fitting_chunk(tiny(), ddpm, TS, SHAPE, labels, most) for most in (7, 700)] == [7, 64]


# the three forms


def test_safetensors_holds_floats(tmp_path):
    assert make(tmp_path / "sub/a.safetensors", chunk=4, first=5)
    found = load_file(tmp_path / "sub/a.safetensors")
    assert found["pictures"].dtype == torch.float32
    torch.testing.assert_close(found["pictures"], drawn(range(5, 15)), rtol=1e-5, atol=1e-5)
    assert found["seeds"].tolist() == list(range(5, 15)) and found["labels"].equal(found["seeds"] % 10)
    assert sorted(p.name for p in (tmp_path / "sub").iterdir()) == [
        "a.safetensors",
        "a.safetensors.json",
        "a.safetensors.lock",
    ]


def test_npz_is_as_judges_read_it(tmp_path):
    make(tmp_path / "a.npz", chunk=4)
    found = np.load(tmp_path / "a.npz")
    want = to_bytes(drawn(range(10))).permute(0, 2, 3, 1).numpy()
    assert found["arr_0"].shape == (10, 8, 8, 1) and found["arr_0"].dtype == np.uint8
    assert np.abs(found["arr_0"].astype(int) - want).max() <= 1
    assert found["labels"].tolist() == list(range(10))


def test_folder_of_pngs_named_by_seed(tmp_path):
    make(tmp_path / "drawn", chunk=4, first=3, n=6)
    files = sorted((tmp_path / "drawn").glob("*.png"))
    assert [p.name for p in files] == [f"{i:06d}.png" for i in range(3, 9)]
    got = torch.stack([torch.from_numpy(np.array(Image.open(p))) for p in files]).int()
    assert (got - to_bytes(drawn(range(3, 9)))[:, 0].int()).abs().max() <= 1
    assert json.loads((tmp_path / "drawn/labels.json").read_text())["4"] == 4


def test_colours_stay_in_their_channels(tmp_path):
    class Colour(Denoiser):
        schedule = DDPMSchedule(linear_betas())

        def forward(self, x_t, t):
            alpha, sigma = (c.float() for c in self.schedule(t))
            return Prediction(x_t, alpha, sigma, torch.tensor([-1.0, 0.0, 1.0])[:, None, None].expand(x_t.shape))

    for name in ("a.npz", "a"):
        generate(tmp_path / name, Colour(), ddim, TS, 2, (3, 4, 5))
    assert np.load(tmp_path / "a.npz")["arr_0"][1, 3, 4].tolist() == [0, 128, 255]
    png = Image.open(tmp_path / "a/000001.png")
    assert png.size == (5, 4) and png.getpixel((4, 3)) == (0, 128, 255)


def test_latents_of_any_shape(tmp_path):
    generate(
        tmp_path / "a.safetensors", GMMDenoiser(scale_mixture(), CosineSchedule()), ddpm, TS, 5, (2,), chunk=2
    )
    assert load_file(tmp_path / "a.safetensors")["pictures"].shape == (5, 2)


def scale_mixture():
    from diffusion_nb.mixtures import random_mixture

    return random_mixture()


def test_the_walk_starts_with_the_noise_of_its_first_time(tmp_path):
    starts = []

    def look(denoiser, x, ts, *, noise, **cond):
        starts.append((x, noise(0), denoiser.schedule(ts[0])[1].float()))
        return x

    generate(tmp_path / "a.safetensors", tiny(), look, time_grid(4, start=0.3), 3, SHAPE, cond=labels)
    ((x, z, sigma),) = starts
    assert x.equal(sigma * z) and 0.1 < sigma < 0.9


def test_conditions_as_tensors_or_as_a_function_of_the_seed(tmp_path):
    make(tmp_path / "a.safetensors", chunk=4, first=7)
    make(tmp_path / "b.safetensors", chunk=4, first=7, cond={"y": torch.arange(7, 17) % 10})
    a, b = (load_file(tmp_path / f"{v}.safetensors") for v in "ab")
    assert a["pictures"].equal(b["pictures"]) and a["labels"].equal(b["labels"])


# nothing is drawn twice, nothing is lost


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "a.safetensors"
    make(out, chunk=4)
    return load_file(out)["pictures"]


def interrupted(out, at=6, **options):
    with pytest.raises(KeyboardInterrupt) as e:
        make(out, Counted(tiny(), at=at), chunk=4, **options)
    return str(e.value)


def test_an_interruption_says_what_is_safe_and_the_rest_is_drawn(tmp_path, whole):
    out, again = tmp_path / "a.safetensors", Counted(tiny())
    said = interrupted(out, at=10)
    assert "8 of 10 pictures are safe in " in said and "the same call goes on from there" in said
    assert make(out, again)
    assert again._calls == 4  # one chunk of four steps
    assert load_file(out)["pictures"].equal(whole)


def test_a_second_call_does_nothing_and_says_so(tmp_path, capsys):
    again = Counted(tiny())
    make(tmp_path / "a.npz")
    assert make(tmp_path / "a.npz", again) and again._calls == 0
    assert "a.npz: all 10 pictures are there already" in capsys.readouterr().out


def damage_cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def damage_flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 16
    path.write_bytes(data)


def damage_empty(path):
    path.write_bytes(b"")


def damage_head(path):
    path.write_bytes(b"\xff" * 20 + path.read_bytes()[20:])


@pytest.mark.parametrize("damage", [damage_cut, damage_flip, damage_empty, damage_head])
def test_a_damaged_part_is_named_and_made_anew(damage, tmp_path, whole):
    out, again = tmp_path / "a.safetensors", Counted(tiny())
    interrupted(out, at=10)
    damage(tmp_path / "a.safetensors.parts/000000000004-4.safetensors")
    with pytest.warns(UserWarning, match="000000000004-4.safetensors .* is damaged: its pictures are made anew"):
        make(out, again)
    assert again._calls == 8 and load_file(out)["pictures"].equal(whole)


def test_a_part_of_another_run_is_no_part(tmp_path):
    interrupted(tmp_path / "a.safetensors", at=10)
    part = tmp_path / "a.safetensors.parts/000000000000-4.safetensors"
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "b.safetensors", Counted(tiny(1), at=10), chunk=4)
    (tmp_path / "b.safetensors.parts" / part.name).write_bytes(part.read_bytes())
    with pytest.warns(UserWarning, match="damaged"):
        make(tmp_path / "b.safetensors", Counted(tiny(1)))


def test_the_last_chunk_has_the_size_of_the_others(tmp_path):
    sizes = []

    def look(denoiser, x, ts, *, noise, **cond):
        sizes.append((len(x), len(cond["y"])))
        return x

    make(tmp_path / "a.npz", sampler=look, chunk=4)
    assert sizes == [(4, 4)] * 3


def test_each_process_draws_its_share_only(tmp_path, whole):
    out, calls = tmp_path / "a.safetensors", []
    for rank in (1, 0):
        job = Counted(tiny())
        done = make(out, job, chunk=4, rank=rank, world=2)
        calls.append((done, job._calls))
    assert calls == [(False, 4), (True, 8)]  # one chunk of four steps, and two
    assert load_file(out)["pictures"].equal(whole)


@pytest.mark.parametrize("chunk", [1, 3, 10, 16])
def test_goes_on_in_another_chunk_size(chunk, tmp_path, whole):
    out, again = tmp_path / "a.safetensors", Counted(tiny())
    interrupted(out, at=6)
    make(out, again, chunk=chunk)
    got = load_file(out)["pictures"]
    assert got[:4].equal(whole[:4])
    torch.testing.assert_close(got, whole, rtol=1e-5, atol=1e-5)
    assert again._calls == 4 * len([k for k in range(0, 10, chunk) if k + chunk > 4])


@pytest.mark.parametrize("change, names", [
    (dict(n=11), "n: 10 there, 11 now"), (dict(first=1), "first: 0 there, 1 now"), (dict(sampler=ddim), "sampler: ddpm there, ddim now"),
    (dict(denoiser=Counted(tiny(1))), "weights: "), (dict(cond=lambda seeds: {"y": seeds % 9}), "conditions: "),
    (dict(sampler=partial(ddim, eta=1.0)), r"ddim \('eta', 1.0\) now"), (dict(denoiser=Counted(Clip(tiny()))), "weights: "),
])  # fmt: skip
@pytest.mark.parametrize("when", ["begun", "done"])
def test_another_run_is_refused(change, names, when, tmp_path):
    out = tmp_path / "a.safetensors"
    interrupted(out) if when == "begun" else make(out)
    with pytest.raises(ValueError, match=f"(?s)holds another run .*{names}.*name another place, or delete it"):
        make(out, **change)


def sampler_with(value):
    return lambda denoiser, x, ts, *, noise, **cond: ddim(denoiser, x, ts, noise=noise, eta=float(value), **cond)


class Eta:
    def __init__(self, eta):
        self.eta = eta

    def __call__(self, denoiser, x, ts, *, noise, **cond):
        return ddim(denoiser, x, ts, noise=noise, eta=self.eta, **cond)


def by(function):
    return partial(ddpm, var=function)


WAYS = [
    (sampler_with(0.0), sampler_with(0.0), sampler_with(1.0)), (Eta(0.0), Eta(0.0), Eta(1.0)), (Eta(0.0).__call__, Eta(0.0).__call__, Eta(1.0).__call__),
    (lambda x: x + 1, lambda x: x + 1, lambda x: x + 2), (by(fixed_small), by(fixed_small), by(fixed_large)), (partial(ddim, eta=[0.0]), partial(ddim, eta=[0.0]), partial(ddim, eta=[1.0])),
    (by(torch.zeros(2000)), by(torch.zeros(2000)), by(torch.zeros(2000).index_fill(0, torch.tensor(999), 1e-6))),
]  # fmt: skip


@pytest.mark.parametrize("one, same, other", WAYS, ids=range(len(WAYS)))
def test_samplers_are_told_apart_by_what_they_hold(one, same, other):
    assert records.described(one) == records.described(same) != records.described(other)
    assert " at 0x" not in records.described(one)


def test_a_record_is_the_same_in_another_process():
    text = "from functools import partial; from diffusion_nb.generation.record import described; from diffusion_nb.samplers.linear import ddpm; from diffusion_nb.variances import fixed_small; "
    text += "print(described(partial(ddpm, var=fixed_small)))"
    there = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True).stdout.strip()
    assert there == records.described(by(fixed_small)) == "ddpm ('var', fixed_small)"


@pytest.mark.parametrize("when", ["begun", "done"])
@pytest.mark.parametrize("name", ["a.safetensors", "a"])
def test_replace_replaces_another_run_and_not_the_same(name, when, tmp_path):
    out, want = tmp_path / name, tmp_path / "want" / name
    make(want, Counted(tiny(1)), chunk=4)
    interrupted(out, at=10) if when == "begun" else make(out, chunk=4)
    with pytest.raises(KeyboardInterrupt):  # another run takes the place, …
        make(out, Counted(tiny(1), at=6), chunk=4, replace=True)
    again = Counted(tiny(1))
    assert make(out, again, replace=True) and again._calls == 8  # … goes on with what is its own, …
    assert make(out, again, replace=True) and again._calls == 8  # … and is not done twice
    assert records.file_hash(out) == records.file_hash(want)
    assert not list(tmp_path.glob("*.parts"))


@pytest.mark.parametrize("spoil", ["a.npz", "a.npz.json"])
def test_replace_makes_anew_what_is_damaged(spoil, tmp_path):
    make(tmp_path / "a.npz")
    (tmp_path / spoil).write_text("{")
    with pytest.raises(ValueError, match="is not what was written|the record of .* is damaged"):
        make(tmp_path / "a.npz")
    assert make(tmp_path / "a.npz", replace=True) and np.load(tmp_path / "a.npz")["arr_0"].shape == (10, 8, 8, 1)


@pytest.mark.parametrize("replace", [False, True])
def test_a_damaged_record_costs_no_picture(replace, tmp_path, whole):
    interrupted(tmp_path / "a.safetensors", at=10)
    file = tmp_path / "a.safetensors.parts/record.json"
    before, again = file.read_text(), Counted(tiny())
    for spoilt in (before[:-9], before.replace('"steps": 4', '"steps": 5'), ""):
        file.write_text(spoilt)
        with pytest.warns(UserWarning, match="record.json is damaged; the pictures beside it are of this run"):
            interrupted(tmp_path / "a.safetensors", at=1)
        assert file.read_text() == before
    file.write_text(before[:-9])
    with pytest.warns(UserWarning, match="damaged"):
        make(tmp_path / "a.safetensors", again, replace=replace)
    assert again._calls == 4 and load_file(tmp_path / "a.safetensors")["pictures"].equal(whole)


def test_chunks_of_another_run_whose_record_is_damaged_are_refused(tmp_path):
    interrupted(tmp_path / "a.safetensors", at=10)
    (tmp_path / "a.safetensors.parts/record.json").write_text("{")
    with pytest.raises(ValueError, match="the record of .* is damaged, so that nobody knows of which run it is"):
        make(tmp_path / "a.safetensors", Counted(tiny(1)))


def test_replace_leaves_alone_what_has_no_record(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(ValueError, match="no record beside it"):
        make(tmp_path / "a", replace=True)
    interrupted(tmp_path / "b.npz")
    (tmp_path / "b.npz").write_text("mine")  # beside the parts of another run
    with pytest.raises(ValueError, match="no record beside it"):
        make(tmp_path / "b.npz", Counted(tiny(1)), replace=True)
    assert (tmp_path / "a").read_text() == (tmp_path / "b.npz").read_text() == "mine"


def test_times_and_shape_belong_to_the_run(tmp_path):
    interrupted(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="steps: 4 there, 5 now; times: "):
        generate(tmp_path / "a.safetensors", Counted(tiny()), ddpm, time_grid(5), 10, SHAPE, cond=labels)
    with pytest.raises(ValueError, match=r"shape: \[1, 8, 8\] there, \[1, 4, 4\] now"):
        generate(tmp_path / "a.safetensors", Counted(tiny()), ddpm, TS, 10, (1, 4, 4), cond=labels)


def test_a_network_that_accelerate_has_prepared_has_an_identity():
    "Its forward is a method of its own that leads back to it."
    from accelerate import Accelerator

    prepared = tiny()
    prepared.net = Accelerator(mixed_precision="bf16", cpu=True).prepare(prepared.net)
    assert identity(prepared) == identity(prepared) != identity(tiny())
    loop = tiny()
    loop.others = [loop]
    assert identity(loop) == identity(loop)


def test_identity_sees_weights_numbers_and_functions():
    same = [identity(CFG(tiny(), 1.0, 10)), identity(CFG(tiny(), 1.0, 10).eval())]
    others = [CFG(tiny(1), 1.0, 10), CFG(tiny(), 1.5, 10), CFG(tiny(), 1.0, 9), CFG(tiny(), interval(1.0, 0.2, 0.8), 10),
              CFG(tiny(), interval(1.0, 0.3, 0.8), 10), Clip(CFG(tiny(), 1.0, 10)), CompiledDenoiser(CFG(tiny(), 1.0, 10), bf16=True)]  # fmt: skip
    found = [*same, *map(identity, others)]
    assert same[0] == same[1] and len(set(found)) == len(found) - 1


def test_what_is_there_without_a_record_is_left_alone(tmp_path):
    (tmp_path / "a.npz").write_text("mine")
    with pytest.raises(ValueError, match="is there already, and no record beside it"):
        make(tmp_path / "a.npz")
    assert (tmp_path / "a.npz").read_text() == "mine"
    (tmp_path / "b").mkdir()
    assert make(tmp_path / "b")  # an empty folder is no obstacle
    (tmp_path / "c.npz").mkdir()  # unless a file is to stand there
    with pytest.raises(ValueError, match="is there already"):
        make(tmp_path / "c.npz")


def test_a_result_that_was_changed_is_found_out(tmp_path):
    make(tmp_path / "a")
    (tmp_path / "a/000003.png").unlink()
    with pytest.raises(ValueError, match="is not what was written .* delete it"):
        make(tmp_path / "a")


@pytest.mark.parametrize("name", ["a", "a.npz"])
def test_a_merge_that_was_killed_is_done_again(name, tmp_path, monkeypatch):
    "Killed after the result was put in place and before its record was."
    out = tmp_path / name
    write = store.write_record

    def killed_before_the_record(path, about):
        if path.name == f"{name}.json":
            raise KeyboardInterrupt
        write(path, about)

    with monkeypatch.context() as m:
        m.setattr(store, "write_record", killed_before_the_record)
        with pytest.raises(KeyboardInterrupt):
            make(out)
    (tmp_path / f"{name}.parts/result.safetensors.99.tmp").write_text("left over")
    again = Counted(tiny())
    assert out.exists() and make(out, again) and again._calls == 0
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob("*.parts"))


# errors at the door, and later


@pytest.mark.parametrize("options, says", [
    (dict(n=0), "n: expected at least 1 picture; got 0"), (dict(chunk=0), "chunk: expected at least 1"), (dict(rank=2, world=2), "rank: expected 0 to 1"),
    (dict(cond={"y": torch.zeros(9)}), "expected 10 values of 'y', one for each picture; got 9"),
    (dict(world=2), "rank, world: expected both or neither; got rank = None and world = 2"), (dict(rank=0, world=0), "since world = 0"),
    (dict(cond={"y": list(range(10))}), "got list, not a tensor with rows"), (dict(cond={"y": torch.tensor(3)}), "not a tensor with rows"),
    (dict(cond=lambda seeds: {"y": seeds[:1]}), "expected 10 values of 'y', one for each picture; got 1"),
    (dict(cond=lambda seeds: seeds), "cond: expected a dict of tensors by name; got Tensor"),
])  # fmt: skip
def test_arguments_that_cannot_be_meant(options, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        make(tmp_path / "a.npz", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, shape, says", [
    ("a.jpg", SHAPE, "ends in .safetensors or .npz, or a folder"), ("a", (4, 8, 8), r"\(4, 8, 8\) do not fit into PNG"),
    ("a.npz", (2,), "name a .safetensors file"),
])  # fmt: skip
def test_what_the_file_cannot_hold(name, shape, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        generate(tmp_path / name, tiny(), ddpm, TS, 3, shape)


def test_dropout_is_noticed(tmp_path):
    model = NetDenoiser(UNet(1, 4, (1, 2), 1, (), dropout=0.1), DDPMSchedule(linear_betas()))
    with pytest.raises(ValueError, match="is in training mode"):
        generate(tmp_path / "a", model, ddpm, TS, 3, SHAPE)


def test_pictures_with_nan_are_named_by_seed(tmp_path):
    def spoiled(denoiser, x, ts, *, noise, **cond):
        x = ddpm(denoiser, x, ts, noise=noise, **cond)
        return x.masked_fill(((noise.seeds == 5) | (noise.seeds == 6))[:, None, None, None], float("nan"))

    with pytest.raises(
        FloatingPointError, match="2 of 4 pictures hold NaN or infinite values, those of seeds 5, 6:"
    ) as e:
        make(tmp_path / "a.npz", sampler=spoiled, chunk=4)
    assert "4 of 10 pictures are safe" in e.value.__notes__[0]


@pytest.mark.parametrize(
    "returned, says", [(lambda x: x[:2], r"\(4, 1, 8, 8\); got \(2, 1, 8, 8\)"), (lambda x: [x], "got list")]
)
def test_a_sampler_that_returns_something_else(returned, says, tmp_path):
    def odd(denoiser, x, ts, *, noise, **cond):
        return returned(x)

    with pytest.raises(ValueError, match=f"sampler: expected pictures of shape .*{says}"):
        make(tmp_path / "a.npz", sampler=odd, chunk=4)


def test_out_of_memory_says_what_is_safe(tmp_path):
    with pytest.raises(torch.OutOfMemoryError) as e:
        make(tmp_path / "a.npz", Counted(tiny(), at=6, error=torch.OutOfMemoryError("full")), chunk=4)
    assert "4 of 10 pictures are safe" in e.value.__notes__[0]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="0 of 10 pictures are safe"):
        make(tmp_path / "file/a.npz")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="0 of 10 pictures are safe"):
        make(tmp_path / "a.npz")


# processes, and how they end


class Slow(Counted):
    "Draws the same, but takes its time."

    def forward(self, x_t, t, **cond):
        time.sleep(self._at)
        return self.denoiser(x_t, t, **cond)


Slow.__qualname__ = "Counted"  # nor is it another in the record


def work(log, out, pause, limit, rank, world, team):
    "A process of its own: 40 pictures, its share of them; what it says goes to `log`."
    sys.stdout = sys.stderr = open(log, "w", encoding="utf-8", buffering=1)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if team:
        dist.init_process_group("gloo", init_method=f"file://{team}", rank=rank, world_size=world)
        rank = world = None
    try:
        print(make(out, Slow(tiny(), pause), n=40, chunk=4, rank=rank, world=world))
    except (KeyboardInterrupt, OSError) as e:
        print(type(e).__name__, e)
        sys.exit(3)
    if team:
        dist.destroy_process_group()


def start(out, pause=0.0, limit=0, rank=None, world=None, team=None):
    log = out.with_name(f"log-{rank}-{time.monotonic_ns()}")
    process = SERVER.Process(target=work, args=(log, out, pause, limit, rank, world, team))
    process.log = log
    process.start()
    return process


def said(process, code=0):
    process.join(100)
    text = process.log.read_text() if process.log.exists() else ""
    assert process.exitcode == code, text
    return text


def after_parts(process, out, count, delay=0.0):
    "Wait for so many parts, and a little longer."
    while len(list(Path(f"{out}.parts").glob("*-*.safetensors"))) < count:
        assert process.is_alive(), said(process)
        time.sleep(0.002)
    time.sleep(delay)


@pytest.fixture(scope="module")
def forty(tmp_path_factory):
    out = tmp_path_factory.mktemp("forty") / "a.safetensors"
    make(out, n=40, chunk=4)
    return load_file(out)["pictures"]


def test_killed_and_killed_again(tmp_path, forty):
    out, delays = tmp_path / "a.safetensors", torch.rand(2, generator=torch.Generator().manual_seed(0)) * 0.1
    for count, delay in zip((1, 5), delays.tolist(), strict=True):
        process = start(out, 0.02)
        after_parts(process, out, count, delay)
        process.kill()
        said(process, -signal.SIGKILL)
        assert not out.exists()
    assert "True" in said(start(out))
    assert load_file(out)["pictures"].equal(forty)


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_says_how_many_are_safe(sig, tmp_path, forty):
    out = tmp_path / "a.safetensors"
    process = start(out, 0.02)
    after_parts(process, out, 2)
    os.kill(process.pid, sig)
    text, parts = said(process, 3), len(list(Path(f"{out}.parts").glob("*-*.safetensors")))
    assert (
        f"KeyboardInterrupt stopped: {4 * parts} of 40 pictures are safe in {out}.parts; the same call goes on"
        in text
    )
    make(out, n=40)
    assert load_file(out)["pictures"].equal(forty)


def test_two_processes_killed_and_gone_on_with(tmp_path, forty):
    out = tmp_path / "a.safetensors"
    pair = [start(out, 0.02, rank=rank, world=2, team=tmp_path / "first") for rank in (0, 1)]
    after_parts(pair[0], out, 2, 0.03)
    for process in pair:
        process.kill()
        said(process, -signal.SIGKILL)
    assert not out.exists()
    pair = [start(out, rank=rank, world=2, team=tmp_path / "second") for rank in (0, 1)]
    assert [said(process).strip() for process in pair] == ["True", "True"]
    assert load_file(out)["pictures"].equal(forty)


def test_independent_jobs_share_the_work(tmp_path, forty):
    out = tmp_path / "a.safetensors"
    jobs = [start(out, 0.01, rank=rank, world=2) for rank in (0, 1)]
    texts = [said(job) for job in jobs]
    assert sum("True" in text for text in texts) >= 1
    assert all("True" in text or "of 40 pictures are there; the others are another" in text for text in texts)
    assert load_file(out)["pictures"].equal(forty)


@pytest.mark.parametrize("limit, safe", [(800, 0), (4000, 40)])
def test_a_full_disk_says_what_is_safe_and_nothing_is_spoiled(limit, safe, tmp_path, forty):
    "A limit on the size of files stands for it: too small for a part, or only for the whole."
    out = tmp_path / "a.safetensors"
    text = said(start(out, limit=limit), 3)
    assert (
        f"{safe} of 40 pictures are safe in {out}.parts; the same call goes on from there, once there is room"
        in text
    )
    assert not out.exists() and not list(tmp_path.glob("**/*.tmp"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make(out, n=40)
    assert load_file(out)["pictures"].equal(forty)


@pytest.mark.parametrize(
    "name, own",
    [
        ("pics", "pics/thesis.txt"),
        ("pics", "pics/mine/thesis.txt"),
        ("a.npz", "a.npz"),
        ("pics", "pics.parts/mine.safetensors"),
    ],
)
def test_what_somebody_put_there_meanwhile_is_left_alone(name, own, tmp_path):
    "The run is stopped, a file of one's own is put into its place, and the run goes on: the file is as it was."

    def stops(denoiser, x, ts, *, noise, **cond):
        if stops.calls.pop(0):
            raise KeyboardInterrupt
        return ddpm(denoiser, x, ts, noise=noise, **cond)

    stops.calls = [0, 1]
    call = functools.partial(generate, tmp_path / name, tiny().eval(), stops, TS, 6, SHAPE, chunk=3, cond=labels)
    with pytest.raises(KeyboardInterrupt):
        call()
    (tmp_path / own).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / own).write_text("years of work")
    stops.calls = [0] * 9
    if own.startswith(f"{name}.parts"):
        assert call()
    else:
        with pytest.raises(ValueError, match="is there already, and no record beside it says of which run"):
            call()
        kept = tmp_path / f"{name}.parts"
        assert len(list(kept.glob("*-*.safetensors"))) == 2  # all that was drawn is there
        (tmp_path / own).rename(tmp_path / "elsewhere")
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        assert call()
        own = "elsewhere"
    assert (tmp_path / own).read_text() == "years of work"


@pytest.mark.parametrize("name", ["pics", "a.npz"])
def test_replacing_moves_aside_what_is_not_as_it_was_written(name, tmp_path):
    call = functools.partial(generate, tmp_path / name, tiny().eval(), ddpm, TS, 3, SHAPE, cond=labels)
    assert call()
    mine = tmp_path / name / "thesis.txt" if name == "pics" else tmp_path / name
    mine.write_text("years of work")
    with pytest.warns(UserWarning, match="is not what was written there"):
        assert call(replace=True)
    (aside,) = tmp_path.glob("*.kept-1*")
    assert (aside / "thesis.txt" if name == "pics" else aside).read_text() == "years of work"


def test_each_of_many_fast_denoisers_is_compiled():
    "PyTorch compiles one code object eight times, and then runs it as it is, without an error."
    compiled = []

    def backend(graph, inputs):
        compiled.append(len(inputs))
        return graph.forward

    x, t, y = torch.zeros(2, *SHAPE), torch.tensor(0.5), torch.zeros(2, dtype=torch.long)
    for k in range(12):
        fast = CompiledDenoiser(tiny(), compile=True, backend=backend)
        first, again = fast(x, t, y=y), fast(x, t, y=y)
        assert len(compiled) == k + 1 and first.x0.equal(again.x0)
