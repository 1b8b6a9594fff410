"""Pictures in files of one's own: a folder, or an .npz file."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import Dataset

ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


class PictureFolder(Dataset):
    """The pictures of a folder, read one by one: item i is (picture (3, size, size), bytes; label).

    A picture is cropped to its middle square and resized. Where the folder has subfolders with pictures, these are the classes, `classes` in the order of their names; else there is
    one class. grey: one channel instead of three. Raises ValueError where the folder holds no pictures, and in both itself and subfolders.
    """

    def __init__(self, folder: Path | str, size: int, grey: bool = False):
        folder = Path(folder)
        self.files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS)
        if not self.files:
            raise ValueError(f"{folder} holds no pictures ({', '.join(sorted(ENDINGS))})")
        names = [p.relative_to(folder).parts[0] if p.parent != folder else "" for p in self.files]
        self.classes = sorted(set(names))
        if "" in self.classes and len(self.classes) > 1:
            raise ValueError(
                f"{folder} holds pictures and subfolders with pictures: expected one or the other, a subfolder for each class"
            )
        self.labels = [self.classes.index(name) for name in names]
        self.size, self.mode = size, "L" if grey else "RGB"

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, "c s s"], int]:
        from PIL import Image, ImageOps

        try:
            with Image.open(self.files[i]) as picture:
                square = ImageOps.fit(picture.convert(self.mode), (self.size, self.size), Image.Resampling.LANCZOS)
        except OSError as e:
            raise ValueError(f"{self.files[i]} is no picture that can be read: {e}") from e
        return torch.from_numpy(np.atleast_3d(np.asarray(square)).transpose(2, 0, 1).copy()), self.labels[i]


def read_npz(path: Path | str) -> tuple[UInt8[Tensor, "n c h w"], Int[Tensor, " n"] | None]:
    "Pictures and labels, if there are any, of an .npz file as `generate` and FID tools write it: arr_0 (n, h, w, c), bytes; labels (n,)."
    try:
        with np.load(path) as found:
            x, y = found["arr_0"], found["labels"] if "labels" in found else None
    except (OSError, ValueError, KeyError) as e:
        raise ValueError(f"{path}: expected an .npz file with arr_0, pictures (n, h, w, c) as bytes: {e!r}") from e
    if x.ndim != 4 or x.dtype != np.uint8 or x.shape[3] not in (1, 3):
        raise ValueError(f"{path}: expected arr_0 of shape (n, h, w, 1 or 3), uint8; got {x.shape}, {x.dtype}")
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), None if y is None else torch.from_numpy(y).long()
