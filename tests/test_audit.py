"""Claims about the audit: its verdicts are the attacks' own, its cures do what it says, time never makes anything safe."""
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos

from april_nb.attacks import ATTACKS
from april_nb.audit import DRAWS, MECHANISMS, STOPPED, audit, clipped_noise, page, text
from april_nb.data import FORMATS, photos
from april_nb.defenses import compose, defense, noise_generator, parts
from april_nb.federated import AprilError, Update, client_update
from april_nb.metrics import psnr
from april_nb.models import named_model
from april_nb.privacy import exact_epsilon
from april_nb.views import view

APRIL = Path(sys.executable).with_name("april")
NORMALISATION = FORMATS["cifar10"].normalisation
PHOTO, LABEL = photos(FORMATS["cifar10"]).batch([0])[0], torch.tensor([3])


CLOSED = [name for name, a in ATTACKS.items() if not a.searches]
SEARCHES = [name for name, a in ATTACKS.items() if a.searches]


def run(name, model, update):
    answer, = ATTACKS[name](model, [update])
    return answer


def timm_vit(Model=VisionTransformer, **options):
    torch.manual_seed(0)
    return Model(**dict(img_size=32, patch_size=8, embed_dim=96, depth=3, num_heads=4, num_classes=10) | options)


def report_of(model, budget=0.0, **options):
    return audit(model, PHOTO, LABEL, normalisation=NORMALISATION, budget=budget, **options)


def by_name(report):
    return {f.name: f for f in report.attacks}


@pytest.fixture(scope="module")
def report():
    return report_of(timm_vit())


def test_every_attack_is_reported_and_closed_forms_always_run(report):
    assert list(by_name(report)) == ["labels", *CLOSED, *SEARCHES] and set(CLOSED + SEARCHES) == set(ATTACKS)
    assert all(by_name(report)[name].ended for name in CLOSED)


def test_verdicts_are_those_of_the_attacks_run_one_by_one(report):
    model = timm_vit()
    update = client_update(model, NORMALISATION(PHOTO).float(), LABEL)
    for name in ("patch", "subspace"):
        answer, found = run(name, model, update), by_name(report)[name]
        assert (answer.verdict, answer.reason, answer.systems) == (found.verdict, found.reason, found.systems)
        assert found.psnr == pytest.approx(psnr(NORMALISATION.inverse(answer.images), PHOTO).item(), abs=1e-6)


def test_a_search_without_time_is_not_converged_and_never_safe(report):
    found = by_name(report)
    assert {found[name].verdict for name in SEARCHES} == {"not-converged", "not-applicable"}
    assert not any(found[name].ended for name in SEARCHES if found[name].verdict == "not-converged")
    assert "cannot pass one" in str(report) and "did not end" in str(report)


def test_a_cure_says_what_did_not_run_on_it_and_never_ranks_by_that(report):
    for cure in report.cures:
        unfinished = tuple(f.name for f in cure.findings if f.verdict == "not-converged" and not f.ended)
        assert cure.untested == unfinished and (cure.outcome != "stops what was tried" or not unfinished)
    ended = [not c.untested for c in report.cures]
    assert ended == sorted(ended, reverse=True)
    assert "untested against" in str(report) and report.needs > 0


def test_a_cure_is_called_one_when_every_attack_on_it_has_ended():
    report = report_of(timm_vit(depth=2), budget=600.0, steps=2)
    assert report.needs == 0
    assert {c.outcome for c in report.cures} == {"leaks", "stops what was tried"} and not any(c.untested for c in report.cures if c.worst < STOPPED)


def test_two_images_of_different_classes_are_not_protected_by_withheld_positions():
    model = timm_vit(embed_dim=192)
    report = audit(model, photos(FORMATS["cifar10"]).batch([0, 1])[0], torch.tensor([3, 5]), normalisation=NORMALISATION, budget=0)
    withheld = next(c for c in report.cures if c.defenses == ("withhold:positions",))
    assert "separate" in withheld.untested and withheld.outcome != "stops what was tried"


class Clock:
    """Stands in for the module `time`; only those who say so let it pass."""
    now = 0.0
    def perf_counter(self): return self.now
    monotonic = perf_counter


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in ("april_nb.audit", "april_nb.spans"): monkeypatch.setattr(sys.modules[module], "time", clock)
    return clock


def test_closed_forms_never_spend_the_searches_budget(clock, monkeypatch):
    patch = ATTACKS["patch"]
    def slow(model, updates, terms):
        clock.now += 1000
        return patch.run(model, updates, terms)
    monkeypatch.setitem(ATTACKS, "patch", replace(patch, run=slow))
    report = report_of(timm_vit(depth=1), budget=8.0, steps=1)
    assert by_name(report)["patch"].seconds == 1000 and all(f.ended for f in report.attacks)


