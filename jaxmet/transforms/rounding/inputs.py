"""What the data tell of the inputs of some layers, in the float and in the quantized model."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmet.engine.node import Node
from jaxmet.engine.replay import Hook, Run
from jaxmet.engine.rows import rows_of
from jaxmet.numerics.precision import wide
from jaxmet.numerics.rounding.quadratic import Products
from jaxmet.transforms.lockstep import Copy
from jaxmet.transforms.rounding.layers import Layer


class Inputs(NamedTuple):
    """Means over all rows seen: products of inputs, and the inputs themselves."""

    number: jax.Array
    products: Products
    mean: jax.Array
    float_mean: jax.Array


def merged(one: Inputs, two: Inputs) -> Inputs:
    """What both have seen."""
    total = one.number + two.number
    share = two.number / jnp.maximum(total, 1.0)
    mean = jax.tree.map(lambda a, b: a + (b - a) * share, one[1:], two[1:])
    return Inputs(total, *mean)


Rows = tuple[jax.Array, jax.Array]  # of the quantized and of the float model


class Look:
    """One piece of both copies, run for what its layers read; one compilation a shape."""

    def __init__(
        self,
        exact: Copy,
        noisy: Copy,
        layers: Sequence[Layer],
        offsets: Mapping[str, Any],
        most: int | None,
        *,
        keep: bool,
    ) -> None:
        self.exact, self.noisy, self.most, self.keep = exact, noisy, most, keep
        self.layers = {layer.node.name: layer for layer in layers}
        self.offsets = offsets
        self.steps: dict[Any, Any] = {}
        self.key: Any = None

    def __call__(
        self, batch: int, piece: int, key: jax.Array
    ) -> tuple[dict[str, Inputs], dict[str, Rows]]:
        """Sums over the rows of one batch, and with `keep` the rows themselves."""
        shape = self.exact.lives[batch][0]
        if shape not in self.steps:
            both = [
                copy.observer(batch, piece, lambda hook: self.watch(hook))
                for copy in (self.exact, self.noisy)
            ]
            self.steps[shape] = jax.jit(lambda *a: self.look(*both, *a))
        lives = self.exact.lives[batch][1], self.noisy.lives[batch][1]
        return self.steps[shape](self.exact.params, self.noisy.params, *lives, key)

    def look(
        self,
        exact: Any,
        noisy: Any,
        params: Any,
        rounded: Any,
        live: Any,
        noisy_live: Any,
        key: jax.Array,
    ) -> tuple[dict[str, Inputs], dict[str, Rows]]:
        self.key = key
        float_rows = exact(params, live, None)
        quantized_rows = noisy(rounded, noisy_live, None)
        self.key = None
        rows = {n: (quantized_rows[n], float_rows[n]) for n in self.layers}
        return {n: _inputs(*r) for n, r in rows.items()}, rows if self.keep else {}

    def watch(self, hook: Hook) -> Hook:
        """The copy's own hook, and behind it the rows that the layers read."""

        def watching(node: Node, run: Run, operands: tuple[Any, ...]) -> Any:
            result, _ = hook(node, run, operands)
            if node.name not in self.layers:
                return result, None
            assert node.weight is not None
            x, kernel = operands[0], operands[node.weight.operand]
            rows = rows_of(
                node,
                x,
                kernel.shape,
                offset=self.offsets.get(node.name),
                most=self.most,
                key=self.key,
            )
            return result, rows.astype(wide(rows.dtype))

        return watching


def _inputs(rows: jax.Array, float_rows: jax.Array) -> Inputs:
    rows, float_rows = (v.reshape(-1, *v.shape[-2:]) for v in (rows, float_rows))
    number = jnp.asarray(rows.shape[1], rows.dtype)

    def product(one: jax.Array, two: jax.Array) -> jax.Array:
        total = jnp.einsum("gri,grj->gij", one, two, precision="highest")
        return total / jnp.maximum(number, 1.0)

    means = (jnp.mean(v, axis=1) for v in (rows, float_rows))
    products = Products(
        product(rows, rows), product(rows, float_rows), product(float_rows, float_rows)
    )
    return Inputs(number, products, *means)
