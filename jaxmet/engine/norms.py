"""Normalizations, found by what they do: divide by the root of a spread."""

from collections.abc import Iterable

from jaxmet.engine.cluster import (
    SCALE,
    VIEWS,
    Cluster,
    cone,
    is_free,
    leaf_of,
    only_use,
    order_of,
    through_views,
    varying_axes,
)
from jaxmet.engine.program import CONST, DATA, NOISE, PARAM, Equation, Region, Value


def norms(region: Region) -> Iterable[Cluster]:
    order = order_of(region)
    for equation in region.equations:
        if not is_free(equation):
            continue
        if equation.name == "rsqrt" or (
            equation.name == "pow" and equation.operands[1].scalar() == -0.5
        ):
            inverse = True
        elif equation.name == "sqrt":
            inverse = False
        else:
            continue
        spread = equation.operands[0]
        if not spread.shape or equation.kind == NOISE or spread.scalar() is not None:
            continue
        found = _norm(equation, inverse, order)
        if found is not None:
            yield found


def _norm(root: Equation, inverse: bool, order: dict[Equation, int]) -> Cluster | None:
    gain, scale = root.results[0], None
    upright, scaled = inverse, True  # whether the gain holds 1/root, and scale itself
    while True:
        use = only_use(gain)
        if use is None or not is_free(use):
            return None
        others = [v for v in use.operands if v is not gain]
        if use.name == "div" and use.operands[1] is gain:
            upright, scaled = not upright, scale is None or not scaled
        if use.name in SCALE and others and others[0].kind == DATA:
            if _derived_from_same(others[0], gain, use):
                break
        if use.name in SCALE and others and others[0].kind == PARAM:
            scale, scaled = others[0], use.name == "mul" or use.operands[1] is gain
        elif (
            use.name in SCALE
            and others
            and others[0].kind == DATA
            and gain.kind == DATA
        ):
            return None
        elif use.name not in VIEWS and not (
            use.name in SCALE and others and others[0].kind == CONST
        ):
            return None
        gain = use.results[0]
    body = use
    centred = others[0]
    source, mean = centre(centred)
    exit, scale, bias = _affine_tail(body.results[0], scale)
    equations = cone(exit, {source}, order)
    if root not in equations or body not in equations:
        return None
    batch_free = root.kind < DATA
    details = {
        "spread": root.operands[0],
        "mean": mean,
        "scale": scale,
        "bias": bias,
        "affine": batch_free and (mean is None or mean.kind < DATA),
        "constant": root.kind == CONST,
        "direct": upright
        and scaled
        and not (body.name == "div" and body.operands[0] is gain),
    }
    return Cluster("norm", "norm", equations, exit, source, details)


def _derived_from_same(numerator: Value, gain: Value, use: Equation) -> bool:
    """Whether `use` normalizes its numerator by statistics of the numerator's source."""
    if gain.kind < DATA:
        return True
    source, _ = centre(numerator)
    seen: set[Value] = set()
    stack = [gain]
    while stack:
        value = stack.pop()
        if value is source or through_views(value) is through_views(source):
            return True
        if value in seen or value.producer is None:
            continue
        seen.add(value)
        stack += [v for v in value.producer.operands if v.kind == DATA]
    return False


def centre(value: Value) -> tuple[Value, Value | None]:
    """The value that is centred and its mean: (x, m) of x − m, else (x, None)."""
    value = through_views(value, ("convert_element_type",))
    if value.producer is not None and value.producer.name == "sub":
        x, mean = value.producer.operands
        same = x.ndim == mean.ndim and x.kind == DATA
        if same and (mean.kind < DATA or varying_axes(mean) != varying_axes(x)):
            x = through_views(x, ("convert_element_type",))
            return x, mean
    return value, None


def _affine_tail(
    value: Value, scale: Value | None
) -> tuple[Value, Value | None, Value | None]:
    """Follow a norm's own scale and bias to its exit."""
    bias, exit = None, value
    while (use := only_use(value)) is not None and is_free(use):
        others = [v for v in use.operands if v is not value]
        if use.name == "convert_element_type":
            value = use.results[0]
            if bias is not None or scale is not None:
                exit = value
            continue
        if not others or others[0].kind != PARAM or bias is not None:
            break
        if leaf_of(others[0]) is None and use.name != "add":
            break
        if len(varying_axes(others[0])) > 1:
            break
        if use.name == "mul" and scale is None:
            scale = others[0]
        elif use.name == "add":
            bias = others[0]
        else:
            break
        value = exit = use.results[0]
    return exit, scale, bias
