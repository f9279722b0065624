"""Theorem 6: a secret table of positions hides the order of the patches, and nothing else."""
import copy
from dataclasses import replace

import pytest
import timm
import torch
from torchvision.models import VisionTransformer
from transformers import ViTConfig, ViTForImageClassification

from april_nb.attacks import best_attack, check_update
from april_nb.defenses import gaussian, withhold
from april_nb.federated import MissingGradient, client_update, generator_of
from april_nb.metrics import best_assignment
from april_nb.secret import DRAW, Block, company, edges, guesses, in_images, in_order, laid, parted, puzzle, same_places, secret
from april_nb.secret import settled, strangers
from april_nb.views import NotApplicable, view
from april_nb.vit import ViT, guess_positions, init_timm, init_torch, to_patches


def small(width=48, init=init_torch, arch="B", **changes):
    """A ViT with 4 patches of 64 pixels and learned positions."""
    model = ViT(arch, **dict(image_size=16, channels=1, patch=8, width=width, depth=2, heads=2, mlp_width=64, classes=10) | changes)
    init(model, torch.Generator().manual_seed(0))
    return model


def batch(model, labels, seed=0, **how):
    """Images in units of a standard deviation, and what their client sends in float32 without the position gradient."""
    x = torch.randn(len(labels), 1, 16, 16, generator=generator_of(seed), dtype=torch.double)
    return x, client_update(model, x.float(), torch.tensor(labels), withheld=("positions",), **how)


def off(answer, x):
    """Root mean square error with each image's patches in their best order, and the labels in the images' order."""
    found, truth = (to_patches(images, 8) for images in (answer.images, x))
    image = best_assignment(*(patches.flatten(1).sort(1).values for patches in (found, truth)))
    paired = zip(found[image], truth)
    error = torch.stack([patches[best_assignment(patches, own)] - own for patches, own in paired])
    return error.square().mean().sqrt().item(), answer.labels[image].tolist()


def uneven(model):
    """The same model with norms and biases as training leaves them: of no special value."""
    g = generator_of(5)
    for name, p in model.named_parameters():
        if "norm" in name or name.endswith("bias"): p.data += 0.3 * torch.randn(p.shape, generator=g)
    return model


@pytest.mark.parametrize("labels", [[4], [4, 4], [2, 0, 2]])
@pytest.mark.parametrize("model", [small(), small(init=init_timm), uneven(small())], ids=["torch", "timm", "uneven"])
def test_patches_and_labels_come_back_from_a_server_that_does_not_know_the_positions(model, labels):
    x, update = batch(model, labels)
    answer, = secret(guess_positions(model, seed=3), [update])
    error, found = off(answer, x)
    assert error < 1e-3 and found == labels
    left = answer.systems[-1].relative_residual
    assert left < 1e-4 and answer.verdict == ("not-unique" if left < 100 * torch.finfo(torch.float32).eps else "approximate")
    assert answer.error / 10 < error < 10 * answer.error and "order" in answer.reason and answer.finished and len(answer.history)


def test_the_table_comes_back_with_its_rows_in_the_order_of_the_patches():
    model = small()
    x, update = batch(model, [1, 7])
    answer, = secret(guess_positions(model, seed=3), [update])
    truth, found = to_patches(x, 8), to_patches(answer.images, 8)
    images = torch.cdist(found.flatten(1).sort(1).values, truth.flatten(1).sort(1).values).argmin(1)
    order = best_assignment(found[0], truth[images[0]])   # for each true place a place of the answer
    assert torch.equal(order, best_assignment(found[1], truth[images[1]]))   # one order for all images
    centred = lambda E: E - E.mean(1, keepdim=True)
    E = centred(answer.positions)[torch.cat([torch.zeros(1, dtype=torch.long), 1 + order])]
    assert (E - centred(model.positions.detach().double().view(E.shape))).abs().max() < 1e-4


@pytest.mark.parametrize("labels", [[4], [4, 4], [2, 0, 2]])
def test_a_server_that_knows_the_table_has_the_order_from_it(labels):
    model = small()
    x, update = batch(model, labels)
    answer, = secret(model, [update])
    images = answer.images[best_assignment(answer.images, x)]
    assert (images - x).square().mean().sqrt() < 1e-3 and "order" not in answer.reason
    left = answer.systems[-1].relative_residual
    assert answer.verdict == ("exact" if left < 100 * torch.finfo(torch.float32).eps else "approximate")


