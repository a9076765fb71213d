"""What a comparison was asked for, checked and opened before anything is written. Imported only by running verbs."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from backends.harness import TaskRequest
from cli.budget import (
    COUNTS,
    RATIOS,
    THIS_MACHINE,
    Device,
    make_goal,
    read_amount,
    read_workload,
    settle_workload,
)
from cli.console import Console, format_bytes
from cli.estimate import FLOAT, estimate_disk, estimate_memory, free_memory
from cli.frontier_request import CompareRequest
from cli.frontier_store import check_store
from cli.prepare import Job, Texts, check_goal, check_runtime, check_writable, gather_texts, prepare_job
from cli.request import Request
from cli.tasks import Questions, gather_questions
from cli.weights import BITS
from compress.checkpoint_writer import check_kept, check_output, check_space
from compress.errors import UserError
from compress.frontier import spread_levels
from compress.goal import Goal
from compress.pipeline import storage_dtype
from compress.recipe import Recipe
from compress.report_frontier import DENSE
from profiles.cost import Workload
from profiles.loader import load_profile, user_folder

EXACT = "fp32"
RECOVERED = "recovered"
# What a recipe says that changes no point, or is kept apart from it.
APART = ("keep", "params", "memory", "speedup", "latency", "profile", "format", "shard_bytes", "spill_bytes")


@dataclass(frozen=True)
class Target:
    """A device to compare on; `device` is None for this machine where it has no profile: then all is measured."""

    name: str
    device: Device | None
    workload: Workload

    @property
    def measured(self) -> bool:
        """Whether models are run there, that is here."""
        return self.name == THIS_MACHINE


@dataclass(frozen=True)
class Level:
    """One amount of compression: the recipe with its budget, and what the plan must meet besides."""

    name: str
    recipe: Recipe
    goal: Goal | None


@dataclass(frozen=True)
class Variant:
    """One point to make: of a level (None: the dense model), trained back or not, in a number format."""

    level: Level | None
    recovered: bool = False
    format: str = EXACT

    @property
    def name(self) -> str:
        """What the point and its folder are called."""
        parts = [self.level.name if self.level else DENSE]
        parts += [RECOVERED] if self.recovered else []
        parts += [self.format] if self.format != EXACT else []
        return "-".join(parts)

    @property
    def exact(self) -> Variant:
        """The checkpoint that a quantised point is made of."""
        return replace(self, format=EXACT)


@dataclass(frozen=True)
class FrontierJob:
    """A checked request; `job` holds the open model and the recipe that all points share."""

    request: CompareRequest
    job: Job
    targets: tuple[Target, ...]
    levels: tuple[Level, ...]
    questions: Questions | None
    settings: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return self.request.output

    @property
    def recovers(self) -> bool:
        """Whether points are trained back too."""
        return bool(self.request.recover_tokens)

    def list_variants(self) -> Iterator[Variant]:
        """Yield the points, the dense model first, and what a point is made of before it."""
        formats = self.request.formats
        for name in dict.fromkeys((EXACT, *formats)):
            yield Variant(None, format=name)
        for level in self.levels:
            if self.recovers or EXACT in formats:
                yield Variant(level)
            for name in formats:
                if self.recovers or name != EXACT:
                    yield Variant(level, self.recovers, name)


def prepare_frontier(request: CompareRequest, console: Console) -> FrontierJob:
    """Check everything that can be checked without running the model; raises UserError."""
    check_store(request.output, request.overwrite)
    check_request(request)
    names = list_profiles(request)
    recipes = list_recipes(request, names[0])
    asked = Request(
        request.source, recipes[0][1], request.text, request.eval_text, export=False, speed=request.speed
    )  # fmt: skip
    job = prepare_job(asked, console)
    check_place(request, job)
    targets = tuple(open_target(name, request, job) for name in names)
    check_predicted(request, targets[0])
    levels = tuple(open_level(name, recipe, job, console) for name, recipe in recipes)
    made = FrontierJob(request, job, targets, levels, read_questions(request, console), {})
    check_room(made)
    return replace(made, settings=describe_settings(made))


# Flags


def check_request(request: CompareRequest) -> None:
    """Raise UserError for flags that cannot be meant, or not together."""
    if request.text is None:
        raise UserError("A comparison needs text to calibrate and to evaluate on: give --text FILE.")
    unknown = [name for name in request.formats if name not in BITS]
    if unknown or not request.formats:
        raise UserError(f"--formats: '{','.join(unknown)}' is not among {','.join(BITS)}; list one or more of them.")
    if request.recipe.budget != "keep" or request.recipe.keep != Recipe().keep:
        raise UserError(
            f"recipe: '{request.recipe.budget}' is one point, and a comparison has several: take it out and give "
            "--keep, --speedup or --points."
        )
    if request.recover_tokens:
        read_amount(request.recover_tokens, COUNTS, "--recover-tokens", "200k")
        if request.eval_text is None:
            raise UserError(
                "--recover-tokens trains on all of --text, so that nothing of it is left to evaluate on: give "
                "--eval-text FILE too."
            )
    if request.search:
        check_search(request)


def check_search(request: CompareRequest) -> None:
    """Raise UserError where no search can be made."""
    if importlib.util.find_spec("optuna") is None:
        raise UserError("--search needs Optuna: pip install 'lightpress[search]'.")
    if request.levels.speedup:
        raise UserError("--search varies --keep between its levels: give --keep or --points with it, not --speedup.")


def check_predicted(request: CompareRequest, target: Target) -> None:
    """Raise UserError for a search on a device that nothing is predicted for."""
    if request.search and target.device is None:
        raise UserError(
            f"--search goes by predicted speeds, and {target.name} has no profile yet: measure it once with "
            "`lightpress profiles measure`, or give another --profile first."
        )


def list_profiles(request: CompareRequest) -> tuple[str, ...]:
    """Return the profiles as they were given; this machine where none was."""
    return tuple(dict.fromkeys(request.profiles or (request.recipe.profile or THIS_MACHINE,)))


def list_recipes(request: CompareRequest, profile: str) -> list[tuple[str, Recipe]]:
    """Return each level's name and recipe, the largest model first; `profile` decides shapes, if it is known here."""
    first = request.formats[0] if EXACT not in request.formats else ""
    base = replace(request.recipe, profile=profile, format=first)
    if find_profile(profile) is None:
        base = replace(base, profile="", format="", workload=Recipe().workload, devices=1)
    if request.levels.speedup:
        ratios = {read_amount(text, RATIOS, "--speedup", "1.2,1.5,2") for text in request.levels.speedup}
        return [(f"speedup-{ratio:g}", replace(base, speedup=f"{ratio:g}x")) for ratio in sorted(ratios)]
    shares = request.levels.keep or spread_levels(request.levels.points)
    if 1 in shares:
        raise UserError("--keep 1 is the dense model, which every comparison has: leave it out.")
    return [(name_keep(share), replace(base, keep=share)) for share in sorted(set(shares), reverse=True)]


