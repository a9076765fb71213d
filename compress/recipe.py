"""What a run is asked to do: the one place for defaults (no heavy imports: the command line reads it too)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from compress.errors import UserError

AXES = ("ffn", "kv", "hidden", "layers")


@dataclass(frozen=True)
class Recipe:
    """Options of `plan` and `compress`; flags and recipe files fill it, and nothing else holds a default."""

    keep: float = 0.7
    """Fraction of non-embedding parameters to keep, 0 < keep <= 1."""
    axes: tuple[str, ...] = AXES
    """What may be pruned: ffn channels, kv groups, hidden width, layers."""
    multiple: int = 0
    """Kept channels are a multiple of this; 0 means 16, or the power of two below it that the dense size has."""
    score: str = "obs"
    """How units are ranked: `activation` (rms activation x weight norm) or `obs` (greedy optimal brain surgeon)."""
    repair: str = "lstsq"
    """Repair of o and down: `lstsq` (least squares with the residual-corrected target) or `none`."""
    windows: int = 128
    """Calibration windows."""
    length: int = 256
    """Tokens in a window; shorter when the model's context is."""
    score_tokens: int = 0
    """Tokens of the first pass (scores); 0 is automatic: 1.5 times the FFN width, at least 4096. Repair uses all."""
    field: str = "text"
    """Field of a .jsonl or .parquet file that holds the text."""
    seed: int = 0
    """Seed of everything random (text that the model samples itself)."""
    shard_bytes: int = 2 * 2**30
    """Largest size of one written weight file, in bytes."""
    spill_bytes: int = 2**30
    """Hidden states above this many bytes go to a temporary file."""

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        if not 0 < self.keep <= 1:
            raise UserError(f"--keep {self.keep:g} must be above 0 and at most 1, such as 0.7.")
        unknown = [axis for axis in self.axes if axis not in AXES]
        if unknown or not self.axes:
            raise UserError(f"--axes: '{','.join(unknown)}' is not among {','.join(AXES)}; list one or more of them.")
        if self.repair not in ("lstsq", "none"):
            raise UserError(f"--repair {self.repair} is not one of lstsq, none.")
        for name in ("windows", "length", "shard_bytes"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1.")
        for name in ("multiple", "score_tokens", "spill_bytes"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name.replace('_', '-')} must not be negative.")
        if self.length == 1:
            raise UserError("--length must be at least 2: the last token of a window has no successor.")


def check_value(name: str, value: Any, wanted: type) -> None:
    """Raise UserError when a recipe's value has the wrong type."""
    allowed = {tuple: (list, tuple), float: (int, float)}.get(wanted, (wanted,))
    if isinstance(value, bool) or not isinstance(value, allowed):
        kind = {tuple: "list of names", float: "number", int: "whole number", str: "text"}[wanted]
        raise UserError(f"recipe: '{name}' must be a {kind}, got {value!r}.")


def merge_recipe(file: dict[str, Any], flags: dict[str, Any]) -> Recipe:
    """Return the recipe of a file's keys overridden by given flags (None means not given); unknown keys are refused."""
    known = {item.name for item in fields(Recipe)}
    unknown = sorted(set(file) - known)
    if unknown:
        raise UserError(f"recipe: unknown key '{unknown[0]}'; known keys: {', '.join(sorted(known))}.")
    values = {**file, **{key: value for key, value in flags.items() if value is not None}}
    if isinstance(values.get("axes"), str):
        values["axes"] = [axis.strip() for axis in values["axes"].split(",") if axis.strip()]
    for item in fields(Recipe):
        check_value(item.name, values.get(item.name, item.default), type(item.default))
    if "axes" in values:
        values["axes"] = tuple(values["axes"])
    return Recipe(**values)
