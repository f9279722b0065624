"""Claims about where updates come from: weights, gradients, wrapped models; that they travel, compare and cannot stall a server."""
import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from april_nb import federated
from april_nb.closed_form import closed_form
from april_nb.defenses import noise_generator
from april_nb.federated import AprilError, InvalidUpdate, MissingGradient, Update, client_update, load_update, save_update
from april_nb.labels import restore_labels
from april_nb.patch import patch_leakage
from april_nb.views import view
from april_nb.vit import guess_positions, vit

FLOATS = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


def small(dtype=torch.float64, seed=0):
    """A model with what federations really have: a frozen layer, statistics, integers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))
    model[4].requires_grad_(False)
    return model.to(dtype)


def batch(n=4, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 2, 2, generator=g, dtype=torch.float64).to(dtype), torch.arange(n) % 3


def trained(model, x, y, steps, lr):
    """A client's model after plain gradient descent."""
    model = copy.deepcopy(model)
    for _ in range(steps):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None: p -= lr * p.grad
    return model


WRAPPERS = {"DataParallel": nn.DataParallel, "compiled": lambda m: torch.compile(m, backend="eager"),
            "twice": lambda m: nn.DataParallel(torch.compile(m, backend="eager")), "bare": lambda m: m}


def opacus(model):
    from opacus import GradSampleModule
    return GradSampleModule(copy.deepcopy(model), strict=False)


@pytest.mark.parametrize("name", ["blocks.0.attention.q.weight", "positions", "head.bias", "module_list.0.weight"])
@given(prefixes=st.lists(st.sampled_from(["module.", "_module.", "_orig_mod.", "base_model.model."]), max_size=4))
def test_prefixes_of_wrappers_come_off_however_many(name, prefixes):
    assert federated.plain_name("".join(prefixes) + name) == name


def test_a_compiled_part_keeps_its_name():
    model = vit("vit_mnist", "B", depth=1)
    names = [n for n, _ in model.named_parameters()]
    model.blocks[0].mlp = torch.compile(model.blocks[0].mlp, backend="eager")
    assert [n for n, _ in model.named_parameters()] != names and [federated.plain_name(n) for n, _ in model.named_parameters()] == names


@pytest.mark.filterwarnings("ignore:Full backward hook")   # Opacus's way
@pytest.mark.parametrize("wrapper", [*WRAPPERS, "opacus"])
def test_gradients_of_a_wrapped_model_are_those_of_the_model(wrapper):
    if wrapper == "opacus": pytest.importorskip("opacus")
    model, x, y = vit("vit_mnist", "B", depth=1), torch.rand(2, 1, 28, 28), torch.tensor([3, 4])
    wrapped = opacus(model) if wrapper == "opacus" else WRAPPERS[wrapper](copy.deepcopy(model))
    F.cross_entropy(wrapped(x) if wrapper == "opacus" else model_of(wrapped)(x), y).backward()
    update, expected = Update.from_gradients(wrapped, examples=2), client_update(model, x, y)
    assert set(update.gradients) == set(expected.gradients)
    for n, g in expected.gradients.items(): torch.testing.assert_close(update[n], g, rtol=1e-4, atol=1e-6)


def model_of(wrapped):
    """The model inside; calling it needs no compiler and no GPU."""
    while type(wrapped).__name__ != "ViT": wrapped = wrapped.module if isinstance(wrapped, nn.DataParallel) else wrapped._orig_mod
    return wrapped


@pytest.mark.parametrize("kind", ["modules", "state dicts", "a wrapped state dict", "a model and a state dict"])
@given(seed=st.integers(0, 1000), steps=st.integers(1, 4), lr=st.floats(1e-3, 1))
def test_a_difference_of_weights_is_the_update_of_the_client(kind, seed, steps, lr):
    model, (x, y) = small(seed=seed), batch(seed=seed)
    model.eval()
    before, after = model, trained(model, x, y, steps, lr)
    if kind != "modules": after = after.state_dict()
    if kind in ("state dicts", "a wrapped state dict"): before = before.state_dict()
    if kind == "a wrapped state dict": after = {f"_orig_mod.module.{n}": t for n, t in after.items()}
    update = Update.from_weights(before, after, lr=lr, steps=steps, examples=4)
    expected = client_update(model, x, y, local_steps=steps, lr=lr)
    assert set(update.gradients) == set(expected.gradients)   # no frozen layer, no statistics, no counter
    assert (update.examples, update.local_steps, update.lr) == (expected.examples, expected.local_steps, expected.lr)
    for n, g in expected.gradients.items(): torch.testing.assert_close(update[n], g, rtol=1e-9, atol=1e-12)


