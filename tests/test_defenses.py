"""What each defence promises, over random updates; what attacks say when a defence takes what they read."""
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from april_nb import defenses
from april_nb.closed_form import closed_form
from april_nb.defenses import (as_weights, clip, defense, gaussian, laplace, noise_generator, parts, quantize, top_k,
                               total_norm, withhold)
from april_nb.experiments import Arm, Slice, attack_slice
from april_nb.federated import AprilError, MissingGradient, Update, client_update, load_update, save_update
from april_nb.labels import restore_labels
from april_nb.optimization import Settings, gradient_matching, paper_settings
from april_nb.views import view
from april_nb.vit import vit

APRIL = Path(sys.executable).parent / "april"
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
NOISES = pytest.mark.parametrize("noise", [gaussian, laplace])


def update_of(seed, dtype=torch.float64, shapes=((3, 5), (7,), (2, 4)), scales=(1.0, 1e-3, 0.1), **fields):
    g = torch.Generator().manual_seed(seed)
    tensors = [s * torch.randn(shape, generator=g, dtype=torch.double) for shape, s in zip(shapes, scales)]
    return Update({f"w{i}": t.to(dtype) for i, t in enumerate(tensors)}, **fields)


def flat(update): return torch.cat([update[n].double().flatten() for n in sorted(update.gradients)])


def large(seed=0): return update_of(seed, shapes=((300, 400), (50_000,)), scales=(1.0, 1e-4))


def attacked(arch="A"):
    model = vit("vit_mnist", arch)
    x = torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(5))
    return model, client_update(model, x, torch.tensor([3]))


ALL = [("gaussian", lambda u, g: gaussian(u, 0.1, g)), ("laplace", lambda u, g: laplace(u, 0.1, g, "rms")),
       ("clip", lambda u, g: clip(u, 0.5)), ("topk", lambda u, g: top_k(u, 0.3)),
       ("quantize", lambda u, g: quantize(u, 6)), ("weights", lambda u, g: as_weights(u, u.gradients, 0.1)),
       ("withhold", lambda u, g: withhold(u, ["w1"]))]


@pytest.mark.parametrize("name, defend", ALL, ids=[n for n, _ in ALL])
@given(seed=st.integers(0, 2**20), dtype=DTYPES)
def test_a_defence_keeps_format_counts_and_input_and_leaves_its_trace(name, defend, seed, dtype):
    update = update_of(seed, dtype, examples=4, local_steps=3, lr=0.1, defenses=("before",))
    kept, state = flat(update).clone(), torch.get_rng_state()
    after = defend(update, noise_generator(seed))
    assert torch.equal(flat(update), kept) and torch.equal(torch.get_rng_state(), state)
    assert (after.dtype, after.examples, after.local_steps, after.lr) == (dtype, 4, 3, 0.1)
    assert after.defenses[0] == "before" and len(after.defenses) == 2 and after.defenses[1].startswith(f"{name}:")
    assert all(g.shape == update[n].shape and g.dtype == dtype for n, g in after.gradients.items())


@NOISES
@pytest.mark.parametrize("relative, scale", [
    (None, lambda r, g: r), ("norm", lambda r, g: (r * g.norm().item()) ** 0.5), ("rms", lambda r, g: r * g.square().mean().sqrt().item())])
@pytest.mark.parametrize("r", [1e-3, 2.0])
def test_noise_has_mean_zero_and_the_stated_deviation(noise, relative, scale, r):
    update = large()
    after = noise(update, r, noise_generator(1), relative)
    for n, g in update.gradients.items():
        added, σ, count = after[n] - g, scale(r, g), g.numel()
        assert abs(added.mean()) < 5 * σ / count ** 0.5
        assert added.std().item() == pytest.approx(σ, rel=0.02)


def test_laplacian_noise_has_heavier_tails_than_normal_noise_of_equal_variance():
    update = large()
    kurtosis = lambda noise: ((noise(update, 1.0, noise_generator(0))["w0"] - update["w0"]) ** 4).mean()
    assert kurtosis(gaussian) == pytest.approx(3, rel=0.1) and kurtosis(laplace) == pytest.approx(6, rel=0.1)


@NOISES
def test_noise_depends_on_the_generator_only(noise, tmp_path):
    update = update_of(0)
    once = noise(update, 0.1, noise_generator(7))
    torch.manual_seed(99)
    assert torch.equal(flat(once), flat(noise(update, 0.1, noise_generator(7))))
    assert not torch.equal(flat(once), flat(noise(update, 0.1, noise_generator(8))))
    save_update(Update(dict(reversed(update.gradients.items()))), tmp_path / "u.safetensors")
    assert torch.equal(flat(once), flat(noise(load_update(tmp_path / "u.safetensors"), 0.1, noise_generator(7))))


