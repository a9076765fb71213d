"""Shapes of a decoder-only language model: the vocabulary of all other rooms (frozen, JSON-able)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

FULL = "full_attention"
SLIDING = "sliding_attention"


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one decoder layer; `biases` names the projections that carry a bias vector."""

    query_heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    kind: str = "dense"
    attention: str = FULL
    norms: tuple[str, ...] = ("attn_in", "mlp_in")
    biases: tuple[str, ...] = ()

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.query_heads // self.kv_heads

    @property
    def query(self) -> int:
        """Rows of the query projection."""
        return self.query_heads * self.head_dim

    @property
    def kv(self) -> int:
        """Rows of the key (and of the value) projection."""
        return self.kv_heads * self.head_dim

    def parameters(self, hidden: int) -> int:
        """Count the layer's weights: projections, norms over the hidden width, biases (qk-norms are left out)."""
        attention = hidden * (2 * self.query + 2 * self.kv)
        mlp = 3 * hidden * self.ffn
        rows = {"q": self.query, "k": self.kv, "v": self.kv, "o": hidden, "gate": self.ffn, "up": self.ffn}
        bias = sum(rows.get(name, hidden) for name in self.biases)
        return attention + mlp + bias + hidden * len(self.norms)

    def resize(self, kv_heads: int | None = None, ffn: int | None = None) -> LayerShape:
        """Return the same layer with other counts; query heads follow the key/value heads."""
        kv = self.kv_heads if kv_heads is None else kv_heads
        return replace(self, query_heads=kv * self.group, kv_heads=kv, ffn=self.ffn if ffn is None else ffn)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a whole decoder: vocabulary, residual width, and one `LayerShape` per layer."""

    vocab: int
    hidden: int
    tied: bool
    layers: tuple[LayerShape, ...]

    @property
    def uniform(self) -> bool:
        """True when all layers have equal counts, norms and biases (attention kinds may differ)."""
        return len({replace(x, attention=FULL) for x in self.layers}) <= 1

    @property
    def layer_parameters(self) -> int:
        """Non-embedding parameters: what a `--keep` fraction counts."""
        return sum(layer.parameters(self.hidden) for layer in self.layers) + self.hidden

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding and of an untied output head."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.layer_parameters + self.embedding_parameters

    def keep_layers(self, kept: Iterable[int]) -> ModelShape:
        """Return the shape with only the layers `kept`, in that order."""
        return replace(self, layers=tuple(self.layers[index] for index in kept))

    def to_json(self) -> dict[str, Any]:
        """Return plain lists, numbers and strings."""
        return asdict(self)
