"""The command line as a user meets it: whole runs on tiny models, one sentence for each mistake, quick help."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file, save_file
from tiny import make_checkpoint
from typer.testing import CliRunner
from words import write_tokenizer

from cli.app import VERBS, app
from cli.console import Console, PlainMeter, align_table
from cli.options import ASCEND, CURRICULUM, HELP, PANELS, PLAN_KEYS, ROUNDS, WEIGHTS
from cli.planned import show_plan
from cli.prepare import Job, check_plan
from cli.render import render_choices, render_plan, render_tried
from cli.request import Request
from compress.checkpoint import open_checkpoint
from compress.errors import UserError
from compress.importance import SCORES
from compress.plan import LayerPlan, MergedGroups, Plan, keep_everything
from compress.recipe import CHOICES, Recipe, flag
from compress.report import LayerRow, PlanReport, make_plain
from compress.surgery.job import REFINE_STEPS
from compress.trials import TRIALS
from compress.weights import read_spec

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "-m", "cli.app"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
SMALL = ("--windows", "6", "--length", "24", "--threads", "1")
# What the default does on small models, ten trials and hundreds of steps, is for tests of those.
PLAIN = (*SMALL, "--trials", "0")
FAST = (*PLAIN, "--refine", "0")
LEAN = ("--no-export", "--no-verify", "--no-bench")


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Return a function from a case to a tiny checkpoint folder with a tokenizer, which tests must not change."""
    made = {}

    def make(case):
        if case not in made:
            made[case] = make_checkpoint(tmp_path_factory.mktemp("models") / case, case)
            write_tokenizer(made[case])
        return made[case]

    return make


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_json(*arguments):
    """Run with --json; stdout must be the one object and nothing else."""
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def copy_model(source, target):
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


# Whole runs


@pytest.mark.parametrize("case", ["llama", "glm4", "gemma2"])
def test_compress_runs_from_checkpoint_to_proof(case, model, text, tmp_path):
    out = tmp_path / "out"
    bare = ("--no-bench", "--no-export")
    fewer = {"llama": (), "glm4": (*bare, "--absorb", "all"), "gemma2": bare}[case]
    steps = 10 if case == "llama" else 0
    given = ("--keep", 0.7, "--text", text, "-o", out, *PLAIN, "--refine", steps, *fewer)
    report = run_json("compress", model(case), *given)
    proofs = [("transformers", "equal"), ("onnxruntime", "equal")][: 2 if case == "llama" else 1]
    assert [(proof["runtime"], proof["status"]) for proof in report["proofs"]] == proofs
    comparison = report["comparison"]
    assert comparison["compressed"]["layer_parameters"] <= 0.7 * comparison["dense"]["layer_parameters"]
    assert comparison["compressed"]["perplexity"] > 1
    assert 0 <= comparison["compressed"]["agreement"] <= 1
    assert bool(comparison["compressed"]["decode_tokens_per_s"]) == (case == "llama")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "lightpress.json"):
        assert (out / name).is_file(), name
    assert (out / "onnx" / "model.onnx").is_file() == (case == "llama")
    # Without the norms behind its branches the second is a plain pre-norm model, written as such.
    kind = json.loads((out / "config.json").read_text())["model_type"]
    assert kind in {"llama": ("llama", "mistral"), "glm4": ("glm",), "gemma2": ("gemma2",)}[case]
    manifest = json.loads((out / "lightpress.json").read_text())
    assert set(manifest["source"]["sha256"]) == {"config.json", "model.safetensors"}
    assert manifest["recipe"]["keep"] == 0.7
    assert manifest["plan"]["layers"][0]["ffn"]
    assert manifest["metrics"]["compressed"] == comparison["compressed"]
    assert manifest["versions"]["torch"] == torch.__version__
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_class_that_nobody_ships_is_proved_by_onnx_alone(model, text, tmp_path):
    arguments = ("compress", model("pangu_sandwich"), "--text", text, "-o", tmp_path / "out", *FAST, "--no-bench")
    proofs = run_json(*arguments)["proofs"]
    assert [proof["status"] for proof in proofs] == ["skipped", "equal"]
    assert "no class" in proofs[0]["reason"]


