"""What every runtime offers, and what needs no more than that: greedy generation and the measurement of speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Logits = NDArray[np.floating[Any]]
SEED = 0


class Runtime(Protocol):
    """A model that can be run: prefill a prompt, then decode token by token; a cache fits only its own runtime."""

    @property
    def vocab(self) -> int:
        """Number of token ids."""
        ...

    def prefill(self, ids: Ids, mask: Ids | None = None, every: bool = True) -> tuple[Logits, Any]:
        """Run a prompt `[batch, sequence]`; return logits `[batch, sequence, vocab]` and the cache.

        Without `every`, a runtime may leave out all logits but those of the last position.
        """
        ...

    def decode(self, ids: Ids, cache: Any) -> tuple[Logits, Any]:
        """Run further tokens `[batch, new]`; return their logits `[batch, new, vocab]` and the longer cache."""
        ...


@dataclass(frozen=True)
class Speed:
    """Tokens per second: medians over the rounds, with the slowest and the fastest round."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    prefill_range: tuple[float, float]
    decode_range: tuple[float, float]
    rounds: int


def generate_greedily(
    model: Runtime, ids: Ids | Sequence[int], count: int, stop: Collection[int] = frozenset()
) -> list[int]:
    """Return up to `count` new ids after one prompt, each the most likely; a stop id is the last one returned."""
    logits, cache = model.prefill(np.asarray(ids, dtype=np.int64).reshape(1, -1), every=False)
    chosen: list[int] = []
    while len(chosen) < count:
        chosen.append(int(logits[0, -1].argmax()))
        if chosen[-1] in stop or len(chosen) == count:
            break
        logits, cache = model.decode(np.array([chosen[-1:]], dtype=np.int64), cache)
    return chosen


def measure(model: Runtime, prompt: int, new: int, rounds: int) -> Speed:
    """Measure one model: prefill of `prompt` tokens, then `new` decode steps, batch 1, `rounds` times."""
    return measure_all([model], prompt, new, rounds)[0]


def measure_pair(first: Runtime, second: Runtime, prompt: int, new: int, rounds: int) -> tuple[Speed, Speed]:
    """Measure two models in alternating rounds, so that a change in the machine's load meets both alike."""
    speeds = measure_all([first, second], prompt, new, rounds)
    return speeds[0], speeds[1]


def measure_all(models: Sequence[Runtime], prompt: int, new: int, rounds: int) -> list[Speed]:
    """Measure any number of models round by round on the same random token ids; ValueError unless all counts >= 1."""
    if min(prompt, new, rounds) < 1:
        raise ValueError("prompt, new and rounds must be at least 1")
    vocab = min(model.vocab for model in models)
    ids = make_ids(vocab, 1, prompt + new)
    for model in models:  # a round that does not count: the first one pays for memory and caches
        time_round(model, ids, prompt)
    seconds: list[list[tuple[float, float]]] = [[] for _ in models]
    for number in range(rounds):
        order = range(len(models)) if number % 2 == 0 else reversed(range(len(models)))
        for index in order:
            seconds[index].append(time_round(models[index], ids, prompt))
    return [summarise_rounds(own, prompt, new) for own in seconds]


def make_ids(vocab: int, batch: int, length: int) -> Ids:
    """Return random token ids `[batch, length]`, always the same."""
    return np.random.default_rng(SEED).integers(0, vocab, (batch, length), dtype=np.int64)


def time_turn(model: Runtime, ids: Ids, prompt: int, least: float) -> tuple[float, float]:
    """Return the mean seconds of rounds that last `least` seconds together, after one to wake threads and caches.

    Where a single round lasts that long, it alone counts.
    """
    first = time_round(model, ids, prompt)
    if sum(first) >= least:
        return first
    rounds: list[tuple[float, float]] = []
    while sum(map(sum, rounds)) < least:
        rounds.append(time_round(model, ids, prompt))
    return statistics.fmean(one for one, _ in rounds), statistics.fmean(two for _, two in rounds)


def time_round(model: Runtime, ids: Ids, prompt: int) -> tuple[float, float]:
    """Return the seconds of one prefill of `ids[:, :prompt]` and of decoding the rest one by one."""
    start = time.perf_counter()
    _, cache = model.prefill(ids[:, :prompt], every=False)
    middle = time.perf_counter()
    for place in range(prompt, ids.shape[1]):
        _, cache = model.decode(ids[:, place : place + 1], cache)
    return middle - start, time.perf_counter() - middle


def summarise_rounds(seconds: Sequence[tuple[float, float]], prompt: int, new: int) -> Speed:
    """Turn the seconds of each round into tokens per second."""
    prefill = [prompt / first for first, _ in seconds]
    decode = [new / second for _, second in seconds]
    return Speed(
        statistics.median(prefill),
        statistics.median(decode),
        (min(prefill), max(prefill)),
        (min(decode), max(decode)),
        len(seconds),
    )
