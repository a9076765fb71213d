"""Rankings and damage curves equal refits from scratch; findings and layer orders follow from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import slow_twins
import torch
from branches import draw_sample, with_tokens
from tiny import CASES, make_checkpoint
from torch import Tensor

from compress.calibrate import ATTENTION, MLP, NORMS, stream_dense
from compress.checkpoint import open_checkpoint
from compress.decoder import attention_context, make_frame, mlp_activation, project
from compress.errors import UserError
from compress.hidden import HiddenStore
from compress.importance import SCORES, find_score
from compress.importance.branch import FFN, KV
from compress.importance.findings import (
    Findings,
    HiddenSums,
    LayerFindings,
    collect_findings,
    order_layers,
    reduce_layer,
)
from compress.importance.units import Ranking, damage_of_order, invert_quickly, rank_by_activation, rank_by_obs
from compress.solve import RIDGE
from compress.stats import ChannelSums, Moments
from compress.text import Windows
from compress.weights import embed_rows, read_spec


def assert_curve(damage: tuple[float, ...], x: Tensor, weight: Tensor, order: tuple[int, ...], size: int) -> None:
    """Refit errors for every k; with nothing left to refit there is no ridge, and the error is the whole output."""
    curve = slow_twins.refit_curve(x, weight, list(order), size, RIDGE)
    curve[-1] = float((x @ weight.T).pow(2).sum())
    assert damage == pytest.approx(curve, rel=1e-7, abs=1e-7)


def draw(tokens: int, inputs: int, outputs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Correlated inputs (so that a refit matters) and a weight."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=random, dtype=torch.float64)
    x = torch.randn(tokens, inputs, generator=random, dtype=torch.float64) @ mix + 0.3
    return x, torch.randn(outputs, inputs, generator=random, dtype=torch.float64)


def gather(x: Tensor) -> Moments:
    moments = Moments.empty(x.shape[1])
    moments.update(x)
    return moments


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [1, 2, 4])
def test_greedy_removal_equals_refits_from_scratch(size: int, seed: int) -> None:
    x, weight = draw(50, 8, 5, seed)
    ranking = rank_by_obs(gather(x), weight, size)
    assert list(ranking.order) == slow_twins.remove_greedily(x, weight, size, RIDGE)
    assert_curve(ranking.damage, x, weight, ranking.order, size)


def test_greedy_removal_with_fewer_tokens_than_inputs() -> None:
    x, weight = draw(5, 8, 4, 7)
    ranking = rank_by_obs(gather(x), weight, 1)
    curve = slow_twins.refit_curve(x, weight, list(ranking.order), 1, RIDGE)
    assert ranking.damage[:-1] == pytest.approx(curve[:-1], rel=1e-6, abs=1e-7)
    assert list(ranking.damage) == sorted(ranking.damage)


@pytest.mark.parametrize("size", [1, 3])
def test_damage_of_any_order_equals_refits(size: int) -> None:
    x, weight = draw(40, 9, 4, 11)
    order = torch.randperm(9 // size, generator=torch.Generator().manual_seed(2))
    damage = damage_of_order(gather(x), weight, order, size)
    assert_curve(damage, x, weight, tuple(order.tolist()), size)


@pytest.mark.parametrize(("units", "size"), [(230, 1), (120, 2)])
def test_removal_in_batches_keeps_an_exact_curve(units: int, size: int) -> None:
    x, weight = draw(300, units * size, 3, 5)
    moments = gather(x)
    ranking = rank_by_obs(moments, weight, size)
    assert sorted(ranking.order) == list(range(units))
    exact = damage_of_order(moments, weight, torch.tensor(ranking.order), size)
    assert ranking.damage[:-1] == pytest.approx(exact[:-1], rel=1e-5)
    for gone in (1, 2, 3, units // 2, units - 1):
        kept = slow_twins.inputs_of(list(ranking.order[gone:]), size)
        assert ranking.damage[gone] == pytest.approx(slow_twins.refit_error(x, weight, kept, RIDGE), rel=1e-5)


@pytest.mark.parametrize("size", [1, 3])
def test_activation_ranking_equals_sums_over_tokens(size: int) -> None:
    x, weight = draw(30, 12, 4, 13)
    ranking = rank_by_activation(gather(x), weight, size)
    scores = slow_twins.score_activations(x, weight, size)
    assert list(ranking.order) == sorted(range(12 // size), key=scores.__getitem__)
    assert_curve(ranking.damage, x, weight, ranking.order, size)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_selection_in_single_precision_is_the_same(power: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large matrices are inverted in float32: on flat and on steep spectra the damage is that of float64."""
    generator = torch.Generator().manual_seed(29)
    turn = torch.linalg.qr(torch.randn(96, 96, generator=generator, dtype=torch.float64))[0]
    spectrum = torch.arange(1, 97, dtype=torch.float64) ** -power
    x = torch.randn(400, 96, generator=generator, dtype=torch.float64) * spectrum.sqrt() @ turn.T
    weight = torch.randn(24, 96, generator=generator, dtype=torch.float64)
    exact = rank_by_obs(gather(x), weight, 1)
    monkeypatch.setattr("compress.importance.units.QUICK_INPUTS", 1)
    quick = rank_by_obs(gather(x), weight, 1)
    assert invert_quickly(gather(x).gram).dtype == torch.float32
    assert quick.damage == pytest.approx(exact.damage, rel=1e-3)
    for count in (24, 48, 72):
        assert len(set(quick.order[:count]) & set(exact.order[:count])) >= count - 1


