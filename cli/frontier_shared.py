"""Points made by several processes at once: each takes levels of its own, and all read the one calibration's plans."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cli.console import Console, RunFailure
from cli.frontier_job import Variant, prepare_frontier, read_texts
from cli.frontier_plans import gather_plans
from cli.frontier_points import Bench, make_point
from cli.frontier_request import CompareRequest
from cli.frontier_store import POINT, POINTS
from cli.frontier_turns import follow_parent
from cli.measure import limit_threads
from compress.errors import UserError

GRACE = 30.0  # seconds that an interrupted process has to save what it was training
LOOK_SECONDS = 0.5  # between two looks at how far the others are


def share_work(bench: Bench, console: Console) -> None:
    """Make all points of all levels in processes of their own; the dense model's come first, as all compare with it.

    Raises UserError or RunFailure where a process did; any exception ends them all, and what is complete stays.
    """
    made = bench.made
    variants = list(made.list_variants())
    for variant in variants:
        if variant.level is None:
            make_point(bench, variant)
    bench.look()
    slices = slice_levels([level.name for level in made.levels], made.request.jobs)
    context = multiprocessing.get_context("spawn")  # threads of torch do not survive a fork
    pipes = [context.Pipe(duplex=False) for _ in slices]
    workers = [
        context.Process(target=make_share, args=(settle_request(bench, len(slices)), names, sender), daemon=True)
        for names, (_, sender) in zip(slices, pipes, strict=True)
    ]
    try:
        for worker, (_, sender) in zip(workers, pipes, strict=True):
            worker.start()
            sender.close()  # the other end of it belongs to the worker alone: its death ends the pipe
        for worker, (receiver, _) in zip(workers, pipes, strict=True):
            while not receiver.poll(LOOK_SECONDS):
                done = len(list((made.folder / POINTS).glob(f"*/{POINT}")))
                console.progress("points", min(done, len(variants) - 1), len(variants))
            raise_failure(receive(receiver))
            worker.join()
    except KeyboardInterrupt:
        wait_for(workers, GRACE)  # it reached them too: training saves its step
        raise
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
        wait_for(workers)


def wait_for(workers: Sequence[Any], seconds: float | None = None) -> None:
    """Wait until processes that were started have ended, each no longer than that."""
    for worker in workers:
        if worker.pid is not None:
            worker.join(seconds)


def slice_levels(names: Sequence[str], count: int) -> list[list[str]]:
    """Return at most `count` shares of the levels, large and small models spread over all."""
    return [list(names[place::count]) for place in range(min(count, len(names)))]


def settle_request(bench: Bench, count: int) -> CompareRequest:
    """Return what a process is asked: the same, with its part of the threads."""
    request = bench.made.request
    threads = request.speed.threads or max(1, (os.cpu_count() or 1) // count)
    return replace(request, jobs=1, overwrite=False, speed=replace(request.speed, threads=threads))


def make_share(request: CompareRequest, names: Sequence[str], sender: Any) -> None:
    """Make the points of some levels, as a process of its own; sends the kind and the sentence of a failure."""
    follow_parent()
    try:
        limit_threads(request.speed.threads)
        console = Console(quiet=True)
        made = prepare_frontier(request, console)
        texts = read_texts(made, console)
        bench = Bench(made, texts, gather_plans(made, texts, console), console)
        for variant in made.list_variants():
            if is_among(variant, names):
                make_point(bench, variant)
        sender.send(("", ""))
    except (UserError, RunFailure) as error:
        sender.send((type(error).__name__, str(error)))
    except KeyboardInterrupt:
        pass  # the first process ends them all, and says so


def is_among(variant: Variant, names: Sequence[str]) -> bool:
    """Tell whether a point belongs to one of these levels."""
    return variant.level is not None and variant.level.name in names


def receive(receiver: Any) -> tuple[str, str]:
    """Return what a process said at its end; one that said nothing was killed, or failed as nobody expected."""
    try:
        kind, sentence = receiver.recv()
    except EOFError:
        return RunFailure.__name__, "A process that made points ended early (out of memory?): give fewer --jobs."
    return str(kind), str(sentence)


def raise_failure(found: tuple[str, str]) -> None:
    """Raise what a process reported, if it failed."""
    kind, sentence = found
    if kind:
        raise UserError(sentence) if kind == UserError.__name__ else RunFailure(sentence)
