"""How Sphinx makes the web pages. tools/pages.py prepares the folder that this file is run in."""

import shutil
from importlib.util import find_spec
from pathlib import Path

project = "diffusion_nb"
author = copyright = "the diffusion_nb authors"
extensions = ["myst_nb", "sphinx.ext.mathjax"]
root_doc = "index"

nb_execution_mode = "off"  # the pages show what is stored
nb_mime_priority_overrides = [("html", "image/gif", 25)]
nb_ipywidgets_js = {}
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4

html_theme = "furo"
html_title = "diffusion_nb"
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_show_sourcelink = html_copy_source = False
pygments_style, pygments_dark_style = "friendly", "monokai"

# MathJax and its fonts lie beside the pages: nothing is fetched.
mathjax_path = "mathjax/tex-chtml.js"
mathjax3_config = {"options": {"enableMenu": False}}


def add_mathjax(app, problem):
    bundle = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static/mathjax"
    for part in ("tex-chtml.js", "output/chtml/fonts/woff-v2"):
        place = Path(app.outdir) / "_static/mathjax" / part
        place.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (bundle / part).is_dir() else shutil.copy)(bundle / part, place)


def setup(app):
    app.set_html_assets_policy("always")  # MathJax on every page: Sphinx does not know of the ledger's formulas
    app.connect("build-finished", add_mathjax)
