"""What `recover` does and says: checks, teacher, training, output. Imported only by running verbs."""

from __future__ import annotations

import hashlib
import json
import math
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from cli.budget import COUNTS, read_amount
from cli.console import Console, RunFailure, format_bytes, format_count
from cli.estimate import free_memory
from cli.measure import Model, limit_threads
from cli.prepare import check_weights, check_writable
from cli.render import render_proof
from cli.run import encode_manifest, list_versions
from cli.trained import open_model, open_writer, prove_output, read_manifest
from cli.version import read_version
from compress.checkpoint import Checkpoint
from compress.checkpoint_writer import MANIFEST_NAME, check_output, check_space
from compress.errors import UserError
from compress.hidden import release_memory
from compress.recover.data import Batch, DataStream, StreamOptions, make_options, open_stream
from compress.recover.loop import Diverged, LoopOptions, StepReport, Trainer, measure_loss, train
from compress.recover.lora import LoraOptions
from compress.recover.losses import Objective
from compress.recover.model import Frozen, Student, StudentOptions, estimate_activations
from compress.recover.optimizer import AdamOptions
from compress.recover.schedule import Schedule, choose_warmup
from compress.recover.state import CURVE_NAME, Curve, find_state, load_state, open_work, save_state
from compress.recover.teacher import (
    CachedTeacher,
    NoTeacher,
    OnlineTeacher,
    Plan,
    Teaching,
    check_matches,
    check_vocabulary,
    fill_cache,
    list_missing,
    open_cache,
    plan_cache,
)
from compress.report import Proof, make_plain
from compress.spec import ModelSpec
from compress.text import load_tokenizer

