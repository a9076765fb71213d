"""Layers quantised on the stream of the quantised layers before them: better than rounding, on every layout."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from refusals import refused
from slow_twins import output_error
from tiny import make_checkpoint
from torch import Tensor

from cli.console import Console
from cli.weights import choose_format, list_formats, predict_speed
from compress.checkpoint import open_checkpoint
from compress.decoder import compute_logits, make_frame, run_layer
from compress.quantize.blocks import Quantised
from compress.quantize.ends import Divergence, Sensitivity, choose_bits, quantise_matrix, split_windows
from compress.quantize.stream import HALVES, METHODS, LayerQuantiser, WeightForm
from compress.text import Windows
from compress.weights import embed_rows, read_head, read_layer, read_spec
from profiles.loader import load_profile

IDS = torch.randint(3, 96, (24, 32), generator=torch.Generator().manual_seed(3))
LEARNED, TEST = Windows(IDS[:18], "random"), IDS[18:]


def run_quantised(folder: Path, case: str, form: WeightForm | None) -> Tensor:
    """Return the last stream of the test windows, with the quantised weights as floats."""
    checkpoint = open_checkpoint(folder if folder.exists() else make_checkpoint(folder, case))
    spec = read_spec(checkpoint)
    x = embed_rows(checkpoint, spec, TEST, torch.float32)
    quantiser = LayerQuantiser(checkpoint, spec, form, LEARNED) if form else None
    for index in range(len(spec.layers)):
        weights = read_layer(checkpoint, spec, index, torch.float32)
        if quantiser:
            found = quantiser.quantise_layer(index, weights)
            assert {r for r, m in found.items() if isinstance(m, Quantised)} == {
                role for half in HALVES for role in (*half.readers, half.projection)
            }
            weights = {r: m.dequantise() if isinstance(m, Quantised) else m for r, m in found.items()}
        x = run_layer(spec, spec.layers[index], weights, x, make_frame(spec, *TEST.shape))[0]
    return x


@pytest.mark.parametrize("case", ["llama", "llama-biases", "gemma2", "glm4", "olmo2", "qwen3", "granite", "phi3"])
def test_learning_from_text_beats_rounding(case: str, tmp_path: Path) -> None:
    dense = run_quantised(tmp_path / "m", case, None)
    errors = {
        method: float((run_quantised(tmp_path / "m", case, WeightForm(4, 16, True, method)) - dense).pow(2).sum())
        for method in METHODS
    }
    assert 0 < errors["gptq"] < errors["nearest"]


def test_eight_bits_leave_little_error(tmp_path: Path) -> None:
    dense = run_quantised(tmp_path / "m", "llama", None)
    for method in METHODS:
        found = run_quantised(tmp_path / "m", "llama", WeightForm(8, 32, True, method))
        assert float((found - dense).norm() / dense.norm()) < 0.03


def test_ends_of_a_tied_model_are_one_object(tmp_path: Path) -> None:
    for case, same in (("llama-tied", True), ("llama", False)):
        checkpoint = open_checkpoint(make_checkpoint(tmp_path / case, case))
        spec = read_spec(checkpoint)
        embed, head = LayerQuantiser(checkpoint, spec, WeightForm(4, method="nearest")).quantise_ends(checkpoint, spec)
        assert (embed is head) == same
        assert embed is not None
        assert embed.bits == 8


# Embedding and head in 4 or 8 bits


def slow_divergence(p: list[float], q: list[float]) -> float:
    """KL(softmax p || softmax q), entry by entry."""
    mass_p, mass_q = sum(math.exp(a) for a in p), sum(math.exp(b) for b in q)
    return sum(math.exp(a) / mass_p * (a - math.log(mass_p) - b + math.log(mass_q)) for a, b in zip(p, q, strict=True))


def test_divergence_in_blocks_equals_the_slow_one() -> None:
    random = torch.Generator().manual_seed(4)
    p = torch.randn(6, 50, generator=random) * 8
    q = p + torch.randn(6, 50, generator=random)
    running = Divergence(6)
    for one, other in zip(p.split(17, 1), q.split(17, 1), strict=True):
        running.update(one, other)
    wanted = sum(slow_divergence(a, b) for a, b in zip(p.tolist(), q.tolist(), strict=True)) / 6
    assert running.mean() == pytest.approx(wanted, rel=1e-9)


def test_matrix_in_blocks_equals_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "m", "llama"))
    name = read_spec(checkpoint).names["head"]
    monkeypatch.setattr("compress.checkpoint.BLOCK_BYTES", 4 * 7 * 48)
    for form in (WeightForm(8, 16, True, "nearest"), WeightForm(4, 32, False, "search")):
        found = quantise_matrix(checkpoint, name, form.quantise)
        whole = form.quantise(checkpoint.read_one(name, torch.float32))
        assert torch.equal(found.dequantise(), whole.dequantise())


def quantise_whole(folder: Path, case: str, form: WeightForm) -> tuple[LayerQuantiser, list[Quantised]]:
    """Quantise all layers, then embedding and head."""
    checkpoint = open_checkpoint(folder if folder.exists() else make_checkpoint(folder, case))
    spec = read_spec(checkpoint)
    quantiser = LayerQuantiser(checkpoint, spec, form, LEARNED if form.method == "gptq" else None)
    for index in range(len(spec.layers)):
        quantiser.quantise_layer(index, read_layer(checkpoint, spec, index, torch.float32))
    return quantiser, [matrix for matrix in quantiser.quantise_ends(checkpoint, spec) if matrix]


@pytest.mark.parametrize("case", ["llama", "llama-tied", "gemma2"])
def test_measured_divergences_are_those_of_the_whole_model(case: str, tmp_path: Path) -> None:
    """The same from three plain forward passes over the held-out windows."""
    quantiser, _ = quantise_whole(tmp_path / "m", case, WeightForm(4, 16))
    spec, trial, found = quantiser.spec, quantiser.trial, quantiser.choice and quantiser.choice.measured
    assert trial is not None and found is not None
    held = split_windows(LEARNED)[1]
    assert held is not None and held.ids.shape[0] == trial.dense.shape[0]
    x = embed_rows(quantiser.checkpoint, spec, held.ids, torch.float32)
    for index, layer in enumerate(spec.layers):
        weights = read_layer(quantiser.checkpoint, spec, index, torch.float32)
        x = run_layer(spec, layer, weights, x, make_frame(spec, *held.ids.shape))[0]
    torch.testing.assert_close(trial.dense.read(0, len(x)), x, rtol=1e-4, atol=1e-4)
    exact = read_head(quantiser.checkpoint, spec, torch.float32)
    heads = [exact["head"], *(quantiser.end_form(8).quantise(exact["head"]), quantiser.quantise_head())]
    dense, high, low = (store.read(0, len(x)).flatten(0, 1) for store in (trial.dense, trial.high, trial.low))
    matrices = [head.dequantise() if isinstance(head, Quantised) else head for head in heads]

    def diverge(first: tuple[Tensor, int], second: tuple[Tensor, int]) -> float:
        p, q = (
            compute_logits(spec, {**exact, "head": matrices[n]}, y).double().log_softmax(-1) for y, n in (first, second)
        )
        return float((p.exp() * (p - q)).sum(-1).mean())

    assert found.layers == pytest.approx(diverge((dense, 0), (high, 1)), rel=1e-3)
    assert found.head == pytest.approx(diverge((high, 1), (high, 2)), rel=1e-3)
    assert found.embedding == pytest.approx(diverge((high, 1), (low, 1)), rel=1e-3)


def test_ends_pay_for_their_bytes_what_the_layers_pay(tmp_path: Path) -> None:
    spec = read_spec(open_checkpoint(make_checkpoint(tmp_path / "m", "llama")))
    limit = 0.2 * spec.shape.vocab * spec.shape.hidden / spec.shape.layer_parameters
    for head, embedding, bits in ((0.99, 0.099, (4, 4)), (1.01, 0.099, (4, 8)), (0.99, 0.101, (8, 4)), (2, 2, (8, 8))):
        found = choose_bits(spec, Sensitivity(0.2, head * limit, embedding * limit))
        assert (found.embedding, found.head) == bits


@pytest.mark.parametrize(
    ("case", "form", "bits", "shared"),
    [
        ("llama", WeightForm(4, 16, ends="4"), (4, 4), False),
        ("llama-tied", WeightForm(4, 16, ends="4"), (4, 4), False),  # GPTQ for the head: no embedding any more
        ("llama-tied", WeightForm(4, 16, method="search", ends="4"), (4, 4), True),
        ("llama-tied", WeightForm(4, 16, ends="8"), (8, 8), True),
        ("llama", WeightForm(4, 16, method="nearest"), (8, 8), False),
        ("llama", WeightForm(8, 16), (8, 8), False),
    ],
)
def test_bits_of_the_ends(
    case: str, form: WeightForm, bits: tuple[int, int], shared: bool, tmp_path: Path
) -> None:
    quantiser, (embed, head) = quantise_whole(tmp_path / "m", case, form)
    assert (embed.bits, head.bits) == bits
    assert (embed is head) == shared
    assert quantiser.estimate_bytes() > 0


def test_head_learned_from_text_beats_the_search(tmp_path: Path) -> None:
    quantiser, (_, head) = quantise_whole(tmp_path / "m", "llama", WeightForm(4, 16, ends="4"))
    weight, gram = read_head(quantiser.checkpoint, quantiser.spec, torch.float32)["head"], quantiser.collect_outputs()
    found = output_error(weight, head, gram)
    assert found < 0.9 * output_error(weight, quantiser.quantise_nearby("head", 4), gram)


# The format that a profile asks for


def test_profile_gives_the_format_it_decodes_fastest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape, console = read_spec(open_checkpoint(make_checkpoint(tmp_path / "m", "llama"))).shape, Console(False, False)
    profile = load_profile("cpu-avx512")
    speeds = {name: predict_speed(name, shape, profile) for name in list_formats(profile)}
    assert list(speeds) == ["fp32", "int8", "w8a8", "int4"]
    best = choose_format(profile.name, shape, False, console)
    assert speeds[best] == max(speeds.values())
    said = capsys.readouterr().err
    assert best in said and all(f"{name} {speed:.3g}" in said for name, speed in speeds.items())
    assert choose_format(profile.name, shape, True, console) == "fp32"  # standard operators have nothing else
    refused(lambda: choose_format("ascend-310p3", shape, False, console), "ascend-310p3", "CPU profile")


def test_slow_memory_asks_for_fewer_bits(tmp_path: Path) -> None:
    shape = read_spec(open_checkpoint(make_checkpoint(tmp_path / "m", "llama"))).shape
    profile = load_profile("cpu-avx2")
    slow = replace(profile, memory=replace(profile.memory, bandwidth_gb_per_s=0.001, cache_mib=0.0, cache_gb_per_s=0.0))
    speeds = [predict_speed(name, shape, slow) for name in ("fp32", "int8", "int4")]
    assert speeds[0] < speeds[1] < speeds[2]


def test_held_windows_are_kept_from_learning() -> None:
    learned, held = split_windows(LEARNED)
    assert held is not None
    rows = {tuple(row) for row in LEARNED.ids.tolist()}
    parts = [{tuple(row) for row in part.ids.tolist()} for part in (learned, held)]
    assert parts[0] | parts[1] == rows
    assert not parts[0] & parts[1]
    assert split_windows(Windows(IDS[:1], "one"))[1] is None


def test_what_cannot_be_quantised_is_said(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "m", "llama"))
    refused(lambda: LayerQuantiser(checkpoint, read_spec(checkpoint), WeightForm(4)), "GPTQ needs calibration text")
    refused(lambda: WeightForm(4, method="guess"), "guess", "gptq")
    refused(lambda: WeightForm(3), "3 bits")
    refused(lambda: WeightForm(4, ends="6"), "6 bits", "auto")
