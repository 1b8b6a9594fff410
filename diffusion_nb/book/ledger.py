"""The ledger: every statement of the papers, and what shows it."""

import ast
import json
import re
import tomllib
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import NamedTuple

from diffusion_nb.util.storage import project_root

NOT_COMPARED = re.compile(
    r"^#\s*(\|\s*eval\s*:\s*false|NBVAL_SKIP|NBVAL_IGNORE_OUTPUT)", re.MULTILINE | re.IGNORECASE
)


class Claim(NamedTuple):
    "What a notebook was stored to show, of which kinds the evidence is, and the nearest heading above."

    heading: str
    says: str
    kinds: list[str]


def headings(cells: list[dict]) -> Iterator[tuple[str, str, str]]:
    "(nearest heading above, source, what it is stored to have printed) of each code cell whose output the tests compare."
    heading = ""
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            heading = (re.findall(r"^#+ +(.+)", re.sub(r"(?s)```.*?```", "", source), re.MULTILINE) or [heading])[
                -1
            ]
        elif cell["cell_type"] == "code" and not NOT_COMPARED.search(source):
            if not {"nbval-ignore-output", "nbval-skip"} & set(cell["metadata"].get("tags", ())):
                printed = [o["text"] for o in cell["outputs"] if o.get("name") == "stdout"]
                yield heading, source, "".join(map("".join, printed))


def shown(cells: list[dict], mark: str, function: str) -> list[tuple[str, Claim]]:
    "(id, what is shown) for each line `mark id says · kinds` in a cell that calls `function` with that id."
    line = re.compile(rf"^{mark} (\S+) (.+) · (.+)$", re.MULTILINE)
    return [
        (id, Claim(heading, says, re.sub(r" \([^()]*(?:\([^()]*\)[^()]*)*\)", "", kinds).split(", ")))
        for heading, source, printed in headings(cells)
        for id, says, kinds in line.findall(printed)
        if re.search(rf"\b{function}\(\s*['\"]{re.escape(id)}['\"]", source)
    ]


def claims_in(cells: list[dict]) -> dict[str, Claim]:
    "The claims that a notebook shows, by id."
    return dict(shown(cells, "✓", "claim"))


def errata_in(cells: list[dict]) -> list[tuple[str, Claim]]:
    "The misprints that a notebook shows: (id, what is printed and what holds)."
    return shown(cells, "✗→✓", "erratum")


def has_pictures(cells: list[dict]) -> bool:
    return any(
        kind.startswith(("image/", "video/"))
        for cell in cells
        for output in cell.get("outputs", ())
        for kind in output.get("data", ())
    )


def parts(id: str) -> list[str]:
    "'X-6/7' and its parts X-6 and X-7; 'X-1..3' and X-1, X-2, X-3; any other id alone."
    prefix, _, rest = id.rpartition("-")
    first, dots, last = rest.partition("..")
    numbers = range(int(first), int(last) + 1) if dots else rest.split("/")
    return list(dict.fromkeys([id, *(f"{prefix}-{n}" for n in numbers)]))


def cites(text: str, id: str) -> bool:
    "Whether `text` names this id or a part of it, and not just a longer id that begins alike."
    names = "|".join(map(re.escape, parts(id)))
    return bool(re.search(rf"(?<![\w/-])(?:{names})(?![\w-]|/[A-Z]?\d|\.\.\d)", text))


def docstrings(node: ast.Module | ast.ClassDef, name: str) -> Iterator[tuple[str, str]]:
    "(dotted name, docstring) of the public functions, classes and methods below `node`."
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            yield f"{name}.{child.name}", ast.get_docstring(child) or ""
            if isinstance(child, ast.ClassDef):
                yield from docstrings(child, f"{name}.{child.name}")


def documented(package: Path) -> list[tuple[str, str]]:
    "(dotted name, docstring) of everything public in a package."
    modules = sorted(p for p in package.rglob("*.py") if not p.name.startswith("_"))
    names = [".".join(p.relative_to(package.parent).with_suffix("").parts) for p in modules]
    return [
        found
        for p, name in zip(modules, names, strict=True)
        for found in docstrings(ast.parse(p.read_text(encoding="utf-8")), name)
    ]


STRENGTH = ["symbolic", "oracle", "bound", "limit", "Monte Carlo", "experiment"]


class Row(NamedTuple):
    "A row of claims.toml and what the book shows for it. `written`: its notebook exists; `claim`: None if there is none yet; `code`: {name: the first line of its docstring}."

    id: str
    source: str
    statement: str
    checks: list[str]
    notebook: str
    written: bool
    pictures: bool
    claim: Claim | None
    errata: list[Claim]
    code: dict[str, str]

    @property
    def kinds(self) -> list[str]:
        "The kinds of evidence shown, the strongest first."
        return sorted(self.claim.kinds, key=STRENGTH.index) if self.claim else []

    @property
    def missing(self) -> list[str]:
        "The kinds of evidence asked for and not shown."
        met = {*self.kinds, *(["picture"] if self.claim and self.pictures else [])}
        return [kind for kind in self.checks if kind not in met]


