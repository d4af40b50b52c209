"""Loops, branches and the like, wrapped again as they were around an interpreted body."""

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
from jax import lax

from jaxmet.engine.flow.token_masks import Kept, ScanMasks, TokenMasks
from jaxmet.engine.program import compat
from jaxmet.engine.program.program import Equation

if TYPE_CHECKING:
    from jaxmet.engine.run.machine import Machine


class Counted(NamedTuple):
    """Statistics from under a branch: meaningful only where `count` is not zero."""

    value: Any
    count: Any


def _masks_before(machine: "Machine", equation: Equation) -> list[Kept]:
    """The masks of what a loop or branch reads; those of its results are set."""
    if machine.masks is None:
        return []
    masks = [machine.masks.of(v) for v in equation.operands]
    if equation.name != "scan":
        machine.masks.follow(equation, {})
    return masks


def _remat(machine: "Machine", equation: Equation, operands: list) -> list:
    masks = _masks_before(machine, equation)

    def body(*operands):
        return machine.body(equation.bodies[0], operands, masks)

    p = equation.params
    again = jax.checkpoint(body, prevent_cse=p["prevent_cse"], policy=p["policy"])
    results, statistics = again(*operands)
    machine.statistics |= statistics
    return results


def _scan(machine: "Machine", equation: Equation, operands: list) -> list:
    p, region = equation.params, equation.bodies[0]
    skip, count = compat.scan_arity(p)
    constants = operands[:skip]
    masked = None
    if machine.masks is not None:
        masked = ScanMasks(equation, _masks_before(machine, equation))

    def body(carry, slices):
        (carry, held), (number, *slices, seen) = carry, slices
        inner = dataclasses.replace(machine, iteration=(*machine.iteration, number))
        inputs = masked.inside(held, seen) if masked is not None else None
        masks = None if inputs is None else TokenMasks(region.inputs, inputs)
        out, statistics = inner.inner(region, (*constants, *carry, *slices), masks)
        left: list = []
        if masked is not None and masks is not None:
            held, left = masked.outside([masks.of(v) for v in region.outputs])
        return (out[:count], held), (out[count:], left, statistics)

    start, seen = ([], []) if masked is None else (masked.carry, masked.slices)
    (carry, held), (stacked, left, statistics) = lax.scan(
        body,
        (operands[skip : skip + count], start),
        [jnp.arange(p["length"]), *operands[skip + count :], seen],
        length=p["length"],
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    if masked is not None and machine.masks is not None:
        machine.masks.put(equation.results, masked.results(held, left))
    machine.statistics |= statistics
    return [*carry, *stacked]


def turn_of(
    machine: "Machine", equation: Equation, operands: list, carry: list, number: Any
) -> tuple[list, dict[str, Any]]:
    """What a `scan` carries after the turn that reads slice `number`, and its statistics."""
    skip, count = compat.scan_arity(equation.params)
    inner = dataclasses.replace(machine, iteration=(*machine.iteration, number))
    slices = [
        lax.dynamic_index_in_dim(x, number, keepdims=False)
        for x in operands[skip + count :]
    ]
    given = (*operands[:skip], *carry, *slices)
    out, statistics = inner.inner(equation.bodies[0], given, None)
    return out[:count], statistics


def _cond(machine: "Machine", equation: Equation, operands: list) -> list:
    index, *rest = operands
    masks = _masks_before(machine, equation)[1:]
    traced = [
        jax.make_jaxpr(lambda *o, b=body: machine.body(b, o, masks), return_shape=True)(
            *rest
        )
        for body in equation.bodies
    ]
    shapes = [statistics for _, (_, statistics) in traced]

    def branch(i: int):
        jaxpr, shape = traced[i]

        def taken(*operands):
            flat = jax.extend.core.jaxpr_as_fun(jaxpr)(*operands)
            results, statistics = jax.tree.unflatten(jax.tree.structure(shape), flat)
            every = {}
            for k, other in enumerate(shapes):
                for name, one in other.items():
                    value = statistics[name] if k == i else jax.tree.map(_zeros, one)
                    every[name] = Counted(value, jnp.int32(k == i))
            return results, every

        return taken

    branches = [branch(i) for i in range(len(equation.bodies))]
    results, statistics = lax.switch(index, branches, *rest)
    machine.statistics |= statistics
    return results


def _zeros(shape: Any) -> jax.Array:
    return jnp.zeros(shape.shape, shape.dtype)


def _while(machine: "Machine", equation: Equation, operands: list) -> list:
    first = equation.params["cond_nconsts"]
    second = first + equation.params["body_nconsts"]
    condition, body = equation.bodies
    _masks_before(machine, equation)
    machine = dataclasses.replace(machine, masks=None)

    def again(carry):
        return machine.body(condition, (*operands[:first], *carry))[0][0]

    def step(carry):
        results, statistics = machine.body(body, (*operands[first:second], *carry))
        if statistics:
            raise ValueError(
                f"jaxmet.evaluate: the hook returned statistics of {sorted(statistics)}, "
                "which run under lax.while_loop, where their number is not known. Return "
                "None for nodes whose `region` has 'while', or write the loop as lax.scan."
            )
        return results

    return list(lax.while_loop(again, step, operands[second:]))


def _custom(machine: "Machine", equation: Equation, operands: list) -> list:
    """A custom derivative rule with a layer inside keeps its rule."""
    masks = _masks_before(machine, equation)

    def inner(*operands):
        return machine.body(equation.bodies[0], operands, masks)

    wrapped = jax.custom_jvp(inner)

    @wrapped.defjvp
    def rule(primals, tangents):
        outputs = inner(*primals)
        results, given = jax.jvp(
            lambda *o: compat.bind(equation.primitive, equation.params, o),
            primals,
            tangents,
        )
        del results
        zeros = jax.tree.map(_zero_tangent, outputs[1])
        return outputs, (given, zeros)

    results, statistics = wrapped(*operands)
    machine.statistics |= statistics
    return results


def _zero_tangent(x: Any) -> Any:
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.zeros_like(x)
    return jnp.zeros(x.shape, jax.dtypes.float0)


REGIONS = {
    "scan": _scan,
    "cond": _cond,
    "while": _while,
    **dict.fromkeys(compat.REMAT, _remat),
    **dict.fromkeys(compat.CUSTOM, _custom),
}
