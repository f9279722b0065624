"""Theorems 1 and 2 and Algorithm 1 as properties over random models, float64; what no closed form may depend on."""
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from april_nb.attention import attention_moment
from april_nb.closed_form import closed_form
from april_nb.defenses import gaussian, noise_generator
from april_nb.federated import client_update
from april_nb.labels import restore_labels
from april_nb.patch import patch_leakage, ridge_leakage
from april_nb.position import position_gradient
from april_nb.subspace import subspace_leakage
from april_nb.views import view
from april_nb.vit import ViT, init_torch


class AcrossTokens(nn.Module):
    """A network that lets tokens interact in a way that no Transformer does."""
    def __init__(self, width):
        super().__init__()
        self.gru, self.mix = nn.GRU(width, width, batch_first=True), nn.Conv1d(width, width, 3, padding=1)

    def forward(self, z):
        return torch.sin(self.gru(z)[0]) * self.mix(z.mT).mT + z.cumsum(1).tanh()


BEHIND = {
    "mlp": lambda C: nn.Sequential(nn.Linear(C, C), nn.GELU(), nn.Linear(C, C)),
    "recurrent": AcrossTokens,
    "pointwise": lambda C: nn.Softplus(),
}


@st.composite
def models(draw, arch="A", min_depth=1):
    """A small float64 ViT with random sizes, and sometimes another network behind its first attention."""
    heads = draw(st.sampled_from([1, 2, 4]))
    width = heads * draw(st.integers(5, 10))
    model = ViT(arch, image_size=8, channels=draw(st.sampled_from([1, 3])), patch=4, width=width,
                depth=draw(st.integers(min_depth, 3)), heads=heads, mlp_width=2 * width, classes=5,
                mlp_gelus=draw(st.sampled_from([1, 2])), head_scale=draw(st.booleans()),
                qkv_bias=draw(st.booleans()), class_token=draw(st.booleans())).double()
    init_torch(model, torch.Generator().manual_seed(draw(st.integers(0, 10**6))))
    if arch == "A":
        torch.manual_seed(0)
        model.blocks[0].mlp = BEHIND[draw(st.sampled_from(sorted(BEHIND)))](width).double()
        model.blocks[0].norm = nn.Identity()
    return model


