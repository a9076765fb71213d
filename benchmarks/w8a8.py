"""Perplexity of W8A8 models as Ascend's servers compute them: int8 weights and inputs, integers exact.

    python benchmarks/w8a8.py stories|demo|books [--books FOLDER] [--tests 60] [--windows 64] [--ablations]

Targets: excess over the dense perplexity at most 2 % with dynamic inputs, 4 % with static ones. Embedding, norms and
head are rounded to the model's type (float16 as on 310P, bfloat16 as on A2); between projections values are float32,
where a device keeps that type. Same windows as quality.py.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from quality import Case, open_case

from compress.decoder import compute_logits, make_frame, run_layer
from compress.hidden import HiddenStore, batches
from compress.quantize.w8a8 import DYNAMIC, STATIC, LinearForm, as_weights
from compress.quantize.w8a8_stream import LinearQuantiser, StreamReport, fill_rounded
from compress.text import Windows
from compress.weights import read_head, read_layer

HALF, BRAIN = torch.float16, torch.bfloat16
FORMS = {
    "dynamic, float16": LinearForm(DYNAMIC, HALF),
    "dynamic, bfloat16": LinearForm(DYNAMIC, BRAIN),
    "static, float16": LinearForm(STATIC, HALF),
    "static, bfloat16": LinearForm(STATIC, BRAIN),
    "compressed-tensors static": LinearForm(STATIC, BRAIN, folds_bias=False),
}
PLAIN = replace(FORMS["static, bfloat16"], fallback="")
ABLATIONS = {
    "static, nothing falls back": PLAIN,
    "static, no smoothing": replace(PLAIN, alpha=None),
    "static, smoothing 0.7": replace(PLAIN, alpha=0.7),
    "static, nearest codes": replace(PLAIN, gptq=False),
    "static, nearest codes, no smoothing": replace(PLAIN, gptq=False, alpha=None),
}


def measure_loss(
    case: Case, test: Windows, learned: Windows, form: LinearForm | None
) -> tuple[float, StreamReport]:
    """Return the loss in nats per token, and what the quantiser did."""
    spec, checkpoint = case.spec, case.checkpoint
    dtype = form.dtype if form else torch.float32
    quantiser = LinearQuantiser(checkpoint, spec, form, learned) if form else None
    with HiddenStore((*test.ids.shape, spec.shape.hidden)) as store:
        fill_rounded(checkpoint, spec, test, store, dtype)
        for index, layer in enumerate(spec.layers):
            weights = read_layer(checkpoint, spec, index, torch.float32)
            if quantiser:
                weights = as_weights(quantiser.quantise_layer(index, weights))
            for start, stop in batches(*test.ids.shape):
                frame = make_frame(spec, stop - start, test.ids.shape[1])
                store.write(start, run_layer(spec, layer, weights, store.read(start, stop), frame)[0])
        ends = {role: tensor.to(dtype).float() for role, tensor in read_head(checkpoint, spec, torch.float32).items()}
        total = 0.0
        for place, ids in enumerate(test.ids):
            logits = compute_logits(spec, ends, store.read(place, place + 1)[0, :-1])
            total += float(F.cross_entropy(logits, ids[1:], reduction="sum"))
    return total / test.ids[:, 1:].numel(), quantiser.report if quantiser else StreamReport()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=("stories", "demo", "books"))
    parser.add_argument("--books", type=Path, default=Path("books"))
    parser.add_argument("--tests", type=int, default=60)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--ablations", action="store_true")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    case = open_case(options.case, options.books)
    test, learned = case.test.take(options.tests), case.calibration.take(options.windows)
    dense, _ = measure_loss(case, test, learned, None)
    print(f"{case.name}: dense perplexity {math.exp(dense):.3f}\n")
    print("| form | perplexity | excess % | groups that fell back | greatest loss: ordinary, sinks | s |")
    print("|---|---|---|---|---|---|")
    for name, form in (FORMS | (ABLATIONS if options.ablations else {})).items():
        started = time.perf_counter()
        loss, report = measure_loss(case, test, learned, form)
        moved = sum(group.kind != form.kind for group in report.groups)
        ordinary, sinks = (max(getattr(group, part) for group in report.groups) for part in ("ordinary", "sinks"))
        print(
            f"| {name} | {math.exp(loss):.3f} | {100 * math.expm1(loss - dense):.2f} | {moved} of "
            f"{len(report.groups)} | {ordinary:.1e}, {sinks:.1e} | {time.perf_counter() - started:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
