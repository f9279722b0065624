"""The matching engine equals the plain autograd step, in float64 to 1e-9, whatever the model, batch and target."""
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from april_nb.federated import AprilError, Update, client_update
from april_nb.matching import Matcher, Shares, plain_shares
from april_nb.optimization import LBFGS, PUBLISHED, RESTART, Settings, match, objective, paper_settings
from april_nb.vit import ViT, init_torch


@st.composite
def cases(draw):
    """A small float64 model, updates of several victims, guesses and labels."""
    heads = draw(st.sampled_from([1, 2]))
    model = ViT(draw(st.sampled_from("AB")), image_size=8, channels=draw(st.sampled_from([1, 3])), patch=4,
                width=heads * draw(st.integers(4, 24)), depth=draw(st.integers(1, 2)), heads=heads, mlp_width=draw(st.integers(3, 40)),
                classes=5, mlp_gelus=draw(st.sampled_from([1, 2])), qkv_bias=draw(st.booleans()), class_token=draw(st.booleans())).double()
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    init_torch(model, g)
    N, B = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.double)
    images = lambda: randn(N, B, model.channels, 8, 8)
    names = [n for n, _ in model.named_parameters()]
    withheld = tuple(draw(st.lists(st.sampled_from(names), max_size=4, unique=True)))
    noise = draw(st.sampled_from([0.0, 0.1]))
    updates = []
    for x in images():
        u = client_update(model, x, torch.randint(5, (B,), generator=g), withheld=withheld)
        updates.append(Update({n: t + noise * t.square().mean().sqrt() * randn(*t.shape) for n, t in u.gradients.items()}, B))
    labels = randn(N, B, 5).softmax(-1) if draw(st.booleans()) else torch.randint(5, (N, B), generator=g)
    return model, updates, images().requires_grad_(), labels


LOSSES = {"distance": Shares.distance, "relative": Shares.relative_distance, "cosine": Shares.cosine, "l1": lambda s: s.l1,
          "positions": lambda s: s.cosine({"positions": 1.0}), "weighted": lambda s: s.distance({"patch.weight": 3.0, "head.bias": 0.5})}


@settings(max_examples=40)
@given(cases(), st.sampled_from(sorted(LOSSES)))
def test_losses_and_image_gradients_equal_the_materialised_ones(case, loss):
    model, updates, x, y = case
    loss = LOSSES[loss]
    ours = loss(Matcher(model, updates, dtype=torch.double).shares(x, y, l1=True))
    plain = torch.cat([loss(plain_shares(model, *guess, u)) for *guess, u in zip(x, y, updates)])
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)
    gradient, expected = (torch.autograd.grad(l.sum(), x, allow_unused=True)[0] for l in (ours, plain))
    if expected is None or not expected.any(): return
    assert (gradient - expected).norm() <= 1e-9 * expected.norm() + 1e-13


@given(cases(), st.data())
def test_a_subset_of_parameters_counts_alone(case, data):
    model, updates, x, y = case
    names = data.draw(st.lists(st.sampled_from(sorted(updates[0].gradients)), min_size=1, unique=True))
    whole, part = (Matcher(model, updates, n, dtype=torch.double).shares(x, y) for n in (None, names))
    torch.testing.assert_close(part.distance(), whole.distance(dict.fromkeys(names, 1.0)), rtol=1e-9, atol=1e-12)


def test_a_relative_distance_counts_every_tensor_by_its_own_size_and_none_that_holds_rounding_alone():
    ours, theirs = torch.tensor([[[3.0, 0.0], [3e-3, 0.0], [9.0, 9.0]]]), torch.tensor([[[1.0, 0.0], [1e-3, 0.0], [1e-9, 0.0]]])
    dot = lambda a, b: (a * b).sum(-1).double()
    shares = Shares(("loud", "quiet", "rounding"), dot(ours, ours), dot(ours, theirs), dot(theirs, theirs))
    torch.testing.assert_close(shares.relative_distance(), torch.tensor([8.0]).double(), rtol=1e-5, atol=0)


