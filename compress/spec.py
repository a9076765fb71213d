"""A family, a config.json and the stored tensor shapes, resolved into the numbers the forward pass needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from compress.errors import UserError
from compress.family import (
    ABSORBED,
    BIASED,
    EXTENSION,
    IGNORED_SUFFIXES,
    NORM_ROLES,
    PER_LAYER,
    ROLE_AXES,
    Family,
    KindRule,
    TensorRule,
    check_absorbable,
    find_family,
)
from compress.rope import VARIANTS, RopeSpec
from compress.shapes import FULL, SLIDING, LayerShape, ModelShape

Shapes = Mapping[str, tuple[int, ...]]
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")


@dataclass(frozen=True)
class LayerSpec:
    """One layer: its sizes, the stored tensor of each role, and how it attends."""

    shape: LayerShape
    names: Mapping[str, str] = field(hash=False)
    parts: Mapping[str, tuple[str, ...]] = field(hash=False)
    window: int | None
    rope: RopeSpec | None


@dataclass(frozen=True)
class ModelSpec:
    """A whole model: sizes, names and conventions; holds no tensor."""

    family: Family = field(hash=False)
    config: Mapping[str, Any] = field(hash=False)
    shape: ModelShape
    layers: tuple[LayerSpec, ...]
    names: Mapping[str, str] = field(hash=False)
    eps: float
    activation: str
    attention_scale: float
    attention_softcap: float | None
    embedding_multiplier: float
    residual_multiplier: float
    logit_divisor: float
    logit_softcap: float | None

    @property
    def norm_offset(self) -> float:
        """What is added to stored norm weights."""
        return self.family.norm.offset

    @property
    def shares_ends(self) -> bool:
        """Whether embedding and head are one matrix, under whatever names the checkpoint stores it."""
        return self.shape.tied or self.names["embed"] == self.names["head"]

    @property
    def max_positions(self) -> int:
        """Longest sequence the model was made for, in tokens."""
        return int(self.config.get("max_position_embeddings") or 2048)


class Settings:
    """Config values with the family's defaults; a key that config.json sets to null stays null."""

    def __init__(self, config: Mapping[str, Any], family: Family) -> None:
        """Wrap one config.json."""
        self.config, self.family = config, family

    def get(self, key: str) -> Any:
        """Return the value of `key`, or None when neither config.json nor the family has it."""
        return self.config[key] if key in self.config else self.family.config.get(key)

    def size(self, key: str) -> int:
        """Return a required positive integer; raises UserError when config.json lacks it."""
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"config.json: '{key}' must be a positive integer, got {value!r}.")
        return value


def resolve_model(config: Mapping[str, Any], tensors: Shapes | None, where: str = "config.json") -> ModelSpec:
    """Resolve a model's description, checked against the stored `tensors` unless those are None.

    Raises UserError for an unknown family, an impossible config, or tensors that do not fit.
    """
    family = find_family(config, where)
    try:
        spec = resolve_family(config, family, tensors or {})
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, ZeroDivisionError) as error:
        # config.json is the user's: any of its values may have a wrong type, and all are read in there.
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{where}: config.json holds a value that cannot be used ({reason}); compare it with the original."
        ) from error
    if tensors is not None:
        check_tensors(spec, tensors, where)
    return spec


def resolve_family(config: Mapping[str, Any], family: Family, tensors: Shapes) -> ModelSpec:
    """Resolve a config whose family is known."""
    settings = Settings(config, family)
    tied = bool(settings.get("tie_word_embeddings"))
    count = settings.size("num_hidden_layers")
    rotary = [uses_rope(settings, index) for index in range(count)]
    kinds = [attention_kind(settings, index, rotary[index]) for index in range(count)]
    layers = tuple(
        resolve_layer(settings, index, kinds[index], rotary[index]) for index in range(count)
    )
    hidden = settings.size("hidden_size")
    shape = ModelShape(settings.size("vocab_size"), hidden, tied, tuple(layer.shape for layer in layers))
    names = resolve_model_names(family, tensors, tied)
    return ModelSpec(family, dict(config), shape, layers, names, **read_conventions(settings, hidden))


