"""Labels from gradients: what is claimed of one image, of certain counts, of rounding and of batches."""
import inspect
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from april_nb.federated import MissingGradient, client_update
from april_nb.labels import certain_counts, idlg, nearest_counts, public_outlook, restore_labels, yin
from april_nb.linear import NotRecoverable
from april_nb.views import NotApplicable, view
from april_nb.vit import INITIALISATIONS, ViT


@st.composite
def models(draw, min_classes=2, bias=True):
    """A small float64 ViT with random sizes, whose classifier may be as sure of itself as a trained one's."""
    model = ViT(draw(st.sampled_from("AB")), image_size=8, channels=draw(st.sampled_from([1, 3])), patch=4, width=16,
                depth=draw(st.integers(1, 2)), heads=2, mlp_width=16, classes=draw(st.integers(min_classes, 12)),
                class_token=draw(st.booleans())).double()
    init = INITIALISATIONS[draw(st.sampled_from(sorted(INITIALISATIONS)))]
    init(model, torch.Generator().manual_seed(draw(st.integers(0, 10**6))))
    with torch.no_grad(): model.head.weight *= draw(st.sampled_from([1, 10]))
    if not bias: model.head.bias = None
    return model


def batch(model, n, seed):
    g = torch.Generator().manual_seed(seed)
    shape = (n, model.channels, model.image_size, model.image_size)
    return (torch.randn(shape, generator=g, dtype=torch.double),
            torch.randint(model.head.out_features, (n,), generator=g))


def counts(model, labels):
    return torch.bincount(labels, minlength=model.head.out_features)


seeds, formats = st.integers(0, 10**6), st.sampled_from([torch.float64, torch.float32, torch.bfloat16])


@given(models(), seeds, formats)
def test_the_label_of_one_image_is_exact(model, seed, dtype):
    images, labels = batch(model, 1, seed)
    update = client_update(model, images, labels, dtype=dtype)
    assert idlg(view(model), update).equal(labels) and restore_labels(model, update).equal(labels)


@given(models(min_classes=3, bias=False), seeds)
def test_the_weights_alone_tell_one_label_of_three_classes_or_more(model, seed):
    images, labels = batch(model, 1, seed)
    update = client_update(model, images, labels)
    assert idlg(view(model), update).equal(labels) and restore_labels(model, update).equal(labels)


@given(models(min_classes=3), seeds)
def test_a_withheld_bias_does_not_hide_one_label(model, seed):
    images, labels = batch(model, 1, seed)
    assert idlg(view(model), client_update(model, images, labels, withheld=("head.bias",))).equal(labels)


@given(models(), st.integers(1, 40), seeds, formats)
def test_certain_counts_never_exceed_the_truth(model, n, seed, dtype):
    images, labels = batch(model, n, seed)
    certain = certain_counts(view(model), client_update(model, images, labels, dtype=dtype))
    assert (certain <= counts(model, labels)).all()


@given(models(), st.integers(2, 40), seeds, st.booleans())
def test_restored_labels_are_as_many_as_images_sorted_and_respect_what_is_certain(model, n, seed, withhold):
    images, labels = batch(model, n, seed)
    update = client_update(model, images, labels, withheld=("head.bias",) * withhold)
    restored = restore_labels(model, update)
    assert restored.shape == (n,) and restored.equal(restored.sort().values)
    assert (certain_counts(view(model), update) <= counts(model, restored)).all()


@given(models(), st.integers(1, 40), seeds)
def test_a_classifier_of_zeros_gives_every_label_away(model, n, seed):
    nn.init.zeros_(model.head.weight)
    images, labels = batch(model, n, seed)
    assert restore_labels(model, client_update(model, images, labels)).equal(labels.sort().values)


