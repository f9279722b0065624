"""Batches in the span of their patches: what linear algebra leaves open, and how a search tells images apart."""
import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from april_nb.federated import AprilError, MissingGradient, client_update
from april_nb.metrics import best_assignment
from april_nb import optimization
from april_nb.optimization import LBFGS, RESTART, Settings, match
from april_nb.separation import family, separate
from april_nb.refinement import refine
from april_nb.subspace import equations
from april_nb.views import view
from april_nb.vit import ViT, init_torch, to_patches, vit


def small(arch="B", width=32, seed=0):
    """A float64 ViT with 4 patches of 16 pixels and learned positions."""
    model = ViT(arch, image_size=8, channels=1, patch=4, width=width, depth=2, heads=1, mlp_width=64, classes=5).double()
    init_torch(model, torch.Generator().manual_seed(seed))
    return model


def batch(model, labels, seed=0):
    """Images and what their client sends, without the position gradient."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(len(labels), 1, 8, 8, generator=g, dtype=torch.double)
    return x, client_update(model, x, torch.tensor(labels), withheld=("positions",))


@given(arch=st.sampled_from("AB"), images=st.integers(1, 3), spare=st.integers(-3, 3), seed=st.integers(0, 9))
def test_a_batch_leaves_p_times_b_minus_1_directions_open_if_and_only_if_the_width_has_room(arch, images, spare, seed):
    needed = 4 * (images + 1) + (2 if arch == "B" else 1)
    model = small(arch, needed + spare, seed)
    x, update = batch(model, list(range(images)), seed)
    f, X = family(view(model), update), to_patches(x, 4)
    assert (f.Q.shape[1] == 4 * (images - 1)) == (spare >= 0)
    assert torch.allclose(f.patches(f.coordinates(X)), X, atol=1e-5)


@pytest.mark.parametrize("images", [2, 3])
def test_the_rank_of_the_equations_does_not_hang_on_how_a_decomposition_rounds(images):
    model = small(width=64)
    e = equations(view(model), batch(model, list(range(images)))[1])
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        turn = torch.linalg.qr(torch.randn(len(e.K), len(e.K), generator=g, dtype=torch.double)).Q
        turned = replace(e, rest=e.rest @ turn).solve(torch.float64)
        assert turned.system.rank == 4
        torch.testing.assert_close(turned.X, e.solve(torch.float64).X)


def test_a_batch_of_distinct_classes_comes_back_with_labels_restored():
    model = small()
    x, update = batch(model, [1, 2, 3])
    told = []
    answer, = separate(model, [update], 700, watch=lambda step, losses, images: told.append(step))
    back = answer.images[best_assignment(answer.images, x)]
    assert (back - x).abs().max() < 1e-4
    assert sorted(answer.labels.tolist()) == [1, 2, 3] and answer.verdict == "approximate"
    assert told == list(range(700)) and len(answer.history) == 700
    assert [(s.name, s.rank, s.expected_rank) for s in answer.systems] == [
        ("patches", 12, 12), ("tokens", 13, 13), ("subspace", 4, 12)]


def test_a_batch_with_two_images_of_one_class_comes_back_with_labels_restored():
    model = small()
    x, update = batch(model, [1, 1, 3])
    answer, = separate(model, [update], 700, seeds=[1])
    assert (answer.images[best_assignment(answer.images, x)] - x).abs().max() < 1e-4
    assert sorted(answer.labels.tolist()) == [1, 1, 3] and answer.verdict == "approximate"


def test_a_batch_comes_back_without_the_gradients_of_both_embeddings():
    model = small()
    x, _ = batch(model, [1, 1])
    update = client_update(model, x, torch.tensor([1, 1]), withheld=("positions", "patch.weight", "patch.bias"))
    answer, = separate(model, [update], 500, restarts=4)   # half of the first guesses arrive
    assert family(view(model), update).Q.shape == (16, 4)
    assert (answer.images[best_assignment(answer.images, x)] - x).abs().max() < 1e-4


def test_victims_separated_together_do_not_notice_each_other_nor_the_generator():
    model, state = small(), torch.get_rng_state()
    updates, labels = [batch(model, [0, 1], seed)[1] for seed in (0, 1)], torch.tensor([[0, 1], [0, 1]])
    together = separate(model, updates, 5, labels, seeds=[3, 4])
    alone, = separate(model, updates[1:], 5, labels[1:], seeds=[4])
    assert torch.allclose(together[1].images, alone.images) and torch.equal(torch.get_rng_state(), state)


def test_of_several_first_guesses_the_one_of_least_loss_counts():
    model = small()
    updates, labels = [batch(model, [1, 1], seed)[1] for seed in (0, 1)], torch.tensor([[1, 1], [1, 1]])
    tries = [separate(model, updates, 20, labels, seeds=[RESTART * r, 1 + RESTART * r]) for r in range(3)]
    for got, of in zip(separate(model, updates, 20, labels, restarts=3), zip(*tries)):
        assert torch.equal(got.images, min(of, key=lambda a: a.history.min()).images)


@pytest.mark.parametrize("search", [lambda *a: separate(*a, restarts=2), refine], ids=["separate", "refine"])
def test_the_server_keeps_its_model(search):
    model = small()
    before = copy.deepcopy(model)
    search(model, [batch(model, [1])[1]], 2)
    assert all(p.requires_grad for p in model.parameters()) and next(model.parameters()).dtype == torch.double
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters()))


SEARCHES = {"match": lambda model, u, **options: match(model, [u], Settings(5), torch.tensor([[1]]), **options)[0],
            "refine": lambda model, u, **options: refine(model, [u], 5, **options)[0],
            "separate": lambda model, u, **options: separate(model, [u], 5, **options)[0]}


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES.keys())
def test_a_search_stops_when_its_seconds_are_over_and_not_before_its_first_step(search, monkeypatch):
    model = small()
    _, update = batch(model, [1])
    monkeypatch.setattr(optimization.time, "monotonic", itertools.count().__next__)   # a second a look
    whole, told = search(model, update), []
    some = search(model, update, seconds=2.5, watch=lambda step, losses, images: told.append(step))
    assert told == [0, 1, 2] and torch.equal(some.history, whole.history[:3])
    assert "stopped by the budget after 3 of 5 steps" in some.reason and "stopped" not in whole.reason
    assert len(search(model, update, seconds=0).history) == 1
    for wrong in (-1.0, math.nan):
        with pytest.raises(AprilError, match="seconds"): search(model, update, seconds=wrong)


def test_restarts_share_the_seconds(monkeypatch):
    model, told = small(), []
    monkeypatch.setattr(optimization.time, "monotonic", itertools.count().__next__)
    separate(model, [batch(model, [1, 2])[1]], 9, restarts=2, seconds=5, watch=lambda step, *_: told.append(step))
    assert told == 2 * [0, 1, 2]


def test_a_stopped_search_whose_gradients_match_says_both():
    model = small(width=64)   # the linear solution is exact
    x, update = batch(model, [1])
    answer, = refine(model, [update], 5, seconds=0)
    assert answer.verdict == "approximate" and torch.allclose(answer.images, x, atol=1e-6)
    assert answer.reason.startswith("stopped by the budget after 1 of 5 steps: the gradients nearest to the pixels match")


def test_a_step_reaches_no_further_than_a_plateau():
    lbfgs, slope = LBFGS(), torch.ones(2, 3, dtype=torch.double)
    x = lbfgs.step(slope, slope)
    flat = torch.tensor([[0.5], [0.999]], dtype=torch.double) * slope   # curvatures ½ · 3 and a thousandth of it
    moved = (x - lbfgs.step(x, flat)).square().mean(1).sqrt()
    assert moved[0] < 1 and moved[1] == pytest.approx(4)


def test_with_the_weights_of_timm_a_search_stays_where_pixels_are():
    model, g = vit("vit_cifar", "B", "timm"), torch.Generator().manual_seed(2)
    x = torch.randn(2, 3, 32, 32, generator=g)
    x = torch.nn.functional.interpolate(torch.randn(2, 3, 8, 8, generator=g), size=32, mode="bicubic")
    told, labels = [], torch.tensor([1, 1])
    update = client_update(model, x, labels, withheld=("positions",))
    answer, = separate(model, [update], 25, labels[None], seeds=[3], watch=lambda step, losses, images: told.append(images[0]))
    assert max(images.abs().max() for images in told) < 10
    assert answer.images.isfinite().all() and answer.history[-1] < answer.history[0] / 3


def test_what_the_search_cannot_do_without_is_named():
    model = small()
    x, _ = batch(model, [0, 1])
    without = client_update(model, x, torch.tensor([0, 1]), withheld=("blocks.0.attention.v.weight",))
    with pytest.raises(MissingGradient, match="attention.v.weight"): separate(model, [without], 2)
    with pytest.raises(AprilError, match="take separate"): refine(model, [batch(model, [0, 1])[1]], 2)