def test_the_stream_of_noise_is_not_that_of_weights_and_first_guesses():
    zeros = Update({"w": torch.zeros(1000)})
    noise = gaussian(zeros, 1.0, noise_generator(0))["w"]
    assert abs(torch.corrcoef(torch.stack([noise, torch.randn(1000, generator=torch.Generator().manual_seed(0))]))[0, 1]) < 0.15


@NOISES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_noise_is_added_before_rounding_to_the_format_that_is_sent(noise, dtype):
    update = update_of(3, dtype)
    wide = Update({n: g.float() for n, g in update.gradients.items()})
    narrow, exact = noise(update, 0.1, noise_generator(0)), noise(wide, 0.1, noise_generator(0))
    assert all(torch.equal(narrow[n], g.to(dtype)) for n, g in exact.gradients.items())


def test_only_the_literal_reading_depends_on_the_scale_of_the_loss():
    update = large()
    louder = Update({n: 10 * g for n, g in update.gradients.items()})
    ratio = lambda relative: ((gaussian(louder, 0.1, noise_generator(0), relative)["w0"] - louder["w0"]).std()
                              / (gaussian(update, 0.1, noise_generator(0), relative)["w0"] - update["w0"]).std()).item()
    assert ratio("rms") == pytest.approx(10) and ratio("norm") == pytest.approx(10 ** 0.5) and ratio(None) == pytest.approx(1)


@given(st.integers(0, 2**20), st.floats(1e-6, 1e6))
def test_clipping_bounds_the_norm_and_keeps_the_direction(seed, size):
    update = update_of(seed)
    after = clip(update, size)
    assert total_norm(after) <= size * (1 + 1e-12)
    assert torch.cosine_similarity(flat(after), flat(update), 0).item() == pytest.approx(1)
    if total_norm(update) <= size: assert torch.equal(flat(after), flat(update))
    else: assert total_norm(after) == pytest.approx(size)


def test_the_norm_is_that_of_all_tensors_together():
    update = update_of(0)
    assert total_norm(update) == pytest.approx(flat(update).norm().item())
    assert total_norm(update_of(0, torch.float16, scales=(1.5e4, 1.5e4, 1.5e4))) > 65504   # beyond the format's range


@given(st.integers(0, 2**20), st.integers(1, 100), DTYPES)
def test_top_k_keeps_exactly_k_and_the_largest(seed, percent, dtype):
    update = update_of(seed, dtype, shapes=((10, 6), (15,), (25,)))
    after, share = top_k(update, percent / 100), flat(update)
    kept = flat(after) != 0
    assert kept.sum() == percent                    # of a hundred entries, none of which is zero
    assert torch.equal(flat(after)[kept], share[kept])
    if percent < 100: assert share[kept].abs().min() >= share[~kept].abs().max()


def test_ties_go_to_the_first_parameter_and_the_first_entry():
    update = Update({"b": torch.ones(3), "a": torch.tensor([1.0, -1.0, 2.0])})
    assert flat(top_k(update, 0.5)).tolist() == [1, -1, 2, 0, 0, 0] and flat(top_k(update, 1 / 6)).tolist() == [0, 0, 2, 0, 0, 0]
    assert not flat(top_k(Update({"w": torch.zeros(4)}), 0.5)).any()


@given(st.integers(0, 2**20), st.integers(2, 16))
def test_quantisation_errs_by_at_most_half_a_step_and_has_few_levels(seed, bits):
    update = update_of(seed)
    after = quantize(update, bits)
    for n, g in update.gradients.items():
        step = g.abs().max().item() / (2 ** (bits - 1) - 1)
        assert (after[n] - g).abs().max().item() <= step / 2 * (1 + 1e-9)
        assert len(after[n].unique()) <= 2 ** bits - 1
        assert after[n].abs().max() == pytest.approx(g.abs().max())


def test_zeros_stay_zeros_under_quantisation():
    assert not quantize(Update({"w": torch.zeros(5)}), 4)["w"].any()
    sparse = top_k(update_of(0), 0.2)
    assert (flat(quantize(sparse, 8))[flat(sparse) == 0] == 0).all()


def test_withheld_names_are_absent_and_named():
    after = withhold(update_of(0, withheld=("w9",)), ["w0", "w2"])
    assert set(after.gradients) == {"w1"} and after.withheld == ("w9", "w0", "w2") and after.defenses == ("withhold:w0,w2",)
    with pytest.raises(MissingGradient, match="withheld"): after["w0"]
    with pytest.raises(AprilError, match="cannot withhold w7"): withhold(after, ["w7"])


