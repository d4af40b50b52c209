"""Channels removed from every parameter that runs along them."""

from jaxmet.transforms.prune.prune import prune as prune
