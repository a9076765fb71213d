"""What a run is asked to do: the one place for defaults (no heavy imports: the command line reads it too)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from compress.errors import UserError

AXES = ("ffn", "kv", "hidden", "layers")
CHOICES = {
    "ratio": ("loss", "equal", "softmax", "zscore", "influence"),
    "shapes": ("uniform", "per-layer"),
    "depth": ("clap", "drop"),
    "norms": ("none", "slnp", "calibrated"),
    "absorb": ("none", "safe", "all"),
    "absorb_constant": ("least-squares", "mean-inverse"),
    "rotate": ("none", "pca"),
    "repair": ("lstsq", "diagonal", "bias", "none"),
    "biases": ("none", "stock", "own"),
    "target": ("corrected", "dense", "own"),
    "inputs": ("auto", "lstsq", "none"),
}
# Least values; -1 stands for automatic.
LEAST = {
    "windows": 1, "length": 1, "shard_bytes": 1, "multiple": 0, "score_tokens": 0, "spill_bytes": 0, "absorb_limit": 0,
    "refine": -1, "trials": -1, "devices": 1,
}
# Only one of these can be met at a time.
BUDGETS = ("keep", "params", "memory", "speedup", "latency")  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """Options of `plan` and `compress`; flags and recipe files fill it, and nothing else holds a default."""

    keep: float = 0.7
    """Fraction of non-embedding parameters to keep, 0 < keep <= 1; the budget where no other is given."""
    params: str = ""
    """Budget: parameters in all, such as `2.6B` or `350M`."""
    memory: str = ""
    """Budget: weights, keys and values on one device at the workload's context and batch, such as `4GiB`."""
    speedup: str = ""
    """Budget: how many times as fast as the dense model the workload is predicted to run, such as `1.5x`."""
    latency: str = ""
    """Budget: predicted time of the workload, such as `25ms`: of one token (decode), or to the first (prefill)."""
    profile: str = ""
    """Device that the result will run on: a profile's name or file; empty: `this-machine`, where it is needed."""
    workload: str = "decode"
    """What is timed: `decode`, `prefill`, `PROMPT+OUTPUT[@BATCH]`, or one phase, `decode:PROMPT+OUTPUT[@BATCH]`."""
    format: str = ""
    """Number format that is timed and sized: `fp16`, `w8a8`, `int4` and so on; empty: the profile's first."""
    devices: int = 1
    """Devices that the model is split over (tensor parallelism)."""
    axes: tuple[str, ...] = AXES
    """What may be pruned: ffn channels, kv groups, hidden width, layers."""
    multiple: int = 0
    """Kept channels are a multiple of this; 0 means 16, or the power of two below it that the dense size has."""
    score: str = "obs"
    """How units are ranked: `obs` (greedy optimal brain surgeon) or another name of `compress.importance.SCORES`."""
    ratio: str = "loss"
    """How the budget is shared among layers: `loss` (the optimiser), `equal`, `softmax` (SlimLLM), `zscore` (FLAP), or
    `influence` (ShortGPT: whole layers go, least block influence first)."""
    shapes: str = "uniform"
    """`uniform`: all layers alike, as stock runtimes want them; `per-layer`: each its own."""
    depth: str = "drop"
    """A dropped layer's attention groups go with it (`drop`), or may live on in the layer before it (`clap`)."""
    norms: str = "calibrated"
    """RMSNorm weights after cuts: `none`, `slnp` (L2 kept), or `calibrated` on the text (the final norm too)."""
    absorb: str = "none"
    """Post-norms folded into the projection before them: `none`, `safe` (where they vary little), or `all`."""
    absorb_limit: float = 0.15
    """Coefficient of variation up to which `safe` absorbs a post-norm."""
    absorb_constant: str = "least-squares"
    """What replaces 1/rms: the `least-squares` constant, or the `mean-inverse` of the paper."""
    rotate: str = "none"
    """Basis of the hidden width: as it is (`none`), or principal components, one rotation for all layers (`pca`)."""
    repair: str = "lstsq"
    """Repair of o and down: `lstsq`, `diagonal` (SlimLLM's regression), `bias` (FLAP's compensation) or `none`."""
    biases: str = "none"
    """Biases on o and down that a repair may fill: `none`, `stock` (where the family's class has a place for them), or
    `own` (everywhere; only Lightpress opens the result)."""
    target: str = "corrected"
    """What the repair aims at: the dense stream (`corrected`), the dense branch (`dense`), or the unpruned branch on
    the pruned stream (`own`)."""
    inputs: str = "auto"
    """Refit of q, k, v, gate and up: `lstsq`, `none`, or `auto` (`lstsq` where hidden channels went)."""
    refine: int = -1
    """Steps of the block-wise joint solve of each layer's weights; -1 is automatic: small models with the default
    repair and target only."""
    trials: int = -1
    """Plans rebuilt and measured before one is chosen; -1 is automatic: small models only."""
    windows: int = 128
    """Calibration windows."""
    length: int = 256
    """Tokens in a window; shorter when the model's context is."""
    score_tokens: int = 0
    """Tokens of the first pass (scores); 0: 1.5 times the FFN width, at least 4096, more on small models."""
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
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{flag(name)} {getattr(self, name)} is not one of {', '.join(allowed)}.")
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise UserError(f"{flag(name)} must {'not be negative' if least == 0 else f'be at least {least}'}.")
        self.check_repair()

    @property
    def budget(self) -> str:
        """The key of the budget to meet."""
        return next((name for name in BUDGETS[1:] if getattr(self, name)), "keep")

    def check_repair(self) -> None:
        """Refuse repairs that have nothing to work on."""
        if self.length == 1:
            raise UserError("--length must be at least 2: the last token of a window has no successor.")
        if self.repair == "bias" and self.biases == "none":
            raise UserError("--repair bias moves biases only: say where they may be with --biases stock or own.")
        if self.target == "own" and "hidden" in self.axes:
            raise UserError(
                "--target own compares with the unpruned branch on the same stream, which hidden pruning changes: "
                "give --axes without hidden, or --target corrected."
            )
        if self.refine > 0 and (self.repair, self.target) != ("lstsq", "corrected"):
            raise UserError("--refine fits layers to the dense stream: it needs --repair lstsq and --target corrected.")
        if self.ratio == "influence" and self.axes != ("layers",):
            raise UserError("--ratio influence drops whole layers only: give --axes layers with it.")
        if self.ratio in ("equal", "softmax", "zscore") and set(self.axes) != {"ffn", "kv"}:
            raise UserError(f"--ratio {self.ratio} shares a budget among KV and FFN alone: give --axes ffn,kv with it.")
        if self.ratio != "loss" and self.budget != "keep":
            raise UserError(f"{flag(self.budget)} needs --ratio loss: --ratio {self.ratio} shares out parameters only.")
        if self.ratio in ("softmax", "zscore") and self.shapes == "uniform":
            raise UserError(f"--ratio {self.ratio} makes uneven layers: add --shapes per-layer, or use --ratio equal.")


