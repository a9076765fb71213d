"""Files of W8A8 models as Ascend's servers read them: names, types and shapes of tensors, and the description.

AscendV1 is what vllm-ascend (`--quantization ascend`) and MindIE take, compressed-tensors what vllm-ascend takes
without a flag (reference/ascend.md, 4.3; read in the sources of vllm-ascend, ModelSlim and MindIE-LLM). Projections
that a checkpoint stores fused stay fused, under their stored name: the servers' classes for such families look them up
so (vLLM, `packed_modules_mapping` of a family with a fused tensor names that tensor itself).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.quantize.w8a8 import DYNAMIC, FLOAT, STATIC, LinearForm, QuantisedLinear

ASCEND, COMPRESSED = "ascend", "compressed-tensors"
DESCRIPTION = "quant_model_description.json"
WEIGHTS = "quant_model_weights"
VERSION = "1.0.0"
INT_QUANTIZED = "int-quantized"


@dataclass(frozen=True)
class Layout:
    """A quantisation by name: whose files, and whether inputs are static."""

    files: str
    kind: str

    def form(self, dtype: torch.dtype, gptq: bool, alpha: float | None, fallback: bool) -> LinearForm:
        """Return how projections are quantised for it.

        compressed-tensors has one scheme for all layers and a list of those to leave alone: what falls back is float.
        """
        own = DYNAMIC if self.files == ASCEND else FLOAT
        return LinearForm(self.kind, dtype, self.files == ASCEND, gptq, alpha, own if fallback else "")


LAYOUTS: Mapping[str, Layout] = {
    "w8a8-static": Layout(ASCEND, STATIC),
    "w8a8-dynamic": Layout(ASCEND, DYNAMIC),
    "compressed-tensors-w8a8": Layout(COMPRESSED, DYNAMIC),
    "compressed-tensors-w8a8-static": Layout(COMPRESSED, STATIC),
}


def module_name(name: str) -> str:
    """Return the module of a weight."""
    return name.removesuffix(".weight")


def name_ascend(name: str, linear: QuantisedLinear, dtype: torch.dtype, integer_factors: bool) -> dict[str, Tensor]:
    """Return AscendV1's tensors of the projection whose weight is `name`, its float bias left out.

    Scales of weights are float32 holding values of the model's type, so that a server may cast them or not; input
    scale and offset `[1]` are of the model's type (MindIE, w8a8.md); factors `[out]` are float32, or int64 holding
    float32 bits where the model is float16 or the chip wants it.
    """
    prefix, column = module_name(name), linear.weight_scale[:, None].contiguous()
    zeros = torch.zeros_like(column)
    tensors = {name: linear.codes, f"{prefix}.weight_scale": column, f"{prefix}.weight_offset": zeros}
    if linear.grid is None:
        return tensors
    assert linear.deq_scale is not None and linear.quant_bias is not None
    bits = integer_factors or dtype == torch.float16
    return tensors | {
        f"{prefix}.input_scale": torch.tensor([linear.grid.scale], dtype=dtype),
        f"{prefix}.input_offset": torch.tensor([linear.grid.offset], dtype=dtype),
        f"{prefix}.quant_bias": linear.quant_bias,
        f"{prefix}.deq_scale": pack_factors(linear.deq_scale) if bits else linear.deq_scale,
    }


def pack_factors(factors: Tensor) -> Tensor:
    """Return float32 factors as int64 that hold their bit patterns."""
    return factors.contiguous().view(torch.int32).to(torch.int64)


def name_compressed(name: str, linear: QuantisedLinear, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return compressed-tensors' tensors of the projection whose weight is `name`, its float bias left out.

    A symmetric input has no zero point in this format, and vLLM's loader refuses a tensor that it does not expect.
    """
    prefix = module_name(name)
    tensors = {name: linear.codes, f"{prefix}.weight_scale": linear.weight_scale[:, None].to(dtype)}
    if linear.grid is not None:
        tensors[f"{prefix}.input_scale"] = torch.tensor([linear.grid.scale], dtype=dtype)
    return tensors


def describe_ascend(kinds: Mapping[str, str], head: str) -> dict[str, Any]:
    """Return quant_model_description.json for tensor name -> type.

    The head's key is there even where a tied model stores no such tensor: vllm-ascend looks it up all the same.
    """
    used = set(kinds.values())
    whole = next((kind for kind in (STATIC, DYNAMIC) if kind in used), FLOAT)
    facts = {"version": VERSION, "model_quant_type": whole, "metadata": {}, "group_size": 0, "optional": {}}
    return {**({head: FLOAT} | dict(kinds)), **facts}


def describe_compressed(kind: str, ignored: Iterable[str]) -> dict[str, Any]:
    """Return the `quantization_config` of config.json in compressed-tensors' schema; `ignored` names float modules."""
    inputs: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True}
    own = {"strategy": "token", "dynamic": True} if kind == DYNAMIC else {"strategy": "tensor", "dynamic": False}
    group = {
        "targets": ["Linear"],
        "weights": {**inputs, "strategy": "channel", "dynamic": False},
        "input_activations": {**inputs, **own},
        "output_activations": None,
        "format": INT_QUANTIZED,
    }
    return {
        "quant_method": COMPRESSED,
        "quantization_status": "compressed",
        "format": INT_QUANTIZED,
        "config_groups": {"group_0": group},
        "ignore": list(ignored),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
