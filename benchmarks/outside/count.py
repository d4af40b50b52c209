"""An independent count of a model's layers and multiplications, from its jaxpr alone.

A layer is a `dot_general`, convolution or `ragged_dot` of something that depends on inputs
with something that depends on parameters only, or a gather of rows of the latter at indices
that depend on inputs. Nothing of jaxmet is used here: it is what jaxmet is compared with.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

PARAMETER, INPUT = 1, 2
DOTS = ("dot_general", "ragged_dot", "ragged_dot_general")


@dataclasses.dataclass
class Counted:
    """Layers by primitive and shape of their weight, and multiplications of all products."""

    layers: list[str] = dataclasses.field(default_factory=list)
    macs: int = 0


def counted(apply: Callable[..., Any], params: Any, *inputs: Any) -> Counted:
    """What the equations of `apply(params, *inputs)` hold."""
    closed = jax.make_jaxpr(apply)(params, *inputs)
    jaxpr = _open(closed)
    number = len(jax.tree.leaves(params))
    taints = [PARAMETER] * number + [INPUT] * (len(jaxpr.invars) - number)
    found = Counted()
    _walk(jaxpr, taints, found, 1, [True] * len(jaxpr.outvars))
    return found


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _walk(
    jaxpr: Any,
    taints: Sequence[int],
    found: Counted,
    times: int,
    wanted: Sequence[bool],
) -> list[int]:
    """Taints of the results, after the live equations have been counted."""
    taint = dict(zip(jaxpr.invars, taints, strict=True))
    read = lambda v: 0 if hasattr(v, "val") else taint.get(v, 0)
    live = {
        v
        for v, w in zip(jaxpr.outvars, wanted, strict=True)
        if w and not hasattr(v, "val")
    }
    kept = []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or any(v in live for v in equation.outvars):
            live.update(v for v in equation.invars if not hasattr(v, "val"))
            kept.append(equation)
    for equation in reversed(kept):
        outs = _equation(
            equation, [read(v) for v in equation.invars], found, times, live
        )
        taint.update(zip(equation.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _equation(
    equation: Any, taints: list[int], found: Counted, times: int, live: set[Any]
) -> list[int]:
    name, params = equation.primitive.name, equation.params
    every = 0
    for t in taints:
        every |= t
    if name == "scan":
        return _scan(equation, taints, found, times)
    if name == "while":
        nc, nb = params["cond_nconsts"], params["body_nconsts"]
        body, carry = _open(params["body_jaxpr"]), taints[nc + nb :]
        carry = _fixed(body, taints[nc : nc + nb], carry, [], found, times)
        return [t | INPUT * bool(every & INPUT) for t in carry]
    if name == "cond":
        outs = [taints[0]] * len(equation.outvars)
        branches = params["branches"]
        if params.get("branches_platforms"):  # one for each platform, the others unused
            branches = branches[-1:]
        for branch in map(_open, branches):
            more = _walk(branch, taints[1:], found, times, [True] * len(outs))
            outs = [a | b for a, b in zip(outs, more, strict=True)]
        return outs
    inner = [_open(v) for v in params.values() if hasattr(_open(v), "eqns")]
    inner = [j for j in inner if len(j.invars) == len(taints)]
    if inner and len(inner[0].outvars) == len(equation.outvars):
        wanted = [v in live for v in equation.outvars]
        return _walk(inner[0], taints, found, times, wanted)
    _count(name, equation, taints, found, times)
    return [every] * len(equation.outvars)


def _scan(equation: Any, taints: list[int], found: Counted, times: int) -> list[int]:
    params, body = equation.params, _open(equation.params["jaxpr"])
    if "ft_in" in params:
        consts, carries, _ = (len(list(t)) for t in params["ft_in"].unpack())
    else:
        consts, carries = params["num_consts"], params["num_carry"]
    split = consts + carries
    return _fixed(
        body,
        taints[:consts],
        taints[consts:split],
        taints[split:],
        found,
        times * params["length"],
    )


def _fixed(
    body: Any,
    consts: list[int],
    carry: list[int],
    xs: list[int],
    found: Counted,
    times: int,
) -> list[int]:
    """A loop body, counted once its carry depends on nothing more."""
    wanted = [True] * len(body.outvars)
    while True:
        outs = _walk(body, [*consts, *carry, *xs], Counted(), 1, wanted)
        new = [a | b for a, b in zip(carry, outs[: len(carry)], strict=True)]
        if new == carry:
            return _walk(body, [*consts, *carry, *xs], found, times, wanted)
        carry = new


def _count(
    name: str, equation: Any, taints: list[int], found: Counted, times: int
) -> None:
    if name not in (*DOTS, "conv_general_dilated", "gather"):
        return
    left, right = taints[:2]
    shapes = [tuple(v.aval.shape) for v in equation.invars[:2]]
    if name == "gather":
        if left == PARAMETER and right & INPUT:
            found.layers.append(f"{name} {shapes[0]}")
        return
    if (left | right) & INPUT:
        found.macs += times * _macs(name, equation, shapes)
    if left == PARAMETER and right & INPUT:
        found.layers.append(f"{name} {shapes[0]}")
    elif right == PARAMETER and left & INPUT:
        found.layers.append(f"{name} {shapes[1]}")


def _macs(name: str, equation: Any, shapes: list[tuple[int, ...]]) -> int:
    if name == "dot_general":
        (contract, _), _ = equation.params["dimension_numbers"]
        if not contract:
            return 0  # a scaling that was written as a product
        summed = math.prod(shapes[0][a] for a in contract)
        return summed * math.prod(equation.outvars[0].aval.shape)
    if name.startswith("ragged_dot"):
        return math.prod(shapes[0]) * shapes[1][-1]
    spec = equation.params["dimension_numbers"].rhs_spec
    window = math.prod(shapes[1][a] for a in spec[1:])
    return window * math.prod(equation.outvars[0].aval.shape)
