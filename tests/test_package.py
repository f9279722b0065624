"""Claims about the parts that are not theorems: updates, models, images, scores, certificates."""
import ast
import inspect
import math
import sys
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import april_nb
from april_nb import federated, metrics
from april_nb.certificate import solve, standard_error
from april_nb.closed_form import closed_form
from april_nb.data import FORMATS, DataMissing, fit, load, load_folder, photos, read_image, sample
from april_nb.federated import InvalidUpdate, MissingGradient, Update, client_update, load_update, save_update
from april_nb.views import NotApplicable
from april_nb.vit import InvalidImage, from_patches, to_patches, vit

ROOT = Path(april_nb.__file__).parent.parent


@given(st.integers(1, 3), st.sampled_from([1, 3]), st.integers(1, 4), st.integers(1, 5))
def test_patches_and_back_is_the_identity(n, channels, patch, per_side):
    size = patch * per_side
    x = torch.rand(n, channels, size, size)
    assert torch.equal(from_patches(to_patches(x, patch), patch, size, size), x)


def test_paper_models_have_the_paper_sizes():
    sizes = {n: (m.patch.out_features, len(m.blocks), m.blocks[0].attention.heads, len(m.positions))
             for n in ("vit_mnist", "vit_cifar", "vit_b_16", "vit_b_32") for m in [vit(n)]}
    assert sizes == {"vit_mnist": (384, 4, 4, 17), "vit_cifar": (384, 4, 4, 17),
                     "vit_b_16": (768, 12, 12, 197), "vit_b_32": (768, 12, 12, 50)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_an_update_survives_the_disk_bit_for_bit(tmp_path, dtype):
    model = vit("vit_mnist", "A")
    update = client_update(model, torch.rand(2, 1, 28, 28), torch.tensor([1, 2]), dtype=dtype, withheld=("positions",))
    save_update(update, tmp_path / "u.safetensors")
    back = load_update(tmp_path / "u.safetensors")
    assert all(torch.equal(back[n], g) and back[n].dtype == dtype for n, g in update.gradients.items())
    assert (back.examples, back.local_steps, back.lr, back.withheld) == (2, 1, None, ("positions",))


def test_a_foreign_file_with_bad_counts_is_refused(tmp_path):
    federated.save_file({"w": torch.ones(2)}, tmp_path / "u.safetensors", {"examples": "many"})
    with pytest.raises(InvalidUpdate, match="cannot read an update"): load_update(tmp_path / "u.safetensors")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_gradients_that_are_not_finite_are_refused(bad):
    with pytest.raises(InvalidUpdate, match="NaN or infinite"): Update({"w": torch.tensor([1.0, bad])})


def test_missing_and_withheld_gradients_are_named():
    model, image = vit("vit_mnist", "A"), (torch.rand(1, 1, 28, 28), torch.tensor([1]))
    with pytest.raises(MissingGradient, match="'positions'.*withheld"):
        closed_form(model, client_update(model, *image, withheld=("positions",)))
    update = client_update(model, *image)
    less = Update({n: g for n, g in update.gradients.items() if "attention.q" not in n})
    with pytest.raises(MissingGradient, match="'blocks.0.attention.q.weight'.*no parameter of that name"): closed_form(model, less)


def test_an_update_of_another_model_is_refused():
    update = client_update(vit("vit_mnist", "A", width=64), torch.rand(1, 1, 28, 28), torch.tensor([1]))
    with pytest.raises(InvalidUpdate, match="belongs to another model"): closed_form(vit("vit_mnist", "A"), update)


def test_a_model_without_the_parts_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    update = client_update(model, torch.rand(1, 1, 28, 28), torch.tensor([1]))
    with pytest.raises(NotApplicable, match="no view for Sequential"): closed_form(model, update)
    with pytest.raises(NotApplicable, match="needs architecture A"):
        closed_form(vit("vit_mnist", "B"), client_update(vit("vit_mnist", "B"), torch.rand(1, 1, 28, 28), torch.tensor([1])))


@pytest.mark.parametrize("shape", [(1, 3, 28, 28), (1, 1, 32, 32), (1, 28, 28), (28, 28)])
def test_images_of_the_wrong_shape_or_channels_are_refused(shape):
    with pytest.raises(InvalidImage, match="takes images of shape"):
        client_update(vit("vit_mnist"), torch.rand(shape), torch.zeros(shape[0], dtype=torch.long))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_any_image_fits_any_model(mode, name):
    image = Image.fromarray(np.arange(40 * 60, dtype=np.uint16).reshape(40, 60) * 27) if mode == "I;16" else Image.new(mode, (60, 40))
    x = fit(image, FORMATS[name])
    assert x.shape == (FORMATS[name].channels, FORMATS[name].size, FORMATS[name].size)
    assert 0 <= x.min() and x.max() <= 1


def test_orientation_tags_are_obeyed(tmp_path):
    left = np.zeros((64, 64, 3), np.uint8)
    left[:, :32] = 255
    exif = Image.Exif()
    exif[0x0112] = 3   # upside down
    Image.fromarray(left).save(tmp_path / "a.jpg", exif=exif)
    x = read_image(tmp_path / "a.jpg", FORMATS["cifar10"])
    assert x[:, :, 20:].mean() > 0.9 and x[:, :, :12].mean() < 0.1


def test_without_data_photographs_stand_in_and_say_so(monkeypatch):
    monkeypatch.delenv("APRIL_DATA", raising=False)
    for name, format in FORMATS.items():
        images = load(name)
        assert images.name == "photos" and images[9][0].shape == (format.channels, format.size, format.size)


def test_named_data_that_is_not_there_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("APRIL_DATA", str(tmp_path))
    for name in FORMATS:
        with pytest.raises(DataMissing, match=name): load(name)


def test_any_folder_of_images_is_a_data_set(tmp_path):
    for label in "ab":
        (tmp_path / label).mkdir()
        Image.new("RGB", (40, 40)).save(tmp_path / label / "0.png")
    images = load_folder(tmp_path, FORMATS["cifar10"])
    assert len(images) == 2 and images.batch([0, 1])[1].tolist() == [0, 1]


@given(st.lists(st.integers(0, 4), max_size=60), st.integers(0, 60))
def test_a_sample_takes_the_first_of_each_class_then_the_second(labels, n):
    chosen = sample(labels, n)
    turns = [sum(labels[j] == labels[i] for j in range(i)) for i in chosen]
    assert turns == sorted(turns) and len(set(chosen)) == len(chosen) == min(n, len(labels))
    assert sample(labels, n // 2) == chosen[:n // 2]


@given(st.permutations(range(5)))
def test_scores_do_not_depend_on_batch_order(order):
    f = FORMATS["cifar10"]
    x = photos(f).batch(range(5))[0]
    noisy = x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    args = f.normalisation(x), f.normalisation
    assert metrics.scores(f.normalisation(noisy)[list(order)], *args) == metrics.scores(f.normalisation(noisy), *args)


def test_an_exact_image_scores_finite_and_alone():
    f = FORMATS["mnist"]
    x = f.normalisation(photos(f).batch(range(3))[0])
    wrong = torch.cat([x[:1], x[1:] + 1])
    exact, *others = metrics.scores(wrong, x, f.normalisation)
    assert exact.mse == 0 and math.isfinite(exact.psnr) and exact.psnr > 300 and exact.ssim == 1
    assert all(o.psnr < 20 for o in others)


@given(st.integers(2, 12), st.integers(0, 20), st.integers(1, 4), st.integers(0, 1000))
def test_solve_is_exact_unique_and_counts_its_rank(n, spare, k, seed):
    g = torch.Generator().manual_seed(seed)
    A, X = torch.randn(n + spare + 3, n, generator=g, dtype=torch.double), torch.randn(n, k, generator=g, dtype=torch.double)
    solution = solve(A, A @ X, "test", torch.float64)
    assert solution.system.rank == n and torch.allclose(solution.X, X, atol=1e-6)
    A[:, -1] = A[:, 0]
    repeated = solve(A, A @ X, "test", torch.float64)
    assert repeated.system.rank == n - 1 and standard_error(repeated) == math.inf


def test_solve_survives_zeros():
    solution = solve(torch.zeros(5, 3, dtype=torch.double), torch.zeros(5, 2, dtype=torch.double), "test", torch.float32)
    assert solution.system.rank == 0 and not solution.X.any() and math.isfinite(solution.system.condition_number)


def public():
    """Every public function and class of the package, with its module."""
    for path in sorted((ROOT / "april_nb").glob("[!_]*.py")):
        module = __import__(f"april_nb.{path.stem}", fromlist=["*"])
        for name in module.__all__:
            yield pytest.param(getattr(module, name), id=f"{path.stem}.{name}")


def documentable(thing): return inspect.isfunction(thing) or (inspect.isclass(thing) and not issubclass(thing, Enum))


@pytest.mark.parametrize("thing", [p for p in public() if documentable(p.values[0])])
def test_every_public_thing_is_documented_down_to_its_parameters(thing):
    docments = pytest.importorskip("fastcore.docments").docments
    assert thing.__doc__
    if inspect.isfunction(thing) and thing.__module__ != "april_nb.cli":
        for name, comment in docments(thing, full=True).items():
            if name == "return" and comment["anno"] is None: continue
            if name != "return" and inspect.signature(thing).parameters[name].kind == inspect.Parameter.VAR_KEYWORD: continue
            assert comment["docment"], f"{name} has no comment"


def test_the_package_runs_without_the_tools_of_the_book():
    allowed = {"torch", "torchvision", "skimage", "scipy", "matplotlib", "numpy", "PIL", "safetensors", "typer", "rich", "lazy_loader", "april_nb",
               "opacus",    # the extra `privacy`; test_privacy checks that only functions import it
               "timm", "transformers",   # the extras `timm` and `hf`; test_views imports everything without them
               "flwr",      # the extra `flower`: `federation` is Flower's apps and nothing else may import it
               "psutil",    # `bench` measures with it; `runner` imports it where another process's claim is met
               "ray"}       # the extra `ray`: `runner` imports it where `--ray` asks for it
    for path in (ROOT / "april_nb").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                top = name.split(".")[0]
                assert top in allowed or top in sys.stdlib_module_names, f"{path.name} imports {name}"
                assert top != "flwr" or path.stem == "federation", f"{path.name} imports {name}"
