"""How good a point is, against the dense model: text, tasks, and text that it generates. Imported by running verbs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from backends.eager import load_eager, run_window
from backends.runtime import Runtime, generate_greedily
from backends.tasks import TaskScore, bootstrap_share
from cli.console import Console
from cli.estimate import free_memory
from cli.measure import Model
from cli.tasks import Questions, answer_source
from compress.checkpoint import Checkpoint
from compress.decoder import compute_logits
from compress.evaluate import compare_logits, fill_hidden, stream_logits
from compress.frontier import count_agreed, measure_repetition
from compress.hidden import HiddenStore
from compress.report_frontier import Interval, Sample
from compress.text import Windows
from compress.weights import read_head

PROMPT, NEW = 24, 48  # tokens of a prompt, and of its continuation
EAGER_SHARE = 0.6  # of the free memory that a model may take to generate


@dataclass(frozen=True)
class DenseView:
    """The dense model's last stream on the evaluation text `[windows, length, hidden]`, and its continuations."""

    model: Model
    windows: Windows
    hidden: Tensor
    prompts: tuple[tuple[int, ...], ...]
    continued: tuple[tuple[int, ...], ...]

    def logits(self) -> Any:
        """Yield logits `[length - 1, vocab]` of each window, from the stored stream: the layers are not run again."""
        checkpoint, spec = self.model
        ends = read_head(checkpoint, spec, torch.float32)
        for row in self.hidden:
            yield compute_logits(spec, ends, row[:-1])


def view_dense(model: Model, windows: Windows, samples: int, path: Path, console: Console) -> DenseView:
    """Run the dense model on the evaluation text and let it continue prompts, or read what an earlier run saved."""
    prompts = choose_prompts(windows, samples)
    if path.is_file():
        stored = load_file(path)
        rows = tuple(tuple(row) for row in stored["continued"].tolist())
        return DenseView(model, windows, stored["hidden"], prompts if rows else (), rows)
    checkpoint, spec = model
    with HiddenStore((*windows.ids.shape, spec.shape.hidden)) as store:
        fill_hidden(checkpoint, spec, windows, store, console.progress)
        hidden = store.read(0, len(windows.ids))
    if prompts and not fits_memory(checkpoint):
        console.warn("the dense model does not fit into memory as a whole: no text is generated to compare.")
        prompts = ()
    continued = continue_prompts(load_eager(checkpoint), prompts, count_new(windows)) if prompts else []
    table = torch.tensor(continued, dtype=torch.int64) if continued else torch.zeros(0, 1, dtype=torch.int64)
    partial = path.with_name(f".{path.name}.partial")
    save_file({"hidden": hidden.contiguous(), "continued": table}, partial)
    partial.replace(path)
    return DenseView(model, windows, hidden, prompts, tuple(map(tuple, continued)))


def fits_memory(checkpoint: Checkpoint) -> bool:
    """Tell whether a model can be loaded as a whole, in float32."""
    free, values = free_memory(), sum(info.count for info in checkpoint.tensors.values())
    return free is None or 4 * values < EAGER_SHARE * free


# Text


def compare_checkpoint(dense: DenseView, model: Model, console: Console) -> Tensor:
    """Return sums over each window's tokens `[windows, 4]` (see `compare_logits`), one layer in memory."""
    checkpoint, spec = model
    with HiddenStore((*dense.windows.ids.shape, spec.shape.hidden)) as store:
        fill_hidden(checkpoint, spec, dense.windows, store, console.progress)
        return add_windows(dense, stream_logits(checkpoint, spec, store))


def compare_graph(dense: DenseView, graph: Runtime) -> Tensor:
    """Return the sums `[windows, 4]` of an exported graph, whose weights are others than the checkpoint's."""
    return add_windows(dense, (run_window(graph, ids) for ids in dense.windows.ids))


def compare_itself(dense: DenseView) -> Tensor:
    """Return the sums `[windows, 4]` of the dense model against itself."""
    return add_windows(dense, dense.logits())


def add_windows(dense: DenseView, other: Any) -> Tensor:
    """Return the sums of each window."""
    rows = zip(dense.logits(), other, dense.windows.ids, strict=True)
    return torch.stack([compare_logits(first, second, ids[1:]) for first, second, ids in rows])


# Tasks


def answer_tasks(
    folder: Path, questions: Questions | None, threads: int | None, console: Console
) -> dict[str, Interval]:
    """Return task -> accuracy with its interval; a metric other than `acc` is named behind the task."""
    if questions is None:
        return {}
    scores = answer_source(str(folder), questions, threads, console)
    return {name_task(score): bound_score(score) for score in scores if score.higher_is_better}


def name_task(score: TaskScore) -> str:
    """Return a task's name, with its metric where that is not plain accuracy."""
    return score.task if score.metric == "acc" else f"{score.task} {score.metric}"


def bound_score(score: TaskScore) -> Interval:
    """Return a score with its interval, that of a normal distribution where only the standard error is known."""
    if score.interval is not None:
        return Interval(score.value, *score.interval)
    if score.error is None:
        return Interval(score.value)
    reach = 1.96 * score.error
    return Interval(score.value, score.value - reach, score.value + reach)


def bound_shares(shares: Mapping[str, float], examples: int) -> dict[str, Interval]:
    """Return shares of right answers to `examples` questions each with their 95 % bootstrap intervals."""
    return {
        name: Interval(share, *bootstrap_share(round(share * examples), examples)) for name, share in shares.items()
    }


# Generated text


def choose_prompts(windows: Windows, count: int) -> tuple[tuple[int, ...], ...]:
    """Return the first tokens of `count` windows, spread over the text."""
    places = sorted({round(place) for place in torch.linspace(0, len(windows.ids) - 1, count).tolist()})
    length = min(PROMPT, max(1, windows.ids.shape[1] // 2))
    return tuple(tuple(windows.ids[place, :length].tolist()) for place in places)


def count_new(windows: Windows) -> int:
    """Return how many tokens are generated: windows fit into the model's context."""
    length = windows.ids.shape[1]
    return max(1, min(NEW, length - length // 2))


def continue_prompts(model: Runtime, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Return the greedy continuations of prompts; the end of a text is a token as others are."""
    return [generate_greedily(model, list(prompt), count) for prompt in prompts]


def make_samples(
    dense: DenseView, continued: Sequence[Sequence[int]], tokenizer: Any
) -> tuple[Sample, ...]:
    """Return continuations as text beside the dense model's."""
    return tuple(
        Sample(
            tokenizer.decode(list(prompt)), tokenizer.decode(list(own)), count_agreed(reference, own), len(own),
            measure_repetition(own),
        )
        for prompt, reference, own in zip(dense.prompts, dense.continued, continued, strict=True)
    )  # fmt: skip


def sample_checkpoint(dense: DenseView, checkpoint: Checkpoint, tokenizer: Any) -> tuple[Sample, ...]:
    """Return what a checkpoint makes of the prompts, run by torch."""
    if not dense.prompts:
        return ()
    return make_samples(
        dense, continue_prompts(load_eager(checkpoint), dense.prompts, count_new(dense.windows)), tokenizer
    )


def sample_itself(dense: DenseView, tokenizer: Any) -> tuple[Sample, ...]:
    """Return what the dense model made of the prompts: it is not asked again."""
    return make_samples(dense, dense.continued, tokenizer)


def sample_graph(dense: DenseView, graph: Runtime, tokenizer: Any) -> tuple[Sample, ...]:
    """Return what an exported graph makes of the prompts."""
    return make_samples(dense, continue_prompts(graph, dense.prompts, count_new(dense.windows)), tokenizer)
