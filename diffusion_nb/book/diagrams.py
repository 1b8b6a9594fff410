"""Drawing diagrams: boxes, arrows and small pictures on an empty canvas, in colours that colour-blind readers can tell apart."""

import matplotlib.pyplot as plt
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import FancyBboxPatch
from torch import Tensor

# Okabe and Ito's colours
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
GREY = "#7F7F7F"

Point = tuple[float, float]


def canvas(width: float, height: float, scale: float = 1.0) -> Axes:
    "An empty drawing, `width` by `height` units with (0, 0) at the lower left; one unit is `scale` inches."
    fig, ax = plt.subplots(figsize=(width * scale, height * scale))
    fig.subplots_adjust(0, 0, 1, 1)
    ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    ax.axis("off")
    return ax


def pale(colour: str) -> tuple[float, float, float]:
    "The colour mixed with four parts of white."
    r, g, b = (0.8 + 0.2 * c for c in to_rgb(colour))
    return r, g, b


def box(ax: Axes, at: Point, text: str, width: float = 1.6, height: float = 0.7, colour: str = SKY, size: float = 10) -> Point:  # fmt: skip
    "Its centre: a box with rounded corners and text in it."
    x, y = at[0] - width / 2, at[1] - height / 2
    style = f"round,pad=0,rounding_size={min(0.12, height / 3)}"
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=pale(colour), edgecolor=colour, linewidth=1.5, zorder=2))  # fmt: skip
    ax.text(*at, text, ha="center", va="center", fontsize=size)
    return at


def circle(ax: Axes, at: Point, text: str, radius: float = 0.35, colour: str = SKY, size: float = 11) -> Point:
    "Its centre: a node of a graphical model."
    ax.add_patch(plt.Circle(at, radius, facecolor=pale(colour), edgecolor=colour, linewidth=1.5, zorder=2))
    ax.text(*at, text, ha="center", va="center", fontsize=size)
    return at


def arrow(ax: Axes, start: Point, end: Point, text: str = "", bend: float = 0.0, colour: str = BLACK, dashed: bool = False, above: float = 0.14, size: float = 9) -> None:  # fmt: skip
    "An arrow with a label beside its middle; bend: how far it curves to the left."
    look = dict(arrowstyle="-|>", color=colour, lw=1.4, linestyle="--" if dashed else "-", shrinkA=0, shrinkB=0, mutation_scale=12, zorder=1, connectionstyle=f"arc3,rad={-bend}")  # fmt: skip
    ax.annotate("", end, start, arrowprops=look)
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = (dx**2 + dy**2) ** 0.5
    off = above + bend * length / 2
    x, y = (start[0] + end[0]) / 2 - dy / length * off, (start[1] + end[1]) / 2 + dx / length * off
    ax.text(x, y, text, ha="center", va="center", fontsize=size, color=colour)


def thumb(ax: Axes, picture: Float[Tensor, "c h w"], at: Point, size: float = 0.9, label: str = "") -> Point:
    "Its centre: a small picture with values in [-1, 1], and a label below."
    x, y, half = *at, size / 2
    pixels = ((picture.clamp(-1, 1) + 1) / 2).permute(1, 2, 0).cpu()
    pixels = pixels.expand(-1, -1, 3) if pixels.shape[2] == 1 else pixels
    ax.imshow(pixels.numpy(), extent=(x - half, x + half, y - half, y + half), interpolation="nearest", zorder=3)
    ax.add_patch(
        plt.Rectangle((x - half, y - half), size, size, fill=False, edgecolor=GREY, linewidth=0.8, zorder=4)
    )
    ax.text(x, y - half - 0.05, label, ha="center", va="top", fontsize=9)
    return at


def display_small(colours: int = 128) -> None:
    "Show the current figure as a PNG of so many colours, and close it: a picture full of noise takes a quarter of the bytes."
    import io

    from IPython.display import Image, display
    from PIL import Image as Pixels

    full, small = io.BytesIO(), io.BytesIO()
    plt.savefig(full, dpi="figure", facecolor="white", bbox_inches="tight")
    plt.close()
    picture = (
        Pixels.open(full).convert("RGB").quantize(colours, Pixels.Quantize.MEDIANCUT, dither=Pixels.Dither.NONE)
    )
    picture.save(small, "PNG", optimize=True)
    display(Image(small.getvalue()))
