"""Quantised checkpoints: AscendV1 (ModelSlim, quant_model_description.json) and compressed-tensors (ascend.md 4.3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.ascend_build import CONFIG, read_json
from backends.ascend_rules import ERROR, WARNING, Chip, Finding, load_rules, show_names
from compress.errors import UserError

DESCRIPTIONS = "quant_model_description*.json"
COMPRESSED = "compressed-tensors"
FLOATS = ("F16", "BF16", "F32")
MATRIX_RANK = 2
BITS = 8
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Description:
    """A quant_model_description.json: the type of each tensor by name, and everything else."""

    file: str
    types: Mapping[str, str]
    meta: Mapping[str, Any]


def find_description(folder: Path) -> Description | None:
    """Return the description in a folder, None where there is none; UserError when it is no JSON object."""
    paths = sorted(folder.glob(DESCRIPTIONS))
    if not paths:
        return None
    data = read_json(paths[0])
    if not isinstance(data, dict):
        raise UserError(f"{paths[0]}: is not a JSON object; write the description again.")
    known = load_rules()["description"]["meta"]
    types = {name: kind for name, kind in data.items() if name not in known and isinstance(kind, str)}
    return Description(paths[0].name, types, {name: value for name, value in data.items() if name not in types})


def check_description(description: Description, tensors: Tensors, chip: Chip | None, dtype: str) -> Iterator[Finding]:
    """Yield what is wrong between the description and the tensors; `dtype` is that of config.json."""
    for rule, severity, node, text in (
        *check_names(description, tensors),
        *check_kinds(description, chip),
        *check_fused(description),
        *check_suffixes(description, tensors, chip, dtype),
    ):
        yield Finding(rule, severity, description.file, node, text)


Problem = tuple[str, str, str, str]


def check_names(description: Description, tensors: Tensors) -> Iterator[Problem]:
    """Yield tensors without an entry, entries without a tensor, and meta keys that are missing."""
    missing = [name for name in tensors if name not in description.types]
    if missing:
        yield "description", ERROR, missing[0], f"{show_names(missing)} have no entry; name every tensor and its type."
    stray = [name for name in description.types if name not in tensors]
    # A tied head has an entry and no tensor: the servers look its key up.
    stray = [name for name in stray if not name.endswith(("lm_head.weight", "output_layer.weight"))]
    if stray:
        yield "description", ERROR, stray[0], f"{show_names(stray)} have an entry and no tensor; drop the entry."
    if "model_quant_type" not in description.meta:
        text = "model_quant_type is missing; write the type of most linears there."
        yield "description", WARNING, "model_quant_type", text


def check_kinds(description: Description, chip: Chip | None) -> Iterator[Problem]:
    """Yield types that nobody knows, and those that the chip's servers do not run."""
    rules = load_rules()["description"]
    for kind in dict.fromkeys(description.types.values()):
        names = [name for name, other in description.types.items() if other == kind]
        if kind not in rules["known"]:
            yield "quant-type", ERROR, names[0], f"{kind} of {show_names(names)} is no known type; write W8A8 or FLOAT."
            continue
        dense = [name for name in names if ".experts." not in name and name.endswith(".weight")]
        if kind in rules["experts_only"] and dense:
            text = f"{kind} is for experts only, and {show_names(dense)} are not; quantise them as W8A8_DYNAMIC."
            yield "quant-type", ERROR, dense[0], text
        elif chip is not None and dense and kind not in (rules["float"], *chip.linears, *rules["experts_only"], "C8"):
            text = f"{chip.soc} runs {', '.join(chip.linears) or 'no quantised linears'}, not {kind}; quantise again."
            yield "quant-type", ERROR, dense[0], text


def check_fused(description: Description) -> Iterator[Problem]:
    """Yield parts of one fused linear that differ in type, which stops vllm-ascend with a ValueError."""
    for parts in load_rules()["description"]["fused"]:
        for name in description.types:
            if not name.endswith(f"{parts[0]}.weight"):
                continue
            stem = name.removesuffix(f"{parts[0]}.weight")
            kinds = {part: description.types.get(f"{stem}{part}.weight") for part in parts}
            if len({kind for kind in kinds.values() if kind}) > 1:
                said = ", ".join(f"{part} is {kind}" for part, kind in kinds.items())
                text = f"{said}: vllm-ascend fuses them and stops with a ValueError; give them one type."
                yield "fused-types", ERROR, name, text


def check_suffixes(description: Description, tensors: Tensors, chip: Chip | None, dtype: str) -> Iterator[Problem]:
    """Yield tensors of quantised linears that are missing, or have a wrong type or shape."""
    schemes = load_rules()["description"]["suffixes"]
    for name, kind in description.types.items():
        if not name.endswith(".weight") or name not in tensors:
            continue
        stored, shape = tensors[name]
        stem = name.removesuffix("weight")
        if kind == load_rules()["description"]["float"]:
            if stored not in FLOATS:
                yield "quant-type", ERROR, name, f"{name} is called FLOAT and stored as {stored}; correct its entry."
        elif kind in schemes and len(shape) != MATRIX_RANK:
            yield "quant-shape", ERROR, name, f"{name} is {kind} with the shape {list(shape)}; a linear's is [out, in]."
        elif kind in schemes:
            for suffix, (element, sizes) in schemes[kind].items():
                wanted = settle_element(element, chip, dtype)
                yield from check_part(stem + suffix, tensors, wanted, fill_sizes(sizes, shape))
                if description.types.get(stem + suffix, kind) != kind:
                    text = f"{stem}{suffix} and its linear have different types in the description; write {kind}."
                    yield "quant-type", ERROR, stem + suffix, text


