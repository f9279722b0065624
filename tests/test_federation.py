"""A Flower federation in this process: what its messages say, and that nobody's training notices who looks."""
import copy
import itertools
import math
import random
import socket

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, fixedclipping_mod
from flwr.serverapp.strategy import (DifferentialPrivacyClientSideFixedClipping,
                                     DifferentialPrivacyServerSideFixedClipping, FedAvg)
from flwr.supercore.object_ref import load_app
from torch.nn import functional as F

from april_nb.attacks import ATTACKS
from april_nb.defenses import compose, noise_generator, total_norm
from april_nb.experiments import Federation
from april_nb.federated import Update, client_update
from april_nb.federation import (TERMS, InProcess, at_rest, client, draws, federate, private, server, steps_of, train,
                                 undo_adam, update_of)
from april_nb.patch import patch_leakage
from april_nb.runner import select
from april_nb.views import view
from april_nb.vit import vit


@pytest.fixture(scope="module")
def model():
    return vit("vit_cifar", "B", "timm")


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("epochs", [1, 3])
def test_the_update_of_a_message_is_what_the_client_sent(model, epochs):
    double = copy.deepcopy(model).double()
    curious, _ = federate(double, clients=2, images=2, batch=2, epochs=epochs)
    for i in (1, 2):
        x, y = private(i - 1, 2, 2)
        update, own = update_of(curious.replies[1, i], double, curious.terms), client_update(double, x, y, local_steps=epochs)
        assert (update.examples, update.local_steps) == (2, epochs) and update.gradients.keys() == own.gradients.keys()
        for name in own.gradients: torch.testing.assert_close(update[name], own[name], rtol=1e-8, atol=1e-12)


def test_theorem_3_reads_every_clients_image_in_every_round(model):
    curious, _ = federate(model, 2, clients=3)
    assert set(curious.found) == {(r, i) for r in (1, 2) for i in (1, 2, 3)}
    for (_, i), answer in curious.found.items():
        assert distance(answer.images, private(i - 1, 3, 1)[0]) < 1e-2
    assert distance(curious.found[1, 1].images, private(1, 3, 1)[0]) > 0.5   # the second client's image is another


def test_training_is_the_same_whether_somebody_looks_or_not(model):
    watched = federate(model, 2, clients=2)[1].arrays.to_torch_state_dict()
    with draws(0):
        honest = FedAvg(fraction_evaluate=0.0).start(InProcess(client, 2), ArrayRecord(model.state_dict()), 2,
                                                     train_config=ConfigRecord(TERMS)).arrays.to_torch_state_dict()
    assert all(torch.equal(w, honest[name]) for name, w in watched.items())
    assert not torch.equal(watched["head.weight"], model.head.weight)


def test_a_federation_leaves_the_global_generators_as_they_were(model):
    random.seed(3)
    np.random.seed(3)
    expected = random.Random(3).random(), np.random.RandomState(3).rand()
    federate(model, clients=2)
    assert (random.random(), np.random.rand()) == expected


def test_the_model_that_was_handed_in_stays_as_it_was(model):
    before = copy.deepcopy(model.state_dict())
    federate(model, clients=2, epochs=2)
    at_rest(model, TERMS | {"weight-decay": 0.1})
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


@pytest.mark.parametrize("terms", [dict(momentum=0.9), dict(weight_decay=0.1), dict(momentum=0.9, weight_decay=0.1),
                                   dict(optimiser="adamw", weight_decay=0.1, epochs=1)])
def test_weight_decay_is_taken_off_exactly(model, terms):
    double = copy.deepcopy(model).double()
    curious, _ = federate(double, clients=2, **dict(epochs=3) | terms)
    sent, mended = (update_of(curious.replies[1, 1], before, curious.terms) for before in (double, at_rest(double, curious.terms)))
    if terms.get("optimiser"): mended = undo_adam(mended)
    truth = private(0, 2, 1)[0]
    assert distance(patch_leakage(double, mended).images, truth) < 1e-5
    if "weight_decay" in terms: assert distance(patch_leakage(double, sent).images, truth) > 0.1


def test_at_rest_is_the_identity_without_decay_and_a_power_with_it(model):
    terms = TERMS | {"epochs": 2, "images": 3, "batch": 2, "lr": 0.1}
    assert steps_of(terms) == 4
    assert all(torch.equal(w, model.get_parameter(n).double()) for n, w in at_rest(model, terms).named_parameters())
    decayed = at_rest(model, terms | {"weight-decay": 0.5})
    torch.testing.assert_close(decayed.head.weight, model.head.weight.double() * (1 - 0.1 * 0.5) ** 4)


