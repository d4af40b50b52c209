"""A program with `fake_quant` in it, run in integers wherever a rule says how."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from jaxmet.engine.integers.grid_arithmetic import on_grid, target_grid
from jaxmet.engine.integers.integer_rules import RULES, spread_constant
from jaxmet.engine.integers.integer_values import (
    Floats,
    Held,
    Integers,
    Joint,
    Origin,
    Total,
    at_hand,
    at_once,
    computed,
    floats,
)
from jaxmet.engine.program import compat
from jaxmet.engine.program.scopes import grid_owner
from jaxmet.numerics.fake_quant import fake_quant_p

COMPUTES = {
    "conv_general_dilated": "convolution",
    "dot_general": "dot",
    "add": "add",
    "reduce_sum": "sum",
    "reduce_window_sum": "average pool",
    "reduce_window_max": "max pool",
    "concatenate": "concat",
    "exp": "exp",
    "logistic": "logistic",
    "tanh": "tanh",
    "erf": "erf",
    "mul": "multiply",
}
INLINE = (*compat.CALLS, *compat.CUSTOM, *compat.REMAT)


@dataclasses.dataclass(frozen=True)
class IntegerStep:
    """One operation: its layer, what it is, and None or why it is in float.

    Of one in integers also what it was made of, what it was put on a grid from, and the result;
    None where nothing puts it on a grid.
    """

    layer: str
    operation: str
    why: str | None
    origin: Origin | None = None
    value: Total | Joint | None = None
    result: Integers | None = None


@dataclasses.dataclass
class IntegerProgram:
    """Runs equations on values that are floats or integers, and lists what it did."""

    steps: list[IntegerStep] = dataclasses.field(default_factory=list)

    def run(self, closed: Any, values: Sequence[Held], scope: str = "") -> list[Held]:
        jaxpr, consts = compat.open_jaxpr(closed)
        known = [Floats(at_hand(a), True, tuple(jnp.shape(a))) for a in consts]
        environment: dict[Any, Held] = dict(zip(jaxpr.constvars, known, strict=True))
        environment.update(zip(jaxpr.invars, values, strict=True))

        def read(atom: Any) -> Held:
            if isinstance(atom, Literal):
                return Floats(atom.val, True, tuple(jnp.shape(atom.val)))
            return environment[atom]

        for equation in jaxpr.eqns:
            results = self._step(equation, [read(v) for v in equation.invars], scope)
            environment.update(zip(equation.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _step(self, equation: Any, values: list[Held], scope: str) -> list[Held]:
        name = equation.primitive.name
        stack = str(equation.source_info.name_stack)
        layer = "/".join(part for part in (scope, stack) if part)
        if equation.primitive is fake_quant_p:
            return [self._quantized(equation, values)]
        if name in INLINE:
            body = compat.call_body(equation.params)
            return self.run(
                body, values[-len(compat.open_jaxpr(body)[0].invars) :], layer
            )
        if all(isinstance(v, Floats) for v in values):
            return self._in_float(equation, layer, values, None)
        rule = RULES.get(name)
        found = None
        if rule is not None:
            # What is done to weights alone is done now: a file needs the numbers.
            with at_once(values):
                found = rule(equation, layer, values)
        if found is None:
            return self._in_float(equation, layer, values, self._why(equation, values))
        return [self._noted(equation, layer, values, found)]

    def _noted(
        self, equation: Any, layer: str, values: list[Held], found: Held
    ) -> Held:
        """The value, listed if an operation has begun with it."""
        name, params = equation.primitive.name, equation.params
        if name == "concatenate":
            self.steps.append(IntegerStep(layer, COMPUTES[name], None))
        if name == "reduce_window_max" and isinstance(found, Integers):
            (x,) = values
            assert isinstance(x, Integers)
            origin = Origin(layer, name, (x,), params)
            step = IntegerStep(layer, COMPUTES[name], None, origin, result=found)
            self.steps.append(step)
        origin = found.origin if isinstance(found, Total | Joint) else None
        if isinstance(found, Total | Joint) and origin is not None and origin.index < 0:
            origin = dataclasses.replace(origin, index=len(self.steps))
            self.steps.append(IntegerStep(layer, COMPUTES[name], None, origin))
            return dataclasses.replace(found, origin=origin)
        return found

    def _quantized(self, equation: Any, values: list[Held]) -> Held:
        x, *grid = values
        sides = [floats(v).stored for v in grid]
        plain = equation.invars[0].aval.dtype == jnp.float32
        target = target_grid(sides) if plain else None
        if target is None or not target.fits(x.shape):
            return self._in_float(equation, "", values, None)[0]
        owner = grid_owner(equation)
        found = dataclasses.replace(on_grid(x, target), layer=owner)
        if isinstance(x, Total | Joint) and x.origin is not None:
            at = x.origin.index
            new = {"origin": x.origin, "value": x, "result": found}
            self.steps[at] = dataclasses.replace(self.steps[at], **new)
        return found

    def opened(self, value: Held) -> Floats:
        """A value in float; of a sum that nothing rounds, its step has the bias by then."""
        if isinstance(value, Total) and value.origin is not None:
            at = value.origin.index
            if self.steps[at].result is None:
                new = {"origin": value.origin, "value": value}
                self.steps[at] = dataclasses.replace(self.steps[at], **new)
        return floats(value)

    def _why(self, equation: Any, values: list[Held]) -> str:
        """What is not on a grid, of an operation with a rule."""
        read = [v for v in values if isinstance(v, Floats) and not v.fixed]
        weight = [v for v in values if isinstance(v, Floats) and v.fixed]
        if read:
            return "an input is in float"
        if weight and equation.primitive.name in (
            "dot_general",
            "conv_general_dilated",
        ):
            return "the weight is in float"
        return "no rule in integers"

    def _in_float(
        self, equation: Any, layer: str, values: list[Held], why: str | None
    ) -> list[Held]:
        name = equation.primitive.name
        fixed = all(v.fixed for v in values)
        if name == "broadcast_in_dim" and len(values) == 1:
            found = spread_constant(equation, values)
            if found is not None:
                return [found]
        if name in COMPUTES and not fixed and layer:
            inexact = jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.inexact)
            if inexact:
                self.steps.append(IntegerStep(layer, COMPUTES[name], why or "in float"))
        held = [self.opened(v) for v in values]
        run = lambda: compat.bind(
            equation.primitive, equation.params, [v.array for v in held]
        )
        stored = [v.stored for v in held]
        results = computed(run, *stored) if fixed else run()
        return [Floats(a, fixed, tuple(jnp.shape(a))) for a in results]


def in_integers(
    function: Callable[..., Sequence[Any]],
    held: Sequence[Held],
    inputs: Sequence[Any],
) -> tuple[list[Any], list[IntegerStep]]:
    """The results of `function(weights, inputs)` with weights as what they are held as."""
    dtypes = [v.stored.dtype if isinstance(v, Floats) else jnp.float32 for v in held]
    shapes = [
        jax.ShapeDtypeStruct(v.shape, d) for v, d in zip(held, dtypes, strict=True)
    ]
    closed = jax.make_jaxpr(lambda w, x: list(function(w, x)))(shapes, list(inputs))
    program = IntegerProgram()
    values = [Floats(x, False, tuple(jnp.shape(x))) for x in inputs]
    results = program.run(closed, [*held, *values])
    return [program.opened(v).array for v in results], program.steps