def test_printed_run_shows_plan_and_table(model, text, tmp_path):
    arguments = ("--axes", "ffn", "--keep", "0.8", "--text", text, "-o", tmp_path / "out", *FAST, *LEAN[:2])
    done = run("compress", model("llama"), *arguments)
    assert done.exit_code == 0, done.stderr
    for words in ("FFN channels", "56 -> ", "perplexity", "top-1 agreement", "decode tokens/s", "torch (eager)"):
        assert words in done.stdout
    assert "6 calibration windows" not in done.stderr


def test_model_samples_its_own_text(model, tmp_path):
    out = tmp_path / "out"
    done = run("compress", model("llama"), "--keep", 0.8, "-o", out, *FAST, *LEAN)
    assert done.exit_code == 0, done.stderr
    assert "samples its own" in done.stderr
    assert json.loads((out / "lightpress.json").read_text())["text"] == "sampled from the model itself"


def test_keep_all_is_bit_identical(model, text, tmp_path):
    source, out = model("llama-tied"), tmp_path / "out"
    arguments = ("--keep", "1.0", "--text", text, "-o", out, *SMALL, *LEAN[1:])
    report = run_json("compress", source, *arguments)
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert report["comparison"]["compressed"]["divergence"] == pytest.approx(0, abs=1e-9)
    assert json.loads((out / "config.json").read_text()) == json.loads((source / "config.json").read_text())


def test_edited_plan_is_carried_out(model, text, tmp_path):
    source, file, out = model("llama"), tmp_path / "plan.json", tmp_path / "out"
    shown = run("plan", source, "--keep", 0.7, "--text", text, "-o", file, *PLAIN, "--norms", "slnp")
    assert shown.exit_code == 0, shown.stderr
    assert f"--plan {file} --text {text} --norms slnp --windows 6 --length 24 -o OUT" in shown.stdout
    data = json.loads(file.read_text())
    for row in data["layers"]:
        row["ffn"], row["kv_groups"] = [0, 3, 5, 6, 9, 11, 20, 40], [1]
    data["layers"] = data["layers"][:1] + data["layers"][-1:]
    data["hidden"] = list(range(48))
    file.write_text(json.dumps(data))
    run_json("compress", source, "--plan", file, "--text", text, "-o", out, *SMALL, "--refine", 0, *LEAN)
    config = json.loads((out / "config.json").read_text())
    assert (config["intermediate_size"], config["num_key_value_heads"], config["num_hidden_layers"]) == (8, 1, 2)
    assert config["hidden_size"] == 48


def test_plan_writes_nothing_unasked(model, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    summary = run_json("plan", model("llama"), "--keep", 0.7, "--text", text, *PLAIN)
    assert summary["parameters"] < summary["dense_parameters"]
    assert summary["kept_fraction"] <= 0.7
    assert summary["plan"]["layers"]
    assert list(tmp_path.iterdir()) == []


def test_recipe_file_gives_way_to_flags(model, text, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("keep: 0.9\naxes: [ffn]\nscore-tokens: 96\n")
    shared = ("plan", model("llama"), "--text", text, "--recipe", recipe, *PLAIN)
    assert 0.8 < run_json(*shared)["kept_fraction"] <= 0.9
    summary = run_json(*shared, "--keep", 0.7)
    assert summary["kept_fraction"] <= 0.7
    assert summary["layers"][0]["kv_groups"] == 3


def test_other_verbs(model, text, tmp_path):
    source = model("gemma2")
    facts = run_json("inspect", source, "--check")
    assert (facts["family"], facts["layers"], facts["tied"], facts["finite"]) == ("gemma2", 4, True, True)
    assert facts["windows"] == [11, None, 11, None]
    assert "2 of 4 layers see 11 tokens" in run("inspect", source).stdout
    assert "onnx/model.onnx" in run_json("export", source, "--target", "onnx", "-o", tmp_path / "onnx")["graph"]
    alone = run_json("evaluate", source, "--text", text, "--windows", 4, "--length", 24)
    assert alone["dense"] is None
    pair = run_json("evaluate", source, "--against", source, "--text", text, "--windows", 4, "--length", 24)
    assert pair["compressed"]["agreement"] == 1
    assert pair["compressed"]["perplexity"] == pytest.approx(alone["compressed"]["perplexity"])
    speeds = run_json("bench", source, "--against", source, "--prompt", 8, "--new", 2, "--rounds", 1, "--threads", 1)
    assert speeds["runs"][0]["rows"][0]["compressed"]["decode"]["median"] > 0


def test_overwrite_replaces_only_when_asked(model, text, tmp_path):
    arguments = ("compress", model("llama"), "--keep", "1", "--text", text, "-o", tmp_path / "out", *SMALL, *LEAN)
    assert run(*arguments).exit_code == 0
    (tmp_path / "out" / "stale").touch()
    assert run(*arguments).exit_code == 2
    assert (tmp_path / "out" / "stale").exists()
    assert run(*arguments, "--overwrite").exit_code == 0
    assert not (tmp_path / "out" / "stale").exists()


# Mistakes


def poison_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors")


def truncate_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def drop_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (poison_weights, ["up_proj", "NaN"]),
        (truncate_weights, ["truncated"]),
        (drop_tokenizer, ["tokenizer.json"]),
    ],
)
def test_damaged_checkpoint_is_refused(damage, words, model, text, tmp_path):
    folder = copy_model(model("llama"), tmp_path / "model")
    damage(folder)
    refuse(("compress", folder, "--text", text, "-o", tmp_path / "out", *SMALL), words, tmp_path / "out")


