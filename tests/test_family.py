"""Families: strict files without dead keys, and checkpoints that do not fit are refused naming the tensor."""

from __future__ import annotations

import ast
import json
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file, save_file
from test_decoder import run_decoder
from tiny import CASES, FAMILIES, make_checkpoint, make_config

from compress import family as family_module
from compress.checkpoint import open_checkpoint
from compress.family import (
    FUSED_ROLES,
    NORM_ROLES,
    ROLE_AXES,
    Family,
    build_family,
    find_family,
    load_families,
    merge_tables,
    read_family_data,
)
from compress.spec import expected_tensors, resolve_model
from compress.weights import fuse_parts, read_layer, read_spec

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "compress" / "families").glob("*.toml"))
NAMES = [path.stem for path in FILES]


# The files


def build(**changes: Any) -> Family:
    return build_family(merge_tables(read_family_data("llama"), changes), "x.toml")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nonsense": 1}, ["x.toml", "'nonsense'", "known keys"]),
        ({"norm": {"ofset": 1.0}}, ["'ofset'", "[norm]", "offset"]),
        ({"rope": {"theta": 1e4, "base": 2}}, ["'base'", "[rope]"]),
        ({"write_as": {"where": "always"}}, ["'where'", "[write_as]"]),
        ({"limits": {"max_heads": 3}}, ["'max_heads'", "[limits]"]),
        ({"layer": {"q": {"name": "a", "if": "b"}}}, ["'if'", "[layer.q]"]),
        ({"layer": {"query": "a"}}, ["'query'", "[layer]"]),
        ({"model": {"lm_head": "a"}}, ["'lm_head'", "[model]"]),
        ({"kinds": [{"name": "dense", "tensors": {"w1": "a"}}]}, ["'w1'", "[kinds.tensors]"]),
        ({"kinds": [{"name": "dense", "layer": "all"}]}, ["'layer'", "[kinds]"]),
        ({"kinds": [{"name": "dense", "layers": "some"}]}, ["'some'", "all, from, list"]),
        ({"layer": {"qkv": "a"}}, ["qkv", "parts"]),
        ({"layer": {"q": {"name": "a", "parts": ["q", "k"]}}}, ["q", "parts"]),
        ({"window": {"layers": "odd"}}, ["'odd'", "except_every"]),
        ({"attention": {"qk_norm": "both"}}, ["'both'", "head"]),
        ({"write_as": {"when": "sometimes"}}, ["'sometimes'", "always"]),
        ({"absorbed_as": {"famly": "llama"}}, ["'famly'", "[absorbed_as]", "family"]),
        ({"norm": {"offset": "1"}}, ["[norm] offset", "float"]),
        ({"norm": {"offset": True}}, ["[norm] offset", "float"]),
        ({"rope": {"interleaved": 1}}, ["[rope] interleaved", "bool"]),
        ({"window": {"period": 2.5}}, ["[window] period", "int"]),
        ({"limits": {"hidden_is_heads_for": "longrope"}}, ["hidden_is_heads_for", "tuple"]),
    ],
)
def test_a_key_that_nobody_knows_is_refused(changes: dict[str, Any], words: list[str]) -> None:
    refused(lambda: build(**changes), "x.toml", *words)


@pytest.mark.parametrize("key", ["name", "model_types", "architecture", "model", "layer", "kinds"])
def test_a_missing_key_is_named(key: str) -> None:
    data = {name: value for name, value in read_family_data("llama").items() if name != key}
    refused(lambda: build_family(data, "x.toml"), f"missing key '{key}'")


def test_two_families_of_one_model_type_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    read = read_family_data
    monkeypatch.setattr(
        family_module,
        "read_family_data",
        lambda name: {**read(name), "model_types": ["twin"]} if name in ("glm", "granite") else read(name),
    )
    load_families.cache_clear()
    try:
        refused(load_families, "'twin'", "'glm'", "'granite'")
    finally:
        load_families.cache_clear()


def test_an_unknown_model_type_names_the_nearest() -> None:
    near = {"lama": "llama", "qwen2_moe": "qwen2", "Gemma3_txt": "gemma3_text", "PanguUltr": "PanguUltra"}
    for given, nearest in near.items():
        words = ("here", f"'{given}'", f"nearest: '{nearest}'")
        refused(lambda given=given: find_family({"model_type": given}, "here"), *words)
    refused(lambda: find_family({}, "here"), "here", "model_type")


