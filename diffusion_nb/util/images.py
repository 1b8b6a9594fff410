"""Pictures: grids, bytes, animations."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor


def to_bytes(x: Float[Tensor, "*any"]) -> UInt8[Tensor, "*any"]:
    "[-1, 1] → 0 … 255, clipped and rounded."
    return ((x.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def picture_grid(x: Float[Tensor, "n c h w"], columns: int = 0, gap: int = 1) -> UInt8[Tensor, "H W c"]:
    "One picture made of n, in rows of `columns` (0: as square as can be), with a light line of `gap` pixels between them."
    n, c, h, w = x.shape
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    rows = math.ceil(n / columns)
    grid = torch.full((rows * (h + gap) - gap, columns * (w + gap) - gap, c), 230, dtype=torch.uint8)
    for i, picture in enumerate(to_bytes(x)):
        top, left = i // columns * (h + gap), i % columns * (w + gap)
        grid[top : top + h, left : left + w] = picture.permute(1, 2, 0)
    return grid


def show(x: Float[Tensor, "n c h w"], columns: int = 0, title: str = "", ax=None, scale: float = 0.5,
         row_labels: Sequence[str] = (), column_labels: Sequence[str] = ()):  # fmt: skip
    """The axes with pictures in a grid: `ax`, or those of a new figure, `scale` inches a picture.

    row_labels, column_labels: what stands left of each row, and above each column.
    """
    import matplotlib.pyplot as plt

    grid = picture_grid(x, columns)
    if ax is None:
        h, w = grid.shape[0] / x.shape[2], grid.shape[1] / x.shape[3]
        above, left = 0.3 * bool(title) + 0.25 * bool(column_labels), 0.09 * max(map(len, row_labels), default=0)
        _, ax = plt.subplots(figsize=(w * scale + left, h * scale + above), layout="constrained")
    ax.imshow(grid.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    for ticks, labels, size in (
        (ax.set_yticks, row_labels, x.shape[2]),
        (ax.set_xticks, column_labels, x.shape[3]),
    ):
        ticks([i * (size + 1) + (size - 1) / 2 for i in range(len(labels))], labels, fontsize=9)
    ax.tick_params(length=0, labeltop=True, labelbottom=False)
    ax.set_title(title, fontsize=10)
    return ax


def as_bytes(x: Float[Tensor, "*any"]) -> Tensor:
    "x as bytes, 0 … 255 for [-1, 1], where that loses nothing: a quarter of the memory. Else x."
    small = to_bytes(x)
    return small if torch.equal(small / 127.5 - 1, x.cpu()) else x


def animate(
    frames: Sequence[Float[Tensor, "n c h w"]], columns: int = 0, scale: int = 6, milliseconds: int = 80
) -> bytes:
    "An animated GIF, one grid of pictures a frame; show it with IPython.display.Image(data=…)."
    import io

    from PIL import Image

    images = [Image.fromarray(picture_grid(f, columns).expand(-1, -1, 3).numpy()) for f in frames]
    images = [im.resize((im.width * scale, im.height * scale), Image.Resampling.NEAREST) for im in images]
    out = io.BytesIO()
    images[0].save(out, "GIF", save_all=True, append_images=images[1:], duration=milliseconds, loop=0)
    return out.getvalue()
