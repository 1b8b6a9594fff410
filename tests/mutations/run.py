"""Put each bug of mutations.toml into a copy of the project, and demand that the tests named beside it fail.

    python tests/mutations/run.py [words of names or files ...] [-j 2]

A bug goes into the module and into the notebook that exports it, since a notebook runs its own cells. The copies hold no
trained network, and no place for one: a test that needs one fails in the first run, which is without any bug.
"""

import argparse
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MUTATIONS = tomllib.loads(Path(__file__).with_name("mutations.toml").read_text())["mutation"]
PARTS = ("diffusion_nb", "nbs", "tests", "tools", "conftest.py", "pyproject.toml", "settings.ini")
SECONDS = 120  # for the tests of one bug
IMPORTED = (
    "torch",
    "torch._dynamo",
    "torchdiffeq",
    "diffusers",
    "hypothesis",
    "sympy",
    "scipy.integrate",
    "sklearn.datasets",
    "nbval",
)  # before all forks; nothing of this project
MISSPELT = {"SyntaxError", "IndentationError", "ImportError", "ModuleNotFoundError", "NameError", "UnboundLocalError",
            "AttributeError"}  # fmt: skip


def notebooks_of(module: Path) -> list[Path]:
    "The notebooks that export into a module, as it says above each cell; none for one that is written by hand."
    found = re.findall(r"^# %% (\S+\.ipynb) ", module.read_text(encoding="utf-8"), re.MULTILINE)
    return [(module.parent / name).resolve() for name in dict.fromkeys(found)]


def replaced(text: str, m: dict, where: Path) -> str:
    "The text with `new` for `old`, which must be there once."
    if (n := text.count(m["old"])) != 1:
        raise ValueError(
            f"{m['name']}: {m['old']!r} occurs {n} times in {where.name}, not once; mend mutations.toml"
        )
    return text.replace(m["old"], m["new"])


def mutants(m: dict, root: Path) -> dict[Path, str]:
    "The module with the bug, and the notebook that exports it, if one does."
    module = root / m["file"]
    changed = {module: replaced(module.read_text(), m, module)}
    for path in notebooks_of(module):
        notebook = json.loads(path.read_text())
        for cell in notebook["cells"]:
            source = "".join(cell["source"])
            if source.startswith("#| export") and m["old"] in source:
                cell["source"] = source.replace(m["old"], m["new"])
                changed[path] = json.dumps(notebook)
    return changed


def bare_copy(root: Path, parts: tuple[str, ...] = PARTS) -> Path:
    "A copy of these parts of the project at `root`, without trained networks and with no place for one."
    for part in parts:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy(ROOT / part, root / part)
    (root / "data").touch()  # a file, where artifacts want a folder
    return root


def copy(root: Path) -> Path:
    "A bare copy, with a test and a notebook that look whether it is what they import."
    bare_copy(root)
    look = (
        f"import diffusion_nb.noise\nassert diffusion_nb.noise.__file__ == {str(root / 'diffusion_nb/noise.py')!r}"
    )
    (root / "tests/test_copy.py").write_text("def test_copy():\n    " + look.replace("\n", "\n    "))
    cell = dict(cell_type="code", id="look", metadata={}, outputs=[], execution_count=1, source=look)
    (root / "nbs/copy.ipynb").write_text(json.dumps(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)))
    return root


def with_cells_above(test: str, root: Path = ROOT) -> list[str]:
    "A cell of a notebook, named by its id, needs those above it; pytest counts the cells of code from 0. Raises ValueError where there is none of this id."
    path, _, id = test.partition("::")
    if not path.endswith(".ipynb") or not id:
        return [test]
    cells = json.loads((root / path).read_text(encoding="utf-8"))["cells"]
    ids = [cell["id"] for cell in cells if cell["cell_type"] == "code"]
    return [f"{path}::Cell {i}" for i in range(ids.index(id) + 1)]


def first_failure(said: str) -> str | None:
    "The test that failed and its error, as pytest said it; None where nothing was tested."
    ended = re.search(r"^FAILED (.+?)(?: - |$)", said, re.MULTILINE)
    if not ended:
        return None
    mark = r"^" if ".ipynb" in ended[1] else r"^E +(?:\w+\.)*"
    errors = re.findall(mark + r"(\w+Error|assert|Failed)\b", said, re.MULTILINE)
    return (
        None if errors and errors[-1] in MISSPELT else f"{ended[1]} ({errors[-1] if errors else 'another output'})"
    )


def failure(tests: list[str], root: Path, status: int) -> str | None:
    "What pytest, which ended with this status, wrote into the log of a copy: the first test that failed, or None. Raises RuntimeError where nothing was tested."
    said = re.sub(r"\x1b\[[\d;]*m", "", (root / "log").read_text())
    by = first_failure(said)
    if status > 1 or status and not by:
        raise RuntimeError(f"nothing was tested:\n{said[-3000:]}")
    return by if status else None


