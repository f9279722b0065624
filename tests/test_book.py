"""The built book: without a warning, readable offline, every picture described, every link ended; then in a browser."""
import re
import shutil
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.xdist_group("book")


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    out = tmp_path_factory.mktemp("book")
    run = subprocess.run([Path(sys.executable).parent / "jupyter-book", "build", ROOT, "--path-output", out, "--all", "-W", "-n",
                          "--keep-going"], capture_output=True, text=True)
    assert run.returncode == 0, (run.stdout + run.stderr)[-5000:]
    return out / "_build" / "html"


class Page(HTMLParser):
    """Images and external resources of a page."""
    def __init__(self, path):
        super().__init__()
        self.images, self.loaded, self.text = [], [], path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "img": self.images.append(attributes)
        if tag in ("script", "img") and attributes.get("src"): self.loaded.append(attributes["src"])
        if tag == "link" and attributes.get("rel") == "stylesheet": self.loaded.append(attributes["href"])


def pages(book):
    return {p.relative_to(book).as_posix(): Page(p) for folder in ("nbs", "back") for p in (book / folder).glob("*.html")}


def test_book_reads_offline(book):
    assert (book / "tex-svg-full.js").stat().st_size > 1_000_000
    for name, page in pages(book).items():
        assert not [src for src in page.loaded if src.startswith(("http:", "https:", "//"))], name


def test_every_picture_is_described(book):
    for name, page in pages(book).items():
        for image in page.images: assert len(image.get("alt", "")) > 10 or "logo" in image.get("class", ""), (name, image)


def test_no_directive_traceback_or_raw_role_is_left_on_a_page(book):
    for name, page in pages(book).items():
        assert not re.search(r"#\|\s*(hide|export|label|default_exp)", page.text), name
        assert "Traceback (most recent call last)" not in page.text and "{eq}`" not in page.text, name


def test_tables_that_a_cell_computes_are_tables(book):
    for chapter, entry in (("10_closed_form", "cifar10"), ("11_when_it_works", "vit_cifar"), ("15_table1", "cifar10")):
        text = (book / "nbs" / f"{chapter}.html").read_text(encoding="utf-8")
        assert f"<td><p>{entry}</p></td>" in text and "| --- |" not in text, chapter


def test_api_page_shows_what_stands_beside_the_parameters(book):
    text = re.sub(r"<[^>]+>", "", (book / "back" / "api.html").read_text(encoding="utf-8"))
    assert "shape (B, channels, H, W), normalised" in text and "closed_form" in text and "MissingGradient" in text


def test_every_internal_link_has_an_end(book):
    ids, lost = {}, []
    for path in book.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        ids[path] = set(re.findall(r'\b(?:id|name)="([^"]+)"', text))
    for path in ids:
        if path.parent.name not in ("nbs", "back"): continue
        for href in re.findall(r'<a\b[^>]*\bhref="([^"]+)"', path.read_text(encoding="utf-8")):
            if re.match(r"[a-z]+:", href): continue
            file, _, anchor = unescape(href).partition("#")
            end = (path.parent / unquote(file)).resolve() if file else path
            if not end.exists() or (anchor and end in ids and unquote(anchor) not in ids[end]): lost.append((path.name, href))
    assert not lost


# What one visit to a page tells, first on a desk by day, then on a phone by night.
LOOK = r"""async () => {
    if (window.MathJax) await MathJax.startup.promise
    const text = document.createElement('div')
    text.append(...[...document.querySelectorAll('article')].map(a => a.cloneNode(true)))
    text.querySelectorAll('script, style, pre, code, mjx-assistive-mml').forEach(e => e.remove())
    const broken = [...document.images].filter(i => i.complete && !i.naturalWidth && i.getClientRects().length)
    return {formulas: document.querySelectorAll('mjx-container').length, errors: document.querySelectorAll('mjx-merror, [data-mml-node=merror]').length,
            raw: /\\\(|\\\[|\\begin\{/.test(text.textContent), broken: broken.map(i => i.src.slice(0, 80))}
}"""
CUT = """() => [...document.querySelectorAll('article mjx-container')]
    .filter(e => e.getBoundingClientRect().right > e.parentElement.getBoundingClientRect().right + 1).map(e => e.textContent.slice(0, 40))"""
SHADE = r"""() => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('article p')).color]
    .map(c => c.match(/[\d.]+/g).slice(0, 3).reduce((sum, v) => sum + Number(v), 0) / 765)"""


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None: pytest.skip("no Chromium on this machine: install it, or let .ci/run do so")
    sync_api = pytest.importorskip("playwright.sync_api", reason="no Playwright: install the extra `dev`")
    with sync_api.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(book, browser):
    """Opens a page by its name, and says what the console and the network saw."""
    context = browser.new_context(viewport={"width": 1400, "height": 900}, color_scheme="light")
    def open_page(name):
        page, seen = context.new_page(), []
        page.on("console", lambda m: m.type in ("error", "warning") and seen.append(m.text))
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on("request", lambda r: r.url.startswith(("file:", "data:", "blob:")) or seen.append(r.url))
        page.goto(f"file://{book}/{name}")
        return page, seen
    yield open_page
    context.close()


def test_in_a_browser_every_page_is_quiet_set_narrow_light_and_dark(book, opened):
    faults, formulas = [], 0
    for name in pages(book):
        page, seen = opened(name)
        told = page.evaluate(LOOK)
        formulas += told["formulas"]
        if seen or told["errors"] or told["raw"] or told["broken"]: faults.append((name, seen, told))
        paper, ink = page.evaluate(SHADE)
        page.emulate_media(color_scheme="dark")
        page.wait_for_function("document.documentElement.dataset.theme == 'dark'", timeout=10_000)
        night, chalk = page.evaluate(SHADE)
        if not (paper > 0.8 > 0.4 > ink and night < 0.3 < 0.6 < chalk): faults.append((name, "colours", paper, ink, night, chalk))
        page.set_viewport_size({"width": 390, "height": 844})
        if (wide := page.evaluate("document.documentElement.scrollWidth")) > 390: faults.append((name, "wide", wide))
        if cut := page.evaluate(CUT): faults.append((name, "cut", cut))
        page.close()
    assert not faults
    assert formulas > 300


def test_in_a_browser_arrow_keys_move_every_slider(book, opened):
    moved = set()
    for name in (n for n, page in pages(book).items() if 'class="moving"' in page.text):
        page, _ = opened(name)
        for slider in page.locator(".moving input[type=range]").all():
            frames = slider.locator("xpath=..").locator(".frame")
            shown = lambda frames=frames: [i for i in range(frames.count()) if frames.nth(i).is_visible()]
            first = int(slider.input_value())
            key, then = ("ArrowRight", first + 1) if first + 1 < frames.count() else ("ArrowLeft", first - 1)
            assert frames.count() > 1 and shown() == [first], name
            slider.press(key)
            assert shown() == [then] and slider.get_attribute("aria-valuetext") == frames.nth(then).get_attribute("title"), name
            moved.add(slider.get_attribute("aria-label"))
        for picture in page.locator(".moving:has(.patches)").all():
            picture.locator("button").nth(1).hover()
            assert picture.locator(".frame").nth(1).is_visible() and not picture.locator(".frame").nth(0).is_visible(), name
    assert {"hidden width C", "step", "images in the batch", "noise r"} <= moved


def test_in_a_browser_the_search_finds_theorem_5(opened):
    page, _ = opened("search.html?q=Theorem+5")
    page.locator("#search-results li a").first.wait_for(timeout=20_000)
    assert any("Theorem 5" in title for title in page.locator("#search-results li a").all_inner_texts())
