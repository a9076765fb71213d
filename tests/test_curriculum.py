"""The order of training documents: difficulty equals its slow twin, orders rise, stages follow, resumed runs agree."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from refusals import refused
from tiny import make_checkpoint
from typer.testing import CliRunner
from words import WORDS, make_tokenizer

from cli.app import Verb, Verbs
from cli.curriculum import ORDER_NAME
from cli.recover import recover
from compress.checkpoint import open_checkpoint
from compress.recover import curriculum
from compress.recover.curriculum import (
    FAILURES,
    LOSS,
    CurriculumOptions,
    draw_share,
    make_curriculum,
    measure_difficulty,
)
from compress.recover.data import NEAR, DataStream, StreamOptions, open_stream
from compress.recover.data_pack import cut_windows
from compress.recover.functional import embed_tokens, load_model, run_layers
from compress.recover.model import Frozen
from compress.recover.select import measure_losses
from compress.weights import read_spec


def make_rows(count: int, kinds: tuple[str | None, ...] = (), seed: int = 0) -> list[dict[str, str]]:
    """Prompts with answers of one to nine words; rows of the kind `long` answer with twenty more."""
    own = random.Random(seed)
    rows = []
    for number in range(count):
        kind = kinds[number % len(kinds)] if kinds else None
        size = 1 + number % 9 + 20 * (kind == "long")
        prompt, answer = (" ".join(own.choices(WORDS, k=most)) for most in (3, size))
        rows.append({"prompt": prompt, "response": answer, **({"kind": kind} if kind else {})})
    return rows


def put(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def stream_of(path: Path, length: int = 32, rows: int = 2, seed: int = 0) -> DataStream:
    return open_stream([path], make_tokenizer(), StreamOptions(length, rows, seed, start=(1,), end=(2,)))


def open_case(folder: Path, case: str = "llama") -> Frozen:
    checkpoint = open_checkpoint(make_checkpoint(folder / case, case))
    return Frozen(checkpoint, read_spec(checkpoint))


def find_documents(stream: DataStream, count: int, order: Any, start: int = 0) -> list[list[int]]:
    """Return which documents lie in each batch, told apart by their first piece's tokens."""
    names = {tuple(stream.document(number).ids): number for number in stream.used()}
    assert len(names) == len(stream.used())
    found = []
    for batch in islice(stream.batches(start, order), count):
        own = []
        for ids, documents, weights in zip(batch.ids, batch.documents, batch.weights, strict=True):
            for place in range(int(documents.max()) + 1):
                inside = documents == place
                key = tuple(ids[inside][: stream.options.length].tolist())
                own += [names[key]] if weights[inside].any() and key in names else []
        found.append(own)
    return found


# Difficulty


@pytest.mark.parametrize("case", ["llama", "gemma2", "granite", "glm4"])
def test_difficulty_equals_its_slow_twin(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curriculum, "count_piece", lambda vocab: 5)
    stream = stream_of(put(tmp_path / "a.jsonl", make_rows(14)), length=8)
    frozen = open_case(tmp_path, case)
    checkpoint = open_checkpoint(tmp_path / case)
    model, chosen = load_model(checkpoint, read_spec(checkpoint)), [0, 3, 4, 7, 8, 13]
    found = measure_difficulty(frozen, stream, chosen)
    assert found.isnan().all(1).nonzero()[:, 0].tolist() == [n for n in range(14) if n not in chosen]
    for number in chosen:
        one = stream.document(number)
        ids = torch.tensor([one.ids])
        logits = frozen.logits(run_layers(model, embed_tokens(model, ids), model.layers))[0].log_softmax(-1)
        losses = wrong = counted = 0.0
        for place in range(1, len(one.ids)):
            losses -= one.weights[place] * float(logits[place - 1, one.ids[place]])
            wrong += one.weights[place] * (int(logits[place - 1].argmax()) != one.ids[place])
            counted += one.weights[place]
        wanted = torch.tensor([losses / counted, wrong / counted])
        torch.testing.assert_close(found[number], wanted, atol=1e-5, rtol=1e-5)


