"""Matrices of many layers in two arrays, against loops over the matrices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmet.numerics import packed
from jaxmet.numerics.scaling import balance, layers_of, log_ranges

Shape = tuple[int, int, int]
sizes = st.sampled_from([1, 2, 3, 16, 17, 64, 65, 130])
shapes = st.lists(st.tuples(st.sampled_from([1, 2, 5]), sizes, sizes), min_size=1)


class Drawn:
    """Matrices, a number for each input and output, and all of it packed."""

    def __init__(self, shapes: list[Shape]):
        rng = np.random.default_rng(len(shapes))
        self.matrices = [rng.normal(size=s).astype(np.float32) for s in shapes]
        self.by_in = [rng.normal(size=(g, i)) for g, i, _ in shapes]
        self.by_out = [rng.normal(size=(g, o)) for g, _, o in shapes]
        self.ins = packed.rounded_size(1 + sum(v.size for v in self.by_in))
        self.outs = packed.rounded_size(1 + sum(v.size for v in self.by_out))
        self.at = packed.places_of(shapes, self.ins, self.outs)

    def row(self, values: list[np.ndarray], size: int) -> np.ndarray:
        flat = np.concatenate([v.reshape(-1) for v in values]).astype(np.float32)
        return np.pad(flat, (0, size - flat.size))


def flat(values: Any) -> np.ndarray:
    return np.concatenate([np.asarray(v).reshape(-1) for v in values])


@settings(max_examples=3)
@given(shapes)
def test_reductions_are_those_of_the_matrices(shapes: list[Shape]) -> None:
    d = Drawn(shapes)
    x = packed.pack(d.matrices, -np.inf)
    ins, outs = d.row(d.by_in, d.ins), d.row(d.by_out, d.outs)
    made = packed.largest_by_output(x, d.at, jnp.asarray(ins), d.outs)
    read = packed.largest_by_input(x, d.at, jnp.asarray(outs), d.ins)
    pairs = list(zip(d.matrices, d.by_in, d.by_out, strict=True))
    wanted = flat((m + i[..., None]).max(1) for m, i, _ in pairs)
    np.testing.assert_allclose(made[: wanted.size], wanted, rtol=1e-5, atol=1e-5)
    assert not np.isfinite(made[wanted.size :]).any()
    wanted = flat((m + o[:, None]).max(2) for m, _, o in pairs)
    np.testing.assert_allclose(read[: wanted.size], wanted, rtol=1e-5, atol=1e-5)

    zero = packed.pack(d.matrices, 0.0)
    found = packed.total_by_output(zero, d.at, jnp.asarray(ins), d.outs)
    wanted = flat(np.einsum("gio,gi->go", m, i) for m, i, _ in pairs)
    np.testing.assert_allclose(found[: wanted.size], wanted, rtol=1e-4, atol=1e-4)
    assert not np.any(found[wanted.size :])

    layer = np.repeat(np.arange(len(shapes)), [v.size for v in d.by_out])
    number = len(shapes) + 1
    layer = np.pad(layer, (0, d.outs - layer.size), constant_values=len(shapes))
    top = packed.largest_by_layer(x, d.at, jnp.asarray(layer), number)
    np.testing.assert_allclose(top[:-1], [m.max() for m in d.matrices], rtol=1e-6)
    assert top[-1] == 0
    both = packed.moved(x, d.at, jnp.asarray(ins), jnp.asarray(outs))
    top = packed.largest_by_layer(both, d.at, jnp.asarray(layer), number)
    wanted = [(m + i[..., None] + o[:, None]).max() for m, i, o in pairs]
    np.testing.assert_allclose(top[:-1], wanted, rtol=1e-5)


def test_few_sizes() -> None:
    found = [packed.rounded_size(n) for n in range(5000)]
    assert all(size >= n for n, size in enumerate(found))
    assert all(2 * size <= 3 * n for n, size in enumerate(found) if n >= 8)
    assert len(set(found)) < 22


@pytest.mark.parametrize("groups", [1, 3])
def test_a_program_does_not_grow_with_the_layers(groups: int) -> None:
    def equations(depth: int) -> int:
        """Of the balance of a chain of layers of one width."""
        width = 4
        rng = np.random.default_rng(0)
        weights = rng.normal(size=(depth, groups, width, width, 9)).astype(np.float32)
        each = np.arange(groups * width).reshape(1, groups, width)
        size = groups * width
        ins = [each + size * k for k in range(depth)]
        outs = [each + size * (k + 1) for k in range(depth)]
        fixed = size * (depth + 1)
        layers = layers_of([log_ranges(w) for w in weights], ins, outs, fixed)
        x = np.zeros(fixed + 1, np.float32)
        run = jax.make_jaxpr(lambda v: balance(layers, v, lowest=v - 9, highest=v + 9))
        return count(run(jnp.asarray(x)).jaxpr)

    assert equations(6) == equations(24) == equations(96)


def count(jaxpr: Any) -> int:
    inner = [
        sub
        for eqn in jaxpr.eqns
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr)
        if is_jaxpr(value)
        for sub in [getattr(value, "jaxpr", value)]
    ]
    return len(jaxpr.eqns) + sum(map(count, inner))


def is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")
