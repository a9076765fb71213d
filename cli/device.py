"""What `evaluate` and `bench` do with `--device npu`: models loaded whole onto the device and run there by torch.

The flag itself is light to import; the libraries are imported by the functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.console import Console, RunFailure
from cli.request import BenchPlan, BenchSize
from compress.errors import UserError
from compress.recipe import Recipe
from compress.report import Comparison

if TYPE_CHECKING:
    from backends.eager import EagerModel, Place
    from cli.measure import Model

CPU = "cpu"
DeviceOption = Annotated[
    str, typer.Option("--device", help="cpu, or npu: an Ascend NPU, run by torch-npu (extra `npu`) with CANN.")
]


def evaluate_on(
    device: str, sources: tuple[str, str | None], text: tuple[Path | None, Recipe], tasks: bool, console: Console
) -> dict[str, Any]:
    """Measure quality on a text as the device computes it, against the second source if there is one; print it too.

    Raises UserError without a text, or where `tasks` were asked for.
    """
    from cli.render import render_comparison
    from compress.report import make_plain

    if text[0] is None:
        raise UserError(
            f"--device {device} measures perplexity only: give --text FILE, or ask tasks with --device cpu."
        )
    with explain_memory():
        found = compare_on(device, sources, (text[0], text[1]), console)
    console.show(render_comparison(found))
    plain: dict[str, Any] = make_plain(found)
    return plain


def compare_on(device: str, sources: tuple[str, str | None], text: tuple[Path, Recipe], console: Console) -> Comparison:
    """Measure quality of the first source, against the second if there is one."""
    from backends.eager import compare_placed, measure_placed
    from cli import measure
    from cli.quality import open_models
    from compress.text import load_tokenizer, read_windows

    models, recipe = open_models(sources), text[1]
    check_vocabularies(models)
    checkpoint, spec = models[-1]
    size = (recipe.windows, min(recipe.length, *(own.max_positions for _, own in models)))
    windows = read_windows(text[0], load_tokenizer(checkpoint.folder), dict(spec.config), size, recipe.field)
    place, loaded = load_models(device, models, console)
    note = f"Quality: on {windows.tokens} tokens, on {describe_place(place)}; text: {windows.source}."
    if len(loaded) == 1:
        return Comparison(None, measure.merge_metrics(models[0], measure_placed(loaded[0], windows), None), note)
    qualities = compare_placed(loaded[0], loaded[1], windows)
    sides = [measure.merge_metrics(model, own, None) for model, own in zip(models, qualities, strict=True)]
    return Comparison(sides[0], sides[1], note)


def bench_on(device: str, sources: tuple[str, str | None], plan: BenchPlan, console: Console) -> dict[str, Any]:
    """Measure speed on the device, of the first source, in rounds with the second if there is one; print it too."""
    from cli.render import render_comparison
    from compress.report import make_plain

    with explain_memory():
        found = time_on(device, sources, read_size(device, plan), console)
    console.show(render_comparison(found))
    plain: dict[str, Any] = make_plain(found)
    return plain


def read_size(device: str, plan: BenchPlan) -> BenchSize:
    """Return the one prompt that is timed on a device; UserError for a plan of several, or of batches."""
    if len(plan.prompts) > 1 or plan.batches != (1,) or plan.threads != (None,):
        raise UserError(
            f"--device {device} times one prompt length at batch 1, on no CPU threads of its own; give a single "
            "--prompt, without --batch and --threads."
        )
    size = BenchSize(rounds=plan.rounds)
    return replace(size, prompt=plan.prompts[0] if plan.prompts else size.prompt, new=plan.new or size.new)


def time_on(device: str, sources: tuple[str, str | None], size: BenchSize, console: Console) -> Comparison:
    """Measure speed of the first source, in alternating rounds with the second if there is one."""
    from backends.eager import read_peak_memory
    from backends.runtime import measure_all
    from cli import measure
    from cli.quality import open_models

    models = open_models(sources)
    size = measure.fit_size(size, models)
    place, loaded = load_models(device, models, console)
    rates = measure_all(loaded, size.prompt, size.new, size.rounds)
    note = (
        f"Speed: torch on {describe_place(place)}, batch 1, {size.prompt} prompt and {size.new} new tokens, median of "
        f"{size.rounds} alternating rounds."
    )
    peak = read_peak_memory(place)
    memory = f" Memory: at most {peak / 2**20:.1f} MiB on the device." if peak is not None else ""
    sides = [measure.merge_metrics(model, None, rate) for model, rate in zip(models, rates, strict=True)]
    return Comparison(sides[0] if len(sides) > 1 else None, sides[-1], speed_note=note + memory)


def load_models(device: str, models: list[Model], console: Console) -> tuple[Place, list[EagerModel]]:
    """Open the device for all models, say which kernels they run on, and load them."""
    from backends.eager import load_placed, open_place

    place = open_place(device, [spec for _, spec in models])
    for note in place.notes:
        console.note(note)
    return place, [load_placed(checkpoint, spec, place) for checkpoint, spec in models]


@contextmanager
def explain_memory() -> Iterator[None]:
    """Turn a device without memory left into a sentence."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunFailure("out of memory on the device; use shorter windows or prompts, or --device cpu.") from error


def describe_place(place: Place) -> str:
    """Return the device and its number format in a few words."""
    return f"{place.name} in {str(place.dtype).removeprefix('torch.')}"


def check_vocabularies(models: list[Model]) -> None:
    """Raise UserError when two models differ in their number of tokens."""
    sizes = {spec.shape.vocab for _, spec in models}
    if len(sizes) > 1:
        counts = " and ".join(f"{checkpoint.folder} has {spec.shape.vocab} tokens" for checkpoint, spec in models)
        raise UserError(f"{counts}; only models with the same vocabulary can be compared.")
