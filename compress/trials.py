"""Plans tried before one is chosen: rebuilt in memory on part of the text and measured against the dense model.

On a small model a rebuild takes seconds: the prices of the axes come from repaired cuts as deep as the budget wants
them, and the best few shapes are measured, not predicted. On a large model the prices come from one cut per axis
without repair (probe.py) and the best prediction is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
import torch.nn.functional as F

from compress.calibrate import fill_embeddings, share_text
from compress.checkpoint import Checkpoint
from compress.choose import Choice, Prices, Scope, choose_plan, full_scope
from compress.decoder import compute_logits
from compress.errors import UserError
from compress.goal import Goal
from compress.gradients import PIECE_VALUES, SAMPLED, BackwardOptions, sensitivities
from compress.hidden import share_windows
from compress.importance.findings import Findings
from compress.parallel import ALONE, Group
from compress.plan import Plan, keep_everything
from compress.probe import NO_SHARES, Shares, cut_spec, price_damage, probe_damage, probe_plans, weigh_axes
from compress.recipe import Recipe
from compress.settle import settle_plan
from compress.spec import ModelSpec
from compress.spec_change import add_biases
from compress.surgery.describe import REPAIRED
from compress.surgery.ends import cut_ends, finish_norm, read_new_head, storage_types
from compress.surgery.job import SMALL_MODEL, Rebuild, open_streams, start_pruned
from compress.surgery.rebuild import rebuild_layers
from compress.text import Windows
from compress.weights import read_head

TRIALS = 6  # plans measured on a small model
LEARNED, MEASURED = 32, 12  # windows of about 256 tokens that a trial learns from, and that measure it
# Tokens of the Fisher sums: as many as cost little beside a calibration pass.
SENSED, SENSED_WORK = 4096, 2**37

Progress = Callable[[str, int, int], None]


def ignore(stage: str, done: int, total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Bench:
    """Where plans are tried: the dense model, the text, the recipe, a goal other than the recipe's `keep`.

    The processes of a `group` share each trial's windows; the few windows of sensitivities and probes all run whole.
    """

    checkpoint: Checkpoint
    spec: ModelSpec
    windows: Windows
    recipe: Recipe
    goal: Goal | None = None
    group: Group = ALONE

    @property
    def share(self) -> float:
        """What the budget leaves of the dense model's cost."""
        return self.recipe.keep if self.goal is None else self.goal.share


def count_trials(bench: Bench) -> int:
    """Return how many plans are measured: what the recipe says, or 6 for models up to 16M parameters.

    Raises UserError where the text is too short for the trials asked for: windows that measure teach nothing.
    """
    recipe, enough = bench.recipe, len(bench.windows.ids) > 1
    if recipe.trials > 0 and not enough:
        raise UserError(
            f"--trials {recipe.trials} needs at least two windows of text, one to learn from and one to measure with; "
            "give more text, a smaller --length, or --trials 0."
        )
    if recipe.trials >= 0:
        return recipe.trials
    small = bench.spec.shape.layer_parameters <= SMALL_MODEL
    return TRIALS if small and enough and recipe.repair == "lstsq" else 0


def search_plan(bench: Bench, findings: Findings, progress: Progress) -> Plan:
    """Return the plan: the best prediction, or on a small model the best of several measured ones."""
    spec, recipe = bench.spec, bench.recipe
    trials = count_trials(bench)
    if recipe.ratio != "loss" or not trials:
        axis = {}
        if recipe.ratio == "loss" and len(recipe.axes) > 1:
            axis = weigh_axes(bench.checkpoint, spec, findings, bench.windows, recipe.axes)
        return settle(bench, findings, choose_plan(spec, findings, recipe, Prices(axis), goal=bench.goal).plan)
    measured = price_axes(bench, findings, progress)
    choices = list_choices(bench, findings, make_prices(findings, measured))
    layers = price_layers(bench) if trials > 1 else {}
    if layers:
        # How sensitive layers are is itself an estimate: plans with and without it are measured against each other.
        choices = join_choices(choices, list_choices(bench, findings, make_prices(findings, measured, layers)))
    choices, losses = bench.group.tell(choices[:trials]), []
    for place, choice in enumerate(choices):
        progress("try plans", place, len(choices))
        losses.append(measure_plan(bench, choice.plan))
    progress("try plans", len(choices), len(choices))
    best = min(range(len(choices)), key=losses.__getitem__)
    plan: Plan = choices[best].plan
    tried = [{"loss": round(loss, 4), **outline_plan(c.plan)} for loss, c in zip(losses, choices, strict=True)]
    return replace(plan, notes={**plan.notes, "measured_loss": round(losses[best], 4), "tried": tried})


