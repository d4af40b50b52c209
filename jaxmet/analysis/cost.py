"""What a model costs: multiplications, parameters and bytes of every layer."""

import math
from typing import Any

import jax
import numpy as np

from jaxmet.engine.graph.graph import Graph, fitted
from jaxmet.engine.graph.operations import works
from jaxmet.layers.arguments import accepting
from jaxmet.tree.leaves import dense, is_structured
from jaxmet.tree.named_leaves import flatten, parameter_names
from jaxmet.tree.structures import LowRank, Pruned
from jaxmet.tree.table import Table

CALLER = "cost"
REST, ALL = "(other parameters)", "(all)"


def cost(params: Any, graph: Graph, *inputs: Any, **kwargs: Any) -> Table:
    """Multiplications, parameters and bytes of every layer, and of the model in all.

    `inputs` are arrays or `jax.ShapeDtypeStruct`s; counts are for one call with them, so
    pass one example for the cost of an example. `params` may be factorized or pruned,
    with the graph of the model as it was: what is counted is what `jm.lift` runs, two layers
    for two factors.

    Columns: `layer`, products of activations with each other (attention) among them; `macs`,
    the multiplications of its product, those with padding included, as papers count them,
    once a step of a `jax.lax.scan`, of both branches of a `cond`, of a `while_loop` once;
    `flops`, additions and multiplications where a window meets values, as XLA counts them;
    `parameters` of weight and bias, and their `bytes` as they are stored. A weight that
    several layers read counts with the first. The last two rows are the parameters of no
    layer, and the whole.

    Args:
        params: the parameter tree, whatever the model takes first; not changed.
        graph: the graph of `jm.trace`; `graph.only` and `graph.without` select layers.
        *inputs: arrays or `jax.ShapeDtypeStruct`s; counts are for one call with them.
        **kwargs: keyword arguments for the model.

    Returns:
        A table with one row per layer, then the other parameters, then the whole.

    Raises:
        ValueError: without inputs, for inputs on which the model does not run, and for a tree
            that is not the graph's.

    >>> table = jm.cost(params, graph, images[:1])
    >>> table.where(layer="(all)")["macs"]
    """
    graph, leaves = fitted(params, graph, CALLER)
    counted = set[str]()
    if not inputs:
        raise ValueError(
            f"jaxmet.{CALLER}: there are no inputs. Pass those of one call, or their "
            "shapes as jax.ShapeDtypeStruct: how much work a layer is depends on them."
        )
    rows = []
    cure, traced = "Pass what one call takes, or its shapes.", graph.called[0]
    with accepting(
        inputs, CALLER, graph.apply, params, kwargs, traced=traced, cure=cure
    ):
        products = works(graph, params, inputs, kwargs)
    for work in products:
        own = [n for n in work.node.parameters if n in leaves and n not in counted]
        counted.update(own)
        numbers = _stored([leaves[n] for n in own])
        rows.append((work.node.name, work.macs, work.flops, *numbers))
    rest = _stored([leaf for name, leaf in leaves.items() if name not in counted])
    rows.append((REST, 0, 0, *rest))
    rows.append((ALL, *(sum(row[i] for row in rows) for i in range(1, 5))))
    names = ("layer", "macs", "flops", "parameters", "bytes")
    return Table(
        dict(zip(names, zip(*rows, strict=True), strict=True)), "cost of a call"
    )


def _stored(leaves: list[Any]) -> tuple[int, int]:
    arrays = [a for a in jax.tree.leaves(leaves) if hasattr(a, "dtype")]
    sizes = [math.prod(np.shape(a)) for a in arrays]
    bytes_ = sum(n * a.dtype.itemsize for n, a in zip(sizes, arrays, strict=True))
    return sum(sizes), bytes_


def widths(params: Any) -> Table:
    """What is left of every parameter: if you rebuild the model with smaller layers.

    One row per leaf that was factorized or pruned: its name, its `shape` before, the shapes
    that are `stored` now, and the `rank` between two factors. A flax model with these
    features and ranks takes the stored arrays as they are.

    Args:
        params: a tree of `jm.prune` or `jm.factorize`.

    Returns:
        A table with one row per compressed leaf.

    >>> print(jm.widths(jm.prune(params, graph, ratios)))
    """
    names, leaves = parameter_names(params, whole=True), flatten(params, whole=True)[1]
    rows = [
        (
            name,
            leaf.shape,
            [tuple(dense(p).shape) for p in flatten(leaf)[1]],
            _rank(leaf),
        )
        for name, leaf in zip(names, leaves, strict=True)
        if is_structured(leaf)
    ]
    columns = list(zip(*rows, strict=True)) or [()] * 4
    return Table(
        dict(zip(("parameter", "shape", "stored", "rank"), columns, strict=True)),
        f"{len(rows)} parameters are smaller",
    )


def _rank(leaf: Any) -> int | None:
    weight = _left_of(leaf)
    if not isinstance(weight, LowRank):
        return None
    return int(_left_of(weight.second).shape[weight.in_axes[-1]])


def _left_of(leaf: Any) -> Any:
    """What is stored of a leaf, however often it was pruned."""
    weight = dense(leaf)
    while isinstance(weight, Pruned):
        weight = dense(weight.part)
    return weight
