import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffusion_nb.nets.autoencoder import Code, PlainBlock
from diffusion_nb.nets.unet import Down, Up, norm


class VectorQuantiser(nn.Module):
    """Each latent vector ↦ the nearest of `codes` vectors, with the gradient passed straight through. (van den Oord et al. 2017, section 3.2)

    codes, dim: how many vectors there are in the code book, of how many numbers.
    """

    def __init__(self, codes: int, dim: int):
        super().__init__()
        self.book = nn.Parameter(torch.randn(codes, dim))
        self.register_buffer("use", torch.ones(codes))
        self.register_buffer("seen", torch.zeros(codes, dim))

    def index(self, z: Float[Tensor, "b c h w"]) -> Int[Tensor, "b h w"]:
        "The number of the nearest code, for each vector."
        vectors = z.movedim(1, -1)
        distance = self.book.square().sum(1) - 2 * vectors @ self.book.T  # and |vector|², which decides nothing
        return distance.argmin(-1)

    def vectors(self, index: Int[Tensor, "b h w"]) -> Float[Tensor, "b c h w"]:
        "The codes of these numbers."
        return self.book[index].movedim(-1, 1)

    def forward(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        index = self.index(z)
        if self.training:
            self._count(z.detach(), index)
        return z + (self.vectors(index) - z).detach()

    @torch.no_grad()
    def _count(self, z, index):
        codes, vectors = len(self.book), z.movedim(1, -1).flatten(0, -2)
        self.use.lerp_(torch.bincount(index.flatten(), minlength=codes).to(self.use), 0.01)
        self.seen.copy_(vectors[torch.arange(codes, device=z.device) * len(vectors) // codes])

    @torch.no_grad()
    def restart(self, share: float = 0.05) -> int:
        "Put each code that was used less than `share` of the average onto a vector seen last; returns how many."
        dead = self.use < share * self.use.mean()
        self.book[dead], self.use[dead] = self.seen[dead], self.use.mean()
        return int(dead.sum())


class SmallAutoencoder(nn.Module):
    """Pictures in [-1, 1] ↦ latents and back, by convolutions alone.

    channels: of the pictures. latent: of the latents. widths: the channels of each level; each further level is half as wide and high.
    blocks: per level on the way down; on the way up one more. patch: pixels folded into channels first, patch × patch.
    quantiser: what the decoder rounds latents with; without one, the encoder makes a normal distribution of them.
    """

    def __init__(self, channels: int = 1, latent: int = 4, widths: tuple[int, ...] = (16, 32), blocks: int = 1,
                 patch: int = 2, quantiser: VectorQuantiser | None = None):  # fmt: skip
        super().__init__()
        self.multiple, self.quantiser = patch * 2 ** (len(widths) - 1), quantiser
        folded, c = channels * patch**2, widths[0]
        down = [nn.PixelUnshuffle(patch), nn.Conv2d(folded, c, 3, padding=1)]
        for i, width in enumerate(widths):
            down += [Down(c, symmetric=True)] if i else []
            for _ in range(blocks):
                down.append(PlainBlock(c, width))
                c = width
        out = latent if quantiser else 2 * latent
        self.encoder = nn.Sequential(*down, norm(c), nn.SiLU(), nn.Conv2d(c, out, 1))
        up = [nn.Conv2d(latent, c, 3, padding=1)]
        for i, width in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                up.append(PlainBlock(c, width))
                c = width
            up += [Up(c)] if i else []
        head = nn.Conv2d(c, folded, 3, padding=1)
        self.decoder = nn.Sequential(*up, norm(c), nn.SiLU(), head, nn.PixelShuffle(patch))

    def encode(self, x: Float[Tensor, "b c H W"]) -> Code | Float[Tensor, "b z h w"]:
        "The distribution of the latents of pictures; with a quantiser the latents, before it rounds them."
        if x.shape[2] % self.multiple or x.shape[3] % self.multiple:
            raise ValueError(f"x: this autoencoder needs heights and widths that are multiples of {self.multiple}; "
                             f"got {x.shape[2]}×{x.shape[3]}")  # fmt: skip
        made = self.encoder(x)
        if self.quantiser:
            return made
        mean, log_var = made.chunk(2, dim=1)
        return Code(mean, log_var.clamp(-30, 20))

    def decode(self, z: Float[Tensor, "b z h w"]) -> Float[Tensor, "b c H W"]:
        "The pictures of latents, which a quantiser rounds first."
        return self.decoder(self.quantiser(z) if self.quantiser else z)
