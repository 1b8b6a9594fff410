"""50,000 pictures of 32×32 with the CIFAR-10 U-Net, in pictures a second: DDPM with 1000 steps, DDIM with 50 and 20, DPM-Solver++ with 10, and the
one step of a consistency model or of a distilled student.

Run: python benchmarks/fifty_thousand.py                  (a GPU: bfloat16, compiled, channels last; writes results/fifty_thousand-cuda.json)
     python benchmarks/fifty_thousand.py --n 2 --only ddim-20    (the CPU, float32, as a test that it runs; results/fifty_thousand-cpu.json)

The weights are untrained: time does not depend on them. Each sampler starts after a short walk that compiles and warms up. With
--n below 50,000 the total is for n pictures; nothing is extrapolated.
"""

import argparse
import math
import time

import torch
from common import report

from diffusion_nb.consistency import Guess, consistency_sample
from diffusion_nb.core import Noise
from diffusion_nb.denoiser import Clip, NetDenoiser
from diffusion_nb.forward import DDPMSchedule, linear_betas
from diffusion_nb.nets.unet import UNet
from diffusion_nb.samplers.ddim import ddim
from diffusion_nb.samplers.ddpm import ddpm, time_grid
from diffusion_nb.samplers.solvers import dpmpp_2m, edm_grid

SHAPE = (3, 32, 32)
SCHEDULE = DDPMSchedule(linear_betas(1000))


def one_step(denoiser, x, ts, *, noise):
    return consistency_sample(Guess(denoiser), x, ts[[0, -1]], noise=noise)


RUNS = {
    "ddpm-1000": (ddpm, time_grid(1000)),
    "ddim-50": (ddim, time_grid(50)),
    "ddim-20": (ddim, time_grid(20)),
    "dpmpp_2m-10": (dpmpp_2m, edm_grid(SCHEDULE, 10, 0.05, 80.0)),
    "one step": (one_step, time_grid(1)),
}


class InDtype(torch.nn.Module):
    "The network in another dtype and layout than the walk, which stays in float32."

    def __init__(self, net, dtype, layout):
        super().__init__()
        self.net, self.dtype, self.layout = net, dtype, layout

    def forward(self, x, t):
        return self.net(x.to(self.dtype, memory_format=self.layout), t)


def model(device, dtype, compiled):
    layout = torch.channels_last if device == "cuda" else torch.contiguous_format
    net = UNet().to(device, dtype, memory_format=layout).eval().requires_grad_(False)
    if compiled:
        net.compile()
    return Clip(NetDenoiser(InDtype(net, dtype, layout), SCHEDULE)).to(device)


def walk(run, denoiser, ts, seeds, device):
    noise = Noise(seeds, SHAPE, device)
    return run(denoiser, noise(0), ts, noise=noise)


def timed(run, denoiser, ts, n, batch, device):
    "Seconds for n pictures, in batches of one size: the surplus of the last is drawn, too."
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    walk(run, denoiser, ts[sorted({0, len(ts) // 2, len(ts) - 1})], range(batch), device)
    sync()
    start = time.perf_counter()
    for k in range(math.ceil(n / batch)):
        x = walk(run, denoiser, ts, range(k * batch, (k + 1) * batch), device)
        assert x.shape == (batch, *SHAPE)
    sync()
    assert torch.isfinite(x).all()
    return time.perf_counter() - start


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--n", type=int, default=50_000, help="pictures for each sampler")
    args.add_argument("--batch", type=int, default=1000)
    args.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="some of the samplers")
    args.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = args.parse_args()
    on_gpu, batch = args.device == "cuda", min(args.batch, args.n)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    if on_gpu:
        torch.backends.cudnn.benchmark = True
    denoiser = model(args.device, dtype, compiled=on_gpu)
    rows = {}
    for name in args.only:
        run, ts = RUNS[name]
        total = timed(run, denoiser, ts, args.n, batch, args.device)
        rows[name] = round(total, 2)
        rows[f"{name}, pictures/s"] = float(f"{args.n / total:.4g}")
        print(f"{name:14} {args.n:,} pictures in {total:.1f} s: {args.n / total:.4g} a second", flush=True)
    setting = f"{str(dtype).removeprefix('torch.')}, {'compiled, channels last' if on_gpu else 'not compiled'}, batch {batch}"
    report(
        f"fifty_thousand-{args.device}",
        f"s for {args.n:,} pictures ({setting}), or pictures/s where it says so",
        rows,
    )


if __name__ == "__main__":
    main()
