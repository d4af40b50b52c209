"""What the layers that read channels say of them, and how they make good for those that go."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import numpy as np

from jaxmet.engine.graph.channel_groups import Layout, Member
from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Node
from jaxmet.layers.grams import GramSums
from jaxmet.layers.layer import WeightMatrix
from jaxmet.layers.leaf_math import replaced, shifted
from jaxmet.numerics.channel_selection import (
    by_block_obs,
    by_lasso,
    reconstruct,
    removal_order,
)
from jaxmet.numerics.precision import wide
from jaxmet.transforms.prune.coupled_channels import (
    CoupledChannels,
    channel_along,
    left_along,
)
from jaxmet.tree.leaves import dense

Selection = Literal["magnitude", "lasso", "obs"]
SELECTIONS = get_args(Selection)


def magnitudes(
    graph: Graph, name: str, leaves: Mapping[str, Any], bundle: CoupledChannels
) -> np.ndarray:
    """The share of a layer's squared weights that reads each channel."""
    found, total = np.zeros(bundle.size), 0.0
    for member in read_by(graph, name):
        of = channel_along(member.layout, bundle.indices)
        if (of >= 0).any():
            array = np.asarray(dense(leaves[member.parameter])).astype(np.float64)
            rest = tuple(i for i in range(array.ndim) if i != member.axis)
            squares = np.sum(array**2, axis=rest)
            found += _gathered(squares, of, bundle.size)
            total = float(np.sum(squares))
    return found / total if total else found


def read_by(graph: Graph, name: str) -> tuple[Member, ...]:
    """The axes along which the weight of a layer reads channels."""
    return tuple(m for m in graph.members if m.node == name and m.role == "in")


