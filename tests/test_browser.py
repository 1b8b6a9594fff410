"""The web pages in a browser, at the widths and in the colours that readers have; skipped where neither Chromium nor Chrome is installed."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import browser

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(browser.program() is None, reason="neither Chromium nor Chrome is installed")
SOME = ("index", "02_forward", "13_guidance", "24_dit", "errata", "ledger", "guide", "cli", "api/samplers.linear")
CONTRAST = """(() => {
  const rgba = (text) => { const v = text.match(/[\\d.]+/g).map(Number); return v.length < 4 ? [...v, 1] : v; };
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255).map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => { for (; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor); if (c[3] > 0.5) return c; } return [255, 255, 255, 1]; };
  const weak = {};
  const walk = document.createTreeWalker(document.querySelector("article"), NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const text = walk.currentNode.textContent.trim(), e = walk.currentNode.parentElement, style = getComputedStyle(e);
    if (!text || !e.checkVisibility({checkVisibilityCSS: true, checkOpacity: true})) continue;
    const [a, b] = [light(rgba(style.color)), light(behind(e))].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
    if (ratio < (parseFloat(style.fontSize) >= 24 ? 3 : 4.5)) weak[e.tagName + "." + e.className + " " + style.color] = ratio.toFixed(1) + " " + text.slice(0, 30);
  }
  return weak;
})()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    site = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, ROOT / "tools/pages.py", "--out", site], check=True, capture_output=True)
    with browser.served(site) as address, browser.browser(tmp_path_factory.mktemp("profile")) as page:
        page.site, page.address = site, address
        yield page


def test_no_page_complains(page):
    "No script fails, nothing is missing."
    page.size(1300)
    for path in sorted(page.site.glob("*.html")):
        page.open(f"{page.address}/{path.name}")
        assert page.errors == [], path.name


@pytest.mark.parametrize("width", [320, 400, 800, 1100, 1300, 1480])
def test_no_page_scrolls_sideways(page, width):
    page.size(width)
    for name in SOME:
        page.open(f"{page.address}/{name}.html")
        beyond = page.run("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert beyond == 0, f"{name} is {beyond} pixels wider than a window of {width}"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(page, scheme):
    "A contrast of 4.5, of large text 3, as the web's guidelines for accessibility ask (level AA)."
    page.size(1300)
    page.scheme(scheme)
    weak = {}
    for name in SOME:
        page.open(f"{page.address}/{name}.html")
        weak |= page.run(CONTRAST)
    assert weak == {}


def test_search_finds_the_sampler(page):
    page.open(f"{page.address}/search.html?q=ddpm")
    assert page.until("document.querySelectorAll('ul.search li').length >= 5")
    assert "samplers.linear" in page.run("document.querySelector('ul.search').textContent")


def test_a_picture_is_enlarged_and_a_box_unfolded_by_keys(page):
    page.size(1300)
    page.open(f"{page.address}/13_guidance.html")
    page.run("document.querySelector('.cell_output img[tabindex]').focus()")
    page.press("Enter")
    assert page.until("document.querySelector('dialog[open] img').alt.length")
    page.run("document.querySelector('dialog').close()")
    assert page.until("document.activeElement.matches('.cell_output img')")
    page.run("document.querySelector('details.fold > summary').focus()")
    page.press("Enter")
    assert page.until("document.querySelector('details.fold').open")


def test_a_slider_moves_by_keys(page):
    page.open(f"{page.address}/13_guidance.html")
    said = "document.querySelector('.frames input').getAttribute('aria-valuetext')"
    page.run("document.querySelector('.frames input').focus()")
    before = page.run(said)
    page.press("ArrowRight")
    assert page.run(said) not in (before, None)


def test_the_first_key_leads_past_the_sidebar(page):
    page.open(f"{page.address}/13_guidance.html")
    page.press("Tab")
    assert page.run("document.activeElement.getAttribute('href')") == "#furo-main-content"
