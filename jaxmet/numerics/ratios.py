"""Which ratio each layer is compressed to, from a table of scores; on the host, in float64.

A row of the table is a layer, a column a ratio of cost after to cost before; an entry is the
score of the network with this layer alone compressed to this ratio.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxmet.numerics.knapsack import Chosen as Chosen
from jaxmet.numerics.knapsack import optimal as optimal
from jaxmet.numerics.knapsack import too_tight

Table = Float[np.ndarray, "layers ratios"]


def monotone(scores: Table, weights: Table | None = None) -> Table:
    r"""The nearest scores that never fall as the ratio rises, from left to right.

    Of all rising rows the one of least $\sum_j w_j (\hat s_j - s_j)^2$: neighbours in the
    wrong order are pooled into their mean until none is left.

    Ayer et al., An Empirical Distribution Function for Sampling with Incomplete
    Information, 1955.

    Args:
        scores: scores of each layer, by rising ratio.
        weights: how much each score counts; default None: equally.

    Returns:
        Scores that never fall.
    """
    weights = np.ones_like(scores) if weights is None else weights
    return np.stack([_pooled(s, w) for s, w in zip(scores, weights, strict=True)])


def _pooled(scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    pools: list[tuple[float, float, int]] = []  # mean, weight, how many
    for mean, weight, count in zip(scores, weights, [1] * scores.size, strict=True):
        while pools and pools[-1][0] > mean:
            before, heavy, more = pools.pop()
            mean = (before * heavy + mean * weight) / (heavy + weight)
            weight, count = heavy + weight, count + more
        pools.append((mean, weight, count))
    return np.repeat([p[0] for p in pools], [p[2] for p in pools])


def greedy(
    ratios: Float[np.ndarray, " ratios"],
    scores: Table,
    costs: Table,
    full: Float[np.ndarray, " layers"],
    target: float | int,
    *,
    other: float | int = 0.0,
) -> Int[np.ndarray, " layers"]:
    """The ratio of each layer under one threshold for all scores; -1 leaves a layer as it is.

    From mild to strong a layer goes on as far as its scores stay at the threshold or above,
    and to the end if the last does. Of the thresholds that make a difference it is the
    highest with a cost of at most `target` of the whole, which is `full` and the `other`
    cost of the network.

    AIMET's greedy selection, which halves its way to a cost that may end above the target.

    Args:
        ratios: the ratios of the columns.
        scores: scores of each layer and ratio.
        costs: costs of each layer and ratio.
        full: the cost of each layer as it is.
        target: the cost afterwards over the cost before.
        other: the cost of the rest of the network; default 0.

    Returns:
        The column of each layer, -1 for a layer that does not change.

    Raises:
        ValueError: where no threshold gives a cost within the target.
    """
    strong_first = np.argsort(ratios, kind="stable")
    index = np.append(strong_first, -1)
    costs = np.concatenate([costs[:, strong_first], full[:, None]], axis=1)
    budget, least = target * (other + full.sum()), np.inf
    for threshold in np.append(np.unique(scores), np.inf)[::-1]:
        place = _as_far_as(scores[:, strong_first] >= threshold)
        cost = other + costs[np.arange(len(place)), place].sum()
        if cost <= budget:
            return index[place]
        least = min(least, cost)
    raise ValueError(too_tight(least, budget))


def _as_far_as(good: Bool[np.ndarray, "layers ratios"]) -> Int[np.ndarray, " layers"]:
    """The strongest place before which nothing fails, or the very strongest if it is good."""
    layers, ratios = good.shape
    run = np.logical_and.accumulate(good[:, ::-1], axis=1).sum(axis=1)
    return np.where(good[:, 0], 0, ratios - run)
