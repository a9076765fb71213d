"""What a training run was asked for, checked and opened before anything is written. Imported only by running verbs."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from cli.budget import COUNTS, read_amount
from cli.console import Console, format_bytes, format_count
from cli.curriculum import read_options
from cli.estimate import free_memory
from cli.measure import Model
from cli.prepare import check_weights, check_writable
from cli.trained import open_model
from compress.checkpoint import Checkpoint
from compress.checkpoint_writer import check_kept, check_output, check_space
from compress.errors import UserError
from compress.parallel import ALONE, Group
from compress.recover.data import Batch, DataStream, StreamOptions, make_options, open_stream
from compress.recover.loop import LoopOptions
from compress.recover.losses import Objective
from compress.recover.model import estimate_activations
from compress.recover.optimizer import AdamOptions
from compress.recover.parallel_data import check_rows
from compress.recover.rollout import RolloutOptions, check_prompts, read_stops
from compress.recover.sampler import SampleOptions
from compress.recover.schedule import Schedule, choose_warmup
from compress.recover.state import RUN_NAME
from compress.recover.teacher import check_matches, check_vocabulary
from compress.spec import ModelSpec
from compress.text import load_tokenizer

RATE_TIMES_WIDTH, LORA_RATE, MOST_RATE = 0.1, 5.0, 1e-3  # the default rate falls with the width, as muP's does
ACTIVATION_BYTES = 2 * 2**30  # above which layers are run again rather than kept
HELDOUT_BATCHES = 16
POLICY_SHARE = 0.5  # of a run with rounds that is on-policy
# What a run may be resumed with other values of: they change where it stands in no way.
FREE = ("output", "resume", "overwrite", "no_verify", "as_json", "quiet", "threads", "save_minutes", "save_steps",
        "cache", "eval_text", "eval_steps", "rate", "merge", "merge_rate", "device")  # fmt: skip


@dataclass(frozen=True)
class Lesson:
    """A stretch of a run: `round` 0 is on the text, the others on what the student answers once it got there."""

    round: int
    first: int
    steps: int

    @property
    def last(self) -> int:
        """Steps that the run has made when the lesson is over."""
        return self.first + self.steps


@dataclass(frozen=True)
class Job:
    """A checked request: the models, the text, and how to train; `order` of the documents, for a curriculum.

    `lessons` cover the steps of the run one after the other.
    """

    asked: Mapping[str, Any]
    student: Model
    teacher: Model | None
    stream: DataStream
    heldout: tuple[Batch, ...]
    objective: Objective
    options: LoopOptions
    work: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    order: tuple[int, ...] | None = None
    lessons: tuple[Lesson, ...] = ()

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.options.schedule.steps

    @property
    def batch_tokens(self) -> int:
        """Tokens of one batch."""
        return int(self.asked["batch"] * self.asked["length"])

    def count_batches(self, steps: int) -> int:
        """Return how many batches so many steps take."""
        return steps * self.options.accumulate

    @property
    def text_steps(self) -> int:
        """Steps on the text, before any rounds."""
        return sum(lesson.steps for lesson in self.lessons if not lesson.round)

    def batches(self, start: int) -> Iterator[Batch]:
        """Yield the batches of the text from number `start` on, in the order that was settled."""
        return self.stream.batches(start, self.order)

    def rollout_options(self, lesson: Lesson) -> RolloutOptions:
        """Return what a round asks of the student."""
        asked = self.asked
        stops = {*read_stops(self.student[0].folder), *self.stream.options.end}
        given = {name: asked[name] for name in ("temperature", "top_p") if asked[name] is not None}
        most = asked["length"] // 2 if asked["answer_tokens"] is None else asked["answer_tokens"]
        sample = SampleOptions(most, stop=tuple(sorted(stops)), **given)
        tokens = self.count_batches(lesson.steps) * self.batch_tokens
        return RolloutOptions(tokens, asked["length"], sample, (asked["seed"], lesson.round))

    def prompters(self) -> Sequence[int]:
        """Return the documents of the text that may give prompts."""
        return self.stream.used() if self.order is None else sorted(set(self.order))


# Checks


def prepare(asked: Mapping[str, Any], console: Console, group: Group = ALONE) -> Job:
    """Open and check everything; raises UserError."""
    check_rows(asked["batch"], group)
    output = Path(asked["output"])
    check_output(output, overwrite=asked["overwrite"])
    check_writable(output)
    student = open_model(asked["student"])
    teacher = open_model(asked["teacher"]) if asked["teacher"] else None
    for checkpoint, _ in (student, *([teacher] if teacher else [])):
        check_output(output, checkpoint.folder, asked["overwrite"])
    check_kept(output, [asked["cache"]])
    if asked["overwrite"]:
        check_kept(output, (*map(Path, asked["text"]), asked["eval_text"]))
    read_options(asked)
    objective = make_objective(asked)
    if teacher is not None:
        check_vocabulary((student[1], student[0].folder), (teacher[1], teacher[0].folder))
        check_matches(student[1], teacher[1], objective.matches)
    check_length(asked["length"], student)
    options = make_options_of_loop(asked, student[1])
    check_room(asked, student, output, group)
    console.note("Reading the text.")
    work = output.absolute().with_name(f"{output.absolute().name}.training")
    asked = {**asked, "now": group.tell(settle_date(work, asked["resume"]))}
    stream, heldout = open_texts(asked, student[0])
    for checkpoint, _ in (student, *([teacher] if teacher else [])):
        check_weights(checkpoint, console)
    lessons = plan_lessons(asked, options.schedule.steps)
    job = Job(asked, student, teacher, stream, heldout, objective, options, work, lessons=lessons)
    check_rounds(job)
    return replace(job, settings=describe_settings(job))


def plan_lessons(asked: Mapping[str, Any], steps: int) -> tuple[Lesson, ...]:
    """Divide the steps of a run: off-policy training on the text, then rounds of about equal length.

    A pruned student first needs the text: right after pruning its own answers are worth nothing (methods 4.4).
    """
    rounds, share = asked["rounds"], asked["policy_share"]
    if not rounds:
        return (Lesson(0, 0, steps),)
    share = POLICY_SHARE if share is None else share
    if not 0 < share <= 1:
        raise UserError(f"--policy-share {share:g} is no share of the training; give more than 0 and at most 1.")
    start = steps - round(share * steps)
    if steps - start < rounds:
        raise UserError(
            f"--rounds {rounds} have {steps - start} of the {steps} steps between them; give more --tokens, or a "
            "larger --policy-share."
        )
    ends = [start + (steps - start) * done // rounds for done in range(rounds + 1)]
    text = (Lesson(0, 0, start),) if start else ()
    return text + tuple(
        Lesson(number, *(ends[number - 1], ends[number] - ends[number - 1])) for number in range(1, rounds + 1)
    )


def check_rounds(job: Job) -> None:
    """Raise UserError for rounds in which the student would have nothing to answer."""
    for lesson in job.lessons:
        if lesson.round:
            check_prompts(job.stream, job.prompters(), job.rollout_options(lesson))
            return


def check_length(length: int, student: Model) -> None:
    """Raise UserError for rows longer than the model was made for."""
    checkpoint, spec = student
    if length > spec.max_positions:
        raise UserError(
            f"--length {length} is more than the {spec.max_positions} positions that {checkpoint.folder} was made for; "
            "give a smaller one."
        )


def check_room(asked: Mapping[str, Any], student: Model, output: Path, group: Group) -> None:
    """Raise UserError where the disk or the memory is too small for the output and the states of the run.

    The processes of a group on this machine hold their share of the model, and each one the ends and their gradients
    for the length of a step. The memory of another device is not asked.
    """
    (checkpoint, spec), lora = student, asked["lora"]
    master = 4 * sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    states = 0 if lora else 3 * (3 + bool(asked["ema"])) * master  # the last two, and one being written
    check_space(output, checkpoint.nbytes + states)
    tokens = asked["batch"] * asked["length"]
    kept = 0 if asked["checkpointing"] else min(estimate_activations(spec, tokens), ACTIVATION_BYTES)
    merged = master if asked["rounds"] else 0  # a student with adapters answers with its weights merged
    whole = 8 * spec.shape.embedding_parameters if group.size > 1 else 0
    shared = kept + (checkpoint.nbytes if lora else (4 + bool(asked["ema"])) * master)
    needed = shared * group.local / group.size + group.local * (whole + merged * (bool(lora) or group.size > 1))
    free = free_memory() if asked["device"] == "cpu" else None
    if free is not None and needed > free:
        raise UserError(
            f"Training needs about {format_bytes(needed)} of memory, and {format_bytes(free)} are free: give --lora "
            "16, a smaller --batch, or use a larger machine."
        )


def settle_date(work: Path, resume: bool) -> str:
    """Return the date that chat templates see: today's, or for a run that goes on the one it began with."""
    if resume:
        with suppress(OSError, ValueError, TypeError, KeyError):  # open_work says what is wrong with the file
            return date.fromisoformat(json.loads((work / RUN_NAME).read_text(encoding="utf-8"))["now"]).isoformat()
    return date.today().isoformat()


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
        student.folder, student.config, (rows, length), datetime.fromisoformat(asked["now"]), seed=asked["seed"],
        field=asked["field"], plain=asked["plain"],
    )  # fmt: skip
    if options.plain and options.template is None:
        raise UserError(f"--plain does nothing: {student.folder} has no chat template that prompts would go through.")
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
    facts, each = job.stream.facts, job.batch_tokens * job.options.accumulate
    own, epochs = job.steps - job.text_steps, job.text_steps * each / facts.tokens
    console.note(
        f"{job.steps} steps of {each} tokens: {format_count(job.steps * each)} tokens, {epochs:.2g} times the text "
        f"({format_count(facts.tokens)} tokens of {facts.documents} documents); rate {job.options.rate:.2g}."
    )
    if own:
        console.note(f"The last {own} steps are on the student's own answers (rounds: {job.lessons[-1].round}).")