def refuse(arguments, words, out=None):
    done = run(*arguments)
    assert done.exit_code == 2, (done.output, done.exception)
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("lightpress: ")
    for word in words:
        assert word in done.stderr
    if out is not None:
        assert not out.exists()
        assert not list(out.parent.glob(f".{out.name}.*"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--keep", "0"], ["--keep 0"]),
        (["--keep", "2"], ["--keep 2"]),
        (["--keep", "much"], ["--keep"]),
        (["--axes", "ffn,bones"], ["bones"]),
        (["--score", "luck"], ["luck"]),
        (["--repair", "glue"], ["glue"]),
        (["--text", "missing.txt"], ["missing.txt"]),
        (["--eval-text", "missing.jsonl"], ["missing.jsonl"]),
        (["--plan", "missing.json"], ["missing.json"]),
        (["--recipe", "missing.yaml"], ["missing.yaml"]),
        (["--keep", "0.01", "--axes", "kv", "--trials", "0"], ["--keep 0.01", "603 of 60,336 parameters"]),
        (["--keep", "0.02", "--axes", "ffn,kv", "--ratio", "equal"], ["the budget leaves", "keep more"]),
        (["--nonsense"], ["--nonsense"]),
        (["--refine", "-2"], ["--refine"]),
        (["--ratio", "equal"], ["--ratio equal", "--axes ffn,kv"]),
        (["--ratio", "softmax", "--axes", "ffn,kv"], ["--ratio softmax", "--shapes per-layer"]),
        (["--ratio", "equal", "--axes", "ffn,kv", "--trials", "2"], ["--trials does nothing with --ratio equal"]),
        (["--absorb-limit", "0.3"], ["--absorb-limit does nothing", "--absorb safe or all"]),
        (["--repair", "none", "--target", "dense"], ["--target does nothing", "--repair lstsq or diagonal or bias"]),
        (["--absorb", "safe"], ["no norms behind its branches"]),
        (["--rotate", "pca", "--axes", "ffn,kv"], ["--rotate pca", "add hidden to --axes"]),
        (["--depth", "clap", "--axes", "ffn"], ["--depth clap", "add layers to --axes"]),
    ],
)
def test_wrong_flag_is_one_sentence(flags, words, model, text, tmp_path):
    out = tmp_path / "out"
    given = () if "--text" in flags else ("--text", text)
    refuse(("compress", model("llama"), *given, "-o", out, *SMALL, "--quiet", *flags), words, out)


@pytest.mark.parametrize(
    ("case", "flags", "words"),
    [
        ("olmo2", ["--absorb", "all"], ["no norm before the attention"]),
        ("olmo2", ["--rotate", "pca"], ["only behind its branches"]),
        ("glm4", ["--rotate", "pca"], ["attn_out, mlp_out in layer 0", "--absorb all"]),
        ("glm4", ["--absorb", "all", "--keep", "1"], ["--absorb all", "--keep 1"]),
        ("glm4", ["--biases", "stock"], ["no place for a bias on o, down"]),
        ("glm4", ["--repair", "bias", "--biases", "own"], ["--repair bias", "--absorb all"]),
    ],
)
def test_what_a_family_cannot_do_is_refused_before_any_pass(case, flags, words, model, tmp_path, monkeypatch):
    monkeypatch.setattr("cli.prepare.gather_texts", lambda *_: pytest.fail("text was read"))
    refuse(("compress", model(case), "-o", tmp_path / "out", *flags), words, tmp_path / "out")