RATE_TIMES_WIDTH, LORA_RATE, MOST_RATE = 0.1, 5.0, 1e-3  # the default rate falls with the width, as muP's does
ACTIVATION_BYTES = 2 * 2**30  # above which layers are run again rather than kept
HELDOUT_BATCHES = 16
RESIDENT_SHARE = 0.4  # of the free memory that a teacher may take
NOTE_SECONDS = 5.0
CURVE_OUT = "recovery.csv"
# What a run may be resumed with other values of: they change where it stands in no way.
FREE = ("output", "resume", "overwrite", "no_verify", "as_json", "quiet", "threads", "save_minutes", "save_steps",
        "cache", "eval_text", "eval_steps", "rate", "merge", "merge_rate")  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A checked request: the models, the text, and how to train."""

    asked: Mapping[str, Any]
    student: Model
    teacher: Model | None
    stream: DataStream
    heldout: tuple[Batch, ...]
    objective: Objective
    options: LoopOptions
    work: Path
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.options.schedule.steps


def run_recover(asked: Mapping[str, Any], console: Console) -> dict[str, Any]:
    """Check, score or load the teacher, train, write and prove; returns what the manifest says of the run.

    Raises UserError before anything is written, RunFailure for a run that diverged, KeyboardInterrupt (which says how
    to resume) when asked to stop.
    """
    limit_threads(asked["threads"])
    started = time.perf_counter()
    job = prepare(asked, console)
    describe_job(job, console)
    open_work(job.work, job.settings, asked["resume"])
    teaching = make_teaching(job, console)
    trainer = make_trainer(job)
    before = evaluate(job, trainer)
    resume_run(job, trainer, console)
    train_all(job, trainer, teaching, console)
    if trainer.average is not None:
        trainer.average.swap(trainer.optimizer.parameters)
    after = evaluate(job, trainer)
    facts = describe_run(job, trainer, (before, after), time.perf_counter() - started)
    proofs = write_student(job, trainer.student, facts, console)
    shutil.rmtree(job.work, ignore_errors=True)
    return show_result(job, {**facts, "proofs": make_plain(proofs)}, proofs, console)


# Checks


def prepare(asked: Mapping[str, Any], console: Console) -> Job:
    """Open and check everything; raises UserError."""
    output = Path(asked["output"])
    check_output(output, overwrite=asked["overwrite"])
    check_writable(output)
    student = open_model(asked["student"])
    teacher = open_model(asked["teacher"]) if asked["teacher"] else None
    for checkpoint, _ in (student, *([teacher] if teacher else [])):
        check_output(output, checkpoint.folder, asked["overwrite"])
    objective = make_objective(asked)
    if teacher is not None:
        check_vocabulary((student[1], student[0].folder), (teacher[1], teacher[0].folder))
        check_matches(student[1], teacher[1], objective.matches)
    check_length(asked["length"], student)
    options = make_options_of_loop(asked, student[1])
    check_room(asked, student, output)
    console.note("Reading the text.")
    stream, heldout = open_texts(asked, student[0])
    check_weights(student[0], console)
    work = output.absolute().with_name(f"{output.absolute().name}.training")
    job = Job(asked, student, teacher, stream, heldout, objective, options, work)
    return replace(job, settings=describe_settings(job))


def check_length(length: int, student: Model) -> None:
    """Raise UserError for rows longer than the model was made for."""
    checkpoint, spec = student
    if length > spec.max_positions:
        raise UserError(
            f"--length {length} is more than the {spec.max_positions} positions that {checkpoint.folder} was made for; "
            "give a smaller one."
        )


def check_room(asked: Mapping[str, Any], student: Model, output: Path) -> None:
    """Raise UserError where the disk or the memory is too small for the output and the states of the run."""
    (checkpoint, spec), lora = student, asked["lora"]
    master = 4 * sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    states = 0 if lora else 3 * (3 + bool(asked["ema"])) * master  # the last two, and one being written
    check_space(output, checkpoint.nbytes + states)
    tokens = asked["batch"] * asked["length"]
    kept = 0 if asked["checkpointing"] else min(estimate_activations(spec, tokens), ACTIVATION_BYTES)
    needed = kept + (checkpoint.nbytes if lora else (4 + bool(asked["ema"])) * master)
    free = free_memory()
    if free is not None and needed > free:
        raise UserError(
            f"Training needs about {format_bytes(needed)} of memory, and {format_bytes(free)} are free: give --lora "
            "16, a smaller --batch, or use a larger machine."
        )


def make_objective(asked: Mapping[str, Any]) -> Objective:
    """Return the loss that the flags ask for."""
    alpha = Objective().alpha if asked["alpha"] is None else asked["alpha"]
    return Objective(asked["loss"], alpha, read_matches(asked["match"]))


def read_matches(text: str | None) -> tuple[tuple[int, int], ...]:
    """Return pairs of layers from `3:4,7:8`; one number is a layer of both models."""
    try:
        pairs = [[int(part) for part in item.split(":")] for item in (text or "").split(",") if item]
        return tuple((pair[0], pair[-1]) for pair in pairs if len(pair) <= len("st") or fail(text))
    except ValueError as error:
        raise UserError(f"--match {text} names no layers; write STUDENT:TEACHER pairs such as 3:4,7:8.") from error


def fail(text: object) -> bool:
    """Raise ValueError."""
    raise ValueError(text)


def make_options_of_loop(asked: Mapping[str, Any], spec: ModelSpec) -> LoopOptions:
    """Return how to train."""
    tokens = read_amount(asked["tokens"], COUNTS, "--tokens", "2M")
    steps = math.ceil(tokens / (asked["batch"] * asked["length"] * asked["accumulate"]))
    warmup = choose_warmup(steps) if asked["warmup"] is None else asked["warmup"]
    rate = asked["rate"]
    if rate is None:
        rate = min(MOST_RATE, (LORA_RATE if asked["lora"] else 1.0) * RATE_TIMES_WIDTH / spec.shape.hidden)
    if not 0 < rate < 1:
        raise UserError(f"--lr {rate:g} is no learning rate; give a small positive number such as 1e-4.")
    return LoopOptions(
        rate, Schedule(steps, asked["schedule"], warmup), asked["accumulate"], asked["clip"], asked["ema"],
        asked["bf16"], AdamOptions(decay=asked["decay"]),
    )  # fmt: skip


def open_texts(asked: Mapping[str, Any], student: Checkpoint) -> tuple[DataStream, tuple[Batch, ...]]:
    """Open the training text, and read the batches of the held-out one."""
    tokenizer, rows, length = load_tokenizer(student.folder), asked["batch"], asked["length"]
    options = make_options(
        student.folder, student.config, (rows, length), seed=asked["seed"], field=asked["field"]
    )
    stream = open_stream(asked["text"], tokenizer, options)
    if stream.facts.tokens < rows * length:
        raise UserError(
            f"{', '.join(map(str, asked['text']))}: gives {stream.facts.tokens} tokens, less than one batch of {rows} "
            f"x {length}; give more text, or a smaller --batch or --length."
        )
    return stream, read_heldout(asked["eval_text"], tokenizer, options)


def read_heldout(path: Path | None, tokenizer: Any, options: StreamOptions) -> tuple[Batch, ...]:
    """Return the batches of a text that is only evaluated on; none without one."""
    if path is None:
        return ()
    stream = open_stream([path], tokenizer, replace(options, seed=0))
    count = max(1, min(HELDOUT_BATCHES, stream.facts.tokens // (options.rows * options.length)))
    found = tuple(islice(stream.batches(), count))
    stream.close()
    return found


# What a run is


def describe_settings(job: Job) -> dict[str, Any]:
    """Return what decides the result of a run, as plain values: a resumed run must have the same."""
    own = {name: value for name, value in job.asked.items() if name not in FREE}
    own["text"] = [str(path) for path in job.asked["text"]]
    models = {"student": job.student, "teacher": job.teacher}
    files = {f"{name}_files": model[0].sha256() if model else None for name, model in models.items()}
    return {**own, **files, "data": hash_data(job)}


def hash_data(job: Job) -> str:
    """Return one hash of the text files, of how they become batches, and of tokenizer and chat template."""
    total = hashlib.sha256()
    shown = {key: value for key, value in vars(job.stream.options).items() if key != "template"}
    total.update(json.dumps(shown, sort_keys=True, default=list).encode())
    for path in [*job.asked["text"], *job.student[0].side_files()]:
        with Path(path).open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def describe_job(job: Job, console: Console) -> None:
    """Say what will be trained on what."""
    facts, asked = job.stream.facts, job.asked
    tokens = job.steps * asked["batch"] * asked["length"] * asked["accumulate"]
    epochs = tokens / facts.tokens
    console.note(
        f"{job.steps} steps of {tokens // job.steps} tokens: {format_count(tokens)} tokens, {epochs:.2g} times the "
        f"text ({format_count(facts.tokens)} tokens of {facts.documents} documents); rate {job.options.rate:.2g}."
    )


# Teacher and student


def make_teaching(job: Job, console: Console) -> Teaching:
    """Return where targets come from; offline, all scores are on disk when this returns and the teacher is gone."""
    if job.teacher is None:
        return NoTeacher()
    checkpoint, spec = job.teacher
    if not job.asked["offline"]:
        free = free_memory()
        resident = free is None or 4 * spec.shape.parameters < RESIDENT_SHARE * free
        if not resident:
            console.warn("the teacher is too large for memory and read again for each batch; --offline is quicker.")
        return OnlineTeacher(Frozen(checkpoint, spec, resident), [other for _, other in job.objective.matches])
    plan, folder = plan_scores(job), Path(job.asked["cache"] or job.work / "scores")
    size = plan.form.record.itemsize * int(job.steps * job.options.accumulate * count_tokens(job))
    check_space(folder, size)
    open_cache(folder, plan)
    if list_missing(folder, plan):
        console.note(f"Scoring with the teacher: the top {plan.form.k} of each token, at most {format_bytes(size)}.")
        try:
            fill_cache(folder, plan, Frozen(checkpoint, spec), job.stream.batches, console.progress)
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(f"stopped while scoring; {folder} keeps what is done: {advise_resume()}") from stop
        release_memory()
    return CachedTeacher(folder, plan)


def count_tokens(job: Job) -> int:
    """Return the tokens of one batch."""
    return int(job.asked["batch"] * job.asked["length"])


def plan_scores(job: Job) -> Plan:
    """Return the plan of the teacher's scores."""
    assert job.teacher is not None
    _, spec = job.teacher
    key = {"teacher": json.dumps(job.settings["teacher_files"], sort_keys=True), "data": job.settings["data"]}
    return plan_cache(key, spec.shape.vocab, job.steps * job.options.accumulate, count_tokens(job))


