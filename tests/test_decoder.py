"""The forward equals transformers on a tiny perturbed model of every family, in float64 and float32."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CASES, WITHOUT_REFERENCE, make_checkpoint

from compress.checkpoint import open_checkpoint
from compress.decoder import compute_logits, make_frame, run_layer
from compress.weights import embed_rows, read_head, read_layer, read_spec

# Sums of ~50 products of order 1 in float64 and float32; logits are of order 10.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
LENGTH = 40  # longer than every sliding window, and than the original context of the scaled rotary variants


def run_decoder(folder: Path, ids: torch.Tensor, dtype: torch.dtype, split: int = 0) -> torch.Tensor:
    """Run all layers over `ids`; with `split`, prefill that many tokens and decode the rest one by one."""
    checkpoint = open_checkpoint(folder)
    spec = read_spec(checkpoint)
    layers = [read_layer(checkpoint, spec, index, dtype) for index in range(len(spec.layers))]
    pasts: list[Any] = [None] * len(layers)
    total = ids.shape[1]
    cuts = [0, total] if not split else [0, *range(split, total + 1)]
    outputs = []
    for start, stop in zip(cuts, cuts[1:], strict=False):
        x = embed_rows(checkpoint, spec, ids[:, start:stop], dtype)
        frame = make_frame(spec, len(ids), stop - start, start, dtype)
        for index, weights in enumerate(layers):
            x, pasts[index] = run_layer(spec, spec.layers[index], weights, x, frame, pasts[index])
        outputs.append(compute_logits(spec, read_head(checkpoint, spec, dtype), x))
    return torch.cat(outputs, 1)


@contextlib.contextmanager
def in_double() -> Iterator[None]:
    """Make transformers compute in float64 where its code asks for float32 by name (norms, softmax, rotary)."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch, "float", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def run_reference(folder: Path, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Run transformers on the same folder."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    if dtype == torch.float64:
        with in_double():
            exact = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").double()
            exact.load_state_dict(model.state_dict())
            with torch.no_grad():
                return exact(ids, use_cache=False).logits
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.fixture
def ids() -> torch.Tensor:
    """Two sequences of token ids."""
    return torch.randint(3, 96, (2, LENGTH), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("case", [case for case in CASES if case not in WITHOUT_REFERENCE])
def test_equals_transformers(case: str, dtype: torch.dtype, tmp_path: Path, ids: torch.Tensor) -> None:
    folder = make_checkpoint(tmp_path / case, case)
    ours, theirs = run_decoder(folder, ids, dtype), run_reference(folder, ids, dtype)
    assert theirs.dtype == dtype
    assert (ours - theirs).abs().max().item() <= TOLERANCE[dtype]


@pytest.mark.parametrize("case", CASES)
def test_cached_decode_equals_prefill(case: str, tmp_path: Path, ids: torch.Tensor) -> None:
    # longrope rotates all positions anew once the original context is passed, which a cache cannot follow
    # (transformers' cache does not either): keep the whole sequence on one side of it.
    changes = {"original_max_position_embeddings": 64} if case == "phi3-longrope" else {}
    folder = make_checkpoint(tmp_path / case, case, **changes)
    whole = run_decoder(folder, ids, torch.float64)
    stepped = run_decoder(folder, ids, torch.float64, split=17)
    assert (whole - stepped).abs().max().item() <= TOLERANCE[torch.float64]


def test_pangu_embedded_equals_llama_with_biases(tmp_path: Path, ids: torch.Tensor) -> None:
    folder = make_checkpoint(tmp_path / "pangu", "pangu_embedded")
    ours = run_decoder(folder, ids, torch.float64)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": True}
    config["rms_norm_eps"] = 1e-5
    (folder / "config.json").write_text(json.dumps(config))
    theirs = run_reference(folder, ids, torch.float64)
    assert (ours - theirs).abs().max().item() <= TOLERANCE[torch.float64]


def test_pangu_sandwich_equals_gemma_style_sandwich(tmp_path: Path, ids: torch.Tensor) -> None:
    """DSSN is the four-norm layout: with neutral conventions gemma2's class computes the same function."""
    folder = make_checkpoint(tmp_path / "pangu", "pangu_sandwich")
    ours = run_decoder(folder, ids, torch.float64)
    tensors = load_file(folder / "model.safetensors")
    twin = {}
    for name, tensor in tensors.items():
        renamed = name.replace("pre_mlp_layernorm", "pre_feedforward_layernorm")
        renamed = renamed.replace("post_mlp_layernorm", "post_feedforward_layernorm")
        exact = tensor.double()
        twin[renamed] = exact - 1.0 if "norm" in name else exact
    # gemma scales embeddings by sqrt(hidden): take it out of the weights.
    twin["model.embed_tokens.weight"] = twin["model.embed_tokens.weight"] / 48**0.5
    save_file(twin, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "rms_norm_eps": 1e-5,
        "hidden_activation": "silu",
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "query_pre_attn_scalar": 8,
        "sliding_window": 4096,
    }
    (folder / "config.json").write_text(json.dumps(config))
    theirs = run_reference(folder, ids, torch.float64)
    assert (ours - theirs).abs().max().item() <= TOLERANCE[torch.float64]
