"""How a chapter's notebook is read: the one reader behind the book, the notebook tests and `make notebooks`.

nbdev's `#|` lines are instructions, not text. They are taken off a cell's source and turned into what
Jupyter Book and the test run understand: tags, captions, alternative text.
"""
import csv
import json
import re
from base64 import b64encode
from pathlib import Path

import matplotlib
import nbformat
from resvg_py import svg_to_bytes

TIMES = Path(__file__).resolve().parent.parent / "results" / "times" / "chapters.csv"   # tools/execute.py writes it

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"

DIRECTIVE = re.compile(r"^#\|\s*([\w-]+):?\s*(.*?)\s*$")
TAGS = {"hide": "remove-cell", "default_exp": "remove-cell", "code-fold": "hide-input", "eval": "skip-execution"}


def split(source):
    """The `#|` lines at the top of a cell as a dictionary, and the source below them."""
    directives, lines = {}, source.split("\n")
    while lines and (match := DIRECTIVE.match(lines[0])):
        directives[match[1]] = match[2]
        lines.pop(0)
    return directives, "\n".join(lines)


def mark(cell):
    """Turns a code cell's directives into tags and figure metadata, in place."""
    directives, cell.source = split(cell.source)
    tags = cell.metadata.setdefault("tags", [])
    tags += [TAGS[name] for name in directives if name in TAGS]
    if "label" in directives:
        cell.metadata["mystnb"] = {
            "figure": {"name": directives["label"], "caption": directives["fig-cap"]},
            "image": {"alt": directives["fig-alt"]},
        }


def keep_together(cell):
    """Ties in a cell's tables, in place, what a browser would break: 1e-07 behind its hyphen, short numbers at a space."""
    for output in cell.outputs:
        if table := output.get("data", {}).get("text/markdown"):
            head, *rows = re.sub(r"(?<=\de)-(?=\d)", "\N{NON-BREAKING HYPHEN}", table).split("\n")
            tied = [re.sub(r"(?<=\| )[^|]*\d[^|]*(?= \|)", lambda entry: short(entry[0]), row) for row in rows]
            output.data["text/markdown"] = "\n".join([head, *tied])


def short(entry):
    """Itself, without a space to break at if it has at most as many characters as a narrow column has room for."""
    return entry.replace(" ", "\N{NO-BREAK SPACE}") if len(entry) <= 18 and "`" not in entry else entry


def add_picture(cell):
    """Puts a picture beside a cell's drawing, in place: paper cannot show SVG."""
    for output in cell.outputs:
        data = output.get("data", {})
        if "image/png" in data or not (drawing := re.search("<svg.*?</svg>", data.get("text/html", ""), re.S)): continue
        svg = drawing[0].replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace('"inherit"', '"DejaVu Sans"')
        data["image/png"] = b64encode(svg_to_bytes(svg_string=svg, width=1400, font_dirs=[str(FONTS)], background="white")).decode()


MATHS = r'<span class="math notranslate nohighlight">[^<]*</span>'


def tie(app, pagename, templatename, context, doctree):
    """Keeps a formula on a line with the marks around it, and the space before a link out of the link."""
    body = re.sub(rf"[(\[]*{MATHS}[.,;:!?)\]’]+s?|[(\[]+{MATHS}", r'<span class="tied">\g<0></span>', context.get("body", ""))
    context["body"] = re.sub(r'(<a class="reference internal" href="[^"]*">) ', r" \1", body)


def read(text):
    """A notebook from its JSON text, with directives applied; myst-nb calls this for every chapter."""
    notebook = nbformat.reads(text, as_version=4)
    for above, cell in zip([None, *notebook.cells], notebook.cells):
        if cell.cell_type == "code":
            mark(cell)
            keep_together(cell)
            add_picture(cell)
            if ends_in_solution(above): cell.metadata.tags.append("hide-cell")
    return notebook


def ends_in_solution(cell):
    """Does a solution close a cell? The code below it is the rest of the solution, and no reader should meet it first."""
    blocks = re.findall(r"^:::\{(\w+)\}", cell.source, re.M) if cell and cell.cell_type == "markdown" else []
    return blocks[-1:] == ["solution"] and cell.source.rstrip().endswith(":::")


def runnable(notebook):
    """The code cells that a test run executes."""
    return [c for c in notebook.cells if c.cell_type == "code" and "skip-execution" not in c.metadata.get("tags", [])]


def times():
    """The runs that `tools/execute.py` has noted: a dictionary for each chapter and size."""
    if not TIMES.exists(): return []
    with open(TIMES, newline="", encoding="utf-8") as file: return list(csv.DictReader(file))


def cost(app, docname, source):
    """Says below a chapter's opening how long its stored outputs took, as it was measured."""
    run = next((r for r in times() if f"nbs/{r['chapter']}" == docname and r["preset"] == "paper"), None)
    if run is None: return
    notebook = json.loads(source[0])
    lines = "".join(notebook["cells"][0]["source"]).split("\n")
    size = int(run["seconds"])
    lines[5:5] = ["", f"*Last run as stored here: {size} s, {run['threads']} thread{'s' * (run['threads'] != '1')} of {run['device']}, "
                      f"torch {run['torch'].partition('+')[0]} ([how to run](33_how_to_run.ipynb)).*"]
    notebook["cells"][0]["source"] = "\n".join(lines)
    source[0] = json.dumps(notebook)


def setup(app):
    """Makes this module a Sphinx extension; myst-nb finds `read` through `nb_custom_formats`."""
    app.connect("source-read", cost)
    app.connect("html-page-context", tie)
    return {"parallel_read_safe": True}
