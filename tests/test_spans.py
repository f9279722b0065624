"""Theorem 5: every layer names its inputs, and a batch comes back image by image, without labels."""
import copy
import inspect
import math
from dataclasses import replace

import pytest
import torch
from torchvision.models import VisionTransformer

import april_nb.spans
from april_nb.data import FORMATS, photos
from april_nb.defenses import clip, gaussian, withhold
from april_nb.federated import client_update, generator_of
from april_nb.metrics import best_assignment, psnr
from april_nb.spans import (NEAR, Formed, Peeling, Products, Suspect, Tokens, activation, assembled, beside, by_places,
                            certify_tokens, companions, conclude, families, freed, from_heads, input_spans, jacobian, label_of, own_jacobians,
                            places_of, polish, spans, unexplained, wanted)
from april_nb.separation import family
from april_nb.subspace import subspace_leakage
from april_nb.training import train
from april_nb.views import view
from april_nb.vit import ViT, init_timm, init_torch, to_patches, vit


def small(width=48, init=init_torch, **changes):
    """A ViT with 4 patches of 64 pixels and learned positions."""
    model = ViT("B", **dict(image_size=16, channels=1, patch=8, width=width, depth=3, heads=2, mlp_width=64,
                            classes=10) | changes)
    init(model, torch.Generator().manual_seed(0))
    return model


def batch(model, labels, seed=0, **how):
    """Images in units of a standard deviation, and what their client sends in float32 without the position gradient."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(len(labels), 1, 16, 16, generator=g, dtype=torch.double)
    return x, client_update(model, x.float(), torch.tensor(labels), withheld=("positions",), **how)


def fit(suspect, known, c):
    """Root mean square residual of a candidate at every layer, in units of what the gradient's errors explain."""
    units = suspect.units(suspect.image(c), known)
    return [suspect.residual(c, [span], [unit]).square().mean().sqrt().item() for span, unit in zip(known, units)]


def paired(answer, x):
    """PSNR of a whole batch on pixels in units of a standard deviation, and the labels in its order."""
    order = best_assignment(answer.images, x)
    return psnr(answer.images[order], x), answer.labels[order].tolist()


def test_an_image_of_the_batch_has_no_residual_in_any_layer_and_a_mixture_has():
    model = small()
    x, update = batch(model, [1, 1, 3])
    suspect, known = Suspect(model, update), input_spans(model, update)
    truth = suspect.family.coordinates(to_patches(x, 8))
    assert len(known) == 12
    for c in truth: assert max(fit(suspect, known, c)) < 10
    assert min(fit(suspect, known, truth.mean(0))) > 1e3


def test_layers_are_found_without_their_names_and_only_where_the_theorem_holds():
    model = small()
    _, update = batch(model, [1, 1, 3])
    rows = {span.names[0]: (len(span.rows), span.space.basis.shape[1]) for span in input_spans(model, update)}
    assert rows["blocks.0.mlp.0.weight"] == rows["blocks.1.attention.q.weight"] == (5, 15)
    assert rows["blocks.2.mlp.0.weight"] == rows["head.weight"] == (1, 3)   # where only class tokens count
    assert "blocks.0.attention.q.weight" not in rows                        # the family's
    _, many = batch(model, list(range(10)))
    assert all(len(span.rows) == 1 for span in input_spans(model, many))    # 50 rows of 48 numbers
    assert "head.weight" not in [span.names[0] for span in input_spans(model, many)]   # p − e_y sums to zero
    few = {n: g for n, g in update.gradients.items() if "mlp.0" not in n}
    left = input_spans(model, type(update)(few, 3))
    assert left and not any("mlp.0" in name for span in left for name in span.names)


