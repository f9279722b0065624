"""Whoever computes a slice, and whoever dies on the way: every row is there once, and the same to the last bit."""
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from april_nb import runner
from april_nb.experiments import Arm, Slice, run
from april_nb.federated import AprilError
from april_nb.runner import COLUMNS, Store, carry_out, in_process, in_processes, read_rows

APRIL = [sys.executable, "-c", "from april_nb.cli import main; main()", "run"]
CPU = torch.device("cpu")
QUIET = lambda *_: None
RESULTS = sorted((Path(__file__).resolve().parent.parent / "results").glob("*.csv"))


@pytest.fixture(autouse=True)
def photographs(monkeypatch): monkeypatch.delenv("APRIL_DATA", raising=False)


def april(*args, **more):
    return subprocess.Popen([*APRIL, *map(str, args)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **more)


def table(path):
    """A CSV's rows as text, without what a clock says."""
    seconds = COLUMNS.index("seconds")
    return [[v for i, v in enumerate(line.split(",")) if i != seconds] for line in path.read_text(encoding="utf-8").splitlines()]


def slices(seed=0, n=4, steps=2):
    """One image each."""
    arm = Arm("mnist", "B", "dlg", steps=steps)
    return [Slice("table1", arm, (i,), seed) for i in range(n)]


def wait_for(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "it did not happen in time"
        time.sleep(0.02)


def ended(pid):
    """Has a process ended? One that nobody waited for has, too."""
    try: return " Z " in Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except FileNotFoundError: return True


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()]


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_a_csv_comes_out_of_the_store_as_it_went_in(path, tmp_path):
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    Store(copy, tuple(read_rows(copy)[0])).export()
    assert copy.read_bytes() == path.read_bytes()


def test_two_jobs_and_one_process_make_the_same_bytes_but_for_seconds(tmp_path):
    for jobs in (1, 2):
        run("closed_form", tmp_path / str(jobs), dataset="mnist", n=2, jobs=jobs)
        run("table1", tmp_path / str(jobs), dataset="mnist", method="april", n=2, steps=2, jobs=jobs)
    for name in ("closed_form.csv", "table1.csv"):
        one, two = (table(tmp_path / str(jobs) / name) for jobs in (1, 2))
        assert one == two and len(one) > 4


def test_rows_do_not_depend_on_the_threads_of_the_process_that_asked(tmp_path):
    threads = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            run("closed_form", tmp_path / str(n), dataset="cifar10", n=3)
            assert torch.get_num_threads() == n, "the caller's number comes back"
    finally: torch.set_num_threads(threads)
    assert table(tmp_path / "1" / "closed_form.csv") == table(tmp_path / "2" / "closed_form.csv")


def test_two_runs_share_the_work_and_make_nothing_twice(tmp_path):
    args = ["table1", "--dataset", "mnist", "--n", 26, "--steps", 6, "--settings", "paper", "--device", "cpu", "--results", tmp_path]
    env = {k: v for k, v in os.environ.items() if k != "APRIL_DATA"} | {"SHARED": str(tmp_path)}
    spy = "import april_nb.experiments as e, os; f = e.attack_slice; g = lambda a, ids, *r: (open(f\"{os.environ['SHARED']}/{os.getpid()}.log\", 'a').write(f'{a.method} {ids}\\n'), f(a, ids, *r))[1]; e.attack_slice = g\n"
    both = [subprocess.Popen([sys.executable, "-c", spy + APRIL[2], "run", *map(str, args)], env=env, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [p.wait(180) for p in both] == [0, 0]
    logs = [p.read_text(encoding="utf-8").splitlines() for p in tmp_path.glob("*.log")]
    made = [line for log in logs for line in log]
    assert len(logs) == 2, "each of them did some"
    assert len(made) == len(set(made)) == 8
    assert len(read_rows(tmp_path / "table1.csv")) == 4 * 26


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_driver_killed_in_mid_run_loses_nothing_and_leaves_nothing_running(tmp_path, jobs):
    args = ["table1", "--dataset", "mnist", "--n", 1, "--steps", 10, "--device", "cpu", "--jobs", jobs, "--results"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run("table1", whole, dataset="mnist", n=1, steps=10)
    driver = april(*args, killed)
    wait_for(lambda: len(read_rows(killed / "table1.csv")) >= 2)
    workers = children(driver.pid)
    assert len(workers) >= jobs - 1
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    wait_for(lambda: all(map(ended, workers)))
    before = read_rows(killed / "table1.csv")
    assert 2 <= len(before) < 8
    with Store(killed / "table1.csv", COLUMNS).change() as db:   # the dead driver's claims must not hold a run up
        assert db.execute("UPDATE claims SET until = ?", (time.time() + 10 ** 6,)).rowcount
    assert april(*args, killed).wait(180) == 0
    assert table(killed / "table1.csv") == table(whole / "table1.csv")
    assert all(row in read_rows(killed / "table1.csv") for row in before), "a finished row was made again"


def test_ctrl_c_on_workers_is_one_line_and_ends_them(tmp_path):
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)   # a shell lets its background jobs ignore interruptions
    driver = april("table1", "--dataset", "mnist", "--n", 25, "--steps", 400, "--jobs", 2, "--device", "cpu", "--results", tmp_path,
                   start_new_session=True, preexec_fn=heard)
    try:
        wait_for(lambda: driver.poll() is None and len(children(driver.pid)) >= 3)   # two workers and Python's tracker
        time.sleep(1)
        workers = children(driver.pid)
        os.killpg(driver.pid, signal.SIGINT)   # as a terminal does
        _, errors = driver.communicate(timeout=60)
    finally:
        if driver.poll() is None: os.killpg(driver.pid, signal.SIGKILL)
    assert driver.returncode == 130 and errors.count("\n") == 1 and errors.startswith("april: interrupted"), errors
    wait_for(lambda: all(map(ended, workers)))


def test_a_worker_that_dies_is_one_line_with_a_cure(tmp_path):
    store = Store(tmp_path / "table1.csv", COLUMNS)
    with pytest.raises(AprilError, match="fewer --jobs") as stop:
        carry_out([Deadly("table1", Arm("mnist", "B", "dlg", steps=2), (0,), 0)], store, lambda: in_processes(2, CPU), QUIET)
    assert "\n" not in str(stop.value)


class Deadly(Slice):
    """Ends the process that computes it."""
    def rows(self, where, watch): os._exit(9)
    def only(self, groups): return self


def test_claims_of_the_living_are_kept_and_those_of_the_dead_are_not(tmp_path):
    store, other = (Store(tmp_path / "table1.csv", COLUMNS) for _ in range(2))
    queue, theirs = slices(), slices()
    assert store.take(queue) == theirs[0] and other.take(theirs) == slices()[1]
    assert [s.ids for s in theirs] == [(0,), (2,), (3,)], "what another has in hand stays in the queue"
    with store.change() as db: db.execute("UPDATE claims SET until = 0 WHERE owner = ?", (store.owner,))
    assert other.take(theirs).ids == (0,), "a lease ends"
    far = time.time() + 1000
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    assert not runner.lives(f"{socket.gethostname()} {dead.pid} x", far) and runner.lives(f"{socket.gethostname()} {os.getpid()} x", far)
    assert runner.lives("elsewhere 1 x", far) and not runner.lives("elsewhere 1 x", 0)


def test_a_run_waits_for_what_another_has_in_hand_and_takes_it_over_when_the_lease_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "PAUSE", 0.05)
    store, gone = (Store(tmp_path / "table1.csv", COLUMNS) for _ in range(2))
    gone.owner = "elsewhere 1 x"
    assert gone.take(slices(n=1))
    with store.change() as db: db.execute("UPDATE claims SET until = ?", (time.time() + 2,))
    start = time.time()
    carry_out(slices(n=2), store, lambda: in_process(CPU, QUIET), QUIET)
    assert time.time() - start > 1.5 and [r["image_id"] for r in read_rows(store.path)] == [0, 1]


def test_a_lease_is_renewed_while_its_run_lives_and_given_back_when_it_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "LEASE", 0.4)
    store, other = (Store(tmp_path / "table1.csv", COLUMNS) for _ in range(2))
    with store.at_work():
        assert store.take(slices(n=1))
        time.sleep(1)
        assert other.take(slices(n=1)) is None
    assert other.take(slices(n=1))


def test_rows_that_no_csv_has_seen_are_kept_and_rows_taken_out_of_it_are_forgotten(tmp_path, monkeypatch):
    path = tmp_path / "table1.csv"
    rows = [r for s in slices(n=2) for r in s.rows(CPU, QUIET)]
    store = Store(path, COLUMNS)
    store.add(rows[:1])
    with monkeypatch.context() as full:
        full.setattr(Store, "export", lambda self: (_ for _ in ()).throw(OSError("no space")))
        with pytest.raises(OSError): store.add(rows[1:])
    assert len(read_rows(path)) == 1
    Store(path, COLUMNS)
    assert read_rows(path) == rows
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    assert Store(path, COLUMNS).left(slices(n=2)) == slices(n=2)[1:]


@pytest.mark.parametrize("content, why", [(b"no database at all" * 100, "remove it"), (None, "unable to open")])
def test_a_store_that_cannot_be_used_is_named_with_its_cure(tmp_path, content, why):
    if content: (tmp_path / ".table1.sqlite").write_bytes(content)
    else: (tmp_path / ".table1.sqlite").mkdir()
    with pytest.raises(AprilError, match=rf"\.table1\.sqlite: .*{why}|{why}.*") as stop: Store(tmp_path / "table1.csv", COLUMNS)
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize("args, why", [(["--jobs", "2", "--ray", "local"], "choose one"), (["--jobs", "0"], "--jobs"),
                                       (["--ray", "local", "--device", "warp"], "no device 'warp' on a cluster")])
def test_executors_that_cannot_be_are_refused_in_one_line(args, why, tmp_path):
    driver = april("closed_form", *args, "--results", tmp_path)
    _, errors = driver.communicate(timeout=60)
    assert driver.returncode == 2 and errors.startswith("april: ") and errors.count("\n") == 1 and why in errors


def test_without_ray_the_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(AprilError, match=r"pip install '\.\[ray\]'"): run("closed_form", tmp_path, n=1, dataset="mnist", ray="local")


@pytest.fixture(scope="module")
def cluster():
    """A head without CPUs for tasks, and two nodes with one each, on this machine; the first test kills one of them."""
    ray = pytest.importorskip("ray", reason="needs Ray: pip install '.[ray]'")
    from ray.cluster_utils import Cluster
    small = dict(object_store_memory=10 ** 8, include_dashboard=False)
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("APRIL_DATA", raising=False)
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        environment.setenv("RAY_health_check_period_ms", "500")
        environment.setenv("RAY_memory_monitor_refresh_ms", "0")   # other processes' memory is not this test's affair
        environment.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        nodes = Cluster(initialize_head=True, head_node_args=dict(num_cpus=0, **small))
        try:
            yield nodes, [nodes.add_node(num_cpus=1, object_store_memory=10 ** 8) for _ in range(2)]
        finally:
            ray.shutdown()
            nodes.shutdown()


def test_a_cluster_that_loses_a_node_in_mid_run_makes_the_same_rows_once(cluster, tmp_path):
    nodes, (doomed, _) = cluster
    here, there = tmp_path / "here" / "table1.csv", tmp_path / "there" / "table1.csv"
    for path in (here, there): path.parent.mkdir()
    works = slices(n=6, steps=60)
    killed = []
    def kill(*_):
        if not killed: killed.append(nodes.remove_node(doomed, allow_graceful=False))
    carry_out(works, Store(here, COLUMNS), lambda: in_process(CPU, QUIET), QUIET)
    carry_out(works, Store(there, COLUMNS), lambda: runner.on_ray(nodes.address, CPU), kill)
    assert killed and table(here) == table(there) and len(read_rows(there)) == 6


def test_an_error_of_an_attack_on_ray_is_the_same_line_as_here(cluster, tmp_path):
    nodes, _ = cluster
    works = [Slice("table1", Arm("mnist", "B", "closed-form"), (0,), 0)]
    said = []
    for executor in (lambda: in_process(CPU, QUIET), lambda: runner.on_ray(nodes.address, CPU)):
        with pytest.raises(AprilError) as stop: carry_out(works, Store(tmp_path / "table1.csv", COLUMNS), executor, QUIET)
        said.append(str(stop.value))
    assert said[0] == said[1] and "\n" not in said[0]
