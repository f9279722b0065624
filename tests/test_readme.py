"""What the README promises."""
import re
from pathlib import Path

import pytest
import safetensors.torch

import april_nb

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_snippets_run_as_they_stand_one_after_the_other(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)   # they write what a client sends
    scope = {}
    for code in re.findall(r"```python\n(.*?)```", README, re.S): exec(code, scope)
    out = capsys.readouterr().out
    assert re.match(r"patch exact .* \de-0[5-9]\n", out) and re.search(r"^! patch +(exact|approximate)", out, re.M)
    assert out.endswith("exact\n") or out.endswith("approximate\n")
    model, sent = scope["model"], april_nb.load_update("u.safetensors")
    model.load_state_dict(safetensors.torch.load_file("w.safetensors"))
    assert april_nb.attack(model, sent).verdict == "exact"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_every_file_it_links_exists(page):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8")): assert (ROOT / target).exists(), target


def test_the_newest_change_is_this_version():
    assert re.search(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)[1] == april_nb.__version__


def test_every_make_target_it_names_exists():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert set(re.findall(r"make (\w+)", README.split("## Two commands")[1])) <= targets