def test_the_jacobian_is_that_of_differences():
    model = small().double()
    x, update = batch(model.float(), [1, 3])
    suspect = Suspect(model, update)
    c = suspect.draw(torch.Generator().manual_seed(0))
    units = suspect.units(suspect.image(c), suspect.deep)
    f = lambda c: suspect.residual(c, suspect.deep, units)
    d = torch.randn(c.shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    by_difference = (f(c + 1e-5 * d) - f(c - 1e-5 * d)) / 2e-5
    by_derivative = jacobian(f, c, chunk=3).mT @ d.flatten()
    assert (by_derivative - by_difference).norm() < 1e-5 * by_difference.norm()


@pytest.mark.parametrize("init", [init_torch, init_timm], ids=["torch", "timm"])
def test_two_images_of_one_class_come_back_with_their_labels_and_the_foretold_error(init):
    model = small(init=init)
    x, update = batch(model, [4, 4])
    answer, = spans(model, [update])
    score, labels = paired(answer, x)
    assert score.min() > 100 and labels == [4, 4] and answer.verdict == "exact"
    error = (answer.images[best_assignment(answer.images, x)] - x).square().mean().sqrt().item()
    assert answer.error / 10 < error < 10 * answer.error
    assert [(s.name, s.rank, s.expected_rank) for s in answer.systems] == [
        ("patches", 8, 8), ("tokens", 9, 9), ("subspace", 4, 8), ("spans", 16, 16), ("images", 2, 2)]
    assert answer.systems[-1].relative_residual < 1e-5 and len(answer.history)


def test_five_images_of_any_classes_come_back_with_their_labels():
    model = small()
    x, update = batch(model, [2, 0, 2, 7, 2])
    answer, = spans(model, [update])
    score, labels = paired(answer, x)
    assert score.min() > 100 and labels == [2, 0, 2, 7, 2] and answer.verdict == "exact"


def test_a_label_is_never_needed_and_every_argument_but_model_and_updates_has_a_default():
    parameters = list(inspect.signature(spans).parameters.values())
    assert [p.name for p in parameters[:2]] == ["model", "updates"]
    assert all(p.default is not inspect.Parameter.empty for p in parameters[2:])
    model = small()
    x, update = batch(model, [4, 9])
    bare = type(update)({n: g for n, g in update.gradients.items() if "head" not in n}, 2)
    answer, = spans(model, [bare])   # not even the classifier's gradient
    score, labels = paired(answer, x)
    assert score.min() > 100 and labels == [4, 9]


def test_only_the_right_label_lowers_the_rank_and_an_image_of_another_batch_lowers_none():
    model = small()
    x, update = batch(model, [4, 9, 4])
    suspect, server = Suspect(model, update), copy.deepcopy(model).double()
    for image, label in zip(x.split(1), [4, 9, 4]):
        assert label_of(suspect, server, update, image, update, range(10)) == (label, 1.0)
        wrong = [y for y in range(10) if y != label]
        assert label_of(suspect, server, update, image, update, wrong) is None
    other = batch(model, [4], seed=1)[0]
    assert label_of(suspect, server, update, other, update, range(10)) is None


def test_out_of_time_it_says_how_many_images_are_missing_and_goes_on_from_those_it_has():
    model = small()
    x, update = batch(model, [1, 2, 1])
    nothing, = spans(model, [update], seconds=0.0)
    assert nothing.verdict == "not-converged" and nothing.reason.startswith("0 of 3 images found")
    assert nothing.images.shape == (0, 1, 16, 16) and nothing.error == math.inf
    peeling = Peeling(model, update, None, math.inf, lambda fit, images: None)
    assert peeling.find(60, [0])
    peeling.finds = peeling.finds[:1]
    first, = spans(model, [update], restarts=0, found=[conclude(peeling)])
    assert first.verdict == "not-converged" and first.reason.startswith("1 of 3 images found")
    whole, = spans(model, [update], found=[first])
    assert whole.verdict == "exact" and paired(whole, x)[0].min() > 100
    assert psnr(whole.images[:1], peeling.images).item() > 100


def test_noise_is_foretold_and_never_exact():
    model = small()
    x, update = batch(model, [1, 2])
    for std in (1e-3, 1e-2):
        answer, = spans(model, [gaussian(update, std, torch.Generator().manual_seed(0), "rms")], restarts=3)
        assert answer.verdict != "exact"
        if len(answer.images) == 2:
            error = (answer.images[best_assignment(answer.images, x)] - x).square().mean().sqrt().item()
            assert error / 10 < answer.error


@pytest.mark.parametrize(["changes", "labels"], [
    (dict(dropout=0.1), [1, 2]), (dict(depth=1, heads=1), [1, 2]), (dict(), list(range(10)))],
    ids=["dropout", "one block", "M above C"])
def test_without_a_condition_of_the_theorem_the_verdict_is_not_exact(changes, labels):
    model = small(**changes)
    answer, = spans(model, [batch(model, labels)[1]], steps=15, restarts=2)
    assert answer.verdict in ("not-unique", "not-converged") and answer.reason


def test_one_image_is_theorem_4s():
    model = small()
    x, update = batch(model, [3])
    answer, = spans(model, [update])
    assert answer.verdict == "exact" and (answer.images - x).abs().max() < 1e-4


def test_the_server_keeps_its_model_and_the_generator_its_state():
    model = small()
    before, state = copy.deepcopy(model), torch.get_rng_state()
    told = []
    spans(model, [batch(model, [1, 2])[1]], watch=lambda step, losses, images: told.append((step, images.shape)))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters()))
    assert all(p.requires_grad for p in model.parameters()) and torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert [step for step, _ in told] == list(range(len(told))) and told[0][1] == (1, 1, 1, 16, 16)


