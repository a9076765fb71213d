"""`export --target ascend-hf`: a Hugging Face folder that vllm-ascend and MindIE open, in the chip's type or in W8A8.

A layer at a time: read, quantise on its own stream, write. The folder appears when all of it is there.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backends.ascend_build import TARGET_FILE, write_json
from backends.ascend_format import (
    ASCEND,
    DESCRIPTION,
    LAYOUTS,
    WEIGHTS,
    describe_ascend,
    describe_compressed,
    module_name,
    name_ascend,
    name_compressed,
)
from backends.ascend_rules import Chip
from backends.ascend_servers import (
    DTYPES,
    FAMILY_310P,
    NONE,
    Start,
    check_head,
    check_products,
    check_quantisation,
    check_shape,
    choose_dtype,
    list_starts,
    list_warnings,
    open_chip,
)
from compress.calibrate import Progress
from compress.checkpoint import Checkpoint
from compress.checkpoint_source import INDEX_NAME
from compress.checkpoint_writer import CheckpointWriter, check_output, check_space
from compress.errors import UserError
from compress.quantize.w8a8 import (
    DYNAMIC,
    FLOAT,
    STATIC,
    LinearForm,
    Matrix,
    QuantisedLinear,
    fuse_linears,
    quantise_linear,
)
from compress.quantize.w8a8_stream import NEEDS_TEXT, LinearQuantiser, StreamReport
from compress.spec import LayerSpec, ModelSpec
from compress.text import Windows
from compress.weights import read_layer, read_spec

SHARD_BYTES = 4 * 2**30  # as ModelSlim shards
NAMED = 4  # groups that a warning names before it says "and more"
HALF_MAX, HALF_NORMAL = torch.finfo(torch.float16).max, torch.finfo(torch.float16).smallest_normal


@dataclass(frozen=True)
class HfRequest:
    """What to write for which chip.

    `soc_version` as `npu-smi` names it (Ascend310P3, Ascend910B2, ...); `quantisation` one of QUANTISATIONS; `dtype`
    float16, bfloat16 or empty for the chip's own; `devices`: degree of tensor parallelism; `alpha`: strength of
    smoothing, None for none; `mixed`: whether projections that static inputs harm fall back; `int8_head`: the head too.
    """

    soc_version: str
    quantisation: str = NONE
    dtype: str = ""
    devices: int = 1
    shard_bytes: int = SHARD_BYTES
    gptq: bool = True
    alpha: float | None = 0.5
    mixed: bool = True
    int8_head: bool = False
    overwrite: bool = False


@dataclass
class Rounded:
    """What rounding to float16 did: values that became 0 or subnormal, of how many; the largest, and its tensor."""

    lost: int = 0
    subnormal: int = 0
    values: int = 0
    largest: float = 0.0
    name: str = ""


@dataclass(frozen=True)
class HfReport:
    """What was written: type and quantisation, files with sizes, projections by kind, what rounding and codes cost."""

    folder: Path
    soc_version: str
    dtype: str
    quantisation: str
    files: Mapping[str, int]
    kinds: Mapping[str, int]
    rounded: Rounded
    stream: StreamReport
    warnings: tuple[str, ...]
    starts: tuple[Start, ...]


@dataclass
class Work:
    """An export under way: the model, what is asked, the open folder, and what was written so far."""

    checkpoint: Checkpoint
    spec: ModelSpec
    chip: Chip
    request: HfRequest
    writer: CheckpointWriter
    kinds: dict[str, str] = field(default_factory=dict)
    rounded: Rounded = field(default_factory=Rounded)

    @property
    def dtype(self) -> torch.dtype:
        """The model's type on the device."""
        return DTYPES[self.request.dtype]

    @property
    def ascend(self) -> bool:
        """Whether the files are AscendV1's."""
        return self.request.quantisation in LAYOUTS and LAYOUTS[self.request.quantisation].files == ASCEND


