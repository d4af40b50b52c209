"""Equations whose operands are all known, computed once instead of traced."""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.extend.core import Literal

from jaxmet.engine.program import compat

SMALL = 1024
"""Values of at most so many entries are kept whatever they are made of."""


def with_known_computed(
    closed: Any, kept: Callable[[Any], bool]
) -> Callable[..., list[Any]]:
    """A function that runs equations, and computes those that depend on no input while traced.

    A constant that only spreads a smaller one out stays an equation: a program holds none that is
    larger than what was given.

    Args:
        closed: the closed jaxpr.
        kept: says of an equation that its result stays an equation where a traced one reads it.

    Returns:
        `f(*inputs)`, a list of the results, with the name scopes of the equations.
    """
    jaxpr, constants = compat.open_jaxpr(closed)

    def run(*inputs: Any) -> list[Any]:
        values = dict(zip(jaxpr.constvars, constants, strict=True))
        values |= dict(zip(jaxpr.invars, inputs, strict=True))
        known = _Known(values, kept)
        for equation in jaxpr.eqns:
            known.run(equation)
        return [*map(known.traced, jaxpr.outvars)]

    return run


class _Known:
    """What variables hold: traced values, numbers, and equations that have not been needed."""

    def __init__(self, values: dict[Any, Any], kept: Callable[[Any], bool]) -> None:
        self.values, self.kept = values, kept
        self.equations: dict[Any, Any] = {}  # of numbers that stay equations

    def run(self, equation: Any) -> None:
        inputs = [v for v in equation.invars if not isinstance(v, Literal)]
        is_open = equation.effects or not _has_numbers(equation)
        if is_open or any(isinstance(self.values.get(v), Tracer) for v in inputs):
            found = _bound(equation, [*map(self.traced, equation.invars)])
            self.values.update(zip(equation.outvars, found, strict=True))
        elif self.kept(equation):
            self.equations[equation.outvars[0]] = equation
        else:
            self.compute(equation)

    def compute(self, equation: Any) -> None:
        operands = [*map(self.number, equation.invars)]
        with jax.ensure_compile_time_eval():
            found = compat.bind(equation.primitive, equation.params, operands)
        self.values.update(zip(equation.outvars, found, strict=True))
        if len(found) == 1 and _spreads(found[0], operands):
            self.equations[equation.outvars[0]] = equation

    def number(self, v: Any) -> Any:
        """What a variable that depends on no input holds."""
        if isinstance(v, Literal):
            return v.val
        if v not in self.values:
            self.compute(self.equations[v])
        return self.values[v]

    def traced(self, v: Any) -> Any:
        """What an equation that is traced reads."""
        if isinstance(v, Literal):
            return v.val
        equation = self.equations.get(v)
        if equation is None:
            return self.values[v]
        key = ("traced", v)
        if key not in self.values:
            operands = [*map(self.traced, equation.invars)]
            (self.values[key],) = _bound(equation, operands)
        return self.values[key]


def _bound(equation: Any, operands: Sequence[Any]) -> list[Any]:
    """An equation traced again, in its name scope."""
    stack = str(equation.source_info.name_stack)
    with jax.named_scope(stack) if stack else contextlib.nullcontext():
        return compat.bind(equation.primitive, equation.params, operands)


def _has_numbers(equation: Any) -> bool:
    """Whether all sizes of the results are numbers, none a symbol."""
    sizes = [n for v in equation.outvars for n in getattr(v.aval, "shape", ())]
    return all(isinstance(n, int) for n in sizes)


def _spreads(result: Any, operands: Sequence[Any]) -> bool:
    size = math.prod(np.shape(result))
    return size > SMALL and size > 2 * sum(math.prod(np.shape(x)) for x in operands)
