"""The package as an importer meets it: names and modules without a line of set-up, loaded when they are used."""
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import torch
from typer.testing import CliRunner

import april_nb
from april_nb import attack, cli
from april_nb.metrics import as_psnr
from april_nb.data import FORMATS
from april_nb.vit import vit

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
    with pytest.raises(AttributeError, match="nothing"): _ = april_nb.nothing


@pytest.mark.parametrize("first", ["april_nb.audit", "from april_nb.audit import page", "import april_nb.audit", "from april_nb.cli import main"])
def test_a_function_is_a_function_whatever_was_imported_first(first):
    run = python(f"import april_nb, inspect; {first}; assert inspect.isfunction(april_nb.audit); from april_nb.audit import audit, text; "
                 "assert audit is april_nb.audit and list(inspect.signature(audit).parameters)[:3] == ['model', 'images', 'labels']")
    assert (run.returncode, run.stderr) == (0, "")


def test_the_page_of_the_api_lists_the_names_that_need_no_modules():
    page = (Path(__file__).parent.parent / "back" / "api.md").read_text(encoding="utf-8").partition("need no module's name: ")[2].partition("\n")[0]
    assert {*re.findall(r"`(\w+)`", page)} == {name for name in april_nb.__all__ if not inspect.ismodule(getattr(april_nb, name))}


def test_every_name_says_what_it_is():
    for name in april_nb.__all__:
        thing = getattr(april_nb, name)
        assert thing.__doc__ and not (inspect.ismodule(thing) and callable(thing)), name


@pytest.fixture
def round_of_one(generator):
    model = vit("vit_mnist", "B")
    x, y = torch.randn(1, 1, 28, 28, generator=generator), torch.tensor([4])
    return model, x, y, april_nb.client_update(model, x, y)


def test_attack_runs_the_best_attack_that_applies(round_of_one):
    model, x, _, update = round_of_one
    answer = attack(model, update)
    assert (answer.method, answer.verdict) == ("patch", "exact") and (answer.images - x).abs().max() < 1e-5
    kept = april_nb.client_update(model, x, torch.tensor([4]), withheld=("positions",))
    assert attack(model, kept).method == april_nb.best_attack(model, kept)[0] == "subspace"


def test_the_command_line_chooses_and_foretells_the_same(round_of_one, tmp_path):
    model, _, _, update = round_of_one
    april_nb.save_update(update, tmp_path / "u.safetensors")
    ran = CliRunner().invoke(cli.app, ["attack", "--model", "vit_mnist", "--arch", "B", "--update", str(tmp_path / "u.safetensors"), "--json"])
    report, answer = json.loads(ran.stdout), attack(model, update)
    assert (report["method"], report["verdict"], report["reason"]) == (answer.method, answer.verdict, answer.reason)
    assert report["foretold_psnr"] == as_psnr(answer.error, FORMATS["mnist"].normalisation)


def test_a_named_attack_takes_known_labels_and_terms(round_of_one):
    model, _, y, update = round_of_one
    answer = attack(model, update, method="dlg", labels=y, steps=2)
    assert answer.method == "dlg" and len(answer.history) == 2 and answer.labels.tolist() == [4]


def test_attack_refuses_what_it_cannot_run_and_warns_of_what_does_not_fit(round_of_one):
    model, x, y, update = round_of_one
    with pytest.raises(april_nb.AprilError, match="unknown method 'magic': choose from closed-form"): attack(model, update, method="magic")
    with pytest.raises(april_nb.federated.InvalidUpdate, match="another model"): attack(vit("vit_mnist", "B", width=192), update)
    with pytest.warns(UserWarning, match="wrong weights"): attack(vit("vit_mnist", "B", seed=3), update)


@pytest.mark.parametrize("asked, words", [
    (dict(step=3), ["unknown term 'step'", "steps"]), (dict(labels=[4]), ["list", "torch.tensor(labels)"]),
    (dict(labels=torch.tensor(4)), ["()", "shape (B,)"]), (dict(labels=4), ["int", "torch.tensor"]),
    (dict(labels=torch.tensor([4, 5])), ["1 images but 2 labels"]), (dict(labels=torch.tensor([10])), ["label 10", "0 to 9"])])
def test_attack_refuses_what_cannot_be_asked_in_one_line(round_of_one, asked, words):
    model, _, _, update = round_of_one
    with pytest.raises(april_nb.AprilError) as error: attack(model, update, **asked)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_a_models_name_is_no_model(round_of_one):
    *_, update = round_of_one
    with pytest.raises(april_nb.AprilError, match=r"of type str: pass a torch.nn.Module; april_nb.named_model"): attack("vit_mnist", update)


def test_gradients_that_are_no_update_are_refused(round_of_one):
    model, _, _, update = round_of_one
    for call in (lambda: attack(model, dict(update.gradients)), lambda: april_nb.audit(model, update=dict(update.gradients), budget=0)):
        with pytest.raises(april_nb.federated.InvalidUpdate, match="of type dict: Update"): call()
