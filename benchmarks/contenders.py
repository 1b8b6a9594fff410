"""What train.py, sample.py and curves.py compare: this library, diffusers, and lucidrains' denoising-diffusion-pytorch.

Each trains and samples as its documentation does, with the same help: data on the device, autocast to bfloat16, channels last, a compiled
network, a fused optimiser, and no look at the loss. All learn to predict the noise of the chain with linear betas, so that their
losses, and their walks from the same noise, can be held against ours: `checked_training` and `check_walks` do so before anything is timed.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from common import (
    InDtype,
    arguments,
    clock,
    digits,
    flops,
    memory,
    peak_memory,
    peaks,
    profile,
    report,
    seconds,
)
from denoising_diffusion_pytorch import GaussianDiffusion, Unet, denoising_diffusion_pytorch
from denoising_diffusion_pytorch.attend import Attend
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from diffusers.utils import logging
from ema_pytorch import EMA
from torch import nn

from diffusion_nb.denoisers import Clip, NetDenoiser
from diffusion_nb.grids import time_grid
from diffusion_nb.losses.simple import denoising_loss
from diffusion_nb.models.diffusers import names
from diffusion_nb.nets.unet import UNet, parameters
from diffusion_nb.noise import Noise
from diffusion_nb.samplers.linear import ddim
from diffusion_nb.schedules import DDPMSchedule, linear_betas
from diffusion_nb.time_samplers import chain_times
from diffusion_nb.training.batches import flip_half
from diffusion_nb.training.trainer import Trainer

logging.set_verbosity_error()
denoising_diffusion_pytorch.tqdm = lambda steps, **_: steps  # no progress bar
T, LEVELS, BLOCKS, ATTENTION = 1000, 4, 2, (1,)
SCHEDULE = DDPMSchedule(linear_betas(T))


class Setting(NamedTuple):
    device: str
    width: int
    size: int
    batch: int
    bf16: bool
    compile: bool
    flash: bool = True  # attention, in lucidrains' network

    @property
    def layout(self):
        return torch.channels_last if self.bf16 else torch.contiguous_format

    def autocast(self):
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bf16)

    def words(self):
        parts = (
            "bfloat16, channels last" if self.bf16 else "float32",
            "compiled" if self.compile else "not compiled",
        )
        parts += () if self.flash else ("without flash attention",)
        parts += ("seconds of processor time",) if self.device == "cpu" else ()
        return f"{', '.join(parts)}, batch {self.batch}, {self.size}×{self.size}, width {self.width}"


def index(t):
    "Our time t = (i + 1)/1000 as the index i that the others tell their networks."
    return T * t - 1


# the networks


def published(width=128, size=32):
    "diffusers' network in the configuration of the published DDPM weights for CIFAR-10; groups of 4 channels where it is narrower."
    net = UNet2DModel(
        sample_size=size, layers_per_block=BLOCKS, block_out_channels=(width, 2 * width, 2 * width, 2 * width),
        downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6, attention_head_dim=None,
        norm_num_groups=min(32, width // 4),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    for m in net.modules():
        if isinstance(m, nn.GroupNorm):
            m.num_groups = min(32, m.num_channels // 4)
    return net


def lucid(dim):
    "lucidrains' network as in its README."
    return flash(Unet(dim=dim, dim_mults=(1, 2, 4, 8), flash_attn=True), False)


def flash(net, on):
    "lucidrains' network with flash attention or without; on a GPU it takes bfloat16."
    for m in net.modules():
        if isinstance(m, Attend):
            m.flash = on
    return net


def networks(width=128, size=32, device="cpu"):
    "Ours and diffusers' with the same weights; lucidrains' with the width of its README, about as many parameters, and with our width."
    ours, theirs = UNet(width=width, blocks=BLOCKS, attention=ATTENTION), published(width, size)
    weights = theirs.state_dict()
    table = names(LEVELS, BLOCKS, ATTENTION, set(ours.state_dict()))
    ours.load_state_dict({name: torch.cat([weights[n] for n in group]) for name, group in table.items()})
    nets = {"diffusion_nb": ours, "diffusers": theirs} | {f"lucidrains {d}": lucid(d) for d in (width // 2, width)}
    return {name: net.to(device) for name, net in nets.items()}


def said(net):
    "The network as a function (pictures, indices) ↦ noise."
    if isinstance(net, UNet2DModel):
        return lambda x, i: net(x, i).sample
    return (lambda x, i: net(x, i.round().long())) if isinstance(net, Unet) else net


def denoiser_of(net):
    return NetDenoiser(said(net), SCHEDULE, c_noise=index)


def operations(net, size, backward=False):
    "Operations per picture, counted without computing anything."
    net = copy.deepcopy(net).to("meta")
    x, t = torch.zeros(1, 3, size, size, device="meta"), torch.zeros(1, device="meta")

    def call():
        with torch.set_grad_enabled(backward):
            out = said(net)(x, t)
            if backward:
                out.sum().backward()

    return flops(call)


def check_networks(nets, size):
    "In float64, our network with diffusers' weights says what diffusers' says."
    ours, theirs = (copy.deepcopy(nets[name]).double() for name in ("diffusion_nb", "diffusers"))
    device = next(ours.parameters()).device
    x, i = torch.randn(2, 3, size, size, device=device).double(), torch.tensor([0.0, 700.0], device=device)
    with torch.no_grad():
        want = said(theirs)(x, i)
        torch.testing.assert_close(ours(x, i.float()), want, rtol=0, atol=1e-9 * want.abs().max().item())


def check_operations(nets, width, size):
    "Ours and diffusers' take as many operations; in the CIFAR-10 configuration 12.4 GFLOP forward and three times that with backward."
    forward, both = operations(nets["diffusion_nb"], size), operations(nets["diffusion_nb"], size, backward=True)
    theirs = operations(nets["diffusers"], size)
    expected = (12.44e9, 37.32e9) if (width, size) == (128, 32) else (theirs, 3 * theirs)
    for got, want in zip((forward, both, theirs), (*expected, forward), strict=True):
        if abs(got / want - 1) > 0.01:
            raise AssertionError(f"{got / 1e9:.4g} GFLOP a picture, and it should be {want / 1e9:.4g}")


# training


def pictures(n, size, device):
    "Smooth random pictures in [-1, 1], for something to be learned."
    x = F.interpolate(torch.randn(n, 3, 4, 4), size=(size, size), mode="bilinear").clamp(-1, 1)
    return x.to(device)


class Training(NamedTuple):
    "loss: (pictures, indices, noise) ↦ the mean loss, by the library's own code. step: one step of training."

    loss: Callable
    step: Callable


def train_ours(s, net, x0, lr):
    trainer = Trainer(denoiser_of(net), x0, steps=10**6, lr=lambda k: lr, batch=s.batch, time_sampler=chain_times(T),
                      augment=flip_half, device=s.device, bf16=s.bf16, compile=s.compile)  # fmt: skip

    def loss(x, i, eps):
        with s.autocast():
            return denoising_loss(trainer.denoiser, x, (i + 1).double() / T, eps).mean()

    return Training(loss, trainer.train_step)


def documented_step(s, x0, loss, params, optimizer, average):
    "The body of the loop that diffusers' train_unconditional.py and lucidrains' Trainer have in common."

    def step():
        x = x0[torch.randint(len(x0), (s.batch,), device=s.device)]
        x = flip_half(x, torch.rand(s.batch, device=s.device))
        loss(x, torch.randint(T, (s.batch,), device=s.device), torch.randn_like(x)).backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average()

    return step


def train_diffusers(s, net, x0, lr):
    net, scheduler = net.to(memory_format=s.layout).train(), DDPMScheduler(T)
    params = list(net.parameters())
    ema = EMAModel(params, decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75, foreach=True)
    optimizer = torch.optim.AdamW(params, lr, (0.95, 0.999), weight_decay=1e-6, fused=s.device == "cuda")
    if s.compile:
        net.compile()

    def loss(x, i, eps):
        noisy = scheduler.add_noise(x, eps, i)
        with s.autocast():
            return F.mse_loss(net(noisy, i).sample.float(), eps)

    step = documented_step(s, x0.to(memory_format=s.layout), loss, params, optimizer, lambda: ema.step(params))
    return Training(loss, step)


def gaussian_diffusion(net, s, steps=None):
    flash(net, s.flash and (s.bf16 or s.device == "cpu"))
    return GaussianDiffusion(net, image_size=s.size, timesteps=T, sampling_timesteps=steps, objective="pred_noise",
                             beta_schedule="linear").to(s.device)  # fmt: skip


def train_lucid(s, net, x0, lr):
    diffusion = gaussian_diffusion(net.to(memory_format=s.layout), s).train()
    ema = EMA(diffusion, beta=0.995, update_every=10).to(s.device)
    params = list(diffusion.parameters())
    optimizer = torch.optim.Adam(params, lr, (0.9, 0.99), fused=s.device == "cuda")
    if s.compile:
        net.compile()

    def loss(x, i, eps):
        with s.autocast():
            return diffusion.p_losses(x, i, noise=eps)

    return Training(loss, documented_step(s, x0.to(memory_format=s.layout), loss, params, optimizer, ema.update))


TRAIN = {"diffusion_nb": train_ours, "diffusers": train_diffusers, "lucidrains": train_lucid}


def reference_loss(name, net, x, i, eps):
    "What the loss should be, in float32: by our code for the others, by diffusers' for ours."
    with torch.no_grad():
        if name == "diffusion_nb":
            return F.mse_loss(net(DDPMScheduler(T).add_noise(x, eps, i), i.float()), eps).item()
        return denoising_loss(denoiser_of(net), x, (i + 1).double() / T, eps).mean().item()


def checked_training(name, s, net, x0, steps=10):
    "The contender, its loss held against the reference's before a few steps of training, and found lower after them."
    x, i = x0[: s.batch], torch.linspace(100, T - 1, s.batch, device=s.device).long()
    eps = torch.randn_like(x)
    want = reference_loss(name, net, x, i, eps)
    training = TRAIN[name.split()[0]](s, copy.deepcopy(net), x0, lr=2e-4 * 128 / s.width)
    before = training.loss(x, i, eps).item()
    if not abs(before - want) <= (0.03 if s.bf16 else 1e-4) * want:
        raise AssertionError(f"{name}: the loss is {before:.6f} and should be {want:.6f}")
    for _ in range(steps):
        training.step()
    after = training.loss(x, i, eps).item()
    if steps and not after < 0.95 * before:
        raise AssertionError(
            f"{name}: {steps} steps took the loss from {before:.4f} to {after:.4f}; it should fall"
        )
    return training


# sampling


def draw_ours(s, net):
    dtype = torch.bfloat16 if s.bf16 else torch.float32
    if s.compile:
        net.compile()
    denoiser = Clip(denoiser_of(InDtype(net.to(dtype, memory_format=s.layout).eval(), s.layout))).to(s.device)

    def draw(steps, ts=None, x=None):
        x = Noise(range(s.batch), (3, s.size, s.size), s.device)(0) if x is None else x
        return ddim(denoiser, x, time_grid(steps) if ts is None else ts)

    return draw


def draw_diffusers(s, net):
    dtype = torch.bfloat16 if s.bf16 else torch.float32
    net.register_to_config(sample_size=s.size)
    pipeline = DDIMPipeline(net.to(dtype, memory_format=s.layout).eval(), DDIMScheduler(T))
    pipeline.set_progress_bar_config(disable=True)
    if s.compile:
        net.compile()

    def draw(steps):
        options = dict(num_inference_steps=steps, use_clipped_model_output=True, output_type="pt")
        return 2 * pipeline(s.batch, **options).images - 1

    return draw


def draw_lucid(s, net):
    diffusion = gaussian_diffusion(net.to(memory_format=s.layout), s).eval()
    if s.compile:
        net.compile()

    def draw(steps):
        diffusion.sampling_timesteps = steps
        with s.autocast():
            return 2 * diffusion.ddim_sample((s.batch, 3, s.size, s.size)) - 1

    return draw


DRAW = {"diffusion_nb": draw_ours, "diffusers": draw_diffusers, "lucidrains": draw_lucid}
TIMES = {
    "diffusers": lambda n: torch.arange(0, T, T // n),
    "lucidrains": lambda n: torch.linspace(-1, T - 1, n + 1).int()[1:],
}


def with_input(net):
    "A copy that adds its input to what it says: the noise guessed by an untrained network is too small, and all pictures would end black or white."

    def add(net, args, out):
        if isinstance(net, UNet2DModel):
            out.sample = out.sample + args[0]
            return out
        return out + args[0]

    net = copy.deepcopy(net)
    net.register_forward_hook(add)
    return net


def check_walks(s, nets, steps=5, atol=1e-3):
    "In float32 their walks, and ours through the same network from the same noise and at the same times, end at the same pictures."
    s = s._replace(batch=2, bf16=False, compile=False)
    for name in [name for name in nets if name != "diffusion_nb"]:
        kind = name.split()[0]
        torch.manual_seed(0)
        want = DRAW[kind](s, with_input(nets[name]))(steps)
        torch.manual_seed(0)
        x = torch.randn(s.batch, 3, s.size, s.size, device=s.device)
        ts = torch.cat([(TIMES[kind](steps).flip(0) + 1).double() / T, torch.zeros(1).double()])
        net = nets["diffusion_nb" if kind == "diffusers" else name]
        got = draw_ours(s, with_input(net))(steps, ts, x)
        inside = (want.abs() < 0.99).float().mean().item()
        error = (got - want).abs().max().item()
        if error > atol or inside < 0.5:
            raise AssertionError(
                f"{name}: its pictures and ours differ by up to {error:.2g}; {100 * inside:.0f} % of the pixels are not clipped"
            )
        print(f"{name}: its walk and ours differ by {error:.1g} at most")


def check_shape(s, name, x):
    if x.shape != (s.batch, 3, s.size, s.size):
        raise AssertionError(f"{name}: expected {s.batch} pictures of {s.size}×{s.size}, got {tuple(x.shape)}")


def checked_draw(name, s, net, steps=5):
    "The contender; its pictures are finite and as varied as those of the same network in float32."
    torch.manual_seed(0)
    plain = DRAW[name.split()[0]](s._replace(bf16=False, compile=False), copy.deepcopy(net))(steps)
    draw = DRAW[name.split()[0]](s, copy.deepcopy(net))
    fast = draw(steps).float()
    check_shape(s, name, fast)
    if not torch.isfinite(fast).all() or abs(fast.std() / plain.std() - 1) > 0.2:
        raise AssertionError(f"{name}: pictures spread by {fast.std():.3f}, and in float32 by {plain.std():.3f}")
    return draw


def where_it_works(name, s, make):
    "make(setting) and the setting: where another library's network does not run so, without flash attention, or not compiled."
    tries = [s, s._replace(flash=False)] if name.startswith("lucidrains") else [s]
    if s.compile and name != "diffusion_nb":
        tries += [t._replace(compile=False) for t in tries]
    for used in tries:
        try:
            return make(used), used
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as e:
            print(f"{name} does not run {used.words()}: {str(e)[:200]}")
            if used is tries[-1]:
                raise


def compare(what, unit, args, s, nets, make, pictures, operations):
    """Time the contenders and write the table `what`.

    make: (name, setting) ↦ one turn of a contender, checked. pictures: in a turn. operations: network ↦ for a picture.
    """
    turns, about = {}, {}
    for name in args.only or nets:
        before = memory(args.device)
        turns[name], used = where_it_works(name, s, lambda s, name=name: make(name, s))
        gib = peak_memory(args.device, before, turns[name])
        about[name] = dict(parameters=parameters(nets[name]), setting=used.words(), peak_memory_GiB=gib)
        print(f"{name}: checked", flush=True)
    best = peaks(args.device, torch.bfloat16 if s.bf16 else torch.float32, 8192 if args.device == "cuda" else 2048)
    rows, ratios = {}, {}
    for name, time in seconds(turns, args.rounds, args.minutes, clock(args.device)).items():
        rate, work = pictures / time, operations(nets[name])
        rows[name] = {"pictures/s": digits(rate), "GFLOP a picture": digits(work / 1e9), "TFLOP/s": digits(rate * work / 1e12),
                      "share of the measured peak": digits(rate * work / max(best.values()), 3)} | about[name]  # fmt: skip
        ratios[name] = digits(rate / next(iter(rows.values()))["pictures/s"], 3)
    report(f"{what}-{args.device}", f"{unit}, {s.words()}; ratios: pictures/s relative to the first row", rows, ratios, args.out,
           peaks_TFLOP_s={name: digits(peak / 1e12) for name, peak in best.items()})  # fmt: skip
    if args.profile:
        profile(args.out / f"{what}-{args.device}-profile.txt", turns, args.device)


def options(doc, batch):
    "The options of train.py and sample.py. batch: on a CPU and on a GPU."
    args = arguments(doc)
    args.add_argument("--batch", type=int, default=batch[torch.cuda.is_available()])
    args.add_argument("--size", type=int, default=32, help="height and width of the pictures")
    args.add_argument("--only", nargs="+", help="some of the contenders, such as 'lucidrains 64'")
    args.add_argument("--profile", action="store_true", help="also write where the time goes")
    return args
