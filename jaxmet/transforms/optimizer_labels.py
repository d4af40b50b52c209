"""What an optimizer may do to each leaf."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxmet.engine.graph.graph import Graph, fitted
from jaxmet.layers.folds.norm_parameters import check_mode
from jaxmet.tree.leaves import Compressed, is_compressed
from jaxmet.tree.named_leaves import flatten, has_collections, named_leaves, path_parts
from jaxmet.tree.quantizers import Quantizers, check_are_quantizers

CALLER = "optimizer_labels"


def optimizer_labels(
    params: Any, graph: Graph, quantizers: Quantizers | None = None
) -> Any:
    """Labels for `optax.multi_transform`: a pair of trees for the pair that trains.

    `'weights'` are what the loss trains: kernels, biases, gains and shifts of norms;
    `'statistics'` the running means and variances of norms, every leaf of a collection
    beside `params`, and what is no float; `'bounds'` the bounds and offsets that
    `Compressed` leaves state; `'ranges'` the leaves of `quantizers`. Statistics and bounds
    want `optax.set_to_zero()`: weight decay would pull them to zero without any gradient.

    The trees have the structure of `params` and of `quantizers`; without `quantizers` it is
    the first alone.

    Args:
        params: the parameter tree, whatever the model takes first; not changed.
        graph: the graph of `jm.trace`; `graph.only` and `graph.without` select layers.
        quantizers: the quantizers to be trained beside the tree; default None: the tree alone.

    Returns:
        A tree of labels, or a pair of trees with `quantizers`, for `optax.multi_transform`.

    Raises:
        ValueError: for a tree that is not the graph's, for a graph in training mode, whose
            norms do not say where their statistics are kept, and for integer weights.

    >>> frozen = optax.set_to_zero()
    >>> each = {"weights": optax.adamw(1e-4), "ranges": optax.adam(1e-4),
    ...         "statistics": frozen, "bounds": frozen}
    >>> optimizer = optax.multi_transform(each, jm.optimizer_labels(params, graph, quantizers))
    >>> state = optimizer.init((params, quantizers))
    """
    graph, _ = fitted(params, graph, CALLER, layers=False)
    if quantizers is not None:
        check_are_quantizers(quantizers, CALLER)
    kept = {n for node in graph.nodes if node.norm for n in _statistics(node)}
    collections = has_collections(params)
    names, (paths, leaves, tree) = named_leaves(params), flatten(params)
    labels = []
    for name, path, leaf in zip(names, paths, leaves, strict=True):
        beside = collections and path_parts(path)[0] != "params"
        labels.append(
            _label(name, leaf, "statistics" if beside or name in kept else "weights")
        )
    of_params = tree.unflatten(labels)
    if quantizers is None:
        return of_params
    labels_of = jax.tree.map(lambda _: "ranges", quantizers)
    fixed = {
        name: dataclasses.replace(q, least="bounds")
        for name, q in labels_of.weights.items()
        if q.least is not None
    }
    weights = labels_of.weights | fixed
    return of_params, dataclasses.replace(labels_of, weights=weights)


def _statistics(node: Any) -> tuple[str, ...]:
    check_mode(node, CALLER)
    return tuple(n for n in (node.norm.mean, node.norm.variance) if n is not None)


def _label(name: str, leaf: Any, label: str) -> Any:
    if is_compressed(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"jaxmet.{CALLER}: the weight of {name!r} holds integers ({leaf.dtype}), "
                "which do not train. Train the float tree that they were made of."
            )
        stated = dict.fromkeys(leaf.stated(), "bounds")
        return Compressed(**stated | {"weight": label})
    floating = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)
    return label if floating else "statistics"
