"""An exported folder, opened by a process that knows nothing of the checkpoint, generates the decoder's tokens.

One process opens all folders with onnxruntime, another with onnxruntime-genai: this interpreter's if it has that, else
the one that LIGHTPRESS_GENAI_PYTHON names. Where the decoder itself all but ties, either token is right (GAP).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import FAMILIES, POST_NORM_FAMILIES, make_checkpoint

from backends.eager import EagerModel, load_eager
from backends.export_onnx import export_onnx
from compress.checkpoint import open_checkpoint

ROOT = Path(__file__).parents[1]
GENAI_PYTHON = os.environ.get("LIGHTPRESS_GENAI_PYTHON") or (sys.executable if find_spec("onnxruntime_genai") else "")
PROMPT, COUNT, VOCAB = [5, 17, 44, 3, 90, 61, 8, 29], 64, 96
GAP = 1e-4  # between the decoder's two best logits (which are about 1 to 10): float32 sums in another order differ so
BOTH = ["attn_out", "mlp_out"]
UNEVEN = {
    "1": {"intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2},
    "3": {"num_attention_heads": 2, "num_key_value_heads": 1},
}
ABSORBED = {"0": {"absorbed_norms": BOTH}, "1": {**UNEVEN["1"], "absorbed_norms": BOTH[1:]}, "3": UNEVEN["3"]}
RUNS: Mapping[str, tuple[str, dict[str, Any]]] = {
    **{case: (case, {}) for case in FAMILIES},
    **{f"{case} uneven": (case, {"per_layer_config": UNEVEN}) for case in FAMILIES},
    **{f"{case} absorbed": (case, {"per_layer_config": ABSORBED}) for case in POST_NORM_FAMILIES},
}
ORT_SCRIPT = """
import json, sys
from pathlib import Path
from backends.ort import open_onnx
folders, prompt, count = json.load(sys.stdin)
print(json.dumps({name: open_onnx(Path(folder), 1).generate(prompt, count) for name, folder in folders.items()}))
"""
GENAI_SCRIPT = """
import json, sys
import numpy
import onnxruntime_genai as genai

def generate(folder, prompt, count):
    model = genai.Model(folder)
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + count, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(numpy.array([prompt], dtype=numpy.int32))
    found = []
    while len(found) < count and not generator.is_done():
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    return found

folders, prompt, count = json.load(sys.stdin)
print(json.dumps({name: generate(folder, prompt, count) for name, folder in folders.items()}))
"""


class Exported:
    """All models: the decoder of each, and the folder that was exported."""

    def __init__(self, folder: Path) -> None:
        self.decoders: dict[str, EagerModel] = {}
        self.folders: dict[str, str] = {}
        self.said: dict[str, list[int]] = {}
        for name, (case, changes) in RUNS.items():
            self.add(folder / name.replace(" ", "-"), name, make_checkpoint(folder / f"dense {name}", case, **changes))

    def add(self, target: Path, name: str, source: Path) -> None:
        """Export one model, whose end token is one that it does not generate: the runtimes would stop there."""
        decoder = self.decoders[name] = load_eager(open_checkpoint(source))
        said = self.said[name] = decoder.generate(PROMPT, COUNT)
        config = json.loads((source / "config.json").read_text())
        config["eos_token_id"] = next(id for id in range(VOCAB) if id not in said)
        (source / "config.json").write_text(json.dumps(config))
        export_onnx(open_checkpoint(source), target)
        self.folders[name] = str(target)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp("fresh"))


def run_fresh(python: str, script: str, exported: Exported) -> dict[str, list[int]]:
    """Return the tokens of all folders as another process gives them."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    given = json.dumps([exported.folders, PROMPT, COUNT])
    done = subprocess.run(
        [python, "-c", script], input=given, capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[int]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def by_onnxruntime(exported: Exported) -> dict[str, list[int]]:
    return run_fresh(sys.executable, ORT_SCRIPT, exported)


@pytest.fixture(scope="module")
def by_genai(exported: Exported) -> dict[str, list[int]]:
    if not GENAI_PYTHON:
        pytest.skip("onnxruntime-genai is not installed, and LIGHTPRESS_GENAI_PYTHON names no interpreter that has it")
    return run_fresh(GENAI_PYTHON, GENAI_SCRIPT, exported)


def assert_greedy(decoder: EagerModel, found: list[int]) -> None:
    """Every token is the decoder's own choice after those before it, or as good as that within GAP."""
    assert len(found) == COUNT
    logits, cache = decoder.prefill(np.array([PROMPT]))
    for place, token in enumerate(found):
        row = logits[0, -1]
        assert token == int(row.argmax()) or float(row.max() - row[token]) < GAP, f"token {place} of {found}"
        logits, cache = decoder.decode(np.array([[token]]), cache)


@pytest.mark.parametrize("name", RUNS)
def test_onnxruntime_generates_the_decoders_tokens(
    name: str, exported: Exported, by_onnxruntime: dict[str, list[int]]
) -> None:
    assert_greedy(exported.decoders[name], by_onnxruntime[name])


@pytest.mark.parametrize("name", RUNS)
def test_genai_generates_the_decoders_tokens(
    name: str, exported: Exported, by_genai: dict[str, list[int]]
) -> None:
    assert_greedy(exported.decoders[name], by_genai[name])


def test_models_say_something_worth_comparing(exported: Exported) -> None:
    different = {tuple(tokens) for tokens in exported.said.values()}
    assert len(different) > len(RUNS) * 3 // 4  # two families may differ in names alone
    assert sum(len(set(tokens)) > 1 for tokens in different) > len(different) // 2  # some repeat one token