def make_trainer(job: Job) -> Trainer:
    """Load the student."""
    checkpoint, spec = job.student
    again = job.asked["checkpointing"]
    if again is None:
        again = estimate_activations(spec, count_tokens(job)) > ACTIVATION_BYTES
    lora = LoraOptions(job.asked["lora"], seed=job.asked["seed"]) if job.asked["lora"] else None
    return Trainer(Student(checkpoint, spec, StudentOptions(lora, again)), job.objective, job.options)


def evaluate(job: Job, trainer: Trainer) -> float | None:
    """Return the held-out loss in nats per token, or None without a text for it."""
    return measure_loss(trainer.student, job.heldout, job.options.bf16) if job.heldout else None


# Training


class Stopper(AbstractContextManager["Stopper"]):
    """Turns the first interrupt into a wish, so that no step is left half done; the second one stops at once."""

    def __init__(self, console: Console) -> None:
        self.asked = False
        self._console = console
        self._held: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Take the signals over."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._held[number] = signal.signal(number, self._stop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give them back."""
        for number, handler in self._held.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self._console.note("Stopping after this step.")


class Meter:
    """Notes on how training goes, every few seconds."""

    def __init__(self, job: Job, done: int, console: Console) -> None:
        self._steps, self._first, self._console = job.steps, done, console
        self._tokens = count_tokens(job) * job.options.accumulate
        self._started = self._noted = time.monotonic()
        self.rate = 0.0

    def report(self, report: StepReport, running: float, heldout: float | None) -> None:
        """Say step, loss, tokens per second and the time left."""
        now = time.monotonic()
        each = (now - self._started) / (report.step - self._first)
        self.rate = self._tokens / each
        if heldout is None and now - self._noted < NOTE_SECONDS and report.step < self._steps:
            return
        self._noted = now
        held = "" if heldout is None else f", held-out loss {heldout:.4f}"
        self._console.note(
            f"step {report.step} of {self._steps}: loss {running:.4g}{held}, {format_count(self.rate)} tokens/s, "
            f"about {each * (self._steps - report.step):.0f} s left"
        )


