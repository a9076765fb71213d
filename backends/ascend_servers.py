"""Which Ascend servers open a folder, on which chip, and how they are started; facts in ascend_servers.toml."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from backends.ascend_format import ASCEND, LAYOUTS
from backends.ascend_rules import Chip, find_chip, load_rules, load_servers, require_soc
from compress.errors import UserError
from compress.family import EXTENSION, PER_LAYER
from compress.quantize.w8a8 import QuantisedLinear
from compress.shapes import LayerShape
from compress.spec import ModelSpec
from compress.surgery.pad import uniform_shape

NONE = "none"
QUANTISATIONS = (NONE, *LAYOUTS)
DTYPES: Mapping[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}
FAMILY_310P = "310P"


def open_chip(soc_version: str) -> Chip:
    """Return the chip of a soc_version; UserError for an unknown one, and for one that no server runs on."""
    chip = find_chip(require_soc(soc_version))
    assert chip is not None  # require_soc knows it
    if not chip.servers:
        raise UserError(
            f"No server of Hugging Face folders runs on {soc_version}; export with --target ascend-om instead."
        )
    return chip


def choose_dtype(chip: Chip, wanted: str) -> str:
    """Return the type that the model runs in: the one wanted, else the chip's; UserError for one it does not have."""
    if not wanted:
        return "bfloat16" if chip.bf16 else "float16"
    if wanted not in DTYPES:
        raise UserError(f"The servers run float16 or bfloat16, not {wanted}; choose one of them.")
    if wanted == "bfloat16" and not chip.bf16:
        raise UserError(f"{chip.soc} has no bfloat16; give float16, or leave the type to the chip.")
    return wanted


def check_quantisation(chip: Chip, quantisation: str, dtype: str) -> None:
    """Raise UserError for a quantisation that does not exist or that the chip's servers do not read."""
    if quantisation not in QUANTISATIONS:
        raise UserError(f"The quantisation {quantisation} is not one of {', '.join(QUANTISATIONS)}.")
    layout = LAYOUTS.get(quantisation)
    if layout is None:
        return
    if layout.files != ASCEND and not chip.compressed_tensors:
        raise UserError(f"No server reads {quantisation} on {chip.soc}; give w8a8-static or w8a8-dynamic.")
    if layout.files != ASCEND and dtype != "bfloat16":
        raise UserError(
            f"{quantisation} keeps its scales in the model's type, and in float16 they would underflow; leave the type "
            "at bfloat16, or give w8a8-static or w8a8-dynamic."
        )


def check_shape(spec: ModelSpec, chip: Chip, devices: int) -> None:
    """Raise UserError for a model that no stock class of a server opens, or that its kernels do not take.

    Layers must be alike, without biases or absorbed norms of our own; heads must be 16-aligned and split evenly
    (reference/ascend.md, 4.1, 4.2 and 4.5).
    """
    check_stock(spec)
    check_kernels(spec, chip)
    check_split(spec.shape.layers[0], devices)


def check_kernels(spec: ModelSpec, chip: Chip) -> None:
    """Raise UserError for heads that the attention kernels do not take, and that no compression changes."""
    rules, layer = load_rules()["fused_attention"], spec.shape.layers[0]
    if layer.head_dim % rules["head_multiple"] or layer.head_dim > rules["head_dim"]:
        raise UserError(
            f"The attention kernels of {chip.soc} take heads of a multiple of {rules['head_multiple']} values up to "
            f"{rules['head_dim']}, and this model's have {layer.head_dim}; export with --target ascend-om instead."
        )
    if layer.group > rules["ratio"]:
        raise UserError(f"{layer.group} query heads on one key/value head are more than the kernels' {rules['ratio']}.")


def check_split(layer: LayerShape, devices: int) -> None:
    """Raise UserError unless `devices` (tensor parallelism) divide key/value heads and FFN channels."""
    if devices < 1:
        raise UserError(f"A model cannot be split over {devices} devices; give 1 or more.")
    for name, size in (("key/value heads", layer.kv_heads), ("FFN channels", layer.ffn)):
        if size % devices:
            raise UserError(
                f"{size} {name} cannot be split over {devices} devices; choose a degree of tensor parallelism that "
                "divides them."
            )


def check_stock(spec: ModelSpec) -> None:
    """Raise UserError for what only our own code opens: uneven layers, absorbed norms in some layers, added biases."""
    if not spec.shape.uniform or spec.config.get(PER_LAYER):
        try:
            uniform_shape(spec)
        except UserError as error:
            raise UserError(
                "The servers open uniform layers with all their norms only, and some of these have lost theirs or "
                "differ in size; compress with --shapes uniform, and --absorb all or none, or export with --target "
                "ascend-om."
            ) from error
        raise UserError(
            "The servers open layers of one size only, and these differ; compress with --shapes uniform, or first "
            "write an equal padded copy with `lightpress export --target uniform`."
        )
    if (spec.config.get(EXTENSION) or {}).get("biases"):
        raise UserError(
            "The servers' classes have no place for the biases that the repair added to this model; compress with "
            "--biases none or stock, or export with --target ascend-om."
        )


