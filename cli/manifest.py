"""Manifests: what a folder says of how it was made. Imported only by running verbs."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from compress.checkpoint_writer import MANIFEST_NAME, write_atomically
from compress.report import make_plain

LIBRARIES = ("torch", "numpy", "onnx", "onnxruntime", "safetensors", "tokenizers")


def list_versions() -> dict[str, str]:
    """Return the versions of the libraries that a result depends on."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def encode_manifest(data: dict[str, Any]) -> str:
    """Return a manifest as text."""
    return json.dumps(make_plain(data), indent=2, allow_nan=False) + "\n"


def extend_manifest(folder: Path, entries: dict[str, Any]) -> dict[str, Any]:
    """Add entries to a folder's manifest, in one rename; return all of it."""
    path = folder / MANIFEST_NAME
    data = {**json.loads(path.read_text(encoding="utf-8")), **entries}
    write_atomically(path, encode_manifest(data).encode())
    return data
