"""The repair of a projection equals least squares on the stacked data, in its limits too."""

from __future__ import annotations

import pytest
import slow_twins
import torch
from torch import Tensor

from compress.solve import damp_gram, invert_gram, residual_error, solve_projection
from compress.stats import Moments

TOKENS, INPUTS, OUTPUTS = 60, 7, 4


def draw(*shape: int, seed: int) -> Tensor:
    """Values with means that are not zero, so that a forgotten bias shows."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.7


@pytest.fixture
def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = draw(TOKENS, INPUTS, seed=1) * torch.tensor([3, 1, 1, 0.1, 1, 2, 0.01]).double()
    return x, draw(TOKENS, OUTPUTS, seed=2), draw(OUTPUTS, INPUTS, seed=3), draw(OUTPUTS, seed=4)


def gather(x: Tensor, y: Tensor) -> Moments:
    moments = Moments.empty(x.shape[1], y.shape[1])
    moments.update(x, y)
    return moments


@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 0.5, 100.0])
def test_equals_stacked_least_squares(data: tuple[Tensor, ...], ridge: float) -> None:
    x, y, weight, _ = data
    solved, bias = solve_projection(gather(x, y), weight, None, ridge)
    assert bias is None
    torch.testing.assert_close(solved, slow_twins.fit_projection(x, y, weight, ridge), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 0.5, 100.0])
def test_equals_stacked_least_squares_with_bias(data: tuple[Tensor, ...], ridge: float) -> None:
    x, y, weight, bias = data
    solved, shift = solve_projection(gather(x, y), weight, bias, ridge)
    wanted, wanted_shift = slow_twins.fit_with_bias(x, y, weight, ridge)
    torch.testing.assert_close(solved, wanted, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(shift, wanted_shift, rtol=1e-8, atol=1e-9)


def test_fewer_tokens_than_inputs(data: tuple[Tensor, ...]) -> None:
    x, y, weight, bias = (data[0][:3], data[1][:3], *data[2:])
    solved, _ = solve_projection(gather(x, y), weight)
    torch.testing.assert_close(solved, slow_twins.fit_projection(x, y, weight, 1e-3), rtol=1e-8, atol=1e-9)
    solved, shift = solve_projection(gather(x, y), weight, bias)
    wanted, wanted_shift = slow_twins.fit_with_bias(x, y, weight, 1e-3)
    torch.testing.assert_close(solved, wanted, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(shift, wanted_shift, rtol=1e-8, atol=1e-9)


def test_residual_error_equals_the_sum_over_tokens(data: tuple[Tensor, ...]) -> None:
    x, y, weight, bias = data
    moments = gather(x, y)
    assert residual_error(moments, weight) == pytest.approx(slow_twins.sum_errors(x, y, weight), rel=1e-10)
    assert residual_error(moments, weight, bias) == pytest.approx(slow_twins.sum_errors(x, y, weight, bias), rel=1e-10)


def test_a_free_bias_and_a_solve_only_help(data: tuple[Tensor, ...]) -> None:
    x, y, weight, bias = data
    moments = gather(x, y)
    plain, _ = solve_projection(moments, weight)
    free, shift = solve_projection(moments, weight, bias)
    assert residual_error(moments, plain) < residual_error(moments, weight)
    assert residual_error(moments, free, shift) < min(
        residual_error(moments, plain), residual_error(moments, weight, bias)
    )


def test_without_ridge_a_linear_target_is_found_exactly(data: tuple[Tensor, ...]) -> None:
    x, _, weight, bias = data
    solved, none = solve_projection(gather(x, x @ weight.T), torch.zeros_like(weight), None, 0.0)
    assert none is None
    torch.testing.assert_close(solved, weight, rtol=1e-7, atol=1e-7)
    solved, shift = solve_projection(gather(x, x @ weight.T + bias), torch.zeros_like(weight), bias * 0, 0.0)
    torch.testing.assert_close(solved, weight, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(shift, bias, rtol=1e-7, atol=1e-7)


def test_a_huge_ridge_keeps_the_weight_and_moves_only_the_bias(data: tuple[Tensor, ...]) -> None:
    x, y, weight, bias = data
    solved, _ = solve_projection(gather(x, y), weight, None, 1e12)
    torch.testing.assert_close(solved, weight, rtol=1e-8, atol=1e-8)
    solved, shift = solve_projection(gather(x, y), weight, bias, 1e12)
    torch.testing.assert_close(solved, weight, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(shift, (y - x @ weight.T).mean(0), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_dead_inputs_keep_their_weight(data: tuple[Tensor, ...], ridge: float) -> None:
    _, y, weight, bias = data
    dead = gather(torch.zeros(TOKENS, INPUTS).double(), y)
    torch.testing.assert_close(solve_projection(dead, weight, None, ridge)[0], weight)
    solved, shift = solve_projection(dead, weight, bias, ridge)
    torch.testing.assert_close(solved, weight)
    torch.testing.assert_close(shift, y.mean(0))


def test_repeated_inputs_share_the_work(data: tuple[Tensor, ...]) -> None:
    x, y, weight, _ = data
    double = torch.cat((x, x), 1)
    solved, _ = solve_projection(gather(double, y), torch.cat((weight, weight), 1))
    assert torch.isfinite(solved).all()
    torch.testing.assert_close(solved[:, :INPUTS], solved[:, INPUTS:], rtol=1e-6, atol=1e-6)


def test_the_result_has_the_weights_type(data: tuple[Tensor, ...]) -> None:
    x, y, weight, bias = data
    solved, shift = solve_projection(gather(x.float(), y.float()), weight.float(), bias.float())
    assert solved.dtype == shift.dtype == torch.float32
    wanted, _ = slow_twins.fit_with_bias(x, y, weight, 1e-3)
    torch.testing.assert_close(solved, wanted.float(), rtol=1e-3, atol=1e-3)


def test_damping_and_inverse() -> None:
    gram = torch.tensor([[4.0, 0.0], [0.0, 2.0]]).double()
    torch.testing.assert_close(damp_gram(gram, 0.5), torch.tensor([[5.5, 0.0], [0.0, 3.5]]).double())
    torch.testing.assert_close(invert_gram(gram, 0.5), torch.tensor([[1 / 5.5, 0.0], [0.0, 1 / 3.5]]).double())
    assert float(damp_gram(gram * 0).diagonal().min()) > 0
