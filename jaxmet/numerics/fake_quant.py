r"""Rounding to a grid and back, as one primitive.

$$\hat x = s\,(\mathrm{clip}(\mathrm{round}(x/s) + z,\ l,\ h) - z)$$

Ties go to the even integer. Gradients are those of a surrogate that holds the rounding
residual fixed: straight through inside the grid, none outside; and for the grid itself

$$\partial\hat x/\partial s = \mathrm{round}(x/s) - x/s\ \text{inside},\quad
\mathrm{clip}(\cdot) - z\ \text{outside};\qquad
\partial\hat x/\partial z = 0\ \text{inside},\quad -s\ \text{outside}.$$

Esser et al., [Learned Step Size Quantization](https://arxiv.org/abs/1902.08153), ICLR
2020; Jain et al., [Trained Quantization Thresholds](https://arxiv.org/abs/1903.08066).

A primitive keeps the operation whole: there is one place for its gradients, and who
exports or prints a program sees `fake_quant`, not its pieces. Its tangent is a primitive
too: so a training step keeps nothing but `x` for the gradient and computes the rest again.
"""

import functools
from collections.abc import Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, Num

Numbers: TypeAlias = Num[Array, "..."] | Num[np.ndarray, "..."] | float | int

fake_quant_p = Primitive("fake_quant")
tangent_p = Primitive("fake_quant_tangent")


def fake_quant(
    x: Num[Array, "*shape"] | Num[np.ndarray, "*shape"] | float | int,
    scale: Numbers,
    zero_point: Numbers,
    low: Numbers,
    high: Numbers,
    *,
    axis: tuple[int, ...] | None = None,
    block: int | None = None,
) -> Float[Array, "*shape"]:
    """`x` rounded to the grid of `scale` and `zero_point` between `low` and `high`.

    The other operands are scalars, or have the rank of `x` with size 1 on the axes
    along which they do not change; with `block`, an axis may have one entry for each
    `block` neighbours, the last of which may be fewer. `axis` only names the axes that have
    scales of their own. Half
    precision is computed in float32.

    Args:
        x: the values, of any shape and float dtype.
        scale: the step of the grid, broadcast against x.
        zero_point: the integer that stands for zero, broadcast against x.
        low: the lowest integer.
        high: the highest integer.
        axis: names the axes that have scales of their own; changes no value; default None.
        block: how many neighbours on an axis share one scale; default None: no blocks.

    Returns:
        The rounded values, of the shape and dtype of `x`.

    Raises:
        ValueError: for values that are no floating-point numbers, for operands that do not fit,
            and for `low` above `high`.

    >>> x = jnp.array([-1.0, 0.26, 0.9])
    >>> jm.fake_quant(x, 0.5, 0, -2, 1)
    Array([-1. ,  0.5,  0.5], dtype=float32)
    """
    _check_float(x)
    x = jnp.asarray(x)
    wide = np.dtype(np.float32) if x.dtype.itemsize < 4 else x.dtype
    grid = [_operand(a, x, wide, block) for a in (scale, zero_point, low, high)]
    _check_ends(*grid[2:])
    axis = None if axis is None else tuple(sorted(a % max(x.ndim, 1) for a in axis))
    return fake_quant_p.bind(x, *grid, axis=axis, block=block)


def _check_float(x: Any) -> None:
    try:
        found = f"of {jnp.result_type(x)}"
        good = jnp.issubdtype(jnp.result_type(x), jnp.floating)
    except TypeError:  # no array
        found, good = f"of type {type(x).__name__}", False
    if not good:
        raise ValueError(
            f"jaxmet.fake_quant: x is {found}, and a grid is for floating-point arrays. Give "
            "x.astype(jnp.float32)."
        )


def _check_ends(low: Any, high: Any) -> None:
    """Raise where the lowest grid point lies above the highest, if their values are known."""
    known = (np.ndarray, jax.Array)
    ends = [
        a for a in (low, high) if isinstance(a, known) and not isinstance(a, Tracer)
    ]
    if len(ends) < 2 or not all(getattr(a, "is_fully_addressable", True) for a in ends):
        return
    pairs = zip(low.shape, high.shape, strict=True)
    if not all(n == m or 1 in (n, m) for n, m in pairs):
        return  # one of them changes along blocks only
    low, high = np.broadcast_arrays(*ends)
    above = low > high
    if above.any():
        raise ValueError(
            f"jaxmet.fake_quant: low is {low[above][0]:g} and high {high[above][0]:g}. Give "
            "the lowest point of the grid as low, such as low=-128, high=127."
        )


