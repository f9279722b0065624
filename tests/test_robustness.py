"""Claims about attacks of every kind on Gaussian noise, and about a promise to clients (chapter 18d)."""
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from april_nb import privacy, robustness
from april_nb.data import FORMATS
from april_nb.defenses import clip
from april_nb.federated import AprilError, client_update
from april_nb.vit import vit

chance, noise, rounds = st.floats(1e-9, 0.9), st.floats(0.05, 50), st.integers(1, 100)


def generator(): return torch.Generator().manual_seed(0)


@given(chance, noise, rounds)
def test_noise_takes_every_attack_down_to_the_blind_guess_and_no_further(κ, σ, T):
    γ = robustness.reconstruction_bound(κ, σ, T)
    assert κ <= γ <= robustness.reconstruction_bound(κ, σ / 2, T)
    assert γ == pytest.approx(robustness.reconstruction_bound(κ, σ / math.sqrt(T)), rel=1e-6)
    assert robustness.reconstruction_bound(κ, 1e9, T) == pytest.approx(κ, rel=1e-3) and robustness.reconstruction_bound(κ, 0) == 1
    if γ < 0.99: assert robustness.noise_against(κ, γ, T) == pytest.approx(σ, rel=1e-3)


@pytest.mark.parametrize("σ", [0.5, 1, 3])
def test_two_opposite_candidates_reach_the_bound(σ):
    drawn = robustness.best_guess(torch.tensor([[1., -1.], [-1., 1.]]), σ, 100_000, generator())
    assert drawn == pytest.approx(robustness.reconstruction_bound(0.5, σ), abs=0.006)   # four standard errors


@pytest.mark.parametrize("σ", [0.2, 0.5, 1.5])
@pytest.mark.parametrize("m, d", [(2, 3), (30, 5), (100, 200)])
def test_no_candidates_in_the_ball_are_named_more_often_than_the_bound_says(m, d, σ):
    g = generator()
    f = torch.randn(m, d, generator=g, dtype=torch.double)
    f /= f.norm(dim=1, keepdim=True)
    assert robustness.best_guess(f @ f.mT, σ, 20_000, g) <= robustness.reconstruction_bound(1 / m, σ) + 0.015


def test_the_best_guess_is_the_nearest_update_under_noise_on_every_entry():
    g = generator()
    f = 0.7 * torch.randn(20, 8, generator=g, dtype=torch.double)
    sent = torch.randint(20, (40_000,), generator=g)
    seen = f[sent] + 0.8 * torch.randn(40_000, 8, generator=g, dtype=torch.double)
    nearest = torch.cdist(seen, f).argmin(1).eq(sent).double().mean().item()
    assert robustness.best_guess(f @ f.mT, 0.8, 40_000, g) == pytest.approx(nearest, abs=0.015)


def test_a_picture_drawn_from_a_normal_prior_is_hit_no_more_often_than_the_bound_says():
    """The best attack for squared error and a normal prior is the posterior mean; clipping keeps it in the ball."""
    g, σ, η = generator(), 0.4, 0.5
    z = torch.randn(200_000, 2, generator=g, dtype=torch.double)
    κ = 1 - math.exp(-η ** 2 / 2)   # around the mode
    f = z / z.norm(dim=1, keepdim=True).clamp_min(1.0)   # S = 1
    seen = f + σ * torch.randn(z.shape, generator=g, dtype=torch.double)
    for shrink in (0.8, 1.0, 1.2):
        hit = ((shrink * seen - z).norm(dim=1) <= η).double().mean().item()
        assert κ < hit <= robustness.reconstruction_bound(κ, σ)


@given(st.floats(0.5, 20), st.integers(1, 100))
def test_the_numerical_account_lies_between_the_exact_one_and_renyi_s(z, T):
    tight = robustness.tight_epsilon(z, 1e-5, T)
    assert privacy.exact_epsilon(z, 1e-5, T) <= tight + 1e-3 and tight <= privacy.epsilon(z, 1e-5, T) + 0.02


def test_sampling_makes_the_numerical_account_cheaper():
    assert robustness.tight_epsilon(1, 1e-5, 240, 1 / 32) < 0.9 * privacy.epsilon(1, 1e-5, 240, 1 / 32)
    assert robustness.tight_epsilon(0, 1e-5) == math.inf


def small(): return vit("vit_mnist", "B", width=16, depth=1, heads=2, mlp_width=16).double()


def test_clipped_updates_are_the_clients_own():
    x, y = torch.randn(3, 2, 1, 28, 28, dtype=torch.double, generator=generator()), torch.tensor([[0, 1], [2, 3], [4, 5]])
    assert FORMATS["mnist"].size == 28
    for S in (0.1, 1e3):
        rows = robustness.clipped_updates(small(), x, y, S)
        for row, a, b in zip(rows, x, y):
            alone = clip(client_update(small(), a, b), S)
            torch.testing.assert_close(row, torch.cat([alone[n].flatten() for n, _ in small().named_parameters()]),
                                       rtol=1e-5, atol=1e-8)


def test_noise_on_the_sum_has_the_size_that_was_paid_for():
    x, y = torch.zeros(1, 1, 1, 28, 28, dtype=torch.double), torch.zeros(1, 1, dtype=torch.long)
    quiet, loud = small(), small()
    for model, z in ((quiet, 0.0), (loud, 2.0)):
        robustness.train_clients(model, x, y, 1, 1.0, lr=1.0, noise_multiplier=z, clip=3.0)
    moved = torch.cat([(a - b).flatten() for a, b in zip(quiet.parameters(), loud.parameters())])
    assert moved.std().item() == pytest.approx(2 * 3, rel=0.05) and abs(moved.mean().item()) < 0.5
    again = small()
    robustness.train_clients(again, x, y, 1, 1.0, lr=1.0, noise_multiplier=2.0, clip=3.0)
    assert all(torch.equal(a, b) for a, b in zip(loud.parameters(), again.parameters()))


def test_nonsense_is_one_line():
    with pytest.raises(AprilError, match="between 0 and 1"): robustness.reconstruction_bound(1.0, 1)
    with pytest.raises(AprilError, match="between 0 and 1"): robustness.noise_against(0.1, 2)
    with pytest.raises(AprilError, match="blind guess"): robustness.noise_against(0.2, 0.1)
    with pytest.raises(AprilError, match="choose 0 or more"): robustness.tight_epsilon(-1, 1e-5)
    with pytest.raises(AprilError, match="share in"):
        robustness.train_clients(small(), torch.zeros(1, 1, 1, 28, 28), torch.zeros(1, 1), 1, 2.0, 1.0, noise_multiplier=1, clip=1)
    assert robustness.reconstruction_bound(0.5, 1) == pytest.approx(norm.cdf(1))
