"""Ascend NPUs through torch-npu: what is there, which fused kernels compute this model right, and their exact calls.

Without CANN, torch-npu fails at import and can leave the process unusable, and an operator that a chip does not have
can take the device down with it. So a fresh process (`python -m backends.npu`) imports torch-npu, runs every call that
the model will make on a few tokens and compares it with plain torch; a call that fails ends that process, and the next
one goes on behind it. Only calls that came out right are used; all others stay plain torch, and the notes say so.

Operator signatures: schemas registered by torch-npu 2.13.0. Limits: Ascend/op-plugin, docs/zh/custom_APIs/torch_npu.
None of this has run on an NPU: the tests run it on emulated operators with the same schemas.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from backends.verify import make_environment
from compress.decoder import HALVES, Kernels, causal_mask, mix_values, rms_norm, rotate_heads
from compress.errors import UserError
from compress.rope import RopeSpec, compute_scale, compute_tables
from compress.spec import LayerSpec, ModelSpec

__all__ = ["Case", "Npu", "NpuKernels", "list_cases", "open_npu", "read_peak_bytes", "synchronise"]

PACKAGE, DEVICE = "torch_npu", "npu"
NORM, ROTARY = "npu_rms_norm", "npu_rotary_mul"
FUSED, PROMPT, STEP = "npu_fused_infer_attention_score", "npu_prompt_flash_attention", "npu_incre_flash_attention"
UNLIMITED = 2147483647  # of pre_tokens and next_tokens: the mask alone decides
CAUSAL_MODE, CAUSAL_SIZE = 3, 2048  # sparse mode "right-down causal" takes a fixed triangle of this size
ALIGNED = 16  # 32 bytes of a 16-bit format
MAX_HEADS, MAX_GROUP, MAX_HEAD_SIZE, MAX_ROTATING = 256, 64, 512, 896
MAX_ROTARY_HEADS = 999  # batch times heads
# Batch and keys that an attention operator takes, on the chip that takes fewest; plain torch does what lies above.
REACH = {FUSED: (65536, 262144), PROMPT: (128, 65535), STEP: (256, 65536)}
# Largest error beside the largest value: a few roundings of the format. A wrong mask or pairing errs by the value.
TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 4e-2}
LENGTH, TOTAL, WINDOW = 32, 48, 17  # tokens, keys and window of a trial call
PATIENCE_S = 300.0
ANSWER = "probe: "
COMMAND = (sys.executable, "-P", "-m", "backends.npu")


@dataclass(frozen=True)
class Case:
    """One kind of call that a model makes: the operator and all that decides whether a chip can do it."""

    op: str
    size: int  # values that are normed, rotate, or make up a head
    heads: int = 1
    groups: int = 1  # key/value heads
    interleaved: bool = False
    scaled: bool = False  # rotary tables that leave [-1, 1]
    narrow: bool = False  # a sliding window


@dataclass(frozen=True)
class Probe:
    """What a fresh process found: the chip, its free bytes, the format used, and by case why it fails ("": works)."""

    chip: str
    free: int
    dtype: torch.dtype
    reasons: Mapping[Case, str] = field(hash=False)


@dataclass(frozen=True)
class Npu:
    """An NPU ready for a model: torch device, chip name, number format, free bytes, kernels, what they are in words."""

    device: torch.device
    chip: str
    dtype: torch.dtype
    free: int
    kernels: Kernels
    notes: tuple[str, ...]


@dataclass(frozen=True)
class NpuKernels:
    """The calls, on a module that holds the operators; each falls to plain torch where its case is not in `works`."""

    ops: Any
    works: Collection[Case]
    triangle: Tensor  # bool `[2048, 2048]`, True is masked

    def norm(self, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        """Do what `rms_norm` does; the operator wants the weight in the format of `x`."""
        if Case(NORM, x.shape[-1]) not in self.works:
            return rms_norm(x, weight, eps, offset)
        normed: Tensor = self.ops.npu_rms_norm(x, weight + offset if offset else weight, eps)[0]
        return normed

    def rotate(self, heads: Tensor, cos: Tensor, sin: Tensor, rope: RopeSpec) -> Tensor:
        """Do what `rotate_heads` does: layout BNSD, tables 11SD; values behind the rotating ones pass by."""
        fits = len(heads) * heads.shape[1] <= MAX_ROTARY_HEADS and len(cos) == 1
        if rotary_case(rope, heads.shape[1]) not in self.works or not fits:
            return rotate_heads(heads, cos, sin, rope)
        mode = "interleave" if rope.interleaved else "half"
        turned = self.ops.npu_rotary_mul(heads[..., : rope.dim].contiguous(), cos[:, None], sin[:, None], mode)
        return torch.cat((turned, heads[..., rope.dim :]), -1) if heads.shape[-1] > rope.dim else turned

    def mix(self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """Do what `mix_values` does; one new token needs no mask, once keys outside its window are left out."""
        step = query.shape[2] == 1
        if step and window is not None:
            key, value = key[:, :, -window:], value[:, :, -window:]
        for op in (FUSED, STEP if step else PROMPT):
            narrow = window is not None and op != STEP
            case = Case(op, query.shape[3], query.shape[1], key.shape[1], narrow=narrow)
            batch, keys = REACH[op]
            if case in self.works and len(query) <= batch and key.shape[2] <= keys:
                heads = (query.contiguous(), key.contiguous(), value.contiguous())
                return self.call_attention(op, heads, scale, window)
        return mix_openly(query, key, value, scale, window)

    def call_attention(self, op: str, heads: tuple[Tensor, Tensor, Tensor], scale: float, window: int | None) -> Tensor:
        """Call one of the three attention operators on contiguous query, key and value."""
        query, key, value = heads
        sizes: dict[str, Any] = {"num_heads": query.shape[1], "input_layout": "BNSD"}
        mixed: Tensor
        if op == STEP:
            grouped = {"num_key_value_heads": key.shape[1], "inner_precise": 0}
            mixed = self.ops.npu_incre_flash_attention(query, key, value, scale_value=scale, **grouped, **sizes)
        elif op == PROMPT:  # its form for the 310P knows neither groups of heads nor sparse modes
            key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], 1) for part in (key, value))
            sizes |= {"atten_mask": make_mask(query, key, window), "next_tokens": UNLIMITED}
            mixed = self.ops.npu_prompt_flash_attention(query, key, value, scale_value=scale, **sizes)
        else:
            sizes |= self.choose_mask(query, key, window) | {"num_key_value_heads": key.shape[1]}
            mixed = self.ops.npu_fused_infer_attention_score(query, key, value, scale=scale, **sizes)[0]
        return mixed

    def choose_mask(self, query: Tensor, key: Tensor, window: int | None) -> dict[str, Any]:
        """Return the mask of the fused operator: none for one token, the fixed triangle, or a whole mask."""
        if query.shape[2] == 1:
            return {}
        if window is None:
            return {"atten_mask": self.triangle, "sparse_mode": CAUSAL_MODE}
        return {"atten_mask": make_mask(query, key, window)}


def make_mask(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Return bool `[1, 1, queries, keys]`, True where a query may not look."""
    return ~causal_mask(query.shape[2], key.shape[2], window, query.device)[None, None]