def test_a_cold_first_call_does_not_set_the_clock(clock, monkeypatch):
    calls = []
    def cold(*args, **options):
        clock.now += 0.001 if calls else 1000
        calls.append(1)
        return client_update(*args, **options)
    monkeypatch.setattr(sys.modules["april_nb.audit"], "client_update", cold)
    assert all(f.ended for f in report_of(timm_vit(depth=1), budget=8.0, steps=1).attacks)


def test_the_audits_searches_take_as_many_first_guesses_as_asked(monkeypatch):
    tried = []
    def counted(model, updates, terms):
        tried.append(terms.restarts)
        return ATTACKS["patch"].run(model, updates, terms)
    for name in SEARCHES: monkeypatch.setitem(ATTACKS, name, replace(ATTACKS[name], run=counted))
    report_of(timm_vit(depth=1), budget=60.0, steps=1, restarts=3)
    assert tried and {*tried} == {3}


def test_noise_is_offered_through_mechanisms_with_their_epsilon_for_one_round(report):
    offered = {c.action: c for c in report.cures if c.action in MECHANISMS}
    assert set(offered) == set(MECHANISMS)
    clipped = next(c for c in offered.values() if c.epsilon is not None)
    (_, S), (_, σ) = (spec.split(":") for spec in clipped.defenses)
    assert clipped.epsilon == exact_epsilon(float(σ) / (2 * float(S)), 1e-5) and "for one round" in str(report)


def test_clipping_to_the_updates_own_norm_changes_nothing_but_makes_a_promise():
    update = client_update(timm_vit(), NORMALISATION(PHOTO).float(), LABEL)
    for factor in (1.0, 3.3, 9.9, 0.0123):
        scaled = Update({n: factor * g for n, g in update.gradients.items()})
        (clip, _), _ = clipped_noise(0.1, scaled)
        sent = defense(clip, view(timm_vit()), noise_generator(0))(scaled)
        assert all(torch.allclose(sent[n], g) for n, g in scaled.gradients.items())


def test_wrong_weights_are_reported_as_that_and_not_as_a_cure(report):
    model = timm_vit()
    update = client_update(model, NORMALISATION(PHOTO).float(), LABEL)
    torch.manual_seed(1)
    other = VisionTransformer(img_size=32, patch_size=8, embed_dim=96, depth=3, num_heads=4, num_classes=10)
    wrong = audit(other, PHOTO, LABEL, update=update, normalisation=NORMALISATION, budget=0)
    assert any("wrong weights" in line for line in wrong.remarks) and "warning: " in str(wrong) and not report.remarks


def test_the_view_is_checked_on_the_first_lines(report):
    assert str(report).splitlines()[1].startswith("view: ") and all(c.ok and c.error < 1e-4 for c in report.checks)


@pytest.mark.parametrize("images, labels", [
    ((255 * PHOTO).byte(), LABEL), (255 * PHOTO, LABEL), (NORMALISATION(PHOTO), LABEL), (PHOTO[:, :1], LABEL), (PHOTO[..., :16], LABEL),
    (PHOTO * torch.nan, LABEL), (PHOTO, torch.tensor([10])), (PHOTO, torch.tensor([3, 3]))])
def test_images_and_labels_that_do_not_fit_are_one_line(images, labels):
    with pytest.raises(AprilError) as error: audit(timm_vit(), images, labels, normalisation=NORMALISATION, budget=0)
    assert "\n" not in str(error.value)


def test_a_search_is_stopped_in_time_with_its_best_guess():
    found = by_name(report_of(timm_vit(VisionTransformerRelPos), budget=6.0))["tag"]
    assert found.verdict == "not-converged" and "stopped by the budget after" in found.reason and not found.ended and found.steps
    assert found.images.isfinite().all() and found.psnr is not None


def test_a_search_with_time_enough_gives_its_own_verdict():
    found = by_name(report_of(timm_vit(depth=1), budget=60.0, steps=3))["ig"]
    assert found.verdict in ("approximate", "not-converged") and "budget" not in found.reason


def test_cures_applied_do_what_the_report_says(report):
    model = timm_vit()
    update = client_update(model, NORMALISATION(PHOTO).float(), LABEL)
    assert any("noise" in cure.action for cure in report.cures)
    for cure in report.cures:
        noisy = any(spec.startswith("gaussian") for spec in cure.defenses)
        left = {}
        for draw in range(DRAWS if noisy else 1):
            sent = compose(cure.defenses, view(model), noise_generator(draw))(update)
            for found in cure.findings:
                if found.name not in CLOSED or found.verdict in ("not-applicable", "nothing-leaks"): continue
                answer = run(found.name, model, sent)
                left.setdefault(found.name, []).append(psnr(NORMALISATION.inverse(answer.images), PHOTO).item())
        assert left or not any(f.psnr for f in cure.findings)
        for found in cure.findings:
            if found.name in left: assert found.psnr == pytest.approx(max(left[found.name]), abs=1e-6)


