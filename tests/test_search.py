"""`compare --search`: trials of one study, shared by processes, taken up again, and refused where they do not fit."""

import csv
import importlib.util
import io
import json
import os
import subprocess
import sys
import time

import pytest
from refusals import refused
from test_cli import ENVIRONMENT, ROOT
from test_compare import PROFILES, ask, leave_out_times, run_verb

import cli.frontier_place as place
import cli.frontier_search as search
import cli.frontier_study as studying
import cli.frontier_turns as turns
from cli.console import Console, RunFailure
from cli.frontier import describe_run, run_compare
from cli.frontier_job import prepare_frontier
from cli.frontier_request import Levels
from cli.frontier_table import render_frontier
from compress.errors import UserError
from compress.report import make_plain
from compress.report_frontier import DENSE

TRIALS = 4
QUIET = Console(quiet=True)
with_optuna = pytest.mark.skipif(
    importlib.util.find_spec("optuna") is None, reason="needs Optuna: pip install 'lightpress[search]'"
)


def seek(model, text, folder, **changes):
    given = {
        "search": TRIALS, "samples": 0, "profiles": ("cpu-avx2",), "levels": Levels(keep=(0.9, 0.6)),
        "recipe": {"axes": ("ffn", "layers")},
    }  # fmt: skip
    return ask(model, text, folder, **{**given, **changes})


@pytest.fixture(scope="module")
def searched(model, text, tmp_path_factory):
    """A complete search by one process, which tests must not change."""
    pytest.importorskip("optuna")
    folder = tmp_path_factory.mktemp("searched") / "out"
    return folder, run_compare(seek(model, text, folder), QUIET)


def list_states(folder):
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.load_study(study_name=studying.STUDY, storage=studying.open_storage(str(folder / place.LOG)))
    return study, [trial.state.name for trial in study.get_trials(deepcopy=False)]


@with_optuna
def test_search_joins_the_frontier(searched, model, text):
    folder, frontier = searched
    names = [point.name for point in frontier.points]
    assert names[:3] == [DENSE, "keep-0.90", "keep-0.60"]
    assert len(names) > 3 and all(name.startswith("search-0") for name in names[3:])
    rows = frontier.manifest["search"]
    assert [row["trial"] for row in rows] == [1, 2, 3, 4]
    points = {point.name: point for point in frontier.points}
    for row in rows:
        assert 0.6 <= row["keep"] <= 0.9 and row["axes"] in ("ffn", "ffn+layers")
        if row["state"] == "complete":
            point = points[row["point"]]
            assert row["ratio"] == point.ratio.value
            assert row["tokens_per_s"] == point.speeds["cpu-avx2"].tokens_per_s
            assert point.keep == pytest.approx(row["keep"], abs=0.006) or row["again"]
        else:
            assert row["reason"]
    assert {row["state"] for row in rows} <= {"complete", "pruned"}
    assert set(frontier.answers["cpu-avx2"].frontier) <= set(names)
    shown = render_frontier(frontier)
    assert "Search: 4 trials over --keep 0.6 to 0.9" in " ".join(shown.split())
    table = list(csv.DictReader(io.StringIO((folder / "frontier.csv").read_text())))
    assert [row["point"] for row in table] == names
    assert json.loads((folder / "frontier.json").read_text()) == json.loads(json.dumps(make_plain(frontier)))
    page = (folder / "report.html").read_text()
    assert names[-1] in page and "--search 4" in page
    assert not (folder / "work").exists()


@with_optuna
def test_point_of_a_trial_is_that_of_its_command(searched, tmp_path):
    from typer.testing import CliRunner

    from cli.app import app

    folder, frontier = searched
    point = next(one for one in frontier.points if one.name.startswith("search-"))
    words = point.command.split()
    done = CliRunner().invoke(app, [*words[1:-1], str(tmp_path / "again"), "--no-export", "--no-verify", "--no-bench"])
    assert done.exit_code == 0, done.stderr
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (folder / "points" / point.name / name).read_bytes()


