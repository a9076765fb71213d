"""Strict loader of `families/*.toml`: tensor names by role and the conventions of a family; never sizes."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from importlib import resources
from typing import Any

from compress.errors import UserError

# The axes of every tensor by role; a fused tensor concatenates its parts along the first axis.
ROLE_AXES: Mapping[str, tuple[str, ...]] = {
    "embed": ("vocab", "hidden"),
    "head": ("vocab", "hidden"),
    "final_norm": ("hidden",),
    "attn_in": ("hidden",),
    "attn_out": ("hidden",),
    "mlp_in": ("hidden",),
    "mlp_out": ("hidden",),
    "q": ("query", "hidden"),
    "k": ("kv", "hidden"),
    "v": ("kv", "hidden"),
    "o": ("hidden", "query"),
    "q_bias": ("query",),
    "k_bias": ("kv",),
    "v_bias": ("kv",),
    "o_bias": ("hidden",),
    "q_norm": ("head",),
    "k_norm": ("head",),
    "gate": ("ffn", "hidden"),
    "up": ("ffn", "hidden"),
    "down": ("hidden", "ffn"),
    "gate_bias": ("ffn",),
    "up_bias": ("ffn",),
    "down_bias": ("hidden",),
}
NORM_ROLES = ("attn_in", "attn_out", "mlp_in", "mlp_out")
# The norm behind a branch -> the projection whose output it reads, and the norm at the start of the same branch.
POST_NORMS: Mapping[str, tuple[str, str]] = {"attn_out": ("o", "attn_in"), "mlp_out": ("down", "mlp_in")}
BRANCHES: Mapping[str, str] = {"attn_out": "attention", "mlp_out": "MLP"}
# Keys of our own in config.json: `per_layer_config` entries list absorbed norms, EXTENSION lists added biases.
PER_LAYER, ABSORBED, EXTENSION = "per_layer_config", "absorbed_norms", "lightpress"
FUSED_ROLES = ("qkv", "gate_up")
BIASED = tuple(role.removesuffix("_bias") for role in ROLE_AXES if role.endswith("_bias"))
# Left-over buffers of old exports: derived values, safe to leave out.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


@dataclass(frozen=True)
class TensorRule:
    """Where one role is stored: a name template, an optional config flag, and the roles fused in it."""

    name: str
    when: str = ""
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class KindRule:
    """A kind of MLP and the layers that have it: `all`, `from` a config key on, or `list` in the config."""

    name: str
    layers: str = "all"
    key: str = ""
    tensors: Mapping[str, TensorRule] = field(default_factory=dict)


@dataclass(frozen=True)
class NormRule:
    """`offset` is added to stored norm weights (1 where the file holds w - 1)."""

    offset: float = 0.0


@dataclass(frozen=True)
class ActivationRule:
    """The config key that names the gate's activation function."""

    key: str = "hidden_act"


@dataclass(frozen=True)
class AttentionRule:
    """Score scale (`head_dim`, or a config key), soft-cap key, and the span of qk-norms (`head` or `all`)."""

    scale: str = "head_dim"
    softcap: str = ""
    qk_norm: str = ""


@dataclass(frozen=True)
class RopeRule:
    """Rotary conventions: base, pairing, other base in sliding layers, layers without rotation."""

    theta: float = 10000.0
    interleaved: bool = False
    sliding_theta: float = 0.0
    sliding_theta_key: str = ""
    list: str = ""
    interval: str = ""
    aliases: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class WindowRule:
    """Sliding windows: size key, enabling key, and which layers (all, from, except_every, without_rope)."""

    size: str = ""
    enabled: str = ""
    layers: str = "none"
    key: str = ""
    period: int = 0


@dataclass(frozen=True)
class MultiplierRule:
    """Factors on embeddings and on each branch: a config key, or `sqrt_hidden`."""

    embedding: str = ""
    residual: str = ""


@dataclass(frozen=True)
class LogitRule:
    """Config keys of the logits' divisor and soft cap."""

    divide: str = ""
    softcap: str = ""


@dataclass(frozen=True)
class LimitRule:
    """Shapes that the family's stock configuration class refuses."""

    heads_divide_hidden: bool = False
    hidden_is_heads_for: tuple[str, ...] = ()


@dataclass(frozen=True)
class WriteRule:
    """As which other family a model is written: compressed (`always`, `heads_do_not_divide`) or `absorbed_as`."""

    when: str = ""
    family: str = ""
    without_biases: bool = False
    set: Mapping[str, Any] = field(default_factory=dict)
    copy: Mapping[str, str] = field(default_factory=dict)
    empty: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """Everything about a family that is not a size."""

    name: str
    model_types: tuple[str, ...]
    architecture: str
    stock: bool = True
    config: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, TensorRule] = field(default_factory=dict)
    layer: Mapping[str, TensorRule] = field(default_factory=dict)
    kinds: tuple[KindRule, ...] = ()
    feeds: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    norm: NormRule = field(default_factory=NormRule)
    activation: ActivationRule = field(default_factory=ActivationRule)
    attention: AttentionRule = field(default_factory=AttentionRule)
    rope: RopeRule = field(default_factory=RopeRule)
    window: WindowRule = field(default_factory=WindowRule)
    multipliers: MultiplierRule = field(default_factory=MultiplierRule)
    logits: LogitRule = field(default_factory=LogitRule)
    limits: LimitRule = field(default_factory=LimitRule)
    write_as: WriteRule | None = None
    absorbed_as: WriteRule | None = None


