"""What cannot be is one line: bad images, labels, models, files, sizes, scores. (The command line's cases stand in another file.)"""
import gzip
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features
from torch import nn

from april_nb import data, metrics
from april_nb.data import FORMATS, DataMissing, Normalisation, load, read_image
from april_nb.federated import AprilError, InvalidUpdate, Update, client_update, load_update, save_update
from april_nb.models import named_model
from april_nb.vit import InvalidImage, ViT, guess_positions, vit

CIFAR = FORMATS["cifar10"]


def one_line(call, *words, error=AprilError):
    with pytest.raises(error) as raised: call()
    message = str(raised.value)
    assert "\n" not in message and len(message) < 500 and all(w in message for w in words), message


MODEL = vit("vit_mnist", "B", depth=1)
IMAGES, LABELS = torch.rand(2, 1, 28, 28), torch.tensor([1, 2])


@pytest.mark.parametrize("labels, words", [
    ([1, 2], ["list", "torch.tensor(labels)"]), (np.array([1, 2]), ["ndarray", "torch.tensor"]), (LABELS.int(), ["int32", ".long()"]),
    (LABELS.float(), ["float32", ".long()"]), (LABELS > 1, ["bool", ".long()"]), (torch.tensor([1, 10]), ["label 10", "0 to 9"]),
    (torch.tensor([1, -1]), ["label -1"]), (torch.tensor([1, -100]), ["label -100"]), (torch.tensor([1, 10**15]), ["out of range"]),
    (torch.tensor([1]), ["2 images but 1 labels"]), (torch.tensor([[1], [2]]), ["(2, 1)", "shape (B,)"]),
    (nn.functional.one_hot(LABELS, 10), ["(2, 10)", "shape (B,)"]), (torch.tensor(1), ["()", "shape (B,)"])])
def test_labels_that_are_none_are_one_line(labels, words):
    one_line(lambda: client_update(MODEL, IMAGES, labels), *words)


@pytest.mark.parametrize("images, words", [
    ((255 * IMAGES).byte(), ["uint8", "divide by 255"]), ((255 * IMAGES).long(), ["int64", "divide"]), (IMAGES.tolist(), ["list"]),
    (IMAGES.numpy(), ["ndarray"]), (IMAGES.expand(2, 3, 28, 28), ["(B, 1, 28, 28)", "(2, 3, 28, 28)"]),
    (torch.rand(2, 1, 32, 32), ["(2, 1, 32, 32)"]), (torch.rand(2, 28, 28), ["(2, 28, 28)"]), (IMAGES * torch.nan, ["NaN pixels"]),
    (IMAGES[:0], ["(0, 1, 28, 28)"]), (IMAGES[0, 0, 0, 0], ["()"]), (IMAGES.double(), ["float64"]),
    (IMAGES.to("meta"), ["meta"])])
def test_images_that_a_model_does_not_take_are_one_line(images, words):
    one_line(lambda: client_update(MODEL, images, LABELS), *words, error=InvalidImage)


FOREIGN = {"torchvision": lambda: __import__("torchvision").models.VisionTransformer(32, 8, 1, 2, 16, 16, num_classes=10),
           "timm": lambda: pytest.importorskip("timm").models.VisionTransformer(32, 8, num_classes=10, embed_dim=16, depth=1, num_heads=2),
           "hf": lambda: (lambda t: t.ViTForImageClassification(t.ViTConfig(
               image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
               num_labels=10)))(pytest.importorskip("transformers"))}


@pytest.mark.parametrize("library", FOREIGN)
@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 3, 28, 28), (2, 32, 32), (2, 4, 32, 32)])
def test_other_libraries_complaints_about_shapes_are_one_line(library, shape):
    model = FOREIGN[library]()
    one_line(lambda: client_update(model, torch.rand(shape), LABELS), str(shape), error=InvalidImage)
    one_line(lambda: client_update(model, torch.rand(2, 3, 32, 32), torch.tensor([1, 10])), "label 10", "0 to 9")


