"""The points of a comparison: rebuilt with repair, trained back, quantised, measured, each saved as it is complete."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import cli.measure as speeds
from backends.export_onnx import GRAPH_NAME, export_onnx
from backends.ort import open_onnx
from cli.console import Console, RunFailure
from cli.frontier_job import EXACT, FrontierJob, Level, Variant
from cli.frontier_proof import prove_cut, prove_found
from cli.frontier_quality import (
    DenseView,
    answer_tasks,
    compare_checkpoint,
    compare_graph,
    compare_itself,
    sample_checkpoint,
    sample_graph,
    sample_itself,
    view_dense,
)
from cli.frontier_store import PLANS, POINTS, WORK, load_point, save_point
from cli.manifest import encode_manifest, list_versions
from cli.measure import ONNX_FOLDER, Model
from cli.page_run import read_curve
from cli.planned import make_row
from cli.prepare import Texts
from cli.recovered import read_defaults
from cli.run import list_flags
from cli.training import run_recover
from cli.version import read_version
from cli.weights import FormatFlags, open_form
from cli.written import Clock, open_folder
from compress.checkpoint import open_checkpoint
from compress.checkpoint_source import read_json
from compress.checkpoint_writer import MANIFEST_NAME
from compress.frontier import score_windows
from compress.pipeline import Task, compress_checkpoint, describe_run
from compress.plan import Plan, keep_everything
from compress.recover.state import RUN_NAME
from compress.report_frontier import Interval, Point
from compress.surgery.describe import new_config
from compress.text import Windows

Scorer = Callable[[Model], Mapping[str, Interval]]
DENSE_VIEW = "dense.safetensors"


@dataclass
class Bench:
    """What making points takes: the job, its text and plans; the dense model's outputs, once they are needed."""

    made: FrontierJob
    texts: Texts
    plans: dict[str, Plan]
    console: Console
    scorer: Scorer | None = None
    view: DenseView | None = None

    @property
    def dense(self) -> Model:
        """The dense model."""
        return self.made.job.checkpoint, self.made.job.spec

    @property
    def evaluation(self) -> Windows:
        """The text that points are compared on."""
        assert self.texts.evaluation is not None
        return self.texts.evaluation

    @property
    def measured(self) -> bool:
        """Whether models are run on this machine's ONNX Runtime, so that each needs a graph."""
        return any(target.measured for target in self.made.targets)

    def look(self) -> DenseView:
        """Return the dense model's outputs on the evaluation text, computed once for all points."""
        if self.view is None:
            place, samples = self.made.folder / WORK, self.made.request.samples
            place.mkdir(exist_ok=True)
            self.view = view_dense(self.dense, self.evaluation, samples, place / DENSE_VIEW, self.console)
        return self.view

    def place(self, variant: Variant) -> Path:
        """Return the folder of a point."""
        return self.made.folder / POINTS / variant.name

    def open(self, variant: Variant) -> Model:
        """Return the checkpoint that a point is, or that its graph was made of."""
        if variant.level is None:
            return self.dense
        return speeds.pair_checkpoint(open_checkpoint(self.place(variant.exact)))

    def graph(self, variant: Variant) -> Path:
        """Return the folder of a point's graph: within the checkpoint's, or the point's own where it is quantised."""
        place = self.place(variant)
        return place / ONNX_FOLDER if variant.format == EXACT else place


def make_point(bench: Bench, variant: Variant) -> Point:
    """Return a point: the one that is there, or one that is made, measured and saved now."""
    found, clock = load_point(bench.place(variant)), Clock()
    if found is None:
        make_folder(bench, variant)
    if bench.made.request.verify and variant.level is not None:
        prove_found(bench.place(variant.exact), bench.texts.calibration)
    if found is not None:
        make_graph(bench, variant)  # a device that is measured may have been named since
        return found
    with clock.time("export"):
        make_graph(bench, variant)
    point = measure_point(bench, variant, clock)
    bench.place(variant).mkdir(exist_ok=True)
    save_point(bench.place(variant), point)
    return replace(point, folder=bench.place(variant))


# Making


