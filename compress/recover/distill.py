"""Less data for the same training: rows chosen from a stream, or synthetic ones, each with its provenance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from compress.errors import UserError
from compress.recover.data import DataStream, Document, DocumentView
from compress.recover.functional import Model
from compress.recover.select import (
    FeatureOptions,
    measure_losses,
    order_documents,
    rank_by_gradient,
    shuffle_documents,
    take_share,
)
from compress.recover.trajectory import Samples, TrajectoryOptions, fits_samples, make_samples, train_expert
from compress.recover.trajectory_exchange import exchange_rows
from compress.recover.trajectory_learn import distil_prompts
from compress.recover.trajectory_project import Outer, check_text, count_round_trip, write_samples
from compress.recover.trajectory_rows import match_rows

RANDOM, LOSS, GRADIENT, TRAJECTORY = "random", "loss", "gradient", "trajectory"
METHODS = (RANDOM, LOSS, GRADIENT, TRAJECTORY)

Report = Callable[[str, int, int], None]
Row = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What is asked for: a `share` of the tokens by a `method`; `pick`: which losses; `features`: which gradients."""

    method: str
    share: float
    seed: int = 0
    pick: str = "medium"
    features: FeatureOptions = field(default_factory=FeatureOptions)
    trajectory: TrajectoryOptions = field(default_factory=TrajectoryOptions)

    def __post_init__(self) -> None:
        """Refuse an unknown method and a share that is none."""
        if self.method not in METHODS:
            raise UserError(f"--method {self.method} is not one of {', '.join(METHODS)}.")
        if not 0 < self.share <= 1:
            raise UserError(f"--share {self.share:g} is no share of the tokens; give more than 0 and at most 1.")


@dataclass(frozen=True)
class Outcome:
    """Rows to write, and what is known of them: numbers by name, for the user and the provenance."""

    rows: Iterator[Row]
    facts: Mapping[str, Any]


def choose_rows(
    request: Request, model: Model | None, stream: DataStream, targets: DataStream | None, report: Report
) -> Outcome:
    """Choose whole documents; the model is needed for losses and gradients, `targets` for gradients."""
    ranking = rank_documents(request, model, stream, targets, report)
    sizes = stream.token_counts().tolist()
    taken = sorted(take_share(ranking, sizes, request.share))
    tokens = sum(sizes[number] for number in taken)
    facts = {"documents": len(taken), "tokens": tokens, "share": tokens / sum(sizes)}
    return Outcome(copy_rows(stream, taken, request), facts)


def rank_documents(
    request: Request, model: Model | None, stream: DataStream, targets: DataStream | None, report: Report
) -> list[int]:
    """Return document numbers, those to take first in front."""
    if request.method == RANDOM:
        return shuffle_documents(len(stream.index), request.seed)
    assert model is not None
    if request.method == LOSS:
        losses = measure_losses(model, stream, lambda done, total: report("measure losses", done, total))
        return order_documents(losses, request.pick)
    assert targets is not None
    return rank_by_gradient(
        model, stream, targets, request.features, lambda done, total: report("compare gradients", done, total)
    )


def copy_rows(stream: DataStream, numbers: Sequence[int], request: Request) -> Iterator[Row]:
    """Yield rows as they are in their files, with where they are from; one that was synthetic stays so."""
    for number in numbers:
        row = stream.index.read(number)[0]
        own = {"method": request.method, "seed": request.seed, "document": stream.index.place(number)}
        if "provenance" in row:
            own["source"] = row["provenance"]
        yield {**row, "synthetic": bool(row.get("synthetic", False)), "provenance": own}


def distil_rows(
    request: Request, model: Model, stream: DataStream, tokenizer: Any, barred: Sequence[int], report: Report
) -> Outcome:
    """Learn prompts by trajectory matching and yield them as text with their answers.

    `barred`: ids that no prompt may hold. Raises UserError where no document is long enough.
    """
    options, view = request.trajectory, DocumentView(stream, stream.used())
    candidates = draw_candidates(request, stream)
    states = [
        train_expert(model, view, options, options.seed * 1009 + number + 1, report)
        for number in range(options.experts)
    ]
    whole = int(stream.token_counts().sum())
    documents, budget = list(candidates.values()), request.share * whole
    taken = match_rows(model, documents, states, options, budget, report)
    better = exchange_rows(model, documents, taken, options, budget, report)
    numbers = sorted(list(candidates)[place] for place in better.taken)
    samples = make_samples({one: candidates[one] for one in numbers}, options, len(stream.options.start))
    found = distil_prompts(model, samples, states, options, Outer(barred, check_text(samples, tokenizer), report))
    texts = write_samples(samples, found.ids, tokenizer, stream.options.end)
    begin, end = samples.learned
    facts = {
        "documents": len(texts),
        "tokens": sum(samples.sizes),
        "share": sum(samples.sizes) / whole,
        "candidates": len(candidates),
        "exchanged": better.kept,
        "lag_matched": better.first,
        "lag_exchanged": better.last,
        "changed": float((found.ids[:, begin:end] != samples.ids[:, begin:end]).float().mean()),
        "matching_start": found.first,
        "matching_real": found.real,
        "matching_learned": found.learned,
        "matching_nearest": found.nearest,
        "matching_tokens": found.tokens,
        "round_trip": count_round_trip(samples, found.ids, texts, tokenizer),
    }
    return Outcome(mark_rows(texts, samples, request, stream), facts)


def draw_candidates(request: Request, stream: DataStream) -> dict[int, Document]:
    """Return documents by number, those long enough, at most `candidates` of them at random; UserError for chats."""
    options, fixed = request.trajectory, len(stream.options.start)
    found: dict[int, Document] = {}
    for number in shuffle_documents(len(stream.index), request.seed):
        one = stream.document(number)
        if not fits_samples(one, options, fixed):
            continue
        if "messages" in stream.index.read(number)[0]:
            raise UserError(
                f"{stream.index.place(number)} is a chat, and trajectories are matched on texts and on rows with "
                "prompt and response; give those, or choose chats with --method loss or gradient."
            )
        found[number] = one
        if len(found) == options.candidates:
            break
    make_samples(found, options, fixed)  # refuses before the experts are trained
    return found


def mark_rows(
    texts: Sequence[Mapping[str, str]], samples: Samples, request: Request, stream: DataStream
) -> Iterator[Row]:
    """Yield synthetic rows with their provenance: a learned prompt looks like no text that anybody wrote."""
    for text, number in zip(texts, samples.numbers, strict=True):
        own = {"method": request.method, "seed": request.seed, "document": stream.index.place(number)}
        yield {**text, "synthetic": True, "provenance": {**own, "learned": "the prompt's first tokens"}}
