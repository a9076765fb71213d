"""What `compress` writes beside the checkpoint for the runtime of the device. Imported only by running verbs."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from backends.ascend_hf import HfRequest, export_hf
from backends.ascend_om import export_om, request_for
from backends.ascend_rules import settle_soc
from backends.eager import measure_placed
from backends.export_onnx import export_onnx
from backends.ort import open_onnx
from backends.verify import ONNX_FOLDER, Sample
from cli.ascend_om import describe_next
from cli.budget import FORMATS, QUANTISED, Device
from cli.console import Console, format_bytes
from cli.export_flags import HF, OM, ONNX
from cli.weights import W8A8, FormatFlags, open_form
from compress.checkpoint import Checkpoint, open_checkpoint
from compress.errors import UserError
from compress.text import Windows
from profiles.loader import QUANTISATIONS

ASCEND_FOLDER = "ascend"
EXACT = "fp32"
SAMPLE_WINDOWS = 2
# Quantised products round their inputs to 8 bits, layer after layer, which the sample does not: 9 % of the largest
# logit were seen on the demo in int4. A graph of other weights is further off.
QUANTISED_TOLERANCE = 0.3


@dataclass(frozen=True)
class Artifact:
    """What lies beside the checkpoint: the graph's format, what it should compute, and what to do on the device.

    `error`: why there is nothing for the device.
    """

    format: str
    sample: Sample | None = None
    lines: tuple[str, ...] = ()
    error: str | None = None

    @property
    def quantised(self) -> bool:
        """Whether the graph holds other weights than the checkpoint."""
        return self.format != EXACT


def choose_graph_format(device: Device | None) -> str:
    """Return the weights of the ONNX graph: those that are timed, where the device runs it, else float32."""
    if device is None or device.profile.runtime.export != ONNX:
        return EXACT
    work = device.workload
    return W8A8 if (work.weights, work.activations) == FORMATS[W8A8] else work.weights


def write_artifacts(
    folder: Path, output: Path, device: Device | None, windows: Windows, console: Console
) -> Artifact:
    """Export a sealed folder, which will become `output`, to ONNX, and for an Ascend profile to `ascend` too."""
    checkpoint, name = open_checkpoint(folder), choose_graph_format(device)
    sample = write_graph(checkpoint, name, windows, console)
    if device is None:
        return Artifact(name, sample)
    try:
        return Artifact(name, sample, write_for_device(checkpoint, output, device, windows, console))
    except UserError as error:
        # What only the compressed model shows, such as weights beyond float16, is no reason to lose the checkpoint.
        console.warn(f"nothing was written for {device.profile.name}: {error}")
        return Artifact(name, sample, error=str(error))


def write_graph(checkpoint: Checkpoint, name: str, windows: Windows, console: Console) -> Sample | None:
    """Write the ONNX graph; return what it should compute where that is not what the checkpoint does."""
    given = FormatFlags(name, "gptq", None, None, False, None, len(windows.ids))
    with open_form(given, checkpoint, console, windows) as form:
        place = checkpoint.folder / ONNX_FOLDER
        export_onnx(checkpoint, place, lambda *steps: console.progress("export", *steps), form)
        if form.quantiser is None:
            return None
        ids, logits = form.quantiser.sample_logits(SAMPLE_WINDOWS)
        return Sample(ids, logits, QUANTISED_TOLERANCE)


def write_for_device(
    checkpoint: Checkpoint, output: Path, device: Device, windows: Windows, console: Console
) -> tuple[str, ...]:
    """Write what else the device's runtime loads; return what to copy and what to run, in three lines."""
    writers = {OM: write_om, HF: write_hf}
    kind = device.profile.runtime.export
    if kind not in writers:
        return describe_onnx(output, device)
    return writers[kind](checkpoint, output, device, windows, console)


def describe_onnx(output: Path, device: Device) -> tuple[str, ...]:
    """Return the lines for a device that runs ONNX."""
    graph, name = output / ONNX_FOLDER, choose_graph_format(device)
    return (
        f"{graph} holds the model in {name} for ONNX Runtime, as planned for {device.profile.name}.",
        f"Copy that folder to the device: scp -r {shlex.quote(str(graph))} DEVICE:model",
        'Run it there with onnxruntime-genai, or with Lightpress: lightpress generate model "..."',
    )


def write_om(
    checkpoint: Checkpoint, output: Path, device: Device, windows: Windows, console: Console
) -> tuple[str, ...]:
    """Write the graph that ATC compiles; `windows` is not needed."""
    report = export_om(
        checkpoint, checkpoint.folder / ASCEND_FOLDER, request_for(device.profile),
        lambda *steps: console.progress("ascend", *steps),
    )  # fmt: skip
    return describe_next(replace(report, folder=output / ASCEND_FOLDER))


def write_hf(
    checkpoint: Checkpoint, output: Path, device: Device, windows: Windows, console: Console
) -> tuple[str, ...]:
    """Write the folder that Ascend's servers load."""
    request = HfRequest(
        settle_soc(device.profile), choose_quantisation(device), choose_dtype(device),
        device.workload.devices,
    )  # fmt: skip
    # The writer wants its folder outside of the checkpoint that it reads.
    scratch = Path(tempfile.mkdtemp(prefix=".lightpress-", dir=checkpoint.folder.parent))
    try:
        report = export_hf(checkpoint, scratch / ASCEND_FOLDER, request, windows, console.progress)
        (scratch / ASCEND_FOLDER).rename(checkpoint.folder / ASCEND_FOLDER)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for warning in report.warnings:
        console.note(warning)
    place, size = output / ASCEND_FOLDER, format_bytes(sum(report.files.values()))
    return (
        f"{place} written for {report.soc_version}: {report.dtype}, quantisation {report.quantisation}; {size}.",
        f"Copy that folder to the device: scp -r {shlex.quote(str(place))} DEVICE:/path/to/{ASCEND_FOLDER}",
        f"Run there, with {report.starts[0].server}: {report.starts[0].command}",
    )


def choose_quantisation(device: Device) -> str:
    """Return the first of the profile's quantisations that is what was planned and timed; none for plain weights."""
    work = device.workload
    if work.weights not in QUANTISED:
        return "none"
    known = device.profile.formats.quantisations
    return next(name for name in known if QUANTISATIONS[name] == (work.weights, work.activations))


def choose_dtype(device: Device) -> str:
    """Return the servers' name of the planned float type; empty for the chip's own."""
    return {"fp16": "float16", "bf16": "bfloat16"}.get(device.workload.weights, "")


def measure_graph(folder: Path, windows: Windows, threads: int | None) -> float:
    """Return the perplexity of an ONNX folder on the windows, over the same tokens as `compress.evaluate`."""
    return measure_placed(open_onnx(folder, threads), windows).perplexity
