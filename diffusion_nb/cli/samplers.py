"""The samplers that commands name, each with the times that suit it."""

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_nb.experiments.cold import blur_times
from diffusion_nb.grids import even_logsnr_grid, sigma_grid, time_grid
from diffusion_nb.recipes.cold import cold_sample
from diffusion_nb.samplers.consistency import consistency_sample
from diffusion_nb.samplers.heun import heun
from diffusion_nb.samplers.linear import ddim, ddpm, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m, dpmpp_3m_sde
from diffusion_nb.samplers.sde import predictor_corrector, reverse_sde
from diffusion_nb.samplers.singlestep import dpmpp_2s


def even(schedule, n: int) -> Tensor:
    "n equal steps."
    return time_grid(n)


def from_data(schedule, n: int) -> Tensor:
    "n equal steps, from t = 0.98 where nothing of the data is left at 1, and rates are infinite."
    return time_grid(n, start=1.0 if schedule(torch.ones((), dtype=torch.float64))[0] > 1e-3 else 0.98)


def noise_levels(schedule, n: int) -> Tensor:
    "n levels of sigma/alpha, even in their logarithm, from the largest up to 80 down to 0.5, then 0."
    largest = min(80.0, (-0.5 * schedule.logsnr(torch.ones((), dtype=torch.float64))).exp().item())
    return sigma_grid(
        schedule,
        *torch.logspace(*torch.tensor([largest, 0.5]).log10().tolist(), n).tolist() if n > 1 else [largest],
    )


def blur_grid(schedule, n: int) -> Tensor:
    "n times between which the width of a blur shrinks by the same factor, then 0."
    return torch.cat([blur_times(schedule, n), torch.zeros(1, dtype=torch.float64)])


SAMPLERS: dict[str, tuple[Callable, Callable]] = {
    "ddpm": (ddpm, even),
    "ddim": (ddim, even),
    "heun": (heun, even_logsnr_grid),
    "dpmpp_2m": (dpmpp_2m, even_logsnr_grid),
    "dpmpp_2m_sde": (dpmpp_2m_sde, even_logsnr_grid),
    "dpmpp_2s": (dpmpp_2s, even_logsnr_grid),
    "dpmpp_3m": (dpmpp_3m, even_logsnr_grid),
    "dpmpp_3m_sde": (dpmpp_3m_sde, even_logsnr_grid),
    "reverse_sde": (reverse_sde, from_data),
    "predictor_corrector": (predictor_corrector, from_data),
    "consistency": (consistency_sample, noise_levels),
    "cold": (cold_sample, blur_grid),
}
