"""The cost model against arithmetic by hand on a made-up device, and against published times.

The device: 1 TFLOPS of fp16 of which products reach half, so 5e11 operations per second; weights stream at 50 GB/s,
keys, values and activations at 25 GB/s; its vector unit takes 1000 elements per microsecond. So for `T` tokens a
`[1000, 1000]` product computes for 4 T us, reads fp16 weights in 40 us and carries activations in 0.16 T us. Times are
in microseconds.
"""

from __future__ import annotations

import importlib
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compress.goal import sum_costs
from compress.shapes import SLIDING, LayerShape, ModelShape
from profiles.budget import MemoryCosts, TimeCosts
from profiles.cost import (
    CLASSES,
    DECODE,
    PREFILL,
    REQUEST,
    Estimator,
    Step,
    Workload,
    estimate_cost,
    kv_bytes,
    list_steps,
    weight_bytes,
)
from profiles.profile import Compute, Formats, Link, Memory, Overhead, Profile, Rules, Runtime

MIB = 2**20
DEVICE = Profile(
    "made-up", "round numbers", "npu",
    Compute({"fp16": 1.0, "int8": 2.0}, 0.5, 0.25, half_rows=0, overlap=1, vector_gelements_per_s=1),
    Memory(16, 100, 0.5, 0.25, cache_mib=0, cache_gb_per_s=0),
    Overhead(matrix_op_us=10, vector_op_us=2, collective_us=100, step_us=50),
    Link(8, 10, 0.5),
    Rules({}, 1, 1, 1, True),
    Formats(("fp16", "int8"), ("fp16", "int8"), ("fp16",), ()),
    Runtime("made-up", "onnx", 1, score_passes=0, state_passes=1, vector_ops=8, matrix_ops=6, all_logits=False),
)  # fmt: skip
LAYER = LayerShape(8, 2, 100, 1000)  # 800 rows of queries, 200 of keys
MODEL = ModelShape(5000, 1000, False, (LAYER, LAYER))
DECODING = Workload(DECODE, prompt=900, output=199)  # its middle step sees 1000 tokens
PREFILLING = Workload(PREFILL, prompt=100, output=1)
W8A8: dict[str, Any] = {"weights": "int8", "activations": "int8"}


def make_device(**parts: dict[str, Any]) -> Profile:
    return replace(DEVICE, **{part: replace(getattr(DEVICE, part), **values) for part, values in parts.items()})


def make_estimator(step: Step, profile: Profile = DEVICE, resident: float = math.inf, **work: Any) -> Estimator:
    return Estimator(profile, Workload(**work), step, resident)


def in_us(seconds: float) -> Any:
    return pytest.approx(seconds * 1e6, rel=1e-9)


def resize(shape: ModelShape, **changes: Any) -> ModelShape:
    return replace(shape, layers=tuple(replace(layer, **changes) for layer in shape.layers))


# Products


@pytest.mark.parametrize(
    ("tokens", "overlap", "expected"),
    [
        (1, 1, 40.16),  # matrix and vector: moving only, however little overlaps
        (1, 0, 40.16),
        (4, 1, 40.64),  # memory-bound: computing takes 16
        (4, 0, 56.64),
        (100, 1, 400),  # compute-bound: moving takes 40 + 16
        (100, 0, 456),
        (100, 0.5, 428),
    ],
)
def test_product_overlaps_computing_and_moving(tokens: int, overlap: float, expected: float) -> None:
    for step in (Step(1, tokens, tokens), Step(tokens, 1, 7)):  # rows of one sequence, or sequences
        assert in_us(make_estimator(step, make_device(compute={"overlap": overlap})).product(1000, 1000)) == expected


@pytest.mark.parametrize(
    ("tokens", "types", "expected"),
    [
        (100, W8A8, 200),  # twice the rate
        (1, W8A8, 20.12),  # half the bytes, of activations too
        (100, {"weights": "int8"}, 400),  # weight-only: computed in fp16
        (1, {"weights": "int8"}, 20.16),
        (100, {"weights": "int4"}, 400),
        (1, {"weights": "int4"}, 11.41),  # 4.5 bits a weight
    ],
)
def test_product_types(tokens: int, types: dict[str, Any], expected: float) -> None:
    assert in_us(make_estimator(Step(1, tokens, tokens), **types).product(1000, 1000)) == expected


