"""Methods against each other: one table for a checkpoint, the same calibration text and budget for all, no training.

    python benchmarks/quality.py stories|demo|books [--keep 0.9,0.8,0.7,0.5] [--methods 'NAME;...'] [--books FOLDER]
    python benchmarks/quality.py stories --ablations
    python benchmarks/quality.py stories --protocol        (the foundation's two targets, FFN and KV only)

stories: ../shared/checkpoints/stories260K on TinyStories; demo: the shipped checkpoint on generated text; books: what
benchmarks/train_books.py left, on books it has not seen. Windows of 256 tokens; the first 200 are the test, the last
128 the calibration. Excess is ln(ppl / dense ppl); KL and agreement are against the dense model on the test windows.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from compress.checkpoint import Checkpoint, open_checkpoint
from compress.checkpoint_writer import CheckpointWriter
from compress.errors import UserError
from compress.evaluate import Quality, compare_quality
from compress.pipeline import Task, compress_checkpoint, plan_checkpoint
from compress.plan import describe_counts, plan_shape
from compress.recipe import Recipe
from compress.spec import ModelSpec
from compress.surgery.describe import new_config
from compress.text import Windows, load_tokenizer
from compress.weights import read_spec

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
LENGTH, TEST, CALIBRATION = 256, 200, 128
TARGETS = {0.75: 14.8, 0.5: 39.4}

UNITS = ("ffn", "kv")
# Kept channels are a multiple of this for all methods, so that all come equally near the budget.
STEP = 4
# Papers' methods as they are: nothing of ours is added.
PLAIN = Recipe(axes=UNITS, ratio="equal", norms="slnp", repair="none", inputs="none", refine=0, trials=0)
UNEVEN = replace(PLAIN, shapes="per-layer", biases="own")
BASELINES = {
    "random": replace(PLAIN, score="random"),
    "magnitude": replace(PLAIN, score="magnitude"),
    "wanda-sp": replace(PLAIN, score="wanda"),
    "minitron": replace(PLAIN, score="minitron"),
    "llm-pruner": replace(PLAIN, score="taylor"),
    "flap": replace(UNEVEN, score="flap", ratio="zscore", repair="bias", target="dense"),
    "slimllm": replace(UNEVEN, score="slimllm", ratio="softmax", repair="diagonal", target="own"),
    # Behind a post-norm a bias has no place: models that have them are absorbed first.
    "flap, absorbed": replace(UNEVEN, score="flap", ratio="zscore", repair="bias", target="dense", absorb="all"),
    # The same with every layer cut alike: on small models the papers' layer ratios can do harm.
    "flap, equal": replace(PLAIN, score="flap", repair="bias", target="dense", biases="own"),
    "slimllm, equal": replace(PLAIN, score="slimllm", repair="diagonal", target="own", biases="own"),
    "wanda-sp, regression": replace(PLAIN, score="wanda", repair="diagonal", target="own", biases="own"),
    "shortgpt": replace(PLAIN, axes=("layers",), ratio="influence"),
    "slicegpt": replace(PLAIN, axes=("hidden",), ratio="loss", rotate="pca", norms="none"),
    "slicegpt, equal total": replace(PLAIN, axes=("hidden",), ratio="loss", rotate="pca", norms="none"),
    "slicegpt, absorbed": replace(PLAIN, axes=("hidden",), ratio="loss", rotate="pca", norms="none", absorb="all"),
}
OURS = {
    "default": Recipe(),
    "default, per-layer": Recipe(shapes="per-layer"),
    "rotated": Recipe(rotate="pca"),
    "rotated, equal total": Recipe(rotate="pca"),
    "closed form": Recipe(refine=0),
    "closed form, per-layer": Recipe(refine=0, shapes="per-layer"),
}
# Pairs whose order the papers claim: the first should be the better one.
ABLATIONS = {
    "CLAP / plain drop": [Recipe(axes=("layers",), depth=d, refine=0, repair="none") for d in ("clap", "drop")],
    "CLAP / plain drop, repaired": [Recipe(axes=("layers",), depth=d, refine=0) for d in ("clap", "drop")],
    "SLNP / none (hidden)": [replace(PLAIN, axes=("hidden",), ratio="loss", norms=n) for n in ("slnp", "none")],
    "calibrated / SLNP (hidden)": [
        replace(PLAIN, axes=("hidden",), ratio="loss", norms=n) for n in ("calibrated", "slnp")
    ],
    "SlimLLM ratio / uniform": [BASELINES["slimllm"], BASELINES["slimllm, equal"]],
    "SlimLLM greedy / plain": [replace(BASELINES["slimllm, equal"], score=s) for s in ("slimllm", "slimllm-plain")],
    "SlimLLM regression / none": [BASELINES["slimllm"], replace(BASELINES["slimllm"], repair="none", biases="none")],
    "OBS / activation score": [Recipe(axes=UNITS, score=s, refine=0, trials=0) for s in ("obs", "activation")],
    "corrected / dense target": [Recipe(axes=UNITS, target=t, refine=0, trials=0) for t in ("corrected", "dense")],
    "final norm fitted / not": [Recipe(axes=UNITS, norms=n, refine=0, trials=0) for n in ("calibrated", "slnp")],
    "inputs refitted / not": [Recipe(axes=UNITS, inputs=i, refine=0, trials=0) for i in ("lstsq", "none")],
    "measured plans / predicted": [Recipe(trials=t, refine=0) for t in (-1, 0)],
    "per-layer / uniform": [Recipe(shapes=s, refine=0) for s in ("per-layer", "uniform")],
    "refined / closed form": [Recipe(axes=UNITS, refine=r, trials=0) for r in (-1, 0)],
}


@dataclass(frozen=True)
class Case:
    """A dense checkpoint with its text."""

    name: str
    checkpoint: Checkpoint
    spec: ModelSpec
    test: Windows
    calibration: Windows


def open_case(name: str, books: Path) -> Case:
    """Open a checkpoint and cut its text into windows."""
    folders = {"stories": SHARED / "checkpoints/stories260K", "demo": ROOT / "compress/demo/checkpoint", "books": books}
    folder = folders[name]
    if not folder.is_dir():
        print(f"skipped: {folder} is not here")
        sys.exit(0)
    checkpoint = open_checkpoint(folder)
    tokenizer = load_tokenizer(folder)
    ids = [i for part in read_parts(name) for i in tokenizer.encode(part, add_special_tokens=name == "demo").ids]
    windows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    test, calibration = Windows(windows[:TEST], "test"), Windows(windows[-CALIBRATION:], "calibration")
    return Case(name, checkpoint, read_spec(checkpoint), test, calibration)


def read_parts(name: str) -> list[str]:
    """Return the text in the pieces that it is tokenised in: documents or lines."""
    if name == "demo":
        from compress.demo.grammar import write_documents

        return list(write_documents(1500, 991, "heldout"))
    if name == "books":
        from train_books import heldout_text

        return heldout_text()[:600_000].splitlines(keepends=True)
    return [(SHARED / "data/tinystories_1910stories_1p6MB.txt").read_text()]


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    name: str
    keep: float
    kept: float
    shape: str
    quality: Quality
    excess: float
    seconds: float

    def print(self) -> None:
        """Print the line as a row of a Markdown table."""
        q = self.quality
        print(
            f"| {self.name} | {self.keep:g} | {self.kept:.3f} | {self.shape} | {q.perplexity:.2f} | {self.excess:.3f} "
            f"| {q.divergence:.3f} | {100 * (q.agreement or 0):.1f} | {self.seconds:.0f} |",
            flush=True,
        )


HEAD = "| method | keep | kept | shape | ppl | excess | KL | agree % | s |\n|---|---|---|---|---|---|---|---|---|"


def measure(case: Case, name: str, recipe: Recipe) -> Row | None:
    """Compress by one recipe and compare with the dense model; None (and a line) where it cannot be done."""
    started = time.perf_counter()
    task = Task(case.checkpoint, case.spec, case.calibration, recipe)
    try:
        plan = plan_checkpoint(task)
        with tempfile.TemporaryDirectory() as folder:
            with CheckpointWriter(Path(folder) / "out", new_config(case.spec, plan, recipe)) as writer:
                compress_checkpoint(task, plan, writer)
                writer.finish()
            seconds = time.perf_counter() - started
            written = open_checkpoint(Path(folder) / "out")
            dense, found = compare_quality(
                (case.checkpoint, case.spec), (written, read_spec(written)), case.test
            )
    except UserError as error:
        print(f"| {name} | {recipe.keep:g} | | cannot: {error} | | | | | |", flush=True)
        return None
    shape = plan_shape(plan, case.spec.shape)
    counts = [describe_counts([getattr(layer, key) for layer in shape.layers]) for key in ("kv_heads", "ffn")]
    outline = f"{len(shape.layers)} layers, hidden {shape.hidden}, KV {counts[0]}, FFN {counts[1]}"
    kept = shape.layer_parameters / case.spec.shape.layer_parameters
    excess = math.log(found.perplexity / dense.perplexity)
    row = Row(name, recipe.keep, kept, outline, found, excess, seconds)
    row.print()
    return row


def fit_keep(case: Case, name: str, keep: float) -> float:
    """Return the budget of a method; a rotated tied model pays for the head of its own where the name says so."""
    shape = case.spec.shape
    if not name.endswith("equal total") or not shape.tied:
        return keep
    total = keep * shape.layer_parameters + shape.embedding_parameters
    return total / (shape.layer_parameters + 2 * shape.embedding_parameters)


def compare_methods(case: Case, keeps: list[float], methods: dict[str, Recipe]) -> None:
    """Print the table, and per budget our excess as a share of the best baseline's."""
    print(HEAD, flush=True)
    verdicts = []
    for keep in keeps:
        at = {name: replace(recipe, keep=fit_keep(case, name, keep), multiple=STEP) for name, recipe in methods.items()}
        rows = {name: measure(case, name, recipe) for name, recipe in at.items()}
        done = {name: row.excess for name, row in rows.items() if row is not None}
        rivals = {name: excess for name, excess in done.items() if name in BASELINES}
        if not rivals:
            continue
        best = min(rivals, key=rivals.__getitem__)
        shares = [f"{name} {done[name] / rivals[best]:.2f}x" for name in OURS if name in done]
        verdicts.append(f"keep {keep:g}: best baseline {best} ({rivals[best]:.3f}); ours: {', '.join(shares)}")
    print("\n" + "\n".join(verdicts), flush=True)


