"""The reader's road: short to the first leak, no chapter too long, every chapter on it, no button that leads nowhere."""
import csv
import re
import types
from pathlib import Path

import nbformat
import pytest

import chapters
import published

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
TOC = (ROOT / "_toc.yml").read_text(encoding="utf-8")
ORDER = re.findall(r"nbs/(\w+)", TOC)


def prose(chapter):
    return " ".join(c.source for c in nbformat.read(ROOT / "nbs" / f"{chapter}.ipynb", 4).cells if c.cell_type == "markdown")


def test_every_chapter_is_on_the_road_once():
    assert sorted(ORDER) == [p.stem for p in NOTEBOOKS]


def test_the_first_leak_comes_within_fifteen_minutes_of_reading():
    to_the_leak = ORDER[:ORDER.index("06_linear") + 1]
    assert to_the_leak == ["00_front_page", "01_federated", "06_linear"]
    words = sum(len(re.findall(r"\w+", prose(c))) for c in to_the_leak)
    assert words / 220 < 15   # words that a reader takes in a minute


@pytest.mark.parametrize("chapter", ORDER)
def test_no_chapter_has_more_than_6000_words(chapter):
    assert len(prose(chapter).split()) < 6000


def test_certificates_come_after_the_first_closed_form_and_the_engine_is_a_tool():
    at = ORDER.index
    assert at("10_closed_form") < at("07_certificate") < at("11_when_it_works")
    assert at("32_algorithm2") < at("12_labels") < at("14_optimization")
    tools = re.findall(r"nbs/(\w+)", TOC.split("caption: Tools")[1].split("caption: Back")[0])
    assert {"03_views", "04_data", "05_metrics", "13_matching"} <= set(tools)


def test_the_attack_of_algorithm_2_has_no_more_than_fifteen_lines():
    cell = next(c.source for c in nbformat.read(ROOT / "nbs" / "32_algorithm2.ipynb", 4).cells if c.source.startswith("def algorithm_2"))
    assert len(cell.splitlines()) <= 15


def test_the_readme_is_no_longer_than_two_screens():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 90


def test_times_are_those_of_chapters_that_exist_and_say_what_they_ran_on():
    rows = chapters.times()
    assert rows and len({(r["chapter"], r["preset"]) for r in rows}) == len(rows)
    for r in rows:
        assert r["chapter"] in ORDER and int(r["seconds"]) >= 0 and r["preset"] in ("quick", "paper")
        assert all(r[column] for column in ("data", "threads", "device", "machine", "python", "torch", "day"))


def test_a_page_says_how_long_its_stored_run_took(tmp_path, monkeypatch):
    monkeypatch.setattr(chapters, "TIMES", tmp_path / "chapters.csv")
    text = (ROOT / "nbs" / "06_linear.ipynb").read_text(encoding="utf-8")
    source = [text]
    chapters.cost(None, "nbs/06_linear", source)
    assert source == [text]   # nothing is said that was not measured
    row = dict(chapter="06_linear", preset="paper", seconds="7", threads="1", device="cpu", torch="9.9.9+x")
    with open(chapters.TIMES, "w", newline="") as file:
        table = csv.DictWriter(file, list(row))
        table.writeheader(), table.writerow(row)
    chapters.cost(None, "nbs/06_linear", source)
    first = nbformat.reads(source[0], 4).cells[0].source.split("\n")
    assert first[4].startswith("*") and first[6].startswith("*Last run as stored here: 7 s, 1 thread of cpu, torch 9.9.9 ")


@pytest.mark.parametrize("url, shown", [("", False), ("https://example.org/book", True)])
def test_buttons_appear_with_the_address_and_not_before(url, shown):
    config = types.SimpleNamespace(html_theme_options={"repository_url": url})
    published.switch_on(None, config)
    assert config.html_theme_options.get("use_issues_button", False) is shown
    assert ("launch_buttons" in config.html_theme_options) is shown


def test_the_address_stands_in_one_place():
    assert re.search(r"^repository:.*\n  url: \"\"", (ROOT / "_config.yml").read_text(encoding="utf-8"), re.M)
