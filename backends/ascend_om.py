"""Export a checkpoint for Ascend's ATC: ONNX graphs with a cache of fixed size, and all that turns them into an OM.

The folder appears complete or not at all; weights go through one layer at a time into one data file that all graphs of
the folder share. The graphs are described in `backends.om_graph`, the texts beside them in `backends.om_build`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch
from onnx import TensorProto

from backends import om_runner
from backends.ascend_build import write_json
from backends.ascend_rules import Chip, find_chip, load_rules, require_soc, settle_soc
from backends.export_onnx import GRAPH_ROOM, read_generation
from backends.om_build import (
    BUILD,
    CONTRACT,
    KEPT,
    MIXED,
    MIXED_LIST,
    ORIGIN,
    README,
    RUNNER,
    SCRIPT,
    BuildPlan,
    describe_build,
    describe_contract,
    list_black,
    list_flags,
    list_kept,
    write_readme,
    write_script,
)
from backends.om_graph import OmGraph, StepForm, StoredModel, count_rows, emit_step, part_pairs, store_tables
from backends.onnx_graph import IR_VERSION, OPSET
from backends.onnx_layers import NORMS
from compress.checkpoint import Checkpoint
from compress.checkpoint_writer import check_space, replace_folder, sync_path
from compress.errors import UserError
from compress.spec import LayerSpec, ModelSpec
from compress.weights import Weights, read_layer, read_spec
from profiles.profile import Profile

DATA = "model.onnx.data"
CONFIG = "config.json"
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
IDS = {"int64": TensorProto.INT64, "int32": TensorProto.INT32}
PRECISIONS = (MIXED, ORIGIN, "fp16", "mixed_bfloat16", "cube_fp16in_fp32out")
HOSTS = ("", "aarch64", "x86_64")
LOGITS = ("last", "all")
HALF_MAX, HALF_NORMAL, HALF_ZERO = 65504.0, 2.0**-14, 2.0**-25
DEFAULT_CACHE = 1024
DEFAULT_GEARS, DEFAULT_STATIC = (1, 8, 32, 128), (1, 128)
BOARD = "310B"  # chips that sit on aarch64 boards of their own
INLINE_BYTES = 3 * 2**29  # weights up to here go into the OM itself (ascend.md 2.2: outside from about 1.5 GB on)
GIB = 2**30
CUBE = 16  # step of a float16 product along every axis (ascend.md 5)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class OmRequest:
    """What to write: chip, element type (fp16, or fp32 for proofs), tokens in the cache, and new tokens per step.

    `gears`: ascending, the first 1; one graph with --dynamic_dims, or one graph each if `static`. None and empty values
    are chosen to fit. `external_weight`: atc's flag. `logits`: of the last new token or of all. `host_cpu`: of the
    machine that runs the OM, where it is not the one that compiles. `jobs`: processes that compile at a time.
    `memory_gib`: of the device, 0 where that is not known.
    """

    soc_version: str
    profile: str = ""
    dtype: str = "fp16"
    cache: int | None = None
    gears: tuple[int, ...] = ()
    static: bool = False
    ids: str = "int64"
    logits: str = "last"
    precision: str = ""
    external_weight: int | None = None
    host_os: str = "linux"
    host_cpu: str = ""
    jobs: int = 4
    memory_gib: float = 0.0


@dataclass(frozen=True)
class OmReport:
    """What was written: folder, chip, resolved sizes, files with their bytes, how weights fit float16, and notes.

    `largest` is the largest |weight| and the tensor it is in; `subnormal` and `flushed` are the shares of all weights
    that float16 keeps with fewer digits, and that it turns to zero (both 0 where float32 is written).
    """

    folder: Path
    soc_version: str
    cache: int
    gears: tuple[int, ...]
    files: Mapping[str, int]
    largest: tuple[float, str]
    subnormal: float
    flushed: float
    notes: tuple[str, ...]


def request_for(profile: Profile, soc_version: str = "") -> OmRequest:
    """Return what a device profile asks for; UserError when the profile is of no Ascend chip, or of another family."""
    soc = settle_soc(profile, soc_version)
    chip = find_chip(soc)
    host = "aarch64" if chip is not None and chip.family == BOARD else ""
    return OmRequest(soc, profile.name, host_cpu=host, memory_gib=profile.memory.capacity_gib)


def export_om(
    checkpoint: Checkpoint, folder: Path, request: OmRequest, progress: Progress | None = None, overwrite: bool = False
) -> OmReport:
    """Write the folder of one chip; `progress` gets layers written and all layers.

    Raises UserError for a request that cannot be met, a checkpoint that does not fit its config, weights that float16
    cannot hold, or a folder that cannot be written; then nothing is left behind.
    """
    spec = read_spec(checkpoint)
    plan = resolve_request(request, spec)
    check_space(folder, count_bytes(spec, plan) + GRAPH_ROOM)
    with fresh_folder(folder, checkpoint.folder, overwrite) as work:
        half = HalfCheck(plan.dtype == "fp16")
        with (work / DATA).open("wb") as data:
            nodes = write_graphs(work, data, (checkpoint, spec), plan, (half, progress))
        notes = list_notes(spec, plan, half)
        write_texts(work, (checkpoint, spec), plan, nodes, notes)
        files = {path.name: path.stat().st_size for path in sorted(work.iterdir())}
    shares = half.subnormal / max(half.values, 1), half.flushed / max(half.values, 1)
    return OmReport(folder, plan.soc, plan.cache, plan.gears, files, half.largest, *shares, tuple(notes))


# The request


def resolve_request(request: OmRequest, spec: ModelSpec) -> BuildPlan:
    """Return the plan with every choice made; UserError for the first thing in the request that cannot be."""
    chip = find_chip(require_soc(request.soc_version))
    assert chip is not None
    check_choices(request)
    check_types(request, chip)
    check_heads(spec)
    cache = request.cache if request.cache is not None else min(DEFAULT_CACHE, spec.max_positions)
    check_cache(cache, spec)
    default = DEFAULT_STATIC if request.static else DEFAULT_GEARS
    gears = request.gears or tuple(gear for gear in default if gear <= cache)
    check_gears(gears, cache, request.static)
    precision = request.precision or (MIXED if request.dtype == "fp16" else ORIGIN)
    plan = BuildPlan(
        request.soc_version, request.profile, request.dtype, cache, gears, request.static, request.ids, request.logits,
        precision, 0, request.host_os, request.host_cpu, request.jobs,
    )  # fmt: skip
    check_memory(spec, plan, request.memory_gib)
    if request.external_weight is not None:
        return replace(plan, external_weight=request.external_weight)
    # Files named by content serve several graphs; a single graph needs no more than one file.
    outside = 1 if request.static and len(gears) > 1 else 2 if count_bytes(spec, plan) > INLINE_BYTES else 0
    return replace(plan, external_weight=outside)


def check_choices(request: OmRequest) -> None:
    """Raise UserError for a value that is none of its choices."""
    for value, flag, choices in (
        (request.ids, "--ids", tuple(IDS)),
        (request.logits, "--logits", LOGITS),
        (request.precision or MIXED, "--precision", PRECISIONS),
        (request.host_cpu, "--host-cpu", HOSTS),
        (request.external_weight or 0, "--external-weight", (0, 1, 2)),
    ):
        if value not in choices:
            listed = ", ".join(str(choice) for choice in choices if choice != "")
            raise UserError(f"{flag} {value} is not one of {listed}; choose one of them.")
    if request.jobs < 1:
        raise UserError(f"--jobs {request.jobs} must be at least 1: atc compiles in that many processes.")


def check_types(request: OmRequest, chip: Chip) -> None:
    """Raise UserError for an element type that is not written, or a mode that the chip lacks."""
    if request.dtype == "bf16" and not chip.bf16:
        raise UserError(f"{chip.soc} has no bfloat16; export with --format fp16.")
    if request.dtype not in DTYPES:
        raise UserError(
            f"--format {request.dtype} is not written for an OM; give fp16, or fp32 to check numbers (servers read "
            "bf16 from --target ascend-hf)."
        )
    if request.precision == "mixed_bfloat16" and not chip.bf16:
        raise UserError(f"{chip.soc} has no bfloat16, so --precision mixed_bfloat16 cannot be; use {MIXED}.")
    if request.dtype == "fp32" and request.precision not in ("", ORIGIN):
        raise UserError(
            f"--precision {request.precision} would turn a graph of --format fp32 into 16 bits without the list of "
            "what must not: leave it out, or give --format fp16."
        )


def check_heads(spec: ModelSpec) -> None:
    """Raise UserError where layers differ in head size, or it cannot be halved for the rotary embedding."""
    sizes = sorted({layer.shape.head_dim for layer in spec.layers})
    if len(sizes) > 1:
        raise UserError(
            f"Layers have heads of {sizes[0]} and of {sizes[-1]} values, which one cache tensor cannot hold; make them "
            "equal before the export."
        )
    odd = [size for size in (*sizes, *(layer.rope.dim for layer in spec.layers if layer.rope)) if size % 2]
    if odd:
        raise UserError(f"Heads of {odd[0]} values cannot be halved for rotation; an OM needs an even head size.")


def check_cache(cache: int, spec: ModelSpec) -> None:
    """Raise UserError for a cache without rows or longer than the model's context."""
    if cache < 1:
        raise UserError(f"--cache {cache} must be at least 1: no tensor of an OM may be empty.")
    if cache > spec.max_positions:
        raise UserError(
            f"--cache {cache} is longer than the {spec.max_positions} positions of the model; give at most that."
        )


