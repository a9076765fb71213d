"""Baseline scores equal loops over tokens; branches hold what scores read; layer ratios keep to their budgets."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import slow_twins
import torch
from branches import KINDS, cut_windows, draw_sample, with_tokens
from tiny import make_checkpoint

from compress.calibrate import ATTENTION, MLP, NORMS, average_windows, stream_dense
from compress.checkpoint import open_checkpoint
from compress.decoder import apply_norm, attention_branch, attention_context, make_frame, mlp_activation, project
from compress.errors import UserError
from compress.hidden import HiddenStore
from compress.importance import SCORES, find_score
from compress.importance.baselines import standardise
from compress.importance.branch import FFN, KV
from compress.importance.findings import LayerFindings, make_ffn_branch, make_kv_branch, reduce_all
from compress.importance.ratio import (
    CAP,
    find_budget,
    find_costs,
    flap_counts,
    slim_counts,
    slim_ratios,
    spend,
    uniform_counts,
)
from compress.importance.units import Ranking
from compress.shapes import LayerShape, ModelShape
from compress.solve import RIDGE
from compress.text import Windows
from compress.weights import embed_rows, read_spec

# Scores from samples


@pytest.mark.parametrize(("kind", "size"), KINDS)
@pytest.mark.parametrize("name", SCORES)
def test_every_score_gives_a_whole_ranking(name: str, kind: str, size: int) -> None:
    sample = draw_sample(kind, 6, size)
    ranking = find_score(name)(sample.branch)
    assert sorted(ranking.order) == list(range(6))
    assert len(ranking.score) == 6
    assert [len(ranking.keep(count)) for count in range(7)] == list(range(7))
    for count in range(1, 7):
        kept = slow_twins.inputs_of(list(ranking.keep(count)), size)
        wanted = slow_twins.refit_error(sample.x, sample.branch.weight, kept, RIDGE)
        assert ranking.damage[6 - count] == pytest.approx(wanted, rel=1e-6, abs=1e-6)
    assert find_score(name)(sample.branch) == ranking


@pytest.mark.parametrize(("kind", "size"), KINDS)
@pytest.mark.parametrize("name", [name for name in SCORES if name != "obs"])
def test_the_least_important_go_first(name: str, kind: str, size: int) -> None:
    ranking = find_score(name)(draw_sample(kind, 6, size, seed=2).branch)
    assert list(ranking.order) == sorted(range(6), key=ranking.score.__getitem__)


@pytest.mark.parametrize(("kind", "size"), KINDS)
def test_the_obs_score_is_what_each_removal_added(kind: str, size: int) -> None:
    sample = draw_sample(kind, 6, size)
    ranking = find_score("obs")(sample.branch)
    curve = slow_twins.refit_curve(sample.x, sample.branch.weight, list(ranking.order), size, RIDGE)
    for gone, unit in enumerate(ranking.order[:-1]):
        assert ranking.score[unit] == pytest.approx(curve[gone + 1] - curve[gone], rel=1e-5, abs=1e-6)
    assert sum(ranking.score) == pytest.approx(ranking.damage[-1])


@pytest.mark.parametrize(("kind", "size"), KINDS)
def test_baselines_equal_loops_over_tokens(kind: str, size: int) -> None:
    sample = draw_sample(kind, 5, size, seed=3)
    weight = sample.branch.weight
    wanted = {
        "wanda": slow_twins.score_mean_products(sample.x, weight, size),
        "flap": slow_twins.score_fluctuations(sample.x, weight, size, 2 if kind == KV else 1),
        "minitron": [
            sum(slow_twins.spread_windows(cut_windows(sample.x))[at : at + size]) ** 0.5
            for at in range(0, 5 * size, size)
        ],
        "activation": slow_twins.score_activations(sample.x, weight, size),
        "taylor": sample.branch.first_order.tolist(),
    }
    for name, scores in wanted.items():
        assert find_score(name)(sample.branch).score == pytest.approx(scores, rel=1e-9), name


@pytest.mark.parametrize(("kind", "size"), KINDS)
def test_magnitude_counts_every_weight_that_goes_with_a_unit(kind: str, size: int) -> None:
    """Removing a unit's rows and columns takes exactly that much from the square sum of all weights."""
    branch = draw_sample(kind, 4, size).branch
    found = find_score("magnitude")(branch).score
    for unit in range(4):
        total = 0.0
        for role, tensor in branch.weights.items():
            side = tensor.T if role in ("o", "down") else tensor
            total += float(side.view(4, -1, side.shape[1])[unit].pow(2).sum())
        assert found[unit] == pytest.approx(math.sqrt(total), rel=1e-12)