@given(st.lists(st.floats(-3, 8), min_size=2, max_size=4), st.integers(1, 5), st.integers(0, 3))
def test_nearest_counts_minimise_the_squared_distance(target, n, at):
    least = torch.zeros(len(target), dtype=torch.long)
    least[at % len(target)] = n // 2
    target = torch.tensor(target, dtype=torch.double)
    found = nearest_counts(target, least, n)
    assert found.sum() == n and (found >= least).all()
    best = min((torch.tensor(c) - target).square().sum() for c in itertools.product(range(n + 1), repeat=len(target))
               if sum(c) == n and (torch.tensor(c) >= least).all())
    torch.testing.assert_close((found - target).square().sum(), best)


@given(st.lists(st.integers(0, 5), min_size=2, max_size=12), st.floats(-5, 5), seeds)
def test_rounding_is_right_while_errors_differ_by_less_than_one(true, shift, seed):
    true = torch.tensor(true)
    error = shift + 0.99 * torch.rand(len(true), generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    assert nearest_counts(true + error, torch.zeros_like(true), int(true.sum())).equal(true)


@given(models(), st.integers(1, 20), seeds)
def test_yins_rule_returns_distinct_classes_only(model, n, seed):
    found = yin(view(model), client_update(model, *batch(model, n, seed)))
    assert len(found) == len(set(found.tolist())) == min(n, model.head.out_features)


@given(models(), seeds)
def test_public_pictures_leave_model_and_generator_as_they_were(model, seed):
    before, state = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    p, h = public_outlook(model, 6, seed)
    assert p.shape == (6, model.head.out_features) and h.shape == (6, 16)
    torch.testing.assert_close(p.sum(1), torch.ones(6, dtype=torch.double))
    assert torch.equal(torch.get_rng_state(), state) and not model.head._forward_pre_hooks
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert p.equal(public_outlook(model, 6, seed)[0])


def small(classes=10, **options):
    model = ViT("B", image_size=8, channels=3, patch=4, width=16, depth=2, heads=2, mlp_width=16, classes=classes, **options)
    INITIALISATIONS["torch"](model.double(), torch.Generator().manual_seed(0))
    return model


def test_two_classes_need_the_bias():
    model = small(2)
    images, labels = batch(model, 1, 0)
    assert idlg(view(model), client_update(model, images, labels)).equal(labels)
    model.head.bias = None
    with pytest.raises(NotRecoverable, match="two classes and no bias"): idlg(view(model), client_update(model, images, labels))


def test_idlg_refuses_a_batch():
    with pytest.raises(NotApplicable, match="one image"): idlg(view(small()), client_update(small(), *batch(small(), 2, 0)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_no_gradient_no_label(n, bias):
    model = small()
    if not bias: model.head.bias = None
    update = client_update(model, *batch(model, n, 0), loss=lambda s, y: 0 * s.sum())
    with pytest.raises(NotRecoverable, match="saw no label"): restore_labels(model, update)


def test_a_withheld_classifier_is_named():
    model = small()
    update = client_update(model, *batch(model, 2, 0), withheld=("head.weight", "head.bias"))
    with pytest.raises(MissingGradient, match="'head.weight'.*withheld"): restore_labels(model, update)


def test_counts_that_contradict_the_batch_are_set_aside():
    model = small()
    images, labels = batch(model, 4, 0)   # a sum in place of a mean quadruples every count
    update = client_update(model, images, labels, loss=lambda s, y: 4 * nn.functional.cross_entropy(s, y))
    assert certain_counts(view(model), update).sum() > 4 and restore_labels(model, update).shape == (4,)


def test_dropout_leaves_the_labels_of_a_batch_where_they_were():
    model, state = small(dropout=0.1), torch.get_rng_state()
    images, labels = batch(model, 4, 0)
    assert restore_labels(model, client_update(model, images, labels)).equal(labels.sort().values)
    assert torch.equal(torch.get_rng_state(), state) and model.training


def test_label_rules_see_a_model_or_its_view_and_an_update_only():
    for rule, first in [(idlg, "view"), (yin, "view"), (certain_counts, "view"), (restore_labels, "model")]:
        names = list(inspect.signature(rule).parameters)
        assert names[:2] == [first, "update"] and set(names[2:]) <= {"seed"}
