"""The atc command against the graph and the chip: chip name, shapes and gears, precision, files, and io.json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from backends.ascend_build import (
    INTERFACE,
    OPEN,
    Build,
    Size,
    fill_shapes,
    list_gears,
    parse_gears,
    parse_shapes,
    read_json,
)
from backends.ascend_graph import Dims, OpenGraph, describe_value, name_element
from backends.ascend_rules import ERROR, WARNING, Chip, Finding, explain_soc, load_rules, show_names

GIGABYTES = 2 * 2**30
ND = "ND"
TOGETHER = 2
# What io.json may call ONNX's element types.
ELEMENTS = {"FLOAT": ("float32", "fp32", "float"), "FLOAT16": ("float16", "fp16"), "DOUBLE": ("float64", "double")}


def check_build(graph: OpenGraph, build: Build, chip: Chip | None) -> Iterator[Finding]:
    """Yield what is wrong with a graph's atc command; `graph` has the dimensions as exported."""
    for rule, severity, text in (
        *check_flags(build),
        *check_precision(build, chip),
        *check_quantised(graph, build),
        *check_shapes(graph, build, chip),
        *check_gears(graph, build),
    ):
        yield Finding(rule, severity, build.file, graph.name, text)


Problem = tuple[str, str, str]


def check_flags(build: Build) -> Iterator[Problem]:
    """Yield unknown, deprecated and wrong flags (ascend.md 2.1)."""
    rules = load_rules()["flags"]
    unknown = [name for name in build.flags if name not in rules["known"]]
    if unknown:
        yield "flag", WARNING, f"atc may not know --{show_names(unknown)}; check the name."
    for name in filter(build.get, rules["deprecated"]):
        yield "flag", WARNING, f"--{name} is frozen or deprecated; use --op_precision_mode, or leave it out."
    for name, value, reason in (("framework", "5", "ONNX"), ("mode", "0", "a conversion to OM")):
        if build.get(name) not in ("", value):
            yield "flag", ERROR, f"--{name}={build.get(name)} is not {reason}; write --{name}={value}."
    if build.get("input_format") not in ("", *rules["formats"]):
        yield "flag", ERROR, f"--input_format={build.get('input_format')} is none of ONNX's; write ND for a decoder."
    if build.get("external_weight") not in ("", *rules["external_weight"]):
        yield "flag", ERROR, f"--external_weight={build.get('external_weight')} is none of 0, 1 and 2; choose one."
    soc = build.get("soc_version")
    if not soc:
        yield "soc-version", ERROR, "There is no --soc_version; name the chip that will run the model."
    elif "$" not in soc and explain_soc(soc):
        yield "soc-version", ERROR, explain_soc(soc)


def check_precision(build: Build, chip: Chip | None) -> Iterator[Problem]:
    """Yield precision modes that are unknown, given twice, or bfloat16 on a chip without it (ascend.md 2.1)."""
    modes = load_rules()["precision"]
    given = {name: build.get(name) for name in ("precision_mode", "precision_mode_v2") if build.get(name)}
    if len(given) == TOGETHER:
        yield "precision", ERROR, "--precision_mode and --precision_mode_v2 exclude each other; keep the latter."
    for name, mode in given.items():
        known = modes["v2"] if name.endswith("v2") else modes["v1"]
        if mode not in known:
            yield "precision", ERROR, f"--{name}={mode} is no mode of it; choose one of {', '.join(known)}."
        elif mode in modes["bf16"] and chip is not None and not chip.bf16:
            yield "bf16", ERROR, f"--{name}={mode} needs bfloat16, which {chip.soc} does not have; use mixed_float16."


def check_quantised(graph: OpenGraph, build: Build) -> Iterator[Problem]:
    """Yield gears and precision modes that a graph quantised for deployment may not have (ascend.md 2.2)."""
    rules = load_rules()["amct"]
    quantised = [node.op_type for node in graph.nodes if node.op_type in rules["names"]]
    if not quantised:
        return
    geared = any(build.get(name) for name in ("dynamic_dims", "dynamic_batch_size", "dynamic_image_size"))
    if geared or OPEN in flatten(build) or any(isinstance(size, str) for size in flatten(build)):
        text = f"The graph is quantised ({quantised[0]}), so its shapes must be static; drop the gears."
        yield "quantised-gears", ERROR, text
    mode = build.get("precision_mode_v2") or build.get("precision_mode")
    if mode in rules["modes"]:
        yield "precision", ERROR, f"The graph is quantised ({quantised[0]}), which forbids the mode {mode}; use fp16."


