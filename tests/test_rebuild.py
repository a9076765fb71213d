"""Cutting: exact where what goes carried nothing (float64, every tensor perturbed), and the norms that follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import CASES, make_checkpoint
from torch import Tensor

from compress.checkpoint import Checkpoint, open_checkpoint
from compress.decoder import compute_logits, make_frame, run_layer
from compress.plan import LayerPlan, Plan, keep_everything
from compress.probe import cut_spec
from compress.spec import ModelSpec
from compress.surgery.norms import rescale_norm
from compress.surgery.width import axis_rows, fold_embedding_scale, head_rows, slice_weights
from compress.weights import read_layer, read_spec

EXACT = 1e-10  # logits of order 10 in float64
KEPT_HIDDEN = torch.tensor([i for i in range(48) if i % 3 != 1])
Weights = dict[str, Tensor]


class Model:
    """All weights of a tiny model by role, in float64, to be edited and run."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.spec = read_spec(checkpoint)
        double = torch.float64
        self.layers = [read_layer(checkpoint, self.spec, i, double) for i in range(len(self.spec.layers))]
        roles = ["embed", "final_norm"] + ([] if self.spec.shape.tied else ["head"])
        self.ends = {role: checkpoint.read_one(self.spec.names[role], double) for role in roles}


def open_model(folder: Path, case: str) -> Model:
    return Model(open_checkpoint(make_checkpoint(folder, case)))


def run_model(spec: ModelSpec, layers: list[Weights], ends: Mapping[str, Tensor]) -> Tensor:
    """Logits of 2 windows longer than every sliding window."""
    ids = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(5))
    x = ends["embed"][ids] * spec.embedding_multiplier
    frame = make_frame(spec, 2, 40, 0, torch.float64)
    for layer, weights in zip(spec.layers, layers, strict=True):
        x, _ = run_layer(spec, layer, weights, x, frame)
    return compute_logits(spec, {"head": ends["embed"], **ends}, x)


def cut_model(model: Model, plan: Plan) -> tuple[ModelSpec, list[Weights], Weights]:
    spec, hidden = model.spec, torch.tensor(plan.hidden)
    layers = []
    for row in plan.layers:
        shape = spec.layers[row.layer].shape
        rows = axis_rows(shape, hidden, torch.tensor(row.kv_groups), torch.tensor(row.ffn))
        layers.append(slice_weights(spec, model.layers[row.layer], rows))
    return cut_spec(spec, plan), layers, slice_weights(spec, model.ends, {"hidden": hidden})


def gap(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().max())


def uneven_rows(model: Model, size: int) -> list[tuple[int, ...]]:
    """Kept units of each layer: another third goes in every layer, and one more in odd layers."""
    return [tuple(i for i in range(size) if (i + n) % 3 and i != n % 2 * 7) for n in range(len(model.layers))]


@pytest.mark.parametrize("case", CASES)
def test_channels_that_nobody_reads_go_without_a_trace(case: str, tmp_path: Path) -> None:
    model = open_model(tmp_path, case)
    kept = uneven_rows(model, 56)
    for weights, rows in zip(model.layers, kept, strict=True):
        gone = [i for i in range(56) if i not in rows]
        weights["down"][:, gone] = 0
    plan = keep_everything(model.spec.shape)
    plan = replace(plan, layers=tuple(replace(row, ffn=rows) for row, rows in zip(plan.layers, kept, strict=True)))
    assert gap(run_model(*cut_model(model, plan)), run_model(model.spec, model.layers, model.ends)) <= EXACT


@pytest.mark.parametrize("case", CASES)
def test_groups_that_nobody_reads_go_without_a_trace(case: str, tmp_path: Path) -> None:
    model = open_model(tmp_path, case)
    shape = model.spec.layers[0].shape
    kept = [((0, 2), (1,), (1, 2), (0,))[n % 4] for n in range(len(model.layers))]
    for weights, groups in zip(model.layers, kept, strict=True):
        gone = torch.tensor([group for group in range(3) if group not in groups])
        weights["o"][:, head_rows(gone, shape.group, shape.head_dim)] = 0
    plan = keep_everything(model.spec.shape)
    plan = replace(plan, layers=tuple(replace(row, kv_groups=g) for row, g in zip(plan.layers, kept, strict=True)))
    error = gap(run_model(*cut_model(model, plan)), run_model(model.spec, model.layers, model.ends))
    if model.spec.family.attention.qk_norm == "all":
        assert error > EXACT
        pytest.skip("a qk-norm over all heads sees the heads that went: removing them cannot be exact")
    assert error <= EXACT


def silence_hidden(model: Model, kept: Tensor) -> None:
    """Keep the stream's other channels at zero, and give all norms weights whose rescaling is sqrt(48 / kept)."""
    gone = torch.tensor([i for i in range(48) if i not in kept.tolist()])
    offset = model.spec.norm_offset
    model.ends["embed"][:, gone] = 0
    for weights in [*model.layers, model.ends]:
        for role in weights.keys() & {"o", "down", "o_bias", "down_bias"}:
            weights[role][gone] = 0
        for role in weights.keys() & {"attn_in", "attn_out", "mlp_in", "mlp_out", "final_norm"}:
            gain = weights[role] + offset
            share = gain[kept].pow(2).mean() / gain[gone].pow(2).mean()
            gain[gone] *= share.sqrt()
            weights[role] = gain - offset