def name_keep(share: float) -> str:
    """Return the name of a share, with two digits where they say it all."""
    return f"keep-{share:.2f}" if round(share, 2) == share else f"keep-{share:g}"


def open_level(name: str, recipe: Recipe, job: Job, console: Console) -> Level:
    """Return a level with its goal; UserError where it cannot be planned for."""
    recipe = replace(recipe, length=job.recipe.length)
    goal, _ = make_goal(recipe, job.spec, storage_dtype(job.checkpoint, job.spec).itemsize)
    check_goal(goal, recipe, console)
    return Level(name, recipe, goal)


def read_questions(request: CompareRequest, console: Console) -> Questions | None:
    """Read task files and find lm-eval's tasks; None where nothing is asked."""
    flags = request.tasks
    if not flags:
        return None
    wanted = TaskRequest(flags.names, flags.folder, flags.limit, flags.shots)
    return gather_questions(wanted, flags.pairs, flags.choices, console)


def read_texts(made: FrontierJob, console: Console) -> Texts:
    """Read the text to calibrate on, and that to compare on; UserError where it is too short for both."""
    request = replace(made.job.request, output=made.folder)  # without an output nothing is kept for evaluation
    texts = gather_texts(replace(made.job, request=request), console)
    if texts.evaluation is None:
        raise UserError(f"{made.request.text}: is too short to calibrate and to compare on; give --eval-text FILE too.")
    return texts


# Devices


def find_profile(name: str) -> Any:
    """Return a profile; None for this machine where nobody measured it. UserError for an unknown one."""
    if name == THIS_MACHINE and not (user_folder() / f"{THIS_MACHINE}.toml").is_file():
        return None
    return load_profile(name)


def open_target(name: str, request: CompareRequest, job: Job) -> Target:
    """Return a device with its workload; UserError where it could not run what is made."""
    profile = find_profile(name)
    work = read_workload(request.recipe.workload)
    if name == THIS_MACHINE and work.batch > 1:
        raise UserError(
            f"--workload {request.recipe.workload}: {THIS_MACHINE} is measured with one sequence at a time; leave its "
            "batch out, or compare on other profiles."
        )
    if profile is None:
        return Target(name, None, work)
    recipe = replace(request.recipe, profile=name, format="")
    device = Device(profile, settle_workload(recipe, job.spec, profile))
    target = Target(profile.name, device, device.workload)
    check_artifact(target, job)
    if not any(open_format(target, own, job, request.recipe) for own in request.formats):
        raise UserError(
            f"--profile {name}: {profile.runtime.name} there reads none of --formats {','.join(request.formats)}: add "
            "a format that it has, or leave the profile out."
        )
    return target


def check_artifact(target: Target, job: Job) -> None:
    """Raise UserError where the device's runtime could not open the model however it was compressed."""
    written = replace(job.request, output=Path(), export=True)
    try:
        check_runtime(replace(job, request=written, device=target.device))
    except UserError as error:
        reason = str(error.__cause__ or error).rstrip(".")
        why = reason.split(";")[0]
        raise UserError(f"{target.name} could not run this model ({why}): leave the profile out.") from error


