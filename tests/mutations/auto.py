"""Change the library in one place, many times over, and see how often the tests notice.

    python tests/mutations/auto.py [words of files or functions ...] [-n 300] [--seed 0] [-j 2]

The changes are made by rule and drawn at random, evenly over the functions of the modules that notebooks export: another
operator or number, a condition turned round, an argument or a method call left out, two arguments exchanged. For each, the
tests run that reach the changed line, cheapest first, up to one that fails. What no result on a CPU hangs on is not changed
(devices, `strict=`), nor are messages and progress bars. survivors.toml lists changes that change nothing.
"""

import argparse
import ast
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout, suppress
from itertools import accumulate, count, pairwise, zip_longest
from pathlib import Path
from typing import NamedTuple

import pytest
from mutations.run import bare_copy

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("noise", "schedules", "grids", "time_samplers", "forward", "denoisers", "mixtures", "variances", "guidance",
           "data", "losses", "samplers", "likelihood", "nets", "metrics")  # fmt: skip
PARTS = ("diffusion_nb", "nbs", "tests", "tools", "benchmarks", "conftest.py", "pyproject.toml", "settings.ini", "claims.toml")  # fmt: skip
# These read the text of the project, or do nothing but start processes, in which a line that is reached is not seen.
LEFT_OUT = ("auto_mutants", "benchmarks", "book", "docs", "face", "ledger", "mutations", "printed", "resume")
HEAVY = ("torch", "torchvision.datasets", "torchdiffeq", "sklearn.datasets", "sklearn.model_selection", "diffusers", "einops",
         "jaxtyping", "scipy.stats", "sympy", "hypothesis", "nbval.plugin", "matplotlib.pyplot", "tqdm.auto", "coverage")  # fmt: skip
MAPS = ROOT / "build/reached"
GOAL = 0.9  # the share that must be noticed
ENOUGH = 60  # seconds of tests for one change
PATIENCE = 60  # seconds to wait beyond three times what the tests took
FORK = multiprocessing.get_context("fork")


# The changes


class Mutant(NamedTuple):
    "A change: `new` in place of the bytes from `start` to `end`; `first` to `last` are lines of which a test must reach one."

    file: str
    function: str
    start: int
    end: int
    new: str
    first: int
    last: int

    def applied(self, source: bytes) -> bytes:
        return source[: self.start] + self.new.encode() + source[self.end :]


class Source:
    "A file with its tree, and where in it the nodes are, in bytes."

    def __init__(self, text: bytes):
        self.text, self.tree = text, ast.parse(text)
        self.starts = [0, *(i + 1 for i, byte in enumerate(text) if byte == ord("\n"))]
        imports = (node for node in ast.walk(self.tree) if isinstance(node, ast.Import | ast.ImportFrom))
        self.imported = {(name.asname or name.name).split(".")[0] for node in imports for name in node.names}

    def span(self, node: ast.AST) -> tuple[int, int]:
        return (self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset)  # fmt: skip

    def of(self, start: int, end: int) -> str:
        return self.text[start:end].decode()

    def line(self, place: int) -> int:
        "The number of the line, from 1."
        return self.text.count(b"\n", 0, place) + 1


