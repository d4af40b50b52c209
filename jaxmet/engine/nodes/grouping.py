"""Equations gathered into nodes: groups with a single exit, within one region.

Products take their bias, norms the smallest cone above their input, softmax its own
pattern, activations the largest cone of pointwise equations of one value. Additions,
multiplications, matmuls, concatenations and pools of what is left are nodes of their own;
everything else is a move.
"""

import math
from collections.abc import Iterable

from jaxmet.engine.nodes.activations import number_of
from jaxmet.engine.nodes.cluster import (
    SCALE,
    SHIFT,
    Cluster,
    is_free,
    only_use,
)
from jaxmet.engine.nodes.norms import norms
from jaxmet.engine.nodes.pointwise import activations
from jaxmet.engine.nodes.products import products
from jaxmet.engine.nodes.softmax import softmaxes
from jaxmet.engine.program.program import CONST, DATA, PARAM, Equation, Region, Value

REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min")
WINDOWS = {
    "reduce_window_max": "max_pool",
    "reduce_window_min": "min_pool",
    "reduce_window_sum": "avg_pool",
    "reduce_window": "pool",
}
RESIZE_CALLS = ("_resize", "resize", "_scale_and_translate", "scale_and_translate")


def group(region: Region) -> None:
    """Claim the equations of this region and of those inside it."""
    for equation in region.equations:
        for body in equation.bodies:
            group(body)
    for find in (products, norms, softmaxes, _resizes, activations, _rest):
        for cluster in find(region):
            _claim(cluster)


def _claim(cluster: Cluster) -> None:
    inside = set(cluster.equations)
    made = {v for e in cluster.equations for v in e.results}
    operands: dict[Value, None] = {}
    for equation in cluster.equations:
        equation.node = cluster
        for value in equation.operands:
            if value not in made and value.constant is None:
                operands[value] = None
    ordered = sorted(operands, key=lambda v: v.kind != DATA)
    cluster.operands = ordered
    assert cluster.exit.producer in inside


def _resizes(region: Region) -> Iterable[Cluster]:
    calls: dict[int, list[Equation]] = {}
    for equation in region.equations:
        for number, name in equation.calls:
            if name in RESIZE_CALLS and is_free(equation):
                calls.setdefault(number, []).append(equation)
    claimed: set[Equation] = set()
    for equations in calls.values():
        inside = set(equations)
        if inside & claimed:
            continue
        made = {v for e in equations for v in e.results}
        exits = [
            v for v in made if v.kind == DATA and any(u not in inside for u in v.uses)
        ]
        entries = {
            v for e in equations for v in e.operands if v.kind == DATA and v not in made
        }
        escapes = any(u not in inside for v in made - set(exits) for u in v.uses)
        if len(exits) == 1 and len(entries) == 1 and not escapes:
            claimed |= inside
            yield Cluster("resize", "resize", equations, exits[0], entries.pop())


def _rest(region: Region) -> Iterable[Cluster]:
    for equation in region.equations:
        if not is_free(equation) or equation.kind != DATA:
            continue
        out = equation.results[0]
        if not out.inexact:
            continue
        wide = [v for v in equation.operands if v.kind in (DATA, PARAM) and v.inexact]
        kind, function = None, ""
        if equation.name == "dot_general" and len(equation.data) == 2:
            kind, function = "matmul", "dot"
        elif equation.name in SHIFT and len(wide) == 2:
            kind, function = "add", equation.name
        elif equation.name in SCALE and len(wide) == 2:
            kind, function = "multiply", equation.name
        elif equation.name in ("concatenate", "stack") and len(wide) > 1:
            kind, function = "concat", "concat"
        elif equation.name in WINDOWS:
            yield _pool(equation, WINDOWS[equation.name])
        elif equation.name in REDUCTIONS:
            yield _pool(equation, equation.name.replace("reduce_", ""))
        if kind is not None:
            yield Cluster(kind, function, [equation], out, equation.data[0])


def _pool(equation: Equation, function: str) -> Cluster:
    """A pool, with the division that makes a sum a mean."""
    if function not in ("avg_pool", "sum"):
        return Cluster(
            "pool", function, [equation], equation.results[0], equation.data[0]
        )
    equations = [equation, *_scaling(equation.results[0])]
    if not _divides(equations):
        function = "sum"
    elif function == "sum":
        function = "mean"
    exit = equations[-1].results[0]
    return Cluster("pool", function, equations, exit, equation.data[0])


def _scaling(total: Value) -> list[Equation]:
    """The scaling by a constant that is all that becomes of a sum, its kept axes first."""
    use, before = only_use(total), []
    if use is not None and is_free(use) and use.name == "broadcast_in_dim":
        if math.prod(use.params["shape"]) != math.prod(total.shape):
            return []
        before, total = [use], use.results[0]
        use = only_use(total)
    if use is None or not is_free(use) or use.name not in SCALE:
        return []
    scales = use.operands[0] is total and use.operands[1].kind == CONST
    return [*before, use] if scales else []


def _divides(equations: list[Equation]) -> bool:
    """Whether a sum is divided by how much it sums: a number, or counts by position."""
    reduction, scaling = equations[0], equations[-1]
    if scaling is reduction:
        return False
    by = scaling.operands[1]
    number = number_of(by)
    if number is None:
        return by.ndim > 0
    params, shape = reduction.params, reduction.operands[0].shape
    sizes = params.get("window_dimensions") or [shape[i] for i in params["axes"]]
    count = math.prod(sizes)
    if scaling.name == "mul":
        number = 1 / number if number else math.inf
    return not isinstance(count, int) or math.isclose(number, count, rel_tol=0.01)
