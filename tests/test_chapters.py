"""How a stored notebook becomes a page: what a browser must not break, and what a reader must not meet first."""
from types import SimpleNamespace

import nbformat
import nbformat.v4 as v4

import chapters

SOLVED = ":::{exercise}\n:label: ex-a\nWhy?\n:::\n\n:::{solution} ex-a\n:class: dropdown\nSee below.\n:::\n"


def page_of(*cells):
    return chapters.read(nbformat.writes(v4.new_notebook(cells=list(cells)))).cells


def test_code_that_ends_a_solution_is_folded_and_no_other():
    cells = page_of(v4.new_code_cell("0"), v4.new_markdown_cell(SOLVED), v4.new_code_cell("1"), v4.new_code_cell("2"),
                    v4.new_markdown_cell(SOLVED + "\nOn with the text."), v4.new_code_cell("3"))
    assert [c.source for c in cells if "hide-cell" in c.metadata.get("tags", [])] == ["1"]


def test_a_formula_keeps_its_marks_on_its_line():
    formula = '<span class="math notranslate nohighlight">x</span>'
    for body in (f"({formula}),", f"{formula}’s", f"{formula}."):
        context = {"body": f"so {body} on"}
        chapters.tie(None, "", "", context, None)
        assert context["body"] == f'so <span class="tied">{body}</span> on'


def test_short_numbers_of_a_table_stay_whole_and_long_texts_break():
    table = v4.new_output("display_data", {"text/markdown": "| a |\n| --- |\n| 1e-07 to 3 |\n| a text of more than 18 characters |"})
    cell = SimpleNamespace(outputs=[table])
    chapters.keep_together(cell)
    *_, short, long = table.data["text/markdown"].split("\n")
    assert short == "| 1e\N{NON-BREAKING HYPHEN}07\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}3 |" and long.count("\N{NO-BREAK SPACE}") == 0
