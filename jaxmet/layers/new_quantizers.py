"""The quantizers that a configuration asks for, before they hold a range."""

from jaxmet.layers.placement.placed_weights import WeightPlace
from jaxmet.tree.config_fields import Settings
from jaxmet.tree.quantizer import Quantizer

HEADROOM = 2
"""How far beyond what 'minmax' saw an activation of 16 bits may go: it costs the last bit."""


def weight_quantizer(place: WeightPlace) -> Quantizer:
    """What quantizes a weight, following it."""
    s = place.settings
    return Quantizer(
        bits=s.bits,
        symmetric=s.symmetric,
        signed=s.symmetric,
        axis=place.axis,
        block=s.block,
        block_axis=place.block_axis,
        calibrator=s.calibrator,
        percentile=s.percentile,
    )


def activation_quantizer(
    s: Settings, *, signed: bool = True, products_only: bool = False
) -> Quantizer:
    """What quantizes an activation, following it until it holds a range."""
    return Quantizer(
        bits=s.bits,
        symmetric=s.symmetric,
        signed=signed and s.symmetric,
        narrow=False,
        calibrator=s.calibrator,
        percentile=s.percentile,
        headroom=HEADROOM if s.calibrator == "minmax" and s.dynamic is None else 1,
        products_only=products_only,
        per_token=products_only and s.at_products,
        block=s.dynamic if products_only and isinstance(s.dynamic, int) else None,
    )
