"""Theorem 4: exact whenever its rank condition holds, and a verdict that says so whenever it does not."""
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from april_nb.federated import MissingGradient, Update, client_update
from april_nb.separation import family, separate
from april_nb.refinement import posterior, refine
from april_nb.subspace import equations, evened, row_space, subspace_leakage
from april_nb.views import view
from april_nb.vit import ViT, guess_positions, init_torch, to_patches, vit


def small(arch="B", width=32, heads=4, depth=2, positions="normal", seed=0, beta=0.0, **sizes):
    """A float64 ViT with 4 patches of 16 pixels, and β ≠ 0 if asked for."""
    sizes = dict(image_size=8, channels=1, patch=4) | sizes
    model = ViT(arch, width=width, depth=depth, heads=heads, mlp_width=2 * width, classes=5,
                positions=positions, **sizes).double()
    g = torch.Generator().manual_seed(seed)
    init_torch(model, g)
    if arch == "B":
        nn.init.uniform_(model.blocks[0].norm1.weight, 0.5, 2, generator=g)
        nn.init.uniform_(model.blocks[0].norm1.bias, -beta, beta, generator=g)
    return model


def private(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(1, *view(model).image_shape, generator=g, dtype=torch.double)


def attacked(model, x, label=1):
    withheld = ("positions",) if model.position_kind == "learned" else ()
    return subspace_leakage(model, client_update(model, x, torch.tensor([label]), withheld=withheld))


@given(arch=st.sampled_from("AB"), width=st.integers(7, 20), beta=st.sampled_from([0.0, 0.3]),
       class_token=st.booleans(), positions=st.sampled_from(["normal", "learned"]),
       seed=st.integers(0, 10**6))
def test_the_image_comes_back_exactly_when_the_count_holds(arch, width, beta, class_token, positions, seed):
    model = small(arch, width, heads=1, depth=3, beta=beta, class_token=class_token, positions=positions,
                  seed=seed)
    x, P = private(model, seed), 4
    columns = P + P + class_token + (arch == "B")   # r + P + 1, and one for the mean or for β
    answer = attacked(model, x)
    assume(answer.systems[1].condition_number < 1e6)
    if columns <= width:
        assume(answer.systems[-1].condition_number < 1e5)
        assert answer.verdict == "exact", answer.reason
        torch.testing.assert_close(answer.images, x, rtol=1e-5, atol=1e-5)
    else:
        assert answer.verdict != "exact"


@pytest.mark.parametrize("side", [2, 3, 4])
def test_two_dimensional_positions_leave_the_directions_open_that_the_proposition_counts(side):
    model = small(width=64, positions="sincos2d", image_size=8 * side, patch=8)
    answer = attacked(model, private(model))
    system = answer.systems[-1]
    assert answer.verdict == "not-unique" and system.expected_rank - system.rank == (side - 1) ** 2


def test_without_positions_one_direction_is_determined():
    model = small(positions="none")
    assert attacked(model, private(model)).systems[-1].rank == 1


@pytest.mark.parametrize("init", ["torch", "timm"])
@pytest.mark.parametrize("arch", ["A", "B"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_without_positions_every_attack_ends_and_none_calls_the_image_unique(arch, init, dtype):
    model = vit("vit_cifar", arch, init, positions="none").to(dtype)   # timm's biases are zero: nothing pins a patch
    update = client_update(model, private(model).to(dtype), torch.tensor([0]))
    answer = subspace_leakage(model, update)
    assert answer.verdict == "not-unique" and answer.systems[-1].rank <= 1
    assert "rank 1 for 16" in answer.reason or "no direction" in answer.reason
    assert family(view(model), update).Q.shape[1] >= 15
    for found, in (refine(model, [update], 2), separate(model, [update], 2)): assert found.images.isfinite().all()


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("positions, of_16", [("normal", 0), ("sincos2d", 9), ("none", 15)])
def test_what_positions_leave_open_is_counted_in_the_weights_alone(positions, of_16, images):
    model = vit("vit_cifar", "B", positions=positions)
    update = client_update(model, torch.cat([private(model, seed) for seed in range(images)]).float(), torch.arange(images))
    assert equations(view(model), update).open == of_16 + 16 * (images - 1)


@pytest.mark.parametrize("attack, embeddings", [
    (lambda model, u: subspace_leakage(model, u), 0), (lambda model, u: family(view(model), u), 1),
    (lambda model, u: posterior(e := equations(view(model), u), e.solve(u.dtype)), 0)], ids=["subspace", "family", "posterior"])
def test_no_matrix_is_decomposed_twice(attack, embeddings, monkeypatch):
    model = small(positions="learned")
    update, calls, svd = client_update(model, private(model), torch.tensor([1])), [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda A, **options: calls.append(A) or svd(A, **options))
    attack(model, update)
    assert len(calls) == 6 + embeddings   # patches; three rounds that even the rows, and tokens; the equations
    alike = [torch.equal(a, b) or torch.equal(a, b.mT) for i, a in enumerate(calls) for b in calls[:i]]
    assert not any(alike)


def test_repeated_patches_are_counted_once_and_come_back():
    model = small()
    x = private(model)
    x[..., 4:, :] = x[..., :4, :]
    answer = attacked(model, x)
    assert answer.systems[0].rank == 2 and answer.verdict == "exact"
    torch.testing.assert_close(answer.images, x, rtol=1e-6, atol=1e-6)


def test_every_broken_premise_has_its_verdict():
    x = private(small())
    assert attacked(small(depth=1, heads=1), x).verdict == "not-unique"
    assert attacked(small(dropout=0.2), x).verdict == "not-applicable"
    zero = small()
    nn.init.zeros_(zero.head.weight)
    assert attacked(zero, x).verdict == "nothing-leaks"
    clients = small()
    update = client_update(clients, x, torch.tensor([1]))
    assert subspace_leakage(guess_positions(clients), update).verdict == "not-applicable"
    two = client_update(clients, torch.cat([x, -x]), torch.tensor([1, 2]))
    assert subspace_leakage(clients, two).verdict == "not-unique"


def test_it_reads_four_gradients_and_no_position_gradient():
    model = small(positions="learned")
    x = private(model)
    update = client_update(model, x, torch.tensor([1]))
    v = view(model)
    few = Update({n: g for n, g in update.gradients.items() if n in (v.patch_weight, *v.qkv)})
    wild = Update({**update.gradients, v.positions: torch.full_like(model.positions, 1e9)})
    expected = subspace_leakage(model, update).images
    for other in (few, wild): assert torch.equal(subspace_leakage(model, other).images, expected)
    with pytest.raises(MissingGradient):
        subspace_leakage(model, Update({n: g for n, g in few.gradients.items() if n != v.qkv[0]}))


def test_a_weight_that_stacks_q_k_and_v_is_read_as_three():
    model = small()
    update = client_update(model, private(model), torch.tensor([1]))
    v = view(model)
    grads, weights = (torch.cat([of[n] for n in v.qkv]) for of in (update, v.weights))
    fused = replace(v, weights={**v.weights, "qkv": weights}, qkv=("qkv",))
    three, one = equations(v, update), equations(fused, Update({**update.gradients, "qkv": grads}))
    assert one.tokens.system.rank == 5 and one.tokens.gap > 1e6
    torch.testing.assert_close(one.tokens.values, three.tokens.values)


def test_a_row_space_contains_the_inputs_and_knows_its_error():
    g = torch.Generator().manual_seed(0)
    a, delta = (torch.randn(5, n, generator=g, dtype=torch.double) for n in (40, 60))
    noise = 1e-3 * torch.randn(60, 40, generator=g, dtype=torch.double)
    space = row_space(delta.mT @ a + noise, 5, torch.float64, "test")
    assert 0.9e-3 < space.noise < 1.1e-3
    outside = (a - a @ space.basis @ space.basis.mT).norm(dim=1) / 35 ** 0.5
    foretold = space.error(a.mT).norm(dim=0)
    assert ((outside / foretold - 1).abs() < 0.5).all()


@pytest.mark.parametrize("decades", [0, 1, 6])
def test_even_rows_know_the_space_as_well_as_if_none_were_louder_than_another(decades):
    g = torch.Generator().manual_seed(0)
    a, delta = (torch.randn(5, n, generator=g, dtype=torch.double) for n in (40, 120))
    size = torch.logspace(0, decades, 120, dtype=torch.double)[:, None]
    sent = delta.mT @ a + 1e-3 * torch.randn(120, 40, generator=g, dtype=torch.double)
    def outside(grad):
        basis = row_space(grad, 5, torch.float64, "test").basis
        return (a - a @ basis @ basis.mT).norm().item()
    assert outside(evened(size * sent, 5)) < 1.1 * outside(sent)
    if decades == 6: assert outside(size * sent) > 4 * outside(sent)


def test_even_rows_leave_rows_without_error_alone():
    exact = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.double)
    assert torch.equal(evened(exact, 1), exact)


def test_foretold_errors_are_true_under_rounding_and_noise():
    model = small(width=64)
    x = private(model)
    update = client_update(model, x, torch.tensor([1]))
    for size in (1e-8, 1e-6, 1e-4):
        g = torch.Generator().manual_seed(0)
        noise = lambda t: size * t.square().mean().sqrt() * torch.randn(t.shape, generator=g, dtype=t.dtype)
        answer = subspace_leakage(model, Update({n: t + noise(t) for n, t in update.gradients.items()}))
        true = (answer.images - x).square().mean().sqrt().item()
        assert 1 / 3 < true / answer.error < 3


@given(arch=st.sampled_from("AB"), spare=st.integers(-3, 3), positions=st.sampled_from(["normal", "learned"]),
       seed=st.integers(0, 9))
def test_without_the_patch_gradient_an_image_is_exact_if_and_only_if_a_token_has_room_for_a_patch(
        arch, spare, positions, seed):
    model = small(arch, 16 + 4 + (2 if arch == "B" else 1) + spare, heads=1, positions=positions, seed=seed)
    x = private(model, seed)
    withheld = {"positions", "patch.weight", "patch.bias"} & {n for n, _ in model.named_parameters()}
    answer = subspace_leakage(model, client_update(model, x, torch.tensor([1]), withheld=tuple(withheld)))
    assert (answer.verdict in ("exact", "approximate")) == (spare >= 0)
    if spare >= 0: assert torch.allclose(answer.images, x, atol=1e-4)
    else: assert answer.verdict == "not-unique"


def test_refinement_finds_what_the_linear_solution_leaves_open_and_restores_labels():
    model = vit("vit_cifar", "B", positions="sincos1d")
    x = private(model).float().mul(0.1).cumsum(2).cumsum(3).clamp(-2, 2)
    update, start = client_update(model, x, torch.tensor([3])), []
    linear = subspace_leakage(model, update)
    refined, = refine(model, [update], 25, watch=lambda step, losses, images: start.append(images))
    error = lambda images: (images.view_as(x) - x).square().mean().item()
    assert linear.verdict == "not-unique" and refined.labels.tolist() == [3] and len(refined.history) == 25
    assert error(refined.images) < 0.5 * error(start[0])
    assert error(refined.images) < 0.1 * error(linear.images)


def test_victims_refined_together_do_not_notice_each_other():
    model = small(positions="sincos2d", image_size=16, patch=8)
    updates = [client_update(model, sign * private(model), torch.tensor([2])) for sign in (1, -1)]
    alone, = refine(model, updates[:1], 5, labels=torch.tensor([2]))
    together = refine(model, updates, 5, labels=torch.tensor([2, 2]))
    torch.testing.assert_close(together[0].images, alone.images, rtol=1e-6, atol=1e-6)


def test_patches_of_the_private_image_lie_in_the_span_even_where_positions_are_secret():
    model = small(positions="learned", image_size=16, patch=8)
    x = private(model)
    update = client_update(model, x, torch.tensor([1]), withheld=("positions",))
    R = equations(view(guess_positions(model)), update).patches.basis
    X = to_patches(x, 8)[0]
    assert (X - X @ R @ R.mT).norm() < 1e-10 * X.norm()
