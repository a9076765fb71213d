"""Measure this machine as ONNX Runtime sees it: products, bandwidths, vector rate, fixed costs, and whole decoders.

Small graphs give each constant of the cost model on its own; two small random decoders, written by the exporter itself,
give what only a decoder shows: nodes per layer, the cost of a pass, how often scores and keys cross memory.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from scipy.optimize import least_squares

from backends.export_onnx import export_onnx
from backends.footprint import STREAM, open_stream
from backends.ort import OrtModel, open_onnx
from compress.checkpoint import open_checkpoint
from compress.checkpoint_writer import CheckpointWriter
from compress.shapes import ModelShape
from compress.spec import expected_tensors, resolve_model
from compress.weights import read_spec
from profiles.cost import DECODE, PREFILL, Workload, estimate_cost
from profiles.profile import Compute, Formats, Link, Memory, Overhead, Profile, Rules, Runtime

OPSET, IR_VERSION = 18, 8
QUIET = 4
GRAIN = 65536.0  # multiply-adds that ONNX Runtime gives each thread of a float32 product (MLAS_SGEMM_THREAD_COMPLEXITY)
Floats = NDArray[np.float32]
Progress = Callable[[str, int, int], None]
# Rows of the products that are timed: one (bandwidth), few, and enough for the peak.
ROWS = (32, 128, 512)
WIDE = (1024, 4096)  # K and N of a product: 16 MiB
STREAM_SECONDS = 0.25
CACHED = (1024, 2048)  # 8 MiB: inside it
# Sizes of the random decoders: hidden, FFN, heads, layers. Small ones are all fixed cost; the last one computes.
DECODERS = (
    (128, 256, 4, 2), (192, 448, 6, 10), (256, 704, 4, 6), (384, 1536, 6, 8), (512, 1408, 8, 4), (1024, 2816, 16, 3),
)  # fmt: skip
PROMPTS, CONTEXTS = (32, 128, 512), (32, 512, 960)
STEPS = 8  # decode steps that are timed at one context
ROUNDS = 3  # turns over all decoders; the median of them counts, so that one busy second spoils nothing


@dataclass(frozen=True)
class Sample:
    """One measured workload of one decoder."""

    shape: ModelShape
    workload: Workload
    seconds: float


def measure_machine(
    name: str, threads: int | None, progress: Progress, fitted: int | None = None
) -> tuple[Profile, list[Sample]]:
    """Return the profile of this machine, and all decoder timings; takes about half a minute.

    `fitted`: decoders, from the first, whose timings the profile is fitted to (None: all).
    """
    stages = 4
    progress("measure", 0, stages)
    products = [(rows, time_product(rows, *WIDE, threads)) for rows in ROWS]
    peak, half = fit_products(products)
    progress("measure", 1, stages)
    stream = open_stream(threads, STREAM)(STREAM_SECONDS) / 1e9
    cached = product_bytes(*CACHED) / time_product(1, *CACHED, threads) / 1e9
    elements, launch = time_vector(threads), time_launch(threads)
    progress("measure", 2, stages)
    start = draft_profile(name, threads, (peak, half), (stream, max(cached, stream)), (elements, launch))
    samples = measure_decoders(threads)
    progress("measure", 3, stages)
    known = samples[: len(samples) // len(DECODERS) * fitted] if fitted else samples
    profile = fit_profile(start, known)
    progress("measure", stages, stages)
    return profile, samples


# Single operations


def time_graph(nodes: list[Any], feeds: dict[str, Floats], weights: dict[str, Floats], threads: int | None) -> float:
    """Return the seconds of running a graph whose output is `y`."""
    floats = TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info(key, floats, list(value.shape)) for key, value in feeds.items()]
    outputs = [helper.make_tensor_value_info("y", floats, None)]
    tensors = [helper.make_tensor(k, floats, v.shape, v.tobytes(), raw=True) for k, v in weights.items()]
    graph = helper.make_graph(nodes, "probe", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = QUIET
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    values = {key: onnxruntime.OrtValue.ortvalue_from_numpy(value) for key, value in feeds.items()}
    return time_call(lambda: session.run_with_ort_values(None, values))


def time_call(call: Callable[[], Any], least: float = 0.25, rounds: int = 7) -> float:
    """Return the seconds of one call, over at least `rounds` calls and `least` seconds, after two to warm up.

    The lower quartile: whatever else runs on the machine only ever makes a call slower.
    """
    call(), call()
    times: list[float] = []
    while len(times) < rounds or sum(times) < least:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return float(np.quantile(times, 0.25))


def time_product(rows: int, k: int, n: int, threads: int | None) -> float:
    """Return the seconds of `[rows, k] @ [k, n]` in float32, the second a weight."""
    random = np.random.default_rng(0)
    x, w = random.standard_normal((rows, k), np.float32), random.standard_normal((k, n), np.float32)
    return time_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": x}, {"w": w}, threads)


def product_bytes(k: int, n: int) -> float:
    """Return the bytes of a float32 weight."""
    return 4.0 * k * n


def fit_products(times: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Return the peak in TFLOPS and the rows at which half of it is reached: time = (rows + half) * work / peak."""
    work = 2.0 * WIDE[0] * WIDE[1]
    rows = np.array([row for row, _ in times], dtype=float)
    seconds = np.array([second for _, second in times])
    # Weighted by the inverse of the time, so that every size counts by its relative error.
    design = np.stack([rows * work, np.full_like(rows, work)], 1) / seconds[:, None]
    slope, start = np.linalg.lstsq(design, np.ones_like(rows), rcond=None)[0]
    slope = slope if slope > 0 else seconds[-1] / (rows[-1] * work)
    return 1e-12 / slope, max(0.0, start / slope)