def flatten(build: Build) -> list[Size]:
    """Return all dimensions of --input_shape, none when it cannot be read."""
    try:
        return [size for dims in parse_shapes(build.get("input_shape")).values() for size in dims]
    except ValueError:
        return []


# Shapes


def check_shapes(graph: OpenGraph, build: Build, chip: Chip | None) -> Iterator[Problem]:
    """Yield what --input_shape says wrong about a graph's inputs."""
    try:
        shapes = parse_shapes(build.get("input_shape"))
    except ValueError as error:
        yield "input-shape", ERROR, f"--input_shape cannot be read at '{error}'; write name:1,16;other:1,16."
        return
    declared = {entry.name: describe_value(entry).dims or () for entry in graph.inputs}
    for name in shapes:
        if name not in declared:
            yield "input-shape", ERROR, f"--input_shape names {name}, which is no input of {graph.name}; correct it."
    for name, dims in declared.items():
        yield from explain_dims(name, dims, shapes.get(name))
    if any(isinstance(size, str) for dims in shapes.values() for size in dims):
        yield from check_ranges(shapes, build, chip)


def explain_dims(name: str, dims: Dims, given: Sequence[Size] | None) -> Iterator[Problem]:
    """Yield where one input's dimensions and those that --input_shape gives it differ."""
    if given is None:
        if any(isinstance(size, str) for size in dims):
            text = f"{name} has open dimensions {list(dims)} and no --input_shape; give sizes, or -1 and gears."
            yield "open-shape", ERROR, text
        return
    if len(given) != len(dims):
        yield "input-shape", ERROR, f"--input_shape gives {name} {len(given)} sizes, it has {len(dims)}; correct it."
        return
    for size, declared in zip(given, dims, strict=True):
        if isinstance(size, int) and (size == 0 or size < OPEN):
            yield "zero-dim", ERROR, f"--input_shape gives {name} the size {size}; every size must be above 0."
        elif isinstance(declared, int) and size not in (declared, OPEN) and not isinstance(size, str):
            yield "input-shape", ERROR, f"--input_shape gives {name} {size} where the graph has {declared}; correct it."
        elif isinstance(declared, int) and size != declared:
            yield "input-shape", ERROR, f"--input_shape opens a dimension of {name}, fixed at {declared}; correct it."


def check_ranges(shapes: Mapping[str, Sequence[Size]], build: Build, chip: Chip | None) -> Iterator[Problem]:
    """Yield what is wrong with ranges a~b: the chip's compiler has none, gears beside them, or ends out of order."""
    if chip is not None and not chip.ranges:
        yield "ranges", ERROR, f"{chip.soc} takes no ranges in --input_shape; use static shapes, or -1 and gears."
    if build.get("dynamic_dims") or build.get("dynamic_batch_size"):
        yield "ranges", ERROR, "--input_shape holds a range beside gears; write -1 where gears fill it."
    for name, dims in shapes.items():
        for size in filter(lambda size: isinstance(size, str), dims):
            low, high = (int(end) for end in str(size).split("~"))
            if low < 1 or high < low:
                yield "ranges", ERROR, f"The range {size} of {name} is empty or starts below 1; write low~high."


def check_gears(graph: OpenGraph, build: Build) -> Iterator[Problem]:
    """Yield what is wrong with --dynamic_dims and --dynamic_batch_size (ascend.md 2.1)."""
    rules = load_rules()["flags"]
    dims, batch = build.get("dynamic_dims"), build.get("dynamic_batch_size")
    count = flatten(build).count(OPEN)
    if count and not dims and not batch and not build.get("dynamic_image_size"):
        yield "gears", ERROR, f"--input_shape has {count} open size(s) that no gears fill; give --dynamic_dims."
    if dims:
        excluded = [f"--{name}" for name in rules["not_with_dynamic_dims"] if build.get(name)]
        if excluded:
            yield "gears", ERROR, f"--dynamic_dims excludes {show_names(excluded)}; keep one."
        if build.get("input_format") != ND:
            yield "gears", ERROR, "--dynamic_dims needs --input_format=ND; add it."
    if dims or batch:
        yield from check_gear_values(graph, build, count)


