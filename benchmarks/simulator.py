"""Predicted against published and against measured times.

    python benchmarks/simulator.py published         (no device needed: the rows of ../shared/reference/ascend.md)
    python benchmarks/simulator.py fit               (how the launch costs of the Ascend profiles were found)
    python benchmarks/simulator.py here [--rounds 5] (measures this machine, in turns with ONNX models of other shapes)
    python benchmarks/simulator.py pangu             (Qwen3-32B cut by the planner under --speedup 1.16 on A2)

Targets: held-out published dense rows: median error at most 15 %, none above 35 %. Here: median at most 10 % over the
shapes, Kendall's tau of their order at least 0.9. Constants were fitted on the four rows marked `fit` alone.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from compress.shapes import LayerShape, ModelShape
from profiles.cost import DECODE, PREFILL, Workload, estimate_cost
from profiles.loader import load_profile
from profiles.profile import Profile

W8A8 = {"weights": "int8", "activations": "int8"}
BF16 = {"weights": "bf16", "activations": "bf16"}


def make_shape(sizes: tuple[int, ...], vocab: int, tied: bool = False) -> ModelShape:
    """Return a model of equal pre-norm layers: layers, hidden, query heads, KV heads, head size, FFN."""
    layers, hidden, query, kv, size, ffn = sizes
    return ModelShape(vocab, hidden, tied, (LayerShape(query, kv, size, ffn),) * layers)


# Qwen3-8B and -32B, Qwen2.5-72B: their config.json. The 32B and 72B of the Pangu report are taken to be like them.
B8 = make_shape((36, 4096, 32, 8, 128, 12288), 151936)
B32 = make_shape((64, 5120, 64, 8, 128, 25600), 151936)
B72 = make_shape((80, 8192, 64, 8, 128, 29568), 152064)


@dataclass(frozen=True)
class Row:
    """One published time: where it stands, the model, the device, what was run, milliseconds."""

    source: str
    shape: ModelShape
    profile: str
    workload: Workload
    milliseconds: float
    fitted: bool = False


def decode(prompt: int, batch: int, devices: int, types: dict[str, str], output: int = 256) -> Workload:
    """Return a decode step."""
    return Workload(DECODE, prompt, output, batch, kv="bf16", devices=devices, **types)


def prefill(prompt: int, batch: int, devices: int, types: dict[str, str]) -> Workload:
    """Return a prefill."""
    return Workload(PREFILL, prompt, 1, batch, kv="bf16", devices=devices, **types)


# The reports do not say which A2 chip served them: decode with 336 sequences needs more than 32 GB a card, and servers
# of the 800I line hold the "280T" chip, so it is the one with 64 GB. Prompts of 7.4 are short and not stated.
A2 = "ascend-910b4-1"
ROWS = (
    Row("7.4 Qwen3-8B BF16 TP1", B8, "ascend-a3", decode(1024, 1, 1, BF16), 15.48, True),
    Row("7.4 Qwen3-8B BF16 TP2", B8, "ascend-a3", decode(1024, 1, 2, BF16), 10.35, True),
    Row("7.4 Qwen3-8B W8A8 TP1", B8, "ascend-a3", decode(1024, 1, 1, W8A8), 10.46, True),
    Row("7.4 Qwen3-8B W8A8 TP2", B8, "ascend-a3", decode(1024, 1, 2, W8A8), 7.90, True),
    Row("7.1 row 2: 32B prefill", B32, A2, prefill(2048, 2, 2, W8A8), 604.07),
    Row("7.1 row 3: 72B prefill", B72, A2, prefill(2048, 2, 2, W8A8), 1282.94),
    Row("7.1 row 7: 32B decode, batch 1", B32, A2, decode(2048, 1, 4, W8A8), 16.26),
    Row("7.1 row 8: 32B decode, batch 336", B32, A2, decode(2048, 336, 4, W8A8), 86.34),
    Row("7.1 row 9: 72B decode, batch 1", B72, A2, decode(2048, 1, 4, W8A8), 26.88),
    Row("7.1 row 10: 72B decode, batch 228", B72, A2, decode(2048, 228, 4, W8A8), 97.74),
)


def find_error(row: Row, profile: Profile | None = None) -> float:
    """Return predicted over published time, less 1."""
    predicted = estimate_cost(row.shape, profile or load_profile(row.profile), row.workload).total
    return predicted * 1e3 / row.milliseconds - 1


def show_published() -> None:
    """Print the table of published rows, and what other A2 chips would give."""
    print("| row | published ms | predicted ms | error | |\n|---|---|---|---|---|")
    held = []
    for row in ROWS:
        error = find_error(row)
        held += [] if row.fitted else [abs(error)]
        use = "fit" if row.fitted else "test"
        print(f"| {row.source} | {row.milliseconds} | {row.milliseconds * (1 + error):.2f} | {error:+.1%} | {use} |")
    print(f"\nheld out: median {statistics.median(held):.1%}, largest {max(held):.1%} (targets 15 % and 35 %)")
    for name in ("ascend-910b2", "ascend-910b3"):
        other = [abs(find_error(row, load_profile(name))) for row in ROWS if not row.fitted]
        print(f"were the cards {name}: median {statistics.median(other):.1%}, largest {max(other):.1%}")


def fit_launches() -> None:
    """Search the constants that the four rows can tell: weight bandwidth and fixed costs; print the best grid point."""
    rows, start = [row for row in ROWS if row.fitted], load_profile("ascend-a3")
    best = (float("inf"), start)
    grid = itertools.product((0.75, 0.8, 0.85, 0.9), (4.0, 6.0, 8.0, 10.0), (2.0, 3.0, 4.0, 6.0), (6.0, 9.0, 12.0))
    for weights, matrix, vector, collective in grid:
        made = replace(
            start,
            memory=replace(start.memory, weight_efficiency=weights),
            overhead=replace(start.overhead, matrix_op_us=matrix, vector_op_us=vector, collective_us=collective),
        )
        best = min(best, (sum(find_error(row, made) ** 2 for row in rows), made), key=lambda pair: pair[0])
    print(f"squared error {best[0]:.2e}: {best[1].memory}\n{best[1].overhead}")


# This machine

# Hidden, FFN, heads, layers: other shapes than those that `profiles measure` fits to.
SHAPES = (
    (128, 384, 4, 4), (256, 1024, 8, 3), (384, 1024, 6, 6), (512, 1024, 8, 8), (768, 2048, 12, 4), (1024, 1408, 16, 3),
    (1024, 2816, 8, 4), (640, 3584, 10, 3),
)  # fmt: skip


def show_here(rounds: int) -> None:
    """Time the decoders of the fit and others in the same turns; fit to the first, print predictions of the others.

    In turns, because the memory bandwidth of a shared machine can change by half from one minute to the next.
    """
    from backends import machine

    count = len(machine.DECODERS)
    machine.DECODERS, machine.ROUNDS = (*machine.DECODERS, *SHAPES), rounds
    profile, samples = machine.measure_machine("this-machine", None, lambda *_: None, fitted=count)
    each = len(samples) // len(machine.DECODERS)
    known, unseen = samples[: count * each], samples[count * each :]
    fitted = [abs(estimate_cost(s.shape, profile, s.workload).total / s.seconds - 1) for s in known]
    print(f"{profile}\nfitted to {len(known)} timings: median error {statistics.median(fitted):.1%}")
    found: dict[str, list[tuple[float, float]]] = {PREFILL: [], DECODE: []}
    print("| hidden, FFN, heads, layers | phase | tokens before | measured ms | predicted ms | error |")
    print("|---|---|---|---|---|---|")
    for place, sample in enumerate(unseen):
        work, guess = sample.workload, estimate_cost(sample.shape, profile, sample.workload).total
        found[work.phase].append((sample.seconds, guess))
        print(
            f"| {SHAPES[place // each]} | {work.phase} | {work.prompt} | {sample.seconds * 1e3:.2f} | "
            f"{guess * 1e3:.2f} | {guess / sample.seconds - 1:+.1%} |"
        )
    for phase, pairs in found.items():
        errors = [abs(guess / seconds - 1) for seconds, guess in pairs]
        print(
            f"{phase}: median error {statistics.median(errors):.1%}, largest {max(errors):.1%}, "
            f"Kendall tau {rank_agreement(pairs):.2f} (targets 10 %, 0.9)"
        )


def rank_agreement(pairs: Sequence[tuple[float, float]]) -> float:
    """Return Kendall's tau of two orders."""
    signs = [(a[0] - b[0]) * (a[1] - b[1]) for a, b in itertools.combinations(pairs, 2)]
    return sum((sign > 0) - (sign < 0) for sign in signs) / len(signs)


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("published", "fit", "here", "pangu"))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.what == "pangu":
        from pangu import show_pangu

        show_pangu()
    else:
        {"published": show_published, "fit": fit_launches, "here": lambda: show_here(options.rounds)}[options.what]()


if __name__ == "__main__":
    sys.exit(main())
