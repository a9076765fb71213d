"""Distilled data: choosing documents, trajectories matched by learned prompts, and the command that writes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from refusals import refused
from tiny import make_checkpoint
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from typer.testing import CliRunner

from cli.distill import distill_data, write_rows
from compress.checkpoint import open_checkpoint
from compress.recover import select
from compress.recover.data import DataStream, Document, StreamOptions, open_stream
from compress.recover.functional import Model, embed_tokens, load_model, run_layers, stack_documents, sum_losses
from compress.recover.select import (
    FeatureOptions,
    gradient_features,
    measure_losses,
    order_documents,
    rank_by_gradient,
    score_similarity,
    take_share,
)
from compress.recover.trajectory import (
    Learned,
    Matching,
    Theta,
    TrajectoryOptions,
    count_round_trip,
    distil_prompts,
    draw_start,
    find_neighbours,
    make_samples,
    match_gradients,
    measure_match,
    neighbour_gradient,
    roll_out,
    start_learned,
    train_expert,
    write_samples,
)
from compress.weights import read_spec

WORDS = [f"w{number}" for number in range(60)]


def make_tokenizer() -> Tokenizer:
    words = {word: place + 10 for place, word in enumerate(WORDS)}
    tokenizer = Tokenizer(WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "?": 3, **words}, unk_token="?"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return tokenizer


def make_texts(path: Path, count: int = 12, seed: int = 0) -> Path:
    random = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        places = torch.randint(0, 60, (4 + number % 9,), generator=random).tolist()
        rows.append({"text": " ".join(WORDS[place] for place in places)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load_case(folder: Path, case: str = "llama", **changes: object) -> Model:
    checkpoint = open_checkpoint(make_checkpoint(folder / case, case, **changes))
    return load_model(checkpoint, read_spec(checkpoint))


def stream_of(path: Path, length: int = 32) -> DataStream:
    return open_stream([path], make_tokenizer(), StreamOptions(length=length, start=(1,), end=(2,)))


# Choosing


@pytest.mark.parametrize("case", ["llama", "gemma2", "granite", "phi3-longrope"])
def test_losses_equal_those_of_documents_alone(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "TOKENS", 40)
    model, stream = load_case(tmp_path, case), stream_of(make_texts(tmp_path / "a.jsonl"), 8)
    losses = measure_losses(model, stream)
    for number in range(12):
        ids = torch.tensor([stream.document(number).ids])
        x = run_layers(model, embed_tokens(model, ids), model.layers)
        alone = sum_losses(model, x, ids, torch.ones(ids.shape))[0] / (ids.shape[1] - 1)
        torch.testing.assert_close(losses[number], alone, atol=1e-5, rtol=1e-5)


def test_losses_equal_those_of_the_evaluation(tmp_path: Path) -> None:
    import math

    from compress.evaluate import measure_quality
    from compress.text import Windows

    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "m", "glm4"))
    model, stream = load_model(checkpoint, read_spec(checkpoint)), stream_of(make_texts(tmp_path / "a.jsonl"))
    ids = torch.tensor([stream.document(5).ids])
    wanted = measure_quality(checkpoint, read_spec(checkpoint), Windows(ids, "here")).perplexity
    assert math.isclose(float(measure_losses(model, stream)[5].exp()), wanted, rel_tol=1e-5)


def test_orders_of_difficulty() -> None:
    losses = torch.tensor([3.0, float("nan"), 1.0, 2.0, 9.0, 2.5])
    assert order_documents(losses, "easy") == [2, 3, 5, 0, 4]
    assert order_documents(losses, "hard") == [4, 0, 5, 3, 2]
    assert order_documents(losses, "medium") == [5, 0, 3, 2, 4]
    refused(lambda: order_documents(losses, "odd"), "'odd'", "easy, medium, hard")


def test_a_share_is_of_tokens() -> None:
    sizes = [10, 0, 30, 5, 40, 15]
    assert take_share([4, 1, 2, 3, 0, 5], sizes, 0.55) == [4, 3, 0]
    assert take_share([4, 2], sizes, 0.01) == [4]
    assert take_share(range(6), sizes, 1.0) == [0, 2, 3, 4, 5]


@pytest.mark.parametrize("size", [6, 1000])
def test_features_equal_projected_gradients(size: int, tmp_path: Path) -> None:
    model, stream = load_case(tmp_path, "qwen3"), stream_of(make_texts(tmp_path / "a.jsonl", 3))
    options = FeatureOptions(layers=2, roles=("o", "down", "gate"), size=size, seed=3)
    fast = gradient_features(model, [stream.document(number) for number in range(3)], options)
    pairs = select.draw_projections(model, options)
    for number in range(3):
        ids, weights = stack_documents([stream.document(number)])
        with torch.enable_grad():
            layers = [{role: one.clone().requires_grad_() for role, one in layer.items()} for layer in model.layers]
            loss = sum_losses(model, run_layers(model, embed_tokens(model, ids), layers), ids, weights)[0]
            (loss / (ids.shape[1] - 1)).backward()
        slow = []
        for layer, own in zip(layers[-2:], pairs, strict=True):
            for role in options.roles:
                gradient = layer[role].grad
                assert gradient is not None
                slow.append((own[role][0].T @ gradient @ own[role][1]).flatten())
        torch.testing.assert_close(fast[number], torch.cat(slow), atol=1e-6, rtol=1e-4)


def test_documents_like_the_target_come_first(tmp_path: Path) -> None:
    model = load_case(tmp_path)
    low, high = " ".join(WORDS[:6] * 2), " ".join(WORDS[50:56] * 2)
    rows = [{"text": low if number % 3 else high} for number in range(9)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": " ".join(WORDS[51:56] + WORDS[50:55])}) + "\n")
    streams = stream_of(tmp_path / "a.jsonl"), stream_of(tmp_path / "b.jsonl")
    ranking = rank_by_gradient(model, *streams, FeatureOptions())
    assert sorted(ranking[:3]) == [0, 3, 6]


def test_similarity_is_pooled() -> None:
    features, targets = torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 5.0]])
    torch.testing.assert_close(score_similarity(features, targets), torch.tensor([0.5, 0.5**0.5]))
    torch.testing.assert_close(score_similarity(features, targets, "best"), torch.tensor([1.0, 0.5**0.5]))
    refused(lambda: score_similarity(features, targets, "worst"), "'worst'")


# Trajectories


SMALL = TrajectoryOptions(
    rank=2, experts=1, expert_steps=12, expert_rate=3e-3, every=3, ahead=1, inner=3, batch=4, prompt=3, steps=30,
    rate=0.2,
)


def load_small(folder: Path, dtype: torch.dtype = torch.float32) -> Model:
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3}
    checkpoint = open_checkpoint(make_checkpoint(folder / "small", "llama", **sizes, num_key_value_heads=1))
    return load_model(checkpoint, read_spec(checkpoint), dtype)


def make_matching(folder: Path, options: TrajectoryOptions) -> tuple[Matching, list[Theta], dict[int, Document]]:
    model, stream = load_small(folder, torch.float64), stream_of(make_texts(folder / "a.jsonl", 20))
    documents = {number: stream.document(number) for number in range(20)}
    states = train_expert(model, list(documents.values()), options, 1)
    samples = make_samples(documents, options, 1)
    return Matching(model, samples, options), states, documents


@pytest.mark.parametrize("rank", [0, 2])
def test_gradients_equal_those_of_the_whole_unrolled_loop(rank: int, tmp_path: Path) -> None:
    options = replace(SMALL, rank=rank)
    matching, states, _ = make_matching(tmp_path, options)
    learned = start_learned(matching.model, matching.samples, states, options)
    start = draw_start([states], matching.samples, options, 3)
    loss, by_embeddings, by_rates = match_gradients(matching, learned, start)
    with torch.enable_grad():
        own = Learned(learned.embeddings.clone().requires_grad_(), learned.rates.clone().requires_grad_())
        theta = {name: tensor.clone().requires_grad_() for name, tensor in start.theta.items()}
        for rows in start.rows:
            theta = matching.step(theta, own, rows, twice=True)
        slow = sum((theta[name] - start.target[name]).square().sum() for name in theta)
        slow = slow / sum((start.theta[name] - start.target[name]).square().sum() for name in theta)
        wanted = torch.autograd.grad(slow, [own.embeddings, own.rates])
    assert loss == pytest.approx(float(slow), rel=1e-9)
    torch.testing.assert_close(by_embeddings, wanted[0], rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(by_rates, wanted[1], rtol=1e-7, atol=1e-12)
    assert by_embeddings.abs().max() > 0


def test_gradients_equal_finite_differences(tmp_path: Path) -> None:
    matching, states, _ = make_matching(tmp_path, SMALL)
    learned = start_learned(matching.model, matching.samples, states, SMALL)
    start = draw_start([states], matching.samples, SMALL, 4)
    _, by_embeddings, by_rates = match_gradients(matching, learned, start)
    random = torch.Generator().manual_seed(0)
    way = torch.randn(learned.embeddings.shape, generator=random, dtype=torch.float64)
    turn = torch.randn(learned.rates.shape, generator=random, dtype=torch.float64)
    sides = []
    for sign in (1, -1):
        moved = Learned(learned.embeddings + sign * 1e-5 * way, learned.rates + sign * 1e-5 * turn)
        sides.append(float(measure_match(roll_out(matching, moved, start)[-1], start)))
    slope = float((by_embeddings * way).sum() + (by_rates * turn).sum())
    assert (sides[0] - sides[1]) / 2e-5 == pytest.approx(slope, rel=1e-5)


def test_matching_falls_below_one(tmp_path: Path) -> None:
    model, stream = load_small(tmp_path), stream_of(make_texts(tmp_path / "a.jsonl", 20))
    documents = {number: stream.document(number) for number in range(20)}
    states = [train_expert(model, list(documents.values()), SMALL, 1)]
    samples = make_samples({number: documents[number] for number in range(8)}, SMALL, 1)
    found = distil_prompts(model, samples, states, SMALL, (0, 1, 2))
    assert found.before < 0.9 and found.before < found.first - 0.1
    assert sum(found.curve[-8:]) < sum(found.curve[:8])
    begin, end = samples.learned
    assert torch.equal(found.ids[:, end:], samples.ids[:, end:]) and torch.equal(found.ids[:, 0], samples.ids[:, 0])
    assert not torch.equal(found.ids[:, begin:end], samples.ids[:, begin:end])
    assert found.ids[:, begin:end].min() > 2


def test_the_regulariser_keeps_prompts_near_tokens(tmp_path: Path) -> None:
    model, stream = load_small(tmp_path), stream_of(make_texts(tmp_path / "a.jsonl", 20))
    documents = {number: stream.document(number) for number in range(20)}
    states = [train_expert(model, list(documents.values()), SMALL, 1)]
    samples = make_samples(documents, SMALL, 1)
    gaps = []
    for pull in (0.0, 300.0):
        found = distil_prompts(model, samples, states, replace(SMALL, pull=pull, steps=15))
        gaps.append(abs(found.after - found.before))
    assert gaps[1] < gaps[0]


def test_the_regulariser_is_the_distance_to_the_nearest_by_angle() -> None:
    table = torch.tensor([[1.0, 0.0], [0.0, 8.0], [0.1, 0.1]], dtype=torch.float64)
    embeddings = torch.tensor([[[0.3, 3.0], [0.9, 0.1]]], dtype=torch.float64)
    assert find_neighbours(embeddings, table).tolist() == [[1, 0]]  # by distance the first would be the last row's
    assert find_neighbours(embeddings, table, (1,)).tolist() == [[2, 0]]
    loss, gradient = neighbour_gradient(embeddings, table, ())
    with torch.enable_grad():
        leaf = embeddings.clone().requires_grad_()
        slow = (leaf - table[[1, 0]]).square().sum(-1).mean() / table.square().sum(1).mean()
        (wanted,) = torch.autograd.grad(slow, leaf)
    assert loss == pytest.approx(float(slow))
    torch.testing.assert_close(gradient, wanted)


def test_samples_need_something_to_predict(tmp_path: Path) -> None:
    document = Document([1, 5, 6, 7, 8, 2], [1] * 6)
    samples = make_samples({7: document, 9: Document([1, 5], [1, 1])}, SMALL, 1)
    assert samples.numbers == (7,) and samples.learned == (1, 4)
    assert samples.weights.tolist() == [[0, 0, 0, 0, 1, 1]]
    refused(lambda: make_samples({0: Document([1, 5, 6], [1] * 3)}, SMALL, 1), "--prompt-tokens", "first 4")
    refused(lambda: TrajectoryOptions(expert_steps=4, every=5), "train it longer")
    refused(lambda: replace(SMALL, inner=0), "at least 1")


def test_samples_become_text_and_tokens_again() -> None:
    tokenizer = make_tokenizer()
    documents = {3: Document([1, 11, 12, 13, 14, 15, 2], [1] * 7), 4: Document([1, 10, 11, 12, 13], [0, 0, 0, 0, 1])}
    samples = make_samples(documents, replace(SMALL, prompt=2), 1)
    rows = write_samples(samples, samples.ids, tokenizer, (2,))
    assert rows == [
        {"prompt": "w1 w2", "response": "w3 w4 w5"},
        {"prompt": "w0 w1 w2", "response": "w3"},  # tokens of the prompt that are not learned stay in it
    ]
    assert count_round_trip(samples, samples.ids, rows, tokenizer) == 1
    assert count_round_trip(samples, samples.ids, [{"prompt": "w1"}, rows[1]], tokenizer) == 0.5


# The command


def run_command(*words: object) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(distill_data)
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3}
    made = make_checkpoint(tmp_path / "model", "llama", **sizes, num_key_value_heads=1)
    make_tokenizer().save(str(made / "tokenizer.json"))
    make_texts(tmp_path / "a.jsonl", 40)
    make_texts(tmp_path / "like.jsonl", 3, seed=5)
    return tmp_path


@pytest.mark.parametrize(
    "flags", [["--method", "random"], ["--method", "loss", "--pick", "hard"], ["--method", "gradient", "--like", "L"]]
)
def test_the_command_chooses_rows(flags: list[str], folder: Path) -> None:
    flags = [str(folder / "like.jsonl") if flag == "L" else flag for flag in flags]
    out = folder / "out.jsonl"
    code, said = run_command(
        folder / "model", "--text", folder / "a.jsonl", *flags, "--share", 0.2, "-o", out, "--json", "--quiet"
    )
    facts = json.loads(said)
    assert code == 0 and 0.1 < facts["share"] <= 0.2
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    given = [json.loads(line)["text"] for line in (folder / "a.jsonl").read_text().splitlines()]
    assert len(rows) == facts["documents"] > 2
    assert len({row["text"] for row in rows}) == len(rows) and {row["text"] for row in rows} <= set(given)
    for row in rows:
        assert row["synthetic"] is False and row["provenance"]["method"] == flags[1]
        line = int(row["provenance"]["document"].rpartition(" ")[2])
        assert given[line - 1] == row["text"]
    assert sorted(path.name for path in folder.iterdir()) == ["a.jsonl", "like.jsonl", "model", "out.jsonl"]


def test_the_command_writes_synthetic_rows_that_training_reads(folder: Path) -> None:
    out = folder / "out.jsonl"
    words = ["--method", "trajectory", "--share", 0.2, "--prompt-tokens", 2, "--steps", 3, "--rank", 1, "--experts", 1]
    code, said = run_command(folder / "model", "--text", folder / "a.jsonl", *words, "-o", out, "--quiet")
    assert code == 0 and "marked synthetic" in said
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(row["synthetic"] is True and row["provenance"]["model"] == "model" for row in rows)
    stream = stream_of(out)
    assert stream.facts.documents == len(rows) > 2
    first = stream.document(0)
    assert first.ids[0] == 1 and first.ids[-1] == 2 and not any(first.weights[:3]) and all(first.weights[3:])


def test_the_command_refuses_in_a_sentence(folder: Path) -> None:
    def start(*words: object, output: str = "out.jsonl") -> object:
        return lambda: run_command(folder / "model", "--text", folder / "a.jsonl", *words, "-o", folder / output)

    refused(start("--method", "best"), "--method best", "random, loss, gradient, trajectory")
    refused(start("--share", 0), "--share 0")
    refused(start("--pick", "easy"), "--pick does nothing", "--method loss")
    refused(start("--rank", 2, "--method", "loss"), "--rank does nothing")
    refused(start("--method", "gradient"), "--like FILE")
    refused(start("--method", "loss", "--pick", "odd"), "'odd'")
    refused(start("--method", "trajectory", "--prompt-tokens", 99), "--prompt-tokens")
    refused(start(output="model"), "is a folder")
    refused(start(output="a.jsonl"), "also an input")
    refused(start(output="none/out.jsonl"), "no folder")
    refused(start("--field", "body"), "--field")
    (folder / "out.jsonl").write_text("kept")
    refused(start(), "exists already", "--overwrite")
    assert (folder / "out.jsonl").read_text() == "kept"
    chat = {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 " * 9}]}
    (folder / "chat.jsonl").write_text(json.dumps(chat) + "\n")
    (folder / "model" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content + ' ' }}{% endfor %}")
    words = ["--text", folder / "chat.jsonl", "--method", "trajectory", "--prompt-tokens", 2, "-o", folder / "b.jsonl"]
    refused(lambda: run_command(folder / "model", *words), "line 1 is a chat")


def test_nothing_half_written_is_left(tmp_path: Path) -> None:
    def fail() -> Iterator[dict[str, Any]]:
        yield {"text": "one", "provenance": {}}
        raise KeyboardInterrupt

    (tmp_path / "out.jsonl").write_text("before")
    with pytest.raises(KeyboardInterrupt):
        write_rows(tmp_path / "out.jsonl", fail(), "model")
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    assert (tmp_path / "out.jsonl").read_text() == "before"