def check_gear_values(graph: OpenGraph, build: Build, count: int) -> Iterator[Problem]:
    """Yield wrong numbers in gears: how many, how long, how large, and in which order."""
    rules, batch = load_rules()["flags"], bool(build.get("dynamic_batch_size"))
    try:
        written = build.get("dynamic_batch_size").replace(",", ";") if batch else build.get("dynamic_dims")
        gears = parse_gears(written)
        filled = list_gears(build)
    except ValueError:
        yield "gears", ERROR, "The gears are no numbers; write them as 1,256;16,256, one value for each -1."
        return
    yield from count_gears(gears)
    wanted = 1 if batch else count
    wrong = [gear for gear in gears if len(gear) != wanted]
    if wrong or not count:
        text = f"The gear {wrong[0] if wrong else gears[0]} has not one value for each of {count} open dimension(s)."
        yield "gears", ERROR, f"{text[:-1]}; write as many values as --input_shape has -1."
        return
    if any(size < 1 for gear in gears for size in gear):
        yield "gears", ERROR, "A gear holds a size below 1; every size must be above 0."
    if batch:
        yield from check_batches(gears, build, rules["batch"])
    yield from check_order(graph, build, filled)


def count_gears(gears: Sequence[Sequence[int]]) -> Iterator[Problem]:
    """Yield a wrong number of gears, and gears given twice."""
    rules = load_rules()["flags"]
    low, high = rules["gears"]
    if not low <= len(gears) <= high:
        yield "gears", ERROR, f"There are {len(gears)} gear(s), and atc takes {low} to {high}; change their number."
    elif len(gears) > rules["advised_gears"]:
        text = f"There are {len(gears)} gears; 3 or 4 are advised, as each adds to the compile time; drop some."
        yield "gears", WARNING, text
    if len({tuple(gear) for gear in gears}) < len(gears):
        yield "gears", ERROR, "A gear is given twice; leave one out."


def check_batches(gears: Sequence[Sequence[int]], build: Build, limits: Sequence[int]) -> Iterator[Problem]:
    """Yield sizes of --dynamic_batch_size that are too large, and open dimensions that are not the first."""
    large = [gear[0] for gear in gears if gear[0] > limits[1]]
    if large:
        yield "gears", ERROR, f"--dynamic_batch_size {large[0]} is above {limits[1]}; choose a smaller one."
    shapes = parse_shapes(build.get("input_shape"))
    late = [name for name, dims in shapes.items() if OPEN in dims[1:]]
    if late:
        yield "gears", ERROR, f"--dynamic_batch_size fills the first dimension only, and {late[0]} is open elsewhere."


def check_order(graph: OpenGraph, build: Build, gears: Sequence[Sequence[int]]) -> Iterator[Problem]:
    """Yield a gear that gives two sizes to dimensions that the graph calls by one name: its values are out of order."""
    try:
        shapes = parse_shapes(build.get("input_shape"))
    except ValueError:
        return
    for gear in gears:
        filled = fill_shapes(shapes, gear)
        sizes: dict[str, set[Size]] = {}
        for entry in graph.inputs:
            for name, size in zip(describe_value(entry).dims or (), filled.get(entry.name, ()), strict=False):
                if isinstance(name, str) and name.isidentifier():
                    sizes.setdefault(name, set()).add(size)
        for name, found in sizes.items():
            if len(found) > 1:
                text = (
                    f"The gear {list(gear)} gives the dimension {name} the sizes {sorted(map(str, found))}; its values "
                    "follow the order of the -1s in --input_shape: reorder them."
                )
                yield "gear-order", ERROR, text
                return


# Files


def check_weights_layout(folder: Path, build: Build, weight_bytes: int) -> Iterator[Finding]:
    """Yield where --external_weight and the files beside the OM disagree (ascend.md 2.1)."""
    flag = build.get("external_weight") or "0"
    beside = (folder / "weight").is_dir()
    converted = any(folder.glob("*.om"))
    if flag == "0" and beside:
        text = "There is a folder `weight`, and --external_weight=0 puts all into the OM; delete it, or give 1 or 2."
        yield Finding("external-weight", WARNING, build.file, "weight", text)
    if flag in ("1", "2") and converted and not beside:
        text = f"--external_weight={flag} leaves the weights in `weight` beside the OM, and it is missing; copy it too."
        yield Finding("external-weight", ERROR, build.file, "weight", text)
    if flag == "0" and weight_bytes > GIGABYTES:
        text = (
            f"{weight_bytes / 2**30:.1f} GiB of weights go into one OM with --external_weight=0; give 1 or 2 and copy "
            "the folder `weight` along."
        )
        yield Finding("external-weight", WARNING, build.file, "", text)


