"""Values and weights on the grids of quantizers, as the replay of a model meets them."""

import dataclasses
import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp

from jaxmet.engine.graph.graph import Graph, fitted
from jaxmet.engine.graph.node import Node
from jaxmet.engine.run.replay import Run
from jaxmet.layers.folds.folded_weights import folded_and_back
from jaxmet.tree.grids import Grids
from jaxmet.tree.named_leaves import named_leaves, replace_leaves
from jaxmet.tree.quantizers import Quantizer, Quantizers


def quantizer_at(
    node: Node, run: Run, quantizers: Quantizers, ndim: int
) -> Quantizer | None:
    """The quantizer of a node, in a loop over layers the one of this layer.

    An input of `ndim` axes that such a loop slices has those of all layers along axis 0.
    """
    owner = quantizers.owner(node.name)
    if owner is None:
        return None
    quantizer: Quantizer = quantizers.activations[owner]
    if not node.layers:
        along = lambda a: a.reshape(-1, *(1,) * (ndim - 1)) if jnp.ndim(a) == 1 else a
        return jax.tree.map(along, quantizer)
    return _of_layer(quantizer, run.iteration[-1])


def _of_layer(quantizer: Quantizer, index: Any) -> Quantizer:
    """Of a quantizer with a scale for each layer that of one; another one as it is."""
    return jax.tree.map(lambda a: a[index] if jnp.ndim(a) else a, quantizer)


def fake_quantize_output(
    node: Node,
    run: Run,
    result: Any,
    quantizers: Quantizers,
    grids: Grids | None = None,
) -> Any:
    """A node's result on its grid, if it has one there; integers, as pixels may be, stay."""
    quantizer = quantizer_at(node, run, quantizers, result.ndim)
    owner = quantizers.owner(node.name)
    real = jnp.issubdtype(result.dtype, jnp.inexact)
    if quantizer is None or owner is None or not real or quantizer.products_only:
        return result
    examples = math.prod(result.shape[axis] for axis in node.batch)
    return quantizer(result, grids and grids.activations[owner], examples=examples)


def fake_quantize_operands(
    node: Node,
    run: Run,
    operands: tuple[Any, ...],
    quantizers: Quantizers,
    grids: Grids | None = None,
    scope: Callable[[str], AbstractContextManager] = lambda name: nullcontext(),
) -> tuple[Any, ...]:
    """What a node reads on a grid that is not that of the whole value.

    A weight that the model computes from several parameters, and what only products read on
    their grids; each is quantized within `scope` of the quantizer's name.
    """
    found = list(operands)
    for i, name in entered_operands(node, quantizers).items():
        quantizer = quantizer_entering(node, run, i, found[i].ndim, quantizers)
        owner = quantizers.owner(name)
        assert owner is not None
        with scope(owner):
            found[i] = quantizer(found[i], grids and grids.activations[owner])
    weight = node.weight
    if weight is not None and weight.name is None and node.name in quantizers.weights:
        quantizer = quantizers.weights[node.name]
        i = weight.operand
        with scope(node.name):
            found[i] = quantizer(found[i], grids and grids.weights[node.name])
    return tuple(found)


def entered_operands(node: Node, quantizers: Quantizers) -> dict[int, str]:
    """The operands that are quantized where this product reads them, and a node of each.

    None of which any source has no quantizer, as one that was zero in all data.
    """
    if not node.is_product:
        return {}
    float_at = {
        e.operand for e in node.inputs if quantizers.owner(e.node or "") is None
    }
    return {
        edge.operand: edge.node
        for edge in node.inputs
        if edge.node is not None
        and edge.operand not in float_at
        and _only_products(edge.node, quantizers)
    }


def quantizer_entering(
    node: Node, run: Run, operand: int, ndim: int, quantizers: Quantizers
) -> Quantizer:
    """What quantizes an operand of a product; in a loop, that of the turn that made the value."""
    found: Quantizer | None = None
    edges = [e for e in node.inputs if e.operand == operand and e.node is not None]
    first = quantizers.activation(edges[0].node or "")
    if first is not None and first.follows:
        return _of_rows(first, node, operand, ndim)
    for edge in sorted(edges, key=lambda e: e.turn == "previous"):
        quantizer = quantizers.activation(edge.node or "")
        assert quantizer is not None
        if edge.turn == "last":
            quantizer = _of_layer(quantizer, -1)
        elif node.layers and any(map(jnp.ndim, jax.tree.leaves(quantizer))):
            here = run.iteration[-1] - int(edge.turn == "previous")
            quantizer = _of_layer(quantizer, jnp.maximum(here, 0))
            if found is not None:  # the first turn reads what the loop began with
                choose = functools.partial(jnp.where, here < 0)
                quantizer = jax.tree.map(choose, found, quantizer)
        found = quantizer
    assert found is not None
    return found


def _of_rows(q: Quantizer, node: Node, operand: int, ndim: int) -> Quantizer:
    """A range for each row that a product sums over, or for each of its blocks."""
    summed = tuple(i % ndim for i in node.summed(operand))
    if not q.per_token or not summed:
        return dataclasses.replace(q, block=None)
    if node.convolution is not None:  # the windows of several results share positions
        kept = node.convolution.input_axes[:1]
        return dataclasses.replace(q, axis=kept, block=None)
    kept = tuple(i for i in range(ndim) if i not in summed)
    if q.block is None or len(summed) > 1:
        return dataclasses.replace(q, axis=kept, block=None)
    return dataclasses.replace(q, axis=kept, block_axis=min(summed))


def _only_products(name: str, quantizers: Quantizers) -> bool:
    quantizer = quantizers.activation(name)
    return quantizer is not None and quantizer.products_only


def fake_quantize_params(
    params: Any,
    quantizers: Quantizers,
    grids: Grids | None = None,
    fold: Graph | None = None,
) -> Any:
    """The tree with every quantized parameter on its grid; with `fold`, as it is folded."""
    leaves = named_leaves(params)
    quantize = functools.partial(quantizers.quantize_weights, grids=grids)
    if fold is None:
        quantized = quantize(leaves)
    else:
        fold, leaves = fitted(params, fold, "simulate")
        quantized = folded_and_back(fold, leaves, quantize, "simulate")
    held = {name: quantized[name] for name in quantizers.weights if name in leaves}
    return replace_leaves(params, held)
