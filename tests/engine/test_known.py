"""Equations of known values: computed once, and no constant larger than what was given."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from jaxmet.engine.program.known import with_known_computed

W = np.arange(12, dtype=np.float32).reshape(3, 4)


def traced_again(function, *inputs, kept=lambda equation: False):
    closed = jax.make_jaxpr(lambda *x: list(function(*x)))(*inputs)
    run = with_known_computed(closed, kept)
    again = jax.make_jaxpr(run)(*inputs)
    for one, two in zip(run(*inputs), function(*inputs), strict=True):
        np.testing.assert_array_equal(one, two)
    return again


def names(closed):
    return [e.primitive.name for e in closed.jaxpr.eqns]


def test_what_depends_on_no_input_is_a_number():
    x = jnp.ones((2, 3))

    def model(x):
        scale = jnp.max(jnp.abs(W), axis=0, keepdims=True)
        return [x @ (jnp.asarray(W) / scale), jnp.sum(jnp.asarray(W))]

    again = traced_again(model, x)
    assert names(again) == ["dot_general"]
    assert any(np.array_equal(c, W / W.max(0, keepdims=True)) for c in again.consts)


def test_what_is_spread_out_stays_an_equation():
    x = jnp.ones((64, 64))
    bias = np.arange(64, dtype=np.float32)

    def model(x):
        spread = jnp.broadcast_to(bias, (64, 64))
        return [x + spread, jnp.max(spread) * x]

    again = traced_again(model, x)
    assert max(np.size(c) for c in again.consts) <= 64
    assert names(again).count("broadcast_in_dim") == 1
    assert "reduce_max" not in names(again)


def test_kept_equations_are_computed_for_numbers_and_traced_for_the_rest():
    x = jnp.ones((2, 3))

    def model(x):
        rounded = jax.lax.round(jnp.asarray(W) / 5)
        return [x @ rounded, x @ (2 * rounded)]

    again = traced_again(model, x, kept=lambda e: e.primitive.name == "round")
    assert names(again).count("round") == 1 and "mul" not in names(again)


def test_name_scopes_stay():
    x = jnp.ones((2, 3))

    def model(x):
        with jax.named_scope("mine:of/a/b"):
            return [x @ jnp.asarray(W)]

    (equation,) = traced_again(model, x).jaxpr.eqns
    assert str(equation.source_info.name_stack) == "mine:of/a/b"


def test_sizes_without_a_number_are_traced():
    (batch,) = jax.export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, 3), jnp.float32)
    closed = jax.make_jaxpr(lambda x: [x + jnp.zeros(x.shape) + 1.0])(shape)
    again = jax.make_jaxpr(with_known_computed(closed, lambda e: False))(shape)
    assert "broadcast_in_dim" in names(again)
    assert again.out_avals[0].shape[0] == batch
