"""What XLA:CPU does badly, said otherwise.

A convolution with a window of one is a dot over channels. One with few inputs to an output
(depthwise, small groups, a stem over colours) is a sum of shifted inputs times one number
a channel. On XLA:CPU both are several times faster than the convolution primitive; other
platforms keep the primitive. The choice is made when the program is lowered.

XLA:CPU also computes a value again in every fusion that uses it, a depthwise sum included,
where that looks cheap. `computed_once` makes it look expensive.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxmet.engine import compat

TERMS = 50  # products to an output, a 7x7 depthwise window: more take long to compile
COLOURS = 3  # inputs to an output where all channels are mixed

Params = dict[str, Any]


def convolution(primitive: Any, params: Params, x: Any, kernel: Any) -> Any:
    """One convolution equation, with the faster formulation on CPU where there is one."""
    if _formulation(params, x, kernel) is None:
        return compat.bind(primitive, params, (x, kernel))[0]
    return _either(x, kernel, primitive=primitive, params=tuple(params.items()))


@functools.partial(jax.jit, static_argnames=("primitive", "params"))
def _either(x: Any, kernel: Any, *, primitive: Any, params: tuple) -> Any:
    """Under `jit`, so that layers of one shape are traced and lowered once."""
    p = dict(params)
    said = _formulation(p, x, kernel)
    assert said is not None

    def plain(x, kernel):
        return compat.bind(primitive, p, (x, kernel))[0]

    def otherwise(x, kernel):
        return said(p, x, kernel)

    if said is shift_and_multiply and p["feature_group_count"] == 1:
        otherwise = _derived_from(plain, otherwise)
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


def _derived_from(plain: Callable, otherwise: Callable) -> Callable:
    """`otherwise` with the derivatives of `plain`, to which it is equal."""
    said = jax.custom_jvp(otherwise)

    def rule(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
        (x, kernel), (dx, dkernel) = primals, tangents
        moved = []
        if not isinstance(dx, SymbolicZero):
            moved.append(plain(dx, kernel))
        if not isinstance(dkernel, SymbolicZero):
            moved.append(plain(x, dkernel))
        y = said(x, kernel)
        return y, sum(moved[1:], moved[0]) if moved else lax.full_like(y, 0)

    said.defjvp(rule, symbolic_zeros=True)
    return said


def pointwise(p: Params, x: Any, kernel: Any) -> Any:
    """A convolution with a window of one as a dot over channels."""
    out, inside, *space = p["dimension_numbers"].rhs_spec
    x, strides = _opened(p, x), p["window_strides"]
    size = [(n - 1) // s + 1 for n, s in zip(x.shape[1:-1], strides, strict=True)]
    x = _window(x, [0] * len(size), size, strides)
    weight = lax.transpose(kernel, (inside, out, *space))
    weight = lax.reshape(weight, weight.shape[:2])
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    return _closed(p, lax.dot_general(x, weight, contract, precision=p["precision"]))


def shift_and_multiply(p: Params, x: Any, kernel: Any) -> Any:
    """A convolution as a sum of shifted, strided and scaled inputs.

    Each group reads its own input channels; a term is one place of the window and one of
    the channels, as wide as the output.
    """
    spec = p["dimension_numbers"].rhs_spec
    x = _opened(p, x)
    taps = lax.transpose(kernel, (*spec[2:], spec[1], spec[0]))
    *window, inputs, channels = taps.shape
    taps = lax.reshape(taps, (math.prod(window) * inputs, channels))
    scales = iter(lax.split(taps, (1,) * taps.shape[0]))
    strides, dilation = p["window_strides"], p["rhs_dilation"]
    sides = list(zip(x.shape[1:-1], window, strides, dilation, strict=True))
    size = [(n - (k - 1) * d - 1) // s + 1 for n, k, s, d in sides]
    places = itertools.product(*(range(0, k * d, d) for _, k, _, d in sides))
    total = None
    for start in places:
        shifted = _window(x, start, size, strides)
        for i in range(inputs):
            part = _spread(shifted, i, inputs, channels)
            axes = (0, x.ndim - 1)
            term = lax.mul(part, lax.broadcast_in_dim(next(scales), part.shape, axes))
            total = term if total is None else lax.add(total, term)
    return _closed(p, total)


def _spread(x: Any, i: int, inputs: int, channels: int) -> Any:
    """Input channel `i` of every group, once for each output channel of the group."""
    if inputs > 1:
        x = lax.slice_in_dim(x, i, None, inputs, axis=-1)
    groups = x.shape[-1]
    if groups == channels:
        return x
    if groups == 1:
        return lax.broadcast_in_dim(x, (*x.shape[:-1], channels), range(x.ndim))
    wide = (*x.shape, channels // groups)
    wide = lax.broadcast_in_dim(x, wide, range(x.ndim))
    return lax.reshape(wide, (*x.shape[:-1], channels))


def _opened(p: Params, x: Any) -> Any:
    """The input with its channels last and padded."""
    batch, channels, *space = p["dimension_numbers"].lhs_spec
    x = lax.transpose(x, (batch, *space, channels))
    if not any(side for pair in p["padding"] for side in pair):
        return x
    sides = [(low, high, 0) for low, high in p["padding"]]
    return lax.pad(x, np.zeros((), x.dtype), [(0, 0, 0), *sides, (0, 0, 0)])


def _closed(p: Params, y: Any) -> Any:
    """The output with its axes where the convolution puts them."""
    batch, channels, *space = p["dimension_numbers"].out_spec
    return lax.transpose(y, np.argsort((batch, *space, channels)))


def _window(
    x: Any, start: Sequence[Any], size: Sequence[Any], strides: Sequence[int]
) -> Any:
    """`size` entries of each spatial axis from `start` on, `strides` apart."""
    places = zip(start, size, strides, strict=True)
    stop = [b + (n - 1) * s + 1 for b, n, s in places]
    stop = (x.shape[0], *stop, x.shape[-1])
    return lax.slice(x, (0, *start, 0), stop, (1, *strides, 1))