def check_gears(gears: tuple[int, ...], cache: int, static: bool) -> None:
    """Raise UserError for gears that ATC refuses or that the cache cannot hold."""
    low, high = load_rules()["flags"]["gears"]
    shown = ",".join(map(str, gears))
    if not static and not low <= len(gears) <= high:
        raise UserError(f"--gears {shown} are {len(gears)}; atc takes {low} to {high} gears, or add --static.")
    if len(gears) > high:
        raise UserError(f"--gears {shown} would be {len(gears)} graphs; give at most {high}.")
    if list(gears) != sorted(set(gears)) or gears[0] != 1:
        raise UserError(f"--gears {shown} must ascend from 1, which decoding needs; give such as 1,8,32,128.")
    if gears[-1] > cache:
        raise UserError(f"--gears {shown} reach beyond the cache of {cache} tokens; give a longer --cache or less.")


def check_memory(spec: ModelSpec, plan: BuildPlan, memory_gib: float) -> None:
    """Raise UserError where weights and cache alone exceed the device's memory."""
    needed = (count_bytes(spec, plan) + plan.cache * count_row_bytes(spec, plan)) / GIB
    if memory_gib and needed > memory_gib:
        raise UserError(
            f"Weights and cache take {needed:.1f} GiB and {plan.profile} has {memory_gib:g}; compress the model, or "
            "give a shorter --cache."
        )


