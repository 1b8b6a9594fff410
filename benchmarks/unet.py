"""The CIFAR-10 U-Net of DDPM beside diffusers' UNet2DModel: seconds for a batch, forward and forward with backward.

Run: python benchmarks/unet.py            (CPU: batch 4, two threads; writes benchmarks/results/unet-cpu.json)
     python benchmarks/unet.py --batch 128   (GPU, if there is one: also channels last and compiled; unet-cuda.json)
"""

import argparse

import torch
from common import report, seconds
from contenders import published

from diffusion_nb.nets.unet import UNet, parameters


def contenders(device, dtype, batch):
    on_gpu = device == "cuda"
    layout = torch.channels_last if on_gpu else torch.contiguous_format
    ours, theirs = (m.to(device, dtype, memory_format=layout) for m in (UNet(), published()))
    assert parameters(ours) == parameters(theirs) == 35_746_307
    if on_gpu:
        ours.compile()
        theirs.compile()
    x = torch.randn(batch, 3, 32, 32, device=device, dtype=dtype).to(memory_format=layout)
    t = torch.full((batch,), 500, device=device)
    calls = {"diffusion_nb": lambda: ours(x, t.float()), "diffusers": lambda: theirs(x, t).sample}

    def timed(call, backward):
        def run():
            with torch.set_grad_enabled(backward):
                out = call()
                if backward:
                    out.float().square().mean().backward()
            if on_gpu:
                torch.cuda.synchronize()

        return run

    name = str(dtype).removeprefix("torch.")
    return [{f"{name} {what}, {lib}": timed(call, back) for lib, call in calls.items()}
            for what, back in (("forward", False), ("forward+backward", True))]  # fmt: skip


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--batch", type=int, default=4)
    batch = args.parse_args().batch
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(2)
    rows, ratios = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        for pair in contenders(device, dtype, batch):
            times = seconds(pair, rounds=5)
            (ours, a), (_, b) = times.items()
            rows |= {name: round(v, 4) for name, v in times.items()}
            ratios[ours] = round(a / b, 2)
    report(f"unet-{device}", f"s, batch {batch}", rows, ratios)


if __name__ == "__main__":
    main()
