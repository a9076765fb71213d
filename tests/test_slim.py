"""SlimLLM's scores from moments equal those from outputs per unit and token; swaps only ever help."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import slow_twins
import torch
from branches import draw_sample, gather, with_tokens
from tiny import CASES, FAMILIES, make_checkpoint
from torch import Tensor

from compress.calibrate import ATTENTION, MLP, LayerStats, stream_dense
from compress.checkpoint import open_checkpoint
from compress.decoder import apply_norm, attention_branch, attention_context, make_frame, mlp_activation, project
from compress.hidden import HiddenStore
from compress.importance.branch import FFN, KV
from compress.importance.findings import make_ffn_branch, make_kv_branch
from compress.importance.slim import (
    MOST_SWAPPED,
    find_pairs,
    find_terms,
    rank_explained,
    rank_groups,
    rank_slim,
    score_all,
    score_channels,
    score_without,
    sum_correlations,
    sum_explained,
)
from compress.importance.units import Ranking
from compress.solve import RIDGE, solve_diagonal
from compress.spec import ModelSpec
from compress.stats import Moments
from compress.text import Windows
from compress.weights import embed_rows, read_spec

OBJECTIVES = [(sum_correlations, False), (sum_explained, True)]


# Against outputs per unit and token


def test_pairs_are_covariances_of_what_units_add() -> None:
    sample = draw_sample(KV, 5, 4)
    pairs = find_pairs(sample.branch.moments, sample.branch.weight, 4)
    parts = [part - part.mean(0) for part in slow_twins.unit_outputs(sample.x, sample.branch.weight, 4)]
    for u, v in itertools.product(range(5), range(5)):
        wanted = (parts[u] * parts[v]).mean(0)
        torch.testing.assert_close(pairs[:, u, v], wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("objective", "explained"), OBJECTIVES)
@pytest.mark.parametrize(("units", "size"), [(5, 4), (3, 2), (8, 1), (1, 4)])
def test_scores_equal_the_loops_over_tokens(units: int, size: int, objective, explained: bool) -> None:
    sample = draw_sample(KV, units, size, seed=units) if size > 1 else draw_sample(FFN, units, 1, seed=units)
    terms = find_terms(sample.branch.moments, sample.branch.weight, size)
    found = score_all(terms, objective) - score_without(terms, objective)
    wanted = slow_twins.score_removals(slow_twins.unit_outputs(sample.x, sample.branch.weight, size), explained)
    assert found.tolist() == pytest.approx(wanted, rel=1e-8, abs=1e-9)


@pytest.mark.parametrize(("objective", "explained"), OBJECTIVES)
@pytest.mark.parametrize("seed", range(4))
def test_every_count_keeps_what_swaps_from_scratch_keep(seed: int, objective, explained: bool) -> None:
    sample = draw_sample(KV, 7, 2, hidden=5, seed=seed)
    ranking = rank_groups(sample.branch, objective)
    parts = slow_twins.unit_outputs(sample.x, sample.branch.weight, 2)
    for count in range(1, 8):
        assert list(ranking.keep(count)) == slow_twins.swap_units(parts, list(ranking.order), count, explained)


def test_swaps_happen_and_the_damage_is_theirs() -> None:
    swapped = 0
    for seed in range(4):
        sample = draw_sample(KV, 7, 2, hidden=5, seed=seed)
        ranking = rank_groups(sample.branch, sum_correlations)
        for count in range(1, 8):
            kept = slow_twins.inputs_of(list(ranking.keep(count)), 2)
            wanted = slow_twins.refit_error(sample.x, sample.branch.weight, kept, RIDGE)
            assert ranking.damage[7 - count] == pytest.approx(wanted, rel=1e-7, abs=1e-7)
        assert all(len(kept) == count for count, kept in ranking.picks.items())
        assert all(kept != tail(ranking, count) for count, kept in ranking.picks.items())
        swapped += len(ranking.picks)
    assert swapped > 4
    assert ranking.keep(0) == ()


def tail(ranking: Ranking, count: int) -> tuple[int, ...]:
    """What the plain order keeps."""
    return tuple(sorted(ranking.order[len(ranking.order) - count :]))


def test_swaps_reach_the_optimum_more_often_than_the_plain_order() -> None:
    """12 weakly correlated units, 4 removed, all 495 choices tried (methods 2.9)."""
    greedy_hits = plain_hits = 0
    for seed in range(20):
        sample = draw_sample(KV, 12, 2, hidden=8, tokens=80, seed=100 + seed)
        random = torch.Generator().manual_seed(seed)
        x, mix = (torch.randn(rows, 24, generator=random, dtype=torch.float64) for rows in (80, 24))
        sample = with_tokens(sample, x + 0.2 * x @ mix)
        parts = torch.stack(slow_twins.unit_outputs(sample.x, sample.branch.weight, 2))
        ranking = rank_groups(sample.branch, sum_correlations)
        values = {kept: measure(parts, kept) for kept in itertools.combinations(range(12), 8)}
        best, greedy, plain = max(values.values()), values[ranking.keep(8)], values[tail(ranking, 8)]
        assert greedy >= plain * (1 - 1e-12)
        greedy_hits += greedy > best - 1e-9
        plain_hits += plain > best - 1e-9
    assert greedy_hits > plain_hits
    assert greedy_hits >= 15


def measure(parts: Tensor, kept: tuple[int, ...]) -> float:
    """Sum over channels of |Pearson| of what is kept with everything."""
    left, whole = parts[list(kept)].sum(0), parts.sum(0)
    left, whole = left - left.mean(0), whole - whole.mean(0)
    return float(((left * whole).sum(0) / left.norm(dim=0) / whole.norm(dim=0)).abs().sum())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("objective", [sum_correlations, sum_explained])
def test_swaps_never_lower_the_objective(seed: int, objective) -> None:
    sample = draw_sample(KV, 10, 2, hidden=4, seed=seed)
    parts = slow_twins.unit_outputs(sample.x, sample.branch.weight, 2)
    ranking = rank_groups(sample.branch, objective)
    for count in range(1, 10):
        found, plain = (
            slow_twins.kept_likeness(parts, list(kept), objective is sum_explained)
            for kept in (ranking.keep(count), tail(ranking, count))
        )
        assert found >= plain * (1 - 1e-10)


def test_explained_variance_is_what_the_diagonal_repair_leaves() -> None:
    """The objective plus the mean error of the best line per channel is the variance of the whole output."""
    sample = draw_sample(KV, 6, 2, seed=8)
    branch, kept = sample.branch, [0, 2, 3]
    inputs = torch.tensor(slow_twins.inputs_of(kept, 2))
    y = sample.x @ branch.weight.T
    moments = Moments.empty(len(inputs), y.shape[1])
    moments.update(sample.x[:, inputs], y)
    repaired = solve_diagonal(moments, branch.weight[:, inputs], torch.zeros(len(branch.weight)).double())
    parts = slow_twins.unit_outputs(sample.x, branch.weight, 2)
    left = slow_twins.sum_errors(sample.x[:, inputs], y, *repaired) / len(y)
    explained = slow_twins.kept_likeness(parts, kept, explained=True)
    assert explained + left == pytest.approx(float(y.var(0, correction=0).sum()), rel=1e-9)


# Constants, sizes, quirks


def test_constant_outputs_count_as_alike_only_where_the_whole_is_constant() -> None:
    """Unit 0 writes a constant, unit 1 alone moves channel 1, nobody moves channel 2."""
    x = torch.cat((torch.full((40, 1), 3.0).double(), draw_sample(FFN, 2, 1, tokens=40).x), 1)
    weight = torch.tensor([[1.0, 1.0, 1.0], [2.0, 1.0, 0.0], [4.0, 0.0, 0.0]]).double()
    terms = find_terms(gather(x), weight, 1)
    values = score_without(terms, sum_correlations)
    parts = slow_twins.unit_outputs(x, weight, 1)
    wanted = [slow_twins.kept_likeness(parts, kept) for kept in ([1, 2], [0, 2], [0, 1])]
    assert values.tolist() == pytest.approx(wanted, rel=1e-9)
    assert values[0] == pytest.approx(3.0)  # a constant can go, and channel 2 stays as constant as it was
    assert values[1] < 2.0  # channel 1 stands still while the whole moves: no likeness
    assert torch.isfinite(values).all()


def test_dead_units_are_worth_nothing() -> None:
    sample = draw_sample(KV, 5, 4)
    x = sample.x.clone()
    x[:, 4:8] = 0
    for rank in (rank_slim, rank_explained):
        ranking = rank(with_tokens(sample, x).branch)
        assert ranking.order[0] == 1
        assert ranking.score[1] == pytest.approx(0, abs=1e-9)
        assert min(ranking.score) >= -1e-9


def test_many_units_keep_the_plain_order() -> None:
    branch = draw_sample(KV, MOST_SWAPPED + 1, 2, hidden=3, tokens=300).branch
    assert rank_slim(branch).picks == {}
    few = draw_sample(KV, 20, 2, hidden=3, tokens=300).branch
    assert rank_slim(few).picks != {}


def test_channels_equal_the_loops_over_tokens() -> None:
    sample = draw_sample(FFN, 9, 1)
    branch = sample.branch
    y = sample.x @ branch.weight.T
    wanted = zip(
        slow_twins.score_features(y, sample.x, branch.weight),
        slow_twins.score_rows(branch.weights["gate"], sample.read),
        slow_twins.score_rows(branch.weights["up"], sample.read),
        strict=True,
    )
    wanted = [sum(parts) for parts in wanted]
    ranking = rank_slim(branch)
    assert ranking.score == pytest.approx(wanted, rel=1e-9)
    assert list(ranking.order) == sorted(range(9), key=wanted.__getitem__)
    curve = slow_twins.refit_curve(sample.x, branch.weight, list(ranking.order), 1, RIDGE)
    assert ranking.damage[:-1] == pytest.approx(curve[:-1], rel=1e-7, abs=1e-7)
    assert rank_explained(branch) == ranking


def test_a_branch_that_gives_out_nothing_has_finite_scores() -> None:
    sample = draw_sample(FFN, 9, 1)
    silent = replace(sample.branch, weight=torch.zeros_like(sample.branch.weight))
    assert torch.isfinite(score_channels(silent)).all()


def test_rankings_repeat() -> None:
    for kind, size in ((KV, 4), (FFN, 1)):
        first, again = (rank_slim(draw_sample(kind, 6, size, seed=4).branch) for _ in range(2))
        assert first == again


# Through the calibration pass: every residual layout, grouped attention, biases, tied embeddings


def stream_layers(
    folder: Path, case: str
) -> Iterator[tuple[ModelSpec, LayerStats, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """Yield each layer's statistics with (inputs, scale) of `o` and `down` for all tokens that count."""
    checkpoint = open_checkpoint(make_checkpoint(folder / case, case, num_hidden_layers=2))
    spec = read_spec(checkpoint)
    ids = torch.randint(3, 96, (2, 25), generator=torch.Generator().manual_seed(1))
    x, frame = embed_rows(checkpoint, spec, ids, torch.float32), make_frame(spec, 2, 25)
    with HiddenStore((2, 25, spec.shape.hidden)) as store:
        for stats in stream_dense(checkpoint, spec, Windows(ids, "random"), store, frozenset({ATTENTION, MLP})):
            context, _ = attention_context(spec, spec.layers[stats.index], stats.weights, x, frame)
            middle = x + attention_branch(spec, stats.weights, context)
            activation = mlp_activation(spec, stats.weights, middle)
            yield (
                spec, stats,
                (cut_first(context), scale_tokens(spec, stats, "o", "attn_out", context)),
                (cut_first(activation), scale_tokens(spec, stats, "down", "mlp_out", activation)),
            )  # fmt: skip
            x = store.read(0, 2)


