"""Costs of the parts of a shape, in whole units, for a plan to spend a budget on: nanoseconds, or bytes on a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from compress.shapes import LayerShape, ModelShape
from profiles.cost import SCALE_BYTES, TYPE_BYTES, Estimator, Workload, list_steps, split_kv
from profiles.profile import Profile

NANO = 1e9
Part = Callable[[Estimator], Mapping[str, float]]


class TimeCosts:
    """Nanoseconds of a workload on a device, all its forward passes together.

    `resident`: bytes that a pass touches, taken as those of the planned model; they decide what a cache holds.
    """

    def __init__(self, profile: Profile, workload: Workload, resident: float) -> None:
        """Prepare one estimator for each kind of forward pass."""
        steps = list_steps(workload)
        self.passes = [(Estimator(profile, workload, step, resident), times) for step, times in steps]

    def attention(self, layer: LayerShape, hidden: int) -> int:
        """Return the time of projections, rotary embedding, scores and mixing."""
        return self.sum_passes(lambda passed: passed.attention(layer, hidden))

    def mlp(self, layer: LayerShape, hidden: int) -> int:
        """Return the time of gate, up, activation and down."""
        return self.sum_passes(lambda passed: passed.mlp(layer, hidden))

    def fixed(self, layer: LayerShape, hidden: int) -> int:
        """Return the time of norms, residual adds, launches and collectives."""
        return self.sum_passes(lambda passed: passed.fixed(layer, hidden))

    def outside(self, shape: ModelShape) -> int:
        """Return the time of final norm and head, and of starting a pass."""
        return self.sum_passes(lambda passed: passed.outside(shape.vocab, shape.hidden))

    def sum_passes(self, part: Part) -> int:
        """Return the whole nanoseconds of one part over all passes."""
        return round(NANO * sum(times * sum(part(passed).values()) for passed, times in self.passes))


class MemoryCosts:
    """Bytes of weights, and of keys and values at the workload's full context and batch, on each device."""

    def __init__(self, workload: Workload, exact: str) -> None:
        """`exact` is the type of what is not quantised: embeddings, and an output head without a type of its own."""
        self.workload, self.exact = workload, exact

    def attention(self, layer: LayerShape, hidden: int) -> int:
        """Return the bytes of the projections and of keys and values."""
        work = self.workload
        weights = layer.resize(ffn=0).parameters(hidden) - layer.resize(0, 0).parameters(hidden)
        weights += round(2 * hidden * (split_kv(layer, work) * work.devices - layer.kv))
        span = min(work.context, work.window or work.context) if layer.attention != "full_attention" else work.context
        kept = split_kv(layer, work) * span
        return self.count(weights, layer.query + 2 * layer.kv) + round(2 * work.batch * kept * TYPE_BYTES[work.kv])

    def mlp(self, layer: LayerShape, hidden: int) -> int:
        """Return the bytes of gate, up and down."""
        return self.count(layer.resize(0).parameters(hidden) - layer.resize(0, 0).parameters(hidden), 2 * layer.ffn)

    def fixed(self, layer: LayerShape, hidden: int) -> int:
        """Return the bytes of norms and output biases."""
        return self.count(layer.resize(0, 0).parameters(hidden), 2 * hidden)

    def outside(self, shape: ModelShape) -> int:
        """Return the bytes of embeddings, head and final norm."""
        exact = TYPE_BYTES[self.exact]
        head = TYPE_BYTES[self.workload.head] if self.workload.head else exact
        ends = shape.vocab * shape.hidden * (max(head, exact) if shape.tied else head + exact)
        return round((ends + shape.hidden * exact) / self.workload.devices)

    def count(self, weights: int, rows: int) -> int:
        """Return the bytes of weights with `rows` outputs in all on one device."""
        scales = SCALE_BYTES * rows if self.workload.weights == "int8" else 0
        return round((weights * TYPE_BYTES[self.workload.weights] + scales) / self.workload.devices)


