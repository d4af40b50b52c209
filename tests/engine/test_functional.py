"""An nnx module as a pure function: what it computes, keeps, hands back and refuses."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxmet as jm


class Net(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Linear(4, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, momentum=0.9, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x, train=False):
        x = jax.nn.relu(self.norm(self.stem(x), use_running_average=not train))
        return self.head(x)

    def features(self, x):
        return self.stem(x)


@pytest.fixture
def net():
    module = Net(nnx.Rngs(0))
    module.norm.mean[...] = jnp.linspace(-0.5, 0.5, 6)
    module.norm.var[...] = jnp.linspace(0.5, 2.0, 6)
    return module


X = jax.device_put(np.float32(np.random.default_rng(0).normal(1.0, 2.0, (5, 4))))


def test_it_computes_what_the_module_computes(net):
    apply, params, _ = jm.functional(net)
    np.testing.assert_array_equal(apply(params, X), net(X))
    np.testing.assert_allclose(jax.jit(apply)(params, X), net(X), rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(apply(params, X, method="features"), net.features(X))


def test_params_are_the_whole_state(net):
    _, params, _ = jm.functional(net)
    names = {
        "/".join(str(k.key) for k in p[:-1])
        for p, _ in jax.tree.leaves_with_path(params)
    }
    linears = {
        f"{layer}/{leaf}" for layer in ("stem", "head") for leaf in ("kernel", "bias")
    }
    assert names == linears | {
        f"norm/{leaf}" for leaf in ("scale", "bias", "mean", "var")
    }


def test_other_parameters_give_another_output_and_gradients(net):
    apply, params, _ = jm.functional(net)
    doubled = jax.tree.map(lambda a: 2 * a, params)
    assert np.max(np.abs(apply(doubled, X) - apply(params, X))) > 0.1
    grads = jax.jit(jax.grad(lambda p: jnp.sum(apply(p, X) ** 2)))(params)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert np.any(grads["stem"]["kernel"][...] != 0)


def test_updated_statistics_are_handed_back_and_the_module_is_left_alone(net):
    apply, params, _ = jm.functional(net)
    before = [np.array(leaf) for leaf in jax.tree.leaves((nnx.state(net), params))]
    outputs, updated = apply(params, X, train=True, mutable=nnx.BatchStat)
    hidden = np.asarray(net.stem(X), np.float64)
    mean = 0.9 * np.linspace(-0.5, 0.5, 6) + 0.1 * hidden.mean(0)
    np.testing.assert_allclose(updated["norm"]["mean"][...], mean, rtol=1e-4)
    var = 0.9 * np.linspace(0.5, 2.0, 6) + 0.1 * hidden.var(0)
    np.testing.assert_allclose(updated["norm"]["var"][...], var, rtol=1e-4)
    assert len(jax.tree.leaves(updated)) == 2
    assert np.max(np.abs(outputs - apply(params, X))) > 1e-3
    after = jax.tree.leaves((nnx.state(net), params))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


def test_training_the_module_leaves_params_alone(net):
    _, params, merge = jm.functional(net)
    kernel = np.array(params["stem"]["kernel"][...])
    net.stem.kernel[...] = net.stem.kernel[...] * 2.0
    other = merge(params)
    other.stem.kernel[...] = other.stem.kernel[...] * 3.0
    np.testing.assert_array_equal(params["stem"]["kernel"][...], kernel)
    np.testing.assert_allclose(net.stem.kernel[...], 2.0 * kernel)


def test_merge_gives_a_module_of_other_parameters(net):
    apply, params, merge = jm.functional(net)
    graph = jm.trace(apply, params, X)
    folded = jm.fold_batch_norm(params, graph)
    module = merge(folded)
    assert isinstance(module, Net) and module is not net
    np.testing.assert_array_equal(module(X), apply(folded, X))
    np.testing.assert_allclose(module(X), net(X), atol=1e-5)
    kernels = module.stem.kernel[...], net.stem.kernel[...]
    assert np.max(np.abs(kernels[0] - kernels[1])) > 1e-4


def test_the_whole_recipe_runs_on_it(net):
    apply, params, _ = jm.functional(net)
    graph = jm.trace(apply, params, X)
    quantizers = jm.calibrate(params, graph, [X], progress=False)
    assert {*quantizers.weights} == {"stem/kernel", "head/kernel"}
    y = jax.jit(jm.simulate(apply, quantizers))(params, X)
    assert 1e-4 < np.max(np.abs(y - net(X))) < 0.1


@pytest.mark.parametrize("thing", [linen.Dense(3), lambda x: x, {"kernel": 1.0}])
def test_other_things_are_refused(thing):
    with pytest.raises(
        TypeError, match=r"jaxmet\.functional: .*not an nnx\.Module.*linen"
    ):
        jm.functional(thing)


def test_what_most_do_not_need_is_not_imported() -> None:
    heavy = "{'flax.nnx', 'altair', 'pandas', 'equinox', 'onnx', 'matplotlib'}"
    line = f"import sys, jaxmet; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", line], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
