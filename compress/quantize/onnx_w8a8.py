"""Layers whose products have 8-bit weights and 8-bit inputs on ONNX Runtime (com.microsoft.DynamicQuantizeMatMul).

A weight has one scale per output and no zero point. Inputs become uint8 when the graph runs, with one scale and zero
point for all rows of a step together (ONNX, DynamicQuantizeLinear). One token of massive activations then makes the
grid coarse for every token beside it. What that costs a group of products (q, k, v; o; gate, up; down) is measured on
whole windows, first tokens and sinks included, as the graph will meet them; a group that loses more than a limit keeps
8-bit weights in blocks (MatMulNBits), whose inputs have a scale for each block of each row (the rule is ours).

Smoothing, GPTQ and the refit are those of compress.quantize.w8a8_stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from compress.checkpoint import Checkpoint
from compress.decoder import compute_logits
from compress.errors import UserError
from compress.quantize.blocks import Format, Quantised
from compress.quantize.ends import HIGH as HIGH_BITS
from compress.quantize.ends import LOW as LOW_BITS
from compress.quantize.ends import EndChoice, fill_quantised
from compress.quantize.gptq import quantise_readers
from compress.quantize.stream import SPILL_BYTES, LayerQuantiser, WeightForm
from compress.quantize.w8a8 import DYNAMIC, LinearForm, Matrix, QuantisedLinear, multiply_exactly
from compress.quantize.w8a8_stream import SINK_SLACK, GroupLoss, LinearQuantiser, Reader
from compress.spec import ModelSpec
from compress.text import Windows
from compress.weights import read_head

METHODS = ("gptq", "nearest")
BLOCKS = "BLOCKS"  # what became of a group that loses too much: 8-bit weights in blocks
TOP, MIDDLE = 255, 128  # the largest code of an input, and the code that is moved to 0 to have them all within int8
# What a product may lose of its output's energy. Measured through the graph (benchmarks/quantise.py --inputs): the
# `down` of stories260K lose 0.001 each, and the perplexity is 0.34 % above the dense one; those of the books model lose
# 0.002 and more, five of eight fall back, and the excess is 0.17 % instead of 0.32 %.
LIMIT = 0.002
# Strength of smoothing. Weights, in 8 bits a row by GPTQ, lose far less than inputs on a shared grid do: more of the
# inputs' range moves into them than the usual half (books: excess 0.32 % instead of 0.47 % where nothing falls back).
ALPHA = 0.8
GraphMatrix = Tensor | Quantised | QuantisedLinear


def encode_step(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes 0 .. 255 of `x` `[..., tokens, in]`, and scale and zero point `[..., 1, 1]` of each step.

    All rows of a step share a grid, which holds 0 (ONNX, DynamicQuantizeLinear, in float32 as it says). Values and
    zero point are rounded half to even; a step of zeros has scale 1.
    """
    low = x.amin((-2, -1), keepdim=True).clamp(max=0)
    high = x.amax((-2, -1), keepdim=True).clamp(min=0)
    scale = (high - low) / TOP
    scale = torch.where(scale > 0, scale, 1.0)
    zero = (-low / scale).round_().clamp_(0, TOP)
    return (x / scale).round_().add_(zero).clamp_(0, TOP), scale, zero


class StepLinear(QuantisedLinear):
    """A projection whose inputs `[..., tokens, in]` are rounded on one grid for all tokens of a step."""

    @classmethod
    def take(cls, linear: QuantisedLinear) -> StepLinear:
        """Return the projection with its inputs rounded so."""
        return cls(**{item.name: getattr(linear, item.name) for item in fields(linear)})

    def round_inputs(self, x: Tensor) -> Tensor:
        """Return the inputs as the codes hold them."""
        codes, scale, zero = encode_step(x)
        return (codes - zero) * scale

    def apply(self, x: Tensor) -> Tensor:
        """Return the output `[..., tokens, out]`, integers exact, factors joined first as ONNX Runtime does."""
        codes, scale, zero = encode_step(x)
        shift = (zero - MIDDLE).to(torch.int32) * self.codes.sum(1, dtype=torch.int32)
        sums = multiply_exactly(codes - MIDDLE, self.codes) - shift
        y = sums.float() * (scale * self.weight_scale)
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class StepForm:
    """How weights are rounded (gptq, or nearest without text), the block where they have blocks, and the limit.

    `ends`: bits of embedding and head, as in compress.quantize.stream.WeightForm. `limit`: squared output error over
    squared output that a product may lose, ordinary tokens and sinks apart (these may lose `SINK_SLACK` times that).
    """

    method: str = METHODS[0]
    block: int = 32
    ends: str = "auto"
    limit: float = LIMIT
    alpha: float | None = ALPHA

    def __post_init__(self) -> None:
        """Refuse what does not exist."""
        if self.method not in METHODS:
            raise UserError(
                f"Weights with 8-bit inputs cannot be quantised by {self.method}: choose one of {', '.join(METHODS)}."
            )


