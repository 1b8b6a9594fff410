"""Frames that a slider on a page chooses among."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import IPython.display
import pytest
import torch
from PIL import Image

from diffusion_nb.book.slider import slider


class Tags(HTMLParser):
    "The attributes of each kind of tag, in order."

    def __init__(self, html):
        super().__init__()
        self.found = {}
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.setdefault(tag, []).append(dict(attrs))


@pytest.fixture
def shown(monkeypatch):
    "Call it with what slider takes: (its HTML, its text)."

    def show(*args, **options):
        kept = []
        monkeypatch.setattr(IPython.display, "display", lambda data, raw: kept.append(data))
        slider(*args, **options)
        return kept[0]["text/html"], kept[0]["text/plain"]

    return show


FRAMES = [torch.full((4, 6, 1), shade, dtype=torch.uint8) for shade in (0, 100, 200)]


def test_a_slider_holds_every_frame_and_says_what_it_shows(shown):
    html, text = shown(FRAMES, ["0", "1; half", "2"], "weight <w> =", 'The "same"', start=1, columns=("a & b",))
    tags = Tags(html).found
    (handle,), (picture,) = tags["input"], tags["img"]
    assert (handle["type"], handle["min"], handle["max"], handle["value"]) == ("range", "0", "2", "1")
    assert handle["aria-valuetext"] == "1; half" and "weight &lt;w&gt; =" in html and "a &amp; b" in html
    assert picture["alt"] == text == 'The "same"; 3 pictures, weight <w> = 0 to 2'
    assert json.loads(next(a["data-says"] for a in tags["div"] if a.get("class") == "frames")) == ["0", "1; half", "2"]  # fmt: skip
    assert "translateY(-33.3333%)" in picture["style"] and "<script" not in html
    pixels = Image.open(io.BytesIO(base64.b64decode(picture["src"].partition(",")[2]))).convert("L")
    assert pixels.size == (6, 12) and [pixels.getpixel((3, y)) for y in (1, 6, 10)] == [0, 100, 200]


def test_two_sliders_of_a_page_do_not_share_a_name(shown):
    html, _ = shown(FRAMES, "abc", "k", "t")
    assert not re.search(r"\bid=|getElementById", html) and "this.closest" in html


def test_what_does_not_fit_is_said(shown):
    with pytest.raises(ValueError, match="2 labels for 3 frames"):
        shown(FRAMES, "ab", "k", "t")
    with pytest.raises(ValueError, match="frames of one size"):
        shown([*FRAMES, torch.zeros(4, 5, 1, dtype=torch.uint8)], "abcd", "k", "t")
