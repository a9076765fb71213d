"""Descriptions of changed models: post-norms that were absorbed, biases that a repair adds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from compress.family import (
    ABSORBED,
    BIASED,
    NORM_ROLES,
    PER_LAYER,
    Family,
    bias_flags,
    check_absorbable,
    load_families,
)
from compress.shapes import LayerShape, ModelShape
from compress.spec import LayerSpec, ModelSpec, read_added_biases
from compress.spec_writer import refuse_biases, require_writer


def drop_norms(shape: LayerShape, roles: Collection[str]) -> LayerShape:
    """Return the layer's shape without the norms of `roles`."""
    return replace(shape, norms=tuple(role for role in shape.norms if role not in roles))


def resolve_absorbed(spec: ModelSpec, absorbed: Mapping[int, Collection[str]]) -> ModelSpec:
    """Return the description of the model whose layers lost the post-norms `absorbed` (layer -> roles).

    It is what `resolve_model` makes of the returned `config`; the family stays. Raises UserError for a role that is
    no post-norm, or one without which nothing would normalise the residual stream.
    """
    for role in {role for roles in absorbed.values() for role in roles}:
        check_absorbable(spec.family, role)
    layers = tuple(drop_roles(layer, absorbed.get(index, ())) for index, layer in enumerate(spec.layers))
    shape = replace(spec.shape, layers=tuple(layer.shape for layer in layers))
    return replace(spec, config=mark_absorbed(spec.config, layers, spec.family), shape=shape, layers=layers)


def drop_roles(layer: LayerSpec, roles: Collection[str]) -> LayerSpec:
    """Return a layer without the norms of `roles`."""
    names = {role: name for role, name in layer.names.items() if role not in roles}
    return replace(layer, shape=drop_norms(layer.shape, roles), names=names)


def mark_absorbed(config: Mapping[str, Any], layers: Sequence[LayerSpec], family: Family) -> dict[str, Any]:
    """Return the config with the norms that each layer lost in its `per_layer_config` entry."""
    changes = dict(config.get(PER_LAYER) or {})
    for index, layer in enumerate(layers):
        lost = [role for role in NORM_ROLES if role in family.layer and role not in layer.names]
        if lost:
            changes[str(index)] = {**changes.get(str(index), {}), ABSORBED: lost}
    return {**config, PER_LAYER: changes} if changes else dict(config)


def add_biases(spec: ModelSpec, shape: ModelShape, projections: Collection[str], extend: bool = False) -> ModelShape:
    """Return `shape` with a bias on `projections` in every layer, and on all others that come along with them.

    A family's own class switches biases on for several projections at once; those nobody asked for are zeros
    (`surgery.biases`). Raises UserError where that class has no place for one. With `extend` only those asked for are
    added, by our own extension of config.json, which no stock class reads.
    """
    if extend:
        fused = [name for name in projections if name not in spec.layers[0].names]
        if fused:
            raise refuse_biases(spec.family, fused)
        return replace(shape, layers=tuple(carry_biases(layer, projections) for layer in shape.layers))
    held = set(shape.layers[0].biases) | set(read_added_biases(spec.config))
    missing = [name for name in projections if name not in held]
    family = writing_family(spec, shape)
    switches = bias_flags(family).values()
    added = {name for names in switches if set(names) & set(missing) for name in names}
    homeless = [name for name in missing if name not in added]
    if homeless:
        raise refuse_biases(family, homeless)
    return replace(shape, layers=tuple(carry_biases(layer, {*added, *projections}) for layer in shape.layers))


def carry_biases(shape: LayerShape, projections: Collection[str]) -> LayerShape:
    """Return the layer's shape with biases on `projections` too, in the order in which descriptions list them."""
    wanted = {*shape.biases, *projections}
    return replace(shape, biases=tuple(name for name in BIASED if name in wanted))


def writing_family(spec: ModelSpec, shape: ModelShape) -> Family:
    """Return the family as which a compressed shape is written; raises UserError when none accepts it."""
    writer = require_writer(spec, shape)
    return writer if isinstance(writer, Family) else load_families()[writer.family]