Change = tuple[int, int, str]
SWAPS = {ast.Add: "+-", ast.Sub: "-+", ast.Mult: "*/", ast.Div: "/*", ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"),
         ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="), ast.NotEq: ("!=", "==")}  # fmt: skip
SYMMETRIC = {"min", "max", "minimum", "maximum"}
NO_RESULT = {"strict", "device"}  # keywords that change none on a CPU
SAME_ON_A_CPU = {"cpu", "contiguous"}


def between(source: Source, op: ast.AST, left: ast.AST, right: ast.AST) -> Iterator[Change]:
    "Another operator than the one that stands between two operands."
    old, new = SWAPS.get(type(op), (None, None))
    if old:
        at = source.text.find(old.encode(), source.span(left)[1], source.span(right)[0])
        yield at, at + len(old), new


def operators(source: Source, node: ast.AST) -> Iterator[Change]:
    match node:
        case ast.BinOp(left=left, op=op, right=right) | ast.AugAssign(target=left, op=op, value=right):
            yield from between(source, op, left, right)
        case ast.Compare():
            for op, (left, right) in zip(node.ops, pairwise([node.left, *node.comparators]), strict=True):
                yield from between(source, op, left, right)


def constants(source: Source, node: ast.AST) -> Iterator[Change]:
    match node:
        case ast.Constant(value=bool(value)):
            yield *source.span(node), str(not value)
        case ast.Constant(value=int(value)):
            yield *source.span(node), str(value + 1)
        case ast.Constant(value=float(value)):
            yield *source.span(node), repr(2 * value or 1.0)


def negations(source: Source, node: ast.AST) -> Iterator[Change]:
    tests = getattr(node, "ifs", [node.test] if isinstance(node, ast.If | ast.While | ast.IfExp) else [])
    for start, end in map(source.span, tests):
        yield start, end, f"not ({source.of(start, end)})"


def fewer_keywords(source: Source, node: ast.AST) -> Iterator[Change]:
    if isinstance(node, ast.Call):
        given = [*node.args, *node.keywords]
        for before, this, after in zip([None, *given], given, [*given[1:], None], strict=False):
            if isinstance(this, ast.keyword) and this.arg not in NO_RESULT:
                start, end = source.span(this)
                yield source.span(before)[1] if before else start, source.span(after)[0] if after and not before else end, ""  # fmt: skip


def exchanged(source: Source, node: ast.AST) -> Iterator[Change]:
    if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] not in SYMMETRIC | {"tqdm"}:
        for (a, b), (c, d) in pairwise(map(source.span, node.args)):
            if source.of(a, b) != source.of(c, d):
                yield a, d, source.of(c, d) + source.of(b, c) + source.of(a, b)


def fewer_methods(source: Source, node: ast.AST) -> Iterator[Change]:
    "A tensor without the method that is called on it, such as .sqrt()."
    import torch

    match node:
        case ast.Call(func=ast.Attribute(value=owner, attr=name)):
            module = isinstance(owner, ast.Name) and owner.id in source.imported
            moved = name == "to" and ast.unparse(node).endswith(".device)") and len(node.args) == 1
            boring = module or moved or name in SAME_ON_A_CPU or name.startswith("__")
            if hasattr(torch.Tensor, name) and not boring:
                at = source.text.rfind(b".", source.span(owner)[1], source.span(node.func)[1])
                yield at, source.span(node)[1], ""


KINDS = (operators, constants, negations, fewer_keywords, exchanged, fewer_methods)


def parts(node: ast.AST) -> list[ast.AST]:
    "What lies in a node and may be changed: no messages, annotations, decorators or progress bars."
    match node:
        case ast.FunctionDef():
            return [d for d in (*node.args.defaults, *node.args.kw_defaults) if d] + node.body
        case ast.Raise() | ast.JoinedStr() | ast.Call(func=ast.Attribute(value=ast.Name(id="bar"))):
            return []
        case ast.Call(func=ast.Name(id="tqdm")):
            return node.args
        case ast.AnnAssign():
            return [node.value] if node.value else []
        case ast.keyword(arg=name) if name in NO_RESULT:
            return []
    return list(ast.iter_child_nodes(node))


def lines(node: ast.stmt) -> tuple[int, int]:
    "The first and last line of a statement, of one with a body without that; of a function's defaults, those of its body."
    body = getattr(node, "body", None)
    if isinstance(node, ast.FunctionDef):
        return body[0].lineno, node.end_lineno
    return node.lineno, max(node.lineno, body[0].lineno - 1) if body else node.end_lineno


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    "The functions and methods of a file, with their names; what is defined in one belongs to it."
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from ((f"{node.name}.{f.name}", f) for f in node.body if isinstance(f, ast.FunctionDef))


def changes(source: Source, node: ast.AST, at: tuple[int, int]) -> Iterator[tuple[Change, tuple[int, int]]]:
    "The changes in a node, each with the lines of the statement that it is in."
    at = lines(node) if isinstance(node, ast.stmt) else at
    if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "tqdm"):
        for kind in KINDS:
            yield from ((change, at) for change in kind(source, node))
    for part in parts(node):
        yield from changes(source, part, at)


