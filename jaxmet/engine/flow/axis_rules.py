"""How labels pass through equations, and what ends the freedom to rescale a channel.

A channel may be rescaled where everything it meets is positively homogeneous or has a
parameter that can follow. What is not known to be so freezes the channel and says why.
"""

from collections.abc import Callable

from jaxmet.engine.axes import labels as lb
from jaxmet.engine.axes.views import VIEW_RULES, view
from jaxmet.engine.flow.axis_arithmetic import (
    align,
    conv,
    dot,
    elementwise,
    followed_through,
)
from jaxmet.engine.flow.axis_joins import freeze_all
from jaxmet.engine.flow.axis_moves import MOVE_RULES
from jaxmet.engine.nodes.pointwise import POINTWISE
from jaxmet.engine.program import compat
from jaxmet.engine.program.program import (
    CONST,
    DATA,
    NOISE,
    PARAM,
    Equation,
    Region,
    body_operands,
    carried,
)

FOLLOWED = ("norm", "activation")


def label_inputs(region: Region) -> None:
    """Fresh labels for parameters; axis 0 of every model input is its batch."""
    for value in region.inputs:
        if value.kind == PARAM:
            value.axes = tuple(lb.fresh(n) for n in value.shape)
        elif value.kind == DATA and not compat.is_key(value.aval):
            axes = [lb.fresh(n, "an input of the model") for n in value.shape]
            if axes:
                why = "the batch axis"
                axes[0] = (lb.Atom(value.shape[0], batch=True, frozen=why, fixed=why),)
            value.axes = tuple(axes)


def label(region: Region) -> None:
    """Labels for every value of a region whose inputs have theirs."""
    for equation in region.equations:
        cluster = equation.node
        if equation.bodies:
            _regions(equation)
        elif cluster is not None and cluster.kind in FOLLOWED:
            if equation.kind == PARAM and equation.name in VIEW_RULES:
                view(equation)
            elif equation.kind == PARAM and cluster.kind == "norm":
                align(equation.operands, equation.results[0])  # e.g. variance + epsilon
            elif equation.results[0] is cluster.exit:
                followed_through(cluster)
        else:
            _apply(equation)
        for value in equation.results:
            if len(value.axes) != value.ndim:
                value.axes = tuple(() for _ in range(value.ndim))


def _apply(equation: Equation) -> None:
    if equation.kind in (CONST, NOISE):
        return
    if equation.name in VIEW_RULES:
        view(equation)
    elif equation.name in RULES:
        RULES[equation.name](equation)
    elif equation.name in POINTWISE or equation.name == "add_any":
        elementwise(equation)
    else:
        _opaque(equation)


def _opaque(equation: Equation, why: str | None = None) -> None:
    """An unknown operation: nothing may be rescaled; the batch is kept where it fits."""
    why = why or f"{equation.name}: no rule"
    for value in equation.operands:
        freeze_all(value, why, fixed=False)  # it gets whole arrays
    for result in equation.results:
        like = next((v for v in equation.data if v.shape == result.shape), None)
        if like is not None:
            result.axes = like.axes
            continue
        axes = [lb.fresh(n, why) for n in result.shape]
        for value in equation.data:
            for i, axis in enumerate(value.axes[: len(axes)]):
                if lb.carries_batch(axis) and value.shape[i] == result.shape[i]:
                    axes[i] = axis
        result.axes = tuple(axes)


# Regions


def _regions(equation: Equation) -> None:
    loop = equation.name in ("scan", "while")
    skip = compat.scan_arity(equation.params) if equation.name == "scan" else (0, 0)
    loops = {inside for inside, _ in carried(equation)}
    for body, outer in zip(equation.bodies, body_operands(equation), strict=True):
        for i, (inside, outside) in enumerate(zip(body.inputs, outer, strict=True)):
            axes = outside.axes or tuple(lb.fresh(n) for n in outside.shape)
            if equation.name == "scan" and i >= sum(skip):
                axes = axes[1:]
            if inside in loops:  # the batch reaches a first state of zeros from the end
                pairs = zip(axes, inside.shape, strict=True)
                axes = tuple(a or lb.fresh_one(n) for a, n in pairs)
            inside.axes = axes
            if inside.kind == CONST:
                inside.axes = tuple(lb.fresh(n) for n in inside.shape)
        label(body)
    for inside, outside in carried(equation):
        for a, b in zip(inside.axes, outside.axes, strict=True):
            lb.unify(a, b)
    _region_results(equation, sum(skip))
    if loop or equation.name == "cond":
        why = "crosses a loop" if loop else "crosses a branch"
        for body in equation.bodies:
            for value in (*body.inputs, *body.outputs):
                freeze_all(value, why)
        for value in (*equation.operands, *equation.results):
            freeze_all(value, why)


def _region_results(equation: Equation, skip: int) -> None:
    body = equation.bodies[-1]
    carry = len(carried(equation))
    for i, result in enumerate(equation.results):
        inside = body.outputs[i]
        axes = inside.axes or tuple(lb.fresh(n) for n in inside.shape)
        if equation.name == "scan" and i >= carry:
            xs = equation.operands[skip:]
            leading = next((v.axes[0] for v in xs if v.axes and v.axes[0]), None)
            axes = (leading or lb.fresh(result.shape[0]), *axes)
        result.axes = axes
    if equation.name == "cond":
        for other in equation.bodies[:-1]:
            for mine, theirs in zip(body.outputs, other.outputs, strict=True):
                for a, b in zip(mine.axes, theirs.axes, strict=False):
                    lb.unify(a, b)


RULES: dict[str, Callable[[Equation], None]] = {
    **MOVE_RULES,
    "dot_general": dot,
    "conv_general_dilated": conv,
}
