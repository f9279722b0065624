"""The attacker sees the model and the update, nothing else."""
import dataclasses
import inspect
import subprocess
import sys

import torch

from april_nb import attacks
from april_nb.attacks import ATTACKS, Terms
from april_nb.certificate import Reconstruction
from april_nb.federated import Update, client_update, save_update
from april_nb.vit import vit


IMAGES = {"image", "images", "x", "private", "references", "originals", "truth"}


def test_an_attack_of_the_list_takes_a_model_updates_and_terms_and_no_image_ever():
    for attack in ATTACKS.values(): assert list(inspect.signature(attack.run).parameters) == ["model", "updates", "terms"]
    assert not IMAGES & {f.name for f in dataclasses.fields(Terms)}


def test_the_functions_behind_the_list_take_a_model_and_updates_first_and_no_image_ever():
    behind = [f for f in vars(attacks).values() if inspect.isfunction(f) and f.__annotations__.get("return") in
              (Reconstruction, list[Reconstruction])]
    assert {"closed_form", "patch_leakage", "ridge_leakage", "subspace_leakage", "refine", "separate", "secret", "match"} <= {f.__name__ for f in behind}
    for f in behind:
        names = list(inspect.signature(f).parameters)
        assert names[:2] in (["model", "update"], ["model", "updates"]) and not IMAGES & set(names), f.__name__


def test_an_update_holds_gradients_and_counts_only():
    assert [f.name for f in dataclasses.fields(Update)] == ["gradients", "examples", "local_steps", "lr", "withheld",
                                                         "defenses"]   # by name, which the attacker knows anyhow
    model = vit("vit_mnist", "A")
    update = client_update(model, torch.rand(1, 1, 28, 28), torch.tensor([1]))
    assert {n: g.shape for n, g in update.gradients.items()} == {n: p.shape for n, p in model.named_parameters()}
    assert all(not g.requires_grad and g.grad_fn is None for g in update.gradients.values())


def test_the_client_leaves_nothing_behind_in_the_model():
    model = vit("vit_mnist", "A")
    before, image = {n: t.clone() for n, t in model.state_dict().items()}, torch.rand(1, 1, 28, 28)
    state = torch.get_rng_state()
    client_update(model, image, torch.tensor([1]), local_steps=2)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and torch.equal(torch.get_rng_state(), state)


def test_an_attacker_in_another_process_recovers_the_same_image_from_the_file(tmp_path):
    image = torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    save_update(client_update(vit("vit_mnist", "A"), image, torch.tensor([1])), tmp_path / "update.safetensors")
    code = ("import sys, torch; from april_nb.closed_form import closed_form; from april_nb.federated import load_update; "
            "from april_nb.vit import vit; "
            "torch.save(closed_form(vit('vit_mnist', 'A'), load_update(sys.argv[1])).images, sys.argv[2])")
    subprocess.run([sys.executable, "-c", code, tmp_path / "update.safetensors", tmp_path / "out.pt"], check=True)
    assert (torch.load(tmp_path / "out.pt") - image).abs().max() < 1e-3
