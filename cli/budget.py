"""From flags to a goal: the device, the workload, and the limit that the plan must meet. Imported by running verbs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from compress.errors import UserError
from compress.goal import Goal, ParameterCosts, keep_goal, sum_costs
from compress.recipe import Recipe
from compress.shapes import ModelShape
from compress.spec import ModelSpec
from profiles.budget import MemoryCosts, TimeCosts
from profiles.cost import DECODE, PREFILL, REQUEST, Cost, Workload, estimate_cost, kv_bytes, weight_bytes
from profiles.loader import QUANTISATIONS, load_profile
from profiles.profile import Profile
from profiles.rules import Steps, shape_steps

QUANTISED = ("int8", "int4")
THIS_MACHINE = "this-machine"
PROMPT, OUTPUT = 128, 32  # what `bench` measures unless told otherwise
COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9}
BYTES = {
    "": 1.0, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30, "tib": 2.0**40,
}  # fmt: skip
SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
RATIOS = {"": 1.0, "x": 1.0}
MOST = 1e18  # no amount of anything here is larger
MOST_TOKENS = 2**24
# Formats by name: types of weights, of activations (none: the profile's first), and of keys and values.
FORMATS: Mapping[str, tuple[str, str | None]] = {
    "fp32": ("fp32", "fp32"), "fp16": ("fp16", "fp16"), "bf16": ("bf16", "bf16"),
    "w8a8": ("int8", "int8"), "int8": ("int8", None), "int4": ("int4", None),
}  # fmt: skip


@dataclass(frozen=True)
class Device:
    """What the result is meant for: a profile, and what is run on it."""

    profile: Profile
    workload: Workload

    def estimate(self, shape: ModelShape) -> Cost:
        """Return the predicted cost of a shape."""
        return estimate_cost(shape, self.profile, self.workload)


def read_amount(text: str, units: Mapping[str, float], where: str, example: str) -> float:
    """Return a number above 0 with one of `units` behind it; UserError otherwise."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)\s*", text.lower())
    if found is None or found[2] not in units:
        names = ", ".join(unit for unit in units if unit)
        raise UserError(f"{where} {text} is not a number with a unit ({names}); give it like {example}.")
    if not 0 < float(found[1]) * units[found[2]] < MOST:
        raise UserError(f"{where} {text} has to be above 0 and of a size that exists; give it like {example}.")
    return float(found[1]) * units[found[2]]


def read_workload(text: str) -> Workload:
    """Return the workload that `--workload` names, its types not yet settled."""
    phase, _, sizes = text.strip().lower().rpartition(":")
    if not phase and sizes in (DECODE, PREFILL):
        return Workload(sizes, PROMPT, OUTPUT)
    found = re.fullmatch(r"([0-9]+)\+([0-9]+)(?:@([0-9]+))?", sizes)
    prompt, output, batch = (int(number or 1) for number in found.groups()) if found else (0, 0, 0)
    sound = 1 <= min(prompt, output, batch) <= max(prompt, output, batch) <= MOST_TOKENS
    if not sound or phase not in ("", DECODE, PREFILL, REQUEST):
        raise UserError(
            f"--workload {text}: give decode, prefill, PROMPT+OUTPUT or PROMPT+OUTPUT@BATCH such as 512+64@4, or a "
            "phase of that, such as decode:512+64@4."
        )
    return Workload(phase or REQUEST, prompt, output, batch)


def refuse_idle(recipe: Recipe) -> None:
    """Raise UserError for flags that say something of a device where none is named."""
    sized = recipe.budget == "memory"
    idle = {
        "--format": recipe.format, "--devices": recipe.devices > 1,
        "--workload": recipe.workload != Recipe().workload and not sized,
    }  # fmt: skip
    given = [name for name, said in idle.items() if said]
    if given:
        raise UserError(f"{' and '.join(given)} without a device would do nothing: name one with --profile.")


