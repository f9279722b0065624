"""What is shipped: a wheel that holds the package and nothing of the book, and says what it needs."""
import ast
import re
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from hatchling.build import build_sdist, build_wheel

import april_nb

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAMES = {"PIL": "pillow", "skimage": "scikit-image", "lazy_loader": "lazy-loader"}   # modules that are not called like their project


def name_of(requirement): return re.match(r"[\w-]+", requirement)[0]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        out = tmp_path_factory.mktemp("wheel")
        return zipfile.ZipFile(out / build_wheel(str(out)))


def test_the_wheel_holds_every_module_with_its_types_and_no_index_of_notebooks(wheel):
    shipped = {Path(n).name for n in wheel.namelist() if n.startswith("april_nb/")}
    there = {p.name for p in (ROOT / "april_nb").iterdir() if p.is_file()}
    assert shipped == there - {"_modidx.py"} and {"py.typed", "__init__.pyi"} <= shipped
    assert all(n.startswith(("april_nb/", "april_nb-")) for n in wheel.namelist())


def test_the_wheel_says_what_it_is(wheel):
    said = {Path(n).name: wheel.read(n).decode() for n in wheel.namelist() if ".dist-info/" in n}
    meta = Parser().parsestr(said["METADATA"])
    assert (meta["Version"], meta["License-Expression"]) == (april_nb.__version__, "Apache-2.0")
    assert "april = april_nb.__main__:main" in said["entry_points.txt"]
    assert {name_of(r) for r in meta.get_all("Requires-Dist") if "extra ==" not in r} == {name_of(r) for r in PROJECT["dependencies"]}


def test_what_the_package_imports_is_declared_and_nothing_else():
    extras = {name_of(r) for group in PROJECT["optional-dependencies"].values() for r in group}
    declared, imported = {name_of(r) for r in PROJECT["dependencies"]}, set()
    for path in (ROOT / "april_nb").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import): imported |= {a.name.split(".")[0] for a in node.names}
            if isinstance(node, ast.ImportFrom) and not node.level: imported.add(node.module.split(".")[0])
    needed = {NAMES.get(name, name) for name in imported - sys.stdlib_module_names - {"april_nb"}}
    assert declared <= needed <= declared | extras


def test_a_source_distribution_can_be_built_from(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with tarfile.open(tmp_path / build_sdist(str(tmp_path))) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "april_nb/cli.py", "nbs/93_cli.ipynb", "tests/test_cli.py"} <= names
    assert not [n for n in names if n.startswith((".", "_build")) and n != ".gitignore"]
