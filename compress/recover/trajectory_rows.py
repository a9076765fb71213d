"""Which documents to distil: those whose gradients together point where the experts went.

    along an expert, at a few states s:   goal_s = theta*_t - theta*_{t+M},  g_i,s = gradient of document i there
    score of some documents     sum over s of cos(sum of their g_j,s, goal_s)
    take next the document that raises the score most for each of its tokens

With one inner step at the best rate the matching loss of some documents is 1 - cos^2 of their summed gradient with the
goal: this is the matching loss itself, made linear, and greedily lowered. The method's text was not available (methods
section 3); that documents are chosen, and how, is ours. Picking documents whose sum matches a gradient is known from
GRAD-MATCH (arXiv 2103.00123); single documents like the goal, as LESS takes them, are alike among themselves.

A gradient is kept as a sketch: each of its values is added, under a random sign, to one of a few thousand sums.
Inner products are kept in the mean (count sketch, Charikar et al. 2002).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.recover.data import Document
from compress.recover.functional import Model, embed_tokens, run_layers, stack_documents, sum_losses
from compress.recover.trajectory import Report, Theta, TrajectoryOptions, apply_theta

SKETCH = 8192  # values of a gradient that are kept
# States of each expert at which gradients are compared, from its first to the last with a target: at the start all
# documents pull the same way. (Our choice; not shown to train better.)
PLACES = 2


@dataclass(frozen=True)
class Sketch:
    """Where each value of the parameters goes, `[parameters]`, and its sign; None: few enough to be kept whole."""

    places: Tensor | None
    signs: Tensor | None
    size: int

    def press(self, theta: Mapping[str, Tensor]) -> Tensor:
        """Return the sums `[size]` of some parameters or their gradients."""
        flat = torch.cat([tensor.flatten() for tensor in theta.values()])
        if self.places is None or self.signs is None:
            return flat
        return flat.new_zeros(self.size).index_add_(0, self.places, flat * self.signs)


def draw_sketch(theta: Mapping[str, Tensor], size: int, seed: int) -> Sketch:
    """Draw a sketch of parameters like `theta`."""
    count = sum(tensor.numel() for tensor in theta.values())
    if count <= size:
        return Sketch(None, None, count)
    random = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (count,), generator=random) * 2 - 1
    dtype = next(iter(theta.values())).dtype
    return Sketch(torch.randint(size, (count,), generator=random), signs.to(dtype), size)


def match_rows(
    model: Model, documents: Sequence[Document], states: Sequence[Sequence[Theta]], options: TrajectoryOptions,
    budget: float, report: Report | None = None,
) -> list[int]:  # fmt: skip
    """Return which documents to take, in the order taken, of at most `budget` tokens together; at least one."""
    sketch = draw_sketch(states[0][0], SKETCH, options.seed)
    features, goals = [], []
    pairs = list(list_segments(states, options))
    for number, (theta, target) in enumerate(pairs):
        goals.append(sketch.press({name: theta[name] - target[name] for name in theta}))
        rows = []
        for place, document in enumerate(documents):
            rows.append(sketch.press(differentiate_document(model, document, theta, options)))
            if report is not None:
                report("compare documents", number * len(documents) + place + 1, len(pairs) * len(documents))
        features.append(torch.stack(rows))
    return take_rows(torch.stack(features), torch.stack(goals), [len(one.ids) for one in documents], budget)


def list_segments(states: Sequence[Sequence[Theta]], options: TrajectoryOptions) -> Iterator[tuple[Theta, Theta]]:
    """Yield starts and targets: the first and the last of each expert's trajectory, where there is room for two."""
    for expert in states:
        last = len(expert) - 1 - options.ahead
        for place in sorted({round(last * part / (PLACES - 1)) for part in range(PLACES)}):
            yield expert[place], expert[place + options.ahead]


def differentiate_document(model: Model, document: Document, theta: Theta, options: TrajectoryOptions) -> Theta:
    """Return the gradients of a document's summed cross entropy by the parameters."""
    ids, weights = stack_documents([document])
    weights[:, 0] = 0
    with torch.enable_grad():
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in theta.items()}
        x = embed_tokens(model, ids)
        last = run_layers(model, x, apply_theta(model, leaves, options))
        loss = sum_losses(model, last, ids, weights.to(x.dtype))[0]
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def take_rows(features: Tensor, goals: Tensor, sizes: Sequence[int], budget: float) -> list[int]:
    """Return rows, greedily: each time the one that brings the sums nearest to the goals for each of its tokens.

    `features` `[states, rows, size]`, `goals` `[states, size]`; a row that is too long for what is left of `budget` is
    passed over. The first is taken in any case.
    """
    ways = (features @ torch.nn.functional.normalize(goals, dim=1)[:, :, None])[:, :, 0]
    squares, lengths = features.square().sum(2), torch.tensor(sizes, dtype=features.dtype)
    total, score, taken, left = torch.zeros_like(goals), 0.0, list[int](), budget
    free = torch.ones(len(sizes), dtype=torch.bool)
    while bool(free.any()):
        energy = total.square().sum(1, keepdim=True) + 2 * (features @ total[:, :, None])[:, :, 0] + squares
        along = ways[:, taken].sum(1, keepdim=True) + ways
        scores = (along / energy.clamp(min=torch.finfo(energy.dtype).tiny).sqrt()).sum(0)
        chosen = int(((scores - score) / lengths).masked_fill(~free, float("-inf")).argmax())
        score = float(scores[chosen])
        taken.append(chosen)
        total = total + features[:, chosen]
        left -= sizes[chosen]
        free[chosen] = False
        free &= lengths <= left
    return taken
