"""Claims about the guarantee that noise gives and about descent under noise (the chapters on privacy and convergence)."""
import ast
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from april_nb import convergence, privacy
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


ENDS = [5e-324, 1e-300, 1e-200, 1e-100, 1e-50, 1e-16, 1e-8, 1e-3, 1.0, 1e3, 1e8, 1e16, 1e50, 1e100, 1e200, 1e300, math.inf, -1e300, math.nan]
anything = st.sampled_from(ENDS) | st.floats(1e-100, 1e100)
probabilities = st.sampled_from([5e-324, 1e-300, 1e-200, 1e-30, 0.5, 1 - 1e-16, 1.0]) | st.floats(1e-12, 1 - 1e-16)
counts = st.sampled_from([1, 10, 10**6, 2**53, 2**53 + 1, 10**400, math.inf, math.nan])


def or_one_line(call):
    """What a call returns, or None where it refuses in one line; anything else is an error."""
    try: return call()
    except AprilError as error: assert "\n" not in str(error) and len(str(error)) < 300


@pytest.mark.parametrize("account", [*ACCOUNTS, privacy.noise_for])
@settings(max_examples=300)
@given(anything, probabilities, counts)
def test_every_account_is_a_number_or_one_line_at_the_ends_of_the_range(account, z, delta, rounds):
    answer = or_one_line(lambda: account(z, delta, rounds))
    assert answer is None or answer >= 0
    if 1e-100 <= z <= 1e100 and 1e-300 <= delta < 1 and rounds in (1, 10, 10**6, 2**53): assert answer is not None and answer < math.inf


@settings(max_examples=300)
@given(anything, probabilities, counts, st.sampled_from([5e-324, 1e-100, 1e-9, 0.5, 1 - 1e-16, 1.0, 2.0]))
def test_sampling_at_the_ends_of_the_range(z, delta, rounds, q):
    answer = or_one_line(lambda: privacy.epsilon(z, delta, rounds, q))
    assert answer is None or 0 <= answer < math.inf


@settings(max_examples=300)
@given(anything, anything, counts)
def test_exact_deltas_and_divergences_at_the_ends_of_the_range(ε, z, rounds):
    δ = or_one_line(lambda: privacy.exact_delta(ε, z, rounds))
    assert δ is None or 0 <= δ <= 1
    for divergence in (privacy.gaussian_renyi, privacy.laplace_renyi):
        ρ = or_one_line(lambda: divergence(1 + ε, z))
        assert ρ is None or 0 <= ρ < math.inf


def test_without_noise_nothing_is_kept():
    assert privacy.exact_delta(1, 0) == 1
    assert privacy.gaussian_renyi(2, 0) == privacy.laplace_renyi(2, 0) == math.inf


def delta_in_many_digits(u, z):
    """δ at ε = (1/2z − u)/z, from its definition in two hundred digits, and ε."""
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(200):
        u, z = mpmath.mpf(u), mpmath.mpf(z)
        ε = (1 / (2 * z) - u) / z
        return float(mpmath.ncdf(u) - mpmath.exp(ε) * mpmath.ncdf(u - 1 / z)), float(ε)


@settings(max_examples=200)
@given(st.floats(-100, 8).map(lambda e: 10.0 ** -e), st.floats(-37, 8))
def test_delta_has_all_its_digits_however_strong_the_noise(z, u):
    u = min(u, 1 / (2 * z))   # ε ≥ 0
    expected, _ = delta_in_many_digits(u, z)
    assert privacy.profile(u, z) == pytest.approx(expected, rel=1e-9, abs=1e-307)


@settings(max_examples=200)
@given(st.floats(-100, 4).map(lambda e: 10.0 ** -e), st.floats(-36, 6))
def test_epsilon_and_noise_are_found_however_strong_the_noise(z, u):
    δ, ε = delta_in_many_digits(min(u, 1 / (2 * z)), z)
    if not 1e-299 < δ < 1 - 1e-6: return
    # an ε so small that the rounding of δ decides it has no more digits than that
    assert privacy.exact_epsilon(z, δ) == pytest.approx(ε, rel=1e-6, abs=1e-12 / z)
    if ε >= 1e-100: assert privacy.noise_for(ε, δ) == pytest.approx(z, rel=1e-6)