def make_folder(bench: Bench, variant: Variant) -> None:
    """Write the checkpoint that a point is, or is made of, unless it is there."""
    level = variant.level
    if level is None or (bench.place(variant.exact) / MANIFEST_NAME).is_file():
        return
    if variant.recovered:
        cut = replace(variant.exact, recovered=False)
        make_folder(bench, cut)
        recover_point(bench, bench.place(cut), bench.place(variant.exact))
    else:
        write_cut(bench, level, bench.place(variant.exact))


def write_cut(bench: Bench, level: Level, folder: Path) -> None:
    """Rebuild the dense model as a level's plan says, with repair, in a folder that appears when it is complete."""
    job, plan, console = bench.made.job, bench.plans[level.name], bench.console
    whole = plan == keep_everything(job.spec.shape)
    windows = bench.texts.calibration.take(2) if whole else bench.texts.calibration
    task = Task(job.checkpoint, job.spec, windows, level.recipe)
    console.note(f"{level.name}: rebuilding.")
    started = time.perf_counter()
    config = new_config(job.spec, plan, level.recipe)
    with open_folder(replace(job, recipe=level.recipe), config, folder) as writer:
        result = compress_checkpoint(task, plan, writer, console.progress)
        facts = describe_point(bench, level, plan)
        written = writer.seal()
        proofs = prove_cut(written, level.name, result) if bench.made.request.verify else ()
        seconds = time.perf_counter() - started
        writer.add_text(MANIFEST_NAME, encode_manifest({**facts, "proofs": proofs, "seconds": seconds}))
        writer.finish()


def describe_point(bench: Bench, level: Level, plan: Plan) -> dict[str, Any]:
    """Return a point's manifest, as `compress` writes it."""
    return {
        "source": {"path": str(bench.made.request.source), "sha256": bench.made.settings["checkpoint"]},
        **describe_run(level.recipe, bench.texts.calibration),
        "seed": level.recipe.seed,
        "versions": {"lightpress": read_version(), **list_versions()},
        "plan": plan.to_json(),
    }


def recover_point(bench: Bench, cut: Path, folder: Path) -> None:
    """Train a cut model back with the dense one as its teacher; a run that was stopped before goes on."""
    request = bench.made.request
    bench.console.note(f"{cut.name}: training on {request.recover_tokens} tokens.")
    asked = {
        **read_defaults(),
        "student": str(cut), "output": folder, "teacher": request.source, "text": [request.text],
        "field": request.recipe.field, "tokens": request.recover_tokens, "seed": request.recipe.seed,
        "length": bench.made.job.recipe.length, "threads": request.speed.threads, "no_verify": not request.verify,
        "resume": (folder.with_name(f"{folder.name}.training") / RUN_NAME).is_file(),
        "eval_text": request.eval_text,
    }  # fmt: skip
    run_recover(asked, Console(as_json=True, quiet=bench.console.quiet))


def make_graph(bench: Bench, variant: Variant) -> None:
    """Export a point to ONNX where it is measured on this machine or quantised, unless that is done."""
    place = bench.graph(variant)
    needed = bench.measured or variant.format != EXACT
    if not needed or (place / GRAPH_NAME).is_file():
        return
    console, windows = bench.console, bench.texts.calibration
    flags = FormatFlags(variant.format, "gptq", None, None, False, None, len(windows.ids))
    checkpoint, _ = bench.open(variant)
    place.mkdir(parents=True, exist_ok=True)
    with open_form(flags, checkpoint, Console(quiet=True), windows) as form:
        export_onnx(checkpoint, place, lambda done, total: console.progress("export", done, total), form)


# Measuring


