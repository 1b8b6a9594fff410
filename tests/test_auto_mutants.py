"""What `make mutants` changes, what it draws, and whether its list of changes that change nothing is up to date."""

import os
import time
from collections import Counter

import pytest
from mutations.auto import (
    MODULES,
    drawn,
    equivalents,
    forked,
    interval,
    modules,
    mutants_of,
    reaching,
    shown,
)

TEXT = """"α: 1 + 1"
import torch

def f(x, n: int = 2, *, σ: float = 0.5):
    "½ + 1."
    if n < 3:
        raise ValueError(f"n: {n + 1}" + "4")
    for _ in tqdm(range(n), total=7):
        x = torch.sum((x * σ).sqrt(), dim=n)
    return g(x, n, strict=True)
"""


def by_line(tmp_path, text: str) -> dict[int, list[str]]:
    (tmp_path / "module.py").write_text(text)
    lines = {}
    for m in mutants_of(tmp_path / "module.py", tmp_path):
        line, old, new = shown(m, tmp_path)
        assert old == text.split("\n")[line - 1].strip() != new
        compile(m.applied(text.encode()), "module.py", "exec")
        lines.setdefault(line, []).append(new)
    return lines


def test_kinds_of_changes(tmp_path):
    assert by_line(tmp_path, TEXT) == {
        4: ["def f(x, n: int = 3, *, σ: float = 0.5):", "def f(x, n: int = 2, *, σ: float = 1.0):"],
        6: ["if not (n < 3):", "if n <= 3:", "if n < 4:"],
        9: [
            "x = torch.sum((x * σ).sqrt())",
            "x = torch.sum((x * σ), dim=n)",
            "x = torch.sum((x / σ).sqrt(), dim=n)",
        ],
        10: ["return g(n, x, strict=True)"],
    }


@pytest.mark.parametrize("line, changed", [
    ("a += b - c", ["a -= b - c", "a += b + c"]),
    ("a <= b != c", ["a < b != c", "a <= b == c"]),
    ("(a == True) > 0.0", ["(a == True) >= 0.0", "(a != True) > 0.0", "(a == False) > 0.0", "(a == True) > 1.0"]),
    ("f(k=a, **b)", ["f(**b)", "f(k=a)"]),
    ("f((a), b, a)", ["f((b), a, a)", "f((a), a, b)"]),
    ("max(a, b)", []),
    ("[a for a in b if a]", ["[a for a in b if not (a)]"]),
    ("a.flip(b).cpu()", ["a.cpu()"]),
    ("torch.exp(a).to(a.device)", []),
    ("super().__init__()", []),
    ("bar.update(1 + 1)", []),
])  # fmt: skip
def test_kinds_one_by_one(tmp_path, line, changed):
    head = "import torch\ndef f():\n    "
    assert by_line(tmp_path, head + line + "\n") == ({3: changed} if changed else {})


def test_a_change_is_reached_by_its_statement(tmp_path):
    text = "def f(a=1):\n    if (a <\n        b):\n        c(2,\n          3)\n"
    (tmp_path / "module.py").write_text(text)
    where = {m.new: (m.first, m.last) for m in mutants_of(tmp_path / "module.py", tmp_path)}
    assert where == {"2": (2, 5), "<=": (2, 3), "3": (4, 5), "4": (4, 5)}


def test_tests_that_reach_it_come_cheapest_first(tmp_path):
    (tmp_path / "module.py").write_text("def f(a):\n    return a + a\n")
    (m,) = mutants_of(tmp_path / "module.py", tmp_path)
    seen = [{"seconds": {"x": 3, "y": 1, "z": 60, "w": 0.1}, "lines": {"module.py": {"1": [3], "2": [0, 1, 2]}}}]  # fmt: skip
    assert list(reaching(m, seen).items()) == [("y", 1), ("x", 3)]
    assert not reaching(m._replace(first=3, last=3), seen)


def test_draw_is_even_and_the_same_for_a_seed():
    mutants = [m for path in modules() for m in mutants_of(path)]
    assert {m.file.split("/")[1].removesuffix(".py") for m in mutants} == set(MODULES)
    functions = {(m.file, m.function) for m in mutants}
    one, more = drawn(mutants, len(functions), 0), drawn(mutants, 2 * len(functions), 0)
    assert {(m.file, m.function) for m in one} == functions and more[: len(one)] == one
    assert len(set(more)) == len(more) and max(Counter((m.file, m.function) for m in more).values()) <= 3
    assert drawn(mutants, 50, 0) == one[:50] != drawn(mutants, 50, 1)


def test_listed_survivors_are_still_changes():
    there = {(m.file, m.function, *shown(m)[1:]) for path in modules() for m in mutants_of(path)}
    assert equivalents().keys() <= there and all(equivalents().values())


def test_interval():
    low, high = interval(9, 10)
    assert abs(low - 0.596) < 1e-3 and abs(high - 0.982) < 1e-3
    assert interval(10, 10)[1] == 1


def test_forked():
    start = time.perf_counter()
    assert forked(lambda: os.getpid(), 60)[0] != os.getpid()
    assert forked(lambda: os._exit(3), 60) == forked(lambda: time.sleep(60), 0.1) == ()
    assert time.perf_counter() - start < 30
