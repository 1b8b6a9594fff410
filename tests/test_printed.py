"""Printed texts are compared to the precision with which they are printed, and no looser; pictures as one sees them."""

import base64
import io
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from matplotlib.figure import Figure
from nbformat.v4 import new_code_cell, new_notebook, new_output

from tools.anywhere import weak
from tools.printed import Printed
from tools.seen import Seen

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("stored, fresh", [
    ("the mean is 0.523, or so", "the mean is 0.524, or so"),
    ("1.00", "0.99"),
    ("a  9.99 b", "a 10.00 b"),
    ("-0.00", "0.00"),
    ("1.2e-05", "1.3e-05"),
    ("9.9e-06", "1.0e-05"),
    ("0.1", "0.0999"),  # of a format that drops zeros
    ("tensor([0.25, -1.50])", "tensor([0.26, -1.51])"),
    ("−0.5 nats", "−0.4 nats"),
    ("12 of 12; 8×8", "12 of 12; 8×8"),
])  # fmt: skip
def test_the_last_printed_place_may_differ_by_one(stored, fresh):
    assert Printed(stored) == Printed(fresh) and Printed(fresh) == Printed(stored)
    assert not Printed(stored) != Printed(fresh)


@pytest.mark.parametrize("stored, fresh", [
    ("0.523", "0.525"),  # two units
    ("0.523", "0.533"),  # a digit further left
    ("0.1", "0.0989"),
    ("1.2e-05", "1.2e-04"),
    ("0.5", "-0.5"),
    ("177 digits", "178 digits"),  # a count
    ("1e+03 or 3", "1e+03 or 4"),
    ("float32", "float64"),
    ("v1.2.3", "v1.2.4"),
    ("07_ddpm", "08_ddpm"),
    ("DDPM-6", "DDPM-7"),
    ("rising", "falling"),
    ("0.5 nats", "0.5 bits"),
    ("0.5", "0.5 0.5"),
    ("0.5", "nan"),
    ("0.5, 0.6", "0.5; 0.6"),
    ("a b", "a  b"),
    ("1, 2, 3", "1, 2, 3.0 4"),
])  # fmt: skip
def test_anything_else_is_another_text(stored, fresh):
    assert Printed(stored) != Printed(fresh) and Printed(fresh) != Printed(stored)


def drawn(shift=0.0, height=1.0, title="loss", extra=None):
    "A plot of a falling curve and a row of grey squares, as the base64 of its PNG."
    fig = Figure(figsize=(6, 3), layout="constrained")
    left, right = fig.subplots(1, 2)
    x = np.linspace(0, 1, 100)
    left.plot(x, height * np.exp(-3 * x) + shift)
    left.set(xlim=(0, 1), ylim=(0, 1), xlabel="step", title=title)
    right.imshow(np.eye(8) if extra is None else extra, cmap="gray")
    file = io.BytesIO()
    fig.savefig(file, dpi=72)
    return base64.b64encode(file.getvalue()).decode()


def test_a_picture_may_differ_by_what_one_hardly_sees():
    assert Seen(drawn()) == Seen(drawn()) and Seen(drawn()) == Seen(drawn(shift=0.005))
    one_pixel = np.eye(8)
    one_pixel[0, 3] = 0.5
    assert Seen(drawn()) == Seen(drawn(extra=one_pixel))


def test_another_picture_and_a_damaged_one_are_told():
    stored, file = drawn(), base64.b64decode(drawn())
    black = Figure(figsize=(6, 3))
    black.savefig(black_file := io.BytesIO(), dpi=72, facecolor="black")
    others = [drawn(height=0.5), drawn(extra=np.eye(8)[::-1]), drawn(extra=np.zeros((8, 8)))]
    others += [
        base64.b64encode(b).decode()
        for b in (black_file.getvalue(), file[:200] + b"\0\0\0" + file[203:], file[:-100])
    ]
    for other in others:
        assert Seen(stored) != Seen(other) and Seen(other) != Seen(stored)


BAR = "import time\nfrom tqdm.auto import tqdm\nfor i in tqdm(range(6000), mininterval=0):\n    time.sleep(0.001)\nprint('done')"
CELLS = {  # (source, stored): whether it is green
    (
        BAR,
        "done",
    ): True,  # thousands of messages, read while it runs: left in the queues, the last ones would be dropped
    ("print(0.5231)", "0.5230"): True,
    ("print(0.5235)", "0.5230"): False,
    ("print(41)", "42"): False,
}
SHOWN = "from IPython.display import Image, display\nimport base64\ndisplay(Image(data=base64.b64decode('{}'), format='png'))"
PICTURES = {(drawn(shift=0.005), drawn()): True, (drawn(height=0.5), drawn()): False}


def test_the_suite_compares_a_notebook_by_what_it_prints(tmp_path):
    cells = [new_code_cell(source, execution_count=i, outputs=[new_output("stream", name="stdout", text=f"{stored}\n")])
             for i, (source, stored) in enumerate(CELLS)]  # fmt: skip
    cells += [new_code_cell(SHOWN.format(fresh), execution_count=9, outputs=[new_output("display_data", {"image/png": stored, "text/plain": "<IPython.core.display.Image object>"})])
              for fresh, stored in PICTURES]  # fmt: skip
    nbformat.write(new_notebook(cells=cells), tmp_path / "one.ipynb")
    words = [
        "-q",
        "-rA",
        "--color=no",
        "-c",
        ROOT / "pyproject.toml",
        "--rootdir",
        ROOT,
        "--confcutdir",
        ROOT,
        "-p",
        "conftest",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, tmp_path / "one.ipynb"], cwd=ROOT, capture_output=True, text=True
    )
    for i, green in enumerate([*CELLS.values(), *PICTURES.values()]):
        found = re.search(rf"^(PASSED|FAILED) .*::Cell {i}\b", done.stdout, re.MULTILINE)
        assert found and (found[1] == "PASSED") == green, done.stdout


def test_weak_evidence_is_named():
    "One piece that moves by more than a third of its margin between two settings, and one that does not."
    said = lambda *values: [dict(id="A", kind="limit", got=v, low=0.0, high=10.0) for v in values]
    (line,) = weak({"one": said(4.0, 4.0), "other": said(6.0, 5.0)})
    assert line.startswith("A, evidence 1 (limit): margin 4, spread 2: one 4, other 6;")
