"""The table of results, back/results.md, says what the rows say: numbers that are typed there are computed here."""
import re
from pathlib import Path

import pytest

from april_nb.runner import group, read_rows, select, values

ROOT = Path(__file__).resolve().parent.parent
LINES = [line.split(" | ") for line in (ROOT / "back" / "results.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
DATA = ("mnist", "cifar10", "imagenet")


def rows(experiment, **columns): return select(read_rows(ROOT / "results" / f"{experiment}.csv"), **columns)


def mid(some, column="psnr"): return f"{values(some, column).quantile(0.5).item():.0f}"


def least(some): return f"{values(some, 'psnr').min():.0f}"


def result(start):
    """What the one line that begins so gives as the result."""
    line, = (line for line in LINES if line[0].removeprefix("| ").startswith(start))
    return line[1]


@pytest.mark.parametrize("experiment, columns, line", [
    ("closed_form", dict(dtype="float32", config="init=timm"), "… with timm's initialisation | "),
    ("patch", dict(arch="B", config="init=torch"), "Theorem 3 on architecture B"),
    ("patch", dict(arch="B", config="init=timm"), "… with timm's initialisation (n = 50"),
    ("patch", dict(arch="A", config="init=torch"), "… on architecture A, 500 images"),
    ("patch", dict(arch="A", config="init=timm"), "… on architecture A, 500 images")])
def test_closed_forms_on_three_data_sets(experiment, columns, line):
    parts = [rows(experiment, dataset=d, **columns) for d in DATA]
    said = next(" | ".join(c) for c in LINES if " | ".join(c).removeprefix("| ").startswith(line))
    a, b, c = map(mid, parts)
    assert f"{a}, {b} and {c} dB" in said
    if experiment == "patch": assert "lowest {}, {} and {}".format(*map(least, parts)) in said


def test_theorem_4():
    median = lambda **columns: mid(rows("subspace", dataset="cifar10", method="subspace", **columns))
    assert f"{median(positions='normal', dtype='float64')} / {median(positions='normal', dtype='float32')} dB" in result("Theorem 4, position")
    searched = rows("subspace", dataset="cifar10", method="refine")
    assert (f"{median(positions='sincos1d', dtype='float64')} / {median(positions='sincos1d', dtype='float32')} (`not-unique`) / "
            f"{mid([r for r in searched if r['steps'] == max(s['steps'] for s in searched)])} dB") in result("… one-dimensional")


def test_batches_by_matching():
    restored = rows("fig4", labels="restored")
    of = lambda size, how: [r for r in restored if f"batch={size} " in r["config"] and how in r["config"]]
    for how in ("adam", "lbfgs"): assert " / ".join(mid(of(size, how)) for size in (2, 4, 8)) + " dB" in result("Fig. 4")
    runs = [len(of(size, how)) // size for how in ("adam", "lbfgs") for size in (2, 4, 8)]
    assert "({}, {} and {} attacks by Adam, {}, {} and {} by L-BFGS)".format(*runs) in next(line[0] for line in LINES if line[0].startswith("| Fig. 4"))


def best(spec, positions="learned"):
    """The median of the attack that reads most from one image behind a defence."""
    of = lambda r: (re.findall(r"defense=(\S+)", r["config"]) or [""])[0]
    some = [r for r in rows("defenses", positions=positions) if "batch=" not in r["config"] and of(r) == spec]
    return max(group(some, "method", "config").values(), key=lambda one: values(one, "psnr").quantile(0.5).item())


def test_photographs_on_a_smaller_model_come_back_by_search():
    some = group(rows("table1-b32"), "method")
    means = ", ".join(f"{name} {values(some[m,], 'mse').mean():.2g}" for m, name in (("dlg", "DLG"), ("ig", "IG"), ("tag", "TAG"), ("april", "APRIL")))
    assert set(some) == {("dlg",), ("ig",), ("tag",), ("april",)}
    assert result("… ImageNet, two photographs on a ViT-B/32") == f"mean MSE: {means}"
    assert all(len(pair) == 2 and {r["steps"] for r in pair} == {5000} for pair in some.values())


def test_defences_are_held_against_the_best_attack():
    noise = ("clip:1", "gaussian:0.01*rms", "gaussian:0.1*rms", "gaussian:1*rms", "quantize:8")
    assert result("Every attack on every defence") == " / ".join(mid(best(spec)) for spec in noise) + " dB"
    kept = ["+".join(f"withhold:{part}" for part in parts) for parts in (
        ["positions"], ["positions", "patch"], ["positions", "patch", "block"], ["body"])]
    fixed, unknown = best("", "sincos2d"), best("", "learned/secret")
    assert result("… after withholding") == (" / ".join(mid(best(spec)) for spec in kept)
                                             + f" dB; {mid(fixed)} (Theorem 5, n = {len(fixed)}); {mid(unknown)} "
                                             f"(Theorem 6, n = {len(unknown)}; with the patches in the order of their edges)")
    assert fixed[0]["method"] == "spans" and unknown[0]["method"] == "secret"


def test_batches_image_by_image():
    def whole(config, dataset="cifar10"):
        some = group(rows("spans", dataset=dataset, dtype="float32", config=f"init={config}"), "loss").values()
        found = [min(values(one, "psnr")).item() for one in some if values(one, "psnr").min() >= 50]
        return len(some), len(found), f"{min(found):.0f}"
    fresh = ["batch=2 classes=pair restarts=10", "batch=4 classes=random restarts=10", "batch=8 classes=random restarts=10"]
    torch_, timm = ([whole(f"{init} {how}") for how in fresh] for init in ("torch", "timm"))
    longer = [whole(f"timm {fresh[0]} epochs={e}") for e in (5, 20, 40)]
    ended, mnist = whole(f"torch {fresh[0]} epochs=40"), whole(f"torch {fresh[0]} epochs=12", "mnist")
    assert all(one[0] == 10 for one in [*torch_, *timm, *longer, ended, mnist])
    counts, lows = (lambda some: ", ".join(str(n) for _, n, _ in some)), (lambda some: " / ".join(p for _, _, p in some))
    assert f"lowest {lows(torch_)} dB" in result("**Theorem 5**") and counts(torch_) == "10, 10, 10"
    assert (f"{counts(timm)}; {counts(longer)}; {ended[1]}; and {mnist[1]} of ten whole. Lowest image of the whole batches "
            f"{lows(timm)}; {lows(longer)}; {ended[2]}; and {mnist[2]} dB") in result("… timm's weights")
    eights = group(rows("spans", dataset="cifar10", dtype="float32", config=f"init=timm {fresh[2]}"), "loss").values()
    sharp = sum(values(one, "psnr").min() >= 90 for one in eights)
    assert f"eight with timm's weights: {sharp} of ten at 90 dB and more" in result("… timm's weights")
    count = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
    for name, dataset, how in (("… one batch of four photographs", "photos", "torch batch=4 classes=distinct restarts=10 patch=32"),
                               ("… five batches of four", "imagenet", "torch batch=4 classes=random restarts=10 patch=32"),
                               ("… five batches of eight", "imagenet", "torch batch=8 classes=random restarts=10 patch=32"),
                               ("… four pairs of ImageNet photographs on a ViT-B/32 with timm", "imagenet",
                                "timm batch=2 classes=random restarts=10 patch=32 qkv_bias=True"),
                               ("… two pairs of ImageNet photographs on a ViT-B/16", "imagenet", "torch batch=2 classes=random restarts=10"),
                               ("… one batch of four ImageNet photographs on a ViT-B/32 with timm", "imagenet",
                                "timm batch=4 classes=random restarts=10 patch=32 qkv_bias=True"),
                               ("… one batch of four ImageNet photographs on a ViT-B/32 with torchvision", "imagenet",
                                "torchvision batch=4 classes=random restarts=10 patch=32 qkv_bias=True"),
                               ("… five pairs of ImageNet photographs on a ViT-B/32 with torchvision", "imagenet",
                                "torchvision batch=2 classes=random restarts=10 patch=32 qkv_bias=True")):
        some, found, lowest = whole(how, dataset)
        assert some == found == count[name.split()[1]] and f"lowest {lowest} dB" in result(name)


def test_batches_by_tokens_that_are_asked_for_no_place():
    def whole(experiment, dataset, init, epochs):
        config = f"init={init} batch=2 classes=pair" + " restarts=10" * (experiment == "spans") + f" epochs={epochs}"
        some = group(rows(experiment, dataset=dataset, dtype="float32", config=config), "loss").values()
        assert len(some) == 10
        return {min(r["image_id"] for r in one): values(one, "psnr").min().item() for one in some if values(one, "psnr").min() >= 50}
    said = [("mnist", "torch", 12), ("mnist", "timm", 12), ("cifar10", "timm", 5)]
    found, others = ([whole(experiment, *one) for one in said] for experiment in ("secret", "spans"))
    three = "{} / {}; and {}".format
    assert (three(*map(len, found)) + " of ten whole, with Theorem 5's " + three(*(len(a.keys() | b.keys()) for a, b in zip(found, others)))
            + ". Lowest image of its whole batches " + three(*(f"{min(one.values()):.0f}" for one in found)) + " dB") == result("… **Theorem 6**")


def test_batches_from_trained_models_and_from_noisy_updates():
    def whole(config, dataset="cifar10", dtype="float32"):
        some = group(rows("spans", dataset=dataset, dtype=dtype, config=f"init={config}"), "loss").values()
        found = [values(one, "psnr").min().item() for one in some if values(one, "psnr").min() >= 50]
        return len(some), str(len(found)), f"{min(found, default=0):.0f}"
    pair = "batch=2 classes=pair restarts=10"
    early = [whole(f"torch {pair} epochs={e}") for e in (1, 5, 20)]
    timm, digits = whole(f"timm {pair} epochs=1"), whole(f"timm {pair} epochs=12", "mnist")
    assert all(one[0] == 10 for one in (*early, timm, digits))
    of = lambda i: f"{' / '.join(one[i] for one in early)}; {timm[i]}; and {digits[i]}"
    assert result("… other trained models") == f"{of(1)} of ten whole. Lowest image of the whole batches {of(2)} dB"
    rough = [whole(f"torch {pair}", dtype="float16"), *(whole(f"torch {pair} defense=gaussian:{σ}*rms") for σ in ("0.0001", "0.001"))]
    assert [one[0] for one in rough] == [5, 5, 5]
    assert result("… two of one class, float16") == (f"{' / '.join(one[1] for one in rough)} whole, `approximate`. "
                                                     f"Lowest image of the whole batches {rough[0][2]} / {rough[1][2]} dB")


def test_trainings():
    last = lambda some, what: [r for r in some if r[what] == max(s[what] for s in some)]
    share = lambda some: 100 * values(some, "accuracy").mean().item()
    noisy = last([r for r in rows("sgd-noise") if "lr=2.0" in r["config"]], "step")
    of = [[r for r in noisy if r["noise"] == z] for z in (0, 1, 2, 4)]
    assert result("DP-SGD") == (" / ".join(f"{share(some):.0f}" for some in of) + " %, ε = ∞ / "
                                + " / ".join(f"{some[0]['epsilon']:.1f}" for some in of[1:]))
    kinds = [last(rows("positions", positions=kind), "epoch") for kind in ("learned", "normal", "sincos1d", "sincos2d", "none")]
    assert result("Fixed positions, MNIST") == "accuracy " + " / ".join(f"{share(some):.1f}" for some in kinds) + " %"
