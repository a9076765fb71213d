"""One runtime and one folder in a fresh process of its own: what cpu_peers.py and cpu_pruned.py start.

    python benchmarks/peer_runs.py ENGINE FOLDER [--threads 2] [--hint HINT] [--check FILE.npy]

ENGINE: ours, genai, llama, openvino, openvino-genai, or bandwidth (no folder). Prints one line of JSON: seconds from
before the runtime's import until the model is open, tokens/s of a prefill of 512 tokens, tokens/s of 64 steps after a
prompt of 64 (medians of repeats after one to warm up), and the peak of resident memory. With --check: the logits after
a fixed prompt, or the greedy tokens of a runtime that shows no logits. Runs in the peers' environment, which has none
of this project's needs: everything is imported where it is used.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PREFILL, PROMPT, NEW = 512, 64, 64
REPEATS = 3
PROBE = 24  # tokens of the prompt whose logits are compared
GREEDY = 8  # tokens compared where a runtime shows no logits
SMALL_VOCAB = 500  # ids below it are in the vocabulary of every model here
READ = 2**30  # bytes

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Engine:
    """An open model: seconds of a prefill, seconds of so many steps after a prompt, logits or greedy tokens after one.

    Where a runtime lets a cache be made beforehand, it is made before the clock starts.
    """

    prefill: Callable[[Ids], float]
    decode: Callable[[Ids, int], float]
    probe: Callable[[Ids], NDArray[Any]]


def probe_ids() -> Ids:
    """Return the prompt `[PROBE]` of the comparison."""
    return np.random.default_rng(7).integers(3, SMALL_VOCAB, PROBE)


def clock(call: Callable[[], Any]) -> float:
    """Return the seconds of a call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def open_ours(folder: Path, threads: int, hint: str) -> Engine:
    """Open our ONNX folder with this project's own loop on ONNX Runtime."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from backends.ort import open_onnx

    model = open_onnx(folder, threads)

    def decode(ids: Ids, new: int) -> float:
        logits, cache = model.prefill(ids[None], every=False)
        started = time.perf_counter()
        for _ in range(new):
            logits, cache = model.decode(np.array([[int(logits[0, -1].argmax())]]), cache)
        return time.perf_counter() - started

    return Engine(
        lambda ids: clock(lambda: model.prefill(ids[None], every=False)),
        decode,
        lambda ids: model.prefill(ids[None], every=False)[0][0, -1],
    )


def open_genai(folder: Path, threads: int, hint: str) -> Engine:
    """Open an ONNX folder, ours or its builder's, in onnxruntime-genai."""
    import onnxruntime_genai as og

    config = og.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)

    def start(length: int, new: int) -> Any:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=length + new + 8, min_length=length + new + 4, do_sample=False)
        return og.Generator(model, parameters)

    def prefill(ids: Ids) -> float:
        one = start(len(ids), 0)
        return clock(lambda: one.append_tokens(ids[None].astype(np.int32)))

    def decode(ids: Ids, new: int) -> float:
        one = start(len(ids), new)
        one.append_tokens(ids[None].astype(np.int32))
        one.generate_next_token()  # takes the prompt's logits: it runs no step
        return clock(lambda: [one.generate_next_token() for _ in range(new)])

    def probe(ids: Ids) -> NDArray[Any]:
        one = start(len(ids), 0)
        one.append_tokens(ids[None].astype(np.int32))
        logits: NDArray[Any] = np.asarray(one.get_output("logits"))[0, -1]
        return logits

    return Engine(prefill, decode, probe)


def open_llama(folder: Path, threads: int, hint: str) -> Engine:
    """Open a GGUF file by llama.cpp's C interface; its cache is float16, as it is unless asked."""
    import llama_cpp as ll

    ll.llama_backend_init()
    model = ll.llama_model_load_from_file(str(folder / "model.gguf").encode(), ll.llama_model_default_params())
    settings = ll.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = 1024, PREFILL, PREFILL
    settings.n_threads = settings.n_threads_batch = threads
    context = ll.llama_init_from_model(model, settings)
    if not context:
        raise RuntimeError("llama.cpp does not open the file")
    vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))
    memory = ll.llama_get_memory(context)

    def run(ids: Ids) -> NDArray[Any]:
        tokens = (ll.llama_token * len(ids))(*ids.tolist())
        if ll.llama_decode(context, ll.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama_decode failed")
        found = ll.llama_get_logits_ith(context, -1)
        return np.ctypeslib.as_array(found, (vocab,))

    def prefill(ids: Ids) -> NDArray[Any]:
        ll.llama_memory_clear(memory, True)
        return run(ids)

    def decode(ids: Ids, new: int) -> float:
        logits = prefill(ids)
        started = time.perf_counter()
        for _ in range(new):
            logits = run(logits.argmax(0, keepdims=True))
        return time.perf_counter() - started

    return Engine(lambda ids: clock(lambda: prefill(ids)), decode, lambda ids: prefill(ids).copy())


def find_properties(threads: int, hint: str) -> dict[str, Any]:
    """Return OpenVINO's settings: threads, and the precision that it computes in (`default`: its own choice)."""
    given: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads}
    return given if hint == "default" else {**given, "INFERENCE_PRECISION_HINT": hint}


