"""What pictures of the book are called where they cannot be seen."""

import ast
import re
from collections.abc import Iterator
from html import escape

KINDS = ("image/png", "image/gif", "image/jpeg")
NO_ALT = re.compile(r'alt="No description has been provided for this image"')  # as nbconvert says it


def words_of(node: ast.expr) -> str:
    "A string of the source; what an f-string fills in is left out."
    if isinstance(node, ast.JoinedStr):
        return "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def titles(source: str) -> Iterator[str]:
    "The titles that the code of a cell gives its pictures, and the names of their axes."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", "")
            first = node.args[:1] if name in ("set_title", "suptitle", "set_xlabel", "set_ylabel") else []
            named = [k.value for k in node.keywords if k.arg in ("title", "xlabel", "ylabel")]
            yield from filter(None, map(words_of, first + named))


def alt_text(source: str, section: str) -> str:
    "What a picture shows, from the code that draws it; where that gives it no title, the section that it stands in."
    found = dict.fromkeys(" ".join(title.split()) for title in titles(source) if re.search(r"\w", title))
    said = len(re.findall(r"\w", " ".join(found))) >= 8  # more than a word or two
    return " · ".join([*found, *([] if said else [f"picture of the section “{section}”"])])


def alt_texts(cells: list) -> Iterator[tuple[dict, str]]:
    "(cell, alternative text) for each picture that the cells of a notebook show, in their order."
    section = ""
    for cell in cells:
        if cell["cell_type"] == "markdown":
            section = (re.findall(r"^#+ (.*)$", cell["source"], re.MULTILINE) or [section])[-1]
        for output in cell.get("outputs", []):
            if any(kind in output.get("data", {}) for kind in KINDS):
                yield cell, alt_text(cell["source"], section)


def with_alt_texts(html: str, cells: list) -> str:
    "A page that nbconvert made of these cells, with alternative texts for its pictures."
    texts = (text for _, text in alt_texts(cells))
    return NO_ALT.sub(lambda match: f'alt="{escape(next(texts, "picture"))}"', html)