def mix_openly(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """Do what `mix_values` does with products and a softmax: torch-npu puts a kernel of its own behind torch's call."""
    group = query.shape[1] // key.shape[1]
    key, value = (heads.repeat_interleave(group, 1) for heads in (key, value))
    scores = (query * scale) @ key.transpose(2, 3)  # scaled first: a product may pass the range of float16
    scores = scores.masked_fill(make_mask(query, key, window), float("-inf"))
    wide = torch.float32 if scores.dtype in HALVES else scores.dtype
    return scores.softmax(-1, dtype=wide).to(value.dtype) @ value


def make_kernels(ops: Any, works: Collection[Case], device: torch.device) -> Kernels:
    """Return the decoder's kernels on the operators of `ops`, for the cases that work."""
    triangle = torch.ones(CAUSAL_SIZE, CAUSAL_SIZE, dtype=torch.bool).triu(1).to(device)
    calls = NpuKernels(ops, frozenset(works), triangle)
    return Kernels(calls.norm, calls.rotate, calls.mix)


# Which calls a model makes


def list_cases(specs: Sequence[ModelSpec]) -> list[Case]:
    """Return each kind of call that the models make, once; scores with a soft cap are no call of any operator."""
    cases = []
    for spec in specs:
        cases.append(Case(NORM, spec.shape.hidden))
        for layer in spec.layers:
            cases += [Case(NORM, size) for size in list_norm_sizes(spec, layer)]
            counts = (layer.shape.query_heads, layer.shape.kv_heads)
            if layer.rope is not None:
                cases += [rotary_case(layer.rope, count) for count in counts]
            if spec.attention_softcap is None:
                cases.append(Case(FUSED, layer.shape.head_dim, *counts, narrow=layer.window is not None))
    return list(dict.fromkeys(cases))


def list_norm_sizes(spec: ModelSpec, layer: LayerSpec) -> list[int]:
    """Return the sizes of the norms on queries and keys; all others have the hidden width."""
    whole = {"q_norm": layer.shape.query, "k_norm": layer.shape.kv}
    head = spec.family.attention.qk_norm == "head"
    return [layer.shape.head_dim if head else size for role, size in whole.items() if role in layer.names]


def rotary_case(rope: RopeSpec, heads: int) -> Case:
    """Return the case of rotating queries or keys."""
    return Case(ROTARY, rope.dim, heads, interleaved=rope.interleaved, scaled=compute_scale(rope) > 1)


def list_substitutes(case: Case) -> list[Case]:
    """Return the older operators for prompts and for single tokens, in place of a fused one that does not work."""
    prompt = Case(PROMPT, case.size, case.heads, case.groups, narrow=case.narrow)
    return [prompt, Case(STEP, case.size, case.heads, case.groups)]


def explain_limit(case: Case) -> str:
    """Return why the documented limits of an operator rule a case out, or nothing."""
    if case.op == NORM:
        return "" if case.size >= ALIGNED else f"{case.size} values are less than 32 bytes"
    if case.size % ALIGNED:
        return f"size {case.size} is no multiple of {ALIGNED}"
    if case.op == ROTARY:
        if case.scaled:
            return "its tables leave [-1, 1]"
        fits = case.size < MAX_ROTATING and case.heads <= MAX_ROTARY_HEADS
        return "" if fits else f"{case.heads} heads of {case.size} values are too many"
    fits = case.size <= MAX_HEAD_SIZE and case.heads <= MAX_HEADS and case.heads // case.groups <= MAX_GROUP
    return "" if fits else f"{case.heads} heads of {case.size} values over {case.groups} are too many"


# The question, in this process


def open_npu(specs: Sequence[ModelSpec], dtype: torch.dtype | None = None) -> Npu:
    """Probe the NPU for these models and load torch-npu here; UserError says what is missing, and what to do."""
    probe = probe_npu(list_cases(specs), dtype)
    ops = importlib.import_module(PACKAGE)
    device = torch.device(DEVICE)
    works = [case for case, reason in probe.reasons.items() if not reason]
    kernels = make_kernels(ops, works, device)
    return Npu(device, probe.chip, probe.dtype, probe.free, kernels, describe_kernels(specs, probe))


def probe_npu(cases: Sequence[Case], dtype: torch.dtype | None = None) -> Probe:
    """Try the cases on the device in fresh processes, then substitutes for fused attention that does not work."""
    if find_spec(PACKAGE) is None:
        raise UserError(
            "--device npu needs torch-npu, which is not installed; on the machine with the NPU run "
            "`pip install 'torch-npu==2.13.*'` (the extra `npu`) and source CANN's set_env.sh, or use --device cpu."
        )
    probe = try_cases(cases, dtype)
    failed = [case for case, reason in probe.reasons.items() if case.op == FUSED and reason]
    if not failed:
        return probe
    more = [other for case in failed for other in list_substitutes(case)]
    found = try_cases(list(dict.fromkeys(more)), dtype)
    return Probe(probe.chip, probe.free, probe.dtype, {**probe.reasons, **found.reasons})


def try_cases(cases: Sequence[Case], dtype: torch.dtype | None) -> Probe:
    """Ask fresh processes until each case has its answer; the one that a process died on does not work."""
    reasons = {case: explain_limit(case) for case in cases}
    left = [case for case, reason in reasons.items() if not reason]
    while True:
        head, answers, error = ask_process(left, dtype)
        reasons |= dict(zip(left, answers, strict=False))
        left = left[len(answers) :]
        if left:
            reasons[left.pop(0)] = error
        if not left:
            return Probe(head["chip"], head["free"], getattr(torch, head["dtype"]), reasons)


def ask_process(cases: Sequence[Case], dtype: torch.dtype | None) -> tuple[dict[str, Any], list[str], str]:
    """Run one process over the cases; return its head, the reason of each case it came to, and its own error."""
    question = {"dtype": None if dtype is None else str(dtype).split(".")[1], "cases": [asdict(case) for case in cases]}
    # The variable is set whatever the user's own setting: the process imports torch-npu itself, and reports on it.
    environment = make_environment() | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    try:
        ran = subprocess.run(
            COMMAND, input=json.dumps(question), env=environment, capture_output=True, text=True, check=False,
            timeout=PATIENCE_S,
        )  # fmt: skip
        output, error = ran.stdout, read_reason(ran.stderr, ran.returncode)
    except subprocess.TimeoutExpired as late:
        partial = late.stdout or b""  # bytes even where text was asked for, on some versions of Python
        output = partial if isinstance(partial, str) else partial.decode(errors="replace")
        error = f"no answer in {PATIENCE_S:.0f} s"
    answers = [json.loads(line.removeprefix(ANSWER)) for line in output.splitlines() if line.startswith(ANSWER)]
    if not answers:
        raise UserError(explain_missing(error))
    if answers[0]["chip"] is None:
        raise UserError(
            "--device npu: torch-npu and CANN load, but no NPU is visible; check `npu-smi info` and "
            "ASCEND_RT_VISIBLE_DEVICES, or use --device cpu."
        )
    return answers[0], [answer["reason"] for answer in answers[1:]], error


def read_reason(text: str, code: int) -> str:
    """Return the line of a process's stderr that names its error, or the signal that ended it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    if code < 0:
        return f"its process was ended by signal {-code}"
    return (named or lines or ["it ended without a word"])[-1].rstrip(".")[:300]


def explain_missing(error: str) -> str:
    """Return the sentence for a torch-npu that does not load."""
    library = re.search(r"\blib\w+\.so[.\d]*", error)
    if library is None:
        return (
            f"--device npu: torch-npu does not load ({error}); check that its version fits torch "
            f"{torch.__version__} and the installed CANN, or use --device cpu."
        )
    return (
        f"--device npu: torch-npu is installed but does not load, as {library.group()} is not found: CANN is not "
        "installed or not set up in this shell; run `source /usr/local/Ascend/ascend-toolkit/set_env.sh` (or install "
        "CANN first) and try again, or use --device cpu."
    )


def describe_kernels(specs: Sequence[ModelSpec], probe: Probe) -> tuple[str, ...]:
    """Return one sentence for each operator and outcome, so that nothing falls to plain torch unseen."""
    groups: dict[tuple[str, str], list[Case]] = {}
    for case, reason in probe.reasons.items():
        groups.setdefault((case.op, reason), []).append(case)
    notes = []
    for (op, reason), cases in groups.items():
        sizes = ", ".join(sorted({describe_case(case) for case in cases}))
        batch, keys = REACH.get(op, (0, 0))
        reach = f" up to {keys} keys and a batch of {batch}" if keys else ""
        notes.append(f"{op} ({sizes}): {f'not used, {reason}' if reason else f'used{reach}'}.")
    if any(spec.attention_softcap is not None for spec in specs):
        notes.append("Attention: plain torch, as no fused operator soft-caps scores.")
    return tuple(notes)


def describe_case(case: Case) -> str:
    """Return the sizes of a case in a few words."""
    if case.op == NORM:
        return str(case.size)
    if case.op == ROTARY:
        return f"{case.heads}x{case.size}{' interleaved' if case.interleaved else ''}"
    return f"{case.heads}/{case.groups}x{case.size}{' windowed' if case.narrow else ''}"


def synchronise() -> None:
    """Wait until the NPU has done all that it was given."""
    getattr(torch, DEVICE).synchronize()


def read_peak_bytes() -> int:
    """Return the largest number of bytes that tensors have held on the NPU in this process."""
    return int(getattr(torch, DEVICE).max_memory_allocated())


# The answer, in a process of its own

Trial = Callable[[Case, Kernels, torch.dtype, torch.device], float]  # error beside the largest value


def answer_question(ops: Any, question: Mapping[str, Any], device: torch.device, write: Callable[[Any], None]) -> None:
    """Write the head, then for each case why it does not work; a call that raises ends the process, as it should."""
    npu = getattr(torch, DEVICE)
    if not npu.is_available():
        write({"chip": None})
        return
    name = question["dtype"] or ("bfloat16" if npu.is_bf16_supported() else "float16")
    write({"chip": npu.get_device_name(0), "free": int(npu.mem_get_info()[0]), "dtype": name})
    for given in question["cases"]:
        case = Case(**given)
        kernels = make_kernels(ops, [case], device)
        error = max(run(case, kernels, getattr(torch, name), device) for run in TRIALS[case.op])
        limit = TOLERANCE.get(getattr(torch, name), 1e-4)
        write({"reason": "" if error <= limit else f"it differs from plain torch by {error:.2g} of the largest value"})


def try_norm(size: float) -> Trial:
    """Return a trial of a norm over values of this size: small ones show the epsilon, large ones where squares sum."""

    def run(case: Case, kernels: Kernels, dtype: torch.dtype, device: torch.device) -> float:
        x, weight = draw((1, LENGTH, case.size), dtype) * size, draw((case.size,), dtype)
        found = kernels.norm(x.to(device), weight.to(device), 1e-5, 0.0)
        return measure_error(found, rms_norm(x.double(), weight.double(), 1e-5, 0.0))

    return run


def try_rotary(case: Case, kernels: Kernels, dtype: torch.dtype, device: torch.device) -> float:
    """Return the error of a rotation at positions away from 0."""
    rope = RopeSpec(case.size, 10000.0, interleaved=case.interleaved)
    heads = draw((1, LENGTH, case.heads, case.size), dtype).transpose(1, 2)  # not contiguous, as the decoder has it
    cos, sin = compute_tables(rope, torch.arange(WINDOW, WINDOW + LENGTH)[None], dtype)
    found = kernels.rotate(heads.to(device), cos.to(device), sin.to(device), rope)
    return measure_error(found, rotate_heads(heads.double(), cos.double(), sin.double(), rope))


def try_attention(length: int, total: int) -> Trial:
    """Return a trial of attention of the last `length` of `total` tokens."""

    def run(case: Case, kernels: Kernels, dtype: torch.dtype, device: torch.device) -> float:
        query = draw((1, case.heads, length, case.size), dtype)
        key, value = (draw((1, case.groups, total, case.size), dtype) for _ in range(2))
        window, scale = WINDOW if case.narrow else None, 2.0 * case.size**-0.5
        found = kernels.mix(query.to(device), key.to(device), value.to(device), scale, window)
        return measure_error(found, mix_values(query.double(), key.double(), value.double(), scale, window))

    return run


PROMPTS = (try_attention(LENGTH, LENGTH), try_attention(LENGTH, TOTAL))
TRIALS: dict[str, tuple[Trial, ...]] = {
    NORM: (try_norm(1.0), try_norm(2e-3), try_norm(500.0)),  # 500 squared is beyond float16
    ROTARY: (try_rotary,),
    FUSED: (*PROMPTS, try_attention(1, TOTAL)),
    PROMPT: PROMPTS,
    STEP: (try_attention(1, TOTAL),),
}


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return normal values, rounded to the format."""
    return torch.randn(shape).to(dtype)


def measure_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest error beside the largest value; NaN counts as infinite."""
    error = float((found.cpu().double() - expected).abs().max() / expected.abs().max())
    return error if error == error else float("inf")  # noqa: PLR0124 (NaN is not itself)


def main() -> None:
    """Answer the question on standard input."""
    question = json.load(sys.stdin)
    torch.manual_seed(0)
    ops = importlib.import_module(PACKAGE)
    with torch.inference_mode():
        answer_question(ops, question, torch.device(DEVICE), lambda line: print(ANSWER + json.dumps(line), flush=True))


if __name__ == "__main__":
    main()
