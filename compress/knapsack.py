"""The multiple-choice knapsack, exact: one option of each row, least summed loss, summed cost within a budget.

Numbers in, numbers out. A Lagrangian relaxation bounds every row's options; what survives goes through dynamic
programming over Pareto states, pruned by dominance and by the linear relaxation of the rows to come. This is the idea
of Pisinger, "A minimal algorithm for the multiple-choice knapsack problem" (1995), in array form and with real losses
(our reconstruction: the text was not at hand). Nothing is made convex.

One rule settles ties, up to rounding: the least loss, then the least cost, then row by row from the first the option
of the lower column.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# States times options looked at in one search, about a second or two of work. Where more are alive the least promising
# states go, and what they could have given is then in the bound. Unlike layers stay far below it.
MOST_WORK = 16_000_000
# Children of states are bounded this many at a time, so that memory does not follow states times options.
BLOCK = 1 << 20
# Losses are sums of at most a few hundred rounded terms; whatever lies this close to the best is kept, not pruned.
ROUNDING = 2.0**-44


# Options as arrays: one row per layer, one column per option, in the order of preference among ties.


@dataclass(frozen=True)
class Options:
    """Costs and losses `[rows, options]`; a loss of infinity marks a column that the row does not have."""

    costs: Ints
    losses: Floats


def stack_options(rows: Iterable[tuple[Ints, Floats]]) -> Options:
    """Pad the options of all rows to one width."""
    listed = list(rows)
    shape = len(listed), max((len(costs) for costs, _ in listed), default=1)
    costs, losses = np.zeros(shape, np.int64), np.full(shape, np.inf)
    for row, (cost, loss) in enumerate(listed):
        costs[row, : len(cost)], losses[row, : len(loss)] = cost, loss
    return Options(costs, losses)


# The Lagrangian relaxation: a price per unit of cost instead of the budget.


@dataclass(frozen=True)
class Point:
    """One option per row, with the summed loss and cost."""

    columns: Ints
    loss: float
    cost: int


@dataclass(frozen=True)
class Relaxation:
    """A bound under the loss of all choices within the budget, the price (nats per cost unit), a choice that fits."""

    bound: float
    price: float
    fitting: Point


def measure_point(options: Options, columns: Ints) -> Point:
    """Sum loss and cost of one option per row."""
    rows = np.arange(len(columns))
    return Point(columns, math.fsum(options.losses[rows, columns]), int(options.costs[rows, columns].sum()))


def find_cheapest(options: Options) -> Point:
    """Return the choice of least cost, and of least loss among those."""
    costs = np.where(np.isfinite(options.losses), options.costs, np.iinfo(np.int64).max)
    cheapest = costs == costs.min(axis=1, keepdims=True)
    return measure_point(options, np.where(cheapest, options.losses, np.inf).argmin(axis=1))


def price_options(options: Options, price: float) -> Floats:
    """Return loss plus priced cost `[rows, options]`."""
    priced: Floats = options.losses + price * options.costs
    return priced


def allow_rounding(options: Options, price: float) -> float:
    """Return more than rounding can move a sum of losses and priced costs over the rows."""
    finite = np.isfinite(options.losses)
    largest = np.where(finite, np.abs(options.losses) + price * options.costs, 0.0).max(axis=1)
    return ROUNDING * float(largest.sum())


def relax_options(options: Options, budget: int) -> Relaxation | None:
    """Maximise the Lagrangian bound over the price by cutting planes; None where nothing fits the budget.

    Each round prices cost along the chord between the best choice that fits and one that does not; both are corners of
    the lower hull of (cost, loss), and so is what the price finds below the chord, until there is nothing below it.
    """
    high = find_cheapest(options)
    if high.cost > budget:
        return None
    low = measure_point(options, options.losses.argmin(axis=1))
    if low.cost <= budget:
        return Relaxation(low.loss - allow_rounding(options, 0.0), 0.0, low)
    while True:
        price = (high.loss - low.loss) / (low.cost - high.cost)
        point = measure_point(options, price_options(options, price).argmin(axis=1))
        if not high.cost < point.cost < low.cost:
            bound = high.loss + price * (high.cost - budget)
            return Relaxation(bound - allow_rounding(options, price), price, high)
        low, high = (low, point) if point.cost <= budget else (point, high)


def fill_budget(options: Options, point: Point, budget: int) -> Point:
    """Spend what a choice leaves of the budget, row by row from the first."""
    columns, spare = point.columns.copy(), budget - point.cost
    for row, column in enumerate(columns):
        costs = options.costs[row]
        fitting = np.where(costs <= costs[column] + spare, options.losses[row], np.inf)
        columns[row] = fitting.argmin()
        spare += int(costs[column] - costs[columns[row]])
    return measure_point(options, columns)


# The search: states after each row, pruned by dominance and by the relaxation of the rows to come.


@dataclass(frozen=True)
class Menu:
    """Options of one row that can be part of a best choice, none dominated, in the order of their columns."""

    costs: Ints
    losses: Floats
    columns: Ints


@dataclass(frozen=True)
class Tail:
    """The relaxation of all rows to come: least loss at a cost, linear between corners that are choices."""

    costs: Ints
    losses: Floats
    slopes: Floats

    def estimate(self, budgets: Ints) -> tuple[Floats, Floats]:
        """Return, within each budget, a bound under the loss of the rows to come and a loss that they can have."""
        corner = np.searchsorted(self.costs, budgets, side="right") - 1
        reached = np.where(corner < 0, np.inf, self.losses[corner])
        return reached + self.slopes[corner] * (budgets - self.costs[corner]), reached


@dataclass(frozen=True)
class States:
    """Choices for the rows so far, none dominated, in the order of preference among ties."""

    costs: Ints
    losses: Floats
    parents: Ints
    columns: Ints

    def take(self, index: Ints) -> States:
        """Return the states at these places."""
        return States(self.costs[index], self.losses[index], self.parents[index], self.columns[index])


def find_pareto(costs: Ints, losses: Floats) -> Ints:
    """Return, rising, the places of the undominated pairs; of equal pairs the first."""
    order: Ints = np.lexsort((losses, costs)).astype(np.int64)  # stable, as the order of preference asks
    losses = losses[order]
    kept: Ints = np.sort(order[np.append(True, losses[1:] < np.minimum.accumulate(losses)[:-1])])
    return kept


def make_menus(options: Options, relaxed: Relaxation, ceiling: float) -> list[Menu]:
    """Drop the options that no choice below the ceiling can hold, by their priced loss above the row's best."""
    priced = price_options(options, relaxed.price)
    alive = priced - priced.min(axis=1, keepdims=True) <= ceiling - relaxed.bound
    menus = []
    for costs, losses, row in zip(options.costs, options.losses, alive, strict=True):
        columns = np.flatnonzero(row)
        columns = columns[find_pareto(costs[columns], losses[columns])]
        menus.append(Menu(costs[columns], losses[columns], columns))
    return menus


