"""One list of attacks: whatever runs attacks reads it, says what stands in the way, and holds an update against its model."""
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from april_nb import cli
from april_nb.attacks import ATTACKS, Attack, best_attack, check_update, listed, obstacle
from april_nb.audit import audit
from april_nb.certificate import Reconstruction
from april_nb.data import FORMATS, photos
from april_nb.defenses import parts, withhold
from april_nb.experiments import Arm, attack_slice, defense_arms
from april_nb.federated import AprilError, InvalidUpdate, Update, client_update
from april_nb.views import NotApplicable, view
from april_nb.vit import vit

ROOT = Path(__file__).resolve().parent.parent
FORMAT = FORMATS["cifar10"]
PIXELS = photos(FORMAT).batch([0, 1])[0]
X = FORMAT.normalisation(PIXELS).float()
BODY = parts(view(vit("vit_cifar", "B")))["body"]


@pytest.fixture(scope="module")
def server(): return vit("vit_cifar", "B")


@pytest.fixture(scope="module")
def update(server): return client_update(server, X[:1], torch.tensor([3]))


def grey(model, updates, terms):
    return [Reconstruction(torch.zeros(u.examples, *view(model).image_shape, dtype=torch.double), (), math.inf, "not-unique",
                           "always grey") for u in updates]


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(ATTACKS, "toy", Attack("A toy", "nothing", grey, ("patch",)))


def test_a_toy_attack_is_on_the_command_line(toy, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["april", "attack", "--model", "vit_mnist", "--method", "toy", "--json"])
    with pytest.raises(SystemExit) as stop: cli.main()
    report = json.loads(capsys.readouterr().out)
    assert stop.value.code == 0 and (report["method"], report["reason"]) == ("toy", "always grey")


def test_a_toy_attack_makes_rows(toy, monkeypatch):
    monkeypatch.delenv("APRIL_DATA", raising=False)
    row, = attack_slice(Arm("mnist", "B", "toy"), [0], 0, torch.device("cpu"))
    assert (row["method"], row["verdict"], row["labels"], row["steps"]) == ("toy", "not-unique", "none", 0)
    arms = [arm for arm, _ in defense_arms("quick") if arm.method == "toy"]
    assert arms and not any("withhold:patch" in arm.defense for arm in arms)


def test_where_a_client_sends_its_classifier_alone_only_searches_in_pixels_are_tried():
    arms = [arm for arm, _ in defense_arms("quick") if "withhold:body" in arm.defense]
    assert {arm.method for arm in arms} == {"dlg", "ig", "tag"}


def test_a_toy_attack_is_in_the_audit_and_after_every_cure(toy, server):
    report = audit(server, PIXELS[:1], torch.tensor([3]), normalisation=FORMAT.normalisation, budget=0)
    found = {f.name: f for f in report.attacks}
    assert found["toy"].verdict == "not-unique" and found["toy"].psnr is not None
    assert all("toy" in {f.name for f in cure.findings} for cure in report.cures)


