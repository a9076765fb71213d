"""Text distilled by trajectory matching: prompts learned so that a few steps on them train as many steps on real text.

    experts     the model is trained on real documents, its parameters kept every few steps: theta*_0, theta*_1 ...
    rows        documents whose gradients together point where the experts went (trajectory_rows.py); some are
                exchanged for others as long as that trains better (trajectory_exchange.py)
    matching    the student starts at theta*_t and takes N steps on learned prompts with real answers, to theta_N;
                loss = |theta_N - theta*_{t+M}|^2 / |theta*_t - theta*_{t+M}|^2, back through all N steps
                + lambda * mean |E_i - nearest embedding|^2 (trajectory_learn.py)
    projection  each learned embedding becomes its nearest token, and swaps lower the loss (trajectory_project.py);
                text, marked synthetic

The method is NACD's (arXiv 2504.09818; methods section 3). Its stages, and that only prompts are learned, are known;
the choice of rows, the exchanges, the swaps, the sizes, the shape of the regulariser, its scale, the cosine by which
neighbours are found and a learned rate for each tensor are our reconstruction: the paper's text was not available.

Backward keeps one inner step's graph at a time: each step is run again from its stored parameters, last step first,
and passes the gradient by its result on to its start. That is exact, and the memory does not grow with N.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.decoder import PLAIN, Kernels
from compress.errors import UserError
from compress.recover.data import Document
from compress.recover.functional import TWICE, Model, embed_tokens, run_layers, stack_documents, sum_losses
from compress.weights import Weights

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
BOTTOM = 1e-20  # a parameter that the expert never moved has no rate to learn

Theta = dict[str, Tensor]
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TrajectoryOptions:
    """Sizes of experts, inner loop and outer loop.

    `rank`: of the LoRA that trajectories are of, with factor `scale` (0: all projections whole, for tiny models);
    `experts` runs of `expert_steps` steps on `batch` documents, kept every `every`; `ahead`: how many kept states the
    target lies after the start (M); `inner`: the student's steps (N); `prompt`: learned tokens of a sample;
    `steps`, `rate`: of the outer optimiser, the rate as a share of the embeddings' root mean square; `tempo`: its rate
    for the logarithms of the inner rates; `pull`: lambda of the nearest-neighbour regulariser;
    `swaps`: trials of other tokens at the end (None: one for four steps); `candidates`: documents among which samples
    are chosen; `exchanges`: trials of other documents in their place, measured on `tests` documents.
    """

    rank: int = 4
    scale: float = 2.0
    experts: int = 2
    expert_steps: int = 40
    expert_rate: float = 1e-3
    every: int = 5
    ahead: int = 4
    inner: int = 5
    batch: int = 8
    prompt: int = 16
    steps: int = 200
    rate: float = 0.1
    tempo: float = 0.03
    pull: float = 0.1
    swaps: int | None = None
    candidates: int = 1024
    exchanges: int = 50
    tests: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse sizes without a trajectory."""
        least = (
            self.experts, self.every, self.ahead, self.inner, self.batch, self.prompt, self.steps, self.tests,
        )  # fmt: skip
        if min(least) < 1 or self.rank < 0:
            raise UserError("Trajectories need at least 1 expert, step, state ahead, document, test and learned token.")
        if self.expert_steps < self.every * self.ahead:
            raise UserError(
                f"An expert of {self.expert_steps} steps has no state {self.every * self.ahead} steps after its start; "
                "train it longer."
            )


@dataclass(frozen=True)
class Samples:
    """Documents whose first tokens after a fixed start are learned.

    `ids`, `weights` `[samples, length]`, padded on the right; `learned`: the span `[begin, end)` of learned places,
    which count nothing; `sizes`: tokens of each; `numbers`: the documents they are from.
    """

    ids: Tensor
    weights: Tensor
    learned: tuple[int, int]
    sizes: tuple[int, ...]
    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Start:
    """One matching problem: where the student starts, what it should reach, and which samples each step sees."""

    theta: Theta
    target: Theta
    rows: tuple[Tensor, ...]


@dataclass(frozen=True)
class Learned:
    """What is learned: embeddings `[samples, prompt, hidden]`, and the logarithm of each parameter tensor's rate."""

    embeddings: Tensor
    rates: Tensor


# Parameters


