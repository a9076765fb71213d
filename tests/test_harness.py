"""Scores of text under any runtime equal their slow twin, our perplexity and lm-eval; every misuse is one sentence."""

import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from refusals import refused
from tiny import make_checkpoint
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from typer.testing import CliRunner

from backends import likelihood
from backends.eager import load_eager
from backends.export_onnx import STANDARD, export_onnx
from backends.harness import Answers, TaskRequest, explain_unknown, find_tasks, read_settings, score_harness_tasks
from backends.likelihood import Row, TextModel, continue_text, cut_text, encode_pair, group_rows, roll_text, score_rows
from backends.tasks import bootstrap_share, read_choices, read_pairs, score_examples, score_task
from cli.app import Verb, Verbs
from cli.console import Console
from cli.evaluate import SURROUNDINGS, evaluate
from cli.tasks import open_text_model
from compress import demo
from compress.checkpoint import open_checkpoint
from compress.evaluate import fill_hidden, stream_logits
from compress.hidden import HiddenStore
from compress.text import Windows
from compress.weights import read_spec

UNEVEN = {
    "1": {"intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2},
    "3": {"num_attention_heads": 2, "num_key_value_heads": 1},
}
KINDS = ("uneven", "fused", "standard", "demo")
app = typer.Typer(cls=Verbs, pretty_exceptions_enable=False)
app.callback()(lambda: None)
app.command("evaluate", cls=Verb)(evaluate)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """The verb sets what lm-eval reads from the environment; tests leave none of it behind."""
    for name in SURROUNDINGS:
        monkeypatch.setenv(name, "1")


def make_words(begins):
    """A word is a token, after a <s> that the tokenizer itself adds if it begins so; w3w4 is one too."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{index}": index for index in range(3, 95)} | {"w3w4": 95}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>"])
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """An uneven checkpoint with its two graphs, and the demo."""
    root = tmp_path_factory.mktemp("harness")
    uneven = make_checkpoint(root / "uneven", "llama", per_layer_config=UNEVEN)
    make_words(True).save(str(uneven / "tokenizer.json"))
    export_onnx(open_checkpoint(uneven), root / "fused")
    export_onnx(open_checkpoint(uneven), root / "standard", form=STANDARD)
    return {name: root / name for name in KINDS[:3]} | {"demo": Path(demo.__file__).parent / "checkpoint"}


@pytest.fixture(scope="session")
def opened(folders):
    return {kind: open_text_model(str(folder), 1, Console()) for kind, folder in folders.items()}


@pytest.fixture(scope="session")
def exact(folders):
    """The uneven model in float64, where the order of sums does not show."""
    runtime = load_eager(open_checkpoint(folders["uneven"]), torch.float64)
    return TextModel(runtime, make_words(True), 1, frozenset({2}), 256, "tiny")


def make_rows(vocab=96, seed=0):
    """Rows of which some share a long context, some have equal lengths, and some are alone."""
    random = np.random.default_rng(seed)

    def draw(count):
        return tuple(int(token) for token in random.integers(0, vocab, count))

    shared = draw(20)
    rows = [Row(shared + draw(count), 20) for count in (1, 4, 2, 7)]
    rows += [Row(draw(9), start) for start in (1, 1, 5, 8)]
    rows += [Row((1, *draw(count)), 1) for count in (3, 3, 30, 5, 1)]
    order = random.permutation(len(rows))
    return [rows[place] for place in order]


def score_slowly(runtime, row):
    """Each scored token's log-likelihood, from a run of its own over all tokens before it."""
    values, greedy = [], True
    for place in range(row.start, len(row.ids)):
        logits = runtime.prefill(np.array([row.ids[:place]], dtype=np.int64))[0][0, -1].tolist()
        top = max(logits)
        values.append(logits[row.ids[place]] - top - math.log(math.fsum(math.exp(value - top) for value in logits)))
        greedy = greedy and logits.index(top) == row.ids[place]
    return values, greedy


# Scores


def check_scores(model, rows, error):
    for score, row in zip(score_rows(model, rows), rows, strict=True):
        values, greedy = score_slowly(model.runtime, row)
        assert np.abs(score.tokens - values).max() < error
        assert score.greedy == greedy
        assert score.total == pytest.approx(math.fsum(values), abs=error * len(values))


def test_scores_equal_their_slow_twin(exact):
    rows = make_rows()
    groups = list(group_rows(rows, 96))
    assert sorted(number for numbers, _ in groups for number in numbers) == list(range(len(rows)))
    assert {(len(numbers), shared) for numbers, shared in groups} >= {(4, True), (4, False), (2, False), (1, False)}
    check_scores(exact, rows, 1e-12)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_every_runtime_scores_alike(kind, opened):
    check_scores(opened[kind], make_rows(seed=1), 4e-6)


def test_rows_beyond_the_limit_of_logits_run_in_pieces(exact, opened, monkeypatch):
    monkeypatch.setattr(likelihood, "MAX_LOGITS", 96 * 3)
    rows = make_rows(seed=2)
    assert {shared for numbers, shared in group_rows(rows, 96) if len(numbers) == 1} == {True, False}
    check_scores(exact, rows, 1e-12)
    check_scores(opened["fused"], rows, 4e-6)


def test_batches_stay_within_their_limit(monkeypatch):
    monkeypatch.setattr(likelihood, "MAX_TOKENS", 10)
    rows = [Row((number, 2, 3, 4, 5), 1) for number in range(7)]
    assert [numbers for numbers, _ in group_rows(rows, 96)] == [[0, 1], [2, 3], [4, 5], [6]]


def test_greedy_is_told_from_not(exact):
    prompt = (1, 20, 30)
    made = tuple(exact.runtime.generate(prompt, 4))
    rows = [Row(prompt + made, 3), Row((*prompt, *made[:3], (made[3] + 1) % 96), 3)]
    assert [score.greedy for score in score_rows(exact, rows)] == [True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_agree_with_our_perplexity(kind, folders, opened):
    """Token by token what `evaluate --text` sums up, in float32, also through the graphs."""
    folder = folders["uneven" if kind in KINDS[1:3] else kind]
    checkpoint = open_checkpoint(folder)
    spec = read_spec(checkpoint)
    ids = torch.tensor(np.random.default_rng(3).integers(3, spec.shape.vocab, (3, 24)))
    with HiddenStore((3, 24, spec.shape.hidden)) as store:
        fill_hidden(checkpoint, spec, Windows(ids, ""), store)
        logits = torch.stack(list(stream_logits(checkpoint, spec, store)))
    expected = logits.double().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].numpy()
    scores = score_rows(opened[kind], [Row(tuple(row), 1) for row in ids.tolist()])
    found = np.stack([score.tokens for score in scores])
    assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()
    assert [score.total for score in scores] == pytest.approx(expected.sum(1).tolist(), rel=1e-6)


def test_what_is_no_number_is_refused(exact):
    broken = np.zeros((2, 5))
    broken[1, 3] = np.nan
    with pytest.raises(FloatingPointError, match="no numbers"):
        likelihood.score_targets(broken, [1, 2])


def test_token_of_another_model_is_refused(exact):
    refused(lambda: score_rows(exact, [Row((1, 96), 1)]), "token 96", "only 96", "tokenizer.json")


# Text to rows


def bare(begins=True, start=1, context=256):
    return TextModel(None, make_words(begins), start, frozenset(), context, "tiny")


PAIRS = {
    "plain": (("w5 w6", " w7"), True, ((1, 5, 6, 7), 3)),
    "no start added": (("w5 w6", " w7"), False, ((5, 6, 7), 2)),
    "blanks": (("w5 w6  ", "w7 w8"), True, ((1, 5, 6, 7, 8), 3)),
    "own start": (("<s> w5", " w7"), True, ((1, 5, 7), 2)),
    "merged": (("w5 w3", "w4 w7"), True, ((1, 5, 3, 7), 3)),
    "nothing before": (("", "w7 w8"), True, ((1, 7, 8), 1)),
    "blanks alone": (("  ", "w7 w8"), False, ((1, 7, 8), 1)),
    "start alone": (("", "<s> w8"), True, ((1, 8), 1)),
}


@pytest.mark.parametrize("case", PAIRS)
def test_pair_becomes_a_row(case):
    texts, begins, (ids, start) = PAIRS[case]
    assert encode_pair(bare(begins), *texts) == Row(ids, start)


def test_model_without_start_token_does_not_score_the_first():
    assert encode_pair(bare(False, None), "", "w7 w8") == Row((7, 8), 1)
    assert roll_text(bare(False, None), "w7 w8 w9") == [Row((7, 8, 9), 1)]
    refused(lambda: encode_pair(bare(False, None), "", "w7"), "'w7'", "no token to score")
    refused(lambda: encode_pair(bare(), "w5 w3", "w4"), "'w4'", "no token to score")


def test_long_contexts_lose_their_beginning():
    context = " ".join(f"w{index}" for index in range(3, 30))
    assert encode_pair(bare(context=6), context, " w40 w41") == Row((25, 26, 27, 28, 29, 40, 41), 5)
    whole = " ".join(["w40"] * 6)
    assert encode_pair(bare(context=6), "w5", f" {whole}") == Row((5, *[40] * 6), 1)
    refused(lambda: encode_pair(bare(context=6), "w5", f" {whole} w41"), "7 tokens", "context of tiny is 6")


@pytest.mark.parametrize("length", [0, 1, 5, 6, 7, 12, 13, 17])
def test_windows_score_each_token_once(length):
    ids = list(range(10, 10 + length))
    rows = roll_text(bare(context=6), " ".join(f"w{token}" for token in ids))
    assert [token for row in rows for token in row.ids[row.start :]] == ids
    for row in rows:
        assert len(row.ids) == min(7, length + 1)
        assert row.start >= 1
        assert list(row.ids) == [1, *ids][(1, *ids).index(row.ids[0]) :][: len(row.ids)]


# Greedy text


@pytest.mark.parametrize("kind", KINDS[:3])
def test_text_stops_where_it_should(kind, opened):
    model = opened[kind]
    made = model.runtime.generate((1, 20, 30), 8)
    words = [f"w{token}" for token in made]
    last = list(dict.fromkeys(made))[-1]
    place = made.index(last)
    assert min(made) > 2 and max(made) < 95 and place > 2
    assert continue_text(model, "w20 w30", [], 8) == " ".join(words)
    assert continue_text(model, "w20 w30", ["", f"w{last}"], 8) == " ".join(words[:place]) + " "
    ending = TextModel(model.runtime, model.tokenizer, 1, frozenset({last}), 256)
    assert continue_text(ending, "w20 w30", [], 8) == " ".join(words[:place])
    short = TextModel(model.runtime, model.tokenizer, 1, frozenset(), 5)
    cut = model.runtime.generate((8, 20, 30), 2)
    assert continue_text(short, "w7 w8 w20 w30", [], 2) == f"w{cut[0]} w{cut[1]}"
    refused(lambda: continue_text(short, "w7", [], 5), "5 new tokens", "max_gen_toks")


def test_first_stop_string_counts():
    assert cut_text("one. two\nthree", ["\n", "."]) == "one"
    assert cut_text("one", ["."]) == "one"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ([], 256)),
        ({"until": ".", "max_gen_toks": 9, "max_tokens": 3}, (["."], 9)),
        ({"until": [".", "x"], "max_new_tokens": 3, "do_sample": False, "temperature": 1.0}, ([".", "x"], 3)),
    ],
)
def test_generation_settings(given, expected):
    assert read_settings(given) == expected


