"""The equation ledger: the book shows what claims.toml asks for, and a book that does not is found out."""

import json

import pytest

from diffusion_nb.book.ledger import cites, gaps, ledger, parts
from diffusion_nb.cli.main import main
from tools import reviewed

CLAIM = """[[claim]]
id = "{}"
source = "here"
statement = "it is so"
checks = {}
notebook = "01_a"
"""
PNG = {"output_type": "display_data", "data": {"image/png": "iVBORw0KGgo="}}


def code(source, *printed, tags=(), outputs=()):
    text = {"output_type": "stream", "name": "stdout", "text": [f"{line}\n" for line in printed]}
    return {"cell_type": "code", "metadata": {"tags": list(tags)}, "source": source, "outputs": [text, *outputs]}


def prose(text):
    return {"cell_type": "markdown", "metadata": {}, "source": text}


@pytest.fixture
def book(project):
    "Call it with the rows, {id: kinds}, and the cells of notebook 01_a."

    def write(rows, *cells, errata=()):
        (project / "nbs").mkdir(exist_ok=True)
        (project / "claims.toml").write_text(
            "".join(CLAIM.format(id, json.dumps(kinds)) for id, kinds in rows.items())
        )
        for name, content in (("01_a", cells), ("errata", errata)):
            if content:
                (project / f"nbs/{name}.ipynb").write_text(json.dumps({"cells": content}))
        return project

    return write


def test_the_book_shows_what_it_must():
    missing = gaps()
    assert not missing, "\n".join(["claims.toml asks for more than the notebooks show:", *missing])


def test_what_is_shown_is_no_gap(book):
    cell = code(
        'claim(\n    "X-1", oracle(1, 1), says="one · of two",\n)',
        "✓ X-1 one · of two · Monte Carlo (n = 200; standard error 0.1; sees 1 | a shift (of 2 %)), oracle",
    )
    root = book({"X-1": ["oracle", "Monte Carlo"]}, prose("# Title\n## A part\n```\n# no heading\n```"), cell)
    (row,) = ledger(root)
    assert gaps(root) == []
    assert (row.claim.heading, row.claim.says, row.kinds) == ("A part", "one · of two", ["oracle", "Monte Carlo"])


@pytest.mark.parametrize("cell, shows", [
    (code("1 + 1"), "no such claim"),
    (code('claim("X-1", oracle(1, 1), says="one")'), "no such claim"),  # not run
    (code('claim("X-14", oracle(1, 1), says="one")', "✓ X-14 one · oracle"), "no such claim"),
    (code('print("✓ X-1 one · oracle")', "✓ X-1 one · oracle"), "no such claim"),
    (code('claim("X-1", ...)', "✓ X-1 one · oracle", tags=["nbval-ignore-output"]), "no such claim"),
    (code('claim("X-1", ...)', "✓ X-1 one · oracle", tags=["nbval-skip"]), "no such claim"),
    (code('#| eval: false\nclaim("X-1", ...)', "✓ X-1 one · oracle"), "no such claim"),
    (code('# NBVAL_IGNORE_OUTPUT\nclaim("X-1", ...)', "✓ X-1 one · oracle"), "no such claim"),
    (code('claim("X-1", ...)', "✓ X-1 one · experiment, Monte Carlo"), "Monte Carlo, experiment"),
])  # fmt: skip
def test_a_gap_is_found_and_named(book, cell, shows):
    assert gaps(book({"X-1": ["limit"]}, prose("# Title"), cell)) == [f"X-1: 01_a shows {shows}; asked for: limit"]


@pytest.mark.parametrize("asked, shown, missing", [
    (["symbolic"], "oracle", "symbolic"),
    (["limit"], "symbolic, oracle", "limit"),
    (["bound"], "oracle", "bound"),
    (["Monte Carlo"], "experiment", "Monte Carlo"),
    (["symbolic", "oracle", "experiment"], "oracle", "symbolic, experiment"),
    (["oracle", "experiment"], "symbolic, oracle, experiment", ""),
    (["oracle", "experiment"], "symbolic, oracle", "experiment"),  # one struck out
    (["picture", "experiment"], "experiment", "picture"),
])  # fmt: skip
def test_each_kind_is_met_by_itself_alone(book, asked, shown, missing):
    root = book({"X-1": asked}, code('claim("X-1")', f"✓ X-1 one · {shown}"))
    assert gaps(root) == ([f"X-1: 01_a shows {shown}; asked for: {missing}"] if missing else [])


def test_a_picture_is_a_claim_in_a_notebook_with_pictures(book):
    claim = code('claim("X-1")', "✓ X-1 one · experiment")
    assert gaps(book({"X-1": ["picture"]}, claim, code("show(x)", outputs=[PNG]))) == []
    assert (
        len(gaps(book({"X-1": ["picture"]}, claim)))
        == len(gaps(book({"X-1": ["picture"]}, code("", outputs=[PNG]))))
        == 1
    )


def test_rows_of_notebooks_to_come_are_planned(book):
    root = book({"X-1": ["oracle"]})
    assert (
        gaps(root) == [] and "planned: 01_a" in ledger(root).markdown() and "planned: 01_a" in ledger(root).html()
    )


def test_an_erratum_is_linked_from_its_row(book):
    cell = code('erratum("X-2", ...)', "✗→✓ X-2 not 1, but 2 · oracle", "✗→✓ X-2 not 3, but 4 · limit")
    root = book({"X-1": ["oracle"], "X-2/3": ["oracle"]}, errata=[prose("# Errata\n## A sign"), cell])
    assert [len(row.errata) for row in ledger(root)] == [0, 2]
    assert 'href="errata.ipynb#A-sign"' in ledger(root).html()