def open_device(recipe: Recipe, spec: ModelSpec, planned: bool = False) -> Device | None:
    """Return the device that the recipe names; None where it names none and needs none (as `planned` ones do)."""
    timed = recipe.budget in ("speedup", "latency") and not planned
    if not recipe.profile and not timed:
        refuse_idle(recipe)
        return None
    try:
        profile = load_profile(recipe.profile or THIS_MACHINE)
    except UserError as error:
        if recipe.profile:
            raise
        raise UserError(
            f"--{recipe.budget} needs to know a device: give --profile NAME (see `lightpress profiles list`), or "
            "measure this machine once with `lightpress profiles measure`."
        ) from error
    return Device(profile, settle_workload(recipe, spec, profile))


def settle_workload(recipe: Recipe, spec: ModelSpec, profile: Profile) -> Workload:
    """Return the workload with its types, checked against the profile and the model's context."""
    formats, work = profile.formats, read_workload(recipe.workload)
    name = recipe.format
    if name and name not in FORMATS:
        raise UserError(f"--format {name} is not one of {', '.join(FORMATS)}.")
    weights, activations = FORMATS[name] if name else (formats.weights[0], None)
    activations = activations or formats.activations[0]
    for kind, own, allowed in (
        ("weights", weights, formats.weights), ("activations", activations, formats.activations),
    ):  # fmt: skip
        if own not in allowed:
            raise UserError(
                f"--format {name}: {profile.name} has no {own} {kind}; it has {', '.join(allowed)}: choose another "
                "format or profile."
            )
    check_context(recipe, work, spec)
    check_quantisation(name, (weights, activations), profile)
    if recipe.devices > max(profile.link.devices, 1):
        raise UserError(
            f"--devices {recipe.devices}: {profile.name} joins at most {max(profile.link.devices, 1)}; give fewer."
        )
    # Our own graphs keep all keys and mask those outside a window; servers hold the window only.
    served = profile.runtime.export == "ascend-hf"
    windows = [layer.window for layer in spec.layers if layer.window is not None and served]
    return replace(
        work, weights=weights, activations=activations, kv=formats.kv[0], devices=recipe.devices,
        window=min(windows, default=None),
    )  # fmt: skip


def check_context(recipe: Recipe, work: Workload, spec: ModelSpec) -> None:
    """Raise UserError for a workload longer than the model's context."""
    if work.context > spec.max_positions:
        raise UserError(
            f"--workload {recipe.workload}: {work.prompt} + {work.output} tokens are more than the model's context of "
            f"{spec.max_positions}; give fewer."
        )


def check_quantisation(name: str, types: tuple[str, str], profile: Profile) -> None:
    """Raise UserError for a quantised format that the profile's runtime does not read."""
    if types[0] not in QUANTISED:
        return
    known = profile.formats.quantisations
    pairs = [QUANTISATIONS[own] for own in known]
    if types not in [(weights, inputs or profile.formats.activations[0]) for weights, inputs in pairs]:
        have = ", ".join(known) or "none"
        raise UserError(f"--format {name}: {profile.runtime.name} on {profile.name} reads these quantisations: {have}.")


def make_goal(
    recipe: Recipe, spec: ModelSpec, itemsize: int, planned: bool = False
) -> tuple[Goal | None, Device | None]:
    """Return what the plan must meet (None: a plain `--keep`, or a plan there is already) and the device.

    `itemsize`: bytes of a stored weight.
    """
    device = open_device(recipe, spec, planned)
    if planned:
        return None, device
    if device is not None and recipe.shapes == "per-layer" and not device.profile.rules.uneven_layers:
        raise UserError(
            f"--shapes per-layer: {device.profile.runtime.name}, the runtime of {device.profile.name}, opens only "
            "models whose layers are all alike; leave it out, or choose a profile that runs ONNX."
        )
    makers = {"params": params_goal, "memory": memory_goal, "speedup": speed_goal, "latency": speed_goal}
    if recipe.budget in makers:
        goal = makers[recipe.budget](recipe, spec, device, itemsize)
    elif device is not None:
        goal = share_goal(recipe, spec)
    else:
        return None, None
    return (goal if device is None else take_steps(goal, device, spec)), device


