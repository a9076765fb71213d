"""A synthetic llama of any depth for the benchmarks: hidden 1024, 16/8 heads x 64, FFN 2816, vocabulary 32000."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from compress.checkpoint_writer import CheckpointWriter
from compress.spec import expected_tensors, resolve_model
from compress.text import Windows


def make_config(layers: int) -> dict[str, Any]:
    """Return the config.json of the synthetic model."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    }


def write_model(folder: Path, layers: int, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the model with random weights, one tensor in memory at a time."""
    config = make_config(layers)
    random = torch.Generator().manual_seed(0)
    with CheckpointWriter(folder, config) as writer:
        for name, shape in expected_tensors(resolve_model(config, None)).items():
            values = torch.randn(shape, generator=random) * (0.02 if len(shape) > 1 else 0.1)
            writer.add(name, (values if len(shape) > 1 else values + 1).to(dtype))
        writer.finish()
    return folder


def make_windows(count: int, length: int) -> Windows:
    """Return random token ids `[count, length]`."""
    return Windows(torch.randint(32000, (count, length), generator=torch.Generator().manual_seed(1)), "random ids")
