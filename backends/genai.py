"""genai_config.json beside a fused graph, with which onnxruntime-genai opens the folder as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backends.onnx_graph import GRAPH_FILE
from compress.spec import ModelSpec

GENAI_NAME = "genai_config.json"
# onnxruntime-genai's name for any decoder that it need not know better.
MODEL_TYPE = "decoder"


def write_genai_config(folder: Path, spec: ModelSpec, generation: Mapping[str, Any]) -> None:
    """Write the description; `generation` is generation_config.json as far as there is one, for the token ids."""
    data = describe_genai(spec, generation)
    (folder / GENAI_NAME).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def describe_genai(spec: ModelSpec, generation: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description: where the graph is, the names of its inputs and outputs, sizes, and special tokens."""
    widest = max(spec.shape.layers, key=lambda layer: layer.kv_heads)
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": GRAPH_FILE,
        "head_size": widest.head_dim,
        "hidden_size": spec.shape.hidden,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": widest.query_heads,
        "num_hidden_layers": len(spec.layers),
        "num_key_value_heads": widest.kv_heads,
    }
    model = {
        **list_tokens(spec.config, generation),
        "context_length": spec.max_positions,
        "decoder": decoder,
        "type": MODEL_TYPE,
        "vocab_size": spec.shape.vocab,
    }
    search = {
        "do_sample": False, "early_stopping": True, "max_length": spec.max_positions, "min_length": 0, "num_beams": 1,
        "num_return_sequences": 1, "past_present_share_buffer": True, "repetition_penalty": 1.0, "temperature": 1.0,
        "top_k": 50, "top_p": 1.0,
    }  # fmt: skip
    return {"model": model, "search": search}


def list_tokens(config: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    """Return begin, end and padding tokens; what neither file names is the end token, and that 0 at worst."""
    found = {**config, **{key: value for key, value in generation.items() if value is not None}}
    end = found.get("eos_token_id")
    end = 0 if end is None else end
    first = end[0] if isinstance(end, list) else end
    begin, padding = found.get("bos_token_id"), found.get("pad_token_id")
    return {
        "bos_token_id": first if begin is None else begin,
        "eos_token_id": end,
        "pad_token_id": first if padding is None else padding,
    }
