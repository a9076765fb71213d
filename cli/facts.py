"""What `inspect` says about a checkpoint. Imported only by running verbs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cli.console import format_bytes, format_count
from compress.checkpoint import Checkpoint
from compress.family import explain_not_stock
from compress.plan import describe_counts
from compress.spec import LayerSpec, ModelSpec
from compress.weights import read_spec


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the facts about a checkpoint as plain data; raises UserError when it does not fit its config."""
    spec = read_spec(checkpoint)
    infos = list(checkpoint.tensors.values())
    return {
        "folder": str(checkpoint.folder),
        "family": spec.family.name,
        **describe_shape(spec),
        "dtypes": sorted({str(info.dtype).removeprefix("torch.") for info in infos}),
        "bytes": checkpoint.nbytes,
        "files": sorted({info.file.name for info in infos}),
        "tensors": len(infos),
        "tokenizer": (checkpoint.folder / "tokenizer.json").is_file(),
        "stock_class": not explain_not_stock(spec.config),
    }


def describe_shape(spec: ModelSpec) -> dict[str, Any]:
    """Return sizes and conventions."""
    shape, layers = spec.shape, spec.layers
    return {
        "layers": len(layers),
        "hidden": shape.hidden,
        "vocab": shape.vocab,
        "query_heads": [layer.shape.query_heads for layer in layers],
        "kv_groups": [layer.shape.kv_heads for layer in layers],
        "head_dim": layers[0].shape.head_dim,
        "ffn": [layer.shape.ffn for layer in layers],
        "norms": list(layers[0].shape.norms),
        "biases": list(layers[0].shape.biases),
        "parameters": shape.parameters,
        "layer_parameters": shape.layer_parameters,
        "tied": shape.tied,
        "context": spec.max_positions,
        "rotary": list_rotary(layers),
        "windows": [layer.window for layer in layers],
    }


def list_rotary(layers: Sequence[LayerSpec]) -> list[str]:
    """Return the rotary variants in use, and 'none' where a layer does not rotate."""
    return sorted({layer.rope.variant if layer.rope else "none" for layer in layers})


def render_facts(facts: dict[str, Any]) -> str:
    """Return the facts as a table of two columns."""
    rows = [(name, value) for name, value in list_rows(facts) if value]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}   {value}" for name, value in rows)


def list_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Return each line of the table; an empty value is left out."""
    counts = {key: describe_counts(facts[key]) for key in ("query_heads", "kv_groups", "ffn")}
    heads = f"{counts['query_heads']} query heads, {counts['kv_groups']} KV groups, head size {facts['head_dim']}"
    stock = "" if facts["stock_class"] else " (transformers has no class for it)"
    parameters = f"{format_count(facts['parameters'])} ({format_count(facts['layer_parameters'])} without embeddings)"
    return [
        ("folder", facts["folder"]),
        ("family", facts["family"] + stock),
        ("layers", str(facts["layers"])),
        ("hidden width", str(facts["hidden"])),
        ("attention", heads),
        ("FFN channels", counts["ffn"]),
        ("norms per layer", ", ".join(facts["norms"])),
        ("biases", ", ".join(facts["biases"])),
        ("vocabulary", f"{facts['vocab']} tokens, {'tied' if facts['tied'] else 'untied'} head"),
        ("context", f"{facts['context']} tokens"),
        ("rotary", ", ".join(facts["rotary"])),
        ("sliding windows", describe_windows(facts["windows"])),
        ("parameters", parameters),
        ("weights", f"{format_bytes(facts['bytes'])} of {', '.join(facts['dtypes'])} in {describe_files(facts)}"),
        ("tokenizer", "tokenizer.json" if facts["tokenizer"] else "none (text cannot be read)"),
        ("values", "all finite" if facts.get("finite") else ""),
    ]


def describe_windows(windows: Sequence[int | None]) -> str:
    """Return how many layers look through a window of what size."""
    sizes = sorted({window for window in windows if window})
    return ", ".join(f"{list(windows).count(size)} of {len(windows)} layers see {size} tokens" for size in sizes)


def describe_files(facts: dict[str, Any]) -> str:
    """Return the one weight file, or how many there are."""
    files = facts["files"]
    return str(files[0]) if len(files) == 1 else f"{len(files)} files"
