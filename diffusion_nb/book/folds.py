"""What the web pages fold: boxes titled "Deeper", solutions of exercises, and the code that draws diagrams."""

import re
from typing import NamedTuple

FOLDED = re.compile(r"(#+) ((?:Deeper|Solution)\b.*)")


class Fold(NamedTuple):
    "The cells from `first` to `last` are folded below a title."

    first: int
    last: int
    title: str


def headings(cell) -> list[str]:
    "The lines of a cell that are headings."
    text = cell["source"] if cell["cell_type"] == "markdown" else ""
    return re.findall(r"^#+ .*", re.sub(r"(?s)```.*?```", "", text), re.MULTILINE)


def folds(cells: list) -> list[Fold]:
    """The sections of a notebook that are folded: from a cell that begins with the heading "Deeper: …" or "Solution …" to the cell before the next heading.

    Raises ValueError for such a heading in a cell that begins otherwise, or that holds another heading.
    """
    heads = [i for i, cell in enumerate(cells) if headings(cell)]
    found = []
    for i, after in zip(heads, [*heads[1:], len(cells)], strict=True):
        if odd := next(filter(None, map(FOLDED.match, headings(cells[i]))), None):
            if len(headings(cells[i])) > 1 or not cells[i]["source"].startswith(odd.string):
                raise ValueError(f"{odd.string!r}: a folded section begins with a cell of its own, which holds no other heading")  # fmt: skip
            found.append(Fold(i, after - 1, odd[2].strip()))
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