def test_a_matrix_that_single_precision_cannot_factor_is_inverted_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.importance.units.QUICK_INPUTS", 1)
    gram = torch.eye(4, dtype=torch.float64)
    gram[0, 0] = float("1e300")  # beyond float32 after scaling, within float64
    gram[1, 1] = 1e-300
    monkeypatch.setattr("compress.importance.units.damp_gram", lambda gram: gram)
    assert invert_quickly(gram).dtype == torch.float64


def test_greedy_beats_activation_where_inputs_repeat() -> None:
    """Two copies of one strong input: a score by size keeps both, the greedy one drops one for free."""
    x, weight = draw(60, 4, 3, 17)
    x = torch.cat((x, 5 * x[:, :1], 5 * x[:, :1]), 1)
    weight = torch.cat((weight, weight[:, :1], weight[:, :1]), 1)
    greedy, by_size = rank_by_obs(gather(x), weight, 1), rank_by_activation(gather(x), weight, 1)
    assert greedy.order[0] in (0, 4, 5)
    assert greedy.damage[2] < 0.1 * by_size.damage[2]


@pytest.mark.parametrize("score", SCORES)
def test_a_single_unit_has_a_curve(score: str) -> None:
    sample = draw_sample(KV, 1, 4, seed=19)
    ranking = find_score(score)(sample.branch)
    assert ranking.order == (0,)
    assert len(ranking.damage) == 2
    whole = float((sample.x @ sample.branch.weight.T).pow(2).sum())
    assert ranking.damage[1] == pytest.approx(whole, rel=2 * RIDGE * 4)


@pytest.mark.parametrize("score", ["obs", "activation", "wanda", "flap", "minitron"])
def test_dead_units_go_first_and_cost_nothing(score: str) -> None:
    sample = draw_sample(FFN, 6, 1, seed=23)
    x = sample.x.clone()
    x[:, [1, 4]] = 0
    branch = with_tokens(sample, x).branch
    ranking = find_score(score)(branch)
    assert set(ranking.order[:2]) == {1, 4}
    assert ranking.damage[2] <= 1.01 * RIDGE * float(x.pow(2).sum()) / 6 * float(branch.weight[:, [1, 4]].pow(2).sum())


def test_keep_returns_the_last_of_the_order_sorted() -> None:
    ranking = Ranking((3, 0, 2, 1), (0.0,) * 5)
    assert ranking.keep(2) == (1, 2)
    assert ranking.keep(4) == (0, 1, 2, 3)
    assert ranking.keep(1) == (1,)


def test_an_unknown_score_is_named() -> None:
    with pytest.raises(UserError, match=r"greed is not one of obs, activation, .*, slimllm-explained\.$"):
        find_score("greed")


# Through the calibration pass

NEEDS = frozenset({ATTENTION, MLP, NORMS})
UNBIASED = [case for case in CASES if case not in ("llama-biases", "pangu_embedded")]


@pytest.mark.parametrize("case", UNBIASED)
def test_removing_everything_costs_what_the_branch_adds(case: str, tmp_path: Path) -> None:
    """Scaled inputs times post-norm gain are the branch itself, in every residual layout."""
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / case, case))
    spec = read_spec(checkpoint)
    ids = torch.randint(3, 96, (4, 30), generator=torch.Generator().manual_seed(1))
    stream = embed_rows(checkpoint, spec, ids, torch.float32)
    with HiddenStore((4, 30, spec.shape.hidden)) as store:
        for stats in stream_dense(checkpoint, spec, Windows(ids, "random"), store, NEEDS):
            found = reduce_layer(spec, stats, "obs")
            added = slow_twins.branch_energies(spec, stats.weights, stats.index, stream)
            assert [found.kv.damage[-1], found.ffn.damage[-1]] == pytest.approx(added, rel=1e-4)
            stream = store.read(0, 4)
            assert len(found.ffn.order) == spec.layers[stats.index].shape.ffn
            assert len(found.kv.order) == spec.layers[stats.index].shape.kv_heads


