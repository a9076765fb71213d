"""What lies beside the graphs of an Ascend OM: atc's command as a script and as JSON, the contract, and the README."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from backends.om_graph import FRESH, IDS, LOGITS, MASK, PAST, POSITIONS, ROPE_IDS, count_rows, needs_rope_ids
from compress.spec import ModelSpec

BUILD, CONTRACT, SCRIPT, RUNNER, README = "build.json", "io.json", "build_om.sh", "run_om.py", "README.md"
KEPT, MIXED_LIST = "keep_dtype.cfg", "mixlist.json"
FORMAT = 1  # of build.json and io.json
MIXED, ORIGIN = "mixed_float16", "origin"
NEW, ALL = "S", "C+S"  # how io.json writes the axes that follow the gear
GRAPH = "model"
# ONNX's operator -> CANN's, for the black list of mixed precision (operators known on every chip), and the square that
# CANN makes of a product with itself (TQ:ops_info.json).
CANN_TYPES: Mapping[str, str] = {
    "Mul": "Mul", "Add": "Add", "Sub": "Sub", "Div": "RealDiv", "Sqrt": "Sqrt", "ReduceMean": "ReduceMean",
    "Softmax": "SoftmaxV2", "Tanh": "Tanh", "Erf": "Erf",
}  # fmt: skip
SQUARE = "Square"


@dataclass(frozen=True)
class BuildPlan:
    """Everything the texts need: chip, sizes and choices, all resolved."""

    soc: str
    profile: str
    dtype: str
    cache: int
    gears: tuple[int, ...]
    static: bool
    ids: str
    logits: str
    precision: str
    external_weight: int
    host_os: str
    host_cpu: str
    jobs: int

    @property
    def graphs(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Name without suffix, and gears, of each graph."""
        return tuple((name_graph(gear), (gear,)) for gear in self.gears) if self.static else ((GRAPH, self.gears),)


def name_graph(gear: int) -> str:
    """Return the name of a static graph."""
    return "decode" if gear == 1 else f"prefill_{gear}"


# The contract


def describe_contract(spec: ModelSpec, plan: BuildPlan, generation: Mapping[str, Any]) -> dict[str, Any]:
    """Return io.json: names, element types and shapes, where keys and values go, gears, positions, special tokens."""
    floats = "float16" if plan.dtype == "fp16" else "float32"
    heads, size = count_rows(spec), spec.layers[0].shape.head_dim
    chosen = needs_rope_ids(spec, plan.cache)
    names = [IDS, MASK, POSITIONS, *([ROPE_IDS] if chosen else [])]
    tokens = [{"name": name, "dtype": plan.ids, "shape": [1, ALL if name == MASK else NEW]} for name in names]
    rows = NEW if plan.logits == "all" else 1
    return {
        "format": FORMAT,
        "inputs": [*tokens, {"name": PAST, "dtype": floats, "shape": [1, plan.cache, heads, size]}],
        "outputs": [
            {"name": LOGITS, "dtype": "float32", "shape": [1, rows, spec.shape.vocab]},
            {"name": FRESH, "dtype": floats, "shape": [1, NEW, heads, size]},
        ],
        "axes": {NEW: "new tokens of a step: a gear", ALL: "rows of the cache and new tokens"},
        "gears": list(plan.gears),
        "graphs": [{"onnx": f"{name}.onnx", "om": f"{name}.om", "gears": list(gears)} for name, gears in plan.graphs],
        "cache": describe_cache(spec, plan, floats),
        "rope": describe_long(spec, plan) if chosen else None,
        "rules": RULES,
        "vocab": spec.shape.vocab,
        "logits": plan.logits,
        "tokens": list_special(spec.config, generation),
    }


RULES = {
    "pieces": "A prompt is run in pieces, each in a gear; a short piece stands at the end of its gear, after padding.",
    "padding": "Padding has id 0, position 0 and mask 0; its new rows are not copied.",
    "attention_mask": "First an entry for each row of the cache, 1 where it holds a token; then one per new token.",
    "position_ids": "Token n of the text has position n, and its keys and values lie in row n of the cache.",
    "logits": "Those of the step's last token, or of every new token where logits is 'all'.",
}


