r"""One option for each layer so that the sum of scores is largest within a budget of cost.

Partial choices are extended layer by layer, and one goes if another costs no more and scores
as much, or if the most that it may become is less than a choice already known. With any
price $\lambda \ge 0$ of cost, a choice within the budget b scores at most

$$\lambda b + \sum_i \max_j (s_{ij} - \lambda c_{ij}).$$

`scipy.optimize.milp` does not do: it stops within 1e-6 of the best score, whatever the scale of
the scores, and takes any of equal scores, not the cheapest.

Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, chapter 11.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

LIMIT = 20_000
DUST = 1e-9  # of the scores: what rounding may make of a sum

Table = Float[np.ndarray, "layers options"]
Options = Int[np.ndarray, " layers"]


class Chosen(NamedTuple):
    """The option of each layer, their scores and costs summed, and what may be missing.

    No choice within the budget scores more than `score` and `gap` together.
    """

    options: Options
    score: float
    cost: float
    gap: float


class _Frontier(NamedTuple):
    """Partial choices by rising cost, each of a higher score than all before it.

    `parent` is the choice of the layers before the last, `option` that of the last.
    """

    cost: Float[np.ndarray, " n"]
    score: Float[np.ndarray, " n"]
    parent: Int[np.ndarray, " n"]
    option: Int[np.ndarray, " n"]

    def at(self, index: np.ndarray) -> "_Frontier":
        return _Frontier(*(v[index] for v in self))


def optimal(
    scores: Table, costs: Table, budget: float | int, *, limit: int = LIMIT
) -> Chosen:
    """The best choice, or with more than `limit` partial choices one with a known gap.

    To leave a layer as it is must be an option, with its own score and cost. An infinite
    cost marks an option that is not there. Of two equal scores it is the lower cost.

    Args:
        scores: the score of each option of each layer.
        costs: its cost; infinite where there is no such option.
        budget: the largest cost of all together.
        limit: how many partial choices are kept at most; default 20,000.

    Returns:
        The option of each layer, score and cost, and how much more could be reached.

    Raises:
        ValueError: where the cheapest options of all layers cost more than the budget.
    """
    there = np.isfinite(costs) & np.isfinite(scores)
    least = np.where(there, costs, np.inf).min(axis=1)
    if not least.sum() <= budget:
        raise ValueError(too_tight(least.sum(), budget))
    scores, costs = np.where(there, scores, -np.inf), np.where(there, costs, 0.0)
    price, known = _best_price(scores, costs, budget)
    most = (scores - price * costs).max(axis=1)
    bound = most.sum() + price * budget
    floor = _sum(scores, known) - DUST * np.abs(scores[there]).max() * len(scores)
    most_after, least_after = _after(most), _after(least)
    layers, exact = [_Frontier(*np.zeros((2, 1)), *np.zeros((2, 1), int))], True
    for layer in range(len(scores)):
        new = _extended(layers[-1], scores[layer], costs[layer])
        fits = new.cost + least_after[layer] <= budget
        hope = new.score + price * (budget - new.cost) + most_after[layer]
        new = _undominated(new.at(fits & (hope >= floor)))
        exact = exact and new.cost.size <= limit
        layers.append(_thinned(new, limit))
    options = _traced(layers) if layers[-1].cost.size else known
    worse = _sum(scores, options) < _sum(scores, known)
    if worse or _sum(costs, options) > budget:
        options = known
    score = _sum(scores, options)
    gap = 0.0 if exact else max(0.0, float(bound) - score)
    return Chosen(options, score, _sum(costs, options), gap)


def too_tight(least: float | int, budget: float | int) -> str:
    """What to say when nothing is within the budget.

    Args:
        least: the smallest cost that was reached.
        budget: the largest cost that was allowed, in the same unit.

    Returns:
        A clause for an error message.
    """
    return f"no choice costs {budget:.6g} or less: the smallest cost reached is {least:.6g}"


def _best_price(
    scores: Table, costs: Table, budget: float | int
) -> tuple[float, Options]:
    """The lowest price at which the best options are within the budget, and these."""

    def at(price: float) -> Options:
        worth = scores - price * costs
        best = worth == worth.max(axis=1, keepdims=True)
        return np.where(best, costs, np.inf).argmin(axis=1)

    if _sum(costs, at(0.0)) <= budget:
        return 0.0, at(0.0)
    low, high = 0.0, 1e-12
    while _sum(costs, at(high)) > budget:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        within = _sum(costs, at(middle)) <= budget
        low, high = (low, middle) if within else (middle, high)
    return high, at(high)


def _extended(
    old: _Frontier,
    scores: Float[np.ndarray, " options"],
    costs: Float[np.ndarray, " options"],
) -> _Frontier:
    """Every partial choice with every option of one more layer that is there."""
    options = np.flatnonzero(np.isfinite(scores))
    parent, option = np.divmod(np.arange(old.cost.size * options.size), options.size)
    option = options[option]
    return _Frontier(
        old.cost[parent] + costs[option],
        old.score[parent] + scores[option],
        parent,
        option,
    )


def _undominated(choices: _Frontier) -> _Frontier:
    choices = choices.at(np.lexsort((-choices.score, choices.cost)))
    before = np.maximum.accumulate(np.append(-np.inf, choices.score))[:-1]
    return choices.at(choices.score > before)


def _thinned(choices: _Frontier, limit: int) -> _Frontier:
    """The best of each of so many ranges of cost, and the cheapest of all."""
    if choices.cost.size <= limit:
        return choices
    low, high = choices.cost[0], choices.cost[-1]
    place = np.floor((choices.cost - low) / (high - low) * (limit - 2))
    last: Bool[np.ndarray, " n"] = np.append(place[1:] != place[:-1], True)
    last[0] = True
    return choices.at(last)


def _traced(layers: list[_Frontier]) -> Options:
    """The options of the best choice of all layers."""
    place, options = layers[-1].cost.size - 1, []
    for layer in layers[:0:-1]:
        options.append(layer.option[place])
        place = layer.parent[place]
    return np.array(options[::-1])


def _after(v: Float[np.ndarray, " layers"]) -> Float[np.ndarray, " layers"]:
    """For each layer the sum over all after it."""
    return np.append(np.cumsum(v[:0:-1])[::-1], 0.0)


def _sum(table: Table, options: Options) -> float:
    return float(table[np.arange(len(options)), options].sum())