def test_tiles_pad_computing_and_weights_but_not_activations() -> None:
    profile = make_device(rules={"tiles": {"fp16": (300, 600), "int8": (500, 250)}})  # 1000 x 1000 -> 1200 x 1200
    assert in_us(make_estimator(Step(1, 100, 100), profile).product(1000, 1000)) == 576
    assert in_us(make_estimator(Step(1, 1, 1), profile).product(1000, 1000)) == 57.76
    assert in_us(make_estimator(Step(1, 1, 1), profile, **W8A8).product(1000, 1000)) == 20.12  # whole tiles already


def test_few_rows_compute_slowly() -> None:
    profile = make_device(compute={"half_rows": 100})
    assert in_us(make_estimator(Step(1, 100, 100), profile).product(1000, 1000)) == 800
    assert in_us(make_estimator(Step(1, 300, 300), profile).product(1000, 1000)) == 1600


def test_vector_takes_the_longer_of_unit_and_memory() -> None:
    fast = {"vector_gelements_per_s": 100}
    assert in_us(make_estimator(Step(1, 1, 1)).vector(1e6)) == 1000
    assert in_us(make_estimator(Step(1, 1, 1), make_device(compute=fast)).vector(1e6)) == 160  # 4 MB at 25 GB/s
    for mib, expected in ((8, 16), (7, 160)):  # half of the cache holds 4 MB, or does not
        profile = make_device(compute=fast, memory={"cache_mib": mib, "cache_gb_per_s": 1000})
        assert in_us(make_estimator(Step(1, 1, 1), profile).vector(1e6)) == expected


# Cache


def test_cache_serves_what_stays_in_it() -> None:
    profile = make_device(memory={"cache_mib": 1, "cache_gb_per_s": 400})
    # At 1.5 times its size half of the reads hit: 1 / (0.5 / 400 + 0.5 / 100).
    for mib, expected in ((0.5, 400), (1, 400), (1.5, 160), (2, 100), (9, 100), (math.inf, 100)):
        assert make_estimator(Step(1, 1, 1), profile, mib * MIB).read_speed() / 1e9 == pytest.approx(expected)
        assert make_estimator(Step(1, 1, 1), DEVICE, mib * MIB).read_speed() / 1e9 == pytest.approx(100)  # no cache


def test_weights_keys_and_values_of_the_model_share_the_cache() -> None:
    # Weights: 40 MB. Keys and values: 1600 bytes a token, so 25 000 tokens fill the rest of 80 MB.
    profile = make_device(memory={"cache_mib": 80e6 / MIB, "cache_gb_per_s": 400})
    short, long = (replace(DECODING, prompt=prompt) for prompt in (20_000, 80_000))
    heads = [estimate_cost(MODEL, profile, work).seconds["head"] * 1e6 for work in (short, long)]
    assert heads == pytest.approx([50 + 0.12, 200 + 0.12])  # small activations are carried in the cache


# Attention


def score(step: Step, layer: LayerShape = LAYER, profile: Profile = DEVICE, **work: Any) -> Any:
    estimator = make_estimator(step, profile, **work)
    return in_us(estimator.scores(layer, *estimator.heads(layer)))


def test_decode_reads_keys_and_values() -> None:
    # 1000 tokens of 200 keys and 200 values: 0.8 MB in 32 us; 3.2 M operations in 12.8 us; 8000 scores in 8 us.
    step = Step(1, 1, 1000)
    assert score(step) == 32 + 8
    assert score(step, profile=make_device(compute={"overlap": 0})) == 32 + 12.8 + 8
    assert score(step, profile=make_device(runtime={"state_passes": 3})) == 3 * 32 + 8
    assert score(step, kv="int8") == 16 + 8
    assert score(Step(5, 1, 1000)) == 5 * (32 + 8)
    assert score(Step(1, 1, 2000)) == 2 * (32 + 8)


def test_kv_heads_move_and_query_heads_compute() -> None:
    step, apart = Step(1, 1, 1000), make_device(compute={"overlap": 0})
    assert score(step, replace(LAYER, kv_heads=8), apart) == 128 + 12.8 + 8
    assert score(step, replace(LAYER, query_heads=16), apart) == 32 + 25.6 + 16


def test_window_caps_the_span_of_sliding_layers() -> None:
    sliding = replace(LAYER, attention=SLIDING)
    assert score(Step(1, 1, 1000), sliding, window=250) == 8 + 2
    assert score(Step(1, 1, 1000), sliding, window=4000) == 40
    assert score(Step(1, 1, 1000), sliding) == 40
    assert score(Step(1, 1, 1000), window=250) == 40  # this layer sees everything


