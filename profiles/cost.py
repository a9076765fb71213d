"""Predicted time and memory of a model on a device: (ModelShape, Profile, Workload) -> Cost. Pure arithmetic.

A forward pass is a list of operations. Each takes the longer of what it computes (padded to the device's tiles) and
what it moves (weights once per pass, keys and values, activations where no cache holds them), as far as the device
does both at once, and a fixed time on top. Operations do not overlap: runtimes for inference run them one after the
other. Times are in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from compress.shapes import FULL, LayerShape, ModelShape
from profiles.profile import Profile

PREFILL, DECODE, REQUEST = "prefill", "decode", "request"
# Bytes of one weight or activation; int4 with one 16-bit scale for each block of 32.
TYPE_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5 + 2 / 32}
CLASSES = ("attention", "mlp", "scores", "norms", "vector", "head", "collectives", "fixed")
SCALE_BYTES = 4  # a float32 scale per output channel of int8 weights
GIGA, MICRO = 1e9, 1e-6


@dataclass(frozen=True)
class Workload:
    """What is run: `phase` prefill, decode (one step at the middle of the answer) or request (prompt and answer).

    `prompt`, `output`: tokens of each sequence; `batch`: sequences at once; `weights`, `activations`, `kv`: types;
    `head`: type of the output head's weights; `devices`: tensor-parallel degree; `window`: span of sliding attention.
    """

    phase: str = DECODE
    prompt: int = 128
    output: int = 128
    batch: int = 1
    weights: str = "fp16"
    activations: str = "fp16"
    kv: str = "fp16"
    head: str = ""
    devices: int = 1
    window: int | None = None

    @property
    def context(self) -> int:
        """Tokens of a sequence when its answer is complete."""
        return self.prompt + self.output


@dataclass(frozen=True)
class Step:
    """One forward pass: `rows` new tokens of each of `batch` sequences that hold `total` tokens after it."""

    batch: int
    rows: int
    total: int

    @property
    def tokens(self) -> int:
        """New tokens of all sequences."""
        return self.batch * self.rows


@dataclass(frozen=True)
class Cost:
    """Predicted seconds by class of operation, and bytes on each device: weights, keys and values."""

    seconds: Mapping[str, float]
    weight_bytes: float
    kv_bytes: float
    tokens: float

    @property
    def total(self) -> float:
        """Seconds in all."""
        return sum(self.seconds.values())

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of all sequences together: those of the prompt in prefill, else those of the answer."""
        return self.tokens / self.total

    @property
    def memory_bytes(self) -> float:
        """Bytes that weights, keys and values take on each device."""
        return self.weight_bytes + self.kv_bytes


def pad(count: float, step: int) -> int:
    """Round up to a multiple."""
    return math.ceil(count / step) * step


