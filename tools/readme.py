"""Write README.md and docs/readme/ from nbs/index.ipynb, as it is stored: nothing is run. --check only compares."""

import argparse
import posixpath
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]
PICTURES = "docs/readme"
NOTE = "<!-- Made from nbs/index.ipynb by tools/readme.py: change the notebook, then run make export. -->\n\n"


def from_root(match: re.Match) -> str:
    "A link that holds in nbs/, as it reads from the top folder."
    target = match[1]
    return match[0] if re.match(r"[a-z]+:|[#/]", target) else f"]({posixpath.normpath(f'nbs/{target}')}"


def readable(output) -> bool:
    "No warnings, no progress bars."
    return output.get("name") != "stderr" and "application/vnd.jupyter.widget-view+json" not in output.get(
        "data", {}
    )


def convert(notebook: Path) -> dict[str, bytes]:
    "The README and its pictures, by path."
    nb = nbformat.read(notebook, as_version=4)
    nb.metadata.language_info = {"name": "python"}
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\]\(([^)\s]+)", from_root, cell.source)
        else:
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.MULTILINE)
            cell.outputs = [out for out in cell.get("outputs", []) if readable(out)]
    tags = {"enabled": True, "remove_cell_tags": {"remove-cell"}, "remove_input_tags": {"remove-input"}}
    exporter = MarkdownExporter(config=Config(TagRemovePreprocessor=tags))
    text, resources = exporter.from_notebook_node(nb)
    files = {}
    for n, (name, data) in enumerate(resources["outputs"].items(), start=1):
        path = f"{PICTURES}/picture-{n}{Path(name).suffix}"
        text = re.sub(rf"\s*!\[\w*\]\({re.escape(name)}\)\s*", f"\n\n![picture {n}]({path})\n\n", text)
        files[path] = data
    return {"README.md": f"{NOTE}{text.strip()}\n".encode(), **files}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 where README.md is not up to date")
    check = parser.parse_args().check
    files = convert(ROOT / "nbs/index.ipynb")
    leftover = [p for p in (ROOT / PICTURES).glob("*") if p.relative_to(ROOT).as_posix() not in files]
    stale = [p for p, data in files.items() if not (ROOT / p).exists() or (ROOT / p).read_bytes() != data]
    if check:
        stale += [p.relative_to(ROOT).as_posix() for p in leftover]
        if stale:
            print(f"not up to date with nbs/index.ipynb: {', '.join(stale)}; run make export", file=sys.stderr)
        return bool(stale)
    for path in leftover:
        path.unlink()
    for path in stale:
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_bytes(files[path])
    return 0


if __name__ == "__main__":
    sys.exit(main())
