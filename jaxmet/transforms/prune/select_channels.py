"""Which channels go first, and how many of them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmet.engine.graph.channel_groups import indices_of
from jaxmet.engine.graph.graph import Graph
from jaxmet.layers.grams import GramSums
from jaxmet.transforms.prune.coupled_channels import CoupledChannels
from jaxmet.transforms.prune.refit import ConsumerMatrix, magnitudes, read_by


def _ratios_of(
    graph: Graph, bundles: Sequence[CoupledChannels], asked: Mapping[str, float]
) -> dict[int, float]:
    r"""The ratio of each bundle, the largest that a layer that reads it is asked for.

    What reads channels along n axes, or of n groups along one, keeps $r^{1/n}$ of each.
    """
    known = {i for b in bundles for i in b.indices}

    def of_each(name: str) -> float:
        laid_out = (item for m in read_by(graph, name) for item in m.layout)
        times = sum(bool(known & indices_of((item,))) for item in laid_out)
        return asked[name] ** (1 / max(1, times))

    names = {name for b in bundles for name in b.consumers if name in asked}
    share = {name: of_each(name) for name in names}
    return {
        b.index: max((share[n] for n in b.consumers if n in share), default=1.0)
        for b in bundles
    }


def kept_counts(
    graph: Graph,
    bundles: Sequence[CoupledChannels],
    asked: Mapping[str, float],
    multiple: int,
) -> dict[int, int]:
    """How many channels of each bundle stay, by the ratios that layers are asked for."""
    each = _ratios_of(graph, bundles, asked)
    return {b.index: _kept_at(b.size, each[b.index], multiple) for b in bundles}


def _kept_at(size: int, ratio: float, multiple: int) -> int:
    """How many of so many channels stay: one at least, rounded up to a multiple."""
    count = max(1, math.floor(size * ratio * (1 + 1e-12)))
    return min(size, -(-count // multiple) * multiple)


def consumers_of(
    graph: Graph,
    names: Iterable[str],
    leaves: Mapping[str, Any],
    seen: Mapping[str, GramSums],
) -> dict[str, ConsumerMatrix]:
    """What the data say to the layers with these names, as far as they have any."""
    found = {
        n: ConsumerMatrix.of(graph, n, leaves, seen[n]) for n in names if n in seen
    }
    return {n: consumer for n, consumer in found.items() if consumer is not None}


def removal(
    graph: Graph,
    leaves: Mapping[str, Any],
    bundle: CoupledChannels,
    consumers: Mapping[str, ConsumerMatrix],
    selection: str,
    keep: int,
) -> np.ndarray:
    """The channels of a bundle in the order in which they go."""
    known = [consumers.get(n) for n in bundle.consumers]
    if selection == "obs" and len(known) == 1 and known[0] is not None:
        order = known[0].order(bundle)
        if order is not None:
            return order
    scores = np.zeros(bundle.size)
    for name, consumer in zip(bundle.consumers, known, strict=True):
        if consumer is None or selection == "magnitude":
            scores += magnitudes(graph, name, leaves, bundle)
        else:
            scores += consumer.scores(bundle, selection, keep)
    return np.argsort(scores, kind="stable")


def left_of(order: np.ndarray, count: int) -> np.ndarray:
    """Which channels are left when so many are, of those that go in this order."""
    found = np.ones(order.size, bool)
    found[order[: order.size - count]] = False
    return found
