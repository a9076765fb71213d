"""What a plan must meet: a limit on some cost of the new model, and the steps that its counts keep to.

The optimiser knows no device: a cost is any object that prices the parts of a shape in whole units, and the parts add
up (`Costs`). Where they do not quite (a cache that holds a small model but not a large one), `measure` is the truth and
the search is repeated until the truth meets the limit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from compress.recipe import Recipe
from compress.shapes import LayerShape, ModelShape


class Costs(Protocol):
    """Prices in whole units: parameters, bytes or nanoseconds."""

    def attention(self, layer: LayerShape, hidden: int) -> int:
        """Return what a layer's attention costs at its counts."""
        ...

    def mlp(self, layer: LayerShape, hidden: int) -> int:
        """Return what a layer's MLP costs at its counts."""
        ...

    def fixed(self, layer: LayerShape, hidden: int) -> int:
        """Return what a layer costs whatever its counts."""
        ...

    def outside(self, shape: ModelShape) -> int:
        """Return what embeddings, final norm and head cost at a hidden width; the layers are not looked at."""
        ...


class ParameterCosts:
    """Counts parameters; those of the embeddings only where asked for."""

    def __init__(self, embeddings: bool = False) -> None:
        """Say whether the embeddings count."""
        self.embeddings = embeddings

    def attention(self, layer: LayerShape, hidden: int) -> int:
        """Count projections of queries, keys, values and outputs, with biases that go with heads."""
        return layer.resize(ffn=0).parameters(hidden) - layer.resize(0, 0).parameters(hidden)

    def mlp(self, layer: LayerShape, hidden: int) -> int:
        """Count gate, up and down, with biases that go with channels."""
        return layer.resize(0).parameters(hidden) - layer.resize(0, 0).parameters(hidden)

    def fixed(self, layer: LayerShape, hidden: int) -> int:
        """Count norms and biases of outputs."""
        return layer.resize(0, 0).parameters(hidden)

    def outside(self, shape: ModelShape) -> int:
        """Count the final norm, and embeddings if they count."""
        return shape.hidden + (shape.embedding_parameters if self.embeddings else 0)


@dataclass(frozen=True)
class Goal:
    """A limit on a cost.

    `dense`: what the dense model costs. `asked`: how the user said it, such as `--keep 0.7`. `unit`: of limit and cost.
    `again(value)`: the flag that would allow `value`. `measure`: the true cost of a whole shape where the parts do not
    quite add up to it. `ffn_step`, `hidden_step`, `kv_step`: multiples that counts keep to (0: the recipe's rule).
    """

    costs: Costs
    limit: int
    dense: int
    asked: str
    unit: str
    again: Callable[[int], str]
    measure: Callable[[ModelShape], float] | None = None
    ffn_step: int = 0
    hidden_step: int = 0
    kv_step: int = 1

    @property
    def share(self) -> float:
        """What may be left of the dense model's cost, at most 1."""
        return min(1.0, self.limit / max(self.dense, 1))


def sum_costs(costs: Costs, shape: ModelShape) -> int:
    """Return the cost of a whole shape, part by part."""
    parts = (costs.attention, costs.mlp, costs.fixed)
    return costs.outside(shape) + sum(part(layer, shape.hidden) for layer in shape.layers for part in parts)


def keep_goal(shape: ModelShape, recipe: Recipe) -> Goal:
    """Return the goal of `--keep`: a share of the non-embedding parameters."""
    total = shape.layer_parameters
    unit = "parameters outside the embeddings"
    return Goal(
        ParameterCosts(), int(recipe.keep * total), total, f"--keep {recipe.keep:g}", unit,
        lambda value: f"--keep {-(-1000 * value // total) / 1000:g}",
    )  # fmt: skip
