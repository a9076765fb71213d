"""What `evaluate` does: score a model on text and tasks, the dense one beside it. Imported only by running verbs."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.genai import GENAI_NAME
from backends.harness import TaskRequest, find_tasks, score_harness_tasks
from backends.likelihood import TextModel
from backends.tasks import TaskFile, TaskScore, read_choices, read_pairs, score_task
from cli.console import Console, RunFailure, align_table
from cli.graphs import evaluate_graphs
from cli.measure import limit_threads
from cli.quality import evaluate_folders
from cli.render import format_share, render_comparison
from cli.stream import (
    AUTO,
    GENERATION_NAME,
    ONNX,
    TORCH,
    Artifact,
    find_artifact,
    find_context,
    find_ends,
    find_setting,
    open_model,
    open_tokenizer,
)
from compress.checkpoint import open_checkpoint
from compress.checkpoint_source import CONFIG_NAME
from compress.recipe import Recipe
from compress.report import make_plain

DEFAULT_CONTEXT = 2048  # lm-eval assumes the same
NAME_WIDTH = 20  # of a task in the table
TOKENIZER_CONFIG = "tokenizer_config.json"
UNLIMITED = 2**40  # tokenizers whose model_max_length means nothing have about 1e30


@dataclass(frozen=True)
class Questions:
    """All tasks of one run: local files, and lm-eval's with its manager of tasks, None without any."""

    files: tuple[TaskFile, ...]
    request: TaskRequest
    manager: Any = None


@dataclass(frozen=True)
class Outcome:
    """One metric of one task, of the model asked about and of the dense one if there is one."""

    score: TaskScore
    dense: TaskScore | None

    @property
    def ratio(self) -> float | None:
        """The value as a share of the dense one, where higher is better and the dense is not 0."""
        if self.dense is None or not self.dense.value or not self.score.higher_is_better:
            return None
        return self.score.value / self.dense.value


def evaluate_all(
    sources: tuple[str, str | None], text: tuple[Path | None, Recipe], questions: Questions, threads: int | None,
    console: Console,
) -> dict[str, Any]:  # fmt: skip
    """Measure the first source on a text, if there is one, and on all questions; print and return what was found."""
    limit_threads(threads)
    found: dict[str, Any] = {}
    names = [source for source in (sources[1], sources[0]) if source is not None]
    if text[0] is not None and any(find_source(name).runtime == ONNX for name in names):
        models = [open_text_model(name, threads, console) for name in names]
        found |= evaluate_graphs(models, text[0], text[1], console)
    elif text[0] is not None:
        comparison = evaluate_folders(sources, text[0], text[1], console)
        console.show(render_comparison(comparison))
        found |= make_plain(comparison)
    if questions.manager or questions.files:
        outcomes = answer_questions(sources, questions, threads, console)
        console.show(render_outcomes(outcomes))
        found["tasks"] = list_outcomes(outcomes)
    return found


def gather_questions(
    request: TaskRequest, pairs: Sequence[Path], choices: Sequence[Path], console: Console
) -> Questions:
    """Read all task files, and find lm-eval and its tasks if there are some, before a model is opened."""
    files = [read_pairs(path, request.limit) for path in pairs]
    files += [read_choices(path, request.limit) for path in choices]
    with hush_harness(console.quiet):
        return Questions(tuple(files), request, find_tasks(request) if request.names else None)


def answer_questions(
    sources: tuple[str, str | None], questions: Questions, threads: int | None, console: Console
) -> list[Outcome]:
    """Score the first source, and the second as the dense model beside it; one model is in memory at a time."""
    scores = answer_source(sources[0], questions, threads, console)
    if sources[1] is None:
        return [Outcome(score, None) for score in scores]
    dense = {(one.task, one.metric): one for one in answer_source(sources[1], questions, threads, console)}
    return [Outcome(score, dense.get((score.task, score.metric))) for score in scores]


def answer_source(source: str, questions: Questions, threads: int | None, console: Console) -> list[TaskScore]:
    """Score one model; RunFailure when it computes no numbers."""
    model = open_text_model(source, threads, console)
    scores = []
    try:
        for task in questions.files:
            scores += score_task(model, task, console.progress)
        if questions.manager is not None:
            with hush_harness(console.quiet):
                scores += score_harness_tasks(model, questions.request, questions.manager, console.progress)
    except FloatingPointError as error:
        raise RunFailure(f"{source}: {error}.") from error
    return scores


