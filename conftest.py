"""How the notebooks are compared with their stored outputs (nbval)."""

import os
import re

import pytest
from nbval.kernel import RunningKernel
from nbval.plugin import IPyNbCell

# One thread, so that sums are added in one order, and two workers fit two cores. Kernels inherit all of these.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
}
# The stored outputs are those of settings.ini as it stands.
for name in ("DIFFUSION_NB_PROFILE", "DIFFUSION_NB_SET"):
    os.environ.pop(name, None)

EVAL_FALSE = re.compile(r"^#\s*\|\s*eval\s*:\s*false\s*$", re.MULTILINE | re.IGNORECASE)
WIDGET = "application/vnd.jupyter.widget-view+json"
PICTURES = ("image/png", "image/jpeg", "image/svg+xml", "image/gif")
DIFFERS = {
    r" at 0x[0-9a-f]+": "",  # nbdev-clean drops addresses from what is stored
    r"data:image/[^\"']*": "",
    r"[0-9a-f]{32}": "",  # the names that matplotlib gives to animations
}


def without_widgets(outputs):
    return [out for out in outputs if WIDGET not in out.get("data", {})]


class Cell(IPyNbCell):
    "A notebook cell whose progress bars, warnings and pictures may differ from the stored ones."

    def compare_outputs(self, test, ref, skip_compare=None):
        self.parent.sanitize_patterns |= DIFFERS
        skip_compare = (*(skip_compare or self.parent.skip_compare), "stderr", *PICTURES)
        return super().compare_outputs(without_widgets(test), without_widgets(ref), skip_compare)


def execute_cell_input(kernel, source, allow_stdin=None):
    "As Jupyter runs a cell: IPython hides the value of a line that ends in ';' only where history is kept."
    return kernel.kc.execute(source, store_history=True, allow_stdin=allow_stdin, stop_on_error=False)


RunningKernel.execute_cell_input = execute_cell_input


def pytest_collection_modifyitems(items):
    for item in items:
        if isinstance(item, IPyNbCell):
            item.__class__ = Cell
            # nbdev-clean nulls the count, and nbval takes such a cell for one that was never run.
            item.cell.execution_count = item.cell.execution_count or 0
            if EVAL_FALSE.search(item.cell.source):
                item.add_marker(pytest.mark.skip(reason="#| eval: false"))