def test_prefill_sees_the_causal_half_where_attention_is_fused() -> None:
    # The square has a million scores for each of 8 heads: 12 800 us of products, 8000 us of softmax.
    step = Step(1, 1000, 1000)
    assert score(step) == 6400 + 4000
    assert score(Step(3, 1000, 1000)) == 3 * 10400
    # Stored scores: the whole square, one pass by the softmax itself and `score_passes` more.
    assert score(step, profile=make_device(runtime={"score_passes": 1})) == 12800 + 2 * 8000
    assert score(step, profile=make_device(runtime={"score_passes": 2})) == 12800 + 3 * 8000


def test_prefill_through_a_window_sees_a_band() -> None:
    # 1000 rows see 250 tokens each, less the triangle of 250 * 250 / 2 before the first: 218 750 scores a head.
    sliding, apart = replace(LAYER, attention=SLIDING), make_device(compute={"overlap": 0})
    assert score(Step(1, 1000, 1000), sliding, window=250) == 2800 + 1750
    assert score(Step(1, 1000, 1000), sliding, apart, window=250) == 2800 + 1750 + 32  # some row sees each key


def test_devices_share_heads_and_copy_kv_heads_that_are_too_few() -> None:
    step = Step(1, 1, 1000)
    assert score(step, devices=2) == 16 + 4
    assert score(step, devices=8) == 16 + 1  # one KV head each, as on two devices
    # On eight: [1000, 100 + 2 * 100] and [100, 1000], 12 + 4 us of weights and 2400 activations.
    assert in_us(make_estimator(step, devices=8).attention(LAYER, 1000)["attention"]) == 16 + 0.192


# What does not depend on counts, and what is outside the layers


@pytest.mark.parametrize(
    ("work", "norms", "vector", "collectives"),
    [
        ({}, 6, 2, 0),  # norms: 1000 elements and a launch each; residual adds: 2000 elements
        (W8A8, 6, 6 + 8, 0),  # four quantise operations
        ({"devices": 2}, 6, 2, 2 * 100.4),  # ring: 2 * 1/2 of 2000 bytes at 5 GB/s
        ({"devices": 4}, 6, 2, 2 * 100.6),  # 2 * 3/4
    ],
)
def test_fixed(work: dict[str, Any], norms: float, vector: float, collectives: float) -> None:
    found = make_estimator(Step(1, 1, 1000), **work).fixed(LAYER, 1000)
    expected = {"norms": norms, "vector": vector, "fixed": 6 * 10 + 8 * 2}
    expected |= {"collectives": collectives} if collectives else {}
    assert {name: value * 1e6 for name, value in found.items()} == pytest.approx(expected)
    if collectives:  # carry all tokens; launches do not grow with them
        many = make_estimator(Step(5, 10, 10), **work).fixed(LAYER, 1000)
        assert in_us(many["collectives"]) == 200 + 50 * (collectives - 200)


def test_absorbing_post_norms_saves_exactly_two_norms() -> None:
    sandwich = resize(MODEL, norms=("attn_in", "attn_out", "mlp_in", "mlp_out"))
    before, after = (estimate_cost(shape, DEVICE, DECODING).seconds for shape in (sandwich, MODEL))
    saved = {name: (before[name] - after[name]) * 1e6 for name in CLASSES}
    assert saved == pytest.approx({**dict.fromkeys(CLASSES, 0.0), "norms": 2 * 2 * 3}, abs=1e-9)


@pytest.mark.parametrize(
    ("all_logits", "types", "expected"),
    [
        (True, {}, 4000),  # 200 tokens
        (False, {}, 200.96),  # two tokens: the last of each sequence
        (False, {"weights": "int8"}, 200.96),  # the head has a type of its own
        (False, {"head": "int8"}, 100.96),
        (False, {"head": "int4"}, 57.21),
        (True, {"head": "int8"}, 4000),
        (True, {"head": "int8", **W8A8}, 2000),
        (False, {"devices": 2}, 100 + 0.56),
    ],
)
def test_head(all_logits: bool, types: dict[str, Any], expected: float) -> None:
    profile = make_device(runtime={"all_logits": all_logits})
    times = make_estimator(Step(2, 100, 100), profile, **types).outside(5000, 1000)
    assert in_us(times["head"]) == expected
    assert in_us(times["norms"]) == 200 + 2
    assert in_us(times["fixed"]) == 50 + 10
    assert in_us(times.get("collectives", 0.0)) == (100 if "devices" in types else 0)