@contextlib.contextmanager
def hush_harness(quiet: bool) -> Any:
    """Keep what lm-eval prints off standard output, and its log to errors; all of it away when quiet."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.CRITICAL if quiet else logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO() if quiet else sys.stderr):
            yield
    finally:
        logger.setLevel(level)


# The model


def open_text_model(source: str, threads: int | None, console: Console) -> TextModel:
    """Open a checkpoint with torch, or an exported folder with ONNX Runtime, and its tokenizer.

    A folder that holds both is evaluated by its weights: give its `onnx` folder for the graph. What no config says is
    assumed with a warning.
    """
    artifact = find_source(source)
    tokenizer = open_tokenizer(artifact)
    start, ends, context = find_start(artifact, tokenizer), find_ends(artifact), find_length(artifact)
    if start is None:
        console.warn(f"{source} names no start token: the first token of a text without a context is not scored.")
    if context is None:
        console.warn(f"{source} does not say its longest context: {DEFAULT_CONTEXT} tokens are assumed.")
    return TextModel(open_model(artifact, threads, 0), tokenizer, start, ends, context or DEFAULT_CONTEXT, source)


def find_source(source: str) -> Artifact:
    """Return what runs a source, which may be a hub id."""
    folder = Path(source)
    if not folder.exists():
        return find_artifact(open_checkpoint(source).folder, TORCH)
    return find_artifact(folder, TORCH if any(folder.glob("*.safetensors")) else AUTO)


def find_start(artifact: Artifact, tokenizer: Any) -> int | None:
    """Return the token that starts a text: bos, else eos, as in calibration, else what the tokenizer itself puts there.

    None where nothing says one.
    """
    for key in ("bos_token_id", "eos_token_id"):
        value, _ = find_setting(artifact, *((name, key) for name in (CONFIG_NAME, GENERATION_NAME, GENAI_NAME)))
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int):
            return value
    around: list[int] = tokenizer.encode("").ids
    return around[0] if around else None


def find_length(artifact: Artifact) -> int | None:
    """Return the longest sequence in tokens, by the model's config or its tokenizer's; None where neither says it."""
    known = find_context(artifact)
    if known is None:
        known, _ = find_setting(artifact, (TOKENIZER_CONFIG, "model_max_length"))
    return None if known is None or known > UNLIMITED else int(known)


# The table


def render_outcomes(outcomes: Sequence[Outcome]) -> str:
    """Return the table of tasks: value, uncertainty, and number of examples or the dense model beside."""
    beside = any(outcome.dense is not None for outcome in outcomes)
    head = ("task", "metric", "value", "dense", "of dense", "uncertainty", "examples")
    rows = [head, *(list_cells(outcome) for outcome in outcomes)]
    shown = [row[:-1] if beside else (*row[:3], *row[5:]) for row in rows]
    return "\n".join([align_table(shown), explain_columns(outcomes)])


def list_cells(outcome: Outcome) -> tuple[str, ...]:
    """Return one metric's cells."""
    score, dense = outcome.score, outcome.dense
    return (
        score.task if len(score.task) <= NAME_WIDTH else f"{score.task[: NAME_WIDTH - 1]}…",
        score.metric,
        f"{score.value:.4g}",
        "" if dense is None else f"{dense.value:.4g}",
        "" if outcome.ratio is None else format_share(outcome.ratio),
        format_uncertainty(score),
        str(score.examples or ""),
    )


def format_uncertainty(score: TaskScore) -> str:
    """Return a standard error or an interval."""
    if score.interval is not None:
        return f"{score.interval[0]:.3g} to {score.interval[1]:.3g}"
    return "" if score.error is None else f"± {score.error:.2g}"


def explain_columns(outcomes: Sequence[Outcome]) -> str:
    """Return what the uncertainties are, as a line below the table."""
    parts = []
    if any(outcome.score.interval is not None for outcome in outcomes):
        parts.append("intervals are 95 % bootstrap intervals of the examples")
    if any(outcome.score.error is not None for outcome in outcomes):
        parts.append("± is lm-eval's standard error")
    return f"Uncertainty: {'; '.join(parts)}." if parts else "Uncertainty: not known."


def list_outcomes(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return the outcomes as JSON."""
    return [
        {**make_plain(outcome.score), "dense": outcome.dense and make_plain(outcome.dense), "of_dense": outcome.ratio}
        for outcome in outcomes
    ]
