"""Runs the notebooks of the book side by side, and writes what they showed as web pages."""

import copy
import hashlib
import json
import os
import re
import signal
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from diffusion_nb.book.folds import TEMPLATE, mark_folds
from diffusion_nb.book.pictures import with_alt_texts
from diffusion_nb.util.allocator import VARIABLES
from diffusion_nb.util.storage import PACKAGE, shipped, write_atomically

MEMORY = 2 * 2**30  # bytes that a notebook may need: the largest takes about half


def chosen(names: list[str], folder: Path) -> list[Path]:
    "The notebooks whose names begin with any of `names` (all of them if there are none), the numbered ones first, in order."
    book = sorted(folder.glob("*.ipynb"), key=lambda p: (not p.name[0].isdigit(), p.name))
    for name in names:
        if not any(p.name.startswith(name) for p in book):
            raise ValueError(f"no notebook {name!r}; there are {', '.join(p.stem for p in book)}")
    return [p for p in book if not names or p.name.startswith(tuple(names))]


def how_many() -> int:
    "Notebooks at a time: one per core, fewer where memory is short."
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, psutil.virtual_memory().available // MEMORY))


def in_order(paths: list[Path], seconds: dict[str, float], jobs: int) -> list[Path]:
    "The order of the book, but of the last few those that took long come first: alone at the end, they would keep one core busy."
    usual = median(seconds.values()) if seconds else 0
    head, tail = paths[: -2 * jobs], paths[-2 * jobs :]
    return head + sorted(tail, key=lambda p: seconds.get(p.stem, 0) <= usual)


def state_of(nbs: Path) -> str:
    "A hash of everything that decides what the notebooks show: their cells, the library, the settings."
    cells = [
        [c["source"] for c in json.loads(p.read_text(encoding="utf-8"))["cells"]]
        for p in sorted(nbs.glob("*.ipynb"))
    ]
    code = [p.read_text(encoding="utf-8") for p in [shipped("settings.ini"), *sorted(PACKAGE.rglob("*.py"))]]
    asked = [os.environ.get(f"DIFFUSION_NB_{name}") for name in ("PROFILE", "SET", "SETTINGS")]
    return hashlib.sha256(json.dumps([cells, code, asked]).encode()).hexdigest()


