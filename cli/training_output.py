"""What a training run leaves: the trained folder, proved, and what is said of it. Imported only by running verbs."""

from __future__ import annotations

import resource
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cli.console import Console, format_bytes, format_count
from cli.manifest import encode_manifest, list_versions
from cli.render import render_proof
from cli.trained import open_writer, prove_output, read_manifest
from cli.training_job import Job
from cli.training_lessons import list_rounds, render_round
from cli.version import read_version
from compress.checkpoint_writer import MANIFEST_NAME
from compress.recover.loop import Trainer
from compress.recover.model import Student
from compress.recover.state import CURVE_NAME
from compress.report import Proof, make_plain

CURVE_OUT = "recovery.csv"

def describe_run(
    job: Job, trainer: Trainer, heldout: tuple[float | None, float | None], seconds: float
) -> dict[str, Any]:
    """Return what was done, for the manifest and for --json."""
    settings = dict(job.settings)
    models = {
        name: {"path": settings.pop(name), "sha256": settings.pop(f"{name}_files")} for name in ("student", "teacher")
    }
    return {
        "student": models["student"],
        "teacher": models["teacher"] if job.teacher else None,
        "settings": settings,
        "schedule": asdict(job.options.schedule),
        "rate": job.options.rate,
        "rates": [{"from_step": step, "rate": rate} for step, rate in trainer.history.rates],
        "steps": trainer.history.step,
        "tokens": trainer.history.tokens,
        "data": make_plain(job.stream.facts),
        "rounds": list_rounds(job),
        "loss": trainer.history.running,
        "heldout_loss": {"before": heldout[0], "after": heldout[1]},
        "seconds": seconds,
        "peak_rss_bytes": read_peak(),
        "versions": {"lightpress": read_version(), **list_versions()},
    }


def read_peak() -> int:
    """Return the most memory that this process has had, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux hands ru_maxrss on from the process that started this one
        return 1024 * int(status.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def write_student(job: Job, student: Student, facts: dict[str, Any], console: Console) -> tuple[Proof, ...]:
    """Write the trained model as the student was stored, prove it, and move it into place; the first process does."""
    if not student.group.first:
        for _ in student.stored():  # gathered together
            pass
        return ()
    checkpoint, asked = job.student[0], job.asked
    with open_writer(asked, checkpoint) as writer:
        for name, tensor in student.stored():
            if name in checkpoint.tensors:
                writer.add(name, tensor.to(checkpoint.tensors[name].dtype))
        shutil.copyfile(job.work / CURVE_NAME, writer.work / CURVE_OUT)
        proofs = prove_output(writer.seal(), asked, console)
        earlier = read_manifest(checkpoint.folder)
        entry = {**facts, "proofs": make_plain(proofs)}
        manifest = {**earlier, "recovery": [*earlier.get("recovery", []), entry]}
        writer.add_text(MANIFEST_NAME, encode_manifest(manifest))
        writer.finish()
    return proofs


def show_result(job: Job, facts: dict[str, Any], proofs: tuple[Proof, ...], console: Console) -> dict[str, Any]:
    """Print the result and return it."""
    held = facts["heldout_loss"]
    if held["before"] is not None:
        console.show(f"Held-out loss: {held['before']:.4f} before, {held['after']:.4f} after, in nats per token.")
    console.show(
        f"Trained {facts['steps']} steps on {format_count(facts['tokens'])} tokens in {facts['seconds']:.0f} s; "
        f"training loss {facts['loss']:.4g}; at most {format_bytes(facts['peak_rss_bytes'])} of memory."
    )
    for found in facts["rounds"]:
        console.show(render_round(found))
    for proof in proofs:
        console.show(render_proof(proof))
    console.show(f"Written to {job.asked['output']}.")
    return facts
