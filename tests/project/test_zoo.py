"""The zoo itself: its models run under the strict flags, and its twins are twins."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo import CASES, model, twin

RUNS = [(name, front) for name, case in CASES.items() for front in case.frontends]
TWINS = [name for name, case in CASES.items() if {"linen", "nnx"} <= {*case.make}]
TRAINED = [(n, f) for n, f in RUNS if CASES[n].train_kwargs(f)]


@pytest.fixture(autouse=True)
def strict_flags():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


def arrays(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@functools.cache
def outputs(name, front):
    apply, params, inputs = model(name, front)
    return arrays(jax.jit(apply)(params, *inputs))


@pytest.mark.parametrize(("name", "front"), RUNS)
def test_runs_under_jit(name, front):
    _, params, inputs = model(name, front)
    batch = inputs[0].shape[0]
    for leaf in outputs(name, front):
        assert np.all(np.isfinite(leaf))
        assert leaf.shape[0] == batch
        if np.issubdtype(leaf.dtype, np.floating):
            # an input that does not reach the outputs, or a dead ReLU, shows here
            assert np.max(np.std(leaf, axis=0)) > 1e-3
    for leaf in jax.tree.leaves(params):
        assert isinstance(leaf, jax.Array)
        assert not jnp.issubdtype(leaf.dtype, jnp.floating) or np.asarray(leaf).all()


@pytest.mark.parametrize("name", TWINS)
def test_twins_agree(name):
    left, right = outputs(name, "linen"), outputs(name, "nnx")
    for a, b in zip(left, right, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TWINS)
def test_twin_copies_every_number(name):
    case = CASES[name]
    _, params, _ = case.make["linen"](jax.random.key(3))
    _, state, _ = case.make["nnx"](jax.random.key(3))
    copied = twin(case, params)
    assert jax.tree.structure(copied) == jax.tree.structure(state)
    assert len(jax.tree.leaves(state)) == len(jax.tree.leaves(params))
    for a, b in zip(arrays(copied), arrays(state), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("name", "front"), TRAINED)
def test_training_differs_from_inference(name, front):
    case = CASES[name]
    apply, params, inputs = model(name, front)
    kwargs = case.train_kwargs(front)
    y = jax.jit(lambda params, *inputs: apply(params, *inputs, **kwargs))(
        params, *inputs
    )
    trained = arrays(y)[0]
    assert np.all(np.isfinite(trained))
    assert np.max(np.abs(trained - outputs(name, front)[0])) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_lists_are_consistent(name):
    case = CASES[name]
    assert case.name == name
    assert len(set(case.nodes)) == len(case.nodes)
    assert [node for node in case.nodes if node in case.layers] == [*case.layers]
    assert case.nodes[0].startswith("input")
    assert case.nodes[-1].startswith("output")


def test_keys_change_the_numbers():
    make = CASES["conv_bn_relu"].make["linen"]
    same, again, other = (make(jax.random.key(k))[1] for k in (0, 0, 1))
    for a, b, c in zip(arrays(same), arrays(again), arrays(other), strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.all(a != c)