def count_bytes(spec: ModelSpec, plan: BuildPlan) -> int:
    """Return about how many bytes the weights take."""
    return spec.shape.parameters * DTYPES[plan.dtype].itemsize


def count_row_bytes(spec: ModelSpec, plan: BuildPlan) -> int:
    """Return the bytes of one token in the cache."""
    return count_rows(spec) * spec.layers[0].shape.head_dim * DTYPES[plan.dtype].itemsize


def list_notes(spec: ModelSpec, plan: BuildPlan, half: HalfCheck) -> list[str]:
    """Return what the user should know of this export."""
    notes = []
    size = spec.layers[0].shape.head_dim
    for what, count in (("head size", size), ("cache", plan.cache), ("hidden size", spec.shape.hidden)):
        if count % CUBE:
            notes.append(f"The {what} of {count} is no multiple of {CUBE}, so the chip pads it in every product.")
    row = count_row_bytes(spec, plan)
    notes.append(f"The cache takes {plan.cache * row / 2**20:.2f} MiB on the device, {row} bytes for each token.")
    if plan.static and len(plan.gears) > 1:
        notes.append("Every static graph loads its own copy of the weights on the device; gears share one.")
    if half.flushed:
        share = half.flushed / half.values
        notes.append(f"float16 turns {half.flushed} weights ({share:.1e} of all) to zero: they are below 3e-8.")
    return notes