def test_losses_are_those_of_the_selection(tmp_path: Path) -> None:
    stream, frozen = stream_of(put(tmp_path / "a.jsonl", make_rows(20)), length=10), open_case(tmp_path)
    checkpoint = open_checkpoint(tmp_path / "llama")
    wanted = measure_losses(load_model(checkpoint, read_spec(checkpoint)), stream)
    torch.testing.assert_close(measure_difficulty(frozen, stream, range(20))[:, 0], wanted, atol=1e-5, rtol=1e-5)


def test_a_loss_that_is_no_number_is_refused(tmp_path: Path) -> None:
    stream, frozen = stream_of(put(tmp_path / "a.jsonl", make_rows(4))), open_case(tmp_path)
    frozen._ends["final_norm"] = frozen._ends["final_norm"] * float("nan")
    refused(lambda: measure_difficulty(frozen, stream, [1, 2]), "a.jsonl: line 2", "not a number", "--curriculum")


# Windows


@pytest.mark.parametrize(("most", "room"), [(5, 1000), (1000, 40), (3, 25), (1000, 1)])
def test_windows_equal_their_slow_twin(most: int, room: int) -> None:
    import numpy as np

    own = random.Random(most)
    sizes = np.array([own.randint(1, 20) for _ in range(50)], np.uint32)
    places = np.array(own.sample(range(50), 40))
    slow: list[list[int]] = []
    for place in places.tolist():
        fits = slow and len(slow[-1]) < most and sum(int(sizes[one]) for one in [*slow[-1], place]) <= room
        if fits:
            slow[-1].append(place)
        else:
            slow.append([place])
    assert [window.tolist() for window in cut_windows(places, sizes, most, room)] == slow


def test_an_order_lays_documents_side_by_side(tmp_path: Path) -> None:
    stream = stream_of(put(tmp_path / "a.jsonl", make_rows(40)), length=8)
    order = random.Random(0).choices(range(40), k=90)  # some twice, some never
    pieces = [stream._owners[place] for place in stream._follow(order)]
    slow = [own for number in order for own in stream._owners if own == number]
    assert pieces == slow
    rows = [place for window in stream._plan_windows(0, order) for row in window for place in row]
    assert Counter(rows) == Counter(stream._follow(order).tolist())
    assert stream.count_rows(order) == sum(1 for window in stream._plan_windows(0, order) for _ in window)


