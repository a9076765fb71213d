"""What a checkpoint folder holds, found without loading weights, and why some folders are refused."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from compress.errors import UserError

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

SIDE_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
)
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
NEVER_SIDE_SUFFIXES = (*PICKLE_SUFFIXES, ".py", ".safetensors")
HUB_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

QUANTISED_SUFFIXES = (
    ".qweight",
    ".qzeros",
    ".scales",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_packed",
    ".weight_zero_point",
)
NARROW_FLOATS = ("F8", "F6", "F4")
LFS_MAGIC = b"version https://git-lfs"
LENGTH_BYTES = 8  # a safetensors file starts with the length of its JSON header
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself


@dataclass(frozen=True)
class TensorInfo:
    """Where one stored tensor lies: `offset` is the byte of its first value in `file`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    offset: int = 0

    @property
    def count(self) -> int:
        """The number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The stored size in bytes."""
        return self.count * self.dtype.itemsize


def find_folder(source: str | Path) -> Path:
    """Return the local folder of a path or hub id, downloading if needed; UserError where there is none."""
    folder = Path(source).expanduser()
    if folder.is_file():
        raise UserError(f"{folder} is a file; give the folder that holds it and its config.json.")
    if not folder.is_dir():
        if not HUB_ID.fullmatch(str(source)):
            raise UserError(f"There is no folder {folder}; give a checkpoint folder or a hub id such as org/name.")
        folder = download_snapshot(str(source))
    if not (folder / CONFIG_NAME).is_file():
        raise UserError(f"{folder} has no config.json; give a Hugging Face checkpoint folder.")
    return folder


def download_snapshot(hub_id: str) -> Path:
    """Return the folder of a hub snapshot, from the cache when HF_HUB_OFFLINE is set; UserError where it fails."""
    from huggingface_hub import snapshot_download

    try:
        # Only the top folder: subfolders hold other formats of the same weights.
        return Path(snapshot_download(hub_id, allow_patterns=HUB_PATTERNS, ignore_patterns=["*/*", "consolidated*"]))
    except Exception as error:  # the HTTP client behind the hub, and so its exceptions, changes with its version
        raise UserError(f"There is no folder {hub_id}, and {_explain_hub_error(hub_id, error)}.") from error


def _explain_hub_error(hub_id: str, error: Exception) -> str:
    """Put a hub failure into words by the class of the error, since the messages span several lines."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return f"the hub model {hub_id} is gated: accept its terms on huggingface.co and run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return f"the hub has no model {hub_id} that you may read: check the name, or run `hf auth login`"
    if constants.HF_HUB_OFFLINE:
        return f"HF_HUB_OFFLINE is set and {hub_id} is not in the hub's cache: download it first or unset the variable"
    return (
        f"{hub_id} could not be downloaded from the hub ({type(error).__name__}): check the path, "
        "or the network connection and the free disk space"
    )


def list_side_files(folder: Path) -> list[Path]:
    """Return the files of a checkpoint folder that an output folder needs besides config and weights, by name."""
    return [
        file
        for file in sorted(folder.iterdir())
        if any(fnmatch(file.name, pattern) for pattern in SIDE_PATTERNS)
        and file.suffix not in NEVER_SIDE_SUFFIXES
        and file.is_file()
    ]


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON file that holds an object; UserError where it does not."""
    refuse_lfs_pointer(path)
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        place = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{path} is not valid JSON{place}; repair it or download it again.") from error
    if not isinstance(parsed, dict):
        raise UserError(f"{path} does not hold a JSON object; repair it or download it again.")
    return parsed


def read_header(path: Path) -> list[TensorInfo]:
    """List the tensors of one safetensors file from its header; UserError for a truncated or corrupt file."""
    refuse_lfs_pointer(path)
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
        base = LENGTH_BYTES + length
        if base > size or length > MAX_HEADER_BYTES:
            raise UserError(f"{path} is truncated or not a safetensors file; download it again.")
        text = stream.read(length)
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        ends = [entry["data_offsets"][1] for entry in entries.values()]
        missing = max(ends, default=0) - (size - base)
        if missing > 0:
            raise UserError(f"{path} is truncated: its last {missing} bytes are missing; download it again.")
        infos = [_parse_entry(path, name, entry, base) for name, entry in entries.items()]
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise UserError(f"{path} has a corrupt safetensors header; download it again.") from error
    if sum(info.nbytes for info in infos) != size - base:
        raise UserError(f"{path} is corrupt: its size differs from what its header lists; download it again.")
    return infos


def _parse_entry(path: Path, name: str, entry: dict[str, Any], base: int) -> TensorInfo:
    code, (begin, end) = entry["dtype"], entry["data_offsets"]
    if code not in DTYPES:
        if code.startswith(NARROW_FLOATS):
            raise UserError(_describe_quantised(path.parent, code))
        raise UserError(f"Tensor {name} in {path} has the dtype {code}, which is not supported; convert it to float32.")
    info = TensorInfo(name, tuple(entry["shape"]), DTYPES[code], path, base + begin)
    if begin < 0 or min(info.shape, default=0) < 0 or info.nbytes != end - begin:
        raise ValueError(f"{name}: offsets do not fit the shape")
    return info