def start_theta(model: Model, options: TrajectoryOptions) -> Theta:
    """Return the trained parameters: LoRA's `a` (random) and `b` (zero) of each projection, or the projections.

    LoRA as in arXiv 2106.09685, section 4.1.
    """
    random = torch.Generator().manual_seed(options.seed)
    theta: Theta = {}
    for index, weights in enumerate(model.layers):
        for role in PROJECTIONS:
            dense = weights[role]
            if options.rank == 0:
                theta[f"{index}.{role}"] = dense.clone()
                continue
            noise = torch.randn(options.rank, dense.shape[1], generator=random, dtype=dense.dtype)
            theta[f"{index}.{role}.a"] = noise / dense.shape[1] ** 0.5
            theta[f"{index}.{role}.b"] = dense.new_zeros(dense.shape[0], options.rank)
    return theta


def apply_theta(model: Model, theta: Mapping[str, Tensor], options: TrajectoryOptions) -> list[Weights]:
    """Return the weights of all layers under some parameters."""
    layers = []
    for index, weights in enumerate(model.layers):
        changed = {}
        for role in PROJECTIONS:
            name = f"{index}.{role}"
            factors = name not in theta
            changed[role] = (
                torch.addmm(weights[role], theta[f"{name}.b"], theta[f"{name}.a"], alpha=options.scale)
                if factors
                else theta[name]
            )
        layers.append({**weights, **changed})
    return layers


def mean_loss(
    model: Model, theta: Mapping[str, Tensor], options: TrajectoryOptions, batch: tuple[Tensor, Tensor, Tensor],
    kernels: Kernels = TWICE,
) -> Tensor:  # fmt: skip
    """Return the mean cross entropy of a batch's counted tokens; `batch`: embeddings before the layers, ids, weights.

    The default `kernels` can be differentiated twice.
    """
    x, ids, weights = batch
    last = run_layers(model, x, apply_theta(model, theta, options), kernels=kernels)
    return sum_losses(model, last, ids, weights).sum() / weights[:, 1:].sum()


# Experts


def train_expert(
    model: Model, documents: Sequence[Document], options: TrajectoryOptions, seed: int, report: Report | None = None
) -> list[Theta]:
    """Return the parameters of a run of Adam on real documents: the first, then one every `options.every` steps."""
    random = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(documents), (options.expert_steps, options.batch), generator=random).tolist()
    states = []
    for step, theta in enumerate(follow_batches(model, documents, draws, options, falls=False)):
        if step % options.every == 0:
            states.append(copy_theta(theta))
        if report is not None and step:
            report("train experts", step, options.expert_steps)
    return states


def follow_batches(
    model: Model, documents: Sequence[Document], draws: Sequence[Sequence[int]], options: TrajectoryOptions, falls: bool
) -> Iterator[Theta]:
    """Yield the parameters before the first step of Adam and after each, which the next step changes.

    `draws`: the documents of each step; `falls`: the rate goes down, in a line, to nothing.
    """
    theta = start_theta(model, options)
    leaves = [tensor.requires_grad_() for tensor in theta.values()]
    optimizer = torch.optim.Adam(leaves, lr=options.expert_rate)
    yield theta
    for step, chosen in enumerate(draws):
        ids, weights = stack_documents([documents[number] for number in chosen])
        weights[:, 0] = 0
        with torch.enable_grad():
            batch = (embed_tokens(model, ids), ids, weights.to(leaves[0].dtype))
            loss = mean_loss(model, theta, options, batch, PLAIN)  # fused: several times as fast on long texts
            gradients = torch.autograd.grad(loss, leaves)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        optimizer.param_groups[0]["lr"] = options.expert_rate * (1 - falls * step / len(draws))
        optimizer.step()
        yield theta


def copy_theta(theta: Mapping[str, Tensor]) -> Theta:
    """Return parameters that later steps do not change."""
    return {name: tensor.detach().clone() for name, tensor in theta.items()}


# Samples


def fits_samples(document: Document, options: TrajectoryOptions, fixed: int) -> bool:
    """Tell whether a document has tokens that count after the learned ones; `fixed`: tokens before those.

    A prompt shorter than the learned places does not fit either: part of its answer would be learned over.
    """
    span = document.weights[fixed : fixed + options.prompt]
    return any(document.weights[fixed + options.prompt :]) and any(span) == all(span)


def make_samples(documents: Mapping[int, Document], options: TrajectoryOptions, fixed: int) -> Samples:
    """Make samples of the documents, by number, that have something to predict after the learned places.

    `fixed`: tokens at the start that are not learned. UserError where there is none.
    """
    begin, end = fixed, fixed + options.prompt
    usable = {number: one for number, one in documents.items() if fits_samples(one, options, fixed)}
    if not usable:
        raise UserError(
            f"No document has tokens that count after its first {end}; give longer texts, or learn fewer than "
            f"{options.prompt} tokens of each (--prompt-tokens)."
        )
    ids, weights = stack_documents(list(usable.values()))
    weights[:, :end] = 0
    return Samples(ids, weights, (begin, end), tuple(len(one.ids) for one in usable.values()), tuple(usable))


