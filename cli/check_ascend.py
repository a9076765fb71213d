"""`lightpress check-ascend`: whether a folder will convert and run on an Ascend chip, without one."""

from __future__ import annotations

import subprocess
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options
from cli.console import Console, RunFailure
from compress.errors import UserError

if TYPE_CHECKING:
    from backends.ascend_check import Report
    from backends.ascend_rules import Finding

WIDTH = 100
INDENT = " " * 9
STDERR = 2  # what atc says is no result of ours


def check_ascend(
    *,
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder with .onnx graphs, or a Hugging Face folder.")
    ],
    soc_version: Annotated[
        str | None, typer.Option("--soc-version", help="Chip, such as Ascend310B1; else that of build.json.")
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option("--profile", help="Shipped Ascend profile that names the chip.", rich_help_panel=options.DEVICE),
    ] = None,
    devices: Annotated[
        int, typer.Option("--devices", "--tp", min=1, help="Devices that will share a Hugging Face folder.")
    ] = 1,
    run_atc: Annotated[
        bool, typer.Option("--run-atc", help="Convert with atc when there are no errors; it must be on PATH.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Fail on warnings too.")] = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Check every node, shape, flag and tensor in a folder against what Ascend's compiler and servers take.

    Example: lightpress check-ascend ./model/ascend --profile ascend-310b1
    """
    with Console(as_json, quiet) as console:
        from backends.ascend_check import check_folder, offer_atc
        from backends.ascend_rules import find_profile_soc

        if soc_version and profile:
            raise UserError("--soc-version and --profile both name the chip: give one of them.")
        soc = find_profile_soc(profile) if profile else soc_version
        if run_atc and not offer_atc(folder):
            raise UserError(
                f"--run-atc needs atc on PATH and {folder / 'build_om.sh'}: source CANN's set_env.sh, and check a "
                "folder of `lightpress export --target ascend-om`."
            )
        report = check_folder(folder, soc, devices, lambda *steps: console.progress("check", *steps))
        command = offer_atc(folder)
        console.show(render_report(report))
        if command and not run_atc:
            console.note(f"atc is installed: {command}")
        console.finish({**describe_report(report), "command": command or None})
        fail_on(report, folder, strict)
        if run_atc:
            convert(folder)


def describe_report(report: Report) -> dict[str, Any]:
    """Return a report as plain data."""
    return {
        "soc_version": report.soc_version or None,
        "checked": list(report.checked),
        "errors": report.errors,
        "warnings": report.warnings,
        "findings": [asdict(finding) for finding in report.findings],
    }


def render_report(report: Report) -> str:
    """Return what was checked, each finding with its place, and how many there are."""
    lines = [f"checked  {text}" for text in report.checked]
    lines.append(f"chip     {report.soc_version or 'unknown'}")
    ordered = sorted(report.findings, key=lambda finding: finding.severity)
    lines += [line for finding in ordered for line in render_finding(finding)]
    return "\n".join([*lines, "", f"{report.errors} error(s), {report.warnings} warning(s)."])


def render_finding(finding: Finding) -> list[str]:
    """Return a finding: severity, rule and place, and the sentence below them."""
    place = " ".join(filter(None, (finding.file, finding.node)))
    sentence = textwrap.fill(
        finding.sentence, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT, break_long_words=False
    )
    return ["", f"{finding.severity:<9}{finding.rule}: {place or 'the folder'}", sentence]


def fail_on(report: Report, folder: Path, strict: bool) -> None:
    """Raise RunFailure when there are errors, or warnings where they count."""
    if report.errors:
        raise RunFailure(f"{folder} has {report.errors} error(s) that would stop it on the device; mend them first.")
    if strict and report.warnings:
        raise RunFailure(f"{folder} has {report.warnings} warning(s), which --strict does not let pass.")


def convert(folder: Path) -> None:
    """Run the folder's script, whose messages go to stderr; RunFailure when atc refuses a graph."""
    ran = subprocess.run(["sh", str(folder / "build_om.sh")], stdout=STDERR, check=False)
    if ran.returncode:
        raise RunFailure(
            f"{folder / 'build_om.sh'} failed with exit code {ran.returncode}; its messages above say why."
        )
