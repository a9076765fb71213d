"""Choosing training documents: at random, by the student's own loss, or by gradients like those of held-out text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from compress.errors import UserError
from compress.recover.data import DataStream, Document, DocumentView
from compress.recover.data_pack import shuffle_places
from compress.recover.functional import Model, embed_tokens, run_layers, stack_documents, sum_losses
from compress.weights import Weights

EASY, MEDIUM, HARD = "easy", "medium", "hard"
KINDS = (EASY, MEDIUM, HARD)
MEAN, BEST = "mean", "best"
TOKENS = 4096  # of documents that run together

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class FeatureOptions:
    """Which gradients describe a document: those by the projections `roles` of the last `layers` layers.

    Each gradient `[out, in]` is projected to `[size, size]`; sides not above `size` are kept whole.
    """

    layers: int = 2
    roles: tuple[str, ...] = ("o", "down")
    size: int = 16
    seed: int = 0


# By loss


def measure_losses(model: Model, stream: DataStream, report: Report | None = None) -> Tensor:
    """Return the model's mean loss of each document's counted tokens, `[documents]` in nats; NaN for one left out.

    A document longer than a row is judged by its first row.
    """
    losses = torch.full((len(stream.index),), float("nan"))
    done = 0
    for numbers in group_documents(stream):
        ids, weights = stack_documents([stream.document(number) for number in numbers])
        with torch.no_grad():
            sums = sum_losses(model, run_layers(model, embed_tokens(model, ids), model.layers), ids, weights)
        losses[numbers] = sums / weights.sum(1)
        done += len(numbers)
        if report is not None:
            report(done, stream.facts.documents)
    return losses


def group_documents(
    stream: DataStream, chosen: Sequence[int] | None = None, tokens: int | None = None
) -> Iterator[list[int]]:
    """Yield the numbers of documents in use, of similar length together, so that little is padding.

    `chosen`: only these; `tokens`: of a group with its padding (or one document alone).
    """
    counts, most = stream.token_counts().clip(max=stream.options.length), tokens or TOKENS
    if chosen is not None:
        own = np.zeros_like(counts)
        own[list(chosen)] = counts[list(chosen)]
        counts = own
    group: list[int] = []
    for number in counts.argsort(kind="stable").tolist():
        if counts[number] == 0:
            continue
        if group and (len(group) + 1) * int(counts[number]) > most:
            yield group
            group = []
        group.append(number)
    if group:
        yield group


def order_documents(losses: Tensor, kind: str) -> list[int]:
    """Return document numbers by difficulty: `easy` (easiest first), `hard`, or `medium` (nearest the median first).

    Documents whose loss is not a number are left out. UserError for another kind.
    """
    if kind not in KINDS:
        raise UserError(f"'{kind}' is no order of difficulty; give one of {', '.join(KINDS)}.")
    known = torch.nonzero(~losses.isnan())[:, 0]
    values = losses[known]
    keys = {EASY: values, HARD: -values, MEDIUM: (values - values.median()).abs() if len(values) else values}[kind]
    found: list[int] = known[keys.argsort(stable=True)].tolist()
    return found


def shuffle_documents(count: int, seed: int) -> list[int]:
    """Return all numbers below `count` in an order that the seed decides."""
    return [int(number) for number in shuffle_places(count, seed)]


def take_share(ranking: Sequence[int], sizes: Sequence[int], share: float) -> list[int]:
    """Return the first documents of a ranking that together have at most `share` of all tokens, at least one.

    By tokens, not documents: rankings differ in the lengths they prefer, and training costs tokens. One that is too
    long for what is left is passed over. `sizes`: tokens of every document; those with none are never taken.
    """
    left = share * sum(sizes)
    taken = []
    usable = [number for number in ranking if sizes[number] > 0]
    for number in usable:
        if sizes[number] <= left:
            taken.append(number)
            left -= sizes[number]
    return taken or usable[:1]


# By gradients


def draw_projections(model: Model, options: FeatureOptions) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """Return for each of the last layers and each role two matrices `[out, size]` and `[in, size]`.

    Gaussian with variance 1 / size: inner products are kept in the mean (Johnson-Lindenstrauss), here one side at a
    time, as the gradient of a linear map is a sum of outer products (LoGra, arXiv 2405.13954, section 3.1).
    """
    random = torch.Generator().manual_seed(options.seed)
    draw = partial(draw_side, size=options.size, random=random)
    return [
        {role: (draw(weights[role].shape[0]), draw(weights[role].shape[1])) for role in options.roles}
        for weights in last_layers(model, options)
    ]


def last_layers(model: Model, options: FeatureOptions) -> tuple[Weights, ...]:
    """Return the layers that features look at."""
    return model.layers[-min(options.layers, len(model.layers)) :]


def draw_side(rows: int, size: int, random: torch.Generator) -> Tensor:
    """Return a projection `[rows, size]`, the identity where it would not make anything smaller."""
    return torch.eye(rows) if rows <= size else torch.randn(rows, size, generator=random) / size**0.5


def iterate_features(model: Model, documents: Iterable[Document], options: FeatureOptions) -> Iterator[Tensor]:
    """Yield the projected gradient of each document's mean loss, `[features]`.

    W + P C Q^T with C = 0 is W, and the gradient by C is P^T (gradient by W) Q: only the small matrices are leaves, and
    the layers below run without a graph.
    """
    pairs = draw_projections(model, options)
    below = model.layers[: len(model.layers) - len(pairs)]
    for document in documents:
        ids, weights = stack_documents([document])
        with torch.no_grad():
            x = run_layers(model, embed_tokens(model, ids), below)
        yield differentiate_document(model, (x, ids, weights), pairs)


def gradient_features(model: Model, documents: Iterable[Document], options: FeatureOptions) -> Tensor:
    """Return the projected gradients of all documents, `[documents, features]`."""
    return torch.stack(list(iterate_features(model, documents, options)))


def differentiate_document(
    model: Model, document: tuple[Tensor, Tensor, Tensor], pairs: Sequence[dict[str, tuple[Tensor, Tensor]]]
) -> Tensor:
    """Return one document's gradients by the small matrices, `[features]`; `document`: stream, ids, weights."""
    x, ids, weights = document
    with torch.enable_grad():
        leaves = [
            {role: torch.zeros(out.shape[1], into.shape[1], requires_grad=True) for role, (out, into) in own.items()}
            for own in pairs
        ]
        layers = [
            {**dense, **{role: dense[role] + own[role][0] @ core[role] @ own[role][1].T for role in core}}
            for dense, own, core in zip(model.layers[-len(pairs) :], pairs, leaves, strict=True)
        ]
        last = run_layers(model, x, layers, len(model.layers) - len(pairs))
        loss = sum_losses(model, last, ids, weights)[0] / weights[:, 1:].sum()
        flat = [leaf for own in leaves for leaf in own.values()]
        return torch.cat([one.flatten() for one in torch.autograd.grad(loss, flat)])


