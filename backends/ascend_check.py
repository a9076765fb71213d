"""Judge a folder for Ascend before anybody waits for ATC or a server: ONNX graphs for OM, and Hugging Face folders.

No NPU and no CANN are needed. What is known, and how surely, stands in ascend_operators.toml with its sources.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from backends.ascend_build import (
    BUILD_FILE,
    CONFIG,
    INTERFACE,
    SCRIPT,
    SUFFIX,
    TARGET_FILE,
    Build,
    half_mode,
    list_fixed_shapes,
    read_builds,
    read_json,
)
from backends.ascend_check_build import check_build, check_files, check_interface, check_weights_layout, read_kept
from backends.ascend_check_data import PROTOBUF_LIMIT, check_external, check_size, check_values, count_bytes
from backends.ascend_check_hf import check_checkpoint
from backends.ascend_check_nodes import check_nodes
from backends.ascend_check_shapes import (
    check_inputs,
    check_open_inputs,
    check_quantised_products,
    check_squares,
    check_steps,
    check_zero_dims,
)
from backends.ascend_graph import OpenGraph, open_graph, walk_graphs
from backends.ascend_rules import ERROR, WARNING, Chip, Finding, explain_soc, find_chip, require_soc
from compress.errors import UserError

ASCEND_FOLDER, MANIFEST, RUNNER = "ascend", "lightpress.json", "run_om.py"
OM_FILES = (BUILD_FILE, SCRIPT, INTERFACE, RUNNER)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Report:
    """What was found, and what was looked at, such as `model.onnx: 120 nodes`; `soc_version` may be empty."""

    findings: tuple[Finding, ...]
    checked: tuple[str, ...]
    soc_version: str = ""

    @property
    def errors(self) -> int:
        """How many findings are errors."""
        return sum(finding.severity == ERROR for finding in self.findings)

    @property
    def warnings(self) -> int:
        """How many findings are warnings."""
        return len(self.findings) - self.errors


def check_folder(
    folder: Path, soc_version: str | None = None, devices: int = 1, progress: Progress | None = None
) -> Report:
    """Return what would keep the graphs or the checkpoint in a folder from running on a chip.

    The chip is `soc_version`, else that of build.json; without either, rules of single chips are left out and a warning
    says so. `devices` is the degree of tensor parallelism that a Hugging Face folder will be served with. Raises
    UserError when there is nothing to check, for an unknown `soc_version`, and for JSON that cannot be read.
    """
    folder = find_ascend(folder)
    graphs = list_graphs(folder)
    soc = require_soc(soc_version) if soc_version else read_soc(folder)
    chip = find_chip(soc)
    config = read_config(folder)
    found = list(check_soc(soc, chip))
    found += check_complete(folder)
    checked: list[str] = []
    if graphs:
        found += check_graphs(folder, graphs, chip, config, checked, progress)
    else:
        found += check_checkpoint(folder, config, chip, devices, checked)
    return Report(merge_findings(found), tuple(checked), soc)


def find_ascend(folder: Path) -> Path:
    """Return the `ascend` folder of what `compress` wrote, else the folder itself."""
    inside = folder / ASCEND_FOLDER
    return inside if (folder / MANIFEST).is_file() and inside.is_dir() else folder


def check_complete(folder: Path) -> Iterator[Finding]:
    """Yield the file that a folder of ours has lost; others' graphs have none of them, or some."""
    missing = [name for name in OM_FILES if not (folder / name).is_file()]
    if len(missing) == 1:
        severity = WARNING if missing[0] == RUNNER else ERROR
        text = f"{missing[0]} is missing; copy it there or export the folder again."
        yield Finding("files", severity, missing[0], "", text)