def read_conventions(settings: Settings, hidden: int) -> dict[str, Any]:
    """Read the model-wide numbers: epsilon, activation, scales, multipliers, soft caps."""
    family = settings.family
    activation = str(settings.get(family.activation.key) or settings.get("hidden_act"))
    if activation not in ACTIVATIONS:
        raise UserError(f"config.json: activation '{activation}' is not one of {', '.join(ACTIVATIONS)}.")
    multipliers = family.multipliers
    embedding = math.sqrt(hidden) if multipliers.embedding == "sqrt_hidden" else settings.get(multipliers.embedding)
    return {
        "eps": float(settings.get("rms_norm_eps")),
        "activation": activation,
        "attention_scale": read_attention_scale(settings),
        "attention_softcap": settings.get(family.attention.softcap) or None,
        "embedding_multiplier": float(embedding or 1.0),
        "residual_multiplier": float(settings.get(multipliers.residual) or 1.0),
        "logit_divisor": float(settings.get(family.logits.divide) or 1.0),
        "logit_softcap": settings.get(family.logits.softcap) or None,
    }


def read_attention_scale(settings: Settings) -> float:
    """Return the factor on query-key products."""
    rule = settings.family.attention.scale
    if rule == "head_dim":
        return float(head_dim(settings) ** -0.5)
    value = float(settings.get(rule))
    # A "scalar" is what the head size stands for and enters as its inverse root; a multiplier enters as it is.
    return value**-0.5 if rule.endswith("scalar") else value


