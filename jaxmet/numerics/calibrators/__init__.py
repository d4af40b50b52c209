r"""The range of values that a quantizer covers: min-max, percentile, MSE, SQNR, entropy.

A wide range makes every step coarse, a narrow one clips: each calibrator is a price for the
two. A calibrator is a function `(values, target) -> (low, high)` in `jax.numpy`: of a
histogram, as `Values`, and of the quantizer that the range is for, as `RangeTarget`, to two
numbers. The built-in ones are the entries of `CALIBRATORS`; any other function can be given
to `jm.QuantConfig` in their place:

    def three_sigma(values, target):
        middle, weight = (values.left + values.right) / 2, values.number / values.number.sum()
        mean = jnp.sum(weight * middle)
        deviation = jnp.sqrt(jnp.sum(weight * (middle - mean) ** 2))
        return mean - 3 * deviation, mean + 3 * deviation

    jm.QuantConfig(activation_range=three_sigma)

Whatever the range, the quantizer covers zero too. The built-in ones leave the end of the side
on which there is nothing at zero.

calibrator         what every calibrator is given, and what several of them share
histogram_pieces   a histogram as a calibrator reads it
outer_ranges       min-max and percentile
squared_error      MSE and SQNR
range_divergence   entropy
range_search       the cheapest range by a price that a grid has
calibrator_names   the built-in calibrators by name
calibrated_range   the range of an array or a histogram by any calibrator
"""

from jaxmet.numerics.calibrators.calibrated_range import best_range as best_range
from jaxmet.numerics.calibrators.calibrated_range import (
    check_calibrator as check_calibrator,
)
from jaxmet.numerics.calibrators.calibrated_range import range_of as range_of
from jaxmet.numerics.calibrators.calibrated_range import values_in as values_in
from jaxmet.numerics.calibrators.calibrator import Calibrator as Calibrator
from jaxmet.numerics.calibrators.calibrator import RangeTarget as RangeTarget
from jaxmet.numerics.calibrators.calibrator import binned as binned
from jaxmet.numerics.calibrators.calibrator import in_own_unit as in_own_unit
from jaxmet.numerics.calibrators.calibrator import whole_range as whole_range
from jaxmet.numerics.calibrators.calibrator_names import CALIBRATORS as CALIBRATORS
from jaxmet.numerics.calibrators.calibrator_names import RangeMethod as RangeMethod
from jaxmet.numerics.calibrators.calibrator_names import RangeName as RangeName
from jaxmet.numerics.calibrators.calibrator_names import (
    calibrator_name as calibrator_name,
)
from jaxmet.numerics.calibrators.calibrator_names import calibrator_of as calibrator_of
from jaxmet.numerics.calibrators.calibrator_names import is_percentile as is_percentile
from jaxmet.numerics.calibrators.histogram_pieces import Values as Values
from jaxmet.numerics.calibrators.histogram_pieces import values_of as values_of
from jaxmet.numerics.calibrators.outer_ranges import percentile as percentile
from jaxmet.numerics.calibrators.outer_ranges import (
    percentile_range as percentile_range,
)
from jaxmet.numerics.calibrators.outer_ranges import (
    smallest_to_largest as smallest_to_largest,
)
from jaxmet.numerics.calibrators.range_divergence import divergence as divergence
from jaxmet.numerics.calibrators.range_divergence import entropy as entropy
from jaxmet.numerics.calibrators.range_search import cheapest_of as cheapest_of
from jaxmet.numerics.calibrators.range_search import cheapest_range as cheapest_range
from jaxmet.numerics.calibrators.squared_error import GAMMA as GAMMA
from jaxmet.numerics.calibrators.squared_error import mse as mse
from jaxmet.numerics.calibrators.squared_error import noise as noise
from jaxmet.numerics.calibrators.squared_error import sqnr as sqnr
from jaxmet.numerics.calibrators.squared_error import sqnr_candidates as sqnr_candidates
