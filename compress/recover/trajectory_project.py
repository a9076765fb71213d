"""From learned embeddings to tokens: nearest neighbours, swaps of single tokens, and the text that is written.

Projection loses what lies between the tokens: embeddings that stay nearest to the tokens they started from have
learned nothing that can be written. So the tokens themselves are matched as well: the gradient by a token's embedding
says, to first order, what any other token in its place would do to the matching loss (HotFlip, arXiv 1712.06751);
swaps that lower the loss in fact are kept. This stage is ours (methods section 3 has the first only).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.recover.trajectory import (
    Learned,
    Matching,
    Report,
    Samples,
    Start,
    TrajectoryOptions,
    judge,
    match_gradients,
)

Stable = Callable[[int, Tensor], bool]  # whether a sample's prompt ids `[prompt]` are the same ids when read as text
Swap = tuple[int, int, int]  # sample, place in its prompt, new token


@dataclass(frozen=True)
class Outer:
    """How prompts may come out: ids that are `barred`, prompts that text would not bring back, and who is told."""

    barred: Sequence[int] = ()
    stable: Stable | None = None
    report: Report | None = None


# Neighbours


def find_neighbours(embeddings: Tensor, table: Tensor, barred: Sequence[int] = ()) -> Tensor:
    """Return the token whose embedding points most nearly the same way, `[...]` for embeddings `[..., hidden]`.

    By cosine: by distance, rows of low norm would be nearest to everything (methods section 3). `barred` ids never are.
    """
    cosines = F.normalize(embeddings.flatten(0, -2), dim=1) @ F.normalize(table, dim=1).T
    cosines[:, list(barred)] = -torch.inf
    return cosines.argmax(1).view(embeddings.shape[:-1])


def neighbour_gradient(embeddings: Tensor, table: Tensor, barred: Sequence[int]) -> tuple[float, Tensor]:
    """Return mean |E_i - nearest|^2 as a share of the table's mean square row norm, and its gradient by E."""
    difference = embeddings - F.embedding(find_neighbours(embeddings, table, barred), table)
    whole = float(table.square().sum(1).mean()) * difference[..., 0].numel()
    return float(difference.square().sum()) / whole, difference * (2 / whole)


def project_prompts(embeddings: Tensor, real: Tensor, table: Tensor, outer: Outer) -> Tensor:
    """Return the nearest tokens `[samples, prompt]`; a prompt that text would not bring back stays the `real` one."""
    nearest = find_neighbours(embeddings, table, outer.barred)
    if outer.stable is not None:
        for sample in range(len(nearest)):
            if not outer.stable(sample, nearest[sample]):
                nearest[sample] = real[sample]
    return nearest


# Swaps


@dataclass
class Search:
    """Prompts as tokens `[samples, prompt]` while single ones are swapped: the matching loss so far, what is ruled out.

    `group`: how many samples change at once.
    """

    tokens: Tensor
    loss: float
    group: int
    curve: list[float] = field(default_factory=list)
    ruled_out: set[Swap] = field(default_factory=set)


