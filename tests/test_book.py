"""The built book: without a warning, readable offline, every picture described, every formula set."""
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

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
        self.images, self.loaded, self.text = [], [], path.read_text()
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
        text = (book / "nbs" / f"{chapter}.html").read_text()
        assert f"<td><p>{entry}</p></td>" in text and "| --- |" not in text, chapter


def test_api_page_shows_what_stands_beside_the_parameters(book):
    text = re.sub(r"<[^>]+>", "", (book / "back" / "api.html").read_text())
    assert "shape (B, channels, H, W), normalised" in text and "closed_form" in text and "MissingGradient" in text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("page", ["nbs/08_attention", "nbs/10_closed_form", "back/notation"])
def test_a_real_browser_sets_every_formula(book, page, tmp_path):
    run = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
                          f"--user-data-dir={tmp_path}", "--virtual-time-budget=20000", "--dump-dom", f"file://{book}/{page}.html"],
                         capture_output=True, text=True, timeout=120)
    body = run.stdout[run.stdout.index("<body"):]
    text = re.sub(r"<(script|style|mjx-assistive-mml)[^>]*>.*?</\1>", "", body, flags=re.S)
    assert text.count("<mjx-container") > 20
    assert not re.search(r"\\\(|\\\[|\\begin\{|merror", text)