def score_similarity(features: Tensor, targets: Tensor, pool: str = MEAN) -> Tensor:
    """Return how much each document's gradient points where those of `targets` do, `[documents]` in [-1, 1].

    Cosines, since the gradients of short documents are long; `mean` over all targets, or the `best` of them. As LESS
    (arXiv 2402.04333, section 4), with plain gradients at one checkpoint instead of Adam's at several.
    """
    if pool not in (MEAN, BEST):
        raise UserError(f"'{pool}' does not say how similarities are pooled; give {MEAN} or {BEST}.")
    cosines = torch.nn.functional.normalize(features, dim=1) @ torch.nn.functional.normalize(targets, dim=1).T
    return cosines.mean(1) if pool == MEAN else cosines.amax(1)


def rank_by_gradient(
    model: Model, stream: DataStream, targets: DataStream, options: FeatureOptions, report: Report | None = None
) -> list[int]:
    """Return the numbers of a stream's documents, those most like the `targets` first."""
    numbers = stream.used()
    goals = gradient_features(model, DocumentView(targets, targets.used()), options)
    scores = []
    for features in iterate_features(model, DocumentView(stream, numbers), options):
        scores.append(score_similarity(features[None], goals))
        if report is not None:
            report(len(scores), len(numbers))
    return [numbers[place] for place in torch.cat(scores).argsort(descending=True, stable=True).tolist()]
