"""Theorem 3: the patch embedding leaks every ViT, its conditions, and what its certificate says."""
import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from april_nb.certificate import solve
from april_nb.closed_form import closed_form
from april_nb.defenses import gaussian, laplace, noise_generator
from april_nb.runner import group, read_rows, values
from april_nb.federated import MissingGradient, Update, client_update
from april_nb.patch import patch_leakage, ridge_leakage, shrinkage
from april_nb.vit import ViT, from_patches, init_torch, to_patches, vit

ROOT = Path(__file__).resolve().parent.parent
APRIL = Path(sys.executable).parent / "april"
READ = ("patch.weight", "positions")


def drawn(arch, width, seed=0, **options):
    """A small float64 ViT with 16 patches of 4 · channels numbers."""
    sizes = dict(image_size=8, channels=1, patch=2, depth=2, heads=1, mlp_width=2 * width, classes=5)
    model = ViT(arch, width=width, **sizes | options).double()
    init_torch(model, torch.Generator().manual_seed(seed))
    return model


@st.composite
def models(draw):
    """Both architectures, random sizes with P ≤ C − 1; below C = D, W_p has no inverse."""
    arch = draw(st.sampled_from("AB"))
    heads = draw(st.sampled_from([1, 2, 4]))
    return drawn(arch, heads * draw(st.integers(-(-17 // heads), 10 if heads > 2 else 20)),
                 draw(st.integers(0, 10**6)), channels=draw(st.sampled_from([1, 3, 16])), heads=heads,
                 depth=draw(st.integers(2 if arch == "A" else 1, 4)), class_token=draw(st.booleans()),
                 qkv_bias=draw(st.booleans()), dropout=draw(st.sampled_from([0.0, 0.2])))


def batch(model, n=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    shape = (n, model.channels, model.image_size, model.image_size)
    return torch.randn(shape, generator=g, dtype=torch.double), torch.randint(5, (n,), generator=g)


def rms(a, b):
    return (a - b).square().mean().sqrt().item()


@given(models(), st.integers(0, 100))
def test_theorem_3_is_exact_on_both_architectures_with_and_without_dropout(model, seed):
    images, labels = batch(model, 1, seed)
    answer = patch_leakage(model, client_update(model, images, labels, seed=seed))
    assert answer.systems[0].rank == 16 and answer.verdict == "exact", answer.reason
    assert rms(answer.images, images) < 1e-3


@given(models(), st.integers(2, 5), st.sampled_from([1e-3, 1e-1, 1.0]))
def test_any_number_of_local_steps_at_any_rate_is_as_good_as_one(model, steps, lr):
    images, labels = batch(model)
    answer = patch_leakage(model, client_update(model, images, labels, local_steps=steps, lr=lr))
    assert rms(answer.images, images) < 1e-3 and answer.verdict == "exact", answer.reason


@given(models(), st.integers(2, 4))
def test_copies_of_one_image_are_as_good_as_one_and_the_verdict_does_not_bet_on_it(model, copies):
    images, _ = batch(model)
    answer = patch_leakage(model, client_update(model, images.expand(copies, -1, -1, -1), torch.arange(copies)))
    assert rms(answer.images, images) < 1e-3 and answer.verdict == "not-unique"


@given(st.sampled_from("AB"), st.integers(0, 10**6), st.sampled_from([gaussian, laplace]),
       st.sampled_from([1e-9, 1e-7, 1e-5, 1e-3, 1e-2, 1e-1, 1.0]))
def test_the_certificate_foretells_the_error_under_noise_or_says_that_it_cannot(arch, seed, noise, r):
    model = drawn(arch, 64, seed)
    images, labels = batch(model, 1, seed)
    update = noise(client_update(model, images, labels), r, noise_generator(seed), "rms")
    answer = patch_leakage(model, update)
    if math.isfinite(answer.error): assert 1 / 4 < answer.error / rms(answer.images, images) < 4
    else: assert answer.verdict in ("not-applicable", "not-unique")
    if r == 1.0: assert answer.verdict not in ("exact", "approximate")


def solved_under_noise(P, C, ν, draws, D=50):
    """Singular values from 1 to 2, noise on the matrix alone: what is solved for, and the solutions."""
    g = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(shape, generator=g, dtype=torch.double)
    U, V, X = torch.linalg.qr(random(P, P)).Q, torch.linalg.qr(random(C, P)).Q, random(P, D)
    G = U * torch.linspace(1, 2, P, dtype=torch.double) @ V.mT
    return X, [solve((G + ν * random(P, C)).mT, G.mT @ X, "noisy", torch.float64) for _ in range(draws)]


@pytest.mark.parametrize("P, C", [(4, 24), (12, 24), (18, 24), (24, 48)])
def test_noise_in_the_matrix_takes_off_what_shrinkage_foretells(P, C):
    X, answers = solved_under_noise(P, C, ν=0.05, draws=2000)
    lost = (sum(a.X for a in answers) / len(answers) - X).square().mean().sqrt().item()
    foretold = sum(shrinkage(a, 1e-12) for a in answers) / len(answers)
    assert lost == pytest.approx(foretold, rel=0.15)   # C in place of C − P − 1 is off by a quarter and more


@pytest.mark.parametrize("P, sign", [(22, -1), (24, 1)])
def test_the_answer_is_too_short_with_two_equations_to_spare_and_too_long_with_none(P, sign):
    X, answers = solved_under_noise(P, 24, ν=0.02, draws=4000)
    pulled = torch.tensor([((a.X - X) * X).sum() / X.square().sum() for a in answers])
    assert sign * pulled.mean() > 2 * pulled.std() / len(pulled) ** 0.5


def test_with_one_equation_to_spare_noise_does_not_shorten_the_answer_and_shrinkage_says_so():
    _, answers = solved_under_noise(23, 24, ν=0.05, draws=20)
    assert all(a.system.relative_residual > 1e-6 and shrinkage(a, 1e-12) == 0 for a in answers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_certificate_foretells_rounding(dtype):
    model = vit("vit_cifar", "B")
    images, labels = batch(model.double())
    model.float()
    for seed in range(5):
        images, labels = batch(model, 1, seed)
        answer = patch_leakage(model, client_update(model, images.float(), labels, dtype=dtype))
        assert answer.verdict in ("exact", "approximate")
        assert 1 / 3 < answer.error / rms(answer.images, images.float().double()) < 3


def test_it_reads_two_gradients_and_no_weight():
    model = drawn("B", 24)
    update = client_update(model, *batch(model))
    only = Update({n: update[n] for n in READ})
    scrambled = drawn("B", 24, seed=1)
    with torch.no_grad():
        for p in scrambled.parameters(): p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    assert torch.equal(patch_leakage(scrambled, only).images, patch_leakage(model, update).images)


@pytest.mark.parametrize("name", READ)
def test_either_gradient_missing_is_named(name):
    model = drawn("B", 24)
    with pytest.raises(MissingGradient, match=f"'{name}': the client withheld it"):
        patch_leakage(model, client_update(model, *batch(model), withheld=(name,)))


def test_fixed_positions_are_named():
    model = drawn("B", 24, positions="normal")
    with pytest.raises(MissingGradient, match="fixed positions are not trained"):
        patch_leakage(model, client_update(model, *batch(model)))


@given(models())
def test_rows_sum_to_zero_exactly_where_only_layer_norms_read_the_stream(model):
    G = client_update(model, *batch(model))["positions"]
    sums = (G.sum(1).abs().max() / G.norm(dim=1).max()).item()
    only_layer_norms = model.arch == "B" and model.dropout.p == 0
    assert sums < 1e-12 if only_layer_norms else sums > 1e-6


@pytest.mark.parametrize("arch, width, dropout, rank", [
    ("A", 15, 0, 15), ("A", 16, 0, 16), ("B", 15, 0, 14), ("B", 16, 0, 15), ("B", 17, 0, 16), ("B", 16, 0.2, 16)])
def test_the_least_width_is_P_and_one_more_where_rows_sum_to_zero(arch, width, dropout, rank):
    model = drawn(arch, width, dropout=dropout)
    images, labels = batch(model)
    answer = patch_leakage(model, client_update(model, images, labels))
    assert answer.systems[0].rank == rank
    assert answer.verdict == ("exact" if rank == 16 else "not-unique")
    assert (rms(answer.images, images) < 1e-3) == (rank == 16)


def test_a_null_direction_makes_another_image_with_the_same_two_gradients():
    model = drawn("B", 16)
    images, labels = batch(model)
    update = client_update(model, images, labels)
    G_p, X = update["positions"][1:], to_patches(images, 2)[0]
    n = torch.linalg.svd(G_p)[0][:, -1:]
    torch.testing.assert_close(G_p.mT @ (X + n), update["patch.weight"])


@given(st.integers(0, 10**6))
def test_a_dropped_token_hides_its_patch_and_no_other(seed):
    model = drawn("B", 32)
    model.dropout = nn.Dropout1d(0.3)
    images, labels = batch(model)
    update = client_update(model, images, labels, seed=seed)
    kept = update["positions"][1:].norm(dim=1) > 0
    answer = patch_leakage(model, update)
    found, true = to_patches(answer.images, 2)[0], to_patches(images, 2)[0]
    assert answer.systems[0].rank == kept.sum()
    assert torch.allclose(found[kept], true[kept], atol=1e-6) and (found[~kept].abs() < 1e-6).all()
    expected = "exact" if kept.all() else "not-unique" if kept.any() else "nothing-leaks"
    assert answer.verdict == expected


def test_one_block_breaks_architecture_A_and_not_B():
    for arch, verdict in (("A", "not-unique"), ("B", "exact")):
        model = drawn(arch, 32, depth=1)
        assert patch_leakage(model, client_update(model, *batch(model))).verdict == verdict


def test_nothing_leaks_through_a_head_of_zeros():
    model = drawn("B", 24)
    nn.init.zeros_(model.head.weight)
    answer = patch_leakage(model, client_update(model, *batch(model)))
    assert answer.verdict == "nothing-leaks" and torch.isfinite(answer.images).all()


@given(st.integers(2, 4), st.integers(0, 10**6))
def test_a_batch_gives_the_matrix_average_of_algorithm_1(n, seed):
    model = drawn("A", 24, seed)
    images, labels = batch(model, n, seed)
    alone = torch.stack([client_update(model, x[None], y[None])["positions"][1:] for x, y in zip(images, labels)])
    M = torch.linalg.pinv(alone.mean(0).mT) @ alone.mT / n
    update = client_update(model, images, labels)
    answer = patch_leakage(model, update)
    expected = from_patches((M @ to_patches(images, 2)).sum(0, keepdim=True), 2, 8, 8)
    assert answer.verdict == "not-unique"
    assert rms(answer.images, expected) < 1e-4 * expected.norm()
    assert rms(answer.images, closed_form(model, update).images) < 1e-4 * expected.norm()


def test_a_batch_that_claims_to_be_one_image_is_betrayed_by_its_residual():
    model = drawn("B", 64)
    answer = patch_leakage(model, replace(client_update(model, *batch(model, 2)), examples=1))
    assert answer.verdict == "not-applicable" and answer.systems[0].relative_residual > 1e-3


def test_factors_of_their_own_change_the_contrast_and_the_bias_knows_them():
    model = drawn("B", 24)
    images, labels = batch(model)
    update = client_update(model, images, labels)
    scale = {"patch.weight": 3.0, "patch.bias": 3.0, "positions": 2.0}
    update = replace(update, gradients={n: scale.get(n, 1) * g for n, g in update.gradients.items()})
    assert rms(patch_leakage(model, update).images, 1.5 * images) < 1e-6
    torch.testing.assert_close(update["patch.bias"], 1.5 * update["positions"][1:].sum(0))


@given(st.integers(0, 10**6))
def test_ridge_regression_equals_least_squares_without_noise(seed):
    model = drawn("B", 24, seed)
    images, labels = batch(model, 1, seed)
    assert rms(ridge_leakage(model, client_update(model, images, labels)).images, images) < 1e-3


@pytest.mark.parametrize("seed", range(4))
def test_ridge_regression_does_not_divide_by_what_noise_put_into_an_open_direction(seed):
    model = drawn("B", 16, seed)   # rank 15 of 16, before the noise
    images, labels = batch(model, 1, seed)
    noisy = gaussian(client_update(model, images, labels), 1e-4, noise_generator(seed), "rms")
    assert patch_leakage(model, noisy).systems[0].rank == 16
    assert 2 * rms(ridge_leakage(model, noisy).images, images) < rms(patch_leakage(model, noisy).images, images)


def test_ridge_regression_never_calls_its_answer_exact_and_knows_when_nothing_was_sent():
    model = drawn("B", 24)
    update = client_update(model, *batch(model))
    answer = ridge_leakage(model, update)
    assert answer.verdict == "approximate" and 0 < answer.error < 1e-3 and answer.systems == patch_leakage(model, update).systems
    assert ridge_leakage(model, replace(update, examples=2)).verdict == "not-unique"
    nn.init.zeros_(model.head.weight)
    zero = ridge_leakage(model, client_update(model, *batch(model)))
    assert zero.verdict == "nothing-leaks" and not zero.images.any() and zero.error == 1


@pytest.mark.parametrize("width", [24, 12])
@pytest.mark.parametrize("attack", [patch_leakage, ridge_leakage])
def test_the_system_is_decomposed_once(attack, width, monkeypatch):
    model = drawn("B", width)
    update, calls, svd = gaussian(client_update(model, *batch(model)), 1e-3, noise_generator(0), "rms"), [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda A, **options: calls.append(A) or svd(A, **options))
    attack(model, update)
    assert len(calls) == 1


def report(*args):
    run = subprocess.run([APRIL, "attack", *args, "--json"], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("model, init, least", [
    ("vit_mnist", "torch", 120), ("vit_cifar", "torch", 120), ("vit_b_16", "torch", 100),
    ("vit_mnist", "timm", 105), ("vit_cifar", "timm", 105), ("vit_b_16", "timm", 85)])
def test_the_command_recovers_a_photo_from_the_real_vit(model, init, least):
    r = report("--model", model, "--arch", "B", "--method", "patch", "--init", init, "--seed", "0")
    assert r["psnr"] >= least and r["verdict"] == "exact" and r["method"] == "patch" and r["labels"] is None
    assert abs(r["psnr"] - r["foretold_psnr"]) < 6
    assert [(s["name"], s["rank"]) for s in r["systems"]] == [("patch_embedding", 196 if model == "vit_b_16" else 16)]
    assert r["seconds"] < 0.5


@pytest.mark.parametrize("options, why", [("--know withheld", "'positions': the client withheld it"),
                                          ("--positions sincos2d", "fixed positions are not trained"),
                                          ("--defense withhold:patch", "'patch.weight': the client withheld it")])
def test_the_command_says_in_one_line_which_gradient_is_missing(options, why):
    run = subprocess.run([APRIL, "attack", "--model", "vit_mnist", "--arch", "B", "--method", "patch", *options.split()],
                         capture_output=True, text=True, timeout=300)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("april: ") and run.stderr.count("\n") == 1 and why in run.stderr


def test_every_row_of_the_results_is_explained_by_its_certificate():
    arms = group(read_rows(ROOT / "results" / "patch.csv"), "dataset", "arch", "config")
    assert {(d, a) for d, a, _ in arms} >= set(itertools.product(("mnist", "cifar10"), "AB")) | {("imagenet", "B")}
    for (dataset, arch, config), rows in arms.items():
        exact = [r for r in rows if r["verdict"] == "exact"]
        assert all(r["mse"] < 1e-5 for r in exact), (dataset, arch, config)
        if arch == "B":
            least = {"init=torch": 120, "init=timm": 105}[config] - 20 * (dataset == "imagenet")
            assert len(exact) == len(rows) and values(rows, "psnr").min() >= least
