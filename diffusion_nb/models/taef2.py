"""A small published autoencoder: TAEF2, which stands in for the codec of FLUX.2 (madebyollin/taesd, MIT)."""

import hashlib
from pathlib import Path

from jaxtyping import Float
from torch import Tensor, nn

from diffusion_nb.models.model import fill
from diffusion_nb.util.storage import read_weights

SHA256 = {
    "taef2_encoder.pth": "10a4e1021e89d7551eaf161352da8dbd0b1aa83872ae28b150c1df1ce2f147b6",
    "taef2_decoder.pth": "0a44a31e1ae59eb9dbf9359d24942fd3ef5928162c1800d97a28c61d51be0ab5",
}


class Block(nn.Module):
    "Three 3×3 convolutions, added to what came in; `wide`: after two 1×1 ones by way of four times the channels, added as well."

    def __init__(self, c: int, wide: bool):
        super().__init__()
        layers = [layer for _ in range(3) for layer in (nn.Conv2d(c, c, 3, padding=1), nn.ReLU())]
        self.conv = nn.Sequential(*layers[:-1])
        mixing = [nn.Conv2d(c, 4 * c, 1, bias=False), nn.GroupNorm(4, 4 * c), nn.ReLU(), nn.Conv2d(4 * c, c, 1, bias=False)]  # fmt: skip
        self.pool = nn.Sequential(*mixing) if wide else None

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        x = x if self.pool is None else x + self.pool(x)
        return (x + self.conv(x)).relu()


class Squash(nn.Module):
    "3 tanh(x / 3)."

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return 3 * (x / 3).tanh()


class TAEF2(nn.Module):
    "An autoencoder: `encode` makes (b, 32, h/8, w/8) of pictures (b, 3, h, w) in [-1, 1], `decode` the reverse."

    def __init__(self, width: int = 64, latent: int = 32):
        super().__init__()
        w, conv = width, lambda a, b, **options: nn.Conv2d(a, b, 3, padding=1, **options)
        half = lambda i: [conv(w, w, stride=2, bias=False), *(Block(w, i == 2) for _ in range(3))]
        twice = lambda i: [
            *(Block(w, i == 0) for _ in range(3)),
            nn.Upsample(scale_factor=2),
            conv(w, w, bias=False),
        ]
        downs, ups = ([layer for i in range(3) for layer in level(i)] for level in (half, twice))
        self.encoder = nn.Sequential(conv(3, w), Block(w, False), *downs, conv(w, latent))
        self.decoder = nn.Sequential(Squash(), conv(latent, w), nn.ReLU(), *ups, Block(w, False), conv(w, 3))

    def encode(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 32 h/8 w/8"]:
        if x.shape[2] % 8 or x.shape[3] % 8:
            raise ValueError(
                f"x: expected a height and width that are multiples of 8; got {x.shape[2]}×{x.shape[3]}"
            )
        return self.encoder((x + 1) / 2)

    def decode(self, z: Float[Tensor, "b 32 h w"]) -> Float[Tensor, "b 3 8*h 8*w"]:
        return 2 * self.decoder(z) - 1


def load_taef2(folder: Path | str) -> TAEF2:
    """The published autoencoder, in eval mode, from the folder that holds taef2_encoder.pth and taef2_decoder.pth.

    Raises FileNotFoundError saying where to find them, and ValueError for files that are not these very ones.
    """
    made, folder = TAEF2(), Path(folder)
    for part, net in (("encoder", made.encoder), ("decoder", made.decoder)):
        file = folder / f"taef2_{part}.pth"
        if not file.exists():
            raise FileNotFoundError(f"{file} is not there: put taef2_encoder.pth and taef2_decoder.pth of https://github.com/madebyollin/taesd into that folder")  # fmt: skip
        if hashlib.sha256(file.read_bytes()).hexdigest() != SHA256[file.name]:
            raise ValueError(f"{file} is not the published file: expected SHA-256 {SHA256[file.name]}")
        fill(net, {name: v.float() for name, v in read_weights(file, allow_pickle=True).items()}, str(file))
    return made.eval().requires_grad_(False)
