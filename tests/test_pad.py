"""The padded copy of an uneven model is exactly equal and opens in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_decoder import run_decoder, run_reference
from tiny import CASES, WITHOUT_REFERENCE, make_checkpoint

from compress.checkpoint import open_checkpoint
from compress.checkpoint_writer import CheckpointWriter
from compress.errors import UserError
from compress.surgery.pad import uniform_config, write_padded
from compress.weights import read_spec

# Sums over padded columns add exact zeros, but blocked matrix products may group the terms differently.
TOLERANCE = 1e-10
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
UNEVEN = {"0": {"intermediate_size": 40, **HEADS}, "2": {"intermediate_size": 24}}


def write_uniform(folder: Path, target: Path) -> Path:
    checkpoint = open_checkpoint(folder)
    spec = read_spec(checkpoint)
    with CheckpointWriter(target, uniform_config(spec)) as writer:
        write_padded(checkpoint, spec, writer)
        return writer.finish()


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith(("olmo2", "mistral-no"))])
def test_padded_copy_is_equal(case: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "uneven", case, per_layer_config=UNEVEN)
    padded = write_uniform(folder, tmp_path / "padded")
    ids = torch.randint(3, 96, (2, 30), generator=torch.Generator().manual_seed(2))
    assert read_spec(open_checkpoint(padded)).shape.uniform
    ours = run_decoder(folder, ids, torch.float64)
    assert (run_decoder(padded, ids, torch.float64) - ours).abs().max().item() <= TOLERANCE
    if case not in WITHOUT_REFERENCE or case == "pangu_embedded":
        theirs = run_reference(padded, ids, torch.float32)
        assert (theirs - ours).abs().max().item() <= 2e-5


def test_norms_over_all_heads_have_no_padded_copy(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "uneven", "olmo2", per_layer_config=UNEVEN)
    with pytest.raises(UserError, match="norm all heads together"):
        write_uniform(folder, tmp_path / "padded")
    assert not (tmp_path / "padded").exists()
