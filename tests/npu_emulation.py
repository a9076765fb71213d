"""The NPU operators that the product calls, emulated on the CPU: real schemas, plain loops, documented limits.

The schemas are those that torch-npu 2.13.0 registers, letter by letter (read from libtorch_npu.so); torch itself checks
each call against them. What an operator computes and refuses follows Ascend/op-plugin, docs/zh/custom_APIs/torch_npu.
As a module on its own this stands in for `torch_npu` in a fresh process: see `write_package`.
"""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path

import torch

NAMESPACE = "emulated_npu"
SCHEMAS = (
    "npu_rms_norm(Tensor input, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)",
    "npu_rotary_mul(Tensor input, Tensor r1, Tensor r2, str rotary_mode='half', Tensor? rotate=None) -> Tensor",
    "npu_prompt_flash_attention(Tensor query, Tensor key, Tensor value, *, Tensor? padding_mask=None, "
    "Tensor? atten_mask=None, Tensor? pse_shift=None, int[]? actual_seq_lengths=None, Tensor? deq_scale1=None, "
    "Tensor? quant_scale1=None, Tensor? deq_scale2=None, Tensor? quant_scale2=None, Tensor? quant_offset2=None, "
    "int num_heads=1, float scale_value=1.0, int pre_tokens=2147483647, int next_tokens=0, "
    'str input_layout="BSH", int num_key_value_heads=0, int[]? actual_seq_lengths_kv=None, int sparse_mode=0) '
    "-> Tensor",
    "npu_incre_flash_attention(Tensor query, Tensor key, Tensor value, *, Tensor? padding_mask=None, "
    "Tensor? atten_mask=None, Tensor? pse_shift=None, SymInt[]? actual_seq_lengths=None, "
    "Tensor? antiquant_scale=None, Tensor? antiquant_offset=None, Tensor? block_table=None, "
    "Tensor? dequant_scale1=None, Tensor? quant_scale1=None, Tensor? dequant_scale2=None, Tensor? quant_scale2=None, "
    "Tensor? quant_offset2=None, Tensor? kv_padding_size=None, int num_heads=1, float scale_value=1.0, "
    'str input_layout="BSH", int num_key_value_heads=0, int block_size=0, int inner_precise=1) -> Tensor',
    "npu_fused_infer_attention_score(Tensor query, Tensor key, Tensor value, *, Tensor? pse_shift=None, "
    "Tensor? atten_mask=None, SymInt[]? actual_seq_lengths=None, SymInt[]? actual_seq_lengths_kv=None, "
    "Tensor? dequant_scale1=None, Tensor? quant_scale1=None, Tensor? dequant_scale2=None, Tensor? quant_scale2=None, "
    "Tensor? quant_offset2=None, Tensor? antiquant_scale=None, Tensor? antiquant_offset=None, "
    "Tensor? key_antiquant_scale=None, Tensor? key_antiquant_offset=None, Tensor? value_antiquant_scale=None, "
    "Tensor? value_antiquant_offset=None, Tensor? block_table=None, Tensor? query_padding_size=None, "
    "Tensor? kv_padding_size=None, Tensor? key_shared_prefix=None, Tensor? value_shared_prefix=None, "
    "SymInt[]? actual_shared_prefix_len=None, Tensor? query_rope=None, Tensor? key_rope=None, "
    "Tensor? key_rope_antiquant_scale=None, int num_heads=1, float scale=1.0, int pre_tokens=2147483647, "
    'int next_tokens=2147483647, str input_layout="BSH", int num_key_value_heads=0, int sparse_mode=0, '
    "int inner_precise=0, int block_size=0, int antiquant_mode=0, int key_antiquant_mode=0, "
    "int value_antiquant_mode=0, bool softmax_lse_flag=False) -> (Tensor, Tensor)",
)
CALLS: dict[str, int] = {}  # how often each operator ran: a test of a kernel must have met it


def count(name):
    CALLS[name] = CALLS.get(name, 0) + 1


