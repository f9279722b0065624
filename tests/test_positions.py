"""Fixed position embeddings: what the tables are, what is sent, what an attacker who must guess them has, and the training loop."""
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from april_nb.closed_form import closed_form
from april_nb.experiments import Arm, Training, attack_slice, run
from april_nb.runner import TRAINING
from april_nb.federated import AprilError, MissingGradient, client_update
from april_nb.labels import restore_labels
from april_nb.matching import Matcher, plain_shares
from april_nb.optimization import PUBLISHED, Settings, match, paper_settings
from april_nb.training import accuracy, train
from april_nb.views import view
from april_nb.vit import INITIALISATIONS, POSITIONS, TABLES, guess_positions, sincos1d, sincos2d, sines, vit

FIXED = POSITIONS[1:]
SMALL = dict(width=48, depth=2, heads=4, mlp_width=32)
CPU = torch.device("cpu")


@pytest.fixture
def one(generator):
    return torch.randn(1, 3, 32, 32, generator=generator), torch.tensor([3])


@given(st.sampled_from(sorted(TABLES)), st.integers(1, 8), st.integers(1, 16), st.booleans())
def test_tables_have_a_row_for_each_token_and_are_the_same_every_time(name, side, quarter, class_token):
    table = TABLES[name](side, 4 * quarter, class_token)
    assert table.shape == (side ** 2 + class_token, 4 * quarter) and table.dtype == torch.float32
    assert torch.equal(table, TABLES[name](side, 4 * quarter, class_token))


