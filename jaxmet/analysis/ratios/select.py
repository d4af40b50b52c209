"""From the table of scores to one ratio a site, within a budget."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmet.analysis.cost import ALL
from jaxmet.numerics.ratios import greedy, monotone, optimal
from jaxmet.tree.names import suggestion
from jaxmet.tree.table import Table

CALLER = "select_ratios"
METHODS = ("greedy", "optimal")
BUDGETS = ("macs", "parameters")


def select_ratios(
    table: Table,
    target: float,
    *,
    method: str = "optimal",
    budget: str = "macs",
    manual: Mapping[str, float] | None = None,
    fit: bool = True,
) -> dict[str, float]:
    """One ratio a site, so that the network costs at most `target` of what it did.

    `table` is that of `jm.score_ratios`. 'optimal' maximises the sum of the scores over all
    sites, an exact multiple-choice knapsack; 'greedy' is AIMET's: one threshold for all
    scores, each site at its smallest ratio that still scores as much. Costs are `budget`:
    'macs' or 'parameters', those of all other parameters included. `fit` makes each site's
    scores rise with the ratio first. `manual` fixes the ratios of some sites.

    The result is what `factorize` and `prune` take; sites that stay as they are are not in
    it. Of pruning the table counts the site that reads the channels alone: who makes them
    shrinks as well, so that the network costs less than promised.

    Raises ValueError for a target outside (0, 1], for one that cannot be reached, naming the
    smallest that can, and for a table of something else.

    >>> ratios = jm.select_ratios(table, 0.5)
    >>> small = jm.factorize(params, graph, ratios=ratios)
    """
    _check(table, target, method, budget)
    sites = [n for n in dict.fromkeys(table["site"]) if n != ALL]
    manual = dict(manual or {})
    for name, ratio in manual.items():
        if name not in sites:
            raise ValueError(
                f"jaxmet.{CALLER}: the table has no site {name!r}. {suggestion(name, sites)}"
            )
        _check_ratio(f"manual ratio of {name!r}", ratio)
    by_site = {name: table.where(site=name) for name in sites}
    ratios = np.array(by_site[sites[0]]["ratio"], np.float64)
    scores = np.array([by_site[n]["score"] for n in sites], np.float64)
    costs = np.array([by_site[n][budget] for n in sites], np.float64)
    order = np.argsort(ratios)
    ratios, scores, costs = ratios[order], scores[:, order], costs[:, order]
    if fit:
        scores = monotone(scores)
    total = float(table.where(site=ALL)[budget][0])
    other = total - costs[:, -1].sum()
    free = [i for i, n in enumerate(sites) if n not in manual]
    fixed = sum(_cost_at(ratios, costs[sites.index(n)], r) for n, r in manual.items())
    chosen = _choose(
        ratios, scores[free], costs[free], target, total, other + fixed, method
    )
    found = {sites[i]: float(r) for i, r in zip(free, chosen, strict=True)}
    every = dict(found | manual)
    for name in sites:
        tied = by_site[name].columns.get("tied", [None])[0]
        every |= dict.fromkeys(tied.split(", ") if tied else [], every[name])
    return {n: r for n, r in every.items() if r < 1}


def _choose(
    ratios: np.ndarray,
    scores: np.ndarray,
    costs: np.ndarray,
    target: float,
    total: float,
    other: float,
    method: str,
) -> np.ndarray:
    budget = target * total * (1 + 1e-12)
    least = other + costs.min(axis=1).sum() if len(costs) else other
    if least > budget:
        raise ValueError(
            f"jaxmet.{CALLER}: {target} cannot be reached. The smallest ratio that the table "
            f"allows is {least / total:.4f}: score smaller ratios, or more sites."
        )
    if not len(costs):
        return ratios[:0]
    if method == "optimal":
        return ratios[optimal(scores, costs, budget - other).options]
    index = greedy(
        ratios[:-1],
        scores[:, :-1],
        costs[:, :-1],
        costs[:, -1],
        budget / (other + costs[:, -1].sum()),
        other=other,
    )
    return np.where(index < 0, 1.0, ratios[index])


def _cost_at(ratios: np.ndarray, costs: np.ndarray, ratio: float) -> float:
    """The cost of a ratio that need not be in the table: never below what it will be."""
    at = np.searchsorted(ratios, ratio * (1 - 1e-12))
    return float(max(costs[min(at, len(ratios) - 1)], ratio * costs[-1]))


def _check(table: Any, target: Any, method: str, budget: str) -> None:
    wanted = {"site", "ratio", "score", *BUDGETS}
    if not isinstance(table, Table) or not wanted <= table.columns.keys():
        raise ValueError(
            f"jaxmet.{CALLER}: the table is none of jm.score_ratios, which has the columns "
            f"{', '.join(sorted(wanted))}."
        )
    if ALL not in table["site"] or len(table) < 2:
        raise ValueError(
            f"jaxmet.{CALLER}: the table has no rows of sites, or none of the whole network. "
            "Pass the whole table of jm.score_ratios."
        )
    _check_ratio("target", target)
    for said, what, of in ((method, "method", METHODS), (budget, "budget", BUDGETS)):
        if said not in of:
            raise ValueError(
                f"jaxmet.{CALLER}: {what} is {said!r}. It is {of[0]!r} or {of[1]!r}."
            )
    if not np.all(np.isfinite(np.array(table["score"], np.float64))):
        raise ValueError(
            f"jaxmet.{CALLER}: the table holds scores that are no numbers."
        )


def _check_ratio(what: str, ratio: Any) -> None:
    number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
    if not number or not 0 < ratio <= 1:
        raise ValueError(
            f"jaxmet.{CALLER}: the {what} is {ratio!r}. It is the cost afterwards over the "
            "cost before: a number above 0 and up to 1."
        )
