"""Block formats against ONNX Runtime itself, the scale search and GPTQ against plain loops."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from slow_twins import output_error
from torch import Tensor

from compress.errors import UserError
from compress.quantize import gptq
from compress.quantize.blocks import FACTORS, REFITS, Format, Quantised, round_to_nearest, search_scales, stack_rows
from compress.quantize.gptq import (
    RIDGE,
    factor_upper,
    plan_walks,
    quantise_gptq,
    quantise_part,
    quantise_readers,
)

FORMATS = list(itertools.product((4, 8), (16, 32, 128), (True, False)))


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Float32 values whose rows have other sizes and means, so that ranges are not alike."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(shape[0], 1, generator=generator) * 3 + 0.1
    shift = torch.randn(shape[0], 1, generator=generator)
    return (torch.randn(shape, generator=generator) + shift) * rows


def draw_gram(inputs: int, seed: int = 0) -> Tensor:
    """Mean of x x^T for correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(4 * inputs, inputs, generator=generator, dtype=torch.float64) @ (mix + 1)
    x = x * torch.rand(inputs, generator=generator, dtype=torch.float64).pow(2)
    return x.T @ x / len(x)


# What the operator itself makes of it


def run_operator(quantised: Quantised, x: np.ndarray, accuracy: int) -> np.ndarray:
    codes, zeros = quantised.pack()
    inputs = {"codes": codes, "scales": quantised.scales} | ({} if zeros is None else {"zeros": zeros})
    node = helper.make_node(
        "MatMulNBits", ["x", *inputs], ["y"], domain="com.microsoft", K=quantised.inputs, N=len(codes),
        bits=quantised.bits, block_size=quantised.block, accuracy_level=accuracy,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (len(x), len(codes)))],
        [onnx.numpy_helper.from_array(tensor.numpy(), name) for name, tensor in inputs.items()],
    )  # fmt: skip
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("accuracy", [0, 1])
@pytest.mark.parametrize("inputs", [150, 256])
@pytest.mark.parametrize(("bits", "block", "symmetric"), FORMATS)
def test_packed_weight_is_what_the_operator_computes_with(bits, block, symmetric, inputs, accuracy):
    quantised = round_to_nearest(draw(7, inputs), bits, block, symmetric)
    for rows in (1, 5):
        x = draw(rows, inputs, seed=rows)
        wanted = x.double() @ quantised.dequantise().double().T
        got = torch.from_numpy(run_operator(quantised, x.numpy(), accuracy))
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().mean()))


@pytest.mark.parametrize(("bits", "block", "symmetric"), FORMATS)
def test_operator_with_inputs_of_eight_bits_comes_close(bits, block, symmetric):
    """Accuracy level 4 rounds the inputs too: its kernels must take negative scales as well."""
    quantised, x = round_to_nearest(draw(7, 150), bits, block, symmetric), draw(5, 150, seed=1)
    wanted = x @ quantised.dequantise().T
    missed = torch.from_numpy(run_operator(quantised, x.numpy(), 4)) - wanted
    assert float(missed.norm() / wanted.norm()) < 0.01


@pytest.mark.parametrize("inputs", [150, 256])
@pytest.mark.parametrize(("bits", "block", "symmetric"), FORMATS)
def test_packed_rows_are_what_the_lookup_reads(bits, block, symmetric, inputs):
    """GatherBlockQuantized, the embedding's operator, takes the same bytes: row after row instead of block by block."""
    quantised = round_to_nearest(draw(7, inputs), bits, block, symmetric)
    codes, zeros = quantised.pack()
    tensors = {"codes": codes.flatten(1), "scales": quantised.scales} | ({} if zeros is None else {"zeros": zeros})
    names = ["codes", "ids", "scales", *list(tensors)[2:]]
    node = helper.make_node(
        "GatherBlockQuantized", names, ["y"], domain="com.microsoft", bits=bits, block_size=block, gather_axis=0,
        quantize_axis=1,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "one", [helper.make_tensor_value_info("ids", TensorProto.INT64, (1, 3))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(tensor.numpy(), name) for name, tensor in tensors.items()],
    )  # fmt: skip
    domains = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    got = session.run(None, {"ids": np.array([[3, 6, 0]])})[0]
    assert np.array_equal(got[0, :, :inputs], quantised.dequantise()[[3, 6, 0]].numpy())