def test_mlp_and_rope() -> None:
    estimator = make_estimator(Step(1, 1, 1000))
    assert in_us(estimator.mlp(replace(LAYER, ffn=2000), 1000)["mlp"]) == 3 * (80 + 0.24)
    assert in_us(estimator.mlp(replace(LAYER, ffn=2000), 1000)["vector"]) == 2
    for passes in (1, 3):  # over 800 queries, 200 keys, 200 values
        profile = make_device(runtime={"head_passes": passes})
        assert in_us(make_estimator(Step(1, 1, 1000), profile).attention(LAYER, 1000)["vector"]) == passes * 1.2


# Workloads


def test_steps() -> None:
    work = Workload(REQUEST, prompt=100, output=50, batch=3)
    prefill, decode = (Step(3, 100, 100), 1), (Step(3, 1, 125), 50)
    expected = {REQUEST: [prefill, decode], PREFILL: [prefill], DECODE: [(decode[0], 1)]}
    assert {phase: list_steps(replace(work, phase=phase)) for phase in expected} == expected
    assert [list_steps(replace(work, phase=DECODE, output=n))[0][0].total for n in (1, 2, 51)] == [101, 101, 126]


def test_breakdown_of_a_decode_step() -> None:
    cost = estimate_cost(MODEL, DEVICE, DECODING)
    expected = {
        "attention": 2 * (48.176 + 32.144), "mlp": 2 * 3 * 40.16, "scores": 2 * 40, "norms": 2 * 6 + 3,
        "vector": 2 * (1.2 + 1 + 2), "head": 200.48, "collectives": 0, "fixed": 2 * 76 + 60,
    }  # fmt: skip
    assert {name: value * 1e6 for name, value in cost.seconds.items()} == pytest.approx(expected)
    assert in_us(cost.total) == 917.48


def test_request_is_prefill_and_steps() -> None:
    work = Workload(prompt=100, output=50, batch=3)
    prefill, decode, whole = (
        estimate_cost(MODEL, DEVICE, replace(work, phase=phase)) for phase in (PREFILL, DECODE, REQUEST)
    )
    parts = {name: prefill.seconds[name] + 50 * decode.seconds[name] for name in CLASSES}
    assert whole.seconds == pytest.approx(parts)
    assert [x.tokens_per_s * x.total for x in (prefill, decode, whole)] == pytest.approx([300, 3, 150])


# Memory


@pytest.mark.parametrize(
    ("tied", "types", "layers", "ends"),
    [
        (False, {}, 20_000_000, 20_000_000),
        (True, {}, 20_000_000, 10_000_000),
        (True, {"weights": "int8"}, 10_000_000 + 41_600, 10_000_000),  # 5200 outputs a layer, 4 bytes each
        (True, {"weights": "int4"}, 5_625_000, 10_000_000),
        (False, {"head": "int4"}, 20_000_000, 12_812_500),
        (True, {"head": "int4"}, 20_000_000, 10_000_000),  # the embedding stays
    ],
)
def test_weight_bytes(tied: bool, types: dict[str, Any], layers: int, ends: int) -> None:
    shape = replace(resize(MODEL, norms=()), tied=tied)
    final_norm = 2000
    assert weight_bytes(shape, Workload(**types), DEVICE) == layers + ends + final_norm


def test_devices_share_weights_but_copy_kv_heads_that_are_too_few() -> None:
    found = [weight_bytes(MODEL, Workload(devices=devices), DEVICE) for devices in (1, 2, 8)]
    assert found[1] == pytest.approx(found[0] / 2, rel=1e-3)
    # Eight devices: q, o and MLP an eighth each, one KV head each, embeddings an eighth.
    assert found[2] == pytest.approx(2 * 2 * (200_000 + 200_000 + 375_000) + 2_500_000, rel=1e-3)


def test_kv_bytes() -> None:
    work = Workload(prompt=900, output=100)
    mixed = replace(MODEL, layers=(LAYER, replace(LAYER, attention=SLIDING)))
    assert kv_bytes(MODEL, work) == 1_600_000
    assert kv_bytes(MODEL, replace(work, batch=3)) == 4_800_000
    assert kv_bytes(MODEL, replace(work, kv="int8")) == 800_000
    assert [kv_bytes(MODEL, replace(work, devices=n)) for n in (2, 8)] == [800_000, 800_000]
    assert kv_bytes(mixed, replace(work, window=250)) == 800_000 + 200_000
    assert kv_bytes(mixed, replace(work, window=5000)) == 1_600_000