@dataclasses.dataclass(frozen=True)
class ConsumerMatrix:
    """A layer as a matrix, where it stands in the parameter, and what the data say of its inputs.

    `index` are the places of the matrix in the flattened parameter; `along` has, by axis of
    the parameter that runs along channels, which entry of it each row reads. `centered` are
    mean products of the inputs, where there is a bias of what differs from their `center`.
    """

    node: Node
    members: tuple[Member, ...]
    weight: np.ndarray  # (ins, outs)
    index: np.ndarray  # (ins, outs)
    along: Mapping[int, np.ndarray]  # (ins,) each
    centered: np.ndarray  # (ins, ins)
    center: np.ndarray  # (ins,)

    @staticmethod
    def of(
        graph: Graph, name: str, leaves: Mapping[str, Any], gram: GramSums
    ) -> "ConsumerMatrix | None":
        """None for a layer that is not one product of a matrix that a parameter holds."""
        node, members = graph[name], read_by(graph, name)
        kernel = np.asarray(dense(leaves[node.kernel]))
        assert node.weight is not None
        matrix = WeightMatrix.of(node, leaves[node.kernel])
        if matrix is None or matrix.sizes[0] != 1:
            return None
        groups = matrix.index
        weight = kernel.astype(wide(kernel.dtype))
        entries = np.unravel_index(groups[0], kernel.shape)
        along = {m.axis: entries[m.axis] for m in members}
        if any((e != e[:, :1]).any() for e in along.values()):
            return None
        rows = {axis: e[:, 0] for axis, e in along.items()}
        gram = jax.device_get(gram)
        center, centered = map(np.asarray, (gram.center[0], gram.mean[0]))
        if node.bias is not None:
            centered = centered - center[:, None] * center
        weight = weight.reshape(-1)[groups[0]]
        return ConsumerMatrix(node, members, weight, groups[0], rows, centered, center)

    def channels_of(self, bundle: CoupledChannels) -> np.ndarray:
        """For each row of the matrix the channel of a bundle that it reads, −1 for none."""
        each = self._rows(lambda layout: channel_along(layout, bundle.indices))
        return functools.reduce(np.maximum, each)

    def left(self, masks: Mapping[int, np.ndarray]) -> np.ndarray:
        """The rows of the matrix that are left, where masks of groups say what is."""
        each = self._rows(lambda layout: left_along(layout, masks))
        return functools.reduce(np.logical_and, each)

    def _rows(self, of: Callable[[Layout], np.ndarray]) -> list[np.ndarray]:
        return [of(m.layout)[self.along[m.axis]] for m in self.members]

    def scores(self, bundle: CoupledChannels, selection: str, keep: int) -> np.ndarray:
        """How much each channel of a bundle is worth to this layer, as a share."""
        rows, channels, of = self.by_channel(bundle)
        weight, gram = self.weight[rows], self.centered[rows][:, rows]
        cross = gram @ weight
        if selection == "lasso":
            share = max(1, round(keep / bundle.size * channels))
            found = by_lasso(gram, cross, weight, channels, share)
        else:
            energy = np.sum(weight * cross)
            found = by_block_obs(gram, cross, channels) / (energy if energy > 0 else 1)
        return _gathered(found, of, bundle.size)

    def order(self, bundle: CoupledChannels) -> np.ndarray | None:
        """Its channels as they go one after the other, None if others are among them."""
        rows, channels, of = self.by_channel(bundle)
        if channels != bundle.size or not np.array_equal(of, np.arange(channels)):
            return None
        gram = self.centered[rows][:, rows]
        return removal_order(gram, gram @ self.weight[rows], channels)

    def by_channel(self, bundle: CoupledChannels) -> tuple[np.ndarray, int, np.ndarray]:
        """The rows tap by tap of as many channels, and which channel of the bundle each is.

        Where not all are of the bundle, or not as many of each, they are those of entries of
        the axes that the layer sums over.
        """
        own = self.channels_of(bundle)
        count = np.bincount(own[own >= 0], minlength=bundle.size)
        if (own >= 0).all() and len(set(count)) == 1:
            return _by_tap(own, bundle.size), bundle.size, np.arange(bundle.size)
        ends = [int(e.max()) + 1 for e in self.along.values()]
        entry = np.ravel_multi_index(tuple(self.along.values()), ends)
        number = int(entry.max()) + 1
        rows = _by_tap(entry, number)
        return rows, number, own[rows[:number]]

    def refitted(
        self, left: np.ndarray, leaves: Mapping[str, Any]
    ) -> tuple[dict[str, Any], float]:
        """The leaves of this layer that make good for the rows gone, and the error.

        The error is that of the output over its energy, of its variance where a bias is.
        """
        gram, weight = self.centered, self.weight
        cross = gram @ weight
        new = reconstruct(gram, cross, left, start=weight).weight
        energy = np.sum(weight * cross)
        error = np.sum((weight - new) * (cross - gram @ new))
        share = float(np.sqrt(max(error, 0.0) / max(energy, 1e-30)))
        return self._leaves(new, self.center @ (weight - new), leaves), share

    def _leaves(
        self, matrix: np.ndarray, shift: Any, leaves: Mapping[str, Any]
    ) -> dict[str, Any]:
        name, bias = self.node.kernel, self.node.bias
        old = dense(leaves[name])
        flat = np.zeros(math.prod(old.shape), matrix.dtype)
        flat[self.index] = matrix
        found = {name: replaced(leaves[name], flat)}
        if bias is not None and bias in leaves and bias not in self.node.shared:
            found[bias] = shifted(leaves[bias], shift)
        return found


def refit_consumers(
    consumers: Mapping[str, ConsumerMatrix],
    masks: Mapping[int, np.ndarray],
    leaves: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, float]]:
    """Leaves in which the consumers make good for what they lose, and what they cannot."""
    work, errors = dict(leaves), {}
    for name, consumer in consumers.items():
        found, errors[name] = consumer.refitted(consumer.left(masks), leaves)
        work |= found
    return work, errors


def _by_tap(own: np.ndarray, number: int) -> np.ndarray:
    """Rows in the order in which a row of each of so many things comes, then the next of each."""
    return np.argsort(own, kind="stable").reshape(number, -1).T.reshape(-1)


def _gathered(scores: np.ndarray, of: np.ndarray, size: int) -> np.ndarray:
    """The scores of all entries of each channel together."""
    found = np.zeros(size)
    np.add.at(found, of[of >= 0], scores[of >= 0])
    return found