def list_tensors(folder: Path) -> list[TensorInfo]:
    """List the tensors of a folder by its index, or by the shard headers without one; UserError if damaged."""
    found = _list_indexed(folder) if _has_index(folder) else _list_scanned(folder)
    _refuse_quantised_tensors(folder, found)
    return found


def _has_index(folder: Path) -> bool:
    """Tell whether the index counts: as in transformers, model.safetensors goes before an index of other files."""
    if not (folder / INDEX_NAME).is_file():
        return False
    return not (folder / SINGLE_NAME).is_file() or SINGLE_NAME in _read_weight_map(folder).values()


def _read_weight_map(folder: Path) -> dict[str, str]:
    mapping = read_json(folder / INDEX_NAME).get("weight_map")
    if not isinstance(mapping, dict) or not all(isinstance(file, str) for file in mapping.values()):
        raise UserError(f"{folder / INDEX_NAME} has no valid weight_map; delete it to have the shards scanned instead.")
    return mapping


def _list_indexed(folder: Path) -> list[TensorInfo]:
    mapping = _read_weight_map(folder)
    headers: dict[str, dict[str, TensorInfo]] = {}
    for file in sorted(set(mapping.values())):
        if Path(file).name != file:
            raise UserError(f"The index of {folder} names {file}, which is no file of that folder; download it again.")
        if not (folder / file).is_file():
            raise UserError(f"{folder} lacks the shard {file} that its index names; download it again.")
        headers[file] = {info.name: info for info in read_header(folder / file)}
    for name, file in mapping.items():
        if name not in headers[file]:
            raise UserError(f"Tensor {name} is not in {folder / file}, where the index puts it; download both again.")
    return [headers[file][name] for name, file in mapping.items()]


def _list_scanned(folder: Path) -> list[TensorInfo]:
    single = folder / SINGLE_NAME
    # Mistral publishes the same weights a second time, under other names, as consolidated*.safetensors.
    shards = [f for f in sorted(folder.glob("*.safetensors")) if not f.name.startswith("consolidated")]
    files = [single] if single.is_file() else shards
    if not files:
        raise UserError(_describe_no_weights(folder))
    _refuse_missing_numbers(folder, files)
    found: dict[str, TensorInfo] = {}
    for info in (info for file in files for info in read_header(file)):
        if info.name in found:
            both = f"{found[info.name].file.name} and {info.file.name}"
            raise UserError(f"Tensor {info.name} is in both {both} of {folder}; remove the one that does not belong.")
        found[info.name] = info
    return list(found.values())


def _refuse_missing_numbers(folder: Path, files: list[Path]) -> None:
    """Without an index only the names say how many shards there should be."""
    totals = [int(match[1]) for file in files if (match := re.search(r"-of-(\d+)\.safetensors$", file.name))]
    if totals and len(totals) < max(totals):
        raise UserError(f"{folder} holds only {len(totals)} of {max(totals)} shards; download the others.")


def _describe_no_weights(folder: Path) -> str:
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        return (
            f"{folder} holds only pickled weights ({pickles[0]}), which can run code when opened; convert them first, "
            "for example with transformers' save_pretrained, which writes safetensors."
        )
    return f"{folder} has no *.safetensors weights; download them into it or give another folder."


def refuse_lfs_pointer(path: Path) -> None:
    """Raise UserError where a file is only a Git LFS pointer."""
    with path.open("rb") as stream:
        if stream.read(len(LFS_MAGIC)) == LFS_MAGIC:
            raise UserError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in {path.parent}.")


def refuse_quantised_config(folder: Path, config: dict[str, Any]) -> None:
    """Raise UserError, naming the method, where config.json says that the weights are quantised."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            settings = part.get(key)
            if settings:
                found = settings if isinstance(settings, dict) else {}
                method = found.get("quant_method") or found.get("quant_algo") or found.get("format") or key
                raise UserError(_describe_quantised(folder, str(method)))


def _refuse_quantised_tensors(folder: Path, infos: list[TensorInfo]) -> None:
    for info in infos:
        # Only weights: GPT-2 era checkpoints store their attention masks as uint8.
        narrow = info.dtype in (torch.int8, torch.uint8) and info.name.endswith("weight")
        if narrow or info.name.endswith(QUANTISED_SUFFIXES):
            raise UserError(_describe_quantised(folder, f"{info.name} is {str(info.dtype).removeprefix('torch.')}"))


def _describe_quantised(folder: Path, method: str) -> str:
    return f"{folder} is already quantised ({method}); give the original bf16, fp16 or fp32 checkpoint instead."
