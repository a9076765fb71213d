"""Layers quantised on the stream of the quantised layers before them: better than rounding, on every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from refusals import refused
from tiny import make_checkpoint
from torch import Tensor

from compress.checkpoint import open_checkpoint
from compress.decoder import make_frame, run_layer
from compress.quantize.blocks import Quantised
from compress.quantize.stream import HALVES, METHODS, LayerQuantiser, WeightForm
from compress.text import Windows
from compress.weights import embed_rows, read_layer, read_spec

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


def test_what_cannot_be_quantised_is_said(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "m", "llama"))
    refused(lambda: LayerQuantiser(checkpoint, read_spec(checkpoint), WeightForm(4)), "GPTQ needs calibration text")
    refused(lambda: WeightForm(4, method="guess"), "guess", "gptq")
    refused(lambda: WeightForm(3), "3 bits")