def _operand(a: Any, x: jax.Array, dtype: np.dtype, block: int | None) -> Any:
    if not isinstance(a, jax.Array):  # known now: nothing to trace
        a = np.asarray(a, dtype)
    a = a if a.dtype == dtype else lax.convert_element_type(a, dtype)
    if a.ndim == 0:
        one = (1,) * x.ndim
        return a.reshape(one) if isinstance(a, np.ndarray) else lax.broadcast(a, one)
    fits = a.ndim == x.ndim and all(
        n in (1, m) or (block is not None and n == -(-m // block))
        for n, m in zip(a.shape, x.shape, strict=True)
    )
    if not fits:
        blocks = "" if block is None else f" in blocks of {block}"
        raise ValueError(
            f"jaxmet.fake_quant: a grid of shape {a.shape} does not fit values of "
            f"shape {x.shape}{blocks}. Give a scalar, or an array of the same rank "
            "with size 1 on the axes that share a scale."
        )
    return a


def _along(a: Any, shape: Sequence[Any], block: int | None) -> jax.Array:
    """An operand of the grid repeated to the shape of the values."""
    if block is not None:
        for i, (n, m) in enumerate(zip(a.shape, shape, strict=True)):
            if n not in (1, m):
                kept = tuple(k + (k > i) for k in range(a.ndim))
                split = (*a.shape[: i + 1], block, *a.shape[i + 1 :])
                repeated = lax.broadcast_in_dim(a, split, kept)
                long = (*a.shape[:i], n * block, *a.shape[i + 1 :])
                a = lax.slice_in_dim(lax.reshape(repeated, long), 0, m, axis=i)
    return lax.broadcast_in_dim(a, shape, range(a.ndim))


def quotient(x: Float[Array, "*shape"], scale: Float[Array, "*shape"]) -> jax.Array:
    """$x/s$, divided: XLA multiplies by the reciprocal of what it broadcasts, which moves ties.

    Args:
        x: values, a float array.
        scale: a positive scale for each value, of the same shape and dtype.

    Returns:
        The quotients, of the same shape and dtype.
    """
    return lax.div(x, lax.optimization_barrier(scale))


def _integers(x: Any, grid: Sequence[Any], block: int | None) -> tuple[jax.Array, ...]:
    """Wide x, the grid at the shape of x, x/s, and its integer before clipping."""
    s, z, low, high = (_along(a, x.shape, block) for a in grid)
    wide = lax.convert_element_type(x, s.dtype)
    ratio = quotient(wide, s)
    q = lax.add(lax.round(ratio, lax.RoundingMethod.TO_NEAREST_EVEN), z)
    return s, z, low, high, ratio, q


def _compute(
    x: Any, *grid: Any, axis: tuple[int, ...] | None, block: int | None
) -> jax.Array:
    del axis
    s, z, low, high, _, q = _integers(x, grid, block)
    rounded = lax.mul(s, lax.sub(lax.clamp(low, q, high), z))
    return lax.convert_element_type(rounded, x.dtype)


@functools.lru_cache(1024)  # a trace at each bind takes longer than all the rest
def _abstract(compute: Any, *args: Any, **params: Any) -> Any:
    # What the implementation's own trace says, sharding and varying axes included.
    return jax.make_jaxpr(partial(compute, **params))(*args).out_avals[0]


def _jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, axis: Any, block: Any
) -> tuple[jax.Array, Any]:
    x, *grid = primals
    out = fake_quant_p.bind(x, *grid, axis=axis, block=block)
    moved = tangents[:3]  # the ends of the grid get no gradient
    of = tuple(type(t) is not ad.Zero for t in moved)
    if not any(of):
        return out, ad.Zero(jax.typeof(out).to_tangent_aval())
    some = [_like(t, x, grid[0].dtype, block) for t in moved if type(t) is not ad.Zero]
    wide = tangent_p.bind(*some, x, *grid, of=of, axis=axis, block=block)
    return out, lax.convert_element_type(wide, x.dtype)


def _like(t: Any, x: Any, dtype: Any, block: int | None) -> jax.Array:
    """A tangent repeated to the shape of x, and on a mesh laid out as x is."""
    t = _along(lax.convert_element_type(t, dtype), x.shape, block)
    zero = lax.full_like(x, 0, dtype)
    return t if jax.typeof(t) == jax.typeof(zero) else lax.add(t, zero)


# The tangent: linear in its first operands, those of x, scale and zero point that `of` says,
# all of the shape of x.


def _factors(x: Any, grid: Sequence[Any], block: int | None) -> list[Any]:
    """The derivatives by x, scale and zero point, as maps of what they multiply."""
    s, z, low, high, ratio, q = _integers(x, grid, block)
    inside = lax.bitwise_and(lax.ge(q, low), lax.le(q, high))
    # The residual and the end of the grid are constants of the surrogate, also when it
    # is differentiated again.
    residual = lax.stop_gradient(lax.sub(lax.sub(q, z), ratio))
    level = lax.sub(lax.stop_gradient(lax.clamp(low, q, high)), z)
    zero = lax.full_like(s, 0)
    return [
        lambda t: lax.select(inside, t, zero),
        lambda t: lax.mul(t, lax.select(inside, residual, level)),
        lambda t: lax.neg(lax.mul(t, lax.select(inside, zero, s))),
    ]


def _tangent(*args: Any, of: tuple[bool, ...], axis: Any, block: Any) -> jax.Array:
    del axis
    *some, x, s, z, low, high = args
    factors = _factors(x, (s, z, low, high), block)
    used = [f for f, has in zip(factors, of, strict=True) if has]
    terms = [factor(t) for t, factor in zip(some, used, strict=True)]
    return functools.reduce(lax.add, terms)


def _tangent_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], **params: Any
) -> tuple[jax.Array, Any]:
    number = sum(params["of"])
    out = tangent_p.bind(*primals, **params)
    if any(type(t) is not ad.Zero for t in tangents[number:]):
        full = [ad.instantiate_zeros(t) for t in tangents]
        return out, jax.jvp(partial(_tangent, **params), primals, full)[1]
    moved = [ad.instantiate_zeros(t) for t in tangents[:number]]
    return out, tangent_p.bind(*moved, *primals[number:], **params)


