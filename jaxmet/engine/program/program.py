"""A jaxpr as a flat program: calls inlined, loops and branches kept as regions.

Values are objects, so that a body inlined twice gives two sets of values. What a value
may depend on is one of four kinds, each stronger than the one before: constants,
parameters, noise (random bits) and data (the model's inputs).
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxmet.engine.program import compat

CONST, PARAM, NOISE, DATA = range(4)

RAGGED = ("ragged_dot_general", "ragged_dot")
PRODUCTS = ("conv_general_dilated", "dot_general", *RAGGED)


@dataclasses.dataclass(eq=False, repr=False)
class Value:
    """One array of the program. `name` is set on parameter leaves."""

    aval: Any
    kind: int = CONST
    constant: Any = None
    name: str | None = None
    producer: "Equation | None" = dataclasses.field(default=None, repr=False)
    uses: list["Equation | None"] = dataclasses.field(default_factory=list, repr=False)
    axes: tuple = ()
    source: "Value | None" = dataclasses.field(
        default=None, repr=False
    )  # outside a region
    sliced: bool = False  # and whether a loop takes one slice of it
    tied: list = dataclasses.field(default_factory=list, repr=False)
    """Pairs of axes whose channels are the same ones though each has its own scale."""

    @property
    def shape(self) -> tuple[compat.Size, ...]:
        return tuple(self.aval.shape)

    @property
    def ndim(self) -> int:
        return len(self.aval.shape)

    @property
    def inexact(self) -> bool:
        """Whether this holds real numbers that can be rounded: no integers, not complex."""
        return bool(jnp.issubdtype(self.aval.dtype, jnp.floating))

    @property
    def is_complex(self) -> bool:
        return bool(jnp.issubdtype(self.aval.dtype, jnp.complexfloating))

    def numbers(self) -> np.ndarray | None:
        """The floats of a constant that is known while tracing, wide; None for others."""
        known = self.kind == CONST and self.constant is not None
        if not known or isinstance(self.constant, Tracer) or compat.is_key(self.aval):
            return None
        if not jnp.issubdtype(self.aval.dtype, jnp.floating):
            return None
        return np.asarray(self.constant, np.float64)

    def scalar(self) -> float | None:
        """The number, if this is a constant scalar that is known while tracing."""
        if self.constant is None or self.ndim or isinstance(self.constant, Tracer):
            return None
        known = not compat.is_key(self.aval) and not self.is_complex
        return float(self.constant) if known else None


@dataclasses.dataclass(eq=False, repr=False)
class Equation:
    """One operation; `bodies` are the regions of a loop, branch or custom rule."""

    primitive: Any
    params: dict[str, Any]
    operands: list[Value]
    results: list[Value]
    calls: tuple[tuple[int, str], ...] = ()
    bodies: tuple["Region", ...] = ()
    node: Any = dataclasses.field(default=None, repr=False)
    effects: Any = ()

    @property
    def name(self) -> str:
        return str(self.primitive.name)

    @property
    def data(self) -> list[Value]:
        return [v for v in self.operands if v.kind == DATA]

    @property
    def kind(self) -> int:
        return max((v.kind for v in self.operands), default=CONST)


@dataclasses.dataclass(eq=False, repr=False)
class Region:
    """A straight list of equations with its inputs, constants and outputs."""

    inputs: list[Value]
    constants: list[Value]
    equations: list[Equation]
    outputs: list[Value]

    def walk(self) -> Iterator[Equation]:
        """Every equation, those of inner regions before the one that holds them."""
        for equation in self.equations:
            for body in equation.bodies:
                yield from body.walk()
            yield equation


def _has_product(jaxpr: Any) -> bool:
    inner, _ = compat.open_jaxpr(jaxpr)
    return any(
        e.primitive.name in PRODUCTS
        or any(_has_product(j) for j in compat.sub_jaxprs(e.params))
        for e in inner.eqns
    )


def flatten(jaxpr: Any) -> Region:
    """The program of a closed jaxpr, without dead code, its values linked."""
    region = _Flattener().region(jaxpr)
    prune(region)
    link(region)
    return region


def prune(region: Region) -> None:
    """Drop equations that nothing needs: they would look like second uses."""
    live = set(region.outputs)
    kept = []
    for equation in reversed(region.equations):
        if equation.effects or any(v in live for v in equation.results):
            live.update(equation.operands)
            kept.append(equation)
            for body in equation.bodies:
                prune(body)
    region.equations = kept[::-1]


class _Flattener:
    def __init__(self):
        self.count = 0

    def region(self, jaxpr: Any) -> Region:
        inner, consts = compat.open_jaxpr(jaxpr)
        inputs = [Value(v.aval) for v in inner.invars]
        region = Region(inputs, [], [], [])
        env = dict(zip(inner.invars, inputs, strict=True))
        self.constants(region, env, inner.constvars, consts)
        region.outputs = self.inline(region, inner, env, ())
        return region

    def constants(self, region, env, variables, consts) -> None:
        for variable, const in zip(variables, consts, strict=True):
            env[variable] = Value(variable.aval, constant=const)
            region.constants.append(env[variable])

    def inline(self, region, jaxpr, env, calls) -> list[Value]:
        """Append the equations of `jaxpr`; the values of its outputs."""

        def read(atom: Any) -> Value:
            if isinstance(atom, jax.extend.core.Literal):
                return Value(atom.aval, constant=atom.val)
            return env[atom]

        for eqn in jaxpr.eqns:
            operands = [read(a) for a in eqn.invars]
            if eqn.primitive.name in compat.CALLS:
                body, consts = compat.open_jaxpr(compat.call_body(eqn.params))
                inner = dict(zip(body.invars, operands, strict=True))
                self.constants(region, inner, body.constvars, consts)
                self.count += 1
                call = (self.count, str(eqn.params.get("name", "")))
                results = self.inline(region, body, inner, (*calls, call))
                env.update(zip(eqn.outvars, results, strict=True))
                continue
            results = [Value(v.aval) for v in eqn.outvars]
            env.update(zip(eqn.outvars, results, strict=True))
            bodies = tuple(self.region(j) for j in self.bodies(eqn))
            region.equations.append(
                Equation(
                    eqn.primitive,
                    eqn.params,
                    operands,
                    results,
                    calls,
                    bodies,
                    effects=eqn.effects,
                )
            )
        return [read(a) for a in jaxpr.outvars]

    def bodies(self, eqn: Any) -> Sequence[Any]:
        """The jaxprs that become regions; those of other equations stay opaque."""
        name, params = eqn.primitive.name, eqn.params
        if name == "scan" or name in compat.REMAT:
            return (params["jaxpr"],)
        if name == "cond":
            return params["branches"]
        if name == "while":
            return (params["cond_jaxpr"], params["body_jaxpr"])
        if name in compat.CUSTOM and _has_product(compat.call_body(params)):
            return (compat.call_body(params),)
        return ()


def link(region: Region) -> None:
    """Fill in who makes and who uses each value; `None` stands for the region's end."""
    for equation in region.equations:
        for value in equation.operands:
            if not value.uses or value.uses[-1] is not equation:  # twice in a row
                value.uses.append(equation)
        for value in equation.results:
            value.producer = equation
        loops = {inside for inside, _ in carried(equation)}
        for body, outer in zip(equation.bodies, body_operands(equation), strict=True):
            link(body)
            for i, (inside, outside) in enumerate(zip(body.inputs, outer, strict=True)):
                if inside not in loops:
                    inside.source = outside
                    inside.sliced = equation.name == "scan" and i >= sum(
                        compat.scan_arity(equation.params)
                    )
    for value in region.outputs:
        if not value.uses or value.uses[-1] is not None:
            value.uses.append(None)


