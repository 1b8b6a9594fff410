"""Files that a finished set of samples can be written as."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from diffusion_nb.util.storage import save_tensors


def write_npz(path: Path, found: dict[str, Tensor]) -> None:
    "arr_0: (n, h, w, c), uint8; seeds; labels."
    arrays = {"arr_0": found["pictures"].permute(0, 2, 3, 1).numpy()} | {
        k: v.numpy() for k, v in found.items() if k != "pictures"
    }

    with open(path, "wb") as f:
        np.savez(f, **arrays)  # type: ignore[arg-type]  # its stubs take every keyword for the first one


def write_folder(path: Path, found: dict[str, Tensor]) -> None:
    "One PNG a picture, named by its seed, and labels.json if there are any."
    from PIL import Image

    path.mkdir(exist_ok=True)
    for seed, picture in zip(
        tqdm(found["seeds"].tolist(), desc="writing", delay=3), found["pictures"], strict=True
    ):
        Image.fromarray(picture.permute(1, 2, 0).squeeze(2).numpy()).save(path / f"{seed:06d}.png")
    if "labels" in found:
        labels = dict(zip(found["seeds"].tolist(), found["labels"].tolist(), strict=True))
        (path / "labels.json").write_text(json.dumps(labels), encoding="utf-8")


FORMS: dict[str, Callable[[Path, dict[str, Tensor]], None]] = {
    "": write_folder,
    ".npz": write_npz,
    ".safetensors": partial(save_tensors, about={}),
}