@pytest.mark.parametrize("how, word", [(dict(local_steps=0), "one step"), (dict(local_steps=10**12), "local_steps"), (dict(local_steps=1.5), "local_steps"),
                                       (dict(local_steps=2, lr=0.0), "lr"), (dict(local_steps=2, lr=torch.nan), "lr"), (dict(lr=-1.0), "lr"),
                                       (dict(dtype=torch.int8), "int8"), (dict(dtype=torch.float8_e4m3fn), "float8_e4m3fn")])
def test_a_client_takes_no_impossible_steps(how, word):
    one_line(lambda: client_update(MODEL, IMAGES, LABELS, **how), word, error=InvalidUpdate)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["head.weight", "positions", "blocks.0.attention.q.bias"])
def test_weights_that_are_no_numbers_are_blamed_and_named(bad, name):
    model = vit("vit_mnist", "B", depth=1)
    model.get_parameter(name).data.view(-1)[3] = bad
    one_line(lambda: client_update(model, IMAGES, LABELS), f"weight {name!r}", "load other weights")


def test_a_model_on_meta_or_all_frozen_is_one_line():
    with torch.device("meta"): model = ViT("B", 28, 1, 7, 16, 1, 2, 16, 10)
    one_line(lambda: client_update(model, IMAGES, LABELS), "meta", "load its weights")
    one_line(lambda: client_update(vit("vit_mnist", depth=1).requires_grad_(False), IMAGES, LABELS), "frozen", "requires_grad_(True)")


@pytest.mark.parametrize("pixels, words", [
    (torch.rand(3, 32, 32).mul(255).byte(), ["uint8", "divide by 255"]), (torch.ones(3, 32, 32).long(), ["int64", "divide by 255"]),
    (255 * torch.rand(2, 3, 32, 32), ["divide them by 255"]), (torch.full((1, 3, 8, 8), 255.0), ["divide them by 255"]),
    (CIFAR.normalisation(torch.rand(2, 3, 32, 32)), ["not normalised"]), (torch.linspace(-0.01, 1, 192).view(3, 8, 8), ["pixels reach from", "[0, 1]"]),
    (torch.linspace(0, 1.5, 192).view(3, 8, 8), ["pixels reach from"]), (torch.full((3, 8, 8), torch.nan), ["NaN"]), (torch.full((3, 8, 8), torch.inf), ["inf"]),
    (torch.rand(2, 1, 8, 8), ["1 channel", "not 3"]), (torch.rand(8, 8), ["(8, 8)"]), (torch.rand(0, 3, 8, 8), ["(0, 3, 8, 8)"]), ([[0.5]], ["list"])])
def test_pixels_are_between_0_and_1_and_say_how_they_get_there(pixels, words):
    one_line(lambda: data.check_pixels(pixels, 3), *words, error=InvalidImage)


@given(st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]), st.integers(0, 1000), st.sampled_from([1, 3, None]))
def test_pixels_that_are_right_but_for_rounding_pass(dtype, seed, channels):
    x = torch.rand(2, channels or 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    x[0, 0, 0] = torch.tensor([0.0, 1.0, 0.0, 1.0])
    data.check_pixels(x.to(dtype), channels)
    if channels:
        n = Normalisation((0.3,) * channels, (0.2,) * channels)
        data.check_pixels(n.inverse(n(x.to(dtype))), channels)


@pytest.mark.parametrize("wrong", [torch.rand(2, 1, 8, 8), torch.rand(2, 4, 8, 8), torch.rand(8, 8), torch.rand(2, 3, 8, 8).byte()])
def test_a_normalisation_broadcasts_nothing(wrong):
    one_line(lambda: CIFAR.normalisation(wrong), error=InvalidImage)
    one_line(lambda: CIFAR.normalisation.inverse(wrong), error=InvalidImage)
    if wrong.shape != (2, 1, 8, 8): one_line(lambda: FORMATS["mnist"].normalisation(wrong), error=InvalidImage)


@pytest.mark.parametrize("mean, std", [((0.5,), (0.0,)), ((0.5, 0.5), (0.2,)), ((), ()), ((float("nan"),), (0.2,)), ((0.5,), (-1.0,))])
def test_a_normalisation_that_cannot_be_inverted_is_refused(mean, std): one_line(lambda: Normalisation(mean, std), "deviation")


def saved(path, image, **how):
    image.save(path, **how)
    return path


def test_a_strip_and_floating_point_pixels_are_one_line(tmp_path):
    strip = saved(tmp_path / "strip.png", Image.new("RGB", (60_000, 1)))
    one_line(lambda: read_image(strip, FORMATS["imagenet"]), "60000 × 1", "strip.png", error=InvalidImage)
    float_tiff = saved(tmp_path / "f.tiff", Image.fromarray(np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)))
    one_line(lambda: read_image(float_tiff, CIFAR), "floating-point", "8 or 16 bits", error=InvalidImage)
    assert read_image(saved(tmp_path / "pano.png", Image.new("L", (640, 20), 255)), CIFAR).min() == 1   # 32 : 1 is a panorama