def find_hull(costs: Ints, losses: Floats) -> list[int]:
    """Return, cost rising, the places of the corners of the lower convex hull of undominated pairs."""
    x, y = costs.tolist(), losses.tolist()
    kept: list[int] = []
    for new in np.argsort(costs).tolist():
        while len(kept) > 1:
            first, middle = kept[-2], kept[-1]
            if (y[middle] - y[first]) * (x[new] - x[first]) < (y[new] - y[first]) * (x[middle] - x[first]):
                break
            kept.pop()
        kept.append(new)
    return kept


def make_tails(menus: Sequence[Menu]) -> list[Tail]:
    """Return the relaxation of the rows from each place on, the last one of none: hull edges, steepest first."""
    hulls = [find_hull(menu.costs, menu.losses) for menu in menus]
    steps = [np.diff(menu.costs[hull]) for menu, hull in zip(menus, hulls, strict=True)]
    gains = [np.diff(menu.losses[hull]) for menu, hull in zip(menus, hulls, strict=True)]
    owner = np.repeat(np.arange(len(menus)), [len(step) for step in steps])
    step, gain = np.concatenate([*steps, np.zeros(0, np.int64)]), np.concatenate([*gains, np.zeros(0)])
    order = np.argsort(gain / step, kind="stable")
    step, gain, owner = step[order], gain[order], owner[order]
    tails = []
    for place in range(len(menus) + 1):
        mine = owner >= place
        cost = sum(int(menu.costs.min()) for menu in menus[place:])
        loss = math.fsum(menu.losses.max() for menu in menus[place:])
        costs, losses = np.append(0, np.cumsum(step[mine])), np.append(0.0, np.cumsum(gain[mine]))
        tails.append(Tail(cost + costs, loss + losses, np.append(gain[mine] / step[mine], 0.0)))
    return tails