def test_a_toy_attack_has_a_column_in_the_chapter_on_what_stops_attacks(toy, monkeypatch):
    monkeypatch.chdir(ROOT / "nbs")
    cells = json.loads((ROOT / "nbs" / "28_what_stops.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    scope = {}
    for source in code[:1] + [c for c in code if "'../results/defenses.csv'" in c]: exec(source, scope)
    assert scope["METHODS"]["toy"] == "A toy"


def test_a_toy_attack_is_in_the_readmes_table(toy, monkeypatch):
    assert "| `toy` | A toy | nothing | patch | no | 1 |" in listed()
    monkeypatch.undo()
    assert listed() in (ROOT / "README.md").read_text(encoding="utf-8"), "README: paste what april_nb.attacks.listed() returns"


def test_nothing_else_lists_attacks():
    for name in ("cli", "experiments", "audit"):
        source = (ROOT / "april_nb" / f"{name}.py").read_text(encoding="utf-8")
        assert "ATTACKS" in source and not {"closed_form(", "patch_leakage", "subspace_leakage"} & set(source.split())


@pytest.mark.parametrize("names, blocked", [
    (("positions",), {"closed-form", "patch", "ridge", "april"}),
    (("patch.weight", "patch.bias"), {"patch", "ridge", "secret"}),
    (("blocks.0.attention.q.weight",), {"closed-form", "subspace", "refine", "separate", "secret"}),
    (BODY, {"closed-form", "patch", "ridge", "subspace", "refine", "separate", "spans", "secret", "april"}),
    (("head.weight",), {"refine", "separate", "dlg", "ig", "tag", "april"})])
def test_an_obstacle_is_a_gradient_that_was_not_sent(server, update, names, blocked):
    less = withhold(update, names)
    found = {name for name, a in ATTACKS.items() if "not sent" in obstacle(a, view(server), less)}
    assert found == blocked


def test_searches_say_how_many_images_they_tell_apart(server, update):
    two = client_update(server, X, torch.tensor([3, 5]))
    assert "2 images or more" in obstacle(ATTACKS["separate"], view(server), update)
    assert "one image" in obstacle(ATTACKS["refine"], view(server), two) and not obstacle(ATTACKS["dlg"], view(server), two)


def test_the_best_attack_is_the_closed_form_that_foretells_least_error_else_a_search(server, update):
    two = client_update(server, X, torch.tensor([3, 5]), withheld=("positions",))
    assert best_attack(server, update)[0] in ("patch", "subspace")
    assert best_attack(server, withhold(update, ["positions"]))[0] == "subspace"
    assert best_attack(server, two)[0] == "spans"
    with pytest.raises(NotApplicable): best_attack(server, Update({"norm.weight": update["norm.weight"]}))


def test_a_closed_form_that_lacks_few_unknowns_goes_before_a_search_that_knows_less():
    patches, narrow = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)), dict(patch=2, image_size=32)
    for width, first in ((240, "patch"), (200, "spans")):   # 240 and 200 equations for 256 patches
        model = vit("vit_cifar", "B", **narrow, width=width, heads=4, depth=2)
        sent = client_update(model, FORMAT.normalisation(patches).float(), torch.tensor([3]))
        assert best_attack(model, sent)[0] == first
        assert best_attack(model, withhold(sent, ["positions"]))[0] == "spans"
        pair = client_update(model, FORMAT.normalisation(patches).float().expand(2, -1, -1, -1), torch.tensor([3, 5]))
        assert best_attack(model, pair)[0] == "spans"
    for sincos in ("sincos1d", "sincos2d"):   # a search that begins where Theorem 4 ends goes before its candidate
        model = vit("vit_cifar", "B", positions=sincos)
        assert best_attack(model, client_update(model, X[:1], torch.tensor([3])))[0] == "spans"


def test_no_search_starts_without_a_classifier():
    headless = pytest.importorskip("timm").models.VisionTransformer(32, 8, num_classes=0, embed_dim=16, depth=1, num_heads=2)
    headless(torch.rand(1, 3, 32, 32)).square().sum().backward()
    sent = Update.from_gradients(headless)
    for name, a in ATTACKS.items(): assert ("no classifier" in obstacle(a, view(headless), sent)) == a.searches, name


def test_an_honest_update_raises_no_remark(server, update):
    for u in (update, client_update(server, X, torch.tensor([3, 5])), client_update(server, X[:1], torch.tensor([3]), local_steps=3),
              client_update(server, X[:1], torch.tensor([3]), dtype=torch.bfloat16), withhold(update, ["positions"])):
        assert check_update(server, u) == ()


def test_wrong_weights_are_reported_as_that(update):
    remarks = check_update(vit("vit_cifar", "B", seed=1), update)
    assert remarks and all("wrong weights" in line for line in remarks)


def test_a_random_update_is_flagged(server, update):
    g = torch.Generator().manual_seed(0)
    noise = Update({n: torch.randn(t.shape, generator=g) for n, t in update.gradients.items()})
    remarks = check_update(server, noise)
    assert any("sum to zero" in line for line in remarks)


def test_a_difference_of_the_wrong_sign_is_refused(server, update):
    turned = Update({n: -g for n, g in update.gradients.items()})
    with pytest.raises(InvalidUpdate, match="sign turned round"): check_update(server, turned)


def test_a_state_dict_in_the_place_of_an_update_is_refused(server):
    with pytest.raises(InvalidUpdate, match="model's own weights"): check_update(server, Update(server.state_dict()))


def test_a_wrong_shape_or_name_anywhere_is_refused(server, update):
    for n in ("norm.weight", "blocks.3.mlp.0.weight"):
        with pytest.raises(InvalidUpdate, match=f"{n}.*another model"):
            check_update(server, Update(dict(update.gradients) | {n: torch.ones(3)}))
    with pytest.raises(InvalidUpdate, match="no parameter 'strange'"):
        check_update(server, Update(dict(update.gradients) | {"strange": torch.ones(3)}))


def test_weights_that_are_not_numbers_are_blamed(update):
    broken = vit("vit_cifar", "B")
    with torch.no_grad(): broken.head.weight[0, 0] = torch.nan
    with pytest.raises(AprilError, match="weight.*head.weight"): check_update(broken, update)


def test_terms_are_refused_where_they_are_misspelt(server, update):
    with pytest.raises(TypeError): ATTACKS["patch"](server, [update], sceonds=3)
