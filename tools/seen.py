"""How a drawn picture is compared with the stored one: as seen from some way off."""

import base64
import io

import numpy as np
from PIL import Image

BLOCK = 8  # pixels a side: what is compared are the mean colours of such blocks
NEAR = 0.1  # how far two blocks that count as alike may differ, of the range from black to white
SHARE = 0.05  # of the blocks that are not white may differ by more
MARGIN = 6  # pixels by which the sizes may differ, since the margins fit the labels


class Seen(str):
    """A PNG or GIF in base64 that equals another which looks the same: one in twenty of the blocks of pixels that are drawn on may differ.

    A line that moves by its own width passes, another line does not; nor does a damaged file.
    """

    def __eq__(self, other) -> bool:
        try:
            here, there = opened(self), opened(other)
        except (OSError, ValueError, SyntaxError):
            return False
        apart = max(abs(a - b) for a, b in zip(here.size, there.size, strict=True))
        return apart <= MARGIN and share_apart(here, there) <= SHARE

    def __ne__(self, other) -> bool:
        return not self == other

    __hash__ = None


def opened(text: str) -> Image.Image:
    "The first frame of a picture, on white. Raises OSError, ValueError or SyntaxError where it is damaged."
    picture = Image.open(io.BytesIO(base64.b64decode(text))).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def share_apart(a: Image.Image, b: Image.Image) -> float:
    "The share of blocks whose mean colours differ visibly, of those that are not white in both."
    size = [max(1, side // BLOCK) for side in a.size]
    a, b = (np.asarray(picture.resize(size, Image.Resampling.BOX), dtype=float) / 255 for picture in (a, b))
    drawn_on = (np.minimum(a, b) < 0.98).any(axis=2)
    return float((abs(a - b).max(axis=2) > NEAR)[drawn_on].mean()) if drawn_on.any() else 0.0
