"""What the checks of a GPU are made of: the device, small networks, and everything that has to run there."""

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffusion_nb.denoisers import (
    Clip,
    Consistency,
    Denoiser,
    DenoiserConsistency,
    NetDenoiser,
    TimeWarped,
    VEView,
    predict_eps,
    predict_v,
    unit_input,
)
from diffusion_nb.generation.fast import CompiledDenoiser
from diffusion_nb.grids import edm_grid, time_grid
from diffusion_nb.losses.bound import bound_loss, hybrid_loss
from diffusion_nb.losses.consistency import consistency_distillation, consistency_training
from diffusion_nb.losses.distillation import distillation_loss
from diffusion_nb.losses.simple import denoising_loss, snr, snr_plus_one
from diffusion_nb.losses.vdm import vdm_loss
from diffusion_nb.nets.conditioning import FourierFeatures, GammaConditioning
from diffusion_nb.nets.unet import UNet
from diffusion_nb.noise import Noise
from diffusion_nb.samplers.heun import heun
from diffusion_nb.samplers.langevin import annealed_langevin
from diffusion_nb.samplers.linear import ddim, ddpm, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m, dpmpp_3m_sde
from diffusion_nb.samplers.sde import predictor_corrector, reverse_sde
from diffusion_nb.samplers.singlestep import dpmpp_2s
from diffusion_nb.schedules import (
    CosineSchedule,
    DDPMSchedule,
    EDMSchedule,
    LearnedSchedule,
    LinearGamma,
    RescaledSchedule,
    Schedule,
    TimeWarpedSchedule,
    TruncatedTime,
    VESchedule,
    VPSchedule,
    cosine_betas,
    linear_betas,
)
from diffusion_nb.time_samplers import (
    LevelSampler,
    LossSecondMomentSampler,
    chain_times,
    constant_levels,
    continuous_times,
    importance_weighted,
)
from diffusion_nb.training.batches import flip_half
from diffusion_nb.training.trainer import Trainer
from diffusion_nb.util.profiling import HostSyncs
from diffusion_nb.variances import fixed_large

DEVICE = torch.device(os.environ.get("DIFFUSION_NB_GPU_TESTS_ON", "cuda"))
ON_GPU = DEVICE.type == "cuda"
COMPILER = {} if ON_GPU else dict(compile=True, backend="aot_eager")  # for Fast: on a GPU its own choice
SHAPE, CLASSES, CHAIN, LEVELS = (1, 16, 16) if ON_GPU else (1, 8, 8), 10, 50, 17


def near(got: Tensor, want: Tensor, rtol: float) -> None:
    "Raise AssertionError where two tensors differ by more than rtol times the largest number in `want`, or 1 where that is less."
    got, want = (v.detach().cpu().double() for v in (got, want))
    assert got.shape == want.shape and got.isfinite().all()
    error, most = (got - want).abs().max().item(), rtol * max(1.0, want.abs().max().item())
    assert error <= most, f"they differ by up to {error:.3g}; allowed are {most:.3g}"


def shaken(net: nn.Module, seed: int = 0) -> nn.Module:
    "The network with random weights everywhere: layers that start at zero would hide what is behind them."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            centre = float(p.ndim == 1 and name.endswith("weight"))  # of normalisations
            p.copy_(centre + torch.randn(p.shape, generator=g) * max(16, p[0].numel()) ** -0.5)
    return net


class Small(nn.Module):
    "Two convolutions that are told the time and a label: quick to compile, and as exact as their dtype."

    def __init__(self, channels: int = SHAPE[0], seed: int = 0, channels_out: int = 0):
        super().__init__()
        self.one = nn.Conv2d(channels, 8, 3, padding=1)
        self.two = nn.Conv2d(8, channels_out or channels, 3, padding=1)
        self.label = nn.Embedding(CLASSES + 1, 8)
        shaken(self, seed)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        told = self.label(y) + (t.to(x.dtype) / 1000)[:, None]
        return self.two(nn.functional.silu(self.one(x) + told[:, :, None, None]))


def unet(channels: int = SHAPE[0], seed: int = 0, **options) -> UNet:
    "A small U-Net of every kind of layer, with labels."
    options = dict(width=32 if ON_GPU else 4, mults=(1, 2), blocks=1, attention=(1,), classes=CLASSES) | options
    return shaken(UNet(channels, **options), seed)


SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "linear betas": lambda: DDPMSchedule(linear_betas()),
    "cosine betas": lambda: DDPMSchedule(cosine_betas()),
    "zero terminal SNR": lambda: DDPMSchedule(torch.cat([linear_betas(CHAIN)[:-1], torch.ones(1).double()])),
    "VP": VPSchedule,
    "cosine": CosineSchedule,
    "VE": VESchedule,
    "EDM": EDMSchedule,
    "relative noise": lambda: RescaledSchedule(DDPMSchedule(linear_betas())),
    "linear gamma": LinearGamma,
    "warped": lambda: TimeWarpedSchedule(CosineSchedule(), TruncatedTime(0.1)),
    "learned": lambda: LearnedSchedule(width=16),
}


def denoiser(net: nn.Module, schedule: str = "linear betas", predict: Callable = predict_v) -> NetDenoiser:
    "A fresh denoiser under the schedule of this name, on the CPU."
    return NetDenoiser(net, SCHEDULES[schedule](), predict, c_in=unit_input)


def ready(model: Denoiser, device: torch.device = DEVICE, dtype: torch.dtype = torch.float32) -> Denoiser:
    "A copy for sampling, on the device."
    return copy.deepcopy(model).to(device, dtype).eval().requires_grad_(False)


# samplers


def walked_langevin(model, x, ts, *, noise, **cond):
    "Two steps of Langevin dynamics at each time, of a fifth of the noise there."
    sigma = model.schedule(ts[-2].to(x.device))[1].item()
    return annealed_langevin(model, x, ts, steps=2, epsilon=0.2 * sigma**2, noise=noise, **cond)


SAMPLERS: dict[str, Callable] = {
    "ddpm": ddpm,
    "ddpm, large": partial(ddpm, var=fixed_large),
    "ddim": ddim,
    "ddim, eta 1": partial(ddim, eta=1.0),
    "heun": heun,
    "heun, churn": partial(heun, s_churn=2.0),
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_3m": dpmpp_3m,
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "dpmpp_2s, ancestral": partial(dpmpp_2s, eta=1.0),
    "reverse_sde": reverse_sde,
    "predictor_corrector": predictor_corrector,
    "langevin": walked_langevin,
}
EULER = ("reverse_sde", "predictor_corrector")  # they need finite rates, and steps short enough


def times(sampler: str) -> Tensor:
    "Falling times on which the sampler of this name can walk under each schedule."
    if sampler == "langevin":
        return time_grid(4, start=0.9, end=0.3)
    return time_grid(40, start=0.6, end=0.2) if sampler in EULER else time_grid(5)


def walk(sampler: str, model: Denoiser, noise: Callable, device: torch.device = DEVICE, **options) -> Tensor:
    "The end of a walk from noise, with labels 0, 1, …"
    ts, start = times(sampler), noise(0)
    x = model.schedule(ts[0].to(device))[1].to(start.dtype) * start
    y = torch.arange(len(start), device=device) % CLASSES
    return SAMPLERS[sampler](model, x, ts, noise=noise, y=y, **options)


# objectives


class Task(NamedTuple):
    "What a Trainer is given: a fresh model, how times are drawn, and the loss."

    model: nn.Module
    times: Callable
    loss: Callable


def vdm_model(net: Callable) -> TimeWarped:
    "A denoiser with Fourier features on a learned clock."
    schedule = LearnedSchedule(width=16)
    inner = FourierFeatures(net(3 * SHAPE[0], channels_out=SHAPE[0]), (0,))
    told = GammaConditioning(schedule.schedule)
    return TimeWarped(NetDenoiser(inner, schedule.schedule, predict_eps, c_noise=told), schedule.warp)


def teacher(device: torch.device, fast: bool, net: Callable, scale: Callable = lambda d: d) -> Denoiser:
    "A teacher on the device, with CUDA graphs if `fast`."
    model = ready(scale(Clip(denoiser(net(seed=1), "cosine"))), device)
    return CompiledDenoiser(model, **COMPILER) if fast else model


def importance(device: torch.device, fast: bool, net: Callable) -> Task:
    "The bound at times drawn by importance."
    history = LossSecondMomentSampler(CHAIN, memory=1)
    return Task(denoiser(net()), history, importance_weighted(bound_loss(CHAIN, LEVELS), history))


def levels(schedule: Schedule) -> LevelSampler:
    "A grid of 18 levels under this schedule."
    return LevelSampler(constant_levels(edm_grid(schedule, 18, 0.02, 80.0)))


