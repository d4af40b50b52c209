"""Roots of a spread, however they are written: √v, v**-0.5, exp(−½ log v)."""

from typing import NamedTuple

from jaxmet.engine.nodes.cluster import VIEWS
from jaxmet.engine.program.program import Equation, Value

POWERS = (0.5, -0.5)


class Root(NamedTuple):
    """What a root is taken of, and its power: a half, or minus a half."""

    spread: Value
    power: float


def root_of(equation: Equation) -> Root | None:
    """What an equation is a root of, None if it is none."""
    match equation.name:
        case "sqrt":
            return Root(equation.operands[0], 0.5)
        case "rsqrt":
            return Root(equation.operands[0], -0.5)
        case "pow":
            power = equation.operands[1].scalar()
            return Root(equation.operands[0], power) if power in POWERS else None
        case "exp":
            return _through_log(equation.operands[0])
    return None


def _through_log(value: Value) -> Root | None:
    """The root that the exponential of `value` is: of half a logarithm, or minus half."""
    power = 1.0
    while (equation := value.producer) is not None and not equation.bodies:
        name, operands = equation.name, equation.operands
        if name == "log":
            return Root(operands[0], power) if power in POWERS else None
        if name in ("mul", "div") and len(operands) == 2:
            numbers = [v.scalar() for v in operands]
            if name == "mul" and numbers[0] is not None:
                operands, numbers = operands[::-1], numbers[::-1]
            number = numbers[1]
            if not number:
                return None
            power *= number if name == "mul" else 1 / number
        elif name == "neg":
            power = -power
        elif name not in VIEWS:
            return None
        value = operands[0]
    return None
