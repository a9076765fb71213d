"""What the parts of pass 2 share: the job, the two residual streams, and the halves of a layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.checkpoint import Checkpoint
from compress.decoder import Frame, attention_context, mlp_activation
from compress.errors import UserError
from compress.hidden import HiddenStore, batches
from compress.parallel import ALONE, Group
from compress.plan import Plan
from compress.recipe import Recipe
from compress.spec import ModelSpec
from compress.text import Windows

Weights = dict[str, Tensor]
# A block-wise solve of 200 steps takes seconds to minutes up to this size, and would dwarf the rest of the run above.
SMALL_MODEL = 2**24
REFINE_STEPS = 200


@dataclass(frozen=True)
class Half:
    """One branch of a layer: its last projection, the norms around it, and what reads its input norm."""

    projection: str
    norm: str
    reads: str
    readers: tuple[str, ...]


ATTENTION = Half("o", "attn_out", "attn_in", ("q", "k", "v"))
MLP = Half("down", "mlp_out", "mlp_in", ("gate", "up"))


@dataclass
class Streams:
    """The two residual streams, room for a projection's inputs, and per-token facts of the dense half.

    `counted` `[windows]` says which windows the solves may learn from (others only pass through, to be measured);
    `branch` holds what a repair aims at when that is not the dense stream itself; `before` holds the pruned stream
    ahead of a layer when the layer is refined. A store that no step needs has width 0. All are of this process's
    windows: those from `first` on of the `total` that the group's processes hold.
    """

    dense: HiddenStore
    pruned: HiddenStore
    inputs: HiddenStore
    branch: HiddenStore
    before: HiddenStore
    counted: Tensor
    mask: Tensor
    scale: Tensor
    first: int
    total: int

    def spans(self) -> Iterator[tuple[int, int]]:
        """Yield groups of windows."""
        return batches(*self.dense.shape[:2])

    def clip(self, start: int, stop: int) -> tuple[int, int]:
        """Return where this process's part of the windows `start:stop` of all processes lies in its stores."""
        own = self.dense.shape[0]
        return min(max(start - self.first, 0), own), min(max(stop - self.first, 0), own)


@dataclass(frozen=True)
class Rebuild:
    """What pass 2 works on: the dense model, the new model, the plan, how to repair, and who shares the text."""

    checkpoint: Checkpoint
    old: ModelSpec
    new: ModelSpec
    plan: Plan
    recipe: Recipe
    types: Mapping[str, torch.dtype]
    group: Group = ALONE

    def __post_init__(self) -> None:
        """Refuse repairs for which the plan leaves nothing to do (a plan may come from a file)."""
        if self.recipe.target == "own" and self.narrows:
            raise UserError(
                "--target own compares with the unpruned branch on the same stream, but this plan removes hidden "
                "channels from it; give --target corrected."
            )
        normed = all(half.norm in layer.shape.norms for layer in self.new.layers for half in (ATTENTION, MLP))
        if self.recipe.repair == "bias" and normed:
            raise UserError(
                "--repair bias moves only biases, and a norm stands behind every branch of this model, which leaves "
                "them no place; add --absorb all, or give --repair lstsq."
            )

    @property
    def hidden(self) -> Tensor:
        """Kept hidden channels."""
        return torch.tensor(self.plan.hidden)

    @property
    def narrows(self) -> bool:
        """True when hidden channels go."""
        return len(self.plan.hidden) < self.old.shape.hidden

    @property
    def refits_inputs(self) -> bool:
        """True when q, k, v, gate and up are refitted too."""
        return self.recipe.inputs == "lstsq" or (self.recipe.inputs == "auto" and self.narrows)

    @property
    def refine_steps(self) -> int:
        """Steps of the block-wise solve; the automatic number is none for other repairs and targets than ours."""
        if self.recipe.refine >= 0:
            return self.recipe.refine
        wanted = self.recipe.repair == "lstsq" and self.recipe.target == "corrected"
        return REFINE_STEPS if wanted and self.old.shape.layer_parameters <= SMALL_MODEL else 0

    def narrow(self, stream: Tensor) -> Tensor:
        """Return the kept channels of a dense stream `[..., hidden]`."""
        if not self.narrows:
            return stream
        # Selecting from a matrix is twelve times faster than from the last of three dimensions.
        return stream.flatten(0, -2).index_select(1, self.hidden).view(*stream.shape[:-1], len(self.plan.hidden))

    def round_to(self, role: str, tensor: Tensor) -> Tensor:
        """Round to the role's storage type and back, so that the stream sees exactly what is written."""
        return tensor.to(self.types[role]).to(torch.float32)


def half_inputs(
    spec: ModelSpec, index: int, half: Half, weights: Mapping[str, Tensor], x: Tensor, frame: Frame
) -> Tensor:
    """Return the inputs of a branch's last projection on the stream `x`."""
    if half is ATTENTION:
        return attention_context(spec, spec.layers[index], weights, x, frame)[0]
    return mlp_activation(spec, weights, x)


def open_streams(stack: ExitStack, job: Rebuild, windows: Windows, measured: int = 0) -> Streams:
    """Allocate the streams and what the recipe needs beside them; the last `measured` windows teach nothing.

    `windows` and `measured` are this process's.
    """
    count, length = windows.ids.shape
    new = job.new.shape.hidden
    widest = max(max(layer.shape.query, layer.shape.ffn) for layer in job.new.layers)
    widths = (
        job.old.shape.hidden, new, widest,
        0 if job.recipe.target == "corrected" else new, new if job.refine_steps else 0,
    )  # fmt: skip
    stores = [stack.enter_context(HiddenStore((count, length, width), job.recipe.spill_bytes)) for width in widths]
    counted = torch.arange(count) < count - measured
    dense, pruned, inputs, branch, before = stores
    mask, scale = torch.ones(count, length, dtype=torch.bool), torch.ones(count, length, 1)
    counts = job.group.gather(count)
    first, total = sum(counts[: job.group.rank]), sum(counts)
    return Streams(dense, pruned, inputs, branch, before, counted, mask, scale, first, total)


def start_pruned(new: ModelSpec, windows: Windows, streams: Streams, embed: Tensor) -> None:
    """Fill the pruned stream with the embeddings as they are written, rounding included."""
    for start, stop in streams.spans():
        rows = embed[windows.ids[start:stop]].to(torch.float32)
        streams.pruned.write(start, rows * new.embedding_multiplier)