def test_cures_are_ranked_by_what_ended_then_by_what_leaks_then_by_price(report):
    keys = [(bool(c.untested), c.worst >= STOPPED, c.price) for c in report.cures]
    assert keys == sorted(keys) and report.cures[0].worst < STOPPED
    alone = next(c for c in report.cures if c.defenses == ("withhold:positions",))
    assert alone.worst > STOPPED and alone.outcome == "leaks"   # Theorem 4 does not read what it withholds


def test_the_noise_that_is_named_is_the_least_on_its_grid(report):
    spec = next(c.defenses[0] for c in report.cures if "rms" in c.action)
    r = float(spec.removeprefix("gaussian:").removesuffix("*rms"))
    model = timm_vit()
    update = client_update(model, NORMALISATION(PHOTO).float(), LABEL)
    less = defense(f"gaussian:{r / 10 ** 0.5:.1g}*rms", view(model), noise_generator(0))(update)
    best = max(psnr(NORMALISATION.inverse(run(a, model, less).images), PHOTO).item() for a in ("patch", "ridge", "subspace"))
    assert best >= STOPPED


def test_ridge_sees_through_noise_that_ruins_least_squares():
    model = timm_vit(patch_size=4, embed_dim=72)   # 64 patches, ill-conditioned
    update = client_update(model, NORMALISATION(PHOTO).float(), LABEL)
    sent = defense("gaussian:0.001*rms", view(model), noise_generator(0))(update)
    plain, ridge = (psnr(NORMALISATION.inverse(run(a, model, sent).images), PHOTO).item() for a in ("patch", "ridge"))
    assert ridge > plain + 6


def test_more_patches_than_channels_are_not_unique_with_the_numerical_rank():
    found = by_name(report_of(timm_vit(patch_size=4, embed_dim=48)))["patch"]
    assert found.verdict == "not-unique" and found.systems[0].rank < 48 < found.systems[0].expected_rank == 64


def test_a_narrow_model_fails_theorem_4_and_not_theorem_3():
    found = by_name(report_of(timm_vit(embed_dim=32)))
    assert found["patch"].verdict == "exact" and found["subspace"].verdict == "not-unique"


def test_without_a_classifier_theorem_3_still_applies():
    report = report_of(timm_vit(num_classes=0))
    found = by_name(report)
    assert found["patch"].verdict == "exact" and found["labels"].verdict == found["dlg"].verdict == "not-applicable"
    assert "no classifier" in found["dlg"].reason


def test_torchvisions_zero_head_leaks_nothing_but_the_label_until_the_next_round():
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, 2, 4, 96, 96, num_classes=10)
    before = {n: p.clone() for n, p in model.named_parameters()}
    report = report_of(model)
    found, later = by_name(report), by_name(report.next_round)
    assert found["labels"].reason == "class 3" and found["patch"].verdict == found["dlg"].verdict == "nothing-leaks"
    assert later["patch"].verdict == "exact" and later["patch"].psnr > 80
    assert not report.cures and report.next_round.cures
    assert "next round, the classifier's weights drawn" in str(report)
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["next_round"]   # a system of zeros has no NaN
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_missing_part_is_named_and_the_rest_still_runs():
    report = report_of(timm_vit(VisionTransformerRelPos))
    found = by_name(report)
    assert "relative" in report.lacks and "note: " in str(report)
    assert found["patch"].verdict == found["subspace"].verdict == "not-applicable"
    assert found["labels"].verdict == "exact" and found["dlg"].verdict == "not-converged"


def test_an_update_alone_is_judged_by_its_certificate(report):
    model = timm_vit()
    update = client_update(model, NORMALISATION(PHOTO).float(), LABEL)
    found = by_name(audit(model, update=update, normalisation=NORMALISATION, budget=0))["patch"]
    assert found.psnr is None and found.foretold == pytest.approx(by_name(report)["patch"].psnr, abs=6)
    with pytest.raises(AprilError, match="give images, an update"): audit(model)


def test_a_batch_is_audited():
    images = photos(FORMATS["cifar10"]).batch([0, 1])[0]
    report = audit(timm_vit(), images, torch.tensor([3, 5]), normalisation=NORMALISATION, budget=0)
    assert by_name(report)["patch"].verdict == "not-unique" and "3, 5" in by_name(report)["labels"].reason


