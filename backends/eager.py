"""Run a checkpoint with torch, all layers in memory: the runtime for checkpoints without an ONNX export."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backends.runtime import Ids, Logits, generate_greedily
from compress.checkpoint import Checkpoint
from compress.decoder import Past, compute_logits, make_frame, run_layer
from compress.spec import ModelSpec
from compress.weights import Weights, read_layer, read_spec

__all__ = ["EagerCache", "EagerModel", "load_eager"]


@dataclass(frozen=True)
class EagerCache:
    """Keys and values of every layer, and the number of tokens in them."""

    layers: tuple[Past, ...]
    length: int


@dataclass(frozen=True)
class EagerModel:
    """A model whose weights are all in memory; a tied head is the embedding itself."""

    spec: ModelSpec
    embedding: Tensor
    layers: tuple[Weights, ...]
    head: Weights

    @property
    def vocab(self) -> int:
        """Number of token ids."""
        return self.spec.shape.vocab

    def prefill(self, ids: Ids, mask: Ids | None = None, every: bool = True) -> tuple[Logits, EagerCache]:
        """Run prompts `[batch, sequence]` of equal length; return logits `[batch, sequence, vocab]` and the cache.

        Without `every` there are logits of the last position only.

        Raises ValueError for a mask with padding, which the decoder does not know: run rows of unequal length apart.
        """
        if mask is not None and not mask.all():
            raise ValueError("the eager runtime takes no padding: run prompts of unequal length one by one")
        return self._run(ids, None, every)

    def decode(self, ids: Ids, cache: EagerCache) -> tuple[Logits, EagerCache]:
        """Run further tokens `[batch, new]` after a cache, which stays valid; return logits and the longer cache."""
        return self._run(ids, cache)

    def generate(self, ids: Ids | Sequence[int], count: int, stop: Collection[int] = frozenset()) -> list[int]:
        """Return up to `count` greedy new ids after one prompt; a stop id is the last one returned."""
        return generate_greedily(self, ids, count, stop)

    @torch.inference_mode()
    def _run(self, ids: Ids, cache: EagerCache | None, every: bool = True) -> tuple[Logits, EagerCache]:
        start = cache.length if cache else 0
        frame = make_frame(self.spec, len(ids), ids.shape[1], start, self.embedding.dtype)
        x = self.embedding[torch.tensor(ids)] * self.spec.embedding_multiplier
        present = []
        for index, (layer, weights) in enumerate(zip(self.spec.layers, self.layers, strict=True)):
            x, own = run_layer(self.spec, layer, weights, x, frame, cache.layers[index] if cache else None)
            present.append(own)
        logits: Logits = compute_logits(self.spec, self.head, x if every else x[:, -1:]).numpy()
        return logits, EagerCache(tuple(present), start + ids.shape[1])


def load_eager(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> EagerModel:
    """Load all weights of a checkpoint, cast to `dtype`; raises UserError when config.json and tensors do not fit."""
    spec = read_spec(checkpoint)
    embedding = checkpoint.read_one(spec.names["embed"], dtype)
    tied = spec.shape.tied or spec.names["head"] == spec.names["embed"]
    head = embedding if tied else checkpoint.read_one(spec.names["head"], dtype)
    layers = tuple(read_layer(checkpoint, spec, index, dtype) for index in range(len(spec.layers)))
    norm = checkpoint.read_one(spec.names["final_norm"], dtype)
    return EagerModel(spec, embedding, layers, {"final_norm": norm, "head": head})