TABLES: Mapping[str, Any] = {
    "norm": NormRule,
    "activation": ActivationRule,
    "attention": AttentionRule,
    "rope": RopeRule,
    "window": WindowRule,
    "multipliers": MultiplierRule,
    "logits": LogitRule,
    "limits": LimitRule,
    "write_as": WriteRule,
    "absorbed_as": WriteRule,
}
CHOICES: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("window", "layers"): ("none", "all", "from", "except_every", "without_rope"),
    ("attention", "qk_norm"): ("", "head", "all"),
    ("write_as", "when"): ("always", "heads_do_not_divide"),
    ("kinds", "layers"): ("all", "from", "list"),
}


def build_table(kind: type[Any], data: Mapping[str, Any], where: str, table: str) -> Any:
    """Build the dataclass `kind` from a TOML table; an unknown key or a wrong type is an error."""
    known = {item.name: item for item in fields(kind)}
    for key, value in data.items():
        if key not in known:
            raise UserError(f"{where}: unknown key '{key}' in [{table}]; known keys: {', '.join(sorted(known))}.")
        allowed = CHOICES.get((table, key))
        if allowed and value not in allowed:
            raise UserError(f"{where}: [{table}] {key} = '{value}' is not one of {', '.join(allowed)}.")
        check_type(str(known[key].type), value, f"{where}: [{table}] {key}")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})


def check_type(declared: str, value: Any, where: str) -> None:
    """Raise UserError when a TOML value does not fit the declared field type."""
    types: dict[str, tuple[type, ...]] = {
        "str": (str,), "bool": (bool,), "int": (int,), "float": (float, int), "tuple": (list,), "Mapping": (dict,),
    }  # fmt: skip
    wanted = types.get(declared.split("[")[0].split(" ")[0])
    wrong_bool = isinstance(value, bool) and declared != "bool"
    if wanted and (not isinstance(value, wanted) or wrong_bool):
        raise UserError(f"{where} must be a {declared.split('[')[0]}, got {value!r}.")


def build_tensors(data: Mapping[str, Any], where: str, table: str) -> dict[str, TensorRule]:
    """Build role -> TensorRule; an empty string removes an inherited role."""
    rules = {}
    for role, value in data.items():
        if role not in ROLE_AXES and role not in FUSED_ROLES:
            raise UserError(f"{where}: unknown tensor role '{role}' in [{table}].")
        if value == "":
            continue
        rule = TensorRule(value) if isinstance(value, str) else build_table(TensorRule, value, where, f"{table}.{role}")
        if (role in FUSED_ROLES) != bool(rule.parts):
            raise UserError(f"{where}: [{table}] {role} must list its parts exactly when it is a fused tensor.")
        rules[role] = rule
    return rules


def build_kind(data: Mapping[str, Any], where: str) -> KindRule:
    """Build one [[kinds]] table."""
    plain = {key: value for key, value in data.items() if key != "tensors"}
    rule: KindRule = build_table(KindRule, plain, where, "kinds")
    return KindRule(rule.name, rule.layers, rule.key, build_tensors(data.get("tensors", {}), where, "kinds.tensors"))


def build_family(data: Mapping[str, Any], where: str) -> Family:
    """Build a Family from merged TOML data; every key must be known."""
    known = {item.name for item in fields(Family)}
    unknown = sorted(set(data) - known)
    if unknown:
        raise UserError(f"{where}: unknown key '{unknown[0]}'; known keys: {', '.join(sorted(known))}.")
    missing = {"name", "model_types", "architecture", "model", "layer", "kinds"} - set(data)
    if missing:
        raise UserError(f"{where}: missing key '{min(missing)}'.")
    built: dict[str, Any] = {key: data[key] for key in ("name", "architecture", "stock", "config") if key in data}
    built |= {key: build_table(kind, data[key], where, key) for key, kind in TABLES.items() if key in data}
    built["model_types"] = tuple(data["model_types"])
    built["model"] = build_tensors(data["model"], where, "model")
    built["layer"] = build_tensors(data["layer"], where, "layer")
    built["kinds"] = tuple(build_kind(kind, where) for kind in data["kinds"])
    built["feeds"] = build_feeds(data.get("feeds", {}), where)
    return Family(**built)