def npu_rms_norm(x, gamma, epsilon=1e-6):
    count("npu_rms_norm")
    assert x.dtype == gamma.dtype, "gamma has the format of the input"
    assert x.shape[-1:] == gamma.shape
    assert 2 <= x.dim() <= 8
    wide = x.double() if x.dtype == torch.float64 else x.float()
    inverse = (wide.square().sum(-1, keepdim=True) / x.shape[-1] + epsilon).sqrt().reciprocal()
    return (wide * inverse * gamma.to(wide.dtype)).to(x.dtype), inverse


def npu_rotary_mul(x, r1, r2, rotary_mode="half", rotate=None):
    count("npu_rotary_mul")
    batch, heads, length, size = x.shape
    assert rotate is None
    assert tuple(r1.shape) == tuple(r2.shape) == (1, 1, length, size), "BNSD goes with 11SD"
    assert r1.dtype == r2.dtype == x.dtype
    assert max(r1.abs().max(), r2.abs().max()) <= 1, "the tables lie in [-1, 1]"
    assert size % 2 == 0
    assert size < 896
    assert batch * heads < 1000
    turned = torch.empty_like(x)
    for index in range(size):
        if rotary_mode == "half":
            other, sign = (index + size // 2, -1) if index < size // 2 else (index - size // 2, 1)
        else:
            assert rotary_mode == "interleave"
            other, sign = (index + 1, -1) if index % 2 == 0 else (index - 1, 1)
        turned[..., index] = x[..., index] * r1[..., index] + sign * x[..., other] * r2[..., index]
    return turned


def mix(query, key, value, scale, hidden):
    """Attend head by head; `hidden` `[queries, keys]` is True where nothing is read."""
    group = query.shape[1] // key.shape[1]
    out = torch.empty_like(query)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    for row in range(query.shape[0]):
        for head in range(query.shape[1]):
            one, other = query[row, head].to(wide), key[row, head // group].to(wide)
            scores = (one @ other.T * scale).masked_fill(hidden, -math.inf)
            out[row, head] = (scores.softmax(-1) @ value[row, head // group].to(wide)).to(query.dtype)
    return out


def check_heads(query, key, value, heads, layout):
    assert layout == "BNSD"
    assert query.is_contiguous()
    assert key.is_contiguous()
    assert value.is_contiguous()
    assert key.shape == value.shape
    assert query.dtype == key.dtype == value.dtype
    assert heads == query.shape[1] <= 256
    assert query.shape[3] == key.shape[3] <= 512
    assert query.shape[3] % 16 == 0, "32 bytes of a 16-bit format"


def read_band(length, total, pre, after):
    """Sparse mode 0: query i, counted from the top left, reads keys i - pre .. i + after, where the mask lets it."""
    place = torch.arange(total)[None] - torch.arange(length)[:, None]
    return (place < -pre) | (place > after)


def read_mask(mask, length, total):
    assert mask.dtype in (torch.bool, torch.int8, torch.uint8)
    assert mask.is_contiguous()
    assert tuple(mask.shape) in {(1, length, total), (1, 1, length, total)}
    whole = mask.reshape(length, total).bool()
    assert not whole.all(1).any(), "no row is masked throughout"
    return whole


def npu_prompt_flash_attention(query, key, value, **given):
    """The form for the 310P: sparse mode 0, no groups, next_tokens 0 or unlimited."""
    count("npu_prompt_flash_attention")
    check_heads(query, key, value, given["num_heads"], given["input_layout"])
    assert given.get("num_key_value_heads", 0) == 0
    assert given["num_heads"] == key.shape[1]
    assert given.get("sparse_mode", 0) == 0
    assert given.get("pre_tokens", 2147483647) == 2147483647
    assert given.get("next_tokens", 0) in (0, 2147483647)
    assert query.shape[0] <= 128
    assert key.shape[2] <= 65535
    length, total = query.shape[2], key.shape[2]
    hidden = read_mask(given["atten_mask"], length, total)
    hidden = hidden | read_band(length, total, 2147483647, given.get("next_tokens", 0))
    return mix(query, key, value, given["scale_value"], hidden)


def npu_incre_flash_attention(query, key, value, **given):
    count("npu_incre_flash_attention")
    check_heads(query, key, value, given["num_heads"], given["input_layout"])
    assert query.shape[2] == 1
    groups = given.get("num_key_value_heads", 0) or given["num_heads"]
    assert groups == key.shape[1]
    assert given["num_heads"] % groups == 0
    assert given["num_heads"] // groups <= 64
    assert given.get("atten_mask") is None
    return mix(query, key, value, given["scale_value"], torch.zeros(1, key.shape[2], dtype=torch.bool))


def npu_fused_infer_attention_score(query, key, value, **given):
    count("npu_fused_infer_attention_score")
    check_heads(query, key, value, given["num_heads"], given["input_layout"])
    groups = given.get("num_key_value_heads", 0) or given["num_heads"]
    assert groups == key.shape[1]
    assert given["num_heads"] % groups == 0
    assert given["num_heads"] // groups <= 64
    length, total, mask = query.shape[2], key.shape[2], given.get("atten_mask")
    mode = given.get("sparse_mode", 0)
    if length == 1 or mask is None:
        assert mask is None
        hidden = torch.zeros(length, total, dtype=torch.bool)
    elif mode == 3:
        assert tuple(mask.shape) == (2048, 2048)
        assert torch.equal(mask.bool(), torch.ones(2048, 2048, dtype=torch.bool).triu(1))
        # Right-down causal: the last query reads all keys.
        hidden = torch.arange(total)[None] > torch.arange(total - length, total)[:, None]
    else:
        assert mode == 0
        reach = given.get("pre_tokens", 2147483647), given.get("next_tokens", 2147483647)
        hidden = read_mask(mask, length, total) | read_band(length, total, *reach)
    return mix(query, key, value, given["scale"], hidden), torch.zeros(1)


def register():
    """Register the operators with torch, once, and return what holds them."""
    ops = getattr(torch.ops, NAMESPACE)
    if not hasattr(ops, "npu_rms_norm"):
        library = torch.library.Library(NAMESPACE, "DEF")
        for schema in SCHEMAS:
            name = schema.split("(")[0]
            library.define(schema)
            library.impl(name, globals()[name], "CPU")
        register.library = library  # torch forgets what nobody holds
    return ops


def stand_in(bf16=True, chip="Ascend910B2", present=True):
    """Return what torch_npu puts at torch.npu."""
    return types.SimpleNamespace(
        is_available=lambda: present,
        get_device_name=lambda index: chip,
        is_bf16_supported=lambda: bf16,
        mem_get_info=lambda: (2**34, 2**35),
        synchronize=lambda: count("synchronize"),
        max_memory_allocated=lambda: 12345,
    )


PACKAGE = '''
"""Stands in for torch_npu: tensors sent to "npu" stay where they are, the operators are emulated."""
import os, sys
import torch
sys.path.insert(0, {tests!r})
import npu_emulation
if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") != "0":
    raise RuntimeError("auto-load is on")
torch.utils.rename_privateuse1_backend("npu")
torch.npu = npu_emulation.stand_in(bf16={bf16}, chip={chip!r}, present={present})
ops = npu_emulation.register()
for schema in npu_emulation.SCHEMAS:
    name = schema.split("(")[0]
    if name not in {absent!r}:
        globals()[name] = getattr(ops, name)
send = torch.Tensor.to
torch.Tensor.to = lambda self, *given, **named: (
    self if str(given[0]).startswith("npu") else send(self, *given, **named)
)
{more}
'''


def write_package(folder: Path, more: str = "", absent=(), bf16=True, chip="Ascend910B2", present=True) -> Path:
    """Write a package named torch_npu into `folder`, with further lines of code, and return the folder."""
    package = folder / "torch_npu"
    package.mkdir(parents=True)
    tests = str(Path(__file__).parent)
    code = PACKAGE.format(tests=tests, more=more, absent=tuple(absent), bf16=bf16, chip=chip, present=present)
    (package / "__init__.py").write_text(code)
    return folder


if __name__ == "__main__":
    sys.exit("a module for tests")