def measure_point(bench: Bench, variant: Variant, clock: Clock) -> Point:
    """Return all that is known of a point but its speeds."""
    dense, request = bench.look(), bench.made.request
    quantised, exact = variant.format != EXACT, variant.level is None and variant.format == EXACT
    graph = open_onnx(bench.graph(variant), request.speed.threads) if quantised else None
    model = bench.open(variant)
    with clock.time("evaluate"):
        if graph is not None:
            sums = compare_graph(dense, graph)
        else:
            sums = compare_itself(dense) if exact else compare_checkpoint(dense, model, bench.console)
        if not bool(torch.isfinite(sums).all()):
            raise RunFailure(f"{variant.name} computes no numbers on {bench.evaluation.source}: try a larger --keep.")
        scores = score_windows(sums, bench.evaluation.ids.shape[1] - 1, request.recipe.seed)
    with clock.time("score"):
        source = bench.place(variant) if quantised else model[0].folder
        accuracy = answer_tasks(source, bench.made.questions, request.speed.threads, bench.console)
        if bench.scorer is not None and graph is None:
            accuracy |= dict(bench.scorer(model))
    with clock.time("generate"):
        tokenizer = bench.made.job.tokenizer
        if graph is not None:
            samples = sample_graph(dense, graph, tokenizer)
        else:
            samples = sample_itself(dense, tokenizer) if exact else sample_checkpoint(dense, model[0], tokenizer)
    point = describe_model(bench, variant, model, scores.perplexity)
    if not exact:
        point = replace(point, divergence=scores.divergence, agreement=scores.agreement, ratio=scores.ratio)
    seconds = {**read_seconds(bench, variant), **clock.seconds}
    return replace(point, accuracy=accuracy, samples=samples, seconds=seconds)


def describe_model(bench: Bench, variant: Variant, model: Model, perplexity: Interval) -> Point:
    """Return a point in numbers that need no run."""
    checkpoint, spec = model
    dense, level = bench.made.job.spec.shape, variant.level
    kept = bench.plans[level.name].kept_layers if level else tuple(range(len(dense.layers)))
    share = 1.0 if level is None else level.recipe.keep
    if level is not None and level.recipe.budget != "keep":
        share = spec.shape.layer_parameters / dense.layer_parameters
    curve = read_curve(bench.place(variant.exact)) if variant.recovered else ()
    size = checkpoint.nbytes
    if variant.format != EXACT:
        size = sum(path.stat().st_size for path in bench.graph(variant).glob("*.onnx*"))
    return Point(
        variant.name, share, variant.format, curve[-1].tokens if curve else 0,
        tuple(make_row(index, layer) for index, layer in zip(kept, spec.shape.layers, strict=True)), spec.shape.hidden,
        spec.shape.parameters, size, perplexity, None, None, {}, curve=curve, command=describe_command(bench, variant),
    )  # fmt: skip


def read_seconds(bench: Bench, variant: Variant) -> dict[str, float]:
    """Return how long a checkpoint took to rebuild and to train back, whichever run did it."""
    if variant.level is None:
        return {}
    cut = read_json(bench.place(Variant(variant.level)) / MANIFEST_NAME)
    seconds = {"rebuild": float(cut["seconds"])}
    if variant.recovered:
        seconds["recover"] = float(read_json(bench.place(variant.exact) / MANIFEST_NAME)["recovery"][-1]["seconds"])
    return seconds


def describe_command(bench: Bench, variant: Variant) -> str:
    """Return the commands that make a point again, one a line; none for the dense model as it is."""
    level, request, lines = variant.level, bench.made.request, []
    source, text, recipe = request.source, shlex.quote(str(request.text)), bench.made.job.recipe
    held = f" --eval-text {shlex.quote(str(request.eval_text))}" if request.eval_text else ""
    windows = f" --windows {len(bench.texts.calibration.ids)}"
    if level is not None:
        plan = shlex.quote(str(bench.made.folder / PLANS / f"{level.name}.json"))
        asked = replace(bench.made.job.request, recipe=level.recipe)
        lines += [f"lightpress compress {shlex.quote(source)} --plan {plan}{list_flags(asked)} -o {level.name}"]
        source = level.name
    if variant.recovered:
        lines += [
            f"lightpress recover {source} --teacher {shlex.quote(request.source)} --text {text} "
            f"--tokens {request.recover_tokens} --length {recipe.length} --seed {recipe.seed}{held} "
            f"-o {variant.exact.name}"
        ]
        source = variant.exact.name
    if variant.format != EXACT:
        lines += [
            f"lightpress export {shlex.quote(source)} --format {variant.format} --text {text}{windows} "
            f"-o {variant.name}"
        ]
    return "\n".join(lines)
