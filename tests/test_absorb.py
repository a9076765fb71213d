"""Absorption costs what the sums predict, and changed models are opened as what they became."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from safetensors.torch import save_file
from test_decoder import run_decoder, run_reference
from tiny import FAMILIES, POST_NORM_FAMILIES, make_checkpoint, make_config
from torch import Tensor

from compress.checkpoint import open_checkpoint
from compress.decoder import (
    attention_branch,
    attention_context,
    compute_logits,
    make_frame,
    mlp_activation,
    mlp_branch,
    project,
    run_layer,
)
from compress.family import POST_NORMS, explain_not_stock
from compress.shapes import ModelShape
from compress.spec import ModelSpec, resolve_model
from compress.spec_change import add_biases, drop_norms, resolve_absorbed
from compress.spec_writer import find_writer, write_config
from compress.stats_norms import (
    CONSTANTS,
    BranchSums,
    PostNormSums,
    check_overflow,
    describe_absorption,
    fit_constant,
    observe_post_norm,
    start_post_norms,
)
from compress.surgery.absorb import absorb_post_norm
from compress.surgery.biases import fill_biases
from compress.weights import fuse_parts, read_layer, read_spec

EXACT = 1e-10  # logits of order 10 in float64
DOUBLE = torch.float64
BRANCHES = {"attn_out": attention_branch, "mlp_out": mlp_branch}
IDS = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(5))
Weights = dict[str, Tensor]


class Model:
    """All weights of a tiny model by role, in float64."""

    def __init__(self, folder: Path, case: str, **changes: Any) -> None:
        checkpoint = open_checkpoint(make_checkpoint(folder, case, **changes))
        self.spec = read_spec(checkpoint)
        self.layers = [read_layer(checkpoint, self.spec, i, DOUBLE) for i in range(len(self.spec.layers))]
        roles = ["embed", "final_norm"] + ([] if self.spec.shape.tied else ["head"])
        self.ends = {role: checkpoint.read_one(self.spec.names[role], DOUBLE) for role in roles}

    def run(self, spec: ModelSpec | None = None) -> Tensor:
        """Logits of 2 windows longer than every sliding window."""
        spec = spec or self.spec
        x, frame = self.ends["embed"][IDS] * spec.embedding_multiplier, make_frame(spec, *IDS.shape, 0, DOUBLE)
        for layer, weights in zip(spec.layers, self.layers, strict=True):
            x, _ = run_layer(spec, layer, weights, x, frame)
        return compute_logits(spec, {"head": self.ends["embed"], **self.ends}, x)

    def save(self, folder: Path, config: Mapping[str, Any]) -> Path:
        """Write the weights under the names and keys of `config`."""
        spec = resolve_model(config, None)
        stored = {spec.names[role]: tensor for role, tensor in self.ends.items()}
        for layer, weights in zip(spec.layers, self.layers, strict=True):
            stored |= {layer.names[role]: tensor for role, tensor in fuse_parts(layer, weights).items()}
        folder.mkdir()
        stored = {name: tensor.contiguous() for name, tensor in stored.items()}
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        return folder


def gap(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().max())


def noise(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


# Absorption: exact where the rms is the same everywhere


def even_inputs(weights: Weights, projection: str, rms: float) -> Tensor:
    """Inputs `[tokens, in]` whose raw outputs all have the same rms, bias included."""
    outputs = noise(30, 48)
    outputs *= rms / outputs.pow(2).mean(-1, keepdim=True).sqrt()
    bias = weights.get(f"{projection}_bias", torch.zeros(()))
    return (outputs - bias) @ torch.linalg.pinv(weights[projection]).T


@pytest.mark.parametrize("rule", CONSTANTS)
@pytest.mark.parametrize("role", POST_NORMS)
@pytest.mark.parametrize("case", [*POST_NORM_FAMILIES, "biases"])
def test_absorbing_an_even_rms_is_exact(case: str, role: str, rule: str, tmp_path: Path) -> None:
    changes = {"attention_bias": True, "mlp_bias": True} if case == "biases" else {}
    model = Model(tmp_path / "m", "pangu_sandwich" if case == "biases" else case, **changes)
    spec, weights, projection = replace(model.spec, residual_multiplier=0.4), model.layers[1], POST_NORMS[role][0]
    inputs = even_inputs(weights, projection, 0.7)
    sums = PostNormSums.start(spec, 1, role, weights[role])
    sums.update(project(weights, projection, inputs), torch.ones(30, dtype=torch.bool))
    report = describe_absorption(sums, rule)
    assert (report.cv < 1e-7, report.error < 1e-7, report.go, report.overflow) == (True, True, True, False)
    assert report.constant == pytest.approx((0.49 + spec.eps) ** -0.5, rel=1e-9)
    absorbed = absorb_post_norm(spec, weights, role, fit_constant(sums, rule))
    assert set(weights) - set(absorbed) == {role}
    changed = {name for name, tensor in absorbed.items() if tensor is not weights[name]}
    assert changed == {name for name in (projection, f"{projection}_bias") if name in weights}
    wanted, branch = BRANCHES[role](spec, weights, inputs), BRANCHES[role](spec, absorbed, inputs)
    assert float(wanted.abs().max()) > 0.1
    assert gap(branch, wanted) <= EXACT


# Absorption: the prediction


def observe_model(model: Model, ids: Tensor) -> list[tuple[str, PostNormSums, Weights, Tensor, Tensor]]:
    """Role, sums, weights, inputs of the last projection and raw outputs of every branch on the dense stream."""
    spec, found = model.spec, []
    x, frame = model.ends["embed"][ids] * spec.embedding_multiplier, make_frame(spec, *ids.shape, 0, DOUBLE)
    mask = torch.ones(ids.shape, dtype=torch.bool)
    mask[:, 0] = False
    for index, (layer, weights) in enumerate(zip(spec.layers, model.layers, strict=True)):
        sums = start_post_norms(spec, index, weights)
        context, _ = attention_context(spec, layer, weights, x, frame)
        x = x + attention_branch(spec, weights, context)
        activation = mlp_activation(spec, weights, x)
        x = x + mlp_branch(spec, weights, activation)
        for role, inputs in (("attn_out", context), ("mlp_out", activation)):
            raw = project(weights, POST_NORMS[role][0], inputs)
            observe_post_norm(sums, role, raw, mask)
            if role in sums:
                found.append((role, sums[role], weights, inputs, raw))
    return found


def measure_error(spec: ModelSpec, role: str, pair: tuple[Weights, Weights], inputs: Tensor) -> float:
    dense, absorbed = (BRANCHES[role](spec, weights, inputs) for weights in pair)
    return float((dense - absorbed).norm() / dense.norm())


@pytest.mark.parametrize("rule", CONSTANTS)
@pytest.mark.parametrize("case", POST_NORM_FAMILIES)
def test_the_predicted_error_is_the_measured_one(case: str, rule: str, tmp_path: Path) -> None:
    """Within 5 % of measured (methods 1.10.5): exactly on the tokens summed; on other text as far as chance allows."""
    model = Model(tmp_path / "m", case)
    ids = torch.randint(3, 96, (72, 40), generator=torch.Generator().manual_seed(1))
    seen, others = observe_model(model, ids[:48]), observe_model(model, ids[48:])
    assert len(seen) == 2 * len(model.layers)
    deviations = []
    for (role, sums, weights, inputs, _), (*_, other, _) in zip(seen, others, strict=True):
        report = describe_absorption(sums, rule)
        assert (sums.ordinary.count, sums.sinks.count) == (48 * 39, 48)
        pair = weights, absorb_post_norm(model.spec, weights, role, fit_constant(sums, rule))
        assert 0.02 < report.error < 0.9
        assert measure_error(model.spec, role, pair, inputs[:, 1:]) == pytest.approx(report.error, rel=1e-9)
        assert measure_error(model.spec, role, pair, inputs[:, :1]) == pytest.approx(report.sink_error, rel=1e-9)
        deviations.append(measure_error(model.spec, role, pair, other[:, 1:]) / report.error - 1)
    # 936 tokens of heavy-tailed rms leave 3 to 10 % of noise on each branch; a bias would show in their mean.
    assert max(map(abs, deviations)) < 0.25
    assert abs(sum(deviations)) / len(deviations) < 0.05


def loop_sums(outputs: Tensor, gain: Tensor, eps: float) -> dict[str, float]:
    """Slow twin: everything that a report says, token by token."""
    rows = [(gain * o, gain * o / math.sqrt(float(o @ o) / len(o) + eps)) for o in outputs]
    rms = [math.sqrt(float(o @ o) / len(o) + eps) for o in outputs]
    mean = sum(rms) / len(rms)
    cv = math.sqrt(sum((r - mean) ** 2 for r in rms) / len(rms)) / mean
    constants = {
        "least-squares": sum(float(o @ y) for o, y in rows) / sum(float(o @ o) for o, _ in rows),
        "mean-inverse": sum(1 / r for r in rms) / len(rms),
    }
    total, found = sum(float(y @ y) for _, y in rows), {"cv": cv}
    for rule, c in constants.items():
        found[rule] = c
        found[f"{rule} error"] = math.sqrt(sum(float((c * o - y) @ (c * o - y)) for o, y in rows) / total)
        found[f"{rule} peak"] = max(float((c * o).abs().max()) for o, _ in rows)
    return found


def make_sums(outputs: Tensor, gain: Tensor, eps: float, mask: Tensor | None = None) -> PostNormSums:
    empty = BranchSums.empty(outputs.shape[-1])
    sums = PostNormSums(2, "mlp_out", gain, eps, empty, BranchSums.empty(outputs.shape[-1]))
    sums.update(outputs, torch.ones(len(outputs), dtype=torch.bool) if mask is None else mask)
    return sums


def test_sums_equal_the_slow_twin_and_merge() -> None:
    outputs, gain, eps = noise(70, 9) * (1 + noise(70, 1, seed=1).abs()), noise(9, seed=2), 0.01
    slow, mask = loop_sums(outputs, gain, eps), torch.arange(70) % 7 > 0
    for rule in CONSTANTS:
        sums = make_sums(outputs, gain, eps)
        report = describe_absorption(sums, rule)
        assert report.cv == pytest.approx(slow["cv"], rel=1e-9)
        assert report.constant == pytest.approx(slow[rule], rel=1e-12)
        assert report.error == pytest.approx(slow[f"{rule} error"], rel=1e-9)
        assert report.peak == pytest.approx(slow[f"{rule} peak"], rel=1e-12)
        assert (report.layer, report.role, sums.ordinary.count, sums.sinks.count) == (2, "mlp_out", 70, 0)
    halves = [make_sums(outputs[part], gain, eps, mask[part]) for part in (slice(40), slice(40, 70))]
    whole = make_sums(outputs, gain, eps, mask)
    merged = halves[0].merge(halves[1])
    for rule in CONSTANTS:
        assert describe_absorption(merged, rule).__dict__ == pytest.approx(describe_absorption(whole, rule).__dict__)
    alone = loop_sums(outputs[mask], gain, eps)
    assert describe_absorption(whole).constant == pytest.approx(alone["least-squares"], rel=1e-12)
    # The peak of a sink counts: it is a value that float16 must hold.
    assert describe_absorption(whole).peak >= float((outputs * gain).abs().max()) * alone["least-squares"] * 0.999


def test_long_texts_are_summed_in_chunks() -> None:
    outputs, gain = noise(2100, 3), noise(3, seed=1)
    outputs[7] *= 9  # the largest values stand in the first chunk
    slow, sums = loop_sums(outputs, gain, 1e-6), make_sums(outputs, gain, 1e-6)
    report = describe_absorption(sums)
    assert report.error == pytest.approx(slow["least-squares error"], rel=1e-9)
    assert report.peak == pytest.approx(slow["least-squares peak"], rel=1e-12)
    assert sums.ordinary.count == 2100


def test_constants_are_ordered_as_derived() -> None:
    """Log-normal rms with CV 0.415: errors 0.383 and 0.517 (methods 1.5); no constant beats least squares."""
    quantiles = (torch.arange(4000, dtype=DOUBLE) + 0.5) / 4000
    rms = (0.4 * torch.special.ndtri(quantiles)).exp()
    unit = noise(4000, 16)
    sums = make_sums(rms[:, None] * unit / unit.pow(2).mean(-1, keepdim=True).sqrt(), torch.ones(16, dtype=DOUBLE), 0.0)
    best, paper = describe_absorption(sums), describe_absorption(sums, "mean-inverse")
    assert (best.cv, best.error, paper.error) == pytest.approx((0.415, 0.383, 0.517), abs=3e-3)
    # Equal gains: CV / sqrt(1 + CV^2) is exact.
    assert best.error == pytest.approx(best.cv / math.sqrt(1 + best.cv**2), rel=1e-9)
    assert best.constant < 1 / (sums.ordinary.rms / sums.ordinary.count) < paper.constant
    assert not best.go
    assert describe_absorption(sums, limit=0.5).go
    constant = fit_constant(sums)
    nearby = [sums.ordinary.error(sums.gain, constant * factor) for factor in (0.99, 1.01)]
    assert min(nearby) > best.error


def test_silent_branches_have_a_finite_constant() -> None:
    silent = make_sums(torch.zeros(20, 4, dtype=DOUBLE), torch.ones(4, dtype=DOUBLE), 1e-6)
    assert [describe_absorption(silent, rule).error for rule in CONSTANTS] == [0, 0]
    assert [fit_constant(silent, rule) for rule in CONSTANTS] == pytest.approx([1e3, 1e3])
    outputs = noise(20, 4)
    sums = make_sums(outputs, torch.tensor([1.0, 0, 2, 3], dtype=DOUBLE), 1e-6)
    refused(lambda: fit_constant(make_sums(outputs[:0], sums.gain, 1e-6)), "layer 2", "MLP", "longer")
    refused(lambda: fit_constant(sums, "median"), "'median'", "least-squares")


def test_outgrowing_float16_is_said() -> None:
    outputs, gain = noise(50, 4), torch.tensor([1.0, 1, 1, 1e5], dtype=DOUBLE)
    large, small = (describe_absorption(make_sums(outputs, g, 1e-6)) for g in (gain, gain.clamp(max=10)))
    assert (large.overflow, small.overflow) == (True, False)
    (warning,) = check_overflow([small, large])
    assert "layer 2" in warning
    assert "MLP" in warning
    assert "65504" in warning


def test_what_cannot_be_absorbed_is_refused(tmp_path: Path) -> None:
    sandwich, post, plain = (Model(tmp_path / case, case) for case in ("glm4", "olmo2", "llama"))

    def absorb(model: Model, role: str) -> None:
        absorb_post_norm(model.spec, model.layers[0], role, 1.0)

    # `post_attention_layernorm` by name, a pre-norm by its place.
    refused(lambda: absorb(sandwich, "mlp_in"), "'mlp_in'", "attn_out and mlp_out")
    refused(lambda: absorb(plain, "attn_out"), "'llama'", "no norm behind the attention")
    refused(lambda: absorb(post, "mlp_out"), "'olmo2'", "never be normalised")
    del sandwich.layers[0]["attn_out"]
    refused(lambda: absorb(sandwich, "attn_out"), "'attn_out'", "gone")
    refused(lambda: resolve_absorbed(post.spec, {0: ["attn_out"]}), "'olmo2'", "never be normalised")
    shape = strip(post.spec, {0: ("attn_out",)})
    refused(lambda: write_config(post.spec, shape, range(4)), "'olmo2'", "never be normalised")


# Descriptions of absorbed models


def strip(spec: ModelSpec, absorbed: Mapping[int, tuple[str, ...]]) -> ModelShape:
    layers = tuple(drop_norms(layer, absorbed.get(i, ())) for i, layer in enumerate(spec.shape.layers))
    return replace(spec.shape, layers=layers)


BOTH = ("attn_out", "mlp_out")
PARTS = {1: ("attn_out",), 2: BOTH, 3: ("mlp_out",)}
ALL = {index: BOTH for index in range(4)}


def absorb_model(model: Model, absorbed: Mapping[int, tuple[str, ...]]) -> None:
    for index, roles in absorbed.items():
        for role in roles:
            model.layers[index] = absorb_post_norm(model.spec, model.layers[index], role, 1.7)


@pytest.mark.parametrize("absorbed", [PARTS, ALL], ids=["some", "all"])
@pytest.mark.parametrize("case", POST_NORM_FAMILIES)
def test_an_absorbed_model_reads_back(case: str, absorbed: dict[int, tuple[str, ...]], tmp_path: Path) -> None:
    model = Model(tmp_path / "dense", case)
    dense = model.run()
    absorb_model(model, absorbed)
    new = resolve_absorbed(model.spec, absorbed)
    wanted = model.run(new)
    assert gap(dense, wanted) > 1e-3
    config = write_config(model.spec, strip(model.spec, absorbed), range(4))
    assert config == json.loads(json.dumps(config))
    folder = model.save(tmp_path / "out", config)
    spec = read_spec(open_checkpoint(folder))  # checks every stored tensor
    assert spec.shape == new.shape
    assert gap(run_decoder(folder, IDS, DOUBLE), wanted) <= EXACT
    if not model.spec.shape.tied:
        assert resolve_model(new.config, None).layers == new.layers
        assert resolve_model(new.config, None).shape == new.shape


RELATIVES = {"glm4": "glm", "pangu_sandwich": "llama"}


@pytest.mark.parametrize("case", RELATIVES)
def test_with_every_post_norm_gone_stock_code_opens_the_relative(case: str, tmp_path: Path) -> None:
    for number, changes in enumerate(({}, {"attention_bias": True})):
        model = Model(tmp_path / f"dense{number}", case, **changes)
        absorb_model(model, ALL)
        config = write_config(model.spec, strip(model.spec, ALL), range(4))
        assert config["model_type"] == RELATIVES[case]
        assert "per_layer_config" not in config
        assert explain_not_stock(config) == ""
        assert resolve_model(config, None).shape.uniform
        folder = model.save(tmp_path / f"out{number}", config)
        assert gap(run_reference(folder, IDS, torch.float32), model.run()) <= 1e-4


@pytest.mark.parametrize("case", POST_NORM_FAMILIES)
def test_lost_norms_follow_their_layers(case: str) -> None:
    """Layers go, sizes differ, a second compression goes on from the first: every layer keeps its own norms."""
    spec = resolve_absorbed(resolve_model(make_config(case), None), {1: BOTH, 3: ("mlp_out",)})
    layers = [replace(layer, ffn=40) if n == 1 else layer for n, layer in enumerate(spec.shape.layers)]
    shape = replace(spec.shape, layers=(layers[1], layers[2], layers[3]))
    config = write_config(spec, shape, [1, 2, 3])
    assert config["per_layer_config"]["0"] == {"absorbed_norms": list(BOTH)}
    assert config["per_layer_config"]["2"]["absorbed_norms"] == ["mlp_out"]
    assert resolve_model(config, None).shape.layers == shape.layers
    assert "norms behind" in explain_not_stock(config) or not spec.family.stock
    # What is left once the layers with norms are gone is the relative, where there is one.
    config = write_config(spec, replace(shape, layers=(layers[1],)), [1])
    assert config["model_type"] == RELATIVES.get(case, spec.config["model_type"])
    assert resolve_model(config, None).shape.layers == (layers[1],)


def test_heads_that_do_not_divide_go_on_to_the_family_that_takes_them() -> None:
    for biased in (False, True):
        spec = resolve_model(make_config("pangu_sandwich", attention_bias=biased), None)
        shape = replace(strip(spec, ALL), hidden=40)
        writer = find_writer(spec, shape)
        assert (writer is None) == biased
        if biased:
            refused(lambda spec=spec, shape=shape: write_config(spec, shape, range(4)), "llama", "6 heads", "40")
        else:
            config = write_config(spec, shape, range(4))
            assert config["model_type"] == "mistral"
            assert resolve_model(config, None).shape == shape


@pytest.mark.parametrize(
    ("norms", "words"),
    [
        (["mlp_in"], ["'mlp_in'", "no norm behind"]),
        ("attn_out", ["absorbed_norms", "layer 2", "list"]),
        (["attn_out", "q_norm"], ["'q_norm'"]),
    ],
)
def test_absorbed_norms_that_make_no_sense_are_refused(norms: Any, words: list[str]) -> None:
    config = make_config("glm4", per_layer_config={"2": {"absorbed_norms": norms}})
    refused(lambda: resolve_model(config, None), *words)
    plain = make_config("llama", per_layer_config={"2": {"absorbed_norms": ["attn_out"]}})
    refused(lambda: resolve_model(plain, None), "'llama'", "nothing to absorb")


# Added biases

STOCK_O = {"llama", "gemma2", "gemma3_text", "granite", "olmo2", "pangu_embedded", "qwen3", "smollm3", "pangu_sandwich"}
STOCK_DOWN = {"llama", "granite", "pangu_embedded", "pangu_sandwich", "smollm3"}


def with_biases(model: Model, shape: ModelShape) -> list[Weights]:
    """Zero biases where the shape has new ones."""
    return [fill_biases(layer, weights) for layer, weights in zip(shape.layers, model.layers, strict=True)]


@pytest.mark.parametrize("projections", [("o",), ("o", "down")], ids="-".join)
@pytest.mark.parametrize("case", FAMILIES)
def test_biases_are_added_by_the_familys_own_keys_or_refused(
    case: str, projections: tuple[str, ...], tmp_path: Path
) -> None:
    model = Model(tmp_path / "dense", case)
    if case not in (STOCK_O if projections == ("o",) else STOCK_O & STOCK_DOWN):
        missing = [name for name, stock in (("o", STOCK_O), ("down", STOCK_DOWN)) if case not in stock]
        refused(
            lambda: add_biases(model.spec, model.spec.shape, projections),
            ", ".join(name for name in missing if name in projections), "no place for a bias", "--repair lstsq",
        )  # fmt: skip
        return
    shape = add_biases(model.spec, model.spec.shape, projections)
    attention, mlp = ("q", "k", "v", "o"), ("gate", "up", "down")
    assert all(layer.biases == (attention + mlp if "down" in projections else attention) for layer in shape.layers)
    config = write_config(model.spec, shape, range(4))
    assert resolve_model(config, None).shape == shape
    assert "lightpress" not in config
    check_biases(model, shape, config, tmp_path)


def check_biases(model: Model, shape: ModelShape, config: dict[str, Any], folder: Path) -> None:
    """Zero biases change nothing; others are read, by stock code too where it is claimed."""
    wanted = model.run()
    model.layers = with_biases(model, shape)
    assert gap(model.run(), wanted) == 0
    for number, weights in enumerate(model.layers):
        for seed, name in enumerate(("o", "down")):
            if f"{name}_bias" in weights:
                weights[f"{name}_bias"] += noise(48, seed=seed + 10 * number)
    wanted, saved = model.run(), model.save(folder / "out", config)
    assert gap(run_decoder(saved, IDS, DOUBLE), wanted) <= EXACT
    if not explain_not_stock(config):
        assert gap(run_reference(saved, IDS, torch.float32), wanted) <= 1e-4


@pytest.mark.parametrize("case", ["qwen2", "qwen3", "phi3", "glm4", "llama", "mistral"])
def test_biases_without_a_stock_place_are_an_extension_of_our_own(case: str, tmp_path: Path) -> None:
    model = Model(tmp_path / "dense", case)
    shape = add_biases(model.spec, model.spec.shape, ("o", "down"), extend=True)
    config = write_config(model.spec, shape, range(4), extend=True)
    added = config.get("lightpress", {}).get("biases")
    assert added == ["o", "down"]
    assert bool(explain_not_stock(config)) == (added is not None)
    new = resolve_model(config, None)
    assert new.shape == shape
    assert new.layers[2].names["down_bias"] == "model.layers.2.mlp.down_proj.bias"
    if added is not None:
        refused(lambda: write_config(model.spec, shape, range(4)), model.spec.family.name, "down")
        again = replace(new.shape, layers=new.shape.layers[1:])
        config_again = write_config(new, again, [1, 2, 3])  # a second compression need not ask again
        assert resolve_model(config_again, None).shape == again
        assert add_biases(new, again, ("o", "down")) == again
    check_biases(model, shape, config, tmp_path)


def test_biases_meet_absorption_and_other_families(tmp_path: Path) -> None:
    """All post-norms gone: the relative's class decides where biases have a place."""
    spec = resolve_model(make_config("pangu_sandwich"), None)
    shape = add_biases(spec, strip(spec, ALL), ("o", "down"))
    config = write_config(spec, shape, range(4))
    assert (config["model_type"], config["attention_bias"], config["mlp_bias"]) == ("llama", True, True)
    assert resolve_model(config, None).shape == shape
    spec = resolve_model(make_config("glm4"), None)
    refused(lambda: add_biases(spec, strip(spec, ALL), ("o",)), "glm", "bias on o")
    config = write_config(spec, add_biases(spec, strip(spec, ALL), ("o",), extend=True), range(4), extend=True)
    assert (config["model_type"], config["lightpress"]) == ("glm", {"biases": ["o"]})
    assert resolve_model(config, None).shape.layers[0].biases == ("o",)
    # Written as a family without bias tensors: refused, whether before or after the biases are there.
    spec = resolve_model(make_config("llama"), None)
    narrow = replace(spec.shape, hidden=40)
    refused(lambda: add_biases(spec, narrow, ("o",)), "mistral", "bias on o")
    biased = replace(add_biases(spec, spec.shape, ("o",)), hidden=40)
    refused(lambda: write_config(spec, biased, range(4)), "6 heads", "40")


