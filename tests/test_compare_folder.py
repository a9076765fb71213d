"""The folder of a comparison: who may work in it, what a stopped or refused run leaves, what a later one may reuse."""

import json
import os
import subprocess
import sys

import pytest
from refusals import refused
from test_cli import ENVIRONMENT, ROOT
from test_compare import ask, leave_out_times, run_verb

import cli.frontier_plans
import cli.frontier_points
import cli.frontier_proof
import cli.frontier_speed
from cli.console import Console, RunFailure
from cli.estimate import FLOAT, estimate_memory
from cli.frontier import run_compare
from cli.frontier_job import check_jobs, prepare_frontier, read_texts
from cli.frontier_request import Levels
from cli.frontier_store import BEGUN, LOCK, SETTINGS
from compress.report import DIFFERENT, Proof, make_plain

QUIET = Console(quiet=True)
SMALL = ("--windows", 6, "--length", 24, "--refine", 0, "--axes", "ffn", "--samples", 0, "--profile", "cpu-avx2")


def few(model, text, folder, *keep, **changes):
    """A request of levels, without samples, on one predicted device."""
    given = {"levels": Levels(keep=keep or (0.9, 0.7)), "samples": 0, "profiles": ("cpu-avx2",)}
    return ask(model, text, folder, **{**given, **changes})


@pytest.fixture(scope="module")
def finished(model, text, tmp_path_factory):
    """A complete comparison, which tests must not change."""
    folder = tmp_path_factory.mktemp("compared") / "out"
    return folder, run_compare(few(model, text, folder), QUIET)