def merge_findings(found: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return findings with those that say the same of several files as one, which names these files."""
    files: dict[Finding, list[str]] = {}
    for finding in found:
        files.setdefault(replace(finding, file=""), []).append(finding.file)
    return tuple(replace(finding, file=", ".join(dict.fromkeys(names))) for finding, names in files.items())


def list_graphs(folder: Path) -> list[Path]:
    """Return the ONNX files of a folder; UserError when it holds neither one nor a config.json."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {what}; give a folder with .onnx graphs, or a Hugging Face folder.")
    graphs = sorted(path for path in folder.iterdir() if path.suffix == SUFFIX and path.is_file())
    if not graphs and not (folder / CONFIG).is_file():
        raise UserError(f"{folder} holds no .onnx graph and no config.json; give a folder of `lightpress export`.")
    return graphs


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json, empty where there is none."""
    data = read_json(folder / CONFIG)
    if data is not None and not isinstance(data, dict):
        raise UserError(f"{folder / CONFIG}: is not a JSON object; export the folder again.")
    return data or {}


def read_soc(folder: Path) -> str:
    """Return the chip that build.json or build_om.sh names, or target.json of a server's folder; empty for none."""
    for file in (BUILD_FILE, TARGET_FILE):
        data = read_json(folder / file)
        chip = data.get("chip", data) if isinstance(data, dict) else {}
        for key in ("soc", "soc_version"):
            if isinstance(chip, dict) and isinstance(chip.get(key), str):
                return str(chip[key])
    found = {build.get("soc_version") for build in read_builds(folder, [path.name for path in list_graphs(folder)])}
    return min((soc for soc in found if soc and "$" not in soc), default="")


def check_soc(soc: str, chip: Chip | None) -> Iterator[Finding]:
    """Yield that no chip is known, or that the one in build.json is none; a graph's own flag is judged beside it."""
    if soc and chip is None:
        yield Finding("soc-version", ERROR, BUILD_FILE, "", explain_soc(soc))
    elif not soc:
        text = "No chip is named, so what single chips lack is not checked; give --soc-version or --profile."
        yield Finding("soc-version", WARNING, "", "", text)


def check_graphs(
    folder: Path, graphs: list[Path], chip: Chip | None, config: dict[str, Any], checked: list[str],
    progress: Progress | None,
) -> Iterator[Finding]:  # fmt: skip
    """Yield all findings about the ONNX graphs of a folder, and add each graph to `checked`."""
    builds = read_builds(folder, [path.name for path in graphs])
    yield from check_builds(folder, graphs, builds)
    yield from check_target(builds, chip)
    for done, path in enumerate(graphs):
        if progress is not None:
            progress(done, len(graphs))
        yield from check_size(path)
        if path.stat().st_size > PROTOBUF_LIMIT:
            checked.append(f"{path.name}: too large to open")
            continue
        model = load_model(path)
        checked.append(f"{path.name}: {len(model.graph.node)} nodes, {len(model.graph.initializer)} constants")
        own = [build for build in builds if build.graph == path.name]
        yield from check_graph(path, model, own, chip, config)
    if progress is not None:
        progress(len(graphs), len(graphs))


def check_builds(folder: Path, graphs: list[Path], builds: list[Build]) -> Iterator[Finding]:
    """Yield atc commands for graphs that are missing, and graphs without a command."""
    names, files = {path.name for path in graphs}, {build.file for build in builds}
    for build in builds:
        if build.graph not in names and "$" not in build.graph:
            text = f"The atc command converts {build.graph}, which is missing; export the folder again."
            yield Finding("build", ERROR, build.file, build.graph, text)
        yield from check_files(folder, build)
    for name in sorted(names - {build.graph for build in builds}) if builds else ():
        text = f"No atc command converts {name}; add one, or delete the graph."
        yield Finding("build", WARNING, min(files), name, text)


def check_target(builds: list[Build], chip: Chip | None) -> Iterator[Finding]:
    """Yield atc commands that compile for another chip than the one that the folder is judged for."""
    for build in builds:
        soc = build.get("soc_version")
        if chip is not None and find_chip(soc) is not None and soc != chip.soc:
            text = (
                f"The atc command compiles for {soc}, and an OM runs on that chip only; write {chip.soc} to run there."
            )
            yield Finding("soc-version", WARNING, build.file, build.graph, text)


