"""Which values reach an output of the model, whatever axes they have.

Two things do not count. An output that is the new running average of a stored parameter is
state and no result. The statistics by which a norm divides its own input are a part of the
norm, also where a running average reads them too.
"""

from collections.abc import Iterable

from jaxmet.engine.axes import labels as lb
from jaxmet.engine.axes.views import CASTS
from jaxmet.engine.nodes.cluster import LAYERS, Cluster, leaf_of, through_views
from jaxmet.engine.nodes.pointwise import POINTWISE
from jaxmet.engine.program import compat
from jaxmet.engine.program.program import (
    DATA,
    PARAM,
    Equation,
    Region,
    Value,
    body_operands,
    carried,
)


def carries(value: Value) -> bool:
    return value.kind == DATA and any(lb.carries_batch(a) for a in value.axes)


def live_values(region: Region) -> set[Value]:
    """The values of the data that an output of the model is computed from.

    What only decides which branch runs is not, except for layers and what they read.
    """
    ends = [v for v in dict.fromkeys(region.outputs) if v.kind == DATA]
    averages = [v for v in ends if not carries(v) and is_running_average(v)]
    live = reaching(region, [v for v in ends if v not in averages])
    layers = {e.node for e in region.walk() if e.node and e.node.kind in LAYERS}
    lost = {c.exit for c in layers} - live
    if lost and averages and lost & reaching(region, averages):
        # What a layer is computed for alone is a result, whatever it looks like.
        for value in averages:
            if lost & (found := reaching(region, [value])):
                live |= found
    if lost:
        deciding = lost & reaching(region, live, branches=True)
        live |= reaching(region, deciding, branches=True)
    return live


def reaching(
    region: Region, ends: Iterable[Value], *, branches: bool = False
) -> set[Value]:
    """The values of the data that these are computed from, and themselves.

    With `branches` also those that decide which branch runs.
    """
    live = set(ends)
    _mark(region, live, branches)
    return live


def _mark(region: Region, live: set[Value], branches: bool) -> None:
    order = {e: i for i, e in enumerate(region.equations)}
    for equation in reversed(region.equations):
        if not any(v in live for v in equation.results):
            continue
        if equation.bodies:
            _mark_bodies(equation, live, branches)
        elif equation.node is not None:
            live.update(_read(equation.node, order))
        else:
            live.update(equation.data)


def _mark_bodies(equation: Equation, live: set[Value], branches: bool) -> None:
    """Carry liveness into loops and branches, and out of them again."""
    pairs = carried(equation)
    for body in equation.bodies:
        same = len(body.outputs) == len(equation.results)
        ends = {
            inside
            for i, inside in enumerate(body.outputs)
            if inside.kind == DATA and (not same or equation.results[i] in live)
        }
        while True:
            live |= ends
            _mark(body, live, branches)
            more = {
                o for i, o in pairs if i in live and o.kind == DATA and o not in live
            }
            if not more:
                break
            ends |= more
    for body, outer in zip(equation.bodies, body_operands(equation), strict=True):
        for inside, outside in zip(body.inputs, outer, strict=True):
            if inside in live and outside.kind == DATA:
                live.add(outside)
    if branches and equation.name == "cond" and equation.operands[0].kind == DATA:
        live.add(equation.operands[0])


def _read(cluster: Cluster, order: dict[Equation, int]) -> list[Value]:
    """What a node reads, without the statistics that a norm takes of its own input."""
    data = [v for v in cluster.operands if v.kind == DATA]
    if cluster.kind != "norm" or cluster.entry is None:
        return data
    own = {cluster.entry, through_views(cluster.entry)}
    return [v for v in data if v in own or not _computed_from(v, own, order)]


def _computed_from(
    value: Value, sources: set[Value], order: dict[Equation, int]
) -> bool:
    """Whether all the data that a value is computed from are among the sources."""
    first = min(order.get(v.producer, -1) if v.producer else -1 for v in sources)
    stack, seen = [value], set(sources)
    while stack:
        top = stack.pop()
        if top in seen:
            continue
        seen.add(top)
        equation = top.producer
        if equation is None or order.get(equation, -1) <= first:
            return False
        stack += equation.data
    return True


def is_running_average(value: Value) -> bool:
    """Whether a value is a·old + b·new entry by entry, with a stored parameter as old.

    Told by the arithmetic: the old value is scaled or chosen by what does not depend on the
    data, or comes in twice, as in old − c·(old − new). What adds a bias does neither. The new
    value is a statistic, so a layer's result does not enter entry by entry.
    """
    met: dict[Value, int] = {}
    first: dict[Value, Value] = {}  # what a loop's carry is at the start
    stack, seen = [value], set()
    while stack:
        top = stack.pop()
        equation = top.producer
        if top in seen or equation is None:
            continue
        seen.add(top)
        if equation.bodies:
            i = equation.results.index(top)
            bodies = [
                b for b in equation.bodies if len(b.outputs) == len(equation.results)
            ]
            stack += [b.outputs[i] for b in bodies]
            for inside, _ in carried(equation):
                body = equation.bodies[-1]
                first[inside] = body_operands(equation)[-1][body.inputs.index(inside)]
            continue
        if equation.node is not None and equation.node.kind in LAYERS:
            return False
        if equation.name not in (*POINTWISE, *CASTS, *compat.CUSTOM):
            continue
        for operand in equation.operands:
            if operand.shape != top.shape:
                continue
            old = _stored(operand, first)
            if old is None:
                stack.append(operand)
                continue
            others = [v for v in equation.operands if v is not operand]
            if equation.name == "select_n":
                others = [equation.operands[0]]
            scaled = equation.name in ("mul", "div", "select_n")
            met[old] = met.get(old, 0) + 1
            if scaled and all(v.kind < DATA for v in others):
                met[old] += 1
    return any(n > 1 for n in met.values())


def _stored(value: Value, first: dict[Value, Value]) -> Value | None:
    """The parameter that a value is, entry by entry, or one layer of it in a loop."""
    value = through_views(value, CASTS)
    value = first.get(value, value)
    leaf = leaf_of(value) if value.kind == PARAM else None
    if leaf is None:
        return None
    shape = leaf.value.shape[1:] if leaf.stacked else leaf.value.shape
    return leaf.value if shape == value.shape else None