class Record:
    """What `run` knows of the notebooks of the book: the seconds of each that ran and what went wrong in it, or None.

    Kept in run.json of its folder. What other cells, another library or other settings showed (`state`) counts as not run.
    """

    def __init__(self, out: Path, book: list[Path], state: str):
        self.out, self.book, self.state, self.seconds, self.problems = out, book, state, {}, {}
        try:
            last = json.loads((out / "run.json").read_text(encoding="utf-8"))
            self.seconds = dict(last["seconds"])
            if last["state"] == state:
                self.problems = {k: v for k, v in last["problems"].items() if (out / f"{k}.html").exists()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return  # there is none yet, or it is damaged

    def left(self) -> list[Path]:
        "The notebooks that have not run well; all of them, if none is left: then the book begins anew."
        return [p for p in self.book if self.problems.get(p.stem, "not run")] or self.book

    def write(self) -> None:
        about = dict(state=self.state, seconds=self.seconds, problems=self.problems)
        write_atomically(
            self.out / "run.json", lambda p: p.write_text(json.dumps(about, indent=1), encoding="utf-8")
        )
        page = index_page(self.book, self.seconds, self.problems)
        write_atomically(self.out / "index.html", lambda p: p.write_text(page, encoding="utf-8"))


class Kernels:
    "The kernels that are running, so that Ctrl-C can stop them all; and the lines of the screen that they may write to."

    def __init__(self, jobs: int):
        self.clients: set[Any] = set()
        self.lines, self.stopped = list(range(jobs)), False
        self.lock = threading.Lock()

    def check(self, **_) -> None:
        "Raise DeadKernelError after Ctrl-C: a kernel that was only starting then was not stopped."
        from nbclient.exceptions import DeadKernelError

        if self.stopped:
            raise DeadKernelError("stopped")

    def stop(self) -> None:
        self.stopped = True
        for client in list(self.clients):
            if pid := getattr(getattr(client.km, "provisioner", None), "pid", None):
                os.kill(pid, signal.SIGKILL)


def execute(path: Path, out: Path, kernels: Kernels) -> tuple[float, str | None]:
    "Run one notebook, write the executed copy and its page; returns the seconds it took and what went wrong, if anything."
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError
    from tqdm import tqdm

    nb, problem, start = nbformat.read(path, as_version=4), None, time.perf_counter()
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None  # what is stored is not what ran here
    cells = sum(c.cell_type == "code" and bool(c.source.strip()) for c in nb.cells)
    with kernels.lock:
        line = kernels.lines.pop(0)
    layout = "{desc} {bar:30} cell {n_fmt} of {total_fmt}, {elapsed}"
    with tqdm(
        total=cells, desc=f"{path.stem:16}", bar_format=layout, position=line, leave=False, disable=None
    ) as bar:
        client = NotebookClient(
            nb,
            timeout=None,
            kernel_name="python3",
            extra_arguments=["--IPKernelApp.log_level=40"],  # errors only
            resources={"metadata": {"path": str(path.parent)}},
            on_cell_execute=kernels.check,
            on_cell_executed=lambda **_: bar.update(),
        )
        kernels.clients.add(client)
        try:
            # one thread a kernel: they share the cores, and sums are added in one order
            client.execute(env={"OMP_NUM_THREADS": "1"} | VARIABLES | os.environ)
        except (CellExecutionError, DeadKernelError) as e:
            problem = str(e)
        finally:
            kernels.clients.remove(client)
            with kernels.lock:
                kernels.lines.append(line)
    if not kernels.stopped:
        if problem:
            nb.cells.insert(0, nbformat.v4.new_markdown_cell(stopped_at(nb)))
        nbformat.write(nb, out / path.name)
        (out / f"{path.stem}.html").write_text(web_page(nb), encoding="utf-8")
    return time.perf_counter() - start, problem


def stopped_at(nb) -> str:
    "What a page of a notebook that failed begins with."
    ran = [i for i, c in enumerate(nb.cells) if c.cell_type == "code" and c.execution_count]
    above = [c.source for c in nb.cells[: ran[-1] if ran else 0] if c.cell_type == "markdown" and "#" in c.source]
    section = re.findall(r"^#+ (.*)$", above[-1], re.MULTILINE)[-1:] if above else []
    return f"> **This notebook failed**, {f'in the section “{section[0]}”' if section else 'at its start'}: below that, nothing ran."


def run_book(paths: list[Path], record: Record, jobs: int) -> dict[str, str | None]:
    """What went wrong in each of these notebooks, or None, by its name.

    Runs `jobs` of them at a time, each in a kernel of its own. The index is there from the first second; pages are linked as
    they are finished. Ctrl-C stops all kernels and keeps what has finished.
    """
    todo, kernels = in_order(paths, record.seconds, jobs), Kernels(jobs)
    running: dict[Future, Path] = {}
    for path in todo:
        record.problems.pop(path.stem, None)
    record.write()
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while todo or running:
                while todo and len(running) < jobs:
                    path = todo.pop(0)
                    running[pool.submit(execute, path, record.out, kernels)] = path
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    take(future, running.pop(future), record)
        except BaseException:
            kernels.stop()
            raise
    return {p.stem: record.problems[p.stem] for p in paths}


def take(future: Future, path: Path, record: Record) -> None:
    "Put what became of a notebook into the record, and say it."
    from tqdm import tqdm

    seconds, problem = future.result()
    record.seconds[path.stem], record.problems[path.stem] = round(seconds, 1), problem
    tqdm.write(f"{path.stem:16} {'failed after' if problem else 'ran in'} {seconds:.0f} s", file=sys.stderr)
    if problem:
        tqdm.write(f"\n{path.name} failed:\n{problem}\n", file=sys.stderr)
    record.write()


def web_page(nb) -> str:
    "A notebook as HTML, its formulas as MathML, which browsers draw by themselves: no script, no network."
    from latex2mathml.converter import convert
    from nbconvert import HTMLExporter

    def formula(match):
        return convert(match[1] or match[2], display="block" if match[1] else "inline")

    nb = copy.deepcopy(nb)
    nb.cells = [c for c in nb.cells if "remove-cell" not in c.metadata.get("tags", []) and not c.source.startswith("#| default_exp")]  # fmt: skip
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\$\$(.+?)\$\$|\$([^$]+?)\$", formula, cell.source, flags=re.DOTALL)
    cells = copy.deepcopy(nb.cells)
    mark_folds(nb)
    exporter = HTMLExporter(raw_template=TEMPLATE, mathjax_url="", require_js_url="")
    return with_alt_texts(exporter.from_notebook_node(nb)[0], cells)


def title(path: Path) -> str:
    "The first heading of a notebook."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    lines = (line for c in cells for line in "".join(c["source"]).splitlines())
    return next((line.lstrip("# ").strip() for line in lines if line.startswith("# ")), path.stem)


def index_page(paths: list[Path], seconds: dict, problems: dict) -> str:
    "An HTML page that lists the notebooks, how long each took, and what failed; until all have run it is read again by itself."

    def row(path):
        name, ran = escape(title(path)), path.stem in problems
        state = "not yet" if not ran else "failed" if problems[path.stem] else f"{seconds[path.stem]:.0f} s"
        return f'<tr><td>{f"<a href={path.stem}.html>{name}</a>" if ran else name}<td class="{state}">{state}'

    style = "body{font:17px/1.6 sans-serif;max-width:45em;margin:3em auto}td{padding:.2em 1em}.failed{color:#b00}"
    again = "" if len(problems) == len(paths) else "<meta http-equiv=refresh content=5>"
    return (f"<!doctype html><meta charset=utf-8>{again}<title>diffusion_nb</title><style>{style}</style><h1>diffusion_nb</h1>"
            f"<p>The book as it ran on this machine, {time.strftime('%Y-%m-%d %H:%M')}: {len(problems)} of {len(paths)} notebooks.<table>"
            + "\n".join(map(row, paths)) + "</table>")  # fmt: skip
