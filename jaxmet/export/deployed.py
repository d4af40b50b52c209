"""What a target runs: the simulation, its parameters known, norms that were folded gone."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.engine.backend.onnx_lowering import SCOPE
from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Node
from jaxmet.engine.program.calls import Apply
from jaxmet.engine.run.replay import Run, evaluate
from jaxmet.layers.fake_quantized import fake_quantize_derived, fake_quantize_output
from jaxmet.layers.folded_shift import folded_norm
from jaxmet.numerics.fake_quant import fake_quant
from jaxmet.tree.host_rounding import grid_in_numpy
from jaxmet.tree.leaves import dense, is_quantized, with_weight
from jaxmet.tree.names import named_leaves, replace_leaves
from jaxmet.tree.quantizers import Quantizers


def deployed(
    apply: Apply, params: Any, graph: Graph, quantizers: Quantizers, kwargs: Any
) -> Callable[..., list[Any]]:
    """A function of the inputs alone: the leaves of the outputs.

    Each weight goes through `fake_quant` with numbers for its grid, and a folded norm, which
    is the identity but for a shift, is that shift.
    """
    leaves = named_leaves(params)
    folded = {n.name for n in graph.nodes if n.norm is not None and _folded(n, leaves)}
    shifts = {name: _shift(graph[name], leaves) for name in folded}
    grids = {
        name: grid_in_numpy(q, np.asarray(dense(leaves[name])))
        for name, q in quantizers.weights.items()
        if name in leaves and q.product is None and q.active
    }
    params = _plain(params, leaves)

    def hook(node: Node, run: Run, operands: tuple[Any, ...]) -> tuple[Any, None]:
        with jax.named_scope(SCOPE + node.name):
            operands = fake_quantize_derived(node, operands, quantizers)
        if node.name in shifts:
            x = operands[0]
            sizes = [x.shape[i] if i in node.features else 1 for i in range(x.ndim)]
            result = x + jnp.asarray(shifts[node.name].reshape(sizes), x.dtype)
        else:
            result = run(*operands)
        with jax.named_scope(SCOPE + node.name):
            return fake_quantize_output(node, run, result, quantizers), None

    def function(*inputs: Any) -> list[Any]:
        own = named_leaves(params)
        rounded = {}
        for name, grid in grids.items():
            q, leaf = quantizers.weights[name], own[name]
            given = jnp.asarray(dense(leaf))
            with jax.named_scope(SCOPE + name):
                array = fake_quant(given, *grid, *q.ends, axis=q.axis, block=q.block)
            rounded[name] = with_weight(leaf, array)
        tree = replace_leaves(params, rounded)
        run = evaluate(apply, hook, cpu_formulations=False)
        return jax.tree.leaves(run(tree, *inputs, **kwargs)[0])

    return function


def _folded(node: Node, leaves: Mapping[str, Any]) -> bool:
    norm = node.norm
    assert norm is not None
    form = norm.why_kept() is None and norm.debias is None and norm.factor == 1
    return form and folded_norm(node, leaves)


def _shift(node: Node, leaves: Mapping[str, Any]) -> np.ndarray:
    """β − μ of a folded norm."""
    norm = node.norm
    assert norm is not None and norm.mean is not None
    shift = -np.asarray(dense(leaves[norm.mean]), np.float64)
    if norm.bias is not None:
        shift = shift + np.asarray(dense(leaves[norm.bias]), np.float64)
    return shift.astype(np.float32)


def _plain(params: Any, leaves: Mapping[str, Any]) -> Any:
    """Integers as the floats that they stand for."""
    if not any(map(is_quantized, leaves.values())):
        return params

    def plain(leaf: Any) -> Any:
        if not is_quantized(leaf):
            return leaf
        more = set(leaf.stated()) - {"weight"}
        array = dense(leaf)
        return leaf.replace(weight=array) if more else array

    return jax.tree.map(plain, params, is_leaf=is_quantized)
