"""A compressed model in the original shapes: one program runs every row of a table.

Ranks cut the tail of a singular value decomposition off, counts of channels set the least
wanted to zero. The leaves of a row are made in NumPy.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmet.engine.graph.channel_groups import Layout, layout_size
from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Node
from jaxmet.layers.grams import grams
from jaxmet.layers.leaf_math import replaced
from jaxmet.numerics.low_rank import Spectrum, masked
from jaxmet.transforms.factorize import rank_at, unfit
from jaxmet.transforms.factors import (
    Shape,
    gram_of_parameter,
    placed_matrix,
    shape_of,
    shapes_on,
    spectrum_of,
)
from jaxmet.transforms.prune.coupled_channels import (
    CoupledChannels,
    axes_of,
    bundles_of,
    channel_along,
    refused,
)
from jaxmet.transforms.prune.refit import ConsumerMatrix, refit_consumers
from jaxmet.transforms.prune.select_channels import (
    consumers_of,
    kept_counts,
    left_of,
    removal,
)
from jaxmet.tree.batches import Batches
from jaxmet.tree.leaves import dense, with_weight


class Shares(NamedTuple):
    """What is left of a layer: of its multiplications, and of the entries of its weight."""

    macs: float
    parameters: float


@dataclasses.dataclass(frozen=True)
class Low:
    """A layer with singular values to cut off."""

    node: Node
    shape: Shape
    parts: Spectrum
    known: Shape
    """The shape with what inputs of these sizes cost."""

    @property
    def most(self) -> int:
        return self.shape.most

    def amount(self, ratio: float, multiple: int) -> int:
        """The rank at this ratio, all of them where factors would cost no less."""
        rank = rank_at(self.shape, ratio, multiple)
        dear = self.known.cost_of(rank) >= self.known.cost
        return self.most if dear else rank

    @property
    def tied(self) -> tuple[str, ...]:
        return ()

    def shares(self, amount: int) -> dict[str, Shares]:
        """What is left of every layer that changes."""
        if amount >= self.most:
            return {self.node.name: Shares(1.0, 1.0)}
        work = self.known.cost_of(amount) / self.known.cost
        held = self.shape.entries_of(amount) / self.shape.cost
        return {self.node.name: Shares(work, held)}

    @property
    def names(self) -> set[str]:
        """The leaves that change."""
        return {self.node.kernel}

    def changed(self, leaves: Mapping[str, Any], amount: int) -> dict[str, Any]:
        """Those leaves with so much left."""
        leaf = leaves[self.node.kernel]
        matrix = placed_matrix(masked(self.parts, amount), self.shape)
        return {self.node.kernel: replaced(leaf, matrix)}


@dataclasses.dataclass(frozen=True)
class Narrow:
    """Channels that a layer reads, bundle by bundle, with the order in which they go.

    `tied` are the other layers that read some of them. `layouts` are those of the axes along
    which layers read or make them, by layer, role and axis; a depthwise convolution, which
    does both at once, has one. `consumers` are refitted. `counts` has a row for each amount that
    may be asked for, and how many channels of each bundle stay then.
    """

    graph: Graph
    layouts: Mapping[tuple[str, str, int], Layout]
    tied: tuple[str, ...]
    consumers: tuple[ConsumerMatrix, ...]
    bundles: tuple[CoupledChannels, ...]
    orders: tuple[np.ndarray, ...]
    counts: np.ndarray

    @property
    def most(self) -> int:
        return sum(b.size for b in self.bundles)

    def amount(self, ratio: float, multiple: int) -> int:
        return sum(_counts(self.graph, self.bundles, ratio, multiple))

    def shares(self, amount: int) -> dict[str, Shares]:
        """What is left of every layer that reads or makes them."""
        counts = self.counts[np.searchsorted(self.counts.sum(axis=1), amount)]
        found: dict[str, float] = {}
        for (name, *_), layout in self.layouts.items():
            gone = 0.0
            for bundle, count in zip(self.bundles, counts, strict=True):
                entries = np.sum(channel_along(layout, bundle.indices) >= 0)
                gone += float(entries) * (1 - int(count) / bundle.size)
            left = 1 - gone / layout_size(layout)
            found[name] = found.get(name, 1.0) * left
        return {name: Shares(left, left) for name, left in found.items()}

    @property
    def names(self) -> set[str]:
        """The leaves that change."""
        refitted = {
            n for c in self.consumers for n in (c.node.kernel, c.node.bias) if n
        }
        return refitted | {*self._axes([np.zeros(b.size, bool) for b in self.bundles])}

    def changed(self, leaves: Mapping[str, Any], amount: int) -> dict[str, Any]:
        """Those leaves with so much left."""
        counts = self.counts[np.searchsorted(self.counts.sum(axis=1), amount)]
        lefts = [*map(left_of, self.orders, counts)]
        consumers = {c.node.name: c for c in self.consumers}
        found = {name: leaves[name] for name in self.names if name in leaves}
        found, _ = refit_consumers(consumers, self._masks(lefts), found)
        for name, axes in self._axes(lefts).items():
            array = np.array(dense(found[name]))
            for axis, left in axes.items():
                array[(slice(None),) * axis + (~left,)] = 0
            found[name] = with_weight(found[name], array)
        return found

    def _masks(self, lefts: Sequence[np.ndarray]) -> dict[int, np.ndarray]:
        """What is left of each group, for what is of each bundle."""
        both = zip(self.bundles, lefts, strict=True)
        return {i: left for bundle, left in both for i in bundle.indices}

    def _axes(self, lefts: Sequence[np.ndarray]) -> dict[str, dict[int, np.ndarray]]:
        return axes_of(self.graph.members, self._masks(lefts))


def _counts(
    graph: Graph, bundles: Sequence[CoupledChannels], ratio: float, multiple: int
) -> tuple[int, ...]:
    """How many channels of each bundle stay when all that read them have this ratio."""
    names = {name for b in bundles for name in b.consumers}
    kept = kept_counts(graph, bundles, dict.fromkeys(names, ratio), multiple)
    return tuple(kept[b.index] for b in bundles)


MaskedLayer = Low | Narrow


def layers_of(
    params: Any,
    graph: Graph,
    leaves: Mapping[str, Any],
    method: str,
    read: Batches,
    rows: int | None,
    *,
    ratios: Sequence[float],
    multiple: int,
    key: jax.Array,
    progress: bool,
) -> tuple[dict[str, MaskedLayer], dict[str, str]]:
    """The layers that can be compressed, and why the others cannot."""
    options: dict[str, Any] = {
        "caller": "score_ratios",
        "rows": rows,
        "key": key,
        "progress": progress,
    }
    if method == "prune":
        asked = [(r, multiple) for r in ratios]
        return _narrow(params, graph, leaves, read, options, asked)
    left = {n.name: why for n in graph.layers if (why := unfit(n, leaves))}
    nodes = [n for n in graph.layers if n.name not in left]
    seen = (
        {}
        if read.abstract
        else grams(graph, params, read, {n.name for n in nodes}, **options)
    )
    found: dict[str, MaskedLayer] = {}
    known = shapes_on(params, graph, nodes, leaves, method, read.first, {})
    for node in nodes:
        leaf = leaves[node.kernel]
        shape = shape_of(node, leaf, method)
        gram = None
        if node.name in seen:
            gram = gram_of_parameter(node, leaf, shape, seen[node.name].mean)
        parts = spectrum_of(dense(leaf), shape, gram)
        found[node.name] = Low(node, shape, parts, known[node.name])
    return found, left


def _narrow(
    params: Any,
    graph: Graph,
    leaves: Mapping[str, Any],
    read: Batches,
    options: dict[str, Any],
    asked: Sequence[tuple[float, int]],
) -> tuple[dict[str, MaskedLayer], dict[str, str]]:
    bundles = [b for b in bundles_of(graph) if refused(b, coupled=True) is None]
    names = {n for b in bundles for n in b.consumers}
    seen = {} if read.abstract else grams(graph, params, read, names, **options)
    consumers = consumers_of(graph, names, leaves, seen)
    selection = "obs" if seen else "magnitude"
    orders = {
        b.index: removal(graph, leaves, b, consumers, selection, b.size // 2 or 1)
        for b in bundles
    }
    through = {n for b in bundles for n in b.through}
    found: dict[str, MaskedLayer] = {}
    for tied in _tied(graph, bundles):
        own = tuple(b for b in bundles if set(b.consumers) & set(tied))
        rows = {_counts(graph, own, *ask) for ask in asked}
        rows.add(tuple(b.size for b in own))
        counts = np.array(sorted(rows, key=sum), np.int32)
        indices = {i for b in own for i in b.indices}
        layouts = {
            (m.node, m.role, m.axis): m.layout
            for m in graph.members
            if m.role == "in" or (m.role == "out" and m.node not in through)
            if (channel_along(m.layout, indices) >= 0).any()
        }
        each = tuple(orders[b.index] for b in own)
        refit = tuple(consumers[n] for n in tied if n in consumers)
        found[tied[0]] = Narrow(graph, layouts, tied[1:], refit, own, each, counts)
    known = {n for name, layer in found.items() for n in (name, *layer.tied)}
    why = "it reads no channels that can be removed"
    return found, {n.name: why for n in graph.layers if n.name not in known}


def _tied(graph: Graph, bundles: Sequence[CoupledChannels]) -> list[tuple[str, ...]]:
    """Layers that read some of the same channels, in the order in which they run."""
    selected = [n.name for n in graph.layers]
    found: list[set[str]] = []
    for bundle in bundles:
        mine = {n for n in bundle.consumers if n in selected}
        for other in [t for t in found if t & mine]:
            found.remove(other)
            mine |= other
        found += [mine] if mine else []
    together = [tuple(n for n in selected if n in t) for t in found]
    return sorted(together, key=lambda t: selected.index(t[0]))
