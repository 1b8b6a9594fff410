"""What the outputs of a notebook depend on, and which of them are not part of the book."""

WIDGET = "application/vnd.jupyter.widget-view+json"
SURROUNDINGS = {"PYTHONHASHSEED": "0", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}  # of a kernel


def without_widgets(outputs):
    "The outputs without progress bars and other widgets."
    return [out for out in outputs if WIDGET not in out.get("data", {})]