def open_openvino(folder: Path, threads: int, hint: str) -> Engine:
    """Open an IR in OpenVINO's plain runtime, its cache as state inside the request."""
    import openvino

    core = openvino.Core()
    given = {"PERFORMANCE_HINT": "LATENCY", **find_properties(threads, hint)}
    request = core.compile_model(str(folder / "openvino_model.xml"), "CPU", given).create_infer_request()
    names = {name for port in request.model_inputs for name in port.names}

    def run(ids: Ids, past: int) -> NDArray[Any]:
        total = past + len(ids)
        feeds = {
            "input_ids": ids[None],
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(past, total)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        request.infer({name: value for name, value in feeds.items() if name in names})
        logits: NDArray[Any] = np.asarray(request.get_tensor("logits").data)[0, -1]
        return logits

    def prefill(ids: Ids) -> NDArray[Any]:
        request.reset_state()
        return run(ids, 0)

    def decode(ids: Ids, new: int) -> float:
        logits = prefill(ids)
        started = time.perf_counter()
        for place in range(new):
            logits = run(logits.argmax(0, keepdims=True), len(ids) + place)
        return time.perf_counter() - started

    return Engine(lambda ids: clock(lambda: prefill(ids)), decode, lambda ids: prefill(ids).copy())


def open_openvino_genai(folder: Path, threads: int, hint: str) -> Engine:
    """Open an IR in OpenVINO GenAI's pipeline: its own loop, its own clock for the first token and for those after."""
    import openvino
    import openvino_genai as ovg

    pipeline = ovg.LLMPipeline(str(folder), "CPU", **find_properties(threads, hint))

    def generate(ids: Ids, new: int) -> Any:
        wanted = ovg.GenerationConfig(max_new_tokens=new, min_new_tokens=new, ignore_eos=True, do_sample=False)
        wanted.apply_chat_template = False
        given = ovg.TokenizedInputs(openvino.Tensor(ids[None]), openvino.Tensor(np.ones((1, len(ids)), np.int64)))
        return pipeline.generate(given, wanted)

    def first(found: Any) -> float:
        return float(found.perf_metrics.get_ttft().mean) / 1e3

    def decode(ids: Ids, new: int) -> float:
        found = generate(ids, new + 1)
        return float(found.perf_metrics.get_generate_duration().mean) / 1e3 - first(found)

    return Engine(
        lambda ids: first(generate(ids, 1)), decode, lambda ids: np.array(generate(ids, GREEDY).tokens[0], np.int64)
    )


ENGINES: dict[str, Callable[[Path, int, str], Engine]] = {
    "ours": open_ours,
    "genai": open_genai,
    "llama": open_llama,
    "openvino": open_openvino,
    "openvino-genai": open_openvino_genai,
}


def read_peak() -> float:
    """Return the peak of resident memory in MB: all pages this process had mapped in, weights from files included.

    From the kernel's own count, as getrusage's also holds that of the parent before exec.
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError("no VmHWM in /proc/self/status")


def measure_engine(engine: Engine, loaded: float) -> dict[str, float]:
    """Return the row of one process; every repeat has a prompt of its own, as some runtimes remember prompts."""
    prompts = np.random.default_rng(0).integers(3, SMALL_VOCAB, (2, REPEATS + 1, PREFILL))
    prefills = [engine.prefill(ids) for ids in prompts[0]][1:]
    decodes = [engine.decode(ids[:PROMPT], NEW) for ids in prompts[1]][1:]
    return {
        "load_s": loaded,
        "prefill": PREFILL / statistics.median(prefills),
        "decode": NEW / statistics.median(decodes),
        "rss_mb": read_peak(),
    }


def measure_bandwidth(threads: int) -> dict[str, float]:
    """Return the GB/s of reading 1 GiB, that of the fastest of three ways."""
    import torch

    torch.set_num_threads(threads)
    values = torch.ones(READ // 4)
    parts = np.array_split(values.numpy(), threads)
    with ThreadPoolExecutor(threads) as pool:
        ways: tuple[Callable[[], Any], ...] = (
            values.sum,
            values.max,
            lambda: list(pool.map(np.max, parts)),
        )
        best = min(clock(way) for _ in range(5) for way in ways)
    return {"gb_per_s": READ / best / 1e9}


def main() -> None:
    """Measure or check one folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=(*ENGINES, "bandwidth"))
    parser.add_argument("folder", type=Path, nargs="?", default=Path())
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--hint", default="default")
    parser.add_argument("--check", type=Path)
    options = parser.parse_args()
    if options.engine == "bandwidth":
        print(json.dumps(measure_bandwidth(options.threads)))
        return
    started = time.perf_counter()
    engine = ENGINES[options.engine](options.folder, options.threads, options.hint)
    loaded = time.perf_counter() - started
    if options.check:
        np.save(options.check, engine.probe(probe_ids()))
        print("{}")
    else:
        print(json.dumps(measure_engine(engine, loaded)))


if __name__ == "__main__":
    main()
