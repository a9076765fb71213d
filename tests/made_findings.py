"""Made-up findings for tests of plans: rankings and damage curves without a model behind them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from tiny import make_config

from compress.importance.findings import Findings, LayerFindings
from compress.importance.units import Ranking
from compress.spec import ModelSpec, resolve_model


def make_spec(case: str, **changes: Any) -> ModelSpec:
    return resolve_model(make_config(case, **changes), None)


def make_ranking(count: int, step: float, seed: int) -> Ranking:
    """A random order and random scores; the damage grows with every unit, by more for the later ones."""
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=random).tolist()
    score = torch.randn(count, generator=random).tolist()
    return Ranking(tuple(order), tuple(step * gone**1.5 for gone in range(count + 1)), tuple(score))


def make_findings(spec: ModelSpec, pinned: tuple[int, ...] = (), seed: int = 0) -> Findings:
    """Unlike layers, a drop order that leaves the first and the last, hidden scores that rise."""
    random = torch.Generator().manual_seed(seed)
    layers = []
    for index, shape in enumerate(spec.shape.layers):
        kv, ffn, change = (float(0.2 + torch.rand((), generator=random)) for _ in range(3))
        found = LayerFindings(
            index, make_ranking(shape.kv_heads, 0.2 * kv, index), make_ranking(shape.ffn, 0.002 * ffn, 100 + index),
            energy=1.0 + index, change=change * (1 + index), influence=0.1 * change, sinks=0,
            groups=tuple(torch.rand(shape.kv_heads, generator=random).tolist()),
        )  # fmt: skip
        layers.append(found)
    score = torch.arange(1.0, spec.shape.hidden + 1)
    order = tuple(sorted(range(1, len(layers) - 1), key=lambda index: layers[index].influence))
    return Findings(tuple(layers), score, score.expand(3, -1) ** 2, order, pinned, 999, 7)


def change_layer(findings: Findings, index: int, **changes: Any) -> Findings:
    layers = list(findings.layers)
    layers[index] = replace(layers[index], **changes)
    return replace(findings, layers=tuple(layers))
