"""`evaluate --text` where a side is an ONNX folder: models run whole, window by window. Imported by running verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from backends.eager import compare_placed, measure_placed
from backends.likelihood import TextModel
from cli.console import Console
from compress.errors import UserError
from compress.evaluate import Quality
from compress.recipe import Recipe
from compress.report import make_plain
from compress.text import Windows, read_windows


def evaluate_graphs(models: list[TextModel], text: Path, recipe: Recipe, console: Console) -> dict[str, Any]:
    """Measure the last model on a text, against the one before it if there is one; print and return what was found.

    Windows are those of a checkpoint: the last model's tokenizer, each document after its start token. Raises
    UserError when the vocabularies differ.
    """
    last = models[-1]
    sizes = {model.runtime.vocab for model in models}
    if len(sizes) > 1:
        raise UserError(
            f"{models[0].name} and {last.name} have different vocabularies; only models with the same one can be "
            "compared."
        )
    config = {"bos_token_id": last.start, "vocab_size": last.runtime.vocab}
    length = min(recipe.length, *(model.context for model in models))
    windows = read_windows(text, last.tokenizer, config, (recipe.windows, length), recipe.field)
    dense, found = measure_models(models, windows)
    console.show(render_quality(dense, found, windows))
    return {"dense": make_plain(dense), "compressed": make_plain(found), "text": windows.source}


def measure_models(models: list[TextModel], windows: Windows) -> tuple[Quality | None, Quality]:
    """Return the quality of the dense model, if there is one, and of the other."""
    if len(models) == 1:
        return None, measure_placed(models[0].runtime, windows)
    return compare_placed(models[0].runtime, models[1].runtime, windows)


def render_quality(dense: Quality | None, found: Quality, windows: Windows) -> str:
    """Return what was found as lines."""
    lines = [f"perplexity {found.perplexity:.4g}" + (f" (dense {dense.perplexity:.4g})" if dense else "")]
    if found.agreement is not None and found.divergence is not None:
        lines.append(f"top-1 agreement {found.agreement:.1%}, KL divergence {found.divergence:.4f} nats")
    return "\n".join((*lines, f"Quality: on {windows.tokens} tokens; text: {windows.source}."))
