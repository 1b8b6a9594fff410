"""Drawing in two stages."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from diffusion_nb.denoisers import Clip, Denoiser, Edited
from diffusion_nb.forward import q_sample
from diffusion_nb.grids import even_logsnr_grid
from diffusion_nb.noise import Noise
from diffusion_nb.samplers.cascade import upsample
from diffusion_nb.samplers.consistency import super_resolve


def enlarging(model, asked: str) -> Denoiser:
    "The stage that was asked for. Raises ValueError where it does not enlarge what this model draws."
    from diffusion_nb.cli.models import load_model

    stage, (channels, height, width) = load_model(asked), model.about.shape
    if stage.about.family != "upsampler":
        raise ValueError(f"--large: expected emoji-upsampler, or a folder that train --upsampler wrote; got a {stage.about.family} model")  # fmt: skip
    if model.codec or tuple(stage.about.shape) != (channels, 2 * height, 2 * width):
        raise ValueError(f"--large: {asked} draws pictures of shape {tuple(stage.about.shape)}, from those of half the size; "
                         f"this model draws {'latents' if model.codec else tuple(model.about.shape)}")  # fmt: skip
    return stage.denoiser


def in_stages(denoiser: Denoiser, x: Tensor, ts: Tensor, *, noise: Noise, sampler: Callable, stage: Denoiser, s: float = 0.1, calls: int = 10, **cond) -> Tensor:  # fmt: skip
    """Large pictures: those that `sampler` draws at half the size, with the noise of the same seeds, enlarged by a stage, which is given them noised to the time s.

    The means of 2×2 pixels stay those of the small pictures. x is not read.
    """
    small = Noise(noise.seeds, (x.shape[1], x.shape[2] // 2, x.shape[3] // 2), x.device)
    start = denoiser.schedule(ts[0])[1].to(x.dtype) * small(0)
    low = sampler(denoiser, start, ts, noise=small, **cond)
    given = q_sample(stage.schedule, low, ts.new_full((len(low),), s).to(x.dtype), small(2**20))
    held = Edited(Clip(stage), super_resolve(low)).eval()
    return upsample(held, given, s, even_logsnr_grid(stage.schedule, calls), noise=noise)


def in_two(sampler: Callable, stage: Denoiser) -> Callable:
    "A sampler followed by a stage that enlarges."
    return partial(in_stages, sampler=sampler, stage=stage)
