"""Rounding of weights, layer after layer, by statistics of their inputs.

adaround          `jm.adaround`
search_scales     `jm.search_scales`
methods/          the rounding methods, one per file
solvers           one layer: what every method gets and returns
rounded_layers    which weights, and how their scales lie in their matrices
layer_order       in which order layers are rounded, and which side by side
input_statistics  what both copies of the model read at a layer
size_classes      layers padded to a few sizes, so that a few programs solve all
layer_problems    a layer as the problem that a method solves, and its solution as leaves
layerwise         all layers, one after the other
"""

from jaxmet.transforms.rounding.adaround import adaround
from jaxmet.transforms.rounding.search_scales import search_scales

__all__ = ["adaround", "search_scales"]
