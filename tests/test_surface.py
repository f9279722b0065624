"""The package as an importer meets it: names and modules without a line of set-up, loaded when they are used."""
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import april_nb

MODULES = sorted(p.stem for p in Path(april_nb.__file__).parent.glob("[!_]*.py"))


def python(code): return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)


def test_the_bare_import_is_silent_and_light():
    run = python("import sys, april_nb; dir(april_nb); assert 'torch' not in sys.modules; print(april_nb.__doc__)")
    assert (run.returncode, run.stderr) == (0, "") and "attack" in run.stdout


def test_every_module_is_an_attribute_unless_a_function_has_its_name():
    assert MODULES and {*MODULES} <= {*april_nb.__all__}
    for name in MODULES:
        thing = getattr(april_nb, name)
        assert inspect.ismodule(thing) or name == "audit" and inspect.isfunction(thing)
    with pytest.raises(AttributeError, match="nothing"): april_nb.nothing


@pytest.mark.parametrize("first", ["april_nb.audit", "from april_nb.audit import page", "import april_nb.audit", "from april_nb.cli import main"])
def test_a_function_is_a_function_whatever_was_imported_first(first):
    run = python(f"import april_nb, inspect; {first}; assert inspect.isfunction(april_nb.audit); from april_nb.audit import audit, text; "
                 "assert audit is april_nb.audit and list(inspect.signature(audit).parameters)[:3] == ['model', 'images', 'labels']")
    assert (run.returncode, run.stderr) == (0, "")


def test_every_name_says_what_it_is():
    for name in april_nb.__all__:
        thing = getattr(april_nb, name)
        assert thing.__doc__ and not (inspect.ismodule(thing) and callable(thing)), name