@with_optuna
def test_stopped_search_ends_with_the_same_table(searched, model, text, tmp_path, monkeypatch):
    """The second trial is interrupted; the run that goes on retries it and says what one that nobody stopped says."""
    make_point, made = search.make_point, []

    def stop_second(bench, variant):
        made.append(variant.name)
        if len(made) == 2:
            raise KeyboardInterrupt
        return make_point(bench, variant)

    monkeypatch.setattr(search, "make_point", stop_second)
    request = seek(model, text, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt, match=r"4 of 7 points are complete"):
        run_compare(request, QUIET)
    study, states = list_states(tmp_path / "out")
    assert states.count("WAITING") == 1 and states.count("FAIL") == 1
    frontier = run_compare(request, QUIET)
    assert made[2] == made[1]
    assert leave_out_times(make_plain(frontier.points)) == leave_out_times(make_plain(searched[1].points))
    assert frontier.manifest["search"] == searched[1].manifest["search"]
    assert frontier.answers == searched[1].answers
    # Nothing is left to do; more trials go on from these.
    monkeypatch.setattr(search, "make_point", pytest.fail)
    monkeypatch.setattr("cli.frontier_plans.find_units", pytest.fail)
    again = run_compare(request, QUIET)
    assert leave_out_times(make_plain(again.points)) == leave_out_times(make_plain(frontier.points))
    monkeypatch.undo()
    more = run_compare(seek(model, text, tmp_path / "out", search=TRIALS + 1), QUIET)
    assert more.manifest["search"][:TRIALS] == frontier.manifest["search"]
    assert len(more.manifest["search"]) == TRIALS + 1


def start_process(model, text, folder):
    given = [
        "compare", model, "--text", text, "-o", folder, "--keep", "0.9,0.6", "--windows", 6, "--length", 24,
        "--refine", 0, "--axes", "ffn,layers", "--samples", 0, "--profile", "cpu-avx2", "--search", TRIALS, "--quiet",
        "--threads", 1,
    ]  # fmt: skip
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", "cli", *map(str, given)], cwd=ROOT, env=ENVIRONMENT, **pipes)


def wait_for_another(folder, worker):
    """Wait until another process than this has finished a trial."""
    deadline = time.monotonic() + 500
    while time.monotonic() < deadline and worker.poll() is None:
        trials = list_states(folder)[0].get_trials(deepcopy=False)
        pids = [one.user_attrs["owner"]["pid"] for one in trials if one.state.is_finished()]
        if set(pids) - {os.getpid()}:
            return
        time.sleep(0.05)


@with_optuna
def test_processes_divide_the_trials(model, text, tmp_path, monkeypatch):
    """This process holds a trial until another, in the same folder, has finished one; then both go on."""
    make_point, workers, folder = search.make_point, [], tmp_path / "out"

    def begin_another(bench, variant):
        if not workers:
            workers.append(start_process(model, text, folder))
            wait_for_another(folder, workers[0])
        return make_point(bench, variant)

    monkeypatch.setattr(search, "make_point", begin_another)
    frontier = run_compare(seek(model, text, folder), QUIET)
    said = workers[0].communicate(timeout=500)
    assert workers[0].returncode == 0, said
    study, _ = list_states(folder)
    trials = turns.list_active(study)
    assert sorted(one.user_attrs["place"] for one in trials) == list(range(TRIALS))
    assert len({one.user_attrs["owner"]["pid"] for one in trials}) == 2
    made = {one.user_attrs["point"] for one in trials if "point" in one.user_attrs}
    last = json.loads((folder / "frontier.json").read_text())  # by whichever ended last
    assert made <= {point["name"] for point in last["points"]}
    assert {row["state"] for row in last["manifest"]["search"]} <= {"complete", "pruned"}
    assert len(frontier.manifest["search"]) == TRIALS
    assert not (folder / "work").exists()