class Run:
    "Pytest on some tests of a copy, up to the first that fails, in a fork of this process: PyTorch and the like are imported once for all runs."

    def __init__(self, tests: list[str], root: Path, seconds: float, *options: str):
        names = dict.fromkeys(name for test in tests for name in with_cells_above(test))
        in_order = sorted(names, key=lambda name: name.partition("::")[0])  # a notebook's cells together
        self.tests, self.root, self.end = tests, root, time.perf_counter() + seconds
        self.pid = os.fork()
        if not self.pid:
            try:
                self.child(["-x", "-q", "-rfE", "--color=no", *options, *in_order])
            finally:
                os._exit(9)

    def child(self, words: list[str]) -> None:
        os.setsid()
        with open(self.root / "log", "w", encoding="utf-8") as log:
            os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
        os.chdir(self.root)
        os.environ.update(PYTHONPATH=str(self.root), PYTHONDONTWRITEBYTECODE="1")
        sys.path.insert(0, str(self.root))
        sys.dont_write_bytecode = True
        status = pytest.main(words)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)

    def status(self) -> int | None:
        "The exit status; None while it runs; raises TimeoutError, and ends it, where it took too long."
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid and time.perf_counter() > self.end:
            os.killpg(self.pid, signal.SIGKILL), os.waitpid(self.pid, 0)
            raise TimeoutError
        return os.waitstatus_to_exitcode(status) if pid else None

    def wait(self) -> str | None:
        "What failed, once it has ended."
        while (status := self.status()) is None:
            time.sleep(0.05)
        return failure(self.tests, self.root, status)


class Bug:
    "A bug in a copy, and the run of the tests beside it."

    def __init__(self, m: dict, root: Path):
        self.m, self.start = m, time.perf_counter()
        changed = mutants(m, root)
        self.before = {path: path.read_text() for path in changed}
        for path, text in changed.items():
            path.write_text(text)
        self.run = Run(m["tests"], root, SECONDS)

    def verdict(self) -> tuple[bool, str] | None:
        "Whether the bug was noticed, and a line about it; None while its tests run. The copy is then as it was."
        by = None
        try:
            if (status := self.run.status()) is None:
                return None
            by = failure(self.m["tests"], self.run.root, status)
            said = f"killed by {by}" if by else f"SURVIVED {', '.join(self.m['tests'])}\n    {self.m['story']}"
        except TimeoutError:
            said = f"TIMED OUT after {SECONDS} s: name quicker tests"
        except RuntimeError as e:
            said = f"PROBLEM: {e}"
        for path, text in self.before.items():
            path.write_text(text)
        return by is not None, f"{self.m['name']:28} {time.perf_counter() - self.start:3.0f} s  {said}"


def verdicts(chosen: list[dict], roots: list[Path]) -> Iterator[tuple[bool, str]]:
    "The verdict of each bug, as they come; one at a time in each copy."
    todo, free, at_work = list(reversed(chosen)), list(roots), []
    while todo or at_work:
        while todo and free:
            at_work.append(Bug(todo.pop(), free.pop()))
        time.sleep(0.05)
        for bug in list(at_work):
            if found := bug.verdict():
                at_work.remove(bug), free.append(bug.run.root)
                yield found


def main(words: list[str], jobs: int) -> int:
    chosen = [m for m in MUTATIONS if not words or any(w in m["name"] or w in m["file"] for w in words)]
    start, noticed = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        roots = [copy(Path(folder).resolve() / str(i)) for i in range(jobs)]
        for m in chosen:
            mutants(m, roots[0])  # all of them apply
        tests = ["tests/test_copy.py", "nbs/copy.ipynb", *(test for m in chosen for test in m["tests"])]
        if by := Run(tests, roots[0], 20 * SECONDS, "-n", str(jobs), "--dist", "loadfile").wait():
            print(f"without any bug, {by} fails:\n{(roots[0] / 'log').read_text()[-3000:]}")
            return 1
        print(f"without any bug the tests pass ({time.perf_counter() - start:.0f} s)", flush=True)
        for found, said in verdicts(chosen, roots):
            noticed.append(found)
            print(f"{len(noticed):3}/{len(chosen)} {said}", flush=True)
    print(f"{sum(noticed)} of {len(chosen)} bugs were noticed, in {time.perf_counter() - start:.0f} s")
    return 0 if chosen and all(noticed) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="parts of names or files of bugs; all bugs if none is given")
    parser.add_argument("-j", type=int, default=2, help="how many at a time (default: 2)")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in IMPORTED:
        import_module(name)
    sys.exit(main(args.words, args.j))
