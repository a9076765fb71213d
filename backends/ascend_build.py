"""The flags of `atc` as build.json or a script holds them, and the shapes and gears that they give a graph's inputs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.ascend_rules import load_rules
from compress.errors import UserError

BUILD_FILE, SCRIPT, INTERFACE, CONFIG = "build.json", "build_om.sh", "io.json", "config.json"
TARGET_FILE = "target.json"  # of a folder for servers: the chip and what was asked
OPEN = -1  # a dimension that gears fill
SUFFIX = ".onnx"
Flags = dict[str, str]
# A dimension of --input_shape: a size, -1, or the text of a range such as `1~64`.
Size = int | str


@dataclass(frozen=True)
class Build:
    """The atc command of one graph: its flags without dashes, and the file that they come from."""

    graph: str
    flags: Mapping[str, str]
    file: str = BUILD_FILE

    def get(self, name: str) -> str:
        """Return a flag's value, empty when it is not given."""
        return self.flags.get(name, "")


def read_json(path: Path) -> Any:
    """Return what a JSON file holds, None when there is no such file; UserError when it is not JSON."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); export the folder again.") from error


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_builds(folder: Path, graphs: Sequence[str]) -> list[Build]:
    """Return the atc commands that build.json, or else build_om.sh, holds for the graphs of a folder.

    Flags may stand under their names with or without dashes, at any depth, or as a list of arguments; those that stand
    above several graphs hold for each.
    """
    data, script = read_json(folder / BUILD_FILE), folder / SCRIPT
    if data is not None:
        found, source = list(walk_flags(data, {})), BUILD_FILE
        if not any("model" in flags for flags in found):
            shared = {name: value for flags in found for name, value in flags.items()}
            found = [{**shared, "model": name} for name in graphs]
    elif script.is_file():
        found, source = read_script(script.read_text(encoding="utf-8", errors="replace")), SCRIPT
    else:
        return []
    return [Build(Path(flags["model"]).name, flags, source) for flags in found if "model" in flags]


def walk_flags(data: Any, above: Flags) -> Iterator[Flags]:
    """Yield the flags of each innermost part of a JSON value that names a graph, or has flags at all."""
    if isinstance(data, list):
        if any(isinstance(item, str) and item.startswith("--") for item in data):
            yield {**above, **read_arguments([str(item) for item in data])}
            return
        for item in data:
            yield from walk_flags(item, above)
    elif isinstance(data, dict):
        own = {**above, **read_flags(data)}
        inner = [flags for key, value in data.items() for flags in walk_part(key, value, own)]
        # Parts that name graphs speak for this level, unless it is about a graph itself.
        named = [flags for flags in inner if "model" in flags]
        merged = {**own, **{name: value for flags in inner for name, value in flags.items()}}
        yield from named if named and "model" not in own else [merged] if merged else []


def walk_part(key: str, value: Any, own: Flags) -> Iterator[Flags]:
    """Yield the flags inside one entry; a key that is a graph's file name says which graph they are for."""
    if not isinstance(value, dict | list) or clean_name(key) in load_rules()["flags"]["known"]:
        return
    yield from walk_flags(value, {**own, "model": key} if key.endswith(SUFFIX) else own)


def clean_name(name: str) -> str:
    """Return a flag's name without dashes in front."""
    return name.lstrip("-")


def read_flags(data: Mapping[str, Any]) -> Flags:
    """Return the entries of a mapping that are flags of atc, as text; `gears` stands for dynamic_dims."""
    known = load_rules()["flags"]["known"]
    flags = {}
    for key, value in data.items():
        name = clean_name(key)
        # A script's own entries may bear a flag's name: a model is a graph's file here, or nothing.
        if value is None or (name == "model" and not str(value).endswith(SUFFIX)):
            continue
        if name in known or key.startswith("--"):
            flags[name] = show_value(value)
    return flags


