"""How Sphinx makes the web pages. tools/pages.py prepares the folder that this file is run in."""

import re
import shutil
from importlib.util import find_spec
from pathlib import Path

from docutils.nodes import raw

import diffusion_nb.book  # noqa: F401  (it makes nbformat quick)

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
html_favicon = "_static/icon.svg"
html_css_files = ["book.css"]
html_js_files = [("book.js", {"defer": "defer"})]
html_show_sourcelink = html_copy_source = False
pygments_style, pygments_dark_style = (
    "a11y-high-contrast-light",
    "monokai",
)  # legible, as tests/test_browser.py asks

# MathJax and its fonts lie beside the pages: nothing is fetched.
mathjax_path = "mathjax/tex-chtml.js"
mathjax3_config = {"options": {"enableMenu": False}}


def add_mathjax(app, problem):
    bundle = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static/mathjax"
    for part in ("tex-chtml.js", "output/chtml/fonts/woff-v2"):
        place = Path(app.outdir) / "_static/mathjax" / part
        place.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (bundle / part).is_dir() else shutil.copy)(bundle / part, place)


def sidebar(app, page, template, context, doctree):
    "The sidebar lists the same pages everywhere: Sphinx makes it once, and each page puts its own addresses into it."
    if not hasattr(app, "sidebar"):
        whole = dict(collapse=False, titles_only=True, maxdepth=-1, includehidden=True)
        app.sidebar = app.builder._get_local_toctree(root_doc, **whole)
    context["toctree"] = lambda **_: app.sidebar.replace('href="', f'href="{"../" * page.count("/")}')


def here(app, page, template, context, doctree):
    "Marks this page in the sidebar."
    entry = f'<a class="reference internal" href="{"../" * page.count("/")}{page}.html">'
    tree, marked = (
        context["furo_navigation_tree"],
        ' class="toctree-l1 current current-page"><a class="current reference internal" href="#">',
    )
    context["furo_navigation_tree"] = tree.replace(f' class="toctree-l1">{entry}', marked)


def objects(app, doctree):
    "The functions and classes of the library, for objects.inv and for the search: tools/pages.py has written where each is."
    for node in doctree.findall(raw):
        for name, kind in re.findall(r'<div id="([\w.]+)" class="py-(\w+)">', node.astext()):
            app.env.get_domain("py").note_object(name, kind, name)


def setup(app):
    app.connect("doctree-read", objects)
    app.connect("html-page-context", sidebar, priority=100)  # furo's own comes at 500
    app.connect("html-page-context", here, priority=900)
    app.set_html_assets_policy("always")  # MathJax on every page: Sphinx does not know of the ledger's formulas
    app.connect("build-finished", add_mathjax)