@pytest.mark.parametrize("symmetric", [True, False])
def test_four_bits_have_the_first_code_low_and_whole_bytes_a_row(symmetric):
    quantised = round_to_nearest(draw(2, 40), 4, 16, symmetric)
    packed, zeros = quantised.pack()
    flat = quantised.codes.view(2, 3, 16).tolist()
    assert packed.tolist() == [[[part[i] + 16 * part[i + 1] for i in range(0, 16, 2)] for part in row] for row in flat]
    if symmetric:
        assert zeros is quantised.zeros is None
    else:
        assert zeros.tolist() == [[a + 16 * b, c] for a, b, c in quantised.zeros.tolist()]


@pytest.mark.parametrize(("bits", "block", "symmetric"), FORMATS)
def test_bytes_are_those_of_the_packed_tensors(bits, block, symmetric):
    quantised = round_to_nearest(draw(3, 150), bits, block, symmetric)
    packed, zeros = quantised.pack()
    tensors = [packed, quantised.scales, *([] if zeros is None else [zeros])]
    assert quantised.bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# Rounding to the nearest code


def steps_of(quantised: Quantised) -> Tensor:
    """The step of every weight, `[out, in]` in float64."""
    return quantised.scales.double().abs().repeat_interleave(quantised.block, 1)[:, : quantised.inputs]


@pytest.mark.parametrize(("bits", "block", "symmetric"), FORMATS)
def test_every_weight_is_within_half_a_step(bits, block, symmetric):
    weight = draw(9, 150)
    weight[0, 3], weight[1] = 1e4, 0.25  # an outlier; a row without spread
    quantised = round_to_nearest(weight, bits, block, symmetric)
    missed = (quantised.dequantise().double() - weight.double()).abs()
    assert (missed <= steps_of(quantised) * (0.5 + 1e-4)).all()
    assert int(quantised.codes.max()) < 2**bits


def largest_step(part: list[float], bits: int, symmetric: bool) -> float:
    """The step that covers a block: all codes for min to max (with 0), or one more code on the far side."""
    low, high = min(0.0, *part), max(0.0, *part)
    if not symmetric:
        return (high - low) / (2**bits - 1)
    far, near = max(high, -low), min(high, -low)
    return max(far / 2 ** (bits - 1), near / (2 ** (bits - 1) - 1))


@pytest.mark.parametrize(("bits", "block", "symmetric"), FORMATS)
def test_steps_are_the_smallest_that_cover_the_range(bits, block, symmetric):
    weight = draw(6, 150)
    quantised = round_to_nearest(weight, bits, block, symmetric)
    for row, place in itertools.product(range(6), range(quantised.scales.shape[1])):
        wanted = largest_step(weight[row, place * block : (place + 1) * block].tolist(), bits, symmetric)
        assert abs(float(quantised.scales[row, place])) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_ends_of_the_range_are_exact(bits, symmetric, sign):
    top = 2 ** (bits - 1)
    far = torch.linspace(-top, top - 1, 16)  # symmetric: both ends, with the far one on either side
    near = torch.linspace(0, 1, 16)  # one sign: the far end, and 0
    weight = sign * torch.stack((far if symmetric else near, near)) * 0.03
    rounded = round_to_nearest(weight, bits, 16, symmetric).dequantise()
    torch.testing.assert_close(rounded[:, [0, -1]], weight[:, [0, -1]], rtol=1e-6, atol=0)


@pytest.mark.parametrize("find", [round_to_nearest, search_scales])
@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_and_single_values_stay_as_they_are(find, symmetric):
    weight = torch.zeros(4, 40)
    weight[1], weight[2, 5], weight[3, 20:] = 0.7, -3e30, 1e-42
    quantised = find(weight, 4, 16, symmetric)
    torch.testing.assert_close(quantised.dequantise()[:3], weight[:3], rtol=1e-6, atol=0)
    assert quantised.scales.isfinite().all()
    assert (quantised.dequantise()[3].abs() <= 1e-38).all()  # float32 has no step that small