def write_plan_of(source, file, edit=lambda data: None):
    """Write a plan that keeps everything, edited."""
    assert run("plan", source, "--keep", "1", "-o", file, *SMALL, "--quiet").exit_code == 0
    data = json.loads(file.read_text())
    edit(data)
    file.write_text(json.dumps(data))


def test_flags_that_a_plan_file_decides_are_refused(model, tmp_path):
    values = {
        "keep": 0.5, "params": "1M", "memory": "1MB", "speedup": "2x", "latency": "1ms",
        "axes": "ffn", "multiple": 8, "shapes": "per-layer", "ratio": "loss", "trials": 3, "score": "flap",
        "score_tokens": 96, "depth": "clap", "absorb": "safe", "absorb_limit": 0.1, "absorb_constant": "mean-inverse",
    }  # fmt: skip
    assert set(values) == set(PLAN_KEYS)
    for name, value in values.items():
        words = ["already says what goes", flag(name)]
        refuse(("compress", model("llama"), "--plan", "p.json", flag(name), value, "-o", tmp_path / "out"), words)


def drop_second_layer(data):
    del data["layers"][1]
    data["layers"][0]["merged"] = [{"layer": 1, "kv_groups": [0]}]


def cut_hidden(data):
    data["hidden"] = data["hidden"][:40]


@pytest.mark.parametrize(
    ("case", "edit", "flags", "words"),
    [
        ("gemma2", drop_second_layer, (), ["layer 1 cannot live on in layer 0", "all tokens before", "'merged'"]),
        ("llama", cut_hidden, ("--target", "own"), ["--target own", "this plan removes hidden"]),
    ],
)
def test_plan_file_that_cannot_be_followed_is_refused(case, edit, flags, words, model, tmp_path):
    write_plan_of(model(case), tmp_path / "p.json", edit)
    out = tmp_path / "out"
    refuse(("compress", model(case), "--plan", tmp_path / "p.json", *flags, "-o", out, *SMALL), words, out)


def test_plan_of_another_basis_is_refused(model):
    checkpoint = open_checkpoint(model("llama"))
    spec = read_spec(checkpoint)
    plan = keep_everything(spec.shape)
    plan = replace(plan, hidden=plan.hidden[:40], notes={"rotate": "pca"})
    request = Request("model", Recipe(), plan=Path("p.json"))
    refused(lambda: check_plan(checkpoint, spec, plan, request), "p.json", "--rotate pca")
    check_plan(checkpoint, spec, plan, replace(request, recipe=Recipe(rotate="pca")))  # refuses nothing


def test_wrong_places_are_one_sentence(model, text, tmp_path):
    source, out = model("llama"), tmp_path / "out"
    refuse(("compress", tmp_path / "nowhere", "--text", text, "-o", out), ["nowhere"], out)
    (tmp_path / "file").touch()
    refuse(("compress", source, "--text", text, "-o", tmp_path / "file" / "out"), ["cannot be written"])
    refuse(("compress", source, "--text", text, "-o", source, "--overwrite"), ["input folder"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    refuse(("compress", source, "--text", text, "-o", tmp_path / "full"), ["not empty"])
    refuse(("compress", source, "--text", text, "-o", tmp_path / "full", "--overwrite"), ["no config.json"])
    refuse(("export", source, "-o", tmp_path / "full"), ["not empty"])
    refuse(("export", source, "--target", "toaster", "-o", out), ["toaster", "onnx"], out)
    refuse(("demo", "-o", tmp_path / "full"), ["demo"])
    refuse(("inspcet", source), ["inspcet"])
    assert (tmp_path / "full" / "thesis.txt").exists()


def test_plan_of_another_model_is_refused(model, text, tmp_path):
    file, out = tmp_path / "plan.json", tmp_path / "out"
    assert run("plan", model("glm4"), "--keep", "1", "--text", text, "-o", file, *SMALL).exit_code == 0
    data = json.loads(file.read_text())
    data["layers"][0]["ffn"][-1] = 500
    file.write_text(json.dumps(data))
    refuse(("compress", model("llama"), "--text", text, "--plan", file, "-o", out, *SMALL), ["layer 0 ffn"], out)
    refuse(("plan", model("llama"), "--text", text, "-o", file, *SMALL), ["exists"])
    os.mkfifo(tmp_path / "pipe")  # as /dev/null: no plain file, and a rename would take its place
    refuse(("plan", model("llama"), "--text", text, "-o", tmp_path / "pipe", *SMALL), ["a device or a pipe"])
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("keeep: 0.7", ["keeep"]),
        ("- 0.7", ["no keys"]),
        ("keep: [", ["not valid YAML"]),
        ("keep: soon", ["keep", "number"]),
        ("windows: 12.5", ["windows", "whole number"]),
        ("axes:", ["axes", "list"]),
    ],
)
def test_wrong_recipe_is_one_sentence(content, words, model, text, tmp_path):
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(content)
    refuse(("compress", model("llama"), "--text", text, "-o", out, "--recipe", recipe), words, out)


