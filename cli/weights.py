"""Number formats of an exported graph: from flags to a quantiser with its calibration text. Imported when running."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from backends.export_onnx import FUSED, STANDARD, GraphForm
from cli.budget import FORMATS
from cli.console import Console
from cli.prepare import gather_calibration
from compress.checkpoint import Checkpoint
from compress.errors import UserError
from compress.quantize.ends import ENDS, EndChoice
from compress.quantize.onnx_w8a8 import BLOCKS as IN_BLOCKS
from compress.quantize.onnx_w8a8 import METHODS as STEP_METHODS
from compress.quantize.onnx_w8a8 import StepForm, StepQuantiser
from compress.quantize.stream import METHODS, LayerQuantiser, WeightForm
from compress.shapes import ModelShape
from compress.text import Windows
from compress.weights import read_spec
from profiles.cost import DECODE, Workload, estimate_cost
from profiles.loader import load_profile
from profiles.profile import Profile

BLOCKS = (32, 64, 128)
# Fewer scales are fewer bytes: blocks of 128 decode 1.3 times as fast as blocks of 32, and with GPTQ they are still
# better than blocks of 32 rounded to the nearest (benchmarks/RESULTS.md). A narrow model would be mostly padding.
MOST_PADDING = 1.05
PROMPT, OUTPUT = 128, 128  # tokens of the request whose decode steps are predicted
W8A8 = "w8a8"  # inputs of products have 8 bits too
READ_AS = {W8A8: "w8a8-dynamic"}  # the profiles' name for it
BITS = {"fp32": 0, "int8": 8, W8A8: 8, "int4": 4}


@dataclass(frozen=True)
class FormatFlags:
    """What the command line says of the weights: format, method, block, ends, and the text that GPTQ learns from."""

    name: str
    method: str
    block: int | None
    symmetric: bool | None
    standard: bool
    text: Path | None
    windows: int
    ends: str = ENDS[0]

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.name not in BITS:
            raise UserError(f"--format {self.name} is not one of {', '.join(BITS)}.")
        if self.method not in METHODS:
            raise UserError(f"--method {self.method} is not one of {', '.join(METHODS)}.")
        if self.block not in (None, *BLOCKS):
            raise UserError(f"--block {self.block} is not one of {', '.join(map(str, BLOCKS))}.")
        if self.name == W8A8:
            self.refuse_blocks()
        if self.ends not in ENDS:
            raise UserError(f"--ends {self.ends} is not one of {', '.join(ENDS)}.")
        if self.ends != ENDS[0] and not BITS[self.name]:
            raise UserError(f"--ends {self.ends} is for quantised weights: give --format int8, w8a8 or int4 with it.")
        if not BITS[self.name]:
            self.refuse_rounding()
        if self.standard and BITS[self.name]:
            raise UserError(
                f"--standard-ops has no operator for {self.name} weights: leave it out, or give --format fp32."
            )
        if self.text is not None and (not BITS[self.name] or self.method != METHODS[0]):
            raise UserError(
                "--text is what GPTQ learns from: give --format int8, w8a8 or int4 with it, and --method gptq."
            )

    def refuse_rounding(self) -> None:
        """Refuse what is said of rounding where nothing is rounded."""
        named = ["--block"] if self.block is not None else []
        named += ["--symmetric/--asymmetric"] if self.symmetric is not None else []
        named += ["--method"] if self.method != METHODS[0] else []
        if named:
            raise UserError(
                f"{' and '.join(named)} would do nothing with --format {self.name}: give --format int8, w8a8 or int4."
            )

    def refuse_blocks(self) -> None:
        """Refuse what is said of blocks where each output has one scale."""
        named = ["--block"] if self.block is not None else []
        named += ["--symmetric/--asymmetric"] if self.symmetric is not None else []
        if named:
            raise UserError(
                f"{' and '.join(named)} is for weights in blocks, and --format {W8A8} has one scale for each output: "
                "leave it out, or give --format int8 or int4."
            )
        if self.method not in STEP_METHODS:
            raise UserError(
                f"--method {self.method} looks for the scales of blocks, which --format {W8A8} has none of: give "
                f"{' or '.join(STEP_METHODS)}."
            )


@contextmanager
def open_form(
    flags: FormatFlags, checkpoint: Checkpoint, console: Console, windows: Windows | None = None
) -> Iterator[GraphForm]:
    """Yield how the graph is to be written; the quantiser's streams go when the block ends.

    `windows`: text for GPTQ that is at hand already; else what the flags name is read.
    """
    if not BITS[flags.name]:
        yield STANDARD if flags.standard else FUSED
        return
    if flags.method != METHODS[0]:
        windows = None
    elif windows is None:
        windows = gather_calibration(flags.text, flags.windows, checkpoint, console)
    with open_quantiser(flags, checkpoint, windows) as quantiser:
        yield GraphForm(quantiser=quantiser)
        if isinstance(quantiser, StepQuantiser):
            console.note(describe_inputs(quantiser))
        if quantiser.choice is not None:
            console.note(describe_ends(quantiser.choice))


def open_quantiser(
    flags: FormatFlags, checkpoint: Checkpoint, windows: Windows | None
) -> LayerQuantiser | StepQuantiser:
    """Return what quantises a checkpoint; use it in a `with` block."""
    spec = read_spec(checkpoint)
    if flags.name == W8A8:
        form = StepForm(flags.method, choose_block(spec.shape), flags.ends)
        return StepQuantiser(checkpoint, spec, form, windows)
    return LayerQuantiser(checkpoint, spec, make_weight_form(BITS[flags.name], flags, spec.shape), windows)


def make_weight_form(bits: int, flags: FormatFlags, shape: ModelShape) -> WeightForm:
    """Return how weights are stored; 8 bits are next to exact without zero points, 4 bits want them."""
    symmetric = bits > 4 if flags.symmetric is None else flags.symmetric  # noqa: PLR2004
    return WeightForm(bits, flags.block or choose_block(shape), symmetric, flags.method, flags.ends)


def choose_block(shape: ModelShape) -> int:
    """Return the largest block that rows can be filled up to without much padding."""
    for block in sorted(BLOCKS, reverse=True):
        if count_padded(shape, block) <= MOST_PADDING * count_padded(shape, 1):
            return block
    return min(BLOCKS)


def count_padded(shape: ModelShape, block: int) -> int:
    """Return the weights of all layers' products with their rows filled up to whole blocks."""

    def fill(inputs: int) -> int:
        return -(-inputs // block) * block

    return sum(
        fill(shape.hidden) * (one.query + 2 * one.kv + 2 * one.ffn) + shape.hidden * (fill(one.query) + fill(one.ffn))
        for one in shape.layers
    )


def describe_inputs(quantiser: StepQuantiser) -> str:
    """Return a sentence on which products have 8-bit inputs."""
    groups = quantiser.report.groups
    if not groups:
        return "All layers' products have 8-bit inputs; without text nobody measured what that costs."
    lost = [group for group in groups if group.kind == IN_BLOCKS]
    names = sorted({", ".join(group.roles) for group in lost})
    kept = f"; {len(lost)} ({'; '.join(names)}) would lose more than {quantiser.form.limit:.1%} and have 8-bit blocks"
    return f"{len(groups) - len(lost)} of {len(groups)} groups of products have 8-bit inputs{kept if lost else ''}."


def describe_ends(choice: EndChoice) -> str:
    """Return a sentence on the bits of embedding and head."""
    said = f"Embedding in {choice.embedding} bits, head in {choice.head}"
    found = choice.measured
    if found is None:
        return f"{said}."
    return (
        f"{said}: 4 bits would move predictions by {found.embedding:.2g} and {found.head:.2g} nats per token, the "
        f"layers' own rounding by {found.layers:.2g} (Kullback-Leibler, on text held out); --ends overrides."
    )


# Formats by profile


def choose_format(name: str, shape: ModelShape, standard: bool, console: Console) -> str:
    """Return the format that the profile of this name decodes fastest with, by the cost model, and say why."""
    profile = load_profile(name)
    formats = [own for own in list_formats(profile) if not (standard and BITS[own])]
    if not formats:
        raise UserError(
            f"--profile {profile.name}: {profile.runtime.name} there reads none of the graphs that export writes for "
            f"ONNX Runtime ({', '.join(BITS)}); name a CPU profile (see `lightpress profiles list`), or give --format."
        )
    speeds = {own: predict_speed(own, shape, profile) for own in formats}
    best = max(formats, key=lambda own: speeds[own])
    told = ", ".join(f"{own} {speed:.3g}" for own, speed in speeds.items())
    console.note(f"Format {best}, the fastest on {profile.name}: predicted tokens/s in decode are {told}.")
    return best


def list_formats(profile: Profile) -> list[str]:
    """Return the formats of ours that a profile's runtime reads, the more exact first."""
    if profile.runtime.export != "onnx":
        return []
    formats = profile.formats
    read = (*formats.quantisations, "fp32")
    return [name for name in BITS if FORMATS[name][0] in formats.weights and READ_AS.get(name, name) in read]


def predict_speed(name: str, shape: ModelShape, profile: Profile) -> float:
    """Return the predicted tokens per second of decoding one sequence; quantised models have their head in 8 bits."""
    formats, (weights, inputs) = profile.formats, FORMATS[name]
    activations = inputs if name == W8A8 and inputs else formats.activations[0]
    work = Workload(
        DECODE, PROMPT, OUTPUT, weights=weights, activations=activations, kv=formats.kv[0],
        head="int8" if BITS[name] else "",
    )  # fmt: skip
    return estimate_cost(shape, profile, work).tokens_per_s
