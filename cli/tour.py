"""What `demo` does and says. Imported only by running verbs."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from pathlib import Path

from cli.console import Console
from cli.frontier import run_compare
from cli.frontier_quality import bound_shares
from cli.frontier_request import CompareRequest, Levels
from cli.measure import Model
from cli.request import BenchSize, Request
from cli.run import run_compress
from compress.demo.grammar import write_text
from compress.demo.score import score_kinds
from compress.errors import UserError
from compress.recipe import Recipe
from compress.report import RunReport
from compress.report_frontier import Frontier, Interval
from compress.text import load_tokenizer

MODEL, TRAIN, HELDOUT, MARKER = "model", "train.txt", "heldout.txt", "README.txt"
TRAIN_CHARACTERS, HELDOUT_CHARACTERS = 400_000, 100_000
SEED = 7  # not the seed that the demo model was trained with
TASKS = 100
FRONTIER, FRONTIER_POINTS, FRONTIER_REFINE = "frontier", 5, 30
FRONTIER_PROFILES = ("this-machine", "ascend-310p3", "ascend-910b3")
TITLE = "Written by `lightpress demo`, which may overwrite this folder."
ABOUT = f"""{TITLE}

{MODEL}/         the compressed model: a Hugging Face folder, its manifest lightpress.json, and ONNX in onnx/
{TRAIN}      text that the model was calibrated with
{HELDOUT}    text that it was evaluated on
{FRONTIER}/      {FRONTIER_POINTS} amounts of compression compared: open report.html
"""
SECOND = f"""Which amount is right? `lightpress compare` now makes {FRONTIER_POINTS} smaller models from one
calibration, with fewer gradient steps, measures them on this machine, and predicts their speed on two Ascend chips."""
INTRODUCTION = """This demo compresses a small language model that ships with Lightpress.
The model was trained on stories, facts, sums and sentences that a small grammar writes.
First it runs on some of that text, to see which layers, heads and channels matter least. Up to {trials} plans are
rebuilt and measured, and the best is carried out: what stays is repaired by least squares and by {refine} gradient
steps on each layer. (`lightpress compress` tries more plans and takes more steps on so small a model; this is to be
quick.) The result is written, exported to ONNX, opened again in fresh processes and compared with the dense model on
text that neither training nor calibration saw, and on {tasks} tasks of each of four kinds."""


def run_demo(output: Path, recipe: Recipe, speed: BenchSize, console: Console) -> RunReport:
    """Compress the shipped checkpoint into `output`, with commentary; raises UserError when the folder is in use."""
    source = find_checkpoint()
    check_folder(output)
    console.show(INTRODUCTION.format(trials=recipe.trials, refine=recipe.refine, tasks=TASKS) + "\n")
    console.show(f"Writing text for calibration and evaluation to {output}.")
    write_texts(output)
    request = Request(
        str(source), recipe, output / TRAIN, output / HELDOUT, output=output / MODEL, overwrite=True, speed=speed
    )
    tokenizer = load_tokenizer(source)

    def score(model: Model) -> dict[str, float]:
        return score_kinds(model, tokenizer, TASKS, progress=console.progress)

    console.show(f"Compressing the demo model to {recipe.keep:g} of its non-embedding parameters:\n")
    report = run_compress(request, console, score)
    console.show(f"\n{SECOND}\n")
    frontier = compare_levels(output, source, recipe, speed, console)
    console.show(advise(output, source, sum(report.seconds.values()) + frontier.seconds))
    return report


def compare_levels(output: Path, source: Path, recipe: Recipe, speed: BenchSize, console: Console) -> Frontier:
    """Compare several amounts of compression, on this machine and on two Ascend chips, into `output`/frontier."""
    tokenizer = load_tokenizer(source)

    def score(model: Model) -> dict[str, Interval]:
        return bound_shares(score_kinds(model, tokenizer, TASKS, progress=console.progress), TASKS)

    lighter = replace(recipe, keep=Recipe().keep, trials=Recipe().trials, refine=FRONTIER_REFINE)
    request = CompareRequest(
        str(source), lighter, output / FRONTIER, output / TRAIN, output / HELDOUT, FRONTIER_PROFILES,
        Levels(points=FRONTIER_POINTS), overwrite=True, speed=speed, scorer="demo",
    )  # fmt: skip
    return run_compare(request, console, score)


def find_checkpoint() -> Path:
    """Return the folder of the shipped checkpoint; raises UserError when this installation lacks it."""
    folder = Path(str(resources.files("compress") / "demo" / "checkpoint"))
    if not (folder / "config.json").is_file():
        raise UserError(f"The demo checkpoint is missing from this installation ({folder}); install lightpress again.")
    return folder


def check_folder(output: Path) -> None:
    """Raise UserError unless the folder is free or an earlier demo wrote it."""
    if output.exists() and not output.is_dir():
        raise UserError(f"The output {output} is a file; choose a folder with -o.")
    if not output.is_dir() or not any(output.iterdir()):
        return
    marker = output / MARKER
    if not marker.is_file() or not marker.read_text(encoding="utf-8", errors="replace").startswith(TITLE):
        raise UserError(f"The output {output} holds something else than an earlier demo; choose another with -o.")


def write_texts(output: Path) -> None:
    """Write the marker first, so that a stopped demo can be run again, then the two texts."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / MARKER).write_text(ABOUT, encoding="utf-8")
        (output / TRAIN).write_text(write_text(TRAIN_CHARACTERS, SEED), encoding="utf-8")
        (output / HELDOUT).write_text(write_text(HELDOUT_CHARACTERS, SEED, "heldout"), encoding="utf-8")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"The output {output} cannot be written ({reason}); choose another with -o.") from error


def advise(output: Path, source: Path, seconds: float) -> str:
    """Return where the files are and what to try next."""
    return f"""
Done in {seconds:.0f} s. The compressed model is in {output / MODEL} (with onnx/ and lightpress.json).
Open {output / FRONTIER / "report.html"} in a browser: accuracy against speed, shapes, samples.

Try next:
  lightpress inspect {output / MODEL}
  lightpress plan {source} --keep 0.5 --text {output / TRAIN}
  lightpress compress {source} --keep 0.5 --text {output / TRAIN} --eval-text {output / HELDOUT} -o half
  lightpress compress {source} --keep 0.5 --shapes per-layer --text {output / TRAIN} -o uneven
  lightpress bench half --against {source}
  lightpress compress {source} --keep 0.5 --text {output / TRAIN} --recover 200k -o trained"""
