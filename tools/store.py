"""Run notebooks from top to bottom, each in a fresh kernel, and store what they showed.

    python tools/store.py nbs/12_solvers.ipynb

As after *Restart kernel and run all cells* in JupyterLab, without what is not part of the book: widgets (progress bars), counts and times of cells, and
needless bytes of pictures. A notebook whose cell fails is left as it was.
"""

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.outputs import SURROUNDINGS, without_widgets  # noqa: E402
from tools.pictures import make_small  # noqa: E402


def run(notebook: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    "The notebook with its outputs. Raises CellExecutionError where a cell fails."
    about = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=None, kernel_name="python3", store_widget_state=False, coalesce_streams=True, resources=about).execute()  # fmt: skip
    notebook.metadata.pop("widgets", None)
    for cell in (c for c in notebook.cells if c.cell_type == "code"):
        cell.outputs = without_widgets(cell.outputs)
    return notebook


def store(path: Path) -> None:
    done = run(nbformat.read(path, 4), path.parent)
    nbformat.write(done, path)
    nbdev_clean(path)
    make_small(path)


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", **SURROUNDINGS}
    for name in map(Path, sys.argv[1:]):
        start = time.monotonic()
        store(name)
        print(f"{name}: {time.monotonic() - start:.0f} s, {name.stat().st_size / 2**20:.2f} MB", file=sys.stderr)