@pytest.mark.parametrize(("blocks", "labels"), [(1, [1]), (2, [1]), (1, [3, 3])])
def test_an_entrance_that_sends_nothing_gives_its_images_away(blocks, labels):
    model = small(width=96)
    x, update = batch(model, labels)
    entrance = ("class_token", "patch.", *(f"blocks.{i}." for i in range(blocks)))
    update = withhold(update, [n for n in update.gradients if n.startswith(entrance)])
    answer, = spans(model, [update])
    scores, found = paired(answer, x)
    assert answer.verdict == "exact" and scores.min() > 100 and found == labels


def test_a_classifier_alone_names_too_few_inputs_for_an_image():
    model = small(width=96)
    _, update = batch(model, [1])
    answer, = spans(model, [withhold(update, [n for n in update.gradients if not n.startswith("head")])])
    assert answer.verdict == "not-unique" and not len(answer.images)
    assert "equations for 256 unknowns of an image" in answer.reason


@pytest.mark.parametrize("library", ["torchvision", "timm", "transformers"])
def test_other_libraries_models_give_their_batches_away(library):
    if library == "torchvision":
        model = VisionTransformer(image_size=16, patch_size=8, num_layers=3, num_heads=2, hidden_dim=64, mlp_dim=96,
                                  num_classes=10)
        torch.nn.init.normal_(model.heads.head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    elif library == "timm":
        timm = pytest.importorskip("timm")
        model = timm.models.vision_transformer.VisionTransformer(img_size=16, patch_size=8, embed_dim=64, depth=3,
                                                                 num_heads=2, num_classes=10)
    else:
        transformers = pytest.importorskip("transformers")
        model = transformers.ViTForImageClassification(transformers.ViTConfig(
            hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=96, image_size=16,
            patch_size=8, num_labels=10))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1: p.normal_(std=p.shape[-1] ** -0.5 if p.ndim == 2 else 0.1, generator=generator)
    x = torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.double)
    update = client_update(model, x.float(), torch.tensor([1, 1]), withheld=(view(model).positions,))
    answer, = spans(model, [update])
    score, labels = paired(answer, x)
    assert score.min() > 90 and labels == [1, 1]


def test_steps_by_products_arrive_where_exact_steps_do_and_single_tokens_certify_them(monkeypatch):
    model = small()
    x, update = batch(model, [1, 4])
    monkeypatch.setattr("april_nb.spans.FORMED", 0)
    answer, = spans(model, [update])
    score, labels = paired(answer, x)
    assert score.min() > 90 and labels == [1, 4]
    assert answer.verdict == "exact" and [s.name for s in answer.systems][-2:] == ["token", "images"]


def test_without_the_first_mlp_steps_by_products_have_no_certificate(monkeypatch):
    model = small()
    x, update = batch(model, [1, 4])
    monkeypatch.setattr("april_nb.spans.FORMED", 0)
    monkeypatch.setattr(Suspect, "mlp", None)
    answer, = spans(model, [update])
    assert len(answer.images) < 2 or answer.verdict == "approximate" and "too large" in answer.reason


def test_tokens_foretell_no_smaller_an_error_than_all_layers():
    model = small()
    x, update = batch(model, [1, 4])
    suspect = Suspect(model, update)
    find = polish(suspect, x[:1].double())
    by_tokens, worst = certify_tokens(suspect, *suspect.mlp, find.image)
    true = (find.image - x[:1]).square().mean().sqrt().item()
    assert find.system.unique and worst.unique and find.error < 2 * by_tokens and true < 5 * by_tokens


