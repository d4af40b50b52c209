"""How much the outputs of a model change with its weights and with what its products read.

Small independent errors of a weight or an activation add to the outputs, to first order, an
expected squared error of (variance of the error) x (sum over outputs of squared derivatives).
A projection of the outputs on random signs has that sum as the expectation of its squared
gradient, so one backward pass tells it of everything at once. Images are taken one by one:
summed over a batch, gradients that are much alike would leave a single draw of chance.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxmet.engine.calls import Apply
from jaxmet.engine.node import Node
from jaxmet.engine.replay import Run, evaluate
from jaxmet.tree.leaves import dense, with_weight
from jaxmet.tree.names import named_leaves, replace_leaves

Squares = dict[str, Any]


def squared_gradients(
    apply: Apply, sites: Mapping[str, int], parameters: Collection[str]
) -> Callable:
    """`f(params, units, *inputs) -> (by input, by weight)`.

    `sites` gives the number of input channels of the products to look at and `parameters`
    names weights. By input: for each product and channel the sum over positions of the squared
    derivative with respect to what the product reads. By weight: the squared derivative with
    respect to each entry. Derivatives are of the outputs on random signs, each output array
    divided by the root of its entry in `units`.
    """

    def squares(params: Any, units: Sequence[jax.Array], *inputs: Any) -> tuple:
        leaves = named_leaves(params)
        free = {name: jnp.asarray(dense(leaves[name])) for name in parameters}
        totals = {name: jnp.zeros(size, jnp.float32) for name, size in sites.items()}

        def projected(free: Squares, totals: Squares) -> jax.Array:
            def tapping(node: Node, run: Run, operands: tuple[Any, ...]) -> Any:
                if node.name in sites:
                    x = _tap(tuple(node.in_features), operands[0], totals[node.name])
                    operands = (x, *operands[1:])
                return run(*operands), None

            new = {n: with_weight(leaves[n], array) for n, array in free.items()}
            tree = replace_leaves(params, new, caller="equalize")
            return _projection(evaluate(apply, tapping)(tree, *inputs)[0], units)

        by_weight, by_input = jax.grad(projected, argnums=(0, 1))(free, totals)
        return by_input, jax.tree.map(_squared, by_weight)

    return squares


def energies(outputs: Any) -> list[jax.Array]:
    """The sum of squares of every real array among the outputs."""
    return [jnp.sum(jnp.square(y)) for y in _real(outputs)]


def _real(outputs: Any) -> list[jax.Array]:
    """The real arrays among the outputs, at least in float32."""
    return [
        y.astype(jnp.promote_types(y.dtype, jnp.float32))
        for y in jax.tree.leaves(outputs)
        if jnp.issubdtype(y.dtype, jnp.floating)
    ]


def _squared(x: jax.Array) -> jax.Array:
    return jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32)))


def _projection(outputs: Any, units: Sequence[jax.Array]) -> jax.Array:
    """The sum of every output times a random sign, each array in its unit."""
    total = jnp.zeros((), jnp.float32)
    for number, (y, unit) in enumerate(zip(_real(outputs), units, strict=True)):
        # The energy stands for the image: others get other signs, the same image the same.
        energy = jnp.sum(jnp.square(jax.lax.stop_gradient(y))).astype(jnp.float32)
        seed = jax.lax.bitcast_convert_type(energy, jnp.uint32)
        key = jax.random.fold_in(jax.random.key(number), seed)
        signs = jax.random.rademacher(key, y.shape, y.dtype)
        scale = jax.lax.rsqrt(jnp.where(unit > 0, unit, 1.0)).astype(y.dtype)
        total += (jnp.sum(y * signs) * scale).astype(jnp.float32)
    return total


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tap(kept: tuple[int, ...], x: jax.Array, total: jax.Array) -> jax.Array:
    """x; the gradient of `total` is the sum of squares of that of x, over all but `kept`."""
    del kept, total
    return x


def _tap_forward(
    kept: tuple[int, ...], x: jax.Array, total: jax.Array
) -> tuple[jax.Array, None]:
    del kept, total
    return x, None


def _tap_backward(kept: tuple[int, ...], _: None, g: jax.Array) -> tuple[Any, Any]:
    rest = [i for i in range(g.ndim) if i not in kept]
    squares = jnp.square(jnp.transpose(g, (*kept, *rest)).astype(jnp.float32))
    summed = jnp.sum(squares, axis=tuple(range(len(kept), g.ndim)))
    return g, summed.reshape(-1)


_tap.defvjp(_tap_forward, _tap_backward)
