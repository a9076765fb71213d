"""Options that several verbs share; every default is the recipe's own, and every key of a recipe has a flag."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.request import Recovery
from compress.errors import UserError
from compress.recipe import AXES, Recipe, flag, merge_recipe

BUDGET, DEVICE, SCORES, SURGERY, REPAIR = "Budget and shape", "Device", "Scores", "Surgery", "Repair"
TEXT, OUTPUT = "Text", "Output"
WEIGHTS, ASCEND = "Weights", "Ascend"
CURRICULUM, ROUNDS = "Curriculum", "On-policy rounds"
PANELS = ("Arguments", BUDGET, DEVICE, SCORES, SURGERY, REPAIR, CURRICULUM, ROUNDS, WEIGHTS, ASCEND, TEXT, OUTPUT,
          "Options")  # fmt: skip
# What each key of a recipe says in the help, under which heading.
HELP: Mapping[str, Mapping[str, str]] = {
    BUDGET: {
        "keep": "Fraction of the non-embedding parameters to keep; the budget, unless one of the next four is.",
        "params": "Parameters in all, such as 2.6B or 350M.",
        "memory": "Weights, keys and values on a device at the workload's context and batch, such as 4GiB.",
        "speedup": "Times as fast as the dense model, by the profile's prediction for the workload, such as 1.5x.",
        "latency": "Predicted time of the workload, such as 25ms: of one token (decode), to the first (prefill), or of "
        "a whole answer.",
        "axes": f"What may be pruned, of {','.join(AXES)}: FFN channels, KV groups with their query heads, the hidden "
        "width, whole layers.",
        "multiple": "Kept channels are a multiple of this; 0: 16, or the power of two that the dense size has.",
        "shapes": "uniform: all layers alike, as stock runtimes want them; per-layer: each its own, for ONNX.",
        "ratio": "How layers share the budget: loss (least predicted loss); with --axes ffn,kv equal, or with --shapes "
        "per-layer too softmax (SlimLLM) or zscore (FLAP); with --axes layers influence (ShortGPT).",
        "trials": "Plans that are rebuilt and measured before one is chosen; -1: several on small models, else 0.",
    },
    DEVICE: {
        "profile": "Device that the result will run on: a name of `lightpress profiles list`, or a .toml file. Its "
        "rules decide shapes, its numbers the predicted times.",
        "workload": "What is timed: decode, prefill, PROMPT+OUTPUT[@BATCH] such as 512+64@4, or a phase of that, "
        "decode:512+64@4.",
        "format": "Number format that is timed and sized, of those that the profile has: fp32, fp16, bf16, w8a8, int8 "
        "or int4.",
        "devices": "Devices that the model is split over (tensor parallelism).",
    },
    SCORES: {
        "score": "How units are ranked: obs (greedy optimal brain surgeon), activation, slimllm, slimllm-plain, "
        "slimllm-explained, flap, wanda, minitron, taylor (LLM-Pruner, from gradients), magnitude or random.",
        "score_tokens": "Tokens that units are ranked on; 0: 1.5 for each FFN channel, at least 4096.",
    },
    SURGERY: {
        "depth": "Attention of a dropped layer: drop (it goes), or clap (its best KV groups live on in the kept layer "
        "before it).",
        "norms": "RMSNorm weights after cuts: none, slnp (their length is kept), or calibrated (fitted "
        "on the text, the final norm too).",
        "absorb": "Fold norms behind a branch into the projection before them: none, safe (those that vary little) or "
        "all.",
        "absorb_limit": "Coefficient of variation up to which --absorb safe folds a norm.",
        "absorb_constant": "What stands in for a folded norm's 1/rms: least-squares, or mean-inverse (the paper's).",
        "rotate": "Basis in which hidden channels go: none (the model's own), or pca (principal components; SliceGPT).",
    },
    REPAIR: {
        "repair": "Refit of the o and down projections: lstsq (least squares), diagonal (a factor and a bias for each "
        "output; SlimLLM), bias (FLAP) or none.",
        "biases": "Biases that the repair may add there: none, stock (where the family's class has them), or own "
        "(everywhere; transformers cannot open the result).",
        "target": "What the repair aims at: corrected (the dense model's stream), dense (its branch), or own (the "
        "unpruned branch on the pruned stream; not with hidden pruning).",
        "inputs": "Refit of q, k, v, gate and up: lstsq, none, or auto (lstsq where hidden channels go).",
        "refine": "Gradient steps that fit all weights of a layer to the dense layer's output on the text; -1: some "
        "hundred on small models, else 0.",
    },
    TEXT: {
        "windows": "Calibration windows.",
        "length": "Tokens in a window.",
        "field": "Field of a .jsonl or .parquet file that holds the text.",
        "seed": "Seed of everything random, such as text that the model samples.",
    },
    OUTPUT: {
        "shard_bytes": "Largest size of one weight file, in bytes.",
        "spill_bytes": "Hidden states above so many bytes go to a temporary file.",
    },
}
# Flags that only decide the plan: beside a plan file they would do nothing.
PLAN_KEYS = (*HELP[BUDGET], *HELP[SCORES], "depth", "absorb", "absorb_limit", "absorb_constant")
# A flag that does something only where another key has one of these values.
USEFUL_WITH: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "trials": ("ratio", ("loss",)),
    "absorb_limit": ("absorb", ("safe", "all")),
    "absorb_constant": ("absorb", ("safe", "all")),
    "inputs": ("repair", ("lstsq",)),
    "biases": ("repair", ("lstsq", "diagonal", "bias")),
    "target": ("repair", ("lstsq", "diagonal", "bias")),
}
SWITCHED_OFF = (None, 0, "none")
# Keys of a recipe file that belong to the training after the rebuild: no part of a Recipe, which is all that planning
# and rebuilding know.
RECOVERY_KEYS = ("recover", "recover_text", "recover_offline", "recover_lr")

Flags = dict[str, Any]


def show_default(name: str) -> str:
    """Return the recipe's default of a key as the help prints it."""
    value = next(item.default for item in fields(Recipe) if item.name == name)
    return ",".join(value) if isinstance(value, tuple) else str(value)