def cells_of(root: Path, notebook: str) -> list[dict]:
    "The cells of a notebook as it is stored; none if it is still to be written."
    path = root / f"nbs/{notebook}.ipynb"
    return json.loads(path.read_text(encoding="utf-8"))["cells"] if path.exists() else []


def ledger(root: Path | None = None) -> "Ledger":
    "The whole ledger of the project at `root`, from its stored files: nothing is run."
    root, rows = root or project_root(), []
    code, errata = documented(root / "diffusion_nb"), errata_in(cells_of(root, "errata"))
    for entry in tomllib.loads((root / "claims.toml").read_text(encoding="utf-8"))["claim"]:
        id, cells = entry["id"], cells_of(root, entry["notebook"])
        misprints = [erratum for where, erratum in errata if where in parts(id)]
        rows.append(Row(**entry, written=bool(cells), pictures=has_pictures(cells), claim=claims_in(cells).get(id),
                        errata=misprints, code={name: text.split("\n")[0] for name, text in code if cites(text, id)}))  # fmt: skip
    return Ledger(rows)


def gaps(root: Path | None = None) -> list[str]:
    "What is asked for and not shown, a line for each row whose notebook is written: empty when the book keeps its word."
    return [
        f"{row.id}: {row.notebook} shows {', '.join(row.kinds) or 'no such claim'}; asked for: {', '.join(row.missing)}"
        for row in ledger(root)
        if row.written and row.missing
    ]


def in_jupyter(notebook: str, heading: str) -> str:
    "Where JupyterLab finds a heading."
    return escape(f"{notebook}.ipynb#{heading.replace(' ', '-')}")


class Ledger(list[Row]):
    "Rows that show themselves as a table."

    def __repr__(self) -> str:
        return f"{len(self)} statements, {sum(bool(row.claim) for row in self)} of them shown"

    def _repr_html_(self) -> str:
        return self.html()

    def html(self, place: Callable[[str, str], str] = in_jupyter, code: Callable[[str], str] | None = None) -> str:
        """Statement, claim and docstrings side by side, so that one can see whether they say the same.

        `place(notebook, heading)` and `code(dotted name)` are the addresses to link to.
        """
        head = "<tr><th>id<th>statement<th>shown by<th>code<th>derived in<th>how"
        return (
            f'<table class="ledger">{head}\n'
            + "\n".join(_html_row(row, place, code) for row in self)
            + "\n</table>"
        )

    def markdown(self) -> str:
        head = "| id | statement | source | derived in | code | shown by | how |\n|---|---|---|---|---|---|---|\n"
        return head + "".join(
            f"| {' | '.join(c.replace('|', chr(92) + '|') for c in _cells(row))} |\n" for row in self
        )


def _short(name: str) -> str:
    return name.removeprefix("diffusion_nb.")


def _cells(row: Row) -> list[str]:
    "The row in Markdown; the strongest kind of evidence is bold."
    code = ", ".join(f"`{_short(name)}`" for name in row.code) or "–"
    if not row.claim:
        return [
            row.id,
            row.statement,
            row.source,
            row.notebook if row.written else f"planned: {row.notebook}",
            code,
            "–",
            "–",
        ]
    kinds = ", ".join([f"**{row.kinds[0]}**", *row.kinds[1:]])
    return [row.id, row.statement, row.source, f"{row.notebook}, {row.claim.heading}", code, row.claim.says, kinds]


def _html_code(name: str, says: str, code: Callable | None) -> str:
    text = f"<code>{_short(name).replace('.', '.<wbr>')}</code>"
    return (f'<a href="{code(name)}">{text}</a>' if code else text) + f"<small>{escape(says)}</small>"


def _html_row(row: Row, place: Callable, code: Callable | None) -> str:
    def link(notebook, heading):
        return f'<a href="{place(notebook, heading)}">{escape(heading)}</a>'

    where, says, how = f"planned: {row.notebook}" if not row.written else row.notebook, "–", "–"
    if row.claim:
        where, says = f"{row.notebook}<br>{link(row.notebook, row.claim.heading)}", escape(row.claim.says)
        how = ", ".join([f"<b>{row.kinds[0]}</b>", *row.kinds[1:]])
    errata = "".join(f"<br>erratum: {link('errata', erratum.heading)}" for erratum in row.errata)
    cells = [f"<b>{escape(row.id)}</b>", f"{escape(row.statement)}<br><small>{escape(row.source)}</small>{errata}",
             says, "".join(_html_code(name, text, code) for name, text in row.code.items()) or "–", where, how]  # fmt: skip
    state = "shown" if row.claim else "missing" if row.written else "planned"
    return f'<tr id="{escape(row.id)}" class="{state}"><td>' + "<td>".join(cells)
