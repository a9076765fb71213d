"""The output of a run: written in a hidden folder, exported, proved, moved into place. Imported by running verbs."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backends.verify import verify_folder
from cli import options
from cli.artifact import EXACT, Artifact, write_artifacts
from cli.console import Console, RunFailure
from cli.manifest import encode_manifest, list_versions
from cli.prepare import Job, Texts, keeps_everything
from cli.request import Request
from cli.version import read_version
from compress.checkpoint_writer import MANIFEST_NAME, CheckpointWriter
from compress.pipeline import Result, Task, compress_checkpoint, describe_run
from compress.plan import Plan
from compress.report import DIFFERENT, Proof
from compress.surgery.describe import new_config
from compress.text import Windows


@dataclass(frozen=True)
class Made:
    """What was written beside the weights, the proofs of all of it, and what training did, if it was asked for."""

    artifact: Artifact
    proofs: tuple[Proof, ...]
    recovery: Mapping[str, Any] | None = None


@dataclass
class Clock:
    """Seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Add the time of the block to a stage."""
        started = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started


def make_task(job: Job, plan: Plan, texts: Texts) -> Task:
    """Return the rebuild that follows a plan."""
    # A model that stays as it is needs no calibration, only a sample to prove it with.
    windows = texts.calibration.take(2) if keeps_everything(job, plan) else texts.calibration
    return Task(job.checkpoint, job.spec, windows, job.recipe, group=job.group)


def write_model(
    job: Job, plan: Plan, texts: Texts, clock: Clock, console: Console
) -> tuple[Path, Made]:
    """Rebuild, export and prove the model in a hidden folder, which becomes the output by one rename."""
    assert job.request.output is not None
    with open_folder(job, new_config(job.spec, plan, job.recipe), job.request.output) as writer:
        with clock.time("rebuild"):
            result = compress_checkpoint(make_task(job, plan, texts), plan, writer, console.progress)
        with clock.time("hash"):
            manifest = describe_manifest(job, plan, texts)
        made = prepare_artifact(writer.seal(), job, (result, texts.calibration), clock, console)
        writer.add_text(MANIFEST_NAME, encode_manifest({**manifest, "proofs": made.proofs}))
        return writer.finish(), made


@contextmanager
def open_folder(job: Job, config: dict[str, Any], folder: Path) -> Iterator[CheckpointWriter]:
    """Give a writer of a folder with the side files of the model; the folder appears when the writer finishes."""
    writer = CheckpointWriter(
        folder, config, job.recipe.shard_bytes, overwrite=job.request.overwrite, source=job.checkpoint.folder
    )
    try:
        with writer:
            for path in job.checkpoint.side_files():
                writer.add_file(path)
            yield writer
    finally:  # an interrupt can fall between the making of the writer's folder and the block that removes it
        shutil.rmtree(writer.work, ignore_errors=True)


def prepare_artifact(
    folder: Path, job: Job, made: tuple[Result, Windows], clock: Clock, console: Console
) -> Made:
    """Export the sealed folder for its runtime and prove it; RunFailure on a mismatch, and then nothing is kept."""
    request, (result, windows) = job.request, made
    artifact = Artifact(EXACT)
    if request.export:
        assert request.output is not None
        with clock.time("export"):
            artifact = write_artifacts(folder, request.output, job.device, windows, console)
    return Made(artifact, prove_folder(folder, request, result, artifact, clock, console))


def describe_manifest(job: Job, plan: Plan, texts: Texts) -> dict[str, Any]:
    """Return where the model came from and how it was made."""
    source = {"path": str(job.request.source), "sha256": job.checkpoint.sha256()}
    run = describe_run(job.recipe, texts.calibration)
    if job.request.plan is not None:  # what would have made a plan was not used
        run["recipe"] = {key: value for key, value in run["recipe"].items() if key not in options.PLAN_KEYS}
        run["plan_file"] = str(job.request.plan)
    return {
        "source": source,
        **run,
        "seed": job.recipe.seed,
        "skipped_sink_tokens": plan.notes.get("skipped_sink_tokens", 0),
        "versions": {"lightpress": read_version(), **list_versions()},
        "plan": plan.to_json(),
    }


def prove_folder(
    folder: Path, request: Request, result: Result, artifact: Artifact, clock: Clock, console: Console
) -> tuple[Proof, ...]:
    """Verify the written folder in fresh processes; RunFailure on a mismatch."""
    if not request.verify:
        return ()
    console.note("Verifying the output in fresh processes.")
    with clock.time("verify"):
        proofs = verify_folder(folder, result.sample_ids, result.sample_logits, request.export, artifact.sample)
    wrong = [proof for proof in proofs if proof.status == DIFFERENT]
    left = "the trained weights are kept for --resume" if request.recovery else "nothing was kept"
    if wrong:
        raise RunFailure(
            f"The output failed its verification with {wrong[0].runtime}: {wrong[0].reason}; {left}. "
            "Please report this with the plan (`lightpress plan`); --no-verify writes the folder all the same."
        )
    return tuple(proofs)
