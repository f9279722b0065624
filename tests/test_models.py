"""Claims about your own model: a hand-written one is registered and proved, a library's goes by name."""
import copy
import json
import logging
import sys
import urllib.error
from dataclasses import replace

import huggingface_hub
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, ViTConfig, ViTMAEConfig

from april_nb.data import FORMATS, format_of
from april_nb.federated import AprilError, Update, client_update
from april_nb.labels import restore_labels
from april_nb.matching import Matcher, plain_shares
from april_nb.metrics import psnr
from april_nb.models import BUILDERS, LIBRARIES, named_model, normalisation_of, without_adapters
from april_nb.patch import patch_leakage
from april_nb.subspace import subspace_leakage
from april_nb.views import NotApplicable, check_view, register_view, view
from april_nb.vit import vit


class Layer(nn.Module):
    """A block as one writes it: a matrix for q, k and v that is no layer, used by a plain product."""
    def __init__(self, width, heads, pre_norm):
        super().__init__()
        self.heads, self.first = heads, nn.LayerNorm(width) if pre_norm else nn.Identity()
        self.to_qkv, self.out = nn.Parameter(torch.randn(3 * width, width) / width ** 0.5), nn.Linear(width, width)
        self.second, self.mlp = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, z):
        q, k, v = (self.first(z) @ self.to_qkv.T).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        z = z + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return z + self.mlp(self.second(z))


