"""What XLA:CPU does badly, in an equal form.

A convolution with a window of one is a dot over channels. One with few inputs to an output
(depthwise, small groups, a stem over colours) is a sum of shifted inputs times one number
per channel. On XLA:CPU both are several times faster than the convolution primitive; other
platforms keep the primitive. The choice is made when the program is lowered.

XLA:CPU also computes a value again in every fusion that uses it, a depthwise sum included,
where that looks cheap. `computed_once` makes it look expensive.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxmet.engine.backend.shifts import (
    closed,
    multiply_and_shift,
    opened,
    place_by_place,
    shift_and_multiply,
    window,
)
from jaxmet.engine.program import compat

TERMS = 50  # products to an output, a 7x7 depthwise window: more take long to compile
COLOURS = 3  # inputs to an output where all channels are mixed

Params = dict[str, Any]


def convolution(primitive: Any, params: Params, x: Any, kernel: Any) -> Any:
    """One convolution equation, with the faster formulation on CPU where there is one."""
    if _formulation(params, x, kernel) is None:
        return compat.bind(primitive, params, (x, kernel))[0]
    return _either(x, kernel, primitive=primitive, params=tuple(params.items()))


@partial(jax.jit, static_argnames=("primitive", "params"))
def _either(x: Any, kernel: Any, *, primitive: Any, params: tuple) -> Any:
    """Under `jit`, so that layers of one shape are traced and lowered once."""
    p = dict(params)
    formulation = _formulation(p, x, kernel)
    assert formulation is not None

    def plain(x, kernel):
        return compat.bind(primitive, p, (x, kernel))[0]

    def otherwise(x, kernel):
        return formulation(p, x, kernel)

    if formulation is shift_and_multiply:
        ways = plain, plain
        if p["feature_group_count"] > 1:
            ways = partial(multiply_and_shift, p), partial(place_by_place, p)
        otherwise = _derived_from(otherwise, *ways)
    return lax.platform_dependent(x, kernel, cpu=otherwise, default=plain)


@jax.jit
def computed_once(x: Any) -> Any:
    """`x` to the bit, computed once on CPU however many uses it has.

    Fusion repeats no division: the value is chosen, at run time, over its reciprocal. For
    what a hook both observes and returns.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x

    def chosen(x):
        always = lax.optimization_barrier(np.True_)
        reciprocal = lax.div(lax.full_like(x, 1), lax.stop_gradient(x))
        return lax.select(always, x, reciprocal)

    return lax.platform_dependent(x, cpu=chosen, default=lambda x: x)


def _formulation(p: Params, x: Any, kernel: Any) -> Callable | None:
    spec, groups = p["dimension_numbers"].rhs_spec, p["feature_group_count"]
    taps, inputs = math.prod(kernel.shape[i] for i in spec[2:]), kernel.shape[spec[1]]
    wide = p["preferred_element_type"]
    if not (
        p["batch_group_count"] == 1
        and p.get("out_sharding") is None
        and all(d == 1 for d in p["lhs_dilation"])
        and x.dtype == kernel.dtype == np.float32
        and (wide is None or wide == np.float32)
    ):
        return None
    if groups == 1 and taps == 1:
        return pointwise
    if taps * inputs < TERMS and (groups > 1 or inputs <= COLOURS):
        return shift_and_multiply
    return None


def integer_formulation(p: Params, x: Any, kernel: Any) -> Callable | None:
    """The faster form on CPU of a convolution of integers that pads nothing, if there is one."""
    spec, groups = p["dimension_numbers"].rhs_spec, p["feature_group_count"]
    taps, inputs = math.prod(kernel.shape[i] for i in spec[2:]), kernel.shape[spec[1]]
    if groups == 1 and taps == 1:
        return pointwise
    if groups == 1 and inputs <= COLOURS:
        return windows_side_by_side
    if groups > 1 and taps * inputs < TERMS:
        return wide_shift_and_multiply
    return None


def _derived_from(otherwise: Callable, in_x: Callable, in_kernel: Callable) -> Callable:
    """`otherwise` with its derivatives from two functions that are equal to it."""
    formulation = jax.custom_jvp(otherwise)

    def rule(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
        (x, kernel), (dx, dkernel) = primals, tangents
        moved = []
        if not isinstance(dx, SymbolicZero):
            moved.append(in_x(dx, kernel))
        if not isinstance(dkernel, SymbolicZero):
            # Through its own derivative: older JAX transposes no other loops.
            along = jax.jvp(partial(in_kernel, x), (kernel,), (dkernel,))
            moved.append(along[1])
        y = formulation(x, kernel)
        return y, sum(moved[1:], moved[0]) if moved else lax.full_like(y, 0)

    formulation.defjvp(rule, symbolic_zeros=True)
    return formulation


def pointwise(p: Params, x: Any, kernel: Any) -> Any:
    """A convolution with a window of one as a dot over channels."""
    out, inside, *space = p["dimension_numbers"].rhs_spec
    x, strides = opened(p, x), p["window_strides"]
    size = [(n - 1) // s + 1 for n, s in zip(x.shape[1:-1], strides, strict=True)]
    x = window(x, [0] * len(size), size, strides)
    weight = lax.transpose(kernel, (inside, out, *space))
    weight = lax.reshape(weight, weight.shape[:2])
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    wide = {"precision": p["precision"]}
    wide["preferred_element_type"] = p["preferred_element_type"]
    return closed(p, lax.dot_general(x, weight, contract, **wide))


def wide_shift_and_multiply(p: Params, x: Any, kernel: Any) -> Any:
    """`shift_and_multiply` in int32: a product of two int8 is no int8."""
    return shift_and_multiply(p, x.astype(np.int32), kernel.astype(np.int32))


def windows_side_by_side(p: Params, x: Any, kernel: Any) -> Any:
    """A convolution over few channels as one dot: the places of its window beside each other."""
    out, inside, *space = p["dimension_numbers"].rhs_spec
    x, strides = opened(p, x), p["window_strides"]
    sides = [kernel.shape[i] for i in space]
    starts = list(np.ndindex(*sides))
    reach = [(k - 1) * d for k, d in zip(sides, p["rhs_dilation"], strict=True)]
    size = [
        (n - r - 1) // s + 1
        for n, r, s in zip(x.shape[1:-1], reach, strides, strict=True)
    ]
    apart = p["rhs_dilation"]
    parts = [
        window(x, [b * d for b, d in zip(start, apart, strict=True)], size, strides)
        for start in starts
    ]
    weight = lax.transpose(kernel, (*space, inside, out))
    weight = weight.reshape(-1, weight.shape[-1])
    x = lax.concatenate(parts, x.ndim - 1)
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    wide = {"preferred_element_type": p["preferred_element_type"]}
    return closed(p, lax.dot_general(x, weight, contract, **wide))