def test_large_matrix_is_quantised_piece_by_piece_alike():
    weight = draw(300, 600)
    whole = search_scales(weight, 4, 32, False)
    parts = [search_scales(part, 4, 32, False) for part in weight.split(7)]
    assert torch.equal(whole.codes, torch.cat([part.codes for part in parts]))
    assert torch.equal(whole.scales, torch.cat([part.scales for part in parts]))
    assert torch.equal(whole.zeros, torch.cat([part.zeros for part in parts]))


# The search


def slow_grid(low: float, high: float, bits: int, symmetric: bool) -> tuple[float, int]:
    """Scale and zero for a range."""
    step = largest_step([low, high], bits, symmetric)
    sign = -1 if symmetric and high > -low else 1
    scale = float(np.float32(sign * step)) or 1.0
    return scale, 2 ** (bits - 1) if symmetric else round(-low / scale)


def slow_codes(part: list[float], scale: float, zero: int, bits: int) -> list[int]:
    return [min(max(round(value / scale + zero), 0), 2**bits - 1) for value in part]


def slow_search(part: list[float], importance: list[float], bits: int, symmetric: bool) -> tuple[float, int]:
    """The best grid of one block, value by value."""

    def error(scale: float, zero: int) -> float:
        rounded = [(code - zero) * scale for code in slow_codes(part, scale, zero, bits)]
        return sum(w * (a - b) ** 2 for a, b, w in zip(part, rounded, importance, strict=True))

    low, high = min(0.0, *part), max(0.0, *part)
    best = min((slow_grid(f * low, f * high, bits, symmetric) for f in FACTORS), key=lambda grid: error(*grid))
    for _ in range(REFITS):
        scale, zero = best
        steps = [code - zero for code in slow_codes(part, scale, zero, bits)]
        energy = sum(w * s * s for s, w in zip(steps, importance, strict=True))
        product = sum(w * s * a for s, a, w in zip(steps, part, importance, strict=True))
        refitted = (float(np.float32(product / energy)) if energy and product else scale), zero
        best = min(best, refitted, key=lambda grid: error(*grid))
    return best


@pytest.mark.parametrize(("bits", "block", "symmetric"), [(4, 16, True), (4, 32, False), (8, 16, False), (8, 16, True)])
def test_search_equals_the_slow_one(bits, block, symmetric):
    weight, importance = draw(5, 72), torch.rand(72, dtype=torch.float64).pow(3)
    weight[0, 1], weight[1, :block] = 60.0, 0.0
    quantised = search_scales(weight, bits, block, symmetric, importance)
    shrunk = 0
    for row, place in itertools.product(range(5), range(quantised.scales.shape[1])):
        span = slice(place * block, min((place + 1) * block, 72))
        part, shares = weight[row, span].tolist(), importance[span].tolist()
        scale, zero = slow_search(part, shares, bits, symmetric)
        assert float(quantised.scales[row, place]) == pytest.approx(scale, rel=1e-6)
        assert symmetric or int(quantised.zeros[row, place]) == zero
        assert quantised.codes[row, span].tolist() == slow_codes(part, scale, zero, bits)
        shrunk += abs(scale) < 0.99 * largest_step(part, bits, symmetric)
    assert shrunk or bits == 8


def weigh_error(quantised: Quantised, weight: Tensor, importance: Tensor) -> Tensor:
    """The weighted squared error of every block, `[out, blocks]`, in float64."""
    zeros = 2 ** (quantised.bits - 1) if quantised.zeros is None else quantised.zeros[..., None].double()
    values = (quantised.codes.view(*quantised.scales.shape, -1).double() - zeros) * quantised.scales[..., None].double()
    missed = (values.flatten(1)[:, : weight.shape[1]] - weight.double()).pow(2) * importance
    return torch.nn.functional.pad(missed, (0, -weight.shape[1] % quantised.block)).view_as(values).sum(-1)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("bits", "block", "symmetric"), FORMATS)