def describe_cache(spec: ModelSpec, plan: BuildPlan, floats: str) -> dict[str, Any]:
    """Return how the cache is laid out and kept up to date."""
    heads, size, layers, first = count_rows(spec), spec.layers[0].shape.head_dim, [], 0
    for layer in spec.layers:
        layers.append({"first": first, "kv_heads": layer.shape.kv_heads})
        first += 2 * layer.shape.kv_heads
    return {
        "input": PAST, "output": FRESH, "dtype": floats, "rows": plan.cache, "heads": heads, "head_dim": size,
        "row_bytes": heads * size * (2 if floats == "float16" else 4),
        "layers": layers,
        "start": "All zeros: rows that are masked must be finite.",
        "update": (
            "After a step with n real tokens, copy the last n rows of new_key_values into rows "
            "length .. length + n - 1 of past_key_values: n * row_bytes contiguous bytes; then length += n."
        ),
        "layout": "Of each layer from `first` on: kv_heads rows of keys, after rotation, then kv_heads rows of values.",
    }  # fmt: skip


def describe_long(spec: ModelSpec, plan: BuildPlan) -> dict[str, Any]:
    """Return what rope_ids must hold."""
    after = next(layer.rope.long_after for layer in spec.layers if layer.rope is not None and layer.rope.long_after)
    return {
        "input": ROPE_IDS, "long_after": after, "long_offset": plan.cache,
        "rule": "position_ids, plus long_offset for all tokens that are run when the text is longer than long_after.",
    }  # fmt: skip


