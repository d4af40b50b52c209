"""Norms over the data: what is divided by the root of a spread of its own.

Such a group of equations reads one value x, is linear in it but for its statistics, which
are reductions of x, and gives the same for x and for a multiple of x (epsilons apart):
this is what a norm does, in whichever order it centres, divides, scales and shifts.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxmet.engine.nodes.cluster import (
    SCALE,
    SHIFT,
    VIEWS,
    Cluster,
    by_channel,
    cone,
    is_free,
    leaves_under,
    only_use,
    through_views,
)
from jaxmet.engine.nodes.norms.roots import Root, root_of
from jaxmet.engine.nodes.records import DataNorm
from jaxmet.engine.program.program import CONST, DATA, PARAM, Equation, Value

CAST = "convert_element_type"
REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "psum")
SAME = (*VIEWS, "neg", "real", "conj")
AFTER = (*SAME, *SCALE, *SHIFT, "max", "min", "pow", "integer_pow", "select_n", "sqrt")
"""What may become of a root until it meets what it normalizes."""


class Growth(NamedTuple):
    """How a value grows with x: as x to the `degree`, statistics of x included.

    `power` counts x itself in it: 1 if linear in x, 0 for a statistic.
    """

    degree: float
    power: int


def data_norm(
    root: Equation, spread: Value, order: dict[Equation, int]
) -> Cluster | None:
    """The norm that divides by this root, if there is one."""
    for exit in _exits(root, order):
        source = _source(exit, root, order)
        if source is None:
            continue
        if _growth(exit, source) != Growth(0.0, 1):
            continue
        return _cluster(root, spread, exit, source, order)
    return None


def _exits(root: Equation, order: dict[Equation, int]) -> Iterator[Value]:
    """The values through which everything goes that the root is used for."""
    ahead = set(root.results)
    while True:
        value = min(ahead, key=lambda v: _place(v, order))
        ahead.remove(value)
        for use in value.uses:
            if use is None or not is_free(use) or use not in order:
                return
            if use.name not in AFTER or len(use.results) != 1:
                return
            ahead.add(use.results[0])
        if len(ahead) == 1:
            yield from ahead
        if not ahead:
            return


def _source(exit: Value, root: Equation, order: dict[Equation, int]) -> Value | None:
    """The nearest value that all data of a norm come from, its centring included."""
    found = None
    for value, passed in _dominators(exit, order):
        if found is not None and not _centres(found, value):
            break
        if found is not None or root in passed:
            found = value
    return found


def _dominators(
    exit: Value, order: dict[Equation, int]
) -> Iterator[tuple[Value, set[Equation]]]:
    """Values that all data of `exit` come from, the nearest first, and what is between."""
    ahead, passed = {exit}, set()
    while True:
        value = max(ahead, key=lambda v: _place(v, order))
        equation = value.producer
        if equation is None or not is_free(equation) or equation not in order:
            return  # of several values none comes from another
        ahead.remove(value)
        passed.add(equation)
        ahead.update(v for v in equation.data if not _counts(v))
        if not ahead:
            return
        if len(ahead) == 1:
            yield next(iter(ahead)), passed


def _place(value: Value, order: dict[Equation, int]) -> int:
    return -1 if value.producer is None else order.get(value.producer, -1)


def _counts(value: Value) -> bool:
    """Whether a value is a mask, or numbers counted from masks alone."""
    while value.inexact:
        equation = value.producer
        if equation is None or len(equation.data) != 1:
            return False
        if equation.name not in (*VIEWS, *REDUCTIONS, *SCALE, "max"):
            return False
        value = equation.data[0]
    return True


def _centres(value: Value, source: Value) -> bool:
    """Whether a value is `source` minus a statistic of it, or a cast of that."""
    value = through_views(value, (CAST,))
    equation = value.producer
    if value is source or equation is None:
        return value is source
    if equation.name not in SHIFT or _growth(value, source) != Growth(1.0, 1):
        return False
    powers = [_growth(v, source) for v in equation.operands]
    return sorted(g.power for g in powers if g is not None) == [0, 1]


def _growth(value: Value, source: Value) -> Growth | None:
    """How a value grows with `source`, None where no power of it says."""
    memo: dict[Value, Growth | None] = {source: Growth(1.0, 1)}
    stack = [value]
    while stack:
        top = stack[-1]
        if top in memo:
            stack.pop()
            continue
        equation = top.producer
        if top.kind != DATA or _counts(top):
            memo[top] = Growth(0.0, 0)
        elif equation is None or not is_free(equation):
            memo[top] = None
        else:
            root = root_of(equation)
            operands = equation.operands if root is None else [root.spread]
            needed = [v for v in operands if v not in memo]
            if needed:
                stack += needed
                continue
            memo[top] = _grown(equation, root, [memo[v] for v in operands])
    return memo[value]


def _grown(
    equation: Equation, root: Root | None, given: list[Growth | None]
) -> Growth | None:
    if any(g is None for g in given):
        return None
    known = [g for g in given if g is not None]
    name, (degree, power) = equation.name, known[0]
    if root is not None:
        return Growth(degree * root.power, 0) if power == 0 else None
    if name in SAME:
        return known[0]
    if name in REDUCTIONS or name == "dot_general":  # of two values, or with numbers
        return Growth(sum(g.degree for g in known), 0)
    if name == "mul":
        return Growth(degree + known[1].degree, power + known[1].power)
    if name == "div" and known[1].power == 0:
        return Growth(degree - known[1].degree, power)
    if name in ("square", "integer_pow"):
        times = 2 if name == "square" else equation.params["y"]
        if times > 0 or power == 0:
            return Growth(degree * times, power * times)
    if name == "abs":
        return Growth(degree, 2 * power)  # linear in x no more
    if name == "select_n":
        return _joined(equation.operands[1:], known[1:])
    if name in (*SHIFT, "max", "min"):
        return _joined(equation.operands, known)
    return None


def _joined(operands: list[Value], known: list[Growth]) -> Growth | None:
    """Of a sum and the like. Numbers beside a statistic (epsilons, bounds) count for nothing."""
    moving = [g for v, g in zip(operands, known, strict=True) if v.kind == DATA]
    still = [v for v in operands if v.kind != DATA]
    power = max(g.power for g in moving) if moving else 0
    if not moving or len({g.degree for g in moving}) > 1:
        return None
    if still and power and not all(v.scalar() == 0 for v in map(through_views, still)):
        return None
    return Growth(moving[0].degree, power)


def _cluster(
    root: Equation,
    spread: Value,
    exit: Value,
    source: Value,
    order: dict[Equation, int],
) -> Cluster | None:
    source = through_views(source, (CAST,))
    inner = cone(exit, {source}, order)
    scale, bias = _parameters(inner)
    end, *parameters = _tail(exit, scale, bias)
    outside = _of_shape(source, end.shape)
    if outside is not None:
        source, exit, (scale, bias) = outside, end, parameters
    equations = cone(exit, {source}, order)
    if root not in equations:
        return None
    record = DataNorm(spread, scale, bias)
    return Cluster("norm", "norm", equations, exit, source, record)


def _of_shape(value: Value, shape: tuple[Any, ...]) -> Value | None:
    """The value, or what it is a view of, that has this shape: of groups the whole."""
    while value.shape != shape:
        equation = value.producer
        if equation is None or not is_free(equation) or equation.name not in VIEWS:
            return None
        value = equation.operands[0]
    return value


def _parameters(equations: list[Equation]) -> tuple[Value | None, Value | None]:
    """The scale and the bias among the equations of a norm."""
    scale = bias = None
    for equation in equations:
        for value in equation.operands if equation.kind == DATA else ():
            if value.kind == PARAM and equation.name in SCALE:
                scale = scale or value
            elif value.kind == PARAM and equation.name in SHIFT:
                bias = bias or value
    return scale, bias


def _tail(
    value: Value, scale: Value | None, bias: Value | None
) -> tuple[Value, Value | None, Value | None]:
    """Follow a norm's own scale and bias to its exit."""
    exit, scaled, shifted = value, scale, bias
    while (use := only_use(value)) is not None and is_free(use):
        others = [v for v in use.operands if v is not value]
        value = use.results[0]
        if use.name == CAST:
            exit = value if scale is not None or bias is not None else exit
            continue
        fresh = scaled is None and shifted is None
        if not others:
            if use.name not in ("reshape", "transpose", "squeeze") or not fresh:
                break
            continue
        if others[0].kind == CONST and use.name in SCALE and fresh:
            continue  # the root of a size, before the scale
        if len(others) > 1 or others[0].kind != PARAM or shifted is not None:
            break
        if not by_channel(others[0]) or len(leaves_under(others[0])) > 1:
            break
        if use.name == "mul" and scaled is None:
            scaled = scale = others[0]
        elif use.name in SHIFT:
            shifted = bias = others[0]
        else:
            break
        exit = value
    return exit, scale, bias
