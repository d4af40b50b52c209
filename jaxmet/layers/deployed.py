"""What a target runs: the simulation, norms that were folded gone, weights handed in."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.engine.graph.node import Node
from jaxmet.engine.program.calls import Apply
from jaxmet.engine.program.scopes import END, LAYER, SCOPE
from jaxmet.engine.run.replay import Run, evaluate
from jaxmet.layers.fake_quantized import fake_quantize_operands, fake_quantize_output
from jaxmet.layers.folds.folded_shift import folded_norm
from jaxmet.layers.folds.norm_parameters import roles_of
from jaxmet.numerics.fake_quant import fake_quant
from jaxmet.tree.checks import is_concrete
from jaxmet.tree.host_rounding import grid_in_numpy
from jaxmet.tree.leaves import dense, is_quantized, with_weight
from jaxmet.tree.named_leaves import named_leaves, replace_leaves
from jaxmet.tree.quantizers import Quantizers

Function = Callable[..., Any]


def weights_on_grids(params: Any, quantizers: Quantizers) -> list[str]:
    """The parameters that are on a grid of their own: all that are quantized but biases."""
    return [
        name
        for name in named_leaves(params)
        if (q := quantizers.weights.get(name)) is not None
        and q.product is None
        and q.active
    ]


def deployed(
    apply: Apply,
    params: Any,
    quantizers: Quantizers,
    kwargs: Any,
    *,
    named: bool = False,
) -> Function:
    """`f(weights, *inputs)`: the model on the grids of its activations.

    `weights` are arrays by name in place of those of the tree, on their grids already. Biases
    are rounded, and a folded norm, which is the identity but for a shift, is that shift.
    """
    given = named_leaves(params)  # integers know their scale
    params = _plain(params)
    leaves = named_leaves(params)
    biases = [n for n, q in quantizers.weights.items() if q.product and n in leaves]
    on_grids = [n for n in biases if is_quantized(given[n])]
    leaves |= {
        n: quantizers.quantize_weight(n, given) for n in biases if n not in on_grids
    }

    def own_scope(node: Node) -> Any:
        # Only LiteRT's file names what is in float; other lowerings read the scopes as they are.
        if not named:
            return contextlib.nullcontext()
        return jax.named_scope(LAYER + node.name + END)

    def hook(node: Node, run: Run, operands: tuple[Any, ...]) -> tuple[Any, None]:
        operands = fake_quantize_operands(
            node, run, operands, quantizers, scope=_scope_of
        )
        if node.norm is not None and _is_shift(node, leaves, quantizers):
            x = operands[0]
            sizes = [x.shape[i] if i in node.features else 1 for i in range(x.ndim)]
            # A known shift is a constant of the program, without an equation that shapes it.
            shift = _shift(node, leaves).reshape(sizes).astype(x.dtype)
            with own_scope(node):
                result = x + jnp.asarray(shift)
        else:
            with own_scope(node):
                result = run(*operands)
        with jax.named_scope(SCOPE + node.name):
            return fake_quantize_output(node, run, result, quantizers), None

    def function(weights: Mapping[str, Any], *inputs: Any) -> Any:
        new = {name: with_weight(leaves[name], a) for name, a in weights.items()}
        tree = replace_leaves(params, leaves | new)
        run = evaluate(apply, hook, cpu_formulations=False)
        return run(tree, *inputs, **kwargs)[0]

    return function


def _scope_of(name: str) -> Any:
    return jax.named_scope(SCOPE + name)


def fake_quantized_weights(params: Any, quantizers: Quantizers) -> Function:
    """A function that puts every weight through `fake_quant` with numbers for its grid."""
    leaves = named_leaves(params)
    arrays = {
        name: np.asarray(dense(leaves[name]))
        for name in weights_on_grids(params, quantizers)
    }
    grids = {
        name: grid_in_numpy(quantizers.weights[name], a) for name, a in arrays.items()
    }

    def function() -> dict[str, Any]:
        found = {}
        for name, grid in grids.items():
            q, array = quantizers.weights[name], jnp.asarray(arrays[name])
            with jax.named_scope(SCOPE + name):
                rounded = fake_quant(array, *grid, *q.ends, axis=q.axis, block=q.block)
            found[name] = rounded
        return found

    return function


def _is_shift(node: Node, leaves: Mapping[str, Any], quantizers: Quantizers) -> bool:
    """Whether a norm was folded: its numbers say so, or that its bias is one of int32."""
    norm = node.norm
    assert norm is not None
    if norm.why_kept() is not None or norm.debias is not None or norm.factor != 1:
        return False
    bias = None if norm.bias is None else quantizers.weights.get(norm.bias)
    if bias is not None and any(name == norm.mean for name, _ in bias.beside):
        return True
    names = [n for n in roles_of(norm).values() if n in leaves]
    arrays = {n: dense(leaves[n]) for n in names}
    if not all(map(is_concrete, arrays.values())):
        return False
    # In NumPy: inside of a trace JAX would trace what is known.
    return folded_norm(node, {n: np.asarray(a) for n, a in arrays.items()})


def _shift(node: Node, leaves: Mapping[str, Any]) -> Any:
    """β − μ of a folded norm."""
    norm = node.norm
    assert norm is not None and norm.mean is not None
    mean = dense(leaves[norm.mean])
    if norm.bias is None:
        return -mean
    bias = dense(leaves[norm.bias])
    if not (is_concrete(mean) and is_concrete(bias)):
        return bias - mean.astype(bias.dtype)
    return (np.asarray(bias, np.float64) - np.asarray(mean, np.float64)).astype(
        bias.dtype
    )


def _plain(params: Any) -> Any:
    """Integers as the floats that they stand for."""

    def plain(leaf: Any) -> Any:
        if not is_quantized(leaf):
            return leaf
        more = set(leaf.stated()) - {"weight"}
        array = dense(leaf)
        return leaf.replace(weight=array) if more else array

    return jax.tree.map(plain, params, is_leaf=is_quantized)
