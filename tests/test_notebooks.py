"""The notebooks are the source: modules equal them, they are clean, they run, and their pages can be shown."""
import configparser
import json
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean
from nbdev.doclinks import nbdev_export

import chapters

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """The repository's notebooks and settings in a folder of their own, with the modules that no notebook makes."""
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".*"))
    shutil.copy(ROOT / "settings.ini", tmp_path)
    (tmp_path / "april_nb").mkdir()
    for name in ("__init__.py", "__main__.py"): shutil.copy(ROOT / "april_nb" / name, tmp_path / "april_nb")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_modules_equal_notebooks(copy):
    nbdev_export()
    made = {p.name: p.read_text(encoding="utf-8") for p in (copy / "april_nb").glob("*.py")}
    kept = {p.name: p.read_text(encoding="utf-8") for p in (ROOT / "april_nb").glob("*.py")}
    assert made == kept, "run nbdev_export"


def test_notebooks_are_clean(copy):
    nbdev_clean("nbs")
    for path in NOTEBOOKS: assert (copy / "nbs" / path.name).read_text(encoding="utf-8") == path.read_text(encoding="utf-8"), f"run nbdev_clean on {path.name}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs_at_quick_size(path, monkeypatch):
    monkeypatch.setenv("APRIL_PRESET", "quick")
    notebook = chapters.read(path.read_text(encoding="utf-8"))
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell not in chapters.runnable(notebook): cell.source = ""
    NotebookClient(notebook, timeout=600, kernel_name="python3", extra_arguments=["--log-level=ERROR"],
                   resources={"metadata": {"path": ROOT / "nbs"}}).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_outputs_can_be_shown(path):
    assert path.stat().st_size < 1_000_000
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        outputs = cell.get("outputs", [])
        assert not any(o["output_type"] == "error" or o.get("name") == "stderr" for o in outputs), "".join(cell["source"])
        if any("image/png" in o.get("data", {}) for o in outputs):
            directives, _ = chapters.split("".join(cell["source"]))
            assert {"label", "fig-cap", "fig-alt"} <= set(directives), "a figure needs label, caption and alternative text"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_chapter_opens_with_title_summary_and_cost(path):
    first = nbformat.read(path, 4).cells[0].source.split("\n")
    assert first[0].startswith("# ") and first[2].startswith("> ") and first[4].startswith("*")


def test_version_is_said_once():
    config = configparser.ConfigParser()
    config.read(ROOT / "settings.ini")
    import april_nb
    assert april_nb.__version__ == config["DEFAULT"]["version"]
    assert f"version: {april_nb.__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
