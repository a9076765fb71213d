"""The config.json of a compressed model: sizes, per-layer lists, and the family it is written as."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from compress.errors import UserError
from compress.family import (
    ABSORBED,
    EXTENSION,
    NORM_ROLES,
    PER_LAYER,
    POST_NORMS,
    Family,
    WriteRule,
    bias_flags,
    check_absorbable,
    find_family,
    load_families,
)
from compress.shapes import LayerShape, ModelShape
from compress.spec import ModelSpec, Settings, read_added_biases, resolve_model


def find_writer(spec: ModelSpec, shape: ModelShape) -> WriteRule | Family | None:
    """Return how a compressed shape is written: its family itself, a WriteRule to another, or None (refused)."""
    family = family_without_norms(spec, shape)
    rule = family.write_as
    if rule is not None and rule.when == "always":
        target = load_families()[rule.family]
        return rule if fits_limits(target, spec, shape) else None
    if fits_limits(family, spec, shape):
        return family
    biased = any(layer.biases for layer in shape.layers)
    if rule is not None and not (rule.without_biases and biased):
        return rule if fits_limits(load_families()[rule.family], spec, shape) else None
    return None


def require_writer(spec: ModelSpec, shape: ModelShape, stock: bool = True) -> WriteRule | Family:
    """Return how a compressed shape is written; raises UserError when no stock configuration class accepts it.

    What no stock class opens anyway, uneven layers or what is not meant to be `stock`, keeps to no class's limits.
    """
    writer = find_writer(spec, shape)
    if writer is None and not (stock and shape.uniform):
        return family_without_norms(spec, shape)
    if writer is None:
        raise UserError(
            f"The {family_without_norms(spec, shape).name} configuration class refuses {shape.layers[0].query_heads} "
            f"heads at hidden size {shape.hidden}; choose a head count that divides it (restrict --axes, or edit the "
            "plan)."
        )
    return writer


def family_without_norms(spec: ModelSpec, shape: ModelShape) -> Family:
    """Return the family a model belongs to: its own, or that of a pre-norm relative when `shape` has no post-norm left.

    Every layer of such a shape is a plain pre-norm layer, which the relative's stock class runs (Pangu Light, arXiv
    2505.20155: absorption; the change of family is our reading). A family that names no relative stays itself.
    """
    rule = spec.family.absorbed_as
    if rule is None or any(role in layer.norms for layer in shape.layers for role in POST_NORMS):
        return spec.family
    return load_families()[rule.family]


def view_absorbed(spec: ModelSpec, shape: ModelShape) -> ModelSpec:
    """Return the dense model as a member of the family that `shape` belongs to."""
    rule = spec.family.absorbed_as
    if rule is None or family_without_norms(spec, shape) is spec.family:
        return spec
    config = copy.deepcopy(dict(spec.config))
    for own in (config.get(PER_LAYER) or {}).values():
        own.pop(ABSORBED, None)
    rename_family(config, spec, rule)
    return resolve_model(config, None)


def fits_limits(family: Family, spec: ModelSpec, shape: ModelShape) -> bool:
    """Tell whether the family's stock configuration class accepts the shape."""
    limits = family.limits
    for layer, own in zip(shape.layers, spec.layers, strict=False):
        if limits.heads_divide_hidden and shape.hidden % layer.query_heads:
            return False
        variant = own.rope.variant if own.rope else ""
        if variant in limits.hidden_is_heads_for and shape.hidden // layer.query_heads != layer.head_dim:
            return False
    return True


def write_config(spec: ModelSpec, shape: ModelShape, kept: Sequence[int], extend: bool = False) -> dict[str, Any]:
    """Return the config.json of a compressed model whose layers are the old layers `kept`.

    A norm that a layer of `shape` lacks was absorbed: with all of them gone the model is written as its pre-norm
    family, else `per_layer_config` names them, layer by layer. A bias that the dense model lacks is switched on by
    its family's own key, or with `extend` listed under a key of our own, which no stock class reads. Raises UserError
    when no stock configuration class accepts the shape or has a place for a bias.
    """
    if shape == spec.shape and list(kept) == list(range(len(spec.layers))):
        return copy.deepcopy(dict(spec.config))
    writer = require_writer(spec, shape, not extend)
    spec = view_absorbed(spec, shape)
    config = copy.deepcopy(dict(spec.config))
    write_sizes(config, spec, shape)
    write_layer_lists(config, spec, kept)
    if isinstance(writer, WriteRule):
        rename_family(config, spec, writer)
    write_biases(config, shape, extend)
    return config