def follow(device: torch.device, fast: bool, net: Callable) -> Task:
    "Consistency distillation of a teacher by a copy of itself."
    f = DenoiserConsistency(denoiser(net(seed=1), "cosine"))
    grid = levels(f.schedule)
    return Task(f, grid, consistency_distillation(teacher(device, fast, net, VEView), grid))


def alone(device: torch.device, fast: bool, net: Callable) -> Task:
    "Consistency training."
    f = Consistency(net(), RescaledSchedule(CosineSchedule()))
    grid = levels(f.schedule)
    return Task(f, grid, consistency_training(grid))


def halved(device: torch.device, fast: bool, net: Callable) -> Task:
    "Progressive distillation, from sixteen steps to eight."
    loss = distillation_loss(teacher(device, fast, net), 8)
    return Task(denoiser(net(seed=1), "cosine"), chain_times(8), loss)


def simple(net: Callable, schedule: str, weight: Callable, predict: Callable = predict_v) -> Task:
    "The weighted error of the guess at any time."
    return Task(denoiser(net(), schedule, predict), continuous_times, partial(denoising_loss, weight=weight))


TASKS: dict[str, Callable[[torch.device, bool, Callable], Task]] = {
    "eps": lambda device, fast, net: simple(net, "linear betas", snr, predict_eps),
    "v": lambda device, fast, net: simple(net, "cosine", snr_plus_one),
    "bound": lambda device, fast, net: Task(denoiser(net()), chain_times(CHAIN), bound_loss(CHAIN, LEVELS)),
    "hybrid": lambda device, fast, net: Task(
        denoiser(net(channels_out=2 * SHAPE[0])), chain_times(CHAIN), hybrid_loss(CHAIN, LEVELS)
    ),
    "importance": importance,
    "vdm": lambda device, fast, net: Task(vdm_model(net), continuous_times, vdm_loss(LEVELS)),
    "distillation": halved,
    "consistency distillation": follow,
    "consistency training": alone,
}


def task(name: str, device: torch.device = DEVICE, fast: bool = False, net: Callable = unet) -> Task:
    "The task of this name; its teacher, if it has one, on the device, with CUDA graphs if `fast`. net: makes the networks."
    return TASKS[name](device, fast, net)


def pictures(n: int = 40) -> Tensor:
    "Smooth pictures on the grid of levels."
    coarse = Noise(range(n), (SHAPE[0], 4, 4))(0)
    x = nn.functional.interpolate(coarse, size=SHAPE[1:], mode="bilinear").clamp(-1, 1)
    return ((x + 1) / 2 * (LEVELS - 1)).round() / (LEVELS - 1) * 2 - 1


def trainer(given: Task, device: torch.device = DEVICE, compile: bool = False, **options) -> Trainer:
    "A Trainer of small pictures with labels. compile: the network, where a loss asks for more than the denoiser's call."
    x0 = pictures()
    options = dict(steps=1000, lr=lambda k: 1e-3, batch=16, ema=0.9, augment=flip_half) | options
    whole = not isinstance(given.model, TimeWarped)
    made = Trainer(given.model, x0, time_sampler=given.times, loss=given.loss, cond={"y": torch.arange(len(x0)) % CLASSES}, null=CLASSES,
                   device=device, compile=compile and ON_GPU and whole, **options)  # fmt: skip
    if compile and ON_GPU and not whole:
        made.denoiser.denoiser.net.compile()
    return made


# what is measured

AT_HOME = ("grid, ",)  # of time_samplers: it looks at what is on the CPU with a GPU, too


class Watch:
    "On a GPU an operation that waits is an error from `start()` to `stop()`; on a CPU it is counted as one that would wait."

    def start(self) -> None:
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("error")
        else:
            self.syncs = HostSyncs()
            self.syncs.__enter__()

    def stop(self) -> None:
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("default")
        elif hasattr(self, "syncs"):
            self.syncs.__exit__()
            looks = {k: n for k, n in self.syncs.places.items() if not k.startswith(AT_HOME)}
            assert not looks, f"these would make the host wait: {looks}"


@contextlib.contextmanager
def no_syncs() -> Iterator[None]:
    "Inside, nothing may wait for the GPU."
    watch = Watch()
    watch.start()
    try:
        yield
    finally:
        watch.stop()


def in_use() -> int:
    "Bytes in use: of the GPU, or of this process."
    if ON_GPU:
        return torch.cuda.memory_allocated()
    import psutil

    return psutil.Process().memory_info().rss