def test_every_family_has_a_tiny_model_and_every_file_a_family() -> None:
    assert list(load_families()) == NAMES
    covered = {make_config(case)["model_type"] for case in CASES}
    assert {kind for family in load_families().values() for kind in family.model_types[:1]} == covered
    assert sorted(FAMILIES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_families_fit_together(name: str) -> None:
    family = load_families()[name]
    assert family.name == name
    assert {"embed", "head", "final_norm"} <= set(family.model) <= set(ROLE_AXES)
    for kind in family.kinds:
        roles = {**family.layer, **kind.tensors}
        parts = {part for rule in roles.values() for part in rule.parts}
        assert {"q", "k", "v", "o", "gate", "up", "down"} <= (set(roles) | parts) - set(FUSED_ROLES)
        assert not parts & set(roles), "a part of a fused tensor is stored on its own too"
        templates = [rule.name for rule in roles.values()]
        assert len(set(templates)) == len(templates)
        assert all("{layer}" in template for template in templates)
        norms = {role for role in roles if role in NORM_ROLES}
        for norm, readers in family.feeds.items():
            assert norm in ROLE_AXES
            assert norm in norms or norm == "final_norm" or not readers
            assert set(readers) <= set(ROLE_AXES)
        assert norms - {"attn_out", "mlp_out"} <= set(family.feeds)
    for rule in filter(None, (family.write_as, family.absorbed_as)):
        target = load_families()[rule.family]
        assert target.stock
        assert {role: rule.name for role, rule in target.model.items()} == {
            role: rule.name for role, rule in family.model.items()
        }
        assert target.norm == family.norm
    if family.absorbed_as is not None:
        target = load_families()[family.absorbed_as.family]
        assert set(target.layer) == set(family.layer) - {"attn_out", "mlp_out"}
        assert target.feeds == family.feeds
        for table in ("activation", "attention", "rope", "window", "multipliers", "logits", "kinds"):
            assert getattr(target, table) == getattr(family, table), table


def attribute_names() -> set[str]:
    """Every attribute that some line of Python reads."""
    found = set()
    for package in ("compress", "backends", "cli", "profiles"):
        for path in (ROOT / package).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return found


def string_constants() -> set[str]:
    found = set()
    for path in (ROOT / "compress").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found |= {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
    return found


def leaf_strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from leaf_strings(inner)
    elif isinstance(value, str):
        yield value


RULE_TABLES = tuple(family_module.TABLES)


def test_every_key_of_the_files_is_read() -> None:
    keys = set()
    for path in FILES:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        keys |= set(data) - {"base", "without"}
        keys |= {key for table in RULE_TABLES for key in data.get(table, {})}
        keys |= {key for kind in data.get("kinds", []) for key in kind}
        rules = [rule for table in (data.get("layer", {}), data.get("model", {})) for rule in table.values()]
        keys |= {key for rule in rules if isinstance(rule, dict) for key in rule}
    assert keys - attribute_names() == set()


def test_every_default_of_the_files_is_read() -> None:
    """A [config] default is read by name in Python, or through the value of some rule."""
    datas = [tomllib.loads(path.read_text(encoding="utf-8")) for path in FILES]
    defaults = {key for data in datas for key in data.get("config", {})}
    rules = {text for data in datas for key, table in data.items() if key != "config" for text in leaf_strings(table)}
    assert defaults - rules - string_constants() == set()


def test_every_rule_of_the_dataclasses_is_read() -> None:
    fields = {item for kind in family_module.TABLES.values() for item in kind.__dataclass_fields__}
    fields |= set(family_module.TensorRule.__dataclass_fields__) | set(family_module.KindRule.__dataclass_fields__)
    assert fields - attribute_names() == set()


# Checkpoints


@pytest.mark.parametrize("case", CASES)
def test_fused_tensors_survive_splitting(case: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / case, case))
    spec = read_spec(checkpoint)
    seen = set(spec.names.values())
    for index, layer in enumerate(spec.layers):
        weights = read_layer(checkpoint, spec, index)
        assert not set(weights) & set(FUSED_ROLES)
        for role, tensor in fuse_parts(layer, weights).items():
            assert torch.equal(tensor, checkpoint.read_one(layer.names[role]))
            seen.add(layer.names[role])
    assert seen == set(checkpoint.tensors) == set(expected_tensors(spec))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], **keys: Any) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def shorten(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: tensors[name][:-1]})


def add(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: torch.ones(3)})


QKV = "model.layers.2.self_attn.qkv_proj.weight"


