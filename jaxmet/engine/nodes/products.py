"""Products with their bias, and lookups: the nodes that hold a weight."""

from collections.abc import Iterable
from typing import Any

from jaxmet.engine.axes.views import follow, holding, numbered
from jaxmet.engine.nodes.cluster import (
    SCALE,
    SHIFT,
    VIEWS,
    Cluster,
    cone,
    is_free,
    only_use,
    order_of,
    through_views,
    varying_axes,
)
from jaxmet.engine.nodes.records import Weighted
from jaxmet.engine.program.program import DATA, PARAM, RAGGED, Equation, Region, Value


def products(region: Region) -> Iterable[Cluster]:
    order = order_of(region)
    for equation in region.equations:
        if equation.name == "gather" and _is_lookup(equation):
            yield Cluster(
                "lookup",
                "gather",
                [equation],
                equation.results[0],
                equation.operands[1],
                Weighted(equation.operands[0], equation),
            )
        if equation.name in RAGGED and _is_ragged(equation):
            rows, weight = equation.operands[:2]
            yield Cluster(
                "ragged",
                "ragged_dot",
                [equation],
                equation.results[0],
                rows,
                Weighted(weight, equation),
            )
        if equation.name not in ("conv_general_dilated", "dot_general"):
            continue
        one, two = equation.operands[:2]
        if {one.kind, two.kind} != {DATA, PARAM}:
            continue
        data, weight = (one, two) if one.kind == DATA else (two, one)
        if equation.name == "conv_general_dilated" and weight is one:
            continue
        yield _with_bias(equation, data, weight, order)


def _is_lookup(equation: Equation) -> bool:
    table, indices = equation.operands[:2]
    return table.kind == PARAM and indices.kind == DATA and table.inexact


def _is_ragged(equation: Equation) -> bool:
    """Whether each row of data meets one of several matrices of a parameter."""
    numbers = ragged_numbers(equation)
    kinds = [v.kind for v in equation.operands[:2]]
    return kinds == [DATA, PARAM] and len(numbers.rhs_group_dimensions) == 1


def ragged_numbers(equation: Equation) -> Any:
    """Which axes of a ragged product meet, and which choose."""
    return equation.params["ragged_dot_dimension_numbers"]


def feature_axes(equation: Equation, weight: Value) -> tuple[int, ...]:
    """Axes of a product's result that come from its weight."""
    numbers = equation.params["dimension_numbers"]
    if equation.name == "conv_general_dilated":
        return (numbers.out_spec[1],)
    (lc, rc), (lb, rb) = numbers
    lhs, rhs = equation.operands[:2]
    if weight is rhs:
        start = lhs.ndim - len(lc)
        return tuple(range(start, start + rhs.ndim - len(rc) - len(rb)))
    return tuple(range(len(lb), lhs.ndim - len(lc)))


def _with_bias(
    equation: Equation, data: Value, weight: Value, order: dict[Equation, int]
) -> Cluster:
    value, equations, bias = equation.results[0], [equation], None
    features = feature_axes(equation, weight)
    axes = numbered(value)
    wanted = [axes[i] for i in features]
    while (use := only_use(value)) is not None and is_free(use):
        if use.name in VIEWS and use.name != "broadcast_in_dim":
            axes = follow(axes, [use])
        elif use.name == "add":
            bias = _bias(use, value, holding(axes, wanted))
            break
        else:
            break
        value = use.results[0]
    if bias is not None and use is not None:
        features, value = holding(axes, wanted), use.results[0]
        equations = cone(value, {data, weight}, order)
    elif use is not None and _by_features(use, value, holding(axes, wanted)):
        # A norm reads what it makes in another shape, as where it runs under vmap.
        features = holding(axes, wanted)
        equations = cone(value, {data, weight}, order)
    else:
        value = equation.results[0]
    record = Weighted(weight, equation, bias, features)
    function = "conv" if equation.name == "conv_general_dilated" else "dot"
    return Cluster("product", function, equations, value, data, record)


def _by_features(use: Equation, value: Value, features: tuple[int, ...]) -> bool:
    """Whether a value is scaled or shifted by a parameter along its features alone."""
    others = [v for v in use.operands if v is not value]
    if use.name not in (*SCALE, *SHIFT) or len(others) != 1:
        return False
    return others[0].kind == PARAM and varying_axes(others[0]) <= set(features)


def _bias(add: Equation, value: Value, features: tuple[int, ...]) -> Value | None:
    """The parameter that is added along the feature axes alone, if there is one."""
    if not _by_features(add, value, features):
        return None
    other = next(v for v in add.operands if v is not value)
    made = through_views(other).producer
    # What is negated is a norm's mean that is subtracted.
    return None if made is not None and made.name == "neg" else other
