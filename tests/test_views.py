"""Claims about views: every attack runs on the Vision Transformers of torchvision, timm and Hugging Face."""
import ast
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import nn
from torch.nn import functional as F
from torchvision.models.vision_transformer import ConvStemConfig
from transformers import ViTConfig, ViTForImageClassification

import april_nb
from april_nb.audit import named_model
from april_nb.closed_form import closed_form
from april_nb.data import photos
from april_nb.defenses import defense, noise_generator, parts
from april_nb.federated import Update, client_update, logits
from april_nb.labels import idlg, restore_labels
from april_nb.matching import Matcher, plain_shares
from april_nb.metrics import psnr
from april_nb.optimization import gradient_matching, paper_settings
from april_nb.patch import patch_leakage
from april_nb.position import position_gradient
from april_nb.views import NotApplicable, view
from april_nb.vit import to_patches


def torchvision_vit(**options):
    sizes = dict(image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=48, mlp_dim=96, num_classes=10)
    model = torchvision.models.VisionTransformer(**sizes | options)
    nn.init.normal_(model.heads.head.weight, std=0.1)   # zero in torchvision: nothing would arrive
    return model


def timm_vit(Model=VisionTransformer, **options):
    return Model(**dict(img_size=32, patch_size=8, depth=2, num_heads=4, embed_dim=48, num_classes=10) | options)


def hugging_face_vit(**options):
    sizes = dict(image_size=32, patch_size=8, num_hidden_layers=2, num_attention_heads=4, hidden_size=48,
                 intermediate_size=96, num_labels=10)
    return ViTForImageClassification(ViTConfig(**sizes | options))


MODELS = {
    "torchvision": torchvision_vit,
    "torchvision, two layers in the head": lambda: torchvision_vit(representation_size=20),
    "timm": timm_vit,
    "timm, registers, LayerScale, qk-norm": lambda: timm_vit(reg_tokens=3, init_values=0.1, qk_norm=True),
    "timm, tokens without position": lambda: timm_vit(reg_tokens=2, no_embed_class=True),
    "timm, mean of patches": lambda: timm_vit(class_token=False, global_pool="avg"),
    "timm, attention pooling": lambda: timm_vit(class_token=False, global_pool="map"),
    "timm, patches without bias, first norm": lambda: timm_vit(pre_norm=True),
    "timm, oblong": lambda: timm_vit(img_size=(24, 40)),
    "DeiT": lambda: timm_vit(VisionTransformerDistilled),
    "Hugging Face": hugging_face_vit,
    "Hugging Face, no q, k, v biases": lambda: hugging_face_vit(qkv_bias=False),
}


