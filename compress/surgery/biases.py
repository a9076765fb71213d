"""Bias vectors for projections that had none: zeros until a repair fills them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.shapes import LayerShape

Weights = dict[str, Tensor]


def fill_biases(shape: LayerShape, weights: Mapping[str, Tensor]) -> Weights:
    """Return a layer's weights with a zero bias `[out]` on every projection that `shape` says has one; exact.

    Stock classes switch biases on for several projections at once (`spec_change.add_biases`).
    """
    missing = [name for name in shape.biases if f"{name}_bias" not in weights]
    zeros = {f"{name}_bias": torch.zeros_like(weights[name][:, 0]) for name in missing}
    return {**weights, **zeros}
