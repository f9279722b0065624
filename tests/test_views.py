"""Claims about views: every attack runs on the Vision Transformers of torchvision, timm and Hugging Face."""
import ast
import copy
import subprocess
import sys
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from opacus import GradSampleModule
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock, VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.vision_transformer import ConvStemConfig
from transformers import (
    BeitForImageClassification, CLIPForImageClassification, CLIPVisionModel, DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher, Dinov2ForImageClassification, Dinov2WithRegistersForImageClassification,
    SiglipForImageClassification, ViTForImageClassification, ViTMAEModel, ViTModel,
)

import april_nb
from april_nb.closed_form import closed_form
from april_nb.data import photos
from april_nb.defenses import defense, noise_generator, parts
from april_nb.federated import AprilError, Update, client_update, logits
from april_nb.labels import idlg, restore_labels
from april_nb.matching import Matcher, plain_shares
from april_nb.metrics import psnr
from april_nb.models import named_model
from april_nb.optimization import gradient_matching, paper_settings
from april_nb.patch import patch_leakage
from april_nb.position import position_gradient
from april_nb.subspace import subspace_leakage
from april_nb.views import LACKS, NotApplicable, check_view, check_weights, unwrap, view
from april_nb.vit import to_patches, vit


def torchvision_vit(**options):
    sizes = dict(image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=48, mlp_dim=96, num_classes=10)
    model = torchvision.models.VisionTransformer(**sizes | options)
    nn.init.normal_(model.heads.head.weight, std=0.1)   # zero in torchvision: nothing would arrive
    return model


def timm_vit(Model=VisionTransformer, **options):
    return Model(**dict(img_size=32, patch_size=8, depth=2, num_heads=4, embed_dim=48, num_classes=10) | options)


TINY = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)

def hugging_face_vit(Model=ViTForImageClassification, **options):
    """A tiny model of Hugging Face's; CLIP and SigLIP keep the picture's part of the configuration apart."""
    vision, Config = TINY | dict(image_size=32, patch_size=8), Model.config_class
    if Model in (CLIPForImageClassification, SiglipForImageClassification):
        return Model(Config(vision_config=vision, text_config=TINY | dict(num_hidden_layers=1, vocab_size=99, bos_token_id=1,
                                                                          eos_token_id=2, pad_token_id=0), num_labels=10))
    return Model(Config(**vision | dict(num_labels=10) | options))


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
    "Hugging Face DeiT": lambda: hugging_face_vit(DeiTForImageClassification),
    "Hugging Face DeiT, two classifiers": lambda: hugging_face_vit(DeiTForImageClassificationWithTeacher),
    "CLIP": lambda: hugging_face_vit(CLIPForImageClassification),
    "SigLIP": lambda: hugging_face_vit(SiglipForImageClassification),
    "DINOv2": lambda: hugging_face_vit(Dinov2ForImageClassification),
    "DINOv2, registers": lambda: hugging_face_vit(Dinov2WithRegistersForImageClassification),
    "BEiT, a table of positions": lambda: hugging_face_vit(BeitForImageClassification,
                                                           use_absolute_position_embeddings=True),
    "timm BEiT": lambda: timm_vit(Beit),
    "timm EVA": lambda: timm_vit(Eva, qkv_fused=False, swiglu_mlp=True),
    "timm SigLIP": lambda: timm.create_model("vit_base_patch16_siglip_224", img_size=32, patch_size=8, embed_dim=48,
                                             depth=2, num_heads=4, num_classes=10),
    "timm DINOv2, registers": lambda: timm.create_model("vit_small_patch14_reg4_dinov2", img_size=28, patch_size=7,
                                                        embed_dim=48, depth=2, num_heads=4, num_classes=10,
                                                        init_values=0.1),
    "timm, norm behind the attention": lambda: timm_vit(block_fn=ResPostBlock),
    "timm, parallel attention and MLP": lambda: timm_vit(block_fn=ParallelScalingBlock),
}


