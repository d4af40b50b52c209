"""The built-in calibrators by name."""

from typing import Any, Literal, TypeAlias

from jaxmet.numerics.calibrators.calibrator import Calibrator
from jaxmet.numerics.calibrators.outer_ranges import percentile, smallest_to_largest
from jaxmet.numerics.calibrators.range_divergence import entropy
from jaxmet.numerics.calibrators.squared_error import mse, sqnr

RangeName: TypeAlias = Literal["minmax", "percentile", "mse", "sqnr", "entropy"]
RangeMethod: TypeAlias = RangeName | Calibrator

CALIBRATORS: dict[RangeName, Calibrator] = {
    "minmax": smallest_to_largest,
    "percentile": percentile,
    "mse": mse,
    "sqnr": sqnr,
    "entropy": entropy,
}
"""The built-in calibrators; a new one is a file, an entry here and its name in `RangeName`."""


def calibrator_of(method: RangeMethod) -> Calibrator:
    """The function of a name, or the function itself.

    Args:
        method: a name of `CALIBRATORS`, or a function `(values, target) -> (low, high)`.

    Returns:
        The function.

    Raises:
        KeyError: for a name that `CALIBRATORS` does not have.
    """
    return method if callable(method) else CALIBRATORS[method]


def calibrator_name(method: Any) -> str:
    """How a calibrator is shown.

    Args:
        method: a name or a function.

    Returns:
        The name, that of the function, or its `repr` if it has none.
    """
    return (
        method if isinstance(method, str) else getattr(method, "__name__", repr(method))
    )


def is_percentile(value: Any) -> bool:
    """Whether a share of the values, in percent, leaves something between two ends.

    Args:
        value: anything; a number counts in percent of all values.

    Returns:
        True for a number above 50 and up to 100, no bool.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 50 < value <= 100
