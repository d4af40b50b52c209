"""What the data tell of the inputs of some layers, in the float and in the quantized model."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmet.engine.graph.node import Node
from jaxmet.engine.run.replay import Hook, Run
from jaxmet.layers.inputs import counted_rows
from jaxmet.layers.lockstep import Copy, Where
from jaxmet.numerics.precision import wide
from jaxmet.numerics.rounding.quadratic import Products
from jaxmet.transforms.rounding.rounded_layers import Layer


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


class InputRows(NamedTuple):
    """Rows of the quantized and of the float model, and which of them count."""

    quantized: jax.Array
    exact: jax.Array
    counts: jax.Array | None


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
        self.numbers = {name: i for i, name in enumerate(self.layers)}
        self.offsets = offsets
        self.steps: dict[Any, Any] = {}
        self.key: Any = None
        self.where: Mapping[str, Where] = {}

    def __call__(
        self, batch: int, piece: int, key: jax.Array, where: Mapping[str, Where]
    ) -> tuple[dict[str, Inputs], dict[str, InputRows]]:
        """Sums over the rows of one batch, and with `keep` the rows themselves."""
        shape = self.exact.lives[batch][0]
        if shape not in self.steps:
            both = [
                copy.observer(batch, piece, lambda hook: self.watch(hook))
                for copy in (self.exact, self.noisy)
            ]
            self.steps[shape] = jax.jit(lambda *a: self.look(*both, *a))
        lives = self.exact.lives[batch][1], self.noisy.lives[batch][1]
        where = {n: w for n, w in where.items() if n in self.layers}
        trees = self.exact.params, self.noisy.params
        return self.steps[shape](*trees, *lives, key, where)

    def look(
        self,
        exact: Any,
        noisy: Any,
        params: Any,
        rounded: Any,
        live: Any,
        noisy_live: Any,
        key: jax.Array,
        where: Mapping[str, Where],
    ) -> tuple[dict[str, Inputs], dict[str, InputRows]]:
        self.key, self.where = key, where
        exact_rows = exact(params, live, None)
        quantized_rows = noisy(rounded, noisy_live, None)
        self.key, self.where = None, {}
        rows = {
            n: InputRows(
                quantized_rows[n][0], exact_rows[n][0], _as_one(exact_rows[n][1])
            )
            for n in self.layers
        }
        return {n: _inputs(*r) for n, r in rows.items()}, rows if self.keep else {}

    def watch(self, hook: Hook) -> Hook:
        """The copy's own hook, and after it the rows that the layers read."""

        def watching(node: Node, run: Run, operands: tuple[Any, ...]) -> Any:
            result, _ = hook(node, run, operands)
            if node.name not in self.layers:
                return result, None
            assert node.weight is not None
            x, kernel = operands[0], operands[node.weight.operand]
            where = self.where[node.name].operand if self.where else None
            if where is not None:
                where = where[run.iteration]
            # Both copies draw the same rows, each layer others.
            key = self.key
            for part in (self.numbers[node.name], *run.iteration):
                key = jax.random.fold_in(key, part)
            rows, counts = counted_rows(
                node,
                x,
                kernel.shape,
                where=where,
                offset=self.offsets.get(node.name),
                most=self.most,
                key=key,
            )
            return result, (rows.astype(wide(rows.dtype)), counts)

        return watching


def _as_one(counts: jax.Array | None) -> jax.Array | None:
    """Which rows count in any round of a loop; a mask is the same in all of them."""
    if counts is None:
        return None
    return jnp.any(counts.reshape(-1, counts.shape[-1]), axis=0)


def _inputs(rows: jax.Array, float_rows: jax.Array, counts: jax.Array | None) -> Inputs:
    rows, float_rows = (v.reshape(-1, *v.shape[-2:]) for v in (rows, float_rows))
    number = jnp.asarray(rows.shape[1], rows.dtype)
    if counts is not None:
        number = jnp.sum(counts).astype(rows.dtype)

    def product(one: jax.Array, two: jax.Array) -> jax.Array:
        total = jnp.einsum("gri,grj->gij", one, two, precision="highest")
        return total / jnp.maximum(number, 1.0)

    means = [jnp.mean(v, axis=1) for v in (rows, float_rows)]
    if counts is not None:  # rows that do not count are zero
        share = rows.shape[1] / jnp.maximum(number, 1.0)
        means = [mean * share for mean in means]
    products = Products(
        product(rows, rows), product(rows, float_rows), product(float_rows, float_rows)
    )
    return Inputs(number, products, *means)