def open_format(target: Target, name: str, job: Job, recipe: Recipe) -> Device | None:
    """Return the device with the workload in a number format; None where it does not read that one."""
    device = target.device
    if device is None:
        return None
    try:
        work = settle_workload(
            replace(recipe, profile=target.name, format="" if name == EXACT else name), job.spec, device.profile
        )
    except UserError:
        return None
    # Our quantised graphs have their head in 8 bits.
    head = "int8" if BITS[name] and device.profile.runtime.export == "onnx" else ""
    return Device(device.profile, replace(work, head=head))


# Place


def check_place(request: CompareRequest, job: Job) -> None:
    """Raise UserError where the output cannot be written, or lies inside the input."""
    check_output(request.output / "points" / DENSE / "new", job.checkpoint.folder)
    check_writable(request.output / "points")
    tasks = request.tasks
    if request.overwrite:
        texts = (request.text, request.eval_text, tasks.folder, *tasks.pairs, *tasks.choices)
        check_kept(request.output, (job.checkpoint.folder, *texts))
    if request.figures is not None:
        check_figures(request.figures)


def check_figures(folder: Path) -> None:
    """Raise UserError where no files can be written into a folder of figures."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--figures {folder}: is a file; choose a folder.")
    try:
        check_writable(folder / "new")
    except UserError as error:
        reason = error.__cause__.strerror if isinstance(error.__cause__, OSError) else ""
        raise UserError(f"--figures {folder}: cannot be made ({reason}); choose another folder.") from error


def check_room(made: FrontierJob) -> None:
    """Raise UserError where the disk cannot hold all points."""
    spec, request = made.job.spec, made.request
    itemsize = storage_dtype(made.job.checkpoint, spec).itemsize
    measured = any(target.measured for target in made.targets)
    needed = 0
    for variant in made.list_variants():
        if (made.folder / "points" / variant.name / "point.json").is_file() and not request.overwrite:
            continue
        recipe = variant.level.recipe if variant.level else None
        keep = recipe.keep if recipe and recipe.budget == "keep" else 1.0
        stored = itemsize if variant.level else 0
        needed += estimate_disk(spec.shape, keep, stored, measured or variant.format != EXACT)
    trials = max(0, request.search - len(list((made.folder / "points").glob("search-*/point.json"))))
    if trials:
        keep = max(level.recipe.keep for level in made.levels)
        graphs = measured or request.formats != (EXACT,)
        needed += trials * estimate_disk(spec.shape, keep, itemsize, graphs)
    check_space(request.output, needed)


def check_jobs(made: FrontierJob, texts: Texts) -> None:
    """Raise UserError where so many processes need more memory than is free.

    Each, and this one, holds the dense model's last stream on the evaluation text beside what it works on.
    """
    jobs, job = made.request.jobs, made.job
    assert texts.evaluation is not None
    stream = FLOAT * texts.evaluation.ids.numel() * job.spec.shape.hidden
    working = estimate_memory(job.spec.shape, job.recipe, storage_dtype(job.checkpoint, job.spec).itemsize)
    needed, free = jobs * working + (jobs + 1) * stream, free_memory()
    if jobs > 1 and free is not None and needed > free:
        raise UserError(
            f"--jobs {jobs} needs about {format_bytes(needed)} of memory and {format_bytes(free)} are free: give fewer."
        )


def describe_settings(made: FrontierJob) -> dict[str, Any]:
    """Return what decides the points, by what a user would call it: a folder holds points of one such setting."""
    request, recipe = made.request, asdict(made.job.recipe)
    tasks = request.tasks
    return {
        "checkpoint": made.job.checkpoint.sha256(),
        "recipe": {name: value for name, value in recipe.items() if name not in APART},
        "text": hash_file(request.text),
        "evaluation text": hash_file(request.eval_text),
        "first profile": [made.targets[0].name, hash_profile(made.targets[0].device)],
        "format to plan for": made.job.recipe.format,
        "tokenizer": {path.name: hash_file(path) for path in made.job.checkpoint.side_files()},
        "number of recovery tokens": request.recover_tokens,
        "set of tasks": {
            "names": tasks.names, "files": [hash_file(path) for path in (*tasks.pairs, *tasks.choices)],
            "folder": [hash_file(path) for path in sorted(tasks.folder.rglob("*.y*ml"))] if tasks.folder else None,
            "limit": tasks.limit, "shots": tasks.shots, "own": request.scorer,
        },
        "number of samples": request.samples,
    }  # fmt: skip


def hash_file(path: Path | None) -> str | None:
    """Return the SHA-256 of a file."""
    if path is None:
        return None
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_profile(device: Device | None) -> str | None:
    """Return the SHA-256 of what a profile says."""
    return hashlib.sha256(repr(device.profile).encode()).hexdigest() if device else None
