"""Stored pictures of notebooks made small: 256 colours where the eye sees no difference. `python tools/pictures.py nbs/01_data.ipynb`"""

import base64
import io
import json
import sys
from pathlib import Path

import numpy as np
import oxipng
from PIL import Image


def as_png(picture: Image.Image) -> bytes:
    "The bytes of a PNG file, as few as the format allows."
    file = io.BytesIO()
    picture.save(file, "PNG")
    return oxipng.optimize_from_memory(file.getvalue(), level=4, strip=oxipng.StripChunks.safe())


def smaller(png: bytes) -> bytes:
    "The picture on white as a PNG, with 256 colours if these are within 1 level of 255 on average and within 32 in 999 of 1000 places; what came in where that is no smaller."
    rgba = Image.open(io.BytesIO(png)).convert("RGBA")
    seen = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    palette = seen.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    off = np.abs(np.asarray(palette.convert("RGB"), dtype=int) - np.asarray(seen))
    same_to_the_eye = off.mean() <= 1 and np.quantile(off, 0.999) <= 32
    return min(png, as_png(palette if same_to_the_eye else seen), key=len)


def make_small(path: Path) -> int:
    "The bytes that the notebook has lost; it is written only if there are any."
    before = path.read_text(encoding="utf-8")
    notebook = json.loads(before)
    for cell in notebook["cells"]:
        for data in (
            output["data"] for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
        ):
            png = base64.b64decode(data["image/png"])
            if (found := smaller(png)) != png:
                data["image/png"] = base64.b64encode(found).decode()
    after = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    if len(after) < len(before):
        path.write_text(after, encoding="utf-8")
    return max(0, len(before) - len(after))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"{name}: {make_small(Path(name)) / 1024:.0f} kB less", file=sys.stderr)