@given(dtype=FLOATS, seed=st.integers(0, 1000))
def test_a_difference_is_rounded_once(dtype, seed):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(50, generator=g).to(dtype)
    after = (w.double() + 1e-2 * torch.randn(50, generator=g)).to(dtype)
    update = Update.from_weights({"w": w}, {"w": after}, lr=0.1)
    assert torch.equal(update["w"], ((w.double() - after.double()) / 0.1).to(dtype)) and update.dtype == dtype
    coarse = Update.from_weights({"w": w.double()}, {"w": after}, lr=0.1)
    assert coarse.dtype == dtype, "the coarser of two formats says how much the client rounded"


def test_statistics_that_move_in_training_are_no_gradients():
    model, (x, y) = small(), batch()
    after = trained(model.train(), x, y, 1, 0.1).state_dict()
    update = Update.from_weights(model.state_dict(), after, lr=0.1)
    assert not [n for n in update.gradients if "running" in n or "batches" in n] and "2.weight" in update.gradients


def test_weights_give_an_image_away_as_the_gradient_does():
    model, x, y = vit("vit_mnist", "B"), torch.rand(1, 1, 28, 28), torch.tensor([3])
    update = Update.from_weights(model, trained(model, x, y, 1, 0.1).state_dict(), lr=0.1)
    assert (patch_leakage(model, update).images - x).abs().max() < 1e-2 and restore_labels(model, update).tolist() == [3]


def test_gradients_are_copied_and_none_counts_as_withheld():
    model, (x, y) = small().eval(), batch()
    F.cross_entropy(model[:4](x), y).backward()   # the last layer takes no part
    update = Update.from_gradients(model, examples=4, withheld=("1.bias",))
    kept = copy.deepcopy(update)
    for p in model.parameters():
        if p.grad is not None: p.grad.zero_()
    assert update == kept and set(update.withheld) == {"1.bias", "5.weight", "5.bias"} and "4.weight" not in update.withheld
    with pytest.raises(MissingGradient, match="withheld"): update["5.bias"]
    assert Update.from_gradients({"module.w": torch.ones(2), "module.b": None}).withheld == ("b",)


def one_line(call, *words, error=InvalidUpdate):
    with pytest.raises(error) as raised: call()
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400
    assert all(w in str(raised.value) for w in words), str(raised.value)


W = {"w": torch.ones(3), "n": torch.tensor(1)}


@pytest.mark.parametrize("after, how, words", [
    ({"v": torch.ones(3)}, {}, ["one of the two sets"]), ({"w": torch.zeros(4)}, {}, ["(3,)", "(4,)"]),
    (W, {}, ["no weight has changed"]), ({"w": torch.full((3,), torch.nan)}, {}, ["after training", "NaN", "smaller learning rate"]),
    ({"w": torch.zeros(3, device="meta")}, {}, ["meta"]), ({"w": torch.zeros(3).to_sparse()}, {}, ["sparse"]),
    ({"w": torch.zeros(3)}, {"lr": 0}, ["lr"]), ({"w": torch.zeros(3)}, {"lr": -1.0}, ["lr"]), ({"w": torch.zeros(3)}, {"lr": None}, ["lr"]),
    ({"w": torch.zeros(3)}, {"lr": torch.nan}, ["lr"]), ({"w": torch.zeros(3)}, {"steps": 0}, ["one step"]),
    ({"w": torch.zeros(3)}, {"steps": 10**20}, ["local_steps"]), ({"w": torch.zeros(3)}, {"examples": 10**12}, ["examples"]),
    ({"w": torch.zeros(3)}, {"lr": 1e-300}, ["NaN or infinite"]), ({"w": torch.zeros(3), "module.w": torch.zeros(3)}, {}, ["two entries", "'w'"])])
def test_weights_that_are_no_clients_are_refused(after, how, words):
    one_line(lambda: Update.from_weights(W, after, **({"lr": 0.1} | how)), *words)


def test_a_model_without_gradients_is_told_to_make_some():
    one_line(lambda: Update.from_gradients(small()), "call backward()")
    one_line(lambda: Update.from_gradients({}), "call backward()")
    one_line(lambda: Update.from_gradients({"w": [1.0]}), "list")
    one_line(lambda: Update.from_gradients([torch.ones(2)]), "dict of tensors")
    one_line(lambda: Update.from_weights([torch.ones(2)], W, lr=0.1), "state dict")


COPIES = [lambda u: pickle.loads(pickle.dumps(u)), copy.copy, copy.deepcopy]


