"""Losses of the student's next-token distributions, and their gradients a few hundred tokens at a time.

All losses are weighted SUMS over tokens in nats: the caller divides by the weights of a whole step, so that a step
gives the same gradient however it is cut into batches. With vocabularies of 10^5 the logits of a batch would be its
largest tensor by far; `differentiate_rows` holds those of one piece, and takes their gradient before the next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.decoder import HALVES
from compress.errors import UserError
from compress.parallel import ALONE, Group

KL, CE, MIX = "kl", "ce", "mix"
KINDS = (KL, CE, MIX)
PIECE_TOKENS, PIECE_VALUES = 512, 2**24  # tokens whose logits exist at once, and fewer where the vocabulary is large
FLOOR = 1e-3  # share of the mean energy that is added to each token's, so that tokens near zero do not rule the loss


@dataclass(frozen=True)
class Top:
    """A teacher's distribution in k + 1 buckets: token `ids` and their `log_probs` `[tokens, k]`, the rest `tail`.

    `tail` `[tokens]`: log-probability of all other tokens together.
    """

    ids: Tensor
    log_probs: Tensor
    tail: Tensor

    def part(self, span: slice) -> Top:
        """Return some of the tokens."""
        return Top(self.ids[span], self.log_probs[span], self.tail[span])


Target = Tensor | Top | None  # what the teacher says of some tokens: its logits, its top buckets, or nothing


@dataclass(frozen=True)
class Objective:
    """What is minimised: `kind` (kl, ce, or `alpha` KL + (1 - alpha) CE), and hidden states to match.

    `matches`: pairs (layer of the student, layer of the teacher) whose streams should agree, counted
    `match_weight` times. The mix and its 0.9 are those of arXiv 2509.26497 (methods 4.2).
    """

    kind: str = KL
    alpha: float = 0.9
    matches: tuple[tuple[int, int], ...] = ()
    match_weight: float = 1.0

    def __post_init__(self) -> None:
        """Refuse an unknown kind and a share outside 0 .. 1."""
        if self.kind not in KINDS:
            raise UserError(f"--loss {self.kind} is not one of {', '.join(KINDS)}.")
        if not 0 <= self.alpha <= 1:
            raise UserError(f"--alpha {self.alpha:g} is no share of the loss; give a number from 0 to 1.")

    @property
    def taught(self) -> bool:
        """True where a teacher is needed."""
        return self.kind != CE or bool(self.matches)


def widen(logits: Tensor) -> Tensor:
    """Return 16-bit values as float32."""
    return logits.float() if logits.dtype in HALVES else logits


def weigh(losses: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum of losses `[tokens]`."""
    return losses @ weights.to(losses.dtype)


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum of -log p(label); logits `[tokens, vocab]`, labels and weights `[tokens]`."""
    return weigh(F.cross_entropy(widen(logits), labels, reduction="none"), weights)


def forward_kl(logits: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum of KL(teacher || student) of logits `[tokens, vocab]`.

    KL = sum p log p - sum p z + log sum exp z with the student's logits z: its log-probabilities are never stored.
    """
    log_probs, z = widen(teacher).log_softmax(-1), widen(logits)
    probs = log_probs.exp()
    entropy = torch.linalg.vecdot(probs, log_probs)
    return weigh(entropy - torch.linalg.vecdot(probs, z) + z.logsumexp(-1), weights)


def tail_kl(logits: Tensor, top: Top, weights: Tensor) -> Tensor:
    """Return the weighted sum of KL(teacher || student) over the teacher's k + 1 buckets.

    It is the divergence of the coarsened distributions, never above the full one, and its gradient moves mass into
    the tail as well as out of it (methods 4.2, mode `tail`). The student's tail is summed over its tokens: 1 - sum of
    the top would cancel where the tail is small.
    """
    z = widen(logits)
    total, chosen = z.logsumexp(-1), z.gather(-1, top.ids)
    rest = z.scatter(-1, top.ids, float("-inf")).logsumexp(-1)
    student = torch.cat((chosen, rest[:, None]), -1) - total[:, None]
    teacher = torch.cat((top.log_probs, top.tail[:, None]), -1).to(z.dtype)
    probs = teacher.exp()
    # A bucket of no mass adds nothing, whatever its logarithm.
    terms = torch.where(probs > 0, probs * (teacher.clamp(min=-1e4) - student), 0.0)
    return weigh(terms.sum(-1), weights)


def score_tokens(objective: Objective, logits: Tensor, labels: Tensor, weights: Tensor, target: Target) -> Tensor:
    """Return the weighted sum of the objective's loss over tokens; logits `[tokens, vocab]`."""
    share = {KL: 1.0, CE: 0.0, MIX: objective.alpha}[objective.kind]
    loss = (1 - share) * cross_entropy(logits, labels, weights) if share < 1 else logits.new_zeros(())
    if share == 0:
        return loss
    if target is None:
        raise UserError(f"--loss {objective.kind} needs a teacher: give --teacher, or --loss {CE}.")
    divergence = tail_kl if isinstance(target, Top) else forward_kl
    return loss + share * divergence(logits, target, weights)  # type: ignore[arg-type]


def match_error(student: Tensor, teacher: Tensor, weights: Tensor, group: Group = ALONE) -> Tensor:
    """Return the weighted sum of |s - t|^2 / |t|^2 over tokens; streams `[tokens, hidden]` (our normalisation).

    The mean energy is that of all tokens of the `group`.
    """
    energy = teacher.pow(2).mean(-1)
    mean: Tensor | float = energy.mean()
    if group.size > 1:
        total, count = group.total(float(energy.sum(dtype=torch.float64)), len(energy))
        mean = total / count
    return weigh((student - teacher).pow(2).mean(-1) / (energy + FLOOR * mean), weights)


def count_piece(vocab: int) -> int:
    """Return how many tokens' logits may exist at once."""
    return max(1, min(PIECE_TOKENS, PIECE_VALUES // vocab))


def differentiate_rows(
    logits_of: Callable[[Tensor], Tensor], rows: Tensor, score: Callable[[Tensor, slice], Tensor], step: int
) -> tuple[float, Tensor]:
    """Return the summed loss of `rows` `[tokens, hidden]` and its gradient by them, `step` tokens at a time.

    `score(logits, span)` is the loss of some tokens. Gradients of the parameters behind `logits_of` are added to
    theirs, as a backward pass does.
    """
    total, gradient = 0.0, torch.empty_like(rows)
    for start in range(0, len(rows), step):
        span = slice(start, start + step)
        leaf = rows[span].detach().requires_grad_()
        with torch.enable_grad():
            loss = score(logits_of(leaf), span)
        loss.backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        gradient[span] = leaf.grad
        total += float(loss.detach())
    return total, gradient