# Weights


class HalfCheck:
    """Watches whether weights fit float16 while they are written."""

    def __init__(self, needed: bool) -> None:
        """Watch only if float16 is what will be written."""
        self.needed = needed
        self.largest = (0.0, "")
        self.values = self.subnormal = self.flushed = 0

    def check(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Return the values `[...]` after counting them; UserError when one is too large for float16."""
        sizes = values.abs()
        largest = float(sizes.max())
        if largest > self.largest[0]:
            self.largest = (largest, name)
        if self.needed:
            if largest > HALF_MAX:
                raise UserError(
                    f"{name} holds a weight of {largest:.6g}, beyond float16's {HALF_MAX:.0f}; export it for a runtime "
                    "with bfloat16 or float32, or scale it down first."
                )
            small = sizes < HALF_NORMAL
            self.subnormal += int((small & (sizes > HALF_ZERO)).sum())
            self.flushed += int(((sizes > 0) & (sizes <= HALF_ZERO)).sum())
        self.values += values.numel()
        return values


def store_model(
    graph: OmGraph, source: tuple[Checkpoint, ModelSpec], cache: int, half: HalfCheck, progress: Progress | None
) -> StoredModel:
    """Stream all weights and tables into the data file and return their names."""
    checkpoint, spec = source
    embed = store_end(graph, checkpoint, (spec.names["embed"], "embed.weight"), half)
    layers = []
    for index, layer in enumerate(spec.layers):
        weights = read_layer(checkpoint, spec, index, torch.float32)
        layers.append(store_om_layer(graph, (spec, layer), f"layers.{index}", weights, half))
        if progress is not None:
            progress(index + 1, len(spec.layers))
    shared = spec.shares_ends
    head = embed if shared else store_end(graph, checkpoint, (spec.names["head"], "head.weight"), half)
    tables = store_tables(graph, spec, cache)
    with graph.wide():
        norm = checkpoint.read_one(spec.names["final_norm"], torch.float32) + spec.norm_offset
        graph.store("final_norm.weight", norm)
        places = graph.store("cache.positions", torch.arange(cache, dtype=torch.float32)[None])
    return StoredModel(embed, head, "final_norm.weight", tuple(layers), tables, places)


def store_end(graph: OmGraph, checkpoint: Checkpoint, names: tuple[str, str], half: HalfCheck) -> str:
    """Copy a matrix `[vocab, hidden]` to the data file, a block of rows in memory; `names`: stored, in the graph."""
    rows, width = checkpoint.tensors[names[0]].shape
    blocks = (half.check(names[0], block) for block in checkpoint.read_blocks(names[0], torch.float32))
    return graph.store_blocks(names[1], (rows, width), blocks)


def store_om_layer(
    graph: OmGraph, place: tuple[ModelSpec, LayerSpec], prefix: str, weights: Weights, half: HalfCheck
) -> dict[str, str]:
    """Store one layer's weights and return role -> name; empties `weights`.

    Matrices become `[in, out]`, so that MatMul needs no Transpose. Norms are float32 with the family's offset added.
    """
    spec, layer = place
    part_pairs(layer, weights)
    names = {}
    for role in list(weights):
        tensor = weights.pop(role)
        name = f"{prefix}.{role.removesuffix('_bias')}.{'bias' if role.endswith('_bias') else 'weight'}"
        if role in NORMS:
            with graph.wide():
                names[role] = graph.store(name, tensor + spec.norm_offset)
            continue
        half.check(find_stored_name(layer, role), tensor)
        names[role] = graph.store(name, tensor.t() if tensor.dim() > 1 else tensor)
    return names


def find_stored_name(layer: LayerSpec, role: str) -> str:
    """Return the checkpoint's name of a role, which may be part of a fused tensor."""
    fused = (name for whole, name in layer.names.items() if role in layer.parts.get(whole, ()))
    return layer.names.get(role) or next(fused, role)


# Files


def write_graphs(
    work: Path,
    data: BinaryIO,
    source: tuple[Checkpoint, ModelSpec],
    plan: BuildPlan,
    watch: tuple[HalfCheck, Progress | None],
) -> list[tuple[str, str]]:
    """Write the data file and every graph over it; return name and operator of all nodes that stay in float32."""
    spec, dtype = source[1], DTYPES[plan.dtype]
    store = OmGraph(data, DATA, dtype)
    stored = store_model(store, source, plan.cache, *watch)
    kept: dict[str, str] = {}
    for name, gears in plan.graphs:
        graph = OmGraph(data, DATA, dtype, initializers=list(store.initializers))
        rows = gears[0] if len(gears) == 1 else None
        emit_step(graph, spec, stored, StepForm(plan.cache, rows, IDS[plan.ids], plan.logits == "all"))
        model = graph.build_model("lightpress")
        (work / f"{name}.onnx").write_bytes(model.SerializeToString(deterministic=True))
        kept |= dict(graph.wide_nodes)
    return list(kept.items())


def write_texts(
    work: Path, source: tuple[Checkpoint, ModelSpec], plan: BuildPlan, nodes: list[tuple[str, str]], notes: list[str]
) -> None:
    """Write all files beside the graphs."""
    checkpoint, spec = source
    contract = describe_contract(spec, plan, read_generation(checkpoint.folder))
    flags = [list_flags(plan, contract, name, gears) for name, gears in plan.graphs]
    if any(MIXED_LIST in own.values() for own in flags):
        write_json(work / MIXED_LIST, list_black(nodes))
    if any(KEPT in own.values() for own in flags):
        (work / KEPT).write_text(list_kept(nodes), encoding="utf-8")
    for file in checkpoint.side_files():
        shutil.copyfile(file, work / file.name)
    write_json(work / CONFIG, checkpoint.config)
    write_json(work / CONTRACT, contract)
    sizes = {path.name: path.stat().st_size for path in sorted(work.glob("*.onnx*"))}
    write_json(work / BUILD, describe_build(plan, flags, {"opset": OPSET, "ir_version": IR_VERSION, "files": sizes}))
    (work / SCRIPT).write_text(write_script(plan, flags), encoding="utf-8")
    shutil.copyfile(om_runner.__file__, work / RUNNER)
    for name in (SCRIPT, RUNNER):
        (work / name).chmod(0o755)
    (work / README).write_text(write_readme(plan, notes), encoding="utf-8")


# The folder


@contextmanager
def fresh_folder(folder: Path, source: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a hidden sibling that takes the folder's place when the block ends well, and is removed otherwise."""
    check_target(folder, source, overwrite)
    target = folder.resolve()
    work = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        # A sibling with our own process id can only come from a killed run, as in a container, where ids repeat.
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        yield work
        for path in [*work.iterdir(), work]:
            sync_path(path)
        replace_folder(work, target)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        if error.filename is not None and not str(error.filename).startswith((str(work), str(target))):
            raise UserError(f"{error.filename} cannot be read ({reason}); nothing was written.") from error
        raise UserError(f"{folder} cannot be written ({reason}); choose another output folder.") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_target(folder: Path, source: Path, overwrite: bool) -> None:
    """Raise UserError where `folder` may not be written; inside the checkpoint's folder is a fine place."""
    target, origin = folder.resolve(), source.resolve()
    if target == origin or target in origin.parents:
        raise UserError(f"The output {folder} is the input folder or holds it; choose such as {origin / 'om'}.")
    if target.exists() and not target.is_dir():
        raise UserError(f"The output {folder} is a file; choose a folder.")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise UserError(f"The output {folder} exists and is not empty; choose another folder or add --overwrite.")
    if not (target / CONTRACT).is_file() or not (target / BUILD).is_file():
        # A mistyped path must not cost someone a folder of other things.
        raise UserError(f"The output {folder} is no folder of an OM export, so it is not overwritten; choose another.")
