"""Peak memory of exporting: one layer's float32 weights + 0.5 GB, whatever the depth, the vocabulary and the format.

    python benchmarks/export_memory.py [--layers 4] [--vocab 32000] [--hidden 1024] [--ffn 2816] [--tied]

Each export of a synthetic llama is a fresh process. What counts is its own allocations (RssAnon, sampled all the
time) above those of the interpreter after its imports; pages of mapped files are the system's to take back. `gptq`
learns from 64 x 256 tokens: beside a layer it holds Gram matrices of the widest projection (float64).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

MIB = 2**20
ROOM = 500e6
FORMATS = ("fp32", "int8 nearest", "int4 nearest", "int4 gptq")


def own_bytes() -> int:
    """Return this process's own resident memory (RssAnon), in bytes."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


class Sampler(threading.Thread):
    """Looks at the own memory every other millisecond."""

    def __init__(self) -> None:
        """Start with what there is."""
        super().__init__(daemon=True)
        self.peak, self.stopped = own_bytes(), threading.Event()

    def run(self) -> None:
        """Look until stopped."""
        while not self.stopped.wait(0.002):
            self.peak = max(self.peak, own_bytes())

    def finish(self) -> int:
        """Stop and return the peak."""
        self.stopped.set()
        self.join()
        return self.peak


def run_worker(source: str, target: str, name: str) -> None:
    """Export in this process and print base, peak and one layer's bytes as JSON."""
    import torch  # noqa: PLC0415

    from backends.export_onnx import GraphForm, export_onnx  # noqa: PLC0415
    from compress.checkpoint import open_checkpoint  # noqa: PLC0415
    from compress.quantize.stream import LayerQuantiser, WeightForm  # noqa: PLC0415
    from compress.text import Windows  # noqa: PLC0415
    from compress.weights import read_spec  # noqa: PLC0415

    torch.set_grad_enabled(False)
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # what libraries allocate when first used
    checkpoint = open_checkpoint(source)
    spec, sampler = read_spec(checkpoint), Sampler()
    base = sampler.peak
    sampler.start()
    kind, _, method = name.partition(" ")
    quantiser = None
    if method:
        ids = torch.randint(spec.shape.vocab, (64, 256), generator=torch.Generator().manual_seed(1))
        form = WeightForm(int(kind[-1]), 32, symmetric=True, method=method)
        quantiser = LayerQuantiser(checkpoint, spec, form, Windows(ids, "random ids") if method == "gptq" else None)
    export_onnx(checkpoint, Path(target), form=GraphForm(quantiser=quantiser))
    layer = 4 * max(one.parameters(spec.shape.hidden) for one in spec.shape.layers)
    print(json.dumps({"base": base, "peak": sampler.finish(), "layer": layer}))


def write_model(folder: Path, options: argparse.Namespace) -> None:
    """Write the synthetic model of `synthetic.py` in other sizes."""
    import torch  # noqa: PLC0415
    from synthetic import make_config  # noqa: PLC0415

    from compress.checkpoint_writer import CheckpointWriter  # noqa: PLC0415
    from compress.spec import expected_tensors, resolve_model  # noqa: PLC0415

    config = {
        **make_config(options.layers), "vocab_size": options.vocab, "hidden_size": options.hidden,
        "intermediate_size": options.ffn, "num_attention_heads": options.hidden // 64,
        "num_key_value_heads": max(options.hidden // 128, 1), "tie_word_embeddings": options.tied,
    }  # fmt: skip
    random = torch.Generator().manual_seed(0)
    with CheckpointWriter(folder, config) as writer:
        for name, shape in expected_tensors(resolve_model(config, None)).items():
            centre, spread = (0.0, 0.02) if len(shape) > 1 else (1.0, 0.1)
            values = torch.empty(shape, dtype=torch.bfloat16).normal_(centre, spread, generator=random)
            writer.add(name, values)
        writer.finish()


def measure(source: Path, target: Path, name: str) -> dict[str, Any]:
    """Export in a fresh process."""
    command = [sys.executable, __file__, "--worker", str(source), str(target), name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print a line for each format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 4), ("vocab", 32000), ("hidden", 1024), ("ffn", 2816)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--worker", nargs=3, metavar=("SOURCE", "TARGET", "FORMAT"))
    options = parser.parse_args()
    if options.worker:
        run_worker(*options.worker)
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "dense"
        write_model(source, options)
        print("| format | own memory above the interpreter's, MiB | bound (layer + 0.5 GB) | share |")
        print("|---|---|---|---|")
        for name in FORMATS:
            found = measure(source, Path(folder) / name.replace(" ", "-"), name)
            used, bound = found["peak"] - found["base"], found["layer"] + ROOM
            print(f"| {name} | {used / MIB:.0f} | {bound / MIB:.0f} | {used / bound:.2f} |", flush=True)


if __name__ == "__main__":
    main()