def export_hf(
    checkpoint: Checkpoint, folder: Path, request: HfRequest, windows: Windows | None = None,
    progress: Progress | None = None,
) -> HfReport:  # fmt: skip
    """Write the folder and return what is in it; `windows` is the text that ranges and GPTQ learn from.

    Raises UserError for a chip, type, quantisation, split or model that no server takes, for values that float16
    cannot hold, and as `CheckpointWriter` does. Nothing is left behind then.
    """
    spec, chip, request = check_request(checkpoint, request)
    form = make_form(request)
    if form is not None and windows is None and form.kind == STATIC:
        raise UserError(NEEDS_TEXT)
    check_output(folder, checkpoint.folder, request.overwrite)
    check_space(folder, estimate_bytes(checkpoint, form))
    config = make_config(spec, request)
    with ExitStack() as stack:
        writer = stack.enter_context(
            CheckpointWriter(
                folder, config, request.shard_bytes, overwrite=request.overwrite, source=checkpoint.folder
            )
        )
        work = Work(checkpoint, spec, chip, request, writer)
        quantiser = None
        if form is not None:
            quantiser = stack.enter_context(LinearQuantiser(checkpoint, spec, form, windows))
        write_tensors(work, quantiser, progress)
        stream = quantiser.report if quantiser else StreamReport()
        report = describe_export(work, folder, stream)
        finish_folder(work, report)
    return replace(report, files={path.name: path.stat().st_size for path in sorted(folder.iterdir())})


def check_request(checkpoint: Checkpoint, request: HfRequest) -> tuple[ModelSpec, Chip, HfRequest]:
    """Return the model, the chip and the request with its type settled; raises what `export_hf` raises early."""
    chip = open_chip(request.soc_version)
    request = replace(request, dtype=choose_dtype(chip, request.dtype))
    check_quantisation(chip, request.quantisation, request.dtype)
    spec = read_spec(checkpoint)
    check_shape(spec, chip, request.devices)
    if request.int8_head:
        check_head(spec, chip, request.quantisation)
    return spec, chip, request


def make_form(request: HfRequest) -> LinearForm | None:
    """Return how projections are quantised, None for not at all."""
    layout = LAYOUTS.get(request.quantisation)
    if layout is None:
        return None
    form = layout.form(DTYPES[request.dtype], request.gptq, request.alpha, request.mixed)
    return replace(form, splits=request.devices > 1)


def estimate_bytes(checkpoint: Checkpoint, form: LinearForm | None) -> int:
    """Return about how many bytes the folder needs: two for each value, or a little more than one in W8A8."""
    values = sum(info.count for info in checkpoint.tensors.values())
    return 2 * values if form is None else values + values // 4


def make_config(spec: ModelSpec, request: HfRequest) -> dict[str, Any]:
    """Return config.json: the model's own, with the type under both names and what the format adds.

    MindIE reads `torch_dtype`, and `quantize` for AscendV1; other readers pass over the latter.
    """
    config = dict(spec.config) | {"torch_dtype": request.dtype, "dtype": request.dtype}
    layout = LAYOUTS.get(request.quantisation)
    if layout is not None and layout.files == ASCEND:
        config["quantize"] = layout.kind.lower()
    return config


def write_tensors(work: Work, quantiser: LinearQuantiser | None, progress: Progress | None) -> None:
    """Write embedding, layers, final norm and head."""
    add_float(work, work.spec.names["embed"], work.checkpoint.read_one(work.spec.names["embed"]))
    for index, layer in enumerate(work.spec.layers):
        weights = read_layer(work.checkpoint, work.spec, index)
        small = weights if quantiser is None else quantiser.quantise_layer(index, weights)
        for name, matrix in fuse_layer(layer, small):
            add_matrix(work, name, matrix)
        if progress is not None:
            progress("export", index + 1, len(work.spec.layers))
    add_float(work, work.spec.names["final_norm"], work.checkpoint.read_one(work.spec.names["final_norm"]))
    name = work.spec.names["head"]
    if name != work.spec.names["embed"] and not work.spec.shape.tied:
        head = work.checkpoint.read_one(name)
        add_matrix(work, name, quantise_head(work, head) if work.request.int8_head else head)


