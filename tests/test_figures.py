"""A figure is compared with the recorded one by what was drawn: another curve or a picture upside down is told, roundings are not."""

import json
from functools import cache
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure

from tools import figures

ROOT = Path(__file__).resolve().parents[1]
DIGITS = np.random.default_rng(0).random((40, 40)).cumsum(0) * np.linspace(
    0.3, 1, 40
)  # brighter towards the bottom, and to the right
X = np.linspace(0.01, 1, 80)
CLOUD = np.random.default_rng(1).standard_normal((200, 2))


def drawn(curve=np.sqrt, picture=DIGITS, points=CLOUD, heights=(1.0, 2.0, 3.0), label="data", title="three curves", top=2.5, log=False, hue="C0", names=("one", "two", "three")):  # fmt: skip
    "What a figure with three curves, a picture, a cloud of points and bars shows."
    fig = Figure(figsize=(8, 3))
    a, b, c, d = fig.subplots(1, 4)
    a.plot(X, 3 * X, label="line")
    a.plot(X, curve(X), color=hue, label=label)
    a.plot(X, X**2)
    a.set(title=title, ylim=(1e-3, top), yscale="log" if log else "linear")
    a.legend()
    b.imshow(picture, cmap="gray")
    c.scatter(*points.T, s=4)
    c.fill_between(X, X, 2 * X)
    c.set(xlim=(-4, 4), ylim=(-4, 4))
    d.bar(range(3), heights)
    d.set_xticks(range(3), names)
    fig.savefig("/dev/null", format="png", dpi=40)
    return json.loads(json.dumps(figures.fingerprint(fig)))


@cache
def original():
    return drawn()


def test_roundings_are_no_difference():
    nearly = drawn(
        curve=lambda x: np.sqrt(x) + 1e-3 * np.sin(9 * x),
        picture=DIGITS + 1e-3,
        points=CLOUD + 1e-3,
        heights=(1.001, 2.0, 3.0),
    )
    assert figures.apart(original(), nearly) == figures.apart(original(), drawn()) == ""


one_upside_down = DIGITS.copy()
one_upside_down[20:, 20:] = one_upside_down[20:, 20:][::-1]


@pytest.mark.parametrize("change, said", [
    (dict(curve=np.cbrt), "line data"),  # of three curves, one
    (dict(curve=lambda x: np.sqrt(x[::-1])), "line data"),
    (dict(curve=lambda x: np.sqrt(x) + 0.2), "line data"),
    (dict(curve=lambda x: np.where(x > 0.5, np.nan, np.sqrt(x))), "line data"),
    (dict(picture=DIGITS[::-1]), "image"),  # upside down
    (dict(picture=DIGITS[:, ::-1]), "image"),  # left to right
    (dict(picture=DIGITS.max() - DIGITS), "image"),  # black for white
    (dict(picture=one_upside_down), "image"),  # one of four
    (dict(points=CLOUD[:, ::-1]), "points"),
    (dict(points=CLOUD[:100]), "points"),
    (dict(heights=(1.0, 3.0, 2.0)), "bars"),
    (dict(label="model"), "model"),
    (dict(title="two curves"), "two curves"),
    (dict(top=4.0), "an axis goes from"),
    (dict(log=True), "scales"),
    (dict(hue="C1"), "holds"),
    (dict(names=("two", "one", "three")), "it says"),
])  # fmt: skip
def test_what_is_drawn_otherwise_is_told(change, said):
    assert said in figures.apart(original(), drawn(**change))


def test_a_missing_figure_and_one_too_many_are_told():
    one = original()
    assert figures.all_apart([one], [one]) == ""
    assert "0 figures were drawn, 1 are recorded" in figures.all_apart([one], [])
    assert figures.all_apart([one], [one, one]) and figures.all_apart([], [one])


def test_all_that_matplotlib_draws_here_has_a_fingerprint():
    "Contours, meshes, arrows, polar axes, empty axes, log axes with zeros, colour pictures."
    fig, axes = plt.subplots(2, 3)
    a, b, c, d, e, f = axes.ravel()
    a.contour(DIGITS), a.contourf(DIGITS), a.axhline(3), a.axvspan(1, 2)
    b.pcolormesh(DIGITS), b.quiver([0, 1], [0, 1], [1, 2], [2, 1])
    c.semilogy([0, 1, 2], [0.0, 1.0, 10.0]), c.errorbar([0, 1], [1, 2], yerr=[0.1, 0.2])
    d.imshow((np.dstack([DIGITS] * 3) * 100).astype(np.uint8))
    e.axis("off"), e.annotate("here", (0.1, 0.2), (0.5, 0.5), arrowprops=dict(arrowstyle="->"))
    f.hist(CLOUD[:, 0], bins=10), f.violinplot(CLOUD)
    fig.savefig("/dev/null", format="png", dpi=40)
    plt.close(fig)
    said = json.loads(json.dumps(figures.fingerprint(fig)))
    assert figures.apart(said, said) == "" and len(said["axes"]) == 6
    assert np.isfinite([n for axes in said["axes"] for drawn in axes["drawn"] for n in drawn[4]]).all()


NOT_COMPARED = {"nbval-ignore-output", "nbval-skip"}
RECORDS = sorted(figures.RECORDS.glob("*.json"))


def with_figures(path: Path) -> set[str]:
    "The cells of a notebook that were stored to show a figure, and are compared."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    shows = lambda out: (
        "image/png" in out.get("data", {}) and "Figure" in "".join(out["data"].get("text/plain", ""))
    )
    return {cell["id"] for cell in cells if any(map(shows, cell.get("outputs", ()))) and not NOT_COMPARED & set(cell["metadata"].get("tags", ()))}  # fmt: skip


@pytest.mark.parametrize("path", RECORDS, ids=[p.stem for p in RECORDS])
def test_a_record_belongs_to_the_figures_of_its_notebook(path):
    "Of those that are recorded, every figure that the tests compare is; none that is gone stays."
    notebook = ROOT / f"nbs/{path.stem}.ipynb"
    assert notebook.exists(), f"{path.name}: there is no such notebook any more"
    said = f"run python tools/figures.py nbs/{path.stem}.ipynb"
    assert set(json.loads(path.read_text(encoding="utf-8"))) == with_figures(notebook), said