def tiny(seed=0, n=1):
    model = ViT("B", image_size=8, channels=1, patch=4, width=24, depth=2, heads=2, mlp_width=24, classes=5).double()
    init_torch(model, torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(1000 + seed)   # not the seed of a first guess
    x, y = torch.randn(n, 1, 8, 8, generator=g, dtype=torch.double), torch.randint(5, (n,), generator=g)
    return model, x, y


def test_equation_12_as_printed_is_the_search_of_the_relative_loss_with_another_weight():
    model, x, y = tiny(n=2)
    updates, guess = [client_update(model, a[None], b[None]) for a, b in zip(x, y)], torch.zeros_like(x)[:, None].requires_grad_()
    shares = Matcher(model, updates, dtype=torch.double).shares(guess, y[:, None])
    norm, printed = shares.target.sum(1), shares.distance() - 3 * shares.cosine({"positions": 1.0})   # Eq. 12 with α = 3
    ours = objective(shares, guess, Settings(1, position=3.0, absolute=True), "positions")
    torch.testing.assert_close(*(torch.autograd.grad(l.sum(), guess, retain_graph=True)[0] for l in (norm * ours, printed)))
    one, = match(model, updates[:1], Settings(5, position=3.0, absolute=True), y[:1, None], dtype=torch.double)
    same, = match(model, updates[:1], Settings(5, position=3.0 / norm[0].item()), y[:1, None], dtype=torch.double)
    torch.testing.assert_close(one.images, same.images)


def test_victims_do_not_notice_each_other():
    model, x, y = tiny(n=3)
    updates = [client_update(model, a[None], b[None]) for a, b in zip(x, y)]
    for optimiser, lr in (("adam", 0.1), ("signed", 0.1), ("lbfgs", 1.0)):
        s = Settings(12, optimiser=optimiser, lr=lr, schedule="constant")
        together = match(model, updates, s, y[:, None], dtype=torch.double)
        for i, answer in enumerate(together):
            alone, = match(model, updates[i:i + 1], s, y[i:i + 1, None], seeds=[i], dtype=torch.double)
            torch.testing.assert_close(answer.images, alone.images, rtol=1e-6, atol=1e-6)


def test_matching_recovers_a_small_image():
    model, x, y = tiny()
    answer, = match(model, [client_update(model, x, y)], Settings(400, optimiser="lbfgs", lr=1.0, schedule="constant"), y[None], dtype=torch.double)
    assert answer.history.min() < 1e-6 and (answer.images - x).abs().mean() < 0.05


def test_the_best_iterate_is_returned_and_history_is_kept():
    model, x, y = tiny()
    update = client_update(model, x, y)
    answer, = match(model, [update], Settings(30, lr=1.0), y[None], dtype=torch.double)
    again = Matcher(model, [update], dtype=torch.double).shares(answer.images[None].requires_grad_(), y[None])
    assert len(answer.history) == 30
    assert math.isclose((again.distance() / again.target.sum(1)).item(), answer.history.min().item(), rel_tol=1e-9)


def test_restarts_keep_the_guess_of_least_loss():
    model, x, y = tiny(n=2)
    updates = [client_update(model, a[None], b[None]) for a, b in zip(x, y)]
    settings = Settings(8)
    tries = [match(model, updates, settings, y[:, None], seeds=[s, s + 1], dtype=torch.double) for s in (0, RESTART, 2 * RESTART)]
    best = match(model, updates, replace(settings, restarts=3), y[:, None], seeds=[0, 1], dtype=torch.double)
    for answer, *one in zip(best, *tries): assert answer.history.min() == min(t.history.min() for t in one)


def test_free_variables_are_whatever_is_decoded():
    model, x, y = tiny(n=2)
    updates = [client_update(model, a[None], b[None]) for a, b in zip(x, y)]
    start = lambda generator: torch.randn(64, dtype=torch.double, generator=generator)
    as_images = lambda v: v.view(-1, 1, 1, 8, 8)
    free = match(model, updates, Settings(5), y[:, None], start=start, decode=as_images, dtype=torch.double)
    pixels = match(model, updates, Settings(5), y[:, None], start=lambda g: as_images(start(g))[0], dtype=torch.double)
    for a, b in zip(free, pixels): torch.testing.assert_close(a.images, b.images)
    with pytest.raises(AprilError, match="start="): match(model, updates, Settings(5), y[:, None], decode=as_images)


def test_every_step_is_told_with_its_guess_and_the_first_guess_is_as_wide_as_asked():
    model, x, y = tiny()
    update, told = client_update(model, x, y), []
    answer, = match(model, [update], Settings(4, start=0.0), y[None], dtype=torch.double,
                    watch=lambda step, losses, images: told.append((step, losses.item(), images.clone())))
    assert [t[0] for t in told] == [0, 1, 2, 3] and [t[1] for t in told] == answer.history.tolist()
    assert not told[0][2].any() and told[1][2].any() and told[0][2].shape == (1, 1, 1, 8, 8)


def test_a_verdict_needs_the_gradients_nearest_to_the_pixels_to_match():
    model, x, y = tiny()
    update = client_update(model, x, y)
    settings = Settings(400, optimiser="lbfgs", schedule="constant")
    early, late = (match(model, [update], replace(settings, steps=n), y[None], dtype=torch.double)[0] for n in (3, 400))
    assert (early.verdict, late.verdict) == ("not-converged", "approximate") and early.history[-1] < 0.5


def test_a_victim_that_overflows_stops_alone():
    model, x, y = tiny(n=2)
    updates = [client_update(model, a[None], b[None]) for a, b in zip(x, y)]
    updates[1] = Update({n: g * 1e200 for n, g in updates[1].gradients.items()})
    good, bad = match(model, updates, Settings(5), y[:, None], dtype=torch.double)
    assert good.history.isfinite().all() and bad.verdict == "not-converged" and bad.images.isfinite().all()


def test_the_global_generator_is_not_touched():
    model, x, y = tiny()
    update, state = client_update(model, x, y), torch.get_rng_state()
    match(model, [update], Settings(2), y[None], dtype=torch.double)
    assert torch.equal(state, torch.get_rng_state())


def test_lbfgs_solves_quadratics_of_different_condition_side_by_side():
    scales = torch.stack([torch.logspace(0, k, 6, dtype=torch.double) for k in (0.5, 1, 2)])
    x, lbfgs = torch.ones(3, 6, dtype=torch.double), LBFGS()
    for _ in range(60): x = lbfgs.step(x, scales * x)
    assert x.abs().max() < 1e-6


def test_unknown_methods_and_missing_boxes_are_named():
    model, x, y = tiny()
    with pytest.raises(AprilError, match="choose from dlg, ig, tag, april"): paper_settings("magic", 10)
    with pytest.raises(AprilError, match="with box="): match(model, [client_update(model, x, y)], PUBLISHED["ig"], y[None])
    with pytest.raises(AprilError, match="unknown optimiser"): match(model, [client_update(model, x, y)], Settings(1, optimiser="sgd"), y[None])
