"""50,000 pictures of 32×32 with the CIFAR-10 U-Net, in pictures per second: DDPM with 1000 steps, DDIM with 50 and 20, DPM-Solver++ with 10, and the
one step of a consistency model or of a distilled student.

Run: python benchmarks/fifty_thousand.py                  (a GPU: bfloat16, compiled, channels last; writes results/fifty_thousand-cuda.json)
     python benchmarks/fifty_thousand.py --minutes 1.5         (the same, begins no batch of a sampler after so long)
     python benchmarks/fifty_thousand.py --n 2 --only ddim-20    (a CPU, float32, as a test that it runs; results/fifty_thousand-cpu.json)

The weights are untrained: time does not depend on them. Each sampler starts after a short walk that compiles and warms up. Where fewer than 50,000
are drawn, the seconds are for those that were drawn; nothing is extrapolated. Before, DDIM's walk is held against diffusers' and lucidrains'.
"""

import time

import torch
from common import InDtype, arguments, digits, prepare, report, sync
from contenders import Setting, check_walks, networks

from diffusion_nb.denoisers import Clip, DenoiserConsistency, NetDenoiser
from diffusion_nb.grids import edm_grid, time_grid
from diffusion_nb.nets.unet import UNet
from diffusion_nb.noise import Noise
from diffusion_nb.samplers.consistency import consistency_sample
from diffusion_nb.samplers.linear import ddim, ddpm, dpmpp_2m
from diffusion_nb.schedules import DDPMSchedule, linear_betas

SHAPE = (3, 32, 32)
SCHEDULE = DDPMSchedule(linear_betas(1000))


def one_step(denoiser, x, ts, *, noise):
    return consistency_sample(DenoiserConsistency(denoiser), x, ts[[0, -1]], noise=noise)


RUNS = {
    "ddpm-1000": (ddpm, time_grid(1000)),
    "ddim-50": (ddim, time_grid(50)),
    "ddim-20": (ddim, time_grid(20)),
    "dpmpp_2m-10": (dpmpp_2m, edm_grid(SCHEDULE, 10, 0.05, 80.0)),
    "one step": (one_step, time_grid(1)),
}


def model(args):
    layout = torch.channels_last if args.bf16 else torch.contiguous_format
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    net = UNet(width=args.width).to(args.device, dtype, memory_format=layout).eval().requires_grad_(False)
    if args.compile:
        net.compile()
    return Clip(NetDenoiser(InDtype(net, layout), SCHEDULE)).to(args.device)


def walk(run, denoiser, ts, seeds, device):
    noise = Noise(seeds, SHAPE, device)
    return run(denoiser, noise(0), ts, noise=noise)


def timed(run, ts, denoiser, args, batch):
    "Pictures and seconds: n of them, or those begun within --minutes; in batches of one size, so the surplus of the last is drawn and counted, too."
    walk(run, denoiser, ts[sorted({0, len(ts) // 2, len(ts) - 1})], range(batch), args.device)
    sync(args.device)
    start, k = time.perf_counter(), 0
    while k * batch < args.n and (k == 0 or time.perf_counter() - start < 60 * args.minutes):
        x = walk(run, denoiser, ts, range(k * batch, (k + 1) * batch), args.device)
        sync(args.device)
        k += 1
    if x.shape != (batch, *SHAPE) or not torch.isfinite(x).all():
        raise AssertionError(f"expected {batch} finite pictures, got {tuple(x.shape)}")
    return k * batch, time.perf_counter() - start


def main():
    args = arguments(__doc__)
    args.add_argument("--n", type=int, default=50_000, help="pictures for each sampler")
    args.add_argument("--batch", type=int, default=1000)
    args.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="some of the samplers")
    args = args.parse_args()
    prepare(args.device)
    check_walks(Setting(args.device, 16, 16, 2, False, False), networks(16, 16, args.device))
    denoiser, rows = model(args), {}
    s = Setting(args.device, args.width, SHAPE[1], min(args.batch, args.n), args.bf16, args.compile)
    for name in args.only:
        n, total = timed(*RUNS[name], denoiser, args, s.batch)
        rows[name] = {"pictures": n, "seconds": digits(total), "pictures/s": digits(n / total)}
        print(f"{name:14} {n:,} pictures in {total:.1f} s", flush=True)
    report(f"fifty_thousand-{args.device}", f"sampling, {s.words()}", rows, out=args.out)


if __name__ == "__main__":
    main()
