"""Put the cell into each notebook that fetches the library where there is none, as on Colab. --check only says where it is missing or another one."""

import argparse
import json
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = """# @title On Colab, run this first: it fetches the library of this book. Elsewhere it does nothing.
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("diffusion_nb") is None:
    book = Path("diffusion_nb_book").absolute()
    if not book.exists():
        project = "REPOSITORY"
        subprocess.run(["git", "clone", "-q", "--depth", "1", project, book], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", f"{book}[book,emoji]"], check=True)
    sys.path.insert(0, str(book))"""


def first_cell(root: Path = ROOT) -> dict:
    "The cell: folded in JupyterLab, and left out by the web pages, the README (remove-cell) and nbval."
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {
        "cell_type": "code",
        "execution_count": None,
        "id": "setup",
        "metadata": {"jupyter": {"source_hidden": True}, "tags": ["hide-input", "nbval-skip", "remove-cell"]},
        "outputs": [],
        "source": SOURCE.replace("REPOSITORY", project["urls"]["Repository"]).splitlines(True),
    }


def with_first_cell(nb: dict, cell: dict) -> dict:
    "The notebook with the cell below its title, and nowhere else."
    title, *rest = (c for c in nb["cells"] if c["id"] != cell["id"])
    return nb | {"cells": [title, cell, *rest]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check, cell, stale = parser.parse_args().check, first_cell(), []
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        nb = json.loads(path.read_text(encoding="utf-8"))
        if (new := with_first_cell(nb, cell)) != nb:
            stale.append(path.name)
            if not check:
                text = json.dumps(new, sort_keys=True, indent=1, ensure_ascii=False)
                path.write_text(text + "\n", encoding="utf-8")  # as nbdev-clean writes it
    if check and stale:
        print(f"run make export: no first cell, or another one, in {', '.join(stale)}", file=sys.stderr)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
