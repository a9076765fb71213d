"""A Hugging Face folder for vllm-ascend and MindIE: element types, uniform layers, heads, and W8A8 in both forms."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.ascend_build import CONFIG, read_json
from backends.ascend_check_quant import (
    Description,
    check_compressed,
    check_description,
    check_unquantised,
    find_description,
)
from backends.ascend_rules import ERROR, WARNING, Chip, Finding, load_rules, load_servers, show_names
from compress.errors import UserError

HALF, BRAIN = "float16", "bfloat16"
LAYER = re.compile(r"\.(\d+)\.")
WEIGHTS = "*.safetensors"
STEP, MATRIX_RANK = 16, 2


@dataclass(frozen=True)
class Stored:
    """A tensor's type as safetensors calls it (F16, I8), its shape, and the name of its file."""

    kind: str
    shape: tuple[int, ...]
    file: str


@dataclass(frozen=True)
class Served:
    """A folder as a server sees it: config.json, tensors by name, the chip if known, and how many share the model."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    chip: Chip | None
    devices: int

    @property
    def dtype(self) -> str:
        """The type that config.json names, empty for none."""
        return str(self.config.get("torch_dtype", self.config.get("dtype", "")) or "").removeprefix("torch.")

    def number(self, name: str, default: int = 0) -> int:
        """Return an integer of config.json."""
        value = self.config.get(name)
        return value if isinstance(value, int) and not isinstance(value, bool) else default

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.number("num_attention_heads")

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.number("num_key_value_heads", self.heads)

    @property
    def head_dim(self) -> int:
        """Size of a head, 0 when config.json does not give it."""
        return self.number("head_dim") or (self.number("hidden_size") // self.heads if self.heads else 0)


def check_checkpoint(
    folder: Path, config: Mapping[str, Any], chip: Chip | None, devices: int, checked: list[str]
) -> Iterator[Finding]:
    """Yield all findings about a Hugging Face folder, and add what was looked at to `checked`."""
    if chip is not None and not chip.servers:
        text = f"No server reads Hugging Face folders on {chip.soc}; export with --target ascend-om."
        yield Finding("server", ERROR, CONFIG, "", text)
    served = Served(folder, config, read_tensors(folder), chip, devices)
    checked.append(f"{CONFIG} and {len(served.tensors)} tensors")
    yield from check_index(served)
    yield from check_dtype(served)
    yield from check_uniform(served)
    yield from check_sizes(served)
    yield from check_heads(served)
    yield from check_split(served)
    description = find_description(folder)
    if description is not None:
        checked.append(f"{description.file}: {len(description.types)} tensors")
    yield from check_quantisation(served, description)


def read_tensors(folder: Path) -> dict[str, Stored]:
    """Return the tensors in a folder's safetensors files from their headers; UserError for a broken or missing file."""
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob(WEIGHTS))
    if not files:
        raise UserError(f"{folder} holds no .safetensors file; export the folder again.")
    tensors: dict[str, Stored] = {}
    for path in files:
        try:
            with safe_open(str(path), "numpy") as stream:
                for name in stream.keys():
                    part = stream.get_slice(name)
                    tensors[name] = Stored(part.get_dtype(), tuple(part.get_shape()), path.name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: is not a whole safetensors file ({error}); export it again.") from error
    return tensors


def check_index(served: Served) -> Iterator[Finding]:
    """Yield tensors that an index names and no file holds, or the other way round, and shards without an index."""
    indexes = sorted(served.folder.glob(f"{WEIGHTS}.index.json"))
    files = {stored.file for stored in served.tensors.values()}
    if len(files) > 1 and not indexes:
        text = f"There are {len(files)} safetensors files and no index; write *.safetensors.index.json."
        yield Finding("index", ERROR, min(files), "", text)
    mapped: dict[str, str] = {}
    for path in indexes:
        data = read_json(path)
        entries = data.get("weight_map") if isinstance(data, dict) else None
        if not isinstance(entries, dict):
            yield Finding("index", ERROR, path.name, "", f"{path.name} has no weight_map; write the index again.")
            return
        mapped.update(entries)
        places = {name: stored.file for name, stored in served.tensors.items()}
        wrong = [name for name, file in entries.items() if places.get(name) != file]
        if wrong:
            text = f"The index places {show_names(wrong)} where they are not; write the index again."
            yield Finding("index", ERROR, path.name, wrong[0], text)
    missing = [name for name in served.tensors if name not in mapped]
    if indexes and missing:
        text = f"The index leaves out {show_names(missing)}; write the index again."
        yield Finding("index", ERROR, indexes[0].name, missing[0], text)


def check_dtype(served: Served) -> Iterator[Finding]:
    """Yield an element type that the chip does not have, or that config.json does not name (ascend.md 4.1)."""
    if "torch_dtype" not in served.config:
        other = " (only dtype is there)" if "dtype" in served.config else ""
        text = f"config.json has no torch_dtype, which MindIE reads{other}; add it."
        yield Finding("torch-dtype", WARNING, CONFIG, "torch_dtype", text)
    if served.chip is None or served.chip.bf16:
        return
    soc = served.chip.soc
    if served.dtype == BRAIN:
        yield Finding("bf16", ERROR, CONFIG, "torch_dtype", f"{soc} has no bfloat16; export the folder in float16.")
    elif served.dtype and served.dtype != HALF:
        text = f"torch_dtype is {served.dtype}, and the servers on {soc} run float16; export the folder in float16."
        yield Finding("torch-dtype", WARNING, CONFIG, "torch_dtype", text)
    brain = [name for name, stored in served.tensors.items() if stored.kind == "BF16"]
    if brain:
        text = f"{show_names(brain)} are stored as bfloat16, which {soc} does not have; store float16."
        yield Finding("bf16", ERROR, served.tensors[brain[0]].file, brain[0], text)


def check_uniform(served: Served) -> Iterator[Finding]:
    """Yield layers of different sizes, which no stock class of a server opens (ascend.md 4.2)."""
    advice = "write a uniform copy with `lightpress export --target uniform`, or compress with --shapes uniform"
    if served.config.get("per_layer_config"):
        text = f"config.json has a per_layer_config, and servers take one size for all layers; {advice}."
        yield Finding("uniform", ERROR, CONFIG, "per_layer_config", text)
    shapes: dict[str, dict[tuple[int, ...], str]] = {}
    for name, stored in served.tensors.items():
        if LAYER.search(name):
            shapes.setdefault(LAYER.sub(".N.", name, count=1), {}).setdefault(stored.shape, name)
    for pattern, found in shapes.items():
        if len(found) > 1:
            names = list(found.values())
            text = f"{names[0]} and {names[1]} have different shapes, {list(found)[0]} and {list(found)[1]}; {advice}."
            yield Finding("uniform", ERROR, served.tensors[names[1]].file, pattern, text)
            return


def check_sizes(served: Served) -> Iterator[Finding]:
    """Yield sizes of config.json that the stored tensors do not have."""
    layers = {int(found.group(1)) for found in map(LAYER.search, served.tensors) if found}
    wanted = served.number("num_hidden_layers")
    if layers and wanted and wanted != max(layers) + 1:
        text = f"num_hidden_layers is {wanted}, and the files hold {max(layers) + 1} layers; export the folder again."
        yield Finding("sizes", ERROR, CONFIG, "num_hidden_layers", text)
    width = served.number("intermediate_size")
    for name, stored in served.tensors.items():
        if name.endswith("down_proj.weight") and len(stored.shape) == MATRIX_RANK and 0 < width != stored.shape[1]:
            text = f"intermediate_size is {width}, and {name} reads {stored.shape[1]}; export the folder again."
            yield Finding("sizes", ERROR, CONFIG, "intermediate_size", text)
            return


def check_heads(served: Served) -> Iterator[Finding]:
    """Yield head sizes that kernels or MindIE do not take (ascend.md 4.1, 4.5, 5)."""
    heads, kv_heads, size = served.heads, served.kv_heads, served.head_dim
    rules = load_rules()["fused_attention"]
    if not (heads and kv_heads and size):
        text = "config.json lacks num_attention_heads or hidden_size; export the folder again."
        yield Finding("config", ERROR, CONFIG, "", text)
        return
    for wrong, text in (
        (size > rules["head_dim"], f"head_dim {size} is above {rules['head_dim']}, where fused attention ends"),
        (size % rules["head_multiple"], f"head_dim {size} is no multiple of {rules['head_multiple']}"),
        (heads % kv_heads, f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"),
        (heads > rules["ratio"] * kv_heads, f"{heads} query heads on {kv_heads} key/value heads is more than 64 to 1"),
    ):
        if wrong:
            yield Finding("head-dim", ERROR, CONFIG, "head_dim", f"{text}; prune or pad the heads to other sizes.")
    yield from check_mindie_heads(served)
    if served.chip is not None and served.chip.family == "310P":
        yield from check_pages(served)


def check_mindie_heads(served: Served) -> Iterator[Finding]:
    """Yield a head_dim that MindIE would not read: it divides hidden_size by the heads for most types (4.1)."""
    kind, hidden = str(served.config.get("model_type", "")), served.number("hidden_size")
    reads_it = any(name in kind for name in load_servers()["servers"]["MindIE"]["head_dim"])
    if reads_it or hidden == served.heads * served.head_dim:
        return
    alone = served.chip is not None and served.chip.family == "310P"
    text = (
        f"MindIE takes hidden_size / num_attention_heads = {hidden / served.heads:g} as the head size of the type "
        f"{kind or '?'}, and it is {served.head_dim}; serve it with vllm-ascend, or keep hidden_size their product."
    )
    yield Finding("mindie-head-dim", ERROR if alone else WARNING, CONFIG, "head_dim", text)


def check_pages(served: Served) -> Iterator[Finding]:
    """Yield what the key/value cache of vllm-ascend on 310P does not take (ascend.md 4.5)."""
    rules = load_rules()["servers"]
    if served.kv_heads * served.head_dim % STEP:
        width = served.kv_heads * served.head_dim
        text = f"num_key_value_heads * head_dim is {width}, no multiple of {STEP}; pad the heads."
        yield Finding("head-dim", ERROR, CONFIG, "num_key_value_heads", text)
    if served.head_dim * rules["page"] > rules["block"]:
        page = rules["block"] // served.head_dim
        text = f"head_dim {served.head_dim} leaves {page} tokens to a page; give --block-size."
        yield Finding("pages", WARNING, CONFIG, "head_dim", text)


def check_split(served: Served) -> Iterator[Finding]:
    """Yield sizes that the degree of tensor parallelism does not divide, or leaves off the cube's steps (4.1, 5)."""
    count = served.devices
    sizes = {"num_key_value_heads": served.kv_heads, "num_attention_heads": served.heads}
    sizes["intermediate_size"] = served.number("intermediate_size")
    for name, size in sizes.items():
        if size % count:
            text = f"{name} {size} is not divided by {count} devices; choose another degree of tensor parallelism."
            yield Finding("tensor-parallel", ERROR, CONFIG, name, text)
    parts = {"intermediate_size": sizes["intermediate_size"] // count, "hidden_size": served.number("hidden_size")}
    for name, size in parts.items():
        if size % STEP:
            text = f"{name} is {size} on each device, no multiple of {STEP}: padding is computed; choose one that is."
            yield Finding("steps", WARNING, CONFIG, name, text)


def check_quantisation(served: Served, description: Description | None) -> Iterator[Finding]:
    """Yield what is wrong with the quantised form, whichever it is (ascend.md 4.3)."""
    method = served.config.get("quantization_config")
    shapes = {name: (stored.kind, stored.shape) for name, stored in served.tensors.items()}
    if description is not None:
        if method:
            text = f"{description.file} stands beside quantization_config in config.json; delete the latter."
            yield Finding("quantisation", ERROR, CONFIG, "quantization_config", text)
        yield from check_description(description, shapes, served.chip, served.dtype)
        yield from check_scales(served, description)
    elif isinstance(method, dict):
        yield from check_compressed(method, shapes, served.chip)
    else:
        yield from check_unquantised(shapes)
    yield from check_int8_steps(served)
    yield from check_cache_type(served, description)


def check_int8_steps(served: Served) -> Iterator[Finding]:
    """Yield int8 weights `[out, in]` off the cube's steps (ascend.md 5), or with a side above 65535 (4.5)."""
    largest, (deep, wide) = load_rules()["quantised_products"]["largest"], load_rules()["tiles"]["int8"]
    small = {name: stored for name, stored in served.tensors.items() if stored.kind == "I8"}
    weights = {name: stored for name, stored in small.items() if len(stored.shape) == MATRIX_RANK}
    for name, stored in weights.items():
        if max(stored.shape) > largest:
            side = max(stored.shape)
            text = f"{name} is int8 with a side of {side}, and int8 products end at {largest}; keep it in float."
            yield Finding("quantised-size", ERROR, stored.file, name, text)
    odd = [name for name, stored in weights.items() if stored.shape[0] % wide or stored.shape[1] % deep]
    if odd:
        text = f"{show_names(odd)} are int8 off the steps of {deep} inputs and {wide} outputs; widen them."
        yield Finding("steps", WARNING, weights[odd[0]].file, odd[0], text)


def check_cache_type(served: Served, description: Description | None) -> Iterator[Finding]:
    """Yield heads off the step of 32 under an int8 key/value cache (ascend.md 4.5, 5)."""
    meta: Mapping[str, Any] = description.meta if description is not None else {}
    step = load_rules()["fused_attention"]["int8_head_multiple"]
    if "C8" in (meta.get("kv_cache_type"), meta.get("kv_quant_type")) and served.head_dim % step:
        text = f"The cache is int8, and head_dim {served.head_dim} is no multiple of {step}; keep the cache in float."
        yield Finding("head-dim", ERROR, CONFIG, "head_dim", text)


def check_scales(served: Served, description: Description) -> Iterator[Finding]:
    """Yield int64 deq_scale values that are not the bit pattern of a positive float32 (ascend.md 4.3)."""
    import numpy

    for name, values in read_scales(served, description):
        bits = values.astype(numpy.uint64)
        scales = (bits & 0xFFFFFFFF).astype(numpy.uint32).view(numpy.float32)
        if (bits >> numpy.uint64(32)).any() or not numpy.isfinite(scales).all() or (scales <= 0).any():
            text = f"{name} is int64, and not the bit pattern of positive float32 scales; write the scales again."
            yield Finding("deq-scale", ERROR, served.tensors[name].file, name, text)
            return


def read_scales(served: Served, description: Description) -> Iterator[tuple[str, Any]]:
    """Yield the int64 deq_scale tensors that the description names."""
    from safetensors import safe_open

    wanted: dict[str, list[str]] = {}
    for name in description.types:
        stored = served.tensors.get(name)
        if name.endswith(".deq_scale") and stored is not None and stored.kind == "I64":
            wanted.setdefault(stored.file, []).append(name)
    for file, names in wanted.items():
        with safe_open(str(served.folder / file), "numpy") as stream:
            for name in names:
                yield name, stream.get_tensor(name)
