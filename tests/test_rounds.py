"""On-policy rounds: the student's sampler against a slow form of it, prompts, answers on disk, and the verb."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from tiny import CASES, make_checkpoint
from typer.testing import CliRunner

from cli.app import Verb, Verbs
from cli.recover import recover
from cli.training_job import plan_lessons
from compress.checkpoint import open_checkpoint
from compress.errors import UserError
from compress.parallel import ALONE, Group
from compress.recover import rollout, sampler
from compress.recover import teacher as teacher_files
from compress.recover.data import make_options, open_stream
from compress.recover.data_rows import Document, StreamOptions
from compress.recover.loop import measure_loss
from compress.recover.lora import LoraOptions
from compress.recover.model import Frozen, Student, StudentOptions
from compress.recover.rollout import (
    RolloutOptions,
    Rollouts,
    RolloutStream,
    Writer,
    answer_window,
    check_prompts,
    cut_prompt,
    draw_prompts,
    fill_round,
    hash_student,
    measure_frozen,
    open_round,
    read_rollouts,
    read_round,
    read_stops,
)
from compress.recover.sampler import (
    SampleOptions,
    answer_prompts,
    count_rows,
    draw_tokens,
    keep_nucleus,
    make_generator,
    view_student,
)
from compress.recover.state import Curve, read_curve
from compress.text import load_tokenizer
from compress.weights import read_spec

ROOT = Path(__file__).resolve().parents[1]
EXACT = StudentOptions(dtype=torch.float64)
UNEVEN = {"1": {"intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}}
MOST = 16  # new tokens: beyond the windows and the short context of the tiny models


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return a function from a case to an open tiny checkpoint and its spec."""
    made = {}

    def make(case):
        if case not in made:
            made[case] = open_checkpoint(make_checkpoint(tmp_path_factory.mktemp("tiny") / case, case))
        return made[case], read_spec(made[case])

    return make


def make_prompts(sizes, seed=0):
    words = random.Random(seed)
    return [[words.randint(3, 95) for _ in range(size)] for size in sizes]


# The sampler


@torch.no_grad()
def answer_slowly(student, prompt, options, source=None):
    """One prompt, the whole model over the whole text for every token; `source` of random numbers, else greedy."""
    ids = list(prompt)
    while len(ids) < len(prompt) + options.most:
        logits = student.logits(student(torch.tensor([ids]))[0])[0, -1]
        if source is None:
            ids.append(max(range(len(logits)), key=lambda token: float(logits[token])))
        else:
            powers = [torch.exp((one - logits.max()) / options.temperature) for one in logits]
            ids.append(int(torch.multinomial(torch.stack(powers) / sum(powers), 1, generator=source)))
        if ids[-1] in options.stop:
            break
    return ids


@pytest.mark.parametrize("case", CASES)
def test_greedy_answers_are_those_without_a_cache(case, tiny):
    student, prompts = Student(*tiny(case), EXACT), make_prompts((9, 3, 5))
    whole = [answer_slowly(student, prompt, SampleOptions(MOST, 0.0)) for prompt in prompts]
    assert [len(one) for one in whole] == [9 + MOST, 3 + MOST, 5 + MOST]
    stop = whole[0][9 + 7]  # a token that ends some answers early, so that rows leave the batch
    options = SampleOptions(MOST, 0.0, stop=(stop, 95))
    expected = []
    for prompt, ids in zip(prompts, whole, strict=True):
        ends = [place for place in range(len(prompt), len(ids)) if ids[place] in options.stop]
        expected.append(ids[: ends[0] + 1] if ends else ids)
    assert len(expected[0]) <= 9 + 8
    assert answer_prompts(view_student(student), prompts, options, make_generator((0,))) == expected


@pytest.mark.parametrize("case", ["llama", "gemma2", "phi3-longrope"])
def test_drawn_answer_is_the_one_without_a_cache(case, tiny):
    student, (prompt,) = Student(*tiny(case), EXACT), make_prompts((12,))
    options = SampleOptions(MOST, 0.7, stop=(2,))
    slow = answer_slowly(student, prompt, options, make_generator((4, 1)))
    assert answer_prompts(view_student(student), [prompt], options, make_generator((4, 1))) == [slow]