def time_vector(threads: int | None) -> float:
    """Return 10^9 elements per second of an activation times a gate, counted as two operations."""
    x = np.random.default_rng(0).standard_normal((256, 2048), np.float32)
    nodes = [helper.make_node("Sigmoid", ["x"], ["s"]), helper.make_node("Mul", ["x", "s"], ["y"])]
    return 2 * x.size / time_graph(nodes, {"x": x}, {}, threads) / 1e9


def time_launch(threads: int | None, count: int = 200) -> float:
    """Return the microseconds of one tiny operation in a long chain."""
    x = np.ones((1, 64), np.float32)
    names = ["x", *(f"t{place}" for place in range(count - 1)), "y"]
    # Two different functions in turns: runtimes fold a chain of one.
    kinds = ("Sin", "Tanh")
    nodes = [helper.make_node(kinds[i % 2], [names[i]], [names[i + 1]]) for i in range(count)]
    return 1e6 * time_graph(nodes, {"x": x}, {}, threads) / count


def find_cache() -> float:
    """Return the MiB of the largest cache that the system names; 0 where it names none."""
    sizes = [0.0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        unit = {"K": 1 / 1024, "M": 1.0, "G": 1024.0}.get(text[-1:], 0.0)
        sizes.append(float(text[:-1]) * unit if unit else 0.0)
    return max(sizes)


def count_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def find_memory() -> float:
    """Return the GiB of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


# Whole decoders


def write_decoder(folder: Path, size: tuple[int, int, int, int]) -> Path:
    """Write a random decoder of given hidden width, FFN width, heads and depth; the shipped demo is its pattern."""
    hidden, ffn, heads, layers = size
    pattern = json.loads((Path(__file__).parents[1] / "compress/demo/checkpoint/config.json").read_text("utf-8"))
    config = {
        **pattern, "hidden_size": hidden, "intermediate_size": ffn, "num_attention_heads": heads,
        "num_key_value_heads": heads // 2, "head_dim": hidden // heads, "num_hidden_layers": layers,
    }  # fmt: skip
    write_random(folder, config)
    return folder


def write_random(folder: Path, config: dict[str, Any]) -> None:
    """Write a checkpoint of a config with random weights."""
    random = torch.Generator().manual_seed(0)
    with CheckpointWriter(folder, config) as writer:
        for name, shape in expected_tensors(resolve_model(config, None)).items():
            values = torch.randn(shape, generator=random) * 0.02
            writer.add(name, values if len(shape) > 1 else values + 1)
        writer.finish()


def measure_decoders(threads: int | None) -> list[Sample]:
    """Export the random decoders and time prefill and decode at several lengths, in several turns."""
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lightpress-measure-")))
        models = []
        for place, size in enumerate(DECODERS):
            checkpoint = open_checkpoint(write_decoder(root / f"decoder{place}", size))
            export_onnx(checkpoint, root / f"onnx{place}")
            models.append((open_onnx(root / f"onnx{place}", threads), read_spec(checkpoint).shape))
        turns = [[sample for model in models for sample in time_decoder(*model)] for _ in range(ROUNDS)]
    medians = [statistics.median(one.seconds for one in same) for same in zip(*turns, strict=True)]
    return [replace(sample, seconds=seconds) for sample, seconds in zip(turns[0], medians, strict=True)]


def time_decoder(model: OrtModel, shape: ModelShape) -> list[Sample]:
    """Time prefill of several prompts, and single steps after several contexts."""
    base = Workload(weights="fp32", activations="fp32", kv="fp32", output=1)
    found = [
        Sample(shape, replace(base, phase=PREFILL, prompt=prompt), time_prefill(model, prompt)) for prompt in PROMPTS
    ]
    for context in CONTEXTS:
        work = replace(base, phase=DECODE, prompt=context, output=STEPS)
        found.append(Sample(shape, work, time_decode(model, context, STEPS)))
    return found


def time_prefill(model: OrtModel, prompt: int, least: float = 0.05) -> float:
    """Return the seconds of one prefill."""
    ids = np.random.default_rng(0).integers(0, model.vocab, (1, prompt), dtype=np.int64)
    return time_call(lambda: model.prefill(ids, every=False), least, 3)


def time_decode(model: OrtModel, context: int, steps: int, least: float = 0.05) -> float:
    """Return the mean seconds of one of `steps` decode steps after `context` tokens."""
    ids = np.random.default_rng(0).integers(0, model.vocab, (1, context + steps), dtype=np.int64)
    _, start = model.prefill(ids[:, :context])

    def run() -> None:
        cache = start
        for place in range(context, context + steps):
            _, cache = model.decode(ids[:, place : place + 1], cache)

    return time_call(run, least, 3) / steps


# From timings to a profile


def draft_profile(
    name: str,
    threads: int | None,
    product: tuple[float, float],
    bandwidths: tuple[float, float],
    vector: tuple[float, float],
) -> Profile:
    """Return the profile of the single operations; what decoders add is still a guess."""
    peak, half = product
    stream, cached = bandwidths
    elements, launch = vector
    count, cache = threads or count_cores(), find_cache()
    return Profile(
        name, f"This machine, measured with ONNX Runtime {onnxruntime.__version__} on {count} threads.", "cpu",
        Compute({"fp32": round_number(peak)}, 1.0, 0.5, half, 0.5, elements, 32.0, count, GRAIN),
        Memory(round(find_memory(), 1), round_number(stream), 1.0, 1.0, cache, round_number(cached) if cache else 0.0),
        Overhead(round_number(launch), round_number(launch), 0.0, 10.0, 4.0, 1.0),
        Link(1, 0.0, 1.0),
        Rules({"fp32": (1, 1)}, 16, 1, 1, uneven_layers=True),
        Formats(("fp32",), ("fp32",), ("fp32",), ()),
        Runtime("onnxruntime", "onnx", 2.0, 0.5, 1.5, 8.0, 4.0, all_logits=False),
        {section: "measured by lightpress profiles measure" for section in SECTIONS},
    )  # fmt: skip


SECTIONS = ("compute", "memory", "overhead", "link", "rules", "runtime")
# What decoders tell: start, least and most of each constant, and how far it may well lie from its start (standard
# deviation of its logarithm): single operations tell some constants well, and others not at all.
FITTED: dict[str, tuple[float, float, float, float]] = {
    "step_us": (20.0, 0.1, 1e4, 1.0),
    "vector_ops": (8.0, 0.5, 400.0, 0.7),
    "matrix_op_us": (3.0, 0.1, 50.0, 0.7),
    "parallel_us": (4.0, 0.1, 50.0, 0.7),
    "head_us": (1.0, 0.05, 50.0, 0.7),
    "state_passes": (1.5, 0.2, 30.0, 0.5),
    "head_passes": (2.0, 0.2, 60.0, 0.5),
    "score_passes": (0.5, 0.02, 60.0, 0.7),
    "attention_efficiency": (0.6, 0.2, 1.0, 0.3),
    "half_rows": (12.0, 0.5, 100.0, 0.7),
    "half_width": (32.0, 1.0, 400.0, 0.7),
    "overlap": (0.7, 0.1, 1.0, 0.3),
    "peak_share": (1.0, 0.5, 2.0, 0.3),
    "bandwidth_share": (1.0, 0.5, 2.0, 0.2),
    "vector_share": (0.8, 0.1, 2.0, 0.2),
    "cache_share": (0.8, 0.2, 1.0, 0.3),
}
NOISE = 0.08  # standard deviation of the logarithm of one timing


def apply_constants(profile: Profile, values: dict[str, float]) -> Profile:
    """Return the profile with some constants replaced."""
    parts: dict[str, Any] = {}
    for part in ("compute", "memory", "overhead", "runtime"):
        own = getattr(profile, part)
        parts[part] = replace(own, **{key: value for key, value in values.items() if hasattr(own, key)})
    compute, memory = profile.compute, profile.memory
    parts["compute"] = replace(
        parts["compute"],
        matrix_tflops={"fp32": compute.matrix_tflops["fp32"] * values["peak_share"]},
        # A decoder has more vector operations than the model counts: their rate makes up for it.
        vector_gelements_per_s=compute.vector_gelements_per_s * values["vector_share"],
    )
    parts["memory"] = replace(
        parts["memory"],
        bandwidth_gb_per_s=memory.bandwidth_gb_per_s * values["bandwidth_share"],
        # Others on the machine have their part of a shared cache.
        cache_mib=memory.cache_mib * values["cache_share"],
    )
    return replace(profile, **parts)


def fit_profile(start: Profile, samples: Sequence[Sample]) -> Profile:
    """Return the profile whose predictions come nearest to the samples, by the logarithm of their ratio."""
    names = list(FITTED)
    first, low, high = (np.log([FITTED[name][place] for name in names]) for place in range(3))
    trust = np.array([FITTED[name][3] for name in names])

    def miss(logs: NDArray[np.float64]) -> NDArray[np.float64]:
        profile = apply_constants(start, dict(zip(names, np.exp(logs).tolist(), strict=True)))
        ratios = [estimate_cost(one.shape, profile, one.workload).total / one.seconds for one in samples]
        return np.concatenate((np.log(ratios) / NOISE, (logs - first) / trust))

    # A robust loss: on a shared machine some timings are far off.
    found = least_squares(miss, first, bounds=(low, high), loss="soft_l1")
    return round_profile(apply_constants(start, dict(zip(names, np.exp(found.x).tolist(), strict=True))))


def round_profile(profile: Profile) -> Profile:
    """Return the profile with four digits of each measured number, as many as a file should show."""
    parts: dict[str, Any] = {}
    for part in ("compute", "memory", "overhead", "runtime"):
        own = getattr(profile, part)
        numbers = {item.name: getattr(own, item.name) for item in fields(own)}
        parts[part] = replace(own, **{k: round_number(v) for k, v in numbers.items() if isinstance(v, float)})
    peaks = {name: round_number(value) for name, value in profile.compute.matrix_tflops.items()}
    return replace(profile, **{**parts, "compute": replace(parts["compute"], matrix_tflops=peaks)})


def round_number(value: float, digits: int = 4) -> float:
    """Round to some significant digits."""
    return 0.0 if value == 0 else round(float(value), digits - 1 - math.floor(math.log10(abs(value))))
