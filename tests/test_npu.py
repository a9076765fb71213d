"""The decoder on NPU kernels equals the plain decoder, on emulated operators: no NPU was there to run the real ones."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import npu_emulation
import numpy as np
import pytest
import torch
from npu_emulation import CALLS, register, stand_in, write_package
from refusals import refused
from tiny import CASES, FAMILIES, LONGROPE, make_checkpoint

from backends import npu
from backends.eager import (
    NPU,
    EagerModel,
    Place,
    compare_placed,
    load_eager,
    load_placed,
    measure_placed,
    open_place,
)
from backends.npu import FUSED, NORM, PROMPT, ROTARY, STEP, Case, Probe
from cli import device
from cli.console import Console, RunFailure
from cli.options import read_recipe
from cli.quality import evaluate_folders
from cli.request import BenchPlan, BenchSize
from compress.checkpoint import open_checkpoint
from compress.decoder import Kernels, mix_values, rms_norm, rotate_heads
from compress.evaluate import compare_quality, measure_quality
from compress.report import make_plain
from compress.rope import RopeSpec, compute_tables
from compress.text import Windows
from compress.weights import read_spec

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
# Sums in another order, and softmax and norms in float32 at least: the bounds of the issue.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
LENGTH, PREFILL = 28, 24
IDS = torch.randint(3, 96, (2, LENGTH), generator=torch.Generator().manual_seed(5)).numpy()
UNEVEN = {
    "1": {"intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2},
    "2": {"intermediate_size": 40, "num_attention_heads": 3, "num_key_value_heads": 3},
    "3": {"num_attention_heads": 2, "num_key_value_heads": 1},
}


@pytest.fixture(autouse=True)
def fresh_counts():
    CALLS.clear()


def make_big(folder: Path, case: str, size: int = 32, **changes: object) -> Path:
    """A tiny model whose heads are large enough for the operators; its cache stays on one side of longrope's switch."""
    if case == "phi3-longrope":
        factors = {"short_factor": [1 + 0.1 * step for step in range(size // 2)], "long_factor": [4.0] * (size // 2)}
        changes |= {"rope_scaling": LONGROPE | factors, "original_max_position_embeddings": 64}
    return make_checkpoint(folder / f"{case}-{size}", case, head_dim=size, **changes)


def on_kernels(folder: Path, dtype: torch.dtype, older: bool = False) -> EagerModel:
    """Load a model onto all emulated operators that the documented limits allow; `older`: without the fused one."""
    checkpoint = open_checkpoint(folder)
    spec = read_spec(checkpoint)
    cases = npu.list_cases([spec])
    if older:
        fused = [case for case in cases if case.op == FUSED]
        cases = [case for case in cases if case.op != FUSED]
        cases += [other for case in fused for other in npu.list_substitutes(case)]
    works = [case for case in cases if not npu.explain_limit(case)]
    return load_placed(checkpoint, spec, Place(CPU, dtype, npu.make_kernels(register(), works, CPU)))


def run_whole(model: EagerModel) -> np.ndarray:
    return model.prefill(IDS)[0]


def run_steps(model: EagerModel) -> np.ndarray:
    """Prefill, then two tokens at once, then one by one."""
    logits, cache = model.prefill(IDS[:, :PREFILL])
    parts = [logits]
    cuts = [PREFILL, PREFILL + 2, *range(PREFILL + 3, LENGTH + 1)]
    for start, stop in itertools.pairwise(cuts):
        logits, cache = model.decode(IDS[:, start:stop], cache)
        parts.append(logits)
    return np.concatenate(parts, 1)


def assert_same(ours: EagerModel, plain: EagerModel) -> None:
    for run in (run_whole, run_steps):
        expected = run(plain)
        error = np.abs(run(ours) - expected).max() / max(1.0, np.abs(expected).max())
        assert error <= TOLERANCE[plain.place.dtype]


def expected_calls(model: EagerModel, older: bool) -> set[str]:
    """Return the operators that a model of large heads must have met, said apart from the code under test."""
    attention = {PROMPT, STEP} if older else {FUSED}
    rotating = any(layer.rope is not None and not layer.rope.variant.endswith(("yarn", "longrope"))
                   for layer in model.spec.layers)  # fmt: skip
    return {NORM} | ({ROTARY} if rotating else set()) | (set() if model.spec.attention_softcap else attention)


@pytest.mark.parametrize("older", [False, True], ids=["fused", "older"])
@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_plain_decoder(case: str, older: bool, tmp_path: Path) -> None:
    folder = make_big(tmp_path, case)
    ours = on_kernels(folder, torch.float64, older)
    assert_same(ours, load_eager(open_checkpoint(folder), torch.float64))
    assert set(CALLS) == expected_calls(ours, older)


@pytest.mark.parametrize("case", FAMILIES)
def test_kernels_equal_plain_decoder_in_float32(case: str, tmp_path: Path) -> None:
    folder = make_big(tmp_path, case)
    assert_same(on_kernels(folder, torch.float32), load_eager(open_checkpoint(folder)))


@pytest.mark.parametrize("case", ["llama", "mistral", "phi3-longrope", "gemma2", "olmo2", "smollm3-window"])
def test_small_heads_stay_plain(case: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / case, case, head_dim=8)
    ours = on_kernels(folder, torch.float64)
    whole = run_whole(load_eager(open_checkpoint(folder), torch.float64))
    assert np.abs(run_whole(ours) - whole).max() <= TOLERANCE[torch.float64] * max(1.0, np.abs(whole).max())
    assert set(CALLS) == {NORM}


@pytest.mark.parametrize("older", [False, True], ids=["fused", "older"])
@pytest.mark.parametrize("case", ["llama-biases", "qwen3", "olmo2", "gemma3_text"])
def test_uneven_layers(case: str, older: bool, tmp_path: Path) -> None:
    folder = make_big(tmp_path, case, 32, per_layer_config=UNEVEN)
    assert_same(on_kernels(folder, torch.float64, older), load_eager(open_checkpoint(folder), torch.float64))
    assert set(CALLS) > {NORM, ROTARY}


@pytest.mark.parametrize("case", ["gemma3_text", "glm4", "pangu_sandwich"])
def test_absorbed_norms(case: str, tmp_path: Path) -> None:
    """A layer without the norms behind its branches: the kernels must not bring them back."""
    folder = make_big(tmp_path, case)
    models = [on_kernels(folder, torch.float64), load_eager(open_checkpoint(folder), torch.float64)]
    gone = ("attn_out", "mlp_out")
    bare = [
        replace(model, layers=tuple({k: v for k, v in layer.items() if k not in gone} for layer in model.layers))
        for model in models
    ]
    assert_same(*bare)
    assert not np.allclose(run_whole(bare[0]), run_whole(models[0]))


def test_prompts_beyond_the_reach_of_an_operator_are_plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = make_big(tmp_path, "llama")
    monkeypatch.setattr(npu, "REACH", {FUSED: (2, 26), PROMPT: (2, 26), STEP: (2, 26)})
    assert_same(on_kernels(folder, torch.float64), load_eager(open_checkpoint(folder), torch.float64))
    # The whole prompt of 28 is plain; 24 and 26 keys are not, in four layers each, and then two tokens that are.
    assert CALLS[FUSED] == 2 * 4


def test_half_precision_norm_squares_in_float32() -> None:
    x = torch.full((1, 4, 16), 1000.0, dtype=torch.float16)
    assert torch.allclose(rms_norm(x, torch.ones(16, dtype=torch.float16), 1e-6, 0.0).float(), torch.ones(1, 4, 16))


# Probing


def ask(ops: object, cases: list[Case], dtype: str | None, **given: object) -> list[dict[str, object]]:
    """Answer in this process, on the CPU."""
    lines: list[dict[str, object]] = []
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "npu", stand_in(**given), raising=False)
        question = {"dtype": dtype, "cases": [vars(case) for case in cases]}
        npu.answer_question(ops, question, CPU, lines.append)
    return lines


ALL_CASES = [
    Case(NORM, 48),
    Case(ROTARY, 32, 6),
    Case(ROTARY, 32, 6, interleaved=True),
    Case(FUSED, 32, 6, 3),
    Case(FUSED, 32, 6, 2, narrow=True),
    Case(PROMPT, 32, 6, 3),
    Case(PROMPT, 32, 6, 3, narrow=True),
    Case(STEP, 32, 6, 3),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_right_operators_pass_the_probe(dtype: str) -> None:
    head, *answers = ask(register(), ALL_CASES, None, bf16=dtype == "bfloat16", chip="Ascend310P3")
    assert head == {"chip": "Ascend310P3", "free": 2**34, "dtype": dtype}
    assert answers == [{"reason": ""}] * len(ALL_CASES)


def plant(name: str, wrong):
    """Operators of which one is wrong."""
    ops = register()
    names = [schema.split("(")[0] for schema in npu_emulation.SCHEMAS]
    return types.SimpleNamespace(**{other: getattr(ops, other) for other in names} | {name: wrong})


def inverted(query, key, value, **given):
    """The polarity of one example in the documents: 1 is seen, where the mask is a whole one."""
    mask = given.get("atten_mask")
    if mask is not None and mask.shape[0] == 1:
        scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * given["scale"]
        scores = scores.masked_fill(~mask, -1e4).softmax(-1)
        return (scores @ value.repeat_interleave(query.shape[1] // key.shape[1], 1), None)
    return register().npu_fused_infer_attention_score(query, key, value, **given)


def left_up(query, key, value, **given):
    """Causal from the top left: right for a first prompt, wrong behind a cache."""
    length, total = query.shape[2], key.shape[2]
    if given.get("sparse_mode") != 3:
        return register().npu_fused_infer_attention_score(query, key, value, **given)
    hidden = torch.arange(total)[None] > torch.arange(length)[:, None]
    return npu_emulation.mix(query, key, value, given["scale"], hidden), None


FAULTS = {
    "epsilon": (Case(NORM, 48), lambda x, gamma, eps: register().npu_rms_norm(x, gamma, 1e-6)),
    "square": (
        Case(NORM, 48),
        lambda x, gamma, eps: ((x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * gamma).to(x.dtype), None),
    ),
    "weight": (Case(NORM, 48), lambda x, gamma, eps: register().npu_rms_norm(x, torch.ones_like(gamma), eps)),
    "pairing": (
        Case(ROTARY, 32, 6, interleaved=True),
        lambda x, cos, sin, mode: register().npu_rotary_mul(x, cos, sin, "half"),
    ),
    "sign": (Case(ROTARY, 32, 6), lambda x, cos, sin, mode: register().npu_rotary_mul(x, cos, -sin, mode)),
    "mask": (Case(FUSED, 32, 6, 2, narrow=True), inverted),
    "corner": (Case(FUSED, 32, 6, 3), left_up),
    "groups": (
        Case(STEP, 32, 6, 3),
        lambda q, k, v, **given: register().npu_incre_flash_attention(q, k.flip(1), v.flip(1), **given),
    ),
    "band": (
        Case(PROMPT, 32, 6, 3),
        lambda q, k, v, **given: register().npu_prompt_flash_attention(q, k, v, **given | {"next_tokens": 0}),
    ),
    "nan": (Case(STEP, 32, 6, 3), lambda q, k, v, **given: torch.full_like(q, float("nan"))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_probe_finds_a_wrong_operator(fault: str) -> None:
    case, wrong = FAULTS[fault]
    answers = ask(plant(case.op, wrong), [case], "float16")[1:]
    assert "differs from plain torch" in answers[0]["reason"]
    assert ask(register(), [case], "float16")[1:] == [{"reason": ""}]


@pytest.mark.parametrize(
    ("case", "word"),
    [
        (Case(NORM, 8), "32 bytes"),
        (Case(ROTARY, 24, 4), "multiple of 16"),
        (Case(ROTARY, 32, 4, scaled=True), "[-1, 1]"),
        (Case(ROTARY, 896, 4), "too many"),
        (Case(FUSED, 40, 4, 4), "multiple of 16"),
        (Case(FUSED, 528, 4, 4), "too many"),
        (Case(FUSED, 64, 65, 1), "too many"),
        (Case(STEP, 64, 264, 66), "too many"),
        (Case(FUSED, 512, 64, 1), ""),
        (Case(ROTARY, 128, 64), ""),
    ],
)
def test_documented_limits(case: Case, word: str) -> None:
    reason = npu.explain_limit(case)
    assert bool(reason) == bool(word)
    assert word in reason


def test_notes_name_every_outcome(tmp_path: Path) -> None:
    spec = read_spec(open_checkpoint(make_big(tmp_path, "llama-yarn")))
    reasons = {case: npu.explain_limit(case) for case in npu.list_cases([spec])}
    notes = npu.describe_kernels([spec], Probe("chip", 0, torch.float16, reasons))
    assert notes == (
        "npu_rms_norm (48): used.",
        "npu_rotary_mul (3x32, 6x32): not used, its tables leave [-1, 1].",
        "npu_fused_infer_attention_score (6/3x32): used up to 262144 keys and a batch of 65536.",
    )
    capped = read_spec(open_checkpoint(make_big(tmp_path, "gemma2")))
    assert FUSED not in {case.op for case in npu.list_cases([capped])}
    assert "soft-caps" in npu.describe_kernels([capped], Probe("chip", 0, torch.float16, {}))[-1]


# Fresh processes


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Return a function that puts a package named torch_npu where this process and fresh ones find it."""

    def put(**given):
        folder = write_package(tmp_path / "packages", **given)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.setenv("PYTHONPATH", str(folder))
        monkeypatch.setenv("OMP_NUM_THREADS", "1")

    return put


def test_a_hanging_operator_is_given_up(package, monkeypatch: pytest.MonkeyPatch) -> None:
    package(more="import time\ntime.sleep(60)")
    monkeypatch.setattr(npu, "PATIENCE_S", 0.2)
    refused(lambda: npu.probe_npu([]), "--device npu", "no answer")


def test_a_missing_library_is_said_in_one_sentence(package) -> None:
    package(more="raise ImportError('libhccl.so: cannot open shared object file: No such file or directory')")
    words = ("libhccl.so", "CANN", "set_env.sh", "--device cpu")
    refused(lambda: npu.probe_npu([Case(NORM, 48)]), "--device npu", *words)


def test_a_machine_without_a_visible_npu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ask(register(), ALL_CASES, None, present=False)
    assert lines == [{"chip": None}]
    ran = subprocess.CompletedProcess([], 0, f"a library's greeting\n{npu.ANSWER}{json.dumps(lines[0])}\n", "")
    monkeypatch.setattr(npu.subprocess, "run", lambda *given, **named: ran)
    monkeypatch.setattr(npu, "find_spec", lambda name: object())
    refused(lambda: npu.probe_npu(ALL_CASES), "--device npu", "no NPU is visible", "npu-smi", "--device cpu")


def test_a_wrong_version_is_said() -> None:
    trace = "Traceback (most recent call last):\n  File x\nRuntimeError: ERR00007 two accelerators\n[ERROR] 2026\n"
    message = npu.explain_missing(npu.read_reason(trace, 1))
    assert "ERR00007 two accelerators)" in message
    assert torch.__version__ in message
    assert npu.read_reason("", -11) == "its process was ended by signal 11"
    assert npu.read_reason("", 3) == "it ended without a word"


def test_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npu, "find_spec", lambda name: None)
    refused(lambda: npu.probe_npu([]), "torch-npu", "not installed", "pip install", "--device cpu")


WHOLE = """
import json, sys, torch
from backends.eager import compare_placed, load_placed, open_place, read_peak_memory
from compress.checkpoint import open_checkpoint
from compress.text import Windows
from compress.weights import read_spec
import npu_emulation
checkpoint = open_checkpoint(sys.argv[1]); spec = read_spec(checkpoint)
ids = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))
place, plain = open_place("npu", [spec, spec]), open_place("cpu", [spec])
models = [load_placed(checkpoint, spec, where) for where in (plain, place)]
dense, other = compare_placed(*models, Windows(ids, "made"))
print(json.dumps({"name": place.name, "dtype": str(place.dtype), "notes": place.notes, "calls": npu_emulation.CALLS,
    "peak": read_peak_memory(place), "dense": dense.perplexity, "other": other.perplexity,
    "divergence": other.divergence}))
"""


FAILING = """
npu_rms_norm = lambda *given: os.kill(os.getpid(), 9)
def npu_incre_flash_attention(*given, **named): raise RuntimeError("EZ9999: no such kernel")
"""


def test_a_model_runs_from_probe_to_perplexity(tmp_path: Path) -> None:
    """All of it in a process with a package named torch_npu; three operators fail, each in a process of its own."""
    folder = make_big(tmp_path, "llama")
    packages = write_package(tmp_path / "packages", FAILING, [FUSED], bf16=False, chip="Ascend310P3")
    paths = os.pathsep.join(map(str, (packages, ROOT, ROOT / "tests")))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    environment.pop("TORCH_DEVICE_BACKEND_AUTOLOAD")
    command = [sys.executable, "-W", "error", "-c", WHOLE, str(folder)]
    ran = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert (found["name"], found["dtype"], found["peak"]) == ("Ascend310P3", "torch.float16", 12345)
    assert found["notes"] == [
        "npu_rms_norm (48): not used, its process was ended by signal 9.",
        "npu_rotary_mul (3x32, 6x32): used.",
        f"{FUSED} (6/3x32): not used, AttributeError: module 'torch_npu' has no attribute '{FUSED}'.",
        "npu_prompt_flash_attention (6/3x32): used up to 65535 keys and a batch of 128.",
        "npu_incre_flash_attention (6/3x32): not used, RuntimeError: EZ9999: no such kernel.",
    ]
    assert set(found["calls"]) == {ROTARY, PROMPT, "synchronize"}
    assert found["calls"]["synchronize"] == 2
    assert abs(found["other"] / found["dense"] - 1) < 0.01
    assert 0 <= found["divergence"] < 0.01


# Quality and refusals


def test_placed_quality_equals_streamed_quality(tmp_path: Path) -> None:
    checkpoints = [open_checkpoint(make_checkpoint(tmp_path / case, case)) for case in ("llama", "qwen2")]
    pairs = [(checkpoint, read_spec(checkpoint)) for checkpoint in checkpoints]
    windows = Windows(torch.from_numpy(IDS), "made")
    models = [load_eager(checkpoint) for checkpoint in checkpoints]
    streamed, placed = compare_quality(*pairs, windows), compare_placed(*models, windows)
    for one, other in zip(streamed, placed, strict=True):
        assert other.tokens == one.tokens
        assert other.perplexity == pytest.approx(one.perplexity, rel=1e-5)
    assert placed[1].agreement == streamed[1].agreement
    assert placed[1].divergence == pytest.approx(streamed[1].divergence, rel=1e-5)
    assert measure_placed(models[0], windows).perplexity == pytest.approx(
        measure_quality(*pairs[0], windows).perplexity, rel=1e-5
    )


def test_unknown_device_is_refused() -> None:
    refused(lambda: open_place("gpu", []), "gpu", "cpu, npu")


def test_too_little_memory_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = read_spec(open_checkpoint(make_checkpoint(tmp_path / "llama", "llama")))
    bytes_needed = spec.shape.parameters * 2
    found = npu.Npu(CPU, "Ascend310B4", torch.float16, bytes_needed, Kernels(), ())
    monkeypatch.setattr(npu, "open_npu", lambda specs, dtype: found)
    refused(lambda: open_place(NPU, [spec]), "Ascend310B4", "GiB", "--device cpu")
    monkeypatch.setattr(npu, "open_npu", lambda specs, dtype: replace(found, free=2 * bytes_needed))
    assert open_place(NPU, [spec]).dtype == torch.float16
    refused(lambda: open_place(NPU, [spec, spec]), "Ascend310B4")


def test_weights_beyond_float16_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_checkpoint(tmp_path / "llama", "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = 7e4
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(folder)
    refused(lambda: load_eager(checkpoint, torch.float16), "down", "layer 1", "65504", "bfloat16")
    assert load_eager(checkpoint, torch.bfloat16).place.dtype == torch.bfloat16


def test_values_beyond_the_range_are_refused(tmp_path: Path) -> None:
    model = load_eager(open_checkpoint(make_checkpoint(tmp_path / "llama", "llama")))
    broken = replace(model, embedding=model.embedding * float("inf"))
    refused(lambda: measure_placed(broken, Windows(torch.from_numpy(IDS), "made")), "float32", "range")


# A machine with torch-npu and without CANN

VERBS = (["--help"], ["export", "MODEL", "-o", "OUT"])


@pytest.fixture
def broken_backend(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine whose torch cannot be imported with auto-load on."""
    folder = tmp_path / "broken"
    (folder / "broken_npu-1.0.dist-info").mkdir(parents=True)
    (folder / "broken_npu-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: broken-npu\nVersion: 1.0\n"
    )
    (folder / "broken_npu-1.0.dist-info" / "entry_points.txt").write_text(
        "[torch.backends]\nbroken = broken_npu:load\n"
    )
    (folder / "broken_npu.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT))), "OMP_NUM_THREADS": "1"}
    environment.pop("TORCH_DEVICE_BACKEND_AUTOLOAD")
    return environment


def test_torch_itself_fails_with_the_broken_backend(broken_backend: dict[str, str]) -> None:
    """Else the next tests would prove nothing."""
    ran = subprocess.run(
        [sys.executable, "-c", "import torch"], env=broken_backend, capture_output=True, text=True, check=False
    )
    assert ran.returncode != 0
    assert "libhccl.so" in ran.stderr


@pytest.mark.parametrize("verb", VERBS, ids=lambda words: words[0])
def test_commands_work_beside_a_broken_backend(verb: list[str], broken_backend: dict[str, str], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "llama")
    words = [{"MODEL": str(folder), "OUT": str(tmp_path / "out")}.get(word, word) for word in verb]
    command = [sys.executable, "-m", "cli.app", *words]
    ran = subprocess.run(command, env=broken_backend, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_libraries_import_beside_a_broken_backend(broken_backend: dict[str, str]) -> None:
    commands = [[sys.executable, "-c", f"import {module}"] for module in ("compress.decoder", "backends.eager")]
    started = [subprocess.Popen(command, env=broken_backend, stderr=subprocess.PIPE, text=True) for command in commands]
    for process in started:
        _, errors = process.communicate()
        assert process.returncode == 0, errors


# The command line: all but the flag itself, on the CPU

DEMO = ROOT / "compress" / "demo" / "checkpoint"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("She took the brush and hurried to the beach. " * 20)
    return path


def test_evaluate_on_a_device_equals_streamed_evaluate(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = read_recipe(None, {"windows": 3, "length": 16})
    sources = (str(DEMO), str(DEMO))
    with Console(False, True) as console:
        found = device.evaluate_on("cpu", sources, (text, recipe), False, console)
        expected = make_plain(evaluate_folders(sources, text, recipe, console))
    for side, key in (("dense", "perplexity"), ("compressed", "perplexity"), ("compressed", "agreement")):
        assert found[side][key] == pytest.approx(expected[side][key], rel=1e-4)
    assert "48 tokens, on cpu in float32" in found["quality_note"]
    assert "perplexity" in capsys.readouterr().out
    with Console(False, True) as console:
        refused(lambda: device.evaluate_on(NPU, sources, (None, recipe), True, console), "perplexity only", "--text")


def test_bench_on_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    with Console(False, True) as console:
        found = device.bench_on("cpu", (str(DEMO), None), BenchPlan((8,), new=2, rounds=1), console)
    assert found["dense"] is None
    assert found["compressed"]["decode_tokens_per_s"] > 0
    assert "torch on cpu in float32, batch 1, 8 prompt and 2 new tokens" in found["speed_note"]
    assert "decode tokens/s" in capsys.readouterr().out
    assert device.read_size(NPU, BenchPlan()) == BenchSize()


@pytest.mark.parametrize("plan", [BenchPlan((8, 9)), BenchPlan(batches=(2,)), BenchPlan(threads=(1,))])
def test_bench_on_a_device_refuses_what_it_does_not_time(plan: BenchPlan) -> None:
    refused(lambda: device.read_size(NPU, plan), "--device npu", "--prompt", "--batch")


def test_a_full_device_is_one_sentence() -> None:
    with pytest.raises(RunFailure, match="out of memory on the device"), device.explain_memory():
        raise torch.OutOfMemoryError("NPU out of memory. Tried to allocate 2.00 GiB")


def test_other_vocabularies_are_refused(tmp_path: Path) -> None:
    folders = [make_checkpoint(tmp_path / str(size), "llama", vocab_size=size) for size in (96, 80)]
    pairs = [(checkpoint, read_spec(checkpoint)) for checkpoint in map(open_checkpoint, folders)]
    refused(lambda: device.check_vocabularies(pairs), "96 tokens", "80 tokens", "same vocabulary")


# The kernels one by one, against the plain functions


@pytest.mark.parametrize("window", [None, 1, 5, 12, 100])
@pytest.mark.parametrize(("length", "total"), [(12, 12), (4, 12), (1, 12), (1, 1)])
@pytest.mark.parametrize("op", [FUSED, PROMPT])
def test_attention_call(op: str, length: int, total: int, window: int | None) -> None:
    random = torch.Generator().manual_seed(length + total)
    query = torch.randn(2, length, 6, 16, generator=random, dtype=torch.float64).transpose(1, 2)
    key, value = (torch.randn(2, 2, total, 16, generator=random, dtype=torch.float64) for _ in range(2))
    narrow = window is not None
    works = [Case(op, 16, 6, 2, narrow=narrow), Case(STEP, 16, 6, 2)]
    calls = npu.make_kernels(register(), works[: 1 if op == FUSED else 2], CPU)
    found = calls.mix(query, key, value, 0.3, window)
    assert torch.allclose(found, mix_values(query, key, value, 0.3, window), atol=1e-13)
    assert CALLS == {op if op == FUSED or length > 1 else STEP: 1}


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize(("length", "total"), [(12, 12), (4, 12), (1, 12)])
def test_open_attention(length: int, total: int, window: int | None) -> None:
    query = torch.randn(2, 6, length, 8, dtype=torch.float64)
    key, value = (torch.randn(2, 2, total, 8, dtype=torch.float64) for _ in range(2))
    found = npu.make_kernels(register(), [], CPU).mix(query, key, value, 0.3, window)
    assert torch.allclose(found, mix_values(query, key, value, 0.3, window), atol=1e-13)
    assert not CALLS


def test_open_attention_of_large_products_in_float16() -> None:
    query = torch.full((1, 1, 3, 64), 60.0, dtype=torch.float16)
    assert torch.isfinite(npu.mix_openly(query, query, query, 0.125, None)).all()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("size", "dim"), [(16, 16), (48, 32)])
def test_rotary_call(interleaved: bool, size: int, dim: int) -> None:
    rope = RopeSpec(dim, 100.0, interleaved=interleaved)
    heads = torch.randn(2, 5, 3, size, dtype=torch.float64).transpose(1, 2)
    cos, sin = compute_tables(rope, torch.arange(7, 12)[None], torch.float64)
    calls = npu.make_kernels(register(), [npu.rotary_case(rope, 3)], CPU)
    assert torch.allclose(calls.rotate(heads, cos, sin, rope), rotate_heads(heads, cos, sin, rope), atol=1e-14)
    assert CALLS == {ROTARY: 1}
