"""The command line, through a subprocess as a person would use it."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from PIL import Image

import april_nb
from april_nb import cli, experiments, runner
from april_nb.attacks import ATTACKS

APRIL = Path(sys.executable).parent / "april"


def april(*args, **kwargs):
    return subprocess.run([APRIL, *map(str, args)], capture_output=True, text=True, timeout=300, **kwargs)


def report(*args):
    run = april("attack", *args, "--json")
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


FIELDS = {"model", "arch", "method", "init", "positions", "know", "dtype", "seed", "seconds", "verdict", "psnr", "mse", "ssim",
          "images", "systems"}


def test_the_default_job_recovers_a_bundled_photo_from_vit_b_16(tmp_path):
    r = report("--out", tmp_path / "attack.png")
    assert FIELDS <= set(r) and (r["model"], r["arch"], r["method"], r["dtype"]) == ("vit_b_16", "A", "patch", "float32")
    assert "least error" in r["why"] and r["weights"] == "random" and not r["remarks"]
    assert r["psnr"] > 90 and r["verdict"] in ("exact", "approximate")
    assert abs(r["foretold_psnr"] - r["psnr"]) < 10
    assert set(r["images"][0]) == {"psnr", "mse", "ssim", "label"}
    assert [set(s) for s in r["systems"]] == [{"name", "rank", "expected_rank", "condition_number", "relative_residual"}]
    assert Image.open(tmp_path / "attack.png").width > 500 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("model, dtype, least", [("vit_cifar", "float32", 100), ("vit_cifar", "float64", 250),
                                                  ("vit_mnist", "float32", 100), ("vit_mnist", "float64", 250)])
def test_small_models_give_any_photo_away(tmp_path, model, dtype, least):
    Image.effect_mandelbrot((90, 60), (-2, -1, 1, 1), 50).save(tmp_path / "m.png")
    r = report(tmp_path / "m.png", "--model", model, "--dtype", dtype, "--seed", 0, "--method", "closed-form")
    assert r["psnr"] >= least and r["verdict"] == "exact"


def test_several_images_are_one_clients_batch(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for i, path in enumerate(paths): Image.radial_gradient("L").rotate(30 * i).save(path)
    r = report(*paths, "--model", "vit_cifar", "--label", 1, "--label", 2, "--method", "closed-form")
    assert len(r["images"]) == 2 and r["verdict"] == "not-unique"


SMALL = "--model vit_cifar --method closed-form "
BAD = {  # what is wrong: arguments (in a folder with ok.png, half.png and notes.txt), and what the line must say
    "missing file": ("none.png", "no such image file"),
    "not an image": ("notes.txt", "not an image"),
    "damaged": ("half.png", "cannot read"),
    "a folder": (".", "cannot read"),
    "unknown model": ("--model vit_huge", "vit_huge"),
    "unknown architecture": ("--arch C", "'C'"),
    "unknown initialisation": ("--init zeros", "zeros"),
    "unknown method": ("--method magic", "magic"),
    "unknown option": ("--modle x", "No such option"),
    "architecture B": (SMALL + "--arch B", "needs architecture A.*Theorem 1.*dlg, ig, tag, april"),
    "no such class": (SMALL + "--label 10", "no class 10"),
    "fixed positions": (SMALL + "--positions normal", "fixed positions are not trained"),
    "withheld positions": (SMALL + "--know withheld", "'positions': the client withheld it"),
    "a batch to refine": ("--model vit_cifar --arch B --method refine ok.png ok.png", "take separate"),
    "april without positions": ("--model vit_cifar --arch B --method april --know withheld", "take dlg, ig or tag"),
    "a secret formula": (SMALL + "--positions sincos2d --know secret", "they are a formula"),
    "unknown positions": (SMALL + "--positions rotary", "rotary"),
    "unknown knowledge": (SMALL + "--know all", "'all'"),
    "labels and images differ": (SMALL + "ok.png --label 1 --label 2", "1 images but 2 labels"),
    "no such device": (SMALL + "--device warp", "no device 'warp'"),
    "no such folder": (SMALL + "--out none/a.png", "existing folder"),
    "not a picture's name": (SMALL + "--out a.txt", ".png"),
    "a device without numbers": (SMALL + "--device meta", "no device 'meta'"),
    "a seed beyond 64 bits": (SMALL + f"--seed {2 ** 70}", "seed"),
    "an architecture that is not ours": ("--model torchvision:vit_b_16 --arch B", "--arch has no effect"),
    "no model of a library": ("--model timm:vit_enormous", "vit_enormous"),
    "no such library": ("--model keras:vit", "keras:vit"),
    "no update": (SMALL + "--update none.safetensors", "none.safetensors"),
    "a defence of what was sent": (SMALL + "--update none.safetensors --defense clip:1", "--defense has no effect"),
    "no weights": (SMALL + "--weights none.safetensors", "none.safetensors"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, case):
    (tmp_path / "notes.txt").write_text("no image")
    Image.new("RGB", (200, 200)).save(tmp_path / "ok.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "ok.png").read_bytes()[:100])
    args, why = BAD[case]
    run = april("attack", *args.split(), cwd=tmp_path)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("april: ") and run.stderr.count("\n") == 1 and re.search(why, run.stderr), run.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["half.png", "notes.txt", "ok.png"]


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    resource = pytest.importorskip("resource")   # Windows has none
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    run = april("attack", "--model", "vit_cifar", "--out", tmp_path / "a.png", preexec_fn=full)
    assert run.returncode == 2 and run.stderr.startswith("april: ") and run.stderr.count("\n") == 1, run.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    def interrupted(model, updates, terms): raise KeyboardInterrupt
    monkeypatch.setitem(ATTACKS, "ridge", replace(ATTACKS["ridge"], run=interrupted))
    monkeypatch.setattr(sys, "argv", ["april", "attack", "--model", "vit_cifar", "--method", "ridge", "--out", str(tmp_path / "a.png")])
    with pytest.raises(SystemExit) as stop: cli.main()
    assert stop.value.code == 130 and "interrupted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_in_the_first_seconds_is_one_line():
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)   # a shell lets its background jobs ignore interruptions
    started = subprocess.Popen([APRIL, "attack"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    time.sleep(1.0)   # PyTorch is being loaded
    started.send_signal(signal.SIGINT)
    out, errors = started.communicate(timeout=60)
    assert (started.returncode, out) == (130, "") and errors.startswith("april: interrupted") and errors.count("\n") == 1, errors


def test_a_closed_pipe_is_one_line():
    started = subprocess.Popen([APRIL, "attack", "--model", "vit_mnist"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started.stdout.close()
    errors = started.stderr.read()
    assert started.wait(60) == 2 and errors.startswith("april: ") and errors.count("\n") == 1, errors


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("command", [["attack", "--model", "vit_mnist"], ["audit", "--model", "ours:vit_mnist", "--budget", "0"], ["attack", "--help"], ["--help"]])
def test_reports_print_on_narrow_streams(encoding, command):
    run = subprocess.run([APRIL, *command], capture_output=True, timeout=120, env=os.environ | {"PYTHONIOENCODING": encoding})
    assert run.returncode == 0 and run.stderr == b"" and len(run.stdout.decode(encoding)) > 200


def test_a_real_update_of_a_library_model_is_attacked_from_its_files(foreign_client):
    tmp_path = foreign_client
    r = report("--model", f"hf:{tmp_path}", "--weights", tmp_path / "weights.safetensors", "--update", tmp_path / "update.safetensors",
               "--out", tmp_path / "a.png")
    assert (r["method"], r["verdict"], r["psnr"], r["arch"]) == ("patch", "exact", None, None) and r["foretold_psnr"] > 80
    assert (tmp_path / "a.png").exists() and not r["remarks"]
    known = report(tmp_path / "x.png", "--model", f"hf:{tmp_path}", "--weights", tmp_path / "weights.safetensors", "--update",
                   tmp_path / "update.safetensors", "--method", "subspace")
    assert known["psnr"] > 20 and known["method"] == "subspace"   # the file has 8 bits, the client's image had more
    wrong = report("--model", f"hf:{tmp_path}", "--update", tmp_path / "update.safetensors")
    assert wrong["weights"] == "random" and any("wrong weights" in line for line in wrong["remarks"])


def test_an_update_file_with_wrapper_prefixes_is_read_like_any_other(tmp_path):
    from safetensors.torch import save_file
    import torch
    from april_nb.federated import client_update
    from april_nb.vit import vit
    update = client_update(vit("vit_mnist", "B"), torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.tensor([1]))
    save_file({f"module.{n}": g for n, g in update.gradients.items()}, tmp_path / "u.safetensors")
    r = report("--model", "vit_mnist", "--arch", "B", "--update", tmp_path / "u.safetensors")
    assert r["verdict"] == "exact" and r["images"][0]["label"] is None and not r["remarks"]


def test_a_search_that_its_budget_ends_says_so():
    r = report("--model", "vit_mnist", "--arch", "B", "--method", "dlg", "--budget", 0)
    assert r["verdict"] == "not-converged" and "stopped by the budget" in r["reason"]


def test_a_batch_of_which_nothing_was_found_is_reported_and_no_picture_of_it_written(tmp_path):
    paths = [tmp_path / f"{name}.png" for name in "ab"]
    for path, gradient in zip(paths, (Image.radial_gradient, Image.linear_gradient)): gradient("L").save(path)
    options = [*paths, "--model", "vit_mnist", "--arch", "B", "--know", "withheld", "--method", "spans", "--budget", 0]
    r = report(*options)
    assert r["verdict"] == "not-converged" and "0 of 2 images found" in r["reason"] and r["psnr"] is None
    assert [i["psnr"] for i in r["images"]] == [None, None]
    run = april("attack", *options, "--out", tmp_path / "out.png")
    assert run.returncode == 2 and "no image was found" in run.stderr and not (tmp_path / "out.png").exists()


def test_a_batch_comes_back_image_by_image_without_labels(tmp_path):
    paths = [tmp_path / f"{name}.png" for name in "ab"]
    for path, gradient in zip(paths, (Image.radial_gradient, Image.linear_gradient)): gradient("L").save(path)
    r = report(*paths, "--model", "vit_mnist", "--arch", "B", "--know", "withheld", "--label", 4, "--label", 4)
    assert r["method"] == "spans" and r["labels"] is None and [i["label"] for i in r["images"]] == [4, 4], r["reason"]
    assert min(i["psnr"] for i in r["images"]) > 80


LIGHT = """
import sys
from april_nb.cli import main
try: main()
finally: assert not {"torch", "torchvision", "scipy", "skimage", "matplotlib", "numpy"} & {*sys.modules}, "loaded"
"""


@pytest.mark.parametrize("arguments, code, said", [
    ("attack --help", 0, "withhold:positions"), ("audit --help", 0, "torchvision"), ("run --help", 0, "table1"), ("bench -h", 0, "vit_cifar"),
    ("", 0, "Commands:"), ("--help", 0, "audit"), ("-h", 0, "bench"), ("--version", 0, april_nb.__version__), ("attack --out a.txt", 2, ""),
    ("nothing", 2, ""), ("attack --know all", 2, "")])
def test_what_needs_no_pytorch_loads_none(arguments, code, said):
    run = subprocess.run([sys.executable, "-c", LIGHT, *arguments.split()], capture_output=True, text=True)
    assert run.returncode == code and "loaded" not in run.stderr and said in run.stdout, run.stderr


@pytest.mark.parametrize("words, offered", [
    ("april a", {"attack", "audit"}), ("april attack --know ", {"shared", "withheld", "secret"}), ("april attack --see", {"--seed"}),
    ("april attack --method s", {name for name in ATTACKS if name.startswith("s")})])
def test_a_shell_completes_commands_options_and_names(words, offered):
    env = os.environ | {"_APRIL_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    assert set(april(env=env).stdout.split()) == offered


@pytest.mark.parametrize("words", ["april attack --method s", "april attack --positions "])
def test_a_shell_completes_names_without_pytorch(words):
    env = os.environ | {"_APRIL_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "3"}
    code = LIGHT.replace("try: main()", "sys.argv = ['april']\ntry: main()")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert run.returncode == 0 and "loaded" not in run.stderr and len(run.stdout.split()) > 2, run.stderr


TABLES = {"attacks.ATTACKS": april_nb.ATTACKS, "defenses.EXAMPLES": april_nb.defenses.EXAMPLES, "models.LIBRARIES": april_nb.models.LIBRARIES,
          "defenses.EXAMPLES.values": april_nb.defenses.EXAMPLES.values(), "vit.PRESETS": april_nb.vit.PRESETS,
          "vit.POSITIONS": april_nb.vit.POSITIONS, "vit.INITIALISATIONS": april_nb.vit.INITIALISATIONS,
          "experiments.EXPERIMENTS": experiments.EXPERIMENTS, "experiments.TRAININGS": experiments.TRAININGS, "experiments.SAME": experiments.SAME}


@pytest.mark.parametrize("place", TABLES)
def test_names_read_in_a_modules_source_are_those_of_its_tables(place):
    assert cli.listed(place) == list(TABLES[place])


def test_every_table_that_a_help_text_names_is_among_those_held_above():
    assert {*re.findall(r"\{([a-z]\w*\.[A-Z][\w.]+)\}", Path(cli.__file__).read_text(encoding="utf-8"))} - {"module.TABLE"} <= {*TABLES}


@pytest.mark.parametrize("command, groups", [
    ("attack", ["Arguments", "The model", "The client's round", "The attack", "The report", "Options"]),
    ("audit", ["Arguments", "The model", "The client's round", "The attack", "The report", "Options"]), ("run", ["Arguments", "Which rows", "Options"])])
def test_help_groups_options(command, groups):
    text = april(command, "--help").stdout
    assert re.findall(r"^(\S.*):$", text, re.M) == groups and "\\[" not in text


@pytest.mark.parametrize("command", ["attack", "audit"])
def test_restarts_budget_and_device_are_options_wherever_an_attack_runs(command):
    text = april(command, "--help").stdout
    for option in ("--restarts N", "--budget SECONDS", "--device"): assert option in text


@pytest.mark.parametrize("module, left", [("april_nb.cli", "nothing was begun"), ("typer", "nothing was begun"), ("torch", cli.INTERRUPTED),
                                          ("numpy", cli.INTERRUPTED)])
def test_an_interruption_while_a_module_is_loaded_is_one_line(module, left):
    code = ("import signal, sys\n"
            "class Now:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            f"        if name == {module!r}: signal.raise_signal(signal.SIGINT)\n"
            "from april_nb.__main__ import main\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"   # a shell lets its background jobs ignore it
            "sys.meta_path.insert(0, Now())\n"
            "main()")
    run = subprocess.run([sys.executable, "-c", code, "attack", "--model", "vit_mnist"], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (130, "") and run.stderr.startswith("april: interrupted") and run.stderr.endswith(f"{left}\n")
    assert run.stderr.count("\n") == 1


def test_an_attack_that_was_not_named_is_printed_with_the_reason_for_it():
    lines = april("attack", "--model", "vit_mnist").stdout.splitlines()
    assert re.match("(closed-form|patch|subspace) on vit_mnist", lines[0]) and lines[1].startswith("chosen: of the closed forms")
    assert not any(line.startswith("chosen") for line in april("attack", "--model", "vit_mnist", "--method", "ridge").stdout.splitlines())


SEARCH = ["--model", "vit_mnist", "--arch", "B", "--steps", 12, "--dtype", "float64"]


@pytest.mark.parametrize("method", ["dlg", "ig", "tag", "april", "refine"])
def test_a_search_that_its_budget_stopped_goes_on_to_the_same_answer(tmp_path, method):
    kept = ["--keep", tmp_path / "search"]
    part = report(*SEARCH, "--method", method, *kept, "--budget", 0)
    assert "stopped by the budget after 1 of 12 steps" in part["reason"]
    numbers = lambda r: (r["psnr"], r["reason"], r["verdict"])
    whole = numbers(report(*SEARCH, "--method", method))
    assert numbers(report(*SEARCH, "--method", method, *kept)) == whole
    assert numbers(report(*SEARCH, "--method", method, *kept, "--budget", 0)) == whole   # there is nothing left to do


def test_an_interrupted_search_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    command = ["april", "attack", *map(str, SEARCH), "--method", "dlg", "--restarts", "2", "--json", "--keep", str(tmp_path / "search")]
    monkeypatch.setattr(sys, "argv", command)
    told = []
    @contextmanager
    def watched(title):
        def tell(*step):
            told.append(step)
            if len(told) == 16: raise KeyboardInterrupt   # in the fourth step of the second first guess
        yield tell
    monkeypatch.setattr(cli, "progress_bar", watched)
    with pytest.raises(SystemExit) as stop: cli.main()
    assert stop.value.code == 130 and capsys.readouterr().err.startswith("april: interrupted")
    with pytest.raises(SystemExit): cli.main()
    went_on = json.loads(capsys.readouterr().out)
    assert len(told) == 16 + 9   # the fourth step again and what follows, nothing before
    (tmp_path / "search").unlink()
    with pytest.raises(SystemExit): cli.main()
    at_once = json.loads(capsys.readouterr().out)
    assert [at_once[k] == went_on[k] for k in ("psnr", "reason", "images")] == [True] * 3


def test_what_a_search_keeps_belongs_to_it_alone(tmp_path):
    kept = ["--keep", tmp_path / "search"]
    report(*SEARCH, "--method", "dlg", *kept, "--budget", 0)
    before = (tmp_path / "search").read_bytes()
    for options, why in [(["--method", "tag"], "belongs to another search"), (["--method", "dlg", "--seed", 3], "belongs to another search"),
                         (["--method", "patch"], "--keep has no effect on patch"), (["--method", "dlg", "--defense", "clip:1"], "another search")]:
        run = april("attack", *SEARCH, *options, *kept)
        assert run.returncode == 2 and why in run.stderr and run.stderr.count("\n") == 1, run.stderr
    assert (tmp_path / "search").read_bytes() == before
    (tmp_path / "search").write_text("something else")
    run = april("attack", *SEARCH, "--method", "dlg", *kept)
    assert run.returncode == 2 and "is not what a search keeps" in run.stderr and (tmp_path / "search").read_text(encoding="utf-8") == "something else"


def test_images_of_a_batch_that_were_found_are_not_searched_for_again(tmp_path):
    paths = [tmp_path / f"{name}.png" for name in "ab"]
    for path, gradient in zip(paths, (Image.radial_gradient, Image.linear_gradient)): gradient("L").save(path)
    options = [*paths, "--model", "vit_mnist", "--arch", "B", "--know", "withheld", "--method", "spans", "--keep", tmp_path / "search"]
    whole = report(*options)
    again = report(*options, "--budget", 0)   # no time to find any
    assert again["verdict"] == whole["verdict"] != "not-converged" and min(i["psnr"] for i in again["images"]) > 80


def test_the_module_runs_as_the_command():
    run = subprocess.run([sys.executable, "-m", "april_nb", "--version"], capture_output=True, text=True)
    assert run.stdout == april("--version").stdout == f"april_nb {april_nb.__version__}\n"


def test_fixed_choices_are_those_of_the_functions_behind_them():
    assert get_args(cli.Size) == runner.PRESETS


def test_help_names_every_option_and_what_the_tables_hold():
    text = april("attack", "--help").stdout
    for name in ATTACKS: assert re.search(rf"\b{name}\b", text), name
    assert "{" not in text
    for option in ("--model", "--arch", "--method", "--init", "--positions", "--know", "--label", "--dtype", "--seed", "--device", "--out", "--json"):
        assert option in text
    assert april().returncode == 0 and "attack" in april().stdout


def test_gradient_matching_lowers_its_loss_and_says_what_it_did(tmp_path):
    r = report("--model", "vit_mnist", "--arch", "B", "--method", "april", "--steps", 30, "--out", tmp_path / "a.png")
    assert r["verdict"] in ("approximate", "not-converged") and r["labels"] == "restored" and r["images"][0]["label"] == 0
    assert (tmp_path / "a.png").exists()


def test_gradient_matching_attacks_a_batch_of_two(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for i, path in enumerate(paths): Image.radial_gradient("L").rotate(30 * i).save(path)
    r = report(*paths, "--model", "vit_mnist", "--arch", "B", "--method", "dlg", "--labels", "known", "--label", 3, "--label", 5,
               "--steps", 5)
    assert len(r["images"]) == 2 and {i["label"] for i in r["images"]} == {3, 5} and r["labels"] == "known"


def test_a_batch_is_searched_for_in_its_span_and_reported_in_the_order_of_its_images(tmp_path):
    paths = [tmp_path / f"{name}.png" for name in "ab"]
    for path, gradient in zip(paths, (Image.radial_gradient, Image.linear_gradient)): gradient("L").save(path)
    r = report(*paths, "--model", "vit_mnist", "--arch", "B", "--method", "separate", "--know", "withheld", "--init", "timm",
               "--label", 5, "--label", 3, "--steps", 60)
    assert [i["label"] for i in r["images"]] == [5, 3] and r["labels"] == "restored"
    assert [s["name"] for s in r["systems"]] == ["patches", "tokens", "subspace"]


def test_the_search_behind_theorem_4_runs_by_name():
    r = report("--model", "vit_mnist", "--arch", "B", "--method", "refine", "--positions", "sincos1d", "--steps", 2)
    assert r["method"] == "refine" and len(r["systems"]) == 3 and r["verdict"] in ("approximate", "not-converged")


@pytest.mark.parametrize("options, expected", [
    ("", ("learned", "shared")), ("--know withheld", ("learned", "withheld")), ("--know secret", ("learned", "secret")),
    ("--positions normal --know secret", ("normal", "secret")), ("--positions sincos1d", ("sincos1d", "withheld"))])
def test_the_report_says_what_the_attacker_knew_of_the_positions(options, expected):
    r = report("--model", "vit_mnist", "--arch", "B", "--method", "dlg", "--steps", 2, *options.split())
    assert (r["positions"], r["know"]) == expected


def test_bench_prints_rows():
    run = april("bench", "--model", "vit_mnist", "--victims", 1, "--victims", 4, "--json")
    rows = json.loads(run.stdout)
    assert [r["victims"] for r in rows] == [1, 4]
    assert set(rows[0]) == {"model", "arch", "victims", "batch", "autograd_seconds", "engine_seconds", "speedup", "peak_share",
                            "peak_memory_mb"}
    assert all(isinstance(v, str) or v > 0 for r in rows for v in r.values())