def show_value(value: Any) -> str:
    """Return a flag's value as atc's command line writes it: names with dims, gears, or plain text."""
    if isinstance(value, dict):
        return ";".join(f"{name}:{show_value(dims)}" for name, dims in value.items())
    if isinstance(value, list):
        nested = any(isinstance(item, list) for item in value)
        return (";" if nested else ",").join(show_value(item) for item in value)
    return str(value)


def read_arguments(arguments: Sequence[str]) -> Flags:
    """Return the flags in a list of command-line arguments, written `--name=value` or `--name value`."""
    flags: Flags = {}
    for place, argument in enumerate(arguments):
        if not argument.startswith("--"):
            continue
        name, equals, value = argument[2:].partition("=")
        following = arguments[place + 1] if place + 1 < len(arguments) else ""
        flags[name] = value if equals else "" if following.startswith("--") else following
    return flags


def read_script(text: str) -> list[Flags]:
    """Return the flags of each `atc` command in a shell script; variables stay as they are written."""
    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue
        if any(Path(word).name == "atc" for word in words):
            commands.append(read_arguments(words))
    return commands


# Shapes


def parse_shapes(text: str) -> dict[str, list[Size]]:
    """Return the dimensions that --input_shape gives each input; ValueError for a text that is none."""
    shapes: dict[str, list[Size]] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, colon, sizes = part.rpartition(":")
        if not colon:
            raise ValueError(part)
        shapes[name] = [parse_size(size.strip()) for size in sizes.split(",")] if sizes else []
    return shapes


def parse_size(text: str) -> Size:
    """Return one dimension; a range stays text, with both ends checked to be numbers."""
    if "~" in text:
        low, _, high = text.partition("~")
        int(low), int(high)
        return text
    return int(text)


def parse_gears(text: str) -> list[list[int]]:
    """Return the gears of --dynamic_dims, or of --dynamic_batch_size; ValueError for a text that is none."""
    return [[int(size) for size in gear.split(",")] for gear in filter(None, text.split(";"))]


def list_gears(build: Build) -> list[list[int]]:
    """Return all gears of a build, one value for each -1 of its shapes in order; ValueError for broken flags."""
    if build.get("dynamic_batch_size"):
        sizes = parse_gears(build.get("dynamic_batch_size").replace(",", ";"))
        count = sum(OPEN in shape for shape in parse_shapes(build.get("input_shape")).values())
        return [gear * count for gear in sizes]
    return parse_gears(build.get("dynamic_dims"))


def fill_shapes(shapes: Mapping[str, Sequence[Size]], gear: Sequence[int]) -> dict[str, list[Size]]:
    """Return shapes whose -1s hold a gear's values in order; those beyond the gear's length stay open."""
    values = iter(gear)
    return {name: [next(values, OPEN) if size == OPEN else size for size in dims] for name, dims in shapes.items()}


def list_fixed_shapes(build: Build | None) -> list[dict[str, list[Size]]]:
    """Return the input shapes to infer a graph with: of its first and last gear, or the static ones."""
    if build is None:
        return [{}]
    try:
        shapes, gears = parse_shapes(build.get("input_shape")), list_gears(build)
    except ValueError:
        return [{}]  # check_flags says what is wrong
    ends = [gears[0], gears[-1]] if len(gears) > 1 else gears or [[]]
    filled = [fill_shapes(shapes, gear) for gear in ends]
    return [{name: [mark_open(size) for size in dims] for name, dims in shape.items()} for shape in filled]


def mark_open(size: Size) -> Size:
    """Return a size, or a text where it is still open or a mistake."""
    return size if isinstance(size, str) or size >= 0 else "?"


def half_mode(build: Build | None) -> str:
    """Return what the precision flags make of float32: "all", "some" or "" (it stays) (ascend.md 2.1)."""
    if build is None:
        return "some"  # atc's default is fp16, and the exporter's user decides
    modes = load_rules()["precision"]
    mode = build.get("precision_mode_v2") or build.get("precision_mode") or "fp16"
    return "all" if mode in modes["half"] else "some" if mode in modes["mixed"] else ""