def resume_run(job: Job, trainer: Trainer, console: Console) -> None:
    """Put the trainer where the last saved state stood."""
    state = find_state(job.work) if job.asked["resume"] else None
    if state is not None:
        load_state(state, trainer)
        console.note(f"Resuming after step {trainer.history.step} of {job.steps}.")
    elif job.asked["resume"]:
        console.note("No step was saved yet: training starts from the beginning.")


def advise_resume() -> str:
    """Return how a stopped run goes on."""
    return "give the same command with --resume to go on"


def train_all(job: Job, trainer: Trainer, teaching: Teaching, console: Console) -> None:
    """Train to the end, saving on the way; RunFailure for a run that diverges."""
    batches = job.stream.batches(trainer.history.batches)
    try:
        with Stopper(console) as stopper:
            for report in log_steps(job, trainer, train(trainer, teaching, batches), console):
                if stopper.asked and report.step < job.steps:
                    save_state(job.work, trainer)
                    raise KeyboardInterrupt(
                        f"stopped after step {report.step} of {job.steps}, saved in {job.work}: {advise_resume()}"
                    )
        save_state(job.work, trainer)  # what follows may fail, or be stopped
    except Diverged as error:
        raise RunFailure(explain_divergence(job, error)) from error


def log_steps(
    job: Job, trainer: Trainer, reports: Iterator[StepReport], console: Console
) -> Iterator[StepReport]:
    """Pass the steps through: each into the curve, some with a held-out loss, some saved."""
    curve, meter = Curve(job.work, trainer.history.step), Meter(job, trainer.history.step, console)
    saved = time.monotonic()
    for report in reports:
        due = report.step % job.asked["eval_steps"] == 0 and report.step < job.steps
        heldout = evaluate(job, trainer) if due else None
        curve.add(report, heldout)
        meter.report(report, trainer.history.running, heldout)
        every = job.asked["save_steps"]
        wanted = time.monotonic() - saved >= 60 * job.asked["save_minutes"] or (every and report.step % every == 0)
        if wanted and not trainer.history.rising:
            save_state(job.work, trainer)
            saved = time.monotonic()
        yield report


def explain_divergence(job: Job, error: Diverged) -> str:
    """Return what happened and what is left of the run."""
    state = find_state(job.work)
    left = (
        f"nothing was saved before; delete {job.work} and start again with a lower --lr" if state is None
        else f"the last good state is {state}: --resume with a lower --lr goes on from there"
    )  # fmt: skip
    return f"Training diverged at step {error.step} ({error.reason}); {left} (it was {job.options.rate:.2g})."


# The output


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
        "steps": trainer.history.step,
        "tokens": trainer.history.tokens,
        "data": make_plain(job.stream.facts),
        "loss": trainer.history.running,
        "heldout_loss": {"before": heldout[0], "after": heldout[1]},
        "seconds": seconds,
        "peak_rss_bytes": read_peak(),
        "versions": {"lightpress": read_version(), **list_versions()},
    }


def read_peak() -> int:
    """Return the most memory that this process has had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def write_student(job: Job, student: Student, facts: dict[str, Any], console: Console) -> tuple[Proof, ...]:
    """Write the trained model as the student was stored, prove it, and move it into place."""
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
    for proof in proofs:
        console.show(render_proof(proof))
    console.show(f"Written to {job.asked['output']}.")
    return facts