def test_code_is_found_by_its_docstrings(book):
    root = book({"X-1": ["oracle"], "X-2/3": ["oracle"], "X-14": ["oracle"]})
    (root / "diffusion_nb/nets").mkdir(parents=True)
    (root / "diffusion_nb/nets/a.py").write_text(
        'def f(x):\n    "One. (X-1, X-3)"\n\n\nclass G:\n    "Two. (X-2/3)"\n\n    def m(self):\n        "(X-14)"\n\n\n'
        'def _hidden():\n    "(X-1)"\n'
    )
    assert [[name.removeprefix("diffusion_nb.nets.a.") for name in row.code] for row in ledger(root)] == [
        ["f"],
        ["f", "G"],
        ["G.m"],
    ]


@pytest.mark.parametrize("id, expected", [
    ("X-6/7", ["X-6/7", "X-6", "X-7"]),
    ("X-A1/A2", ["X-A1/A2", "X-A1", "X-A2"]),
    ("X-1..3", ["X-1..3", "X-1", "X-2", "X-3"]),
    ("X-cold-s", ["X-cold-s"]),
    ("X-14", ["X-14"]),
])  # fmt: skip
def test_parts_of_an_id(id, expected):
    assert parts(id) == expected


@pytest.mark.parametrize("text, id", [
    ("(X-1)", "X-1"), ("X-1.", "X-1"), ("(Y-4, X-6/7 is s = t)", "X-6/7"), ("(X-7; Ho 2020)", "X-6/7"), ("X-1..5 all", "X-1..5"),
    ("(X-1/Y-2)", "X-1"),
])  # fmt: skip
def test_cited(text, id):
    assert cites(text, id)


@pytest.mark.parametrize("text, id", [
    ("(X-14)", "X-1"), ("(X-1)", "X-14"), ("X-6/7", "X-6"), ("X-A1/A2", "X-A1"), ("X-1..5", "X-1"), ("X-cold-s", "X-cold"),
    ("AX-1", "X-1"), ("X-1a", "X-1"), ("X-16", "X-6/7"), ("X-6/71", "X-6/7"), ("X-6/7/8", "X-6/7"), ("X-5/6/7", "X-6/7"),
])  # fmt: skip
def test_not_cited(text, id):
    assert not cites(text, id)


def test_table_is_safe_to_show(book):
    root = book({"X-1": ["oracle"]}, code('claim("X-1")', "✓ X-1 p(x|y) < 1 · oracle"))
    assert "| p(x\\|y) < 1 | **oracle** |" in ledger(root).markdown()
    assert "<td>p(x|y) &lt; 1<td>" in ledger(root).html() and "<td><b>oracle</b>" in ledger(root).html()


def test_command(book, capsys, monkeypatch):
    root = book({"X-1": ["oracle"]}, code('claim("X-1")', "✓ X-1 one · oracle"))
    monkeypatch.setattr("diffusion_nb.book.ledger.project_root", lambda: root)
    assert main(["ledger"]) == 0
    assert "| X-1 | it is so | here | 01_a, " in capsys.readouterr().out
    book({"X-1": ["symbolic"]})
    assert main(["ledger", "--out", str(root / "new/ledger.md")]) == 1
    said = capsys.readouterr()
    assert "X-1: 01_a shows oracle; asked for: symbolic" in said.err and "wrote " in said.out
    assert "| X-1 |" in (root / "new/ledger.md").read_text()


# what was read side by side


def test_every_row_was_read_beside_its_claim_and_code():
    rows = [f"{id}: its {what} was changed: read them side by side, then python tools/reviewed.py {id}" for id, what in reviewed.changed().items()]  # fmt: skip
    assert not rows, "\n".join(rows)


def test_a_changed_row_claim_or_docstring_asks_for_a_review(book):
    def written(says="one", doc="One. (X-1)", **rows):
        root = book(rows or {"X-1": ["oracle"]}, code('claim("X-1")', f"✓ X-1 {says} · oracle"))
        (root / "diffusion_nb").mkdir(exist_ok=True)
        (root / "diffusion_nb/a.py").write_text(f'def f(x):\n    "{doc}"\n')
        (root / "tests").mkdir(exist_ok=True)
        return root

    root = written()
    assert reviewed.changed(root) == {"X-1": "row of claims.toml and claim and code"}
    shown = reviewed.read_now(["X-1"], root)
    assert all(text in shown for text in ("it is so", "one · oracle", "diffusion_nb.a.f: One. (X-1)"))
    assert reviewed.changed(root) == {}
    assert reviewed.changed(written(says="another")) == {"X-1": "claim"}
    assert reviewed.changed(written(doc="Two. (X-1)")) == {"X-1": "code"}
    written()
    text = (root / "claims.toml").read_text()
    (root / "claims.toml").write_text(text.replace("it is so", "it is not so"))
    assert reviewed.changed(root) == {"X-1": "row of claims.toml"}
    with pytest.raises(ValueError, match="X-2"):
        reviewed.read_now(["X-2"], root)


def test_the_three_stand_side_by_side(book):
    root = book({"X-1": ["oracle"]}, code('claim("X-1")', "✓ X-1 one · oracle"))
    (root / "diffusion_nb").mkdir()
    (root / "diffusion_nb/a.py").write_text('def f(x):\n    "Less < more. (X-1)\\n\\n    Further."\n')
    found = ledger(root).html().split("<td>")
    assert (
        found[3] == "one" and found[4].endswith("<small>Less &lt; more. (X-1)</small>") and "it is so" in found[2]
    )
