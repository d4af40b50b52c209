"""Quantizers without calibration: every range is that of the tensor at hand."""

import dataclasses
from typing import Any

from jaxmet.engine.graph.graph import Graph
from jaxmet.layers.new_quantizers import activation_quantizer, weight_quantizer
from jaxmet.layers.placement.placement import place
from jaxmet.numerics.grid import check_bits
from jaxmet.tree.config import QuantConfig, config_of
from jaxmet.tree.quantizers import Quantizers


@dataclasses.dataclass(frozen=True)
class Dynamic:
    """What `simulate` takes in place of `Quantizers`: where they would be, and no ranges."""

    config: QuantConfig

    def quantizers(self, graph: Graph, leaves: dict[str, Any]) -> Quantizers:
        """The quantizers of one traced call, all of which follow their tensor."""
        placement = place(graph, self.config, leaves, "dynamic")
        return Quantizers(
            {w.name: weight_quantizer(w) for w in placement.weights},
            {
                n: activation_quantizer(s, products_only=n in placement.entering)
                for n, s in placement.activations.items()
            },
            tuple(placement.shared.items()),
            tuple(placement.skipped.items()),
            tuple(w.name for w in placement.weights if w.name not in leaves),
        )


def dynamic(bits: int | None = None, config: QuantConfig | None = None) -> Dynamic:
    """Weights and activations whose ranges are found at every call.

    For `simulate` in place of `Quantizers`: no calibration and no tree beside `params`. The range
    of an activation is that of the whole tensor at hand, the batch included, so results depend on
    the batch; with `config.dynamic='token'` or a number each row that a product sums over, or each
    block of so many of its values, has its own. No gradient goes through a range. To have dynamic
    ranges with rounded weights, or for some activations only, calibrate with
    `jm.QuantConfig(dynamic=…)`.

    Args:
        bits: the bit-width of weights and activations, 2 to 16; default None: those of `config`, 8
            without one.
        config: the `jm.QuantConfig` for the rest; default None: the default one.

    Returns:
        What `jm.simulate` takes in place of quantizers.

    Raises:
        ValueError: for impossible bit-widths, and for `bias='int32'`, which needs scales that
            calibration found.

    >>> loss = cross_entropy(jm.simulate(model.apply, jm.dynamic(bits=8))(params, images))
    >>> by_token = jm.dynamic(config=jm.QuantConfig(weight_bits=4, dynamic="token"))
    """
    config = config_of(config, "dynamic")
    if "int32" in (config.bias, *(rule.bias for rule in config.rules)):
        raise ValueError(
            "jaxmet.dynamic: the configuration has bias='int32', whose scale is that of a "
            "calibrated input. Use jm.calibrate, or bias='float'."
        )
    if bits is not None:
        check_bits(bits, caller="dynamic")
        config = dataclasses.replace(config, weight_bits=bits, activation_bits=bits)
    if config.dynamic is None:
        config = dataclasses.replace(config, dynamic="tensor")
    return Dynamic(config)