def settle_element(element: str, chip: Chip | None, dtype: str) -> tuple[str, ...]:
    """Return the element types that a part may have; deq_scale: fp32 for bf16 models, else int64, always on 310P."""
    if element == "DEQ":
        always = chip is not None and chip.family == "310P"
        return ("F32",) if dtype == "bfloat16" and not always else ("I64",) if dtype or always else ("I64", "F32")
    names = element.split(" or ")
    return tuple(kind for name in names for kind in (FLOATS if name == "FLOAT" else (name,)))


def fill_sizes(sizes: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape written in terms of `out` and `in` of a weight `[out, in]`."""
    named = {"out": shape[0], "in": shape[1]}
    return tuple(named[size] if size in named else int(size) for size in sizes.split(","))


def check_part(name: str, tensors: Tensors, wanted: Sequence[str], shape: tuple[int, ...]) -> Iterator[Problem]:
    """Yield that one tensor of a quantised linear is missing, or has a wrong type or shape."""
    if name not in tensors:
        yield "quant-suffix", ERROR, name, f"{name} is missing; store it as {' or '.join(wanted)} {list(shape)}."
        return
    kind, found = tensors[name]
    if kind not in wanted:
        rule = "deq-scale" if name.endswith("deq_scale") else "quant-dtype"
        yield rule, ERROR, name, f"{name} is {kind} and must be {' or '.join(wanted)} here; write it again."
    if found != shape:
        yield "quant-shape", ERROR, name, f"{name} has the shape {list(found)}, not {list(shape)}; write it again."


def check_unquantised(tensors: Tensors) -> Iterator[Finding]:
    """Yield int8 weights in a folder that does not say how they are quantised."""
    whole = [name for name, (kind, _) in tensors.items() if kind == "I8"]
    if whole:
        text = f"{show_names(whole)} are int8, and neither a description nor quantization_config says how; write one."
        yield Finding("quantisation", ERROR, CONFIG, whole[0], text)


# compressed-tensors


def check_compressed(config: Mapping[str, Any], tensors: Tensors, chip: Chip | None) -> Iterator[Finding]:
    """Yield what vllm-ascend does not take of a quantization_config (ascend.md 4.3)."""
    method = config.get("quant_method")
    problems: list[str] = []
    if method != COMPRESSED:
        problems.append(f"the method {method} is not read on Ascend; use compressed-tensors W8A8, or AscendV1")
    elif chip is not None and not chip.compressed_tensors:
        problems.append(f"compressed-tensors is not read on {chip.soc}; export AscendV1 W8A8")
    else:
        groups = read_part(config, "config_groups")
        for name, group in groups.items():
            problems += [f"{name}: {text}" for text in explain_group(group)]
        if not groups:
            problems.append("there are no config_groups; write one with weights and input_activations")
        problems += explain_compressed_tensors(tensors, config)
    for text in problems:
        yield Finding("compressed-tensors", ERROR, CONFIG, "quantization_config", f"In quantization_config {text}.")


def explain_group(group: Any) -> Iterator[str]:
    """Yield why vllm-ascend refuses a group: it takes int8 per channel with int8 activations, symmetric both."""
    weights, inputs = read_part(group, "weights"), read_part(group, "input_activations")
    wanted = {"num_bits": BITS, "type": "int", "symmetric": True}
    for part, given in (("weights", weights), ("input_activations", inputs)):
        for key, value in wanted.items():
            if given.get(key) != value:
                yield f"{part}.{key} is {given.get(key)} and must be {value}"
    if weights.get("strategy") != "channel":
        yield f"weights.strategy is {weights.get('strategy')} and must be channel"
    strategy = "token" if inputs.get("dynamic") else "tensor"
    if inputs.get("strategy") != strategy:
        yield f"input_activations.strategy is {inputs.get('strategy')} and must be {strategy}"


def read_part(data: Any, name: str) -> Mapping[str, Any]:
    """Return a mapping inside a mapping, empty where either is something else."""
    part = data.get(name) if isinstance(data, dict) else None
    return part if isinstance(part, dict) else {}


def explain_compressed_tensors(tensors: Tensors, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield int8 weights without their scales `[out, 1]`, and static ones without an input_scale."""
    groups = read_part(config, "config_groups").values()
    static = any(not read_part(group, "input_activations").get("dynamic") for group in groups)
    quantised = {name: shape for name, (kind, shape) in tensors.items() if kind == "I8" and name.endswith(".weight")}
    if not quantised:
        yield "weights are called quantised, and no tensor is int8; write the weights again"
    for name, shape in quantised.items():
        scale = tensors.get(f"{name}_scale")
        if scale is None or scale[0] not in FLOATS or scale[1] != (shape[0], 1):
            yield f"{name}_scale must be a float tensor of shape [{shape[0]}, 1]; write it"
            return
        if static and name.removesuffix("weight") + "input_scale" not in tensors:
            yield f"activations are static, and the input_scale of {name} is missing; write it"
            return