@given(st.integers(2, 12), st.integers(4, 64))
def test_two_dimensional_sinusoids_have_rank_two_sides_minus_one(side, quarter):
    width = 4 * quarter
    assume(torch.linalg.matrix_rank(sines(torch.arange(side), width // 2)) == side)
    table = sincos2d(side, width, class_token=True)
    assert torch.linalg.matrix_rank(table.double(), rtol=1e-6) <= 2 * side - 1
    exact = sines(torch.arange(side), width // 2)
    exact = torch.cat([exact.repeat_interleave(side, 0), exact.repeat(side, 1)], 1)
    assert torch.linalg.matrix_rank(exact) == 2 * side - 1
    assert torch.allclose(table[1:].double(), exact, atol=1e-6) and not table[0].any()


@given(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3))
def test_two_dimensional_sinusoids_say_row_and_column_in_their_halves(r, c, r2, c2):
    table = sincos2d(4, 32, class_token=False).view(4, 4, 2, 16)
    assert torch.equal(table[r, c, 0], table[r, c2, 0]) and torch.equal(table[r, c, 1], table[r2, c, 1])
    assert (r == r2) == torch.equal(table[r, c, 0], table[r2, c, 0])


def test_one_dimensional_sinusoids_are_those_of_the_transformer():
    table = sincos1d(2, 6, class_token=True)
    for t in range(5):
        for i in range(3):
            angle = torch.tensor(t / 10000 ** (2 * i / 6))
            assert torch.allclose(table[t, 2 * i: 2 * i + 2], torch.stack([angle.sin(), angle.cos()]), atol=1e-6)


@pytest.mark.parametrize("init", INITIALISATIONS)
@pytest.mark.parametrize("kind", FIXED)
def test_kinds_of_positions_change_no_other_weight(kind, init):
    learned, fixed = vit("vit_cifar", "B", init, **SMALL), vit("vit_cifar", "B", init, positions=kind, **SMALL)
    assert all(torch.equal(p, dict(learned.named_parameters())[n]) for n, p in fixed.named_parameters())
    assert torch.equal(fixed.positions, learned.positions) == (kind == "normal")
    if kind in TABLES: assert torch.equal(fixed.positions, TABLES[kind](4, 48, True))


@pytest.mark.parametrize("kind", FIXED)
def test_fixed_positions_are_known_and_not_sent(kind, one):
    model = vit("vit_cifar", "A", positions=kind, **SMALL)
    update = client_update(model, *one)
    assert "positions" not in update.gradients and not view(model).learns_positions
    assert torch.equal(view(model).weight("positions"), model.positions.double())
    assert torch.allclose(view(model).known_tokens(), model.tokens(one[0])[:, 0].double(), atol=1e-6)
    assert restore_labels(model, update).tolist() == [3]


@pytest.mark.parametrize("arch", "AB")
def test_a_frozen_table_and_a_withheld_gradient_are_the_same_update(arch, one):
    withheld = client_update(vit("vit_cifar", arch, **SMALL), *one, withheld=("positions",))
    frozen = client_update(vit("vit_cifar", arch, positions="normal", **SMALL), *one)
    assert withheld.gradients.keys() == frozen.gradients.keys()
    assert all(torch.equal(g, frozen[n]) for n, g in withheld.gradients.items())


def test_the_closed_form_says_in_one_line_that_fixed_positions_are_not_trained(one):
    model = vit("vit_cifar", "A", positions="sincos2d")
    with pytest.raises(MissingGradient, match="fixed positions are not trained") as error: closed_form(model, client_update(model, *one))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", PUBLISHED)
@pytest.mark.parametrize("fixed", [True, False])
def test_gradient_matching_runs_without_the_position_gradient_except_april(method, fixed, one):
    model = vit("vit_cifar", "B", positions="normal" if fixed else "learned", **SMALL)
    update = client_update(model, *one, withheld=() if fixed else ("positions",))
    settings, box = paper_settings(method, 2), (torch.full((3, 1, 1), -3.0), torch.full((3, 1, 1), 3.0))
    if method == "april":
        with pytest.raises(MissingGradient, match="fixed or withheld; take dlg, ig or tag") as error:
            match(model, [update], settings, one[1][None], box)
        assert "\n" not in str(error.value)
    else: assert len(match(model, [update], settings, one[1][None], box)[0].history) == 2


@pytest.mark.parametrize("kind", FIXED)
@pytest.mark.parametrize("arch", "AB")
def test_the_engine_equals_the_plain_step_with_fixed_positions(kind, arch, one):
    model = vit("vit_cifar", arch, positions=kind, **SMALL).double()
    update = client_update(model, one[0].double(), one[1])
    guess = torch.rand(1, 1, 3, 32, 32, dtype=torch.double, generator=torch.Generator().manual_seed(5)).requires_grad_()
    ours = Matcher(model, [update], dtype=torch.double).shares(guess, one[1][None]).distance()
    plain = plain_shares(model, guess[0], one[1], update).distance()
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(l.sum(), guess)[0] for l in (ours, plain)), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kind", ["learned", "normal"])
@pytest.mark.parametrize("init", INITIALISATIONS)
def test_an_attacker_who_guesses_shares_nothing_with_the_clients_positions(kind, init):
    clients, others = (vit("vit_cifar", "B", init, seed, positions=kind) for seed in (0, 5))
    attacker = guess_positions(clients, init, seed=1)
    state, own = clients.state_dict(), attacker.state_dict()
    assert all(torch.equal(own[n], w) for n, w in state.items() if n != "positions")
    assert all(own[n].data_ptr() != w.data_ptr() for n, w in state.items()), "a copy, not a view"
    correlation = torch.corrcoef(torch.stack([own["positions"], state["positions"]]).flatten(1))[0, 1]
    assert correlation.abs() < 0.05 and own["positions"].std() / state["positions"].std() == pytest.approx(1, abs=0.15)
    # the guess is a function of its seed alone: another table of the clients' does not change it
    assert torch.equal(guess_positions(others, init, seed=1).positions, attacker.positions)
    assert not torch.equal(guess_positions(clients, init, seed=2).positions, attacker.positions)


@pytest.mark.parametrize("kind", TABLES)
def test_a_formula_cannot_be_secret(kind):
    with pytest.raises(AprilError, match="they are a formula"): guess_positions(vit("vit_cifar", positions=kind, **SMALL))


def test_unknown_kinds_and_widths_that_do_not_fit_are_refused():
    with pytest.raises(AprilError, match="unknown positions 'rotary'"): vit("vit_cifar", positions="rotary")
    with pytest.raises(AprilError, match="four divides"): vit("vit_cifar", positions="sincos2d", width=30, heads=2)
    with pytest.raises(AprilError, match="even width"): vit("vit_cifar", positions="sincos1d", width=33, heads=3)


def test_rows_say_what_the_attacker_knew(monkeypatch):
    monkeypatch.delenv("APRIL_DATA", raising=False)
    for know, column in [("shared", "learned"), ("withheld", "learned/withheld"), ("secret", "learned/secret")]:
        rows = attack_slice(Arm("mnist", "B", "dlg", steps=2, know=know), [0], 0, CPU)
        assert rows[0]["positions"] == column
    assert Arm("mnist", "B", "dlg", positions="sincos1d", know="withheld").row(0)["positions"] == "sincos1d/withheld"


def test_an_attack_finds_the_picture_where_positions_are_known_and_not_where_they_are_secret(monkeypatch):
    monkeypatch.delenv("APRIL_DATA", raising=False)
    model = dict(width=96, depth=2, heads=4, mlp_width=64)
    arm = lambda know: Arm("mnist", "B", "dlg", steps=200, know=know, model=model)
    shared, withheld, secret = (attack_slice(arm(know), [0], 0, CPU)[0]["mse"] for know in ("shared", "withheld", "secret"))
    assert max(shared, withheld) < secret / 5


def test_the_training_loop_is_deterministic_and_leaves_the_global_generator_alone(generator):
    x, y = torch.randn(40, 3, 32, 32, generator=generator), torch.randint(10, (40,), generator=generator)
    def trained(seed=0, **options):
        model = vit("vit_cifar", "B", dropout=0.1, **SMALL)
        train(model, x, y, epochs=2, batch=16, lr=1e-3, seed=seed, **options)
        return torch.cat([p.detach().flatten() for p in model.parameters()])
    before = torch.get_rng_state()
    first = trained()
    assert torch.equal(first, trained()) and not torch.equal(first, trained(seed=1))
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(first, trained(perturb=lambda grads, g: {n: v + torch.randn(v.shape, generator=g) for n, v in grads.items()}))


def test_sgd_is_one_step_of_the_gradient(generator):
    x, y = torch.randn(4, 3, 32, 32, generator=generator), torch.arange(4)
    model, start = vit("vit_cifar", "B", **SMALL), vit("vit_cifar", "B", **SMALL)
    seen = []
    train(model, x, y, epochs=1, batch=4, lr=0.1, optimiser="sgd", schedule="constant", watch=lambda step, loss: seen.append((step, loss)))
    update = client_update(start, x, y)
    for n, p in model.named_parameters():
        assert torch.allclose(p, dict(start.named_parameters())[n] - 0.1 * update[n], atol=1e-6)
    assert [step for step, _ in seen] == [0]


@pytest.mark.parametrize("kind", POSITIONS)
def test_training_learns_a_toy_problem_and_leaves_fixed_positions_as_they_were(kind, generator):
    y = torch.randint(2, (160,), generator=generator)
    x = torch.randn(160, 1, 8, 8, generator=generator) + (y * 2 - 1).view(-1, 1, 1, 1)
    model = vit("vit_mnist", "B", positions=kind, image_size=8, patch=4, width=24, depth=1, heads=2, mlp_width=24, classes=2)
    before = model.positions.detach().clone()
    train(model, x[:128], y[:128], epochs=4, batch=16, lr=3e-3)
    assert accuracy(model, x[128:], y[128:]) > 0.9 and model.training
    assert torch.equal(model.positions, before) == (kind != "learned")


def test_accuracy_counts_without_dropout(generator):
    model = vit("vit_mnist", "B", dropout=0.5, **SMALL)
    x = torch.randn(20, 1, 28, 28, generator=generator)
    y = model.eval()(x).argmax(1)
    assert accuracy(model.train(), x, y, batch=7) == 1 and model.training
    assert accuracy(model, x, (y + 1) % 10) == 0


def test_training_that_cannot_work_says_so_in_one_line(generator):
    x, y = torch.randn(8, 3, 32, 32, generator=generator), torch.zeros(8, dtype=torch.long)
    model = vit("vit_cifar", "B", **SMALL)
    with pytest.raises(AprilError, match="8 images but 3 labels"): train(model, x, y[:3], 1, 4, 1e-3)
    with pytest.raises(AprilError, match="unknown 'lion'"): train(model, x, y, 1, 4, 1e-3, optimiser="lion")
    with pytest.raises(AprilError, match="unknown 'slow'"): train(model, x, y, 1, 4, 1e-3, schedule="slow")
    with pytest.raises(AprilError, match="smaller learning rate"): train(model, torch.full_like(x, torch.nan), y, 1, 4, 1e-3)


def test_training_rows_are_one_per_epoch_and_the_loss_falls(monkeypatch):
    monkeypatch.delenv("APRIL_DATA", raising=False)
    rows = Training("mnist", "B", "normal", images=100, epochs=3).once(0, CPU)
    assert [r["epoch"] for r in rows] == [1, 2, 3] and {"experiment", *rows[0]} == set(TRAINING)
    assert rows[-1]["loss"] < rows[0]["loss"], "autocast must not keep the weights of the first step"


def test_a_training_experiment_goes_on_where_it_stopped(tmp_path, monkeypatch):
    from april_nb import experiments
    from april_nb.runner import read_rows
    monkeypatch.delenv("APRIL_DATA", raising=False)
    lines = [Training("mnist", "B", kind, images=20, epochs=1) for kind in ("none", "normal")]
    monkeypatch.setitem(experiments.TRAININGS, "positions", lambda preset: [(line, 2) for line in lines])
    once, calls = Training.once, []
    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3: raise KeyboardInterrupt
        return once(*args)
    monkeypatch.setattr(Training, "once", interrupted)
    with pytest.raises(KeyboardInterrupt): run("positions", tmp_path)
    kept = read_rows(tmp_path / "positions.csv")
    assert len(kept) == 2 and len(run("positions", tmp_path)) == 4 and len(calls) == 5
    assert all(row in read_rows(tmp_path / "positions.csv") for row in kept)
    run("positions", tmp_path)
    assert len(calls) == 5, "a second run makes nothing again"
    with pytest.raises(AprilError, match="is a training run"): run("positions", tmp_path, method="dlg")


def test_settings_without_a_position_term_do_not_ask_for_the_position_gradient(one):
    model = vit("vit_cifar", "B", positions="none", **SMALL)
    assert match(model, [client_update(model, *one)], Settings(1), one[1][None])[0].images.isfinite().all()