def read_all(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Who is at work


def start_holder(path, kind):
    """Start a process that holds the last byte of a lock file, as a run with or without --search does."""
    code = (
        f"import fcntl, sys; lock = open(sys.argv[1], 'a+b'); fcntl.lockf(lock, fcntl.{kind}, 1, 2)\n"
        "print('held', flush=True); input()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    holder = subprocess.Popen([sys.executable, "-c", code, str(path)], **pipes)
    assert holder.stdout.readline() == "held\n"
    return holder


def test_second_run_in_a_folder_is_refused_and_a_killed_one_leaves_no_lock(model, text, tmp_path):
    out = tmp_path / "out"
    code = (
        "import cli.frontier_points as points, typer; from cli.compare import compare\n"
        "def stop(*given): print('begun', flush=True); input()\n"
        "points.write_cut = stop\n"
        "app = typer.Typer(); app.command()(compare); app()\n"
    )
    given = [str(word) for word in (model, "--text", text, "--keep", "0.9,0.7", "-o", out, *SMALL, "--quiet")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    first = subprocess.Popen([sys.executable, "-c", code, *given], cwd=ROOT, env=ENVIRONMENT, **pipes)
    assert first.stdout.readline() == "begun\n"
    before = read_all(out)
    for more in ((), ("--overwrite",)):
        done = run_verb(*given, *more)
        assert done.exit_code == 2
        (said,) = done.stderr.strip().splitlines()
        assert said.endswith(f"Another process is at work in {out}: wait for its end, or choose another output.")
    assert read_all(out) == before
    first.kill()
    first.communicate()
    frontier = run_compare(few(model, text, out), QUIET)
    assert [point.name for point in frontier.points] == ["dense", "keep-0.90", "keep-0.70"]
    assert [path.name for path in out.glob(".*")] == [LOCK]


def test_run_waits_for_no_search_and_lets_the_folder_go(finished, model, text):
    folder, frontier = finished
    holder = start_holder(folder / LOCK, "LOCK_SH")
    refused(lambda: run_compare(few(model, text, folder), QUIET), "Another process is at work", "wait for its end")
    holder.communicate("\n")
    again = run_compare(few(model, text, folder), QUIET)
    assert leave_out_times(make_plain(again.points)) == leave_out_times(make_plain(frontier.points))


def test_system_without_locks_compares_all_the_same(finished, model, text, tmp_path, monkeypatch):
    folder, frontier = finished
    monkeypatch.setitem(sys.modules, "fcntl", None)
    again = run_compare(few(model, text, folder), QUIET)
    assert leave_out_times(make_plain(again.points)) == leave_out_times(make_plain(frontier.points))
    refused(lambda: run_compare(few(model, text, tmp_path / "out", 0.01), QUIET), "--keep 0.01 leaves")
    assert not (tmp_path / "out").exists()


def test_processes_of_a_killed_run_end_with_it(tmp_path):
    """The pipe that both write to ends when both have ended."""
    (tmp_path / "worker.py").write_text(
        "import time; from cli.frontier_turns import follow_parent\n"
        "def work(): follow_parent(); print('begun', flush=True); time.sleep(300)\n"
    )
    code = (
        "import multiprocessing, worker\n"
        "child = multiprocessing.get_context('spawn').Process(target=worker.work); child.start(); child.join()\n"
    )
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    pipes = {"stdout": subprocess.PIPE, "text": True, "env": environment}
    parent = subprocess.Popen([sys.executable, "-c", code], **pipes)
    assert parent.stdout.readline() == "begun\n"
    parent.kill()
    assert parent.communicate(timeout=200) == ("", None)


# What stays


@pytest.mark.parametrize("stopped", ["write_json", "write_plan"])
def test_run_stopped_while_it_plans_ends_with_the_same_page(stopped, finished, model, text, tmp_path, monkeypatch):
    """Before its calibration is written, or between two of its plans."""
    real, calls = getattr(cli.frontier_plans, stopped), []

    def stop(*given):
        calls.append(given)
        if stopped == "write_json" or len(calls) == 2:
            raise KeyboardInterrupt
        real(*given)

    monkeypatch.setattr(cli.frontier_plans, stopped, stop)
    with pytest.raises(KeyboardInterrupt, match="0 of 3 points are complete"):
        run_compare(few(model, text, tmp_path / "out"), QUIET)
    monkeypatch.undo()
    again = run_compare(few(model, text, tmp_path / "out"), QUIET)
    assert set(again.damage) == {"0", "1", "2", "3"} and again.damage == finished[1].damage
    assert leave_out_times(make_plain(again.points)) == leave_out_times(make_plain(finished[1].points))


def test_levels_left_out_are_known_to_a_run_that_goes_on(model, text, tmp_path, monkeypatch):
    """A calibration that was written before its plans says what it found out of reach."""
    write_plan = cli.frontier_plans.write_plan
    request = few(model, text, tmp_path / "out", levels=Levels(points=3))

    def stop_last(plan, path):
        write_plan(plan, path)
        if path.stem == "keep-0.60":
            raise KeyboardInterrupt

    monkeypatch.setattr(cli.frontier_plans, "write_plan", stop_last)
    with pytest.raises(KeyboardInterrupt):
        run_compare(request, QUIET)
    monkeypatch.setattr(cli.frontier_plans, "find_units", pytest.fail)  # nothing is left to calibrate for
    frontier = run_compare(request, QUIET)
    assert [point.name for point in frontier.points] == ["dense", "keep-0.80", "keep-0.60"]
    assert frontier.damage


def test_level_out_of_reach_is_refused_before_anything_is_written(finished, model, text, tmp_path):
    refused(lambda: run_compare(few(model, text, tmp_path / "a" / "out", 0.9, 0.01), QUIET), "--keep 0.01 leaves")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    refused(lambda: run_compare(few(model, text, tmp_path / "mine", 0.9, 0.01), QUIET), "more --axes")
    assert list((tmp_path / "mine").iterdir()) == []
    # The advice can be followed in the same folder.
    more = few(model, text, tmp_path / "mine", 0.4, recipe={"axes": ("ffn", "layers")})
    assert [point.name for point in run_compare(more, QUIET).points] == ["dense", "keep-0.40"]
    before = read_all(tmp_path / "mine")
    anew = few(model, text, tmp_path / "mine", 0.9, 0.01, overwrite=True)
    refused(lambda: run_compare(anew, QUIET), "--keep 0.01 leaves")
    assert read_all(tmp_path / "mine") == before


def test_level_out_of_reach_beside_points_says_how_to_go_on(model, text, tmp_path):
    run_compare(few(model, text, tmp_path, 0.9), QUIET)
    before = read_all(tmp_path)
    words = "the points in", "stay, and other levels may join them", "another output or --overwrite"
    refused(lambda: run_compare(few(model, text, tmp_path, 0.8, 0.01), QUIET), *words)
    assert read_all(tmp_path) == before
    frontier = run_compare(few(model, text, tmp_path, 0.9, 0.8), QUIET)
    assert [point.name for point in frontier.points] == ["dense", "keep-0.90", "keep-0.80"]


def test_folder_of_a_run_that_was_killed_at_its_start_is_free(model, text, tmp_path):
    (tmp_path / LOCK).touch()
    (tmp_path / f"{BEGUN}1").write_text("{")
    run_compare(few(model, text, tmp_path, 0.9), QUIET)
    assert (tmp_path / SETTINGS).is_file() and not list(tmp_path.glob(f"{BEGUN}*"))


# What is used again


def test_speeds_of_another_machine_are_measured_anew(model, text, tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTPRESS_PROFILES", str(tmp_path / "none"))
    measure, calls = cli.frontier_speed.measure_all, []

    def count(models, *size):
        calls.append(len(models))
        return measure(models, *size)

    monkeypatch.setattr(cli.frontier_speed, "measure_all", count)
    request = few(model, text, tmp_path / "out", 0.7, profiles=("this-machine",), recipe={"workload": "8+4"})
    first, second = (run_compare(request, QUIET) for _ in range(2))
    assert len(calls) == 1
    assert [point.speeds for point in first.points] == [point.speeds for point in second.points]
    for name, value in (("read_cpu", "Another CPU"), ("count_cores", 1000)):
        monkeypatch.setattr(cli.frontier_speed, name, lambda value=value: value)
        calls.clear()
        for _ in range(2):
            run_compare(request, QUIET)
        assert len(calls) == 1, name


def test_processors_are_known_by_their_names(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nmodel name\t: Fast 9\nflags\t: a b\n\nprocessor\t: 1\nmodel name\t: Fast 9\n")
    assert cli.frontier_speed.read_cpu(path) == "Fast 9"
    path.write_text("processor\t: 0\nCPU part\t: 0xd49\n\nprocessor\t: 1\nCPU part\t: 0xd80\n")
    assert cli.frontier_speed.read_cpu(path) == "0xd49, 0xd80"
    assert cli.frontier_speed.read_cpu(tmp_path / "none")


def read_proofs(folder, name):
    return json.loads((folder / "points" / name / "lightpress.json").read_text())["proofs"]


def test_points_made_without_verification_are_verified_where_it_is_asked_for(model, text, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    run_compare(few(model, text, tmp_path, 0.7), QUIET)
    assert read_proofs(tmp_path, "keep-0.70") == []
    monkeypatch.setattr(cli.frontier_points, "compress_checkpoint", pytest.fail)  # it is not made anew
    verified, verify = few(model, text, tmp_path, 0.7, verify=True), cli.frontier_proof.verify_folder
    wrong = Proof("transformers", DIFFERENT, reason="logits differ")
    monkeypatch.setattr(cli.frontier_proof, "verify_folder", lambda *given, **named: [wrong])
    with pytest.raises(RunFailure, match=r"keep-0.70 failed its verification .*: logits differ; .* delete .*keep-0.70"):
        run_compare(verified, QUIET)
    assert read_proofs(tmp_path, "keep-0.70") == []
    monkeypatch.setattr(cli.frontier_proof, "verify_folder", verify)
    run_compare(verified, QUIET)
    (proof,) = read_proofs(tmp_path, "keep-0.70")
    assert (proof["runtime"], proof["status"]) == ("transformers", "equal")
    monkeypatch.setattr(cli.frontier_proof, "verify_folder", pytest.fail)  # once is enough
    run_compare(verified, QUIET)


def test_trained_points_are_proven_by_what_they_became():
    proof = {"runtime": "transformers", "status": "equal"}
    skipped = {**proof, "status": "skipped"}
    is_proven = cli.frontier_proof.is_proven
    assert is_proven({"proofs": [proof]}) and is_proven({"recovery": [{"proofs": []}, {"proofs": [proof]}]})
    assert not is_proven({"proofs": []}) and not is_proven({"proofs": [skipped]})
    assert not is_proven({"recovery": [{"proofs": [proof]}, {"proofs": []}]})
    assert is_proven({"recovery": [{"proofs": []}], "proofs": [proof]})


def test_memory_of_processes_counts_the_dense_stream_of_each(model, text, tmp_path, monkeypatch):
    made = prepare_frontier(few(model, text, tmp_path / "out", jobs=2), QUIET)
    texts = read_texts(made, QUIET)
    stream = FLOAT * texts.evaluation.ids.numel() * made.job.spec.shape.hidden
    working = 2 * estimate_memory(made.job.spec.shape, made.job.recipe, 4)
    for free, fits in ((working + 3 * stream, True), (working + 3 * stream - 1, False), (None, True)):
        monkeypatch.setattr("cli.frontier_job.free_memory", lambda free=free: free)
        if fits:
            check_jobs(made, texts)
        else:
            refused(lambda: check_jobs(made, texts), "--jobs 2 needs about", "give fewer")
            refused(lambda: run_compare(made.request, QUIET), "--jobs 2 needs about")
    assert not (tmp_path / "out").exists()
