"""Moments of every tensor that the statistics of norms reach, without data.

moment_network   moments carried from norm to norm as normal values
reached_moments  moments of nodes and of the inputs of products
assumed          the same, with inputs of an assumed size
"""

from jaxmet.layers.moments.moment_network import MomentNetwork as MomentNetwork
from jaxmet.layers.moments.reached_moments import input_moments as input_moments
from jaxmet.layers.moments.reached_moments import node_moments as node_moments
from jaxmet.layers.moments.reached_moments import unreached as unreached
