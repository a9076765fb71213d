"""The flags of `lightpress export`, and the targets that each is for (no heavy imports)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from cli.options import ASCEND, WEIGHTS
from compress.errors import UserError

ONNX, UNIFORM, OM, HF = "onnx", "uniform", "ascend-om", "ascend-hf"
TARGETS = (ONNX, UNIFORM, OM, HF)

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")]
Target = Annotated[
    str | None, typer.Option("--target", help=f"One of: {', '.join(TARGETS)}. [default: the profile's, else {ONNX}]")
]
Profile = Annotated[
    str | None,
    typer.Option("--profile", help="Device to write for: a name of `lightpress profiles list`, or a .toml file."),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="onnx: fp32, int8, w8a8 (inputs of products in 8 bits too: prompts run 1.5 times as fast as with int8 "
        "on x86 with VNNI) or int4 (default: the fastest on the --profile, fp32 without one). ascend-om: fp16, or "
        "fp32 to check numbers. ascend-hf: none (the default), w8a8-static, w8a8-dynamic, compressed-tensors-w8a8 or "
        "compressed-tensors-w8a8-static.",
        rich_help_panel=WEIGHTS,
    ),
]
Method = Annotated[
    str,
    typer.Option(
        "--method",
        help="How weights are rounded: gptq (with text), search (no text; not for w8a8) or nearest.",
        rich_help_panel=WEIGHTS,
    ),
]  # fmt: skip
Block = Annotated[
    int | None,
    typer.Option(
        "--block",
        help="onnx, int8 and int4: inputs that share a scale, 32, 64 or 128. [default: 128, less in narrow models]",
        rich_help_panel=WEIGHTS,
    ),
]  # fmt: skip
Symmetric = Annotated[
    bool | None,
    typer.Option(
        "--symmetric/--asymmetric",
        help="onnx, int8 and int4: whether blocks have no zero point of their own. [default: int8 none, int4 one]",
        rich_help_panel=WEIGHTS,
    ),
]
Ends = Annotated[
    str,
    typer.Option(
        "--ends",
        help="onnx: bits of embedding and head beside quantised weights: 8, 4, or auto (8; with int4 and text 4 for "
        "each that loses little by it, as measured on text held out).",
        rich_help_panel=WEIGHTS,
    ),
]
StandardOps = Annotated[
    bool,
    typer.Option(
        "--standard-ops", help="onnx: only operators of the ONNX standard, for other runtimes.", rich_help_panel=WEIGHTS
    ),
]
Text = Annotated[
    Path | None,
    typer.Option("--text", help="Text that quantisation learns from; else sampled.", rich_help_panel=WEIGHTS),
]
Windows = Annotated[int, typer.Option("--windows", min=1, help="Windows of that text.", rich_help_panel=WEIGHTS)]
Smooth = Annotated[
    float,
    typer.Option(
        "--smooth", min=0, max=1, help="ascend-hf: share of the inputs' range that moves into weights; 0: none.",
        rich_help_panel=WEIGHTS,
    ),
]  # fmt: skip
Mixed = Annotated[
    bool,
    typer.Option(
        "--mixed/--pure", help="ascend-hf: whether projections that lose much keep a finer format.",
        rich_help_panel=WEIGHTS,
    ),
]  # fmt: skip
Int8Head = Annotated[
    bool, typer.Option("--int8-head", help="ascend-hf: the head in int8 too.", rich_help_panel=WEIGHTS)
]
SocVersion = Annotated[
    str, typer.Option("--soc-version", help="The chip as atc names it, such as Ascend310P3.", rich_help_panel=ASCEND)
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype", help="ascend-hf: float16 or bfloat16. [default: bfloat16 where the chip has it]",
        rich_help_panel=ASCEND,
    ),
]  # fmt: skip
Devices = Annotated[
    int, typer.Option("--devices", min=1, help="ascend-hf: devices that share the model.", rich_help_panel=ASCEND)
]
Cache = Annotated[
    int | None,
    typer.Option(
        "--cache", min=1, help="ascend-om: tokens that fit into the cache. [default: 1024]", rich_help_panel=ASCEND
    ),
]
Gears = Annotated[
    str,
    typer.Option(
        "--gears", help="ascend-om: new tokens per step, such as 1,8,32,128, the first being 1.", rich_help_panel=ASCEND
    ),
]
Static = Annotated[
    bool, typer.Option("--static", help="ascend-om: a graph for each gear, of fixed shape.", rich_help_panel=ASCEND)
]
Ids = Annotated[
    str, typer.Option("--ids", help="ascend-om: type of token ids, int64 or int32.", rich_help_panel=ASCEND)
]
LogitsOf = Annotated[
    str, typer.Option("--logits", help="ascend-om: of the last new token, or of all.", rich_help_panel=ASCEND)
]
Precision = Annotated[
    str, typer.Option("--precision", help="ascend-om: atc's --precision_mode_v2.", rich_help_panel=ASCEND)
]
ExternalWeight = Annotated[
    int | None, typer.Option("--external-weight", help="ascend-om: atc's --external_weight.", rich_help_panel=ASCEND)
]
HostCpu = Annotated[
    str | None,
    typer.Option("--host-cpu", help="ascend-om: CPU beside the chip, such as aarch64.", rich_help_panel=ASCEND),
]
Jobs = Annotated[
    int, typer.Option("--jobs", min=1, help="ascend-om: processes that atc compiles with.", rich_help_panel=ASCEND)
]

LEARN = {"format", "text", "windows", "method"}
# Parameters of the verb that say something to a target; the others are for all of them.
USED_BY: Mapping[str, frozenset[str]] = {
    ONNX: frozenset({*LEARN, "block", "symmetric", "ends", "standard"}),
    UNIFORM: frozenset(),
    OM: frozenset({
        "format", "soc_version", "cache", "gears", "static", "ids", "logits", "precision", "external_weight",
        "host_cpu", "jobs",
    }),
    HF: frozenset({*LEARN, "soc_version", "dtype", "devices", "smooth", "mixed", "int8_head"}),
}  # fmt: skip


def refuse_idle(context: typer.Context, target: str) -> None:
    """Raise UserError for a flag that was given and that means nothing to the target."""
    known = frozenset[str]().union(*USED_BY.values())
    for item in context.command.params:
        name = item.name or ""
        given = context.get_parameter_source(name)
        if name not in known - USED_BY[target] or given is None or given.name == "DEFAULT":
            continue
        fitting = " or ".join(own for own in TARGETS if name in USED_BY[own])
        raise UserError(f"{item.opts[0]} is for --target {fitting}, not {target}; leave it out, or change the target.")
