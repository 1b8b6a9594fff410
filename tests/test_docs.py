"""The web pages: all there, all links hold, nothing is fetched from elsewhere; and the build says so when not."""

import re
import shutil
import subprocess
import sys
import tomllib
from html import unescape
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import parity  # noqa: E402
from pages import Page, broken  # noqa: E402

from diffusion_nb.book.folds import folds  # noqa: E402
from diffusion_nb.book.pictures import alt_texts, with_alt_texts  # noqa: E402
from diffusion_nb.book.run import web_page  # noqa: E402


def build(root, out):
    words = [sys.executable, ROOT / "tools/pages.py", "--root", root, "--out", out]
    return subprocess.run(words, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT, out)
    assert done.returncode == 0, done.stderr
    return out


def test_all_links_hold_and_nothing_is_fetched(site):
    assert list(broken(site)) == []
    assert len(list(site.rglob("*.html"))) > 20


def test_each_comparison_names_a_test_that_is_there_or_a_choice():
    rows = parity.rows()
    assert parity.missing() == [] and len(rows) == len({(r.programs, r.what) for r in rows}) >= 85
    assert all(r.choice or r.held.count("::") == 1 for r in rows)


def test_the_page_of_comparisons_has_a_row_for_each(site):
    html = (site / "parity.html").read_text(encoding="utf-8")
    assert html.count("<tr") == 1 + len(parity.rows()) and "NVlabs/edm" in html


def test_every_notebook_and_module_has_its_page(site):
    for path in (ROOT / "nbs").glob("*.ipynb"):
        assert (site / f"{path.stem}.html").exists(), path.stem
    for path in (ROOT / "diffusion_nb").rglob("[!_]*.py"):
        name = ".".join(path.relative_to(ROOT / "diffusion_nb").with_suffix("").parts)
        assert (site / f"api/{name}.html").exists(), name


def test_pages_say_where_to_run_them(site):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    colab = project.replace("https://github.com", "https://colab.research.google.com/github")
    links = Page((site / "03_posterior.html").read_text()).links
    assert f"{colab}/blob/main/nbs/03_posterior.ipynb" in links and "running.html" in links


def test_pictures_say_what_they_show_where_they_cannot_be_seen(site):
    page = (site / "07_ddpm.html").read_text(encoding="utf-8")
    shown = re.findall(r'<img alt="([^"]*)"', page)
    assert "drawn by the network that was trained above" in shown and all(map(len, shown)) and len(shown) > 6


def test_every_picture_says_what_it_shows(site):
    for path in site.glob("*.html"):
        for tag in re.findall(r"<img [^>]*>", path.read_text(encoding="utf-8")):
            alt = unescape(re.search(r'alt="([^"]*)"', tag)[1])
            assert len(alt) > 8 and not re.search(r"\.png|No description", alt), f"{path.name}: {tag[:200]}"


def test_pictures_open_in_full_size(site):
    assert any(src.startswith("_static/book.js") for src in Page((site / "07_ddpm.html").read_text()).fetched)
    assert (site / "_static/book.js").exists()


def test_names_are_found_by_search_index_and_other_projects(site):
    import zlib

    inventory = (site / "objects.inv").read_bytes()
    names = zlib.decompress(inventory.split(b"zlib.\n")[1]).decode()
    assert "diffusion_nb.samplers.linear.ddpm py:function 1 api/samplers.linear.html#$" in names
    assert "diffusion_nb.training.trainer.Trainer py:class" in names
    assert re.search(r'"ddpm":', (site / "searchindex.js").read_text(encoding="utf-8").replace("'", '"'))
    index = (site / "genindex.html").read_text(encoding="utf-8")
    assert "ddpm (samplers.linear)" in index and "genindex.html" in Page((site / "index.html").read_text()).links


def test_pages_lead_to_their_source_and_to_their_neighbours(site):
    links = Page((site / "03_posterior.html").read_text()).links
    assert any(link.endswith("/blob/main/nbs/03_posterior.ipynb") for link in links)
    assert {"02_forward.html", "04_denoiser.html", "genindex.html"} <= links
    source = [link for link in Page((site / "api/samplers.linear.html").read_text()).links if "samplers/linear.py#L" in link]  # fmt: skip
    assert len(source) > 5


