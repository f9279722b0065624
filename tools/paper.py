"""What the PDF needs and a browser does not: columns as wide as their words, tables that break across pages, plain proofs."""
import re

from docutils import nodes
from sphinx_proof.nodes import proof_node

LINE, LONG = 105, 12   # characters of a line in a table's type, rows of a table that may not fit on a page


def columns(table):
    """A width for each column: room for its longest word, and a share of what is left by how much more its longest entry has."""
    entries = [[entry.astext() for entry in row.findall(nodes.entry)] for row in table.findall(nodes.row)]
    words = [max(len(word) for text in column for word in re.split(r"[ \n]+", text)) + 2 for column in zip(*entries)]
    wishes = [max(map(len, column)) + 2 - word for column, word in zip(zip(*entries), words)]
    left = max(LINE - sum(words), 0) / max(sum(wishes), 1)
    return [max(1, round(word + wish * left)) for word, wish in zip(words, wishes)]


def fit(app, doctree, docname):
    """Gives tables their columns, proofs their text without a box, and the first chapter its heading."""
    if app.builder.name != "latex": return
    for table in doctree.findall(nodes.table):
        for spec, width in zip(table.findall(nodes.colspec), columns(table)): spec["colwidth"] = width
        table["classes"] += ["colwidths-given"] + ["longtable"] * (len(list(table.findall(nodes.row))) > LONG)
    first = next(doctree.findall(nodes.section))   # its heading goes to the title page, and it would begin without one
    heading = f"\\chapter*{{{first[0].astext()}}}\\addcontentsline{{toc}}{{chapter}}{{{first[0].astext()}}}"
    first.insert(1, nodes.raw("", heading, format="latex"))
    for proof in list(doctree.findall(proof_node)): proof.replace_self(nodes.container("", *proof.children))


def setup(app):
    """Makes this module a Sphinx extension."""
    app.connect("doctree-resolved", fit)
    return {"parallel_read_safe": True}
