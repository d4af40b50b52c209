"""Weights by output channel, on the host: ranges, and how uneven they are."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxmet.engine.graph.graph import TREE_FIRST, Graph, check_graph
from jaxmet.engine.graph.node import Node
from jaxmet.layers.layer import channel_rows
from jaxmet.tree.checks import check_concrete
from jaxmet.tree.leaves import dense, is_structured
from jaxmet.tree.named_leaves import flatten, named_leaves, parameter_names
from jaxmet.tree.structures import LowRank, multiplied, parts_of, scattered

SAMPLES = 4096  # values of a channel that its quartiles are read off


class Ranges(NamedTuple):
    """The ends of every output channel of a weight, each of shape `(channels,)`."""

    low: np.ndarray
    high: np.ndarray


class Relative(NamedTuple):
    """How many times the smallest range of its layer each channel has, and what stands out.

    `values` leaves out channels without any range, of which there are `dead`. `quartiles` are
    the 0th to the 4th; `outliers` are the values beyond Q3 + 1.5 (Q3 − Q1).
    """

    values: np.ndarray
    quartiles: np.ndarray
    outliers: np.ndarray
    dead: int

    @property
    def largest(self) -> float:
        """The largest value, 1 where there is none."""
        return float(self.quartiles[4])

    @property
    def uneven(self) -> float:
        """How many times the range of the median channel the largest one is."""
        return float(self.quartiles[4] / self.quartiles[2])


def weights_of(params: Any, graph: Graph, caller: str) -> dict[str, Any]:
    """The weight of every selected layer as `(channels, values)`, by the layer's name.

    Of compressed leaves the dense weight; a weight that several layers read stands with the
    first. Weights that the model computes from several parameters are left out.
    """
    check_graph(graph, caller, TREE_FIRST)
    leaves = leaves_of_layers(params, graph, caller)
    found: dict[str, Any] = {}
    seen: set[str] = set()
    for node in graph.layers:
        name = node.weight.name if node.weight is not None else None
        if name is None or name in seen:
            continue
        seen.add(name)
        found[node.name] = by_output(array_of(leaves[name]), node)
    if not found:
        raise ValueError(
            f"jaxmet.{caller}: no selected layer has a weight of its own. Pass the whole "
            "graph, or select layers with graph.only."
        )
    return found


def leaves_of_layers(params: Any, graph: Graph, caller: str) -> dict[str, Any]:
    """The leaves by name, refused where a selected layer's weight is not there, or traced.

    A tree that was pruned or factorized has those of the graph from before, too.
    """
    check_concrete(params, caller)
    leaves = leaves_by_name(params)
    names = {layer.weight.name for layer in graph.layers if layer.weight is not None}
    if names - {None, *leaves}:
        graph.leaves(params, caller)  # says which one is missing
    return leaves


def leaves_by_name(params: Any) -> dict[str, Any]:
    """The leaves of a tree, structured ones as a whole and factors of them too.

    What is left of a pruned leaf has its name: that means the whole.
    """
    whole = flatten(params, whole=True)[1]
    found = dict(zip(parameter_names(params, whole=True), whole, strict=True))
    return named_leaves(params) | found


def array_of(leaf: Any) -> np.ndarray:
    """The dense array that a leaf stands for."""
    if not is_structured(leaf):
        return np.asarray(dense(leaf)).astype(np.float32)
    parts = [jnp.asarray(array_of(part)) for part in parts_of(leaf.weight).values()]
    if isinstance(leaf.weight, LowRank):
        return np.asarray(multiplied(leaf.weight, *parts))
    return np.asarray(scattered(parts[0], leaf.weight.keep))


def by_output(weight: np.ndarray, node: Node) -> np.ndarray:
    """A weight as `(channels, values)`; each layer of a stacked one has its own channels."""
    assert node.weight is not None
    stacked = (0,) if node.weight.stacked else ()
    return channel_rows(weight, (*stacked, *node.weight.out_axes))


def ranges(weight: np.ndarray) -> Ranges:
    """The smallest and the largest value of every channel of `(channels, values)`.

    A single value is a range with zero, as every grid has it; a channel that holds NaN or
    infinity has none, which is NaN.
    """
    if weight.shape[1] == 1:
        weight = np.pad(weight, ((0, 0), (0, 1)))
    fine = np.isfinite(weight).all(axis=1)
    low, high = (np.where(fine, v, np.nan) for v in (weight.min(1), weight.max(1)))
    return Ranges(low, high)


def quartiles(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first and the third quartile of every channel, of evenly strided values."""
    stride = -(-weight.shape[1] // SAMPLES)
    fine = np.isfinite(weight).all(axis=1, keepdims=True)
    some = np.where(fine, weight, np.nan)[:, ::stride]
    first, third = np.quantile(some, (0.25, 0.75), axis=1)
    return first, third


def not_finite(*trees: Mapping[str, np.ndarray]) -> str | None:
    """A line for a subtitle about weights that hold NaN or infinity in any of the trees."""
    every = (pair for weights in trees for pair in weights.items())
    names = list(dict.fromkeys(n for n, w in every if not np.isfinite(w).all()))
    some = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"NaN or infinity in {len(names)}: {some}" if names else None


def same_model(
    before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray], caller: str
) -> None:
    """Refuse another tree whose weights are of another shape."""
    for name, weight in before.items():
        if after[name].shape != weight.shape:
            raise ValueError(
                f"jaxmet.{caller}: the weight of {name!r} has {after[name].shape} channels "
                f"and values in after=, and {weight.shape} before. Give a tree of the same "
                "model."
            )


def relative(widths: np.ndarray) -> Relative:
    r"""Ranges of channels $r_i$ over the smallest one: $r_i / \min_j r_j$.

    `widths` is `(channels,)`, largest minus smallest value. Channels with $r_i = 0$ (dead
    ones) have no ratio to anything: they are counted apart, and so are those that are not
    finite. What lies beyond $Q_3 + 1.5 (Q_3 - Q_1)$ is an outlier, as in AIMET.

    >>> relative(np.array([1.0, 2.0, 0.0])).values  # [1, 2]
    """
    widths = np.asarray(widths, np.float64)
    alive = widths[np.isfinite(widths) & (widths > 0)]
    dead = int(widths.size - alive.size)
    if not alive.size:
        return Relative(alive, np.ones(5), alive, dead)
    values = alive / alive.min()
    found = np.quantile(values, np.linspace(0, 1, 5))
    beyond = found[3] + 1.5 * (found[3] - found[1])
    return Relative(values, found, values[values > beyond], dead)


def worst_first(found: Mapping[str, Relative]) -> list[str]:
    """The names by falling largest relative range; equal ones keep their order."""
    return sorted(found, key=lambda name: -found[name].largest)
