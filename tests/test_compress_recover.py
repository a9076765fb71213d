"""`compress --recover`: the one-flag run against its parts by hand, killed runs, kept-out text, and each refusal."""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
import torch
from refusals import refused
from tiny import make_checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner

import cli.recovered
import cli.run
from cli import options
from cli.app import app
from cli.console import Console
from cli.planned import report_plan
from cli.prepare import gather_texts, prepare_job
from cli.recovered import add_needs, read_defaults
from cli.recovered_text import divide_documents, find_training_text
from cli.request import Recovery, Request
from cli.run import name_command
from compress.checkpoint import open_checkpoint
from compress.plan import keep_everything
from compress.recipe import Recipe
from compress.recover import data
from compress.recover.state import Curve, list_states, read_curve
from compress.text import SEPARATOR, read_documents

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
FAST = ("--windows", "6", "--length", "24", "--threads", "1", "--trials", "0", "--refine", "0", "--keep", "0.6")
LEAN = ("--no-export", "--no-verify", "--no-bench")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A dense model with a tokenizer of words, a text to train on, one to evaluate on, and one of few words."""
    root = tmp_path_factory.mktemp("place")
    make_checkpoint(root / "dense", "llama")
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{index}": index for index in range(3, 96)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(root / "dense" / "tokenizer.json"))
    words = random.Random(0)
    for name, count in (("train", 60), ("held", 12), ("one", 1)):
        documents = (" ".join(f"w{words.randint(3, 95)}" for _ in range(words.randint(20, 50))) for _ in range(count))
        (root / f"{name}.txt").write_text(f"\n{SEPARATOR}\n".join(documents))
    order = [f"w{index}" for index in range(3, 96)]
    words.shuffle(order)
    (root / "once.txt").write_text(f"\n{SEPARATOR}\n".join(" ".join(order[at : at + 10]) for at in range(0, 93, 10)))
    (root / "few.txt").write_text("w3 w4 w5")
    return root


def arguments(place, out, *extra):
    given = ["compress", place / "dense", "--text", place / "train.txt", "--eval-text", place / "held.txt", "-o", out]
    return [str(one) for one in [*given, *FAST, *extra]]


def run(*given):
    return CliRunner().invoke(app, [str(one) for one in given])


def compress(place, out, *extra):
    """Compress in this process without graph, proof and speed."""
    return run(*arguments(place, out, *LEAN, *extra))


def read_weights(folder):
    checkpoint = open_checkpoint(folder)
    return checkpoint.read(checkpoint.tensors)


def same(one, two):
    one, two = read_weights(one), read_weights(two)
    return set(one) == set(two) and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


# The whole run


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """A run in one go."""
    out = tmp_path_factory.mktemp("whole") / "out"
    done = compress(place, out, "--recover", "4k")
    assert done.exit_code == 0, done.stderr
    (out.parent / "said.txt").write_text(done.stdout)
    return out


def test_the_flag_is_the_two_commands(place, whole, tmp_path):
    plain, by_hand = tmp_path / "plain", tmp_path / "hand"
    assert compress(place, plain).exit_code == 0
    extra = ("--text", place / "train.txt", "--tokens", "4k", "--length", 24, "--threads", 1, "--no-verify")
    done = run("recover", plain, "--teacher", place / "dense", *extra, "-o", by_hand)
    assert done.exit_code == 0, done.stderr
    assert same(whole, by_hand)
    assert not same(whole, plain)
    before, after = (json.loads((folder / "lightpress.json").read_text()) for folder in (plain, whole))
    assert {name: after[name] for name in ("source", "recipe", "plan", "text")} == {
        name: before[name] for name in ("source", "recipe", "plan", "text")
    }
    # The table is of the trained model.
    assert after["metrics"]["compressed"]["divergence"] < 0.9 * before["metrics"]["compressed"]["divergence"]
    entry = after["recovery"][0]
    assert entry["text"] == [str(place / "train.txt")]
    assert entry["steps"] == len(read_curve(whole / "recovery.csv")) == 21
    assert entry["heldout_loss"]["before"] != entry["heldout_loss"]["after"]
    assert {path.name for path in whole.parent.iterdir()} == {"out", "said.txt"}


def test_graph_and_proof_are_of_the_trained_model(place, tmp_path):
    done = run(*arguments(place, tmp_path / "out", "--recover", "1k", "--recover-offline", "--no-bench", "--json"))
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert {proof["status"] for proof in report["proofs"]} <= {"equal", "close"}
    assert {proof["runtime"] for proof in report["proofs"]} == {"transformers", "onnxruntime"}
    assert report["recovery"]["settings"]["offline"] is True
    assert report["recovery"]["tokens"] == 6 * 192
    assert (tmp_path / "out/onnx/model.onnx").is_file()


def test_result_says_what_training_did(whole):
    said = (whole.parent / "said.txt").read_text()
    assert f"Written to {whole}." in said
    assert "out.recovered" not in said
    held = json.loads((whole / "lightpress.json").read_text())["recovery"][0]["heldout_loss"]
    losses = f"held-out loss {held['before']:.4f} before, {held['after']:.4f} after"
    assert re.search(rf"Recovery on 4.03 k tokens in \d+ s: {losses}", said)


def test_plan_file_and_recipe_keys(place, whole, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    keys = {"keep": 0.6, "windows": 6, "length": 24, "trials": 0, "refine": 0, "recover": 4000}
    lines = [f"{name}: {value}" for name, value in {**keys, "recover-text": place / "train.txt"}.items()]
    recipe.write_text("\n".join(lines))
    out = tmp_path / "out"
    done = run("compress", place / "dense", "--recipe", recipe, "--text", place / "train.txt", "--eval-text",
               place / "held.txt", "--threads", 1, *LEAN, "-o", out)  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert same(out, whole)
    plan = tmp_path / "made.json"
    plan.write_text(json.dumps(json.loads((whole / "lightpress.json").read_text())["plan"]))
    again = tmp_path / "again"
    done = run("compress", place / "dense", "--plan", plan, "--text", place / "train.txt", "--eval-text",
               place / "held.txt", *FAST[:6], "--refine", 0, *LEAN, "--recover", "4k", "-o", again)  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert same(again, whole)


# Stopped runs


def test_killed_run_goes_on_to_the_same_weights(place, whole, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "cli.app", *arguments(place, out, *LEAN, "--recover", "4k")]
    curve = tmp_path / "out.recovered.training" / "loss.csv"
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while len(read_curve(curve)) < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    cut = open_checkpoint(tmp_path / "out.compressed")
    assert cut.config == open_checkpoint(whole).config
    fresh = compress(place, out, "--recover", "4k")
    assert (fresh.exit_code, "out.compressed" in fresh.stderr, "--resume" in fresh.stderr) == (2, True, True)
    other = compress(place, out, "--recover", "4k", "--resume", "--norms", "slnp")
    assert (other.exit_code, "norms (calibrated, now slnp)" in other.stderr) == (2, True)
    longer = compress(place, out, "--recover", "8k", "--resume")
    assert (longer.exit_code, "another tokens (4k, now 8k)" in longer.stderr) == (2, True)
    done = compress(place, out, "--recover", "4k", "--resume")
    assert done.exit_code == 0, done.stderr
    assert "rebuilt already" in done.stderr
    assert same(out, whole)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["out"]


def test_interrupts_keep_what_is_done(place, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def interrupt(self, report, *rest, add=Curve.add):
        add(self, report, *rest)
        if report.step == 4:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Curve, "add", interrupt)
        stopped = compress(place, out, "--recover", "4k")
    assert stopped.exit_code == 1
    assert "stopped after step 4 of 21" in stopped.stderr
    assert "--resume" in stopped.stderr
    assert len(list_states(tmp_path / "out.recovered.training")) == 1

    with monkeypatch.context() as patch:
        patch.setattr(cli.recovered, "prepare_artifact", stop)
        stopped = compress(place, out, "--recover", "4k", "--resume")
    assert stopped.exit_code == 1
    assert "Resuming after step 4 of 21" in stopped.stderr
    assert "out.compressed keeps" in stopped.stderr
    assert not out.exists()
    with monkeypatch.context() as patch:
        patch.setattr(cli.recovered, "run_recover", stop)  # it is trained already
        done = compress(place, out, "--recover", "4k", "--resume")
    assert done.exit_code == 0, done.stderr
    assert same(out, whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def stop(*given):
    raise KeyboardInterrupt


def begin(place, root, stage):
    """Let a run stop while it trains, or once it is trained."""

    def interrupt(self, report, *rest, add=Curve.add):
        add(self, report, *rest)
        if report.step == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        if stage == "training":
            patch.setattr(Curve, "add", interrupt)
        else:
            patch.setattr(cli.recovered, "prepare_artifact", stop)
        assert compress(place, root / "out", "--recover", "4k", "--recover-lr", "2e-3").exit_code == 1
    second = "recovered" if stage == "trained" else "recovered.training"
    assert sorted(path.name for path in root.iterdir()) == ["out.compressed", f"out.{second}"]
    return root


@pytest.fixture(scope="module", params=["training", "trained"])
def begun(request, place, tmp_path_factory):
    """A folder with a run that stopped while it trained, or after that."""
    return begin(place, tmp_path_factory.mktemp(request.param), request.param)


OTHERS = [
    (("--recover", "8k"), "another tokens (4k, now 8k)"),
    (("--recover-offline",), "another offline (False, now True)"),
    (("--recover-text", "{once}"), "another text (["),
    (("--seed", "3"), "another seed (0, now 3)"),
]


def list_files(root):
    """Return what may not change when a command is refused."""
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("extra", "words"), OTHERS)
def test_begun_training_goes_on_only_as_it_was_asked(extra, words, begun, place):
    before = list_files(begun)
    own = [one.format(once=place / "once.txt") for one in extra]
    done = compress(place, begun / "out", "--recover", "4k", "--recover-lr", "2e-3", "--resume", *own)
    assert (done.exit_code, words in done.stderr) == (2, True), done.stderr
    assert done.stderr.splitlines()[-1].startswith("lightpress: ")
    assert list_files(begun) == before


@pytest.mark.parametrize("stage", ["training", "trained"])
def test_another_rate_is_for_training_that_goes_on(stage, place, tmp_path):
    out = begin(place, tmp_path, stage) / "out"
    done = compress(place, out, "--recover", "4k", "--recover-lr", "1e-3", "--resume")
    wanted = [{"from_step": 1, "rate": 2e-3}, {"from_step": 3, "rate": 1e-3}]
    if stage == "trained":
        assert (done.exit_code, "another rate (0.002, now 0.001)" in done.stderr) == (2, True), done.stderr
        done, wanted = compress(place, out, "--recover", "4k", "--recover-lr", "2e-3", "--resume"), wanted[:1]
    assert done.exit_code == 0, done.stderr
    assert json.loads((out / "lightpress.json").read_text())["recovery"][0]["rates"] == wanted
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def resume_later(place, out, monkeypatch, first, *later):
    """Stop a run before its first step; return the error of going on with each of other flags, or what it trains on."""
    # So many windows that as many calibrate whether or not others are kept out of the same text.
    given = ("compress", place / "dense", *FAST, *LEAN, "--windows", 128, "--length", 12, "--recover", "1k", "-o", out)
    given, seen = (*given, "--text", place / "train.txt"), {}
    monkeypatch.setattr(cli.recovered, "run_recover", lambda asked, console: seen.update(asked) or stop())
    assert run(*given, *first).exit_code == 1
    assert seen.pop("resume") is False
    for flags in later:
        seen.clear()
        done = run(*given, *flags, "--resume")
        yield done.stderr.splitlines()[-1] if done.exit_code == 2 else (seen["text"], seen["eval_text"])


def test_text_that_was_trained_on_is_never_evaluated_on(place, tmp_path, monkeypatch):
    flags = ("--eval-text", place / "held.txt")
    said, same_again = resume_later(place, tmp_path / "out", monkeypatch, flags, (), flags)
    assert "was made with an --eval-text" in said
    assert same_again == ([place / "train.txt"], place / "held.txt")


def test_part_that_is_kept_out_stays_kept_out(place, tmp_path, monkeypatch):
    flags = ("--eval-text", place / "held.txt")
    same_again, other = resume_later(place, tmp_path / "out", monkeypatch, (), (), flags)
    own, held = (tmp_path / "out.compressed" / f"recovery-{name}.txt" for name in ("text", "heldout"))
    assert same_again == ([own], held)
    assert other == ([own], place / "held.txt")


def test_divergence_keeps_the_model_and_names_the_flag(place, tmp_path):
    out = tmp_path / "out"
    done = compress(place, out, "--recover", "40k", "--recover-lr", "0.9")
    assert done.exit_code == 1, done.stderr
    assert "diverged" in done.stderr
    assert "--recover-lr" in done.stderr
    assert not out.exists()
    assert read_weights(tmp_path / "out.compressed")


# Text that is kept out


def ask(place, tmp_path, monkeypatch, *extra):
    """Return what the training is asked for, and the words of its texts."""
    seen = {}

    def look(asked, console):
        seen.update(asked)
        raise KeyboardInterrupt("seen")

    monkeypatch.setattr(cli.recovered, "run_recover", look)
    small = ("--windows", 4, "--length", 12, "--trials", 0, "--refine", 0, "--keep", 0.6, *LEAN)
    done = run("compress", place / "dense", *small, "--recover", "1k", *extra, "-o", tmp_path / "out")
    assert "seen" in done.stderr, done.stderr
    return seen, [[word for text in read_documents(path) for word in text.split()] for path in seen["text"]]


@pytest.mark.parametrize("named", [False, True])
def test_training_sees_no_word_that_is_evaluated_on(named, place, tmp_path, monkeypatch):
    once = place / "once.txt"
    extra = ("--recover-text", once, "--recover-text", place / "train.txt") if named else ()
    seen, words = ask(place, tmp_path, monkeypatch, "--text", once, *extra)
    request = Request(str(place / "dense"), Recipe(windows=4, length=12), once, output=tmp_path / "x")
    console = Console(quiet=True)
    held = gather_texts(prepare_job(request, console), console).evaluation
    evaluated = {f"w{number}" for number in held.ids.flatten().tolist() if number > 2}
    assert len(evaluated) >= 10
    assert set(words[0]) == {f"w{index}" for index in range(3, 96)} - evaluated
    assert set(read_all(seen["eval_text"])) == evaluated
    assert len(words) == 1 + named
    if named:
        assert seen["text"][1] == place / "train.txt"
    assert (seen["batch"], seen["length"]) == (8, 12)


def read_all(path):
    return [word for text in read_documents(path) for word in text.split()]


def test_own_sample_is_trained_on_without_text(place, tmp_path, monkeypatch):
    seen, words = ask(place, tmp_path, monkeypatch)
    request = Request(str(place / "dense"), Recipe(windows=4, length=12), output=tmp_path / "x")
    console = Console(quiet=True)
    texts = gather_texts(prepare_job(request, console), console)
    for found, windows in ((words[0], texts.calibration), (read_all(seen["eval_text"]), texts.evaluation)):
        assert found == [f"w{number}" for number in windows.ids.flatten().tolist() if number > 2]


def test_batch_is_cut_to_the_text(place, tmp_path, monkeypatch):
    seen, words = ask(place, tmp_path, monkeypatch, "--text", place / "train.txt", "--recover-text", place / "one.txt")
    assert (seen["batch"], seen["length"]) == ((len(words[0]) + 2) // 12, 12)
    assert seen["batch"] < read_defaults()["batch"]


def test_texts_of_their_own_are_used_whole(place, tmp_path, monkeypatch):
    own = ("--text", place / "train.txt", "--eval-text", place / "held.txt")
    seen, _ = ask(place, tmp_path, monkeypatch, *own, "--recover-lr", "1e-5", "--recover-offline")
    assert (seen["rate"], seen["offline"], seen["tokens"]) == (1e-5, True, "1k")
    assert (seen["text"], seen["eval_text"]) == ([place / "train.txt"], place / "held.txt")
    assert set(seen) == {*read_defaults(), "student", "output"}


def slow_division(documents, tokenizer, start, span):
    """A list of which characters of each document lie inside, from the owner of every token of the whole stream."""
    owners = []
    for number, text in enumerate(documents):
        owners += [None] * start
        owners += [(number, at) for at in tokenizer.encode(text, add_special_tokens=False).offsets]
    inside = {(owner[0], place) for owner in owners[slice(*span)] if owner for place in range(*owner[1])}
    return [[(number, place) in inside for place in range(len(text))] for number, text in enumerate(documents)]


def test_division_is_that_of_every_character():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    documents = ["äb cé", "x", "日本 go", "plain words", "ö"]
    total = sum(1 + len(text.encode()) for text in documents)
    for first in range(total):
        for last in range(first + 1, total + 3):
            pieces = list(divide_documents(documents, tokenizer, 1, (first, last)))
            marks = slow_division(documents, tokenizer, 1, (first, last))
            wanted = [
                ("".join(text[place] for place, _ in group), held)
                for text, row in zip(documents, marks, strict=True)
                for held, group in groupby(enumerate(row), lambda one: one[1])
            ]
            assert pieces == [(text, held) for text, held in wanted if text.strip()], (first, last)


# Refusals


REFUSED = [
    (("--recover", "0"), ["--recover 0", "2M"]),
    (("--recover", "many"), ["--recover many"]),
    (("--recover-text", "{train}"), ["--recover-text does nothing without --recover"]),
    (("--recover-offline",), ["--recover-offline does nothing without --recover"]),
    (("--resume",), ["--resume does nothing without --recover"]),
    (("--recover", "1k", "--resume"), ["no run to resume", "out.compressed"]),
    (("--recover", "1k", "--recover-lr", "7"), ["--recover-lr 7"]),
    (("--recover", "1k", "--recover-text", "{few}"), ["few.txt", "gives 5 tokens", "one row of 24"]),
    (("--recover", "1k", "--recover-text", "{nowhere}"), ["nowhere.txt: no such file"]),
    (("--recover", "1k", "--recover-text", "{held}"), ["held.txt", "--eval-text"]),
    (("--recover", "1k", "--keep", "1"), ["nothing is removed"]),
]


@pytest.mark.parametrize(("extra", "words"), REFUSED)
def test_mistakes_are_one_sentence_before_any_work(extra, words, place, tmp_path):
    out, names = tmp_path / "out", {name: place / f"{name}.txt" for name in ("train", "few", "held", "nowhere")}
    done = compress(place, out, *(one.format(**names) for one in extra))
    assert done.exit_code == 2, done.stderr
    message = done.stderr.strip()
    assert message.startswith("lightpress: ")
    assert message.endswith(".")
    assert "\n" not in message
    for word in words:
        assert word in message
    assert list(tmp_path.iterdir()) == []


BROKEN = [
    (("--eval-text", "{held}", "--recover-text", "{bad}"), "line 1001 is not JSON"),
    (("--eval-text", "{held}", "--recover-text", "{train}", "--recover-text", "{other}"), "line 1001 has neither"),
    (("--eval-text", "{bad}",), "line 1001 is not JSON"),
    (("--text", "{bad}",), "line 1001 is not JSON"),
    (("--text", "{bad}", "--recover-text", "{train}"), "line 1001 is not JSON"),
]


@pytest.mark.parametrize(("extra", "words"), BROKEN)
def test_bad_lines_far_down_are_found_before_any_work(extra, words, place, tmp_path, monkeypatch):
    names = {name: place / f"{name}.txt" for name in ("train", "held")}
    good = json.dumps({"text": " ".join(f"w{index}" for index in range(3, 90))}) + "\n"
    for name, line in (("bad", '{"text": "w3'), ("other", '{"body": "w3 w4"}')):
        names[name] = tmp_path / f"{name}.jsonl"
        names[name].write_text(1000 * good + line + "\n")
    monkeypatch.setattr(cli.run, "gather_texts", stop)
    monkeypatch.setattr(data, "GROUP", 8)  # the look at how much text there is must not be what finds it
    given = ("compress", place / "dense", *FAST, *LEAN, "--recover", "1k", "-o", tmp_path / "out")
    text = () if "--text" in extra else ("--text", names["train"])
    done = run(*given, *text, *(one.format(**names) for one in extra))
    assert (done.exit_code, words in done.stderr) == (2, True), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "other.jsonl"]


def test_named_command_asks_for_the_same_again(place, tmp_path, monkeypatch):
    seen = []

    def look(request, *rest, **named):
        seen.append(request)
        raise KeyboardInterrupt("seen")

    monkeypatch.setattr(cli.run, "run_compress", look)
    spaced = tmp_path / "a b's.txt"
    plan = ("--plan", tmp_path / "my plan.json")
    for extra in (
        (), ("--keep", 0.6, "--norms", "slnp", "--text", spaced, "--no-export"),
        ("--keep", 0.6, "--eval-text", spaced, "--recover", "4k"),
        ("--recover", "4k", "--recover-text", spaced, "--recover-text", place / "train.txt", "--recover-lr", "1e-5"),
        ("--recover", "2M", "--recover-offline", "--windows", 6, "--seed", 3), (*plan, "--recover", "1k"), plan,
    ):  # fmt: skip
        run("compress", place / "dense", *extra, "-o", tmp_path / "out dir")
        command = shlex.split(name_command(seen[-1]))
        assert command[:2] == ["lightpress", "compress"]
        done = run(*command[1:])
        assert "seen" in done.stderr, done.stderr
        assert seen[-1] == seen[-2], command
    assert len(seen) == 14


def test_training_needs_a_tokenizer(place, tmp_path):
    (tmp_path / "dense").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "dense" / name).symlink_to(place / "dense" / name)
    done = run("compress", tmp_path / "dense", *FAST, *LEAN, "--recover", "1k", "-o", tmp_path / "out")
    assert (done.exit_code, "no tokenizer.json" in done.stderr) == (2, True)
    assert not (tmp_path / "out").exists()


def test_recipe_values_of_another_kind_are_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    none = dict.fromkeys(options.RECOVERY_KEYS)
    for line, word in (
        ("recover: true", "recover"), ("recover: 1k\nrecover-lr: fast", "recover_lr"),
        ("recover: 1k\nrecover-offline: 3", "recover_offline"), ("recover: 1k\nrecover-text: 5", "recover_text"),
    ):  # fmt: skip
        path.write_text(line)
        refused(lambda: options.settle_recovery(path, none, False), word)
    path.write_text("recover: 2000\nrecover-lr: 1e-4\nrecover-offline: true\nrecover-text: [a.txt, b.txt]")
    wanted = Recovery("2000", (Path("a.txt"), Path("b.txt")), True, 1e-4)
    assert options.settle_recovery(path, none, False) == wanted
    flags = {**none, "recover": "3k", "recover_offline": False}
    assert options.settle_recovery(path, flags, True) == replace(wanted, tokens="3k", offline=False, resume=True)
    assert options.settle_recovery(None, none, False) is None


def test_needs_of_training_are_told_and_checked(place, tmp_path, monkeypatch):
    request = Request(
        str(place / "dense"), Recipe(windows=4, length=12), place / "train.txt", output=tmp_path / "out",
        recovery=Recovery("10k"),
    )  # fmt: skip
    job = prepare_job(request, Console(quiet=True))
    report = report_plan(job, keep_everything(job.spec.shape))
    more = add_needs(job, report)
    assert more.run_seconds > report.run_seconds
    assert more.disk_bytes - report.disk_bytes >= 36 * report.parameters  # three states of three float32 copies
    monkeypatch.setattr(cli.recovered, "free_memory", lambda: 1000)
    refused(lambda: cli.recovered.check_room(job), "--recover needs", "--lora")
    assert find_training_text(tmp_path, job).paths == (place / "train.txt",)
