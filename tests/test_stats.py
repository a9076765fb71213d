"""Moments: many small batches equal one big one, in every order and size; sums do not drift; sinks are left out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from compress import stats
from compress.stats import SINK_RATIO, BlockSums, ChannelSums, Moments, add_gram, ordinary_tokens

SIZES = [(1, 1, 1), (7, 300, 1), (stats.CHUNK - 1, 1, stats.CHUNK + 1), (stats.CHUNK, 2 * stats.CHUNK + 3)]


def draw(rows: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=dtype) + 0.5


def cut(x: Tensor, sizes: tuple[int, ...]) -> Iterator[Tensor]:
    return iter(x.split(list(sizes)))


def assert_moments(found: Moments, x: Tensor, y: Tensor) -> None:
    close = {"rtol": 1e-12, "atol": 1e-9}
    torch.testing.assert_close(found.gram, x.T @ x, **close)
    torch.testing.assert_close(found.total, x.sum(0), **close)
    torch.testing.assert_close(found.cross, x.T @ y, **close)
    torch.testing.assert_close(found.target_total, y.sum(0), **close)
    assert found.count == len(x)


@pytest.mark.parametrize("sizes", SIZES)
def test_moments_in_batches_equal_one_sum(sizes: tuple[int, ...]) -> None:
    x, y = draw(sum(sizes), 5), draw(sum(sizes), 3, 1)
    moments = Moments.empty(5, 3)
    for rows, wanted in zip(cut(x, sizes), cut(y, sizes), strict=True):
        moments.update(rows, wanted)
    assert_moments(moments, x, y)


@pytest.mark.parametrize("sizes", SIZES)
def test_merged_moments_equal_one_sum_in_any_grouping(sizes: tuple[int, ...]) -> None:
    x, y = draw(sum(sizes), 5), draw(sum(sizes), 3, 1)
    parts = []
    for rows, wanted in zip(cut(x, sizes), cut(y, sizes), strict=True):
        parts.append(Moments.empty(5, 3))
        parts[-1].update(rows, wanted)
    from_left, from_right = parts[0], parts[-1]
    for part in parts[1:]:
        from_left = from_left.merge(part)
    for part in parts[-2::-1]:
        from_right = part.merge(from_right)
    assert_moments(from_left, x, y)
    assert_moments(from_right, x, y)
    assert_moments(Moments.empty(5, 3).merge(from_left), x, y)


def test_merging_leaves_its_parts_alone() -> None:
    parts = [Moments.empty(4), Moments.empty(4)]
    for seed, part in enumerate(parts):
        part.update(draw(6, 4, seed))
    before = [part.gram.clone() for part in parts]
    parts[0].merge(parts[1]).update(draw(6, 4, 2))
    assert all(torch.equal(part.gram, gram) for part, gram in zip(parts, before, strict=True))
    assert [part.count for part in parts] == [6, 6]


def test_no_tokens_change_nothing() -> None:
    moments = Moments.empty(4, 2)
    moments.update(torch.empty(0, 4), torch.empty(0, 2))
    assert moments.count == 0
    assert not moments.gram.any()


@pytest.mark.parametrize(("width", "block"), [(1, 1), (10, 3), (10, 5), (9, 16), (10, 1), (12, 11)])
def test_gram_in_blocks_equals_the_product(width: int, block: int) -> None:
    rows, gram = draw(20, width), torch.ones(width, width, dtype=torch.float64)
    add_gram(gram, rows, block)
    torch.testing.assert_close(gram, rows.T @ rows + 1, rtol=1e-12, atol=1e-12)


def test_gram_beyond_the_standard_block() -> None:
    rows = draw(3, 1030)
    gram = torch.zeros(1030, 1030, dtype=torch.float64)
    add_gram(gram, rows)
    torch.testing.assert_close(gram, rows.T @ rows, rtol=1e-12, atol=1e-12)


def test_float64_sums_do_not_drift_on_a_long_stream() -> None:
    """Equal large increments are the worst case of a running float32 sum: each rounding goes the same way."""
    row = torch.tensor([[1.1, 33.3, 0.07]])
    moments, naive = Moments.empty(3, 3), torch.zeros(3, 3)
    channels = ChannelSums.empty(3)
    count = 8_000
    for _ in range(count):
        moments.update(row, row)
        channels.update(row)
        naive += row.T @ row
    exact = count * (row.double().T @ row.double())
    error = ((moments.gram - exact) / exact).abs().max()
    assert error < 2e-7  # one float32 product, however long the stream
    assert ((naive.double() - exact) / exact).abs().max() > 100 * error  # the stream is adverse indeed
    assert ((moments.cross - exact) / exact).abs().max() < 2e-7
    assert ((channels.square - exact.diagonal()) / exact.diagonal()).abs().max() < 2e-7


@pytest.mark.parametrize("sizes", SIZES)
def test_channel_sums_in_batches_and_merged_equal_one_sum(sizes: tuple[int, ...]) -> None:
    x = draw(sum(sizes), 4)
    running, merged = ChannelSums.empty(4), ChannelSums.empty(4)
    for rows in cut(x, sizes):
        running.update(rows)
        part = ChannelSums.empty(4)
        part.update(rows)
        merged = merged.merge(part)
    for found in (running, merged):
        torch.testing.assert_close(found.absolute, x.abs().sum(0), rtol=1e-12, atol=0)
        torch.testing.assert_close(found.square, x.pow(2).sum(0), rtol=1e-12, atol=0)
        assert found.count == len(x)


@pytest.mark.parametrize("sizes", SIZES)
def test_block_sums_in_batches_and_merged_equal_one_sum(sizes: tuple[int, ...]) -> None:
    before, after = draw(sum(sizes), 4), draw(sum(sizes), 4, 1)
    running, merged = BlockSums(), BlockSums()
    for rows, then in zip(cut(before, sizes), cut(after, sizes), strict=True):
        running.update(rows, then)
        part = BlockSums()
        part.update(rows, then)
        merged = merged.merge(part)
    cosines = (before * after).sum(1) / before.norm(dim=1) / after.norm(dim=1)
    for found in (running, merged):
        assert found.influence == pytest.approx(1 - float(cosines.mean()), rel=1e-10)
        assert found.square_out == pytest.approx(float(after.pow(2).sum()), rel=1e-12)
        assert found.change == pytest.approx(float((after - before).pow(2).sum()), rel=1e-12)


def test_influence_of_known_blocks() -> None:
    x = draw(9, 4)
    same, turned = BlockSums(), BlockSums()
    same.update(x, 3 * x)
    turned.update(x, -x)
    assert same.influence == pytest.approx(0, abs=1e-12)
    assert turned.influence == pytest.approx(2, abs=1e-12)
    assert BlockSums().influence == 1


# Tokens that count


def plant_sinks(places: list[tuple[int, int]]) -> Tensor:
    """Tokens of about unit size with one massive channel in each token of `places`."""
    x = draw(3 * 10, 16, dtype=torch.float32).view(3, 10, 16)
    for window, token in places:
        x[window, token, 5] = -1.5 * SINK_RATIO * float(x[window, token].abs().median())
    return x


def test_planted_sinks_are_left_out_and_counted() -> None:
    places = [(0, 4), (2, 9), (2, 1)]
    mask, count = ordinary_tokens(plant_sinks(places))
    out = {(window, 0) for window in range(3)} | set(places)
    for window, token in itertools.product(range(3), range(10)):
        assert bool(mask[window, token]) == ((window, token) not in out)
    assert count == 3


def test_the_first_token_is_left_out_but_not_counted() -> None:
    mask, count = ordinary_tokens(plant_sinks([(1, 0)]))
    assert count == 0
    assert not mask[:, 0].any()
    assert mask[:, 1:].all()


def test_first_tokens_stay_when_asked_or_when_alone() -> None:
    mask, count = ordinary_tokens(plant_sinks([(1, 0)]), skip_first=False)
    assert count == 1
    assert mask[[0, 2], 0].all()
    assert not mask[1, 0]
    assert ordinary_tokens(plant_sinks([])[:, :1])[0].all()


def test_the_bound_is_a_ratio_not_a_size() -> None:
    x = plant_sinks([(1, 3)])
    for scale in (1e-4, 1e4):
        mask, count = ordinary_tokens(x * scale)
        assert count == 1
        assert not mask[1, 3]
    assert ordinary_tokens(torch.zeros(1, 4, 8))[1] == 0


@pytest.mark.parametrize("massive", [0, 1, 2, 4])
@pytest.mark.parametrize("width", [48, 64, 1024])
def test_sinks_are_found_as_by_the_plain_rule(width: int, massive: int) -> None:
    """On both sides of the bound, for the few massive channels that sinks have."""
    x = draw(400, width, dtype=torch.float32).view(20, 20, width) - 0.5
    sizes = torch.linspace(0.5, 2.0, 20)[:, None, None] * SINK_RATIO
    x[..., :massive] = sizes * x.abs().median(-1, keepdim=True).values
    size = x.abs()
    plain = size.amax(-1) > SINK_RATIO * size.median(-1).values
    mask, count = ordinary_tokens(x, skip_first=False)
    assert torch.equal(mask, ~plain)
    assert count == int(plain.sum())
    assert bool(massive) == bool(count)
    assert count < 400
