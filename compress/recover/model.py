"""The student: the tensors of a checkpoint as parameters, run by the one forward pass of `compress.decoder`.

Rows hold whole documents side by side. A token sees only its own document, and its position counts from that
document's start, so that a packed row gives each document exactly what a row of its own would. Two ways lead there:

    masked     the row stays as it is; scores across documents are masked     (all models but the next)
    unpacked   each document becomes a row, padded on the right               (soft-capped scores, which take no mask)

A causal model never sees padding on the right, so that both are exact. Longrope's choice between its two factor sets
is made for a whole batch, by its longest document, as the reference implementation makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as run_again

from compress.checkpoint import Checkpoint
from compress.decoder import PLAIN, Frame, Kernels, causal_mask, compute_logits, run_layer
from compress.parallel import ALONE, Group
from compress.recover.lora import Adapter, LoraOptions, seed_adapters
from compress.recover.parallel import gather_whole, make_mesh, scatter_gradient, shard_module, shard_tensor
from compress.rope import compute_tables
from compress.spec import ModelSpec
from compress.weights import Weights, embed_rows, fuse_parts, read_head, read_layer

Mix = Callable[[Tensor, Tensor, Tensor, float, int | None], Tensor]


# Packed rows


@dataclass(frozen=True)
class Layout:
    """How a batch goes through the layers: `ids` `[rows', length']`, their frame, and the way back.

    `places` `[rows, length]`: where each token of the batch lies in the flattened `ids`; None where they are the batch.
    """

    ids: Tensor
    frame: Frame
    places: Tensor | None = None

    def restore(self, x: Tensor) -> Tensor:
        """Return a stream `[rows', length', hidden]` in the batch's own order, `[rows, length, hidden]`."""
        return x if self.places is None else x.flatten(0, 1)[self.places]


def lay_out(spec: ModelSpec, ids: Tensor, documents: Tensor | None, dtype: torch.dtype = torch.float32) -> Layout:
    """Prepare a batch of token `ids` `[rows, length]` whose `documents` are numbered (None: each row is one)."""
    plain = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    if documents is None or bool((documents == documents[:, :1]).all()):
        return Layout(ids, make_frame_at(spec, plain, dtype))
    positions = restart_positions(documents)
    if spec.attention_softcap is None:
        kernels = Kernels(mix=mix_within(documents))
        return Layout(ids, make_frame_at(spec, positions, dtype, kernels))
    unpacked, places = unpack_documents(ids, positions)
    straight = torch.arange(unpacked.shape[1], device=ids.device).expand(unpacked.shape)
    return Layout(unpacked, make_frame_at(spec, straight, dtype), places)


def make_frame_at(spec: ModelSpec, positions: Tensor, dtype: torch.dtype, kernels: Kernels = PLAIN) -> Frame:
    """Prepare rotary tables for any `positions` `[rows, length]`; rows that are all alike share theirs."""
    ropes = {layer.rope for layer in spec.layers if layer.rope is not None}
    shared = positions[:1] if positions.stride(0) == 0 else positions
    tables = {rope: compute_tables(rope, shared.cpu(), dtype) for rope in ropes}
    here = {rope: (cos.to(positions.device), sin.to(positions.device)) for rope, (cos, sin) in tables.items()}
    return Frame(positions, here, kernels)


def restart_positions(documents: Tensor) -> Tensor:
    """Return positions `[rows, length]` that count from the start of each document."""
    steps = torch.arange(documents.shape[1], device=documents.device).expand(documents.shape)
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return steps - torch.where(starts, steps, 0).cummax(1).values


def mix_within(documents: Tensor) -> Mix:
    """Return a causal attention kernel that looks no further than the document; one mask for each window in use."""
    masks: dict[int | None, Tensor] = {}

    def mix(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        if window not in masks:
            causal = causal_mask(query.shape[2], key.shape[2], window, query.device)
            masks[window] = ((documents[:, :, None] == documents[:, None]) & causal)[:, None]
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, masks[window], scale=scale, enable_gqa=grouped)

    return mix