def cut_first(x: Tensor) -> Tensor:
    return x[:, 1:].flatten(0, 1).double()


def scale_tokens(spec: ModelSpec, stats: LayerStats, role: str, norm: str, inputs: Tensor) -> Tensor:
    """What the layer does to the raw output of a projection, `[tokens, hidden]`: post-norm and multiplier."""
    raw = project(stats.weights, role, inputs)
    done = apply_norm(spec, stats.weights, norm, raw) * spec.residual_multiplier
    return cut_first(done / raw)


@pytest.mark.parametrize("case", [*FAMILIES, "llama-biases", "llama-tied"])
def test_scores_of_every_family_equal_the_loops(case: str, tmp_path: Path) -> None:
    assert case in CASES
    for spec, stats, (context, attention_scale), (activation, mlp_scale) in stream_layers(tmp_path, case):
        branch = make_kv_branch(spec, stats)
        rows = stats.weights["o"].double()
        parts = [part * attention_scale for part in slow_twins.unit_outputs(context, rows, branch.size)]
        ranking = rank_slim(branch)
        assert ranking.score == pytest.approx(slow_twins.score_removals(parts), rel=1e-3, abs=1e-4)
        for count in range(1, branch.units):
            assert list(ranking.keep(count)) == slow_twins.swap_units(parts, list(ranking.order), count)
        down = make_ffn_branch(spec, stats)
        y = activation @ stats.weights["down"].double().T * mlp_scale
        found = score_channels(down) - sum(
            (stats.weights[role].double().pow(2) @ down.reads.square).sqrt() for role in ("gate", "up")
        )
        if "mlp_out" in stats.weights:
            activation = scale_inputs(activation, stats.weights, spec.eps)
        wanted = slow_twins.score_features(y, activation, down.weight.double())
        assert found.tolist() == pytest.approx(wanted, rel=1e-4)


def scale_inputs(x: Tensor, weights: dict[str, Tensor], eps: float) -> Tensor:
    """Inputs of `down` divided by the rms of its output, with its bias."""
    raw = project({role: tensor.double() for role, tensor in weights.items()}, "down", x)
    return x * torch.rsqrt(raw.pow(2).mean(-1, keepdim=True) + eps)