@pytest.fixture(params=MODELS)
def model(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[request.param]().double()
        v = view(model)
        for name in (v.positions, *v.prefix):   # a few start at zero, where tokens coincide
            if not v.weights[name].any(): nn.init.normal_(model.get_parameter(name), std=0.02)
        return model


def picture(model, n=1):
    shape = view(model).image_shape
    return torch.randn(n, *shape, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def test_every_claim_of_a_view_passes_its_check(model):
    found = {check.name: check for check in check_view(model)}
    assert list(found) == ["stream", "q, k, v", "attention", "classifier"]
    assert found["stream"].ok and found["classifier"].ok and found["stream"].error < 1e-13
    assert found["q, k, v"].ok and found["q, k, v"].error is not None or view(model).lacks == LACKS["block"]
    assert found["attention"].ok and (found["attention"].error is None or found["attention"].error < 1e-12)


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


def test_theorem_4_returns_the_image_through_any_view_that_names_q_k_v(model):
    v = view(model)
    update = client_update(model, picture(model), torch.tensor([3]), withheld=(v.positions,))
    if None in v.qkv:
        with pytest.raises(NotApplicable, match="does not read a layer norm of the stream"): subspace_leakage(model, update)
        return
    answer = subspace_leakage(model, update)
    assert answer.verdict == "exact", answer.reason
    torch.testing.assert_close(answer.images, picture(model), rtol=1e-3, atol=1e-3)


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


@pytest.mark.parametrize("Model", [DeiTForImageClassification, DeiTForImageClassificationWithTeacher])
def test_two_classifiers_count_a_batch_s_labels_as_well_as_one(Model):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = hugging_face_vit(Model).double()
    assert len(view(model).classifiers) == (2 if "Teacher" in Model.__name__ else 1)
    right, g = 0, torch.Generator().manual_seed(0)
    for _ in range(10):
        y = torch.randint(10, (8,), generator=g)
        update = client_update(model, torch.randn(8, 3, 32, 32, generator=g).double(), y)
        right += sum((Counter(restore_labels(model, update).tolist()) & Counter(y.tolist())).values())
    assert right == 80


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
    "relative positions act": lambda: hugging_face_vit(BeitForImageClassification, use_relative_position_bias=True),
    "no position embedding is added": lambda: hugging_face_vit(BeitForImageClassification),
    "what enters the first block is not": lambda: timm.create_model(   # whose class token joins later
        "cait_xxs24_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=10),
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


def test_patches_that_overlap_or_leave_a_border_are_no_tiling():
    stride = nn.Conv2d(3, 48, 8, 4)
    overlap, border = timm_vit(), timm_vit(img_size=36)
    overlap.patch_embed.proj = stride
    for model in (overlap, border):
        with torch.device("meta"): lacks = view(model.to("meta")).lacks
        assert lacks == LACKS["overlap"]


def test_a_model_that_masks_patches_at_random_says_so():
    v = view(hugging_face_vit(ViTMAEModel))
    for name in (v.patch_weight, v.positions, v.qkv[0]):
        with pytest.raises(NotApplicable, match="draws at random which patches it reads"): v.weight(name)


def test_fixed_sinusoids_of_mae_are_not_learned_by_the_classifier_that_takes_them_over():
    torch.manual_seed(0)
    encoder, model = hugging_face_vit(ViTMAEModel), hugging_face_vit()
    model.vit.embeddings.position_embeddings = encoder.embeddings.position_embeddings
    v = view(model)
    assert all(check.ok for check in check_view(model)) and not v.learns_positions
    assert torch.linalg.matrix_rank(v.weight(v.positions)) <= 2 * v.patches ** 0.5


@pytest.mark.parametrize("Model", [ViTModel, CLIPVisionModel], ids=["ViT", "CLIP"])
def test_a_base_model_without_classifier_gives_its_image_away(Model):
    torch.manual_seed(0)
    model = hugging_face_vit(Model).double()
    names, parameters = zip(*model.named_parameters())
    loss = model(picture(model)).pooler_output.square().sum()
    update = Update(dict(zip(names, torch.autograd.grad(loss, parameters, materialize_grads=True))))
    answer = patch_leakage(model, update)
    assert answer.verdict == "exact"
    torch.testing.assert_close(answer.images, picture(model), rtol=1e-5, atol=1e-5)
    with pytest.raises(NotApplicable, match="no classifier"): restore_labels(model, update)


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


def test_the_package_imports_without_timm_transformers_opacus_peft_and_flower():
    modules = [m.stem for m in Path(april_nb.__file__).parent.glob("*.py") if m.stem not in ("__init__", "_modidx", "federation")]
    code = ("import sys; sys.modules.update(timm=None, transformers=None, opacus=None, peft=None, flwr=None); import importlib; "
            f"[importlib.import_module('april_nb.' + m) for m in {modules}]; "
            "from torch import nn; from april_nb.views import view; from april_nb.vit import vit; "
            "view(nn.DataParallel(vit('vit_cifar')))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == ""


def test_no_module_but_views_knows_a_name_of_a_library():
    for path in Path(april_nb.__file__).parent.glob("*.py"):
        if path.stem in ("views", "_modidx"): continue
        strings = {n.value for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        assert not strings & {"pos_embed", "cls_token", "encoder.pos_embedding", "patch_embed.proj", "conv_proj"}


def small_vit(arch="A"):
    """One of ours that every attack reads in a moment."""
    return vit("vit_cifar", arch, width=192, depth=2).double()


def answers(model):
    """What every kind of attack says on updates of `small_vit`."""
    own = small_vit()
    one = client_update(own, picture(own), torch.tensor([3]))
    two = client_update(own, picture(own, 2), torch.tensor([2, 7]))
    guesses = picture(own, 2)[None].float().requires_grad_()
    return [patch_leakage(model, one).images, closed_form(model, one).images, subspace_leakage(model, one).images,
            restore_labels(model, two), gradient_matching(model, one, paper_settings("april", 2)).images,
            Matcher(model, [two]).shares(guesses, torch.tensor([[2, 7]])).square]


@contextmanager
def one_process(path):
    """A process group of one, which DistributedDataParallel asks for."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/group", rank=0, world_size=1)
    try: yield
    finally: torch.distributed.destroy_process_group()


def distributed(model, path):
    with one_process(path): return nn.parallel.DistributedDataParallel(model)


class PeftModel(nn.Module):
    """How PEFT keeps what it wraps; the library itself is no dependency of this package."""
    def __init__(self, model):
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model


PeftModel.__module__ = "peft.peft_model"
WRAPPED = {
    "DataParallel": lambda model, path: nn.DataParallel(model),
    "DistributedDataParallel": distributed,
    "Opacus": lambda model, path: GradSampleModule(model, strict=False),
    "torch.compile": lambda model, path: torch.compile(model, backend="eager"),
    "PEFT": lambda model, path: PeftModel(model),
    "two of them": lambda model, path: torch.compile(nn.DataParallel(model), backend="eager"),
}


@pytest.fixture(scope="module")
def bare_answers(): return answers(small_vit())


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_every_attack_gives_the_same_answer_on_a_wrapped_model(wrapper, bare_answers, tmp_path):
    model = small_vit()
    wrapped = WRAPPED[wrapper](model, tmp_path)
    assert unwrap(wrapped) is model and unwrap(model) is model
    assert all(check.ok and (check.error is not None or check.name == "attention") for check in check_view(wrapped))
    assert view(wrapped).weights.keys() == model.state_dict().keys()
    for answer, expected in zip(answers(wrapped), bare_answers): assert torch.equal(answer, expected)


def quantised():
    model = timm_vit()
    model.head.weight = nn.Parameter(torch.zeros(10, 48, dtype=torch.int8), requires_grad=False)
    return model


def dynamically_quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(timm_vit(), {nn.Linear})


def weight_norm(how):
    def build():
        model = timm_vit()
        how(model.blocks[0].attn.qkv)
        return model
    return build


class Adapter(nn.Module):
    """A linear layer with LoRA, as PEFT names its parts."""
    def __init__(self, layer):
        super().__init__()
        self.base_layer, n = layer, layer.in_features
        self.lora_A = nn.ModuleDict({"default": nn.Linear(n, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, layer.out_features, bias=False)})

    def forward(self, x): return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def lora():
    model = timm_vit().requires_grad_(False)
    for block in model.blocks: block.attn.qkv = Adapter(block.attn.qkv)
    return PeftModel(model)


def filled(value):
    def build():
        model = timm_vit()
        nn.init.constant_(model.blocks[1].mlp.fc1.weight, value)
        return model
    return build


class Strange(Tensor):
    """A tensor of another kind, as sharded and quantised weights are."""


def strange():
    model = timm_vit()
    model.head.weight = nn.Parameter(torch.zeros(10, 48).as_subclass(Strange))
    return model


UNSERVED = {
    "LoRA.*without adapters": lora,
    "parametrised weight.*take weight norm off": weight_norm(nn.utils.parametrizations.weight_norm),
    "parametrised weight.*take weight norm off first": weight_norm(nn.utils.weight_norm),
    "quantised weights have no gradients.*int8": quantised,
    "quantised weights have no gradients.*floating point": dynamically_quantised,
    "every parameter of this model is frozen": lambda: timm_vit().requires_grad_(False),
    "kept as Strange": strange,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("why", UNSERVED)
def test_a_model_that_no_attack_can_read_is_one_line(why):
    model = UNSERVED[why]()
    update = Update({"head.bias": torch.ones(10)})
    for attack in (view, check_view, lambda m: patch_leakage(m, update), lambda m: Matcher(m, [update])):
        with pytest.raises(NotApplicable, match=why) as error: attack(model)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["timm", "ours"])
def test_weights_that_are_not_finite_are_blamed_by_name(value, where):
    sound = {"timm": timm_vit, "ours": lambda: small_vit("B")}[where]()
    update = client_update(sound, torch.randn(2, 3, 32, 32).to(next(sound.parameters())), torch.tensor([1, 2]))
    model = copy.deepcopy(sound)
    name = "blocks.1.mlp.fc1.weight" if where == "timm" else "blocks.1.mlp.0.weight"
    nn.init.constant_(model.get_parameter(name), value)
    for use in (check_weights, check_view, lambda m: Matcher(m, [update]), lambda m: restore_labels(m, update)):
        with pytest.raises(AprilError, match=f"'{name}' has NaN or infinite entries.*not the update"): use(model)
    model = copy.deepcopy(sound)
    nn.init.constant_(model.get_parameter(view(model).patch_weight), value)
    with pytest.raises(AprilError, match="NaN or infinite.*not the update"): subspace_leakage(model, update)


def test_a_model_on_meta_has_names_and_no_numbers():
    with torch.device("meta"): model = timm_vit()
    v = view(model)
    assert v.patch_weight == "patch_embed.proj.weight"
    for use in (lambda: v.weight(v.patch_weight), lambda: check_weights(model), lambda: check_view(model)):
        with pytest.raises(AprilError, match="device `meta`"): use()


def test_a_check_leaves_no_trace():
    model = timm_vit(proj_drop_rate=0.5)
    model.blocks[0].eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    check_view(model)
    assert torch.equal(torch.rand(3), expected) and [m.training for m in model.modules()] == modes
    assert all(torch.equal(w, before[n]) for n, w in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_a_view_is_proved_anew_when_the_model_is_another():
    model = timm_vit()
    assert view(model).qkv == ("blocks.0.attn.qkv.weight",)
    model.norm_pre, model.blocks[0] = nn.LayerNorm(48), ResPostBlock(48, 4)
    assert view(model).qkv == (None,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_checked_in_single(dtype):
    assert all(check.ok and check.error < 1e-5 for check in check_view(timm_vit().to(dtype)))


def test_scores_with_a_temperature_still_come_from_the_classifier():
    class Warm(VisionTransformer):
        def forward(self, x): return 3 * super().forward(x) - 1
    class Masked(VisionTransformer):
        def forward(self, x): return super().forward(x) * torch.arange(10)
    assert view(timm_vit(Warm)).head_weight == "head.weight"
    update = client_update(model := timm_vit(Masked), torch.randn(1, 3, 32, 32), torch.tensor([3]))
    with pytest.raises(NotApplicable, match="'head.weight' does not give this model's scores"): restore_labels(model, update)
