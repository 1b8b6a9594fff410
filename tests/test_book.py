"""What holds the book together: library and README come from the notebooks, outputs are stored, claims are listed."""

import ast
import builtins
import dis
import importlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from pathlib import Path
from types import CodeType

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = {path.stem: nbformat.read(path, as_version=4) for path in sorted((ROOT / "nbs").glob("*.ipynb"))}
CLAIMS = tomllib.loads((ROOT / "claims.toml").read_text())["claim"]
KINDS = {"symbolic", "oracle", "limit", "Monte Carlo", "experiment", "picture"}

SHOWS = {"print", "claim", "erratum", "show", "display"}
EVAL_FALSE = re.compile(r"^#\s*\|\s*eval\s*:\s*false\s*$", re.MULTILINE | re.IGNORECASE)
EXPORTS = re.compile(r"^#\s*\|\s*(?:default_exp|exporti?|exports)\s*:?\s+([\w.]+)\s*$", re.MULTILINE)
HERE = {str(ROOT), str(Path.home()), sys.prefix, tempfile.gettempdir()} - {"/"}
PLACES = "|".join(["/home", "/root", "/tmp", "/Users", *map(re.escape, sorted(HERE))])
A_MACHINE = re.compile(rf"(?<![\w.])({PLACES})\b|site-packages|dist-packages")


def code_cells(stem: str):
    "(number, cell) of each code cell, numbered as nbval numbers them."
    return enumerate(cell for cell in NOTEBOOKS[stem].cells if cell.cell_type == "code")


def tree(cell) -> ast.Module:
    return ast.parse(TransformerManager().transform_cell(cell.source))


