"""Where a constant arrives that is taken off the channels of an activation."""

import dataclasses
from collections.abc import Collection

from jaxmet.engine.axes import labels as lb
from jaxmet.engine.axes.views import VIEW_RULES
from jaxmet.engine.nodes.cluster import Cluster
from jaxmet.engine.program.program import Equation, Value

PASSING = (*VIEW_RULES, "slice", "split")


@dataclasses.dataclass(frozen=True)
class Arrivals:
    """The products whose inputs are less by the same constant, position for position.

    `stopped` says why the constant does not arrive everywhere as it is, or is None.
    """

    products: tuple[str, ...] = ()
    stopped: str | None = None


class _StoppedError(Exception):
    """Something reads the value that does not pass a constant on."""


def arrivals(
    cluster: Cluster, named: Collection[Cluster], channels: Collection[lb.Atom]
) -> Arrivals:
    """Follow what is taken off `channels` of a result to the products that read it."""
    found: dict[str, None] = {}
    try:
        _follow(cluster.exit, named, channels, found, set())
    except _StoppedError as why:
        return Arrivals(tuple(found), str(why))
    return Arrivals(tuple(found), None if found else "no product reads it")


def _follow(
    value: Value,
    named: Collection[Cluster],
    channels: Collection[lb.Atom],
    found: dict[str, None],
    seen: set[Value],
) -> None:
    if value in seen:
        return
    seen.add(value)
    for use in value.uses:
        if use is None:
            raise _StoppedError("it is an output")
        reader = use.node
        if use.bodies or (reader is not None and reader not in named):
            raise _StoppedError(f"{use.name} reads it")
        if reader is None:
            if not _passes(use):
                raise _StoppedError(f"{use.name} reads it")
            after = use.results
        elif reader.kind == "product" and reader.entry is value:
            found[reader.name] = None
            continue
        elif reader.kind == "pool" and _averages(reader):
            after = [reader.exit]
        elif reader.kind == "concat" and _holds(value, use, channels):
            after = [reader.exit]
        else:
            raise _StoppedError(f"{reader.name!r} reads it")
        for result in after:
            _follow(result, named, channels, found, seen)


def _passes(use: Equation) -> bool:
    """Whether every number of the results is one of the operand's."""
    one = len(use.operands) == 1
    return one and use.name in PASSING and all(v.inexact for v in use.results)


def _averages(pool: Cluster) -> bool:
    """Whether a pool of x − c is the pool of x, less c."""
    if pool.function in ("max", "min", "mean"):
        return True
    padding = pool.equations[0].params.get("padding", ())
    if pool.function in ("max_pool", "min_pool"):  # their padding never wins
        return True
    return pool.function == "avg_pool" and not any(map(any, padding))


def _holds(value: Value, use: Equation, channels: Collection[lb.Atom]) -> bool:
    """Whether a concatenation runs along the channels."""
    if use.name == "stack":
        return False
    axis = value.axes[use.params["dimension"]]
    return any(atom in channels for atom in lb.leaves(axis))