def load_model(path: Path) -> onnx.ModelProto:
    """Return an ONNX model without its external data; UserError when the file is none."""
    try:
        model = onnx.load_model(str(path), load_external_data=False)
    except Exception as error:  # noqa: BLE001 - protobuf's own error has no types that mypy could read
        raise UserError(f"{path}: is not an ONNX graph ({type(error).__name__}); export it again.") from error
    if not model.HasField("graph"):
        raise UserError(f"{path}: is not an ONNX graph (it holds none); export it again.")
    # protobuf gives bytes for text that is no UTF-8.
    if any(isinstance(name, bytes) for graph in walk_graphs(model.graph) for name in list_texts(graph)):
        raise UserError(f"{path}: is damaged (a name in it is no text); export or copy it again.")
    return model


def list_texts(graph: onnx.GraphProto) -> Iterator[Any]:
    """Yield the names in a graph."""
    for entry in (*graph.input, *graph.output, *graph.value_info):
        yield entry.name
        for dimension in entry.type.tensor_type.shape.dim:
            yield dimension.dim_param
    for tensor in graph.initializer:
        yield tensor.name
        for place in tensor.external_data:
            yield from (place.key, place.value)
    for node in graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)


def check_graph(
    path: Path, model: onnx.ModelProto, builds: list[Build], chip: Chip | None, config: dict[str, Any]
) -> Iterator[Finding]:
    """Yield all findings about one graph and its atc commands."""
    plain = open_graph(path, model)
    yield from check_inference(plain)
    yield from check_nodes(plain, chip, config)
    yield from check_external(plain)
    yield from check_inputs(plain)
    yield from check_steps(plain)
    yield from check_quantised_products(plain)
    yield from check_interface(path.parent, plain)
    if not builds:
        yield from check_open_inputs(plain)
    size = sum(max(count_bytes(tensor), 0) for tensor in model.graph.initializer)
    for build in builds:
        yield from check_build(plain, build, chip)
        yield from check_weights_layout(path.parent, build, size)
    # Values are read once, however many commands convert the graph.
    commands: Sequence[Build | None] = builds or [None]
    modes = {half_mode(build) for build in commands}
    yield from check_values(plain, "all" if "all" in modes else "some" if "some" in modes else "")
    for command in commands:
        yield from check_precision_loss(plain, command)
        yield from check_fixed(plain, command)


def check_inference(graph: OpenGraph) -> Iterator[Finding]:
    """Yield a finding when the types and shapes of a graph contradict each other."""
    if graph.problem:
        # Constants in the data file are not read for inference, which is no fault of the graph.
        severity = WARNING if "external" in graph.problem.lower() else ERROR
        text = f"Types and shapes cannot be inferred ({graph.problem[:200].rstrip('.')}); export the graph again."
        yield Finding("inference", severity, graph.name, "", text)


def check_precision_loss(graph: OpenGraph, build: Build | None) -> Iterator[Finding]:
    """Yield norms whose square may overflow under a command's precision flags."""
    yield from check_squares(graph, half_mode(build), read_kept(graph.path.parent, build))


def check_fixed(plain: OpenGraph, build: Build | None) -> Iterator[Finding]:
    """Yield zero-length dimensions, and contradictions, of a graph whose inputs have the sizes of a command's gears."""
    for shapes in list_fixed_shapes(build):
        graph = open_graph(plain.path, plain.model, shapes) if shapes else plain
        yield from check_zero_dims(graph)
        if not plain.problem:
            yield from check_inference(graph)


def offer_atc(folder: Path) -> str:
    """Return the command that converts a folder where `atc` is on PATH and a script is there, else nothing."""
    script = folder / "build_om.sh"
    return f"sh {shlex.quote(str(script))}" if shutil.which("atc") and script.is_file() else ""