@pytest.mark.parametrize("duplicate", COPIES, ids=["pickle", "copy", "deepcopy"])
@given(dtype=FLOATS, examples=st.integers(1, 1000), steps=st.integers(1, 9))
def test_an_update_is_pickled_copied_and_equal(duplicate, dtype, examples, steps):
    update = Update({"b": torch.randn(3).to(dtype), "a": torch.randn(2, 2).to(dtype)}, examples, steps, 0.1, ("c",), ("clip:1",))
    other = duplicate(update)
    assert other == update and other is not update and other.dtype == dtype
    with pytest.raises(TypeError): other.gradients["a"] = update["b"]   # still frozen


def test_what_differs_is_not_equal():
    g = torch.tensor([1.0, 2.0])
    update = Update({"w": g})
    others = [Update({"v": g}), Update({"w": g.double()}), Update({"w": g + 1e-7 * g}), Update({"w": g[None]}), Update({"w": g}, 2),
              Update({"w": g}, local_steps=2), Update({"w": g}, lr=0.1), Update({"w": g}, withheld=("b",)),
              Update({"w": g}, defenses=("clip:1",)), Update({"w": g, "v": g}), "update"]
    assert all(update != o for o in others) and update == Update({"module.w": g.clone()})
    assert Update({"a": g, "b": g}) == Update({"b": g, "a": g})
    with pytest.raises(TypeError, match="unhashable"): hash(update)


@pytest.mark.parametrize("counts, word", [
    (dict(examples=10**12), "examples"), (dict(examples=10**20), "examples"), (dict(examples=10**5000), "bits"), (dict(examples=0), "examples is 0"),
    (dict(examples=-1), "examples"), (dict(examples=1.5), "examples"), (dict(examples=True), "examples"), (dict(examples="3"), "examples"),
    (dict(examples=None), "examples"), (dict(local_steps=10**12), "local_steps"), (dict(local_steps=0), "local_steps"),
    (dict(local_steps=2.0), "local_steps"), (dict(lr=torch.nan), "lr"), (dict(lr=torch.inf), "lr"), (dict(lr=0), "lr"), (dict(lr=-0.1), "lr"),
    (dict(lr=10**400), "lr"), (dict(lr=True), "lr"), (dict(lr="0.1"), "lr"), (dict(withheld="bias"), "tuple"), (dict(withheld=(1,)), "tuple"),
    (dict(withheld=("\x1b[2J",)), "control"), (dict(withheld=("a\nb",)), "control"), (dict(defenses=("x" * 10**7,)), "million"),
    (dict(withheld=("b", "module.b")), "two entries"), (dict(defenses=5), "tuple")])
def test_counts_and_names_that_no_client_wrote_are_refused(counts, word):
    one_line(lambda: Update({"w": torch.ones(2)}, **counts), word)


@pytest.mark.parametrize("metadata, word", [
    ({"examples": "1" + "0" * 12}, "examples"), ({"examples": "9" * 4000}, "examples"), ({"examples": "9" * 5000}, "cannot read"),
    ({"examples": "x" * 10**6}, "cannot read"), ({"examples": "-1"}, "examples"), ({"examples": "1e3"}, "cannot read"),
    ({"local_steps": "1" + "0" * 20}, "local_steps"), ({"lr": "nan"}, "lr"), ({"lr": "-1"}, "lr"), ({"lr": "0.0"}, "lr"), ({"lr": "1e999"}, "lr"),
    ({"lr": "x" * 10**6}, "cannot read"), ({"withheld": "a" * 10**7}, "million"), ({"defenses": "\x1b]0;title\x07"}, "control")])
def test_metadata_cannot_stall_a_server_that_reads_a_file(tmp_path, metadata, word):
    save_file({"w": torch.ones(2)}, tmp_path / "u.safetensors", metadata)
    one_line(lambda: load_update(tmp_path / "u.safetensors"), word, "u.safetensors")


def test_the_largest_count_that_is_believed_stalls_nothing():
    model = vit("vit_mnist", "A", depth=1)
    update = Update(client_update(model, torch.rand(2, 1, 28, 28), torch.tensor([1, 2])).gradients, examples=2**16)
    assert len(restore_labels(model, update)) == 2**16
    assert closed_form(model, update).verdict == "not-unique"


STRANGE = {"int64": torch.arange(3), "bool": torch.ones(3, dtype=torch.bool), "complex64": torch.ones(3, dtype=torch.complex64),
           "float8_e4m3fn": torch.ones(3).to(torch.float8_e4m3fn), "float8_e5m2": torch.ones(3).to(torch.float8_e5m2),
           "uint8": torch.ones(3, dtype=torch.uint8), "sparse": torch.ones(3).to_sparse(), "meta": torch.ones(3, device="meta"),
           "empty": torch.ones(0, 3), "list": [1.0, 2.0], "NoneType": None}