def list_special(config: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    """Return begin, end and padding tokens, null or an empty list where neither file names one."""
    found = {**config, **{key: value for key, value in generation.items() if value is not None}}
    end = found.get("eos_token_id")
    ends = end if isinstance(end, list) else [] if end is None else [end]
    return {"bos": found.get("bos_token_id"), "eos": ends, "pad": found.get("pad_token_id")}


# The command


def list_flags(plan: BuildPlan, contract: Mapping[str, Any], name: str, gears: Sequence[int]) -> dict[str, str]:
    """Return the flags of atc for one graph, without dashes (ascend.md 2.1)."""
    single = len(gears) == 1
    sizes = {NEW: str(gears[0]), ALL: str(plan.cache + gears[0])} if single else {NEW: "-1", ALL: "-1"}
    flags = {
        "mode": "0", "framework": "5", "model": f"{name}.onnx", "output": name, "soc_version": plan.soc,
        "input_format": "ND",
        "input_shape": ";".join(
            f"{value['name']}:{','.join(sizes.get(axis, str(axis)) for axis in value['shape'])}"
            for value in contract["inputs"]
        ),
    }  # fmt: skip
    if not single:
        axes = [axis for value in contract["inputs"] for axis in value["shape"] if axis in (NEW, ALL)]
        flags["dynamic_dims"] = ";".join(
            ",".join(str(gear if axis == NEW else plan.cache + gear) for axis in axes) for gear in gears
        )
    return flags | list_shared_flags(plan)


def list_shared_flags(plan: BuildPlan) -> dict[str, str]:
    """Return the flags that all graphs share: precision, where weights go, and the machine that will run them."""
    flags = {"precision_mode_v2": plan.precision}
    if plan.precision == MIXED:
        flags["modify_mixlist"] = MIXED_LIST
    if plan.precision != ORIGIN and plan.dtype == "fp16":
        flags["keep_dtype"] = KEPT
    flags["external_weight"] = str(plan.external_weight)
    if plan.host_cpu:
        flags |= {"host_env_os": plan.host_os, "host_env_cpu": plan.host_cpu}
    return flags | {"log": "error"}


def describe_build(plan: BuildPlan, flags: Sequence[Mapping[str, str]], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return build.json: the chip, the commands flag by flag, their environment, and `facts` about the files."""
    return {
        "format": FORMAT,
        "chip": {"soc": plan.soc, "profile": plan.profile or None},
        "dtype": plan.dtype,
        "cache": plan.cache,
        "steps": list(plan.gears),
        "static": plan.static,
        "environment": {"TE_PARALLEL_COMPILER": plan.jobs, "MAX_COMPILE_CORE_NUMBER": plan.jobs},
        "commands": [{"flags": dict(own)} for own in flags],
        **facts,
    }


def write_script(plan: BuildPlan, flags: Sequence[Mapping[str, str]]) -> str:
    """Return build_om.sh."""
    commands = [
        " \\\n    ".join(["atc", *(f"--{name}={shlex.quote(value)}" for name, value in own.items())])
        + f"\nsettle {own['output']}"
        for own in flags
    ]
    return SCRIPT_TEXT.format(soc=plan.soc, jobs=plan.jobs, commands="\n".join(commands))


SCRIPT_TEXT = """\
#!/bin/sh
# Compiles this folder for {soc} with ATC. Needs CANN with the operator package of that chip, and no NPU.
set -eu
cd "$(dirname "$0")"
if ! command -v atc >/dev/null 2>&1; then
    echo "atc is not on PATH; install CANN with the operators of {soc} and source its set_env.sh." >&2
    exit 2
fi
# Processes that compile at the same time; each takes its own memory, so use 1 on a board of 4 GB.
export TE_PARALLEL_COMPILER="${{TE_PARALLEL_COMPILER:-{jobs}}}"
export MAX_COMPILE_CORE_NUMBER="${{MAX_COMPILE_CORE_NUMBER:-{jobs}}}"
settle() {{ # atc may add the system of the machine that runs the model to the name
    for made in "$1"_linux_*.om; do
        if [ -f "$made" ]; then mv "$made" "$1.om"; fi
    done
    if [ ! -f "$1.om" ]; then
        echo "atc wrote no $1.om; its messages above say why." >&2
        exit 1
    fi
    echo "written: $1.om"
}}
{commands}
"""


# Exceptions of mixed precision


def list_kept(nodes: Iterable[tuple[str, str]]) -> str:
    """Return keep_dtype.cfg: the name of every node that computes in float32, one a line (ATC:--keep_dtype)."""
    return "".join(f"{name}\n" for name, _ in nodes)


def list_black(nodes: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Return mixlist.json: CANN's operators that mixed precision must not turn to float16 (ATC:--modify_mixlist)."""
    types = sorted({CANN_TYPES[operator] for _, operator in nodes if operator in CANN_TYPES} | {SQUARE})
    return {"black-list": {"to-add": types}}


# The README


def write_readme(plan: BuildPlan, notes: Sequence[str]) -> str:
    """Return README.md of the folder: what to copy, what to run, and what nobody has run."""
    compiled = [f"{name}.om" for name, _ in plan.graphs]
    graphs = ", ".join(f"{name}.onnx" for name, _ in plan.graphs)
    weight = ", the folder `weight` beside them" if plan.external_weight else ""
    steps = ", ".join(map(str, plan.gears))
    form = "one graph for each" if plan.static else "one graph for all"
    extra = "".join(f"- {note}\n" for note in notes)
    return README_TEXT.format(
        soc=plan.soc, graphs=graphs, steps=steps, form=form, cache=plan.cache, compiled=", ".join(compiled),
        weight=weight, extra=extra,
    )  # fmt: skip


README_TEXT = """\
# A decoder for {soc}

Written by Lightpress: steps of {steps} tokens ({form}), a cache of {cache} tokens.

**Nothing here has been compiled by ATC or run on an NPU by us**: graphs of this kind were checked with ONNX Runtime on
a CPU, and the commands follow CANN's documentation.

1. Check the graphs on any CPU (numpy and onnxruntime): `python3 run_om.py --ids 1,2,3 --new 8 --onnx`
2. Compile where CANN is installed (no NPU needed): `sh build_om.sh`
3. Copy to the machine with the NPU: {compiled}{weight}, io.json, run_om.py, and the tokenizer files.
4. Run there (numpy, CANN's `acl`; tokenizers for `--prompt`): `python3 run_om.py --prompt "..." --new 64`

- {graphs}: ONNX, opset 18, operators of the standard that ATC converts; the weights are in model.onnx.data.
- build.json: the atc commands of build_om.sh, flag by flag. io.json: names, types and shapes of inputs and outputs, and
  how the cache is kept up to date; all that a program of your own needs.
- keep_dtype.cfg and mixlist.json: what must stay in float32 (norms, softmax, the residual stream) when ATC mixes
  precisions. If atc refuses an entry, compile with `--precision_mode_v2=origin` and without both.
- The value of `--soc_version` must be that of the chip: "Ascend" and the name that `npu-smi info` prints.
{extra}"""