def recipe_option(name: str, text: str, panel: str | None = None) -> Any:
    """Return an option that fills a key of the recipe and is None unless given."""
    return typer.Option(flag(name), help=f"{text} [default: {show_default(name)}]", rich_help_panel=panel)


def list_recipe_flags(left_out: tuple[str, ...]) -> list[inspect.Parameter]:
    """Return a keyword parameter for each key of the recipe, in the order of the help."""
    kinds: dict[str, Any] = {item.name: type(item.default) for item in fields(Recipe)}
    kinds["axes"] = str  # names joined by commas
    options = {
        name: Annotated[kinds[name] | None, recipe_option(name, text, panel)]
        for panel, texts in HELP.items()
        for name, text in texts.items()
        if name not in left_out
    }
    keyword = inspect.Parameter.KEYWORD_ONLY
    return [inspect.Parameter(name, keyword, default=None, annotation=option) for name, option in options.items()]


def take_recipe(*left_out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator: the verb gets a flag for each recipe key but those left out, and their values as `flags`."""

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        shared = list_recipe_flags(left_out)
        own = [item for item in inspect.signature(verb, eval_str=True).parameters.values() if item.name != "flags"]

        @wraps(verb)
        def run(**given: Any) -> None:
            flags = {item.name: given.pop(item.name) for item in shared}
            verb(**given, flags=flags)

        # typer reads a verb's flags from its signature.
        run.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
        run.__annotations__ = {item.name: item.annotation for item in (*own, *shared)}
        return run

    return decorate


Source = Annotated[str, typer.Argument(metavar="CKPT", help="Checkpoint folder, or a hub id such as org/name.")]
Text = Annotated[
    Path | None,
    typer.Option(
        "--text",
        help="Calibration text: .txt, .jsonl or .parquet; without it the model samples its own.",
        rich_help_panel=TEXT,
    ),
]
EvalText = Annotated[
    Path | None,
    typer.Option(
        "--eval-text",
        help="Text to evaluate on; without it, a part of --text that calibration leaves out.",
        rich_help_panel=TEXT,
    ),
]
Keep = Annotated[float | None, recipe_option("keep", HELP[BUDGET]["keep"])]
Length = Annotated[int | None, recipe_option("length", HELP[TEXT]["length"])]
Field = Annotated[str | None, recipe_option("field", HELP[TEXT]["field"])]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="YAML file with the same keys as the flags; a flag goes before it.")
]
PlanFile = Annotated[
    Path | None,
    typer.Option("--plan", help="Use this plan (see `lightpress plan`), edited or not.", rich_help_panel=BUDGET),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an output that exists.", rich_help_panel=OUTPUT)
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads. [default: all]")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the result as one JSON object.", rich_help_panel=OUTPUT)
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print no progress and no notes.", rich_help_panel=OUTPUT)
]
Recover = Annotated[
    str | None,
    typer.Option(
        "--recover",
        metavar="TOKENS",
        help="Then train the result on so many tokens, such as 2M, towards the dense model.",
        rich_help_panel=REPAIR,
    ),
]
RecoverText = Annotated[
    list[Path] | None,
    typer.Option(
        "--recover-text",
        help="Text for that, as `recover` takes it; without it, what is not kept out of --text. May be repeated.",
        rich_help_panel=REPAIR,
    ),
]
RecoverOffline = Annotated[
    bool | None,
    typer.Option(
        "--recover-offline/--recover-online",
        help="Score the text with the dense model once, then train without it in memory. [default: online]",
        rich_help_panel=REPAIR,
    ),
]
RecoverRate = Annotated[
    float | None,
    typer.Option(
        "--recover-lr", help="Highest learning rate of that. [default: by the model's width]", rich_help_panel=REPAIR
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help="Go on with the run with --recover that stopped before this output.", rich_help_panel=OUTPUT
    ),
]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Rounds; the median counts.")]


def settle_recipe(path: Path | None, flags: Flags, plan: Path | None) -> Recipe:
    """Return the recipe of a file and of flags; UserError for flags that would do nothing."""
    refuse_plan_flags(plan, flags)
    if plan is not None and flags.get("target") == "own":
        flags = {**flags, "axes": "ffn,kv,layers"}  # whether hidden channels go, the plan file says
    recipe = read_recipe(path, flags)
    refuse_idle_flags(recipe, flags)
    return recipe


def refuse_plan_flags(plan: Path | None, flags: Flags) -> None:
    """Raise UserError when a plan file meets flags that would make another plan."""
    given = [flag(name) for name in PLAN_KEYS if flags.get(name) is not None]
    if plan is not None and given:
        raise UserError(f"{plan} already says what goes: leave out {', '.join(given)}, or make a new plan with them.")


def refuse_idle_flags(recipe: Recipe, flags: Flags) -> None:
    """Raise UserError for a flag that the rest of the recipe makes useless."""
    for name, (other, values) in USEFUL_WITH.items():
        if flags.get(name) not in SWITCHED_OFF and getattr(recipe, other) not in values:
            raise UserError(
                f"{flag(name)} does nothing with {flag(other)} {getattr(recipe, other)}: leave it out, or give "
                f"{flag(other)} {' or '.join(values)}."
            )


def read_recipe(path: Path | None, flags: Flags) -> Recipe:
    """Return the recipe of a YAML file, or of the defaults, overridden by flags that are not None."""
    file = {} if path is None else read_recipe_file(path)
    return merge_recipe({name: value for name, value in file.items() if name not in RECOVERY_KEYS}, flags)


def settle_recovery(path: Path | None, flags: Flags, resume: bool) -> Recovery | None:
    """Return the training that flags and a recipe file ask for, None without; UserError for flags without effect."""
    file = {} if path is None else read_recipe_file(path)
    found = {name: file.get(name) if flags[name] in (None, []) else flags[name] for name in RECOVERY_KEYS}
    if found["recover"] is None:
        idle = [flag(name) for name in RECOVERY_KEYS if found[name] is not None] + ["--resume"] * resume
        if idle:
            raise UserError(f"{idle[0]} does nothing without --recover: leave it out, or add --recover TOKENS.")
        return None
    texts = found["recover_text"] or []
    return Recovery(
        str(check_kind("recover", found["recover"], (str, int, float), "a number of tokens")),
        tuple(Path(check_kind("recover_text", name, (str, Path), "a file, or a list of files"))
              for name in (texts if isinstance(texts, list) else [texts])),
        bool(check_kind("recover_offline", found["recover_offline"] or False, (bool,), "true or false")),
        read_rate(found["recover_lr"]), resume,
    )  # fmt: skip


def check_kind(name: str, value: Any, kinds: tuple[type, ...], said: str) -> Any:
    """Return a value of a recipe file; UserError where it is of another kind."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise UserError(f"recipe: '{name}' must be {said}, got {value!r}.")
    return value


def read_rate(value: Any) -> float | None:
    """Return a learning rate, which YAML reads as text where it has no point (1e-4); UserError for what is none."""
    try:
        rate = None if value is None else float(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"recipe: 'recover_lr' must be a number, got {value!r}.") from error
    if rate is not None and not 0 < rate < 1:
        raise UserError(f"--recover-lr {rate:g} is no learning rate; give a small positive number such as 1e-4.")
    return rate


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