def mutants_of(path: Path, root: Path = ROOT) -> list[Mutant]:
    "All changes of a file that are within a line, each once."
    source, name = Source(path.read_bytes()), path.relative_to(root).as_posix()
    every = (
        Mutant(name, function, *change, *at)
        for function, node in functions(source.tree)
        for change, at in changes(source, node, (0, 0))
    )
    return [m for m in dict.fromkeys(every) if "\n" not in source.of(m.start, m.end) + m.new]


def modules(root: Path = ROOT) -> list[Path]:
    places = [root / "diffusion_nb" / name for name in MODULES]
    return [path for p in places for path in (sorted(p.glob("*.py")) if p.is_dir() else [p.with_suffix(".py")])]


def drawn(mutants: list[Mutant], n: int, seed: int) -> list[Mutant]:
    "n of them, evenly over the functions, as far as these have enough; the same for the same seed."
    by_function = {}
    for m in mutants:
        by_function.setdefault((m.file, m.function), []).append(m)
    groups, order = list(by_function.values()), random.Random(seed)
    for group in (groups, *groups):
        order.shuffle(group)
    return [m for turn in zip_longest(*groups) for m in turn if m][:n]


def shown(m: Mutant, root: Path = ROOT) -> tuple[int, str, str]:
    "The number of the changed line, and the line before and after."
    text = (root / m.file).read_bytes()
    i = text.count(b"\n", 0, m.start)
    old, new = (t.split(b"\n")[i].decode().strip() for t in (text, m.applied(text)))
    return i + 1, old, new


def equivalents() -> dict[tuple[str, str, str, str], str]:
    "(file, function, line before, line after) of changes that change nothing, with the reason."
    listed = tomllib.loads(Path(__file__).with_name("survivors.toml").read_text())["survivor"]
    return {(s["file"], s["function"], s["old"], s["new"]): s["reason"] for s in listed}


# Tests in a copy, each run in a process of its own, forked from one that has imported what takes long


class Chosen:
    "Of the tests that are collected, those that are wanted, in that order; `failed` is the first that fails."

    def __init__(self, wanted: list[str]):
        self.place, self.failed = {name: i for i, name in enumerate(wanted)}, None

    def pytest_sessionstart(self):
        "A failure is enough: no search for the smallest example."
        from hypothesis import Phase, settings

        phases = [Phase.explicit, Phase.generate]
        settings.register_profile("first failure", settings(), phases=phases, report_multiple_bugs=False)
        settings.load_profile("first failure")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        items[:] = sorted((i for i in items if i.nodeid in self.place), key=lambda i: self.place[i.nodeid])

    def pytest_collectreport(self, report):
        if report.failed:
            self.failed = self.failed or report.nodeid

    pytest_runtest_logreport = pytest_collectreport


class Watched:
    "Which test runs, for `cov`; how long each takes, and which do not pass."

    def __init__(self, cov):
        self.cov, self.seconds, self.bad = cov, {}, set()

    def pytest_collectstart(self, collector):
        self.cov.switch_context(collector.nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.cov.switch_context(item.nodeid)
        return (yield)

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0) + report.duration
        if not report.passed:
            self.bad.add(report.nodeid)


def without_processes() -> None:
    "From here on none can be started: what one does would not be seen, and it might stay behind."

    def refuse(*args, **kwargs):
        raise OSError("no process may be started here")

    subprocess.Popen.__init__ = multiprocessing.process.BaseProcess.start = os.fork = refuse