@dataclass(frozen=True)
class Estimator:
    """The cost model of one device, workload and step; `resident` are the bytes that every pass touches."""

    profile: Profile
    workload: Workload
    step: Step
    resident: float = math.inf

    # Operations

    def product(self, k: float, n: float, weights: str = "", computed: float = 1.0) -> float:
        """Return the seconds of multiplying the step's tokens by a `[k, n]` matrix that is this device's part.

        `computed`: share of the tokens that goes through it (the head may see one position only).
        """
        memory = self.profile.memory
        weights = weights or self.workload.weights
        tokens = max(1.0, self.step.tokens * computed)
        size = self.padded(k, n, weights)
        speed = self.matrix_speed(weights, tokens, min(k, n))
        moved = size * TYPE_BYTES[weights] / (self.read_speed() * memory.weight_efficiency)
        # What int8 products give out is scaled back to floats at once.
        carried = tokens * (k * TYPE_BYTES[self.input_type(weights)] + n * TYPE_BYTES[self.float_type])
        moved += carried / (self.carry_speed(carried) * memory.state_efficiency)
        busy = self.busy_cores(tokens * size)
        # One row is a product of matrix and vector: moving is all of it.
        return moved / busy if tokens <= 1 else self.overlap(2 * tokens * size / speed, moved) / busy

    def busy_cores(self, size: float) -> float:
        """Return the share of the cores that a product of `size` multiply-adds keeps busy."""
        compute = self.profile.compute
        return min(1.0, max(1.0, size / compute.grain) / compute.cores) if compute.grain else 1.0

    def overlap(self, computed: float, moved: float) -> float:
        """Return the seconds of computing and moving at the same time, as far as the device can."""
        hidden = self.profile.compute.overlap * min(computed, moved)
        return computed + moved - hidden

    def padded(self, k: float, n: float, weights: str) -> float:
        """Return the entries of a matrix in whole tiles."""
        tile = self.profile.rules.tiles.get(weights, (1, 1))
        return pad(k, tile[0]) * pad(n, tile[1])

    def matrix_speed(self, weights: str, tokens: float, width: float) -> float:
        """Return operations per second of a product with so many tokens and so narrow a weight."""
        compute = self.profile.compute
        peak = compute.matrix_tflops[self.input_type(weights)] * 1e12 * compute.matrix_efficiency
        return peak * tokens / (tokens + compute.half_rows) * width / (width + compute.half_width)

    def input_type(self, weights: str) -> str:
        """Return the type that a product's inputs come in and that it computes in."""
        return "int8" if weights == self.workload.activations == "int8" else self.float_type

    @property
    def float_type(self) -> str:
        """The type that attention and vector operations compute in."""
        own = self.workload.activations
        return own if own != "int8" else self.profile.formats.activations[0]

    def read_speed(self) -> float:
        """Return bytes per second at which weights stream in, from the cache as far as it holds all of them."""
        memory = self.profile.memory
        cache = memory.cache_mib * 2**20
        if not cache or not memory.cache_gb_per_s:
            return memory.bandwidth_gb_per_s * GIGA
        # What is read in turn is evicted before it comes again: beyond the cache's size hits fall off fast.
        hit = min(1.0, max(0.0, 2.0 - self.resident / cache))
        return GIGA / (hit / memory.cache_gb_per_s + (1 - hit) / memory.bandwidth_gb_per_s)

    def carry_speed(self, size: float) -> float:
        """Return bytes per second of activations of `size` bytes: a cache holds them if they fit in half of it."""
        memory = self.profile.memory
        fits = memory.cache_gb_per_s > 0 and size <= memory.cache_mib * 2**19
        return (memory.cache_gb_per_s if fits else memory.bandwidth_gb_per_s) * GIGA

    def vector(self, elements: float) -> float:
        """Return the seconds of one vector operation over `elements`, which it reads and writes."""
        moved = 2 * elements * TYPE_BYTES[self.float_type]
        carried = moved / (self.carry_speed(moved) * self.profile.memory.state_efficiency)
        return max(self.compute_elements(elements), carried)

    def compute_elements(self, elements: float) -> float:
        """Return the seconds that the vector unit takes for `elements` that it already holds."""
        return elements / (self.profile.compute.vector_gelements_per_s * GIGA)

    # Parts of a layer

    def share(self, count: float) -> float:
        """Return one device's part of `count` that tensor parallelism splits."""
        return count / self.workload.devices

    def heads(self, layer: LayerShape) -> tuple[float, float]:
        """Return one device's rows of queries and of keys (or values); a KV head is copied where devices outnumber."""
        return self.share(layer.query), split_kv(layer, self.workload)

    def attention(self, layer: LayerShape, hidden: int) -> dict[str, float]:
        """Return the seconds of the projections and of the scores of one layer, whatever is fixed left out."""
        query, kv = self.heads(layer)
        projections = self.product(hidden, query + 2 * kv) + self.product(query, hidden)
        heads = self.step.tokens * (query + 2 * kv)
        rope = self.profile.runtime.head_passes * self.vector(heads)
        return {"attention": projections, "scores": self.scores(layer, query, kv), "vector": rope}

    def scores(self, layer: LayerShape, query: float, kv: float) -> float:
        """Return the seconds of scores, softmax and mixing, with all traffic of keys and values."""
        profile, step, work = self.profile, self.step, self.workload
        window = step.total if layer.attention == FULL or work.window is None else work.window
        span, held = min(step.total, window), min(step.total, window + step.rows - 1)
        # Causal: all rows less the triangle before the first token, which is half of the square where nothing slides.
        seen = step.rows * span - min(step.rows, span) ** 2 / 2 if step.rows > 1 else span
        computed = seen if profile.runtime.score_passes == 0 else step.rows * span  # only fused kernels skip the rest
        peak = profile.compute.matrix_tflops[self.float_type] * 1e12 * profile.compute.attention_efficiency
        heads = query / layer.head_dim if layer.head_dim else 0.0
        elements = step.batch * heads * computed
        # Where no kernel fuses attention, scaling, masking and softmax each go over the stored scores.
        passes = self.compute_elements(elements) + profile.runtime.score_passes * self.vector(elements)
        state = 2 * step.batch * held * kv * TYPE_BYTES[work.kv] * profile.runtime.state_passes
        moved = state / (self.read_speed() * profile.memory.state_efficiency)
        started = step.batch * kv / max(layer.head_dim, 1) * profile.overhead.head_us * MICRO
        return self.overlap(4 * step.batch * query * computed / peak, moved) + passes + started

    def mlp(self, layer: LayerShape, hidden: int) -> dict[str, float]:
        """Return the seconds of the MLP of one layer, whatever is fixed left out."""
        ffn = self.share(layer.ffn)
        projections = 2 * self.product(hidden, ffn) + self.product(ffn, hidden)
        return {"mlp": projections, "vector": self.vector(self.step.tokens * ffn)}

    def fixed(self, layer: LayerShape, hidden: int) -> dict[str, float]:
        """Return the seconds that a layer takes whatever its counts: norms, launches, residual adds, collectives."""
        overhead, runtime = self.profile.overhead, self.profile.runtime
        norms = len(layer.norms) * (self.vector(self.step.tokens * hidden) + overhead.vector_op_us * MICRO)
        launches = runtime.matrix_ops * overhead.matrix_op_us + runtime.vector_ops * overhead.vector_op_us
        if self.step.tokens > 1:
            launches += (runtime.matrix_ops + runtime.vector_ops) * overhead.parallel_us
        quantised = 4 if self.workload.activations == "int8" else 0  # inputs of qkv, o, gate and up, down
        vector = self.vector(self.step.tokens * hidden * (2 + quantised)) + quantised * overhead.vector_op_us * MICRO
        times = {"norms": norms, "vector": vector, "fixed": launches * MICRO}
        if self.workload.devices > 1:
            times["collectives"] = 2 * self.collective(self.step.tokens * hidden)
        return times

    def collective(self, elements: float) -> float:
        """Return the seconds of summing `elements` over all devices (ring: each link carries 2 (d - 1) / d of them)."""
        link, devices = self.profile.link, self.workload.devices
        moved = elements * TYPE_BYTES[self.float_type] * 2 * (devices - 1) / devices
        return moved / (link.bandwidth_gb_per_s * GIGA * link.efficiency) + self.profile.overhead.collective_us * MICRO

    def outside(self, vocab: int, hidden: int) -> dict[str, float]:
        """Return the seconds outside the layers: final norm, output head, the start of a pass."""
        overhead = self.profile.overhead
        seen = 1.0 if self.profile.runtime.all_logits else 1 / self.step.rows
        head = self.product(hidden, self.share(vocab), self.workload.head or self.float_type, seen)
        norm = self.vector(self.step.tokens * hidden) + overhead.vector_op_us * MICRO
        times = {"head": head, "norms": norm, "fixed": (overhead.step_us + overhead.matrix_op_us) * MICRO}
        if self.workload.devices > 1:
            times["collectives"] = overhead.collective_us * MICRO
        return times