def test_random_scores_follow_seed_layer_and_kind() -> None:
    branch = draw_sample(FFN, 12, 1).branch
    score = find_score("random")
    others = [replace(branch, seed=1), replace(branch, layer=4), replace(branch, kind=KV)]
    orders = [score(each).order for each in (branch, *others)]
    assert len(set(orders)) == 4
    assert score(replace(branch)).order == orders[0]


def test_a_constant_input_does_not_fluctuate_but_is_active() -> None:
    sample = draw_sample(FFN, 4, 1)
    x = sample.x.clone()
    x[:, 2] = 50.0
    branch = with_tokens(sample, x).branch
    assert find_score("flap")(branch).order[0] == 2
    assert find_score("activation")(branch).order[-1] == 2


def test_standardised_values() -> None:
    values = standardise(torch.tensor([1.0, 2.0, 6.0]).double())
    assert float(values.mean()) == pytest.approx(0)
    assert float(values.std()) == pytest.approx(1)
    assert standardise(torch.tensor([3.0, 3.0])).tolist() == [0, 0]
    assert standardise(torch.tensor([3.0])).tolist() == [0]


def test_taylor_says_what_is_missing() -> None:
    branch = draw_sample(KV, 4, 2).branch
    with pytest.raises(UserError, match=r"layer 3 \(kv\); run the gradient pass"):
        find_score("taylor")(replace(branch, first_order=None))
    with pytest.raises(UserError, match=r"4 units but the gradient pass left \[2\]"):
        find_score("taylor")(replace(branch, first_order=torch.ones(2)))


def test_picks_come_before_the_order() -> None:
    ranking = Ranking((2, 0, 1), (0.0, 1.0, 2.0, 3.0), (0.0,) * 3, {2: (0, 2)})
    assert ranking.keep(2) == (0, 2)
    assert ranking.keep(1) == (1,)


# What calibration leaves for scores