def run_tests(root: Path, files: list[str], plugin, *options: str) -> None:
    "Run pytest in the copy at `root`, in this process, which must be a new one."
    without_processes()
    os.chdir(root)
    os.environ |= {"OMP_NUM_THREADS": "1", "DIFFUSION_NB_HOME": str(root / "data")}
    sys.path.insert(0, str(root))
    with open(root / "log", "w", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        pytest.main(["-q", "--color=no", "-p", "no:anyio", *options, *files], plugins=[plugin])
    if not sys.modules["diffusion_nb"].__file__.startswith(str(root)):
        raise RuntimeError("the tests ran on another library than the copy")


def first_failure(root: Path, wanted: list[str]) -> str | None:
    "The first of these tests that fails; None if all pass."
    plugin = Chosen(wanted)
    run_tests(root, list(dict.fromkeys(name.partition("::")[0] for name in wanted)), plugin, "-x")
    return plugin.failed


def reached(root: Path, file: str) -> dict:
    """Of the tests of a file that pass (`left` did not): `seconds` (test ↦ how long), and `lines` (file of the library ↦ line ↦ their numbers).

    Lines that are reached while the file is imported are reached by all of them.
    """
    import coverage

    cov = coverage.Coverage(data_file=None, source=[str(root / "diffusion_nb")])
    cov.start()
    run_tests(root, [file], plugin := Watched(cov))
    cov.stop()
    good, data, at = {t: s for t, s in plugin.seconds.items() if t not in plugin.bad}, cov.get_data(), {}
    number = {t: i for i, t in enumerate(good)}
    for path in map(str, modules(root)):
        tests = {line: {t for c in contexts for t in (good if c == file else {c} & good.keys())}
                 for line, contexts in data.contexts_by_lineno(path).items()}  # fmt: skip
        at[Path(path).relative_to(root).as_posix()] = {
            k: sorted(number[t] for t in v) for k, v in tests.items() if v
        }
    return {"seconds": good, "lines": at, "left": len(plugin.bad)}


def forked(work: Callable, seconds: float) -> tuple:
    "(what work() returns,) from a process of its own; () if that takes too long or dies."
    here, there = FORK.Pipe(duplex=False)
    child = FORK.Process(target=lambda: there.send((work(),)))
    child.start()
    there.close()
    try:
        return here.recv() if here.poll(seconds) else ()
    except EOFError:
        return ()
    finally:
        child.kill()
        child.join()


# What each of the processes does that work side by side, in a copy of its own


def settle(folder: str) -> None:
    global HERE, WRITES
    HERE, WRITES = bare_copy(Path(folder) / str(os.getpid()), PARTS), count(1)


def put(file: str, text: bytes) -> None:
    "Write a file of the copy; no two have one time, by which Python knows what it has compiled."
    (HERE / file).write_bytes(text)
    os.utime(HERE / file, times=(now := next(WRITES), now))


def see(file: str, place: Path) -> None:
    "Write down what the tests of a file reach."
    got = forked(lambda: reached(HERE, file), 1200)
    if not got:
        raise RuntimeError(f"{file} does not run to its end:\n{(HERE / 'log').read_text()[-3000:]}")
    place.write_text(json.dumps(got[0]), encoding="utf-8")


def noticed_here(m: Mutant, tests: list[str], seconds: float) -> tuple[str | None, float]:
    "The test that notices a change, or None, and the seconds that it took."
    start, text = time.perf_counter(), (ROOT / m.file).read_bytes()
    put(m.file, m.applied(text))
    got = forked(lambda: first_failure(HERE, tests), seconds)
    put(m.file, text)
    return got[0] if got else "no end, or a crash", time.perf_counter() - start


def failed_here(tests: list[str]) -> str | None:
    "Of tests that noticed a change, one that fails without any."
    return (forked(lambda: first_failure(HERE, tests), 3600) or ("no end, or a crash",))[0]


# The trial


def files_of_tests() -> list[str]:
    paths = sorted((ROOT / "tests").glob("test_*.py"))
    return [f"tests/{p.name}" for p in paths if p.stem.removeprefix("test_") not in LEFT_OUT]


def key(file: str) -> str:
    "Of the library and all that a file of tests hangs on."
    sources = [*sorted((ROOT / "diffusion_nb").rglob("*.py")), ROOT / "conftest.py", ROOT / "tests/conftest.py", ROOT / file]  # fmt: skip
    return hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()


def reached_by_tests(pool: ProcessPoolExecutor) -> list[dict]:
    "What `reached` says of each file of tests, kept for as long as neither it nor the library changes."
    MAPS.mkdir(parents=True, exist_ok=True)
    places = {file: MAPS / f"{key(file)}.json" for file in files_of_tests()}
    for stale in set(MAPS.iterdir()) - set(places.values()):
        stale.unlink()
    for job in [pool.submit(see, file, place) for file, place in places.items() if not place.exists()]:
        job.result()
    return [json.loads(place.read_text()) for place in places.values()]


def reaching(m: Mutant, seen: list[dict]) -> dict[str, float]:
    "The tests that reach a change, cheapest first, as many as are enough, with their seconds."
    found = {}
    for part in seen:
        names, at = list(part["seconds"]), part["lines"].get(m.file, {})
        reach = {names[i] for line in range(m.first, m.last + 1) for i in at.get(str(line), ())}
        found |= {name: part["seconds"][name] for name in reach}
    order = sorted(found, key=lambda name: (found[name], name))
    so_far = accumulate(found[name] for name in order)
    return {name: found[name] for name, s in zip(order, so_far, strict=True) if s < ENOUGH or name == order[0]}


def interval(k: int, n: int) -> tuple[float, float]:
    "Wilson's 95 % interval for a share of which k in n were seen."
    z2 = 1.96**2
    middle, half = k + z2 / 2, (z2 * (k * (n - k) / n + z2 / 4)) ** 0.5
    return (middle - half) / (n + z2), (middle + half) / (n + z2)


def tried(mutants: list[Mutant], seen: list[dict], pool: ProcessPoolExecutor) -> dict[Mutant, str | None]:
    "Each change with the test that notices it, or None; said as it comes."
    jobs = {}
    for m in mutants:
        tests = reaching(m, seen)
        jobs[pool.submit(noticed_here, m, list(tests), PATIENCE + 3 * sum(tests.values()))] = m
    by = {}
    for job in as_completed(jobs):
        m, (by[m], seconds) = jobs[job], job.result()
        line, *_ = shown(m)
        print(f"{len(by):3}/{len(jobs)} {seconds:4.0f} s  {m.file}:{line} {m.function}  {by[m] or 'SURVIVED'}", flush=True)  # fmt: skip
    return by


def told(title: str, mutants: list[Mutant]) -> None:
    if mutants:
        print(f"\n{title}:")
    for m in sorted(mutants):
        line, old, new = shown(m)
        print(f"{m.file}:{line} {m.function}\n    {old}\n  → {new}")


def trial(mutants: list[Mutant], jobs: int) -> tuple[dict[Mutant, str | None], str | None]:
    "(what notices each change that tests reach, one of these tests that fails without any change)"
    for name in HEAVY:
        with suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()  # what is there is neither looked through nor copied in each child
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(jobs, FORK, settle, (folder,)) as pool:
        start, seen = time.perf_counter(), reached_by_tests(pool)
        good, left = (sum(n) for n in zip(*((len(part["seconds"]), part["left"]) for part in seen), strict=True))
        print(f"{good} tests pass, {left} cannot here; what they reach was seen in {time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip
        by = tried([m for m in mutants if reaching(m, seen)], seen, pool)
        credited = sorted({name for name in by.values() if name and "::" in name})
        return by, pool.submit(failed_here, credited).result() if credited else None


def main(words: list[str], n: int, seed: int, jobs: int) -> int:
    start, every = time.perf_counter(), [m for path in modules() for m in mutants_of(path)]
    sample = drawn([m for m in every if not words or any(w in f"{m.file} {m.function}" for w in words)], n, seed)
    same = equivalents()
    real = [m for m in sample if (m.file, m.function, *shown(m)[1:]) not in same]
    by, wrong = trial(real, jobs)
    told("survived", alive := [m for m in by if not by[m]])
    told("reached by no test, at most by notebooks", unseen := [m for m in real if m not in by])
    print(f"\n{len(sample)} changes of {len(every)}, seed {seed}, {time.perf_counter() - start:.0f} s: "
          f"{len(sample) - len(real)} change nothing, {len(unseen)} are reached by no test")  # fmt: skip
    if wrong or not by:
        print(f"{wrong} fails without any change" if wrong else "nothing was tried")
        return 1
    k, (low, high) = len(by) - len(alive), interval(len(by) - len(alive), len(by))
    print(f"{k} of the other {len(by)} were noticed: {k / len(by):.1%} (95 %: {low:.1%} to {high:.1%})")
    return 0 if k >= GOAL * len(by) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="parts of names of files or functions; all if none is given")
    parser.add_argument("-n", type=int, default=300, help="how many changes (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    parser.add_argument("-j", type=int, default=2, help="how many at a time (default: 2)")
    args = parser.parse_args()
    sys.exit(main(args.words, args.n, args.seed, args.j))
