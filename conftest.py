"""How the notebooks are compared with their stored outputs (nbval), and how the tests run."""

import os
import re
import time
from collections import Counter, deque
from queue import Empty

import hypothesis
import pytest
import zmq
from jupyter_client.manager import KernelManager
from jupyter_client.provisioning import LocalProvisioner
from nbval.kernel import RunningKernel
from nbval.plugin import IPyNbCell

from diffusion_nb.util.allocator import keep_freed_memory
from tools import figures
from tools.kernels import launch
from tools.outputs import SURROUNDINGS, without_widgets
from tools.printed import Printed
from tools.seen import Seen

# One thread for each of the two workers; kernels inherit this, and the rest. `make test-anywhere` asks for others.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ |= SURROUNDINGS
keep_freed_memory()
# The stored outputs are those of settings.ini as it stands.
for name in ("DIFFUSION_NB_PROFILE", "DIFFUSION_NB_SET"):
    os.environ.pop(name, None)

# The same examples in every run and on every machine, no limit of time, and a failure says how to play it again.
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile("suite")

EVAL_FALSE = re.compile(r"^#\s*\|\s*eval\s*:\s*false\s*$", re.MULTILINE | re.IGNORECASE)
PICTURES = ("iVBORw0KGgo", "R0lGOD")  # how PNG and GIF begin in base64
DIFFERS = {
    r" at 0x[0-9a-f]+": "",  # nbdev-clean drops addresses from what is stored
    r"data:image/[^\"']*": "",
    r"[0-9a-f]{32}": "",  # the names that matplotlib gives to animations
}
RECORDED = {}  # path of a notebook ↦ {id of a cell: its figures}, with DIFFUSION_NB_RECORD_FIGURES


class Cell(IPyNbCell):
    "A notebook cell whose progress bars and warnings may differ from the stored ones, numbers in their last place, pictures as far as one hardly sees it, and curves as far as roundings move them."

    def compare_outputs(self, test, ref, skip_compare=None):
        shown = [out["data"].pop(figures.MIME) for out in test if figures.MIME in out.get("data", {})]
        return self.same_outputs(test, ref, skip_compare) and self.same_figures(shown)

    def same_figures(self, shown):
        "Whether the figures are those that are recorded, if any are for this notebook."
        if os.environ.get(figures.RECORD):
            return self.record(shown)
        was = figures.recorded(self.path)
        said = "" if was is None else figures.all_apart(was.get(self.cell.get("id"), []), shown)
        if said:
            self.comparison_traceback.append(
                f"{said}. If it is right so, python tools/figures.py nbs/{self.path.name}"
            )
        return not said

    def record(self, shown):
        "Keep the figures of this cell with those of the cells before it."
        RECORDED.setdefault(self.path, {}).update({self.cell["id"]: shown} if shown else {})
        if RECORDED[self.path]:
            figures.write(self.path, RECORDED[self.path])
        return True

    def same_outputs(self, test, ref, skip_compare):
        self.parent.sanitize_patterns |= DIFFERS
        skip_compare = {*(skip_compare or self.parent.skip_compare), "stderr"} - {"image/png", "image/gif"}
        return super().compare_outputs(without_widgets(test), without_widgets(ref), skip_compare)

    def sanitize(self, s):
        if isinstance(s, str) and s.startswith(PICTURES):
            return Seen(s)
        text = super().sanitize(s)
        return Printed(text) if isinstance(text, str) else text


class Manager(KernelManager):
    def client(self, **kwargs):
        client = super().client(**kwargs)
        client.context.setsockopt(zmq.RCVHWM, 0)  # its sockets come after this
        return client


class Kernel(RunningKernel):
    """A kernel whose messages are read while a cell runs, from queues without a limit.

    Left until the cell has ended, they wait in queues of a thousand each, which drop what is beyond: a progress bar fills
    them in a minute, and the message that ends the cell is lost.
    """

    def __init__(self, *args, **kwargs):
        self.waiting = deque()
        super().__init__(*args, **kwargs)

    def execute_cell_input(self, source, allow_stdin=None):
        "As Jupyter runs a cell: IPython hides the value of a line that ends in ';' only where history is kept."
        return self.kc.execute(source, store_history=True, allow_stdin=allow_stdin, stop_on_error=False)

    def get_message(self, stream, timeout=None):
        if stream == "iopub":
            return self.waiting.popleft() if self.waiting else super().get_message(stream, timeout)
        end = time.monotonic() + (timeout or float("inf"))
        while True:
            self.read_along()
            try:
                return super().get_message(stream, 0.05)
            except Empty:
                if time.monotonic() > end or not self.is_alive():
                    raise

    def read_along(self):
        "Keep the messages that are there already."
        while True:
            try:
                self.waiting.append(super().get_message("iopub", 0))
            except Empty:
                return


@pytest.hookimpl(tryfirst=True)
def pytest_configure():
    import nbval.kernel
    import nbval.plugin

    nbval.plugin.RunningKernel, nbval.kernel.KernelManager = Kernel, Manager
    LocalProvisioner.launch_kernel = launch


# What `make test ARGS=quick` leaves out beside the notebooks and tests/gpu: whole programs, pages, long samplings and trainings.
NOT_QUICK = (
    "anywhere", "auto_mutants", "benchmarks", "book", "cascade", "cli", "clip", "consistency", "control", "distillation", "docs",
    "emoji", "guide", "lossless", "mutations", "pictures_tool", "printed", "published", "recipes", "resume", "runs", "scale", "students", "systems", "training", "types", "unified",
)  # fmt: skip


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="leave out the tests that take long")


def pytest_ignore_collect(collection_path, config):
    if config.getoption("--quick"):
        name = collection_path.stem
        return True if name == "gpu" or name.removeprefix("test_") in NOT_QUICK else None
    return None


LONG = (
    "test_resume",
    "07_ddpm",
    "test_docs",
    "16_vdm",
    "09_score",
    "08_metrics",
    "18_consistency",
    "15_analytic",
    "10_sde",
    "11_ddim",
    "28_runs",
)


def pytest_collection_modifyitems(items):
    "Files that take long come first: at the end they would keep one of two workers waiting. A cleaned cell counts as run."
    files = list(dict.fromkeys(item.path for item in items))
    place = {p: next((i for i, name in enumerate(LONG) if name in p.name), len(LONG)) for p in files}
    items.sort(key=lambda item: (place[item.path], files.index(item.path)))
    for item in items:
        if isinstance(item, IPyNbCell):
            item.__class__, item.output_timeout = Cell, 600
            # nbdev-clean nulls the count, and nbval takes such a cell for one that was never run.
            item.cell.execution_count = item.cell.execution_count or 0
            if EVAL_FALSE.search(item.cell.source):
                item.add_marker(pytest.mark.skip(reason="#| eval: false"))


def pytest_terminal_summary(terminalreporter):
    "What took longest, file by file: its tests, cells, kernel and fixtures together."
    seconds = Counter()
    for report in (r for reports in terminalreporter.stats.values() for r in reports if hasattr(r, "duration")):
        seconds[report.nodeid.split("::")[0]] += report.duration
    if sum(seconds.values()) > 60:
        terminalreporter.section(f"seconds of {len(seconds)} files, {sum(seconds.values()):.0f} in all")
        for name, s in seconds.most_common(25):
            terminalreporter.write_line(f"{s:7.0f}  {name}")