def split_kv(layer: LayerShape, workload: Workload) -> float:
    """Return one device's rows of keys: at least one head, which is copied where devices outnumber heads."""
    return max(layer.kv / workload.devices, float(layer.head_dim)) if layer.kv else 0.0


def list_steps(workload: Workload) -> list[tuple[Step, int]]:
    """Return the forward passes of a workload, each with how many times it is run."""
    prefill = Step(workload.batch, workload.prompt, workload.prompt)
    # Time is linear in the context: the step in the middle of the answer is the mean of all.
    decode = Step(workload.batch, 1, workload.prompt + max(1, (workload.output + 1) // 2))
    steps = {PREFILL: [(prefill, 1)], DECODE: [(decode, 1)], REQUEST: [(prefill, 1), (decode, workload.output)]}
    return steps[workload.phase]


def weight_bytes(shape: ModelShape, workload: Workload, profile: Profile) -> float:
    """Return the bytes of all weights on one device."""
    exact = TYPE_BYTES[Estimator(profile, workload, Step(1, 1, 1)).float_type]
    # Keys and values are copied where devices outnumber their heads.
    copied = sum(2 * shape.hidden * (split_kv(x, workload) * workload.devices - x.kv) for x in shape.layers)
    matrices = sum(x.parameters(shape.hidden) for x in shape.layers) + copied
    rows = sum(x.query + 2 * x.kv + 2 * x.ffn + 2 * shape.hidden for x in shape.layers)
    scales = SCALE_BYTES * rows if workload.weights == "int8" else 0
    head = TYPE_BYTES[workload.head] if workload.head else exact
    ends = shape.vocab * shape.hidden * (max(head, exact) if shape.tied else head + exact)
    ends += shape.hidden * exact  # the final norm
    return (matrices * TYPE_BYTES[workload.weights] + scales + ends) / workload.devices


def kv_bytes(shape: ModelShape, workload: Workload) -> float:
    """Return the bytes of keys and values on one device when every sequence is complete."""
    spans = [
        workload.context if x.attention == FULL or workload.window is None else min(workload.context, workload.window)
        for x in shape.layers
    ]
    held = sum(split_kv(x, workload) * span for x, span in zip(shape.layers, spans, strict=True))
    return 2 * workload.batch * held * TYPE_BYTES[workload.kv]


def list_parts(shape: ModelShape, profile: Profile, workload: Workload) -> Iterator[tuple[dict[str, float], int]]:
    """Yield the seconds by class of each part of each forward pass, with how many times the pass is run."""
    resident = weight_bytes(shape, workload, profile) + kv_bytes(shape, workload)
    for step, times in list_steps(workload):
        estimator = Estimator(profile, workload, step, resident)
        for layer in shape.layers:
            for part in (estimator.attention, estimator.mlp, estimator.fixed):
                yield part(layer, shape.hidden), times
        yield estimator.outside(shape.vocab, shape.hidden), times


def estimate_cost(shape: ModelShape, profile: Profile, workload: Workload) -> Cost:
    """Return the predicted cost of a workload; uneven layers are summed one by one."""
    seconds = dict.fromkeys(CLASSES, 0.0)
    for part, times in list_parts(shape, profile, workload):
        for name, value in part.items():
            seconds[name] += times * value
    tokens = workload.batch * (workload.prompt if workload.phase == PREFILL else 1)
    if workload.phase == REQUEST:
        tokens = workload.batch * workload.output
    return Cost(seconds, weight_bytes(shape, workload, profile), kv_bytes(shape, workload), tokens)

