"""Shows on the API page what stands beside each parameter: a comment with shape and unit, and the result's."""
import inspect
import re
from typing import get_args

from fastcore.docments import docments

MODULES = re.compile(r"(\w+\.)+(?=[A-Za-z])")


def parameters(app, what, name, obj, options, lines):
    """Adds numpydoc sections for parameters and result, read from the comments in an object's source."""
    if what not in ("function", "class", "method") or (what == "class" and issubclass(obj, Exception)):
        return
    comments = docments(obj, full=True)
    returned = comments.pop("return", None)
    rows = [(n, c) for n, c in comments.items() if n != "self" and c.get("docment")]
    section = []
    if rows:
        section += ["", "Parameters", "----------"]
        for n, c in rows:
            section += [n, f"    {literal(c.anno)}{c.docment}"]
    if returned and returned.get("docment"):
        section += ["", "Returns", "-------", literal(returned.anno).rstrip(": "), f"    {returned.docment}"]
    # a summary and its details come first, what it raises last
    at = next((i for i, line in enumerate(lines) if line.strip() == "Raises"), len(lines))
    lines[at:at] = section + [""]
    lines[:] = [re.sub(r"(?<!`)`([^`]*--[^`]*)`(?!`)", r"``\1``", line) for line in lines]   # --json, and no dash


def literal(annotation):
    """An annotation as code without the modules' names, for example ``Tensor``, and a colon."""
    if annotation is inspect.Parameter.empty:
        return ""
    name = annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation).replace("'", "")   # of classes that come later
    return f"``{MODULES.sub('', name)}``: "


def no_method(app, what, name, obj, skip, options):
    """Leaves out a dataclass' field whose default is a function: it is a parameter, and no method of that name."""
    return True if inspect.isfunction(obj) and obj.__name__ not in (name, "<lambda>") else None


def named_defaults(app, what, name, obj, options, signature, returns):
    """Names functions and classes that are defaults of a dataclass, where `autodoc_preserve_defaults` does not reach."""
    return signature and re.sub(r"<(?:function|class) '?(?:\w+\.)*(\w+)'?>", r"\1", signature), returns


def setup(app):
    """Runs before napoleon, which turns the sections into fields."""
    app.connect("autodoc-process-docstring", parameters, priority=400)
    app.connect("autodoc-skip-member", no_method)
    app.connect("autodoc-process-signature", named_defaults)
    return {"parallel_read_safe": True}