def check_head(spec: ModelSpec, chip: Chip, quantisation: str) -> None:
    """Raise UserError for an int8 head that cannot be: too wide, tied, on a chip without it, or without int8 layers."""
    largest, vocab = load_rules()["quantised_products"]["largest"], spec.shape.vocab
    if vocab > largest:
        raise UserError(
            f"An int8 head of {vocab} rows is beyond the {largest} of quantised products; leave the head in float."
        )
    if chip.family in load_servers()["head"]["float_only"]:
        raise UserError(f"The servers on {chip.soc} keep the head in float; leave the int8 head out.")
    if spec.shape.tied:
        raise UserError("The head of this model is its embedding, which stays in float; leave the int8 head out.")
    layout = LAYOUTS.get(quantisation)
    if layout is None or layout.files != ASCEND:
        raise UserError("An int8 head goes with w8a8-static or w8a8-dynamic only; give one of them, or leave it out.")


def check_products(name: str, linear: QuantisedLinear) -> None:
    """Raise UserError for an int8 weight with a side beyond what quantised products take."""
    largest = load_rules()["quantised_products"]["largest"]
    if max(linear.shape) > largest:
        raise UserError(
            f"{name} is {linear.shape[0]} x {linear.shape[1]} and quantised products end at {largest}; export it with "
            "quantisation none."
        )


def list_warnings(spec: ModelSpec, chip: Chip, quantisation: str, devices: int) -> Iterator[str]:
    """Yield what may keep a server from opening the folder, or from running it well."""
    kind, layer = str(spec.config.get("model_type")), spec.shape.layers[0]
    for name, server in load_servers()["servers"].items():
        if quantisation not in server["formats"]:
            yield f"{name} does not read {quantisation}."
            continue
        if kind in server["tries"][chip.family]:
            yield f"{name} does not list models of type {kind} as supported on {chip.family}, but has a class for them."
        elif kind not in server["opens"][chip.family]:
            yield f"{name} names no models of type {kind} for {chip.family}."
        if mistakes_heads(server, spec):
            yield (
                f"{name} takes hidden_size / num_attention_heads for the head size of type {kind}: "
                f"{spec.shape.hidden / layer.query_heads:g}, where this model has {layer.head_dim}; it cannot open it."
            )
        for key in (f"{chip.family}-{quantisation}", f"any-{quantisation}"):
            if key in server["notes"]:
                yield f"{server['notes'][key]}."
    yield from warn_steps(spec, chip, quantisation, devices)


def mistakes_heads(server: Mapping[str, Any], spec: ModelSpec) -> bool:
    """Tell whether a server would compute another head size than the model has (reference/ascend.md, 4.1)."""
    layer, words = spec.shape.layers[0], server["head_dim"]
    kind = str(spec.config.get("model_type"))
    if words == "config" or ("head_dim" in spec.config and any(word in kind for word in words)):
        return False
    return layer.head_dim != spec.shape.hidden // layer.query_heads


def warn_steps(spec: ModelSpec, chip: Chip, quantisation: str, devices: int) -> Iterator[str]:
    """Yield sizes off the cube's steps, which are padded on the device (reference/ascend.md, 5), and 310P's pages."""
    layer = spec.shape.layers[0]
    deep, _ = load_rules()["tiles"]["float" if quantisation == NONE else "int8"]
    sizes = {"hidden width": spec.shape.hidden, "FFN width": layer.ffn // devices, "heads": layer.query // devices}
    for name, size in sizes.items():
        if size % deep:
            yield f"The {name} of {size} (on each device) is no multiple of {deep}: the device pads it."
    servers = load_rules()["servers"]
    if chip.family == FAMILY_310P and layer.head_dim * servers["page"] > servers["block"]:
        yield f"vllm-ascend on 310P takes pages of {servers['block'] // layer.head_dim} tokens at this head size."


@dataclass(frozen=True)
class Start:
    """A server and the command that starts it on a folder."""

    server: str
    command: str


def list_starts(spec: ModelSpec, chip: Chip, request: tuple[str, str, int], folder: str) -> list[Start]:
    """Return how each server that can open the folder is started; `request` is quantisation, dtype and devices.

    Commands follow the servers' documentation (reference/ascend.md, 4.1 and 4.3).
    """
    quantisation, dtype, devices = request
    length = min(spec.max_positions, 16384) if chip.family == FAMILY_310P else spec.max_positions
    flag = " --quantization ascend" if quantisation in LAYOUTS and LAYOUTS[quantisation].files == ASCEND else ""
    vllm = f"vllm serve {folder} --dtype {dtype} --tensor-parallel-size {devices} --max-model-len {length}{flag}"
    starts = [Start("vllm-ascend", vllm)]
    mindie = load_servers()["servers"]["MindIE"]
    if quantisation in mindie["formats"] and not mistakes_heads(mindie, spec):
        run = f"torchrun --nproc_per_node {devices} --master_port 12350 -m examples.run_pa --model_path {folder}"
        starts.append(Start("MindIE", f"cd ${{ATB_SPEED_HOME_PATH}} && {run}"))
    return starts
