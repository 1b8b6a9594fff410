"""Pictures of one's own: a folder, an .npz file, or a Hugging Face data set."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import Dataset

ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


class PictureFolder(Dataset):
    """The pictures of a folder, read one by one: item i is (picture (3, size, size), bytes; label).

    A picture is turned upright as its camera noted, laid on white where it is transparent, cropped to its middle square and resized; 16 bits become 8. Where the folder has subfolders with pictures, these are the classes, `classes` in the order of their names; else there is
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
        from PIL import Image

        try:
            with Image.open(self.files[i]) as picture:
                return middle_square(as_seen(picture, self.mode), self.size), self.labels[i]
        except OSError as e:
            raise ValueError(f"{self.files[i]} is no picture that can be read: {e}") from e


def as_seen(picture, mode: str):
    "A Pillow picture as it is seen: upright, on white where it is transparent, with 8 bits a channel; in this mode."
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16 bits
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) / 257).round().astype(np.uint8))
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return picture.convert(mode)


def middle_square(picture, size: int) -> UInt8[Tensor, "c {size} {size}"]:
    "The middle square of a Pillow picture, resized."
    from PIL import Image, ImageOps

    square = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.atleast_3d(np.asarray(square)).transpose(2, 0, 1).copy())


class PictureTable(Dataset):
    """The rows of a Hugging Face data set: item i is (picture (3, size, size), bytes; label).

    table: with one column of pictures and at most one of labels, `classes` by name. Raises ValueError where there are others, or no rows.
    """

    def __init__(self, table, size: int):
        kinds = {name: type(feature).__name__ for name, feature in table.features.items()}
        pictures, labels = ([n for n, kind in kinds.items() if kind == k] for k in ("Image", "ClassLabel"))
        if len(pictures) != 1 or len(labels) > 1 or not len(table):
            raise ValueError(f"expected rows with one column of pictures and at most one of labels; got {len(table)} with {kinds}")  # fmt: skip
        self.table, self.size, self.picture, self.label = table, size, *pictures, labels[0] if labels else None
        self.classes = table.features[self.label].names if labels else [""]

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, "3 s s"], int]:
        row = self.table[i]
        return middle_square(as_seen(row[self.picture], "RGB"), self.size), row[self.label] if self.label else 0


def read_hub(name: str, split: str = "train"):
    "A split of a data set of the Hugging Face Hub, or of a folder as `datasets` writes it. Raises ImportError where that package is missing, ValueError where there is no such set."
    try:
        import datasets
    except ImportError as e:
        raise ImportError("data sets of the Hugging Face Hub need one more package: pip install datasets") from e
    try:
        return datasets.load_from_disk(name) if Path(name).is_dir() else datasets.load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError) as e:
        raise ValueError(f"hf:{name} could not be read: {e}") from e


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
