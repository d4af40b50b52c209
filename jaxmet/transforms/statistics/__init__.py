"""Moments of every tensor that the statistics of norms reach, without data."""

from jaxmet.transforms.statistics.network import Network as Network
from jaxmet.transforms.statistics.reach import input_moments as input_moments
from jaxmet.transforms.statistics.reach import node_moments as node_moments
from jaxmet.transforms.statistics.reach import unreached as unreached
