"""Where a constant arrives that is taken off the channels of an activation."""

import dataclasses
from collections.abc import Collection, Iterator, Sequence

from jaxmet.engine.axes import labels as lb
from jaxmet.engine.axes.views import VIEW_RULES
from jaxmet.engine.nodes.cluster import Cluster
from jaxmet.engine.program.program import Equation, Value

PASSING = (*VIEW_RULES, "slice", "split")


@dataclasses.dataclass(frozen=True)
class BiasTargets:
    """The products whose inputs are less by the same constant, position for position.

    `stopped` says why the constant does not arrive everywhere as it is, or is None.
    """

    products: tuple[str, ...] = ()
    stopped: str | None = None


class _StoppedError(Exception):
    """Something reads the value that does not pass a constant on."""


def bias_targets(
    cluster: Cluster, named: Collection[Cluster], channels: Collection[lb.Atom]
) -> BiasTargets:
    """Follow what is taken off `channels` of a result to the products that read it."""
    found: dict[str, None] = {}
    try:
        for value, use in _uses(cluster.exit, channels):
            consumer = use.node if use is not None else None
            if use is None:
                raise _StoppedError("it is an output")
            if use.bodies or (consumer is not None and consumer not in named):
                raise _StoppedError(f"{use.name} reads it")
            if (
                consumer is not None
                and consumer.kind == "product"
                and consumer.entry is value
            ):
                found[consumer.name] = None
            elif not _after(value, use, channels):
                name = use.name if consumer is None else repr(consumer.name)
                raise _StoppedError(f"{name} reads it")
    except _StoppedError as why:
        return BiasTargets(tuple(found), str(why))
    return BiasTargets(tuple(found), None if found else "no product reads it")


def _uses(
    value: Value, channels: Collection[lb.Atom]
) -> Iterator[tuple[Value, Equation | None]]:
    """The uses of a value and of what it is passed on to, those of each before the next."""
    seen, stack = {value}, [(value, iter(value.uses))]
    while stack:
        value, uses = stack[-1]
        for use in uses:
            yield value, use
            after = [] if use is None else _after(value, use, channels)
            fresh = [v for v in dict.fromkeys(after) if v not in seen]
            seen.update(fresh)
            stack += [(v, iter(v.uses)) for v in reversed(fresh)]
            if fresh:
                break
        else:
            stack.pop()


def _after(
    value: Value, use: Equation, channels: Collection[lb.Atom]
) -> Sequence[Value]:
    """The values that a use hands a constant on to, none where it does not."""
    consumer = use.node
    if consumer is None:
        return use.results if _passes(use) else ()
    averages = consumer.kind == "pool" and _averages(consumer)
    joins = consumer.kind == "concat" and _holds(value, use, channels)
    return [consumer.exit] if averages or joins else ()


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