def test_seeds_decide_the_answers(tiny):
    model, prompts = view_student(Student(*tiny("llama"))), make_prompts((4, 6))
    one, same, other = (
        answer_prompts(model, prompts, SampleOptions(MOST), make_generator(seed)) for seed in ((0, 1), (0, 1), (0, 2))
    )
    assert one == same != other


def test_nucleus_is_the_fewest_likeliest_tokens():
    chances = torch.randn(6, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    for share in (0.05, 0.5, 0.9, 1.0):
        for row, kept in zip(chances.tolist(), keep_nucleus(chances, share).tolist(), strict=True):
            total, wanted = 0.0, [0.0] * 12
            for place in sorted(range(12), key=lambda place: -row[place]):
                if total < share:
                    wanted[place] = row[place]
                    total += row[place]
            assert kept == wanted


def test_draws_follow_temperature_and_nucleus():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    options = SampleOptions(1, 2.0, 0.8)
    drawn = draw_tokens(logits.expand(40_000, 4), options, make_generator((0,)))
    chances = [float(torch.exp(one / 2)) for one in logits]
    total = sum(chances[:3])  # 0.46 + 0.28 + 0.17 is the first sum above 0.8
    for token, chance in enumerate([*chances[:3], 0.0]):
        assert float((drawn == token).double().mean()) == pytest.approx(chance / total, abs=0.01)


def test_adapters_answer_merged(tiny):
    student = Student(*tiny("llama"), StudentOptions(LoraOptions(2), dtype=torch.float64))
    with torch.no_grad():
        for tensor in student.trained().values():
            tensor.add_(0.1)
    (prompt,), options = make_prompts((5,)), SampleOptions(6, 0.0)
    plain = answer_slowly(Student(*tiny("llama"), EXACT), prompt, options)
    merged = answer_slowly(student, prompt, options)
    assert answer_prompts(view_student(student), [prompt], options, make_generator((0,))) == [merged] != [plain]


def test_rows_share_the_memory_of_the_cache(tiny):
    _, spec = tiny("llama")
    assert count_rows(spec, 256) == 64
    tokens = 2**18  # 2 x 4 layers x 24 values x 4 bytes for each
    assert count_rows(spec, tokens) == 2**28 // (tokens * 2 * 4 * 24 * 4) == 1


# Prompts

TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} end {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"  # noqa: E501
NAMES = ("user", "assistant", "end")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tokenised student, its dense model, and texts of three kinds."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    root = tmp_path_factory.mktemp("rounds")
    make_checkpoint(root / "dense", "llama")
    make_checkpoint(root / "cut", "llama", per_layer_config=UNEVEN)
    words = {**{f"w{number}": number for number in range(93)}, **{name: 93 + place for place, name in enumerate(NAMES)}}
    tokenizer = Tokenizer(models.WordLevel(words, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for name in ("dense", "cut"):
        tokenizer.save(str(root / name / "tokenizer.json"))
        (root / name / "chat_template.jinja").write_text(TEMPLATE)
    source = random.Random(0)

    def draw(size):
        return " ".join(f"w{source.randint(3, 92)}" for _ in range(size))

    (root / "words.txt").write_text("\n<|endoftext|>\n".join(draw(source.randint(4, 40)) for _ in range(80)))
    turns = [{"role": role, "content": f"w{number}"} for number, role in enumerate(("user", "assistant") * 2, 5)]
    rows = [
        {"messages": turns}, {"prompt": "w11 w12 w13", "response": "w14"}, {"text": draw(30)}, {"text": "w20 w21 w22"},
        {"prompt": draw(40), "response": "w30"},
    ]  # fmt: skip
    (root / "kinds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def ask(length=48, most=24, tokens=400, temperature=1.0, seed=0):
    return RolloutOptions(tokens, length, SampleOptions(most, temperature, stop=(2,)), (seed, 1))


def open_text(folders, name, length=48):
    folder = folders / "cut"
    config = open_checkpoint(folder).config
    return open_stream([folders / name], load_tokenizer(folder), make_options(folder, config, (2, length)))


def test_prompts_come_from_chats_pairs_and_texts(folders):
    stream, words = open_text(folders, "kinds.jsonl"), load_tokenizer(folders / "cut")
    found = [cut_prompt(stream.document(number), ask()) for number in range(5)]
    assert words.decode(found[0]) == "user w5 end assistant w6 end user w7 end assistant"
    assert words.decode(found[1]) == "user w11 w12 w13 end assistant"
    text = stream.document(2).ids
    assert found[2] == list(text[:12])  # a quarter of a row
    assert found[3] == list(stream.document(3).ids[:2])  # half of five: it starts and ends with tokens of its own
    assert found[4] == []  # longer than the half of a row that its answer leaves
    drawn = list(draw_prompts(stream, stream.used(), ask()))
    assert sorted(drawn) == sorted(found[:4])
    orders = {json.dumps(list(draw_prompts(stream, stream.used(), ask(seed=seed)))) for seed in range(6)}
    assert len(orders) > 1


def test_what_begins_within_a_prompt_is_no_prompt(folders):
    stream = open_text(folders, "kinds.jsonl", 24)
    assert len(stream.document(4).ids) < 44 and not stream.begins(4)  # rows of 24 hold the end of a prompt of 40
    assert list(draw_prompts(stream, [4], ask(length=24, most=4))) == []
    assert stream.begins(1) and list(draw_prompts(stream, [1], ask(length=24, most=4)))


def test_prompts_without_room_are_a_mistake(folders):
    stream = open_text(folders, "kinds.jsonl")
    check_prompts(stream, [4], ask(72))
    with pytest.raises(UserError, match="No prompt of the text fits into the 24 tokens"):
        check_prompts(stream, [4], ask())
    with pytest.raises(UserError, match="leave no room for a prompt"):
        check_prompts(stream, [0], ask(most=48))


def test_ends_are_those_of_both_configs(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert read_stops(tmp_path) == (7,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 7]}')
    assert read_stops(tmp_path) == (7, 9)


# Answers on disk


def write_round(folder, folders, progress=lambda *given: None, tokens=1200):
    student, stream = Student(*open_model(folders / "cut")), open_text(folders, "words.txt")
    open_round(folder, hash_student(student))
    prompts = draw_prompts(stream, stream.used(), ask(tokens=tokens))
    return fill_round(folder, Writer(view_student(student), progress), prompts, ask(tokens=tokens))


def open_model(folder):
    checkpoint = open_checkpoint(folder)
    return checkpoint, read_spec(checkpoint)


def list_documents(rollouts):
    return [(list(one.ids), list(one.weights)) for one in rollouts]


def test_stopped_round_goes_on_to_the_same_answers(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(rollout, "WINDOW", 20)
    whole = write_round(tmp_path / "whole", folders)
    assert len(list((tmp_path / "whole").glob("answers-*"))) > 1
    assert 1200 <= len(whole.ids) < 1200 + 20 * 48
    calls = count()

    def stop(stage, done, total):
        if next(calls) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_round(tmp_path / "out", folders, stop)
    first = tmp_path / "out" / "answers-00000.npz"
    written = first.stat().st_mtime_ns
    again = write_round(tmp_path / "out", folders)
    assert list_documents(again) == list_documents(whole)
    assert first.stat().st_mtime_ns == written


def test_answers_of_another_student_are_thrown_away(folders, tmp_path):
    student = Student(*open_model(folders / "cut"))
    write_round(tmp_path / "round", folders)
    open_round(tmp_path / "round", hash_student(student))
    assert list((tmp_path / "round").glob("answers-*"))
    with torch.no_grad():
        next(iter(student.trained().values())).view(-1)[0] += 1
    open_round(tmp_path / "round", hash_student(student))
    assert not list((tmp_path / "round").glob("answers-*"))


def test_damaged_round_is_one_sentence(folders, tmp_path):
    write_round(tmp_path / "round", folders)
    with pytest.raises(UserError, match="no finished round"):
        read_rollouts(tmp_path / "round")
    rollout.close_round(tmp_path / "round", {"round": 1})
    assert len(read_rollouts(tmp_path / "round")) > 0
    assert read_round(tmp_path / "round")["files"] == len(list((tmp_path / "round").glob("answers-*")))
    (tmp_path / "round" / "answers-00000.npz").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(UserError, match="missing or damaged"):
        read_rollouts(tmp_path / "round")


def test_rounds_are_as_long_as_asked_and_each_prompt_is_used_once(folders, tmp_path):
    few, all_of_them = (write_round(tmp_path / str(tokens), folders, tokens=tokens) for tokens in (100, 10**6))
    assert 100 <= len(few.ids) < 100 + 16 * 48
    assert len(all_of_them) == 80
    assert list_documents(all_of_them) != list_documents(few)


class Half(Group):
    """One of two processes that hears nothing of the other."""

    def gather(self, value):
        return [value]


def test_two_processes_write_what_one_does(tiny, monkeypatch):
    monkeypatch.setattr(sampler, "MOST_ROWS", 4)
    model, prompts = view_student(Student(*tiny("llama"))), make_prompts(range(1, 19))
    whole, *halves = (
        answer_window(Writer(model, print, group), prompts, ask(), 3) for group in (ALONE, Half(0, 2), Half(1, 2))
    )
    assert [len(half.ids) > 0 for half in halves] == [True, True]
    assert np.concatenate([half.ids for half in halves]).tolist() == whole.ids.tolist()


def make_rollouts(seed=0, answers=30):
    source = random.Random(seed)
    prompts = [source.randint(1, 12) for _ in range(answers)]
    sizes = [prompt + source.randint(1, 12) for prompt in prompts]
    ids = np.array([source.randint(3, 95) for _ in range(sum(sizes))], np.int32)
    return Rollouts(ids, np.array(sizes, np.int32), np.array(prompts, np.int32))


def test_facts_of_a_round_are_counted_one_by_one():
    rollouts, start = make_rollouts(), 0
    ended = written = 0
    for place, (size, prompt) in enumerate(zip(rollouts.sizes, rollouts.prompts, strict=True)):
        ids = rollouts.ids[start : start + size].tolist()
        assert rollouts[place] == Document(ids, [0] * prompt + [1] * (size - prompt))
        ended += ids[-1] < 50
        written += size - prompt
        start += size
    facts = rollouts.describe(range(50))
    assert 0 < ended < 30
    assert facts == {"prompts": 30, "tokens": written, "mean_tokens": written / 30, "ended": ended / 30}


def test_only_answers_count_and_each_of_them_once(tmp_path):
    rollouts = make_rollouts()
    stream = RolloutStream(tmp_path, rollouts, StreamOptions(length=32, rows=3, vocabulary=96))
    assert (stream.facts.documents, stream.facts.counted) == (30, rollouts.generated)
    found, rows = [], stream.count_rows()
    for row in islice((row for batch in stream.batches() for row in zip(batch.ids, batch.weights, batch.documents)), rows):  # noqa: B905, E501
        ids, weights, documents = (one.tolist() for one in row)
        for number in sorted(set(documents)):
            own = [place for place, document in enumerate(documents) if document == number]
            if any(weights[place] for place in own):
                found.append(([ids[place] for place in own], [int(weights[place]) for place in own]))
    assert sorted(found) == sorted(list_documents(rollouts))
    with pytest.raises(UserError, match="belongs to another model"):
        RolloutStream(tmp_path, rollouts, StreamOptions(length=32, rows=3, vocabulary=20))


def test_loss_of_a_frozen_model_is_that_of_the_student(folders, tmp_path):
    stream = RolloutStream(tmp_path, make_rollouts(), StreamOptions(length=32, rows=3))
    batches = list(islice(stream.batches(), 3))
    model = open_model(folders / "cut")
    assert measure_frozen(Frozen(*model), batches) == pytest.approx(measure_loss(Student(*model), batches), rel=1e-6)


# The verb

app = typer.Typer(cls=Verbs)
app.callback()(lambda: None)
app.command("recover", cls=Verb)(recover)
COMMAND = (
    "import typer; from cli.app import Verb, Verbs; from cli.recover import recover; app = typer.Typer(cls=Verbs);"
    "app.callback()(lambda: None); app.command('recover', cls=Verb)(recover); app()"
)


def arguments(folders, out, *extra):
    given = ["recover", folders / "cut", "--teacher", folders / "dense", "--text", folders / "words.txt", "-o", out]
    given += ["--tokens", 1900, "--batch", 2, "--length", 48, "--lr", 3e-3, "--no-verify", "--rounds", 2, *extra]
    return [str(one) for one in given]


def invoke(folders, out, *extra):
    """Recover the cut model in this process."""
    return CliRunner().invoke(app, arguments(folders, out, *extra))


@pytest.mark.parametrize("rounds", [0, 1, 3])
@pytest.mark.parametrize("share", [None, 0.3, 1.0])
def test_lessons_cover_the_run(rounds, share):
    lessons = plan_lessons({"rounds": rounds, "policy_share": share}, 17)
    assert [step for lesson in lessons for step in range(lesson.first, lesson.last)] == list(range(17))
    own = [lesson for lesson in lessons if lesson.round]
    assert [lesson.round for lesson in own] == list(range(1, rounds + 1))
    if rounds:
        steps = [lesson.steps for lesson in own]
        assert sum(steps) == round(17 * (0.5 if share is None else share))
        assert max(steps) - min(steps) <= 1


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    """An offline run with two rounds that nothing stopped, and how many teachers there were in its steps."""
    out, held = tmp_path_factory.mktemp("whole") / "out", []

    def look(self, report, *rest, add=Curve.add):
        add(self, report, *rest)
        held.append(count_teachers())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Curve, "add", look)
        done = invoke(folders, out, "--offline", "--save-steps", 3, "--json")
    assert done.exit_code == 0, done.stderr
    return out, json.loads(done.stdout), done.stderr, held


def count_teachers():
    return sum(type(one) is Frozen for one in gc.get_objects())


def test_no_teacher_is_in_memory_while_training(whole):
    gc.collect()
    assert whole[3] == [count_teachers()] * 20
    model = Frozen(*open_model(whole[0]))
    assert count_teachers() == whole[3][0] + 1
    del model


def test_rounds_are_told_of_and_learnt_from(whole, folders):
    out, facts, notes, _ = whole
    assert facts["steps"] == 20
    assert [(found["first_step"], found["steps"]) for found in facts["rounds"]] == [(10, 5), (15, 5)]
    for found in facts["rounds"]:
        assert found["mean_tokens"] == found["tokens"] / found["prompts"]
        assert 0 <= found["ended"] <= 1
        assert found["teacher_loss"] > 0
    assert facts["rounds"][0]["tokens"] != facts["rounds"][1]["tokens"]
    manifest = json.loads((out / "lightpress.json").read_text())
    assert manifest["recovery"][0]["rounds"] == facts["rounds"]
    assert "Round 2: " in notes
    curve = [float(row["loss"]) for row in read_curve(out / "recovery.csv")]
    assert len(curve) == 20
    assert sum(curve[-4:]) < sum(curve[:4])
    assert [path.name for path in out.parent.iterdir()] == ["out"]


class Killed(BaseException):
    """What no code catches."""


def kill_at(monkeypatch, place, name, number):
    """Stop the process, as far as its files go, at the `number`th call of a function."""
    calls, found = count(1), getattr(place, name)

    def call(*given, **named):
        if next(calls) == number:
            raise Killed
        return found(*given, **named)

    monkeypatch.setattr(place, name, call)


PHASES = {
    "on the text": (Curve, "add", 5),
    "answering": (rollout, "write_part", 2),
    "scoring a round": (teacher_files, "write_shard", 2),
    "in a round": (Curve, "add", 14),
}


@pytest.mark.parametrize("phase", PHASES)
def test_run_stopped_in_any_phase_ends_with_the_same_weights(phase, whole, folders, tmp_path, monkeypatch):
    out, extra = tmp_path / "out", ("--offline", "--save-steps", 3)
    with monkeypatch.context() as patch:
        kill_at(patch, *PHASES[phase])
        with pytest.raises(Killed):
            invoke(folders, out, *extra)
    done = invoke(folders, out, *extra, "--resume", "--json")
    assert done.exit_code == 0, done.stderr
    assert (out / "model.safetensors").read_bytes() == (whole[0] / "model.safetensors").read_bytes()
    rows = [[row["step"], row["loss"]] for row in read_curve(out / "recovery.csv")]
    assert rows == [[row["step"], row["loss"]] for row in read_curve(whole[0] / "recovery.csv")]
    told = [{**found, "seconds": 0} for found in json.loads(done.stdout)["rounds"]]
    assert told == [{**found, "seconds": 0} for found in whole[1]["rounds"]]


def test_run_killed_in_a_round_ends_with_the_same_weights(whole, folders, tmp_path):
    out, extra = tmp_path / "out", ("--offline", "--save-steps", 3)
    command = [sys.executable, "-c", COMMAND, *arguments(folders, out, *extra)]
    work = tmp_path / "out.training"
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while not (work / "round-01" / "scores" / "shard-00000.npy").exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    done = invoke(folders, out, *extra, "--resume")
    assert done.exit_code == 0, done.stderr
    assert (out / "model.safetensors").read_bytes() == (whole[0] / "model.safetensors").read_bytes()


def test_interrupt_while_answering_says_how_to_resume(folders, tmp_path, monkeypatch):
    def interrupt(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(rollout, "answer_prompts", interrupt)
    stopped = invoke(folders, tmp_path / "out", "--policy-share", 1)
    assert stopped.exit_code == 1
    assert "stopped while the student answered" in stopped.stderr
    assert "--resume" in stopped.stderr


def test_rounds_with_an_online_teacher_and_adapters(folders, tmp_path):
    out = tmp_path / "out"
    extra = ("--lora", 2, "--temperature", 0, "--answer-tokens", 8, "--accumulate", 2, "--ema", 0.5)
    done = invoke(folders, out, *extra, "--policy-share", 0.6, "--json")
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    assert [found["steps"] for found in facts["rounds"]] == [3, 3]
    assert all(found["mean_tokens"] <= 8 for found in facts["rounds"])


BAD = {
    "loss ce": (("--loss", "ce"), "--rounds with --loss ce"),
    "idle share": (("--rounds", "0", "--policy-share", "0.5"), "--policy-share does nothing without --rounds"),
    "idle temperature": (("--rounds", "0", "--temperature", "1"), "--temperature does nothing without --rounds"),
    "idle top-p": (("--rounds", "0", "--top-p", "0.9"), "--top-p does nothing without --rounds"),
    "idle answers": (("--rounds", "0", "--answer-tokens", "9"), "--answer-tokens does nothing without --rounds"),
    "cold": (("--temperature", "-1"), "--temperature -1"),
    "no nucleus": (("--top-p", "0"), "--top-p 0"),
    "no share": (("--policy-share", "1.5"), "--policy-share 1.5"),
    "many rounds": (("--rounds", "11"), "--rounds 11 have 10 of the 20 steps"),
    "full rows": (("--answer-tokens", "48"), "--answer-tokens 48 leave no room"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_one_sentence(name, folders, tmp_path):
    extra, words = BAD[name]
    done = invoke(folders, tmp_path / "out", *extra)
    assert done.exit_code == 2, done.stderr
    message = done.stderr.splitlines()[-1]
    assert message.startswith("lightpress: ")
    assert words in message
    assert list(tmp_path.iterdir()) == []