def test_failed_proof_exits_with_one(model, text, tmp_path, monkeypatch):
    import cli.written
    from compress.report import Proof

    failed = Proof("transformers", "different", reason="logits differ")
    monkeypatch.setattr(cli.written, "verify_folder", lambda *_: [failed])
    arguments = ("--text", text, "-o", tmp_path / "out", *FAST, "--no-bench", "--no-export", "--quiet")
    done = run("compress", model("llama"), *arguments)
    assert done.exit_code == 1
    assert "logits differ" in done.stderr
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_run_leaves_nothing(number, model, text, tmp_path):
    long = ("--windows", "4000", "--length", "8", "--keep", "0.7", "--axes", "ffn", "--trials", "0")
    command = [*COMMAND, "compress", str(model("llama")), "-o", str(tmp_path / "out"), *long, *LEAN]
    big = tmp_path / "big.txt"
    big.write_text(text.read_text().replace("<|endoftext|>", "") * 20)
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    # A test run in the background inherits an ignored SIGINT; and the signal may land while the library copies a file.
    quiet = {**ENVIRONMENT, "PYTHONWARNINGS": "ignore"}
    listen = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    child = subprocess.Popen([*command, "--text", str(big)], env=quiet, preexec_fn=listen, **pipes)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.partial-*")) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    child.send_signal(number)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 1, errors
    assert errors.splitlines()[-1] == "lightpress: stopped; nothing was kept"
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["big.txt"]


# Help and output


