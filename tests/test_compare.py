"""`compare`: the frontier's answers against slow twins, and whole comparisons of tiny models."""

import csv
import io
import json
import math
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from made_findings import make_findings, make_spec
from refusals import refused
from test_cli import ENVIRONMENT, ROOT, copy_model
from typer.testing import CliRunner

import cli.frontier_plans
import cli.frontier_proof
from cli.app import Verb, Verbs
from cli.compare import compare, read_levels
from cli.console import Console, RunFailure
from cli.frontier import explain_levels, run_compare
from cli.frontier_job import Variant, prepare_frontier
from cli.frontier_quality import bound_shares
from cli.frontier_request import CompareRequest, Levels, TaskFlags
from cli.frontier_shared import raise_failure, slice_levels
from cli.frontier_store import load_point, revive_point
from cli.frontier_table import explain_answers, render_frontier
from cli.request import BenchSize
from compress.checkpoint import open_checkpoint
from compress.choose import Prices
from compress.errors import UserError
from compress.evaluate import compare_quality
from compress.frontier import (
    RESAMPLES,
    Standing,
    answer_device,
    count_agreed,
    find_frontier,
    find_knee,
    measure_repetition,
    resample_means,
    sample_damage,
    score_windows,
    spread_levels,
)
from compress.plan import LOSS_EXPONENT
from compress.recipe import Recipe
from compress.report import DIFFERENT, Proof, make_plain
from compress.report_frontier import DENSE, Interval, Point, PointSpeed
from compress.text import load_tokenizer, read_windows
from compress.weights import read_spec

SMALL = {"windows": 6, "length": 24, "refine": 0, "axes": ("ffn",)}
PROFILES = ("cpu-avx2", "ascend-910b3")
KEEP = (0.9, 0.7, 0.5)
CPU = ("--profile", "cpu-avx2")


# Pure arithmetic


def find_frontier_slowly(standings):
    """Compare every pair; of equals the first stays."""
    kept = []
    for place, one in enumerate(standings):
        beaten = any(
            other.speed >= one.speed
            and other.loss <= one.loss
            and (other.speed > one.speed or other.loss < one.loss or index < place)
            for index, other in enumerate(standings)
        )
        if not beaten:
            kept.append(one)
    return tuple(sorted(kept, key=lambda own: own.speed))


@pytest.mark.parametrize("seed", range(30))
def test_frontier_equals_its_slow_twin(seed):
    words = random.Random(seed)
    # Few different values make many ties.
    count = words.randint(1, 12)
    standings = [Standing(str(place), words.randint(1, 6), words.randint(1, 6)) for place in range(count)]
    found = find_frontier(standings)
    assert found == find_frontier_slowly(standings)
    assert all(one.speed < two.speed and one.loss < two.loss for one, two in zip(found, found[1:], strict=False))


def test_knee_is_the_point_furthest_from_the_line_between_the_ends():
    ends = [Standing("slow", 1, 0), Standing("fast", 5, 8)]
    bent = [ends[0], Standing("bend", 4, 2), Standing("late", 4.5, 5), ends[1]]
    assert find_knee(bent).name == "bend"
    hollow = [ends[0], Standing("bad", 1.5, 6), ends[1]]  # pays first and gains later: nothing to stop at
    assert find_knee(hollow) is None
    assert find_knee(ends) is None


def make_point(name, perplexity, speedup, profile="a"):
    speed = PointSpeed(profile, "decode", False, 100 * speedup, speedup, {}, 0.0)
    return Point(name, 1.0, "fp32", 0, (), 8, 1, 1, Interval(perplexity), None, None, {profile: speed})


def test_answers_name_points_of_the_frontier_only():
    points = [
        make_point(DENSE, 10.0, 1.0), make_point("b", 10.1, 1.4), make_point("c", 10.15, 1.3),
        make_point("d", 12.0, 2.0), make_point("e", 13.0, 1.9), make_point("f", 30.0, 2.1),
    ]  # fmt: skip
    found = answer_device(points, "a", 0.02, 1.5)
    assert found.frontier == (DENSE, "b", "d", "f")
    assert (found.fastest, found.best, found.knee) == ("b", "d", "d")
    strict = answer_device(points, "a", 0.001, 5.0)
    assert (strict.fastest, strict.best) == (None, None)
    assert answer_device([*points, make_point("g", 1.0, 9.0, "b")], "a", 0.02, 1.5) == found  # elsewhere only