@pytest.mark.parametrize("given", [{"do_sample": True}, {"temperature": 0.7}])
def test_sampling_is_refused(given):
    refused(lambda: read_settings(given), "do_sample: false")


# Task files


def write_lines(path, *rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def pair_rows(count=12):
    random = np.random.default_rng(5)
    texts = [" ".join(f"w{token}" for token in random.integers(3, 95, size)) for size in range(2, 2 + 2 * count)]
    return [{"sentence_good": texts[2 * row], "sentence_bad": texts[2 * row + 1], "id": row} for row in range(count)]


def question_rows(count=12):
    """Choices of different lengths, so that the three accuracies are not one."""
    random = np.random.default_rng(7)

    def words(size):
        return " ".join(f"w{token}" for token in random.integers(3, 95, size))

    return [
        {"question": words(6), "choices": [words(size) for size in random.permutation([1, 2, 3, 5])], "answer": row % 4}
        for row in range(count)
    ]


@pytest.fixture
def files(tmp_path):
    return write_lines(tmp_path / "pairs.jsonl", *pair_rows()), write_lines(tmp_path / "ask.jsonl", *question_rows())


def test_accuracies_equal_their_slow_twin(exact, files):
    pairs, questions = read_pairs(files[0]), read_choices(files[1])
    right = dict.fromkeys(("pairs", "acc", "acc_norm", "acc_bytes"), 0)

    def total(context, text):
        ids = exact.tokenizer.encode(f"{context} {text}" if context else text).ids
        return sum(score_slowly(exact.runtime, Row(tuple(ids), len(exact.tokenizer.encode(context).ids)))[0])

    for row in pair_rows():
        right["pairs"] += total("", row["sentence_good"]) > total("", row["sentence_bad"])
    for row in question_rows():
        sums = [total(row["question"], choice) for choice in row["choices"]]
        means = [value / len(choice) for value, choice in zip(sums, row["choices"], strict=True)]
        right["acc"] += sums.index(max(sums)) == row["answer"]
        right["acc_norm"] += means.index(max(means)) == row["answer"]
        right["acc_bytes"] += means.index(max(means)) == row["answer"]  # ASCII
    found = {score.metric: score for score in score_task(exact, questions)}
    assert {name: score.value for name, score in found.items()} == {name: right[name] / 12 for name in found}
    assert len({score.value for score in found.values()}) == 2
    (only,) = score_task(exact, pairs)
    assert (only.task, only.metric, only.value, only.examples) == ("pairs", "acc", right["pairs"] / 12, 12)
    assert 0 < only.value < 1
    assert only.interval == bootstrap_share(right["pairs"], 12)


@pytest.mark.parametrize(("right", "count"), [(7, 12), (1, 40), (30, 30), (0, 5), (250, 400)])
def test_interval_is_that_of_resampling(right, count):
    outcomes = np.array([1] * right + [0] * (count - right))
    random = np.random.default_rng(0)
    shares = [outcomes[random.integers(0, count, count)].mean() for _ in range(4000)]
    assert bootstrap_share(right, count) == pytest.approx(np.quantile(shares, [0.025, 0.975]), abs=1.01 / count)


ASKED = {"question": "w5", "choices": ["w6", "w7 w8"]}
FORMS = {
    "index": ({**ASKED, "answer": 1}, "w5", 1),
    "letter": ({**ASKED, "answer": "B"}, "w5", 1),
    "small letter": ({**ASKED, "answer": "b"}, "w5", 1),
    "text": ({**ASKED, "answer": "w7 w8"}, "w5", 1),
    "label": ({**ASKED, "label": 1}, "w5", 1),
    "arc": ({"question": "w5", "choices": {"text": ["w6", "w7 w8"], "label": ["1", "2"]}, "answerKey": "2"}, "w5", 1),
    "context": ({"context": "w4", "choices": ["w6", "w7 w8"], "answer": 1}, "w4", 1),
    "both": ({**ASKED, "context": "w4", "answer": 0}, "w4\nw5", 0),
    "query": ({"query": "w4", "choices": ["w6", "w7 w8"], "gold": 1}, "w4", 1),
}


@pytest.mark.parametrize("case", FORMS)
def test_forms_of_a_question(case, tmp_path):
    row, context, answer = FORMS[case]
    (example,) = read_choices(write_lines(tmp_path / "a.jsonl", row)).examples
    assert (example.context, example.choices, example.answer) == (context, ("w6", "w7 w8"), answer)


WRONG = {
    "no question": ({"choices": ["a", "b"], "answer": 0}, ["line 2", "'question'", "answer, choices"]),
    "no choices": ({"question": "a", "answer": 0}, ["line 2", "no 'choices'"]),
    "one choice": ({"question": "a", "choices": ["a"], "answer": 0}, ["line 2", "two texts"]),
    "empty choice": ({"question": "a", "choices": ["a", " "], "answer": 0}, ["line 2", "without text"]),
    "no answer": ({"question": "a", "choices": ["a", "b"]}, ["line 2", "no 'answer'"]),
    "far answer": ({"question": "a", "choices": ["x", "y"], "answer": 2}, ["line 2", "2 as 'answer'", "0 to 1", "B"]),
    "truth": ({"question": "a", "choices": ["x", "y"], "answer": True}, ["line 2", "True as 'answer'"]),
    "labels": (
        {"question": "a", "choices": {"text": ["x", "y"], "label": ["A"]}, "answer": "A"},
        ["line 2", "as many labels"],
    ),
    "number": ({"question": 3, "choices": ["a", "b"], "answer": 0}, ["line 2", "no text in 'question'"]),
    "list": ([1], ["line 2", "list"]),
    "no json": ("{", ["line 2", "not JSON"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_question_is_one_sentence(case, tmp_path):
    row, words = WRONG[case]
    path = write_lines(tmp_path / "a.jsonl", {**ASKED, "answer": 1}, row)
    refused(lambda: read_choices(path), str(path), *words)


def test_wrong_pairs_are_one_sentence(tmp_path):
    path = tmp_path / "a.jsonl"
    refused(lambda: read_pairs(path), "no such file")
    refused(lambda: read_pairs(tmp_path), "is a folder")
    write_lines(path, "", '{"sentence_good": "x"}')
    refused(lambda: read_pairs(path), "line 2", "no 'sentence_bad'", "it has sentence_good")
    write_lines(path, {"sentence_good": "", "sentence_bad": "x"})
    refused(lambda: read_pairs(path), "line 1", "no text in 'sentence_good'")
    path.write_bytes(b'{"sentence_good": "\xff"}')
    refused(lambda: read_pairs(path), "line 1", "UTF-8")
    path.write_text("\n")
    refused(lambda: read_pairs(path), "no example")


def test_limit_takes_the_first(files):
    assert read_pairs(files[0], 3).examples == read_pairs(files[0]).examples[:3]
    assert len(read_choices(files[1], 100).examples) == 12


# The verb


def run(*arguments):
    return CliRunner().invoke(app, ["evaluate", *(str(argument) for argument in arguments)])


def refuse(arguments, *words):
    done = run(*arguments)
    assert done.exit_code == 2, done.stderr
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)
    for word in words:
        assert word in done.stderr


def run_json(*arguments):
    done = run(*arguments, "--json", "--threads", 1)
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_verb_answers_from_any_folder(kind, folders, files, opened):
    found = run_json(folders[kind], "--pairs", files[0], "--choices", files[1], "--against", folders["uneven"])
    tasks = [read_pairs(files[0]), read_choices(files[1])]
    expected = [score for task in tasks for score in score_task(opened["uneven"], task)]
    assert [(one["task"], one["metric"], one["value"]) for one in found["tasks"]] == [
        (score.task, score.metric, score.value) for score in expected
    ]
    for one, score in zip(found["tasks"], expected, strict=True):
        assert one["interval"] == list(score.interval)
        assert (one["dense"]["value"], one["of_dense"]) == (one["value"], 1.0 if one["value"] else None)


def test_verb_prints_a_table_that_fits(folders, files):
    long = files[1].rename(files[1].with_name(f"{'long_' * 9}.jsonl"))
    done = run(folders["fused"], "--choices", long, "--against", folders["uneven"], "--limit", 5, "--threads", 1)
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["task", "metric", "value", "dense", "of", "dense", "uncertainty"]
    assert [line.split()[1] for line in lines[1:4]] == ["acc", "acc_norm", "acc_bytes"]
    assert "95 % bootstrap" in lines[4]
    alone = run(folders["fused"], "--choices", long, "--limit", 5, "--threads", 1).stdout.splitlines()
    assert alone[0].split() == ["task", "metric", "value", "uncertainty", "examples"]
    assert alone[1].split()[-1] == "5"
    assert max(map(len, lines[:4] + alone[:4])) <= 80


def test_text_and_tasks_in_one_run(folders, files, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{3 + index % 90}" for index in range(300)))
    flags = ("--text", text, "--windows", 2, "--length", 24)
    both = run_json(folders["uneven"], *flags, "--pairs", files[0])
    assert both.pop("tasks")[0]["task"] == "pairs"
    assert both == run_json(folders["uneven"], *flags)


def test_useless_flags_are_one_sentence(folders, files, tmp_path):
    source = folders["uneven"]
    refuse((source,), "--text FILE, --tasks", "--pairs", "--choices")
    refuse((source, "--tasks", ","), "Nothing to evaluate on")
    refuse((source, "--pairs", files[0], "--windows", 3), "--windows", "without --text")
    refuse((source, "--pairs", files[0], "--shots", 3), "--shots", "without --tasks")
    refuse((source, "--pairs", files[0], "--task-folder", tmp_path), "--task-folder", "without --tasks")
    refuse((source, "--text", files[0], "--limit", 3), "--limit", "without --tasks or --pairs or --choices")


def test_wrong_folders_are_one_sentence(folders, files, tmp_path):
    refuse((tmp_path, "--pairs", files[0]), "holds no model")
    plain = make_checkpoint(tmp_path / "plain", "llama")
    refuse((plain, "--pairs", files[0]), "no tokenizer.json")
    refuse((folders["uneven"], "--pairs", tmp_path / "none.jsonl"), "none.jsonl", "no such file")


def test_what_no_config_says_is_assumed_aloud(folders, files, tmp_path):
    """A standard graph brings no config: the start token is the tokenizer's own, or there is none."""
    folder = tmp_path / "alone"
    folder.mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        (folder / name).write_bytes((folders["standard"] / name).read_bytes())
    make_words(True).save(str(folder / "tokenizer.json"))
    asked = ("--pairs", files[0], "--json", "--quiet", "--threads", 1)
    whole, known = run(folder, *asked), run(folders["uneven"], *asked)
    assert whole.stderr == f"lightpress: warning: {folder} does not say its longest context: 2048 tokens are assumed.\n"
    assert json.loads(whole.stdout) == json.loads(known.stdout)
    assert known.stderr == ""
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 256}')
    make_words(False).save(str(folder / "tokenizer.json"))
    without = run(folder, *asked)
    assert "names no start token" in without.stderr
    assert without.stderr.count("\n") == 1
    assert json.loads(without.stdout) != json.loads(known.stdout)


def test_damaged_weights_fail_the_run(files, tmp_path):
    folder = make_checkpoint(tmp_path / "model", "llama", rms_norm_eps=math.nan)
    make_words(True).save(str(folder / "tokenizer.json"))
    done = run(folder, "--pairs", files[0], "--quiet")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "no numbers" in done.stderr
    assert done.stderr.count("\n") == 1


def test_missing_harness_is_one_sentence(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    refuse((folders["uneven"], "--tasks", "any"), "pip install -e .[eval]", "--pairs")


# lm-eval


@pytest.fixture(scope="session")
def harness():
    """lm-eval, offline; its libraries read the environment once."""
    with pytest.MonkeyPatch.context() as patch:
        for name in SURROUNDINGS:
            patch.setenv(name, "1")
        return pytest.importorskip("lm_eval.evaluator", reason="lm-eval is not installed (extra `eval`)")


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
"""
ASK = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}]
"""
ROLL = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
GENERATE = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["w9"], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
"""


def run_tasks(model, request):
    return score_harness_tasks(model, request, find_tasks(request))


@pytest.fixture
def tasks(files, tmp_path):
    """A folder with tasks on the questions' file."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, rest in {"my_ask": ASK, "my_roll": ROLL, "my_generate": GENERATE}.items():
        head = TASK.format(name=name, data=files[1], cache=tmp_path / "cache")
        (folder / f"{name}.yaml").write_text(head + rest)
    return folder


@pytest.mark.filterwarnings("ignore")  # those of lm-eval and of a dozen libraries that it imports
@pytest.mark.parametrize("kind", KINDS)
def test_harness_agrees_with_our_own_numbers(kind, harness, opened, tasks, files, monkeypatch):
    asked = []

    def note(self, pairs):
        found = score_pairs(self, pairs)
        asked.extend(zip(pairs, found, strict=True))
        return found

    score_pairs = Answers.score_pairs
    monkeypatch.setattr(Answers, "score_pairs", note)
    model, own = opened[kind], read_choices(files[1])
    found = run_tasks(model, TaskRequest(("my_ask", "my_roll"), tasks))
    by_name = {(score.task, score.metric): score for score in found}
    for score in score_task(model, own):
        other = by_name["my_ask", score.metric]
        assert (other.value, other.examples) == (score.value, score.examples)
        assert other.error == pytest.approx(math.sqrt(score.value * (1 - score.value) / 11))
    totals = score_examples(model, own)
    texts = [(example.context, f" {choice}") for example in own.examples for choice in example.choices]
    assert [pair for pair, _ in asked] == texts
    assert [total for _, (total, _) in asked] == pytest.approx(totals, rel=1e-6)
    rows = [row for example in own.examples for row in roll_text(model, example.context)]
    loss = -sum(score.total for score in score_rows(model, rows))
    words = sum(len(example.context.split()) for example in own.examples)
    size = sum(len(example.context.encode()) for example in own.examples)
    assert by_name["my_roll", "word_perplexity"].value == pytest.approx(math.exp(loss / words), rel=1e-6)
    assert by_name["my_roll", "bits_per_byte"].value == pytest.approx(loss / size / math.log(2), rel=1e-6)
    assert not by_name["my_roll", "bits_per_byte"].higher_is_better


@pytest.mark.filterwarnings("ignore")
def test_texts_become_tokens_as_in_the_harness(harness):
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class Theirs(TemplateLM):
        eot_token_id = prefix_token_id = 1
        loglikelihood_rolling = generate_until = None

        def tok_encode(self, string, add_special_tokens=None, **others):
            own = string.startswith("<s>") if add_special_tokens is None else not add_special_tokens
            return tokenizer.encode(string, add_special_tokens=not own).ids

        def _loglikelihood_tokens(self, requests, **others):
            return [(context, rest) for _, context, rest in requests]

    class Request:
        def __init__(self, *args):
            self.args = args

    for begins in (True, False):
        tokenizer = make_words(begins)
        pairs = [texts for texts, _, _ in PAIRS.values() if texts[0] != "  "]
        for pair, (context, rest) in zip(
            pairs, Theirs().loglikelihood([Request(*pair) for pair in pairs], disable_tqdm=True), strict=True
        ):
            assert encode_pair(bare(begins), *pair) == Row((*context, *rest), len(context)), pair
    for length in (1, 5, 6, 7, 12, 13, 17):
        ids = list(range(10, 10 + length))
        windows = [make_disjoint_window(pair) for pair in get_rolling_token_windows(ids, 1, 6, 1)]
        rows = roll_text(bare(context=6), " ".join(f"w{token}" for token in ids))
        assert rows == [Row((*before, *scored), len(before)) for before, scored in windows]


@pytest.mark.filterwarnings("ignore")
def test_verb_runs_the_harness_and_keeps_stdout_clean(harness, folders, tasks, files):
    flags = ("--tasks", "my_ask, my_roll,my_generate", "--task-folder", tasks, "--limit", 6)
    found = run_json(folders["fused"], *flags, "--against", folders["uneven"], "--choices", files[1])["tasks"]
    by_name = {(one["task"], one["metric"]): one for one in found}
    assert by_name["my_ask", "acc"]["value"] == by_name["ask", "acc"]["value"]
    assert by_name["my_ask", "acc"]["examples"] == 6
    assert by_name["my_roll", "bits_per_byte"]["of_dense"] is None
    assert by_name["my_generate", "exact_match"]["value"] == 0
    assert all(one["dense"]["value"] == pytest.approx(one["value"], rel=1e-6) for one in found)
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.filterwarnings("ignore")
def test_shots_go_before_the_question(harness, opened, tasks, monkeypatch):
    seen = []

    def note(self, pairs):
        seen.extend(pairs)
        return [(-1.0, False)] * len(pairs)

    monkeypatch.setattr(Answers, "score_pairs", note)
    run_tasks(opened["uneven"], TaskRequest(("my_ask",), tasks, 2, 1))
    rows = question_rows()
    solved = {f"{row['question']} {row['choices'][row['answer']]}" for row in rows}
    assert len(seen) == 8
    for place, (context, _) in enumerate(seen):
        shot, _, question = context.partition("\n\n")
        assert shot in solved
        assert question == rows[place // 4]["question"]


BROKEN = {
    "no data": (("{test: ", "{test: /nowhere"), ["my_ask", "cannot be read", "HF_HUB_OFFLINE=0"]),
    "no field": (("{{question}}", "{{nothing}}"), ["my_ask", "nothing", "check the task's YAML"]),
    "no key": (("dataset_path: json", ""), ["my_ask.yaml", "'dataset_path'"]),
    "no split": (("test_split: test", ""), ["my_ask.yaml", "'test_split'"]),
    "no yaml": (("dataset_path: json", "dataset_path: [json"), ["my_ask.yaml", "not valid YAML"]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", BROKEN)
def test_broken_task_is_one_sentence(case, harness, folders, tasks):
    (old, new), words = BROKEN[case]
    path = tasks / "my_ask.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    (tasks / "unused.yaml").write_text("task: [")  # nobody asks for it
    refuse((folders["uneven"], "--tasks", "my_ask", "--task-folder", tasks, "--quiet"), *words)


def test_unknown_task_is_one_sentence():
    known = ["my_ask", "arc_easy"]
    assert explain_unknown("my_aks", None, known).endswith("or did you mean my_ask?")
    assert explain_unknown("zzz", Path("own"), known).startswith("Neither own nor lm-eval has a task 'zzz'")


@pytest.mark.filterwarnings("ignore")
def test_errors_of_the_model_are_not_blamed_on_the_task(harness, opened, tasks, monkeypatch):
    def fail(self, pairs):
        raise KeyError("ours")

    monkeypatch.setattr(Answers, "score_pairs", fail)
    with pytest.raises(KeyError, match="ours"):
        run_tasks(opened["uneven"], TaskRequest(("my_ask",), tasks))
    refused(lambda: run_tasks(opened["uneven"], TaskRequest(("my_ask",), tasks / "none")), "no such folder")
