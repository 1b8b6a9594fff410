"""Write the book as web pages, from the notebooks as they are stored: nothing is run, and a reader needs no network."""

import argparse  # noqa: I001  (diffusion_nb.book before nbformat, which it makes quick)
import ast
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import tomllib
from collections.abc import Iterator
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import parity
from docutils.nodes import make_id

from diffusion_nb.book.folds import folds
from diffusion_nb.book.ledger import Ledger, cells_of, cites, errata_in, ledger
from diffusion_nb.book.pictures import alt_texts

import nbformat
from readme import readable

ROOT = Path(__file__).resolve().parents[1]


# the notebooks


def repository(root: Path) -> str:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]


def run_it(root: Path, stem: str) -> str:
    "Where a reader can run this notebook."
    project = repository(root).removeprefix("https://github.com/")
    colab = f"https://colab.research.google.com/github/{project}/blob/main/nbs/{stem}.ipynb"
    binder = f"https://mybinder.org/v2/gh/{project}/main?labpath=nbs/{stem}.ipynb"
    source = f"{repository(root)}/blob/main/nbs/{stem}.ipynb"
    links = f'<a href="{colab}">Colab</a> · <a href="{binder}">Binder</a> · <a href="running.html">locally</a> · <a href="{source}">source</a>'
    return f'<p class="run-it">Run it: {links}</p>'


def links(root: Path, text: str) -> str:
    "Links in Markdown, as they hold among the pages: ../X is a page, or else in the repository; headings are named as MyST does."

    def above(match):
        return f"]({match[1]}" if match[1] == "CONTRIBUTING.md" else f"]({repository(root)}/blob/main/{match[1]}"

    def heading(match):
        return match[1] + re.sub(r"[^\w-]", "", match[2].lower())

    text = re.sub(r"\]\(\.\./([^)\s]+)", above, text)
    return re.sub(r"(\]\((?:\w+\.ipynb)?#)([^)\s]+)", heading, text)


def notebook(root: Path, stem: str) -> nbformat.NotebookNode:
    "The notebook as it is shown: no machinery; what goes into the library is tagged."
    nb = nbformat.read(root / f"nbs/{stem}.ipynb", as_version=4)
    nb.metadata = {"kernelspec": nb.metadata.kernelspec, "language_info": {"name": "python"}}
    nb.cells = [cell for cell in nb.cells if "remove-cell" not in cell.metadata.get("tags", []) and not cell.source.startswith("#| default_exp")]  # fmt: skip
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = links(root, cell.source)
        else:
            cell.metadata.tags = cell.metadata.get("tags", []) + ["export"] * cell.source.startswith("#| export")
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.MULTILINE)
            cell.outputs = [output for output in cell.outputs if readable(output)]
    for cell, text in alt_texts(nb.cells):
        cell.metadata["mystnb"] = {"image": {"alt": text}}
    heading, _, rest = nb.cells[0].source.partition("\n")
    nb.cells[0].source = f"{heading}\n\n{run_it(root, stem)}\n{rest}"
    nb.cells = folded(nb.cells)
    return nb


def folded(cells: list) -> list:
    "The cells of a notebook with those sections folded that are for some readers only; their headings stay addresses."
    begins, ends = {fold.first: fold.title for fold in folds(cells)}, {fold.last for fold in folds(cells)}
    shown = []
    for i, cell in enumerate(cells):
        if title := begins.get(i):
            rest = cell.source.partition("\n")[2]
            cell.source = (
                f'<details class="fold"><summary id="{make_id(title)}">{escape(title)}</summary>\n\n{rest}'
            )
        shown += [cell, *([nbformat.v4.new_markdown_cell("</details>")] if i in ends else [])]
    return shown


def title(nb) -> str:
    return nb.cells[0].source.partition("\n")[0].lstrip("# ")


def raw(html: str) -> str:
    "HTML in Markdown, its formulas marked for MathJax."
    html = re.sub(r"\$([^$\n]+)\$", r'<span class="math">\\(\1\\)</span>', html)
    return f"```{{raw}} html\n{html}\n```"