def test_adams_first_step_is_undone_to_rounding_and_saturates_beyond():
    g = torch.tensor([0, 1e-12, -1e-9, 1e-7, -1e-5, 1.0], dtype=torch.double)
    w = torch.nn.Parameter(torch.zeros(6, dtype=torch.double))
    w.grad = g
    torch.optim.Adam([w], lr=0.5).step()
    back = undo_adam(Update({"w": -w.detach() / 0.5}))
    torch.testing.assert_close(back["w"], g, rtol=1e-7, atol=0)
    coarse = undo_adam(Update({"w": (-w.detach() / 0.5).float()}))["w"]
    torch.testing.assert_close(coarse[:3].double(), g[:3], rtol=1e-5, atol=0)
    assert coarse[-1] > 0 and distance(coarse[-1:], g[-1:]) > 0.5


def test_a_federation_of_heads_sends_the_classifier_alone(model):
    curious, _ = federate(model, clients=2, trained="head")
    update = update_of(curious.replies[1, 1], model, curious.terms)
    assert {name for name, g in update.gradients.items() if g.any()} == {"head.weight", "head.bias"}
    assert curious.found[1, 1].verdict == "nothing-leaks"


def test_the_server_app_runs_and_opens_no_connection(monkeypatch, capsys):
    def refuse(*args): raise AssertionError(f"a connection to {args}")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    server(InProcess(client, 2), Context(0, 0, {}, RecordDict(), {"rounds": 1, "lr": 0.1}))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("round 1, client")]
    assert len(lines) == 2 and all("exact" in line for line in lines)


def test_flower_finds_both_apps_under_the_names_that_the_chapter_gives(tmp_path):
    apps = [load_app(f"april_nb.federation:{name}", ImportError, tmp_path) for name in ("server", "client")]
    assert apps == [server, client]


def test_clients_hold_images_of_their_own():
    images = torch.cat([private(i, 4, 2)[0] for i in range(4)])
    pairs = F.pdist(images.flatten(1))
    assert images.shape == (8, 3, 32, 32) and pairs.min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["clipped by clients", "clipped by the server, central noise", "local noise"])
def test_flowers_defences_are_compositions_of_the_books(model, dtype, kind, monkeypatch):
    """Flower's own mods and wrappers beside `defenses.compose`: the same client's round, the same draws of noise."""
    sender, S, lr, ε = copy.deepcopy(model).to(dtype), 0.02, 0.01, 1e5
    local, σ = kind == "local noise", (2 * math.log(1.25 / 1e-5)) ** 0.5 / ε
    g = noise_generator(0)
    drawn = {name: torch.randn(p.shape, dtype=dtype, generator=g) for name, p in sorted(sender.named_parameters())}
    turns = itertools.cycle([drawn[name].numpy() for name in sender.state_dict()])   # the same for both clients
    monkeypatch.setattr(np.random, "normal", lambda mean, std, shape: mean - std * next(turns))   # on w₁, not on w − w₁
    app = client if "server" in kind else ClientApp(mods=[LocalDpMod(S, 1.0, ε, 1e-5) if local else fixedclipping_mod])
    if app is not client: app.train()(train)
    wraps = {"clipped by clients": lambda strategy: DifferentialPrivacyClientSideFixedClipping(strategy, 0.0, S, 2),
             "clipped by the server, central noise": lambda strategy: DifferentialPrivacyServerSideFixedClipping(strategy, 1.0, S, 2)}
    curious, result = federate(sender, clients=2, app=app, wrap=wraps.get(kind, lambda strategy: strategy), lr=lr)
    flowers = update_of(curious.replies[1, 1], sender, curious.terms)
    x, y = private(0, 2, 1)
    honest = client_update(sender, x.to(dtype), y)
    assert total_norm(honest) > 2 * S / lr, "or nothing would be clipped"
    specs = [f"clip:{S / lr}", *[f"gaussian:{σ / lr!r}"] * local, f"weights:{lr}"]
    ours = compose(specs, view(sender), noise_generator(0))(honest)
    for name, w in sender.named_parameters():   # Flower rounds the weights up to three times, the book once
        largest = (w.detach().abs() + (6 * σ if local else 0)) * 4 * torch.finfo(dtype).eps / lr
        assert ((flowers[name] - ours[name]).abs() <= largest + 1e-6 * ours[name].abs()).all(), name
        assert distance(ours[name], honest[name]) > 1e-3
    published = (result.arrays.to_torch_state_dict()["positions"] - sender.positions.detach()).square().mean().sqrt()
    assert ("central" in kind) == (published > S / 4), "central noise is in the model that is published, not in what is read"


def test_every_attack_of_the_list_that_can_start_reads_what_clients_send():
    rows = Federation({}, clients=2, search=1).once(0, torch.device("cpu"))
    assert {row["method"] for row in rows} == set(ATTACKS) - {"closed-form", "separate"}   # of architecture A, of batches
    assert all(len(select(rows, method=method)) == 2 for method in {row["method"] for row in rows})
    assert min(row["psnr"] for row in select(rows, method="patch")) > 80
    assert {row["method"] for row in Federation({}, clients=2).once(0, torch.device("cpu"))} == {"patch"}