def take_batch(model: Model, samples: Samples, embeddings: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return embeddings, ids and weights of some samples, the learned embeddings in their places."""
    begin, end = samples.learned
    ids = samples.ids[rows]
    x = embed_tokens(model, ids)
    own = embeddings[rows] * model.spec.embedding_multiplier
    return torch.cat((x[:, :begin], own, x[:, end:]), 1), ids, samples.weights[rows].to(x.dtype)


def differentiate_inner(
    model: Model, theta: Theta, options: TrajectoryOptions, batch: tuple[Tensor, Tensor, Tensor], twice: bool = False
) -> tuple[Tensor, ...]:
    """Return the gradients of the inner loss by the parameters; `twice` keeps their graph."""
    with torch.enable_grad():
        leaves = theta if twice else {name: tensor.detach().requires_grad_() for name, tensor in theta.items()}
        loss = mean_loss(model, leaves, options, batch, TWICE if twice else PLAIN)
        return torch.autograd.grad(loss, list(leaves.values()), create_graph=twice)


# Matching


@dataclass(frozen=True)
class Matching:
    """What stays the same over all outer steps."""

    model: Model
    samples: Samples
    options: TrajectoryOptions

    def step(self, theta: Theta, learned: Learned, rows: Tensor, twice: bool = False) -> Theta:
        """Return the parameters after one step of gradient descent on the samples `rows`."""
        batch = take_batch(self.model, self.samples, learned.embeddings, rows)
        gradients = differentiate_inner(self.model, theta, self.options, batch, twice)
        rates = learned.rates.exp()
        return {
            name: theta[name] - rate * gradient for name, rate, gradient in zip(theta, rates, gradients, strict=True)
        }


def measure_match(theta: Mapping[str, Tensor], start: Start) -> Tensor:
    """Return |theta - target|^2 / |start - target|^2 over all parameters: 1 is no progress."""
    missed = sum((theta[name] - start.target[name]).square().sum() for name in theta)
    whole = sum((start.theta[name] - start.target[name]).square().sum() for name in theta)
    assert isinstance(missed, Tensor)
    return missed / whole


def roll_out(matching: Matching, learned: Learned, start: Start) -> list[Theta]:
    """Return the parameters before the first inner step and after each; no graph is kept."""
    thetas = [start.theta]
    for rows in start.rows:
        thetas.append(copy_theta(matching.step(thetas[-1], learned, rows)))
    return thetas


def match_gradients(matching: Matching, learned: Learned, start: Start) -> tuple[float, Tensor, Tensor]:
    """Return the matching loss with its gradients by the embeddings and by the logarithms of the rates."""
    thetas = roll_out(matching, learned, start)
    with torch.enable_grad():
        leaves = {name: tensor.requires_grad_() for name, tensor in copy_theta(thetas[-1]).items()}
        loss = measure_match(leaves, start)
        adjoint = torch.autograd.grad(loss, list(leaves.values()))
    embeddings, rates = torch.zeros_like(learned.embeddings), torch.zeros_like(learned.rates)
    for theta, rows in zip(reversed(thetas[:-1]), reversed(start.rows), strict=True):
        adjoint, by_embeddings, by_rates = pull_back(matching, learned, (theta, rows), adjoint)
        embeddings += by_embeddings
        rates += by_rates
    return float(loss.detach()), embeddings, rates


def pull_back(
    matching: Matching, learned: Learned, step: tuple[Theta, Tensor], adjoint: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Run one inner step again; return the gradients by its start, the embeddings and the rates."""
    theta, rows = step
    with torch.enable_grad():
        leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in theta.items()}
        own = Learned(learned.embeddings.detach().requires_grad_(), learned.rates.detach().requires_grad_())
        after = matching.step(leaves, own, rows, twice=True)
        found = torch.autograd.grad(
            list(after.values()), [*leaves.values(), own.embeddings, own.rates], grad_outputs=adjoint
        )
    return found[:-2], found[-2], found[-1]


def judge(matching: Matching, learned: Learned, starts: Sequence[Start]) -> float:
    """Return the mean matching loss over some starts."""
    return sum(float(measure_match(roll_out(matching, learned, start)[-1], start)) for start in starts) / len(starts)
