"""Ranges of activations without data: what norms say of the values after them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmet.engine.graph.graph import Graph
from jaxmet.layers.moments import input_moments, node_moments
from jaxmet.layers.observed_ranges import Range
from jaxmet.layers.placement.placement import Placement
from jaxmet.numerics import xp
from jaxmet.numerics.moments import Moments

N_SIGMA = 6.0
"""Tails of trained networks are longer than a normal value's."""

WHY = "no norm tells its range: give batches, or leave it in float"


def data_free_ranges(
    graph: Graph, params: Any, placement: Placement
) -> dict[str, Range]:
    """A range for each node that owns a quantizer and whose values follow from norms.

    The widest of its channels, each mean ± 6 standard deviations after a norm and what the
    layers between make of that; nodes that share a quantizer get one range.
    """
    known = node_moments(graph, params, n_sigma=N_SIGMA)
    if placement.scaled:
        entering = input_moments(graph, params, n_sigma=N_SIGMA)
        known |= _entering(placement.scaled, known, entering)
    owners = {n: n for n in placement.activations} | placement.shared
    found: dict[str, Range] = {}
    for name, owner in owners.items():
        if name not in known:
            continue
        low, high = float(np.min(known[name].low)), float(np.max(known[name].high))
        if not np.isfinite([low, high]).all():
            continue
        before = found.get(owner, (low, high))
        found[owner] = (
            np.float32(min(low, before[0])),
            np.float32(max(high, before[1])),
        )
    if placement.activations and not found:
        raise ValueError(
            "jaxmet.calibrate: without batches activation ranges come from batch norms, and "
            f"no norm tells those of {_listed(placement.activations)}. Give "
            "batches=jm.batched(inputs, batch_size=32)."
        )
    return found


def _entering(
    scaled: Mapping[str, tuple[str, ...]],
    known: Mapping[str, Moments],
    entering: Mapping[str, Moments],
) -> dict[str, Moments]:
    """Moments of what layers divide as it enters them, one after the other."""
    found = {}
    for name, layers in scaled.items():
        parts = [known.get(n) if n == name else entering.get(n) for n in layers]
        parts = [part for part in parts if part is not None]
        if parts:
            found[name] = Moments(
                *(xp.concatenate(v) for v in zip(*parts, strict=True))
            )
    return found


def _listed(names: Any) -> str:
    first = ", ".join(repr(name) for name in list(names)[:3])
    return first + (f" and {len(names) - 3} more" if len(names) > 3 else "")
