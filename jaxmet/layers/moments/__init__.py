"""Moments of every tensor that the statistics of norms reach, without data."""

from jaxmet.layers.moments.network import Network as Network
from jaxmet.layers.moments.reach import input_moments as input_moments
from jaxmet.layers.moments.reach import node_moments as node_moments
from jaxmet.layers.moments.reach import unreached as unreached
