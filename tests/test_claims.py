"""Sentences of the book that were once wrong, held to the rows and to the mathematics that they speak of."""
import csv
import json
import re
from pathlib import Path

import nbformat
import pytest
import torch

from april_nb.closed_form import closed_form
from april_nb.data import FORMATS, photos
from april_nb.experiments import Arm
from april_nb.runner import group, read_rows, select, values
from april_nb.federated import client_update
from april_nb.metrics import psnr
from april_nb.patch import patch_leakage
from april_nb.privacy import noise_for
from april_nb.subspace import subspace_leakage
from april_nb.vit import from_patches, to_patches, vit

ROOT = Path(__file__).resolve().parent.parent
ROWS = lambda experiment: read_rows(ROOT / "results" / f"{experiment}.csv")


def prose(chapter):
    """A chapter's text on one line."""
    cells = nbformat.read(ROOT / "nbs" / f"{chapter}.ipynb", 4).cells
    return " ".join(" ".join(c.source for c in cells if c.cell_type == "markdown").split())


@pytest.mark.parametrize("dtype, db, sentence", [
    ("bfloat16", 30, "bfloat16, with its 8 bits of precision, still returns {good} of {n} pictures at 30 dB or more"),
    ("bfloat16", 30, "The {short} that bfloat16 spoils go down to {lowest:.0f} dB"),
    ("float16", 50, "float16 {good} of {n} at 50 or more, and none below {lowest:.0f}")])
def test_chapter_11_counts_the_pictures_that_half_precision_spoils(dtype, db, sentence):
    some = [r for r in ROWS("closed_form") if r["config"] == "init=torch" and r["dtype"] == dtype
            and r["dataset"] in ("mnist", "cifar10")]
    p = values(some, "psnr")
    short = int((p < db).sum())
    assert sentence.format(good=len(p) - short, n=len(p), short=short, lowest=p.min().item() // 1) in prose("11_when_it_works")


def test_the_certificate_refuses_exactly_the_pictures_that_bfloat16_spoils():
    some = [r for r in ROWS("closed_form") if r["config"] == "init=torch" and r["dtype"] == "bfloat16"
            and r["dataset"] in ("mnist", "cifar10")]
    spoilt = {(r["dataset"], r["image_id"]) for r in some if r["psnr"] < 30}
    assert spoilt == {(r["dataset"], r["image_id"]) for r in some if r["verdict"] == "not-unique"} and len(spoilt) == 27
    assert "it refuses each of the 27, and no other" in prose("11_when_it_works")


def test_chapter_11_counts_false_alarms():
    some = select(ROWS("closed_form"), dataset="mnist", config="init=timm", dtype="float32")
    alarms = [r for r in some if r["verdict"] == "not-unique" and r["psnr"] >= 25]
    assert f"{len(alarms)} of {len(some)} digits sent in float32" in prose("11_when_it_works")


def test_chapter_11_leaves_no_answer_out_silently():
    text = (ROOT / "nbs" / "11_when_it_works.ipynb").read_text(encoding="utf-8")
    foretold, = re.findall(r'"(\d+) attacks: true minus foretold', text)
    left_out, all_of_them = re.findall(r"(\d+) of (\d+) answers have no foretold error", text)[-1]
    assert int(foretold) + int(left_out) == int(all_of_them)
    half, all_within = re.findall(r"half of them within ([\d.]+) dB.*?all within (\d+) dB", text)[-1]
    assert all_within == "18" and "within the eighteen printed above" in text
    back = (ROOT / "back" / "results.md").read_text(encoding="utf-8")
    assert f"{foretold} of {all_of_them} attacks from 0 to 290 dB; the other {left_out} are called not unique | half within {half} dB, all within {all_within} |" in back


def batch_answer(width, patch=8):
    """What Algorithm 1 returns for a batch of two, and the matrix average of the two images' patches."""
    model = vit("vit_cifar", "A", width=width, patch=patch).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1])
    G = torch.stack([client_update(model, a[None], b[None])["positions"][1:] for a, b in zip(x, y)])
    M = torch.linalg.pinv(G.mean(0).mT) @ G.mT / 2
    returned = to_patches(closed_form(model, client_update(model, x, y)).images, patch)[0]
    return returned, (M @ to_patches(x, patch)).sum(0), model.patch.weight.detach()