@pytest.mark.parametrize("case", ["llama", "gemma2", "olmo2", "granite"])
def test_branches_hold_reads_and_spread(case: str, tmp_path: Path) -> None:
    """Pre-norm, sandwich and post-norm only, over more windows than one batch, first tokens left out."""
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / case, case))
    spec = read_spec(checkpoint)
    ids = torch.randint(3, 96, (70, 31), generator=torch.Generator().manual_seed(1))
    with HiddenStore((70, 31, spec.shape.hidden)) as store:
        stats = next(stream_dense(checkpoint, spec, Windows(ids, "random"), store, frozenset({ATTENTION, MLP})))
    assert stats.norms == {}
    x, frame = embed_rows(checkpoint, spec, ids, torch.float32), make_frame(spec, 70, 31)
    context, _ = attention_context(spec, spec.layers[0], stats.weights, x, frame)
    middle = x + attention_branch(spec, stats.weights, context)
    activation = mlp_activation(spec, stats.weights, middle)
    halves = (
        (make_kv_branch(spec, stats), "attn_in", "attn_out", "o", x, context),
        (make_ffn_branch(spec, stats), "mlp_in", "mlp_out", "down", middle, activation),
    )
    for branch, before, after, role, stream, inputs in halves:
        read = apply_norm(spec, stats.weights, before, stream)[:, 1:].flatten(0, 1).double()
        assert branch.reads.count == 70 * 30
        torch.testing.assert_close(branch.reads.square, read.pow(2).sum(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(branch.reads.absolute, read.abs().sum(0), rtol=1e-5, atol=1e-5)
        if after in stats.weights:
            raw = project(stats.weights, role, inputs)
            inputs = inputs * torch.rsqrt(raw.pow(2).mean(-1, keepdim=True) + spec.eps)
        wanted = inputs[:, 1:].abs().double().mean(1).pow(2).sum(0)
        torch.testing.assert_close(branch.spread, wanted, rtol=1e-5, atol=1e-7)


def test_norm_outputs_are_reads_and_what_branches_add(tmp_path: Path) -> None:
    """An input norm gives out what its module reads, a post-norm what its branch adds to the stream."""
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "sandwich", "gemma2"))
    spec = read_spec(checkpoint)
    ids = torch.randint(3, 96, (4, 31), generator=torch.Generator().manual_seed(1))
    stream = embed_rows(checkpoint, spec, ids, torch.float32)
    with HiddenStore((4, 31, spec.shape.hidden)) as store:
        for stats in stream_dense(checkpoint, spec, Windows(ids, "random"), store, frozenset({NORMS})):
            norms = stats.norms
            assert norms["attn_in"] is stats.attention_reads
            assert norms["mlp_in"] is stats.mlp_reads
            assert {sums.count for sums in norms.values()} == {4 * 30}
            added = slow_twins.branch_energies(spec, stats.weights, stats.index, stream)
            found = [float(norms[role].square.sum()) for role in ("attn_out", "mlp_out")]
            assert found == pytest.approx(added, rel=1e-5)
            stream = store.read(0, 4)
            assert len(stats.attention_spread) == len(stats.mlp_spread) == 0


def test_windows_average_over_the_tokens_that_count() -> None:
    x = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 1, 0]]).bool()
    found = average_windows(x, mask)
    windows = [x[i][mask[i]] for i in (0, 2)]
    assert found[1].tolist() == [0, 0]
    assert found.pow(2).sum(0).tolist() == pytest.approx(slow_twins.spread_windows(windows), rel=1e-5)


def test_seed_and_gradients_reach_the_scores(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "plain", "llama"))
    spec = read_spec(checkpoint)
    ids = torch.randint(3, 96, (4, 31), generator=torch.Generator().manual_seed(1))

    def rank(*options: object) -> list[LayerFindings]:
        with HiddenStore((4, 31, spec.shape.hidden)) as store:
            layers = stream_dense(checkpoint, spec, Windows(ids, "random"), store, frozenset({ATTENTION, MLP, NORMS}))
            return reduce_all(spec, layers, *options)[0]

    drawn = [rank("random", seed) for seed in (0, 0, 5)]
    assert drawn[0] == drawn[1]
    assert drawn[0][0].ffn.order != drawn[0][1].ffn.order
    assert drawn[0][0].ffn.order != drawn[2][0].ffn.order
    assert drawn[0][0].kv.score != drawn[2][0].kv.score
    slopes = {i: (torch.rand(3, dtype=torch.float64), torch.rand(56, dtype=torch.float64)) for i in range(4)}
    for layer in rank("taylor", 0, slopes):
        assert layer.kv.score == tuple(slopes[layer.index][0].tolist())
        assert layer.ffn.score == tuple(slopes[layer.index][1].tolist())
        assert layer.cosine == 1 - layer.influence
    with pytest.raises(UserError, match="layer 2"):
        rank("taylor", 0, {i: slopes[i] for i in (0, 1, 3)})


# Layer ratios


def test_ratios_follow_the_papers_settings() -> None:
    """26 of 32 layers at 20 %, 30 of 32 at 50 %, and the spread over them that alpha gives (methods 2.2)."""
    for remove, picked, alpha in ((0.2, 26, 10), (0.5, 30, 7)):
        cosines = [0.5] * (32 - picked) + [0.90 + 0.09 * i / (picked - 1) for i in range(picked)]
        ratios = slim_ratios(cosines, remove)
        assert [ratio > 0 for ratio in ratios] == [False] * (32 - picked) + [True] * picked
        assert ratios[-1] / ratios[32 - picked] == pytest.approx(math.exp(alpha * 0.09))
        assert sum(ratios) == pytest.approx(32 * remove)


