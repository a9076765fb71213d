"""Perplexity of quantised layers by method, at equal bits: nearest, searched scales, GPTQ on the stream.

    python benchmarks/quantise.py stories|demo|books [--books FOLDER] [--tests 60] [--windows 64] [--ends | --inputs]

Target: excess log-perplexity of int4 by GPTQ at most 0.7 of that of rounding to the nearest. Embedding and head stay
float32 here, products are float32: what is measured is the rounding of the layers. Same windows as quality.py.
With --ends instead: embedding and head in 8 and 4 bits behind int4 layers, the divergences measured on text held out
from calibration, and what `auto` makes of them; in the tables, excess of log-perplexity over the dense model's.
With --inputs instead: the formats of `export` through their graphs on ONNX Runtime, w8a8 by what a product may lose.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from quality import Case, open_case
from torch import Tensor

from backends.export_onnx import GraphForm, export_onnx
from cli.artifact import measure_graph
from cli.weights import choose_block
from compress.calibrate import fill_embeddings
from compress.decoder import compute_logits, make_frame, run_layer
from compress.evaluate import measure_quality
from compress.hidden import HiddenStore, batches
from compress.quantize.blocks import Quantised
from compress.quantize.ends import fill_quantised
from compress.quantize.onnx_w8a8 import BLOCKS, LIMIT, StepForm, StepQuantiser
from compress.quantize.stream import METHODS, LayerQuantiser, WeightForm
from compress.text import Windows
from compress.weights import read_head, read_layer

BITS = (8, 4)
LIMITS = (math.inf, LIMIT, LIMIT / 2)
FORMS = ((4, 32, True), (4, 32, False), (4, 64, False), (4, 128, False), (8, 32, True), (8, 128, True))


def fill_stores(case: Case, test: Windows, forms: Sequence[WeightForm | None]) -> list[HiddenStore]:
    """Return the embeddings of the test windows in each of the forms (None: as they are)."""
    stores = [HiddenStore((*test.ids.shape, case.spec.shape.hidden)) for _ in forms]
    for store, form in zip(stores, forms, strict=True):
        if form is None:
            fill_embeddings(case.checkpoint, case.spec, test, store)
        else:
            fill_quantised(case.checkpoint, case.spec, test, store, form.quantise)
    return stores


def run_layers(case: Case, quantiser: LayerQuantiser | None, stores: Sequence[HiddenStore]) -> None:
    """Advance streams through all layers, quantised if a quantiser is given."""
    spec = case.spec
    for index, layer in enumerate(spec.layers):
        weights = read_layer(case.checkpoint, spec, index, torch.float32)
        if quantiser:
            found = quantiser.quantise_layer(index, weights)
            weights = {r: m.dequantise() if isinstance(m, Quantised) else m for r, m in found.items()}
        for store in stores:
            for start, stop in batches(*store.shape[:2]):
                frame = make_frame(spec, stop - start, store.shape[1])
                store.write(start, run_layer(spec, layer, weights, store.read(start, stop), frame)[0])


def finish_loss(case: Case, test: Windows, store: HiddenStore, head: Tensor | None = None) -> float:
    """Return the loss in nats per token of the last stream."""
    ends, total = read_head(case.checkpoint, case.spec, torch.float32), 0.0
    ends = ends if head is None else {**ends, "head": head}
    for place, ids in enumerate(test.ids):
        logits = compute_logits(case.spec, ends, store.read(place, place + 1)[0, :-1])
        total += float(F.cross_entropy(logits, ids[1:], reduction="sum"))
    return total / test.ids[:, 1:].numel()


def measure_loss(case: Case, test: Windows, learned: Windows, form: WeightForm | None) -> float:
    """Return the loss in nats per token with the layers quantised."""
    quantiser = LayerQuantiser(case.checkpoint, case.spec, form, learned) if form else None
    stores = fill_stores(case, test, [None])
    run_layers(case, quantiser, stores)
    return finish_loss(case, test, stores[0])


def show_ends(case: Case, test: Windows, learned: Windows, dense: float) -> None:
    """Print what embedding and head in 4 bits cost, by form of the layers."""
    print("| block | zero points | " + " | ".join(f"embedding {e}, head {h}" for e in BITS for h in BITS), end="")
    print(" | KL of layers | head | embedding | price of head | embedding | auto |\n" + "|---" * 12 + "|")
    for bits, block, symmetric in FORMS[:3]:
        form = WeightForm(bits, block, symmetric)
        with LayerQuantiser(case.checkpoint, case.spec, form, learned) as quantiser:
            stores = fill_stores(case, test, [quantiser.end_form(bits) for bits in BITS])
            run_layers(case, quantiser, stores)
            small = quantiser.quantise_head()
            heads = quantiser.quantise_nearby("head", 8).dequantise(), small.dequantise()
            quantiser.quantise_ends(case.checkpoint, case.spec)
        losses = [finish_loss(case, test, store, head) - dense for store in stores for head in heads]
        choice = quantiser.choice
        assert choice is not None and choice.measured is not None
        found = choice.measured
        parts = case.spec.shape.layer_parameters, case.spec.shape.vocab * case.spec.shape.hidden
        price = found.layers / parts[0] * parts[1]
        cells = [*losses, found.layers, found.head, found.embedding]
        print(f"| {block} | {'no' if symmetric else 'yes'} | " + " | ".join(f"{value:.5f}" for value in cells), end="")
        print(f" | {found.head / price:.2f} | {found.embedding / price:.2f} | {choice.embedding}, {choice.head} |")


def show_inputs(case: Case, test: Windows, learned: Windows) -> None:
    """Print the perplexity of exported graphs: int8 and int4 weights, and 8-bit inputs up to several losses."""
    block, spec = choose_block(case.spec.shape), case.spec
    dense = measure_quality(case.checkpoint, spec, test).perplexity
    print(f"dense {dense:.4f}\n\n| format | perplexity | excess % | groups in 8-bit blocks | s |\n" + "|---" * 5 + "|")
    forms: dict[str, WeightForm | StepForm] = {
        f"int{bits}": WeightForm(bits, block, symmetric=bits == BITS[0]) for bits in BITS
    }
    forms |= {f"w8a8, at most {limit:g}": StepForm(block=block, limit=limit) for limit in LIMITS}
    forms |= {"w8a8, nearest": StepForm("nearest", block)}
    for name, form in forms.items():
        kind = StepQuantiser if isinstance(form, StepForm) else LayerQuantiser
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder, kind(case.checkpoint, spec, form, learned) as quantiser:
            export_onnx(case.checkpoint, Path(folder) / "onnx", form=GraphForm(quantiser=quantiser))
            found = measure_graph(Path(folder) / "onnx", test, 1)
        groups = quantiser.report.groups if isinstance(quantiser, StepQuantiser) else []
        lost = [f"{group.layer} {'/'.join(group.roles)}" for group in groups if group.kind == BLOCKS]
        told = f"{len(lost)} of {len(groups)}: {', '.join(lost)}" if lost else ""
        seconds = time.perf_counter() - started
        print(f"| {name} | {found:.4f} | {100 * (found / dense - 1):.3f} | {told} | {seconds:.0f} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=("stories", "demo", "books"))
    parser.add_argument("--books", type=Path, default=Path("books"))
    parser.add_argument("--tests", type=int, default=60)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--ends", action="store_true")
    parser.add_argument("--inputs", action="store_true")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    case = open_case(options.case, options.books)
    test, learned = case.test.take(options.tests), case.calibration.take(options.windows)
    if options.inputs:
        show_inputs(case, test, learned)
        return
    dense = measure_loss(case, test, learned, None)
    print(f"{case.name}: dense perplexity {math.exp(dense):.3f}\n")
    if options.ends:
        show_ends(case, test, learned, dense)
        return
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
