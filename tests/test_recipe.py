"""What a recipe refuses before anything is opened."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from refusals import refused

from compress.recipe import AXES, CHOICES, LEAST, Recipe, flag, merge_recipe


def test_the_defaults_are_allowed() -> None:
    assert merge_recipe({}, {}) == Recipe()
    assert Recipe().axes == AXES
    assert {*CHOICES, *LEAST} <= {item.name for item in fields(Recipe)}


# What a value needs beside it, so that it alone is judged.
BESIDE: dict[tuple[str, str], dict[str, Any]] = {
    ("repair", "bias"): {"biases": "own"},
    ("target", "own"): {"axes": ("ffn", "kv", "layers")},
    ("ratio", "equal"): {"axes": ("ffn", "kv")},
    ("ratio", "softmax"): {"axes": ("ffn", "kv"), "shapes": "per-layer"},
    ("ratio", "influence"): {"axes": ("layers",)},
    ("ratio", "zscore"): {"axes": ("ffn", "kv"), "shapes": "per-layer"},
}


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_is_allowed_and_no_other(name: str) -> None:
    for value in CHOICES[name]:
        assert getattr(Recipe(**{name: value}, **BESIDE.get((name, value), {})), name) == value
    refused(lambda: Recipe(**{name: "best"}), f"{flag(name)} best", *CHOICES[name])


@pytest.mark.parametrize("name", LEAST)
def test_numbers_have_a_least_value(name: str) -> None:
    lowest = max(LEAST[name], 2) if name == "length" else LEAST[name]
    assert getattr(Recipe(**{name: lowest}), name) == lowest
    refused(lambda: Recipe(**{name: LEAST[name] - 1}), flag(name), "must")


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.01, float("nan")])
def test_keep_is_a_share(keep: float) -> None:
    refused(lambda: Recipe(keep=keep), "--keep", "at most 1")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"axes": ()}, ["--axes", "ffn,kv,hidden,layers"]),
        ({"axes": ("ffn", "depth")}, ["--axes", "'depth'"]),
        ({"length": 1}, ["--length", "at least 2"]),
        ({"repair": "bias"}, ["--repair bias", "--biases stock or own"]),
        ({"target": "own"}, ["--target own", "hidden", "--axes without hidden"]),
        ({"ratio": "softmax"}, ["--ratio softmax", "--axes ffn,kv"]),
        ({"ratio": "equal", "axes": ("ffn", "layers")}, ["--ratio equal", "--axes ffn,kv"]),
    ],
)
def test_options_that_do_not_go_together_are_refused(values: dict[str, Any], words: list[str]) -> None:
    refused(lambda: Recipe(**values), *words)
    refused(lambda: merge_recipe(values, {}), *words)