def settle(bench: Bench, findings: Findings, plan: Plan) -> Plan:
    """Return the plan with what its shape leaves open."""
    return settle_plan(bench.checkpoint, bench.spec, findings, bench.recipe, plan)


def outline_plan(plan: Plan) -> dict[str, object]:
    """Return the sizes of a tried plan."""
    return {
        "layers": len(plan.layers),
        "hidden": len(plan.hidden),
        "kv_groups": [row.group_count for row in plan.layers],
        "ffn": [len(row.ffn) for row in plan.layers],
    }


def price_axes(bench: Bench, findings: Findings, progress: Progress = ignore) -> dict[str, tuple[float, Plan]]:
    """Return for each axis the loss of one repaired cut, measured end to end, and its plan.

    Absorbed norms cost something with nothing cut at all; that is no axis's fault.
    """
    recipe, cut = bench.recipe, 1 - bench.share
    base = 0.0
    if recipe.absorb != "none":
        base = measure_plan(bench, settle(bench, findings, keep_everything(bench.spec.shape)))
    cuts = {"ffn": cut, "kv": cut, "hidden": cut / 2, "layers": cut / 2}
    plans = {axis: plan for axis, plan in probe_plans(bench.spec, findings, cuts).items() if axis in recipe.axes}
    plans, measured = bench.group.tell(plans), {}
    for place, (axis, plan) in enumerate(plans.items()):
        progress("price axes", place, len(plans))
        measured[axis] = (measure_plan(bench, settle(bench, findings, plan)) - base, plan)
    progress("price axes", len(plans), len(plans))
    return measured


def make_prices(findings: Findings, measured: Mapping[str, tuple[float, Plan]], layers: Shares = NO_SHARES) -> Prices:
    """Return the prices at which every probe costs what it was measured to cost, given the layers' shares."""
    axis = {
        name: price_damage(added, probe_damage(findings, plan, name, layers))
        for name, (added, plan) in measured.items()
    }
    return Prices(axis, layers)


