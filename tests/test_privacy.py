"""Claims about the guarantee that noise gives and about descent under noise (chapter 18)."""
import ast
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from april_nb import privacy
from april_nb.defenses import l1_clip, total_norm
from april_nb.experiments import PrivateTraining
from april_nb.federated import AprilError, Update

noise, delta, rounds = st.floats(0.05, 50), st.floats(1e-12, 0.5), st.integers(1, 10_000)
ACCOUNTS = [privacy.gaussian_epsilon, privacy.exact_epsilon, privacy.laplace_epsilon, privacy.epsilon]


def divergence(log_p, log_q, α, low, high):
    integral, _ = quad(lambda t: math.exp(α * log_p(t) + (1 - α) * log_q(t)), low, high, limit=500, points=(0, 1))
    return math.log(integral) / (α - 1)


@given(st.floats(1.1, 10), st.floats(0.8, 5))
def test_renyi_divergences_are_those_of_the_definition(α, z):
    normal = [lambda t, m=m: -((t - m) / z) ** 2 / 2 - math.log(z * math.sqrt(2 * math.pi)) for m in (1, 0)]
    assert privacy.gaussian_renyi(α, z) == pytest.approx(divergence(*normal, α, α - 15 * z, α + 15 * z), rel=1e-5)
    laplacian = [lambda t, m=m: -abs(t - m) / z - math.log(2 * z) for m in (1, 0)]
    assert privacy.laplace_renyi(α, z) == pytest.approx(divergence(*laplacian, α, -40 * z, 1 + 40 * z), rel=1e-4, abs=1e-9)


def test_the_accountant_reproduces_abadi_et_al():
    """q = 0.01, σ = 4, δ = 1e-5, 10,000 steps: ε ≈ 1.26 (Abadi et al. 2016, section 3.2)."""
    orders = range(2, 33)
    ρ = privacy.library().accountants.analysis.rdp.compute_rdp(q=0.01, noise_multiplier=4, steps=10_000, orders=orders)
    published = min(r + math.log(1e5) / (α - 1) for r, α in zip(ρ, orders))
    assert round(published, 2) == 1.26
    assert 0.9 < privacy.epsilon(4, 1e-5, 10_000, 0.01) < published


@pytest.mark.parametrize("account", ACCOUNTS)
@given(noise, delta, rounds)
def test_epsilon_falls_with_noise_and_grows_with_rounds(account, z, delta, rounds):
    ε = account(z, delta, rounds)
    assert account(1.5 * z, delta, rounds) <= ε * (1 + 1e-9) and account(z, delta, 2 * rounds) >= ε * (1 - 1e-9)


@given(noise, delta, rounds)
def test_what_is_proved_is_never_less_than_what_is_true(z, delta, rounds):
    exact = privacy.exact_epsilon(z, delta, rounds)
    assert exact <= privacy.epsilon(z, delta, rounds) * (1 + 1e-9) + 1e-9
    assert exact <= privacy.gaussian_epsilon(z, delta, rounds) * (1 + 1e-9)
    if exact > 0: assert privacy.exact_delta(exact, z, rounds) == pytest.approx(delta, rel=1e-4)


@given(st.floats(0.01, 1e6), st.floats(1e-10, 0.1), st.integers(1, 1000))
def test_the_noise_for_a_promise_keeps_it_and_no_more(ε, delta, rounds):
    z = privacy.noise_for(ε, delta, rounds)
    assert privacy.exact_epsilon(z, delta, rounds) == pytest.approx(ε, rel=1e-5)
    l = math.log(1 / delta)   # and the closed form's noise is enough
    assert z <= math.sqrt(rounds / 2) * (math.sqrt(l + ε) + math.sqrt(l)) / ε * (1 + 1e-9)


@given(st.floats(0.5, 4), st.floats(0.001, 0.3), st.integers(1, 1000))
def test_sampling_amplifies_privacy(z, q, rounds):
    assert privacy.epsilon(z, 1e-5, rounds, q) <= privacy.epsilon(z, 1e-5, rounds) * (1 + 1e-9)


@pytest.mark.parametrize("account", ACCOUNTS)
def test_nonsense_is_refused_in_one_line(account):
    for arguments, line in [((-1, 1e-5), "choose 0 or more"), ((math.nan, 1e-5), "choose 0 or more"), ((1, 0), "probability"),
                            ((1, 1), "probability"), ((1, 1e-5, 0), "counted from 1"), ((1, 1e-5, 1.5), "counted from 1")]:
        with pytest.raises(AprilError, match=line) as error: account(*arguments)
        assert "\n" not in str(error.value)
    assert account(0, 1e-5) == math.inf
    with pytest.raises(AprilError, match="share in"): privacy.epsilon(1, 1e-5, 1, 0)
    for ε in (0, -1, math.inf):
        with pytest.raises(AprilError, match="positive number"): privacy.noise_for(ε, 1e-5)


def test_a_missing_library_is_one_line_with_its_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(privacy.MissingLibrary, match=r"needs Opacus: pip install 'april_nb\[privacy\]'"):
        privacy.epsilon(1, 1e-5)
    assert privacy.exact_epsilon(1, 1e-5) > 0   # what needs no library goes on


