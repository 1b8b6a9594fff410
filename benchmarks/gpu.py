"""How fast a GPU trains and draws with the 35.7 M U-Net of CIFAR-10, this library alone: what needs no other library to be there.

Run: python benchmarks/gpu.py train     (pictures per second, share of the device's measured peak and peak memory: bfloat16, channels last, compiled)
     python benchmarks/gpu.py sample    (the same of DDIM in 50 steps, with Fast: bfloat16, CUDA graphs)
     python benchmarks/gpu.py fast      (a guess, by Fast and by the plain denoiser, for few pictures and for many; how far the guesses differ)

Each writes results/gpu-WHAT-cuda.json, anew after each row. A CPU takes small numbers, as a test that it runs: --width 8 --batches 2 --rounds 1.
"""

import copy
import time
from functools import partial

import torch
from common import arguments, clock, digits, flops, memory, peak_memory, peaks, prepare, report, seconds, sync

from diffusion_nb.denoisers import Clip, NetDenoiser
from diffusion_nb.generation.fast import CompiledDenoiser
from diffusion_nb.grids import time_grid
from diffusion_nb.nets.unet import UNet
from diffusion_nb.noise import Noise
from diffusion_nb.samplers.linear import ddim
from diffusion_nb.schedules import DDPMSchedule, linear_betas
from diffusion_nb.time_samplers import chain_times
from diffusion_nb.training.batches import flip_half
from diffusion_nb.training.trainer import Trainer

T, SHAPE = 1000, (3, 32, 32)


def model(args):
    "The denoiser, its last layer no longer zero."
    net = UNet(width=args.width)
    torch.nn.init.normal_(net.head[-1].weight, std=0.02)
    return NetDenoiser(net, DDPMSchedule(linear_betas(T)))


def work(args, backward):
    "Operations per picture, of the network, counted without computing anything."
    net = UNet(width=args.width).to("meta")
    x, t = torch.zeros(1, *SHAPE, device="meta"), torch.zeros(1, device="meta")

    def call():
        with torch.set_grad_enabled(backward):
            out = net(x, t)
            if backward:
                out.sum().backward()

    return flops(call)


def rated(args, pictures, turn, operations, peak):
    "A row: the rate of a turn that makes so many pictures, as pictures and as operations, and the memory that it takes."
    before = memory(args.device)
    start = time.perf_counter()
    turn()
    first = time.perf_counter() - start
    best = seconds({"turn": turn}, args.rounds, args.minutes, clock(args.device), warm=1)["turn"]
    gib, rate = peak_memory(args.device, before, turn), pictures / best
    return {"pictures/s": digits(rate), "TFLOP/s": digits(rate * operations / 1e12), "peak memory beyond the start, GiB": gib,
            "share of the measured peak": digits(rate * operations / peak, 3), "seconds of the first turn": digits(first, 3)}  # fmt: skip


def measured_peak(args):
    "The most operations per second that a product or a convolution reaches here."
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    return max(peaks(args.device, dtype, 8192 if args.device == "cuda" else 1024).values())


def train(args):
    "Rows of training, a batch size each."
    peak, operations = measured_peak(args), work(args, backward=True)
    for batch in args.batches or (256, 512, 128):
        x0 = Noise(range(10 * batch), SHAPE)(0).clamp(-1, 1)
        trainer = Trainer(model(args), x0, steps=10**6, lr=lambda k: 2e-4, batch=batch, time_sampler=chain_times(T), augment=flip_half,
                          device=args.device, bf16=args.bf16, compile=args.compile)  # fmt: skip

        def turn(trainer=trainer):
            for _ in range(args.turn):
                loss = trainer.train_step()
            sync(args.device)
            if not loss.isfinite():
                raise AssertionError(f"the loss is {loss}")

        yield f"batch {batch}", rated(args, args.turn * batch, turn, operations, peak)


def fast(args):
    "The denoiser for drawing, on the device: as it is, and by Fast."
    plain = Clip(model(args)).to(args.device).eval().requires_grad_(False)
    return plain, CompiledDenoiser(plain, bf16=args.bf16, compile=args.compile)


def sample(args, steps=50):
    "Rows of DDIM in 50 steps, a batch size each."
    peak, operations = measured_peak(args), steps * work(args, backward=False)
    _, denoiser = fast(args)
    for batch in args.batches or (512, 2048, 64):
        noise = Noise(range(batch), SHAPE, args.device)

        def turn(noise=noise):
            x = ddim(denoiser, noise(0), time_grid(steps))
            sync(args.device)
            if not x.isfinite().all():
                raise AssertionError("some pictures are not finite")

        yield f"batch {batch}", rated(args, batch, turn, operations, peak)


def difference(args, a, b, x, t):
    "How far two denoisers' guesses differ: root mean square, relative to the spread of the second's."
    with torch.no_grad():
        got, want = (d(x, t).x0.float() for d in (a, b))
    return digits(((got - want).square().mean().sqrt() / want.std()).item(), 3)


def guesses(args, repeat=20):
    "Rows of one guess: milliseconds of the plain denoiser, of it in bfloat16, and of Fast."
    plain, quick = fast(args)
    rough = CompiledDenoiser(copy.deepcopy(plain), bf16=True, compile=False)
    t = torch.tensor(0.5, dtype=torch.float64, device=args.device)
    for batch in args.batches or (1, 16, 256):
        x = Noise(range(batch), SHAPE, args.device)(0)

        def turn(denoiser, x=x):
            with torch.no_grad():
                for _ in range(repeat):
                    denoiser(x, t)
            sync(args.device)

        calls = {"plain": plain, "bfloat16, not compiled": rough, "Fast": quick}
        turns = {name: partial(turn, d) for name, d in calls.items()}
        best = seconds(turns, args.rounds, args.minutes, clock(args.device), warm=2)
        row = {f"{name}, ms": digits(1e3 * best[name] / repeat, 3) for name in calls}
        yield f"batch {batch}", row | {"Fast differs from plain by": difference(args, quick, plain, x, t)}


WHAT = {"train": train, "sample": sample, "fast": guesses}


def main():
    args = arguments(__doc__)
    args.add_argument("what", choices=WHAT)
    args.add_argument("--batches", type=int, nargs="+", help="pictures at a time")
    args.add_argument("--turn", type=int, default=10, help="training steps a turn")
    args = args.parse_args()
    prepare(args.device)
    how = [args.device, "bfloat16" if args.bf16 else "float32", "compiled" if args.compile else "not compiled"]
    rows = {}
    for name, row in WHAT[args.what](args):
        rows[name] = row
        report(f"gpu-{args.what}-{args.device}", ", ".join(how), rows, out=args.out)


if __name__ == "__main__":
    main()
