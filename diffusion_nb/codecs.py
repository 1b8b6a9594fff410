from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_nb.losses.simple import denoising_loss
from diffusion_nb.nets.autoencoder import Code


class Codec(NamedTuple):
    """Pictures ↦ latents of mean 0 and variance 1 in each channel, and back.

    autoencoder: its `encode` makes a Code, or the latents themselves, its `decode` pictures. shift, scale: z = (latent - shift) · scale.
    """

    autoencoder: nn.Module
    shift: Float[Tensor, "c 1 1"]
    scale: Float[Tensor, "c 1 1"]

    def moments(self, x: Float[Tensor, "b k H W"]) -> tuple[Tensor, Tensor]:
        "Mean and standard deviation of the latents of each picture, normalised; deviation 0 where the autoencoder adds no noise."
        code = self.autoencoder.encode(x)
        mean, sd = (code.mean, (code.log_var / 2).exp()) if isinstance(code, Code) else (code, torch.zeros_like(code))
        return (mean - self.shift) * self.scale, sd * self.scale

    def encode(self, x: Float[Tensor, "b k H W"], noise: Float[Tensor, "b c h w"] | None = None) -> Float[Tensor, "b c h w"]:  # fmt: skip
        "The latents of pictures: their means, or with noise a sample."
        mean, sd = self.moments(x)
        return mean if noise is None else mean + sd * noise

    def decode(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k H W"]:
        "The pictures of latents."
        return self.autoencoder.decode(z / self.scale + self.shift)


@torch.no_grad()
def fit_codec(autoencoder: nn.Module, x: Float[Tensor, "n k H W"], batch: int = 250) -> Codec:
    "The codec whose shift and scale make the latents of these pictures, sampled, have mean 0 and variance 1 in each channel."
    c = Codec(autoencoder, torch.zeros(1), torch.ones(1))
    mean, sd = (torch.cat(part) for part in zip(*(c.moments(part) for part in x.split(batch)), strict=True))
    over = (0, 2, 3)
    variance = mean.double().var(over, correction=0) + sd.double().square().mean(over)  # the law of total variance
    column = lambda v: v.to(mean.dtype)[:, None, None]
    return Codec(autoencoder, column(mean.double().mean(over)), column(variance.rsqrt()))


@torch.no_grad()
def latents(codec: Codec, x: Float[Tensor, "n k H W"], batch: int = 250) -> Float[Tensor, "n 2*c h w"]:
    "The means of the latents of pictures, then their standard deviations: what `latent_loss` trains on."
    return torch.cat([torch.cat(codec.moments(part), dim=1) for part in x.split(batch)])


def latent_loss(denoiser: nn.Module, x0: Float[Tensor, "b 2*c h w"], t: Float[Tensor, " b"], eps: Float[Tensor, "b 2*c h w"],
                loss: Callable = denoising_loss, **cond) -> Float[Tensor, " b"]:  # fmt: skip
    "The loss of a denoiser of latents, which are sampled afresh each time. x0: means, then standard deviations; eps: the noise of the forward process, then that of the latents."
    (mean, sd), (noise, within) = x0.chunk(2, dim=1), eps.chunk(2, dim=1)
    return loss(denoiser, mean + sd * within, t, noise, **cond)
