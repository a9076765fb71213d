"""What `compress` writes beside the checkpoint for the runtime of the device. Imported only by running verbs."""

from __future__ import annotations

import math
import shlex
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from backends.ascend_hf import HfRequest, export_hf
from backends.ascend_om import export_om, request_for
from backends.ascend_rules import find_profile_soc
from backends.export_onnx import export_onnx
from backends.ort import open_onnx
from backends.verify import ONNX_FOLDER, Sample
from cli.ascend_om import describe_next
from cli.budget import QUANTISED, Device
from cli.console import Console, format_bytes
from cli.export_flags import HF, OM, ONNX
from cli.weights import FormatFlags, open_form
from compress.checkpoint import Checkpoint, open_checkpoint
from compress.errors import UserError
from compress.text import Windows

ASCEND_FOLDER = "ascend"
EXACT = "fp32"
SAMPLE_WINDOWS = 2
# MatMulNBits rounds its inputs to 8 bits, layer after layer: a graph of other weights than these is further off.
QUANTISED_TOLERANCE = 0.1


@dataclass(frozen=True)
class Artifact:
    """What lies beside the checkpoint: the graph's format, what it should compute, and what to do on the device."""

    format: str
    sample: Sample | None = None
    lines: tuple[str, ...] = ()

    @property
    def quantised(self) -> bool:
        """Whether the graph holds other weights than the checkpoint."""
        return self.format != EXACT


def choose_graph_format(device: Device | None) -> str:
    """Return the weights of the ONNX graph: those that are timed, where the device runs it, else float32."""
    runs_it = device is not None and device.profile.runtime.export == ONNX
    return device.workload.weights if device is not None and runs_it else EXACT


def write_artifacts(
    folder: Path, output: Path, device: Device | None, windows: Windows, console: Console
) -> Artifact:
    """Export a sealed folder, which will become `output`, to ONNX, and for an Ascend profile to `ascend` too."""
    checkpoint, name = open_checkpoint(folder), choose_graph_format(device)
    sample = write_graph(checkpoint, name, windows, console)
    lines: tuple[str, ...] = ()
    if device is not None:
        lines = write_for_device(checkpoint, output, device, windows, console)
    return Artifact(name, sample, lines)


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
    """Write what else the device's runtime loads; return what to copy and what to run, in three lines.

    A model that the runtime cannot have is no reason to lose the checkpoint: then there is a warning and no folder.
    """
    writers = {OM: write_om, HF: write_hf}
    kind = device.profile.runtime.export
    if kind not in writers:
        return describe_onnx(output, device)
    try:
        return writers[kind](checkpoint, output, device, windows, console)
    except UserError as error:
        console.warn(f"nothing was written for {device.profile.name}: {error}")
        return ()


def describe_onnx(output: Path, device: Device) -> tuple[str, ...]:
    """Return the lines for a device that runs ONNX."""
    graph = output / ONNX_FOLDER
    return (
        f"{graph} holds the model in {device.workload.weights} for ONNX Runtime, as planned for {device.profile.name}.",
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
        find_profile_soc(device.profile.name), choose_quantisation(device), choose_dtype(device),
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
    """Return the first of the profile's quantisations where the planned weights are quantised, else none."""
    return device.profile.formats.quantisations[0] if device.workload.weights in QUANTISED else "none"


def choose_dtype(device: Device) -> str:
    """Return the servers' name of the planned float type; empty for the chip's own."""
    return {"fp16": "float16", "bf16": "bfloat16"}.get(device.workload.weights, "")


def measure_graph(folder: Path, windows: Windows, threads: int | None) -> float:
    """Return the perplexity of an ONNX folder on the windows, over the same tokens as `compress.evaluate`."""
    model, losses = open_onnx(folder, threads), []
    for ids in windows.ids:
        logits = torch.from_numpy(model.prefill(ids[None].numpy())[0][0])
        losses.append(float(F.cross_entropy(logits[:-1].double(), ids[1:], reduction="sum")))
    return math.exp(sum(losses) / windows.ids[:, 1:].numel())