def contents(caption: str, pages: list[str]) -> str:
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```", ""])


# the ledger


def place(stem: str, heading: str) -> str:
    "The address of a heading."
    return f"{stem}.html#{make_id(heading)}"


def ledger_parts(root: Path, rows: Ledger, modules: list[str]) -> str:
    "The whole ledger and the errata, which stand above the notebook that makes them."

    def code(name):
        return f"api/{max((m for m in modules if name.startswith(f'diffusion_nb.{m}.')), key=len)}.html#{name}"

    errata = (
        f'<li><a href="{place("errata", erratum.heading)}">{escape(id)}</a> {escape(erratum.says)}'
        for id, erratum in errata_in(cells_of(root, "errata"))
    )
    shown = sum(bool(row.claim) for row in rows)
    return "\n\n".join([
        "## Every statement",
        f"{len(rows)} statements: {shown} shown, {sum(not row.written for row in rows)} planned. The strongest evidence is in bold.",
        raw(rows.html(place, code)),
        "## Errata",
        raw(f"<ul>{' '.join(errata)}</ul>"),
    ])  # fmt: skip


# the library


def prose(docstring: str, rows: Ledger) -> str:
    "A docstring in HTML, its ids linked to the ledger."

    def to_ledger(match):
        row = next((row.id for row in rows if cites(match[0], row.id)), None)
        return f'<a href="../ledger.html#{row}">{match[0]}</a>' if row else match[0]

    text = re.sub(r"^(\w+)\n-+$", r"<b>\1</b>\n", escape(docstring, quote=False), flags=re.MULTILINE)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"\*\*([a-z ]+)\*\*", r"<b>\1</b>", text)
    text = re.sub(r"\b[A-Z]{3,4}-\w+(?:[/.-]+\w+)*", to_ledger, text)
    text = re.sub(r"\n(?=[\w, ]+: |Raises )", "<br>", text)
    return "".join(f"<p>{paragraph}</p>" for paragraph in text.split("\n\n"))


def signature(lines: list[str], node) -> list[str]:
    "The source of a function or a class up to its docstring; of a class also its fields and methods."
    start = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
    head = [line.replace("  # fmt: skip", "") for line in lines[start : max(node.body[0].lineno - 1, node.lineno)]]
    for child in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(child, ast.AnnAssign):
            head.append(lines[child.lineno - 1])
        elif isinstance(child, ast.FunctionDef) and (
            child.name[0] != "_" or child.name in ("__init__", "__call__")
        ):
            head += signature(lines, child)
    return head


def entries(lines: list[str], parent, name: str, rows: Ledger, file: str) -> Iterator[str]:
    "The Markdown of each public function and class in a module, or of each documented method of a class; docs/conf.py enters them into objects.inv and the search."
    for node in parent.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_":
            full, docstring = f"{name}.{node.name}", ast.get_docstring(node) or ""
            if docstring or isinstance(parent, ast.Module):
                level = "##" if isinstance(parent, ast.Module) else "###"
                code = textwrap.dedent("\n".join(signature(lines, node)))
                kind = "class" if isinstance(node, ast.ClassDef) else "function" if level == "##" else "method"
                source = f'<a class="source" href="{file}#L{node.lineno}">source</a>'
                text = raw(f'<div id="{full}" class="py-{kind}">{source}{prose(docstring, rows)}</div>')
                index = f"```{{index}} single: {node.name} ({name.removeprefix('diffusion_nb.')})\n```"
                yield f"{level} {node.name}\n\n{index}\n\n```python\n{code}\n```\n\n{text}"
            if isinstance(node, ast.ClassDef):
                yield from entries(lines, node, full, rows, file)


def library(root: Path) -> dict[str, tuple[str, str]]:
    "{module: (the first notebook it comes from, its source)}, in the order of the book; what is written by hand, with no notebook, is last."
    found = {}
    for path in (root / "diffusion_nb").rglob("[!_]*.py"):
        name = ".".join(path.relative_to(root / "diffusion_nb").with_suffix("").parts)
        source = path.read_text(encoding="utf-8")
        made = re.search(r"^# %% \S*/(\w+)\.ipynb ", source, re.MULTILINE)
        found[name] = made[1] if made else "", source
    return dict(sorted(found.items(), key=lambda item: (not item[1][0], item[1][0], item[0])))


def api_page(root: Path, name: str, stem: str, heading: str, source: str, rows: Ledger) -> str:
    origin = f"comes from [{heading}](../{stem}.ipynb)" if stem else "is written by hand"
    top = f"# {name}\n\n{ast.get_docstring(ast.parse(source)) or ''}\n\n`diffusion_nb.{name}` {origin}.\n\n"
    file = f"{repository(root)}/blob/main/diffusion_nb/{name.replace('.', '/')}.py"
    found = entries(source.splitlines(), ast.parse(source), f"diffusion_nb.{name}", rows, file)
    return top + "\n\n".join(found) + "\n"


# the pages


def prepare(root: Path, src: Path) -> None:
    "Fill the folder `src` with what Sphinx reads."
    shutil.copytree(root / "docs", src, dirs_exist_ok=True, ignore=shutil.ignore_patterns("readme", "_build"))
    shutil.copy(root / "CONTRIBUTING.md", src)
    running = (root / "docs/running.md").read_text(encoding="utf-8").replace("REPOSITORY", repository(root))
    (src / "running.md").write_text(running, encoding="utf-8")
    (src / "parity.md").write_text(parity.page(root), encoding="utf-8")
    book = {path.stem: notebook(root, path.stem) for path in sorted((root / "nbs").glob("*.ipynb"))}
    rows, modules = ledger(root), library(root)
    contents_table = "\n".join(cell.source for cell in book["index"].cells if cell.cell_type == "markdown")
    read = re.findall(r"^\| \w+ \| \[.+?\]\((\w+)\.(?:ipynb|html)\)", contents_table, re.MULTILINE)
    numbered = sorted(
        (stem for stem in book if stem[0].isdigit()),
        key=lambda s: (s not in read, read.index(s) if s in read else s),
    )
    more = [stem for stem in book if stem not in (*numbered, "index", "ledger")]
    toctrees = [contents("The book", numbered), contents("Beside it", ["guide", "ledger", "parity", *more, "running", "CONTRIBUTING", "Index of names <genindex>"]),
                contents("The library", [f"api/{name}" for name in modules])]  # fmt: skip
    book["index"].cells.append(nbformat.v4.new_markdown_cell("\n".join(toctrees)))
    book["ledger"].cells.insert(1, nbformat.v4.new_markdown_cell(ledger_parts(root, rows, list(modules))))
    for stem, nb in book.items():
        nbformat.write(nb, src / f"{stem}.ipynb")
    (src / "api").mkdir()
    for name, (stem, source) in modules.items():
        (src / f"api/{name}.md").write_text(
            api_page(root, name, stem, title(book[stem]) if stem else "", source, rows), encoding="utf-8"
        )


class Page(HTMLParser):
    "What a page offers to link to, what it links to, and what it fetches."

    def __init__(self, html: str):
        super().__init__()
        self.ids, self.links, self.fetched = set(), set(), set()
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs.get("id"), attrs.get("name")}
        (self.links if tag == "a" else self.fetched).update(
            v for k in ("href", "src", "data", "poster") if (v := attrs.get(k))
        )


def problem(address: str, path: Path, pages: dict[Path, Page]) -> str | None:
    "What is wrong with an address on the page at `path`, if anything."
    url, fetched = urlsplit(address), address in pages[path].fetched
    if url.scheme or url.netloc:
        return f"{path.name} fetches {address}" if fetched and url.scheme != "data" else None
    target = (path.parent / unquote(url.path)).resolve() if url.path else path
    there = target.exists() and (target not in pages or unquote(url.fragment) in {"", *pages[target].ids})
    return None if there else f"{path.name} links to {address}, which is not there"


def broken(out: Path) -> Iterator[str]:
    "Each link to what is not there, and each thing that a page would fetch from elsewhere."
    pages = {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in sorted(out.rglob("*.html"))}
    for path, page in pages.items():
        yield from filter(None, (problem(address, path, pages) for address in sorted(page.fetched | page.links)))
    for path in sorted([*pages, *out.rglob("*.css")]):
        styles = (
            re.findall(r"(?s)<style.*?</style>", path.read_text(encoding="utf-8"))
            if path in pages
            else [path.read_text(encoding="utf-8")]
        )
        for url in re.findall(r"(?:url\(|@import)\s*['\"]?((?:https?:)?//[^'\")]*)", "".join(styles)):
            yield f"{path.name} fetches {url}"


def build(root: Path, out: Path) -> int:
    "Write the pages of the project at `root`; 1 if Sphinx warned or a link is broken."
    with tempfile.TemporaryDirectory() as folder:
        src, html = Path(folder) / "src", Path(folder) / "html"
        prepare(root, src)
        failed = subprocess.run([sys.executable, "-m", "sphinx", "-qEnW", "--keep-going", src, html]).returncode
        problems = list(broken(html))
        if (out / "searchindex.js").exists():  # made here before
            shutil.rmtree(out)
        shutil.copytree(html, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".doctrees", ".buildinfo"))
    print(*problems, sep="\n", end="\n" if problems else "", file=sys.stderr)
    return int(bool(failed or problems))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=ROOT, help="the project (default: this one)")
    parser.add_argument("--out", type=Path, help="folder to write (default: _site)")
    args = parser.parse_args()
    out = args.out or args.root / "_site"
    status = build(args.root.resolve(), out.resolve())
    print(f"open {out / 'index.html'}" if not status else "the pages have broken parts, see above")
    return status


if __name__ == "__main__":
    sys.exit(main())