def test_help_is_light_and_quick():
    heavy = "torch", "numpy", "onnx", "onnxruntime", "transformers", "rich", "yaml"
    code = (
        "import sys; from cli.app import app\n"
        "try: app(['compress', '--help'], prog_name='lightpress')\n"
        f"finally: print(*[name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert "--keep" in done.stdout
    assert done.stderr.split() == []
    # The processor's time, which a busy machine stretches less than the clock: 0.3 s of the 0.4 s allowed, and slack.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.6


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_an_example(verb):
    done = run(verb, "--help")
    assert done.exit_code == 0
    for words in ("--json", "--quiet", f"lightpress {verb}"):
        assert words in done.stdout


def test_version_and_bare_command():
    assert run("--version").stdout.startswith("lightpress ")
    assert "compress" in run().stdout


def test_plain_progress_is_sparse(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("cli.console.time.monotonic", lambda: now[0])
    meter = PlainMeter()
    for done in range(101):
        meter.report("calibrate", done, 100)
        now[0] += 1.0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[0] == "calibrate: 10 of 100, about 90 s left"
    assert lines[-1] == "calibrate: done in 100 s"


def test_uneven_plan_is_printed_by_layer():
    rows = (LayerRow(0, 4, 2, 16), LayerRow(2, 2, 1, 8))
    plan = PlanReport(rows, LayerRow(0, 4, 2, 32), (1,), 8, 8, 50, 100, 200, 400, 0.5, 1, 1)
    printed = render_plan(plan)
    assert printed.splitlines()[1].split() == ["0", "4", "2", "32", "->", "16"]
    assert printed.splitlines()[2].split() == ["2", "4", "->", "2", "2", "->", "1", "32", "->", "8"]
    assert "dropped, by index: 1." in printed


def test_help_names_every_key_and_every_choice_under_its_heading():
    assert {name for texts in HELP.values() for name in texts} == {item.name for item in fields(Recipe)}
    texts = {name: text for group in HELP.values() for name, text in group.items()}
    for name, allowed in {**CHOICES, "score": SCORES}.items():
        words = set(re.findall(r"[\w-]+", texts[name]))
        assert words.issuperset(allowed), (name, set(allowed) - words)
    printed = run("compress", "--help").stdout
    others = (WEIGHTS, ASCEND, CURRICULUM, ROUNDS)
    places = [printed.index(f"\n{heading}:\n") for heading in PANELS if heading not in others]
    assert places == sorted(places)
    assert all(f" {flag(name)} " in printed for name in texts)
    shown = run("plan", "--help").stdout
    assert {name for name in texts if f" {flag(name)} " not in shown} == {"shard_bytes", "refine"}


# Every key with a value that is not its default, in two recipes, as not all of them go together.
GIVEN = [
    {
        "keep": 0.6, "axes": "ffn,kv", "multiple": 4, "score": "flap", "ratio": "zscore", "shapes": "per-layer",
        "depth": "clap", "norms": "slnp", "absorb": "safe", "absorb_limit": 0.3, "absorb_constant": "mean-inverse",
        "rotate": "pca", "repair": "diagonal", "biases": "own", "target": "dense", "windows": 5, "length": 12,
        "score_tokens": 48, "field": "story", "seed": 4, "shard_bytes": 999, "spill_bytes": 888,
    },
    {"trials": 3, "inputs": "lstsq", "refine": 7, "params": "1M"},
    {"memory": "1MB", "profile": "cpu-avx2"},
    {"speedup": "1.5", "workload": "9+9", "format": "int8"},
    {"latency": "3ms", "devices": 2},
]  # fmt: skip


def test_flags_and_recipe_file_fill_every_key(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("cli.run.run_compress", lambda request, console, group: seen.append(request.recipe))
    file, keys = tmp_path / "recipe.yaml", []
    for values in GIVEN:
        given = [word for key, value in values.items() for word in (flag(key), value)]
        assert run("compress", "model", "-o", "out", *given).exit_code == 0
        file.write_text("".join(f"{flag(key)[2:]}: {value}\n" for key, value in values.items()))
        assert run("compress", "model", "-o", "out", "--recipe", file).exit_code == 0
        expected = {**values, **({"axes": ("ffn", "kv")} if "axes" in values else {})}
        assert seen[-1] == seen[-2] == Recipe(**expected)
        keys += [key for key, value in expected.items() if value != getattr(Recipe(), key)]
    assert set(keys) == {item.name for item in fields(Recipe)}


# Formats of an exported graph


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--format", "int5"), ["int5", "int4"]),
        (("--format", "int4", "--method", "guess"), ["guess", "gptq"]),
        (("--format", "int4", "--standard-ops"), ["--standard-ops", "int4"]),
        (("--format", "int4", "--block", 33, "--method", "nearest"), ["33", "32"]),
        (("--format", "int4", "--text", "none.txt"), ["none.txt", "no such"]),
        (("--text", "none.txt"), ["--text", "--format int8"]),
    ],
)
def test_formats_that_cannot_be_exported(flags, words, model, tmp_path):
    refuse(("export", model("llama"), "-o", tmp_path / "out", *flags), words)
    assert not (tmp_path / "out").exists()


def test_export_in_four_bits_is_smaller_and_runs(model, text, tmp_path):
    sizes = []
    for name, flags in (("fp32", ()), ("int4", ("--text", text, "--windows", 8))):
        done = run("export", model("llama"), "--format", name, *flags, "-o", tmp_path / name, "--quiet")
        assert done.exit_code == 0, done.stderr
        sizes.append((tmp_path / name / "model.onnx.data").stat().st_size)
        said = run("generate", tmp_path / name, "w5 w6 w7", "--new", 4, "--quiet", "--no-stop")
        assert said.exit_code == 0, said.stderr
    assert sizes[1] < 0.4 * sizes[0]


# Budgets and devices


def test_a_speed_budget_runs_from_plan_to_table(model, text, tmp_path):
    """The plan meets the prediction, and the table says that the speeds were not measured on that device."""
    device = ("--speedup", "1.3x", "--profile", "cpu-avx2", "--workload", "decode:16+8")
    source = model("llama")
    planned = run("plan", source, *device, "--text", text, "--trials", 0, *PLAIN, "--json")
    assert planned.exit_code == 0, planned.stderr
    found = json.loads(planned.stdout)["device"]
    assert sum(found["dense_seconds"].values()) / sum(found["seconds"].values()) >= 1.3
    assert found["profile"] == "cpu-avx2"
    done = run(
        "compress", source, *device, "--text", text, "--trials", 0, "--refine", 0, "--no-verify", *PLAIN,
        "-o", tmp_path / "out",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "predicted time" in done.stdout
    assert "x as fast on cpu-avx2, one token after a prompt of 16" in done.stdout
    assert "not on cpu-avx2" in " ".join(done.stdout.split())


def test_a_shape_that_the_device_does_not_like_is_said(model, text):
    device = ("--profile", "ascend-910b2", "--devices", 2)
    done = run("plan", model("llama"), "--keep", 0.9, *device, "--text", text, *PLAIN)
    assert done.exit_code == 0, done.stderr
    assert "lightpress: warning: the head" in done.stderr.lower()
    assert "vocabulary of 96" not in done.stderr  # 48 on each of two devices


def test_too_little_memory_is_said_before_the_work(model, text, monkeypatch):
    monkeypatch.setattr("cli.prepare.free_memory", lambda: 2**20)
    refuse(("plan", model("llama"), "--text", text, *PLAIN), ["of memory", "1.0 MiB are free", "--windows"])


# What a plan says


def test_short_text_is_said_with_what_it_does_to_the_repair(model, text):
    arguments = ("plan", model("llama"), "--keep", 0.8, "--axes", "ffn", "--text", text, *PLAIN)
    done = run(*arguments, "--quiet")
    assert done.exit_code == 0, done.stderr
    [warning] = done.stderr.splitlines()
    # 6 windows of 23 tokens that have a past; the query heads' 48 inputs stay.
    assert warning.startswith("lightpress: warning: 138 tokens to refit projections that keep up to 48 inputs")
    assert "needs 4 for each (192)" in warning
    assert "the ridge is raised up to 1.4 times" in warning
    assert "warning" not in run(*arguments, "--repair", "diagonal").stderr
    assert "warning" not in run(*arguments, "--windows", 9).stderr


def test_absorption_is_reported_by_layer(model, text):
    arguments = ("plan", model("glm4"), "--keep", 0.9, "--axes", "ffn", "--text", text, *PLAIN, "--quiet")
    limit = run_json(*arguments, "--absorb", "all")["plan"]["absorption"][3]["variation"]
    arguments = (*arguments, "--absorb-limit", limit, "--absorb")
    notes = run_json(*arguments, "all")["plan"]["absorption"]
    printed = run(*arguments, "all").stdout.splitlines()
    head = next(place for place, line in enumerate(printed) if "attn_out cv" in line)
    assert printed[head].split() == ["layer", "attn_out", "cv", "error", "mlp_out", "cv", "error"]
    for layer in range(4):
        row = [str(layer)]
        for note in (one for one in notes if one["layer"] == layer):
            row += [f"{note['variation']:.3f}", f"{note['error']:.3f}", "goes" if note["go"] else "goes!"]
        assert printed[head + 1 + layer].split() == row
    assert {note["go"] for note in notes} == {True, False}
    safe = run(*(word for word in arguments if word != "--quiet"), "safe")
    rows = "\n".join(safe.stdout.splitlines()[head : head + 5])
    assert rows.count(" goes") == sum(note["go"] for note in notes)
    assert rows.count(" stays") == sum(not note["go"] for note in notes)
    assert "for ONNX and Lightpress only: transformers' classes have no layers without" in safe.stderr


def make_noted_plan(**notes):
    rows = [
        LayerPlan(0, (0,), (0, 1), (MergedGroups(1, (0, 1)), MergedGroups(2, (1,)))),
        LayerPlan(3, (0, 1), (1,)),
    ]
    return Plan((0, 1), tuple(rows), notes)


def show_noted(folder, console, **notes):
    """Print a plan that keeps everything, with notes."""
    checkpoint = open_checkpoint(folder)
    spec = read_spec(checkpoint)
    job = Job(Request("model", Recipe(keep=1.0)), checkpoint, spec, Recipe(keep=1.0), None, None)
    show_plan(job, replace(keep_everything(spec.shape), notes=notes), console)


def test_overflow_is_warned_of_even_when_quiet(model, capsys):
    show_noted(model("llama"), Console(quiet=True), overflow=["Without the norm it is too large; keep it."])
    assert capsys.readouterr().err == "lightpress: warning: without the norm it is too large; keep it.\n"


def test_groups_that_move_and_groups_that_cannot_are_shown():
    plan = make_noted_plan(not_merged={"2": "their rotary embeddings differ"})
    report = PlanReport(
        (LayerRow(0, 8, 4, 2), LayerRow(3, 4, 2, 1)), LayerRow(0, 4, 2, 2), (1, 2), 2, 2, 50, 100, 200, 400, 0.5, 1, 1
    )
    lines = render_plan(report, plan).splitlines()
    assert lines[0].endswith("groups taken in")
    assert lines[1].endswith("2 of layer 1, 1 of layer 2")
    assert lines[2].split() == ["3", "4", "2", "2", "->", "1"]
    assert render_choices(plan) == "No attention group of layer 2 lives on: their rotary embeddings differ."
    assert render_choices(make_noted_plan()) == ""


def test_tried_plans_are_listed_with_a_star_at_the_best(model, text):
    done = run("plan", model("llama"), "--keep", 0.7, "--axes", "ffn,layers", "--text", text, *SMALL, "--trials", 2)
    assert done.exit_code == 0, done.stderr
    lines = done.stderr[done.stderr.index("Tried plans") :].splitlines()[1:3]
    assert all(re.fullmatch(r"[ *] \d\.\d{4}  \d layers, hidden \d+, KV groups \d, FFN \d+", line) for line in lines)
    [best] = [line for line in lines if line.startswith("*")]
    assert float(best.split()[1]) == min(float(line[2:].split()[0]) for line in lines)
    assert f"Measured loss: {float(best.split()[1]):.3f}" in done.stdout


def test_tried_plans_are_not_listed_when_quiet(model, capsys):
    tried = [{"loss": 0.5, "layers": 4, "hidden": 48, "kv_groups": [2, 1], "ffn": [56, 56]}]
    show_noted(model("llama"), Console(), tried=tried, measured_loss=0.5)
    assert "* 0.5000  4 layers, hidden 48, KV groups 1-2, FFN 56" in capsys.readouterr().err
    show_noted(model("llama"), Console(quiet=True), tried=tried, measured_loss=0.5)
    assert capsys.readouterr().err == ""


def test_plan_fits_into_80_columns():
    count = 24
    layers = tuple(LayerRow(index, 32, 8, 11008 - index) for index in range(0, count, 2))
    losses = {"ffn": 1.23456, "kv": 1.23456, "hidden": 1.23456, "layers": 1.23456}
    report = PlanReport(
        layers, LayerRow(0, 64, 16, 11008), tuple(range(1, count, 2)), 4096, 8192, 10**9, 10**10, 10**12, 10**13, 0.123,
        10**12, 10**12, losses, 123456, 123,
    )  # fmt: skip
    rows = tuple(LayerPlan(row.layer, tuple(range(6)), (0,), (MergedGroups(row.layer + 1, (0, 1)),)) for row in layers)
    norms = [
        {"layer": layer, "norm": norm, "variation": 12.3456, "error": 1.2345, "go": False}
        for layer in range(count)
        for norm in ("attn_out", "mlp_out")
    ]
    tried = [{"loss": 12.3456, "layers": 32, "hidden": 4096, "kv_groups": [16, 8], "ffn": [11008, 10000]}]
    plan = Plan((0,), rows, {"measured_loss": 1.2345, "absorption": norms, "tried": tried})
    printed = "\n".join([render_plan(report, plan), render_choices(plan), render_tried(plan)]).splitlines()
    assert len(printed) > 2 * count
    assert max(map(len, printed)) <= 80


def test_demo_says_how_much_less_than_the_default_it_does(tmp_path, monkeypatch):
    seen = []

    def stop(request, *rest):
        seen.append(request.recipe)
        raise UserError("enough.")

    monkeypatch.setattr("cli.tour.write_texts", lambda output: None)
    monkeypatch.setattr("cli.tour.run_compress", stop)
    told = " ".join(run("demo", "-o", tmp_path).stdout.split())
    assert 0 < seen[0].trials < TRIALS
    assert 0 < seen[0].refine < REFINE_STEPS
    assert f"Up to {seen[0].trials} plans" in told
    assert f"{seen[0].refine} gradient steps on each layer" in told


def test_small_helpers():
    assert align_table([("a", "bb"), ("ccc", "d")]) == "a     bb\nccc    d"
    assert make_plain({"x": (1, float("nan")), "p": Path("a")}) == {"x": [1, None], "p": "a"}
