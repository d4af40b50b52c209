"""What the sites that read channels say of them, and how they make good for those that go."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.engine.channels import Layout
from jaxmet.engine.graph import Graph
from jaxmet.engine.node import Node
from jaxmet.engine.rows import matrix_of
from jaxmet.engine.views import CASTS
from jaxmet.numerics.channel_selection import (
    by_block_obs,
    by_lasso,
    by_magnitude,
    reconstruct,
    removal_order,
)
from jaxmet.transforms.grams import Gram
from jaxmet.transforms.prune.bundles import Bundle, channel_along
from jaxmet.tree.leaves import dense, with_weight

SELECTIONS = ("magnitude", "lasso", "obs")


@dataclasses.dataclass(frozen=True)
class Reader:
    """A site, the layout of its input axis, and what the data say of its inputs."""

    node: Node
    layout: Layout
    weight: jax.Array  # (ins, outs), the entries of the input axis last among ins
    gram: Gram | None = None

    @staticmethod
    def of(
        graph: Graph, name: str, leaves: Mapping[str, Any], gram: Any
    ) -> "Reader | None":
        """None for a site whose inputs are no single axis of one product."""
        node = graph[name]
        layouts = [m.layout for m in graph.members if m.node == name and m.role == "in"]
        conv, weight = node.convolution, node.weight
        assert weight is not None
        if len(layouts) != 1 or weight.name is None:
            return None
        if conv is not None and conv.groups != 1 or node.dot and node.dot.batched:
            return None
        array = jnp.asarray(dense(leaves[weight.name]))
        array = array.astype(jnp.promote_types(array.dtype, jnp.float32))
        if any(view not in CASTS for view in weight.views):
            return None
        return Reader(node, layouts[0], matrix_of(node, array)[0], gram)

    @property
    def entries(self) -> int:
        return int(channel_along(self.layout, set()).size)

    def scores(self, bundle: Bundle, selection: str, keep: int) -> np.ndarray:
        """How much each channel of a bundle is worth to this site, as a share."""
        weight, rows, channels, of = self.by_channel(bundle)
        if self.gram is None or selection == "magnitude":
            found = by_magnitude(weight, channels)
            return _gathered(np.asarray(found / jnp.sum(weight**2)), of, bundle.size)
        gram = self.centered[rows][:, rows]
        cross = jnp.matmul(gram, weight, precision="highest")
        if selection == "lasso":
            share = max(1, round(keep / bundle.size * channels))
            found = np.asarray(by_lasso(gram, cross, weight, channels, share))
            return _gathered(found, of, bundle.size)
        found = by_block_obs(gram, cross, channels) / jnp.sum(weight * cross)
        return _gathered(np.asarray(found), of, bundle.size)

    def order(self, bundle: Bundle) -> np.ndarray | None:
        """Its channels as they go one after the other, None if others are among them."""
        weight, rows, channels, of = self.by_channel(bundle)
        if (
            self.gram is None
            or channels != bundle.size
            or not np.array_equal(of, np.arange(channels))
        ):
            return None
        gram = self.centered[rows][:, rows]
        cross = jnp.matmul(gram, weight, precision="highest")
        return np.asarray(removal_order(gram, cross, channels))

    def by_channel(
        self, bundle: Bundle
    ) -> tuple[jax.Array, np.ndarray, int, np.ndarray]:
        """The weight with its rows by channel, the rows, how many channels, and which."""
        own = channel_along(self.layout, bundle.indices)
        rows = np.arange(self.weight.shape[0])
        count = np.bincount(own[own >= 0], minlength=bundle.size)
        if (own >= 0).all() and len(set(count)) == 1:
            taps = self.weight.shape[0] // own.size
            order = (
                np.argsort(own, kind="stable").reshape(bundle.size, -1).T.reshape(-1)
            )
            rows = (np.arange(taps)[:, None] * own.size + order[None]).reshape(-1)
            return self.weight[rows], rows, bundle.size, np.arange(bundle.size)
        return self.weight, rows, own.size, own

    @property
    def centered(self) -> jax.Array:
        """The products of the inputs, of what differs from their means where a bias is."""
        assert self.gram is not None
        mean, center = self.gram.mean[0], self.gram.center[0]
        if self.node.bias is None:
            return mean
        return mean - center[:, None] * center[None]

    def refitted(
        self, left: Any, leaves: Mapping[str, Any]
    ) -> tuple[dict[str, Any], jax.Array]:
        """The leaves of this site that make good for the entries gone, and the error.

        The error is that of the output over its energy, of its variance where a bias is.
        `left` may be traced.
        """
        assert self.gram is not None
        gram, weight = self.centered, self.weight
        product = partial(jnp.matmul, precision="highest")
        cross = product(gram, weight)
        new = reconstruct(gram, cross, jnp.asarray(left), start=weight).weight
        energy = jnp.sum(weight * cross)
        error = jnp.sum((weight - new) * (cross - product(gram, new)))
        share = jnp.sqrt(jnp.maximum(error, 0.0) / jnp.maximum(energy, 1e-30))
        shift = product(self.gram.center[:1], weight - new)[0]
        return self._leaves(new, shift, leaves), share

    def _leaves(
        self, matrix: jax.Array, shift: jax.Array, leaves: Mapping[str, Any]
    ) -> dict[str, Any]:
        name, bias = self.node.kernel, self.node.bias
        old = dense(leaves[name])
        array = array_of(self.node, matrix, tuple(old.shape)).astype(old.dtype)
        found = {name: with_weight(leaves[name], array)}
        if bias is not None and bias in leaves and bias not in self.node.shared:
            given = jnp.asarray(dense(leaves[bias]))
            moved = given + shift.reshape(given.shape).astype(given.dtype)
            found[bias] = with_weight(leaves[bias], moved)
        return found


def _gathered(scores: np.ndarray, of: np.ndarray, size: int) -> np.ndarray:
    """The scores of all entries of each channel together."""
    found = np.zeros(size)
    np.add.at(found, of[of >= 0], scores[of >= 0])
    return found


def array_of(node: Node, matrix: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `matrix_of` for one group."""
    if node.convolution is not None:
        outs, ins, *window = node.convolution.kernel_axes
        order = (outs, *window, ins)
        array = matrix.T.reshape([shape[i] for i in order])
    else:
        assert node.dot is not None
        summed = [w for _, w in node.dot.summed]
        free = [i for i in range(len(shape)) if i not in summed]
        order = (*summed, *free)
        array = matrix.reshape([shape[i] for i in order])
    return jnp.transpose(array, [order.index(i) for i in range(len(order))])
