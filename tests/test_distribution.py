"""What is shipped: a wheel that holds the package and nothing of the book, and says what it needs."""
import ast
import os
import re
import subprocess
import sys
import sysconfig
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


def test_development_is_a_dependency_group_and_no_extra():
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    assert "pytest" in groups["dev"] and "dev" not in PROJECT["optional-dependencies"]
    assert "--group dev" in (ROOT / "Makefile").read_text()


@pytest.fixture(scope="module")
def installed(tmp_path_factory, wheel):
    """An environment that holds the wheel, and reaches this one's libraries; the repository is not on its path."""
    home = tmp_path_factory.mktemp("empty")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    bin = home / ("Scripts" if os.name == "nt" else "bin")
    subprocess.run([sys.executable, "-m", "pip", "--python", bin / "python", "install", "-q", "--no-deps", "--no-index",
                    "--disable-pip-version-check", wheel.filename], check=True)
    here = sysconfig.get_path("purelib", vars={"base": str(home)})
    (Path(here) / "libraries.pth").write_text(sysconfig.get_path("purelib"))   # a path, whose own .pth files are not read
    return home, bin


SNIPPET = """
import pathlib, torch, april_nb
from april_nb import attack, client_update
from april_nb.vit import vit
model, x, y = vit("vit_mnist", "B"), torch.rand(1, 1, 28, 28), torch.tensor([3])
answer = attack(model, client_update(model, x, y))
print(pathlib.Path(april_nb.__file__).parent, answer.method, (answer.images - x).abs().max().item() < 1e-4)
"""


def test_the_wheel_works_outside_the_repository(installed, tmp_path):
    home, bin = installed
    run = subprocess.run([bin / "python", "-c", SNIPPET], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    where, method, right = run.stdout.split()
    assert Path(where).is_relative_to(home) and (method, right) == ("patch", "True")
    assert subprocess.run([bin / "april", "--version"], cwd=tmp_path, capture_output=True, text=True).stdout == f"april_nb {april_nb.__version__}\n"


def test_a_source_distribution_can_be_built_from(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with tarfile.open(tmp_path / build_sdist(str(tmp_path))) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "april_nb/cli.py", "nbs/93_cli.ipynb", "tests/test_cli.py"} <= names
    assert not [n for n in names if n.startswith((".", "_build")) and n != ".gitignore"]