def flag(name: str) -> str:
    """Return the flag of a recipe key."""
    return f"--{name.replace('_', '-')}"


def check_value(name: str, value: Any, wanted: type) -> None:
    """Raise UserError when a recipe's value has the wrong type."""
    allowed = {tuple: (list, tuple), float: (int, float)}.get(wanted, (wanted,))
    if isinstance(value, bool) or not isinstance(value, allowed):
        kind = {tuple: "list of names", float: "number", int: "whole number", str: "text"}[wanted]
        raise UserError(f"recipe: '{name}' must be a {kind}, got {value!r}.")


def settle_budget(values: dict[str, Any], file: dict[str, Any], flags: dict[str, Any]) -> None:
    """Leave one budget in `values`: that of the flags, else that of the file; UserError for two, or an empty one."""
    given = [name for name in BUDGETS if flags.get(name) is not None] or [name for name in BUDGETS if name in file]
    if len(given) > 1:
        raise UserError(f"{' and '.join(map(flag, given))} are budgets, and a plan meets one: give one of them.")
    for name in set(BUDGETS) - set(given):
        values.pop(name, None)  # a budget of the flags takes the place of the file's
    for name in given:
        if values[name] == "":
            raise UserError(f"{flag(name)} is empty: give a value, or leave it out.")
    for name in BUDGETS[1:]:
        if isinstance(values.get(name), int | float) and not isinstance(values[name], bool):
            values[name] = str(values[name])  # `speedup: 1.5` in a file


def merge_recipe(file: dict[str, Any], flags: dict[str, Any]) -> Recipe:
    """Return the recipe of a file's keys overridden by given flags (None means not given); unknown keys are refused."""
    known = {item.name for item in fields(Recipe)}
    unknown = sorted(set(file) - known)
    if unknown:
        raise UserError(f"recipe: unknown key '{unknown[0]}'; known keys: {', '.join(sorted(known))}.")
    values = {**file, **{key: value for key, value in flags.items() if value is not None}}
    settle_budget(values, file, flags)
    if isinstance(values.get("axes"), str):
        values["axes"] = [axis.strip() for axis in values["axes"].split(",") if axis.strip()]
    for item in fields(Recipe):
        check_value(item.name, values.get(item.name, item.default), type(item.default))
    if "axes" in values:
        values["axes"] = tuple(values["axes"])
    return Recipe(**values)
