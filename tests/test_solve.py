"""The repair of a projection equals least squares on the stacked data, in its limits too."""

from __future__ import annotations

import pytest
import slow_twins
import torch
from torch import Tensor

from compress.errors import UserError
from compress.solve import (
    RIDGE,
    damp_gram,
    invert_gram,
    short_of_tokens,
    solve_bias,
    solve_diagonal,
    solve_projection,
)
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


@pytest.mark.parametrize("tokens", [1, 3, 7, 4 * INPUTS - 1, 4 * INPUTS, 4 * INPUTS + 1])
def test_few_tokens_raise_the_ridge(data: tuple[Tensor, ...], tokens: int) -> None:
    x, y, weight, bias = (data[0][:tokens], data[1][:tokens], *data[2:])
    short = short_of_tokens(tokens, INPUTS)
    assert short == (tokens < 4 * INPUTS)
    ridge = RIDGE * 4 * INPUTS / tokens if short else RIDGE
    solved, _ = solve_projection(gather(x, y), weight)
    torch.testing.assert_close(solved, slow_twins.fit_projection(x, y, weight, ridge), rtol=1e-8, atol=1e-9)
    if tokens == 1:
        return  # no spread about the mean: the bias takes it all
    solved, shift = solve_projection(gather(x, y), weight, bias)
    wanted, wanted_shift = slow_twins.fit_with_bias(x, y, weight, ridge)
    torch.testing.assert_close(solved, wanted, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(shift, wanted_shift, rtol=1e-8, atol=1e-9)


def test_a_free_bias_and_a_solve_only_help(data: tuple[Tensor, ...]) -> None:
    x, y, weight, bias = data
    moments = gather(x, y)
    plain, _ = solve_projection(moments, weight)
    pairs = ((weight, None), (weight, bias), (plain, None), solve_projection(moments, weight, bias))
    cut, cut_biased, solved, freed = (slow_twins.sum_errors(x, y, *pair) for pair in pairs)
    assert solved < cut
    assert freed < min(solved, cut_biased)


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


# Cheaper repairs


def channel_errors(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Squared error of each output channel, summed over tokens."""
    return (x @ weight.T + (0 if bias is None else bias) - y).pow(2).sum(0)


@pytest.mark.parametrize("biased", [False, True])
def test_the_diagonal_equals_a_line_per_channel(data: tuple[Tensor, ...], biased: bool) -> None:
    x, y, weight, bias = data
    solved, shift = solve_diagonal(gather(x, y), weight, bias if biased else None)
    lines = slow_twins.fit_lines(x @ weight.T, y, through_origin=not biased)
    slopes, shifts = (torch.tensor(part, dtype=torch.float64) for part in zip(*lines, strict=True))
    torch.testing.assert_close(solved, slopes[:, None] * weight, rtol=1e-9, atol=1e-9)
    if biased:
        torch.testing.assert_close(shift, shifts, rtol=1e-9, atol=1e-9)
    else:
        assert shift is None


@pytest.mark.parametrize("biased", [False, True])
def test_the_diagonal_never_makes_a_channel_worse(data: tuple[Tensor, ...], biased: bool) -> None:
    for seed in range(5):
        x, y, weight, bias = data[0], draw(TOKENS, OUTPUTS, seed=10 + seed), draw(OUTPUTS, INPUTS, seed=seed), data[3]
        old = bias if biased else None
        before = channel_errors(x, y, weight, old)
        after = channel_errors(x, y, *solve_diagonal(gather(x, y), weight, old))
        assert (after <= before * (1 + 1e-12)).all()
        assert (after < 0.9 * before).any()


def test_what_the_diagonal_leaves_is_the_variance_that_correlation_lacks(data: tuple[Tensor, ...]) -> None:
    """Residual = sum over channels of tokens * var(y) * (1 - rho^2) (methods 2.5)."""
    x, y, weight, bias = data
    wanted = 0.0
    for z, target in zip((x @ weight.T).T, y.T, strict=True):
        rho = torch.corrcoef(torch.stack((z, target)))[0, 1]
        wanted += float(TOKENS * target.var(correction=0) * (1 - rho**2))
    left = slow_twins.sum_errors(x, y, *solve_diagonal(gather(x, y), weight, bias))
    assert left == pytest.approx(wanted, rel=1e-9)


def test_nothing_removed_leaves_everything_as_it_was(data: tuple[Tensor, ...]) -> None:
    x, _, weight, bias = data
    close = {"rtol": 1e-10, "atol": 1e-10}
    solved, shift = solve_diagonal(gather(x, x @ weight.T + bias), weight, bias)
    torch.testing.assert_close(solved, weight, **close)
    torch.testing.assert_close(shift, bias, **close)
    solved, none = solve_diagonal(gather(x, x @ weight.T), weight)
    assert none is None
    torch.testing.assert_close(solved, weight, **close)
    torch.testing.assert_close(solve_bias(gather(x, x @ weight.T + bias), weight, bias)[1], bias, **close)


def test_constant_outputs_keep_their_factor(data: tuple[Tensor, ...]) -> None:
    x, y, weight, bias = data
    x, weight = x.clone(), weight.clone()
    x[:, 0] = 3.7
    weight[0] = 0
    weight[1, 1:] = 0
    for old in (None, bias):
        solved, shift = solve_diagonal(gather(x, y), weight, old)
        assert torch.isfinite(solved).all()
        assert torch.equal(solved[0], weight[0])
    torch.testing.assert_close(solved[1], weight[1])
    torch.testing.assert_close(shift[:2], (y - x @ weight.T).mean(0)[:2])


def test_the_bias_repair_moves_the_mean_alone(data: tuple[Tensor, ...]) -> None:
    """As FLAP: the bias takes in what the removed inputs added on average (methods 8.3)."""
    x, _, weight, bias = data
    y, kept, gone = x @ weight.T + bias, torch.tensor([0, 2, 3, 6]), torch.tensor([1, 4, 5])
    solved, shift = solve_bias(gather(x[:, kept], y), weight[:, kept], bias)
    assert torch.equal(solved, weight[:, kept])
    torch.testing.assert_close(shift, bias + weight[:, gone] @ x[:, gone].mean(0), rtol=1e-10, atol=1e-10)
    before, after = (channel_errors(x[:, kept], y, weight[:, kept], each) for each in (bias, shift))
    assert (after < before).all()
    with pytest.raises(UserError, match="moves only biases"):
        solve_bias(gather(x[:, kept], y), weight[:, kept])


def test_each_repair_leaves_less_than_the_one_before(data: tuple[Tensor, ...]) -> None:
    x, y, weight, bias = data
    moments = gather(x, y)
    found = [repair(moments, weight, bias) for repair in (solve_bias, solve_diagonal, solve_projection)]
    errors = [slow_twins.sum_errors(x, y, *pair) for pair in ((weight, bias), *found)]
    assert errors == sorted(errors, reverse=True)
    assert all(after < 0.999 * before for before, after in zip(errors, errors[1:], strict=False))


def test_cheap_repairs_keep_the_weights_type(data: tuple[Tensor, ...]) -> None:
    x, y, weight, bias = (part.float() for part in data)
    for repair in (solve_diagonal, solve_bias):
        solved, shift = repair(gather(x, y), weight, bias)
        assert solved.dtype == shift.dtype == torch.float32