def write_sizes(config: dict[str, Any], spec: ModelSpec, shape: ModelShape) -> None:
    """Set the size keys in place; layers that differ from the first or lost norms get `per_layer_config` entries."""
    first = shape.layers[0]
    config |= {"hidden_size": shape.hidden, "num_hidden_layers": len(shape.layers)} | layer_sizes(first)
    if config.get("head_dim") or spec.family.config.get("head_dim") or shape.hidden != first.query:
        config["head_dim"] = first.head_dim
    config.pop(PER_LAYER, None)
    changes = {str(i): layer_changes(spec.family, layer, first) for i, layer in enumerate(shape.layers)}
    if any(changes.values()):
        config[PER_LAYER] = {i: own for i, own in changes.items() if own}


def layer_changes(family: Family, layer: LayerShape, first: LayerShape) -> dict[str, Any]:
    """Return a layer's `per_layer_config` entry: sizes unlike the first layer's, and the norms that it lost."""
    sizes: dict[str, Any] = layer_sizes(layer) if layer_sizes(layer) != layer_sizes(first) else {}
    absorbed = [role for role in NORM_ROLES if role in family.layer and role not in layer.norms]
    for role in absorbed:
        check_absorbable(family, role)
    return sizes | ({ABSORBED: absorbed} if absorbed else {})


def layer_sizes(layer: LayerShape) -> dict[str, int]:
    """Return the config keys of one layer's sizes."""
    return {
        "intermediate_size": layer.ffn,
        "num_attention_heads": layer.query_heads,
        "num_key_value_heads": layer.kv_heads,
    }


def write_layer_lists(config: dict[str, Any], spec: ModelSpec, kept: Sequence[int]) -> None:
    """Write per-layer facts as explicit lists, since a rule by index would shift when layers go."""
    if "layer_types" in config or spec.family.window.layers not in ("none", "all"):
        kinds = config.get("layer_types") or [layer.shape.attention for layer in spec.layers]
        config["layer_types"] = [kinds[index] for index in kept]
    if spec.family.rope.list:
        config[spec.family.rope.list] = [int(spec.layers[index].rope is not None) for index in kept]


def rename_family(config: dict[str, Any], spec: ModelSpec, rule: WriteRule) -> None:
    """Turn the config into that of the family it is written as, in place."""
    target = load_families()[rule.family]
    settings = Settings(spec.config, spec.family)
    config |= dict(rule.set) | {key: settings.get(source) for key, source in rule.copy.items()}
    config |= {key: None for key in rule.empty}
    config["model_type"], config["architectures"] = target.model_types[0], [target.architecture]
    # Defaults that the target's class would fill in differently must be spelled out.
    for key in ("rms_norm_eps", "tie_word_embeddings", "hidden_act"):
        config.setdefault(key, settings.get(key))
    for key in rule.drop:
        config.pop(key, None)


def write_biases(config: dict[str, Any], shape: ModelShape, extend: bool) -> None:
    """Switch on the biases of `shape` in place: by the family's own keys, else by our extension where allowed."""
    family = find_family(config, "config.json")
    settings, wanted = Settings(config, family), set(shape.layers[0].biases)
    if any(set(layer.biases) != wanted for layer in shape.layers):
        raise ValueError("all layers of a shape must carry biases on the same projections (see add_biases)")
    for flag, projections in bias_flags(family).items():
        if wanted.issuperset(projections) and not settings.get(flag):
            config[flag] = True
    stored = resolve_model(config, None).shape.layers[0].biases
    added = [name for name in shape.layers[0].biases if name not in stored]
    earlier = read_added_biases(config)
    if added and not (extend or earlier):
        raise refuse_biases(family, added)
    if added:
        config[EXTENSION] = {**(config.get(EXTENSION) or {}), "biases": [*earlier, *added]}


def refuse_biases(family: Family, projections: Sequence[str]) -> UserError:
    """Return the error for biases that a family's own class has no place for."""
    return UserError(
        f"The {family.name} configuration class has no place for a bias on {', '.join(projections)}; "
        "use --repair lstsq or none, which add no biases."
    )
