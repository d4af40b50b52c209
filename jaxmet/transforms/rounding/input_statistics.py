"""What the data tell of the inputs of some layers, in the float and in the quantized model."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.engine.graph.node import Node
from jaxmet.engine.run.replay import Hook, Run
from jaxmet.engine.run.shared_programs import Program, ProgramSequence, placed
from jaxmet.layers.inputs import counted_rows
from jaxmet.layers.lockstep import Copy, Where
from jaxmet.numerics.drawn_order import seed_of
from jaxmet.numerics.precision import wide
from jaxmet.numerics.rounding.quadratic import Products
from jaxmet.transforms.rounding.rounded_layers import Layer
from jaxmet.tree.leaves import flatten, is_compressed
from jaxmet.tree.names import named_leaves


class Inputs(NamedTuple):
    """Means over all rows so far: products of inputs, and the inputs themselves."""

    number: jax.Array
    products: Products
    mean: jax.Array
    float_mean: jax.Array


def merged(one: Inputs, two: Inputs) -> Inputs:
    """The means over the rows of both, in NumPy."""
    one, two = (jax.tree.map(np.asarray, v) for v in (one, two))
    total = one.number + two.number
    share = two.number / np.maximum(total, total.dtype.type(1))
    mean = jax.tree.map(lambda a, b: a + (b - a) * share, one[1:], two[1:])
    return Inputs(total, *mean)


class InputRows(NamedTuple):
    """Rows of the quantized and of the float model, and which of them count."""

    quantized: jax.Array
    exact: jax.Array
    counts: jax.Array | None


class Look:
    """Runs both copies from wave to wave for what its layers read: one program for each.

    `most` says how many rows of a layer are read, `shares` how many of them in a batch of each
    shape: as large a part as it holds of all examples. A program first takes the values that
    are live to where the wave begins, with the weights that were chosen before.
    """

    def __init__(
        self,
        exact: Copy,
        noisy: Copy,
        waves: Sequence[Sequence[Layer]],
        most: Mapping[str, int],
        shares: Mapping[Any, float],
        *,
        keep: bool,
    ) -> None:
        self.copies = exact, noisy
        self.waves, self.most, self.shares, self.keep = waves, most, shares, keep
        # Their names are looked up only where one may have an offset: that takes a while.
        self.compressed = any(map(is_compressed, flatten(exact.params)[1]))
        self.sequences: dict[Any, ProgramSequence] = {}

    def __call__(
        self, batch: int, number: int, key: jax.Array, where: Mapping[str, Where]
    ) -> tuple[dict[str, Inputs], dict[str, InputRows]]:
        """Means over the rows of one batch, and with `keep` the rows themselves."""
        shape, _ = self.copies[0].lives[batch]
        given = self.given(batch, key)
        masks = self.masks(number, where)
        if shape not in self.sequences:
            make = functools.partial(self.program, shape, given, where)
            self.sequences[shape] = ProgramSequence(
                make, len(self.waves), ahead=not placed(given, where)
            )
        lives, found, rows = self.sequences[shape][number](*given, masks)
        for copy, live in zip(self.copies, lives, strict=True):
            copy.put(batch, live)
        return found, rows

    def given(self, batch: int, key: jax.Array) -> tuple[Any, ...]:
        """The arguments of the next program, but for the masks."""
        trees = tuple(copy.params for copy in self.copies)
        lives = tuple(copy.lives[batch][1] for copy in self.copies)
        return trees, self.copies[1].quantizers, lives, key

    def masks(self, number: int, where: Mapping[str, Where]) -> dict[str, Any]:
        """Where the inputs of the layers of a wave count."""
        names = (layer.node.name for layer in self.waves[number])
        return {n: where[n].operand for n in names if n in where}

    def program(
        self,
        shape: Any,
        given: tuple[Any, ...],
        where: Mapping[str, Where],
        number: int,
        before: Program | None,
    ) -> Program:
        """The program of a wave, for arguments like these."""
        if before is not None:
            given = *given[:2], before.shapes[0], given[3]
        masks = self.masks(number, where)
        look = functools.partial(self.look, shape, number)
        return Program(look, *given, masks)

    def close(self) -> None:
        """Compile nothing more."""
        for sequence in self.sequences.values():
            sequence.close()

    def look(
        self,
        shape: Any,
        number: int,
        trees: tuple[Any, Any],
        quantizers: Any,
        lives: tuple[Any, Any],
        key: jax.Array,
        masks: Mapping[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Inputs], dict[str, InputRows]]:
        own = None, quantizers
        if number:
            steps = [copy.step(shape, number - 1) for copy in self.copies]
            every = zip(steps, trees, own, lives, strict=True)
            lives = tuple(step(tree, q, live, None) for step, tree, q, live in every)
        share = self.shares[shape]
        watch = functools.partial(self.watch, number, share, trees[0], key, masks)
        exact, quantized = (
            copy.observer(shape, number, watch)(tree, q, live, None)
            for copy, tree, q, live in zip(self.copies, trees, own, lives, strict=True)
        )
        rows = {
            n: InputRows(quantized[n][0], exact[n][0], _as_one(exact[n][1]))
            for n in (layer.node.name for layer in self.waves[number])
        }
        found = {n: _inputs(*r) for n, r in rows.items()}
        return lives, found, rows if self.keep else {}

    def watch(
        self,
        number: int,
        share: float,
        params: Any,
        key: jax.Array,
        masks: Mapping[str, Any],
        hook: Hook,
    ) -> Hook:
        """The copy's own hook, and after it the rows that the layers read."""
        numbers = {layer.node.name: i for i, layer in enumerate(self.waves[number])}
        leaves = named_leaves(params) if self.compressed else {}

        def watching(node: Node, run: Run, operands: tuple[Any, ...]) -> Any:
            result, _ = hook(node, run, operands)
            if node.name not in numbers:
                return result, None
            assert node.weight is not None
            x, kernel = operands[0], operands[node.weight.operand]
            where = masks.get(node.name)
            if where is not None:
                where = where[run.iteration]
            # Both copies draw the same rows, each layer others.
            seed = seed_of(key, numbers[node.name], *run.iteration)
            leaf: Any = leaves.get(node.kernel)
            rows, counts = counted_rows(
                node,
                x,
                kernel.shape,
                where=where,
                offset=leaf.input_offset if is_compressed(leaf) else None,
                most=math.ceil(self.most[node.name] * share),
                seed=seed,
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