@pytest.mark.parametrize("case", ["llama", "glm4", "olmo2"])
def test_streamed_moments_equal_those_of_all_tokens_at_once(case: str, tmp_path: Path) -> None:
    """More windows than one batch: the sums run over all ordinary tokens, first tokens left out."""
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / case, case))
    spec = read_spec(checkpoint)
    ids = torch.randint(3, 96, (70, 31), generator=torch.Generator().manual_seed(1))
    with HiddenStore((70, 31, spec.shape.hidden)) as store:
        stats = next(stream_dense(checkpoint, spec, Windows(ids, "random"), store, NEEDS))
        after = store.read(0, 70)
    x = embed_rows(checkpoint, spec, ids, torch.float32)
    frame = make_frame(spec, 70, 31)
    context, _ = attention_context(spec, spec.layers[0], stats.weights, x, frame)
    if "attn_out" in stats.weights:
        raw = project(stats.weights, "o", context)
        context = context * torch.rsqrt(raw.pow(2).mean(-1, keepdim=True) + spec.eps)
    rows = context[:, 1:].flatten(0, 1).double()
    assert stats.attention.count == 70 * 30
    torch.testing.assert_close(stats.attention.gram, rows.T @ rows, rtol=1e-4, atol=1e-3)
    assert stats.block.change == pytest.approx(float((after - x)[:, 1:].double().pow(2).sum()), rel=1e-5)
    if "mlp_out" not in stats.weights:
        middle = x + project(stats.weights, "o", context)
        rows = mlp_activation(spec, stats.weights, middle)[:, 1:].flatten(0, 1).double()
        torch.testing.assert_close(stats.mlp.gram, rows.T @ rows, rtol=1e-4, atol=1e-3)


def make_layer(index: int, influence: float = 0.5, sinks: int = 0, change: float = 1.0) -> LayerFindings:
    ranking = Ranking((1, 0, 2), (0.0, 1.0, 3.0, 6.0))
    return LayerFindings(index, ranking, ranking, 2.0, change, influence, sinks)


def test_damage_is_a_share_of_the_energy() -> None:
    layer = make_layer(0, change=4.0)
    assert [layer.kv_damage(count) for count in (3, 2, 1, 0)] == [0, 0.5, 1.5, 3]
    assert layer.ffn_damage(1) == 1.5
    assert layer.drop_damage == 2


def test_layers_go_by_influence_but_never_the_ends() -> None:
    layers = [make_layer(i, influence) for i, influence in enumerate([0.0, 0.3, 0.1, 0.2, 0.0])]
    assert order_layers(layers) == (2, 3, 1)
    assert order_layers(layers[:1]) == ()
    assert order_layers(layers[:2]) == ()


def test_the_layer_that_makes_sinks_stays() -> None:
    """Sinks are counted on the way into a layer: layer 1 makes them when layer 2 is the first to see them."""
    layers = [make_layer(i, 0.1 * i, sinks) for i, sinks in enumerate([0, 0, 9, 10, 10])]
    assert order_layers(layers) == (2, 3)


def make_findings(pinned: tuple[int, ...] = ()) -> Findings:
    sums = HiddenSums()
    x = torch.tensor([[1.0, -4.0, 2.0, 3.0], [1.0, 4.0, -2.0, 3.0]])
    channels = ChannelSums.empty(4)
    channels.update(x)
    sums.add([channels, channels])
    sums.massive = set(pinned)
    sums.tokens = 2
    return collect_findings([make_layer(0), make_layer(1)], sums)


def test_hidden_channels_stay_by_score_after_the_pinned() -> None:
    assert make_findings().keep_hidden(2) == (1, 3)
    assert make_findings((0,)).keep_hidden(2) == (0, 1)
    assert make_findings((0,)).pinned == (0,)
    assert make_findings().keep_hidden(4) == (0, 1, 2, 3)


def test_hidden_damage_is_the_energy_that_goes_summed_over_norms() -> None:
    assert make_findings().hidden_damage(4) == pytest.approx(0)
    assert make_findings().hidden_damage(2) == pytest.approx(2 * (1 + 4) / (1 + 16 + 4 + 9))


def test_hidden_damage_is_never_negative_nor_undefined() -> None:
    """Dead channels, and a norm that gives out nothing: a negative damage has no fractional power."""
    random = torch.Generator().manual_seed(0)
    for _ in range(200):
        energy = torch.rand(3, 40, generator=random, dtype=torch.float64)
        energy[:, ::3] = 0
        energy[2] = 0
        findings = Findings((), energy[0], energy, (), (), 1, 0)
        curve = [findings.hidden_damage(count) for count in range(40, 20, -1)]
        assert min(curve) >= 0
        assert max(curve[:14]) <= 1e-12
        assert curve[-1] > 0.01