def take_steps(goal: Goal, device: Device, spec: ModelSpec) -> Goal:
    """Return the goal with the multiples that the device wants."""
    steps: Steps = shape_steps(device.profile, device.workload, spec.shape)
    return replace(goal, ffn_step=steps.ffn, hidden_step=steps.hidden, kv_step=steps.kv_heads)


def share_goal(recipe: Recipe, spec: ModelSpec) -> Goal:
    """Return the goal of `--keep` beside a profile, whose steps it takes."""
    return keep_goal(spec.shape, recipe)


def params_goal(recipe: Recipe, spec: ModelSpec, device: Device | None, itemsize: int) -> Goal:
    """Return the goal of `--params`."""
    limit = int(read_amount(recipe.params, COUNTS, "--params", "2.6B or 350M"))
    total = spec.shape.parameters
    return Goal(
        ParameterCosts(embeddings=True), limit, total, f"--params {recipe.params}", "parameters",
        lambda value: f"--params {value}",
    )  # fmt: skip


def memory_goal(recipe: Recipe, spec: ModelSpec, device: Device | None, itemsize: int) -> Goal:
    """Return the goal of `--memory`: the stored type's bytes where no device says how weights are kept."""
    limit = int(read_amount(recipe.memory, BYTES, "--memory", "4GiB or 900MB"))
    exact = {4: "fp32", 2: "fp16"}.get(itemsize, "fp32")
    plain = replace(read_workload(recipe.workload), weights=exact, activations=exact, kv=exact)
    check_context(recipe, plain, spec)
    work = device.workload if device else plain
    costs = MemoryCosts(work, device.profile.formats.activations[0] if device else exact)
    dense = sum_costs(costs, spec.shape)
    return Goal(
        costs, limit, dense, f"--memory {recipe.memory}", "bytes",
        lambda value: f"--memory {math.ceil(value / 2**10)}KiB",
    )  # fmt: skip


def speed_goal(recipe: Recipe, spec: ModelSpec, device: Device | None, itemsize: int) -> Goal:
    """Return the goal of `--speedup` or `--latency`, in nanoseconds of the workload."""
    assert device is not None
    profile, work, shape = device.profile, device.workload, spec.shape
    dense = device.estimate(shape).total * 1e9
    if recipe.budget == "speedup":
        ratio = read_amount(recipe.speedup, RATIOS, "--speedup", "1.5x")
        if ratio < 1:
            raise UserError(f"--speedup {recipe.speedup}: must be at least 1x, which is the dense model's speed.")
        limit, asked = dense / ratio, f"--speedup {recipe.speedup} on {profile.name}"
    else:
        limit = read_amount(recipe.latency, SECONDS, "--latency", "25ms") * 1e9
        asked = f"--latency {recipe.latency} on {profile.name}"
    share = min(1.0, limit / dense)
    # Small models may lie in a cache once they are cut; the true time is measured at every candidate (Goal.measure).
    resident = share * (weight_bytes(shape, work, profile) + kv_bytes(shape, work))

    def again(value: int) -> str:
        least = math.floor(1000 * dense / value) / 1000
        return f"--speedup {least:g}x" if recipe.budget == "speedup" else f"--latency {math.ceil(value / 1e3)}us"

    return Goal(
        TimeCosts(profile, work, resident), int(limit), int(dense), asked, "nanoseconds", again,
        measure=lambda new: device.estimate(new).total * 1e9,
    )  # fmt: skip


def describe_workload(device: Device) -> str:
    """Return a workload in words."""
    work = device.workload
    what = {
        PREFILL: f"a prompt of {work.prompt} tokens",
        DECODE: f"one token after a prompt of {work.prompt}, of {work.output}",
        REQUEST: f"{work.prompt} prompt and {work.output} new tokens",
    }[work.phase]
    many = f", {work.devices} devices" if work.devices > 1 else ""
    types = work.weights
    if work.weights != work.activations:
        types = f"{work.weights} weights, {work.activations} activations"
    return f"{what}, batch {work.batch}, {types}{many}"