def price_layers(bench: Bench) -> dict[int, tuple[float, float]]:
    """Return each layer's sensitivity to errors of its attention and its MLP, relative to the mean of all layers.

    From the Fisher information of the residual stream (gradients.py); nothing where all layers are cut alike.
    """
    if bench.recipe.shapes != "per-layer":
        return {}
    count = max(1, min(SENSED, SENSED_WORK // bench.spec.shape.parameters) // bench.windows.ids.shape[1])
    recipe = bench.recipe
    options = BackwardOptions(SAMPLED, seed=recipe.seed, spill_bytes=recipe.spill_bytes)
    try:
        found = sensitivities(bench.checkpoint, bench.spec, bench.windows.take(count), options)
    except UserError:  # windows too short to hold an ordinary token: the plan does without this refinement
        return {}
    attention = max(sum(each.attention for each in found) / len(found), 1e-12)
    mlp = max(sum(each.mlp for each in found) / len(found), 1e-12)
    return {each.layer: (each.attention / attention, each.mlp / mlp) for each in found}


def join_choices(first: Sequence[Choice], second: Sequence[Choice]) -> list[Choice]:
    """Return both lists in turns, without repeats."""
    turns = [choice for pair in zip_longest(first, second) for choice in pair if choice is not None]
    found: dict[tuple[object, ...], Choice] = {}
    for choice in turns:
        found.setdefault((choice.plan.hidden, choice.plan.layers), choice)
    return list(found.values())


def list_choices(bench: Bench, findings: Findings, prices: Prices) -> list[Choice]:
    """Return different plans, best prediction first: the optimum, and the optima of other depths and widths."""
    spec, recipe = bench.spec, bench.recipe
    found: dict[tuple[object, ...], Choice] = {}
    for scope in list_scopes(spec, findings, recipe, bench.goal):
        try:
            choice = choose_plan(spec, findings, recipe, prices, scope, bench.goal)
        except UserError:
            continue
        choice = replace(choice, plan=settle(bench, findings, choice.plan))
        found.setdefault((choice.plan.hidden, choice.plan.layers), choice)
    if not found:
        choose_plan(spec, findings, recipe, prices, goal=bench.goal)  # says which bound stops it
    return sorted(found.values(), key=lambda choice: choice.loss)


def list_scopes(
    spec: ModelSpec, findings: Findings, recipe: Recipe, goal: Goal | None = None
) -> Iterator[Scope]:
    """Yield the full scope and parts of it: each number of dropped layers with all widths, then with few of them."""
    full = full_scope(spec, findings, recipe, goal)
    yield full
    shares = sorted({min(full.widths, key=lambda w: abs(w - share * spec.shape.hidden)) for share in (1.0, 0.9, 0.8)})
    for dropped in range(min(full.most_dropped, len(spec.layers) // 2) + 1):
        yield Scope(full.widths, dropped, dropped)
        for width in reversed(shares):
            yield Scope((width,), dropped, dropped)


def describe_trial(bench: Bench, plan: Plan) -> ModelSpec:
    """Return the description of a tried model, for running only: no stock class limits its shape or its biases."""
    new = cut_spec(bench.spec, plan)
    if bench.recipe.biases == "none":
        return new
    shape = add_biases(new, new.shape, REPAIRED, extend=True)
    layers = tuple(
        replace(layer, shape=own, names={**{f"{name}_bias": "" for name in own.biases}, **layer.names})
        for layer, own in zip(new.layers, shape.layers, strict=True)
    )
    return replace(new, shape=shape, layers=layers)


def measure_plan(bench: Bench, plan: Plan) -> float:
    """Return KL(dense || rebuilt) in nats per token on windows that the rebuild does not learn from.

    The rebuild is the closed-form one: no refinement, part of the text, nothing written.
    """
    recipe = replace(bench.recipe, refine=0)
    new = describe_trial(bench, plan)
    picked, most = pick_windows(bench.windows)
    windows, measured = share_trial(bench.group, picked, most)
    with ExitStack() as stack:
        types = storage_types(bench.checkpoint, bench.spec, new)
        job = Rebuild(bench.checkpoint, bench.spec, new, plan, recipe, types, bench.group)
        streams = open_streams(stack, job, windows, measured)
        fill_embeddings(bench.checkpoint, bench.spec, windows, streams.dense)
        start_pruned(new, windows, streams, cut_ends(job, ("embed",))["embed"])
        for weights in rebuild_layers(job, streams):
            del weights
        final = finish_norm(job, streams).to(torch.float32)
        ends = {"final_norm": final, "head": read_new_head(job)}
        dense = read_head(bench.checkpoint, bench.spec, torch.float32)
        total, piece = 0.0, max(1, PIECE_VALUES // new.shape.vocab)  # logits of a long window would be the peak
        for place in range(len(windows.ids) - measured, len(windows.ids)):
            pair = (streams.dense.read(place, place + 1)[0], streams.pruned.read(place, place + 1)[0])
            for one, other in zip(*(torch.split(stream, piece) for stream in pair), strict=True):
                wanted = compute_logits(bench.spec, dense, one).log_softmax(-1)
                found = compute_logits(new, ends, other).log_softmax(-1)
                total += float(F.kl_div(found, wanted, reduction="sum", log_target=True))
    return bench.group.total(total)[0] / (most * windows.ids.shape[1])


def share_trial(group: Group, windows: Windows, measured: int) -> tuple[Windows, int]:
    """Return this process's windows of a trial, and how many at their end measure it."""
    own = share_windows(group, *windows.ids.shape)
    return share_text(group, windows), len(range(max(own.start, len(windows.ids) - measured), own.stop))


def pick_windows(windows: Windows) -> tuple[Windows, int]:
    """Return the windows of a trial, and how many at their end measure it."""
    count = len(windows.ids)
    measured = max(1, min(MEASURED, count // 4))
    learned = max(1, min(LEARNED, count - measured))
    spread: Sequence[int] = torch.linspace(0, count - 1, min(count, learned + measured)).long().tolist()
    return Windows(windows.ids[list(spread)], windows.source), measured