def test_a_batch_comes_back_as_a_matrix_average_only_if_the_patch_embedding_has_full_rank():
    returned, average, W = batch_answer(384)
    torch.testing.assert_close(returned, average, rtol=1e-6, atol=1e-6)
    returned, average, W = batch_answer(128)   # C < D = 192
    assert (returned - average).norm() > 0.1 * average.norm()
    torch.testing.assert_close(returned, average @ torch.linalg.pinv(W) @ W, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("arch", "AB")
def test_of_four_patches_larger_than_a_token_theorem_3_has_every_pixel_and_algorithm_1_has_not(arch):
    model, n, x = vit("vit_cifar", arch, patch=16), FORMATS["cifar10"].normalisation, photos(FORMATS["cifar10"]).batch([0])[0]
    update = client_update(model, n(x).float(), torch.tensor([3]))
    answer = patch_leakage(model, update)
    assert model.patch.weight.shape == (384, 768) and answer.verdict == "exact"
    assert psnr(n.inverse(answer.images), x).item() > 140
    if arch == "A": assert psnr(n.inverse(closed_form(model, update).images), x).item() < 25
    assert "Algorithm 1 could not return them exactly" in prose("02_vit") and "[Theorem 3](20_patch.ipynb) could" in prose("02_vit")


def test_the_images_of_the_experiments_have_official_indices():
    named = {d: list(csv.DictReader(open(ROOT / "results" / "images" / f"{d}.csv"))) for d in ("mnist", "cifar10", "imagenet")}
    ids = {d: {int(r["image_id"]) for r in rows} for d, rows in named.items()}
    for path in (ROOT / "results").glob("*.csv"):
        for row in read_rows(path):
            if path.stem == "tuning" and row["dataset"] == "mnist":   # from the end of the whole test set, apart from the 500
                assert row["image_id"] not in ids["mnist"] and row["image_id"] < 10_000
            elif "image_id" in row and row["dataset"] in ids: assert row["image_id"] in ids[row["dataset"]], (path.name, row)
    for d, rows in named.items():
        assert len(rows) == len(ids[d]) == len({r["official"] for r in rows}) == len({r["sha256"] for r in rows}) == 500
    assert all(r["image_id"] == r["official"] for r in named["mnist"])
    for some in group(named["cifar10"], "label").values():   # the first fifty of each class, in the test set's order
        assert len(some) == 50 and [int(r["official"]) for r in some] == sorted(int(r["official"]) for r in some)


def test_chapter_11_sees_all_eight_photographs_through_a_narrow_model():
    text, said = outputs("11_when_it_works"), prose("11_when_it_works")
    seen = {width: table_row(text, width, "8") for width in ("384", "192", "96")}
    assert [row[-1] for row in seen.values()] == ["8", "8", "0"]
    lowest = {width: row[1].split(", ")[1].split(" to ")[0] for width, row in seen.items()}
    assert f"come back clear, at {lowest['384']} dB and more; at 192" in said and f"shows its subject, at {lowest['192']}" in said


GRID = ("0.1", "0.3", "1.0", "2.0")


def at_rates(dataset, method):
    """Median errors on the tuning images by learning rate, everything else as in Table 1; four images each."""
    errors = {}
    for lr in GRID:
        config = Arm(dataset, "B", method, attack={"lr": float(lr)}).config()
        some = select(ROWS("tuning"), dataset=dataset, method=method, arch="B", config=config)
        assert len(some) in (0, 4)
        if some: errors[lr] = values(some, "mse").quantile(0.5).item()
    return errors


def test_chapter_15_ranks_dlg_and_april_by_the_same_grid_of_rates():
    for dataset in ("mnist", "cifar10"):
        assert set(at_rates(dataset, "dlg")) == set(at_rates(dataset, "april")) == set(GRID)
    best = {m: min(at_rates("cifar10", m).items(), key=lambda pair: pair[1]) for m in ("tag", "ig", "april", "dlg")}
    assert {m: lr for m, (lr, _) in best.items()} == {"tag": "0.3", "ig": "1.0", "april": "1.0", "dlg": "1.0"}
    errors = [e for _, e in best.values()]
    assert errors == sorted(errors) and errors[0] * 5e4 < errors[1]
    assert "the order is the table's: TAG, IG, APRIL, DLG" in prose("15_table1")


def test_chapter_15_finds_april_level_with_tag_on_mnist_at_another_rate():
    april = at_rates("mnist", "april")
    tag, = (values(select(ROWS("table1"), dataset="mnist", method="tag", settings="paper"), "mse").quantile(q).item() for q in (0.5,))
    assert min(april, key=april.get) == "2.0" and april["2.0"] < 5 * tag < april["1.0"] / 1000
    text = prose("15_table1")
    assert r"APRIL comes to $4 \cdot 10^{-11}$" in text and f"{april['2.0']:.0e}" == "4e-11" and "All four were tuned" not in text


def test_chapter_16_counts_attacks_where_it_counted_images():
    text = outputs("16_batches")
    for (config, labels), some in group(ROWS("fig4"), "config", "labels").items():
        batch = int(re.search(r"batch=(\d+)", config)[1])
        how = ("L-BFGS", "squared") if "lbfgs" in config else ("Adam", "APRIL")
        attacks = len({r["loss"] for r in some})
        assert attacks == len(some) // batch and (attacks == 8 or labels == "known")
        assert table_row(text, str(batch), *how, labels)[0] == str(attacks)


def test_chapters_16_and_22_say_what_l_bfgs_in_pixels_makes_of_batches_and_of_how_many():
    some = {B: [r for r in ROWS("fig4") if f"batch={B} " in r["config"] and "lbfgs" in r["config"]] for B in (2, 4, 8)}
    db = [f"{values(rows, 'psnr').quantile(0.5):.0f}" for rows in some.values()]
    assert "comes to {}, {} and {} dB for two, four and eight images".format(*db) in prose("22_separation")
    like = [r for r in ROWS("batches") if "batch=4 classes=distinct" in r["config"] and r["steps"] == 300]
    span, pixels = ([r for r in like if r["method"] == method] for method in ("separate", "dlg"))
    assert {r["image_id"] for r in span} == {r["image_id"] for r in pixels} and len(pixels) == len(span) == 40
    medians = [values(some, "psnr").quantile(0.5).item() for some in (pixels, span)]
    assert medians[0] + 30 < medians[1] and "pixels: median {:.0f} dB".format(medians[0]) in outputs("22_separation")
    assert "span: median {:.0f} dB".format(medians[1]) in outputs("22_separation")
    words = {1: "one", 8: "eight"}
    assert "{} pairs, {} batches of four and {} of eight".format(*(words[len(some[B]) // B] for B in some)) in prose("16_batches")


def test_theorem_6_brings_back_pairs_of_digits_that_theorem_5_leaves_out():
    def whole(experiment, init):
        some = [r for r in ROWS(experiment) if r["dataset"] == "mnist" and f"init={init} " in r["config"]]
        pairs = {min(r["image_id"] for r in pair): min(r["psnr"] for r in pair) for pair in group(some, "loss").values()}
        return {pair for pair, p in pairs.items() if p >= 50}, set(pairs)
    missing, back = 0, 0
    for init in ("torch", "timm"):
        (by_places, pairs), (by_tokens, same) = whole("spans", init), whole("secret", init)
        assert pairs == same and len(pairs) == 10
        missing, back = missing + len(pairs - by_places), back + len(by_tokens - by_places)
    assert (missing, back) == (8, 6) and "has six of these eight pairs" in prose("23_spans")


def test_without_positions_every_order_of_the_patches_has_the_same_update():
    model = vit("vit_cifar", "B", positions="none").double()
    g = torch.Generator().manual_seed(0)
    X = to_patches(torch.randn(1, 3, 32, 32, dtype=torch.double, generator=g), 8)
    shuffled = X[:, torch.randperm(16, generator=g)]
    assert not torch.equal(X, shuffled)
    a, b = (client_update(model, from_patches(p, 8, 32, 32), torch.tensor([3])).gradients for p in (X, shuffled))
    assert a.keys() == b.keys() and "positions" not in a
    for name in a: torch.testing.assert_close(a[name], b[name], rtol=1e-8, atol=1e-12)


def read_after_a_step_at_home(init):
    """PSNR of Theorem 4 with the first table, after one step of Adam (η = 0.001) by which the client moved its own."""
    first, client = vit("vit_cifar", "B", init), vit("vit_cifar", "B", init)
    x, y = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([3])
    step = torch.optim.Adam([client.positions], lr=1e-3)
    client.positions.grad = client_update(client, x, y)["positions"]
    step.step()
    answer = subspace_leakage(first, client_update(client, x, y, withheld=("positions",)))
    return psnr(answer.images, x.double()).item()


def test_how_secret_a_table_trained_at_home_is_depends_on_how_large_it_was():
    assert read_after_a_step_at_home("torch") > 20 + read_after_a_step_at_home("timm")
    text = prose("19_positions")
    assert "updating $\\nabla E_{pos}$ only on local client without transmission" in text
    assert "must have been of the third kind" not in text


def test_the_chapter_on_convergence_reads_its_bound_as_an_upper_bound():
    text = prose("35_convergence")
    assert "no number of steps goes below" not in text and "It is an upper bound" in text
    assert "does not fall with the number of steps, and where every client must guard itself against the server it is $\\sqrt n$ times as high" in text


def test_the_mean_of_local_noises_is_larger_than_one_central_noise_by_the_root_of_the_crowd():
    n, T, S = 64, 10, 1.0
    z = noise_for(1.0, 1e-5, T)
    central = z * 2 * S / n                       # on the mean, by a trusted server: Δ = 2S / n
    g = torch.Generator().manual_seed(0)
    each = z * 2 * S * torch.randn(n, 100_000, dtype=torch.double, generator=g)   # Δ = 2S for what a client sends
    assert each.mean(0).std().item() == pytest.approx(n ** 0.5 * central, rel=0.02)


def outputs(chapter):
    """What a chapter's cells printed, with its tables."""
    cells = nbformat.read(ROOT / "nbs" / f"{chapter}.ipynb", 4).cells
    found = [o for c in cells if c.cell_type == "code" for o in c.outputs]
    return "\n".join(o.get("text", "") or o.get("data", {}).get("text/markdown", "") for o in found)


def table_row(text, *start):
    """The cells behind the first row of a table that begins with the given ones."""
    line = next(line for line in text.splitlines() if line.startswith("| " + " | ".join(start) + " |"))
    return [cell.strip() for cell in line.strip("|").split("|")][len(start):]


def test_chapter_17_says_what_expecting_noise_is_worth():
    text, said = outputs("17_defenses"), prose("17_defenses")
    naive, aware = (int(table_row(text, "vit_b_16", solver)[2]) for solver in ("least squares", "expecting noise"))   # n, 10⁻⁵, 10⁻⁴
    assert f"gains {aware - naive} dB at $r = 10^{{-4}}$" in said
    ends = dict(re.findall(r"vit_b_16, (.*): the median falls below 20 dB at r = (\S+)", text))
    assert ends == {"least squares": "5e-05", "expecting noise": "0.003"}
    assert "$3 \\cdot 10^{-3}$ in place of $5 \\cdot 10^{-5}$" in said and "sixty times as much" in said


def test_chapter_17_draws_its_line_where_hardly_a_blind_guess_gets_and_ssim_agrees():
    text = outputs("17_defenses")
    blind = [int(table_row(text, name)[-1]) for name in ("mnist", "cifar10", "imagenet")]
    assert blind == [0, 1, 1]
    rows = ROWS("fig6") + ROWS("defenses")
    pairs = [(r["psnr"] >= 20, r["ssim"] >= 0.5) for r in rows]
    by_psnr, by_ssim = pairs.count((True, False)), pairs.count((False, True))
    assert f"of {len(rows)} rows fall on the same side" in text
    assert f"{by_psnr} are pictures by PSNR only, {by_ssim} by SSIM only" in text
    assert (by_psnr + by_ssim) / len(rows) < 0.1 and 0.85 < by_ssim / (by_psnr + by_ssim) < 0.95   # "nine rows of ten", "nine times in ten"


def test_chapter_17_counts_who_is_known_again_below_20_db():
    text = outputs("17_defenses").split("known again")[-1]
    def cells(model): return [tuple(cell.split(", ")) for cell in table_row(text, model, "least squares")[2:]]   # behind n, among
    (p1, _, mnist), (p2, _, cifar), (p3, _, large) = cells("vit_mnist")[2], cells("vit_cifar")[2], cells("vit_b_16")[0]
    assert (p1, mnist, p2, cifar, p3, large) == ("12", "20", "9", "20", "-25", "8")
    last = [int(cells(model)[-1][2]) for model in ("vit_mnist", "vit_cifar", "vit_b_16")]
    assert sum(last) <= 2


def test_chapter_27_names_both_things_that_deit_small_lacks_for_theorem_4():
    report = json.loads((ROOT / "results" / "audits" / "timm-deit_small_patch16_224.json").read_text(encoding="utf-8"))
    solved = {s["name"]: s for a in report["attacks"] if a["name"] == "subspace" for s in a["systems"]}
    left, unknowns = report["sizes"]["C"] - report["sizes"]["P"] - 1, solved["patches"]["rank"]
    assert f"show only {solved['tokens']['rank']} directions of the {solved['tokens']['expected_rank']} tokens" in prose("27_models")
    assert left < unknowns and f"$C - T = {left}$ equations" in prose("27_models") and f"are {unknowns} unknowns" in prose("27_models")


def test_float64_gives_deit_small_all_its_tokens_and_no_unique_answer():
    timm, photo = pytest.importorskip("timm"), FORMATS["imagenet"].normalisation(photos().batch([0])[0]).double()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("deit_small_patch16_224").double()
    answer = subspace_leakage(model, client_update(model, photo, torch.tensor([0])))
    systems = {s.name: s for s in answer.systems}
    assert systems["tokens"].unique and not systems["subspace"].unique and answer.verdict == "not-unique"


CASES_12 = ["untrained, PyTorch", "untrained, timm", "trained badly, new images", "trained badly, seen images",
            "trained well, new images", "trained well, seen images"]


@pytest.mark.parametrize("case", CASES_12)
def test_chapter_12_finds_yin_at_its_own_ceiling_for_32_labels_whatever_the_model(case):
    row = {rule: table_row(outputs("12_labels"), case, rule) for rule in ("Yin et al.", "Yin et al.'s ceiling")}
    assert row["Yin et al."][-1] == row["Yin et al.'s ceiling"][-1] and float(row["Yin et al."][-1]) <= 10 / 32


@pytest.mark.parametrize("case", CASES_12[4:])
def test_chapter_12_admits_that_on_a_well_trained_model_its_rule_is_hardly_a_guess(case):
    text = outputs("12_labels")
    ours, guess = ([float(share) for share in table_row(text, case, rule)] for rule in ("ours", "guess"))
    assert ours[0] == 1 and all(abs(a - b) < 0.1 for a, b in zip(ours[3:], guess[3:])) and ours[-1] < guess[-1]
    assert float(table_row(text, case)[-1]) > 0.93 and float(table_row(text, "trained badly, new images")[-1]) < 0.25
