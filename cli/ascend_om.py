"""`lightpress export --target ascend-om`: from flags to a request, and what to do next. Imported when running."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backends.ascend_om import OmReport, OmRequest, export_om, request_for
from cli.console import Console, format_bytes
from cli.prepare import check_tokenizer, check_weights, check_writable
from compress.checkpoint import open_checkpoint
from compress.errors import UserError
from profiles.loader import load_profile


@dataclass(frozen=True)
class OmFlags:
    """What the command line says: a profile or a chip (or both), and choices that stay at the default when empty."""

    profile: str = ""
    soc_version: str = ""
    dtype: str = "fp16"
    cache: int | None = None
    gears: str = ""
    static: bool = False
    ids: str = "int64"
    logits: str = "last"
    precision: str = ""
    external_weight: int | None = None
    host_cpu: str | None = None
    jobs: int = 4
    overwrite: bool = False


def run_om_export(source: str, output: Path, flags: OmFlags, console: Console) -> None:
    """Export for an OM and say in three lines what to copy and to run; UserError for what cannot be."""
    request = make_request(flags)
    check_writable(output)
    checkpoint = open_checkpoint(source)
    check_tokenizer(checkpoint.folder, console)
    check_weights(checkpoint, console)
    report = export_om(checkpoint, output, request, lambda *steps: console.progress("export", *steps), flags.overwrite)
    for note in report.notes:
        console.note(note)
    for line in describe_next(report):
        console.show(line)
    console.finish(describe_report(report))


def make_request(flags: OmFlags) -> OmRequest:
    """Turn flags into a request; UserError when they name neither a profile nor a chip, or do not fit each other."""
    if not flags.profile and not flags.soc_version:
        raise UserError("--target ascend-om needs the chip; give --profile ascend-310b1, or --soc-version Ascend310B1.")
    request = OmRequest(flags.soc_version)
    if flags.profile:
        request = request_for(load_profile(flags.profile), flags.soc_version)
    return replace(
        request, dtype=flags.dtype, cache=flags.cache, gears=read_gears(flags.gears), static=flags.static,
        ids=flags.ids, logits=flags.logits, precision=flags.precision, external_weight=flags.external_weight,
        host_cpu=request.host_cpu if flags.host_cpu is None else flags.host_cpu, jobs=flags.jobs,
    )  # fmt: skip


def read_gears(text: str) -> tuple[int, ...]:
    """Parse numbers of tokens separated by commas; UserError for other text."""
    try:
        return tuple(int(word) for word in text.split(",")) if text else ()
    except ValueError as error:
        raise UserError(f"--gears {text} must be numbers separated by commas, such as 1,8,32,128.") from error


def describe_next(report: OmReport) -> tuple[str, str, str]:
    """Return what was written, how to compile it, and what to copy and run."""
    total = format_bytes(sum(report.files.values()))
    steps = ", ".join(map(str, report.gears))
    return (
        f"{report.folder} written for {report.soc_version}: {total}, cache of {report.cache} tokens, steps of {steps}.",
        f"Compile where CANN is installed: sh {report.folder}/build_om.sh (what it writes to copy: README.md there).",
        'Run on the device: python3 run_om.py --prompt "..."; on this CPU: the same with --onnx.',
    )


def describe_report(report: OmReport) -> dict[str, Any]:
    """Return the report for --json."""
    return {
        "folder": str(report.folder),
        "soc_version": report.soc_version,
        "cache": report.cache,
        "gears": list(report.gears),
        "files": dict(report.files),
        "largest_weight": {"value": report.largest[0], "tensor": report.largest[1]},
        "subnormal_share": report.subnormal,
        "flushed_share": report.flushed,
        "notes": list(report.notes),
    }