def refine_tokens(matching: Matching, tokens: Tensor, rates: Tensor, starts: Sequence[Start], outer: Outer) -> Search:
    """Try `options.swaps` times to lower the mean matching loss over `starts` by other tokens; it never rises.

    The swaps of many samples are tried together, of half as many after each failure, and one that fails alone is not
    tried again before another has succeeded.
    """
    table, count = matching.model.ends["embed"], count_swaps(matching.options)
    first = judge(matching, Learned(F.embedding(tokens, table), rates), starts)
    search, slopes = Search(tokens, first, max(1, len(tokens) // 2)), None
    for step in range(count):
        if slopes is None:
            slopes = slope_tokens(matching, search.tokens, rates, starts)
        chosen = propose_swaps(search, slopes, table, outer)
        if not chosen:
            break
        if try_swaps(search, chosen, lambda trial: judge(matching, Learned(F.embedding(trial, table), rates), starts)):
            slopes = None
        if outer.report is not None:
            outer.report("swap tokens", step + 1, count)
    return search


def count_swaps(options: TrajectoryOptions) -> int:
    """Return how many swaps are tried: as asked for, else one for four steps of learning."""
    return options.steps // 4 if options.swaps is None else options.swaps


def slope_tokens(matching: Matching, tokens: Tensor, rates: Tensor, starts: Sequence[Start]) -> Tensor:
    """Return the mean gradient of the matching loss by the prompts' embeddings, `[samples, prompt, hidden]`."""
    learned = Learned(F.embedding(tokens, matching.model.ends["embed"]), rates)
    return torch.stack([match_gradients(matching, learned, start)[1] for start in starts]).mean(0)


def propose_swaps(search: Search, slopes: Tensor, table: Tensor, outer: Outer) -> list[Swap]:
    """Return the most promising swap of each of the `search.group` most promising samples."""
    found = []
    for sample, own in enumerate(search.tokens):
        falls = slopes[sample] @ table.T
        falls = falls.gather(1, own[:, None]) - falls  # [prompt, vocab]: how far the loss would fall
        falls[:, list(outer.barred)] = -torch.inf
        falls.scatter_(1, own[:, None], -torch.inf)
        for other, place, token in search.ruled_out:
            if other == sample:
                falls[place, token] = -torch.inf
        best = int(falls.argmax())
        fall, swap = float(falls.max()), (sample, best // len(table), best % len(table))
        if fall <= 0:
            continue
        if outer.stable is not None and not outer.stable(sample, swap_tokens(search.tokens, [swap])[sample]):
            search.ruled_out.add(swap)
            continue
        found.append((fall, swap))
    return [swap for _, swap in sorted(found, reverse=True)[: search.group]]


def swap_tokens(tokens: Tensor, swaps: Sequence[Swap]) -> Tensor:
    """Return prompts with some tokens replaced."""
    trial = tokens.clone()
    for sample, place, token in swaps:
        trial[sample, place] = token
    return trial


def try_swaps(search: Search, swaps: Sequence[Swap], measure: Callable[[Tensor], float]) -> bool:
    """Keep the swaps if the measured loss falls; else try fewer next time, and rule out one that failed alone."""
    trial = swap_tokens(search.tokens, swaps)
    loss = measure(trial)
    search.curve.append(loss)
    if loss < search.loss:
        search.tokens, search.loss = trial, loss
        search.ruled_out.clear()
        search.group = min(2 * search.group, len(search.tokens))
        return True
    if len(swaps) == 1:
        search.ruled_out.add(swaps[0])
    search.group = max(1, min(search.group, len(swaps)) // 2)
    return False


# Text


def find_answer(samples: Samples, sample: int) -> int:
    """Return where a sample's answer begins: at the first token after the learned ones that counts."""
    return next(
        place for place in range(samples.learned[1], samples.sizes[sample]) if samples.weights[sample, place] > 0
    )


def check_text(samples: Samples, tokenizer: Any) -> Stable:
    """Return the check that a sample's prompt, with other learned tokens, is read from its text as the same tokens."""
    end = samples.learned[1]

    def stable(sample: int, prompt: Tensor) -> bool:
        rest = samples.ids[sample, end : find_answer(samples, sample)].tolist()
        ids = [*prompt.tolist(), *rest]
        text = tokenizer.decode(ids, skip_special_tokens=False)
        return bool(tokenizer.encode(text, add_special_tokens=False).ids == ids)

    return stable


def write_samples(samples: Samples, ids: Tensor, tokenizer: Any, end: Sequence[int]) -> list[dict[str, str]]:
    """Return a row with prompt and response for each sample: the response is what counts, without the `end` ids."""
    rows = []
    for number, (own, size) in enumerate(zip(ids.tolist(), samples.sizes, strict=True)):
        split = find_answer(samples, number)
        answer = own[split:size]
        if end and answer[-len(end) :] == list(end):
            answer = answer[: -len(end)]
        prompt = own[samples.learned[0] : split]
        texts = [tokenizer.decode(part, skip_special_tokens=False) for part in (prompt, answer)]
        rows.append({"prompt": texts[0], "response": texts[1]})
    return rows


def count_round_trip(samples: Samples, ids: Tensor, rows: Sequence[Mapping[str, str]], tokenizer: Any) -> float:
    """Return the share of prompts that are the same tokens when their text is tokenised again.

    What another vocabulary makes of a text it makes from the text: there only the text counts.
    """
    same = 0
    for number, (own, row) in enumerate(zip(ids.tolist(), rows, strict=True)):
        prompt = own[samples.learned[0] : find_answer(samples, number)]
        same += tokenizer.encode(row["prompt"], add_special_tokens=False).ids == prompt
    return same / len(rows)