def test_a_step_on_the_update_itself_sharpens_a_batch(monkeypatch):
    monkeypatch.setattr("april_nb.spans.TOGETHER", 1)
    model = small(depth=2)
    x, update = batch(model, [1, 4])
    peeling = Peeling(model, update, None, math.inf, lambda fit, images: None)
    for i, (image, label) in enumerate(zip(x.double().split(1), (1, 4))):
        find = polish(peeling.free, image)
        error = torch.randn(len(find.curvature), 1, generator=generator_of(i), dtype=torch.double)
        error = torch.linalg.solve_triangular(torch.linalg.cholesky(find.curvature).mT, error, upper=True)   # as spans leave it
        blur = peeling.free.image((1e-3 * error / error.square().mean().sqrt()).view(peeling.free.shape))
        peeling.finds.append(replace(find, image=find.image + blur, error=1e-3, label=label))
        peeling.take_off(find.image + blur, label)
    before = unexplained(update, peeling.rest)
    peeling.sharpen()
    off = (peeling.images - x).square().mean().sqrt().item()
    assert off < 1e-4 and unexplained(update, peeling.rest) < before / 10


def test_an_image_is_sharp_though_the_linear_equations_are_off_by_a_tenth(monkeypatch):
    model = small()
    x, update = batch(model, [1, 4])
    true, noise = family(view(model), update), generator_of(0)
    off = replace(true, h=true.h + 0.1 * torch.randn(true.h.shape, generator=noise, dtype=torch.double))
    monkeypatch.setattr("april_nb.spans.family", lambda view, update, needed: off)
    suspect = Suspect(model, update)
    held = polish(suspect, x[:1].double())
    free = polish(freed(suspect, model), held.image)
    rms = lambda find: (find.image - x[:1]).square().mean().sqrt()
    assert rms(held) > 1e-2 and rms(free) < 5 * free.error < 1e-4


def tokens_of(model, x, update):
    """The equations of single tokens, and the tokens of a batch as its client has them, image by image."""
    suspect = Suspect(model, update)
    places, v = places_of(suspect, update), suspect.view
    found = []
    for X in to_patches(x, 8):
        own = X @ v.weight(v.patch_weight).mT + v.offsets()
        o = v.attended(torch.cat([v.known_tokens(), own]))[-4:]
        none = torch.zeros(4, dtype=torch.double)
        found.append(Tokens(torch.arange(4), torch.zeros(4, places.unknowns, dtype=torch.double), X, own, o, none, none))
    return suspect, places, found


def test_a_token_of_the_batch_solves_the_equations_of_its_place_and_a_mixture_does_not():
    model = small()
    x, update = batch(model, [1, 1, 3])
    suspect, places, found = tokens_of(model, x, update)
    assert (places.unknowns, places.equations) == (10, 49)   # T(B − 1) and H − M
    known = [places.recalled(tokens, 0) for tokens in found]
    assert all(len(tokens.x) == 4 and tokens.fit.max() < 1e-4 for tokens in known)
    mixed = sum(tokens.u for tokens in known) / 3
    assert places.outside(places.activations(torch.arange(4), mixed)[0]).norm(dim=1).min() > 1e-2


def test_the_slopes_of_the_activations_are_those_of_differences():
    model = small()
    x, update = batch(model, [1, 2])
    places = places_of(Suspect(model, update), update)
    g = torch.Generator().manual_seed(0)
    t, u, d = torch.arange(4), *torch.randn(2, 4, places.unknowns, generator=g, dtype=torch.double)
    h = lambda u: places.activations(t, u)[0]
    by_difference = (h(u + 1e-5 * d) - h(u - 1e-5 * d)) / 2e-5
    by_slope = (places.activations(t, u, places.free)[1].double() @ d[..., None])[..., 0]
    assert (by_slope - by_difference).norm() < 1e-5 * by_difference.norm()