class Written(nn.Module):
    """A Vision Transformer that no library wrote: its registers stand between class token and patches, without position."""
    def __init__(self, embed="linear", pre_norm=True, registers=2, width=96, side=32, patch=8):
        super().__init__()
        self.patch, self.conv = patch, embed == "conv"
        self.embed = nn.Conv2d(3, width, patch, patch) if self.conv else nn.Linear(3 * patch ** 2, width)
        self.start, self.spare = nn.Parameter(torch.randn(width)), None
        if registers: self.spare = nn.Parameter(torch.randn(1, registers, width))
        self.place = nn.Embedding((side // patch) ** 2 + 1, width)
        self.layers, self.scores = nn.ModuleList(Layer(width, 4, pre_norm) for _ in range(3)), nn.Linear(width, 10)

    def forward(self, x):
        if not self.conv:
            x = x.unflatten(3, (-1, self.patch)).unflatten(2, (-1, self.patch)).permute(0, 2, 4, 3, 5, 1)
            z = self.embed(x.flatten(3).flatten(1, 2))
        else: z = self.embed(x).flatten(2).mT
        z = torch.cat([self.start.expand(len(z), 1, -1), z], 1) + self.place.weight
        if self.spare is not None: z = torch.cat([z[:, :1], self.spare.expand(len(z), -1, -1), z[:, 1:]], 1)
        for layer in self.layers: z = layer(z)
        return self.scores(z[:, 0])


NAMES = dict(patch_embedding="embed", channels_last=True, prefix=["start", "spare"], positions="place", block="layers.0",
             norm="layers.0.first", attention=["layers.0.to_qkv"], head="scores")


def written(changes=None, **options):
    """A model of a class of its own, registered."""
    class Own(Written): pass
    register_view(Own, **NAMES | (changes or {}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Own(**options).double()


KINDS = {
    "linear embedding": lambda: written(),
    "convolution": lambda: written(dict(channels_last=False), embed="conv"),
    "no norm before attention": lambda: written(dict(norm=None), pre_norm=False),
    "no registers": lambda: written(dict(prefix=["start"]), registers=0),
}


@pytest.fixture(params=KINDS)
def model(request): return KINDS[request.param]()


def picture(n=1): return torch.randn(n, 3, 32, 32, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def test_a_registered_model_is_proved_and_gives_its_image_away(model):
    assert all(check.ok and (check.error or 0) < 1e-13 for check in check_view(model))
    update = client_update(model, picture(), torch.tensor([3]))
    withheld = client_update(model, picture(), torch.tensor([3]), withheld=(view(model).positions,))
    for attack, sent in ((patch_leakage, update), (subspace_leakage, withheld)):
        answer = attack(model, sent)
        assert answer.verdict == "exact", answer.reason
        torch.testing.assert_close(answer.images, picture(), rtol=1e-5, atol=1e-5)


def test_theorem_3_reads_a_hand_written_model_in_float32():
    model, n = written().float(), FORMATS["cifar10"].normalisation
    pixels = torch.rand(1, 3, 32, 32, dtype=torch.double, generator=torch.Generator().manual_seed(2))
    answer = patch_leakage(model, client_update(model, n(pixels).float(), torch.tensor([3])))
    assert psnr(n.inverse(answer.images), pixels).item() > 60


def test_matching_and_labels_on_a_registered_model(model):
    update, y = client_update(model, picture(), torch.tensor([3])), torch.tensor([3])
    guess = (picture() * 0.3 + 0.1).requires_grad_()
    ours, plain = Matcher(model, [update], dtype=torch.double).shares(guess[None], y[None]), plain_shares(model, guess, y, update)
    order = [plain.names.index(n) for n in ours.names]
    for part in ("square", "dot", "target"):
        torch.testing.assert_close(getattr(ours, part), getattr(plain, part)[:, order], rtol=1e-8, atol=1e-12)
    assert restore_labels(model, update).tolist() == [3]


def test_registers_between_class_token_and_patches_have_no_position():
    v = view(written())
    assert v.bare == ("spare",) and v.places("place.weight") == (0, *range(3, 19)) and v.places("spare") == (1, 2)
    assert not v.weight(v.positions)[1:3].any()


WRONG = {
    "a norm of another place": (dict(norm="layers.0.second"), "q, k, v are multiplied.*: no"),
    "a norm that is not there": (dict(norm="layers.0.frist"), "no module 'layers.0.frist'; it has 'layers.0.first'"),
    "another block": (dict(attention=["layers.1.to_qkv"]), "q, k, v are multiplied.*: no"),
    "a block that is not the first": (dict(block="layers.1", attention=["layers.1.to_qkv"], norm="layers.1.first"),
                                      "enters the first block: no"),
    "a norm forgotten": (dict(norm=None), "q, k, v are multiplied.*: no"),
    "tokens in another order": (dict(prefix=["spare", "start"], image_size=32), "enters the first block: no"),
    "a token forgotten": (dict(prefix=["start"]), "enters the first block: no"),
    "pixels in another order": (dict(channels_last=False), "enters the first block: no"),
    "another layer for the classifier": (dict(head="layers.2.out"), "scores follow from the classifier's output: no"),
    "a parameter that is not there": (dict(positions="places"), "no parameter 'places'; it has .*'place.weight'"),
    "a token that is not there": (dict(prefix=["begin"]), "no parameter 'begin'; it has '"),
    "no size": (dict(positions=None), "how large its images are: give image_size"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_name_is_one_line_and_no_view(mistake):
    changes, says = WRONG[mistake]
    model = written(changes)
    with pytest.raises(AprilError, match=says) as error: view(model)
    assert "\n" not in str(error.value)


def test_check_view_tells_which_claim_of_a_registered_view_fails():
    found = {check.name: check.ok for check in check_view(written(dict(norm="layers.0.second"))) if check.error is not None}
    assert found == {"stream": True, "q, k, v": False, "classifier": True}


def test_what_a_model_cannot_have_is_a_reason():
    v = view(written(dict(positions=None, image_size=32)))
    with pytest.raises(NotApplicable, match="no position embedding"): v.weight(v.positions)


def test_the_layer_that_joins_the_heads_can_be_named():
    assert view(written()).out is None   # "out" is no name that a library gives it
    assert view(written(dict(output="layers.0.out"))).out == "layers.0.out.weight"
    with pytest.raises(AprilError, match="joins"): view(written(dict(output="layers.0.joins")))


def test_registering_again_is_seen_by_a_model_that_was_proved():
    model = written()
    assert view(model).channels_last
    register_view(type(model), **NAMES | dict(channels_last=False))
    with pytest.raises(NotApplicable, match="enters the first block: no"): view(model)


def test_a_model_that_does_not_run_is_one_line():
    class Picky(Written):
        def forward(self, x): raise RuntimeError("images of 64 pixels,\nplease")
    register_view(Picky, **NAMES)
    with pytest.raises(NotApplicable, match="does not run on an image of shape .3, 32, 32.: images of 64 pixels, please"):
        view(Picky())


@pytest.fixture
def no_network(monkeypatch):
    """As on a machine without a network, at once."""
    def fail(*args, **options): raise urllib.error.URLError("no network")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", fail)


def folder_of(path, Config=ViTConfig, **options):
    """A folder of Hugging Face's with a tiny configuration."""
    Config(**dict(image_size=32, patch_size=8, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
                  intermediate_size=64) | options).save_pretrained(path)
    return f"hf:{path}"


@pytest.mark.parametrize("spec", ["vit_cifar", "ours:vit_cifar"])
def test_our_presets_go_by_short_and_by_full_name_with_their_format(spec):
    named = named_model(spec, seed=3, arch="A", init="torch", positions="sincos1d")
    expected = vit("vit_cifar", "A", "torch", 3, positions="sincos1d").state_dict()
    assert all(torch.equal(w, expected[n]) for n, w in named.model.state_dict().items())
    assert named.format == format_of("vit_cifar") and named.random_weights
    model, format = named
    assert model is named.model and format is named.format


def test_a_library_s_model_is_drawn_from_the_seed_and_leaves_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    a, b, c = (named_model("timm:vit_tiny_patch16_224", seed=seed).model for seed in (0, 0, 1))
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(a.blocks[0].attn.qkv.weight, b.blocks[0].attn.qkv.weight)
    assert not torch.equal(a.blocks[0].attn.qkv.weight, c.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize("Config, classifier", [(ViTConfig, True), (CLIPVisionConfig, False), (ViTMAEConfig, False)])
def test_a_folder_of_hugging_face_needs_no_network(Config, classifier, tmp_path, no_network):
    named = named_model(folder_of(tmp_path, Config))
    assert (named.format.channels, named.format.size, named.random_weights) == (3, 32, True)
    assert (view(named.model).head_weight is not None) == classifier


def test_pretrained_weights_come_from_a_folder_and_are_not_random(tmp_path, no_network):
    first = named_model(folder_of(tmp_path), seed=1).model
    first.save_pretrained(tmp_path)
    again = named_model(f"hf:{tmp_path}", seed=2, pretrained=True)
    assert not again.random_weights
    assert all(torch.equal(w, first.state_dict()[n]) for n, w in again.model.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "module.", "_module.", "_orig_mod.module.", "base_model.model."])
def test_weights_load_by_name_with_any_wrappers_prefix(prefix, tmp_path):
    trained = vit("vit_cifar", "B", seed=4)
    file = tmp_path / "weights.safetensors"
    save_file({prefix + n: w for n, w in trained.state_dict().items()}, file)
    named = named_model("vit_cifar", file)
    assert not named.random_weights
    assert all(torch.equal(w, trained.state_dict()[n]) for n, w in named.model.state_dict().items())


def without(w): del w["head.bias"]
def with_more(w): w["head.scale"] = torch.ones(1)
def of_another_shape(w): w["head.bias"] = torch.ones(7)
def with_nan(w): w["head.bias"].fill_(torch.nan)


@pytest.mark.parametrize("damage, says", [
    (without, "not this model's: it lacks 'head.bias' and 0 more"), (with_more, "it holds 'head.scale' and 0 more"),
    (of_another_shape, r"'head.bias' has shape \(7,\) there and \(10,\) in the model"),
    (with_nan, "'head.bias' has NaN or infinite")])
def test_weights_that_do_not_fit_are_one_line(damage, says, tmp_path):
    weights = {n: w.clone() for n, w in vit("vit_cifar", "B").state_dict().items()}
    damage(weights)
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(AprilError, match=says) as error: named_model("vit_cifar", tmp_path / "w.safetensors")
    assert "\n" not in str(error.value)


def test_a_file_that_holds_no_weights_is_one_line(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"\x80PK nothing of the kind")
    torch.save(vit("vit_cifar", "B").state_dict(), tmp_path / "w.pth")
    for name, cure in (("w.safetensors", "save_file"), ("w.pth", "save_file"), ("missing.safetensors", "No such file")):
        with pytest.raises(AprilError, match=f"cannot load weights from .*{name}: .*{cure}") as error:
            named_model("vit_cifar", tmp_path / name)
        assert "\n" not in str(error.value)


UNKNOWN = {
    "vit_c1far": "write LIBRARY:NAME with a library of ours, torchvision, timm, hf, or one of vit_mnist",
    "keras:vit": "unknown model 'keras:vit'", "timm:": "unknown model 'timm:'", "ours:vit_q": "unknown model 'vit_q'",
    "timm:vit_smal_patch16_224": "timm has no model.*vit_small_patch16_224",
    "torchvision:vit_b_61": "torchvision has no model.*vit_b_16", "torchvision:resnet18": "no view for ResNet.*register_view",
    "hf:google/vit-base-patch16-224": "cannot fetch hf:.*no connection, or no such model.*folder with its config.json",
    "hf:two words//": "cannot fetch hf:",
}


@pytest.mark.parametrize("spec", UNKNOWN)
def test_a_name_that_cannot_be_served_is_one_line(spec, no_network):
    with pytest.raises(AprilError, match=UNKNOWN[spec]) as error: named_model(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spec", ["timm:vit_tiny_patch16_224", "torchvision:vit_b_16", "hf:google/vit-base-patch16-224"])
def test_pretrained_weights_without_a_network_are_one_line(spec, no_network, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(AprilError, match=f"cannot fetch {spec}: no connection.*--weights") as error:
        named_model(spec, pretrained=True)
    assert "\n" not in str(error.value)


def test_a_library_that_retries_says_so_to_nobody(monkeypatch, caplog):
    talker = logging.getLogger("huggingface_hub.utils._http")
    def retrying(name, pretrained):
        talker.warning("Retrying in 8s")
        raise OSError("no route")
    monkeypatch.setitem(BUILDERS, "timm", retrying)
    with pytest.raises(AprilError, match="cannot fetch timm:vit"): named_model("timm:vit")
    assert not caplog.records
    talker.warning("later")
    assert [r.message for r in caplog.records] == ["later"]


@pytest.mark.parametrize("library, package", [("timm", "timm"), ("hf", "transformers")])
def test_a_missing_library_names_its_extra(library, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(AprilError, match=rf"pip install '.\[{library}\]'"): named_model(f"{library}:vit")


def test_options_of_our_models_are_for_no_other(tmp_path):
    with pytest.raises(AprilError, match="architecture, initialisation and positions"):
        named_model("timm:vit_tiny_patch16_224", arch="A")
    with pytest.raises(AprilError, match="no pretrained weights"): named_model("vit_cifar", pretrained=True)
    with pytest.raises(AprilError, match="not both"): named_model("vit_cifar", tmp_path / "w", pretrained=True)


def test_normalisation_is_the_library_s_or_imagenet_s(tmp_path, no_network):
    own = {name: normalisation_of(vit(f.model, "B")) for name, f in FORMATS.items() if name != "imagenet"}
    assert own == {name: FORMATS[name].normalisation for name in own}
    assert named_model("timm:vit_tiny_patch16_224").format.normalisation.mean == (0.5, 0.5, 0.5)
    spec = folder_of(tmp_path)
    assert named_model(spec).format.normalisation == FORMATS["imagenet"].normalisation
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(dict(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])))
    assert named_model(spec).format.normalisation == replace(FORMATS["imagenet"].normalisation,
                                                             mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


def test_a_model_of_one_channel_is_normalised_by_one_number(tmp_path):
    n = named_model(folder_of(tmp_path, num_channels=1)).format.normalisation
    assert n.mean == (sum(FORMATS["imagenet"].normalisation.mean) / 3,) and len(n.std) == 1


def test_every_library_is_listed(): assert LIBRARIES == ("ours", "torchvision", "timm", "hf")


class LoRA(nn.Module):
    """As PEFT lays it out."""
    def __init__(self, layer, rank):
        super().__init__()
        self.base_layer, self.scaling = layer, 2.0
        self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, layer.out_features, bias=False)})
    def forward(self, x): return self.base_layer(x) + self.scaling * self.lora_B["default"](self.lora_A["default"](x))


def lora(server, rank, parts="qkv"):
    """A frozen model with LoRA on its first attention, and an image's gradient in float64."""
    torch.manual_seed(0)
    model = copy.deepcopy(server).requires_grad_(False)
    for part in parts: setattr(model.blocks[0].attention, part, LoRA(getattr(model.blocks[0].attention, part), rank))
    x = torch.rand(1, 3, 32, 32, dtype=torch.double)
    return x, client_update(model.double(), x, torch.tensor([1]))


@pytest.mark.parametrize("rank, parts, found", [(8, "qkv", True), (5, "qkv", False), (12, "qv", True), (8, "qv", False)])
def test_theorem_4_reads_lora_where_the_rows_are_as_many_as_the_tokens(rank, parts, found):
    server = vit("vit_cifar", "B")
    x, sent = lora(server, rank, parts)
    assert all("lora_" in name for name in sent.gradients)
    update = without_adapters(server, Update({f"base_model.model.{name}": g for name, g in sent.gradients.items()}))
    answer = subspace_leakage(server, update)
    assert (answer.systems[1].rank == 17) == found
    assert (psnr(answer.images, x).item() > 60) == found and (answer.verdict == "not-unique") != found


def test_adapters_of_another_model_or_none_are_one_line(rank=4):
    server = vit("vit_cifar", "B")
    _, sent = lora(server, rank)
    with pytest.raises(AprilError, match="adapts no layer of this model") as error: without_adapters(vit("vit_cifar", "B", width=96), sent)
    assert "\n" not in str(error.value)
    with pytest.raises(AprilError, match="needs no translation"): without_adapters(server, Update({"head.bias": torch.ones(10)}))
    kept = without_adapters(server, replace(sent, gradients={**sent.gradients, "head.bias": torch.ones(10)}))
    assert torch.equal(kept["head.bias"], torch.ones(10)) and not any("lora" in name for name in kept.gradients)


def test_torchvisions_initialisation_is_drawn_as_torchvision_draws_it():
    theirs = torchvision.models.VisionTransformer(32, 8, 2, 4, 64, 128)
    ours = vit("vit_cifar", "B", "torchvision", depth=2, width=64, mlp_width=128, qkv_bias=True)
    layer, block = theirs.encoder.layers[0], ours.blocks[0]
    qkv = torch.cat([part.weight for part in (block.attention.q, block.attention.k, block.attention.v)])
    pairs = [(layer.self_attention.in_proj_weight, qkv), (layer.self_attention.out_proj.weight, block.attention.out.weight),
             (layer.mlp[0].weight, block.mlp[0].weight), (layer.mlp[3].weight, block.mlp[2].weight),
             (theirs.conv_proj.weight, ours.patch.weight), (theirs.encoder.pos_embedding, ours.positions)]
    for a, b in pairs: assert b.std().item() == pytest.approx(a.std().item(), rel=0.08)
    for zero in (theirs.class_token, ours.class_token, layer.self_attention.in_proj_bias, block.attention.q.bias,
                 layer.self_attention.out_proj.bias, block.attention.out.bias, theirs.conv_proj.bias, ours.patch.bias):
        assert not zero.any()
    assert ours.head.weight.any() and not theirs.heads.head.weight.any()