def test_the_cell_that_fetches_the_library_is_not_shown(site):
    assert not [p.name for p in site.glob("*.html") if "diffusion_nb_book" in p.read_text(encoding="utf-8")]


def test_alternative_texts_are_the_titles_of_pictures():
    cells = [dict(cell_type="markdown", source="# A\n## Noise"),
             dict(cell_type="code", source='ax.set(title=f"{n} draws", xlabel="t")\nax.set_title("a\\nb"); ax.set_title("t")', outputs=[{"data": {"image/png": ""}}]),
             dict(cell_type="code", source="plot()", outputs=[{"text": ""}, {"data": {"image/gif": ""}}, {"data": {"image/png": ""}}])]  # fmt: skip
    found = [(cells.index(cell), text) for cell, text in alt_texts(cells)]
    assert found == [(1, "… draws · t · a b"), (2, "picture of the section “Noise”"), (2, "picture of the section “Noise”")]  # fmt: skip
    none = 'alt="No description has been provided for this image"'
    page = with_alt_texts(f"<img {none}><img alt='x'><img {none}>", cells[1:2])
    assert page == '<img alt="… draws · t · a b"><img alt=\'x\'><img alt="picture">'


def test_ledger_has_a_row_for_every_statement(site):
    ids = Page((site / "ledger.html").read_text()).ids
    assert {entry["id"] for entry in tomllib.loads((ROOT / "claims.toml").read_text())["claim"]} <= ids


def test_signatures_are_readable_and_ids_lead_to_the_ledger(site):
    page = (site / "api/forward.html").read_text()
    assert "Tensor" in page and '"b *d"' in unescape(page) and "&lt;class" not in page
    assert "../ledger.html#DDPM-6/7" in Page(page).links


def test_formulas_are_drawn_by_what_lies_beside_the_pages(site):
    for name in ("03_posterior", "ledger"):
        assert "_static/mathjax/tex-chtml.js" in Page((site / f"{name}.html").read_text()).fetched
    assert len(list((site / "_static/mathjax/output/chtml/fonts/woff-v2").glob("*.woff"))) > 20


# a small book with faults