def test_a_server_that_knows_the_table_polishes_what_its_tokens_leave_blunt():
    model = small(init=init_timm)
    x, _ = batch(model, [3, 5])
    x[1, :, :8] = x[0, :, :8] + 0.01 * x[1, :, :8]   # two of four patches are all but the other image's
    update = client_update(model, x.float(), torch.tensor([3, 5]), withheld=("positions",))
    (blunt, _), (sharp, labels) = off(secret(guess_positions(model), [update])[0], x), off(secret(model, [update])[0], x)
    assert sharp < blunt / 5 and labels == [3, 5]


def test_half_of_the_first_guesses_resemble_the_tokens_that_were_found():
    found = torch.randn(3, 20, generator=generator_of(0), dtype=torch.double)
    Q = torch.linalg.qr(found.mT).Q
    for known, share in ((found[:0], 0.0), (found[:1], 0.0), (found, 0.5)):
        u = guesses(known, generator_of(1))
        assert u.shape == (DRAW, 20) and torch.equal(u, guesses(known, generator_of(1)))
        within = (u @ Q).norm(dim=1) / u.norm(dim=1)
        assert ((within > 0.8).double().mean().item() > 0.4) == (share > 0) and (within < 0.6).double().mean() > 0.4


@pytest.mark.parametrize("labels", [[1], [1, 5]])
@pytest.mark.parametrize("drift", [1e-3, 3e-2, 1e-1])
def test_a_table_from_some_rounds_ago_has_the_order_and_costs_no_precision(drift, labels):
    model, old = small(), small()
    old.positions.data += drift * torch.randn(old.positions.shape, generator=generator_of(4))
    x, update = batch(model, labels)
    answer, = secret(old, [update])
    images = answer.images[best_assignment(answer.images, x)]
    assert (images - x).square().mean().sqrt() < 1e-5 and answer.verdict == "exact"


def test_rows_are_put_where_a_table_has_them_and_a_table_without_places_says_nothing():
    E = torch.randn(4, 6, generator=generator_of(0), dtype=torch.double)
    shuffle = torch.tensor([2, 0, 3, 1])
    order, told = in_order(E[shuffle] + 7.0, E)
    assert told and torch.equal(E[shuffle][order], E)
    assert not in_order(E[shuffle], torch.randn(4, 6, generator=generator_of(1), dtype=torch.double))[1]
    assert not in_order(torch.zeros(4, 6).double(), torch.zeros(4, 6).double())[1]   # all rows are one


def test_the_attacker_s_own_table_does_not_matter_nor_is_her_model_changed():
    model = small()
    x, update = batch(model, [3])
    for seed in (1, 2):
        attacker = guess_positions(model, seed=seed)
        before = copy.deepcopy(attacker.state_dict())
        answer, = secret(attacker, [update])
        assert off(answer, x)[0] < 1e-4
        assert all(torch.equal(t, before[n]) for n, t in attacker.state_dict().items())
        assert not any(module._forward_pre_hooks for module in attacker.modules())


def test_a_secret_table_whose_gradient_is_sent_keeps_not_even_the_order():
    model = small()
    x = torch.randn(2, 1, 16, 16, generator=generator_of(0), dtype=torch.double)
    answer, = secret(guess_positions(model), [client_update(model, x.float(), torch.tensor([3, 5]))])
    images = answer.images[best_assignment(answer.images, x)]
    assert answer.verdict == "exact" and (images - x).square().mean().sqrt() < 10 * answer.error < 1e-3
    assert (answer.positions - model.positions.detach()).std(1).max() < 1e-4   # each row but for a multiple of 1


@pytest.mark.parametrize("positions", ["normal", "sincos2d"])
def test_a_frozen_table_makes_no_difference(positions):
    model = small(positions=positions)
    x = torch.randn(2, 1, 16, 16, generator=generator_of(0), dtype=torch.double)
    update = client_update(model, x.float(), torch.tensor([3, 5]))
    attacker = guess_positions(model) if positions == "normal" else model   # a formula is nobody's secret
    error, labels = off(secret(attacker, [update])[0], x)
    assert error < 1e-3 and labels == [3, 5]


