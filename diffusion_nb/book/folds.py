"""What the web pages fold: boxes titled "Deeper", solutions of exercises, and the code that draws diagrams."""

import re
from typing import NamedTuple

FOLDED = re.compile(r"(#+) ((?:Deeper|Solution)\b.*)")


class Fold(NamedTuple):
    "The cells from `first` to `last` are folded below a title."

    first: int
    last: int
    title: str


def folds(cells: list) -> list[Fold]:
    """The sections of a notebook that are folded: from a cell that begins with the heading "Deeper: …" or "Solution …" to the next heading as high.

    Raises ValueError for a heading of that kind that is not the first line of its cell, and for a heading within a fold.
    """
    found, open_at = [], None
    for i, cell in enumerate(cells):
        lines = (
            [] if cell["cell_type"] != "markdown" else re.sub(r"(?s)```.*?```", "", cell["source"]).splitlines()
        )
        heads = [(n, line) for n, line in enumerate(lines) if re.match(r"#+ ", line)]
        if heads and open_at is not None:
            found.append(Fold(open_at, i - 1, FOLDED.match(cells[open_at]["source"])[2].strip()))
            open_at = None
        for n, line in heads:
            if FOLDED.match(line):
                if n or len(heads) > 1:
                    raise ValueError(
                        f"{line!r}: a folded section begins with a cell of its own, which holds no other heading"
                    )
                open_at = i
    if open_at is not None:
        found.append(Fold(open_at, len(cells) - 1, FOLDED.match(cells[open_at]["source"])[2].strip()))
    return found


TEMPLATE = """{%- extends 'lab/index.html.j2' -%}
{%- block any_cell -%}
{%- if cell.metadata.fold -%}<details class="fold"><summary>{{ cell.metadata.fold }}</summary>{%- endif -%}
{{ super() }}
{%- if cell.metadata.fold_ends -%}</details>{%- endif -%}
{%- endblock any_cell -%}
{%- block input_group -%}
{%- if 'hide-input' in cell.metadata.get('tags', []) -%}<details class="fold"><summary>the code of this picture</summary>{{ super() }}</details>
{%- else -%}{{ super() }}{%- endif -%}
{%- endblock input_group -%}"""


def mark_folds(nb) -> None:
    "Tell nbconvert, with TEMPLATE, what to fold: the title goes from the first cell into its metadata."
    for fold in folds(nb.cells):
        first = nb.cells[fold.first]
        first.source = first.source.partition("\n")[2]
        first.metadata["fold"], nb.cells[fold.last].metadata["fold_ends"] = fold.title, True
