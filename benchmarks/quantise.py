"""Perplexity of quantised layers by method, at equal bits: nearest, searched scales, GPTQ on the stream.

    python benchmarks/quantise.py stories|demo|books [--books FOLDER] [--tests 60] [--windows 64]

Target: excess log-perplexity of int4 by GPTQ at most 0.7 of that of rounding to the nearest. Embedding and head stay
float32 here, products are float32: what is measured is the rounding of the layers. Same windows as quality.py.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from quality import Case, open_case

from compress.calibrate import fill_embeddings
from compress.decoder import compute_logits, make_frame, run_layer
from compress.hidden import HiddenStore, batches
from compress.quantize.blocks import Quantised
from compress.quantize.stream import METHODS, LayerQuantiser, WeightForm
from compress.text import Windows
from compress.weights import read_head, read_layer

FORMS = ((4, 32, True), (4, 32, False), (4, 128, True), (8, 32, True))


def measure_loss(case: Case, test: Windows, learned: Windows, form: WeightForm | None) -> float:
    """Return the loss in nats per token with the layers quantised."""
    spec, checkpoint = case.spec, case.checkpoint
    quantiser = LayerQuantiser(checkpoint, spec, form, learned) if form else None
    with HiddenStore((*test.ids.shape, spec.shape.hidden)) as store:
        fill_embeddings(checkpoint, spec, test, store)
        for index, layer in enumerate(spec.layers):
            weights = read_layer(checkpoint, spec, index, torch.float32)
            if quantiser:
                found = quantiser.quantise_layer(index, weights)
                weights = {r: m.dequantise() if isinstance(m, Quantised) else m for r, m in found.items()}
            for start, stop in batches(*test.ids.shape):
                frame = make_frame(spec, stop - start, test.ids.shape[1])
                store.write(start, run_layer(spec, layer, weights, store.read(start, stop), frame)[0])
        ends, total = read_head(checkpoint, spec, torch.float32), 0.0
        for place, ids in enumerate(test.ids):
            logits = compute_logits(spec, ends, store.read(place, place + 1)[0, :-1])
            total += float(F.cross_entropy(logits, ids[1:], reduction="sum"))
    return total / test.ids[:, 1:].numel()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=("stories", "demo", "books"))
    parser.add_argument("--books", type=Path, default=Path("books"))
    parser.add_argument("--tests", type=int, default=60)
    parser.add_argument("--windows", type=int, default=64)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    case = open_case(options.case, options.books)
    test, learned = case.test.take(options.tests), case.calibration.take(options.windows)
    dense = measure_loss(case, test, learned, None)
    print(f"{case.name}: dense perplexity {math.exp(dense):.3f}\n")
    print("| bits | block | zero points | nearest | search | GPTQ | GPTQ / nearest | s |")
    print("|---|---|---|---|---|---|---|---|")
    for bits, block, symmetric in FORMS:
        started, excess = time.perf_counter(), {}
        for method in METHODS:
            excess[method] = measure_loss(case, test, learned, WeightForm(bits, block, symmetric, method)) - dense
        ratio = excess["gptq"] / excess["nearest"] if excess["nearest"] > 0 else math.nan
        zeros = "no" if symmetric else "yes"
        print(
            f"| {bits} | {block} | {zeros} | {excess['nearest']:.4f} | {excess['search']:.4f} | {excess['gptq']:.4f} | "
            f"{ratio:.2f} | {time.perf_counter() - started:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
