"""The range of an array or a histogram by any calibrator."""

from collections.abc import Hashable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmet.numerics.calibrators.calibrator import RangeTarget
from jaxmet.numerics.calibrators.calibrator_names import (
    CALIBRATORS,
    RangeMethod,
    calibrator_name,
    calibrator_of,
)
from jaxmet.numerics.calibrators.histogram_pieces import Values, values_of
from jaxmet.numerics.histogram import BINS, histogram
from jaxmet.numerics.ranges import Extremes, Numbers, groups_of, minmax, over_blocks


def check_calibrator(method: Any, caller: str, name: str) -> None:
    """Raise unless this is a name, or a function that runs on a histogram.

    Args:
        method: what was given as a calibrator.
        caller: the function that was called, for the message.
        name: the argument that holds it, for the message.

    Raises:
        ValueError: for an unknown name, for what is neither name nor function or has no hash, and
            for a function that does not run on a histogram.
    """
    if isinstance(method, str) and method in CALIBRATORS:
        return
    cure = (
        f"It is one of {', '.join(map(repr, CALIBRATORS))}, or a function "
        "(values, target) -> (low, high) in jax.numpy: see jm.numerics.calibrators."
    )
    if not callable(method) or not isinstance(method, Hashable):
        raise ValueError(f"jaxmet.{caller}: {name} is {method!r}. {cure}")
    pieces, scalar = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8,), ()))
    for symmetric in (True, False):
        run: Any = partial(_best_range, method=method, symmetric=symmetric)
        try:
            jax.eval_shape(run, *[pieces] * 4, *[scalar] * 3)
        except Exception as error:  # whatever a function raises that cannot run
            first = str(error).strip().split("\n")[0]
            raise ValueError(
                f"jaxmet.{caller}: {name}, the function {calibrator_name(method)}, does not "
                f"run on a histogram: {type(error).__name__}: {first} {cure}"
            ) from error


def values_in(x: Float[Array, "n"], method: RangeMethod) -> Values:
    """Few values stand for themselves; many, and all for a binned calibrator, by bins.

    Args:
        x: the values, a float array (n,).
        method: the calibrator that will read them, a name or a function.

    Returns:
        `Values`: one piece per value up to 2,048 values, else one piece per bin.
    """
    if x.size > BINS or getattr(calibrator_of(method), "binned", False):
        return values_of(histogram(x))
    x = jnp.sort(x)
    return Values(x, x, jnp.ones_like(x), (x != 0).astype(x.dtype))


@partial(jax.jit, static_argnames=("method", "symmetric"))
def best_range(
    values: Values,
    low: Float[Array, "*layers"],
    high: Float[Array, "*layers"],
    tail: Float[Array, "*layers"],
    *,
    method: RangeMethod,
    symmetric: bool,
) -> Extremes:
    """The range for a grid with the ends low … high, for each of the leading axes.

    `tail` is the share that 'percentile' cuts off on either side.

    Args:
        values: pieces of histograms, one per leading index.
        low: the lowest integer of each grid.
        high: the highest integer of each.
        tail: the share that 'percentile' cuts off on either side.
        method: a name such as 'mse', or a function.
        symmetric: whether zero is the middle of the grids.

    Returns:
        The lower and the upper ends.
    """
    choose = partial(_best_range, method=method, symmetric=symmetric)
    pieces = "(n),(n),(n),(n)"
    every = jnp.vectorize(choose, signature=f"{pieces},(),(),()->(),()")
    return every(*values, low, high, tail)


def range_of(
    x: Float[Array, "..."] | Float[np.ndarray, "..."],
    low: Numbers,
    high: Numbers,
    *,
    method: RangeMethod,
    symmetric: bool,
    percentile: float | int = 99.99,
    axis: tuple[int, ...] | None = None,
    block: int | None = None,
    block_axis: int | None = None,
) -> Extremes:
    """The range of an array by a method, apart for each channel or block as `minmax`.

    low … high are the ends of the grid that it is for.

    Args:
        x: the values, any shape.
        low: the lowest integer of the grid.
        high: the highest integer.
        method: a name such as 'mse', or a function.
        symmetric: whether zero is the middle of the grid.
        percentile: for 'percentile', the percent of values below the upper end; default 99.99.
        axis: the axes with ranges of their own; default None: one range.
        block: how many neighbours on `block_axis` share a range; default None.
        block_axis: the axis that is divided into blocks; default None.

    Returns:
        The lower and the upper ends, with the rank of `x`.
    """
    if method == "minmax":
        return minmax(x, axis, block=block, block_axis=block_axis)

    def of(x: jax.Array, block: int | None) -> Extremes:
        groups, shape = groups_of(x, axis, block=block, block_axis=block_axis)
        ends = (jnp.asarray(end, groups.dtype) for end in (low, high))
        tail = jnp.asarray(1 - percentile / 100, groups.dtype)
        found = _range_of(groups, *ends, tail, method=method, symmetric=symmetric)
        return found[0].reshape(shape), found[1].reshape(shape)

    return over_blocks(of, x, block, block_axis)


@partial(jax.jit, static_argnames=("method", "symmetric"))
def _range_of(
    groups: jax.Array, *given: jax.Array, method: RangeMethod, symmetric: bool
) -> Extremes:
    values = jax.vmap(partial(values_in, method=method))(groups)
    given = tuple(jnp.broadcast_to(v, groups.shape[:1]) for v in given)
    return best_range(values, *given, method=method, symmetric=symmetric)


def _best_range(*args: jax.Array, method: Any, symmetric: bool) -> Extremes:
    lowest, highest, tail = args[4:]
    values, target = Values(*args[:4]), RangeTarget(lowest, highest, tail, symmetric)
    found = calibrator_of(method)(values, target)
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise TypeError("it returns no pair of a low and a high end.")
    low, high = (jnp.asarray(end, values.left.dtype) for end in found)
    if low.shape or high.shape:
        raise TypeError(
            f"the ends have the shapes {low.shape} and {high.shape}, not ()."
        )
    return low, high