class StepQuantiser(LinearQuantiser):
    """Quantises layers in order, then embedding and head; use in a `with` block, which frees the streams."""

    def __init__(
        self, checkpoint: Checkpoint, spec: ModelSpec, form: StepForm, windows: Windows | None = None,
        spill_bytes: int = SPILL_BYTES,
    ) -> None:  # fmt: skip
        """Start; raises UserError where GPTQ has no text. Without text every product has 8-bit inputs, unmeasured."""
        learns = form.method == METHODS[0]
        if learns and windows is None:
            raise UserError("GPTQ needs calibration text to know what the weights read; give some, or another method.")
        own = LinearForm(DYNAMIC, torch.float32, gptq=learns, alpha=form.alpha, fallback="", limit=form.limit)
        super().__init__(checkpoint, spec, own, windows if learns else None, spill_bytes)
        self.ends = LayerQuantiser(checkpoint, spec, WeightForm(HIGH_BITS, form.block, True, "nearest", form.ends))
        self.blocks: dict[str, Quantised] = {}
        self.done = 0
        if self.windows is not None:
            # What the layers see are embeddings as they will be stored.
            bits = LOW_BITS if form.ends == str(LOW_BITS) else HIGH_BITS
            small = self.ends.end_form(bits).quantise
            fill_quantised(checkpoint, spec, self.windows, self.streams[1], small)

    def __enter__(self) -> StepQuantiser:
        return self

    # Layers

    def quantise_layer(self, index: int, weights: Mapping[str, Tensor]) -> dict[str, GraphMatrix]:  # type: ignore[override]
        """Return one layer's tensors by role, its projections quantised; layers come in order."""
        self.blocks = {}
        found: dict[str, GraphMatrix] = {**super().quantise_layer(index, weights), **self.blocks}
        self.done, self.blocks = index + 1, {}
        return found

    def quantise_group(
        self, index: int, roles: tuple[str, ...], current: dict[str, Tensor], read: Reader, gram: Tensor
    ) -> dict[str, Matrix]:
        """Return projections that read the same, with 8-bit inputs, or dequantised from blocks where that is too much.

        The blocks themselves are kept for the end of the layer: the streams run on floats.
        """
        made = self.quantise_as(DYNAMIC, roles, current, read, gram)
        loss = self.measure_worst(index, roles, current, made, read)
        fits = loss.ordinary <= self.form.limit and loss.sinks <= SINK_SLACK * self.form.limit
        self.report.groups.append(replace(loss, kind=DYNAMIC if fits else BLOCKS))
        if fits:
            return made
        small = quantise_readers([current[role] for role in roles], gram, Format(HIGH_BITS, self.ends.form.block, True))
        self.blocks |= dict(zip(roles, small, strict=True))
        return {role: self.blocks[role].dequantise() for role in roles}

    def quantise_as(
        self, kind: str, roles: tuple[str, ...], current: dict[str, Tensor], read: Reader, gram: Tensor
    ) -> dict[str, Matrix]:
        """Quantise projections, inputs rounded a step at a time."""
        found = super().quantise_as(kind, roles, current, read, gram)
        return {
            role: StepLinear.take(made) if isinstance(made, QuantisedLinear) else made for role, made in found.items()
        }

    def measure_worst(
        self, index: int, roles: tuple[str, ...], current: dict[str, Tensor], made: Mapping[str, Matrix], read: Reader
    ) -> GroupLoss:
        """Return the greatest losses of a group's projections: large queries do not hide what small values lose."""
        found = [self.measure_loss(index, (role,), current, {role: made[role]}, read) for role in roles]
        ordinary, sinks = max(one.ordinary for one in found), max(one.sinks for one in found)
        return GroupLoss(index, roles, ordinary, sinks, "")

    # What an export asks for (backends.export_onnx.Quantiser)

    @property
    def choice(self) -> EndChoice | None:
        """Bits of embedding and head, once they are made."""
        return self.ends.choice

    def estimate_bytes(self) -> int:
        """Return about the bytes of all weights as they will be stored, rather too many."""
        return self.ends.estimate_bytes()

    def sample_logits(self, count: int) -> tuple[Tensor, Tensor]:
        """Return ids `[windows, length]` and logits of the first windows behind all quantised layers.

        The head is the dense one; ValueError before the last layer, and without text.
        """
        if self.windows is None or self.done < len(self.spec.layers):
            raise ValueError("there are no logits before the last layer, or without text")
        count = min(count, len(self.windows.ids))
        ends = read_head(self.checkpoint, self.spec, torch.float32)
        return self.windows.ids[:count], compute_logits(self.spec, ends, self.streams[1].read(0, count))

    def quantise_ends(self, checkpoint: Checkpoint, spec: ModelSpec) -> tuple[Quantised | None, Quantised | None]:
        """Return embedding and head in blocks, one object where a tied model's are alike."""
        return self.ends.quantise_ends(checkpoint, spec)
