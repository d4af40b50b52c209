"""Which way weights are rounded, layer after layer, by what the data tell of their inputs.

layers       which weights, and each of them as a matrix
waves        in which order, and what side by side
inputs       what both copies of the model read there
solvers      one layer's weights on their grid
sequential   all of them
checkpoint   going on after an interruption
adaround, search_scales     the public calls
"""

from jaxmet.transforms.rounding.adaround import adaround
from jaxmet.transforms.rounding.search_scales import search_scales

__all__ = ["adaround", "search_scales"]
