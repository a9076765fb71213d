"""Options that several verbs share; every default is the recipe's own."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.errors import UserError
from compress.recipe import AXES, Recipe, merge_recipe


def show_default(name: str) -> str:
    """Return the recipe's default of a key as the help prints it."""
    value = next(item.default for item in fields(Recipe) if item.name == name)
    return ",".join(value) if isinstance(value, tuple) else str(value)


def recipe_option(name: str, text: str) -> Any:
    """Return an option that fills a key of the recipe and is None unless given."""
    return typer.Option(f"--{name.replace('_', '-')}", help=f"{text} [default: {show_default(name)}]")


Source = Annotated[str, typer.Argument(metavar="CKPT", help="Checkpoint folder, or a hub id such as org/name.")]
Text = Annotated[
    Path | None,
    typer.Option("--text", help="Calibration text: .txt, .jsonl or .parquet; without it the model samples its own."),
]
EvalText = Annotated[
    Path | None,
    typer.Option("--eval-text", help="Text to evaluate on; without it, a part of --text that calibration leaves out."),
]
Keep = Annotated[float | None, recipe_option("keep", "Fraction of the non-embedding parameters to keep.")]
Axes = Annotated[str | None, recipe_option("axes", f"What may be pruned, of {','.join(AXES)}.")]
Multiple = Annotated[int | None, recipe_option("multiple", "Kept channels are a multiple of this; 0 is automatic.")]
Score = Annotated[str | None, recipe_option("score", "How units are ranked: obs or activation.")]
Repair = Annotated[str | None, recipe_option("repair", "Repair of what stays: lstsq or none.")]
WindowCount = Annotated[int | None, recipe_option("windows", "Calibration windows.")]
Length = Annotated[int | None, recipe_option("length", "Tokens in a window.")]
Field = Annotated[str | None, recipe_option("field", "Field of a .jsonl or .parquet file that holds the text.")]
Seed = Annotated[int | None, recipe_option("seed", "Seed of text that the model samples.")]
ShardBytes = Annotated[int | None, recipe_option("shard_bytes", "Largest size of one weight file, in bytes.")]
SpillBytes = Annotated[int | None, recipe_option("spill_bytes", "Hidden states above so many bytes go to a file.")]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="YAML file with the same keys as the flags; a flag goes before it.")
]
PlanFile = Annotated[Path | None, typer.Option("--plan", help="Use this plan (see `lightpress plan`), edited or not.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads. [default: all]")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress and no notes.")]
Prompt = Annotated[int, typer.Option("--prompt", min=1, help="Tokens of the prompt.")]
New = Annotated[int, typer.Option("--new", min=1, help="Tokens decoded after it.")]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Rounds; the median counts.")]


PLAN_KEYS = ("keep", "axes", "multiple", "score")


def refuse_plan_flags(plan: Path | None, flags: dict[str, Any]) -> None:
    """Raise UserError when a plan file meets flags that would make another plan."""
    given = [f"--{name}" for name in PLAN_KEYS if flags.get(name) is not None]
    if plan is not None and given:
        raise UserError(f"{plan} already says what goes: leave out {', '.join(given)}, or make a new plan with them.")


def read_recipe(path: Path | None, flags: dict[str, Any]) -> Recipe:
    """Return the recipe of a YAML file, or of the defaults, overridden by flags that are not None."""
    return merge_recipe({} if path is None else read_recipe_file(path), flags)


def read_recipe_file(path: Path) -> dict[str, Any]:
    """Read a recipe's keys; UserError when the file is missing or is not a YAML mapping."""
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"{path}: cannot be read as a recipe ({reason}); give a YAML file.") from error
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f" at line {place.line + 1}" if place else ""
        raise UserError(f"{path}: is not valid YAML{where}; write one `key: value` per line.") from error
    if not isinstance(data, dict | None):
        raise UserError(f"{path}: holds no keys; write one `key: value` per line, such as `keep: 0.7`.")
    return {str(key).replace("-", "_"): value for key, value in (data or {}).items()}