def quantise_head(work: Work, head: Tensor) -> QuantisedLinear:
    """Return the head with a scale for each token and row."""
    return quantise_linear(head.float(), None, LinearForm(DYNAMIC, work.dtype), None, None)


def fuse_layer(layer: LayerSpec, weights: Mapping[str, Matrix]) -> Iterator[tuple[str, Matrix]]:
    """Yield stored names with their tensors; parts of a fused projection become one, in one kind."""
    for role, name in layer.names.items():
        parts = [weights[part] for part in layer.parts.get(role, (role,))]
        linears = [part for part in parts if isinstance(part, QuantisedLinear)]
        if linears and len(linears) < len(parts):
            raise ValueError(f"some parts of {name} are quantised and some are not")
        if linears:
            yield name, fuse_linears(linears)
        else:
            yield name, torch.cat([part for part in parts if isinstance(part, Tensor)])


def add_matrix(work: Work, name: str, matrix: Matrix) -> None:
    """Write one stored tensor with all that belongs to it; biases come under their own role."""
    if isinstance(matrix, Tensor):
        add_float(work, name, matrix)
        return
    check_products(name, matrix)
    if work.ascend:
        tensors = name_ascend(name, matrix, work.dtype, work.chip.family == FAMILY_310P)
    else:
        tensors = name_compressed(name, matrix, work.dtype)
    for key, tensor in tensors.items():
        work.writer.add(key, tensor)
        work.kinds[key] = matrix.kind


def add_float(work: Work, name: str, tensor: Tensor) -> None:
    """Write a tensor in the model's type; UserError for values that float16 cannot hold."""
    small = tensor.to(work.dtype)
    if work.dtype == torch.float16:
        count_rounded(work.rounded, name, tensor, small)
    work.writer.add(name, small)
    work.kinds[name] = FLOAT


def count_rounded(rounded: Rounded, name: str, tensor: Tensor, small: Tensor) -> None:
    """Add what rounding one tensor to float16 did; UserError where it overflows."""
    magnitude = tensor.abs()
    largest = float(magnitude.max())
    if not torch.isfinite(small).all():
        raise UserError(
            f"Tensor {name} holds values up to {largest:.4g}, and float16 ends at {HALF_MAX:.0f}; export for a chip "
            "with bfloat16, or quantise it if it is a projection."
        )
    if largest > rounded.largest:
        rounded.largest, rounded.name = largest, name
    rounded.values += tensor.numel()
    rounded.lost += int(((magnitude > 0) & (small == 0)).sum())
    rounded.subnormal += int(((small != 0) & (small.abs() < HALF_NORMAL)).sum())


# What goes beside the tensors


def describe_export(work: Work, folder: Path, stream: StreamReport) -> HfReport:
    """Return the report, its files still to come."""
    request = work.request
    matrices = {name for layer in work.spec.layers for role, name in layer.names.items() if is_projection(layer, role)}
    kinds = Counter(kind for name, kind in work.kinds.items() if name in matrices)
    asked = request.quantisation, request.dtype, request.devices
    known = list_warnings(work.spec, work.chip, request.quantisation, request.devices)
    warnings = [*known, *warn_numbers(work, stream)]
    starts = list_starts(work.spec, work.chip, asked, f"/path/to/{folder.name}")
    return HfReport(
        folder, request.soc_version, request.dtype, request.quantisation, {}, dict(kinds), work.rounded, stream,
        tuple(warnings), tuple(starts),
    )  # fmt: skip


def is_projection(layer: LayerSpec, role: str) -> bool:
    """Tell whether a stored role is a projection, fused or not."""
    return role in ("q", "k", "v", "o", "gate", "up", "down") or role in layer.parts


