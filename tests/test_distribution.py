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

import metadata
import pytest
import yaml
from hatchling.build import build_sdist, build_wheel

import april_nb

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
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
    book = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["repository"]
    assert (meta["Description-Content-Type"], bool(meta.get_all("Project-URL"))) == ("text/markdown", bool(book["url"]))
    assert meta.get_payload().startswith("# april_nb") and not NEAR.findall(meta.get_payload()), "an index has no such file"


NEAR = re.compile(r"\]\((?!https?://)")   # links to files


@pytest.mark.parametrize("url", ["", "https://example.org/april"])
def test_the_readme_reads_without_its_folder(url):
    here = (ROOT / "README.md").read_text(encoding="utf-8")
    there = metadata.on_an_index(here, url, "main")
    assert NEAR.search(here) and not NEAR.search(there)
    assert ("![" in there) == (f"{url}/raw/main/_static/attack.png" in there) == (f"[CONTRIBUTING.md]({url}/blob/main/CONTRIBUTING.md)" in there) == bool(url)
    code = re.compile("```.*?```", re.S)
    assert code.findall(there) == code.findall(here) and "One float32 gradient" in here and ("One float32 gradient" in there) == bool(url)


def test_what_the_package_imports_is_declared_and_nothing_else():
    extras = {name_of(r) for group in PROJECT["optional-dependencies"].values() for r in group}
    declared, imported = {name_of(r) for r in PROJECT["dependencies"]}, set()
    for path in (ROOT / "april_nb").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import): imported |= {a.name.split(".")[0] for a in node.names}
            if isinstance(node, ast.ImportFrom) and not node.level: imported.add(node.module.split(".")[0])
    needed = {NAMES.get(name, name) for name in imported - sys.stdlib_module_names - {"april_nb"}}
    assert declared <= needed <= declared | extras


def test_text_is_utf8_on_every_system_and_no_module_is_one_systems_alone():
    """Windows writes text in a code page of its own unless told otherwise, and lacks some of the standard library."""
    for path in (ROOT / "april_nb").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import): assert not {a.name for a in node.names} & {"fcntl", "pwd", "resource", "termios"}, path
            if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", None)) in TEXT:
                if isinstance(node.func, ast.Attribute) and node.func.attr == "open": continue   # of Pillow, gzip and os: bytes
                assert "encoding" in {k.arg for k in node.keywords}, f"{path}:{node.lineno}"


TEXT = {"open", "read_text", "write_text"}


def test_development_is_a_dependency_group_and_no_extra():
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
    assert "pytest" in groups["dev"] and "dev" not in PROJECT["optional-dependencies"]
    assert "--group dev" in (ROOT / "Makefile").read_text(encoding="utf-8")


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
    alone = dict(cwd=tmp_path, capture_output=True, text=True, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    run = subprocess.run([bin / "python", "-c", SNIPPET], **alone)
    assert run.returncode == 0, run.stderr
    where, method, right = run.stdout.split()
    assert Path(where).is_relative_to(home) and (method, right) == ("patch", "True")
    assert subprocess.run([bin / "april", "--version"], **alone).stdout == f"april_nb {april_nb.__version__}\n"


def test_a_source_distribution_can_be_built_from(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with tarfile.open(tmp_path / build_sdist(str(tmp_path))) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "april_nb/cli.py", "nbs/93_cli.ipynb", "tests/test_cli.py"} <= names
    assert not [n for n in names if n.startswith((".", "_build")) and n != ".gitignore"]
