"""The autoencoder of latent diffusion, regularised by a divergence. (Rombach et al. 2022, appendix G)"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_nb.nets.unet import Attention, Down, Up, norm


class Code(NamedTuple):
    "A normal distribution of latents, independent in each number: its mean and the logarithm of its variance."

    mean: Float[Tensor, "b z h w"]
    log_var: Float[Tensor, "b z h w"]

    def sample(self, noise: Float[Tensor, "b z h w"]) -> Float[Tensor, "b z h w"]:
        "mean + standard deviation · noise."
        return self.mean + (self.log_var / 2).exp() * noise

    def kl(self) -> Float[Tensor, " b"]:
        "The divergence from a standard normal distribution, in nats, one number per picture."
        return 0.5 * (self.mean.square() + self.log_var.exp() - 1 - self.log_var).flatten(1).sum(1)


class PlainBlock(nn.Module):
    "Two normalised 3×3 convolutions, added to what came in."

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        return self.skip(x) + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


def middle(c: int) -> nn.Sequential:
    "A block, attention, a block."
    return nn.Sequential(PlainBlock(c, c), Attention(c), PlainBlock(c, c))


class KLAutoencoder(nn.Module):
    """Pictures ↦ latents, each level half as wide and high, and back: `KLAutoencoder()` is that of Stable Diffusion, 83,653,863 parameters.

    channels: of the pictures. latent: of the latents. width, mults: level i works on width · mults[i] channels. blocks: a level on the way down, one more on the way up.
    """

    def __init__(self, channels: int = 3, latent: int = 4, width: int = 128, mults: Sequence[int] = (1, 2, 4, 4), blocks: int = 2):  # fmt: skip
        super().__init__()
        sizes, self.multiple = [width * m for m in mults], 2 ** (len(mults) - 1)
        down, c = [nn.Conv2d(channels, width, 3, padding=1)], width
        for i, size in enumerate(sizes):
            for _ in range(blocks):
                down.append(PlainBlock(c, size))
                c = size
            if i + 1 < len(sizes):
                down.append(Down(c))
        ends = [norm(c), nn.SiLU(), nn.Conv2d(c, 2 * latent, 3, padding=1), nn.Conv2d(2 * latent, 2 * latent, 1)]
        self.encoder = nn.Sequential(*down, middle(c), *ends)
        up = [nn.Conv2d(latent, latent, 1), nn.Conv2d(latent, c, 3, padding=1), middle(c)]
        for i, size in reversed(list(enumerate(sizes))):
            for _ in range(blocks + 1):
                up.append(PlainBlock(c, size))
                c = size
            if i:
                up.append(Up(c))
        self.decoder = nn.Sequential(*up, norm(c), nn.SiLU(), nn.Conv2d(c, channels, 3, padding=1))

    def encode(self, x: Float[Tensor, "b c h w"]) -> Code:
        "The distribution of the latents of pictures in [-1, 1]."
        if x.shape[2] % self.multiple or x.shape[3] % self.multiple:
            raise ValueError(f"x: this autoencoder halves pictures, so height and width must be multiples of {self.multiple}; got {x.shape[2]}×{x.shape[3]}")  # fmt: skip
        mean, log_var = self.encoder(x).chunk(2, dim=1)
        return Code(mean, log_var.clamp(-30, 20))

    def decode(self, z: Float[Tensor, "b z h w"]) -> Float[Tensor, "b c H W"]:
        return self.decoder(z)
