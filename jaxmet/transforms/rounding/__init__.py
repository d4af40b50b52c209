"""Rounding of weights, layer after layer, by statistics of their inputs.

rounded_layers    which weights, and how their scales lie in their matrices
layer_order       in which order, and what side by side
input_statistics  what both copies of the model read there
solvers           one layer on the grid of its quantizer: what every method gets and returns
size_classes      layers filled up to a few sizes, so that a few programs solve all
methods           the methods, one a file
layerwise         all layers
adaround, search_scales    the public calls
"""

from jaxmet.transforms.rounding.adaround import adaround
from jaxmet.transforms.rounding.search_scales import search_scales

__all__ = ["adaround", "search_scales"]