def test_ratios_equal_the_printed_example() -> None:
    """r from 0.154 to 0.378 for r0 = 0.25 (methods 2.2): ours hits 20 % exactly, the paper's code 20.3 %."""
    ratios = slim_ratios([0.90 + 0.09 * i / 25 for i in range(26)] + [0.1] * 6, 0.2)
    scale = (26 * 0.25 / 32) / 0.2
    assert [ratios[0] * scale, ratios[25] * scale] == pytest.approx([0.154, 0.378], abs=0.002)


@pytest.mark.parametrize("depth", [1, 2, 5, 12, 32])
def test_ratios_hit_every_target_under_the_cap(depth: int) -> None:
    random = torch.Generator().manual_seed(depth)
    for remove in (0.0, 0.03, 0.2, 0.35, 0.5, 0.7, 0.85, CAP):
        cosines = torch.rand(depth, generator=random).tolist()
        ratios = slim_ratios(cosines, remove)
        assert sum(ratios) == pytest.approx(depth * remove)
        assert max(ratios) <= CAP + 1e-12
        assert min(ratios) >= 0
        by_cosine = [ratios[layer] for layer in sorted(range(depth), key=cosines.__getitem__)]
        assert by_cosine == sorted(by_cosine)


def test_a_cap_hands_the_rest_to_other_layers() -> None:
    ratios = slim_ratios([0.99, -1.0, -0.9, -1.0], 0.5)
    assert ratios[0] == pytest.approx(CAP)
    assert sum(ratios) == pytest.approx(2)
    assert slim_ratios([0.1 * i for i in range(8)], 0.5, cap=0.5) == pytest.approx([0.5] * 8)
    with pytest.raises(UserError, match=r"the most is 0\.9"):
        slim_ratios([0.5, 0.6], 0.95)


def test_slim_counts_refuse_to_remove_more_than_the_cap() -> None:
    with pytest.raises(UserError, match=r"the most is 0\.9"):
        slim_counts(make_layers(2, 20, 100), [(10, 2)] * 2, 40)


def make_layers(count: int, kv: int, ffn: int, seed: int = 0) -> list[LayerFindings]:
    """Layers with random scores of unlike scales and random influence."""
    random = torch.Generator().manual_seed(seed)

    def rank(units: int) -> Ranking:
        scale = 10 ** float(torch.randn(1, generator=random))
        scores = torch.rand(units, generator=random, dtype=torch.float64) * scale
        order = torch.argsort(scores).tolist()
        return Ranking(tuple(order), (0.0,) * (units + 1), tuple(scores.tolist()))

    return [LayerFindings(i, rank(kv), rank(ffn), 1.0, 1.0, 0.1 * (i % 3), 0) for i in range(count)]


COUNTERS = (uniform_counts, slim_counts, flap_counts)


@pytest.mark.parametrize("count_units", COUNTERS)
@pytest.mark.parametrize("sizes", [(5, 4, 40, 30, 3), (3, 1, 17, 15, 5), (8, 8, 9, 5, 9)])
def test_counts_use_the_budget_and_no_more(count_units, sizes: tuple[int, ...]) -> None:
    (depth, kv, ffn), costs = sizes[:3], sizes[3:]
    layers, prices = make_layers(depth, kv, ffn), [costs] * depth
    everything = spend([(kv, ffn)] * depth, prices)
    for keep in (0.25, 0.4, 0.5, 0.77, 0.9, 1.0):
        budget = int(keep * everything)
        counts = count_units(layers, prices, budget)
        spent = spend(counts, prices)
        assert spent <= budget
        assert all(1 <= groups <= kv and 1 <= channels <= ffn for groups, channels in counts)
        room = [groups < kv or channels < ffn for groups, channels in counts]
        # What is left buys no more channels: of all layers where they move together, of one where each goes alone.
        step = depth * costs[1] if count_units is uniform_counts else 2 * depth * costs[1]
        assert not any(room) or spent > budget - step or all(channels == ffn for _, channels in counts)
    assert count_units(layers, prices, everything) == ((kv, ffn),) * depth
    with pytest.raises(UserError, match="one KV group and one channel in each"):
        count_units(layers, prices, spend([(1, 1)] * depth, prices) - 1)