LIMITED = """
import resource, sys
import torch
from april_nb.data import FORMATS, read_image
from april_nb.vit import InvalidImage
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20,) * 2)
try: read_image(sys.argv[1], FORMATS["imagenet"])
except InvalidImage as error: print(error)
else: print("read")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
@pytest.mark.parametrize("size, word", [((60_000, 1), "strip"), ((1, 60_000), "strip"), ((9600, 9600), "more than 89 million"),
                                        ((9400, 9400), "not enough memory"), ((1000, 800), "read")])
def test_large_pictures_under_a_memory_limit_are_read_or_are_one_line(tmp_path, size, word):
    Image.new("RGB", size).save(tmp_path / "a.png", compress_level=1)
    run = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path / "a.png")], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and word in run.stdout and run.stdout.count("\n") == 1, run.stderr
    assert run.stderr == ""   # no warning of Pillow's either


@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "tiff", "bmp", "webp", "ppm", "avif"])
@given(share=st.floats(0, 0.98), junk=st.binary(max_size=4))
def test_a_damaged_picture_is_one_line(tmp_path_factory, ending, share, junk):
    if ending in ("webp", "avif") and not features.check(ending): pytest.skip(f"this Pillow has no {ending}")
    folder = tmp_path_factory.mktemp("damaged")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    whole = saved(folder / f"a.{ending}", Image.fromarray(pixels)).read_bytes()
    (folder / f"b.{ending}").write_bytes(whole[:int(share * len(whole))] + junk)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try: x = read_image(folder / f"b.{ending}", CIFAR)   # some formats survive a cut
        except InvalidImage as error: assert "\n" not in str(error) and f"b.{ending}" in str(error)
        else: assert x.shape == (3, 32, 32) and 0 <= x.min() and x.max() <= 1


def mnist(folder, images=b"", labels=b"", squeeze=gzip.compress):
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "t10k-images-idx3-ubyte.gz").write_bytes(squeeze(images))
    (raw / "t10k-labels-idx1-ubyte.gz").write_bytes(squeeze(labels))
    return folder


def idx(*sizes, kind=8): return b"\0\0" + bytes([kind, len(sizes)]) + b"".join(s.to_bytes(4, "big") for s in sizes)


THREE = idx(3, 28, 28) + bytes(range(256)) * 9 + bytes(48), idx(3) + bytes([1, 2, 3])


def test_a_whole_mnist_archive_is_read(tmp_path):
    images = load("mnist", mnist(tmp_path, *THREE))
    assert len(images) == 3 and images[2][1] == 3 and images[0][0].shape == (1, 28, 28)


@pytest.mark.parametrize("images, labels, squeeze", [
    (*THREE, lambda b: gzip.compress(b)[:-20]), (*THREE, lambda b: gzip.compress(b)[:12]), (*THREE, lambda b: b),
    (*THREE, lambda b: gzip.compress(b)[:30] + b"\xff" * 8 + gzip.compress(b)[38:]), (THREE[0][:-1], THREE[1], gzip.compress),
    (THREE[0], THREE[1][:-1], gzip.compress), (THREE[0], idx(2) + bytes(2), gzip.compress), (b"", b"", gzip.compress),
    (idx(3, 14, 56) + THREE[0][16:], THREE[1], gzip.compress), (THREE[0][:13], THREE[1], gzip.compress), (THREE[0], THREE[1][:5], gzip.compress)],
    ids=["cut", "cut early", "not gzip", "corrupt", "a pixel short", "a label short", "fewer labels", "empty", "other shape", "header cut", "labels' header cut"])
def test_a_damaged_mnist_archive_is_one_line(tmp_path, images, labels, squeeze):
    one_line(lambda: load("mnist", mnist(tmp_path, images, labels, squeeze)), "mnist", "damaged", error=DataMissing)


@pytest.mark.parametrize("read, words", [
    (load_update, ["cannot read an update", "safetensors.torch.save_file(gradients, path) writes one"]),
    (lambda path: named_model("vit_mnist", path), ["cannot load weights", "safetensors.torch.save_file(model.state_dict(), path) writes one"])])
def test_a_checkpoint_in_the_place_of_a_safetensors_file_is_told_the_cure(tmp_path, read, words):
    torch.save(MODEL.state_dict(), path := tmp_path / "u.pth")
    one_line(lambda: read(path), "no safetensors file", "u.pth", *words)


def test_a_folder_is_no_update_and_a_missing_one_takes_none(tmp_path):
    update = Update({"w": torch.ones(2)})
    one_line(lambda: load_update(tmp_path), "cannot read an update", "it is a folder")
    one_line(lambda: save_update(update, tmp_path / "none" / "u.safetensors"), "cannot write an update", "No such file or directory")
    assert not list(tmp_path.iterdir())


SIZES = dict(image_size=8, channels=3, patch=4, width=12, depth=2, heads=3, mlp_width=24, classes=10)


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "4", None, float("nan")], ids=repr)
@pytest.mark.parametrize("name", [*SIZES, "mlp_gelus"])
def test_sizes_of_which_no_model_can_be_built_are_one_line(name, size):
    one_line(lambda: ViT("B", **SIZES | {name: size}), name, "whole number")
    one_line(lambda: vit("vit_cifar", **{name: size}), name, "whole number")


@pytest.mark.parametrize("dropout", [-0.1, 1.5, float("nan")])
def test_dropout_is_a_probability(dropout): one_line(lambda: vit("vit_cifar", dropout=dropout), "dropout", "probability")


def test_positions_are_guessed_from_a_known_initialisation():
    one_line(lambda: guess_positions(MODEL, "xavier"), "unknown initialisation 'xavier': choose from torch, timm")


A = torch.rand(3, 3, 8, 8)


@pytest.mark.parametrize("score", [metrics.mse, metrics.psnr, metrics.ssim, metrics.best_assignment,
                                   lambda a, b: metrics.scores(a, b, CIFAR.normalisation)], ids=["mse", "psnr", "ssim", "assignment", "scores"])
@pytest.mark.parametrize("a, b, words", [(A, A[:1], ["(1, 3, 8, 8)"]), (A[:, :1], A, ["(3, 1, 8, 8)"]), (A.byte(), A.byte(), ["uint8", "255"]),
                                         (A, A.long(), ["int64"]), (A[:0], A[:0], ["(0, 3, 8, 8)"]), (A.numpy(), A, ["ndarray"]),
                                         (A, A[0], ["(3, 8, 8)"])])
def test_scores_of_what_does_not_go_together_are_one_line(score, a, b, words): one_line(lambda: score(a, b), "cannot score", *words)


def test_scores_need_windows_channels_and_numbers():
    one_line(lambda: metrics.ssim(A[..., :5], A[..., :5]), "7 × 7")
    one_line(lambda: metrics.ssim(A[0], A[0]), "7 × 7")
    one_line(lambda: metrics.scores(A, A, FORMATS["mnist"].normalisation), "3 channel")
    one_line(lambda: metrics.scores(A, A * torch.nan, CIFAR.normalisation), "reference", "NaN")
    one_line(lambda: metrics.scores(A / 0, A, CIFAR.normalisation), "reconstruction", "infinite")