def test_a_token_names_its_companions_and_a_search_goes_where_an_image_lacks_one():
    model = small()
    x, update = batch(model, [1, 1, 3])
    suspect, _, found = tokens_of(model, x, update)
    every = Tokens.together(found)
    for i in range(12): assert sorted(companions(suspect.view, every, i).tolist()) == [4 * (i // 4) + j for j in range(4)]
    images = assembled(suspect.view, every)
    assert len(images) == 3 and all(min((X - P).abs().max() for P in to_patches(x, 8)) < 1e-9 for X in images)

    model = small(init=init_timm)   # whose attention is nearly a mean
    x, update = batch(model, [1, 1, 3])
    suspect, _, found = tokens_of(model, x, update)
    part = Tokens.together(found)[torch.arange(11)]   # the last image lacks a patch
    assert len(assembled(suspect.view, part)) == 2
    for seed in range(10):
        like, at = wanted(part, 4, torch.Generator().manual_seed(seed))
        i = (part.o == like).all(1).nonzero().item()
        assert at.tolist() == ([3, 3, 3, 3] if i >= 8 else [0, 1, 2, 3])
    assert wanted(part[:0], 4, torch.Generator())[1].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("init", ["torch", "timm", "torchvision"])
def test_tokens_of_one_photograph_agree_on_what_is_nearest_and_strangers_do_not(init):
    photographs = FORMATS["imagenet"].normalisation(photos().batch(range(8))[0]).double()
    v = view(vit("vit_b_32", "B", init, depth=1).double())
    P, g = v.patches, torch.Generator().manual_seed(0)
    streams = [v.stream(x) for x in photographs]
    known = [torch.randperm(P, generator=g)[:int(P * share)] for share in torch.linspace(0.4, 0.95, 8)]   # of each image
    o = torch.cat([v.attended(x)[-P:][there] for x, there in zip(streams, known)])
    none, x = torch.zeros(len(o)), torch.cat([x[-P:][there] for x, there in zip(streams, known)])
    tokens = Tokens(torch.cat(known), none[:, None], none[:, None], x, o, none, none)
    near, _ = beside(tokens, P)
    image = torch.repeat_interleave(torch.arange(8), torch.tensor([len(there) for there in known]))
    same = image[:, None] == image
    strangers = (near & ~same).sum()
    assert strangers < 0.02 * near.sum() if init == "torchvision" else not strangers
    assert (near & same).sum() > 0.75 * same.sum()
    by_distance = torch.cdist(o, o) < NEAR * o.norm(dim=1)
    assert (by_distance & ~same).any(), "distance alone would do"


@pytest.mark.parametrize("missing", [1, 2])
def test_tokens_of_an_image_say_what_stands_where_nothing_was_found(missing):
    model = small(init=init_timm)
    x, update = batch(model, [1, 1, 3])
    suspect, places, found = tokens_of(model, x, update)
    image, others = from_heads(suspect, found[2][torch.arange(missing, 4)], generator_of(0))
    assert others.tolist() == list(range(missing))
    confirmed = places.recalled(places.standing(image[0])[others], 60)
    assert confirmed.place.tolist() == others.tolist()
    torch.testing.assert_close(confirmed.patch, found[2].patch[others], rtol=0, atol=1e-3)


def test_what_a_coordinate_does_to_what_tokens_hear_is_the_derivative(monkeypatch):
    model = small(init=init_timm)
    x, update = batch(model, [1, 2])
    suspect, _, found = tokens_of(model, x, update)
    asked = []
    def descend(f, c, steps, told, push):
        steps = torch.eye(c.numel()).unflatten(1, c.shape)
        asked.append((torch.stack([push(c)(step) for step in steps]), torch.func.jacfwd(f)(c).flatten(1).mT))
        return c, None, None
    monkeypatch.setattr(april_nb.spans, "descend", descend)
    from_heads(suspect, found[0][torch.tensor([1, 3])], generator_of(0))
    (ours, exact), = asked
    assert ((ours - exact).norm(dim=1) < 1e-5 * exact.norm(dim=1)).all()


def test_families_are_tokens_of_one_image_and_no_two_of_them_stand_at_one_place():
    model = small(init=init_timm)
    x, update = batch(model, [1, 1, 3])
    _, _, found = tokens_of(model, x, update)
    part = Tokens.together(found)[torch.tensor([0, 1, 2, 4, 5, 8])]
    assert [family.tolist() for family in families(part)] == [[0, 1, 2], [3, 4], [5]]
    assert families(part[:0]) == []
    twice = replace(part, place=torch.tensor([0, 1, 0, 0, 1, 0]))
    assert [family.tolist() for family in families(twice)] == [[3, 4], [1, 2], [5], [0]], "two at one place are parted"
    between = replace(part, o=torch.cat([part.o[:5], part.o[[0]].lerp(part.o[[3]], 0.5)]), place=torch.tensor([0, 1, 2, 0, 1, 3]))
    assert [family.tolist() for family in families(between)] == [[0, 1, 2], [3, 4], [5]], "a stranger between two images links them, but not if those must be closer"


def test_an_image_whose_last_tokens_no_first_guess_leads_to_is_completed_by_what_the_others_heard():
    model = small(init=init_timm)
    x, update = batch(model, [1, 1, 3])
    suspect, places, found = tokens_of(model, x, update)
    peeling = Peeling(model, update, None, math.inf, lambda fit, images: None)
    part = Tokens.together(found)[torch.tensor([0, 1, 2, 4, 8])]
    assert not assembled(suspect.view, part)
    whole, = assembled(suspect.view, peeling.with_heard(suspect, places, part, generator_of(0), 60))
    torch.testing.assert_close(whole, found[0].patch, rtol=0, atol=1e-3)


def test_no_image_is_polished_twice(monkeypatch):
    model, polished = small(), []
    x, update = batch(model, [2, 0, 2, 7, 2])
    polish = april_nb.spans.polish
    monkeypatch.setattr(april_nb.spans, "polish", lambda *a: polished.append(polish(*a)) or polished[-1])
    spans(model, [update])
    assert len(polished) == len(x)


def test_what_patches_do_to_their_own_tokens_is_the_derivative_of_what_the_mlp_reads():
    model = small()
    x, update = batch(model, [1, 2])
    suspect, v, model = Suspect(model, update), view(model), model.double()
    (mlp, φ), block = suspect.mlp, model.blocks[0]
    into = torch.randn(48, 5, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    stream = v.stream(x[0])
    z = (stream + v.attended(stream) @ v.weight(v.out).mT + v.bias(v.out))[-4:]
    for t, (first, second) in enumerate(own_jacobians(suspect, mlp, φ, x[:1], into)):
        def read(u):
            moved = z[t] + into @ u
            a = block.norm2(moved)
            return a * (moved.var(correction=0) + block.norm2.eps).sqrt(), φ(block.mlp[0](a))
        expected = torch.func.jacrev(read)(torch.zeros(5, dtype=torch.double))
        torch.testing.assert_close((first, second), expected)


def test_after_twenty_products_with_blocks_of_places_a_tenth_of_the_error_is_left_that_is_without():
    model = small(init=init_timm)
    x, update = batch(model, [1, 1, 3])
    suspect = Suspect(model, update)
    c = suspect.draw(generator_of(0))
    units = suspect.units(suspect.image(c), suspect.wider)
    f = lambda c: suspect.residual(c, suspect.wider, units)
    exact = Formed(jacobian(f, c.float()))
    step = exact.solve(exact.slope(f(c)), 1e-6)
    def off(products, *nearly):
        model = Products(f, c, *nearly)
        return ((model.solve(model.slope(f(c)), 1e-6, products, 0.0) - step).norm() / step.norm()).item()
    assert off(20, by_places(suspect, suspect.wider, units, c)) < 0.1 * off(20)


def test_a_solution_that_is_known_is_none_any_more():
    model = small()
    x, update = batch(model, [1, 2])
    suspect, places, found = tokens_of(model, x, update)
    known = places.recalled(found[0], 0)
    g = torch.Generator().manual_seed(0)
    near = known.u + 0.1 * torch.randn(known.u.shape, generator=g, dtype=torch.double)
    away, _ = places.descend(known.place, near, 60, known)
    back, fit = places.descend(known.place, near, 60)
    there = (back - known.u).norm(dim=1).max()
    assert there < 1e-4 and fit.max() < 1e-5
    assert (away - known.u).norm(dim=1).min() > 100 * there


def test_a_search_needs_few_hidden_units_and_finds_what_all_say():
    model = small(mlp_width=400)
    x, update = batch(model, [1, 2])
    suspect, places, found = tokens_of(model, x, update)
    coarse, true = places.coarse, Tokens.together(found)
    units = len(coarse.b)
    assert places.unknowns < coarse.equations < places.equations and units < 200
    assert coarse.outside(coarse.activations(true.place, places.coordinates(true))[0]).norm(dim=1).max() < 1e-5
    ends = places.search(torch.arange(4), torch.Generator().manual_seed(0), 60)
    again = places.recalled(ends[(ends.fit < 0.05).nonzero()[:, 0]], 60)
    assert len(again.x) >= 2 and again.same(true).any(1).all()
    narrow = small(mlp_width=32)
    own = tokens_of(narrow, *batch(narrow, [1, 2]))[1]
    assert own.coarse is own


def test_an_activation_is_taken_for_one_only_if_it_acts_on_every_number_by_itself():
    model, x = small().double().eval(), torch.randn(1, 1, 16, 16, dtype=torch.double)
    first, second = "blocks.0.mlp.0", "blocks.0.mlp.2"
    found, y = activation(model, first, second, x), torch.randn(3, 64, dtype=torch.double)
    assert torch.equal(found(y), torch.nn.functional.gelu(y))
    model.blocks[0].mlp[1] = torch.nn.LayerNorm(64).double()
    assert activation(model, first, second, x) is None


def test_where_linear_equations_leave_a_token_no_unknowns_a_search_returns_their_solution():
    model = small()
    x, update = batch(model, [1])
    places = places_of(Suspect(model, update), update)
    found = places.search(torch.arange(4), torch.Generator().manual_seed(0), 3)
    assert places.unknowns == 0 and found.fit.max() < 1e-4
    assert (found.patch - to_patches(x, 8)[0]).abs().max() < 1e-4
    again = places.recalled(found, 3)
    assert len(again.x) == 4


@pytest.mark.parametrize("rank", [0, 4])
def test_an_image_has_no_label_where_fewer_directions_stand_out_than_it_has_tokens(rank):
    model = small()
    x, update = batch(model, [1])
    suspect, server = Suspect(model, update), copy.deepcopy(model).double().eval()
    assert label_of(suspect, server, update, x, update, range(10), None)[0] == 1
    suspect.shallow = [replace(suspect.shallow[0], rank=rank)]
    assert label_of(suspect, server, update, x, update, range(10), None) is None


def test_a_clipped_batch_comes_back_and_says_by_how_much_it_was_clipped():
    model = small()
    x, update = batch(model, [1, 1, 3])
    peeling = Peeling(model, clip(update, 0.1), None, math.inf, lambda fit, images: None)
    while not peeling.complete and peeling.find(60, [0, 1]): pass
    answer = conclude(peeling)
    assert answer.verdict == "exact" and sorted(answer.labels.tolist()) == [1, 1, 3]
    assert min(psnr(answer.images[best_assignment(answer.images, x)], x)) > 80
    norm = sum(g.double().square().sum() for g in update.gradients.values()).sqrt().item()
    assert peeling.scale == pytest.approx(0.1 / norm, rel=1e-4)


def test_both_embeddings_withheld_hide_one_direction_of_a_patch_as_large_as_a_token():
    model = small(width=64)
    x, update = batch(model, [1])
    v = view(model)
    update = withhold(update, [v.patch_weight, v.patch_bias])
    assert subspace_leakage(model, update).verdict == "not-unique"
    answer, = spans(model, [update], restarts=2)
    assert (answer.verdict, answer.labels.tolist()) == ("not-unique", [1])
    assert answer.reason.startswith("1 of 64 directions of a patch reach no attention")
    X, found = (to_patches(images, 8)[0] @ v.weight(v.patch_weight).mT for images in (x, answer.images))
    assert ((X - found) - (X - found).mean(1, keepdim=True)).abs().max() < 1e-5


def test_single_tokens_settle_what_sinusoids_leave_open_of_one_image():
    model = small(positions="sincos2d")
    x = batch(small(), [3])[0]
    update = client_update(model, x.float(), torch.tensor([3]))   # a formula has no gradient
    assert subspace_leakage(model, update).verdict == "not-unique"
    answer, = spans(model, [update])
    assert psnr(answer.images, x).item() > 100 and answer.labels.tolist() == [3]


def test_a_trained_model_is_no_harder():
    model = small()
    g = torch.Generator().manual_seed(2)
    train(model, torch.randn(40, 1, 16, 16, generator=g), torch.arange(40) % 10, epochs=30, batch=10, lr=3e-3)
    x, update = batch(model.eval(), [4, 4])
    answer, = spans(model, [update])
    assert paired(answer, x)[0].min() > 80