def test_search_is_never_worse_in_any_block(bits, block, symmetric, weighted):
    weight, importance = draw(40, 150), torch.rand(150, dtype=torch.float64).pow(4)
    importance[:20] = 0  # inputs that never fire
    importance = importance if weighted else torch.ones(150)
    found = weigh_error(search_scales(weight, bits, block, symmetric, importance), weight, importance)
    plain = weigh_error(round_to_nearest(weight, bits, block, symmetric), weight, importance)
    assert (found <= plain * (1 + 1e-12)).all()
    assert found.sum() < 0.99 * plain.sum()
    if not weighted:
        default = weigh_error(search_scales(weight, bits, block, symmetric), weight, importance)
        assert torch.equal(found, default)


# GPTQ


def invert_by_elimination(matrix: Tensor) -> Tensor:
    """Gauss-Jordan without pivots: the matrix is positive definite."""
    size = len(matrix)
    work = torch.cat((matrix, torch.eye(size, dtype=torch.float64)), 1)
    for place in range(size):
        work[place] = work[place] / work[place, place].clone()
        for other in range(size):
            if other != place:
                work[other] = work[other] - work[other, place].clone() * work[place]
    return work[:, size:]


def search_block(values: Tensor, importance: Tensor, bits: int, symmetric: bool) -> list[tuple[float, int]]:
    return [slow_search(row.tolist(), importance.tolist(), bits, symmetric) for row in values]


def slow_gptq(weight: Tensor, damped: Tensor, order: list[int], form: tuple[int, int, bool], fixed: bool):
    """The paper's loop: round a column, move the others to make up for it, eliminate it from the inverse."""
    bits, block, symmetric = form
    left, codes = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.long)
    inverse, importance, grids = invert_by_elimination(damped), damped.diagonal(), {}
    for column in order:
        place = column // block
        span = slice(place * block, min((place + 1) * block, weight.shape[1]))
        if place not in grids:
            grids[place] = search_block(
                (weight.double() if fixed else left)[:, span], importance[span], bits, symmetric
            )
        for row, (scale, zero) in enumerate(grids[place]):
            code = slow_codes([float(left[row, column])], scale, zero, bits)[0]
            codes[row, column] = code
            error = (float(left[row, column]) - (code - zero) * scale) / inverse[column, column]
            left[row] -= error * inverse[column]
            left[row, column] = (code - zero) * scale  # rounded columns have left the inverse, so this one stays
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column].clone()
    scales = torch.tensor([[grids[place][row][0] for place in sorted(grids)] for row in range(len(weight))])
    zeros = torch.tensor([[grids[place][row][1] for place in sorted(grids)] for row in range(len(weight))])
    missed = left - weight.double()
    return codes, scales, zeros, torch.einsum("ri,ij,rj->r", missed, damped, missed)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    ("bits", "block", "symmetric"), [(4, 16, True), (4, 16, False), (4, 32, False), (4, 128, True), (8, 32, True)]
)
def test_gptq_equals_the_slow_one(bits, block, symmetric, seed):
    weight, gram = draw(6, 56, seed=seed), draw_gram(56, seed=seed)
    damped = gram + RIDGE * gram.diagonal().mean() * torch.eye(56, dtype=torch.float64)
    form, strongest = (bits, block, symmetric), sorted(range(56), key=lambda i: -float(gram[i, i]))
    plain = slow_gptq(weight, damped, list(range(56)), form, fixed=False)
    other = slow_gptq(weight, damped, strongest, form, fixed=True)
    better = [plain if plain[3][row] <= other[3][row] else other for row in range(6)]
    quantised = quantise_gptq(weight, gram, bits, block, symmetric)
    if bits == 4 and block < 56:
        assert any(choice is plain for choice in better) and any(choice is other for choice in better)
    for row, (codes, scales, zeros, _) in enumerate(better):
        assert quantised.codes[row, :56].tolist() == codes[row].tolist()
        torch.testing.assert_close(quantised.scales[row], scales[row].float(), rtol=1e-6, atol=0)
        assert symmetric or quantised.zeros[row].tolist() == zeros[row].tolist()