def test_only_functions_import_opacus():
    tree = ast.parse(Path(privacy.__file__).read_text())
    assert not [n for n in tree.body if isinstance(n, ast.Import) and n.names[0].name.startswith("opacus")]


@given(st.integers(0, 1000), st.floats(0.1, 10))
def test_mechanisms_clip_in_their_norm_and_add_their_noise(seed, S):
    g = torch.Generator().manual_seed(seed)
    update = Update({"a": 5 * torch.randn(400, 50, generator=g), "b": torch.randn(7, generator=g)})
    l1 = sum(t.abs().sum() for t in l1_clip(update, S).gradients.values())
    assert l1 == pytest.approx(S, rel=1e-4)
    assert total_norm(l1_clip(update, 1e9)) == pytest.approx(total_norm(update))
    for mechanism, std in [(privacy.gaussian_mechanism, 2 * S * 3), (privacy.laplace_mechanism, 8 ** 0.5 * S * 3)]:
        sent = mechanism(update, S, 3.0, g)
        assert sent["a"].std().item() == pytest.approx(std, rel=0.05)
        with pytest.raises(AprilError, match="positive"): mechanism(update, -1.0, 3.0, g)
        with pytest.raises(AprilError, match="positive"): mechanism(update, S, 0.0, g)


@given(st.integers(0, 10_000))
def test_the_noise_ball_holds_on_random_quadratics(seed):
    """Full gradients of a quadratic: the expectation is known in closed form."""
    g = np.random.default_rng(seed)
    λ, e, σ = g.uniform(0.01, 10, 8), 10 ** g.uniform(-2, 2) * g.normal(size=8), 10 ** g.uniform(-3, 2)
    lr, T = g.uniform(0.01, 1) / λ.max(), int(g.integers(0, 3000))
    shrink = (1 - lr * λ) ** 2
    expected = (shrink ** T * e ** 2 + (lr * σ) ** 2 * (1 - shrink ** T) / (1 - shrink)).sum()
    assert expected <= privacy.distance_bound((e ** 2).sum(), λ.min(), λ.max(), lr, T, 8 * σ ** 2) * (1 + 1e-9)


@given(st.integers(0, 10_000))
def test_the_gradient_bound_holds_on_random_quadratics(seed):
    g = np.random.default_rng(seed)
    λ, e, σ = g.uniform(0.01, 10, 8), 10 ** g.uniform(-2, 2) * g.normal(size=8), 10 ** g.uniform(-3, 2)
    lr, T = g.uniform(0.01, 1) / λ.max(), int(g.integers(1, 300))
    shrink, total = (1 - lr * λ) ** 2, 0.0
    for t in range(T):
        total += (λ ** 2 * (shrink ** t * e ** 2 + (lr * σ) ** 2 * (1 - shrink ** t) / (1 - shrink))).sum() / T
    gap = (λ * e ** 2).sum() / 2
    assert total <= privacy.stationarity_bound(gap, λ.max(), lr, T, 8 * σ ** 2) * (1 + 1e-9)


def test_simulated_descent_agrees_with_the_expectation(generator):
    λ, σ, lr, T = torch.tensor([0.3, 1.0], dtype=torch.double), 2.0, 0.2, 60
    oracle = lambda w, g: λ * w + σ * torch.randn(w.shape, generator=g, dtype=w.dtype)
    path = privacy.noisy_descent(oracle, torch.ones(20_000, 2, dtype=torch.double), lr, T, generator)
    shrink = (1 - lr * λ) ** 2
    expected = (shrink ** T + (lr * σ) ** 2 * (1 - shrink ** T) / (1 - shrink)).sum()
    assert path.shape == (T + 1, 20_000, 2)
    assert path[-1].square().sum(1).mean() == pytest.approx(expected.item(), rel=0.03)


def test_the_bounds_refuse_a_step_for_which_they_are_not_proved():
    for lr in (0, 0.51, -1):
        with pytest.raises(AprilError, match="1/L = 0.5"): privacy.stationarity_bound(1, 2, lr, 10, 1)
        with pytest.raises(AprilError, match="1/L = 0.5"): privacy.distance_bound(1, 1, 2, lr, 10, 1)


def tiny_run(seed=0, noise=1.0):
    return PrivateTraining("mnist", noise, images=20, steps=4, batch=4, every=2, width=8).once(seed, torch.device("cpu"))


def test_a_private_training_run_repeats_and_says_what_it_costs(monkeypatch):
    monkeypatch.delenv("APRIL_DATA", raising=False)
    before = torch.get_rng_state()
    first, again = tiny_run(), tiny_run()
    assert torch.equal(before, torch.get_rng_state())
    assert [r["step"] for r in first] == [2, 4]
    same = lambda rows: [{k: v for k, v in r.items() if k != "seconds"} for r in rows]
    assert same(first) == same(again) != same(tiny_run(seed=1))
    assert first[1]["epsilon"] == privacy.epsilon(1.0, 1e-5, 4, 1 / 4)   # 16 images to train on, 4 in a step
    assert tiny_run(noise=0.0)[0]["epsilon"] == math.inf
    with pytest.raises(AprilError, match="choose 0 or more"): tiny_run(noise=-1.0)