def list_children(states: States, menu: Menu) -> Iterator[States]:
    """Yield each state with each option of the next row, in blocks of whole states."""
    width = len(menu.costs)
    for start in range(0, len(states.costs), max(1, BLOCK // width)):
        part = slice(start, start + max(1, BLOCK // width))
        costs = np.add.outer(states.costs[part], menu.costs).ravel()
        losses = np.add.outer(states.losses[part], menu.losses).ravel()
        parents = np.repeat(np.arange(start, start + len(costs) // width), width)
        yield States(costs, losses, parents, np.tile(menu.columns, len(costs) // width))


def join_states(parts: Sequence[States]) -> States:
    """Join blocks of states and drop the dominated ones."""
    names = "costs", "losses", "parents", "columns"
    joined = States(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})
    return joined.take(find_pareto(joined.costs, joined.losses))


@dataclass
class Search:
    """What the search knows: the work left, the loss to beat, the least bound of the states given up."""

    budget: int
    rounding: float
    work: int
    ceiling: float = math.inf
    given_up: float = math.inf

    def advance(self, states: States, menu: Menu, tail: Tail) -> States:
        """Return the states after one more row that may still lead to the least loss."""
        parts = []
        for block in list_children(states, menu):
            least, reached = tail.estimate(self.budget - block.costs)
            self.ceiling = min(self.ceiling, float((block.losses + reached).min()))
            alive = block.losses + least <= self.ceiling + self.rounding
            parts.append(block.take(np.flatnonzero(alive)))
        self.work -= len(states.costs) * len(menu.costs)
        return join_states(parts)

    def limit(self, states: States, tail: Tail, most: int) -> States:
        """Give up the states of the highest bounds above the limit, never the one that surely leads furthest."""
        if len(states.costs) <= most:
            return states
        least, reached = tail.estimate(self.budget - states.costs)
        bounds = states.losses + least
        bounds[(states.losses + reached).argmin()] = -np.inf
        order = np.argsort(bounds, kind="stable")
        self.given_up = min(self.given_up, float(bounds[order[most]]))
        return states.take(np.sort(order[:most]))


def search_menus(menus: Sequence[Menu], search: Search) -> list[int]:
    """Return the column of each row in the best choice found."""
    none, tails = np.zeros(1, np.int64), make_tails(menus)
    trail = [States(none, np.zeros(1), none, none)]
    for row, menu in enumerate(menus):
        share = search.work // (len(menus) - row)
        trail[-1] = search.limit(trail[-1], tails[row], max(1, share // len(menu.costs)))
        trail.append(search.advance(trail[-1], menu, tails[row + 1]))
    columns, place = [], int(trail[-1].losses.argmin())
    for states in trail[:0:-1]:
        columns.append(int(states.columns[place]))
        place = int(states.parents[place])
    return columns[::-1]


def solve_options(options: Options, budget: int, work: int = MOST_WORK) -> tuple[Point, float] | None:
    """Return the choice of least loss within the budget and a proven bound under all choices; None if nothing fits."""
    relaxed = relax_options(options, budget)
    if relaxed is None:
        return None
    rounding = allow_rounding(options, relaxed.price)
    filled = fill_budget(options, relaxed.fitting, budget)
    menus = make_menus(options, relaxed, filled.loss + rounding)
    search = Search(budget, rounding, work)
    found = measure_point(options, np.array(search_menus(menus, search), np.int64))
    best = min(found, filled, key=lambda point: (point.loss, point.cost))
    return best, min(best.loss, search.given_up)
