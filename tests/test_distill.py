"""Distilled data: choosing documents, trajectories matched by learned prompts, and the command that writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from refusals import refused
from tiny import make_checkpoint
from typer.testing import CliRunner
from words import WORDS, make_tokenizer

from cli.distill import distill_data, write_rows
from compress.checkpoint import open_checkpoint
from compress.decoder import compute_logits
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
    apply_theta,
    copy_theta,
    fits_samples,
    judge,
    make_samples,
    match_gradients,
    mean_loss,
    measure_match,
    roll_out,
    start_theta,
    train_expert,
)
from compress.recover.trajectory_exchange import Apprentice, Exchanged, draw_epochs, exchange_rows
from compress.recover.trajectory_learn import distil_prompts, draw_start, guess_rate, learn_prompts, start_learned
from compress.recover.trajectory_project import (
    Outer,
    Search,
    check_text,
    count_round_trip,
    find_neighbours,
    neighbour_gradient,
    project_prompts,
    propose_swaps,
    refine_tokens,
    slope_tokens,
    try_swaps,
    write_samples,
)
from compress.recover.trajectory_rows import differentiate_document, draw_sketch, list_segments, match_rows, take_rows
from compress.weights import read_spec


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
    rate=0.2, swaps=6,
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
    found = distil_prompts(model, samples, states, SMALL, Outer((0, 1, 2)))
    assert found.learned < 0.9 and found.learned < found.first - 0.1 and found.learned < found.real
    assert sum(found.curve[-8:]) < sum(found.curve[:8])
    assert found.tokens < 1
    begin, end = samples.learned
    assert torch.equal(found.ids[:, end:], samples.ids[:, end:]) and torch.equal(found.ids[:, 0], samples.ids[:, 0])
    assert not torch.equal(found.ids[:, begin:end], samples.ids[:, begin:end])
    assert found.ids[:, begin:end].min() > 2


def test_the_regulariser_keeps_prompts_near_tokens(tmp_path: Path) -> None:
    model, stream = load_small(tmp_path), stream_of(make_texts(tmp_path / "a.jsonl", 20))
    documents = {number: stream.document(number) for number in range(20)}
    states = [train_expert(model, list(documents.values()), SMALL, 1)]
    samples = make_samples(documents, SMALL, 1)
    far = []
    for pull in (0.0, 300.0):
        matching = Matching(model, samples, replace(SMALL, pull=pull, steps=15))
        found = learn_prompts(matching, start_learned(model, samples, states[0], SMALL), states, Outer(), [])
        far.append(neighbour_gradient(found.embeddings, model.ends["embed"], ())[0])
    assert far[1] < far[0] / 2


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


def make_search(matching: Matching, states: list[Theta]) -> tuple[Search, torch.Tensor, list[Any], torch.Tensor]:
    begin, end = matching.samples.learned
    rates = start_learned(matching.model, matching.samples, states, matching.options).rates
    starts = [draw_start([states], matching.samples, matching.options, seed) for seed in (1, 2)]
    search = Search(matching.samples.ids[:, begin:end].clone(), 1.0, 3)
    return search, rates, starts, slope_tokens(matching, search.tokens, rates, starts)


def test_slopes_are_the_mean_over_starts(tmp_path: Path) -> None:
    matching, states, _ = make_matching(tmp_path, SMALL)
    search, rates, starts, slopes = make_search(matching, states)
    learned = Learned(matching.model.ends["embed"][search.tokens], rates)
    wanted = (match_gradients(matching, learned, starts[0])[1] + match_gradients(matching, learned, starts[1])[1]) / 2
    torch.testing.assert_close(slopes, wanted)


def test_swaps_equal_those_of_plain_loops(tmp_path: Path) -> None:
    matching, states, _ = make_matching(tmp_path, SMALL)
    search, _, _, slopes = make_search(matching, states)
    table = matching.model.ends["embed"]
    search.ruled_out.add((2, 0, 30))

    def stable(sample: int, prompt: torch.Tensor) -> bool:
        return sample % 5 != 0

    found = propose_swaps(search, slopes, table, Outer((0, 1, 2), stable))
    best = []
    for sample, own in enumerate(search.tokens.tolist()):
        falls = {
            (place, token): float(slopes[sample, place] @ (table[own[place]] - table[token]))
            for place in range(SMALL.prompt) for token in range(3, len(table))
            if token != own[place] and (sample, place, token) != (2, 0, 30)
        }  # fmt: skip
        place, token = max(falls, key=lambda key: falls[key])
        if sample % 5 and falls[place, token] > 0:
            best.append((falls[place, token], (sample, place, token)))
    assert found == [swap for _, swap in sorted(best, reverse=True)[:3]] and len(found) == 3
    assert {one[0] % 5 for one in search.ruled_out - {(2, 0, 30)}} == {0}


def test_swaps_only_lower_the_matching_loss(tmp_path: Path) -> None:
    matching, states, _ = make_matching(tmp_path, replace(SMALL, swaps=12))
    search, rates, starts, _ = make_search(matching, states)
    table = matching.model.ends["embed"]
    before = judge(matching, Learned(table[search.tokens], rates), starts)
    found = refine_tokens(matching, search.tokens, rates, starts, Outer((0, 1, 2)))
    assert len(found.curve) == 12 and found.loss == min(before, *found.curve) and found.tokens.min() > 2
    assert judge(matching, Learned(table[found.tokens], rates), starts) == pytest.approx(found.loss)


def test_swaps_that_fail_are_tried_in_smaller_groups() -> None:
    wanted = torch.tensor([[1, 2], [3, 4], [5, 6]])

    def measure(tokens: torch.Tensor) -> float:
        return float((tokens != wanted).sum())

    search = Search(torch.zeros(3, 2, dtype=torch.long), 6.0, 3)
    good, bad = (0, 0, 1), (1, 1, 9)
    assert try_swaps(search, [good, (1, 0, 3)], measure)
    assert search.tokens.tolist() == [[1, 0], [3, 0], [0, 0]] and search.loss == 4 and search.group == 3
    assert not try_swaps(search, [bad, (2, 0, 7), (0, 1, 9)], measure) and search.group == 1
    assert not search.ruled_out  # any of the three may have been at fault
    assert not try_swaps(search, [bad], measure) and search.ruled_out == {bad} and search.group == 1
    assert try_swaps(search, [(2, 1, 6)], measure) and search.group == 2 and not search.ruled_out
    assert search.tokens.tolist() == [[1, 0], [3, 0], [0, 6]] and search.curve == [4.0, 4.0, 4.0, 3.0]


def test_a_prompt_that_text_does_not_bring_back_stays_real() -> None:
    table = torch.eye(4)
    real = torch.tensor([[0, 1], [1, 2]])
    embeddings = table[torch.tensor([[2, 3], [3, 0]])]
    found = project_prompts(embeddings, real, table, Outer(stable=lambda sample, prompt: sample == 1))
    assert found.tolist() == [[0, 1], [3, 0]]


def test_a_rate_comes_nearest_to_its_goal() -> None:
    goal, gradient = torch.tensor([3.0, 1.0]), torch.tensor([2.0, 2.0])
    rate = guess_rate(goal, gradient, 4)
    missed = [float((goal - 4 * rate * share * gradient).norm()) for share in (0.99, 1.0, 1.01)]
    assert missed[1] < min(missed[0], missed[2])
    assert guess_rate(goal, -gradient, 4) > 0 and guess_rate(goal, torch.zeros(2), 4) == 0


def score_rows(features: torch.Tensor, goals: torch.Tensor, rows: list[int]) -> float:
    if not rows:
        return 0.0
    return float(torch.cosine_similarity(features[:, rows].sum(1), goals).sum())


@pytest.mark.parametrize("budget", [0.0, 25.0, 60.0, 1000.0])
def test_rows_equal_those_of_plain_loops(budget: float) -> None:
    random = torch.Generator().manual_seed(1)
    features = torch.randn(2, 12, 5, generator=random, dtype=torch.float64)
    goals = torch.randn(2, 5, generator=random, dtype=torch.float64)
    sizes = torch.randint(4, 16, (12,), generator=random).tolist()
    taken: list[int] = []
    while True:
        left = budget - sum(sizes[one] for one in taken)
        free = [one for one in range(12) if one not in taken and (sizes[one] <= left or not taken)]
        if not free:
            break
        before = score_rows(features, goals, taken)
        gains = {one: (score_rows(features, goals, [*taken, one]) - before) / sizes[one] for one in free}
        taken.append(max(free, key=lambda one: gains[one]))
    assert take_rows(features, goals, sizes, budget) == taken


def test_rows_match_the_expert_better_than_others(tmp_path: Path) -> None:
    matching, states, documents = make_matching(tmp_path, SMALL)
    rows = list(documents.values())
    budget = 0.3 * sum(len(one.ids) for one in rows)
    taken = match_rows(matching.model, rows, [states], SMALL, budget)
    assert 1 < len(taken) < 20 and sum(len(rows[one].ids) for one in taken) <= budget

    def agree(numbers: list[int]) -> float:
        total = 0.0
        for theta, target in list_segments([states], SMALL):
            found = [differentiate_document(matching.model, rows[number], theta, SMALL) for number in numbers]
            flat = torch.cat([torch.stack([one[name] for one in found]).sum(0).flatten() for name in theta])
            goal = torch.cat([(theta[name] - target[name]).flatten() for name in theta])
            total += float(torch.cosine_similarity(flat, goal, 0))
        return total

    others = [torch.randperm(20, generator=torch.Generator().manual_seed(seed))[: len(taken)] for seed in range(5)]
    assert agree(taken) > max(agree(other.tolist()) for other in others)


def test_a_document_is_differentiated_as_a_batch_of_one(tmp_path: Path) -> None:
    matching, states, documents = make_matching(tmp_path, SMALL)
    found = differentiate_document(matching.model, documents[3], states[1], SMALL)
    ids, weights = stack_documents([documents[3]])
    with torch.enable_grad():
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in states[1].items()}
        batch = (embed_tokens(matching.model, ids), ids, weights.double())
        loss = mean_loss(matching.model, leaves, SMALL, batch) * weights[:, 1:].sum()
        wanted = torch.autograd.grad(loss, list(leaves.values()))
    for one, other in zip(found.values(), wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_a_sketch_keeps_inner_products() -> None:
    random = torch.Generator().manual_seed(0)
    pair = [{"a": torch.randn(30, 20, generator=random), "b": torch.randn(50, generator=random)} for _ in range(2)]
    pair[1]["a"] += pair[0]["a"]
    exact = sum(float((pair[0][name] * pair[1][name]).sum()) for name in ("a", "b"))
    whole = draw_sketch(pair[0], 1000, 0)
    assert float(whole.press(pair[0]) @ whole.press(pair[1])) == pytest.approx(exact, rel=1e-5)
    small = [draw_sketch(pair[0], 400, seed) for seed in range(40)]
    values = [float(one.press(pair[0]) @ one.press(pair[1])) for one in small]
    assert sum(values) / 40 == pytest.approx(exact, rel=0.05)
    first = small[0]
    assert first.places is not None and first.signs is not None
    slow, flat = torch.zeros(400), torch.cat([pair[0]["a"].flatten(), pair[0]["b"]])
    for place, value in enumerate(flat):
        slow[first.places[place]] += value * first.signs[place]
    torch.testing.assert_close(first.press(pair[0]), slow)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_lag_equals_that_of_plain_loops(rank: int, tmp_path: Path) -> None:
    options = replace(SMALL, rank=rank, tests=9, expert_rate=2e-2)
    matching, _, documents = make_matching(tmp_path, options)
    tests, taken = (3, 1, 12, 19, 5, 7), [1, 7, 8, 2, 11]
    lag = Apprentice(matching.model, list(documents.values()), tests, options).measure(taken)
    draws = draw_epochs(5, options)
    assert len(draws) == 12 and all(len(set(draw)) == 4 for draw in draws[:1])
    assert all(sorted(sum(draws, [])[start : start + 5]) == [0, 1, 2, 3, 4] for start in range(0, 45, 5))
    theta = start_theta(matching.model, options)
    optimizer = torch.optim.Adam([one.requires_grad_() for one in theta.values()])
    states = []
    for step, draw in enumerate(draws):
        optimizer.param_groups[0]["lr"] = 2e-2 * (12 - step) / 12
        optimizer.zero_grad()
        ids, weights = stack_documents([documents[taken[place]] for place in draw])
        weights[:, 0] = 0
        with torch.enable_grad():
            x = embed_tokens(matching.model, ids)
            mean_loss(matching.model, theta, options, (x, ids, weights.double())).backward()
        optimizer.step()
        states += [copy_theta(theta)] if step in (5, 11) else []
    means = []
    for theta in states:
        total, count = 0.0, 0.0
        for number in (3, 12, 19, 5):
            ids, weights = stack_documents([documents[number]])
            layers = apply_theta(matching.model, theta, options)
            x = run_layers(matching.model, embed_tokens(matching.model, ids), layers)
            logits = compute_logits(matching.model.spec, matching.model.ends, x)[0].log_softmax(-1)
            for place in range(1, ids.shape[1]):
                total -= float(logits[place - 1, ids[0, place]] * weights[0, place])
                count += float(weights[0, place])
        means.append(total / count)
    assert means[0] != means[1]
    assert lag == pytest.approx(min(means), rel=1e-9)


def test_exchanges_are_kept_where_the_lag_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(3)
    worth = torch.rand(30, generator=random).tolist()
    documents = [Document((1,) * (4 + number % 5), (1.0,) * (4 + number % 5)) for number in range(30)]
    tried: list[tuple[int, ...]] = []

    def measure(apprentice: Apprentice, taken: Sequence[int]) -> float:
        tried.append(tuple(taken))
        return sum(worth[number] for number in taken) / len(taken)

    monkeypatch.setattr(Apprentice, "measure", measure)
    model: Any = None
    found = exchange_rows(model, documents, [0, 1, 2, 3], replace(SMALL, exchanges=60), 60)
    assert len(tried) == 61 and tried[0] == (0, 1, 2, 3)
    kept = list(tried[:1])
    for other in tried[1:]:  # at most three of what was kept have gone, and nothing that fits is left out
        assert len(set(other)) == len(other) and len(set(kept[-1]) - set(other)) <= 3
        room = 60 - sum(len(documents[number].ids) for number in other)
        assert 0 <= room < min(len(documents[number].ids) for number in range(30) if number not in other)
        if sum(worth[n] for n in other) / len(other) < sum(worth[n] for n in kept[-1]) / len(kept[-1]):
            kept.append(other)
    assert found.taken == kept[-1] and found.kept == len(kept) - 1 > 1
    assert found.first is not None and found.last is not None
    assert found.last == pytest.approx(sum(worth[n] for n in found.taken) / len(found.taken))
    assert found.last < found.first


def test_exchanged_documents_train_better(tmp_path: Path) -> None:
    matching, _, documents = make_matching(tmp_path, SMALL)
    rows, options = list(documents.values()), replace(SMALL, exchanges=12, expert_rate=1e-2)
    budget = 0.3 * sum(len(one.ids) for one in rows)
    found = exchange_rows(matching.model, rows, [0, 1], options, budget)
    assert found.kept and found.last is not None and found.first is not None and found.last < found.first
    assert 2 < len(found.taken) and sum(len(rows[one].ids) for one in found.taken) <= budget
    assert found == exchange_rows(matching.model, rows, [0, 1], options, budget)
    still = exchange_rows(matching.model, rows, [0, 1], replace(options, exchanges=0), budget)
    assert still == Exchanged((0, 1))
    whole = exchange_rows(matching.model, rows, list(range(20)), replace(options, exchanges=1), budget)
    assert sorted(whole.taken) == list(range(20))  # nothing is left to come


def test_samples_need_something_to_predict(tmp_path: Path) -> None:
    document = Document([1, 5, 6, 7, 8, 2], [1] * 6)
    samples = make_samples({7: document, 9: Document([1, 5], [1, 1])}, SMALL, 1)
    assert samples.numbers == (7,) and samples.learned == (1, 4)
    assert samples.weights.tolist() == [[0, 0, 0, 0, 1, 1]]
    refused(lambda: make_samples({0: Document([1, 5, 6], [1] * 3)}, SMALL, 1), "--prompt-tokens", "first 4")
    answer = Document([1, 5, 6, 7, 8, 2], [0, 0, 0, 1, 1, 1])  # its prompt is shorter than what would be learned
    assert not fits_samples(answer, SMALL, 1) and fits_samples(answer, replace(SMALL, prompt=2), 1)
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
    stable = check_text(samples, tokenizer)
    assert stable(0, torch.tensor([20, 30])) and not stable(0, torch.tensor([20, 100]))  # 100 is no token


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
    words += ["--exchanges", 2]
    code, said = run_command(folder / "model", "--text", folder / "a.jsonl", *words, "-o", out, "--quiet")
    assert code == 0 and "marked synthetic" in said and "after training on the chosen documents" in said
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(row["synthetic"] is True and row["provenance"]["model"] == "model" for row in rows)
    stream = stream_of(out)
    assert stream.facts.documents == len(rows) > 2
    first = stream.document(0)
    assert first.ids[0] == 1 and first.ids[-1] == 2 and not any(first.weights[:3]) and all(first.weights[3:])


def test_the_command_refuses_in_a_sentence(folder: Path) -> None:
    def start(*words: object, output: str = "out.jsonl") -> Callable[[], object]:
        return lambda: run_command(folder / "model", "--text", folder / "a.jsonl", *words, "-o", folder / output)

    refused(start("--method", "best"), "--method best", "random, loss, gradient, trajectory")
    refused(start("--share", 0), "--share 0")
    refused(start("--pick", "easy"), "--pick does nothing", "--method loss")
    refused(start("--rank", 2, "--method", "loss"), "--rank does nothing")
    refused(start("--exchanges", 2), "--exchanges does nothing")
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
