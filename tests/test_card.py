"""The reproduction card: complete, computed from the rows that are there, and every command and link on it exists."""
import ast
import re
from pathlib import Path

import nbformat
import pytest

import chapters
from april_nb import runner
from april_nb.experiments import EXPERIMENTS, TRAININGS
from april_nb.runner import read_rows

ROOT = Path(__file__).resolve().parent.parent
CARD = ROOT / "nbs" / "29_reproduction_card.ipynb"

# what the paper numbers
NUMBERED = {"Eq.": 12, "Fig.": 8, "Table": 1, "Theorem": 2, "Algorithm": 2}


def made(monkeypatch, read=read_rows):
    """The names that the card's cells define, and the tables that they end in, with rows as `read` reads them."""
    monkeypatch.chdir(ROOT / "nbs")
    monkeypatch.setattr(runner, "read_rows", read)
    names, shown = {"__name__": "card"}, []
    for cell in nbformat.read(CARD, 4).cells:
        if cell.cell_type != "code": continue
        _, source = chapters.split(cell.source)
        body = ast.parse(source).body
        last = body.pop().value if isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), "card", "exec"), names)
        value = eval(compile(ast.Expression(last), "card", "eval"), names) if last else None
        if hasattr(value, "_repr_markdown_"): shown.append(value._repr_markdown_())
    return names, shown


@pytest.fixture
def card(monkeypatch):
    return made(monkeypatch)


def test_the_stored_tables_are_what_the_rows_say_now(card):
    stored = ["".join(output.data["text/markdown"]) for cell in nbformat.read(CARD, 4).cells if cell.cell_type == "code"
              for output in cell.outputs if "text/markdown" in output.get("data", {})]
    assert stored == card[1], "execute the card again"


def test_what_is_ours_moves_with_the_rows(card, monkeypatch):
    def other(path):
        moved = dict(psnr=lambda v: 1.3 * v, mse=lambda v: 3 * v, accuracy=lambda v: 0.9 * v, epsilon=lambda v: 2 * v,
                     verdict=lambda v: "unknown")
        return [row | {k: f(row[k]) for k, f in moved.items() if k in row} for row in read_rows(path)]
    for entry, changed in zip(card[0]["CARD"], made(monkeypatch, other)[0]["CARD"], strict=True):
        if entry.made_by.startswith("test_") or entry.verdict == "not tested": continue
        assert entry.ours != changed.ours and entry.n == changed.n, entry


def test_every_n_device_and_time_comes_from_the_rows(card, monkeypatch):
    def twice(path):
        rows = [row | {"device": "abacus"} for row in read_rows(path)]
        if not {"image_id", "loss"} <= set(rows[0]): return rows + [row | {"seed": row.get("seed", 0) + 1000} for row in rows]
        return rows + [row | {"image_id": row["image_id"] + 10 ** 6, "loss": row["loss"] + 1e3} for row in rows]
    before, after = card[0], made(monkeypatch, twice)[0]
    for entry, changed in zip(before["CARD"], after["CARD"], strict=True):
        n = [[int(v) for v in re.findall(r"\d+", e.n)] for e in (entry, changed)]
        assert n[1] == [2 * v for v in n[0]] and bool(n[0]) != (entry.n == "–"), entry
        assert bool(n[0]) != entry.made_by.startswith("test_"), entry
    for (name, _, rows, device, time, _), changed in zip(before["COMMANDS"], after["COMMANDS"], strict=True):
        if name.startswith("test_"): continue
        assert changed[2] == 2 * rows and changed[3] == "abacus" != device
        assert float(changed[4].split()[0]) == pytest.approx(2 * float(time.split()[0]), rel=0.1, abs=0.2)


def test_every_figure_table_equation_theorem_and_algorithm_is_on_the_card(card):
    places = " ".join(f"{e.where} {e.claim}" for e in card[0]["CARD"])
    for kind, last in NUMBERED.items():
        found = set()
        for first, to in re.findall(rf"{re.escape(kind)} (\d+)(?:–(\d+))?", places): found |= set(range(int(first), int(to or first) + 1))
        assert found == set(range(1, last + 1)), kind


def test_every_claim_of_the_second_abstract_and_every_contribution_is_on_the_card(card):
    places = [e.where for e in card[0]["CARD"]]
    assert [f"Claim {i}" for i in range(1, 6)] == [w for w in places if w.startswith("Claim")]
    for i in range(1, 5): assert any(f"ontribution {i}" in w for w in places), i


def test_every_command_is_a_known_experiment_or_test_and_every_chapter_exists(card):
    for name, command, *_ in card[0]["COMMANDS"]:
        for run in re.findall(r"`([^`]+)`", command):
            test = re.fullmatch(r"python -m pytest (tests/\w+\.py)", run)
            if test: assert (ROOT / test[1]).exists(), run
            else:
                assert re.fullmatch(rf"april run {name} --preset paper( --[a-z]+ \w+)*", run), run
                assert name in EXPERIMENTS | TRAININGS, run
    assert {e.made_by for e in card[0]["CARD"]} == {name for name, *_ in card[0]["COMMANDS"]}
    for e in card[0]["CARD"]: assert (ROOT / "nbs" / f"{e.chapter}.ipynb").exists(), e


def test_the_card_is_in_the_book():
    assert "nbs/29_reproduction_card" in (ROOT / "_toc.yml").read_text(encoding="utf-8")
