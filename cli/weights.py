"""Number formats of an exported graph: from flags to a quantiser with its calibration text. Imported when running."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from backends.export_onnx import FUSED, STANDARD, GraphForm
from cli.console import Console
from compress.checkpoint import Checkpoint
from compress.errors import UserError
from compress.quantize.stream import METHODS, LayerQuantiser, WeightForm
from compress.recipe import Recipe
from compress.sample import sample_windows
from compress.text import Windows, load_tokenizer, read_windows
from compress.weights import read_spec

BITS = {"fp32": 0, "int8": 8, "int4": 4}


@dataclass(frozen=True)
class FormatFlags:
    """What the command line says of the weights: format, method, block, the text that GPTQ learns from."""

    name: str
    method: str
    block: int
    symmetric: bool
    standard: bool
    text: Path | None
    windows: int

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.name not in BITS:
            raise UserError(f"--format {self.name} is not one of {', '.join(BITS)}.")
        if self.method not in METHODS:
            raise UserError(f"--method {self.method} is not one of {', '.join(METHODS)}.")
        if self.standard and BITS[self.name]:
            raise UserError(
                f"--standard-ops has no operator for {self.name} weights: leave it out, or give --format fp32."
            )
        if self.text is not None and (not BITS[self.name] or self.method != METHODS[0]):
            raise UserError("--text is what GPTQ learns from: give --format int8 or int4 with it, and --method gptq.")


@contextmanager
def open_form(flags: FormatFlags, checkpoint: Checkpoint, console: Console) -> Iterator[GraphForm]:
    """Yield how the graph is to be written; the quantiser's streams go when the block ends."""
    bits = BITS[flags.name]
    if not bits:
        yield STANDARD if flags.standard else FUSED
        return
    spec = read_spec(checkpoint)
    form = WeightForm(bits, flags.block, flags.symmetric, flags.method)
    windows = gather_windows(flags, checkpoint, console) if flags.method == METHODS[0] else None
    with LayerQuantiser(checkpoint, spec, form, windows) as quantiser:
        yield GraphForm(quantiser=quantiser)


def gather_windows(flags: FormatFlags, checkpoint: Checkpoint, console: Console) -> Windows:
    """Read the calibration text, or let the model sample its own."""
    spec = read_spec(checkpoint)
    recipe = Recipe(windows=flags.windows, length=min(Recipe().length, spec.max_positions))
    if flags.text is None:
        console.note("No --text given: the model samples its own calibration text.")
        return sample_windows(checkpoint, spec, recipe, console.progress)
    tokenizer = load_tokenizer(checkpoint.folder)
    return read_windows(flags.text, tokenizer, dict(spec.config), (recipe.windows, recipe.length), recipe.field)
