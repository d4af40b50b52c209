"""What a run of equations does to one value: y = a·x + c, as numbers.

Every parameter is drawn at random, one number for all its elements, in float64. What the
equations compute from those numbers tells which role each parameter plays, whatever the
spelling: an identity of such expressions that holds for several draws holds for all.
Views leave such a value as it is, so that it does not matter where they stand.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.core import Tracer

from jaxmet.engine.nodes.cluster import VIEWS
from jaxmet.engine.program import compat
from jaxmet.engine.program.program import NOISE, Equation, Value, flatten

DRAWS = 6
Numbers = np.ndarray[Any, np.dtype[np.float64]]


class UnknownError(Exception):
    """An equation that is not arithmetic on single numbers."""


RULES: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "add_any": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "neg": np.negative,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "square": np.square,
    "pow": np.power,
    "exp": np.exp,
    "log": np.log,
    "max": np.maximum,
    "min": np.minimum,
    "abs": np.abs,
    "real": np.real,
    "conj": np.conj,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lt": np.less,
    "le": np.less_equal,
    "select_n": lambda which, *cases: np.choose(which.astype(np.int64), cases),
}


class DrawnNumbers:
    """Values computed from numbers of the leaves under them, drawn when first met.

    Leaves are parameters, and arrays that the model closes over. `changed` replaces the
    numbers of some values; `met` are the leaves that were needed.
    """

    def __init__(
        self,
        draws: dict[Value, Numbers],
        changed: Mapping[Value, Numbers] | None = None,
    ):
        self.draws, self.known = draws, dict(changed or {})
        self.met: dict[Value, None] = {}

    def leaf(self, value: Value) -> Numbers:
        self.met[value] = None
        if value not in self.draws:
            rng = np.random.default_rng(len(self.draws))
            sign = rng.choice([-1.0, 1.0], DRAWS)
            self.draws[value] = sign * rng.uniform(0.5, 2.0, DRAWS)
        return self.draws[value]

    def number(self, value: Value) -> Numbers:
        if value not in self.known:
            self.known[value] = self._compute(value)
        return self.known[value]

    def _compute(self, value: Value) -> Numbers:
        if value.name is not None:
            return self.leaf(value)
        if value.constant is not None:
            number = _constant(value)
            return self.leaf(value) if number is None else np.full(DRAWS, number)
        if value.source is not None:
            return self.number(value.source)
        equation = value.producer
        if equation is None or not (value.inexact or value.aval.dtype == bool):
            raise UnknownError
        name = equation.name
        if name in compat.CUSTOM and len(equation.results) == 1:  # jax.nn.relu
            return self._call(equation)
        if name in VIEWS:
            return self.number(equation.operands[0])
        if name == "integer_pow":
            return self.number(equation.operands[0]) ** float(equation.params["y"])
        if name not in RULES:
            raise UnknownError
        return RULES[name](*map(self.number, equation.operands))

    def _call(self, equation: Equation) -> Numbers:
        body = flatten(compat.call_body(equation.params))
        for inside, outside in zip(body.inputs, equation.operands, strict=True):
            self.known[inside] = self.number(outside)
        return self.number(body.outputs[0])

    def affine(self, run: Sequence[Equation], start: Value) -> tuple[Numbers, Numbers]:
        """The a and c of a run of equations that begins with `start`."""
        a, c, value = np.ones(DRAWS), np.zeros(DRAWS), start
        for equation in run:
            a, c = self._step(equation, value, a, c)
            value = equation.results[0]
        return a, c

    def _step(
        self, equation: Equation, value: Value, a: Numbers, c: Numbers
    ) -> tuple[Numbers, Numbers]:
        name, operands = equation.name, equation.operands
        if name == "neg":
            return -a, -c
        if len(operands) == 1 or name in VIEWS:
            return a, c
        first = operands[0] is value
        other = self.number(operands[1 if first else 0])
        match name:
            case "mul":
                return a * other, c * other
            case "div" if first:
                return a / other, c / other
            case "add" | "add_any":
                return a, c + other
            case "sub":
                return (a, c - other) if first else (-a, other - c)
        raise UnknownError


def _constant(value: Value) -> float | None:
    """The number that a constant is, None for an array: whose elements may differ."""
    if value.ndim or isinstance(value.constant, Tracer) or compat.is_key(value.aval):
        return None
    return float(value.constant)


def is_step(equation: Equation, value: Value) -> bool:
    """Whether an equation is an affine map of `value` by parameters and constants."""
    name, operands = equation.name, equation.operands
    if equation.bodies or equation.node is not None or not equation.results[0].inexact:
        return False
    if name == "neg" or name == "convert_element_type":
        return True
    if name not in ("mul", "div", "add", "add_any", "sub") or len(operands) != 2:
        return False
    others = [v for v in operands if v is not value]
    if len(others) != 1 or others[0].kind >= NOISE:
        return False
    same_size = equation.results[0].shape == value.shape
    return same_size and (name != "div" or operands[0] is value)