def body_operands(equation: Equation) -> list[list[Value]]:
    """For each body, the outer values that its inputs stand for, in order."""
    name, operands = equation.name, equation.operands
    if name == "cond":
        return [operands[1:] for _ in equation.bodies]
    if name == "while":
        first = equation.params["cond_nconsts"]
        second = first + equation.params["body_nconsts"]
        carry = operands[second:]
        return [operands[:first] + carry, operands[first:second] + carry]
    return [operands] if equation.bodies else []


def carried(equation: Equation) -> list[tuple[Value, Value]]:
    """Pairs (input, output) of a loop's body that are one value in the next round."""
    if equation.name == "scan":
        skip, count = compat.scan_arity(equation.params)
    elif equation.name == "while":
        skip = equation.params["body_nconsts"]
        count = len(equation.results)
    else:
        return []
    body = equation.bodies[-1]
    return list(
        zip(body.inputs[skip : skip + count], body.outputs[:count], strict=True)
    )


def spread_kinds(region: Region) -> None:
    """Give every value its kind, loops to their fixed point."""
    for equation in region.equations:
        kind = equation.kind
        if equation.name.startswith(("random_", "threefry", "rng_")):
            kind = max(kind, NOISE) if kind < DATA else NOISE
        if not equation.bodies:
            for value in equation.results:
                value.kind = max(value.kind, kind)
            continue
        for body, outer in zip(equation.bodies, body_operands(equation), strict=True):
            for inside, outside in zip(body.inputs, outer, strict=True):
                inside.kind = max(inside.kind, outside.kind)
        _settle(equation)
        selector = equation.operands[0].kind if equation.name == "cond" else CONST
        outputs = (
            [equation.bodies[-1].outputs]
            if equation.name == "while"
            else [b.outputs for b in equation.bodies]
        )
        for row in outputs:
            for value, inside in zip(equation.results, row, strict=True):
                value.kind = max(value.kind, inside.kind, selector)


def _settle(equation: Equation) -> None:
    pairs = carried(equation)
    while True:
        for body in equation.bodies:
            spread_kinds(body)
        stale = [(i, o) for i, o in pairs if o.kind > i.kind]
        if not stale:
            return
        for inside, outside in stale:
            inside.kind = outside.kind
        if equation.name == "while":  # the condition reads the same carry
            skip = equation.params["cond_nconsts"]
            for inside, (carry, _) in zip(
                equation.bodies[0].inputs[skip:], pairs, strict=True
            ):
                inside.kind = carry.kind