def test_gptq_does_large_matrices_part_by_part_alike(monkeypatch):
    weight, gram = draw(20, 100), draw_gram(100)
    whole = quantise_gptq(weight, gram, 4, 32, symmetric=False)
    error = output_error(weight, whole, gram)
    monkeypatch.setattr(gptq, "ROWS", 7)
    parts = quantise_gptq(weight, gram, 4, 32, symmetric=False)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scales, parts.scales)
    assert torch.equal(whole.zeros, parts.zeros)
    assert output_error(weight, parts, gram) == pytest.approx(error, rel=1e-12)


def slow_factor(matrix: Tensor) -> Tensor:
    """R of matrix = R R^T, entry by entry from the last column."""
    size = len(matrix)
    factor = torch.zeros_like(matrix)
    for column in reversed(range(size)):
        for row in reversed(range(column + 1)):
            left = float(matrix[row, column])
            left -= sum(float(factor[row, k]) * float(factor[column, k]) for k in range(column + 1, size))
            factor[row, column] = left**0.5 if row == column else left / float(factor[column, column])
    return factor


@pytest.mark.parametrize("panel", [1, 7, 256])
def test_factor_in_place_equals_the_slow_one(panel, monkeypatch):
    monkeypatch.setattr(gptq, "PANEL", panel)
    matrix = draw_gram(40) + torch.eye(40, dtype=torch.float64)
    work = matrix.clone()
    assert factor_upper(work) is work
    torch.testing.assert_close(work.triu(), slow_factor(matrix), rtol=1e-9, atol=1e-11)


def test_weights_that_read_the_same_are_rounded_as_if_alone(monkeypatch):
    monkeypatch.setattr(gptq, "ROWS", 7)
    gram, weights = draw_gram(100), [draw(rows, 100, seed=rows) for rows in (20, 7, 3)]
    before = gram.clone()
    together = quantise_readers(weights, gram, Format(4, 32, symmetric=False))
    walks, form = plan_walks(gram), Format(4, 32, symmetric=False)
    for weight, found in zip(weights, together, strict=True):
        alone = quantise_gptq(weight, gram, 4, 32, symmetric=False)
        by_blocks = stack_rows((quantise_part(part, walks, form) for part in weight.split(5)), len(weight))
        for other in (alone, by_blocks):
            assert torch.equal(found.codes, other.codes)
            assert torch.equal(found.scales, other.scales)
            assert torch.equal(found.zeros, other.zeros)
    assert torch.equal(gram, before)


@pytest.mark.parametrize(("block", "inputs"), [(32, 300), (256, 600)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_lessens_the_output_error(block, inputs, symmetric):
    weight, gram = draw(20, inputs), draw_gram(inputs)
    for bits in (4, 8):
        found = output_error(weight, quantise_gptq(weight, gram, bits, block, symmetric), gram)
        assert found < 0.7 * output_error(weight, round_to_nearest(weight, bits, block, symmetric), gram)
        searched = search_scales(weight, bits, block, symmetric, gram.diagonal())
        assert found < 0.8 * output_error(weight, searched, gram)


@pytest.mark.parametrize(("bits", "block", "symmetric"), FORMATS)
def test_without_correlations_gptq_is_the_search(bits, block, symmetric):
    weight, gram = draw(6, 150), torch.diag(torch.rand(150, dtype=torch.float64))
    damped = gram.diagonal() + RIDGE * gram.diagonal().mean()
    got, wanted = (quantise_gptq(weight, gram, bits, block, symmetric),
                   search_scales(weight, bits, block, symmetric, damped))  # fmt: skip
    assert torch.equal(got.codes, wanted.codes)
    assert torch.equal(got.scales, wanted.scales)
    assert symmetric or torch.equal(got.zeros, wanted.zeros)


def test_dead_inputs_are_rounded_and_disturb_nothing():
    weight, gram = draw(5, 64), draw_gram(64)
    dead = torch.tensor([0, 17, 40, 63])
    gram[dead] = 0
    gram[:, dead] = 0
    quantised = quantise_gptq(weight, gram, 8, 16, symmetric=False)
    missed = (quantised.dequantise().double() - weight.double()).abs()[:, dead]
    assert (missed <= 2 * steps_of(quantised)[:, dead]).all()
    other = weight.clone()
    other[:, dead] *= 0.9  # inside the ranges: the scales may change a little, the error hardly
    nearly = output_error(other, quantise_gptq(other, gram, 8, 16, symmetric=False), gram)
    assert nearly == pytest.approx(output_error(weight, quantised, gram), rel=0.2)


@pytest.mark.parametrize("symmetric", [True, False])
def test_silent_calibration_leaves_the_plain_search(symmetric):
    weight = draw(4, 40)
    got = quantise_gptq(weight, torch.zeros(40, 40, dtype=torch.float64), 4, 16, symmetric)
    assert torch.equal(got.codes, search_scales(weight, 4, 16, symmetric).codes)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(1, 16), (1, 5), (3, 128), (3, 130)])