@pytest.fixture
def book(tmp_path):
    "Call it with the text and the HTML output of its one notebook: (did the build succeed, what was said)."
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for name in ("CONTRIBUTING.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "nbs").mkdir()
    (tmp_path / "diffusion_nb").mkdir()
    (tmp_path / "diffusion_nb/a.py").write_text('# from 01_a.ipynb\ndef f():\n    "One. (X-1)"\n')
    (tmp_path / "claims.toml").write_text(
        '[[claim]]\nid = "X-1"\nsource = "here"\nstatement = "so"\nchecks = ["oracle"]\nnotebook = "02_b"\n'
    )

    def write(name, *cells):
        about = {"kernelspec": {"name": "python3", "display_name": "python3"}}
        nbformat.write(new_notebook(cells=cells, metadata=about), tmp_path / f"nbs/{name}.ipynb")

    def make(text, html=""):
        output = new_output("display_data", {"text/html": html})
        write("index", new_markdown_cell("# Start\n\n[first](01_a.ipynb), [how](../CONTRIBUTING.md)"))
        write("ledger", new_markdown_cell("# The ledger"))
        write(
            "01_a",
            new_markdown_cell(f"# One\n\n{text}\n\n## A: the part's name"),
            new_code_cell("1", outputs=[output]),
        )
        done = build(tmp_path, tmp_path / "_site")
        return done.returncode == 0, done.stdout + done.stderr

    return make


def test_a_sound_book_builds(book):
    text = "[start](index.ipynb), [here](#A:-the-part's-name), [there](01_a.ipynb#A:-the-part's-name), $x_t$, [settings](../settings.ini)"
    good, said = book(text, '<img src="data:image/png;base64,iVBORw0KGgo=">')
    assert good, said


def test_faults_are_named(book):
    text = "[page](07_gone.ipynb), [heading](index.ipynb#gone), {ref}`gone`, ![picture](gone.png), <a href='missing.html'>raw</a>"
    good, said = book(text, '<script src="https://cdn.example.org/x.js"></script><img src="//example.org/y.png">')
    assert not good
    for fault in ("07_gone.ipynb", "'gone'", "undefined label: 'gone'", "image file not readable: gone.png",
                  "links to missing.html, which is not there", "fetches https://cdn.example.org/x.js",
                  "fetches //example.org/y.png"):  # fmt: skip
        assert fault in said, (fault, said)


@pytest.mark.parametrize("html, fault", [
    ('<a href="b.html">', None),
    ('<a href="b.html#here">', None),
    ('<a href="https://example.org/#x">', None),
    ('<a href="b.html#gone">', "a.html links to b.html#gone, which is not there"),
    ('<a href="#gone">', "a.html links to #gone, which is not there"),
    ('<a href="c.html">', "a.html links to c.html, which is not there"),
    ('<iframe src="http://example.org">', "a.html fetches http://example.org"),
    ('<link href="https://example.org/f.css" rel="stylesheet">', "a.html fetches https://example.org/f.css"),
    ('<style>@import "https://example.org/f.css"</style>', "a.html fetches https://example.org/f.css"),
])  # fmt: skip
def test_links_are_checked(tmp_path, html, fault):
    (tmp_path / "a.html").write_text(html)
    (tmp_path / "b.html").write_text('<p id="here">')
    assert list(broken(tmp_path)) == ([fault] if fault else [])


def test_fonts_are_checked(tmp_path):
    (tmp_path / "a.css").write_text('@font-face { src: url("https://example.org/f.woff") }')
    assert list(broken(tmp_path)) == ["a.css fetches https://example.org/f.woff"]


# what is folded


def cells(*sources):
    new = {"#": nbformat.v4.new_markdown_cell, "x": nbformat.v4.new_code_cell}
    return [new[s[0]](s) for s in sources]


def test_a_folded_section_ends_at_the_next_heading():
    book = cells("# A", "## Deeper: b\ntext", "x = 1", "## C", "### Solution\nso", "x = 2")
    assert [tuple(fold) for fold in folds(book)] == [(1, 2, "Deeper: b"), (4, 5, "Solution")]
    assert folds(cells("# A", "## Deep waters", "x")) == []
    with pytest.raises(ValueError, match="a cell of its own"):
        folds(cells("# A\n## Deeper: b"))


def test_pages_fold_boxes_and_the_code_of_diagrams():
    nb = nbformat.v4.new_notebook(cells=cells("# A", "## Deeper: $b$\ntext", "x = 1", "## C", "x = 2"))
    nb.cells[4].metadata["tags"] = ["hide-input"]
    html = web_page(nb)
    first, second = re.findall(r"(?s)<details class=\"fold\"><summary>(.*?)</summary>(.*?)</details>", html)
    assert (
        "Deeper" in first[0]
        and "text" in first[1]
        and first[1].count("jp-CodeCell") == 1
        and ">C<" not in first[1]
    )
    assert second[0] == "the code of this picture" and "2" in second[1]


def test_the_site_has_folds_that_links_find(site):
    folded = [path for path in site.glob("*.html") if '<details class="fold">' in path.read_text(encoding="utf-8")]
    assert folded, "no page folds anything"
    for path in folded:
        html = path.read_text(encoding="utf-8")
        assert html.count('<details class="fold">') <= html.count("</details>")
        assert re.search(r'<details class="fold"><summary id="[\w-]+">', html)


def test_the_readme_counts_the_comparisons():
    rows = parity.rows()
    chosen = sum(row.choice is not None for row in rows)
    said = (
        f"{len(rows)} comparisons on the same inputs, of which {len(rows) - chosen} agree and {chosen} are choices"
    )
    assert said in (ROOT / "README.md").read_text(encoding="utf-8")