@pytest.mark.parametrize(
    ("case", "change", "words"),
    [
        ("llama", drop("model.layers.1.mlp.up_proj.weight"), ["model.layers.1.mlp.up_proj.weight", "missing"]),
        ("llama", drop("lm_head.weight"), ["lm_head.weight", "missing"]),
        ("llama-tied", drop("model.embed_tokens.weight"), ["model.embed_tokens.weight", "missing"]),
        ("llama", drop("model.norm.weight"), ["model.norm.weight", "missing"]),
        ("qwen3", drop("model.layers.3.self_attn.q_norm.weight"), ["model.layers.3.self_attn.q_norm.weight"]),
        ("qwen2", drop("model.layers.0.self_attn.v_proj.bias"), ["model.layers.0.self_attn.v_proj.bias", "missing"]),
        ("llama", shorten("model.norm.weight"), ["model.norm.weight", "[47]", "[48]"]),
        ("llama", shorten("model.layers.0.mlp.up_proj.weight"), ["up_proj.weight", "[55, 48]", "[56, 48]"]),
        ("phi3", shorten(QKV), [QKV, "[95, 48]", "[96, 48]"]),
        ("llama", shorten("model.embed_tokens.weight"), ["model.embed_tokens.weight", "[95, 48]"]),
        ("llama", add("model.layers.0.mlp.extra.weight"), ["model.layers.0.mlp.extra.weight", "1 tensors", "'llama'"]),
        ("llama", add("model.layers.4.input_layernorm.weight"), ["model.layers.4.input_layernorm.weight"]),
        ("llama", add("model.layers.0.self_attn.q_proj.bias"), ["model.layers.0.self_attn.q_proj.bias"]),
        ("llama-tied", add("lm_head.weight"), ["lm_head.weight"]),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    case: str, change: Callable[[dict[str, torch.Tensor]], None], words: list[str], tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path / "m", case)
    read_spec(open_checkpoint(folder))  # sound before the change
    rewrite(folder, change)
    refused(lambda: read_spec(open_checkpoint(folder)), str(folder), *words)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"hidden_size": 0}, ["hidden_size"]),
        ({"num_hidden_layers": "4"}, ["num_hidden_layers"]),
        ({"vocab_size": None}, ["vocab_size"]),
        ({"num_key_value_heads": 4}, ["6 attention heads", "4"]),
        ({"hidden_act": "selu"}, ["selu", "silu"]),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ["dynamic", "longrope"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, ["llama3", "low_freq_factor"]),
        ({"model_type": "gpt2"}, ["gpt2", "nearest"]),
    ],
)
def test_configs_that_do_not_fit_are_refused(keys: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    folder = rewrite(make_checkpoint(tmp_path / "m", "llama"), lambda tensors: None, **keys)
    refused(lambda: read_spec(open_checkpoint(folder)), *words)


def test_buffers_of_old_exports_are_ignored(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", "llama")
    rewrite(folder, add("model.layers.0.self_attn.rotary_emb.inv_freq"))
    assert read_spec(open_checkpoint(folder)).shape.hidden == 48


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("case", ["llama-tied", "gemma2", "pangu_embedded"])
def test_a_tied_matrix_opens_under_either_name_and_twice(case: str, tmp_path: Path) -> None:
    folder, ids = make_checkpoint(tmp_path / "m", case), torch.arange(3, 23)[None]
    wanted = run_decoder(folder, ids, torch.float32)
    rewrite(folder, lambda tensors: tensors.update({HEAD: tensors[EMBED]}))
    assert torch.equal(run_decoder(folder, ids, torch.float32), wanted)
    rewrite(folder, drop(EMBED))
    assert torch.equal(run_decoder(folder, ids, torch.float32), wanted)


def test_a_tied_matrix_stored_twice_and_differently_is_refused(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[HEAD] = tensors[EMBED].clone()
        tensors[HEAD][95, 47] += 1

    folder = rewrite(make_checkpoint(tmp_path / "m", "llama-tied"), change)
    refused(lambda: read_spec(open_checkpoint(folder)), EMBED, HEAD, "tie_word_embeddings")
    rewrite(folder, lambda tensors: None, tie_word_embeddings=False)
    assert not read_spec(open_checkpoint(folder)).shape.tied


def test_sizes_per_layer_are_read() -> None:
    config = make_config("mistral") | {"per_layer_config": {"2": {"intermediate_size": 8, "num_attention_heads": 2,
                                                                  "num_key_value_heads": 1}}}  # fmt: skip
    spec = resolve_model(config, None)
    assert [(x.query_heads, x.kv_heads, x.ffn) for x in spec.shape.layers] == [(6, 3, 56)] * 2 + [(2, 1, 8), (6, 3, 56)]
    assert not spec.shape.uniform