def check_files(folder: Path, build: Build) -> Iterator[Finding]:
    """Yield files that flags name and that are not there."""
    for name in load_rules()["flags"]["with_files"]:
        value = build.get(name)
        if value and "$" not in value and not (folder / value).is_file():
            text = f"--{name}={value} names a file that is missing; write it, or drop the flag."
            yield Finding("flag-file", ERROR, build.file, value, text)


def read_kept(folder: Path, build: Build | None) -> set[str]:
    """Return node names and types that stay out of float16: --keep_dtype, and the black list of --modify_mixlist."""
    kept: set[str] = set()
    if build is None:
        return kept
    for flag in ("modify_mixlist", "keep_dtype", "customize_dtypes"):
        # A script names its files through a variable for its own folder.
        path = folder / build.get(flag).rpartition("}/")[2].rpartition("$HERE/")[2]
        if build.get(flag) and path.is_file():
            kept |= read_exceptions(path)
    return kept


def read_exceptions(path: Path) -> set[str]:
    """Return the names in an exception list: JSON with a black list, or a name on each line."""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        data = json.loads(text)
    except ValueError:
        lines = (line.strip() for line in text.splitlines())
        return {line.rpartition("::")[2].partition(":")[0] if "::" in line else line for line in lines if line}
    black = data.get("black-list", {}) if isinstance(data, dict) else {}
    added = black.get("to-add", []) if isinstance(black, dict) else black
    return {str(name) for name in added} if isinstance(added, list) else set()


# io.json


def check_interface(folder: Path, graph: OpenGraph) -> Iterator[Finding]:
    """Yield where io.json and a graph's inputs and outputs differ in names, types or rank."""
    part = find_interface(read_json(folder / INTERFACE), graph.name)
    if part is None:
        return
    for side, entries in (("inputs", graph.inputs), ("outputs", list(graph.model.graph.output))):
        said = read_entries(part.get(side))
        if said is None:
            continue
        real = {entry.name: describe_value(entry) for entry in entries}
        for name in sorted(said.keys() ^ real.keys()):
            where = f"{INTERFACE} names, and {graph.name} lacks" if name in said else f"{INTERFACE} lacks"
            text = f"{name} is one of the {side} that {where}; export the folder again."
            yield Finding("interface", ERROR, INTERFACE, name, text)
        for name in said.keys() & real.keys():
            element = name_element(real[name].element)
            kind = str(said[name].get("dtype", said[name].get("type", ""))).lower()
            if kind and kind not in ELEMENTS.get(element, (element.lower(),)):
                text = f"{INTERFACE} calls {name} {kind}, and {graph.name} has {element}; export the folder again."
                yield Finding("interface", ERROR, INTERFACE, name, text)
            shape, dims = said[name].get("shape"), real[name].dims
            if isinstance(shape, list) and dims is not None and differs(shape, dims):
                text = f"{INTERFACE} gives {name} the shape {shape}, and {graph.name} has {list(dims)}; export again."
                yield Finding("interface", ERROR, INTERFACE, name, text)


def differs(shape: Sequence[Any], dims: Dims) -> bool:
    """Return whether two shapes differ in rank, or in a size that both of them fix."""
    if len(shape) != len(dims):
        return True
    pairs = [(said, real) for said, real in zip(shape, dims, strict=True) if isinstance(real, int)]
    return any(isinstance(said, int) and said not in (OPEN, real) for said, real in pairs)


def find_interface(data: Any, name: str) -> Mapping[str, Any] | None:
    """Return the part of io.json that is about a graph: under its file name or stem, at any depth, or the whole."""
    if isinstance(data, list):
        parts = (find_interface(item, name) for item in data)
        return next((part for part in parts if part is not None), None)
    if not isinstance(data, dict):
        return None
    named = [data.get(key) for key in ("model", "graph", "file", "onnx", "name") if isinstance(data.get(key), str)]
    if "inputs" in data and (not named or any(Path(str(text)).name == name for text in named)):
        return data
    for key in (name, Path(name).stem):
        if isinstance(data.get(key), dict):
            return find_interface({**data[key], "model": name}, name)
    inner = (find_interface(value, name) for value in data.values() if isinstance(value, dict | list))
    return next((part for part in inner if part is not None), None)


def read_entries(data: Any) -> dict[str, Mapping[str, Any]] | None:
    """Return the tensors that a part of io.json names, with what it says of each; None when it names none."""
    if isinstance(data, dict):
        return {name: value if isinstance(value, dict) else {} for name, value in data.items()}
    if not isinstance(data, list):
        return None
    entries = ({"name": item} if isinstance(item, str) else item for item in data)
    return {str(item["name"]): item for item in entries if isinstance(item, dict) and "name" in item}