@with_optuna
def test_trials_are_claimed_once_and_dead_ones_again(tmp_path):
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = str(tmp_path / "study.log")
    studies = [
        optuna.create_study(
            storage=studying.open_storage(path),
            study_name="x",
            directions=["minimize", "maximize"],
            load_if_exists=True,
        )
        for _ in range(2)
    ]
    first, second = (turns.claim_trial(study, 2) for study in studies)
    assert [one.user_attrs["place"] for one in (first, second)] == [0, 1]
    assert turns.claim_trial(studies[0], 2) is None
    first.suggest_float("keep", 0, 1)
    assert turns.claim_trial(studies[1], 2) is None  # this process lives
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    begun = turns.read_start(child.pid)
    assert begun and begun == turns.read_start(child.pid)
    first.set_user_attr("owner", {"host": turns.platform.node(), "pid": child.pid, "started": begun})
    assert turns.claim_trial(studies[1], 2) is None
    child.communicate(b"\n")
    assert turns.read_start(child.pid) == ""
    again = turns.claim_trial(studies[1], 2)
    assert again.user_attrs["place"] == 0 and again.user_attrs["tries"] == 2
    assert again.suggest_float("keep", 0, 1) == first.params["keep"]
    assert not turns.tell_failure(studies[0], first.number)
    # Another machine is known by its signs of life alone.
    second.set_user_attr("owner", {"host": "elsewhere", "pid": os.getpid(), "started": ""})
    for silence, state in ((1, False), (2 * turns.DEAD_SECONDS, True)):
        second.set_user_attr("beat", time.time() - silence)
        trial = next(one for one in studies[0].get_trials() if one.number == second.number)
        assert turns.is_dead(trial) is state


@with_optuna
def test_trials_without_a_model_are_noted(model, text, tmp_path, monkeypatch, capsys):
    """FFN channels alone reach 0.5 only; and a model without numbers does not end the search."""
    make_point, failed = search.make_point, []

    def fail_first(bench, variant):
        if not failed:
            failed.append(variant.name)
            raise RunFailure("no numbers.")
        return make_point(bench, variant)

    monkeypatch.setattr(search, "make_point", fail_first)
    request = seek(
        model, text, tmp_path / "out", levels=Levels(points=2), recipe={"axes": ("ffn",), "seed": 1}, search=6
    )
    frontier = run_compare(request, QUIET)
    reasons = [row["reason"] for row in frontier.manifest["search"] if row["state"] == "pruned"]
    assert "no numbers." in reasons and any("cannot reach" in reason for reason in reasons), reasons
    assert "is left out: no numbers." in capsys.readouterr().err
    assert f"{len(reasons)} impossible" in frontier.speed_notes[-1]


@with_optuna
def test_equal_plans_and_formats(model, text, tmp_path, monkeypatch):
    """One amount and one axis leave one plan: the level's own point serves all trials of its format."""
    monkeypatch.setattr(search, "DIGITS", 1)
    request = seek(
        model, text, tmp_path / "out", levels=Levels(keep=(0.7,)), recipe={"axes": ("ffn",)}, formats=("fp32", "int8"),
        profiles=("cpu-avx2", PROFILES[1]),
    )  # fmt: skip
    frontier = run_compare(request, QUIET)
    assert [point.name for point in frontier.points] == [DENSE, "dense-int8", "keep-0.70", "keep-0.70-int8"]
    rows = frontier.manifest["search"]
    assert {row["point"] for row in rows} <= {"keep-0.70", "keep-0.70-int8"}
    assert sum(row["again"] for row in rows) == len(rows) - len({row["point"] for row in rows})
    assert [row["state"] for row in rows] == ["complete"] * TRIALS


@with_optuna
def test_database_holds_a_study_and_no_password_is_shown(model, text, tmp_path):
    url = f"sqlite:///{tmp_path / 'search.db'}"
    request = seek(model, text, tmp_path / "out", search=1, storage=url)
    frontier = run_compare(request, QUIET)
    assert len(frontier.manifest["search"]) == 1
    assert not (tmp_path / "out" / place.LOG).exists()
    elsewhere = run_compare(seek(model, text, tmp_path / "new", search=1, storage=url), QUIET)
    made = {row["point"] for row in frontier.manifest["search"]} - {None, "keep-0.90", "keep-0.60"}
    assert ("1 with points in other folders" in elsewhere.speed_notes[-1]) == bool(made)
    assert all(not point.name.startswith("search-") for point in elsewhere.points)
    secret = seek(model, text, tmp_path / "out", storage="postgresql://me:secret@host/db")
    assert "secret" not in describe_run(secret) and "postgresql://USER:PASSWORD@host/db" in describe_run(secret)