@pytest.mark.parametrize("case", CASES)
def test_hidden_channels_that_carry_nothing_go_without_a_trace(case: str, tmp_path: Path) -> None:
    """With it the fold of a multiplier that follows the hidden size, tied and untied."""
    model = open_model(tmp_path, case)
    silence_hidden(model, KEPT_HIDDEN)
    # The mean square of a narrower stream is larger by 48 / 32, but what norms add to it stays: take that out.
    model.spec = replace(model.spec, eps=0.0)
    wanted = run_model(model.spec, model.layers, model.ends)
    plan = replace(keep_everything(model.spec.shape), hidden=tuple(KEPT_HIDDEN.tolist()))
    spec, layers, ends = cut_model(model, plan)
    assert gap(run_model(spec, layers, ends), wanted) <= EXACT
    if spec.family.multipliers.embedding == "sqrt_hidden":
        own = replace(spec, embedding_multiplier=32**0.5)
        assert gap(run_model(own, layers, ends), wanted) > 1e-3
        assert gap(run_model(own, layers, fold_embedding_scale(spec, own, ends)), wanted) <= EXACT


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", ["gemma2", "gemma3_text", "granite", "llama"])
def test_a_changed_embedding_multiplier_folds_exactly(case: str, tied: bool, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, case, tie_word_embeddings=tied)
    model = Model(open_checkpoint(folder))
    before = {role: tensor.clone() for role, tensor in model.ends.items()}
    wanted = run_model(model.spec, model.layers, model.ends)
    other = replace(model.spec, embedding_multiplier=model.spec.embedding_multiplier * 0.37)
    assert gap(run_model(other, model.layers, model.ends), wanted) > 1e-3
    folded = fold_embedding_scale(model.spec, other, model.ends)
    assert gap(run_model(other, model.layers, folded), wanted) <= EXACT
    for role, tensor in before.items():
        assert torch.equal(model.ends[role], tensor)  # data in, data out
    assert fold_embedding_scale(model.spec, model.spec, model.ends) is model.ends


@pytest.mark.parametrize("case", CASES)
def test_keeping_everything_cuts_nothing(case: str, tmp_path: Path) -> None:
    model = open_model(tmp_path, case)
    spec, layers, ends = cut_model(model, keep_everything(model.spec.shape))
    assert spec.shape == model.spec.shape
    for cut, weights in [*zip(layers, model.layers, strict=True), (ends, model.ends)]:
        assert cut.keys() == weights.keys()
        for role, tensor in weights.items():
            assert torch.equal(cut[role], tensor), role


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_gets_the_shape_of_the_plan(case: str, tmp_path: Path) -> None:
    model = open_model(tmp_path, case)
    rows = (LayerPlan(1, (0, 2), tuple(range(0, 56, 5))), LayerPlan(3, (1,), (0, 55)))
    spec, layers, ends = cut_model(model, Plan(tuple(KEPT_HIDDEN.tolist()), rows))
    for layer, weights in zip(spec.layers, layers, strict=True):
        shape = layer.shape
        sizes = {"q": shape.query, "k": shape.kv, "v": shape.kv, "gate": shape.ffn, "up": shape.ffn}
        sizes |= {"o": 32, "down": 32}
        for role, size in sizes.items():
            assert len(weights[role]) == size, role
            if f"{role}_bias" in weights:
                assert weights[f"{role}_bias"].shape == (size,), role
        assert weights["o"].shape[1] == shape.query
        assert weights["down"].shape[1] == shape.ffn
        for role in shape.norms:
            assert weights[role].shape == (32,)
    assert ends["embed"].shape == (96, 32)
    kept = model.layers[1]
    heads = head_rows(torch.tensor([0, 2]), kept["q"].shape[0] // kept["k"].shape[0], spec.layers[0].shape.head_dim)
    assert torch.equal(layers[0]["q"], kept["q"][heads][:, KEPT_HIDDEN])
    assert torch.equal(layers[0]["down"], kept["down"][KEPT_HIDDEN][:, ::5])


def test_rows_of_heads() -> None:
    assert head_rows(torch.tensor([0, 2]), 1, 2).tolist() == [0, 1, 4, 5]
    assert head_rows(torch.tensor([1]), 2, 3).tolist() == [6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rescaling_preserves_the_length_of_the_gain(offset: float) -> None:
    weight = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    kept = weight[torch.arange(0, 50, 3)]
    scaled = rescale_norm(weight, kept, offset)
    assert float((scaled + offset).norm()) == pytest.approx(float((weight + offset).norm()), rel=1e-12)
    ratio = (scaled + offset) / (kept + offset)
    assert float(ratio.max() - ratio.min()) < 1e-12  # a scale, no turn
    torch.testing.assert_close(rescale_norm(weight, weight, offset), weight, rtol=1e-14, atol=1e-14)
    dead = torch.full((4,), -offset).double()
    assert torch.equal(rescale_norm(weight, dead, offset), dead)  # nothing to scale, and no division by zero
