"""Rounding of weights, layer after layer, by statistics of their inputs.

layers       which weights, and each of them as a matrix
waves        in which order, and what side by side
inputs       what both copies of the model read there
solvers      one layer's weights on the grid of its quantizer: what every method gets and returns
methods      the methods, one a file
sequential   all layers
adaround, search_scales     the public calls
"""

from jaxmet.transforms.rounding.adaround import adaround
from jaxmet.transforms.rounding.search_scales import search_scales

__all__ = ["adaround", "search_scales"]