def unpack_documents(ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return a row for each document `[documents, longest]`, padded with 0, and each token's place in them."""
    segment = (positions.flatten() == 0).cumsum(0) - 1
    longest = int(positions.max()) + 1
    places = segment * longest + positions.flatten()
    unpacked = ids.new_zeros(int(segment[-1]) + 1, longest)
    unpacked.view(-1)[places] = ids.flatten()
    return unpacked, places.view(ids.shape)


# The student


@dataclass(frozen=True)
class StudentOptions:
    """How a student is built: adapters or all weights, layers run again in the backward pass, type of the masters.

    `group`: the processes that share it, and the device of this one.
    """

    lora: LoraOptions | None = None
    run_again: bool = False
    dtype: torch.dtype = torch.float32
    group: Group = ALONE


class StudentLayer(nn.Module):
    """One decoder layer: `weights` by role, trained or frozen, and the adapters on frozen ones."""

    def __init__(self, spec: ModelSpec, index: int, weights: Weights, options: StudentOptions) -> None:
        super().__init__()
        self._spec, self._layer, self._dtype = spec, spec.layers[index], options.dtype
        self._again = options.run_again
        self.weights = nn.ParameterDict(make_parameters(weights, options))
        self.adapters = nn.ModuleDict()
        if options.lora is not None:
            random = seed_adapters(options.lora, index)
            for role in options.lora.roles:
                self.adapters[role] = Adapter(weights[role].shape, options.lora, random, options.dtype)

    def collect(self) -> Weights:
        """Return the tensors by role that the forward pass uses, adapters merged; of a group, by all of it together.

        In the forward pass of a shared layer its parameters are whole already.
        """
        plain = {role: tensor for role, tensor in self.weights.items() if role not in self.adapters}
        found = {role: gather_whole(tensor).to(self._dtype) for role, tensor in plain.items()}
        return found | {role: adapter.merge(self.weights[role]) for role, adapter in list_adapters(self.adapters)}

    def forward(self, x: Tensor, frame: Frame) -> Tensor:
        """Return the stream after the layer, `[rows, length, hidden]`."""
        if not (self._again and torch.is_grad_enabled()):
            return self._run(x, frame)
        # Nothing in a layer is random, so that no random state needs keeping.
        out: Any = run_again(self._run, x, frame, use_reentrant=False, preserve_rng_state=False)
        assert isinstance(out, Tensor)
        return out

    def _run(self, x: Tensor, frame: Frame) -> Tensor:
        return run_layer(self._spec, self._layer, self.collect(), x, frame)[0]


class Stack(nn.ModuleList):
    """The layers in their order; a module that runs, since FSDP2 wants one around those that it shards."""

    def forward(self, x: Tensor, frame: Frame, taps: Sequence[int] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        """Return the stream after the last layer, and those after the layers `taps`."""
        tapped = {}
        for index, layer in enumerate(self):
            x = layer(x, frame)
            if index in taps:
                tapped[index] = x
        return x, tapped


def list_adapters(adapters: nn.ModuleDict) -> Iterator[tuple[str, Adapter]]:
    """Yield (role, adapter)."""
    for role, adapter in adapters.items():
        assert isinstance(adapter, Adapter)
        yield role, adapter


def make_parameters(weights: Mapping[str, Tensor], options: StudentOptions) -> dict[str, nn.Parameter]:
    """Return parameters: masters in the student's type where they are trained, else frozen as they are stored."""
    if options.lora is None:
        return {role: nn.Parameter(tensor.to(options.dtype)) for role, tensor in weights.items()}
    return {role: nn.Parameter(tensor, requires_grad=False) for role, tensor in weights.items()}


class Student(nn.Module):
    """A whole model as parameters: `layers`, `ends` (embed, final_norm, head; a tied head is the embedding itself).

    Shared by a group, its parameters are DTensors; use its ends within `open_ends`.
    """

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec, options: StudentOptions | None = None) -> None:
        super().__init__()
        options = options or StudentOptions()
        self.spec, self.options, self.group = spec, options, options.group
        self._mesh, self._whole = make_mesh(options.group), dict[str, Tensor]()
        self.ends = nn.ParameterDict(self._place(make_parameters(read_ends(checkpoint, spec), options)))
        self.layers = Stack(self._make_layer(checkpoint, index) for index in range(len(spec.layers)))
        shard_module(self.layers, self._mesh)

    def _place(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Return the ends on the device; of a group, each process keeps its rows."""
        placed = {role: one.detach().to(self.group.device) for role, one in parameters.items()}
        if self._mesh is not None:
            placed = {role: shard_tensor(one, self._mesh) for role, one in placed.items()}
        return {role: nn.Parameter(placed[role], one.requires_grad) for role, one in parameters.items()}

    def _make_layer(self, checkpoint: Checkpoint, index: int) -> StudentLayer:
        """Read one layer; of a group, each process keeps its rows, so that one whole layer exists at a time."""
        layer = StudentLayer(self.spec, index, read_layer(checkpoint, self.spec, index), self.options)
        layer.to(self.group.device)
        shard_module(layer, self._mesh)
        return layer

    def forward(
        self, ids: Tensor, documents: Tensor | None = None, taps: Sequence[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Return the last stream `[rows, length, hidden]`, and the streams after the layers `taps`."""
        layout = lay_out(self.spec, ids, documents, self.options.dtype)
        x = F.embedding(layout.ids, self.end("embed")) * self.spec.embedding_multiplier
        last, tapped = self.layers(x, layout.frame, taps)
        return layout.restore(last), {index: layout.restore(x) for index, x in tapped.items()}

    @contextmanager
    def open_ends(self) -> Iterator[None]:
        """Hold the ends whole within the block; at its end each process gets its rows of their mean gradients.

        Enter it once for a step, not for each batch: gradients add up within it.
        """
        if self._mesh is None:
            yield
            return
        for role, one in self.ends.items():
            self._whole[role] = gather_whole(one.detach()).requires_grad_(one.requires_grad)
        try:
            yield
        finally:
            whole, self._whole = self._whole, {}
        if any(one.grad is not None for one in whole.values()):  # in all processes or in none: they run batches alike
            for role in [role for role, one in whole.items() if one.requires_grad]:
                one = whole.pop(role)
                gradient = torch.zeros_like(one) if one.grad is None else one.grad
                self.ends[role].grad = scatter_gradient(gradient, self._mesh)

    def end(self, role: str) -> Tensor:
        """Return embed, final_norm or head in the type that the forward pass uses."""
        name = self._name_end(role)
        found: Tensor = self.ends[name] if self._mesh is None else self._whole[name]
        return found.to(self.options.dtype)

    def _name_end(self, role: str) -> str:
        return "embed" if role == "head" and self.spec.shape.tied else role

    def logits(self, x: Tensor) -> Tensor:
        """Return logits `[..., vocab]` of the last stream `x` `[..., hidden]`."""
        return compute_logits(self.spec, {role: self.end(role) for role in ("final_norm", "head")}, x)

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters that training changes, by name, always in the same order."""
        return {name: tensor for name, tensor in self.named_parameters() if tensor.requires_grad}

    @torch.no_grad()
    def stored(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor under its stored name, fused as stored, adapters merged, a tied matrix once per name.

        All processes of a group must take all of them: each is whole in each process while it is yielded.
        """
        names = {self.spec.names[role]: role for role in ("head", "final_norm", "embed")}
        for name, role in names.items():
            yield name, gather_whole(self.ends[self._name_end(role)].detach()).to(self.options.dtype)
        for place, layer in enumerate(self.layers):
            assert isinstance(layer, StudentLayer)
            for role, tensor in fuse_parts(self.spec.layers[place], layer.collect()).items():
                yield self.spec.layers[place].names[role], tensor.detach()


def read_ends(checkpoint: Checkpoint, spec: ModelSpec) -> Weights:
    """Read embedding, final norm and, where it is not tied, the head, as stored."""
    names = {role: spec.names[role] for role in ("embed", "final_norm", "head")}
    if spec.shape.tied:
        del names["head"]
    return {role: checkpoint.read_one(name) for role, name in names.items()}


def estimate_activations(spec: ModelSpec, tokens: int) -> int:
    """Return the bytes that a backward pass over `tokens` keeps where no layer is run again (float32; an estimate).

    Each projection keeps its input, each product its factors: about six streams, three of the attention's width and
    five of the MLP's for each layer.
    """
    hidden = spec.shape.hidden
    return 4 * tokens * sum(8 * hidden + 4 * layer.query + 5 * layer.ffn for layer in spec.shape.layers)


class Frozen:
    """A model that is run, never trained: its layers from memory (`resident`) or read from disk each time.

    It runs on `device`, whatever its batches lie on.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        resident: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        self.spec = spec
        self._checkpoint, self._dtype, self._device = checkpoint, dtype, device or torch.device("cpu")
        self._ends = self._move(read_head(checkpoint, spec, dtype))
        self._layers = [self._read(index) for index in range(len(spec.layers))] if resident else []
        whole = resident and not spec.shape.tied
        self._embed = checkpoint.read_one(spec.names["embed"], dtype).to(self._device) if whole else None

    def _move(self, weights: Weights) -> Weights:
        return {role: tensor.to(self._device) for role, tensor in weights.items()}

    def _embed_ids(self, ids: Tensor) -> Tensor:
        """Return scaled embeddings; rows in use are read from disk where the whole matrix is not in memory."""
        table = self._ends["head"] if self.spec.shape.tied else self._embed
        if table is None:
            return embed_rows(self._checkpoint, self.spec, ids.cpu(), self._dtype).to(self._device)
        return F.embedding(ids, table) * self.spec.embedding_multiplier

    def _read(self, index: int) -> Weights:
        return self._move(read_layer(self._checkpoint, self.spec, index, self._dtype))

    @torch.no_grad()
    def streams(
        self, batches: Sequence[tuple[Tensor, Tensor]], taps: Sequence[int] = ()
    ) -> tuple[list[Tensor], dict[int, list[Tensor]]]:
        """Return the last streams of (ids, documents) pairs and those after the layers `taps`; each layer read once."""
        here = [(ids.to(self._device), documents.to(self._device)) for ids, documents in batches]
        layouts = [lay_out(self.spec, ids, documents, self._dtype) for ids, documents in here]
        streams = [self._embed_ids(layout.ids) for layout in layouts]
        tapped: dict[int, list[Tensor]] = {}
        for index, layer in enumerate(self.spec.layers):
            weights = self._layers[index] if self._layers else self._read(index)
            for place, layout in enumerate(layouts):
                streams[place] = run_layer(self.spec, layer, weights, streams[place], layout.frame)[0]
            if index in taps:
                tapped[index] = [layout.restore(x) for layout, x in zip(layouts, streams, strict=True)]
        return [layout.restore(x) for layout, x in zip(layouts, streams, strict=True)], tapped

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Return logits `[..., vocab]` of the last stream."""
        return compute_logits(self.spec, self._ends, x)
