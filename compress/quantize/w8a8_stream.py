"""All layers quantised to 8-bit weights and inputs, each on the stream that the quantised layers before it leave.

For each half of a layer: the ranges of what its projections read decide the smoothing (compress.quantize.activations);
static inputs get the grid of least expected error on ordinary tokens; weights are rounded by GPTQ on what they now
read. The last projection is first refitted on its inputs as the codes will hold them, so that the stream meets the
dense one again (as compress.quantize.stream does).

Attention sinks are left out of every statistic: a grid that covered them would be too coarse for everybody else. In a
static projection they saturate. What that costs is measured on all tokens, sinks apart: a group of projections (q, k,
v; o; gate, up; down) that loses more than the form's limit falls back to dynamic inputs, or to float weights
(methods 7.4, consequence 5; the rule is ours).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from compress.calibrate import fill_embeddings
from compress.checkpoint import Checkpoint
from compress.decoder import apply_norm, make_frame, project
from compress.errors import UserError
from compress.hidden import HiddenStore, batches, release_memory
from compress.quantize.activations import (
    ChannelRange,
    Histogram,
    InputGrid,
    Weights,
    column_peaks,
    search_grid,
    share_heads,
    smooth_inputs,
    smooth_reads,
    smoothing_factors,
)
from compress.quantize.stream import HALVES, REFIT_RIDGE, SPILL_BYTES
from compress.quantize.w8a8 import (
    FLOAT,
    STATIC,
    LinearForm,
    Matrix,
    as_weights,
    quantise_linear,
)
from compress.solve import solve_projection
from compress.spec import ModelSpec
from compress.stats import Moments, ordinary_tokens
from compress.surgery.job import Half, half_inputs
from compress.text import Windows

# Sinks are few and their keys and values nearly constant: more is forgiven there, but not a wrong direction.
SINK_SLACK = 5.0
NEEDS_TEXT = "Static W8A8 needs calibration text to learn the inputs' ranges; give some, or w8a8-dynamic."
TRIAL_TOKENS = 4096  # what a group's loss is measured on


@dataclass(frozen=True)
class GroupLoss:
    """Squared output error over squared output of one group of projections: mean over ordinary tokens and over sinks.

    `kind` is what became of the group.
    """

    layer: int
    roles: tuple[str, ...]
    ordinary: float
    sinks: float
    kind: str


@dataclass
class StreamReport:
    """What happened: losses of all groups, and the largest magnitude that the residual stream had (float16: 65504)."""

    groups: list[GroupLoss] = field(default_factory=list)
    peak: float = 0.0


Reader = Callable[[Tensor], Tensor]


def fill_rounded(
    checkpoint: Checkpoint, spec: ModelSpec, windows: Windows, store: HiddenStore, dtype: torch.dtype
) -> None:
    """Write the scaled embeddings of all windows into `store`, the matrix rounded to the model's type first."""
    for start, stop in batches(*windows.ids.shape):
        ids = windows.ids[start:stop]
        rows = checkpoint.read_rows(spec.names["embed"], ids.flatten(), dtype).float()
        store.write(start, rows.view(*ids.shape, -1) * spec.embedding_multiplier)


