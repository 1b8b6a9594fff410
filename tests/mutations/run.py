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
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parents[2]
MUTATIONS = tomllib.loads(Path(__file__).with_name("mutations.toml").read_text())["mutation"]
PARTS = ("diffusion_nb", "nbs", "tests", "tools", "conftest.py", "pyproject.toml", "settings.ini")
SECONDS = 120  # for the tests of one bug
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


def with_cells_above(test: str) -> list[str]:
    "A cell of a notebook needs those above it."
    path, _, n = test.partition("::Cell ")
    return [f"{path}::Cell {i}" for i in range(int(n) + 1)] if n else [test]


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


def failure(tests: list[str], root: Path, seconds: int, *options: str) -> str | None:
    "Run tests in a copy up to the first that fails; returns that, or None. Raises RuntimeError where nothing was tested."
    names = dict.fromkeys(name for test in tests for name in with_cells_above(test))
    env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "--color=no", *options]
    command += sorted(
        names, key=lambda name: name.partition("::")[0]
    )  # a notebook's cells together, in their order
    with open(root / "log", "w", encoding="utf-8") as log:
        done = subprocess.run(command, cwd=root, env=env, stdout=log, stderr=log, timeout=seconds)
    said = re.sub(r"\x1b\[[\d;]*m", "", (root / "log").read_text())
    by = first_failure(said)
    if done.returncode > 1 or done.returncode and not by:
        raise RuntimeError(f"nothing was tested:\n{said[-3000:]}")
    return by if done.returncode else None


def verdict(m: dict, copies: SimpleQueue) -> tuple[bool, str]:
    "Whether the bug was noticed, and a line about it."
    root, start = copies.get(), time.perf_counter()
    changed = mutants(m, root)
    before = {path: path.read_text() for path in changed}
    try:
        for path, text in changed.items():
            path.write_text(text)
        by = failure(m["tests"], root, SECONDS)
        said = f"killed by {by}" if by else f"SURVIVED {', '.join(m['tests'])}\n    {m['story']}"
    except subprocess.TimeoutExpired:
        by, said = None, f"TIMED OUT after {SECONDS} s: name quicker tests"
    except RuntimeError as e:
        by, said = None, f"PROBLEM: {e}"
    for path, text in before.items():
        path.write_text(text)
    copies.put(root)
    return by is not None, f"{m['name']:28} {time.perf_counter() - start:3.0f} s  {said}"


def main(words: list[str], jobs: int) -> int:
    chosen = [m for m in MUTATIONS if not words or any(w in m["name"] or w in m["file"] for w in words)]
    copies, start = SimpleQueue(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        roots = [copy(Path(folder).resolve() / str(i)) for i in range(jobs)]
        for m in chosen:
            mutants(m, roots[0])  # all of them apply
        tests = ["tests/test_copy.py", "nbs/copy.ipynb", *(test for m in chosen for test in m["tests"])]
        if by := failure(tests, roots[0], 5 * SECONDS, "-n", str(jobs), "--dist", "loadfile"):
            print(f"without any bug, {by} fails:\n{(roots[0] / 'log').read_text()[-3000:]}")
            return 1
        print(f"without any bug the tests pass ({time.perf_counter() - start:.0f} s)", flush=True)
        for root in roots:
            copies.put(root)
        noticed = []
        for done in as_completed([pool.submit(verdict, m, copies) for m in chosen]):
            noticed.append(done.result()[0])
            print(f"{len(noticed):3}/{len(chosen)} {done.result()[1]}", flush=True)
    print(f"{sum(noticed)} of {len(chosen)} bugs were noticed, in {time.perf_counter() - start:.0f} s")
    return 0 if chosen and all(noticed) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="parts of names or files of bugs; all bugs if none is given")
    parser.add_argument("-j", type=int, default=2, help="how many at a time (default: 2)")
    args = parser.parse_args()
    sys.exit(main(args.words, args.j))
