"""All layers quantised one after the other, each on the stream that the quantised layers before it leave.

Readers of the stream (q, k, v, gate, up) are rounded by GPTQ on what they now read. The last projection of a branch is
first refitted so that the stream meets the dense one again (the residual-corrected target of the repair,
reference/quality.md), then rounded by GPTQ: later layers take back what earlier ones lost (our combination). Embedding
and head come last, when what 4 bits would cost them can be measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.calibrate import fill_embeddings
from compress.checkpoint import Checkpoint
from compress.decoder import apply_norm, compute_logits, make_frame, project
from compress.errors import UserError
from compress.hidden import HiddenStore, batches, release_memory
from compress.quantize.blocks import Format, Quantised, round_to_nearest, search_scales
from compress.quantize.ends import (
    ENDS,
    HIGH,
    LOW,
    EndChoice,
    Trial,
    choose_bits,
    fill_quantised,
    measure_ends,
    quantise_matrix,
    split_windows,
)
from compress.quantize.gptq import plan_walks, quantise_gptq, quantise_part, quantise_readers
from compress.solve import solve_projection
from compress.spec import ModelSpec
from compress.stats import Moments, ordinary_tokens
from compress.surgery.job import ATTENTION, MLP, Half, half_inputs
from compress.text import Windows
from compress.weights import read_head, read_norm

METHODS = ("gptq", "search", "nearest")
Matrix = Tensor | Quantised
# The refit before rounding holds on to the weights more than a repair does: nothing was cut.
REFIT_RIDGE = 1e-2
HALVES = (ATTENTION, MLP)
SPILL_BYTES = 2**25  # streams above it go to files: exporting is to hold a layer and half a gigabyte


@dataclass(frozen=True)
class WeightForm:
    """How weights are stored: bits, block of inputs that share a scale, whether zero is the middle code; the method.

    `ends`: bits of embedding and head, `8`, `4`, or `auto`: 8, or 4 where all else has 4 and the model bears it.
    """

    bits: int
    block: int = 32
    symmetric: bool = False
    method: str = "gptq"
    ends: str = "auto"

    def __post_init__(self) -> None:
        """Refuse what does not exist."""
        Format(self.bits, self.block, self.symmetric)
        if self.method not in METHODS:
            raise UserError(f"Weights cannot be quantised by {self.method}: choose one of {', '.join(METHODS)}.")
        if self.ends not in ENDS:
            raise UserError(f"Embedding and head cannot have {self.ends} bits: choose one of {', '.join(ENDS)}.")

    def quantise(self, weight: Tensor, gram: Tensor | None = None) -> Quantised:
        """Quantise one weight `[out, in]`, by GPTQ where the Gram matrix of its inputs is given."""
        if self.method == "gptq" and gram is not None:
            return quantise_gptq(weight, gram, self.bits, self.block, self.symmetric)
        if self.method == "nearest":
            return round_to_nearest(weight, self.bits, self.block, self.symmetric)
        return search_scales(weight, self.bits, self.block, self.symmetric)


class LayerQuantiser:
    """Quantises layers in order, then embedding and head; use in a `with` block, which frees the streams."""

    def __init__(
        self, checkpoint: Checkpoint, spec: ModelSpec, form: WeightForm, windows: Windows | None = None,
        spill_bytes: int = SPILL_BYTES,
    ) -> None:  # fmt: skip
        """Start; GPTQ needs calibration windows. Raises UserError without them."""
        if form.method == "gptq" and windows is None:
            raise UserError("GPTQ needs calibration text to know what the weights read; give some, or another method.")
        self.checkpoint, self.spec, self.form, self.spill_bytes = checkpoint, spec, form, spill_bytes
        self.windows = windows if form.method == "gptq" else None
        self.streams: tuple[HiddenStore, ...] = ()
        self.trial: Trial | None = None
        self.choice: EndChoice | None = None
        self.done = 0
        if self.windows is not None:
            self.start_streams(self.windows)

    def start_streams(self, windows: Windows) -> None:
        """Fill the streams with embeddings; what the quantised layers see are embeddings as they will be stored."""
        held = None
        if self.form.ends == "auto" and self.form.bits == LOW:
            self.windows, held = split_windows(windows)
        assert self.windows is not None
        bits = LOW if self.form.ends == str(LOW) else HIGH
        self.streams = self.open_stream(self.windows, 0), self.open_stream(self.windows, bits)
        if held is not None:
            self.trial = Trial(*(self.open_stream(held, bits) for bits in (0, HIGH, LOW)))

    def open_stream(self, windows: Windows, bits: int) -> HiddenStore:
        """Return the embeddings of windows, in so many bits (0: as they are)."""
        store = HiddenStore((*windows.ids.shape, self.spec.shape.hidden), self.spill_bytes)
        if bits:
            fill_quantised(self.checkpoint, self.spec, windows, store, self.end_form(bits).quantise)
        else:
            fill_embeddings(self.checkpoint, self.spec, windows, store)
        return store

    def __enter__(self) -> LayerQuantiser:
        return self

    def __exit__(self, *error: object) -> None:
        for store in (*self.dense_streams(), *self.small_streams()):
            store.__exit__(None, None, None)

    def dense_streams(self) -> tuple[HiddenStore, ...]:
        """Return the streams that run through dense layers."""
        return (*self.streams[:1], *([self.trial.dense] if self.trial else []))

    def small_streams(self) -> tuple[HiddenStore, ...]:
        """Return the streams that run through quantised layers."""
        return (*self.streams[1:], *([self.trial.high, self.trial.low] if self.trial else []))

    def estimate_bytes(self) -> int:
        """Return about the bytes of all weights as they will be stored, rather too many."""
        shape, block = self.spec.shape, self.form.block
        # Codes, float32 scales and zeros of a weight whose rows are whole blocks; an end has 8 bits at most.
        layers, ends = (bits / 8 + (4 + bits / 8) / block for bits in (self.form.bits, HIGH))
        return int(shape.layer_parameters * layers + 2 * shape.vocab * shape.hidden * ends)

    # Embedding and head

    def end_form(self, bits: int) -> WeightForm:
        """Return the form of embedding and head; 8 bits are next to exact however they are rounded."""
        if bits == HIGH:
            return WeightForm(HIGH, self.form.block, symmetric=True, method="nearest")
        method = "nearest" if self.form.method == "nearest" else "search"
        return WeightForm(LOW, self.form.block, self.form.symmetric, method)

    def quantise_ends(self, checkpoint: Checkpoint, spec: ModelSpec) -> tuple[Quantised | None, Quantised | None]:
        """Return embedding and head; one object where a tied model's are alike, so that they are stored once.

        A head in 4 bits by GPTQ is no embedding: a tied model then has two matrices, and each token reads the small
        one. Best called after the last layer: before it there is nothing to measure, and `auto` is 8 bits.
        """
        self.choice, head = self.choose_ends()
        if head is None or self.choice.head == HIGH:
            head = self.quantise_nearby("head", self.choice.head)
        alike = self.choice.embedding == self.choice.head and (head.bits == HIGH or not self.knows_outputs())
        if spec.shares_ends and alike:
            return head, head
        return self.quantise_nearby("embed", self.choice.embedding), head

    def choose_ends(self) -> tuple[EndChoice, Quantised | None]:
        """Return the bits of both ends, and the head in 4 bits if that was made on the way."""
        if self.form.ends != "auto":
            bits = int(self.form.ends)
            return EndChoice(bits, bits), self.quantise_head() if bits == LOW else None
        if self.trial is None or not self.knows_outputs():
            return EndChoice(HIGH, HIGH), None
        small = self.quantise_head()
        high = self.end_form(HIGH).quantise
        return choose_bits(self.spec, measure_ends(self.checkpoint, self.spec, self.trial, high, small)), small

    def quantise_nearby(self, role: str, bits: int) -> Quantised:
        """Quantise an end for least error of the matrix itself."""
        return quantise_matrix(self.checkpoint, self.spec.names[role], self.end_form(bits).quantise)

    def quantise_head(self) -> Quantised:
        """Quantise the head to 4 bits, by GPTQ where it is known what it reads."""
        if not self.knows_outputs():
            return self.quantise_nearby("head", LOW)
        walks, form = plan_walks(self.collect_outputs()), Format(LOW, self.form.block, self.form.symmetric)
        return quantise_matrix(self.checkpoint, self.spec.names["head"], lambda rows: quantise_part(rows, walks, form))

    def knows_outputs(self) -> bool:
        """Tell whether the streams have come to the end of the layers."""
        return bool(self.streams) and self.done == len(self.spec.layers)

    def collect_outputs(self) -> Tensor:
        """Return the Gram matrix of what the head reads from the quantised stream."""
        norm = {"final_norm": read_norm(self.checkpoint, self.spec, "final_norm")}
        return self.collect_normed(norm, "final_norm")

    def sample_logits(self, count: int) -> tuple[Tensor, Tensor]:
        """Return ids `[windows, length]` and logits of the first windows behind all quantised layers.

        The head is the dense one; ValueError before the last layer, and without text.
        """
        if not self.knows_outputs() or self.windows is None:
            raise ValueError("there are no logits before the last layer, or without text")
        count = min(count, len(self.windows.ids))
        ends = read_head(self.checkpoint, self.spec, torch.float32)
        return self.windows.ids[:count], compute_logits(self.spec, ends, self.streams[1].read(0, count))

    # Layers

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
        self.done = index + 1
        release_memory()
        return found

    def quantise_half(
        self, index: int, half: Half, dense: dict[str, Tensor], found: dict[str, Matrix], current: dict[str, Tensor]
    ) -> None:
        """Quantise one branch, into `found` and (as floats) `current`, and advance both streams past it."""
        small = self.quantise_readers([dense[role] for role in half.readers], self.collect_normed(current, half.reads))
        for role, matrix in zip(half.readers, small, strict=True):
            self.replace(role, matrix, found, current)
        for store in self.dense_streams():
            self.advance(index, half, dense, store)
        moments = self.collect_inputs(index, half, current)
        weight, shift = current[half.projection], current.get(f"{half.projection}_bias")
        if half.norm not in dense:  # behind a norm the wanted output is known up to a factor only
            weight, shift = solve_projection(moments, weight, shift, REFIT_RIDGE)
        if shift is not None:
            found[f"{half.projection}_bias"] = current[f"{half.projection}_bias"] = shift
        gram = moments.gram
        del moments  # the cross products with the targets, which nobody needs any more
        self.replace(half.projection, self.form.quantise(weight, gram), found, current)
        for store in self.small_streams():
            self.advance(index, half, current, store)

    def quantise_readers(self, weights: list[Tensor], gram: Tensor) -> list[Quantised]:
        """Quantise weights that read the same."""
        return quantise_readers(weights, gram, Format(self.form.bits, self.form.block, self.form.symmetric))

    def replace(self, role: str, small: Quantised, found: dict[str, Matrix], current: dict[str, Tensor]) -> None:
        """Put a quantised weight in place."""
        found[role], current[role] = small, small.dequantise()

    def spans(self) -> Iterable[tuple[int, int]]:
        """Return groups of windows."""
        assert self.windows is not None
        return batches(*self.windows.ids.shape)

    def collect_normed(self, weights: Mapping[str, Tensor], norm: str) -> Tensor:
        """Return the Gram matrix of the quantised stream behind a norm of `weights`."""
        moments = Moments.empty(self.spec.shape.hidden)
        for start, stop in self.spans():
            x = self.streams[1].read(start, stop)
            moments.update(apply_norm(self.spec, weights, norm, x[ordinary_tokens(x)[0]]))
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
        for start, stop in batches(*store.shape[:2]):
            x = store.read(start, stop)
            raw = project(weights, half.projection, self.run_inputs(index, half, weights, x))
            store.write(start, x + apply_norm(self.spec, weights, half.norm, raw) * self.spec.residual_multiplier)