@given(st.floats(-16, 100).map(lambda e: 10.0 ** e), st.floats(1e-12, 0.5), st.sampled_from([1, 10**6, 2**53]))
def test_a_promise_is_kept_at_any_size(ε, delta, rounds):
    z = privacy.noise_for(ε, delta, rounds)
    if ε > 1e-6: assert privacy.exact_epsilon(z, delta, rounds) == pytest.approx(ε, rel=1e-6)
    assert privacy.exact_epsilon(2 * z, delta, rounds) <= privacy.exact_epsilon(z, delta, rounds)


@given(st.floats(1e5, 1e12), st.floats(1.01, 64))
def test_strong_laplacian_noise_costs_no_less_than_is_true(λ, α):
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(100):
        a, l = mpmath.mpf(α), mpmath.mpf(λ)
        true = float(mpmath.log(a / (2 * a - 1) * mpmath.exp((a - 1) / l) + (a - 1) / (2 * a - 1) * mpmath.exp(-a / l)) / (a - 1))
    assert true * (1 - 1e-4) <= privacy.laplace_renyi(α, λ) <= true * (1 + 1e-4)
    if λ > 1e6: assert privacy.laplace_renyi(α, λ) >= true * (1 - 1e-12)


@pytest.mark.parametrize("bound", [lambda **a: convergence.stationarity_bound(**{"gap": 1, "L": 2, "lr": 0.1, "steps": 10, "variance": 1} | a),
                                   lambda **a: convergence.distance_bound(**{"distance": 1, "μ": 1, "L": 2, "lr": 0.1, "steps": 10, "variance": 1} | a)])
def test_bounds_for_no_objective_are_one_line(bound):
    assert bound() > 0
    for L in (0, -1, math.nan, math.inf):
        with pytest.raises(AprilError, match="positive numbers"): bound(L=L)
    with pytest.raises(AprilError, match="positive numbers"): convergence.distance_bound(1, 0, 2, 0.1, 10, 1)
    with pytest.raises(AprilError, match="counted from 1"): convergence.stationarity_bound(1, 2, 0.1, 0, 1)


def test_a_missing_library_is_one_line_with_its_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(privacy.MissingLibrary, match=r"needs Opacus: pip install '.\[privacy\]'"):
        privacy.epsilon(1, 1e-5)
    assert privacy.exact_epsilon(1, 1e-5) > 0   # what needs no library goes on


def test_only_functions_import_opacus():
    tree = ast.parse(Path(privacy.__file__).read_text(encoding="utf-8"))
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
    assert expected <= convergence.distance_bound((e ** 2).sum(), λ.min(), λ.max(), lr, T, 8 * σ ** 2) * (1 + 1e-9)


@given(st.integers(0, 10_000))
def test_the_gradient_bound_holds_on_random_quadratics(seed):
    g = np.random.default_rng(seed)
    λ, e, σ = g.uniform(0.01, 10, 8), 10 ** g.uniform(-2, 2) * g.normal(size=8), 10 ** g.uniform(-3, 2)
    lr, T = g.uniform(0.01, 1) / λ.max(), int(g.integers(1, 300))
    shrink, total = (1 - lr * λ) ** 2, 0.0
    for t in range(T):
        total += (λ ** 2 * (shrink ** t * e ** 2 + (lr * σ) ** 2 * (1 - shrink ** t) / (1 - shrink))).sum() / T
    gap = (λ * e ** 2).sum() / 2
    assert total <= convergence.stationarity_bound(gap, λ.max(), lr, T, 8 * σ ** 2) * (1 + 1e-9)


def test_simulated_descent_agrees_with_the_expectation(generator):
    λ, σ, lr, T = torch.tensor([0.3, 1.0], dtype=torch.double), 2.0, 0.2, 60
    oracle = lambda w, g: λ * w + σ * torch.randn(w.shape, generator=g, dtype=w.dtype)
    path = convergence.noisy_descent(oracle, torch.ones(20_000, 2, dtype=torch.double), lr, T, generator)
    shrink = (1 - lr * λ) ** 2
    expected = (shrink ** T + (lr * σ) ** 2 * (1 - shrink ** T) / (1 - shrink)).sum()
    assert path.shape == (T + 1, 20_000, 2)
    assert path[-1].square().sum(1).mean() == pytest.approx(expected.item(), rel=0.03)


def test_the_bounds_refuse_a_step_for_which_they_are_not_proved():
    for lr in (0, 0.51, -1):
        with pytest.raises(AprilError, match="1/L = 0.5"): convergence.stationarity_bound(1, 2, lr, 10, 1)
        with pytest.raises(AprilError, match="1/L = 0.5"): convergence.distance_bound(1, 1, 2, lr, 10, 1)


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
