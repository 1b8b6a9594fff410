"""`import diffusion_nb as dn`: each name is there, and importing costs nothing."""

import subprocess
import sys
from importlib import import_module

import pytest

import diffusion_nb as dn


@pytest.mark.parametrize("name", dn.HOME)
def test_each_name_is_that_of_its_module(name):
    assert getattr(dn, name) is getattr(import_module(f"diffusion_nb.{dn.HOME[name]}"), name) and name in dir(dn)


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="has no 'ddpmm' at its top"):
        dn.ddpmm  # noqa: B018


def test_importing_loads_nothing():
    code = "import sys, diffusion_nb; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_every_exported_name_is_used_by_a_test_or_by_a_notebook():
    "Beside the cell that defines it: in another cell, or in a test."
    import ast
    import json
    import re
    from pathlib import Path

    root = Path(__file__).parents[1]
    sources = [p.read_text(encoding="utf-8") for p in (root / "tests").rglob("*.py")]
    defined = []
    for path in (root / "nbs").glob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "code":
                sources.append(source)
            if source.startswith("#| export"):
                kinds = ast.FunctionDef | ast.ClassDef
                defined += [n.name for n in ast.parse(source).body if isinstance(n, kinds) and n.name[0] != "_"]
    count = {}
    for source in sources:
        for word in set(re.findall(r"\w+", source)):
            count[word] = count.get(word, 0) + 1
    unused = sorted(name for name in set(defined) if count[name] < 2)
    assert not unused, f"named by no test and no other cell: {unused}"
