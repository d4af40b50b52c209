"""What every calibrator is given, and what several of them share."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmet.numerics.calibrators.histogram_pieces import Values
from jaxmet.numerics.ranges import Ends, Extremes

Scalar = Float[Array, ""]


class RangeTarget(NamedTuple):
    """What a range is for: the `lowest` and `highest` integer of the quantizer.

    `tail` is the share of the values that may lie beyond either end, from
    `QuantConfig.percentile`; `symmetric` is a plain bool.
    """

    lowest: Scalar
    highest: Scalar
    tail: Scalar
    symmetric: bool

    @property
    def ends(self) -> Ends:
        """The lowest and highest integer."""
        return self.lowest, self.highest


Calibrator: TypeAlias = Callable[[Values, RangeTarget], tuple[Any, Any]]
C = TypeVar("C", bound=Calibrator)


def binned(calibrator: C) -> C:
    """Mark a calibrator that needs bins of one width, however few the values are.

    Args:
        calibrator: a function `(values, target) -> (low, high)`.

    Returns:
        The same function, marked.
    """
    setattr(calibrator, "binned", True)  # noqa: B010
    return calibrator


def in_own_unit(calibrator: Calibrator) -> Calibrator:
    """A calibrator in units of a power of two: squares of extreme values would leave the floats.

    Args:
        calibrator: a function `(values, target) -> (low, high)`.

    Returns:
        The function on values between -2 and 2, its result in the unit of its values.
    """

    @functools.wraps(calibrator)
    def scaled(values: Values, target: RangeTarget) -> Extremes:
        extent = jnp.maximum(jnp.abs(values.left[0]), jnp.abs(values.right[-1]))
        _, exponent = jnp.frexp(extent)
        unit = jnp.ldexp(jnp.ones_like(extent), jnp.clip(exponent, -120, 120))
        left, right = values.left / unit, values.right / unit
        low, high = calibrator(values._replace(left=left, right=right), target)
        return low * unit, high * unit

    return scaled


def whole_range(values: Values) -> Extremes:
    """The range of all values and zero.

    Args:
        values: the histogram as `Values`: bins by their ends, and how many values each holds.

    Returns:
        The lower and the upper end of the range, two scalars.
    """
    return jnp.minimum(values.left[0], 0.0), jnp.maximum(values.right[-1], 0.0)