def test_bootstrap_equals_its_slow_twin():
    values = torch.randn(7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    means = resample_means(values, 5)
    chosen = torch.randint(7, (RESAMPLES, 7), generator=torch.Generator().manual_seed(5))
    for row in (0, 1, RESAMPLES - 1):
        wanted = sum(values[place] for place in chosen[row].tolist()) / 7
        assert torch.allclose(means[row], wanted, rtol=1e-12)


def test_intervals_hold_the_value_and_the_paired_one_is_narrower():
    random_ = torch.Generator().manual_seed(0)
    dense = 40 + 8 * torch.rand(32, generator=random_)
    other = dense + 1 + 0.2 * torch.rand(32, generator=random_)  # a hard window is hard for both
    sums = torch.stack([dense, other, torch.full((32,), 2.0), torch.full((32,), 15.0)], 1)
    scores = score_windows(sums, 20, 0)
    assert scores.perplexity.value == pytest.approx(math.exp(float(other.double().mean()) / 20))
    assert scores.ratio.value == pytest.approx(math.exp(float((other - dense).double().mean()) / 20))
    for one in (scores.perplexity, scores.ratio):
        assert one.low < one.value < one.high
    assert scores.ratio.high / scores.ratio.low < scores.perplexity.high / scores.perplexity.low
    assert (scores.divergence.value, scores.agreement.value) == pytest.approx((0.1, 0.75))
    assert score_windows(sums, 20, 0) == scores != score_windows(sums, 20, 1)
    assert score_windows(sums[:1], 20).perplexity.low is None


def test_generated_text_is_compared_token_by_token():
    assert count_agreed([1, 2, 3], [1, 2, 4]) == 2
    assert count_agreed([1, 2], [1, 2]) == 2
    assert count_agreed([], []) == 0
    assert measure_repetition(range(10)) == 0
    assert measure_repetition([7] * 10) == pytest.approx(6 / 7)
    assert measure_repetition([1, 2]) == 0


def test_damage_curves_are_those_that_plans_are_made_from():
    findings = make_findings(make_spec("llama"))
    curves = sample_damage(findings, Prices({"kv": 2.0, "ffn": 0.5}, {1: (3.0, 1.0)}))
    layer, rows = findings.layers[1], dict(curves["1"]["ffn"])
    assert len(curves) == 4 and len(rows) == 9
    assert rows[1.0] == 0
    for kept, loss in rows.items():
        wanted = 0.5 * layer.ffn_damage(round(kept * 56)) ** LOSS_EXPONENT
        assert loss == pytest.approx(wanted, rel=1e-3)
    kept, loss = curves["1"]["kv"][-1]
    assert loss == pytest.approx(6.0 * layer.kv_damage(round(kept * 3)) ** LOSS_EXPONENT, rel=1e-3)


def test_levels_are_spread_evenly():
    assert spread_levels(6) == (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
    assert spread_levels(1) == (0.4,)
    assert bound_shares({"a": 0.5}, 100)["a"].low < 0.5


# Whole comparisons


@pytest.fixture(scope="module")
def finished(model, text, tmp_path_factory):
    """A complete comparison, which tests must not change."""
    folder = tmp_path_factory.mktemp("compared") / "out"
    return folder, run_compare(ask(model, text, folder), Console(quiet=True))


def ask(model, text, folder, **changes):
    recipe = Recipe(**{**SMALL, **changes.pop("recipe", {})})
    given = {"profiles": PROFILES, "levels": Levels(keep=KEEP), "samples": 2, "speed": BenchSize(8, 4, 2, 1)}
    return CompareRequest(str(model), recipe, folder, text, **{**given, **changes})


def leave_out_times(value):
    """Plain results without what a clock says and without the place."""
    if isinstance(value, dict):
        kept = {name: item for name, item in value.items() if name not in ("seconds", "folder", "command", "commands")}
        return {name: leave_out_times(item) for name, item in kept.items()}
    return [leave_out_times(item) for item in value] if isinstance(value, list) else value


def test_comparison_holds_all_points_on_all_devices(finished, model, text):
    folder, frontier = finished
    assert [point.name for point in frontier.points] == [DENSE, "keep-0.90", "keep-0.70", "keep-0.50"]
    sizes = [point.parameters for point in frontier.points]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    for point in frontier.points:
        assert list(point.speeds) == list(PROFILES)
        assert not any(speed.measured for speed in point.speeds.values())
        assert len(point.samples) == 2 and point.samples[0].tokens == 12
        assert len(point.layers) == 4 and point.layers[0].ffn % 8 == 0
    for name in PROFILES:
        speedups = [point.speeds[name].speedup for point in frontier.points]
        assert speedups[0] == 1 and speedups == sorted(speedups)
        assert set(frontier.answers[name].frontier) <= {point.name for point in frontier.points}
    dense, *cut = frontier.points
    assert (dense.divergence, dense.agreement, dense.ratio) == (None, None, None)
    assert all(sample.agreed == sample.tokens for sample in dense.samples)
    losses = [point.divergence.value for point in cut]
    assert losses == sorted(losses) and losses[0] > 0
    assert set(frontier.damage) == {"0", "1", "2", "3"}
    for name in ("report.html", "frontier.json", "frontier.csv", "compare.json", "plans/keep-0.70.json"):
        assert (folder / name).stat().st_size > 0
    assert not (folder / "work").exists()
    assert "ONNX graph" not in (folder / "report.html").read_text()  # there is none


def test_quality_is_that_of_evaluate(finished, model, text):
    folder, frontier = finished
    point = frontier.points[2]
    dense, other = ((one, read_spec(one)) for one in map(open_checkpoint, (model, folder / "points" / point.name)))
    tokenizer, config = load_tokenizer(model), dict(dense[1].config)
    windows = read_windows(text, tokenizer, config, (6 + 32, 24), "text")
    kept = type(windows)(windows.ids[-frontier.manifest["evaluation_tokens"] // 24 :], "")
    first, second = compare_quality(dense, other, kept)
    assert frontier.points[0].perplexity.value == pytest.approx(first.perplexity, rel=1e-6)
    assert point.perplexity.value == pytest.approx(second.perplexity, rel=1e-6)
    assert point.divergence.value == pytest.approx(second.divergence, rel=1e-5)
    assert point.agreement.value == pytest.approx(second.agreement)
    assert point.ratio.value == pytest.approx(second.perplexity / first.perplexity, rel=1e-6)


def test_table_and_files_say_the_same(finished):
    folder, frontier = finished
    shown = render_frontier(frontier)
    assert max(map(len, shown.splitlines())) <= 80
    for name in (*(point.name for point in frontier.points), *PROFILES):
        assert name in shown
    rows = list(csv.DictReader(io.StringIO((folder / "frontier.csv").read_text())))
    assert len(rows) == len(frontier.points) * len(PROFILES)
    stored = json.loads((folder / "frontier.json").read_text())
    assert stored == json.loads(json.dumps(make_plain(frontier)))
    for row in rows:
        point = next(one for one in stored["points"] if one["name"] == row["point"])
        assert float(row["speedup"]) == point["speeds"][row["profile"]]["speedup"]
        assert float(row["perplexity"]) == point["perplexity"]["value"]
        assert (row["frontier"] == "True") == (row["point"] in stored["answers"][row["profile"]]["frontier"])
    assert all(sentence.endswith(".") for name in PROFILES for sentence in explain_answers(frontier, name))


def test_points_are_those_of_compress(finished, model, text, tmp_path):
    """The command that a point names makes the same weights."""
    from cli.app import app

    folder, frontier = finished
    words = frontier.points[1].command.split()
    done = CliRunner().invoke(app, [*words[1:-1], str(tmp_path / "again"), "--no-export", "--no-verify", "--no-bench"])
    assert done.exit_code == 0, done.stderr
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (folder / "points" / "keep-0.90" / name).read_bytes()


def test_repeat_reuses_points_and_says_the_same(finished, model, text, tmp_path, monkeypatch):
    folder, frontier = finished
    monkeypatch.setattr(cli.frontier_plans, "find_units", pytest.fail)
    monkeypatch.setattr("cli.frontier_points.compress_checkpoint", pytest.fail)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.parent != folder and path.is_file()}
    again = run_compare(ask(model, text, folder), Console(quiet=True))
    assert leave_out_times(make_plain(again)) == leave_out_times(make_plain(frontier))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # Another device costs nothing but its prediction.
    more = run_compare(ask(model, text, folder, profiles=(*PROFILES, "cpu-amx")), Console(quiet=True))
    assert list(more.answers) == [*PROFILES, "cpu-amx"]
    assert more.points[1].speeds["cpu-amx"].speedup > 1


def test_one_calibration_and_one_dense_evaluation_serve_all_points(finished, model, text, tmp_path, monkeypatch):
    """An interrupt at the second cut keeps what is complete; the run that goes on repeats none of it.

    With the same seed it ends with the table of a run that nobody stopped.
    """
    calls = {"find_units": 0, "dense": 0, "continued": 0, "rebuilt": []}
    find_units, fill = cli.frontier_plans.find_units, cli.frontier_quality.fill_hidden
    load = cli.frontier_quality.load_eager
    compress_one = cli.frontier_points.compress_checkpoint

    def count_units(*given):
        calls["find_units"] += 1
        return find_units(*given)

    def count_fill(checkpoint, *given):
        calls["dense"] += checkpoint.folder == model
        return fill(checkpoint, *given)

    def count_continued(checkpoint):
        calls["continued"] += checkpoint.folder == model
        return load(checkpoint)

    def count_rebuilt(task, plan, writer, progress):
        calls["rebuilt"].append(task.recipe.keep)
        if calls["rebuilt"] == [0.9, 0.7]:
            raise KeyboardInterrupt
        return compress_one(task, plan, writer, progress)

    monkeypatch.setattr(cli.frontier_plans, "find_units", count_units)
    monkeypatch.setattr(cli.frontier_quality, "fill_hidden", count_fill)
    monkeypatch.setattr(cli.frontier_quality, "load_eager", count_continued)
    monkeypatch.setattr(cli.frontier_points, "compress_checkpoint", count_rebuilt)
    request = ask(model, text, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt, match=r"2 of 4 points are complete"):
        run_compare(request, Console(quiet=True))
    names = sorted(path.parent.name for path in (tmp_path / "out" / "points").glob("*/point.json"))
    assert names == [DENSE, "keep-0.90"]
    assert not (tmp_path / "out" / "report.html").exists()
    again = run_compare(request, Console(quiet=True))
    assert leave_out_times(make_plain(again.points)) == leave_out_times(make_plain(finished[1].points))
    assert again.answers == finished[1].answers
    assert calls == {"find_units": 1, "dense": 1, "continued": 1, "rebuilt": [0.9, 0.7, 0.7, 0.5]}


def test_killed_run_goes_on(model, text, tmp_path):
    """SIGKILL leaves a hidden folder at most, which the next run removes."""
    out = tmp_path / "out"
    code = (
        "import os, sys, cli.frontier_points as points, cli.written as written\n"
        "from cli.compare import compare; import typer\n"
        "real = points.write_cut\n"
        "def dying(bench, level, folder):\n"
        "    class Dying(written.CheckpointWriter):\n"
        "        def seal(self): os.kill(os.getpid(), 9)\n"
        "    if level.name == 'keep-0.70': written.CheckpointWriter = Dying\n"
        "    return real(bench, level, folder)\n"
        "points.write_cut = dying\n"
        "app = typer.Typer(); app.command()(compare); app()\n"
    )
    given = [str(model), "--text", str(text), "--keep", "0.9,0.7", "--profile", "cpu-avx2", "-o", str(out), "--quiet"]
    small = ["--windows", "6", "--length", "24", "--refine", "0", "--axes", "ffn", "--samples", "0"]
    ran = subprocess.run([sys.executable, "-c", code, *given, *small], cwd=ROOT, env=ENVIRONMENT, check=False)
    assert ran.returncode == -9
    points = out / "points"
    assert load_point(points / "keep-0.90") is not None and len(list(points.glob(".keep-0.70.partial-*"))) == 1
    made = (points / "keep-0.90" / "model.safetensors").stat().st_mtime_ns
    request = ask(model, text, out, profiles=("cpu-avx2",), levels=Levels(keep=(0.9, 0.7)), samples=0)
    frontier = run_compare(request, Console(quiet=True))
    assert [point.name for point in frontier.points] == [DENSE, "keep-0.90", "keep-0.70"]
    assert list(points.glob(".*")) == []
    assert (points / "keep-0.90" / "model.safetensors").stat().st_mtime_ns == made


def test_formats_tasks_and_this_machine(model, text, tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTPRESS_PROFILES", str(tmp_path / "none"))  # a machine that nobody measured
    choices, words = tmp_path / "words.jsonl", random.Random(1)
    rows = [{"question": f"w{words.randint(3, 95)}", "choices": ["w5 w6", "w7 w8"], "answer": 0} for _ in range(12)]
    choices.write_text("\n".join(map(json.dumps, rows)))

    request = ask(
        model, text, tmp_path / "out", profiles=("this-machine", "ascend-910b3"), levels=Levels(keep=(0.6,)),
        formats=("fp32", "int4"), tasks=TaskFlags(choices=(choices,)), figures=tmp_path / "figures",
        recipe={"workload": "16+8"},
    )  # fmt: skip
    scorer = {"own": Interval(0.5, 0.4, 0.6)}
    frontier = run_compare(request, Console(quiet=True), lambda model: scorer)
    points = {point.name: point for point in frontier.points}
    assert list(points) == [DENSE, "dense-int4", "keep-0.60", "keep-0.60-int4"]
    for point in points.values():
        here = point.speeds["this-machine"]
        assert here.measured and here.low <= here.tokens_per_s <= here.high and here.seconds == {}
        assert ("ascend-910b3" in point.speeds) == (point.format == "fp32")  # it has no int4
        assert 0 <= point.accuracy["words"].low <= point.accuracy["words"].value <= 1
        assert ("own" in point.accuracy) == (point.format == "fp32")
    assert points[DENSE].speeds["this-machine"].speedup == 1
    assert points["dense-int4"].divergence.value > 0
    assert points["dense-int4"].bytes < points[DENSE].bytes
    assert not any(name.endswith("int4") for name in frontier.answers["ascend-910b3"].frontier)
    assert any(path.suffix == ".svg" for path in (tmp_path / "figures").iterdir())
    shown, page = render_frontier(frontier), (tmp_path / "out" / "report.html").read_text()
    assert "16 prompt and 8 new" in shown
    graphs = "Quality in int4 is that of our ONNX graph, also beside speeds of other runtimes."
    assert graphs in " ".join(shown.split()) and graphs in page


def test_point_that_differs_from_the_model_in_memory_is_not_kept(model, text, tmp_path, monkeypatch):
    wrong = Proof("transformers", DIFFERENT, reason="logits differ")
    monkeypatch.setattr(cli.frontier_proof, "verify_folder", lambda *given, **named: [wrong])
    request = ask(model, text, tmp_path / "out", verify=True, levels=Levels(keep=(0.7,)), samples=0)
    with pytest.raises(RunFailure, match="keep-0.70 failed its verification with transformers: logits differ"):
        run_compare(request, Console(quiet=True))
    assert [path.name for path in (tmp_path / "out" / "points").iterdir()] == [DENSE]


def test_levels_out_of_reach_are_left_out_where_only_a_number_was_asked_for(model, text, tmp_path, capsys):
    levels = Levels(points=3)  # 0.8, 0.6, 0.4: FFN channels alone reach 0.5
    request = ask(model, text, tmp_path / "out", levels=levels, samples=0)
    for _ in range(2):
        found = run_compare(request, Console(quiet=True))
        assert [point.name for point in found.points] == [DENSE, "keep-0.80", "keep-0.60"]
    assert capsys.readouterr().err.count("keep-0.40 is left out: --keep 0.4 leaves") == 1
    named = ask(model, text, tmp_path / "new", levels=Levels(keep=(0.4,)), samples=0)
    refused(lambda: run_compare(named, Console(quiet=True)), "--keep 0.4 leaves")


def test_processes_make_the_same_points(finished, model, text, tmp_path):
    _, frontier = finished
    shared = run_compare(ask(model, text, tmp_path / "out", jobs=2), Console(quiet=True))
    assert leave_out_times(make_plain(shared.points)) == leave_out_times(make_plain(frontier.points))
    assert slice_levels(["a", "b", "c"], 2) == [["a", "c"], ["b"]]
    assert slice_levels(["a"], 4) == [["a"]]
    for kind, error in (("UserError", UserError), ("RunFailure", RunFailure)):
        with pytest.raises(error, match="why"):
            raise_failure((kind, "why"))


@pytest.mark.parametrize("changes", [{"rotate": "pca", "axes": ("ffn", "hidden")}, {"trials": 2}])
def test_rotated_and_tried_plans_have_points_too(changes, model, text, tmp_path):
    given = {"levels": Levels(keep=(0.8, 0.65)), "profiles": ("cpu-avx2",), "samples": 0}
    request = ask(model, text, tmp_path / "out", recipe=changes, **given)
    frontier = run_compare(request, Console(quiet=True))
    losses = [point.divergence.value for point in frontier.points[1:]]
    assert 0 < losses[0] < losses[1] < 5
    notes = json.loads((tmp_path / "out" / "plans" / "keep-0.65.json").read_text())
    assert notes["rotate"] == changes.get("rotate", "none")
    assert ("tried" in notes) == ("trials" in changes)


def test_speedups_are_planned_for_the_first_profile(model, text, tmp_path):
    request = ask(model, text, tmp_path / "out", levels=Levels(speedup=("1x", "1.03")), samples=0)
    frontier = run_compare(request, Console(quiet=True))
    assert [point.name for point in frontier.points] == [DENSE, "speedup-1", "speedup-1.03"]
    assert frontier.points[1].divergence.value == pytest.approx(0, abs=1e-9)
    assert frontier.points[2].speeds["cpu-avx2"].speedup >= 1.03
    assert frontier.points[2].keep < 1
    assert frontier.answers["cpu-avx2"].frontier[-1] == "speedup-1.03"


@pytest.mark.parametrize(("formats", "form"), [(("fp32", "int8"), "fp32"), (("int8",), "int8")])
def test_speedups_are_over_the_dense_model_in_the_same_format(formats, form, model, text, tmp_path):
    """What the page says of them is what their goals are."""
    given = {"levels": Levels(speedup=("1.03",)), "profiles": ("cpu-avx2",)}
    request = ask(model, text, tmp_path / "out", **given, formats=formats)
    made = prepare_frontier(request, Console(quiet=True))
    target, goal = made.targets[0], made.levels[0].goal
    work = replace(target.workload, weights=form, activations="fp32")
    dense = replace(target.device, workload=work).estimate(made.job.spec.shape).total
    assert (goal.dense, goal.limit) == (int(1e9 * dense), int(1e9 * dense / 1.03))
    (said,) = explain_levels(made)
    assert f"cpu-avx2 predicts N times the speed of the dense model, both in {form};" in said
    assert said.endswith("over the dense model in each device's plain format.")
    plain = ask(model, text, tmp_path / "out", **given)
    assert list(explain_levels(prepare_frontier(plain, Console(quiet=True)))) == []


def test_model_without_numbers_is_refused(model, text, tmp_path, monkeypatch):
    broken = torch.full((7, 4), math.nan, dtype=torch.float64)
    monkeypatch.setattr(cli.frontier_points, "compare_checkpoint", lambda *given: broken)
    with pytest.raises(RunFailure, match="keep-0.90 computes no numbers"):
        run_compare(ask(model, text, tmp_path / "out", samples=0), Console(quiet=True))


def test_recovered_points_stand_beside_the_cut_ones(model, text, tmp_path):
    held = tmp_path / "held.txt"
    held.write_text(text.read_text()[:6000])
    request = ask(
        model, text, tmp_path / "out", eval_text=held, levels=Levels(keep=(0.6,)), recover_tokens="2k", samples=0
    )
    frontier = run_compare(request, Console(quiet=True))
    cut, back = frontier.points[1:]
    assert (cut.name, back.name) == ("keep-0.60", "keep-0.60-recovered")
    assert cut.recovered_tokens == 0 and back.recovered_tokens >= 2000
    assert back.curve[-1].tokens == back.recovered_tokens and cut.curve == ()
    assert back.perplexity.value != cut.perplexity.value
    assert back.parameters == cut.parameters
    assert "lightpress recover" in back.command


# Mistakes


def run_verb(*arguments):
    app = typer.Typer(cls=Verbs)
    app.command("compare", cls=Verb)(compare)
    app.callback()(lambda: None)
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def test_verb_prints_json(finished, model, text):
    folder, frontier = finished
    given = [
        model, "--text", text, "-o", folder, "--keep", "0.9,0.7,0.5", "--windows", 6, "--length", 24, "--refine", 0,
        "--axes", "ffn", "--samples", 2, "--profile", PROFILES[0], "--profile", PROFILES[1], "--json",
    ]  # fmt: skip
    done = run_verb(*given)
    assert done.exit_code == 0, done.stderr
    assert [point["name"] for point in json.loads(done.stdout)["points"]] == [one.name for one in frontier.points]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((), "give --text FILE"),
        (("--text", "TEXT", "--keep", "1.5"), "--keep 1.5 must be above 0"),
        (("--text", "TEXT", "--keep", "0.9,much"), "is not a list of numbers"),
        (("--text", "TEXT", "--keep", "1,0.5"), "is the dense model"),
        (("--text", "TEXT", "--keep", "0.5", "--points", "3"), "give one of them"),
        (("--text", "TEXT", "--speedup", "fast"), "--speedup fast"),
        (("--text", "TEXT", "--profile", "ascend-911"), "There is no profile 'ascend-911'"),
        (("--text", "TEXT", "--formats", "int5"), "'int5' is not among"),
        (("--text", "TEXT", "--formats", "int4", "--profile", "ascend-910b3"), "no int4 weights"),
        (("--text", "TEXT", "--formats", "int4", *CPU, "--profile", "ascend-910b3"), "reads none of"),
        (("--text", "TEXT", "--figures", "TEXT"), "is a file"),
        (("--text", "TEXT", "--figures", "UNDER"), "cannot be made (Not a directory)"),
        (("--text", "TEXT", "--pairs", "TASK"), "has no 'sentence_good'"),
        (("--text", "TEXT", "--limit", "3"), "--limit does nothing"),
        (("--text", "TEXT", "--recover-tokens", "1k"), "give --eval-text FILE too"),
        (("--text", "TEXT", "--loss", "2"), "give it like 2%"),
        (("--text", "TEXT", "--at-least", "0x"), "give it like 1.5x"),
        (("--text", "SHORT"), "give --eval-text FILE too"),
        (("--text", "no.txt"), "no such text file"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(given, words, model, text, tmp_path):
    task, short = tmp_path / "task.jsonl", tmp_path / "short.txt"
    task.write_text('{"good": "a"}\n')
    short.write_text(" ".join(f"w{place}" for place in range(3, 40)))
    files = {"TEXT": text, "TASK": task, "SHORT": short, "UNDER": text / "sub" / "more"}
    profile = () if "--profile" in given else ("--profile", "cpu-avx2")
    done = run_verb(model, *(files.get(word, word) for word in given), *profile, "--length", 24, "-o", tmp_path / "out")
    assert done.exit_code == 2, done.stderr
    said = [line for line in done.stderr.strip().splitlines() if not line.startswith("lightpress: warning")]
    assert len(said) == 1 and words in said[0]
    assert not (tmp_path / "out").exists()


def test_folder_with_other_settings_is_refused(finished, model, text, tmp_path):
    folder, _ = finished
    before = sorted(folder.rglob("*"))
    quiet = Console(quiet=True)
    others = [("another recipe: choose another folder", "recipe", {"seed": 1}), ("profile", "profiles", ("cpu-amx",))]
    for words, name, value in others:
        changes = {name: value}
        refused(lambda changes=changes: run_compare(ask(model, text, folder, **changes), quiet), words)
    assert sorted(folder.rglob("*")) == before
    other = copy_model(model, tmp_path / "other")
    for overwrite in (False, True):
        request = ask(model, text, other, overwrite=overwrite)
        refused(lambda request=request: run_compare(request, quiet), "holds no earlier comparison")
    refused(lambda: run_compare(ask(model, text, model / "inside"), quiet), "lies inside it")


def test_overwriting_begins_anew(model, text, tmp_path):
    few = {"levels": Levels(keep=(0.7,)), "samples": 0, "profiles": ("cpu-avx2",)}
    run_compare(ask(model, text, tmp_path / "out", **few), Console(quiet=True))
    (tmp_path / "out" / "mine.txt").write_text("kept")
    request = ask(model, text, tmp_path / "out", **few, recipe={"seed": 1}, overwrite=True)
    frontier = run_compare(request, Console(quiet=True))
    assert frontier.manifest["seed"] == 1
    assert (tmp_path / "out" / "mine.txt").exists()


def test_points_survive_being_stored(finished):
    folder, frontier = finished
    for point in frontier.points:
        stored = make_plain(point)
        again = revive_point(stored, Path(stored["folder"]))
        assert make_plain(again) == {**stored, "speeds": {}}


def test_names_say_what_a_point_is():
    assert Variant(None).name == DENSE
    assert Variant(None, format="w8a8").name == "dense-w8a8"
    with pytest.raises(UserError):
        read_levels(3, "0.5", None)