@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_a_client_that_scales_its_gradient_is_read_all_the_same(factor):
    model = small()
    x, update = batch(model, [3, 5])
    scaled = replace(update, gradients={name: factor * g for name, g in update.gradients.items()})
    answer, = secret(guess_positions(model), [scaled])
    error, labels = off(answer, x)
    assert error < 1e-3 and labels == [3, 5] and answer.verdict == "not-unique"   # but for the order all is explained


def test_images_that_share_a_patch_at_one_place_are_told_apart():
    model = small()
    x, _ = batch(model, [3, 5, 6])
    x[:2, :, :8, :8] = 0.5
    update = client_update(model, x.float(), torch.tensor([3, 5, 6]), withheld=("positions",))
    error, labels = off(secret(guess_positions(model), [update])[0], x)
    assert error < 1e-2 and labels == [3, 5, 6]


def test_the_heads_output_names_the_company_and_the_length_of_a_token():
    model = small().double()
    x = torch.randn(3, 1, 16, 16, generator=generator_of(0), dtype=torch.double)
    v = view(model)
    Z = [v.stream(image) for image in x]
    z, o = torch.cat(Z), torch.cat([v.attended(one) for one in Z])
    factors = torch.rand(len(z), 1, generator=generator_of(1), dtype=torch.double) + 0.5
    π, λ = company(v, z, o / factors)
    assert (λ / factors - 1).abs().max() < 1e-8
    patches = [i for i in range(15) if i % 5]
    truth = torch.block_diag(*[torch.ones(5, 5)] * 3).double()
    assert (π - truth)[:, patches].abs().max() < 1e-8      # the class tokens are one stream, which all images have
    found = {tuple(sorted((group % 5).tolist())): set((group[group % 5 > 0] // 5).tolist()) for group in in_images(π, z, 3)}
    assert set(found) == {(0, 1, 2, 3, 4)} and all(len(images) == 1 for images in found.values())
    assert sorted(group.max().item() // 5 for group in in_images(π, z, 3)) == [0, 1, 2]


def test_directions_become_streams_of_their_length():
    model = uneven(small())
    x, update = batch(model, [1, 2])
    block, v = Block(guess_positions(model), update), view(copy.deepcopy(model).double())
    u = strangers(block.token, 10, generator_of(0), 60, 20)
    z, _ = settled(block, u)
    truth = torch.cat([v.stream(image) for image in x])
    truth = truth - truth.mean(1, keepdim=True)
    assert len(u) == 10 and (torch.cdist(truth, z).min(1).values < 1e-3 * truth.norm(dim=1)).all()
    before, heads = parted(block, u @ block.token.Q.mT)
    assert before.shape == heads.shape == (10, 48)


def test_noise_leaves_no_token_and_the_answer_says_so_and_goes_on():
    model = small()
    x, update = batch(model, [3])
    drowned = gaussian(update, 0.1 * update["head.weight"].square().mean().sqrt().item(), generator_of(0))
    answer, = secret(guess_positions(model), [drowned], patience=2)
    assert answer.verdict == "not-converged" and "0 of 5 tokens" in answer.reason and not len(answer.images)
    kept, (x, update) = {}, batch(model, [3, 1, 3, 4])
    first, = secret(guess_positions(model), [update], seconds=0.0, kept=kept)
    assert not first.finished and 0 < len(kept[0]["tokens"]) < 20 and f"{len(kept[0]['tokens'])} of 20" in first.reason
    again, = secret(guess_positions(model), [update], kept=kept)
    assert off(again, x)[0] < 1e-3


def test_where_it_does_not_apply_it_says_why():
    model = small()
    _, update = batch(model, [3])
    with pytest.raises(NotApplicable, match="first block"): secret(small(arch="A"), [batch(small(arch="A"), [3])[1]])
    with pytest.raises(NotApplicable, match="first block"): secret(model, [withhold(update, ["blocks.0.mlp.0.weight"])])
    with pytest.raises(NotApplicable, match="5 x 5 tokens"): secret(model, [batch(model, [1, 2, 3, 4, 5])[1]])
    with pytest.raises(MissingGradient, match="patch.weight"): secret(model, [withhold(update, ["patch.weight"])])
    with pytest.raises(MissingGradient, match="head.weight"): secret(model, [withhold(update, ["head.weight"])])


def test_the_list_turns_to_it_where_the_table_alone_is_not_the_server_s():
    model = small()
    _, update = batch(model, [3])
    stranger = guess_positions(model)
    assert best_attack(stranger, update)[0] == "secret" and best_attack(model, update)[0] == "subspace"
    assert any("tokens" in remark for remark in check_update(stranger, update))


def library(name):
    """A small ViT of a library."""
    torch.manual_seed(0)
    shape = dict(img_size=32, patch_size=8, embed_dim=128, depth=2, num_heads=4, num_classes=10)
    if name == "torchvision": return VisionTransformer(32, 8, 2, 4, 128, 256, num_classes=10)
    if name == "timm": return timm.models.VisionTransformer(**shape)
    if name == "timm's mean": return timm.models.VisionTransformer(**shape, class_token=False, global_pool="avg")
    return ViTForImageClassification(ViTConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
                                               image_size=32, patch_size=8, num_labels=10))


@pytest.mark.parametrize("name", ["torchvision", "timm", "timm's mean", "Hugging Face"])
def test_libraries_models_give_their_patches_away_with_any_table(name):
    model = library(name).eval()
    v = view(model)
    head = model.get_parameter(v.classifier)
    head.data.copy_(0.02 * torch.randn(head.shape, generator=generator_of(1)))   # torchvision's is zero
    x = torch.randn(2, 3, 32, 32, generator=generator_of(0), dtype=torch.double)
    update = withhold(client_update(model, x.float(), torch.tensor([3, 7])), [v.positions])
    attacker = copy.deepcopy(model)
    attacker.get_parameter(v.positions).data.copy_(0.02 * torch.randn(v.weights[v.positions].shape, generator=generator_of(2)))
    error, labels = off(secret(attacker, [update])[0], x)
    assert error < 1e-2 and labels == [3, 7]


def smooth(seed, side=32):
    """A picture whose pieces continue each other."""
    g = generator_of(seed)
    y, x = torch.meshgrid(*2 * [torch.linspace(0, 1, side, dtype=torch.double)], indexing="ij")
    waves = [torch.sin(6 * (a * x + b * y) + c) for a, b, c in torch.randn(4, 3, generator=g, dtype=torch.double).tolist()]
    return torch.stack(waves).sum(0)[None, None]


def test_edges_put_the_pieces_of_smooth_pictures_in_order():
    shuffle = torch.randperm(16, generator=generator_of(2))
    pieces = torch.cat([to_patches(smooth(seed), 8) for seed in (0, 1)]).unflatten(2, (1, 8, 8))
    for group in (pieces[:1], pieces):
        order = puzzle(group[:, shuffle], 4)
        assert shuffle[order].tolist() == list(range(16))
    costs = edges(pieces)
    right = laid(costs, torch.arange(16).view(4, 4))
    assert right < laid(costs, shuffle.view(4, 4)) / 10


def test_patches_that_stand_at_one_place_have_one_row_of_the_table():
    E = torch.randn(4, 6, generator=generator_of(0), dtype=torch.double)
    orders = torch.stack([torch.arange(4), torch.tensor([2, 0, 3, 1])])
    tables = torch.stack([E, E[orders[1]] + 7.0])   # a multiple of 1 in every row says nothing
    at = same_places(tables)
    assert at[0].tolist() == [0, 1, 2, 3] and orders[1][at[1]].tolist() == [0, 1, 2, 3]


def test_the_answer_can_be_kept_apart_from_another_update_of_the_same_call():
    model = small()
    (x, one), (w, two) = batch(model, [3]), batch(model, [4], seed=1)
    told = []
    first, second = secret(guess_positions(model), [one, two], seeds=[5, 6], watch=lambda step, losses, images: told.append((step, images.shape)))
    assert off(first, x)[0] < 1e-4 and off(second, w)[0] < 1e-4 and [step for step, _ in told] == list(range(len(told)))
    assert replace(first).positions.shape == (5, 48) and told[0][1] == (1, 0, 1, 16, 16)