@pytest.fixture(params=MODELS)
def model(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[request.param]().double()


def picture(model, n=1):
    shape = view(model).image_shape
    return torch.randn(n, *shape, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def test_stream_is_known_rows_and_embedded_patches(model):
    v, seen = view(model), []
    with model.get_submodule(v.blocks).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
        with torch.no_grad(): model.eval()(picture(model))
    Z_p = to_patches(picture(model), v.patch)[0] @ v.weight(v.patch_weight).mT + v.offsets()
    torch.testing.assert_close(seen[0][0], torch.cat([v.known_tokens(), Z_p]))


def test_position_gradient_is_the_streams(model):
    v, arrived = view(model), []
    with model.get_submodule(v.blocks).register_forward_pre_hook(
            lambda _, inputs: inputs[0].register_hook(arrived.append) and None):
        G = position_gradient(v, client_update(model, picture(model), torch.tensor([3])))
    torch.testing.assert_close(G[-v.patches:], arrived[0][0, -v.patches:])


def test_theorem_3_returns_the_image_through_any_view(model):
    answer = patch_leakage(model, client_update(model, picture(model), torch.tensor([3])))
    assert answer.verdict == "exact", answer.reason
    torch.testing.assert_close(answer.images, picture(model), rtol=1e-5, atol=1e-5)


def test_theorem_1_is_refused_by_the_real_block(model):
    with pytest.raises(NotApplicable, match="needs architecture A"):
        closed_form(model, client_update(model, picture(model), torch.tensor([3])))


def test_row_space_of_q_k_v_holds_the_normed_stream(model):
    v = view(model)
    if None in v.qkv:
        with pytest.raises(NotApplicable, match="layer norm of the stream.*Theorem 3"): v.weight(v.qkv[0])
        return
    update = client_update(model, picture(model), torch.tensor([3]))
    Z = torch.cat([v.known_tokens(), to_patches(picture(model), v.patch)[0] @ v.weight(v.patch_weight).mT + v.offsets()])
    eps = model.get_submodule(v.norm[0].removesuffix(".weight")).eps
    inputs = F.layer_norm(Z, Z.shape[1:], *(v.weight(name) for name in v.norm), eps=eps)
    grads = torch.cat([v.gradient(update, name) for name in v.qkv])
    basis = torch.linalg.svd(grads, full_matrices=False)[2][:len(Z)]
    assert (inputs - inputs @ basis.mT @ basis).norm() < 1e-6 * inputs.norm()


def test_labels_are_restored_through_any_view(model):
    update = client_update(model, picture(model), torch.tensor([7]))
    assert idlg(view(model), update).tolist() == [7]
    pair = client_update(model, picture(model, 2), torch.tensor([2, 7]))
    assert len(restore_labels(model, pair)) == 2


def test_matching_engine_equals_the_plain_step_on_any_model(model):
    model.eval()
    update, y = client_update(model, picture(model), torch.tensor([3])), torch.tensor([3])
    guess = (picture(model) * 0.3 + 0.1).requires_grad_()
    ours, plain = Matcher(model, [update], dtype=torch.double).shares(guess[None], y[None], l1=True), plain_shares(model, guess, y, update)
    assert set(ours.names) == set(plain.names) == set(update.gradients)
    order = [plain.names.index(n) for n in ours.names]
    for part in ("square", "dot", "target"):
        torch.testing.assert_close(getattr(ours, part), getattr(plain, part)[:, order], rtol=1e-8, atol=1e-12)
    for loss in (lambda s: s.distance(), lambda s: s.cosine(), lambda s: s.l1):
        a, b = (torch.autograd.grad(loss(s).sum(), guess, retain_graph=True)[0] for s in (ours, plain))
        assert (a - b).norm() < 1e-7 * b.norm()


@pytest.mark.parametrize("name, least", [("vit_small_patch16_224", 90), ("vit_base_patch16_224", 95)])
def test_theorem_3_reads_a_photograph_from_timms_standard_models_in_float32(name, least):
    model, format = named_model(f"timm:{name}")
    photo, n = photos(format).batch([0])[0], format.normalisation
    answer = patch_leakage(model, client_update(model, n(photo).float(), torch.tensor([0])))
    assert psnr(n.inverse(answer.images), photo).item() > least


@pytest.mark.parametrize("method", ["dlg", "ig", "tag", "april"])
def test_searches_go_downhill_on_any_model(model, method):
    update = client_update(model, picture(model), torch.tensor([3]))
    box = torch.tensor(-3.0), torch.tensor(3.0)
    settings = replace(paper_settings(method, 8), lr=0.003)
    history = gradient_matching(model.float(), update, settings, box=box).history
    assert history.isfinite().all() and history.min() < history[0]


@pytest.mark.parametrize("name", ["timm", "Hugging Face", "timm, tokens without position"])
def test_many_victims_share_a_pass_where_every_layer_is_seen(name):
    torch.manual_seed(0)
    model = MODELS[name]().double()
    updates = [client_update(model, picture(model) * k, torch.tensor([k])) for k in (1, 2, 3)]
    x, y = torch.stack([picture(model) * 0.1] * 3).requires_grad_(), torch.tensor([[1], [2], [3]])
    ours = Matcher(model, updates, dtype=torch.double).shares(x, y)
    for i, update in enumerate(updates):
        plain = plain_shares(model, x[i], y[i], update)
        torch.testing.assert_close(ours.distance()[i], plain.distance()[0], rtol=1e-8, atol=1e-12)


def test_many_victims_are_refused_where_a_layer_is_not_seen():
    model = torchvision_vit()
    update = client_update(model, torch.randn(1, 3, 32, 32), torch.tensor([1]))
    with pytest.raises(NotApplicable, match="in_proj.*many victims"): Matcher(model, [update, update])


def test_defences_know_the_parts_of_any_model(model):
    v, update = view(model), client_update(model, picture(model), torch.tensor([3]))
    for part in parts(v):
        sent = defense(f"withhold:{part}", v, noise_generator(0))(update).gradients
        assert 0 < len(sent) < len(update.gradients)
    assert set(sent) == {v.head_weight, v.head_bias} and part == "body"


STEM = [ConvStemConfig(24, 3, 2), ConvStemConfig(24, 3, 4)]
LACKING = {
    "stem": lambda: torchvision_vit(conv_stem_configs=STEM),
    "rotary positions": lambda: timm_vit(Eva, use_abs_pos_emb=False, use_rot_pos_emb=True),
    "relative positions": lambda: timm_vit(VisionTransformerRelPos),
    "no position embedding": lambda: timm_vit(pos_embed="none"),
}


@pytest.mark.parametrize("part", LACKING)
def test_a_missing_part_is_named_with_the_attacks_that_still_apply(part):
    torch.manual_seed(0)
    model = LACKING[part]()
    update = client_update(model, torch.randn(1, 3, 32, 32), torch.tensor([7]))
    with pytest.raises(NotApplicable, match=f"{part}.*labels and gradient matching.*still apply") as error:
        patch_leakage(model, update)
    assert "\n" not in str(error.value)
    assert restore_labels(model, update).tolist() == [7]
    history = gradient_matching(model, update, replace(paper_settings("dlg", 6), lr=0.003)).history
    assert history.isfinite().all() and history.min() < history[0]


def test_rotary_positions_beside_a_table_leave_theorem_3_alone():
    torch.manual_seed(0)
    model = timm_vit(Eva, use_abs_pos_emb=True, use_rot_pos_emb=True).double()
    answer = patch_leakage(model, client_update(model, picture(model), torch.tensor([3])))
    assert answer.verdict == "exact"
    torch.testing.assert_close(answer.images, picture(model), rtol=1e-5, atol=1e-5)


def test_without_a_classifier_there_are_no_labels_but_the_image_leaks():
    torch.manual_seed(0)
    model = timm_vit(num_classes=0).double()
    update = client_update(model, picture(model), torch.tensor([0]))
    for restore in (lambda: restore_labels(model, update), lambda: idlg(view(model), Update(update.gradients))):
        with pytest.raises(NotApplicable, match="no classifier"): restore()
    assert patch_leakage(model, update).verdict == "exact"


def test_frozen_positions_are_not_learned():
    model = timm_vit()
    model.pos_embed.requires_grad_(False)
    assert not view(model).learns_positions and "pos_embed" not in client_update(
        model, torch.randn(1, 3, 32, 32), torch.tensor([0])).gradients


def test_scores_come_out_of_a_record():
    model = hugging_face_vit()
    assert torch.equal(logits(model(torch.zeros(1, 3, 32, 32))), model(torch.zeros(1, 3, 32, 32)).logits)


@pytest.mark.parametrize("name, P, C", [("vit_b_16", 196, 768), ("vit_b_32", 49, 768), ("vit_l_16", 196, 1024),
                                        ("vit_l_32", 49, 1024), ("vit_h_14", 256, 1280)])
def test_all_torchvision_variants_have_a_view(name, P, C):
    with torch.device("meta"): model = getattr(torchvision.models, name)()
    v = view(model)
    assert (v.patches, v.weights[v.positions].shape[-1]) == (P, C) and not v.lacks


def test_the_package_imports_without_timm_and_transformers():
    modules = [m.stem for m in Path(april_nb.__file__).parent.glob("*.py") if m.stem not in ("__init__", "_modidx")]
    code = ("import sys; sys.modules.update(timm=None, transformers=None); import importlib; "
            f"[importlib.import_module('april_nb.' + m) for m in {modules}]; "
            "from april_nb.views import view; from april_nb.vit import vit; view(vit('vit_cifar'))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == ""


def test_no_module_but_views_knows_a_name_of_a_library():
    for path in Path(april_nb.__file__).parent.glob("*.py"):
        if path.stem in ("views", "_modidx"): continue
        strings = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        assert not strings & {"pos_embed", "cls_token", "encoder.pos_embedding", "patch_embed.proj", "conv_proj"}
