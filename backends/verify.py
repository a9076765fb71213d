"""Prove a written folder: fresh processes open it as a user would, and their logits are compared with the model's.

A load that does not fit can succeed with random weights, so logits are compared, never shapes. Each runtime has a
process of its own, without remote code and without the network: what this process holds in memory cannot help it.
Each process imports what its runtime needs and no more, hence the imports inside functions.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from backends.runtime import Ids, Logits
from compress.errors import UserError
from compress.family import explain_not_stock
from compress.report import CLOSE, DIFFERENT, EQUAL, SKIPPED, Proof

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Proof", "Sample", "verify_folder"]

# All sides compute in float32 from the same stored weights and differ in the order of their sums only: deep models
# reach 1e-5 to 1e-4 of the largest logit, while one wrong tensor moves logits by a tenth of it or more.
TOLERANCE = 1e-3
OLDEST_TRANSFORMERS = 5  # older ones lack some families and name their options differently
TRANSFORMERS, ONNXRUNTIME = "transformers", "onnxruntime"
ONNX_FOLDER = "onnx"
ERROR_PREFIX = "verify: "


@dataclass(frozen=True)
class Sample:
    """Ids `[batch, sequence]`, the logits `[batch, sequence, vocab]` they should give, and how near they must come.

    `tolerance`: share of the largest logit.
    """

    ids: Tensor
    logits: Tensor
    tolerance: float = TOLERANCE


def verify_folder(
    folder: Path, sample_ids: Tensor, sample_logits: Tensor, onnx: bool, graph: Sample | None = None
) -> list[Proof]:
    """Open `folder` with transformers, and its onnx subfolder with ONNX Runtime, and compare logits.

    `sample_ids` `[batch, sequence]` and `sample_logits` `[batch, sequence, vocab]` come from the model in memory;
    `graph` is what the ONNX graph should compute, where its weights are others (quantised ones).
    """
    exact = Sample(sample_ids, sample_logits)
    runtimes = [(TRANSFORMERS, exact), *([(ONNXRUNTIME, graph or exact)] if onnx else [])]
    return [prove_runtime(runtime, folder, sample) for runtime, sample in runtimes]


def prove_runtime(runtime: str, folder: Path, sample: Sample) -> Proof:
    """Compare one runtime in a fresh process, unless it cannot open such a folder at all."""
    reason = explain_skip(folder) if runtime == TRANSFORMERS else ""
    if reason:
        return Proof(runtime, SKIPPED, reason=reason)
    with tempfile.TemporaryDirectory(prefix="lightpress-verify-") as scratch:
        stored = Path(scratch) / "sample.npz"
        np.savez(stored, ids=sample.ids.numpy(), logits=sample.logits.float().numpy())
        command = [sys.executable, "-P", "-m", "backends.verify", runtime, str(folder), str(stored)]
        ran = subprocess.run(command, env=make_environment(), capture_output=True, text=True, check=False)
    if ran.returncode == -signal.SIGKILL:
        return Proof(runtime, SKIPPED, reason="its process was killed, probably for lack of memory")
    if ran.returncode:
        return Proof(runtime, DIFFERENT, reason=f"it does not open the folder ({find_error(ran.stderr)})")
    return judge(runtime, sample.tolerance, **json.loads(ran.stdout.splitlines()[-1]))


def explain_skip(folder: Path) -> str:
    """Return why transformers is not asked, or nothing when it is."""
    if find_spec("transformers") is None:
        return "transformers is not installed"
    if int(version("transformers").split(".")[0]) < OLDEST_TRANSFORMERS:
        return f"the installed transformers is older than {OLDEST_TRANSFORMERS}"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return explain_not_stock(config, str(folder))


def make_environment() -> dict[str, str]:
    """Return the environment of a fresh process: no network, and this package importable from a source tree too."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    root = str(Path(__file__).resolve().parents[1])
    if root not in sysconfig.get_paths().values():
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    return environment


def find_error(text: str) -> str:
    """Return the line of a failed process's stderr that names the error, without a closing full stop."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    ours = [line.removeprefix(ERROR_PREFIX) for line in lines if line.startswith(ERROR_PREFIX)]
    return (ours or lines or ["it was killed"])[-1].rstrip(".")


def judge(runtime: str, tolerance: float, max_error: float, scale: float, agreement: float) -> Proof:
    """Turn a measured difference into a proof; a NaN on either side counts as different."""
    same = max_error <= tolerance * scale
    reason = "" if same else f"logits differ by up to {max_error:.3g} at a largest logit of {scale:.3g}"
    passed = EQUAL if tolerance <= TOLERANCE else CLOSE
    return Proof(runtime, passed if same else DIFFERENT, max_error, scale, agreement, reason)


def compare_sample(run: Callable[[Ids], Logits], sample: Path) -> dict[str, float]:
    """Run the sample a row at a time; return largest difference, largest logit and share of equal top-1 tokens."""
    errors, scales, agreed = [], [], []
    with np.load(sample, allow_pickle=False) as stored:
        for ids, expected in zip(stored["ids"], stored["logits"], strict=True):
            logits = run(ids[None])[0]
            if logits.shape != expected.shape:
                raise UserError(f"its logits have the shape {logits.shape}, not {expected.shape}.")
            errors.append(np.abs(logits - expected).max())
            scales.append(np.abs(expected).max())
            agreed.append((logits.argmax(-1) == expected.argmax(-1)).mean())
    return {"max_error": float(np.max(errors)), "scale": float(np.max(scales)), "agreement": float(np.mean(agreed))}


def open_transformers(folder: Path) -> Callable[[Ids], Logits]:
    """Return a function from ids to logits that runs the stock class; UserError where weights did not all load."""
    import torch
    from transformers import AutoModelForCausalLM

    opened: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False, local_files_only=True, output_loading_info=True
    )
    model, loading = opened
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        found = [str(key) for key in loading.get(kind) or ()]
        if found:
            raise UserError(f"{len(found)} {kind.replace('_', ' ')}, among them {min(found)}.")
    model.eval()

    def run(ids: Ids) -> Logits:
        with torch.inference_mode():
            logits: Logits = model(torch.from_numpy(ids), use_cache=False).logits.float().numpy()
        return logits

    return run


def open_onnxruntime(folder: Path) -> Callable[[Ids], Logits]:
    """Return a function from ids to logits that runs the exported graph."""
    from backends.ort import open_onnx

    model = open_onnx(folder / ONNX_FOLDER)
    return lambda ids: model.prefill(ids)[0]


OPENERS: dict[str, Callable[[Path], Callable[[Ids], Logits]]] = {
    TRANSFORMERS: open_transformers,
    ONNXRUNTIME: open_onnxruntime,
}


def main(arguments: list[str]) -> int:
    """Compare one runtime and print the numbers as JSON: RUNTIME FOLDER SAMPLE."""
    runtime, folder, sample = arguments
    try:
        print(json.dumps(compare_sample(OPENERS[runtime](Path(folder)), Path(sample))))
    except UserError as error:
        print(f"{ERROR_PREFIX}{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