def test_defences_compose_in_order_and_the_trace_survives_the_disk(tmp_path):
    update = update_of(0)
    both, g = clip(gaussian(update, 1.0, noise_generator(0)), 1.0), noise_generator(0)
    other = gaussian(clip(update, 1.0), 1.0, g)
    assert both.defenses == ("gaussian:1", "clip:1") and other.defenses == ("clip:1", "gaussian:1")
    assert not torch.equal(flat(both), flat(other))
    save_update(withhold(both, ["w1"]), tmp_path / "u.safetensors")
    assert load_update(tmp_path / "u.safetensors").defenses == ("gaussian:1", "clip:1", "withhold:w1")
    assert client_update(*attacked()[:1], torch.zeros(1, 1, 28, 28), torch.tensor([0])).defenses == ()


SPECS = ["gaussian:0.01", "gaussian:0.1*norm", "laplace:0.001*rms", "clip:1", "topk:0.01", "quantize:8", "weights:0.01"]


@pytest.mark.parametrize("spec", SPECS)
def test_a_trace_is_a_recipe(spec):
    model, update = attacked()
    after = defense(spec, view(model), noise_generator(0))(update)
    assert after.defenses == (spec,)
    assert torch.equal(flat(after), flat(defense(after.defenses[0], view(model), noise_generator(0))(update)))


@pytest.mark.parametrize("arch", "AB")
def test_parts_are_named_by_the_view(arch):
    model, update = attacked(arch)
    for part, names in parts(view(model)).items():
        after = defense(f"withhold:{part}", view(model), noise_generator(0))(update)
        assert set(names) == set(update.gradients) - set(after.gradients) == set(after.withheld)
    assert set(parts(view(model))["block"]) == {n for n in update.gradients if n.startswith("blocks.0.")}


BAD = {"gauss:1": "unknown defence 'gauss': choose from gaussian", "": "unknown defence", "gaussian": "give one value",
       "gaussian:": "give one value", "gaussian:x": "give one value", "gaussian:1*foo": "give one value", "gaussian:1*": "give one value",
       "gaussian:nan": "positive number", "laplace:-1": "positive number", "laplace:inf": "positive number", "gaussian:1*rms*rms": "give one value",
       "clip": "such as clip:1", "clip:0": "positive number", "clip:1*norm": "give one value", "clip:1:2": "give one value",
       "weights:0": "must be a positive", "topk:2": r"\(0, 1\]", "topk:0": r"\(0, 1\]", "topk:nan": r"\(0, 1\]", "quantize:1": "from 2 to 32", "quantize:33": "from 2 to 32",
       "quantize:8.5": "give one value", "withhold": "parts are positions, patch, block", "withhold:head": "parts are", "withhold:": "parts are"}


@pytest.mark.parametrize("spec", BAD)
def test_a_bad_description_is_one_clear_line(spec):
    with pytest.raises(AprilError, match=BAD[spec]) as error: defense(spec, view(vit("vit_mnist")), noise_generator(0))
    assert "\n" not in str(error.value)


def test_noise_relative_to_nothing_known_is_refused():
    with pytest.raises(AprilError, match="choose norm or rms"): gaussian(update_of(0), 1.0, noise_generator(0), "mean")


def check_one_line(call, *words):
    with pytest.raises(MissingGradient) as error: call()
    assert all(w in str(error.value) for w in words) and "\n" not in str(error.value)


@pytest.mark.parametrize("part, missing", [("positions", "positions"), ("block", "blocks.0.attention.q.weight")])
def test_the_closed_form_names_the_gradient_that_it_lacks(part, missing):
    model, update = attacked()
    check_one_line(lambda: closed_form(model, withhold(update, parts(view(model))[part])), repr(missing), "withheld")


def test_matching_runs_without_what_is_withheld_but_april_needs_the_position_gradient():
    model, update = attacked("B")
    less = withhold(update, parts(view(model))["positions"])
    check_one_line(lambda: gradient_matching(model, less, paper_settings("april", 2)), "'positions'", "dlg, ig or tag")
    for method in ("dlg", "tag"):
        assert math.isfinite(gradient_matching(model, less, paper_settings(method, 2)).history[-1])


def test_a_match_without_the_gradients_nearest_to_the_pixels_claims_nothing():
    model, update = attacked("B")
    near = [n for part in ("patch", "block") for n in parts(view(model))[part]]
    answer = gradient_matching(model, withhold(update, near), Settings(2))
    assert answer.verdict == "not-converged" and "withheld" in answer.reason


