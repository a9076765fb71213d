"""What `evaluate` does: one model, or one against another. Imported only by running verbs."""

from __future__ import annotations

from pathlib import Path

from cli import measure
from cli.console import Console
from compress.checkpoint import open_checkpoint
from compress.evaluate import measure_quality
from compress.recipe import Recipe
from compress.report import Comparison
from compress.text import load_tokenizer, read_windows


def open_models(sources: tuple[str, str | None]) -> list[measure.Model]:
    """Open the model asked about, after the one it is compared with if there is one."""
    dense = sources[1]
    return [measure.pair_checkpoint(open_checkpoint(source)) for source in ([dense] if dense else []) + [sources[0]]]


def evaluate_folders(sources: tuple[str, str | None], text: Path, recipe: Recipe, console: Console) -> Comparison:
    """Measure quality of the first source, against the second if there is one; the tokenizer is the first's."""
    models = open_models(sources)
    length = min(recipe.length, *(spec.max_positions for _, spec in models))
    checkpoint, spec = models[-1]
    size = (recipe.windows, length)
    windows = read_windows(text, load_tokenizer(checkpoint.folder), dict(spec.config), size, recipe.field)
    note = f"Quality: on {windows.tokens} tokens; text: {windows.source}."
    if len(models) == 1:
        quality = measure_quality(checkpoint, spec, windows, console.progress)
        return Comparison(None, measure.merge_metrics(models[0], quality, None), note)
    qualities = measure.compare_models(models[0], models[1], windows, console)
    sides = [measure.merge_metrics(model, own, None) for model, own in zip(models, qualities, strict=True)]
    return Comparison(sides[0], sides[1], note)
