"""The config.json of a compressed model: sizes, per-layer lists, and the family it is written as."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from compress.errors import UserError
from compress.family import Family, WriteRule, load_families
from compress.shapes import LayerShape, ModelShape
from compress.spec import ModelSpec, Settings


def find_writer(spec: ModelSpec, shape: ModelShape) -> WriteRule | Family | None:
    """Return how a compressed shape is written: the family itself, a WriteRule to another, or None (refused)."""
    rule = spec.family.write_as
    if rule is not None and rule.when == "always":
        target = load_families()[rule.family]
        return rule if fits_limits(target, spec, shape) else None
    if fits_limits(spec.family, spec, shape):
        return spec.family
    biased = any(layer.biases for layer in shape.layers)
    if rule is not None and not (rule.without_biases and biased):
        return rule if fits_limits(load_families()[rule.family], spec, shape) else None
    return None


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


def write_config(spec: ModelSpec, shape: ModelShape, kept: Sequence[int]) -> dict[str, Any]:
    """Return the config.json of a compressed model whose layers are the old layers `kept`.

    Raises UserError when no stock configuration class accepts the shape.
    """
    config = copy.deepcopy(dict(spec.config))
    if shape == spec.shape and list(kept) == list(range(len(spec.layers))):
        return config
    writer = find_writer(spec, shape)
    if writer is None:
        raise UserError(
            f"The {spec.family.name} configuration class refuses {shape.layers[0].query_heads} heads at hidden size "
            f"{shape.hidden}; choose a head count that divides it (restrict --axes, or edit the plan)."
        )
    write_sizes(config, spec, shape)
    write_layer_lists(config, spec, kept)
    if isinstance(writer, WriteRule):
        rename_family(config, spec, writer)
    return config


def write_sizes(config: dict[str, Any], spec: ModelSpec, shape: ModelShape) -> None:
    """Set the size keys in place; uneven layers get `per_layer_config` entries against the first layer."""
    first = shape.layers[0]
    config |= {"hidden_size": shape.hidden, "num_hidden_layers": len(shape.layers)} | layer_sizes(first)
    if config.get("head_dim") or spec.family.config.get("head_dim") or shape.hidden != first.query:
        config["head_dim"] = first.head_dim
    config.pop("per_layer_config", None)
    if not shape.uniform:
        different = {str(i): layer_sizes(layer) for i, layer in enumerate(shape.layers)}
        config["per_layer_config"] = {i: sizes for i, sizes in different.items() if sizes != layer_sizes(first)}


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