@pytest.mark.parametrize("kind", STRANGE)
def test_a_gradient_that_is_no_dense_floating_point_tensor_is_refused(kind, tmp_path):
    one_line(lambda: Update({"good": torch.ones(2), "w": STRANGE[kind]}), "'w'", kind)
    if kind.startswith(("int", "bool", "float8", "uint", "empty")):
        save_file({"w": STRANGE[kind]}, tmp_path / "u.safetensors")
        one_line(lambda: load_update(tmp_path / "u.safetensors"), "'w'", kind, "u.safetensors")


def test_what_is_no_dict_of_names_is_refused():
    one_line(lambda: Update([torch.ones(2, 2)]), "dict of tensors")
    one_line(lambda: Update({1: torch.ones(2)}), "names of gradients", "tuple of strings")
    one_line(lambda: Update({"w": torch.ones(2), "_module.w": torch.ones(2)}), "two entries", "'w'")


def test_a_gradient_with_a_graph_is_detached():
    w = nn.Parameter(torch.ones(3))
    update = Update({"w": w, "v": 2 * w})
    assert not update["w"].requires_grad and not update["v"].requires_grad and copy.deepcopy(update) == update


def test_a_saved_update_has_plain_names(tmp_path):
    save_file({"module.w": torch.ones(2)}, tmp_path / "u.safetensors", {"withheld": "module.b"})
    update = load_update(tmp_path / "u.safetensors")
    assert list(update.gradients) == ["w"] and update.withheld == ("b",)
    save_update(update, tmp_path / "v.safetensors")
    assert load_update(tmp_path / "v.safetensors") == update


def draw(generator): return torch.randn(4, generator=generator).tolist()


@given(st.integers(0, 2**32 - 1))
def test_seeds_below_2_to_the_32_keep_their_streams(seed):
    assert draw(federated.generator_of(seed)) == draw(torch.Generator().manual_seed(seed))
    assert draw(noise_generator(seed)) == draw(torch.Generator().manual_seed(2**31 + seed))


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_seeds_that_share_a_half_differ(low, high, other):
    if high != other:
        assert draw(federated.generator_of(low + 2**32 * high)) != draw(federated.generator_of(low + 2**32 * other))
        assert draw(federated.generator_of(high + 2**32 * low)) != draw(federated.generator_of(other + 2**32 * low))


@pytest.mark.parametrize("seeds", [(0, 2**32), (1, 2**32), (0, 2**63), (5, 2**64 - 1)])
def test_long_seeds_give_other_weights_positions_masks_and_noise(seeds):
    a, b = (vit("vit_mnist", "B", depth=1, width=16, heads=2, mlp_width=16, dropout=0.5, seed=s) for s in seeds)
    assert not torch.equal(a.positions, b.positions) and draw(noise_generator(seeds[0])) != draw(noise_generator(seeds[1]))
    guess = [guess_positions(a, seed=s).positions for s in seeds]
    masked = [client_update(a, torch.ones(1, 1, 28, 28), torch.tensor([1]), seed=s) for s in seeds]
    assert not torch.equal(*guess) and masked[0] != masked[1]


@pytest.mark.parametrize("seed", [-1, 2**64, 10**5000, 1.0, "1", None, True, float("nan")], ids=lambda s: str(type(s).__name__))
def test_a_seed_that_is_none_is_one_line(seed):
    model = vit("vit_mnist", "A", depth=1)
    for call in (federated.generator_of, noise_generator, lambda s: vit("vit_mnist", seed=s), lambda s: guess_positions(model, seed=s),
                 lambda s: client_update(model, torch.rand(1, 1, 28, 28), torch.tensor([1]), seed=s)):
        one_line(lambda: call(seed), "whole number", error=AprilError)


def test_a_prefix_on_every_name_does_not_keep_an_attack_from_an_update():
    model, x, y = vit("vit_mnist", "A"), torch.rand(1, 1, 28, 28), torch.tensor([3])
    update = client_update(model, x, y)
    wrapped = Update({f"module.{n}": g for n, g in update.gradients.items()})
    assert wrapped == update and closed_form(model, wrapped).verdict == "exact"
    assert view(model).gradient(wrapped, "positions").shape == (17, 384)


@pytest.mark.parametrize("withheld", ["head.bias", "module.head.bias"])
def test_a_client_withholds_by_the_plain_name_whatever_wraps_its_model(withheld):
    model, x, y = vit("vit_mnist", "A", depth=1), torch.rand(1, 1, 28, 28), torch.tensor([3])
    update = client_update(torch.compile(model, backend="eager"), x, y, withheld=(withheld,))
    assert update == client_update(model, x, y, withheld=("head.bias",)) and "head.bias" not in update.gradients