# Shapes


def test_uneven_layers_are_summed() -> None:
    small = LayerShape(4, 1, 100, 300, attention=SLIDING)
    work = replace(DECODING, phase=REQUEST, window=64)
    pairs = ((LAYER, small), (LAYER, LAYER), (small, small))
    uneven, large, little = (estimate_cost(replace(MODEL, layers=pair), DEVICE, work).seconds for pair in pairs)
    assert uneven == pytest.approx({name: (large[name] + little[name]) / 2 for name in CLASSES})


GAINS = {
    "depth": (replace(MODEL, layers=(LAYER,)), set(CLASSES) - {"head"}),
    "width": (replace(MODEL, hidden=500), {"attention", "mlp", "norms", "vector", "head", "collectives"}),
    "ffn": (resize(MODEL, ffn=500), {"mlp", "vector"}),
    "heads": (resize(MODEL, query_heads=4, kv_heads=1), {"attention", "scores", "vector"}),
    "norms": (resize(MODEL, norms=("mlp_in",)), {"norms"}),
}


@pytest.mark.parametrize("work", [DECODING, PREFILLING], ids=[DECODE, PREFILL])
@pytest.mark.parametrize("name", GAINS)
def test_each_cut_gains_in_its_own_classes(name: str, work: Workload) -> None:
    cut, classes = GAINS[name]
    work = replace(work, devices=2 if name in ("depth", "width") else 1)
    before, after = (estimate_cost(shape, DEVICE, work).seconds for shape in (MODEL, cut))
    assert {x for x in CLASSES if after[x] < before[x]} == classes
    assert not [x for x in CLASSES if after[x] > before[x]]


# Prices of a plan

UNEVEN = ModelShape(
    5003, 1001, False,
    (
        replace(LAYER, ffn=777, attention=SLIDING, norms=("attn_in", "attn_out", "mlp_in", "mlp_out")),
        replace(LAYER, biases=("q", "k", "v", "o", "gate", "down")),
        LayerShape(12, 4, 100, 1303),
    ),
)  # fmt: skip


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("phase", [PREFILL, DECODE, REQUEST])
def test_time_of_parts_adds_up(phase: str, devices: int) -> None:
    profile = make_device(memory={"cache_mib": 10, "cache_gb_per_s": 400}, rules={"tiles": {"fp16": (16, 32)}})
    work = Workload(phase, 90, 30, 2, devices=devices, window=50)
    resident = weight_bytes(UNEVEN, work, profile) + kv_bytes(UNEVEN, work)
    whole = estimate_cost(UNEVEN, profile, work).total * 1e9
    assert sum_costs(TimeCosts(profile, work, resident), UNEVEN) == pytest.approx(whole, rel=0, abs=3 * 3 + 1)
    # One device reads more than twice its cache, so nothing stays in it; an eighth of the model fits.
    assert (sum_costs(TimeCosts(profile, work, math.inf), UNEVEN) > whole + 10) == (devices == 8)


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("types", [{}, {"weights": "int8"}, {"weights": "int4", "head": "int4"}, W8A8 | {"kv": "int8"}])
def test_bytes_of_parts_add_up(types: dict[str, Any], devices: int) -> None:
    for tied, window in ((False, None), (True, None), (False, 250), (True, 250)):
        work = Workload(prompt=900, output=99, devices=devices, window=window, **types)
        shape = replace(UNEVEN, tied=tied)
        whole = estimate_cost(shape, DEVICE, work).memory_bytes
        assert sum_costs(MemoryCosts(work, "fp16"), shape) == pytest.approx(whole, rel=0, abs=3 * 4 + 1)


# Published times


def test_published_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    simulator: Any = importlib.import_module("simulator")
    errors = {row.source: (row.fitted, abs(simulator.find_error(row))) for row in simulator.ROWS}
    held = [error for fitted, error in errors.values() if not fitted]
    assert len(held) == len(errors) - 4 >= 6
    assert statistics.median(held) <= 0.15
    assert max(held) <= 0.35
    assert max(error for fitted, error in errors.values() if fitted) <= 0.05
