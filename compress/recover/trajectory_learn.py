"""The outer loop of trajectory matching: prompts and rates learned over many starts, then put back as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.recover.functional import Model
from compress.recover.trajectory import (
    BOTTOM,
    Learned,
    Matching,
    Samples,
    Start,
    Theta,
    TrajectoryOptions,
    differentiate_inner,
    judge,
    match_gradients,
    take_batch,
)
from compress.recover.trajectory_project import Outer, neighbour_gradient, project_prompts, refine_tokens

TESTS = 8  # starts over which outcomes are compared
LEAST_COSINE = 0.05
SWAPS_ON = 2  # starts on which swaps are tried: each trial runs all of them


@dataclass
class Distilled:
    """The outcome: ids with the learned prompts as tokens, and the matching loss as it went.

    `curve`: of each outer step; then means over the same starts: `first` with the real prompts and the rates of the
    start, and with the learned rates `real` (the real prompts), `learned` (the embeddings), `nearest` (the tokens
    nearest to them) and `tokens` (those that are written, after swaps).
    """

    ids: Tensor
    curve: list[float] = field(default_factory=list)
    first: float = float("nan")
    real: float = float("nan")
    learned: float = float("nan")
    nearest: float = float("nan")
    tokens: float = float("nan")


def start_learned(model: Model, samples: Samples, states: Sequence[Theta], options: TrajectoryOptions) -> Learned:
    """Return the real prompts as embeddings, and for each tensor the rate at which they would come nearest."""
    begin, end = samples.learned
    embeddings = F.embedding(samples.ids[:, begin:end], model.ends["embed"])
    size = min(options.batch, len(samples.ids))
    rows = torch.arange(size)
    # In the middle of the trajectory: at its start LoRA's `a` has no gradient, since `b` is zero.
    place = (len(states) - 1 - options.ahead) // 2
    theta, target = states[place], states[place + options.ahead]
    gradients = differentiate_inner(model, theta, options, take_batch(model, samples, embeddings, rows))
    rates = [
        guess_rate(theta[name] - target[name], gradient, options.inner)
        for name, gradient in zip(theta, gradients, strict=True)
    ]
    known = [rate for rate in rates if rate > 0] or [1.0]
    middle = sorted(known)[len(known) // 2]
    return Learned(embeddings, torch.tensor([rate or middle for rate in rates], dtype=embeddings.dtype).log())


def guess_rate(goal: Tensor, gradient: Tensor, steps: int) -> float:
    """Return the rate at which `steps` times this gradient comes nearest to the goal; 0: there is no gradient.

    A gradient hardly along the goal still gets a small rate, since its logarithm is what is learned.
    """
    slope, way = float(gradient.norm()), float(goal.norm())
    if slope <= BOTTOM:
        return 0.0
    along = float((goal * gradient).sum()) / max(slope * way, BOTTOM)
    return max(along, LEAST_COSINE) * way / (steps * slope)


def draw_start(states: Sequence[Sequence[Theta]], samples: Samples, options: TrajectoryOptions, seed: int) -> Start:
    """Draw an expert, a place on its trajectory, and each inner step's samples: all come up before one does again."""
    random = torch.Generator().manual_seed(seed)
    expert = states[int(torch.randint(len(states), (1,), generator=random))]
    place = int(torch.randint(len(expert) - options.ahead, (1,), generator=random))
    count, size = len(samples.ids), min(options.batch, len(samples.ids))
    order = torch.cat([torch.randperm(count, generator=random) for _ in range(-(-options.inner * size // count))])
    rows = tuple(order[step * size : (step + 1) * size] for step in range(options.inner))
    return Start(expert[place], expert[place + options.ahead], rows)


def distil_prompts(
    model: Model, samples: Samples, states: Sequence[Sequence[Theta]], options: TrajectoryOptions,
    outer: Outer | None = None,
) -> Distilled:  # fmt: skip
    """Learn the samples' prompts and put them back as tokens; `states` are the experts'."""
    outer, matching = outer or Outer(), Matching(model, samples, options)
    tests = [draw_start(states, samples, options, -1 - number) for number in range(TESTS)]
    begin, end = samples.learned
    real = samples.ids[:, begin:end]
    start = start_learned(model, samples, states[0], options)
    out = Distilled(samples.ids.clone(), first=judge(matching, start, tests))
    found = learn_prompts(matching, start, states, outer, out.curve)
    nearest = project_prompts(found.embeddings, real, model.ends["embed"], outer)

    def measure(tokens: Tensor) -> float:
        return judge(matching, Learned(F.embedding(tokens, model.ends["embed"]), found.rates), tests)

    out.real, out.learned, out.nearest = measure(real), judge(matching, found, tests), measure(nearest)
    tokens = nearest if out.nearest <= out.real else real
    swapped = refine_tokens(matching, tokens, found.rates, tests[:SWAPS_ON], outer)
    out.ids[:, begin:end], out.tokens = swapped.tokens, measure(swapped.tokens)
    return out


def learn_prompts(
    matching: Matching, start: Learned, states: Sequence[Sequence[Theta]], outer: Outer, curve: list[float]
) -> Learned:
    """Return embeddings and rates after `options.steps` steps of Adam; the matching losses go to `curve`."""
    options, table = matching.options, matching.model.ends["embed"]
    unit = float(table.square().mean().sqrt())
    learned = Learned(start.embeddings.clone().requires_grad_(), start.rates.clone().requires_grad_())
    optimizer = torch.optim.Adam([
        {"params": [learned.embeddings], "lr": options.rate * unit},
        {"params": [learned.rates], "lr": options.tempo},
    ])  # fmt: skip
    for step in range(options.steps):
        begin = draw_start(states, matching.samples, options, options.seed * 1_000_003 + step)
        loss, by_embeddings, learned.rates.grad = match_gradients(matching, learned, begin)
        pull = neighbour_gradient(learned.embeddings.detach(), table, outer.barred)[1]
        learned.embeddings.grad = by_embeddings + options.pull * pull
        optimizer.step()
        curve.append(loss)
        if outer.report is not None:
            outer.report("match trajectories", step + 1, options.steps)
    return Learned(learned.embeddings.detach(), learned.rates.detach())
