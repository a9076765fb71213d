"""The description of the model that a plan and a recipe make."""

from __future__ import annotations

from typing import Any

from compress.plan import Plan, keep_everything, plan_shape
from compress.recipe import Recipe
from compress.shapes import ModelShape
from compress.spec import ModelSpec, resolve_model
from compress.spec_change import add_biases
from compress.spec_writer import write_config

# Repairs that move a bias want one on both last projections.
REPAIRED = ("o", "down")


def describe_new(spec: ModelSpec, plan: Plan, recipe: Recipe) -> ModelSpec:
    """Return the new model's description; UserError when no stock class accepts the shape."""
    return resolve_model(new_config(spec, plan, recipe), None)


DEFAULTS = Recipe()


def new_config(spec: ModelSpec, plan: Plan, recipe: Recipe = DEFAULTS) -> dict[str, Any]:
    """Return the config.json of the compressed model; UserError when no stock class accepts the shape.

    A rotated model has a head of its own (methods 8.5).
    """
    turned = recipe.rotate != "none" and len(plan.hidden) < spec.shape.hidden
    base = resolve_model({**spec.config, "tie_word_embeddings": False}, None) if turned else spec
    return write_config(base, new_shape(base, plan, recipe), plan.kept_layers, extend=recipe.biases == "own")


def new_shape(spec: ModelSpec, plan: Plan, recipe: Recipe) -> ModelShape:
    """Return the shape of the compressed model, with the biases that the recipe asks for."""
    shape = plan_shape(plan, spec.shape)
    if recipe.biases == "none" or plan == keep_everything(spec.shape):
        return shape
    return add_biases(spec, shape, REPAIRED, extend=recipe.biases == "own")