@with_optuna
def test_axes_are_those_that_the_recipe_and_the_model_allow(model, text, tmp_path):
    def axes_of(**recipe):
        made = prepare_frontier(seek(model, text, tmp_path / "out", recipe=recipe), QUIET)
        return studying.open_space(made).axes

    assert axes_of(axes=("ffn", "kv", "layers")) == ("ffn", "ffn+kv", "ffn+layers", "ffn+kv+layers")
    assert axes_of(axes=("kv",)) == ("kv",)
    assert axes_of(axes=("ffn", "hidden"), rotate="pca") == ("ffn+hidden",)
    assert axes_of(axes=("ffn", "kv"), ratio="equal") == ("ffn+kv",)


def test_names_say_which_axes_are_cut():
    four = ("ffn", "kv", "hidden", "layers")
    assert search.name_axes(four, four) == ""
    assert search.name_axes(("ffn", "hidden", "layers"), four) == "-no-kv"
    assert search.name_axes(("ffn", "kv"), four) == "-ffn+kv"
    assert search.name_axes(("ffn",), four) == "-ffn"
    assert search.name_axes(("ffn", "kv"), ("ffn", "kv", "hidden")) == "-ffn+kv"


# Mistakes


@with_optuna
def test_another_study_is_refused(searched, model, text, tmp_path):
    folder, _ = searched
    log = folder / place.LOG
    before = log.read_bytes()
    others = [
        ("another recipe: give another --storage", {"recipe": {"axes": ("ffn", "layers"), "seed": 1}}),
        ("another first profile", {"profiles": ("cpu-amx",)}),
        ("another range of --keep", {"levels": Levels(keep=(0.9, 0.5))}),
        ("another list of --formats", {"formats": ("fp32", "int8")}),
    ]
    for words, changes in others:
        request = seek(model, text, tmp_path / "out", storage=str(log), **changes)
        refused(lambda request=request: run_compare(request, QUIET), f"{log} holds a search with {words}")
    assert log.read_bytes() == before
    assert not (tmp_path / "out").exists()


@with_optuna
@pytest.mark.parametrize(
    ("storage", "words"),
    [
        ("sqlite:////no/such/folder/x.db", "cannot be opened"),
        ("nosuch://me:secret@host/db", "cannot be opened"),
        ("TEXT", "cannot be opened"),
    ],
)
def test_storage_that_is_none_is_refused(storage, words, model, text, tmp_path):
    request = seek(model, text, tmp_path / "out", storage=str(text) if storage == "TEXT" else storage)
    with pytest.raises(UserError, match=words) as caught:
        run_compare(request, QUIET)
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@with_optuna
def test_overwriting_waits_for_nobody_at_work(model, text, tmp_path):
    request = seek(model, text, tmp_path / "out", search=1)
    first = run_compare(request, QUIET)
    anew = seek(model, text, tmp_path / "out", search=1, overwrite=True, recipe={"axes": ("ffn",), "seed": 2})
    code = (
        "import fcntl, sys; lock = open(sys.argv[1], 'a+b'); fcntl.lockf(lock, fcntl.LOCK_SH, 1, 0)\n"
        "print('held', flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out" / place.LOCK)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    refused(lambda: run_compare(anew, QUIET), "Another process is at work")
    left = tmp_path / "out" / "points" / ".search-09.partial-1"
    left.mkdir()
    run_compare(request, QUIET)
    assert left.exists()  # it may be the other's
    other.communicate("\n")
    second = run_compare(anew, QUIET)
    assert not left.exists()
    assert [row["trial"] for row in second.manifest["search"]] == [1]
    assert second.manifest["search"] != first.manifest["search"]


