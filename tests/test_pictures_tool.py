"""Stored pictures are made small, and look the same."""

import base64
import io
import json

import numpy as np
from PIL import Image

from tools.pictures import make_small, smaller


def as_png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def noise(levels: int, size: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, levels, (size, size, 3), dtype=np.uint8))


def test_a_map_of_five_hundred_colours_looks_the_same_in_half_the_bytes():
    level = np.random.default_rng(0).integers(0, 512, (90, 90))
    colours = np.stack([level // 2, level // 4, 254 - level // 2 + level % 2], -1)
    png = as_png(Image.fromarray(colours.astype(np.uint8)).convert("RGBA"))
    found = Image.open(io.BytesIO(smaller(png)))
    assert found.mode == "P" and len(smaller(png)) < 0.6 * len(png)
    before = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=int)
    assert 0 < np.abs(np.asarray(found.convert("RGB")) - before).mean() <= 1


def test_a_picture_of_too_many_colours_is_not_touched():
    picture = noise(256)
    found = Image.open(io.BytesIO(smaller(as_png(picture))))
    assert np.array_equal(np.asarray(found.convert("RGB")), np.asarray(picture))


def test_what_can_be_seen_through_stands_on_white():
    clear = as_png(Image.new("RGBA", (40, 40), (0, 0, 0, 0)))
    assert Image.open(io.BytesIO(smaller(clear))).convert("RGB").getpixel((3, 3)) == (255, 255, 255)


def test_a_notebook_loses_bytes_once_and_nothing_else(tmp_path):
    big = base64.b64encode(as_png(noise(4).convert("RGBA"))).decode()
    outputs = [{"output_type": "display_data", "data": {"image/png": big, "text/plain": "σ"}, "metadata": {}}]
    cells = [{"cell_type": "code", "source": "1", "outputs": outputs}, {"cell_type": "markdown", "source": "2"}]
    path = tmp_path / "a.ipynb"
    path.write_text(json.dumps({"cells": cells}, indent=1, ensure_ascii=False) + "\n")
    lost = make_small(path)
    after = json.loads(path.read_text())
    small = after["cells"][0]["outputs"][0]["data"].pop("image/png")
    assert lost == len(big) - len(small) > 0
    cells[0]["outputs"][0]["data"].pop("image/png")
    assert after == {"cells": cells} and make_small(path) == 0