def warn_numbers(work: Work, stream: StreamReport) -> Iterator[str]:
    """Yield what the numbers themselves warn of: an overflowing stream, values lost, projections that fell back."""
    if work.dtype == torch.float16 and stream.peak > HALF_MAX / 2:
        yield f"The residual stream reaches {stream.peak:.4g}, and float16 ends at {HALF_MAX:.0f}: expect overflow."
    rounded = work.rounded
    if rounded.values and (rounded.lost or rounded.subnormal):
        share = 100 * (rounded.lost + rounded.subnormal) / rounded.values
        yield (
            f"{share:.3g} % of the float16 values are below {HALF_NORMAL:.2g} and lost precision, {rounded.lost} of "
            "them all of it."
        )
    moved = [group for group in stream.groups if group.kind != wanted_kind(work.request)]
    if moved:
        places = ", ".join(f"{'+'.join(group.roles)} of layer {group.layer} ({group.kind})" for group in moved[:NAMED])
        yield f"{len(moved)} groups of projections bear no static inputs and fell back: {places}" + (
            ", and more." if len(moved) > NAMED else "."
        )


def wanted_kind(request: HfRequest) -> str:
    """Return the kind that all projections were meant to have."""
    layout = LAYOUTS.get(request.quantisation)
    return layout.kind if layout else FLOAT


def finish_folder(work: Work, report: HfReport) -> None:
    """Write what stands beside the tensors and move the folder into place."""
    hidden = work.writer.seal()
    if work.ascend:
        rename_weights(hidden)
        head = work.spec.family.model["head"].name
        write_json(hidden / DESCRIPTION, describe_ascend(work.kinds, head))
    elif work.request.quantisation in LAYOUTS:
        add_scheme(work, hidden)
    for path in work.checkpoint.side_files():
        work.writer.add_file(path)
    target = {
        "soc_version": work.request.soc_version, "dtype": work.request.dtype, "quantisation": work.request.quantisation,
        "devices": work.request.devices,
    }  # fmt: skip
    work.writer.add_text(TARGET_FILE, json.dumps(target, indent=2) + "\n")
    work.writer.add_text("README.md", write_readme(work, report))
    work.writer.finish()


def rename_weights(folder: Path) -> None:
    """Give shards and index the names of AscendV1."""
    for path in sorted(folder.glob("model*.safetensors")):
        path.rename(path.with_name(path.name.replace("model", WEIGHTS, 1)))
    index = folder / INDEX_NAME
    if index.is_file():
        data = json.loads(index.read_text(encoding="utf-8"))
        data["weight_map"] = {name: file.replace("model", WEIGHTS, 1) for name, file in data["weight_map"].items()}
        write_json(folder / f"{WEIGHTS}.safetensors.index.json", data)
        index.unlink()


def add_scheme(work: Work, folder: Path) -> None:
    """Add compressed-tensors' scheme to config.json, now that it is known which projections stayed in float."""
    path = folder / "config.json"
    names = [name for layer in work.spec.layers for role, name in layer.names.items() if is_projection(layer, role)]
    ignored = [module_name(name) for name in names if work.kinds[name] == FLOAT]
    head = module_name(work.spec.family.model["head"].name)
    scheme = describe_compressed(LAYOUTS[work.request.quantisation].kind, [head, *ignored])
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | {"quantization_config": scheme})


def write_readme(work: Work, report: HfReport) -> str:
    """Return the folder's README.md: what this is, how servers are started on it, what was not tried."""
    request = work.request
    lines = [
        f"# {report.folder.name}: {request.quantisation if request.quantisation != NONE else request.dtype} for "
        f"{work.chip.soc}",
        "",
        f"Written by Lightpress for {work.chip.soc}: the model runs in {request.dtype}, quantisation "
        f"{request.quantisation}, tensor parallelism {request.devices}.",
        "**Nothing here was run on a device**: no NPU was at hand. The files follow the servers' published sources.",
    ]
    for start in report.starts:
        lines += ["", f"## {start.server}", "", "```sh", start.command, "```"]
    if any(start.server == "MindIE" for start in report.starts):
        lines += [
            "",
            "For MindIE's service, set `modelWeightPath` to this folder and `worldSize` to "
            f"{request.devices} in its config.json.",
        ]
    if report.kinds:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(report.kinds.items()))
        lines += ["", "## Projections", "", f"{counts}. Embedding and norms are {request.dtype}."]
    if report.warnings:
        lines += ["", "## Mind", "", *(f"- {warning}" for warning in report.warnings)]
    return "\n".join(lines) + "\n"
