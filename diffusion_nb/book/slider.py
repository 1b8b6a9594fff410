"""Pictures that a reader moves through with a slider, in JupyterLab and on a web page: they are drawn beforehand, and no kernel is asked."""

import base64
import io
import json
from collections.abc import Sequence
from html import escape

import torch
from jaxtyping import UInt8
from torch import Tensor

# It finds its pictures from where it stands, so that sliders of one page need no names.
MOVED = (
    "var o=this.closest('.frames'),k=this.value,says=JSON.parse(o.dataset.says);"
    "o.querySelector('img').style.transform='translateY(-'+100*k/says.length+'%)';"
    "o.querySelector('output').textContent=says[k];this.setAttribute('aria-valuetext',says[k])"
)


def sprite(frames: Sequence[UInt8[Tensor, "h w c"]], colours: int) -> str:
    "The frames, one below the other, as a WebP picture of so many colours, in a data address."
    from PIL import Image

    out = io.BytesIO()
    pixels = Image.fromarray(torch.cat([f.expand(-1, -1, 3) for f in frames]).numpy())
    few = pixels.quantize(colours, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).convert("RGB")
    few.save(out, "WEBP", lossless=True, quality=80)
    return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}"


def names(words: Sequence[str], side: str) -> str:
    "What stands above the columns or left of the rows, evenly."
    direction = "row" if side == "columns" else "column"
    spans = "".join(f'<span style="flex:1;display:flex;align-items:center;justify-content:center;text-align:center">{escape(word)}</span>' for word in words)  # fmt: skip
    return f'<div style="display:flex;flex-direction:{direction};font-size:.8em;line-height:1.1;gap:.3em">{spans}</div>'


def slider(frames: Sequence[UInt8[Tensor, "h w c"]], labels: Sequence[str], name: str, title: str, start: int = 0, *,
           columns: Sequence[str] = (), rows: Sequence[str] = (), scale: float = 2.0, colours: int = 128) -> None:  # fmt: skip
    """Show one of the frames, and a slider called `name` that chooses among them.

    Parameters
    ----------
    frames: pictures of one size, such as `picture_grid` makes. labels: what is said beside the slider, one per frame.
    title: what is to be seen; it stands above, and is read to those who cannot see. start: the frame that is shown first.
    columns, rows: what stands above each column and left of each row. scale: pixels of the page per pixel, at most. colours: in all frames together.
    The arrow keys move the slider; readers of screens speak the label. Where a page may not run anything, all frames stand one below the other.
    Raises ValueError for frames of different sizes, and where labels and frames differ in number.
    """
    from IPython.display import display

    if len({f.shape for f in frames}) != 1 or len(frames) != len(labels):
        raise ValueError(f"slider: expected frames of one size, and as many labels; got sizes {sorted({tuple(f.shape) for f in frames})} and {len(labels)} labels for {len(frames)} frames")  # fmt: skip
    height, width = frames[0].shape[:2]
    first, last = (label.partition(";")[0] for label in (labels[0], labels[-1]))
    alt = f"{title}; {len(labels)} pictures, {name} {first} to {last}"
    image = (
        f'<img alt="{escape(alt)}" src="{sprite(frames, colours)}" style="width:100%;max-width:none;display:block;'
        f'image-rendering:pixelated;transform:translateY(-{100 * start / len(labels):g}%)">'
    )
    control = (
        f'<label>{escape(name)} <input type="range" min="0" max="{len(labels) - 1}" value="{start}" aria-valuetext="{escape(labels[start])}" '
        f'oninput="{escape(MOVED)}" style="width:min(20em,50vw);vertical-align:middle"></label> <output>{escape(labels[start])}</output>'
    )
    html = (
        f'<div class="frames" data-says="{escape(json.dumps(list(labels)))}" style="max-width:{scale * width + 100 * bool(rows):g}px">\n'
        f'<p style="margin:.3em 0"><b>{escape(title)}</b></p>\n<p style="margin:.3em 0">{control}</p>\n'
        f'<div style="display:grid;grid-template-columns:{"5em" if rows else "0"} 1fr;gap:.3em"><span></span>{names(columns, "columns")}{names(rows, "rows")}'
        f'<div style="overflow:hidden;aspect-ratio:{width}/{height}">{image}</div></div>\n</div>'
    )
    display({"text/html": html, "text/plain": alt}, raw=True)