def _transpose(
    ct: Any, *args: Any, of: tuple[bool, ...], axis: Any, block: Any
) -> list[Any]:
    del axis
    number = sum(of)
    some, (x, *grid) = args[:number], args[number:]
    nothing = [None] * (len(args) - number)
    if type(ct) is ad.Zero:
        return [ad.Zero(t.aval) for t in some] + nothing
    factors = _factors(_awaited(x, ct), grid, block)
    return [f(ct) for f, has in zip(factors, of, strict=True) if has] + nothing


@jax.jit
def _awaited(x: Any, other: Any) -> Any:
    """`x` to the bit, on CPU not before `other` is there.

    What is computed from x alone for the backward pass would be computed in the forward
    pass, and kept: XLA:CPU heeds no barrier. A choice that is made at run time it does.
    """

    def chosen(x: Any, other: Any) -> Any:
        always = lax.optimization_barrier(np.True_)
        other = lax.convert_element_type(lax.stop_gradient(other), x.dtype)
        return lax.select(always, x, other)

    return lax.platform_dependent(x, other, cpu=chosen, default=lambda x, other: x)


def _batch(
    primitive: Primitive,
    args: Sequence[Any],
    dims: Sequence[int | None],
    *,
    axis: tuple[int, ...] | None,
    **params: Any,
) -> tuple[jax.Array, int]:
    size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
    args = [_to_front(a, d) for a, d in zip(args, dims, strict=True)]
    for i in range(sum(params.get("of", ())) + 1):  # x, and tangents before it
        if dims[i] is None:
            full = (size, *args[i].shape[1:])
            args[i] = lax.broadcast_in_dim(args[i], full, range(args[i].ndim))
    shifted = None if axis is None else tuple(a + 1 for a in axis)
    return primitive.bind(*args, axis=shifted, **params), 0


def _to_front(a: Any, dim: int | None) -> jax.Array:
    if dim is None:
        return lax.expand_dims(a, (0,))
    return lax.transpose(a, (dim, *(i for i in range(a.ndim) if i != dim)))


for primitive, compute, static in (
    (fake_quant_p, _compute, ("axis", "block")),
    (tangent_p, _tangent, ("of", "axis", "block")),
):
    compiled = jax.jit(compute, static_argnames=static)
    primitive.def_impl(compiled)
    primitive.def_abstract_eval(partial(_abstract, compiled))
    batching.primitive_batchers[primitive] = partial(_batch, primitive)
    lowering = mlir.lower_fun(compute, multiple_results=False)
    mlir.register_lowering(primitive, lowering)
ad.primitive_jvps[fake_quant_p] = _jvp
ad.primitive_jvps[tangent_p] = _tangent_jvp
ad.primitive_transposes[tangent_p] = _transpose