class LinearQuantiser:
    """Quantises layers in order; use in a `with` block, which frees the two streams."""

    def __init__(
        self, checkpoint: Checkpoint, spec: ModelSpec, form: LinearForm, windows: Windows | None = None,
        spill_bytes: int = SPILL_BYTES,
    ) -> None:  # fmt: skip
        """Start; UserError where static inputs are asked for without the windows that their ranges come from."""
        if windows is None and form.kind == STATIC:
            raise UserError(NEEDS_TEXT)
        self.checkpoint, self.spec, self.form, self.windows = checkpoint, spec, form, windows
        self.report = StreamReport()
        self.streams: tuple[HiddenStore, ...] = ()
        if windows is not None:
            shape = (*windows.ids.shape, spec.shape.hidden)
            self.streams = (HiddenStore(shape, spill_bytes), HiddenStore(shape, spill_bytes))
            fill_embeddings(checkpoint, spec, windows, self.streams[0])
            fill_rounded(checkpoint, spec, windows, self.streams[1], form.dtype)

    def __enter__(self) -> LinearQuantiser:
        return self

    def __exit__(self, *error: object) -> None:
        for store in self.streams:
            store.__exit__(None, None, None)

    def quantise_layer(self, index: int, weights: Mapping[str, Tensor]) -> dict[str, Matrix]:
        """Return one layer's tensors by role, its projections quantised with their biases; layers come in order."""
        dense = {role: tensor.float() for role, tensor in weights.items()}
        # What a device keeps in its own type is rounded at once, so that everything after it learns of it; norms that
        # projections read are rounded where they are smoothed, which leaves the weights to take up the difference.
        reads = {half.reads for half in HALVES}
        current = {role: tensor if role in reads else self.round_vector(tensor) for role, tensor in dense.items()}
        found: dict[str, Matrix] = {}
        for half in HALVES:
            if self.windows is None:
                self.quantise_blindly(half, current, found)
            else:
                self.quantise_half(index, half, dense, current, found)
        release_memory()
        return {role: found[role] if role in found else self.round_vector(current[role]) for role in dense}

    def round_vector(self, tensor: Tensor) -> Tensor:
        """Return norms and biases in the values of the model's type; matrices wait for their codes."""
        return tensor.to(self.form.dtype).float() if tensor.dim() == 1 else tensor

    def quantise_blindly(self, half: Half, current: Weights, found: dict[str, Matrix]) -> None:
        """Quantise a half to the nearest codes: without text there is nothing to smooth or to make up for."""
        if half.reads in current:
            current[half.reads] = self.round_vector(current[half.reads])
        for role in (*half.readers, half.projection):
            found[role] = quantise_linear(current[role], current.get(f"{role}_bias"), self.form, None, None)

    def quantise_half(
        self, index: int, half: Half, dense: Weights, current: Weights, found: dict[str, Matrix]
    ) -> None:
        """Quantise one branch into `found`, its smoothed weights into `current`, and advance both streams past it."""
        self.smooth(index, half, current)
        read = self.make_reader(half, current)
        gram = self.collect_gram(read)
        small = self.quantise_group(index, half.readers, current, read, gram)
        found |= small
        self.advance(index, half, dense, self.streams[0])
        live = as_weights(current | small)
        inputs = self.make_inputs(index, half, live)
        self.refit(index, half, current, live)
        gram = self.collect_gram(inputs)
        small = self.quantise_group(index, (half.projection,), current, inputs, gram)
        found |= small
        self.advance(index, half, live | as_weights(small), self.streams[1])

    # Smoothing

    def smooth(self, index: int, half: Half, current: Weights) -> None:
        """Fold the smoothing of both groups of a half into its weights."""
        reads = self.collect_range(self.make_reader(half, current))
        peaks = column_peaks([current[role] for role in half.readers])
        alpha, dtype = self.form.alpha, self.form.dtype
        ones = torch.ones(len(reads.peak)).double()
        factors = ones if alpha is None else smoothing_factors(reads.peak, peaks, alpha)
        layer = self.spec.layers[index]
        if alpha is not None:
            inputs = self.collect_range(self.make_inputs(index, half, current))
            peak = share_heads(layer, half, inputs.peak)
            columns = share_heads(layer, half, column_peaks([current[half.projection]]))
            smooth_inputs(layer, half, current, smoothing_factors(peak, columns, alpha))
        # Without smoothing the norm is rounded only, and the weights take up what that changes.
        smooth_reads(self.spec, half, current, factors, dtype)

    # What projections read

    def make_reader(self, half: Half, weights: Mapping[str, Tensor]) -> Reader:
        """Return the function from the stream to what the half's first projections read."""
        return lambda x: apply_norm(self.spec, weights, half.reads, x)

    def make_inputs(self, index: int, half: Half, weights: Mapping[str, Tensor]) -> Reader:
        """Return the function from the stream to what the half's last projection reads."""
        return lambda x: half_inputs(self.spec, index, half, weights, x, make_frame(self.spec, *x.shape[:2]))

    def spans(self) -> Iterator[tuple[int, int]]:
        """Yield groups of windows."""
        assert self.windows is not None
        return batches(*self.windows.ids.shape)

    def read_ordinary(self, read: Reader) -> Iterator[Tensor]:
        """Yield what `read` makes of the quantised stream, ordinary tokens `[tokens, n]`."""
        for start, stop in self.spans():
            x = self.streams[1].read(start, stop)
            self.report.peak = max(self.report.peak, float(x.abs().max()))
            yield read(x)[ordinary_tokens(x)[0]]

    def collect_range(self, read: Reader) -> ChannelRange:
        """Return the range of every channel."""
        found: ChannelRange | None = None
        for values in self.read_ordinary(read):
            found = found or ChannelRange.empty(values.shape[1])
            found.update(values)
        assert found is not None
        return found

    def collect_gram(self, read: Reader) -> Tensor:
        """Return the Gram matrix `[n, n]`."""
        moments: Moments | None = None
        for values in self.read_ordinary(read):
            moments = moments or Moments.empty(values.shape[1])
            moments.update(values)
        assert moments is not None
        return moments.gram

    # Quantising

    def quantise_group(
        self, index: int, roles: tuple[str, ...], current: Weights, read: Reader, gram: Tensor
    ) -> dict[str, Matrix]:
        """Return projections that read the same, of one kind and with one grid; the loss decides on the kind."""
        kinds = [self.form.kind]
        if self.form.kind == STATIC and self.form.fallback:
            kinds.append(self.form.fallback)
        for kind in kinds:
            made = self.quantise_as(kind, roles, current, read, gram)
            loss = self.measure_loss(index, roles, current, made, read)
            if kind is kinds[-1] or (loss.ordinary <= self.form.limit and loss.sinks <= SINK_SLACK * self.form.limit):
                break
        self.report.groups.append(replace(loss, kind=kind))
        return made

    def quantise_as(
        self, kind: str, roles: tuple[str, ...], current: Weights, read: Reader, gram: Tensor
    ) -> dict[str, Matrix]:
        """Quantise projections as one kind; FLOAT rounds them to the model's type."""
        if kind == FLOAT:
            return {role: current[role].to(self.form.dtype).float() for role in roles}
        grid = self.find_grid(roles, current, read) if kind == STATIC else None
        chosen = gram if self.form.gptq else None
        return {
            role: quantise_linear(current[role], current.get(f"{role}_bias"), self.form, grid, chosen)
            for role in roles
        }

    def find_grid(self, roles: tuple[str, ...], current: Weights, read: Reader) -> InputGrid:
        """Return the grid of the inputs; an error in a channel costs what its weights make of it."""
        importance = torch.cat([current[role] for role in roles]).double().square().mean(0)
        histogram = Histogram(self.collect_range(read).span, importance)
        for values in self.read_ordinary(read):
            histogram.update(values)
        shared = self.form.splits and roles in [(half.projection,) for half in HALVES]
        return search_grid(histogram, self.form.dtype, symmetric=shared or not self.form.folds_bias)

    def measure_loss(
        self, index: int, roles: tuple[str, ...], current: Weights, made: Mapping[str, Matrix], read: Reader
    ) -> GroupLoss:
        """Return the group's relative output error on the first windows, sinks and first tokens apart."""
        live, sums = as_weights(made), torch.zeros(2, 2, dtype=torch.float64)
        for start, stop in self.spans():
            x = self.streams[1].read(start, stop)
            inputs, ordinary = read(x), ordinary_tokens(x)[0]
            for role in roles:
                exact = project(current, role, inputs)
                missed = project({**current, **live}, role, inputs) - exact
                for place, mask in enumerate((ordinary, ~ordinary)):
                    sums[place, 0] += missed[mask].double().square().sum()
                    sums[place, 1] += exact[mask].double().square().sum()
            if stop * x.shape[1] >= TRIAL_TOKENS:
                break
        shares = (sums[:, 0] / sums[:, 1].clamp(min=1e-30)).tolist()
        return GroupLoss(index, roles, shares[0], shares[1], "")

    def refit(self, index: int, half: Half, current: Weights, live: Mapping[str, Tensor]) -> None:
        """Refit the last projection in place, so that the stream meets the dense one, already advanced, again."""
        if half.norm in current:  # behind a norm the wanted output is known up to a factor only
            return
        weight, shift = current[half.projection], current.get(f"{half.projection}_bias")
        moments = Moments.empty(weight.shape[1], len(weight))
        read = self.make_inputs(index, half, live)
        for start, stop in self.spans():
            x = self.streams[1].read(start, stop)
            mask, _ = ordinary_tokens(x)
            target = (self.streams[0].read(start, stop) - x)[mask] / self.spec.residual_multiplier
            moments.update(read(x)[mask], target)
        current[half.projection], shift = solve_projection(moments, weight, shift, REFIT_RIDGE)
        if shift is not None:
            current[f"{half.projection}_bias"] = self.round_vector(shift)

    def advance(self, index: int, half: Half, weights: Mapping[str, Tensor], store: HiddenStore) -> None:
        """Run one branch over a stream."""
        for start, stop in self.spans():
            x = store.read(start, stop)
            raw = project(weights, half.projection, self.make_inputs(index, half, weights)(x))
            store.write(start, x + apply_norm(self.spec, weights, half.norm, raw) * self.spec.residual_multiplier)