def build_feeds(data: Mapping[str, Any], where: str) -> dict[str, tuple[str, ...]]:
    """Build norm -> projections that read it; every role must be known."""
    for norm, readers in data.items():
        unknown = [role for role in (norm, *readers) if role not in ROLE_AXES]
        if unknown:
            raise UserError(f"{where}: unknown tensor role '{unknown[0]}' in [feeds].")
    return {norm: tuple(readers) for norm, readers in data.items()}


def merge_tables(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Lay `own` over `base`, table by table; lists are replaced whole."""
    merged = dict(base)
    for key, value in own.items():
        inherited = merged.get(key)
        both = isinstance(value, dict) and isinstance(inherited, dict)
        merged[key] = merge_tables(inherited, value) if both and inherited else value
    return merged


def read_family_data(name: str) -> dict[str, Any]:
    """Read one family file with what it inherits through `base`, less the tables it lists in `without`."""
    source = resources.files("compress") / "families" / f"{name}.toml"
    own = tomllib.loads(source.read_text(encoding="utf-8"))
    base = own.pop("base", None)
    dropped = own.pop("without", [])
    inherited = read_family_data(base) if base else {}
    return merge_tables({key: value for key, value in inherited.items() if key not in dropped}, own)


@cache
def load_families() -> dict[str, Family]:
    """Load every shipped family, by name; raises UserError on an unknown key or two families of one model type."""
    names = sorted(
        item.name.removesuffix(".toml")
        for item in (resources.files("compress") / "families").iterdir()
        if item.name.endswith(".toml")
    )
    families = {name: build_family(read_family_data(name), f"compress/families/{name}.toml") for name in names}
    seen: dict[str, str] = {}
    for name, family in families.items():
        for model_type in family.model_types:
            if model_type in seen:
                raise UserError(f"Model type '{model_type}' is claimed by families '{seen[model_type]}' and '{name}'.")
            seen[model_type] = name
    return families


def name_likeness(given: str, known: str) -> tuple[bool, float]:
    """Return how alike two model types are: a common beginning counts before the share of equal letters."""
    begins = bool(given) and (known.startswith(given) or given.startswith(known))
    return begins, difflib.SequenceMatcher(None, given, known).ratio()


def find_family(config: Mapping[str, Any], where: str) -> Family:
    """Return the family of a config.json by its `model_type`; an unknown one is refused, naming the nearest."""
    model_type = str(config.get("model_type", ""))
    known = {kind: family for family in load_families().values() for kind in family.model_types}
    if model_type in known:
        return known[model_type]
    nearest = max(known, key=lambda kind: name_likeness(model_type.lower(), kind.lower()))
    raise UserError(
        f"{where}: model type '{model_type}' is not a family Lightpress knows (nearest: '{nearest}'); known are "
        f"{', '.join(sorted(known))}; if the tensors are the same, set model_type in a copy of config.json."
    )


def bias_flags(family: Family) -> dict[str, tuple[str, ...]]:
    """Return config key -> the projections whose biases it switches on, all at once, in the family's own class."""
    flags: dict[str, tuple[str, ...]] = {}
    for rules in (family.layer, *(kind.tensors for kind in family.kinds)):
        for role, rule in rules.items():
            if role.endswith("_bias") and rule.when:
                flags[rule.when] = (*flags.get(rule.when, ()), role.removesuffix("_bias"))
    return flags


def check_absorbable(family: Family, role: str) -> None:
    """Raise UserError unless `role` is a norm behind a branch that also has a norm at its start.

    What decides is the place in the graph, never the stored name. Without a norm at the start of the branch nothing
    would normalise what the branch reads (our rule; methods 1.5).
    """
    if role not in POST_NORMS:
        raise UserError(f"'{role}' is no norm behind a branch; only {' and '.join(POST_NORMS)} can be absorbed.")
    branch = BRANCHES[role]
    if role not in family.layer:
        raise UserError(
            f"Models of family '{family.name}' have no norm behind the {branch} ({role}), so there is nothing to "
            "absorb; leave absorption out."
        )
    if POST_NORMS[role][1] not in family.layer:
        raise UserError(
            f"Models of family '{family.name}' have no norm before the {branch}: with the one behind it ({role}) "
            "absorbed, the residual stream would never be normalised; leave absorption out."
        )


def explain_not_stock(config: Mapping[str, Any], where: str = "config.json") -> str:
    """Return why transformers' own classes cannot run a model with this config.json; nothing when they can."""
    if not find_family(config, where).stock:
        return f"transformers has no class for {config.get('model_type')}"
    layers = config.get(PER_LAYER) or {}
    if any(ABSORBED in own for own in layers.values()):
        return "transformers' classes have no layers without the norms behind their branches"
    if layers:
        return "transformers' classes have no shapes per layer"
    if (config.get(EXTENSION) or {}).get("biases"):
        return "transformers' classes have no place for the added biases"
    return ""
