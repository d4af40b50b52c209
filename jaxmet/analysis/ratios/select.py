"""From the table of scores to one ratio per layer, within a budget."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import numpy as np

from jaxmet.analysis.cost import ALL
from jaxmet.analysis.ratios.spending import BUDGETS, Budget, Spending
from jaxmet.layers.asked_ratios import check_ratio
from jaxmet.numerics.ratios import greedy, monotone, optimal
from jaxmet.tree.checks import check_choices, check_flags, check_type
from jaxmet.tree.globs import suggestion
from jaxmet.tree.table import Table

CALLER = "select_ratios"
Method = Literal["greedy", "optimal"]
METHODS = get_args(Method)
TURNS = 16


def select_ratios(
    table: Table,
    target: float,
    *,
    method: Method = "optimal",
    budget: Budget = "macs",
    manual: Mapping[str, float] | None = None,
    fit: bool = True,
) -> dict[str, float]:
    """One ratio per layer, so that the network costs at most `target` of what it did.

    `table` is that of `jm.score_ratios`. 'optimal' maximises the sum of the scores over all
    layers, an exact multiple-choice knapsack; 'greedy' is AIMET's: one threshold for all
    scores, each layer at its smallest ratio that still scores as much. Costs are `budget`:
    'macs' or 'parameters', those of all other parameters included. `fit` makes each layer's
    scores rise with the ratio first. `manual` fixes the ratios of some layers, and of those
    tied to them.

    The result is what `factorize` and `prune` take; layers that stay as they are are not in
    it. Channels that go make both who reads them and who makes them cheaper, so that ratios
    of pruning multiply along the network: the choice is made with what each saves alone, and
    turned until all together are within the target. It is exact where costs add up, as those
    of factors do. Of pruned channels 'parameters' are those of weights, not of biases and
    norms, so that a network of them comes out a little smaller than the target.

    Args:
        table: the table of `jm.score_ratios`.
        target: the cost of the result over the cost of the model, in (0, 1].
        method: 'optimal' (the default) or 'greedy'.
        budget: which cost counts: 'macs' (the default) or 'parameters'.
        manual: ratios that are fixed, by layer; default None.
        fit: whether scores are first made to rise with the ratio; default True.

    Returns:
        The ratio of each layer that changes, by name.

    Raises:
        ValueError: for a target outside (0, 1], for one that cannot be reached, naming the
            smallest that can, and for a table of something else.

    >>> ratios = jm.select_ratios(table, 0.5)
    >>> small = jm.factorize(params, graph, ratios=ratios)
    """
    _check(table, target, method, budget)
    check_flags(CALLER, fit=fit)
    if manual is not None:
        cure = "Give the ratio of each layer by name: manual={'stem': 1.0}."
        check_type(CALLER, "manual", manual, Mapping, cure)
    layers = [n for n in dict.fromkeys(table["layer"]) if n != ALL]
    by_layer = {name: table.where(layer=name) for name in layers}
    tied = {name: _tied(by_layer[name]) for name in layers}
    manual = _manual(manual or {}, tied)
    ratios = np.array(by_layer[layers[0]]["ratio"], np.float64)
    scores = np.array([by_layer[n]["score"] for n in layers], np.float64)
    order = np.argsort(ratios)
    ratios, scores = ratios[order], scores[:, order]
    if fit:
        scores = monotone(scores)
    rows = [[list(by_layer[name])[i] for i in order] for name in layers]
    spent = Spending.of(rows, float(table.where(layer=ALL)[budget][0]), budget)
    given = {layers.index(n): _index(ratios, r) for n, r in manual.items()}
    chosen = _within(ratios, scores, spent, target, given, method)
    found = {n: float(ratios[i]) for n, i in zip(layers, chosen, strict=True)}
    every = dict(found | manual)
    for name in layers:
        every |= dict.fromkeys(tied[name], every[name])
    return {n: r for n, r in every.items() if r < 1}


def _tied(rows: Table) -> list[str]:
    """The layers that take the ratio of another."""
    names = rows.columns.get("tied", [None])[0]
    return names.split(", ") if names else []


def _manual(
    given: Mapping[str, float], tied: Mapping[str, list[str]]
) -> dict[str, float]:
    """The ratios that were given, by the layer of the table that takes them."""
    owner = {n: layer for layer, others in tied.items() for n in (layer, *others)}
    found: dict[str, float] = {}
    for name, ratio in given.items():
        if name not in owner:
            raise ValueError(
                f"jaxmet.{CALLER}: the table has no layer {name!r}. "
                f"{suggestion(name, list(owner))}"
            )
        check_ratio(f"manual ratio of {name!r}", ratio, CALLER)
        layer = owner[name]
        if found.setdefault(layer, ratio) != ratio:
            raise ValueError(
                f"jaxmet.{CALLER}: {name!r} reads the same channels as {layer!r} and takes its "
                f"ratio, but the manual ones are {found[layer]!r} and {ratio!r}. Give one."
            )
    return found


def _within(
    ratios: np.ndarray,
    scores: np.ndarray,
    spent: Spending,
    target: float,
    given: Mapping[int, int],
    method: str,
) -> np.ndarray:
    """The ratio of each layer, as an index: the best choice whose true cost is in reach."""
    budget = target * spent.total * (1 + 1e-12)
    free = [i for i in range(len(scores)) if i not in given]
    chosen = np.array([given.get(i, 0) for i in range(len(scores))])
    least = chosen.copy()
    least[free] = np.argmin(spent.alone[free], axis=1)
    if spent.together(least) > budget:
        reached = math.ceil(spent.together(least) / spent.total * 1e4) / 1e4
        raise ValueError(
            f"jaxmet.{CALLER}: {target} cannot be reached. The smallest ratio that the table "
            f"allows is {reached:.4f}: score smaller ratios, or more layers."
        )
    if not free:
        return chosen
    other = spent.total - spent.alone[free, -1].sum()
    other += sum(spent.alone[i, at] - spent.alone[i, -1] for i, at in given.items())

    # A row that costs no less than the layer is the layer as it is.
    last = len(ratios) - 1
    dear = spent.alone >= spent.alone[:, -1:]
    costs = np.minimum(spent.alone, spent.alone[:, -1:])[free]

    def choice(allowed: float) -> np.ndarray:
        found = chosen.copy()
        found[free] = _chosen(allowed)
        found[free] = np.where(dear[free, found[free]], last, found[free])
        return found

    def _chosen(allowed: float) -> np.ndarray:
        if method == "optimal":
            return optimal(scores[free], costs, allowed - other).options
        threshold = allowed / (other + costs[:, -1].sum())
        index = greedy(
            ratios[:-1],
            scores[free, :-1],
            costs[:, :-1],
            costs[:, -1],
            threshold,
            other=other,
        )
        return np.where(index < 0, last, index)

    if spent.separate:
        return choice(budget)
    low = other + spent.alone[free].min(axis=1).sum()
    found = _turned(choice, spent, least, low, budget)
    return _raised(found, scores, spent, free, budget) if method == "optimal" else found


def _turned(
    choice: Callable[[float], np.ndarray],
    spent: Spending,
    least: np.ndarray,
    low: float,
    budget: float,
) -> np.ndarray:
    """The most expensive choice whose cost together is in reach; costs alone do not say it."""
    high, best = spent.total, least
    for _ in range(TURNS):
        middle = (low + high) / 2
        found = choice(middle)
        good = spent.together(found) <= budget
        best = found if good else best
        low, high = (middle, high) if good else (low, middle)
    return best


def _raised(
    chosen: np.ndarray,
    scores: np.ndarray,
    spent: Spending,
    free: list[int],
    budget: float,
) -> np.ndarray:
    """The choice with ratios raised, best gain first, until none fits any more."""
    while True:
        found, gain = None, 0.0
        for i in free:
            for at in range(chosen[i] + 1, scores.shape[1]):
                better = scores[i, at] - scores[i, chosen[i]]
                trial = np.where(np.arange(len(chosen)) == i, at, chosen)
                if better > gain and spent.together(trial) <= budget:
                    found, gain = trial, better
        if found is None:
            return chosen
        chosen = found


def _index(ratios: np.ndarray, ratio: float) -> int:
    """The row of a ratio that need not be in the table: one that costs no less."""
    at = int(np.searchsorted(ratios, ratio * (1 - 1e-12)))
    return min(at, len(ratios) - 1)


def _check(table: Any, target: Any, method: str, budget: str) -> None:
    wanted = {"layer", "ratio", "score", *BUDGETS}
    if not isinstance(table, Table) or not wanted <= table.columns.keys():
        raise ValueError(
            f"jaxmet.{CALLER}: the table is none of jm.score_ratios, which has the columns "
            f"{', '.join(sorted(wanted))}."
        )
    if ALL not in table["layer"] or len(table) < 2:
        raise ValueError(
            f"jaxmet.{CALLER}: the table has no rows of layers, or none of the whole network. "
            "Pass the whole table of jm.score_ratios."
        )
    check_ratio("target", target, CALLER)
    check_choices(CALLER, method=(method, METHODS), budget=(budget, BUDGETS))
    if not np.all(np.isfinite(np.array(table["score"], np.float64))):
        raise ValueError(
            f"jaxmet.{CALLER}: the table holds scores that are no numbers."
        )
