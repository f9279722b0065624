"""The runner goes on where it was stopped, repeats nothing, and ends with the table of an uninterrupted run."""
import itertools
import math
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from april_nb import experiments
from april_nb.cli import main
from april_nb.experiments import EXPERIMENTS, TRAININGS, batches, composed
from april_nb.federated import AprilError
from april_nb.runner import COLUMNS, KEYS, NUMBERS, add_rows, read_rows

COMMAND = [sys.executable, "-c", "from april_nb.cli import main; main()", "run", "table1", "--dataset", "mnist", "--n", "1", "--steps", "2",
           "--device", "cpu", "--results"]


def start(folder):
    env = {k: v for k, v in os.environ.items() if k != "APRIL_DATA"}
    return subprocess.Popen([*COMMAND, folder], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def table(path):
    """Rows without what a clock says."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_rows(path)]


def test_a_run_that_is_killed_and_started_again_ends_with_the_same_table(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait(120) == 0
    expected = table(whole / "table1.csv")
    stop_at = random.randint(1, len(expected) - 1)
    process = start(killed)
    while len(read_rows(killed / "table1.csv")) < stop_at: time.sleep(0.01)
    time.sleep(random.uniform(0, 0.3))
    process.kill()
    process.wait()
    before = read_rows(killed / "table1.csv")
    assert stop_at <= len(before)
    assert start(killed).wait(120) == 0
    after = read_rows(killed / "table1.csv")
    assert table(killed / "table1.csv") == expected
    assert all(row in after for row in before), "a finished row was made again"   # its seconds are the old ones


def test_an_interrupted_run_says_so_in_one_line_and_keeps_finished_slices(tmp_path, monkeypatch, capsys):
    attack, calls = experiments.attack_slice, itertools.count()
    def interrupted(*args):
        if next(calls) == 2: raise KeyboardInterrupt
        return attack(*args)
    monkeypatch.setattr(experiments, "attack_slice", interrupted)
    monkeypatch.delenv("APRIL_DATA", raising=False)
    monkeypatch.setattr(sys, "argv", ["april", *COMMAND[3:], str(tmp_path)])
    with pytest.raises(SystemExit) as stop: main()
    out, errors = capsys.readouterr()
    assert stop.value.code == 130 and out == "" and errors.count("\n") == 1 and "kept" in errors
    assert len(read_rows(tmp_path / "table1.csv")) == 2
    assert {p.name for p in tmp_path.iterdir()} == {"table1.csv", ".table1.sqlite"}


@pytest.mark.parametrize("before, room", [(0, 1000), (0, 8192), (60, 18_000)])
def test_a_full_disk_keeps_the_slices_that_were_written(tmp_path, before, room):
    path, full = tmp_path / "table1.csv", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    if before: add_rows(path, [row(experiment="table1", image_id=i) for i in range(before)])
    run = subprocess.run([*COMMAND, tmp_path], preexec_fn=full, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2 and run.stderr.startswith("april: ") and run.stderr.count("\n") == 1, run.stderr
    kept = read_rows(path)
    assert len(kept) >= before and {p.name for p in tmp_path.iterdir()} <= {"table1.csv", ".table1.sqlite", ".table1.sqlite-journal"}
    assert start(tmp_path).wait(120) == 0
    assert all(r in read_rows(path) for r in kept) and len(read_rows(path)) == before + 8


@pytest.mark.parametrize("args, why", [(["figure99"], "unknown experiment"), (["table1", "--method", "magic"], "no arm"),
                                       (["table1", "--device", "warp"], "no device"), (["table1", "--n", "0"], "--n"),
                                       (["table1", "--results", __file__], ""),
                                       (["table1", "--device", "meta"], "no device 'meta'"),
                                       (["table1", "--dataset", "celeba"], "mnist, cifar10, imagenet"),
                                       (["table1", "--method", "magic"], "dlg, ig, tag, april"),
                                       (["table1", "--seed", str(2 ** 70), "--n", "1", "--dataset", "mnist"], "seed")])
def test_bad_input_is_one_line_and_exit_code_2(args, why, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["april", "run", *args])
    with pytest.raises(SystemExit) as stop: main()
    out, errors = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and errors.startswith("april: ") and errors.count("\n") == 1 and why in errors


def row(**changes):
    return {k: {int: 1, float: 0.5}.get(NUMBERS.get(k), "x") for k in COLUMNS} | changes


@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=40), size=st.integers(2, 4),
       classes=st.sampled_from(["distinct", "pair", "random"]))
def test_batches_have_the_classes_that_an_arm_asks_for_and_no_image_twice(labels, size, classes):
    order = composed(list(range(len(labels))), labels, size, classes)
    assert len(set(order)) == len(order)
    for some in batches(order, size) if classes != "random" else []:
        assert len(some) == size and len({labels[i] for i in some}) == size - (classes == "pair")
    if classes == "random": assert sorted(order) == list(range(len(labels)))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=12))
def test_rows_come_back_as_they_were_in_one_order_whatever_the_order_of_writing(tmp_path_factory, keys):
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    for image_id, steps in keys: add_rows(path, [row(image_id=image_id, steps=steps, mse=image_id / 7)])
    kept = read_rows(path)
    assert [(r["image_id"], r["steps"]) for r in kept] == sorted(set(keys), key=lambda k: (k[1], k[0]))
    assert all(r["mse"] == r["image_id"] / 7 for r in kept)


def test_a_file_of_other_columns_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    with pytest.raises(AprilError, match="move it away"): read_rows(tmp_path / "rows.csv")


def test_rows_make_the_folder_that_they_go_to(tmp_path):
    path = tmp_path / "new" / "folder" / "x.csv"
    add_rows(path, [row(image_id=3)])
    assert [r["image_id"] for r in read_rows(path)] == [3]


@pytest.mark.parametrize("spoil, line", [
    (lambda b: b[:-20], 3), (lambda b: b[:-1], 3), (lambda b: b.replace(b",0.5,", b",half,", 1), 2),
    (lambda b: b.replace(b",0.5,", b",nan,", 1), 2), (lambda b: b.replace(b"\r\n", b"\r\n<<<<<<< HEAD\r\n", 1), 2),
    (lambda b: b.replace(b",x,", b",\xff,", 1), 2), (lambda b: b.replace(b",x,", b",\x00,", 1), 2), (lambda b: b + b"a,b\n", 4)])
def test_a_damaged_file_is_named_with_its_line(tmp_path, spoil, line):
    path = tmp_path / "rows.csv"
    add_rows(path, [row(image_id=i) for i in range(2)])
    whole = path.read_bytes()
    path.write_bytes(spoil(whole))
    with pytest.raises(AprilError, match=f"rows.csv, line {line}: "): read_rows(path)


@pytest.mark.parametrize("path", sorted(Path(__file__).resolve().parent.parent.glob("results/*.csv")), ids=lambda p: p.stem)
def test_stored_rows_are_finite_and_no_two_are_the_same_run(path):
    rows = read_rows(path)
    assert path.stem in {*EXPERIMENTS, *TRAININGS, "bench"} and rows
    columns = tuple(rows[0])
    assert all(math.isfinite(r[k]) for r in rows for k in NUMBERS if k in columns and k != "epsilon")   # ∞ without noise
    assert {r["experiment"] for r in rows} == {path.stem} and all(r[k] != "" for r in rows for k in columns)
    assert len({tuple(r[k] for k in KEYS[columns]) for r in rows}) == len(rows)