def head_dim(settings: Settings) -> int:
    """Return the size of one head: given, or hidden size over heads."""
    return int(settings.get("head_dim") or settings.size("hidden_size") // settings.size("num_attention_heads"))


def uses_rope(settings: Settings, index: int) -> bool:
    """Decide whether layer `index` rotates its queries and keys."""
    rule = settings.family.rope
    given = settings.get(rule.list) if rule.list else None
    if given:
        return bool(given[index])
    interval = settings.get(rule.interval) if rule.interval else None
    return not interval or (index + 1) % int(interval) != 0


def attention_kind(settings: Settings, index: int, rotary: bool) -> str:
    """Decide whether layer `index` attends to everything before it or through a sliding window."""
    rule = settings.family.window
    if rule.layers == "none" or not settings.get(rule.size) or (rule.enabled and not settings.get(rule.enabled)):
        return FULL
    given = settings.get("layer_types")
    if given and rule.layers != "all":
        if len(given) != settings.size("num_hidden_layers"):
            raise UserError(f"config.json: layer_types has {len(given)} entries, not one per layer.")
        if given[index] not in (FULL, SLIDING):
            raise UserError(f"config.json: layer type '{given[index]}' is neither {FULL} nor {SLIDING}.")
        return str(given[index])
    period = int(settings.get(rule.key) or rule.period or 1) if rule.layers == "except_every" else 1
    slides = {
        "all": True,
        "from": rule.layers == "from" and index >= int(settings.get(rule.key) or 0),
        "except_every": (index + 1) % period != 0,
        "without_rope": not rotary,
    }
    return SLIDING if slides[rule.layers] else FULL


def resolve_layer(settings: Settings, index: int, attention: str, rotary: bool) -> LayerSpec:
    """Resolve one layer: sizes (with its `per_layer_config` overrides), stored names, window and rotation."""
    family, config = settings.family, settings.config
    changes = (config.get(PER_LAYER) or {}).get(str(index), {})
    own = Settings({**config, **changes}, family)
    kind = find_kind(own, index)
    wanted = layer_rules(settings, kind, read_absorbed(family, changes, index))
    names = {role: rule.name.format(layer=index, expert="{expert}") for role, rule in wanted.items()}
    heads = own.size("num_attention_heads")
    shape = LayerShape(
        query_heads=heads,
        kv_heads=int(own.get("num_key_value_heads") or heads),
        head_dim=head_dim(settings),
        ffn=own.size("intermediate_size"),
        kind=kind.name,
        attention=attention,
        norms=tuple(role for role in NORM_ROLES if role in names),
        biases=tuple(name for name in BIASED if f"{name}_bias" in names),
    )
    if shape.query_heads % shape.kv_heads:
        raise UserError(f"config.json: {heads} attention heads cannot share {shape.kv_heads} key/value heads evenly.")
    window = int(settings.get(family.window.size)) if attention == SLIDING else None
    rope = resolve_rope(settings, attention) if rotary else None
    return LayerSpec(shape, names, fused_parts(wanted), window, rope)


def layer_rules(settings: Settings, kind: KindRule, absorbed: tuple[str, ...]) -> dict[str, TensorRule]:
    """Return the rules of the tensors that a layer stores: what its flags switch on, less absorbed norms, added biases.

    Added biases are our own extension of config.json: `lightpress: {"biases": ["o", "down"]}`, stored beside their
    projection's weight.
    """
    rules = {**settings.family.layer, **kind.tensors}
    wanted = {
        role: rule
        for role, rule in rules.items()
        if role not in absorbed and (not rule.when or settings.get(rule.when))
    }
    for projection in read_added_biases(settings.config):
        if projection not in BIASED or projection not in wanted:
            raise UserError(
                f"config.json: '{EXTENSION}' adds a bias to '{projection}', which is no projection that family "
                f"'{settings.family.name}' stores on its own; remove it there."
            )
        name = wanted[projection].name.removesuffix(".weight") + ".bias"
        wanted.setdefault(f"{projection}_bias", TensorRule(name))
    return wanted


def read_added_biases(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the projections whose biases config.json adds to what the family's own class has."""
    return tuple((config.get(EXTENSION) or {}).get("biases") or ())


def read_absorbed(family: Family, changes: Mapping[str, Any], index: int) -> tuple[str, ...]:
    """Return the norm roles that a layer lost to absorption; raises UserError for one that cannot be absorbed."""
    absorbed = changes.get(ABSORBED) or []
    if not isinstance(absorbed, list):
        raise UserError(f"config.json: {ABSORBED} of layer {index} must be a list of norm roles, got {absorbed!r}.")
    for role in absorbed:
        check_absorbable(family, str(role))
    return tuple(absorbed)


def fused_parts(rules: Mapping[str, TensorRule]) -> dict[str, tuple[str, ...]]:
    """Return the parts of each fused role."""
    return {role: rule.parts for role, rule in rules.items() if rule.parts}


def find_kind(settings: Settings, index: int) -> KindRule:
    """Return the kind of MLP that layer `index` has; later kinds override earlier ones."""
    chosen = None
    for kind in settings.family.kinds:
        value = settings.get(kind.key) if kind.key else None
        listed = kind.layers == "list" and value is not None and index < len(value) and value[index] == kind.name
        if kind.layers == "all" or listed or (kind.layers == "from" and value is not None and index >= int(value)):
            chosen = kind
    if chosen is None:
        raise UserError(f"Family '{settings.family.name}' names no kind of MLP for layer {index}.")
    return chosen


def resolve_rope(settings: Settings, attention: str) -> RopeSpec:
    """Read the rotary options of one attention kind from either generation of config keys."""
    rule, config = settings.family.rope, settings.config
    stored = config.get("rope_scaling") or config.get("rope_parameters") or {}
    nested = any(key in stored for key in (FULL, SLIDING))
    options = dict((stored.get(attention) or {}) if nested else stored)
    theta = rope_theta(settings, attention, options)
    if rule.sliding_theta and attention == SLIDING and not nested:
        options = {}
    variant = str(options.get("rope_type") or options.get("type") or "default")
    variant = rule.aliases.get(variant, variant)
    if variant not in VARIANTS:
        raise UserError(f"config.json: rotary variant '{variant}' is not one of {', '.join(VARIANTS)}.")
    size = head_dim(settings)
    part = options.get("partial_rotary_factor") or settings.get("partial_rotary_factor") or 1.0
    complete_rope(settings, variant, options)
    return RopeSpec(int(size * part), theta, variant, rule.interleaved, options)


def rope_theta(settings: Settings, attention: str, options: Mapping[str, Any]) -> float:
    """Return the rotary base: per attention kind, per model, or the family's own."""
    rule = settings.family.rope
    if rule.sliding_theta and attention == SLIDING:
        nested = settings.config.get("rope_parameters") or {}
        given = options.get("rope_theta") if SLIDING in nested else None
        return float(given or settings.get(rule.sliding_theta_key) or rule.sliding_theta)
    return float(options.get("rope_theta") or settings.get("rope_theta") or rule.theta)


def complete_rope(settings: Settings, variant: str, options: dict[str, Any]) -> None:
    """Fill in what a scaling variant derives from the model: original context and factor."""
    needed = {
        "linear": ("factor",),
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "longrope": ("long_factor", "short_factor"),
    }
    for key in needed.get(variant, ()):
        if options.get(key) is None:
            raise UserError(f"config.json: rotary variant '{variant}' needs '{key}'.")
    if variant not in ("llama3", "yarn", "longrope"):
        return
    longest = settings.size("max_position_embeddings")
    outside = settings.get("original_max_position_embeddings")
    context = outside or options.get("original_max_position_embeddings") or longest
    options["original_max_position_embeddings"] = context
    if options.get("factor") is None:
        options["factor"] = longest / context


def resolve_model_names(family: Family, tensors: Shapes, tied: bool) -> dict[str, str]:
    """Return role -> stored name of the tensors outside the layers; a tied matrix may be stored under either name."""
    names = {role: rule.name for role, rule in family.model.items()}
    embed, head = names["embed"], names["head"]
    if tied and embed not in tensors and head in tensors:
        return {**names, "embed": head, "head": head}
    if tied and head not in tensors:
        return {**names, "head": embed}
    return names


def role_shape(shape: ModelShape, layer: LayerShape | None, role: str, qk_norm: str = "") -> tuple[int, ...]:
    """Return the stored shape of one (unfused) role."""
    sizes = {"vocab": shape.vocab, "hidden": shape.hidden}
    if layer is not None:
        sizes |= {"query": layer.query, "kv": layer.kv, "ffn": layer.ffn, "head": layer.head_dim}
    return tuple(sizes[axis] for axis in role_axes(role, qk_norm))


def role_axes(role: str, qk_norm: str = "") -> tuple[str, ...]:
    """Return the axes of a role; qk-norms that span all heads follow the query or key/value rows."""
    if qk_norm == "all" and role in ("q_norm", "k_norm"):
        return ("query",) if role == "q_norm" else ("kv",)
    return ROLE_AXES[role]


def expected_tensors(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return stored name -> shape of every tensor the model must have."""
    shape, span = spec.shape, spec.family.attention.qk_norm
    wanted = {name: role_shape(shape, None, role) for role, name in spec.names.items()}
    for layer in spec.layers:
        for role, name in layer.names.items():
            parts = layer.parts.get(role, (role,))
            shapes = [role_shape(shape, layer.shape, part, span) for part in parts]
            wanted[name] = (sum(rows[0] for rows in shapes), *shapes[0][1:])
    return wanted


def check_tensors(spec: ModelSpec, tensors: Shapes, where: str) -> None:
    """Raise UserError for the first tensor that is missing, of the wrong shape, or unknown."""
    wanted = expected_tensors(spec)
    for name, shape in wanted.items():
        if name not in tensors:
            raise UserError(f"{where}: tensor '{name}' {list(shape)} is missing; the checkpoint is not complete.")
        if tuple(tensors[name]) != shape:
            raise UserError(
                f"{where}: tensor '{name}' has shape {list(tensors[name])} but config.json says {list(shape)}."
            )
    known = set(wanted) | {rule.name for rule in spec.family.model.values()}
    unknown = sorted(name for name in tensors if name not in known and not name.endswith(IGNORED_SUFFIXES))
    if unknown:
        raise UserError(
            f"{where}: {len(unknown)} tensors are not part of family '{spec.family.name}', the first is "
            f"'{unknown[0]}'; remove them or use the family's plain language model."
        )