def test_a_search_that_found_no_image_of_a_batch_in_its_time_is_untested_and_no_error():
    images = photos(FORMATS["cifar10"]).batch([0, 1])[0]
    report = audit(timm_vit(embed_dim=192), images, torch.tensor([3, 5]), normalisation=NORMALISATION, budget=5.0)
    found = by_name(report)["spans"]
    assert (found.psnr is None) == (found.images is None) and (found.ended or "spans" in text(report.as_dict()))
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False)) and page(report)


def test_json_text_and_page_tell_the_same(report):
    d = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert text(d) == str(report)
    html = page(report)
    assert all(f.verdict in html and f.verdict in str(report) for f in report.attacks)
    assert "data:image/png;base64," in html and "http" not in html


@pytest.mark.parametrize("spec", ["keras:vit", "timm:vit_enormous", "torchvision:vit_enormous", "ours:vit_huge",
                                  "hf:/nowhere", "torchvision:resnet18", "timm:"])
def test_an_unknown_model_is_one_line(spec, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(AprilError): named_model(spec)


def april(*arguments):
    return subprocess.run([APRIL, "audit", *map(str, arguments)], capture_output=True, text=True)


def test_files_of_a_script_without_this_package_are_audited_from_the_command_line(foreign_client):
    tmp_path = foreign_client
    out = april("--model", f"hf:{tmp_path}", "--weights", tmp_path / "weights.safetensors", "--update",
                tmp_path / "update.safetensors", "--budget", 0, "--json", "--html", tmp_path / "report.html")
    assert out.returncode == 0, out.stderr
    report = json.loads(out.stdout)
    found = {a["name"]: a for a in report["attacks"]}
    assert set(report) >= {"model", "parameters", "attacks", "cures"}
    assert found["patch"]["verdict"] == "exact" and found["labels"]["reason"] == "class 7"
    assert found["patch"]["psnr"] is None and found["patch"]["foretold_psnr"] > 80
    assert "<table>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    wrong = april("--model", "ours:vit_mnist", "--update", tmp_path / "update.safetensors", "--budget", 0)
    assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1 and "Traceback" not in wrong.stderr


@pytest.mark.parametrize("arguments", [["--model", "timm:no"], ["--html", "/nowhere/a.html"], ["--update", "/nowhere"],
                                       ["--model", "ours:vit_mnist", "--label", "11"], ["--budget", "-1"]])
def test_bad_input_is_one_line_and_exit_code_2(arguments):
    out = april("--model", "ours:vit_mnist", *arguments)
    assert out.returncode == 2 and len(out.stderr.strip().splitlines()) == 1, out.stderr


def freezing():
    "The checklist's lines that freeze a model's body."
    cells = json.loads((Path(__file__).parent.parent / "nbs" / "38_checklist.ipynb").read_text(encoding="utf-8"))["cells"]
    cell, = (source for c in cells if "body =" in (source := "".join(c["source"])))
    return cell[cell.index("body ="):cell.index("report =")]


@pytest.mark.parametrize("library", ["timm", "torchvision", "hf"])
def test_the_checklist_freezes_the_body_of_any_librarys_model(library):
    hf = pytest.importorskip("transformers")
    model = {"timm": lambda: timm_vit(reg_tokens=2, no_embed_class=True),
             "torchvision": lambda: torchvision.models.VisionTransformer(32, 8, 2, 4, 48, 96, num_classes=10),
             "hf": lambda: hf.ViTForImageClassification(hf.ViTConfig(
                 image_size=32, patch_size=8, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
                 num_labels=10))}[library]()
    torch.nn.init.normal_(model.get_parameter(view(model).head_weight), std=0.1)   # torchvision's is zero: nothing would leak
    before = audit(model, PHOTO, LABEL, normalisation=NORMALISATION, budget=0)
    exec(freezing(), scope := {"model": model, "view": view, "parts": parts})
    after = audit(model, PHOTO, LABEL, normalisation=NORMALISATION, budget=0)
    reading = [name for name, a in ATTACKS.items() if a.reads]
    verdicts = lambda report: {f.name: f.verdict for f in report.attacks}
    assert verdicts(before)["patch"] == "exact" and all(verdicts(after)[name] == "not-applicable" for name in reading)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and not set(trained) & set(scope["body"]) and verdicts(after)["dlg"] == "not-converged"


@pytest.mark.parametrize("seconds, words", [(3.0, "3 s"), (119, "119 s"), (5442, "91 minutes"), (40_000, "11 hours"), (653_008, "8 days")])
def test_a_report_says_how_long_a_search_takes_in_the_unit_that_one_plans_in(seconds, words):
    report = audit(timm_vit(), PHOTO, LABEL, normalisation=NORMALISATION, budget=0).as_dict() | {"needs": seconds}
    assert f"about {words} more would end" in text(report)