def test_label_restoration_does_without_the_bias_and_names_the_weight():
    model, update = attacked("B")
    assert restore_labels(model, withhold(update, ["head.bias"])).tolist() == [3]
    check_one_line(lambda: restore_labels(model, withhold(update, ["head.bias", "head.weight"])), "'head.weight'", "withheld")


def test_the_closed_form_does_not_notice_clipping():
    model, update = attacked()
    plain, clipped = closed_form(model, update), closed_form(model, clip(update, 2 ** -10))
    assert clipped.verdict == plain.verdict == "exact" and (plain.images - clipped.images).abs().max() < 1e-4


def test_an_arm_names_its_defences_and_seeds_noise_by_image(monkeypatch):
    monkeypatch.delenv("APRIL_DATA", raising=False)
    arm = Arm("mnist", "A", "closed-form", defense=("clip:1", "gaussian:0.01*rms"))
    assert arm.config() == "init=torch defense=clip:1+gaussian:0.01*rms"
    cpu = torch.device("cpu")
    apart = [attack_slice(arm, [i], 0, cpu)[0] for i in (0, 1)]
    together = attack_slice(arm, [0, 1], 0, cpu)
    assert [r["psnr"] for r in apart] == pytest.approx([r["psnr"] for r in together], rel=1e-3)
    there, (undefended, _) = together[0], Slice("x", Arm("mnist", "A", "closed-form"), (0, 1), 0).names()
    assert any(there[k] != v for k, v in undefended[0].items() if k != "experiment"), "another defence is another row"


def april(*args): return subprocess.run([APRIL, *args], capture_output=True, text=True, timeout=300)


def test_the_command_line_defends_in_order_and_reports_it():
    plain, noisy = (april("attack", "--model", "vit_mnist", "--json", *more) for more in
                    ([], ["--defense", "clip:1", "--defense", "gaussian:0.01*rms"]))
    assert noisy.returncode == 0, noisy.stderr
    before, after = (json.loads(r.stdout, parse_constant=pytest.fail) for r in (plain, noisy))
    assert before["defenses"] == [] and after["defenses"] == ["clip:1", "gaussian:0.01*rms"]
    assert after["psnr"] < before["psnr"] - 50 and after["verdict"] == "approximate"
    shown = april("attack", "--model", "vit_mnist", "--defense", "quantize:6")
    assert shown.returncode == 0 and "defences: quantize:6" in shown.stdout


@pytest.mark.parametrize("args, why", [(["--defense", "gauss:1"], "unknown defence"), (["--defense", "clip"], "such as clip:1"),
                                       (["--defense", "withhold:positions", "--method", "closed-form"], "no gradient of 'positions': the client withheld it"),
                                       (["--defense", "withhold:positions", "--arch", "B", "--method", "april", "--steps", "2"], "dlg, ig or tag")])
def test_a_bad_defence_is_one_line_and_exit_code_2(args, why):
    run = april("attack", "--model", "vit_mnist", *args)
    assert run.returncode == 2 and run.stdout == "" and run.stderr.startswith("april: ") and run.stderr.count("\n") == 1
    assert why in run.stderr


@pytest.mark.parametrize("spec", ["topk:0.0001", "gaussian:100", "quantize:2", "laplace:1e6*rms"])
def test_numbers_stay_finite_whatever_is_destroyed(spec):
    run = april("attack", "--model", "vit_mnist", "--json", "--defense", spec)
    assert run.returncode == 0, run.stderr
    json.loads(run.stdout, parse_constant=pytest.fail)


def test_every_defence_has_an_example_that_works():
    model, update = attacked()
    for name, text in defenses.EXAMPLES.items():
        for spec in text.split(" or "): assert defense(spec, view(model), noise_generator(0))(update).defenses[0].startswith(name)


@given(seed=st.integers(0, 2**20), lr=st.floats(1e-3, 10.0), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_weights_say_of_gradients_what_their_own_format_leaves(seed, lr, dtype):
    update, weights = update_of(seed, dtype), update_of(seed + 1, dtype, scales=(1.0, 10.0, 1e-3)).gradients
    sent = as_weights(update, weights, lr)
    for name, g in update.gradients.items():
        bound = (2 * lr * g.abs() + weights[name].abs()) * torch.finfo(dtype).eps / lr
        assert ((sent[name] - g).abs() <= bound).all()
    assert not torch.equal(flat(sent), flat(update))
    with pytest.raises(AprilError, match="the learning rate must be a positive number"): as_weights(update, weights, 0.0)
