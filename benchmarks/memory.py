"""Peak memory of compressing does not grow with depth: the same synthetic model with 6 and with 24 layers.

    python benchmarks/memory.py [--depths 6,24] [--windows 32] [--length 256]

Each run is a fresh process that plans, rebuilds, writes, exports ONNX and evaluates. Targets: the deeper model's peak
within 10 % of the shallower one's, and under 2.2 x (one layer's float32 weights + its statistics + hidden states +
embeddings) + what the interpreter takes after its imports.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

MIB = 2**20


def peak_bytes() -> int:
    """Return this process's highest resident size (VmHWM), in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def run_worker(source: str, target: str, windows: int, length: int) -> None:
    """Compress one model in this process and print its peak and the bound's parts as JSON."""
    import torch  # noqa: PLC0415
    from synthetic import make_windows  # noqa: PLC0415

    from backends.export_onnx import export_onnx  # noqa: PLC0415
    from compress.checkpoint import open_checkpoint  # noqa: PLC0415
    from compress.checkpoint_writer import CheckpointWriter  # noqa: PLC0415
    from compress.evaluate import measure_quality  # noqa: PLC0415
    from compress.pipeline import Task, compress_checkpoint, plan_checkpoint  # noqa: PLC0415
    from compress.recipe import Recipe  # noqa: PLC0415
    from compress.surgery.describe import new_config  # noqa: PLC0415
    from compress.weights import read_spec  # noqa: PLC0415

    torch.set_grad_enabled(False)
    base = peak_bytes()
    checkpoint = open_checkpoint(source)
    spec = read_spec(checkpoint)
    task = Task(checkpoint, spec, make_windows(windows, length), Recipe(keep=0.7))
    plan = plan_checkpoint(task)
    peaks = {"plan": peak_bytes()}
    with CheckpointWriter(Path(target), new_config(spec, plan)) as writer:
        compress_checkpoint(task, plan, writer)
        writer.finish()
    peaks["rebuild"] = peak_bytes()
    written = open_checkpoint(target)
    export_onnx(written, Path(target) / "onnx")
    peaks["export"] = peak_bytes()
    measure_quality(written, read_spec(written), task.windows.take(4))
    layer, hidden = spec.shape.layers[0], spec.shape.hidden
    parts = {
        "layer": 4 * layer.parameters(hidden),
        "statistics": 8 * (layer.ffn**2 + layer.query**2 + layer.ffn * hidden),
        "hidden": 4 * task.windows.tokens * hidden,
        "embeddings": 4 * spec.shape.embedding_parameters,
    }
    print(json.dumps({"base": base, "peak": peak_bytes(), "stages": peaks, "parts": parts}))


def measure(depth: int, windows: int, length: int) -> dict[str, object]:
    """Run one depth in a fresh process."""
    from synthetic import write_model  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as name:
        source = write_model(Path(name) / "dense", depth)
        command = [sys.executable, __file__, "--worker", str(source), f"{name}/out"]
        command += ["--windows", str(windows), "--length", str(length)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, object] = json.loads(result.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure both depths and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", default="6,24")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--worker", nargs=2, metavar=("SOURCE", "TARGET"))
    options = parser.parse_args()
    if options.worker:
        run_worker(*options.worker, options.windows, options.length)
        return
    peaks = []
    for depth in (int(value) for value in options.depths.split(",")):
        found = measure(depth, options.windows, options.length)
        parts, peak, base = dict(found["parts"]), int(str(found["peak"])), int(str(found["base"]))  # type: ignore[call-overload]
        bound = 2.2 * sum(parts.values()) + base
        peaks.append(peak)
        sizes = ", ".join(f"{key} {value / MIB:.0f}" for key, value in parts.items())
        stages = ", ".join(f"{key} {value / MIB:.0f}" for key, value in dict(found["stages"]).items())  # type: ignore[call-overload]
        print(
            f"{depth:3d} layers: peak {peak / MIB:.0f} MiB, bound {bound / MIB:.0f} MiB "
            f"(2.2 x ({sizes}) + base {base / MIB:.0f}); after each stage: {stages}",
            flush=True,
        )
    print(f"deepest against shallowest: {peaks[-1] / peaks[0]:.3f} (target 0.9 .. 1.1)")


if __name__ == "__main__":
    main()