@pytest.mark.parametrize("count_units", [uniform_counts, flap_counts])
def test_one_unit_each_is_the_least(count_units) -> None:
    layers, prices = make_layers(5, 4, 40), [(30, 3)] * 5
    assert count_units(layers, prices, 5 * 33) == ((1, 1),) * 5


def test_uniform_counts_are_alike_and_follow_the_share() -> None:
    layers, prices = make_layers(6, 4, 100), [(300, 30)] * 6
    counts = uniform_counts(layers, prices, int(0.5 * spend([(4, 100)] * 6, prices)))
    assert set(counts) == {(2, 50)}
    assert {channels % 16 for _, channels in uniform_counts(layers, prices, 15000, step=16)} == {0}


def test_slim_counts_take_more_from_layers_that_do_less() -> None:
    layers, prices = make_layers(6, 8, 200), [(100, 10)] * 6
    counts = slim_counts(layers, prices, int(0.6 * spend([(8, 200)] * 6, prices)))
    does_little, does_much = counts[0], counts[2]  # influence 0 and 0.2
    assert does_little[0] < does_much[0]
    assert does_little[1] < does_much[1]
    ratios = slim_ratios([layer.cosine for layer in layers], 0.4)
    for (groups, channels), ratio in zip(counts, ratios, strict=True):
        assert groups == pytest.approx(8 * (1 - ratio), abs=0.51)
        assert channels == pytest.approx(200 * (1 - ratio), rel=0.05)


@pytest.mark.parametrize(("seed", "standard"), [*itertools.product(range(3), (False, True))])
def test_one_threshold_equals_taking_the_best_one_by_one(seed: int, standard: bool) -> None:
    layers, prices = make_layers(4, 3, 12, seed), [(20, 3), (20, 3), (10, 7), (20, 3)]
    scores = [[list(layer.kv.score), list(layer.ffn.score)] for layer in layers]
    if not standard:
        scores = [[standardise(torch.tensor(part).double()).tolist() for part in pair] for pair in scores]
    for budget in (130, 200, 300):
        wanted = slow_twins.fill_best(scores, prices, budget)
        assert [list(counts) for counts in flap_counts(layers, prices, budget, standard)] == wanted


def test_a_step_takes_channels_in_blocks() -> None:
    layers, prices = make_layers(4, 3, 20), [(20, 3)] * 4
    for budget in (200, 300, 400):
        counts = flap_counts(layers, prices, budget, step=8)
        assert {channels for _, channels in counts} <= {8, 16, 20}
        assert spend(counts, prices) <= budget
    for count_units in COUNTERS:
        with pytest.raises(UserError, match="in steps of 16 channels"):
            count_units(layers, prices, 150, step=16)


def test_costs_and_budget_come_from_shapes() -> None:
    layer = LayerShape(6, 3, 8, 56, biases=("q", "k", "v", "o", "gate", "up", "down"))
    shape = ModelShape(96, 48, True, (layer, layer))
    costs = find_costs(layer, 48)
    assert costs == (48 * 8 * (2 * 2 + 2) + 8 * (2 + 1 + 1), 48 * 3 + 2)
    for counts in ((2, 30), (1, 56)):
        smaller = replace(shape, layers=(layer.resize(*counts),) * 2)
        keep = smaller.layer_parameters / shape.layer_parameters
        assert find_budget(shape, keep) == pytest.approx(spend([counts] * 2, [costs] * 2), abs=1)
