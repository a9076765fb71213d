"""The final norm fitted to the dense model's predictions: a noisy stream makes logits too sure (methods 1.4).

Least squares leaves an error in the stream that the dense model's final gain turns into confidence. The gain
minimises KL(dense || compressed) over calibration tokens; the rest of the model stays (our derivation).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from compress.decoder import compute_logits
from compress.spec import ModelSpec
from compress.stats import ordinary_tokens
from compress.surgery.job import Rebuild, Streams

MOST_TOKENS, LEAST_TOKENS = 8192, 256
VALUES = 2**23  # logits that exist at once, about five times over: 160 MiB
# Multiply-adds that one evaluation may take, and that all may: with a large vocabulary the fit would else cost more
# than a layer does. Smaller models get all tokens and steps.
WORK, ALL_WORK = 2**33, 2**36
MOST_STEPS, LEAST_STEPS = 25, 6
# Pull of each channel's factor towards the mean of all: worth this many tokens.
PULL = 32.0


def fit_final_norm(
    job: Rebuild, streams: Streams, old_ends: Mapping[str, Tensor], new_ends: Mapping[str, Tensor]
) -> Tensor:
    """Return the stored final-norm weight `[hidden]` of the new model; both streams stand after the last layer.

    The ends are `final_norm` and `head`, float32, of the dense and of the new model.
    """
    vocab = job.new.shape.vocab
    most = min(MOST_TOKENS, WORK // (vocab * job.new.shape.hidden), VALUES // vocab)
    dense, pruned = sample_tokens(job, streams, max(LEAST_TOKENS, most))
    wanted = compute_logits(job.old, old_ends, dense).log_softmax(-1)
    gain = new_ends["final_norm"] + job.new.norm_offset
    factor = fit_factor(job.new, pruned, wanted, gain, new_ends["head"])
    return gain * factor - job.new.norm_offset


def sample_tokens(job: Rebuild, streams: Streams, count: int) -> tuple[Tensor, Tensor]:
    """Return `count` ordinary tokens of both streams, spread over the windows of all processes."""
    usable = streams.counted.nonzero().flatten().tolist()
    each = max(1, -(-count // sum(job.group.gather(len(usable)))))
    dense, pruned = ([torch.zeros(0, store.shape[2])] for store in (streams.dense, streams.pruned))
    for place in usable:
        x = streams.dense.read(place, place + 1)
        spots = ordinary_tokens(x)[0][0].nonzero().flatten()
        spots = spots[torch.linspace(0, len(spots) - 1, min(each, len(spots))).long()] if len(spots) else spots
        dense.append(x[0, spots])
        pruned.append(streams.pruned.read(place, place + 1)[0, spots])
    # Few enough for every process to hold all: each fits the same norm to the same tokens.
    pairs = job.group.gather((torch.cat(dense), torch.cat(pruned)))
    dense, pruned = (list(each) for each in zip(*pairs, strict=True))
    found = sum(map(len, dense))
    # Evenly thinned: cutting off the rest would leave out the last windows.
    picked = torch.linspace(0, max(found - 1, 0), min(count, found)).round().long()
    return torch.cat(dense)[picked], torch.cat(pruned)[picked]


def fit_factor(spec: ModelSpec, stream: Tensor, wanted: Tensor, gain: Tensor, head: Tensor) -> Tensor:
    """Return the factor on `gain` `[hidden]` of least divergence from log-probabilities `wanted` `[tokens, vocab]`."""
    steps = max(LEAST_STEPS, min(MOST_STEPS, ALL_WORK // (len(stream) * head.numel())))

    def divergence(values: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        factor = torch.tensor(values, dtype=gain.dtype, requires_grad=True)
        with torch.enable_grad():
            ends = {"final_norm": gain * factor - spec.norm_offset, "head": head}
            found = compute_logits(spec, ends, stream).log_softmax(-1)
            loss = F.kl_div(found, wanted, reduction="sum", log_target=True)
            loss = (loss + PULL * (factor - factor.mean()).pow(2).sum()) / len(stream)
            (slope,) = torch.autograd.grad(loss, factor)
        return float(loss.detach()), slope.double().numpy()

    # Not torch.optim: building any of its optimizers imports the compiler, which takes seconds and 70 MiB.
    found = minimize(divergence, np.ones(len(gain)), jac=True, method="L-BFGS-B", options={"maxfun": steps})
    return torch.tensor(found.x, dtype=gain.dtype)
