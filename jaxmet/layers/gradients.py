"""How much the outputs of a model change with its weights and with what its products read.

Small independent errors of a weight or an activation add to the outputs, to first order, an
expected squared error of (variance of the error) x (sum over outputs of squared derivatives).
A projection of the outputs on random signs has that sum as the expectation of its squared
gradient, so one backward pass tells it of everything at once. Images are taken one by one:
summed over a batch, gradients that are much alike would leave a single draw of chance.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxmet.engine.graph.node import Node
from jaxmet.engine.program.calls import Apply
from jaxmet.engine.run.replay import Run, counted_only, evaluate
from jaxmet.numerics.precision import wide
from jaxmet.tree.leaves import dense, with_weight
from jaxmet.tree.named_leaves import named_leaves, replace_leaves

Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Tap:
    """A look at the gradient of a node's result, or of one of its operands.

    `saved(node, run, x)` is what is kept of the value, `measure(node, gradient, saved)`
    an array of `shape`: summed over the passes through the node. What reads the value finds
    `moved(x, saved)` in its place.
    """

    node: str
    shape: tuple[int, ...]
    measure: Callable[[Node, jax.Array, Any], jax.Array]
    saved: Callable[[Node, Run, jax.Array], Any] = lambda *_: ()
    operand: int | None = None
    moved: Callable[[Any, Any], Any] = lambda x, saved: x


def by_channel(name: str, channels: int) -> Tap:
    """The squared gradient of what a product reads, by channel, summed over positions."""
    return Tap(name, (channels,), _by_channel, operand=0)


def _by_channel(node: Node, gradient: jax.Array, saved: Any) -> jax.Array:
    del saved
    kept = tuple(node.in_features)
    rest = [i for i in range(gradient.ndim) if i not in kept]
    squares = jnp.square(jnp.transpose(gradient, (*kept, *rest)).astype(jnp.float32))
    return jnp.sum(squares, axis=tuple(range(len(kept), gradient.ndim))).reshape(-1)


def projected_gradients(
    apply: Apply, taps: Mapping[str, Tap], parameters: Collection[str]
) -> Callable:
    """`f(params, units, key, *batch) -> (by tap, by weight)`.

    By tap: what each measures. By weight: the derivative with respect to each entry of the
    named parameters. Derivatives are of the outputs on random signs, drawn by `key`, each
    output array divided by the root of its entry in `units`. With a mask in the batch
    outputs that do not count are zero.
    """
    at: dict[str, list[tuple[str, Tap]]] = {}
    for key, tap in taps.items():
        at.setdefault(tap.node, []).append((key, tap))

    def gradients(
        params: Any, units: Sequence[jax.Array], key: jax.Array, *batch: Any
    ) -> tuple:
        leaves = named_leaves(params)
        free = {name: jnp.asarray(dense(leaves[name])) for name in parameters}
        totals = {key: jnp.zeros(tap.shape, jnp.float32) for key, tap in taps.items()}

        def projected(free: Arrays, totals: Arrays) -> jax.Array:
            def tapped(name: str, tap: Tap, node: Node, run: Run, x: Any) -> Any:
                saved = tap.saved(node, run, jax.lax.stop_gradient(x))
                read = _tap(partial(tap.measure, node), x, saved, totals[name])
                return tap.moved(read, saved)

            def tapping(node: Node, run: Run, operands: tuple[Any, ...]) -> Any:
                here, given = at.get(node.name, ()), list(operands)
                for name, tap in here:
                    if (i := tap.operand) is not None:
                        given[i] = tapped(name, tap, node, run, given[i])
                result = run(*given)
                for name, tap in here:
                    if tap.operand is None:
                        result = tapped(name, tap, node, run, result)
                return counted_only(node, run, result), None

            new = {n: with_weight(leaves[n], array) for n, array in free.items()}
            tree = replace_leaves(params, new, caller="projected_gradients")
            return _projection(evaluate(apply, tapping)(tree, *batch)[0], units, key)

        by_weight, by_tap = jax.grad(projected, argnums=(0, 1))(free, totals)
        return by_tap, by_weight

    return gradients


def energies(outputs: Any) -> list[jax.Array]:
    """The sum of squares of every real array among the outputs."""
    return [jnp.sum(jnp.square(y)) for y in _real(outputs)]


def _real(outputs: Any) -> list[jax.Array]:
    """The real arrays among the outputs, at least in float32."""
    return [
        y.astype(wide(y.dtype))
        for y in jax.tree.leaves(outputs)
        if jnp.issubdtype(y.dtype, jnp.floating)
    ]


def squared(x: jax.Array) -> jax.Array:
    """x², at least in float32."""
    return jnp.square(x.astype(wide(x.dtype)))


def _projection(outputs: Any, units: Sequence[jax.Array], key: jax.Array) -> jax.Array:
    """The sum of every output times a random sign, each array in its unit."""
    total = jnp.zeros((), jnp.float32)
    for number, (y, unit) in enumerate(zip(_real(outputs), units, strict=True)):
        own = jax.random.fold_in(key, number)
        signs = jax.random.rademacher(own, y.shape, y.dtype)
        scale = jax.lax.rsqrt(jnp.where(unit > 0, unit, 1.0)).astype(y.dtype)
        total += (jnp.sum(y * signs) * scale).astype(jnp.float32)
    return total


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tap(measure: Callable, x: jax.Array, saved: Any, total: jax.Array) -> jax.Array:
    """x; the gradient of `total` is what is measured of that of x."""
    del measure, saved, total
    return x


def _tap_forward(
    measure: Callable, x: jax.Array, saved: Any, total: jax.Array
) -> tuple[jax.Array, Any]:
    del measure, total
    return x, saved


def _tap_backward(measure: Callable, saved: Any, g: jax.Array) -> tuple[Any, Any, Any]:
    return g, jax.tree.map(jnp.zeros_like, saved), measure(g, saved)


_tap.defvjp(_tap_forward, _tap_backward)
