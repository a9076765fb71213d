"""Tiny checkpoints of every family with every tensor perturbed: no norm is 1, no mean is 0, no bias is 0."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from compress.spec import ModelSpec, expected_tensors, resolve_model

COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
LONGROPE = {
    "type": "longrope",
    "long_factor": [1.5, 2.0, 3.0, 4.0],
    "short_factor": [1.0, 1.1, 1.2, 1.3],
}
# Case name -> config over COMMON; one line per family, more where a family has variants that change the forward.
CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-llama3": {"model_type": "llama", "rope_scaling": LLAMA3, "rope_theta": 500000.0},
    "llama-yarn": {"model_type": "llama", "rope_parameters": YARN},
    "llama-linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}},
    "mistral": {"model_type": "mistral", "sliding_window": 12, "head_dim": 16},
    "mistral-no-window": {"model_type": "mistral", "sliding_window": None, "num_attention_heads": 9},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-window": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "phi3": {"model_type": "phi3"},
    "phi3-longrope": {"model_type": "phi3", "rope_scaling": LONGROPE, "original_max_position_embeddings": 24},
    "phi3-partial": {"model_type": "phi3", "partial_rotary_factor": 0.5, "sliding_window": 10},
    "gemma2": {"model_type": "gemma2", "sliding_window": 11, "query_pre_attn_scalar": 24, "tie_word_embeddings": True},
    "gemma3_text": {"model_type": "gemma3_text", "sliding_window": 11, "sliding_window_pattern": 2, "head_dim": 16},
    "gemma3_text-linear": {
        "model_type": "gemma3_text",
        "sliding_window": 11,
        "sliding_window_pattern": 3,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "rope_local_base_freq": 5000.0,
        "tie_word_embeddings": True,
    },
    "glm": {"model_type": "glm", "head_dim": 16},
    "glm4": {"model_type": "glm4", "head_dim": 16, "attention_bias": False},
    "olmo2": {"model_type": "olmo2"},
    "granite": {
        "model_type": "granite",
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.5,
    },
    "smollm3": {"model_type": "smollm3", "no_rope_layer_interval": 2},
    "smollm3-window": {
        "model_type": "smollm3",
        "no_rope_layers": [1, 0, 0, 1],
        "use_sliding_window": True,
        "sliding_window": 9,
    },
    "pangu_embedded": {"model_type": "PanguEmbedded", "tie_word_embeddings": True},
    "pangu_sandwich": {"model_type": "PanguUltra"},
}
# The families as such, for tests that need no variant.
FAMILIES = [name for name in CASES if "-" not in name]
# Families whose branches end in a norm of their own that can be absorbed (olmo2 has no other norms: it cannot).
POST_NORM_FAMILIES = ("gemma2", "gemma3_text", "glm4", "pangu_sandwich")
# No class in transformers: the first equals another family, the second is checked through its own twin.
WITHOUT_REFERENCE = ("pangu_embedded", "pangu_sandwich")


def make_config(case: str, **changes: Any) -> dict[str, Any]:
    """Return the config.json of a tiny model."""
    return {**COMMON, **CASES[case], **changes}


def make_tensors(spec: ModelSpec, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return float64-exact random float32 tensors for every stored name of `spec`."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_tensors(spec).items():
        noise = torch.randn(shape, generator=random)
        if len(shape) == 1:
            centre = 1.0 - spec.norm_offset if "norm" in name else 0.1
            tensors[name] = centre + 0.3 * noise
        elif name in spec.names.values():
            tensors[name] = 0.05 + 0.3 * noise
        else:
            tensors[name] = noise / shape[1] ** 0.5 + 0.01
    return tensors


def make_checkpoint(folder: Path, case: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Write a tiny perturbed checkpoint of `case` and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = make_config(case, **changes)
    tensors = make_tensors(resolve_model(config, None))
    save_file({k: v.to(dtype) for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder
