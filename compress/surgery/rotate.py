"""A dense model seen in another basis of the residual stream, for cutting hidden width as SliceGPT does.

An orthogonal Q commutes with a norm that has no weights of its own: with x the stream and g a pre-norm's gain,

    norm(x) diag(g) W^T  =  norm(x Q) (W diag(g) Q)^T        since |x Q| = |x|

so every pre-norm's gain is folded into the projections that read it and every hidden axis is turned: what reads the
stream becomes W diag(g) Q, what writes to it Q^T W (and Q^T b), the embedding E Q, the head E diag(g_final) Q. With one
Q for all layers nothing is left over in the residual path, and the model keeps its class (arXiv 2401.15024, section 3;
one shared Q instead of one per block, and its choice below, are ours: methods 8.5).

What cutting to the first d' of d channels does to a norm (our derivation; methods 1.4). Let e be the fraction of a
token's energy |x|^2 that the kept channels z hold. The full norm gives them z / sqrt(|x|^2 / d), a norm over the kept
channels alone gives z / sqrt(e |x|^2 / d'), so the second times sqrt(e d / d') is the first, exactly. Equal gains make
SLNP's factor sqrt(d / d'): it takes e for 1 and is too large by 1 / sqrt(e). One constant per norm cannot follow e from
token to token; least squares over tokens gives mean(sqrt(e)) sqrt(d / d'), at most sqrt(mean(e) d / d') (Jensen),
below that by a share of about var(e) / (8 mean(e)^2).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.calibrate import fill_embeddings, share_text
from compress.checkpoint import STEP, Checkpoint
from compress.decoder import attention_branch, attention_context, make_frame, mlp_activation, mlp_branch
from compress.errors import UserError
from compress.family import NORM_ROLES
from compress.hidden import HiddenStore, batches, release_memory
from compress.importance.findings import Findings
from compress.parallel import ALONE, Group
from compress.spec import LayerSpec, ModelSpec, role_axes
from compress.stats import Moments, ordinary_tokens
from compress.text import Windows
from compress.weights import Weights, read_layer

# What becomes of a stored tensor: nothing, a norm without gain, hidden inputs turned, hidden outputs turned.
KEEP, NEUTRAL, INPUTS, OUTPUTS = "keep", "neutral", "inputs", "outputs"
ORTHOGONAL = 1e-9  # largest entry of Q^T Q - 1: eigenvectors and QR stay below 1e-12


@dataclass(frozen=True)
class Reading:
    """How one tensor of the rotated model is read: the stored tensor, its turn, the stored norm folded into it."""

    source: str
    turn: str
    gain: str = ""


@dataclass(frozen=True, eq=False)
class RotatedCheckpoint(Checkpoint):
    """A checkpoint whose tensors are folded and turned as they are read; make it with `rotate_checkpoint`.

    `tensors` keeps the stored types (what the output is written in), but reading without a type gives float32: values
    are rounded once, when they are written. Asking for float64 computes in float64.
    """

    source: Checkpoint
    rotation: Tensor
    norm_offset: float
    readings: Mapping[str, Reading]

    def read(self, names: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return the named tensors, float32 unless asked otherwise; KeyError for an unknown name."""
        return {name: self._read_whole(name, dtype or torch.float32) for name in names}

    def read_rows(self, name: str, rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return `tensor[rows]`, `[len(rows), ...]`; IndexError outside it."""
        reading, final = self.readings[name], dtype or torch.float32
        if reading.turn != INPUTS:
            return self.read_one(name, dtype).index_select(0, rows.to("cpu", torch.int64))
        stored = self.source.read_rows(reading.source, rows, work_type(final))
        return turn_inputs(stored, self._read_gain(reading, final), self._basis(final)).to(final)

    def read_slice(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return `tensor[start:stop]`, `[stop - start, ...]`; IndexError outside it."""
        rows = self.tensors[name].shape[0]
        if not 0 <= start <= stop <= rows:
            raise IndexError(f"rows {start}:{stop} of {name} lie outside its {rows} rows")
        if self.readings[name].turn != INPUTS:
            return self.read_one(name, dtype)[start:stop]
        return self._read_inputs(name, (start, stop), dtype or torch.float32)

    def _read_whole(self, name: str, dtype: torch.dtype) -> Tensor:
        reading, shape = self.readings[name], self.tensors[name].shape
        if reading.turn == INPUTS:
            return self._read_inputs(name, (0, shape[0]), dtype)
        if reading.turn == NEUTRAL:
            return torch.full(shape, 1.0 - self.norm_offset, dtype=dtype)
        if reading.turn == KEEP:
            return self.source.read_one(reading.source, dtype)
        stored = self.source.read_one(reading.source, work_type(dtype))
        return turn_outputs(stored, self._basis(dtype)).to(dtype)

    def _read_inputs(self, name: str, rows: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Turn a matrix a few rows at a time: a second float32 copy of a large embedding would be the peak."""
        (start, stop), width, reading = rows, self.tensors[name].shape[1], self.readings[name]
        turned = torch.empty(stop - start, width, dtype=dtype)
        gain, basis, step = self._read_gain(reading, dtype), self._basis(dtype), max(1, STEP // width)
        for begin in range(start, stop, step):
            end = min(begin + step, stop)
            stored = self.source.read_slice(reading.source, begin, end, work_type(dtype))
            turned[begin - start : end - start] = turn_inputs(stored, gain, basis)
        return turned

    def _read_gain(self, reading: Reading, dtype: torch.dtype) -> Tensor | None:
        if not reading.gain:
            return None
        return self.source.read_one(reading.gain, work_type(dtype)) + self.norm_offset

    def _basis(self, dtype: torch.dtype) -> Tensor:
        return self.rotation.to(work_type(dtype))


def work_type(dtype: torch.dtype) -> torch.dtype:
    """Return the type that values of `dtype` are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def turn_inputs(weight: Tensor, gain: Tensor | None, rotation: Tensor) -> Tensor:
    """Return W diag(gain) Q `[out, hidden]`: the projection as it reads the turned, unweighted norm output."""
    return (weight if gain is None else weight * gain) @ rotation


def turn_outputs(tensor: Tensor, rotation: Tensor) -> Tensor:
    """Return Q^T W `[hidden, in]`, or Q^T b `[hidden]`: the branch as it adds to the turned stream."""
    return rotation.T @ tensor


def require_rotatable(spec: ModelSpec) -> None:
    """Raise UserError for a model with norms behind its branches: their gain stands where the stream is turned."""
    feeds, family = spec.family.feeds, spec.family.name
    for index, layer in enumerate(spec.layers):
        behind = [norm for norm in layer.shape.norms if not feeds.get(norm)]
        if not behind:
            continue
        if len(behind) == len(layer.shape.norms):
            raise UserError(
                f"Family '{family}' has norms only behind its branches, so its hidden width cannot be rotated; "
                "cut hidden channels as they are instead."
            )
        raise UserError(
            f"Family '{family}' has norms behind its branches ({', '.join(behind)} in layer {index}), which a rotated "
            "stream cannot pass; absorb them first."
        )


def rotate_checkpoint(source: Checkpoint, spec: ModelSpec, rotation: Tensor) -> RotatedCheckpoint:
    """Return the model of `source` in the basis `rotation` `[hidden, hidden]`: the same function, with an untied head.

    Raises UserError for a model with post-norms and ValueError for a matrix that is not orthogonal.
    """
    require_rotatable(spec)
    exact, size = rotation.double(), spec.shape.hidden
    unit = torch.eye(size, dtype=torch.float64)
    if exact.shape != unit.shape or not float((exact.T @ exact - unit).abs().max()) <= ORTHOGONAL:
        raise ValueError(f"the rotation must be an orthogonal [{size}, {size}] matrix, got {list(rotation.shape)}")
    readings = list_readings(spec)
    tensors = {name: replace(source.tensors[how.source], name=name) for name, how in readings.items()}
    config = {**source.config, "tie_word_embeddings": False}
    return RotatedCheckpoint(source.folder, config, tensors, source, exact, spec.norm_offset, readings)


def list_readings(spec: ModelSpec) -> dict[str, Reading]:
    """Return how each tensor is read by the name it has in the rotated model (left-over buffers are not in it)."""
    own = {role: rule.name for role, rule in spec.family.model.items()}  # a tied model stores only one of two names
    norm = next(norm for norm, readers in spec.family.feeds.items() if "head" in readers)
    readings = {
        own["embed"]: Reading(spec.names["embed"], INPUTS),
        own[norm]: Reading(spec.names[norm], NEUTRAL),
        own["head"]: Reading(spec.names["head"], INPUTS, spec.names[norm]),
    }
    for layer in spec.layers:
        readings |= {name: read_role(spec, layer, role) for role, name in layer.names.items()}
    return readings


def read_role(spec: ModelSpec, layer: LayerSpec, role: str) -> Reading:
    """Return how one stored tensor of a layer is read; ValueError where its fused parts are fed by different norms."""
    name, parts = layer.names[role], layer.parts.get(role, (role,))
    if role in NORM_ROLES:
        return Reading(name, NEUTRAL)
    axes = role_axes(parts[0], spec.family.attention.qk_norm)
    if "hidden" not in axes:
        return Reading(name, KEEP)
    if axes[0] == "hidden":
        return Reading(name, OUTPUTS)
    gains = {part: norm for norm in layer.shape.norms for part in spec.family.feeds.get(norm, ())}
    [norm] = {gains.get(part, "") for part in parts}
    return Reading(name, INPUTS, layer.names[norm] if norm else "")


def collect_stream_gram(
    checkpoint: Checkpoint, spec: ModelSpec, windows: Windows, spill_bytes: int = 2**30, group: Group = ALONE
) -> Tensor:
    """Return the mean of u u^T `[hidden, hidden]` in float64 over the inputs of all norms; one layer in memory.

    u is what a norm gives out before its gain, x / sqrt(mean(x^2) + eps): the norm removes the stream's scale, and
    without that the last layers would decide alone. Sinks are left out (methods 7.4). The processes of a `group` run
    their shares of the windows. Raises UserError where the model cannot be rotated or where no token is left.
    """
    require_rotatable(spec)
    windows = share_text(group, windows)
    moments = Moments.empty(spec.shape.hidden)
    with HiddenStore((*windows.ids.shape, spec.shape.hidden), spill_bytes) as store:
        fill_embeddings(checkpoint, spec, windows, store)
        for index in range(len(spec.layers)):
            weights = read_layer(checkpoint, spec, index, torch.float32)
            observe_layer(spec, spec.layers[index], weights, store, moments)
            del weights
            release_memory()
        for start, stop in batches(*windows.ids.shape):
            x = store.read(start, stop)
            add_unit(moments, x[ordinary_tokens(x)[0]], spec.eps)
    moments.reduce(group)
    if not moments.count:
        raise UserError(f"{windows.source}: every token is the first of its window or a sink; give more text.")
    return moments.gram / moments.count


def observe_layer(spec: ModelSpec, layer: LayerSpec, weights: Weights, store: HiddenStore, moments: Moments) -> None:
    """Advance the stream in `store` by one layer and add the inputs of its two pre-norms."""
    for start, stop in batches(*store.shape[:2]):
        frame = make_frame(spec, stop - start, store.shape[1])
        x = store.read(start, stop)
        mask, _ = ordinary_tokens(x)
        context, _ = attention_context(spec, layer, weights, x, frame)
        middle = x + attention_branch(spec, weights, context)
        store.write(start, middle + mlp_branch(spec, weights, mlp_activation(spec, weights, middle)))
        add_unit(moments, x[mask], spec.eps)
        add_unit(moments, middle[mask], spec.eps)


def add_unit(moments: Moments, rows: Tensor, eps: float) -> None:
    """Add tokens `[tokens, hidden]` at unit root mean square; in float64, since the smallest eigenvalues matter too."""
    exact = rows.double()
    moments.update(exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps))


def choose_rotation(gram: Tensor, pinned: Iterable[int] = ()) -> Tensor:
    """Return the eigenvectors Q `[hidden, hidden]` of a Gram matrix in float64, largest eigenvalue first.

    Channels in `pinned` (massive activations) stay themselves and come first, the others are turned among themselves:
    turned too, a spike would spread over all channels and sinks could not be told from ordinary tokens any more. Signs
    are such that the largest entry of each column is positive. Raises UserError for NaN or infinite values.
    """
    if not torch.isfinite(gram).all():
        raise UserError("The residual stream holds NaN or infinite values on the calibration text; use other text.")
    fixed = torch.tensor(sorted(set(pinned)), dtype=torch.int64)
    free = torch.ones(len(gram), dtype=torch.bool).index_fill_(0, fixed, False)
    vectors = torch.linalg.eigh(gram.double()[free][:, free]).eigenvectors.flip(1)
    peaks = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    rotation = torch.zeros_like(gram, dtype=torch.float64)
    rotation[fixed, torch.arange(len(fixed))] = 1.0
    rotation[free, len(fixed) :] = vectors * peaks.sign()
    return rotation


def rotated_findings(findings: Findings, energies: Tensor) -> Findings:
    """Return findings whose hidden channels are rotated ones: the first stay, the damage is the energies' tail.

    All norms share the mean of their energies, and damage is linear in them, so its sum over norms is what single
    norms would give. Pinned channels are among the first (`choose_rotation`), so none needs to be pinned again.
    """
    order = torch.arange(len(energies), 0, -1, dtype=findings.hidden_score.dtype)  # exact where energies tie
    shared = energies.to(findings.hidden_energy).expand(len(findings.hidden_energy), -1)
    return replace(findings, hidden_score=order, hidden_energy=shared, pinned=())