@with_optuna
def test_search_joins_no_run_of_another_kind(searched, model, text, monkeypatch, tmp_path):
    folder, _ = searched
    code = (
        "import fcntl, sys; lock = open(sys.argv[1], 'a+b'); fcntl.lockf(lock, fcntl.LOCK_EX, 3)\n"
        "print('held', flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(folder / place.LOCK)]
    plain = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert plain.stdout.readline() == "held\n"
    refused(lambda: run_compare(seek(model, text, folder), QUIET), "Another process is at work", "wait for its end")
    plain.communicate("\n")
    out = tmp_path / "a" / "out"
    monkeypatch.setattr(place.Place, "is_alone", lambda self: False)  # another began it, and was refused meanwhile
    refused(lambda: run_compare(seek(model, text, out), QUIET), "ended before it got far", "start this one again")


@with_optuna
def test_refused_search_leaves_nothing(model, text, tmp_path, monkeypatch):
    unreachable = {"levels": Levels(keep=(0.9, 0.01))}
    refused(lambda: run_compare(seek(model, text, tmp_path / "out", **unreachable), QUIET), "--keep 0.01 leaves")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(sys.modules, "fcntl", None)
    refused(lambda: run_compare(seek(model, text, tmp_path / "out"), QUIET), "--search needs locks on files")
    assert list(tmp_path.iterdir()) == []


@with_optuna
def test_flags_that_leave_nothing_to_search_are_refused(model, text, tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTPRESS_PROFILES", str(tmp_path / "none"))  # a machine that nobody measured
    request = seek(model, text, tmp_path / "out", levels=Levels(speedup=("1.2",)))
    refused(lambda: run_compare(request, QUIET), "give --keep or --points with it")
    request = seek(model, text, tmp_path / "out", profiles=())
    refused(lambda: run_compare(request, QUIET), "this-machine has no profile yet", "lightpress profiles measure")


def test_idle_storage_is_refused(model, text, tmp_path):
    given = (model, "--text", text, "-o", tmp_path / "out", "--profile", "cpu-avx2")
    for more, words in ((("--storage", "x.log"), "without --search"), (("--search", 2, "--storage", " "), "is empty")):
        done = run_verb(*given, *more)
        assert done.exit_code == 2 and words in done.stderr
    assert not (tmp_path / "out").exists()


def test_search_without_optuna_is_one_sentence(model, text, tmp_path, monkeypatch):
    """Whatever is installed here."""
    find = importlib.util.find_spec
    hide = lambda name, *more: None if name == "optuna" else find(name, *more)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hide)
    monkeypatch.setitem(sys.modules, "optuna", None)
    done = run_verb(model, "--text", text, "-o", tmp_path / "out", "--profile", "cpu-avx2", "--search", 2)
    assert done.exit_code == 2, done.stderr
    assert done.stderr.strip().endswith("--search needs Optuna: pip install 'lightpress[search]'.")
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@with_optuna
def test_trial_that_ends_its_process_each_time_is_left_out(model, text, tmp_path, monkeypatch, capsys):
    make_point, names = search.make_point, []

    def stop(bench, variant):
        names.append(variant.name)
        raise KeyboardInterrupt

    request = seek(model, text, tmp_path / "out", search=2, recipe={"axes": ("ffn",)})
    monkeypatch.setattr(search, "make_point", stop)
    for _ in range(search.MOST_TRIES):
        with pytest.raises(KeyboardInterrupt):
            run_compare(request, QUIET)
    assert len(names) == search.MOST_TRIES and len(set(names)) == 1
    monkeypatch.setattr(search, "make_point", make_point)
    rows = run_compare(request, QUIET).manifest["search"]
    assert [(row["trial"], row["state"]) for row in rows] == [(1, "pruned"), (2, "complete")]
    assert "ended 3 times" in rows[0]["reason"] and "ended 3 times" in capsys.readouterr().err


@with_optuna
def test_trial_that_another_machine_took_over_is_left_to_it(model, text, tmp_path, monkeypatch, capsys):
    make_point = search.make_point

    def pause(bench, variant):
        study, _ = list_states(tmp_path / "out")
        turns.give_back(study, study.get_trials(deepcopy=False)[-1])
        monkeypatch.setattr(search, "make_point", make_point)
        return make_point(bench, variant)

    monkeypatch.setattr(search, "make_point", pause)
    rows = run_compare(seek(model, text, tmp_path / "out", search=1), QUIET).manifest["search"]
    assert [(row["trial"], row["state"]) for row in rows] == [(1, "complete")]
    assert "trial 1 of the search paused for so long" in capsys.readouterr().err