def name_of(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


MODULES = {
    f"diffusion_nb.{module}": stem
    for stem in NOTEBOOKS
    for _, cell in code_cells(stem)
    for module in EXPORTS.findall(cell.source)
}


# the library


def test_library_is_what_the_notebooks_export(tmp_path):
    package = tmp_path / "diffusion_nb"
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".*"))
    package.mkdir()
    for path in ("pyproject.toml", "settings.ini", "diffusion_nb/__init__.py"):  # __init__ holds the version
        shutil.copy(ROOT / path, tmp_path / path)
    done = subprocess.run(
        [Path(sys.executable).with_name("nbdev-export")], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    want, have = (
        {p.relative_to(f): p.read_bytes() for p in f.rglob("*.py")} for f in (package, ROOT / "diffusion_nb")
    )
    assert len(want) > 2
    leftover = sorted(str(p) for p in have.keys() - want.keys())
    assert not leftover, f"no notebook exports these, delete them: {leftover}"
    differ = sorted(str(p) for p in want if want[p] != have.get(p))
    assert not differ, f"run make export; not what nbs/ exports: {differ}"


def all_code(code: CodeType):
    "A code object and those inside it."
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from all_code(inner)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_library_knows_every_name_that_it_uses(name):
    "A notebook has imports that its module may lack."
    module = importlib.import_module(name)
    read = [
        i.argval
        for code in all_code(compile(Path(module.__file__).read_text(), name, "exec"))
        for i in dis.get_instructions(code)
        if i.opname == "LOAD_GLOBAL"
    ]
    assert not [n for n in read if not hasattr(module, n) and not hasattr(builtins, n)]


# the stored outputs


def shows_something(cell) -> bool:
    "Whether the cell prints, claims or draws at its top level, or ends in a value."
    body = tree(cell).body
    todo = list(body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            continue
        if (
            isinstance(node, ast.Call)
            and name_of(node) in SHOWS
            and not any(k.arg == "file" for k in node.keywords)
        ):
            return True
        todo += ast.iter_child_nodes(node)
    value = body[-1].value if body and isinstance(body[-1], ast.Expr) else None
    is_value = value is not None and not isinstance(value, ast.Call | ast.Await | ast.Constant)
    return is_value and not cell.source.rstrip().endswith(";")


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_every_cell_that_shows_something_has_its_output_stored(stem):
    missing = [
        n
        for n, cell in code_cells(stem)
        if not EVAL_FALSE.search(cell.source) and not cell.outputs and shows_something(cell)
    ]
    assert not missing, f"{stem}: run it and save it; no stored output in code cells {missing}"


def texts(output):
    "What a reader can read in an output: no pictures."
    if output.output_type == "stream":
        yield output.text
    for mime, data in output.get("data", {}).items():
        if not mime.startswith("image/"):
            yield re.sub(r"base64,[\w+/=\\\n]*", "", str(data))


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_stored_outputs_hold_no_error_and_no_path(stem):
    for n, cell in code_cells(stem):
        for output in cell.outputs:
            assert output.output_type != "error", f"{stem}, code cell {n}: {output.ename}: {output.evalue}"
            for text in texts(output):
                assert "Traceback (most recent call last)" not in text, f"{stem}, code cell {n}: a traceback"
                found = A_MACHINE.search(text)
                assert not found, f"{stem}, code cell {n}: {found[0]!r} is a place on one machine"


# the order of the notebooks


def library_imports(cell):
    "The modules of diffusion_nb that a cell imports."
    for node in ast.walk(tree(cell)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ("diffusion_nb." if node.level else "") + (node.module or "")
            inside = [f"{base.rstrip('.')}.{alias.name}" for alias in node.names]
            found = [name for name in inside if name in MODULES] or [base.rstrip(".")]
        else:
            continue
        yield from (name for name in found if name.startswith("diffusion_nb."))


@pytest.mark.parametrize("stem", [stem for stem in NOTEBOOKS if stem[:2].isdigit()])
def test_notebooks_import_only_from_earlier_ones(stem):
    for n, cell in code_cells(stem):
        for module in library_imports(cell):
            assert module in MODULES, f"{stem}, code cell {n}: no notebook exports {module}"
            assert MODULES[module] < stem, f"{stem}, code cell {n}: {module} comes from {MODULES[module]}"


# the claims and the errata


def ids_made(by: str):
    "(id, notebook) of each call of claim, or erratum, in the book; those of 'demo' state nothing."
    for stem in NOTEBOOKS:
        for n, cell in code_cells(stem):
            for node in ast.walk(tree(cell)):
                if isinstance(node, ast.Call) and name_of(node) == by:
                    id = node.args[0] if node.args else None
                    assert isinstance(id, ast.Constant), (
                        f"{stem}, code cell {n}: the id of a call of {by} is not written out"
                    )
                    if id.value != "demo":
                        yield id.value, stem


def test_claims_are_listed_once_and_made_once_where_the_list_says():
    listed = {entry["id"]: entry["notebook"] for entry in CLAIMS}
    assert len(listed) == len(CLAIMS), "claims.toml lists an id twice"
    made = list(ids_made("claim"))
    twice = [id for id, count in Counter(id for id, _ in made).items() if count > 1]
    assert not twice, f"claimed twice: {twice}"
    unlisted = [(id, stem) for id, stem in made if id not in listed]
    assert not unlisted, f"not in claims.toml: {unlisted}"
    elsewhere = [(id, stem, listed[id]) for id, stem in made if listed[id] != stem]
    assert not elsewhere, f"claimed in another notebook than claims.toml says (id, where, says): {elsewhere}"


def test_errata_name_listed_claims_and_stand_in_the_table_in_order():
    made = [id for id, stem in ids_made("erratum") if stem == "errata"]
    assert made == [id for id, _ in ids_made("erratum")], "an erratum outside its notebook"
    assert made and set(made) <= {entry["id"] for entry in CLAIMS}
    text = "\n".join(cell.source for cell in NOTEBOOKS["errata"].cells if cell.cell_type == "markdown")
    assert re.findall(r"^### ([\w.-]+):", text, re.MULTILINE) == made
    assert re.findall(r"^\| ([A-Z]+-[\w.-]+) \|", text, re.MULTILINE) == made


def test_list_of_claims_is_complete():
    for entry in CLAIMS:
        assert entry.keys() == {"id", "source", "statement", "checks", "notebook"}, entry
        assert all(entry.values()), entry
        assert set(entry["checks"]) <= KINDS, entry


# the README


def test_readme_is_up_to_date():
    done = subprocess.run([sys.executable, ROOT / "tools/readme.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# the artifacts


CARDS = sorted(p.stem for p in (ROOT / "data/artifacts").glob("*.json"))


def test_the_command_line_makes_every_artifact():
    from diffusion_nb.cli import artifact_makers

    assert sorted(artifact_makers()) == CARDS


@pytest.mark.parametrize("name", CARDS)
def test_committed_artifacts_belong_to_their_recipes(name):
    "None would be made again: on any supported Python, in any folder, from settings.ini and the code as they are."
    from diffusion_nb.cli import artifact_makers
    from diffusion_nb.core import _problem, fingerprint

    make, recipe = artifact_makers()[name]
    path = ROOT / f"data/artifacts/{name}.safetensors"
    assert _problem(path, json.loads(json.dumps(recipe)), fingerprint(make)) is None