def batch(model, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    shape = (n, model.channels, model.image_size, model.image_size)
    return torch.randn(shape, generator=g, dtype=torch.double), torch.randint(5, (n,), generator=g)


def streams(model, images, labels):
    """Z_b of each image and ∂l/∂Z_b of the batch's mean loss, which only a client could know."""
    Z = model.tokens(images).detach().requires_grad_()
    z = model.blocks(Z)
    out = model.head(model.norm(z.mean(1) if model.class_token is None else z[:, 0]))
    return Z.detach(), torch.autograd.grad(F.cross_entropy(out, labels), Z)[0]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@given(models(), st.integers(1, 4))
def test_theorem_1_identity_holds_for_any_network_behind_the_attention(model, n):
    images, labels = batch(model, n)
    Z, G = streams(model, images, labels)
    B = attention_moment(view(model), client_update(model, images, labels))
    assert relative(B, torch.einsum("btc,btd->cd", G, Z)) < 1e-10


@given(st.sampled_from("AB").flatmap(models), st.integers(1, 4))
def test_theorem_2_position_gradient_is_the_sum_of_stream_gradients(model, n):
    images, labels = batch(model, n)
    _, G = streams(model, images, labels)
    assert relative(position_gradient(view(model), client_update(model, images, labels)), G.sum(0)) < 1e-10


@st.composite
def invertible(draw):
    """Models that meet the rank conditions: at least two blocks, C ≥ D = 16 and C ≥ P = 4."""
    heads = draw(st.sampled_from([1, 2, 4]))
    width = heads * draw(st.integers(-(-18 // heads), 12 if heads > 2 else 24))
    model = ViT("A", image_size=8, channels=1, patch=4, width=width, depth=draw(st.integers(2, 3)), heads=heads,
                mlp_width=2 * width, classes=5, qkv_bias=draw(st.booleans()), class_token=draw(st.booleans())).double()
    init_torch(model, torch.Generator().manual_seed(draw(st.integers(0, 10**6))))
    return model


@given(invertible(), st.integers(0, 100))
def test_algorithm_1_is_exact_where_the_rank_conditions_hold(model, seed):
    images, labels = batch(model, 1, seed)
    answer = closed_form(model, client_update(model, images, labels))
    assert [s.rank for s in answer.systems] == [4, 16]
    assert answer.verdict == "exact", answer.reason
    assert (answer.images - images).abs().max() < 1e-3


@given(invertible(), st.integers(2, 3))
def test_verdict_of_a_batch_is_not_unique(model, n):
    assert closed_form(model, client_update(model, *batch(model, n))).verdict == "not-unique"


def cifar(**changes):
    from april_nb.vit import vit
    return vit("vit_cifar", "A", **changes).double()


def attack(model, n=1):
    g = torch.Generator().manual_seed(0)
    images = torch.randn(n, 3, 32, 32, generator=g, dtype=torch.double)
    return closed_form(model, client_update(model, images, torch.arange(n)))


def test_one_block_leaves_two_directions_per_head():
    for heads in (1, 2, 4):
        answer = attack(cifar(depth=1, heads=heads))
        assert answer.systems[0].rank == 2 * heads and answer.verdict == "not-unique"


def test_width_below_the_patches_or_their_pixels_is_not_unique():
    assert attack(cifar(patch=4, width=60)).systems[0].unique is False
    assert attack(cifar(width=128)).systems[1].unique is False
    assert attack(cifar(width=128)).verdict == "not-unique"


def test_dropout_makes_the_equations_contradict_each_other():
    answer = attack(cifar(dropout=0.1))
    assert answer.verdict == "not-applicable" and answer.systems[0].relative_residual > 1e-3
    model = cifar(dropout=0.1).eval()   # a client that trains without dropping anything
    assert attack(model).verdict == "exact"


def test_nothing_leaks_through_a_head_of_zeros():
    model = cifar()
    nn.init.zeros_(model.head.weight)
    answer = attack(model)
    assert answer.verdict == "nothing-leaks" and torch.isfinite(answer.images).all()


def test_several_local_steps_are_approximate_and_the_certificate_knows():
    model = cifar()
    image = torch.randn(1, 3, 32, 32, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    answer = closed_form(model, client_update(model, image, torch.tensor([0]), local_steps=3, lr=1e-6))
    error = (answer.images - image).square().mean().sqrt().item()
    assert answer.verdict != "exact" or error < 1e-3
    assert 0.1 < answer.error / error < 10


def scaled(update, factor):
    return replace(update, gradients={n: g * factor for n, g in update.gradients.items()})


CLOSED = {"closed_form": ("A", closed_form), "patch": ("B", patch_leakage), "ridge": ("B", ridge_leakage),
          "subspace": ("B", subspace_leakage)}


@pytest.mark.parametrize("arch, attack", CLOSED.values(), ids=CLOSED.keys())
@given(exponent=st.integers(-530, 530), noise=st.sampled_from([0.0, 1e-6]), seed=st.integers(0, 9))
def test_a_power_of_two_in_the_loss_changes_no_bit_of_an_answer(arch, attack, exponent, noise, seed):
    model = ViT(arch, image_size=8, channels=1, patch=4, width=24, depth=2, heads=1, mlp_width=48, classes=5).double()
    init_torch(model, torch.Generator().manual_seed(seed))
    update = client_update(model, *batch(model, 1, seed))
    if noise: update = gaussian(update, noise, noise_generator(seed), "rms")
    one, other = (attack(model, u) for u in (update, scaled(update, 2.0 ** exponent)))
    assert torch.equal(other.images, one.images) and other.systems == one.systems
    assert (other.verdict, other.reason) == (one.verdict, one.reason)
    assert torch.equal(restore_labels(model, scaled(update, 2.0 ** exponent)), restore_labels(model, update))


@pytest.mark.parametrize("arch, attack", CLOSED.values(), ids=CLOSED.keys())
@given(exponent=st.integers(-160, 160), seed=st.integers(0, 9))
def test_the_unit_of_the_loss_plays_no_part(arch, attack, exponent, seed):
    model = ViT(arch, image_size=8, channels=1, patch=4, width=24, depth=2, heads=1, mlp_width=48, classes=5).double()
    init_torch(model, torch.Generator().manual_seed(seed))
    update = gaussian(client_update(model, *batch(model, 1, seed)), 1e-6, noise_generator(seed), "rms")
    one, other = (attack(model, u) for u in (update, scaled(update, 10.0 ** exponent)))
    torch.testing.assert_close(other.images, one.images, rtol=1e-7, atol=1e-7)
    assert other.verdict == one.verdict
    for a, b in zip(other.systems, one.systems):
        assert (a.name, a.rank, a.expected_rank) == (b.name, b.rank, b.expected_rank)
        assert a.condition_number == pytest.approx(b.condition_number, rel=1e-6)
        assert a.relative_residual == pytest.approx(b.relative_residual, rel=1e-6)


def test_algorithm_1_decomposes_each_of_its_two_systems_once(monkeypatch):
    model, calls, svd = cifar(width=48, mlp_width=48), [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda A, **options: calls.append(A) or svd(A, **options))
    attack(model)
    assert len(calls) == 2
