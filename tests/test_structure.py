"""The rooms of the library: who may import whom, and how large things may be."""

import ast
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = sorted(p for p in (ROOT / "diffusion_nb").rglob("*.py") if p.name != "_modidx.py")
HIGH = {"recipes", "experiments", "models", "book", "cli"}  # what methods know nothing of
METHODS = {"noise", "schedules", "grids", "time_samplers", "forward", "denoisers", "mixtures", "variances", "guidance", "data",
           "losses", "samplers", "likelihood", "nets", "metrics"}  # fmt: skip
LONGEST = 150  # lines


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room(module: str) -> str:
    "diffusion_nb.losses.bound → losses."
    return module.split(".")[1] if "." in module else ""


def imports(path: Path, everywhere: bool = True) -> set[str]:
    "The modules of the library that a file imports; with `everywhere`, inside functions too."
    tree, own = ast.parse(path.read_text(encoding="utf-8")), name_of(path).split(".")
    package = own if path.name == "__init__.py" else own[:-1]
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            found.add(".".join([*start, *([node.module] if node.module else [])]))
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {m for m in found if m.split(".")[0] == "diffusion_nb"}


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_each_room_imports_from_below_only(path):
    own, theirs = room(name_of(path)), {room(m) for m in imports(path)}
    if own in METHODS:
        assert not theirs & HIGH, theirs & HIGH
    if own == "util":
        assert theirs <= {"util"}, theirs
    if own not in {"experiments", "cli", "book", "", "__main__"}:
        assert "experiments" not in theirs and "cli" not in theirs and "book" not in theirs


@pytest.mark.parametrize("path", LIBRARY + sorted((ROOT / "tools").glob("*.py")), ids=lambda p: p.stem)
def test_texts_say_their_encoding_which_differs_between_systems(path):
    for call in (
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
    ):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        binary = any(isinstance(a, ast.Constant) and "b" in str(a.value) for a in call.args[1:2])
        if name in {"read_text", "write_text"} or (
            name == "open" and isinstance(call.func, ast.Name) and not binary
        ):
            assert any(k.arg == "encoding" for k in call.keywords), f"{path.name}:{call.lineno}"


def test_no_module_imports_itself_by_way_of_others():
    arrows = {name_of(p): imports(p, everywhere=False) & {name_of(q) for q in LIBRARY} for p in LIBRARY}
    left = dict(arrows)
    while free := [m for m, needs in left.items() if not needs & left.keys()]:
        for m in free:
            del left[m]
    assert not left, f"a circle among {sorted(left)}"


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_no_function_or_class_is_longer_than_a_few_pages(path):
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, kinds):
            assert node.end_lineno - node.lineno + 1 <= LONGEST, node.name


def test_cells_that_are_exported_are_short():
    lengths = []
    for path in (ROOT / "nbs").glob("*.ipynb"):
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type == "code" and cell.source.startswith("#| export"):
                lengths.append(len(cell.source.splitlines()) - 1)
    lengths.sort()
    assert lengths[len(lengths) // 2] <= 12 and sum(n <= 15 for n in lengths) >= 0.6 * len(lengths)


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text()))