@pytest.mark.parametrize("kind", ["easy", "hard", "medium"])
@pytest.mark.parametrize("passes", [0.4, 1.0, 3.3])
def test_difficulty_rises_through_the_run(kind: str, passes: float, tmp_path: Path) -> None:
    stream, model = stream_of(put(tmp_path / "a.jsonl", make_rows(300))), open_case(tmp_path)
    batches = round(stream.count_rows() * passes / 2)
    found = make_curriculum(stream, CurriculumOptions(kind), 2 * batches, model)
    measured = measure_difficulty(model, stream, stream.used())[:, 0]
    keys = {"easy": measured, "hard": -measured, "medium": (measured - measured.median()).abs()}[kind]
    seen = find_documents(stream, batches, found.order)
    means = [float(keys[own].mean()) for own in seen]
    quarter = len(means) // 4
    first, last = means[:quarter], means[-quarter:]
    assert max(first[: max(1, quarter // 2)]) < min(last[-max(1, quarter // 2) :])
    assert sum(first) / quarter < sum(last) / quarter - 0.5 * float(keys.std())
    shuffled = [float(keys[own].mean()) for own in find_documents(stream, batches, None)]
    slope = abs(sum(shuffled[:quarter]) - sum(shuffled[-quarter:])) / quarter
    assert slope < 0.5 * (sum(last) - sum(first)) / quarter


def test_a_run_reads_every_document_as_often(tmp_path: Path) -> None:
    stream, model = stream_of(put(tmp_path / "a.jsonl", make_rows(300))), open_case(tmp_path)
    rows = int(2.5 * stream.count_rows())
    found = make_curriculum(stream, CurriculumOptions("easy"), rows, model)
    counts = Counter(found.order)
    assert set(counts) == set(stream.used()) and set(counts.values()) == {2, 3}
    assert rows <= stream.count_rows(found.order) <= 1.02 * rows
    # Each time a band comes again, its documents have other neighbours.
    eighth = len(found.order) // 16
    assert found.order[:eighth] != found.order[eighth : 2 * eighth]


def test_a_short_run_reads_hard_documents_too(tmp_path: Path) -> None:
    stream, model = stream_of(put(tmp_path / "a.jsonl", make_rows(300))), open_case(tmp_path)
    found = make_curriculum(stream, CurriculumOptions("easy"), stream.count_rows() // 4, model)
    assert 60 < len(found.order) == len(set(found.order)) < 90
    measured = measure_difficulty(model, stream, stream.used())[:, 0]
    own = measured[list(found.order)]
    assert own.min() < measured.quantile(0.05) and own.max() > measured.quantile(0.95)


def test_a_share_is_of_tokens_and_keeps_the_order() -> None:
    import numpy as np

    sizes, documents = np.arange(1, 101), list(range(99, -1, -1))
    for share in (0.1, 0.5, 0.99):
        taken = draw_share(documents, share, sizes, (3,))
        assert taken == sorted(taken, reverse=True)
        total = sizes[taken].sum()
        assert share * sizes.sum() <= total < share * sizes.sum() + 100
    assert draw_share(documents, 0, sizes, (3,)) == [] and draw_share(documents, 1.5, sizes, (3,)) == documents


def test_the_order_is_the_seeds(tmp_path: Path) -> None:
    stream, model = stream_of(put(tmp_path / "a.jsonl", make_rows(60))), open_case(tmp_path)

    def order(seed: int) -> tuple[int, ...]:
        return make_curriculum(stream, CurriculumOptions("easy", FAILURES, seed=seed), 30, model).order

    assert order(1) == order(1) != order(2)


@pytest.mark.parametrize("start", [1, 7, 23, 40])
def test_batches_from_the_middle_equal_the_straight_run(start: int, tmp_path: Path) -> None:
    stream, model = stream_of(put(tmp_path / "a.jsonl", make_rows(150))), open_case(tmp_path)
    order = make_curriculum(stream, CurriculumOptions("hard"), 100, model).order
    again = tuple(json.loads(json.dumps(order)))
    straight = list(islice(stream.batches(0, order), 60))  # past the end of the order
    for batch, other in zip(straight[start:], stream.batches(start, again), strict=False):
        assert torch.equal(batch.ids, other.ids) and torch.equal(batch.weights, other.weights)


# Stages


@pytest.mark.parametrize("labels", [(), ("short", "long")])
def test_one_label_is_over_before_the_next_begins(labels: tuple[str, ...], tmp_path: Path) -> None:
    rows = make_rows(150, ("short", "long", "short", None, "short"))
    stream = stream_of(put(tmp_path / "a.jsonl", rows))
    found = make_curriculum(stream, CurriculumOptions(label="kind", labels=labels), 2 * stream.count_rows())
    kinds = [rows[number].get("kind") for number in found.order]
    wanted = [*(labels or ("long", "short")), None]  # long answers first; rows without the label last
    assert [stage.label for stage in found.stages] == wanted
    assert [kind for place, kind in enumerate(kinds) if place == 0 or kinds[place - 1] != kind] == wanted
    assert {len(stage.documents) for stage in found.stages} == {30, 90}
    mixed = [own for own in find_documents(stream, 40, found.order) if len({rows[n].get("kind") for n in own}) > 1]
    assert len(mixed) <= 2 * NEAR  # rows are shuffled among neighbours, and some are there where a stage ends


def test_inside_a_label_difficulty_rises(tmp_path: Path) -> None:
    rows = make_rows(200, ("short", "long"))
    stream, model = stream_of(put(tmp_path / "a.jsonl", rows)), open_case(tmp_path)
    found = make_curriculum(stream, CurriculumOptions("easy", LOSS, "kind"), stream.count_rows() + 4, model)
    measured = measure_difficulty(model, stream, stream.used())[:, 0]
    for stage in found.stages:
        values = measured[list(stage.documents)].tolist()
        assert values == sorted(values) and stage.span == (values[0], values[-1])
        assert {rows[number]["kind"] for number in stage.documents} == {stage.label}


def test_labels_are_refused_in_a_sentence(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [*make_rows(30, ("short", "long"))]
    stream = stream_of(put(tmp_path / "a.jsonl", rows))

    def start(label: str, *labels: str) -> Any:
        return lambda: make_curriculum(stream, CurriculumOptions(label=label, labels=labels), 10)

    refused(start("sort"), "--label sort", "no row")
    refused(start("prompt"), "--label prompt", "more than 20", "line 21")
    refused(start("kind", "short"), "--label-order short", "long, short")
    refused(start("kind", "short", "long", "other"), "--label-order short,long,other")
    refused(start("kind", "short", "long", "short"), "once")
    stream = stream_of(put(tmp_path / "b.jsonl", [*rows, {**rows[0], "kind": ["a"]}]))
    refused(start("kind"), "b.jsonl: line 31", "'kind' is a list")
    refused(lambda: CurriculumOptions("odd"), "--curriculum odd", "easy, medium, hard")
    refused(lambda: CurriculumOptions("easy", "size"), "--difficulty size", "loss, failures")


# The verb

app = typer.Typer(cls=Verbs)
app.callback()(lambda: None)
app.command("recover", cls=Verb)(recover)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("verb")
    make_checkpoint(root / "model", "llama")
    make_tokenizer().save(str(root / "model" / "tokenizer.json"))
    put(root / "text.jsonl", [*make_rows(80, ("short", "long"))])
    return root


def invoke(folder: Path, out: Path, *extra: object, taught: bool = False) -> Any:
    """Train in this process, 20 steps of 64 tokens."""
    given = ["recover", folder / "model", "--text", folder / "text.jsonl", "-o", out, "--tokens", 1280, "--batch", 2]
    given += ["--length", 32, "--lr", 1e-3, "--no-verify"]
    given += ["--teacher", folder / "model"] if taught else ["--loss", "ce"]
    return CliRunner().invoke(app, [str(one) for one in [*given, *extra]])


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder)
    return dict(checkpoint.read(checkpoint.tensors))


def test_a_resumed_run_keeps_the_order_it_began_with(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cli import training

    flags = ("--curriculum", "easy", "--difficulty", "failures", "--label", "kind", "--save-steps", 5)
    done = invoke(folder, tmp_path / "whole", *flags)
    assert done.exit_code == 0, done.stderr
    assert re.search(r"Curriculum, easy first: \d+ long documents with \d+ to \d+ % of", done.stderr), done.stderr
    assert invoke(folder, tmp_path / "plain").exit_code == 0

    def stop(*rest: Any) -> None:  # as if it was killed before the output was written
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "write_student", stop)
    assert invoke(folder, tmp_path / "out", *flags).exit_code != 0
    monkeypatch.undo()
    work = tmp_path / "out.training"
    shutil.rmtree(sorted(work.glob("state-*"))[-1])  # what follows step 15 is trained again
    monkeypatch.setattr(curriculum, "measure_difficulty", None)  # and the student is not measured again
    done = invoke(folder, tmp_path / "out", *flags, "--resume")
    assert done.exit_code == 0, done.stderr
    assert "Resuming after step 15" in done.stderr
    whole, again, plain = (read_weights(tmp_path / name) for name in ("whole", "out", "plain"))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in again.items())
    assert any(not torch.equal(tensor, plain[name]) for name, tensor in whole.items())


def test_a_damaged_order_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cli import training

    def stop(*rest: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "make_trainer", stop)
    flags = ("--label", "kind", "--label-order", "short,long")
    assert invoke(folder, tmp_path / "out", *flags).exit_code != 0
    path = tmp_path / "out.training" / ORDER_NAME
    found = json.loads(path.read_text())
    assert [stage["label"] for stage in found["stages"]] == ["short", "long"]
    for text in ("{", '{"order": [1, 999]}', '{"order": 3}'):
        path.write_text(text)
        done = invoke(folder, tmp_path / "out", *flags, "--resume")
        assert done.exit_code == 2 and str(path) in done.stderr and "delete" in done.stderr


def test_the_cached_teacher_sees_the_same_order(folder: Path, tmp_path: Path) -> None:
    flags = ("--curriculum", "medium", "--offline", "--cache", tmp_path / "scores")
    done = invoke(folder, tmp_path / "one", *flags, taught=True)
    assert done.exit_code == 0, done.stderr
    done = invoke(folder, tmp_path / "two", *flags, "--overwrite", taught=True)
    assert done.exit_code == 0, done.stderr
    done = invoke(folder, tmp_path / "three", "--curriculum", "hard", *flags[2:], taught=True)
    assert done.exit_code == 2 and "its order differ" in done.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--difficulty", "loss"), "--difficulty does nothing without --curriculum"),
        (("--label-order", "a,b"), "--label-order does nothing without --label"),
        (("--curriculum", "odd"), "--curriculum odd is not one of easy, medium, hard"),
        (("--curriculum", "easy", "--difficulty", "odd"), "--difficulty odd is not one of loss, failures"),
        (("--label", "kind", "--label-order", " , "), "--label-order names no value of 'kind'"),
        (("--plain",), "--plain does nothing"),
    ],
)
def test_the_command_refuses_in_a_sentence(flags: tuple[str, ...], said: str, folder: Path, tmp_path: Path) -> None:
    done = invoke(folder, tmp_path / "out", *flags)
    assert done.exit_code == 2, done.stderr
    assert said in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_refused_order_leaves_nothing_in_the_way(folder: Path, tmp_path: Path) -> None:
    flags = ("--curriculum", "easy", "--label", "kind", "--label-order")
    done = invoke(folder, tmp_path / "out", *flags, "long")
    assert (done.exit_code, "short" in done.stderr) == (2, True), done.stderr
    assert not list(tmp_path.iterdir())
    done = invoke(folder, tmp_path / "out", *flags, "long,short")
    assert done.exit_code == 0, done.stderr


def write_dated(folder: Path, text: str = "{{ 'w' ~ strftime_now('%d') ~ ' ' ~ m['content'] ~ ' ' }}") -> None:
    """Write a model whose chat template writes the day into each message, and a text of prompts with answers."""
    make_checkpoint(folder / "model", "llama")
    make_tokenizer().save(str(folder / "model" / "tokenizer.json"))
    template = f"{{% for m in messages %}}{text}{{% endfor %}}"
    (folder / "model" / "chat_template.jinja").write_text(template)
    put(folder / "text.jsonl", make_rows(80))


@pytest.mark.parametrize("dated", [True, False])
def test_scores_are_of_the_tokens_whatever_the_day(
    dated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cli import training_job

    write_dated(tmp_path, *([] if dated else ["{{ m['content'] ~ ' ' }}"]))
    offline = ("--offline", "--cache", tmp_path / "scores")

    def train_on(day: str, out: str, *extra: object) -> Any:
        monkeypatch.setattr(training_job, "settle_date", lambda work, resume: day)
        return invoke(tmp_path, tmp_path / out, *extra, taught=True)

    done = train_on("2020-01-17", "one", *offline)
    assert done.exit_code == 0, done.stderr
    scores = {path.name: path.read_bytes() for path in (tmp_path / "scores").iterdir()}
    again = train_on("2020-01-17", "again", *offline)
    assert (again.exit_code, "Scoring" in again.stderr) == (0, False), again.stderr
    done = train_on("2020-01-18", "two", *offline)
    assert {path.name: path.read_bytes() for path in (tmp_path / "scores").iterdir()} == scores
    assert "Scoring" not in done.stderr
    if not dated:
        assert done.exit_code == 0, done.stderr
        return
    assert (done.exit_code, "(its tokens differ)" in done.stderr) == (2, True), done.stderr
    # Refused before its first step, it left nothing that the corrected command would stumble over.
    done = train_on("2020-01-18", "two", *offline[:2], tmp_path / "others")
    assert done.exit_code == 0, done.stderr


def test_a_resumed_run_sees_the_date_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cli import training, training_job

    write_dated(tmp_path)
    seen = []
    real = training_job.make_options

    def watch(*given: Any, **rest: Any) -> StreamOptions:
        options = real(*given, **rest)
        assert options.template is not None
        seen.append(options.template.render([{"role": "user", "content": "w1"}]))
        return options

    def stop(*rest: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training_job, "make_options", watch)
    with monkeypatch.context() as inner:
        inner.setattr(training, "make_trainer", stop)
        assert invoke(tmp_path, tmp_path / "out").exit_code != 0
    path = tmp_path / "out.training" / "run.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "now": "2020-01-17"}))  # begun on another day
    done = invoke(tmp_path, tmp_path / "out", "--resume")
    assert done.exit_code == 0, done.stderr
    assert seen[1] == "w17 w1 "
    assert invoke(tmp_path, tmp_path / "plain", "--plain").exit_code == 0
