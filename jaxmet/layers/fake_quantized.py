"""Values and weights on the grids of quantizers, as the replay of a model meets them."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxmet.engine.graph.graph import Graph, fitted
from jaxmet.engine.graph.node import Node
from jaxmet.engine.run.replay import Run
from jaxmet.layers.folded_weights import folded_and_back
from jaxmet.tree.grids import Grids
from jaxmet.tree.names import named_leaves, replace_leaves
from jaxmet.tree.quantizers import Quantizer, Quantizers


def quantizer_at(node: Node, run: Run, quantizers: Quantizers) -> Quantizer | None:
    """What quantizes a node's result, in a loop over layers the one of this layer."""
    owner = quantizers.owner(node.name)
    if owner is None:
        return None
    quantizer: Quantizer = quantizers.activations[owner]
    if not node.layers:
        return quantizer
    here = run.iteration[-1]
    return jax.tree.map(lambda a: a[here] if jnp.ndim(a) else a, quantizer)


def fake_quantize_output(
    node: Node,
    run: Run,
    result: Any,
    quantizers: Quantizers,
    grids: Grids | None = None,
) -> Any:
    """A node's result on its grid, if it has one; integers, as pixels may be, stay."""
    quantizer, owner = quantizer_at(node, run, quantizers), quantizers.owner(node.name)
    real = jnp.issubdtype(result.dtype, jnp.inexact)
    if quantizer is None or owner is None or not real:
        return result
    examples = math.prod(result.shape[axis] for axis in node.batch)
    return quantizer(result, grids and grids.activations[owner], examples=examples)


def fake_quantize_derived(
    node: Node,
    operands: tuple[Any, ...],
    quantizers: Quantizers,
    grids: Grids | None = None,
) -> tuple[Any, ...]:
    """Put a weight that the model computes from several parameters on its grid."""
    weight = node.weight
    if weight is None or weight.name is not None or node.name not in quantizers.weights:
        return operands
    quantizer = quantizers.weights[node.name]
    i = weight.operand
    quantized = quantizer(operands[i], grids and grids.weights[node.name])
    return (*operands[:i], quantized, *operands[i + 1 :])


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