def compare_ablations(case: Case, keeps: list[float]) -> None:
    """Print each pair and whether the first is the better one, as the papers or we claim."""
    print(HEAD, flush=True)
    verdicts = []
    for name, pair in ABLATIONS.items():
        for keep in keeps:
            at = [replace(recipe, keep=keep, multiple=STEP) for recipe in pair]
            rows = [measure(case, f"{name} ({place})", recipe) for place, recipe in enumerate(at)]
            if None not in rows:
                first, second = (row.excess for row in rows if row)
                sign = "as claimed" if first < second else "NOT as claimed"
                verdicts.append(f"| {name} | {keep:g} | {first:.3f} | {second:.3f} | {sign} |")
    print("\n| pair | keep | first | second | sign |\n|---|---|---|---|---|\n" + "\n".join(verdicts), flush=True)


def check_targets(case: Case) -> None:
    """Measure the foundation's protocol: FFN channels and KV groups only, uniform, closed form as it was."""
    print(HEAD, flush=True)
    for keep, target in TARGETS.items():
        row = measure(case, f"target {target}", Recipe(keep=keep, axes=UNITS))
        print("met" if row and row.quality.perplexity <= target else "MISSED", flush=True)


def main() -> None:
    """Read the command line and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="?", default="stories", choices=["stories", "demo", "books"])
    parser.add_argument("--keep", default="0.9,0.8,0.7,0.5")
    parser.add_argument("--methods", help="names of the table, separated by semicolons; all without it")
    parser.add_argument("--books", type=Path, default=Path("/tmp/books"), help="checkpoint of train_books.py")
    parser.add_argument("--ablations", action="store_true")
    parser.add_argument("--protocol", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    keeps = [float(keep) for keep in options.keep.split(",")]
    case = open_case(options.case, options.books)
    dense, _ = compare_quality((case.checkpoint, case.spec), (case.checkpoint, case.spec), case.test)
    print(f"{options.case}: {case.spec.shape.parameters} parameters, dense perplexity {dense.perplexity:.3f}\n")
    if options.protocol:
        check_targets(case)
    elif options.ablations:
        compare_ablations(case, keeps)
    else:
        methods = BASELINES | OURS
        names = options.methods.split(";") if options.methods else list(methods)
        compare_methods(case, keeps, {name: methods[name] for name in names})


if __name__ == "__main__":
    main()
