"""The list of bugs in tests/mutations is up to date; `make mutations` puts them in and runs the tests that it names."""

from pathlib import Path

import pytest
from mutations.run import MUTATIONS, mutants, with_cells_above

ROOT = Path(__file__).resolve().parents[1]


def test_each_name_is_taken_once():
    names = [m["name"] for m in MUTATIONS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("m", MUTATIONS, ids=lambda m: m["name"])
def test_bug_still_applies(m):
    assert m.keys() == {"name", "file", "old", "new", "tests", "story"} and all(m.values())
    module = ROOT / m["file"]
    changed = mutants(m, ROOT)  # raises ValueError unless `old` is there once, in the module and in its notebook
    compile(changed[module], module.name, "exec")
    assert changed[module] != module.read_text()


@pytest.mark.parametrize("test", sorted({test for m in MUTATIONS for test in m["tests"]}))
def test_named_test_exists(test):
    path, _, name = test.partition("::")
    if path.endswith(".ipynb"):
        assert with_cells_above(test)  # raises ValueError where there is no such cell
    else:
        text = (ROOT / path).read_text()
        assert f"\ndef {name.partition('[')[0]}(" in text
