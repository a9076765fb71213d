"""`lightpress export --target ascend-hf`: from flags to a folder for vllm-ascend and MindIE. Imported when running."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.ascend_format import LAYOUTS
from backends.ascend_hf import HfReport, HfRequest, check_request, export_hf, make_form
from backends.ascend_rules import settle_soc
from cli.console import Console, format_bytes
from cli.prepare import check_tokenizer, check_weights, check_writable, gather_calibration
from compress.checkpoint import open_checkpoint
from compress.checkpoint_writer import check_output
from compress.errors import UserError
from compress.quantize.w8a8 import STATIC, LinearForm
from profiles.loader import load_profile


@dataclass(frozen=True)
class HfFlags:
    """What the command line says: chip by soc_version or by profile, quantisation, the text it learns from.

    `smooth` 0 is no smoothing; `windows` of `text` (None: sampled from the model).
    """

    soc_version: str = ""
    profile: str = ""
    quantisation: str = "none"
    dtype: str = ""
    devices: int = 1
    gptq: bool = True
    smooth: float = 0.5
    mixed: bool = True
    int8_head: bool = False
    text: Path | None = None
    windows: int = 64

    def request(self, overwrite: bool) -> HfRequest:
        """Return the request; UserError where no chip is named."""
        if not self.soc_version and not self.profile:
            raise UserError(
                "--target ascend-hf writes for one chip: give --profile, such as ascend-910b2, or --soc-version."
            )
        soc = settle_soc(load_profile(self.profile), self.soc_version) if self.profile else self.soc_version
        return HfRequest(
            soc, self.quantisation, self.dtype, self.devices, gptq=self.gptq, alpha=self.smooth or None,
            mixed=self.mixed, int8_head=self.int8_head, overwrite=overwrite,
        )  # fmt: skip


def export_ascend_hf(source: str, output: Path, flags: HfFlags, overwrite: bool, console: Console) -> None:
    """Check everything that can be checked early, read or sample the text, write the folder, say what is in it."""
    request = flags.request(overwrite)
    checkpoint = open_checkpoint(source)
    _, _, settled = check_request(checkpoint, request)
    check_output(output, checkpoint.folder, overwrite)
    form = make_form(settled)
    learns = learns_from_text(form)
    check_idle(flags, form, learns)
    check_writable(output)
    check_tokenizer(checkpoint.folder, console)
    check_weights(checkpoint, console)
    windows = gather_calibration(flags.text, flags.windows, checkpoint, console) if learns else None
    report = export_hf(checkpoint, output, request, windows, console.progress)
    show_report(report, console)


def check_idle(flags: HfFlags, form: LinearForm | None, learns: bool) -> None:
    """Raise UserError for flags that would do nothing for the format that was chosen."""
    default = HfFlags()
    given = {
        "--method": flags.gptq != default.gptq and form is None,
        "--smooth": flags.smooth != default.smooth and form is None,
        "--pure": flags.mixed != default.mixed and (form is None or form.kind != STATIC),
        "--windows": flags.windows != default.windows and not learns,
        "--text": flags.text is not None and not learns,
    }
    idle = [name for name, nothing in given.items() if nothing]
    if idle:
        raise UserError(
            f"{' and '.join(idle)} would do nothing with --format {flags.quantisation}: leave it out, or choose a "
            "format that is quantised so, such as w8a8-static."
        )


def learns_from_text(form: LinearForm | None) -> bool:
    """Tell whether calibration windows are any use."""
    return form is not None and (form.kind == STATIC or form.gptq or form.alpha is not None)


def show_report(report: HfReport, console: Console) -> None:
    """Print what was written, what to mind, and what to run on the device."""
    for warning in report.warnings:
        console.note(warning)
    size = format_bytes(sum(report.files.values()))
    kinds = ", ".join(f"{count} projections {kind}" for kind, count in sorted(report.kinds.items()))
    console.show(f"{report.folder} written for {report.soc_version}: {report.dtype}, {kinds}; {size}.")
    for start in report.starts:
        console.show(f"{start.server}: {start.command}")
    console.finish(describe_report(report))


def describe_report(report: HfReport) -> dict[str, Any]:
    """Return the report as plain data."""
    return {
        "folder": str(report.folder),
        "soc_version": report.soc_version,
        "dtype": report.dtype,
        "quantisation": report.quantisation,
        "format": LAYOUTS[report.quantisation].files if report.quantisation in LAYOUTS else "float",
        "files": dict(report.files),
        "projections": dict(report.kinds),
        "rounded": vars(report.rounded),
        "stream_peak": report.stream.peak,
        "groups": [vars(group) for group in report.stream.groups],
        "warnings": list(report.warnings),
        "commands": {start.server: start.command for start in report.starts},
    }
