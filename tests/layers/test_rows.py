"""A product is (groups, rows, ins) times (groups, ins, outs), whatever computes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxmet import evaluate
from jaxmet.layers.eligibility import why_no_matrix
from jaxmet.layers.inputs import rows_of
from jaxmet.layers.layer import matrix_of
from jaxmet.numerics.drawn_order import seed_of
from zoo import CASES


def seen(apply, params, *inputs, most=None):
    """By product: rows, matrix and what the equations themselves make of them."""
    nodes, seed = {}, seed_of(jax.random.key(0))

    def hook(node, run, operands):
        if node.kind == "product" and not node.region:
            x, w = operands[0], operands[node.weight.operand]
            rest = [
                jnp.zeros_like(v) if i not in (0, node.weight.operand) else v
                for i, v in enumerate(operands)
            ]
            rows = rows_of(node, x, w.shape, most=most, seed=seed)
            nodes[node.name] = node
            return run(*operands), (rows, matrix_of(node, w), run(*rest))
        return run(*operands), None

    _, found = jax.jit(evaluate(apply, hook))(params, *inputs)
    return {name: (node, *found[name]) for name, node in nodes.items()}


def sums(node, rows, matrix, y):
    """Sums over rows, and of squares, in the order of the outputs: (groups, outs)."""
    z = np.einsum("gri,gio->gro", *(np.asarray(v, np.float64) for v in (rows, matrix)))
    y = np.asarray(y, np.float64)
    outs = [y.shape[i] for i in node.features]
    y = np.moveaxis(y, node.features, range(len(outs))).reshape(int(np.prod(outs)), -1)
    if node.dot is not None and node.dot.batched:
        return None
    z = np.moveaxis(z, 1, 2).reshape(y.shape[0], -1)
    return np.sort(z, axis=1), np.sort(y, axis=1)


@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.slow
def test_every_product_of_the_zoo_is_one_of_matrices(name):
    apply, params, inputs = next(iter(CASES[name].make.values()))(jax.random.key(1))
    for node, rows, matrix, y in seen(apply, params, *inputs).values():
        assert why_no_matrix(node) is None
        pair = sums(node, rows, matrix, y)
        if pair is None:
            assert rows.shape[0] == matrix.shape[0] > 1
            continue
        scale = np.abs(pair[1]).max() + 1e-6
        np.testing.assert_allclose(*pair, atol=3e-5 * scale)


@pytest.mark.one_in(7)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "padding", [((1, 1), (0, 1)), ((0, 0), (0, 0)), ((2, -1), (0, 3))]
)
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("spread", [1, 2])
def test_windows_of_every_kind(groups, stride, padding, dilation, spread):
    rng = np.random.default_rng(0)
    x = jax.device_put(np.float32(rng.normal(size=(2, 7, 6, 4))))
    w = jax.device_put(np.float32(rng.normal(size=(3, 2, 4 // groups, 8))))

    def apply(p, x):
        return lax.conv_general_dilated(
            x, p["w"], (stride, 1), padding, (spread, spread), (dilation, 1),
            ("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
        )  # fmt: skip

    y = apply({"w": w}, x)
    ((node, rows, matrix, _),) = seen(apply, {"w": w}, x).values()
    z = np.einsum("gri,gio->rgo", rows, matrix).reshape(y.shape)
    np.testing.assert_allclose(z, y, atol=1e-5)


def test_rows_that_are_drawn_are_some_of_all():
    """Different positions, the same for all examples, each whole."""
    rng = np.random.default_rng(0)
    x = jax.device_put(np.float32(rng.normal(size=(2, 6, 6, 3))))
    w = jax.device_put(np.float32(rng.normal(size=(3, 3, 3, 4))))

    def conv(p, x):
        return lax.conv_general_dilated(
            x, p["w"], (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    ((_, every, _, _),) = seen(conv, {"w": w}, x).values()
    ((_, some, _, _),) = seen(conv, {"w": w}, x, most=11).values()
    assert some.shape == (1, 10, 27) and every.shape == (1, 36, 27)
    place = [
        np.flatnonzero((np.asarray(every[0]) == r).all(1)) for r in np.asarray(some[0])
    ]
    assert all(p.size == 1 for p in place)
    place = np.concatenate(place)
    assert len(set(place)) == 10 and np.array_equal(place[5:], place[:5] + 18)
    dense = seen(lambda p, x: x @ p["w"], {"w": w[0, 0]}, x[:, 0])
    ((_, every, _, _),) = dense.values()
    ((_, some, _, _),) = seen(
        lambda p, x: x @ p["w"], {"w": w[0, 0]}, x[:, 0], most=4
    ).values()
    assert {tuple(r) for r in np.asarray(some[0])} < {
        tuple(r) for r in np.asarray(every[0])
    }
    assert len({tuple(r) for r in np.asarray(some[0])}) == 4
    # examples along another axis than the first: as many rows
    ((_, turned, _, _),) = seen(
        lambda p, x: p["w"].T @ x, {"w": w[0, 0]}, x[:, 0].reshape(-1, 3).T, most=4
    ).values()
    np.testing.assert_array_equal(turned, some)


def test_padding_holds_the_offset():
    rng = np.random.default_rng(0)
    x = jax.device_put(np.float32(rng.normal(size=(1, 5, 5, 3))))
    w = jax.device_put(np.float32(rng.normal(size=(3, 3, 3, 4))))
    offset = jnp.asarray([1.0, -2.0, 3.0])

    def conv(p, x):
        return lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    ((node, _, matrix, _),) = seen(conv, {"w": w}, x).values()
    rows = rows_of(node, x, w.shape, offset=offset)
    wide = jnp.broadcast_to(offset, (1, 7, 7, 3)).at[:, 1:-1, 1:-1].set(x)
    y = lax.conv_general_dilated(
        wide, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    z = jnp.einsum("gri,gio->rgo", rows, matrix).reshape(y.shape)
    np.testing.assert_allclose(z, y, atol=1e-5)
