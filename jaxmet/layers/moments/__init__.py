"""Moments of every tensor that the statistics of norms reach, without data."""

from jaxmet.layers.moments.moment_network import MomentNetwork as MomentNetwork
from jaxmet.layers.moments.reached_moments import input_moments as input_moments
from jaxmet.layers.moments.reached_moments import node_moments as node_moments
from jaxmet.layers.moments.reached_moments import unreached as unreached
