"""Compiled programs are kept as long as their model, and found by what they depend on."""

import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxmet.engine.graph.graph import WithArguments
from jaxmet.engine.run.programs import KEPT, frozen, program


class Model:
    def apply(self, params, x, scale=1.0):
        return params * x * scale


def squared(apply):
    return lambda params, x: apply(params, x) ** 2


def test_the_same_model_and_key_give_the_same_program() -> None:
    model = Model()
    one = program(model.apply, "squared", squared)
    assert program(model.apply, "squared", squared) is one
    assert program(model.apply, "other", squared) is not one
    assert program(Model().apply, "squared", squared) is not one
    np.testing.assert_allclose(one(jnp.float32(3), jnp.float32(2)), 36)


def test_equal_modules_are_other_models() -> None:
    one, two = nn.Dense(3), nn.Dense(3)
    assert one == two
    assert program(one.apply, "k", squared) is not program(two.apply, "k", squared)


@pytest.mark.parametrize("key", [None, ("k", np.zeros(2)), ["k", np.zeros(2)]])
def test_a_key_without_a_hash_keeps_nothing(key) -> None:
    model = Model()
    one = program(model.apply, key, squared)
    assert program(model.apply, key, squared) is not one
    np.testing.assert_allclose(one(jnp.float32(3), jnp.float32(2)), 36)


def test_filled_in_arguments_belong_to_the_model() -> None:
    model = Model()
    twice, thrice = (WithArguments(model.apply, {"scale": s}) for s in (2.0, 3.0))
    found = [program(a, "k", squared) for a in (twice, thrice)]
    again = program(WithArguments(model.apply, {"scale": 2.0}), "k", squared)
    assert again is found[0] is not found[1]
    x = jnp.float32(1)
    assert [float(f(x, x)) for f in found] == [4.0, 9.0]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", ["method", "function", "partial", "object"])
def test_programs_go_with_their_model(kind: str) -> None:
    model = Model()
    kinds = {
        "method": model.apply,
        "function": lambda p, x: p * x,
        "partial": functools.partial(model.apply, scale=1.0),
        "object": WithArguments(lambda p, x: p * x, {}),
    }
    apply = kinds[kind]
    gone = weakref.ref(program(apply, "k", squared))
    assert float(gone()(jnp.float32(3), jnp.float32(2))) == 36.0
    assert gone() is not None
    del model, apply, kinds
    gc.collect()
    assert gone() is None


def test_so_many_programs_are_kept() -> None:
    model = Model()
    first = program(model.apply, 0, squared)
    for key in range(1, KEPT):
        program(model.apply, key, squared)
    assert program(model.apply, 0, squared) is first  # used last now
    program(model.apply, KEPT, squared)
    assert program(model.apply, 0, squared) is first
    second = program(model.apply, 1, squared)
    assert program(model.apply, 1, squared) is second


def test_keys_tell_flags_from_numbers() -> None:
    assert frozen({"a": True}) != frozen({"a": 1})
    assert frozen({"a": [1, 2], "b": {3}}) == frozen({"b": {3}, "a": [1, 2]})
    assert frozen([1]) != frozen((1,))


def test_random_keys_are_told_apart_by_their_numbers() -> None:
    keys = jax.random.key(3), jax.random.key(3), jax.random.key(4)
    one, same, other = (frozen(("k", key)) for key in keys)
    assert one == same != other
    assert frozen(jax.random.key(3, impl="rbg")) != frozen(
        jax.random.key(3, impl="unsafe_rbg")
    )
    model = Model()
    found = [program(model.apply, ("k", key), squared) for key in keys]
    assert found[0] is found[1] is not found[2]
