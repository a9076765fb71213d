"""All layers quantised one after the other, each on the stream that the quantised layers before it leave.

Readers of the stream (q, k, v, gate, up) are rounded by GPTQ on what they now read. The last projection of a branch is
first refitted so that the stream meets the dense one again (the residual-corrected target of the repair,
reference/quality.md), then rounded by GPTQ: later layers take back what earlier ones lost (our combination).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.calibrate import fill_embeddings
from compress.checkpoint import Checkpoint
from compress.decoder import apply_norm, make_frame, project
from compress.errors import UserError
from compress.hidden import HiddenStore, batches, release_memory
from compress.quantize.blocks import Format, Quantised, round_to_nearest, search_scales
from compress.quantize.gptq import quantise_gptq
from compress.solve import solve_projection
from compress.spec import ModelSpec
from compress.stats import Moments, ordinary_tokens
from compress.surgery.job import ATTENTION, MLP, Half, half_inputs
from compress.text import Windows

METHODS = ("gptq", "search", "nearest")
Matrix = Tensor | Quantised
# The refit before rounding holds on to the weights more than a repair does: nothing was cut.
REFIT_RIDGE = 1e-2
# Embedding and head are looked at by every token, and keep 8 bits: that costs a little space and next to no accuracy.
END_BITS = 8
HALVES = (ATTENTION, MLP)


@dataclass(frozen=True)
class WeightForm:
    """How weights are stored: bits, block of inputs that share a scale, whether zero is the middle code; the method."""

    bits: int
    block: int = 32
    symmetric: bool = False
    method: str = "gptq"

    def __post_init__(self) -> None:
        """Refuse what does not exist."""
        Format(self.bits, self.block, self.symmetric)
        if self.method not in METHODS:
            raise UserError(f"Weights cannot be quantised by {self.method}: choose one of {', '.join(METHODS)}.")

    def quantise(self, weight: Tensor, gram: Tensor | None = None) -> Quantised:
        """Quantise one weight `[out, in]`, by GPTQ where the Gram matrix of its inputs is given."""
        if self.method == "gptq" and gram is not None:
            return quantise_gptq(weight, gram, self.bits, self.block, self.symmetric)
        if self.method == "nearest":
            return round_to_nearest(weight, self.bits, self.block, self.symmetric)
        return search_scales(weight, self.bits, self.block, self.symmetric)


class LayerQuantiser:
    """Quantises layers in order; use in a `with` block, which frees the two streams."""

    def __init__(
        self, checkpoint: Checkpoint, spec: ModelSpec, form: WeightForm, windows: Windows | None = None,
        spill_bytes: int = 2**30,
    ) -> None:  # fmt: skip
        """Start; GPTQ needs calibration windows. Raises UserError without them."""
        if form.method == "gptq" and windows is None:
            raise UserError("GPTQ needs calibration text to know what the weights read; give some, or another method.")
        self.checkpoint, self.spec, self.form = checkpoint, spec, form
        self.windows = windows if form.method == "gptq" else None
        self.streams: tuple[HiddenStore, ...] = ()
        if self.windows is not None:
            shape = (*self.windows.ids.shape, spec.shape.hidden)
            self.streams = (HiddenStore(shape, spill_bytes), HiddenStore(shape, spill_bytes))
            for store in self.streams:
                fill_embeddings(checkpoint, spec, self.windows, store)

    def __enter__(self) -> LayerQuantiser:
        return self

    def __exit__(self, *error: object) -> None:
        for store in self.streams:
            store.__exit__(None, None, None)

    def quantise_ends(self, checkpoint: Checkpoint, spec: ModelSpec) -> tuple[Quantised | None, Quantised | None]:
        """Return embedding and head in 8 bits; a tied model's are one object, so that they are stored once."""
        form = WeightForm(END_BITS, self.form.block, symmetric=True, method="nearest")
        embed = form.quantise(checkpoint.read_one(spec.names["embed"], torch.float32))
        if spec.shape.tied or spec.names["embed"] == spec.names["head"]:
            return embed, embed
        return embed, form.quantise(checkpoint.read_one(spec.names["head"], torch.float32))

    def quantise_layer(self, index: int, weights: Mapping[str, Matrix]) -> dict[str, Matrix]:
        """Return one layer's weights by role with its matrices quantised; layers must come in order."""
        dense = {role: tensor for role, tensor in weights.items() if isinstance(tensor, Tensor)}
        found: dict[str, Matrix] = dict(dense)
        current = dict(dense)
        for half in HALVES:
            if self.windows is None:
                found |= {role: self.form.quantise(dense[role]) for role in (*half.readers, half.projection)}
            else:
                self.quantise_half(index, half, dense, found, current)
        release_memory()
        return found

    def quantise_half(
        self, index: int, half: Half, dense: dict[str, Tensor], found: dict[str, Matrix], current: dict[str, Tensor]
    ) -> None:
        """Quantise one branch, into `found` and (as floats) `current`, and advance both streams past it."""
        gram = self.collect_reads(half, current)
        for role in half.readers:
            self.replace(role, self.form.quantise(dense[role], gram), found, current)
        self.advance(index, half, dense, self.streams[0])
        moments = self.collect_inputs(index, half, current)
        weight, shift = current[half.projection], current.get(f"{half.projection}_bias")
        if half.norm not in dense:  # behind a norm the wanted output is known up to a factor only
            weight, shift = solve_projection(moments, weight, shift, REFIT_RIDGE)
        if shift is not None:
            found[f"{half.projection}_bias"] = current[f"{half.projection}_bias"] = shift
        self.replace(half.projection, self.form.quantise(weight, moments.gram), found, current)
        self.advance(index, half, current, self.streams[1])

    def replace(self, role: str, small: Quantised, found: dict[str, Matrix], current: dict[str, Tensor]) -> None:
        """Put a quantised weight in place."""
        found[role], current[role] = small, small.dequantise()

    def spans(self) -> Iterable[tuple[int, int]]:
        """Return groups of windows."""
        assert self.windows is not None
        return batches(*self.windows.ids.shape)

    def collect_reads(self, half: Half, current: Mapping[str, Tensor]) -> Tensor:
        """Return the Gram matrix of what the half reads from the quantised stream."""
        moments = Moments.empty(self.spec.shape.hidden)
        for start, stop in self.spans():
            x = self.streams[1].read(start, stop)
            moments.update(apply_norm(self.spec, current, half.reads, x[ordinary_tokens(x)[0]]))
        return moments.gram

    def run_inputs(self, index: int, half: Half, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Return the inputs of the half's last projection."""
        return half_inputs(self.spec, index, half, weights, x, make_frame(self.spec, *x.shape[:2]))

    def collect_inputs(self, index: int, half: Half, current: Mapping[str, Tensor]) -> Moments:
        """Return the moments of the last projection's inputs, with what it should add to the stream as target."""
        width, hidden = current[half.projection].shape[1], self.spec.shape.hidden
        wanted = half.norm not in current
        moments = Moments.empty(width, hidden if wanted else 0)
        for start, stop in self.spans():
            x = self.streams[1].read(start, stop)
            mask, _ = ordinary_tokens(x)
            inputs = self.run_inputs(index, half, current, x)[mask]
            if wanted:
                target = (self.streams[0].read(start, stop) - x)[mask] / self.spec.residual_multiplier
                moments.update(inputs, target)
            else:
                moments.update(inputs)
        return moments

    def advance(self, index: int, half: Half, weights: Mapping[str, Tensor], store: HiddenStore) -> None:
        """Run one branch over a stream."""
        for start, stop in self.spans():
            x = store.read(start, stop)
            raw = project(weights, half.projection, self.run_inputs(index, half, weights, x))
            store.write(start, x + apply_norm(self.spec, weights, half.norm, raw) * self.spec.residual_multiplier)
