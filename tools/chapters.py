"""How a chapter's notebook is read: the one reader behind the book, the notebook tests and `make notebooks`.

nbdev's `#|` lines are instructions, not text. They are taken off a cell's source and turned into what
Jupyter Book and the test run understand: tags, captions, alternative text.
"""
import re

import nbformat

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


def read(text):
    """A notebook from its JSON text, with directives applied; myst-nb calls this for every chapter."""
    notebook = nbformat.reads(text, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            mark(cell)
    return notebook


def runnable(notebook):
    """The code cells that a test run executes."""
    return [c for c in notebook.cells if c.cell_type == "code" and "skip-execution" not in c.metadata.get("tags", [])]


def setup(app):
    """Makes this module importable as a Sphinx extension; myst-nb finds `read` through `nb_custom_formats`."""
    return {"parallel_read_safe": True}
