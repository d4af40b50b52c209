"""Whether each example of a batch goes through a program by itself, as far as axes say.

The batch axis of every value of the data is followed: where it is gone, cut, or met by another
one, a result may depend on several examples.
"""

import math

from jaxmet.engine.axes import labels as lb
from jaxmet.engine.axes.views import VIEW_RULES
from jaxmet.engine.flow.axis_rules import RULES, label
from jaxmet.engine.nodes.pointwise import POINTWISE
from jaxmet.engine.program import compat
from jaxmet.engine.program.program import (
    DATA,
    PRODUCTS,
    Equation,
    Region,
    Value,
    flatten,
    spread_kinds,
)

KNOWN = {*VIEW_RULES, *RULES, *POINTWISE, "add_any"}
CUTS = ("slice", "split", "tile", "concatenate", "pad", "gather")


def may_meet(region: Region, batch: int) -> bool:
    """Whether examples of a labelled program without nodes may meet; `batch` of them.

    False is a proof; True only says that no rule shows the opposite.
    """
    equations = (e for e in region.walk() if e.kind == DATA)
    return any(_may_meet(equation, batch) for equation in equations)


def _may_meet(equation: Equation, batch: int) -> bool:
    if equation.name in compat.CUSTOM and not equation.bodies:
        return _inside(equation, batch)
    if not all(_has_one(v, batch) for v in (*equation.data, *equation.results)):
        return True
    if equation.bodies:
        return False
    return equation.name not in KNOWN or any(
        lb.carries_batch(value.axes[i])
        for value in equation.data
        for i in _joined(equation, value)
    )


def _inside(equation: Equation, batch: int) -> bool:
    """The same of a call with a derivative of its own."""
    body = flatten(compat.call_body(equation.params))
    for inside, outside in zip(body.inputs, equation.operands, strict=True):
        inside.kind, inside.axes = outside.kind, outside.axes
    spread_kinds(body)
    label(body)
    for outside, inside in zip(equation.results, body.outputs, strict=True):
        outside.axes = inside.axes
    return may_meet(body, batch)


def _has_one(value: Value, batch: int) -> bool:
    """Whether one axis of a value of the data runs over all examples."""
    own = [a for axis in value.axes for a in lb.expand(axis) if a.batch]
    axes = sum(map(lb.carries_batch, value.axes))
    return axes == 1 and math.prod(a.size for a in own) == batch


def _joined(equation: Equation, value: Value) -> list[int]:
    """The axes of an operand along which a result depends on several entries."""
    p, name = equation.params, equation.name
    if name == "rev":
        return list(p["dimensions"])
    if name in PRODUCTS[:1]:
        spec = "lhs_spec" if value is equation.operands[0] else "rhs_spec"
        numbers = getattr(p["dimension_numbers"], spec)
        return list(numbers[spec == "lhs_spec" :])
    if name == "dot_general":
        (left, right), _ = p["dimension_numbers"]
        return list(left if value is equation.operands[0] else right)
    if name == "gather":
        source = value is equation.operands[0]
        pairs = zip(p["slice_sizes"], value.shape, strict=True) if source else ()
        return [i for i, (n, m) in enumerate(pairs) if n != m]
    if name in CUTS:
        shapes = [v.shape for v in equation.results]
        return [i for i, n in enumerate(value.shape) if any(s[i] != n for s in shapes)]
    return []
