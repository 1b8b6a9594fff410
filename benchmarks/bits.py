"""Bits per pixel of 256 held-out digits with the model that comes with the book: a chain of 1000 steps, and how long it takes.

Run: python benchmarks/bits.py   (writes benchmarks/results/bits.json)
"""

import time

import torch
from common import report

from diffusion_nb.data import digits
from diffusion_nb.denoisers import Clip
from diffusion_nb.experiments.digits import digit_denoiser
from diffusion_nb.grids import truncated_grid
from diffusion_nb.likelihood.bits import bits_per_dim, fitted_variance
from diffusion_nb.variances import fixed_large


def main():
    torch.set_num_threads(1)  # small pictures: a second thread does not pay
    data, model, ts = digits(), Clip(digit_denoiser()), truncated_grid(1000, 0.03)
    best = fitted_variance(bits_per_dim(model, data.x[:256], ts, levels=17, var=fixed_large, y=data.y[:256]))
    start = time.perf_counter()
    x, y = data.x_test[:256], data.y_test[:256]
    bits = bits_per_dim(model, x, ts, levels=17, var=best, decoder_var=best, y=y)
    rows = {"seconds for 256 digits, 1000 steps": time.perf_counter() - start}
    rows["bits/dim"] = bits.total.mean().item()
    rows["two standard errors"] = 2 * bits.total.std().item() / 256**0.5
    rows["prior"] = bits.prior.mean().item()
    rows["steps (rate)"] = bits.steps.sum(1).mean().item()
    rows["decoder (distortion)"] = bits.decoder.mean().item()
    rows["rms error before the decoder, of 255"] = 127.5 * bits.mse[:, -1].mean().sqrt().item()
    report("bits", "", {name: float(f"{value:.4g}") for name, value in rows.items()})


if __name__ == "__main__":
    main()
