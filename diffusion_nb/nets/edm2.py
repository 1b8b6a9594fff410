"""EDM2's U-Net, in which no layer changes the magnitude of what passes through it. (Karras et al. 2024)"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffusion_nb.nets.song import Resample
from diffusion_nb.util.checks import check_labels

PARTS = 0.3  # of a residual sum that comes from the branch
LARGEST = 256  # activations are clipped to ± this


def unit(x: Tensor, dims: Sequence[int], eps: float = 1e-4) -> Tensor:
    "x with a root mean square of 1 over these dimensions."
    n = math.prod(x.shape[d] for d in dims)
    size = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return x / (eps + size / n**0.5).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    "SiLU, scaled so that normal numbers keep their magnitude. (Karras et al. 2024, eq. 81)"
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, share: float = 0.5) -> Tensor:
    "(1 - share) a + share b, scaled so that independent numbers keep their magnitude. (eq. 88)"
    return a.lerp(b, share) / ((1 - share) ** 2 + share**2) ** 0.5


def mp_cat(a: Float[Tensor, "b c h w"], b: Float[Tensor, "b d h w"]) -> Float[Tensor, "b c+d h w"]:
    "Channels beside each other, both sets with the same weight in what is made of them, whatever their numbers. (eq. 103)"
    n, m = a.shape[1], b.shape[1]
    scale = ((n + m) / 2) ** 0.5
    return torch.cat([a * (scale / n**0.5), b * (scale / m**0.5)], dim=1)


class MPFourier(nn.Module):
    "√2 cos(2π (f t + φ)) for fixed f ~ N(0, 1) and φ uniform on [0, 1). (eq. 75)"

    def __init__(self, n: int):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(n))
        self.register_buffer("phases", 2 * math.pi * torch.rand(n))

    def forward(self, t: Float[Tensor, " b"]) -> Float[Tensor, "b n"]:
        return 2**0.5 * (t[:, None] * self.freqs.to(t.dtype) + self.phases.to(t.dtype)).cos()


class MPConv(nn.Module):
    "A convolution, or with `kernel` 0 a matrix, without bias, each of whose outputs has a filter of unit length; in training the stored one, too. (eq. 47 and 66)"

    def __init__(self, c_in: int, c_out: int, kernel: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in, *[kernel] * 2 * bool(kernel)))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        dims = tuple(range(1, self.weight.ndim))
        if self.training:
            with torch.no_grad():
                self.weight.copy_(unit(self.weight, dims))
        w = (unit(self.weight, dims) * (gain / self.weight[0].numel() ** 0.5)).to(x.dtype)
        return x @ w.T if w.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)


class MPBlock(nn.Module):
    """A residual block, with attention if `head_width` is not 0. (figure 21)

    down: on the way down, where the input is brought to unit length at each pixel first. joins: whether what the way down kept is put beside its input.
    """

    def __init__(self, c_in: int, c_out: int, c_emb: int, down: bool, resize: nn.Module | None = None, head_width: int = 0,
                 dropout: float = 0.0, joins: bool = False):  # fmt: skip
        super().__init__()
        self.down, self.joins, self.resize = down, joins, resize or nn.Identity()
        self.heads, self.dropout = c_out // head_width if head_width else 0, nn.Dropout(dropout)
        self.gain = nn.Parameter(torch.zeros([]))
        self.conv1, self.emb = MPConv(c_out if down else c_in, c_out, 3), MPConv(c_emb, c_out)
        self.conv2 = MPConv(c_out, c_out, 3)
        self.skip = MPConv(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.qkv, self.out = (MPConv(c_out, 3 * c_out, 1), MPConv(c_out, c_out, 1)) if head_width else (None, None)

    def forward(self, x: Float[Tensor, "b c h w"], emb: Float[Tensor, "b e"]) -> Float[Tensor, "b d h2 w2"]:
        x = self.resize(x)
        if self.down:
            x = unit(self.skip(x), (1,))
        scale = 1 + self.emb(emb, gain=self.gain)[:, :, None, None].to(x.dtype)
        h = self.conv2(self.dropout(mp_silu(self.conv1(mp_silu(x)) * scale)))
        x = mp_sum(x if self.down else self.skip(x), h, PARTS)
        if self.heads:
            x = mp_sum(x, self.attention(x), PARTS)
        return x.clamp(-LARGEST, LARGEST)

    def attention(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        "Every pixel attends to every pixel; queries, keys and values are of unit length."
        b, c, h, w = x.shape
        parts = self.qkv(x).reshape(b, self.heads, c // self.heads, 3, h * w)
        q, k, v = (part.transpose(2, 3) for part in unit(parts, (2,)).unbind(3))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(2, 3).reshape(b, c, h, w))


class EDM2UNet(nn.Module):
    """EDM2's network: `EDM2UNet(4, 192, classes=1000)` is EDM2-S for latents. (Karras et al. 2024, figure 21)

    channels: of the pictures. width, mults, blocks, attention: as in `UNet`; heads are 64 channels wide (`head_width`), and the middle attends.
    classes: the number of labels; y = classes means "any". dropout: within the blocks.
    """

    def __init__(self, channels: int = 4, width: int = 192, mults: Sequence[int] = (1, 2, 3, 4), blocks: int = 3, attention: Sequence[int] = (2, 3),
                 head_width: int = 64, classes: int = 0, dropout: float = 0.0):  # fmt: skip
        super().__init__()
        sizes, c_emb = [width * m for m in mults], width * max(mults)
        self.classes, self.multiple = classes, 2 ** (len(mults) - 1)
        self.gain = nn.Parameter(torch.zeros([]))
        self.fourier, self.time = MPFourier(sizes[0]), MPConv(sizes[0], c_emb)
        self.label = MPConv(classes, c_emb) if classes else None

        def block(c_in, c_out, down, attends=False, **options):
            return MPBlock(c_in, c_out, c_emb, down, head_width=head_width * attends, dropout=dropout, **options)

        c, pile = sizes[0], [sizes[0]]
        self.stem, self.down, self.up = MPConv(channels + 1, c, 3), nn.ModuleList(), nn.ModuleList()
        for i, size in enumerate(sizes):
            if i:
                self.down.append(block(c, c, True, resize=Resample((1, 1))))
                pile.append(c)
            for _ in range(blocks):
                self.down.append(block(c, size, True, i in attention))
                c = size
                pile.append(c)
        self.middle = nn.ModuleList([block(c, c, False, True), block(c, c, False)])
        for i, size in reversed(list(enumerate(sizes))):
            if i + 1 < len(sizes):
                self.up.append(block(c, c, False, resize=Resample((1, 1), up=True)))
            for _ in range(blocks + 1):
                self.up.append(block(c + pile.pop(), size, False, i in attention, joins=True))
                c = size
        self.head = MPConv(c, channels, 3)

    def forward(self, x: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], y: Int[Tensor, " b"] | None = None) -> Float[Tensor, "b c h w"]:  # fmt: skip
        "The output for pictures x at network times t, labels y if the network has classes."
        if x.shape[2] % self.multiple or x.shape[3] % self.multiple:
            raise ValueError(f"x: this network halves pictures, so height and width must be multiples of {self.multiple}; got {x.shape[2]}×{x.shape[3]}")  # fmt: skip
        self.check_y(y)
        emb = self.embedding(t, y).to(x.dtype)
        h = self.stem(torch.cat([x, torch.ones_like(x[:, :1])], dim=1))
        pile = [h]
        for block in self.down:
            h = block(h, emb)
            pile.append(h)
        for block in (*self.middle, *self.up):
            h = block(mp_cat(h, pile.pop()) if block.joins else h, emb)
        return self.head(h, gain=self.gain)

    def embedding(self, t: Float[Tensor, " b"], y: Int[Tensor, " b"] | None) -> Float[Tensor, "b e"]:
        "What the blocks hear: the time, and the label."
        emb = self.time(self.fourier(t))
        if y is not None:
            one = F.one_hot(y, self.classes + 1)[:, :-1].to(emb.dtype)
            emb = mp_sum(emb, self.label(self.classes**0.5 * one))
        return mp_silu(emb)

    def check_y(self, y: Int[Tensor, " n"] | None) -> None:
        "Raise ValueError unless these are labels that the network knows, or None where it knows none."
        if (y is None) == (self.label is not None):
            raise ValueError("y: expected a label for each picture (y = classes means any)" if y is None else "y: this network was built without classes")  # fmt: skip
        if y is not None:
            check_labels(y, self.classes)