def test_small_and_zero_matrices(shape, symmetric):
    gram = draw_gram(shape[1])
    for block in (16, 128):
        nothing = quantise_gptq(torch.zeros(shape), gram, 4, block, symmetric)
        assert torch.equal(nothing.dequantise(), torch.zeros(shape))
        quantised = quantise_gptq(draw(*shape), gram, 4, block, symmetric)
        assert quantised.codes.shape == (shape[0], -(-shape[1] // block) * block)
        assert quantised.dequantise().shape == shape
        padding = quantised.codes[:, shape[1] :]
        assert (padding == (8 if symmetric else quantised.zeros[:, -1:])).all()


def test_half_precision_weights_are_taken_as_they_are():
    weight, gram = draw(3, 40).bfloat16(), draw_gram(40)
    got, wanted = (quantise_gptq(kind, gram, 4, 16, symmetric=True) for kind in (weight, weight.float()))
    assert torch.equal(got.codes, wanted.codes)


def test_output_error_is_the_squared_error_of_the_outputs():
    weight, x = draw(6, 24), draw(50, 24, seed=3).double()
    quantised = round_to_nearest(weight, 4, 16, symmetric=True)
    outputs = x @ (weight.double() - quantised.dequantise().double()).T
    assert output_error(weight, quantised, x.T @ x) == pytest.approx(float(outputs.pow(2).sum()), rel=1e-10)


# Refusals


@pytest.mark.parametrize("bits", [0, 2, 3, 5, 16])
def test_other_bits_are_refused(bits):
    with pytest.raises(UserError, match=rf"to {bits} bits: .*; choose one of them\.$"):
        round_to_nearest(draw(2, 32), bits, 32, symmetric=True)


@pytest.mark.parametrize("block", [-16, 0, 8, 24, 48, 100])
def test_other_blocks_are_refused(block):
    for quantise in (search_scales, lambda weight, *form: quantise_gptq(weight, torch.eye(32).double(), *form)):
        with pytest.raises(UserError, match=rf"in blocks of {block} inputs: .*; choose 32 or 128\.$"):
            quantise(draw(2, 32), 4, block, True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value):
    weight, gram = draw(2, 32), draw_gram(32)
    weight[1, 3] = value
    for quantise in (round_to_nearest, search_scales, lambda w, *form: quantise_gptq(w, gram, *form)):
        with pytest.raises(UserError, match=r"shape \[2, 32\] holds NaN or infinite"):
            quantise(weight, 4, 16, True)
    gram[2, 2] = value
    with pytest.raises(UserError, match="finite Gram matrix of 32 x 32"):
        quantise_gptq(draw(2, 32), gram, 4, 16, symmetric=True)
    with pytest.raises(UserError, match=r"of 32 x 32 inputs and was given one of \[31, 31\]"):
        quantise_gptq(draw(2, 32), draw_gram(31), 4, 16, symmetric=True)
