"""What a figure of matplotlib shows, in a few numbers: with these a notebook's figures are compared with those of the last run that was looked at.

    python tools/figures.py nbs/02_forward.ipynb        (run it, compare all else, and record its figures in tests/figures)
    DIFFUSION_NB_RECORD_FIGURES=1 make test ARGS=nbs    (the same for the whole book)

A stored picture is compared as one sees it from some way off (`tools/seen.py`), which a thin curve escapes. Here each curve, cloud of points, image and
set of bars is projected on eight rows of random signs: the distance of two such sketches is, to a quarter, the root mean square distance of what
was drawn, in units of the axes for curves and of black to white for images. Roundings move it by far less than `NEAR`, another curve or an image
upside down by far more. Words are compared as `tools/printed.py` compares them. Animations, and pictures that matplotlib did not draw, have no sketch.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from tools.printed import Printed

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "tests/figures"
MIME = "application/vnd.diffusion-nb.figure+json"
RECORD = "DIFFUSION_NB_RECORD_FIGURES"  # set: what is found is recorded, and not compared
ROWS = 8
NEAR = {"line": 0.01, "points": 0.03, "bars": 0.02, "shape": 0.03, "image": 0.04, "mesh": 0.04, "limits": 0.02}


def sketch(values, n: int = 0) -> list[float]:
    "Sums of numbers with random signs over √n, n how many things they describe; the same signs for as many numbers, in any version of NumPy."
    flat = np.nan_to_num(np.asarray(values, dtype=float).ravel(), nan=-1.0)
    bits = np.random.RandomState(0).randint(0, 256, flat.size, dtype=np.uint8)
    sums = [((2.0 * (bits >> row & 1) - 1) * flat).sum() for row in range(ROWS)]
    return [round(float(s) / math.sqrt(n or max(flat.size, 1)), 3) for s in sums]


def distance(a: list[float], b: list[float]) -> float:
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / max(len(a), 1))


# what was drawn


def places(ax, points, transform) -> np.ndarray:
    "(n, 2): points as they lie in the axes, (0, 0) at the lower left and (1, 1) at the upper right, held within."
    points = np.ma.filled(np.ma.asarray(points, dtype=float), np.nan).reshape(-1, 2)
    with np.errstate(all="ignore"):
        seen = ax.transAxes.inverted().transform(transform.transform(points))
    return np.clip(np.where(np.isfinite(seen), seen, np.nan), 0, 1)


def moments(points: np.ndarray) -> list[float]:
    "Middle, spread and tilt of a shape whose number of points may differ."
    points = points[np.isfinite(points).all(1)]
    if not len(points):
        return [0.0] * 5
    x, y = (points - points.mean(0)).T
    return [round(float(v), 3) for v in (*points.mean(0), x.std(), y.std(), np.cbrt((x * y).mean()))]


def levels(mappable) -> np.ndarray:
    "The values of an image between the ends of its colours; those of an image in colour as they are."
    values = np.ma.filled(np.ma.asarray(mappable.get_array(), dtype=float), np.nan)
    if values.ndim == 3 and values.shape[-1] in (3, 4):
        return values / (255 if mappable.get_array().dtype == np.uint8 else 1)
    return np.clip(np.ma.filled(np.ma.asarray(mappable.norm(values), dtype=float), np.nan), 0, 1)


def colour(value) -> str:
    from matplotlib.colors import to_hex

    try:
        return to_hex(value)
    except (TypeError, ValueError):
        return ""


def entry(artist, kind: str, values, hue="") -> list:
    "[kind, label, colour, how many, sketch]."
    label = str(artist.get_label())
    n = len(values) if kind in ("line", "points") else int(np.size(values))
    return [kind, "" if label.startswith("_") else label, colour(hue), n, sketch(values, n)]


def of_collection(ax, c) -> list[list]:
    "What one collection shows: clouds of points, meshes, and all else by the moments of its outlines."
    from matplotlib.collections import PathCollection, QuadMesh

    hue = c.get_facecolor() if len(c.get_facecolor()) else c.get_edgecolor()
    hue = hue[0] if len(hue) else ""
    found = []
    if isinstance(c, QuadMesh):
        return [entry(c, "mesh", levels(c))]
    if isinstance(c, PathCollection) and len(c.get_offsets()):
        found.append(entry(c, "points", places(ax, c.get_offsets(), c.get_offset_transform()), hue))
    elif outlines := [p.vertices for p in c.get_paths() if len(p.vertices)]:
        shape = moments(places(ax, np.concatenate(outlines), c.get_transform()))
        found.append([*entry(c, "shape", [], hue)[:3], 0, shape])
    if c.get_array() is not None and len(found):
        found.append(entry(c, "mesh", levels(c)))
    return found


def bars(ax) -> list[list]:
    "The boxes around all patches of the axes, and their colours."
    if not ax.patches:
        return []
    outlines = [p.get_path().transformed(p.get_transform()).get_extents().get_points() for p in ax.patches]
    boxes = np.concatenate([ax.transAxes.inverted().transform(b) for b in outlines])
    shades = np.array([p.get_facecolor()[:3] for p in ax.patches])
    return [["bars", "", "", len(ax.patches), sketch(np.clip(boxes, 0, 1), len(ax.patches))], ["bars", "", "", len(shades), sketch(shades, len(shades))]]  # fmt: skip


def words(ax) -> list[str]:
    "All that is written in the axes; ticks where somebody wrote them."
    said = [ax.get_title(), ax.get_title("left"), ax.get_title("right"), ax.get_xlabel(), ax.get_ylabel()]
    said += [t.get_text() for t in ax.texts]
    said += [t.get_text() for t in ax.get_legend().get_texts()] if ax.get_legend() else []
    for axis in (ax.xaxis, ax.yaxis):
        if not axis.isDefault_majfmt:
            said += [t.get_text() for t in axis.get_ticklabels()]
    return [text for text in said if text]


def of_axes(ax) -> dict:
    "Words, limits and artists of one pair of axes."
    ends = ax.transScale.transform(np.array([ax.get_xlim(), ax.get_ylim()]).T).T.ravel()
    drawn = [
        entry(line, "line", places(ax, line.get_xydata(), line.get_transform()), line.get_color())
        for line in ax.lines
        if len(line.get_xydata())
    ]
    for c in ax.collections:
        drawn += of_collection(ax, c)
    for image in ax.images:
        values = levels(image)
        drawn.append(entry(image, "image", values[::-1] if image.origin == "lower" else values))
    limits = [float(f"{v:.5g}") for v in ends]
    return {"words": words(ax), "scales": [ax.get_xscale(), ax.get_yscale()], "limits": limits, "drawn": drawn + bars(ax)}  # fmt: skip


def fingerprint(fig) -> dict:
    "What a figure shows; ask after it was drawn, for only then its limits are known."
    said = [t.get_text() for t in fig.texts] + [fig.get_suptitle()]
    said += [t.get_text() for legend in fig.legends for t in legend.get_texts()]
    return {"words": [text for text in said if text], "axes": [of_axes(ax) for ax in fig.axes]}


# how two are compared


def apart(was: dict, now: dict) -> str:
    "How the figure differs from the recorded one, '' if it does not."
    if Printed("\n".join(was["words"])) != Printed("\n".join(now["words"])):
        return f"it says {now['words']}, and said {was['words']}"
    if len(was["axes"]) != len(now["axes"]):
        return f"it has {len(now['axes'])} pairs of axes, and had {len(was['axes'])}"
    for k, (a, b) in enumerate(zip(was["axes"], now["axes"], strict=True)):
        if said := axes_apart(a, b):
            return f"axes {k}: {said}"
    return ""


def axes_apart(was: dict, now: dict) -> str:
    if Printed("\n".join(was["words"])) != Printed("\n".join(now["words"])):
        return f"it says {now['words']}, and said {was['words']}"
    if was["scales"] != now["scales"]:
        return f"its scales are {now['scales']}, and were {was['scales']}"
    for a, b, p, q in [(*was["limits"][i : i + 2], *now["limits"][i : i + 2]) for i in (0, 2)]:
        if not max(abs(a - p), abs(b - q)) <= NEAR["limits"] * abs(b - a):
            return f"an axis goes from {p:g} to {q:g}, and went from {a:g} to {b:g}"
    if [d[:4] for d in was["drawn"]] != [d[:4] for d in now["drawn"]]:
        return f"it holds {[d[:4] for d in now['drawn']]}, and held {[d[:4] for d in was['drawn']]}"
    for (kind, label, hue, _, a), (*_, b) in zip(was["drawn"], now["drawn"], strict=True):
        if (far := distance(a, b)) > NEAR[kind]:
            return f"{kind} {label} {hue}: {far:.3f} from where it was; at most {NEAR[kind]} is rounding"
    return ""


def all_apart(was: list[dict], now: list[dict]) -> str:
    "How the figures of a cell differ from the recorded ones, '' if they do not."
    if len(was) != len(now):
        return f"{len(now)} figures were drawn, {len(was)} are recorded"
    return next((f"figure {k}, {said}" for k, pair in enumerate(zip(was, now, strict=True)) if (said := apart(*pair))), "")  # fmt: skip


# where they are kept


def add_to(shell) -> None:
    "Every figure that this IPython shell shows carries its fingerprint along."
    from IPython.core.formatters import JSONFormatter, catch_format_error

    class Carried(JSONFormatter):
        "A function registered for figures would not do: the inline backend takes those away when it is set up."

        @catch_format_error
        def __call__(self, shown):
            matplotlib = sys.modules.get("matplotlib.figure")
            return fingerprint(shown) if matplotlib and isinstance(shown, matplotlib.Figure) else None

    shell.display_formatter.formatters[MIME] = Carried(parent=shell.display_formatter, format_type=MIME)


def recorded(notebook: Path) -> dict[str, list[dict]] | None:
    "{id of the cell: its figures} of a notebook of the book, None if nothing is recorded."
    path = RECORDS / f"{notebook.stem}.json"
    if notebook.parent != ROOT / "nbs" or not path.exists():
        return None
    return json.loads(path.read_text(encoding="utf-8"))


def write(notebook: Path, figures: dict[str, list[dict]]) -> None:
    "Record the figures of a notebook, a line for each."
    cells = [
        f'"{cell}": [\n' + ",\n".join(json.dumps(f, ensure_ascii=False, separators=(",", ":")) for f in shown) + "\n]"
        for cell, shown in figures.items()
    ]  # fmt: skip
    RECORDS.mkdir(exist_ok=True)
    (RECORDS / f"{notebook.stem}.json").write_text("{\n" + ",\n".join(cells) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", *sys.argv[1:]]
    sys.exit(subprocess.run(command, cwd=ROOT, env=os.environ | {RECORD: "1"}).returncode)