def test_biases_that_cannot_be_read_are_refused() -> None:
    for name in ("q", "gate", "norm", "o_proj"):
        config = make_config("phi3", lightpress={"biases": [name]})
        refused(lambda config=config: resolve_model(config, None), f"'{name}'", "'phi3'")
    spec = resolve_model(make_config("phi3"), None)
    refused(lambda: add_biases(spec, spec.shape, ("q",), extend=True), "bias on q")
    uneven = add_biases(spec, spec.shape, ("o",), extend=True)
    uneven = replace(uneven, layers=(spec.shape.layers[0], *uneven.layers[1:]))
    with pytest.raises(ValueError, match="same projections"):
        write_config(spec, uneven, range(4), extend=True)


def test_a_zero_bias_is_filled_in_the_type_of_its_weight() -> None:
    spec = resolve_model(make_config("llama"), None)
    weights = {name: torch.ones(rows, 5, dtype=torch.bfloat16) for name, rows in (("q", 48), ("o", 7))}
    shape = replace(spec.shape.layers[0], biases=("q", "o"))
    filled = fill_biases(shape, {**weights, "q_bias": torch.ones(48)})
    assert filled["o_bias"].tolist() == [0] * 7
    assert filled["o_bias"].dtype == torch.bfloat16
    assert bool((filled["q_bias"] == 1).all())
    assert "o_bias" not in weights
