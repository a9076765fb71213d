"""lm-eval on any runtime: its requests answered by log-likelihoods and greedy text, its task files run offline.

lm-eval (EleutherAI's language model evaluation harness, extra `eval`) is optional: nothing here imports it before it is
asked for.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from backends.likelihood import Progress, TextModel, continue_text, encode_pair, roll_text, score_rows
from backends.tasks import TaskScore
from compress.errors import UserError

MAX_NEW = 256  # tokens that lm-eval generates where a task does not say
RESAMPLES = 1000  # for standard errors that lm-eval knows no formula for
NEW_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # in the order lm-eval takes them


# Of each of these a task file must have one.
NEEDED_FIELDS = (
    ("dataset_path", "custom_dataset", "class"), ("test_split", "validation_split", "class"),
    ("doc_to_text", "class"),
)  # fmt: skip


@dataclass(frozen=True)
class TaskRequest:
    """Names of tasks, a folder with YAML files of more, examples of each task (None: all), and few-shot examples."""

    names: tuple[str, ...]
    folder: Path | None = None
    limit: int | None = None
    shots: int | None = None


class Answers:
    """What lm-eval asks of a model, answered; `failure` keeps an error of the model apart from those of a task."""

    def __init__(self, model: TextModel, progress: Progress | None = None) -> None:
        self.model, self.progress = model, progress
        self.failure: BaseException | None = None

    def score_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Return log-likelihood in nats, and whether greedy decoding would say it, of continuations of contexts."""
        rows = [encode_pair(self.model, *pair) for pair in pairs]
        return [(score.total, score.greedy) for score in score_rows(self.model, rows, self.progress)]

    def score_texts(self, texts: Sequence[str]) -> list[float]:
        """Return the log-likelihood of whole texts of any length, in nats."""
        rows = [roll_text(self.model, text) for text in texts]
        scores = iter(score_rows(self.model, [row for own in rows for row in own], self.progress))
        return [sum(next(scores).total for _ in own) for own in rows]

    def continue_texts(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """Return the greedy continuations of prompts, each with its own generation settings."""
        texts = []
        for prompt, settings in requests:
            texts.append(continue_text(self.model, prompt, *read_settings(settings)))
            if self.progress is not None:
                self.progress("generate", len(texts), len(requests))
        return texts


def read_settings(settings: Mapping[str, Any]) -> tuple[list[str], int]:
    """Return the stop strings and the most new tokens of a task's generation_kwargs; UserError for sampling."""
    if settings.get("do_sample", float(settings.get("temperature") or 0) > 0):
        raise UserError(
            "The task samples its answers (do_sample), and Lightpress only takes the likeliest token: set do_sample: "
            "false in the task's generation_kwargs."
        )
    until = settings.get("until") or []
    count = next((settings[key] for key in NEW_KEYS if settings.get(key) is not None), MAX_NEW)
    return [until] if isinstance(until, str) else list(until), int(count)


def wrap_answers(answers: Answers) -> Any:
    """Return an `lm_eval.api.model.LM` that passes every request on; it stands on that class's methods alone."""
    base: Any = import_harness("lm_eval.api.model").LM

    def guard(ask: Any, given: Any) -> Any:
        try:
            return ask(given)
        except BaseException as error:
            answers.failure = error
            raise

    class HarnessModel(base):  # type: ignore[misc]
        """lm-eval's view of a model."""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            """Answer requests of (context, continuation)."""
            return guard(answers.score_pairs, [request.args for request in requests])  # type: ignore[no-any-return]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            """Answer requests of (text,)."""
            return guard(answers.score_texts, [request.args[0] for request in requests])  # type: ignore[no-any-return]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            """Answer requests of (prompt, generation_kwargs)."""
            return guard(answers.continue_texts, [request.args for request in requests])  # type: ignore[no-any-return]

    return HarnessModel()


def import_harness(name: str = "lm_eval") -> Any:
    """Import a module of lm-eval; UserError when it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"--tasks needs lm-eval, which cannot be imported ({error}): run `pip install -e .[eval]` in "
            "Lightpress's own folder, or use --pairs or --choices, which need nothing else."
        ) from error


def find_tasks(request: TaskRequest) -> Any:
    """Return lm-eval's manager of tasks, which knows all names asked for; UserError for a name it does not know.

    lm-eval's own tasks are looked through only for names that the folder lacks: they take seconds.
    """
    manager = import_harness("lm_eval.tasks").TaskManager
    folder = request.folder
    if folder is not None:
        check_task_folder(folder, request.names)
        found = manager(include_path=str(folder), include_defaults=False)
        if set(request.names) <= set(found.all_tasks):
            return found
    found = manager(include_path=None if folder is None else str(folder))
    for name in request.names:
        if name not in found.all_tasks:
            raise UserError(explain_unknown(name, folder, found.all_tasks))
    return found


def check_task_folder(folder: Path, names: Sequence[str]) -> None:
    """Raise UserError when there is no such folder, or the file of a task there is no YAML or lacks a field.

    lm-eval passes over a file that it cannot read, and over a missing field until something else breaks.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of task files; give one that holds the tasks' YAML files.")
    for path in sorted(folder.rglob("*.yaml")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if any(name in text for name in names):
            check_task_file(path, text, names)


def check_task_file(path: Path, text: str, names: Sequence[str]) -> None:
    """Raise UserError when a file that speaks of a task is no YAML, or is the task's own and lacks a field."""
    try:
        data = yaml.load(text, yaml.BaseLoader)  # which takes any tag for text
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f" at line {place.line + 1}" if place else ""
        raise UserError(f"{path}: is not valid YAML{where}; repair it.") from error
    if not isinstance(data, dict) or data.get("task") not in names or "include" in data:
        return
    for fields in NEEDED_FIELDS:
        if not any(field in data for field in fields):
            raise UserError(f"{path}: the task has no '{fields[0]}', which lm-eval needs; add it.")


def explain_unknown(name: str, folder: Path | None, known: Sequence[str]) -> str:
    """Return the sentence for a task that nobody knows."""
    near = difflib.get_close_matches(name, known, 3)
    hint = f"did you mean {' or '.join(near)}?" if near else "check the name."
    if folder is None:
        return f"lm-eval knows no task '{name}'; give --task-folder for tasks of your own, or {hint}"
    return f"Neither {folder} nor lm-eval has a task '{name}': its YAML file must say `task: {name}`; {hint}"


def score_harness_tasks(
    model: TextModel, request: TaskRequest, manager: Any, progress: Progress | None = None
) -> list[TaskScore]:
    """Run lm-eval's tasks on a model, with what `find_tasks` found; one score for each metric of each task and group.

    Raises UserError when a task cannot be made: its data or fields lack.
    """
    harness = import_harness("lm_eval.evaluator")
    answers = Answers(model, progress)
    try:
        results = harness.simple_evaluate(
            wrap_answers(answers), tasks=list(request.names), task_manager=manager, limit=request.limit,
            num_fewshot=request.shots, bootstrap_iters=RESAMPLES, log_samples=False,
        )  # fmt: skip
    except Exception as error:
        if error is answers.failure or isinstance(error, MemoryError):
            raise
        raise UserError(explain_failure(request, error)) from error
    return list_scores(results)


def explain_failure(request: TaskRequest, error: Exception) -> str:
    """Return the sentence for a task that lm-eval cannot make or score."""
    names = " or ".join(request.names)
    reason = " ".join(str(error).split())[:300].rstrip(".") or "no reason given"
    if type(error).__module__.split(".")[0] in ("datasets", "huggingface_hub") or isinstance(error, OSError):
        return (
            f"The data of {names} cannot be read ({type(error).__name__}: {reason}); the network is not used unless "
            "HF_HUB_OFFLINE=0 and HF_DATASETS_OFFLINE=0 are set, so download it before, or name local data_files."
        )
    return f"lm-eval cannot run {names} ({type(error).__name__}: {reason}); check the task's YAML file and its data."


def list_scores(results: Mapping[str, Any]) -> list[TaskScore]:
    """Return lm-eval's results as scores, task by task."""
    scores = []
    for task, values in results["results"].items():
        better = results.get("higher_is_better", {}).get(task, {})
        count = int(results.get("n-samples", {}).get(task, {}).get("effective", 0))
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            name = metric if kind == "none" else f"{metric},{kind}"
            known = float(error) if isinstance(error, int | float) else None
            higher = better.get(metric) is not False
            scores.append(TaskScore(task, name, float(value), count, error=known, higher_is_better=higher))
    return scores
