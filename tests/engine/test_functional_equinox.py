"""An equinox module as a pure function, and batch norms with debiased statistics."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmet as jm

RNG = np.random.default_rng(0)
X = jax.device_put(np.float32(RNG.normal(1.0, 2.0, (7, 3, 6, 6))))
MOMENTUM = 0.9


class Net(eqx.Module):
    stem: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    head: eqx.nn.Linear

    def __init__(self, key, mode="batch", affine=True):
        one, two = jax.random.split(key)
        self.stem = eqx.nn.Conv2d(3, 5, 3, padding=1, key=one)
        self.norm = eqx.nn.BatchNorm(
            5, "batch", mode=mode, momentum=MOMENTUM, channelwise_affine=affine
        )
        self.head = eqx.nn.Linear(5, 2, key=two)

    def __call__(self, x, state):
        x, state = self.norm(self.stem(x), state)
        return self.head(jnp.mean(jax.nn.relu(x), (1, 2))), state


def trained(mode="batch", affine=True, steps=3):
    """A model after a few steps of its running averages, in inference mode."""
    model, state = eqx.nn.make_with_state(Net)(jax.random.key(0), mode, affine)
    if affine:
        scale = jnp.asarray([0.5, -1.0, 2.0, 1.5, 0.7])
        model = eqx.tree_at(lambda m: m.norm.weight, model, scale)
        model = eqx.tree_at(lambda m: m.norm.bias, model, scale[::-1])
    every = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    if steps:
        x = X[None] + jnp.arange(steps, dtype=jnp.float32).reshape(-1, 1, 1, 1, 1)
        state, _ = jax.lax.scan(lambda s, x: (every(x, s)[1], None), state, x)
    return eqx.nn.inference_mode(model), state


def by_hand(model, state, x):
    every = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    return every(x, state)[0]


def decibels(got, wanted):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    error = np.sum((got - wanted) ** 2)
    return 10 * np.log10(np.sum(wanted**2) / error) if error else np.inf


@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_it_computes_what_the_module_computes(mode):
    model, state = trained(mode)
    apply, params, merge = jm.functional(model, state)
    np.testing.assert_allclose(apply(params, X), by_hand(model, state, X), rtol=1e-6)
    again = by_hand(*merge(jax.tree.map(lambda a: a, params)), X)
    np.testing.assert_allclose(again, by_hand(model, state, X), rtol=1e-6)
    graph = jm.trace(apply, params, X)
    assert {"stem", "norm", "head"} <= {n.name for n in graph.nodes}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_its_batch_norms_fold(mode, steps, affine):
    if mode == "ema" and not steps:
        pytest.skip("it has no statistics yet")
    model, state = trained(mode, affine, steps)
    apply, params, merge = jm.functional(model, state)
    graph = jm.trace(apply, params, X)
    folded, report = jm.fold_batch_norm(params, graph, with_report=True)
    assert report.title == "1 of 1 norms folded", report
    assert decibels(apply(folded, X), apply(params, X)) > 100
    assert decibels(by_hand(*merge(folded), X), by_hand(model, state, X)) > 100
    # the oracle: what the module divides by, by hand in float64
    index = (
        model.norm.batch_state_index if mode == "batch" else model.norm.ema_state_index
    )
    mean, var = (np.asarray(v, np.float64) for v in state.get(index))
    if mode == "batch" and steps:
        mean, var = (v / (1 - MOMENTUM**steps) for v in (mean, var))
    scale = np.asarray(model.norm.weight, np.float64) if affine else 1.0
    gain = scale / np.sqrt(var + model.norm.eps)
    after, _ = merge(folded)
    wanted = np.asarray(model.stem.weight, np.float64) * gain[:, None, None, None]
    np.testing.assert_allclose(after.stem.weight, wanted, rtol=3e-6)
    again = jm.fold_batch_norm(folded, graph)
    for a, b in zip(jax.tree.leaves(folded), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_norm_folds_into_a_mapped_convolution_without_bias(groups):
    one = eqx.nn.Conv2d(4, 6, 3, groups=groups, use_bias=False, key=jax.random.key(0))
    norm = {k: jax.device_put(np.float32(RNG.uniform(0.5, 2.0, 6))) for k in "mvsb"}

    def apply(p, x):
        y = jax.vmap(p["conv"])(x)
        p = {k: v[None, :, None, None] for k, v in p["norm"].items()}
        return (y - p["m"]) * jax.lax.rsqrt(p["v"] + 1e-3) * p["s"] + p["b"]

    x = jax.device_put(np.float32(RNG.normal(size=(4, 4, 8, 8))))
    params = {"conv": one, "norm": norm}
    graph = jm.trace(apply, params, x)
    folded, report = jm.fold_batch_norm(params, graph, with_report=True)
    assert report.title == "1 of 1 norms folded", report
    assert decibels(apply(folded, x), apply(params, x)) > 100


def test_debiased_statistics_are_what_the_data_gave():
    """What data-free steps read: the mean and variance of the channels, not the averages."""
    model, state = trained(steps=1)
    channels = np.asarray(jax.vmap(model.stem)(X), np.float64)
    moments = (f((0, 2, 3)) * (1 - MOMENTUM) for f in (channels.mean, channels.var))
    averages = tuple(jax.device_put(np.float32(m)) for m in moments)
    state = state.set(model.norm.batch_state_index, averages)
    apply, params, _ = jm.functional(model, state)
    graph = jm.trace(apply, params, X)
    again, report = jm.reestimate_batch_norm(
        params, graph, [X], with_report=True, progress=False
    )
    assert report["mean moved"][0] < 1e-4 and abs(report["variance max"][0] - 1) < 1e-4
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_equalizing_and_data_free_correction_keep_the_function():
    model, state = trained()
    apply, params, _ = jm.functional(model, state)
    graph = jm.trace(apply, params, X)
    equal = jm.equalize(jm.fold_batch_norm(params, graph), graph)
    assert decibels(apply(equal, X), apply(params, X)) > 90
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    params, quantizers, _ = jm.ptq(apply, params, shape, progress=False)
    simulated = jm.simulate(apply, quantizers)(params, X)
    assert decibels(simulated, by_hand(model, state, X)) > 20


def test_updated_statistics_are_handed_back():
    model, state = trained()
    training = eqx.nn.inference_mode(model, value=False)
    apply, params, merge = jm.functional(training, state)
    outputs, updated = apply(params, X, mutable=True)
    every = jax.vmap(training, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    wanted, new = every(X, state)
    np.testing.assert_allclose(outputs, wanted, rtol=1e-5, atol=1e-6)
    got = merge(updated)[1]
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(new), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("mutable", [False, True])
def test_a_norm_in_training_is_known_as_such(mutable):
    model, state = trained()
    training = eqx.nn.inference_mode(model, value=False)
    apply, params, _ = jm.functional(training, state)
    graph = jm.trace(apply, params, X, mutable=mutable)
    assert graph["norm"].norm.over == "batch"
    assert {n.name for n in graph.nodes} == {
        n.name for n in jm.trace(*jm.functional(model, state)[:2], X).nodes
    }
    with pytest.raises(ValueError, match=r"eqx\.nn\.inference_mode"):
        jm.fold_batch_norm(params, graph)
    quantizers = jm.calibrate(params, graph, [X], progress=False)
    found = jm.simulate(apply, quantizers)(params, X, mutable=mutable)
    wanted = apply(params, X, mutable=mutable)
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0.1, atol=0.05)


def test_a_module_without_state():
    model = eqx.nn.MLP(4, 3, 8, 2, key=jax.random.key(1))
    x = jax.device_put(np.float32(RNG.normal(size=(5, 4))))
    apply, params, merge = jm.functional(model)
    np.testing.assert_allclose(apply(params, x), jax.vmap(model)(x), rtol=1e-6)
    assert len(jm.trace(apply, params, x).layers) == 3
    np.testing.assert_array_equal(jax.vmap(merge(params))(x), jax.vmap(model)(x))
    batched, params, _ = jm.functional(model, vmap=False)
    np.testing.assert_allclose(batched(params, x[0]), model(x[0]), rtol=1e-6)


def test_a_state_in_the_module_is_found():
    model = eqx.nn.inference_mode(Net(jax.random.key(0)))
    apply, params, _ = jm.functional(model)
    assert apply(params, X).shape == (7, 2)
    assert params["state"]["norm"]["batch_counter"].shape == ()


def nnx_module():
    return nnx.Linear(4, 3, rngs=nnx.Rngs(0))


def eqx_module():
    return eqx.nn.Linear(4, 3, key=jax.random.key(0))


@pytest.mark.parametrize("make", [nnx_module, eqx_module])
@pytest.mark.parametrize("method", [False, True])
@pytest.mark.parametrize("step", ["trace", "ptq"])
def test_modules_in_place_of_functions_are_refused(make, method, step):
    module, x = make(), jnp.ones((2, 4))
    call = module.__call__ if method else module
    mode = r"module\.eval\(\)" if make is nnx_module else r"eqx\.nn\.inference_mode"
    with pytest.raises(ValueError, match=rf"jaxmet\.{step}: .*{mode}.*jm\.functional"):
        if step == "trace":
            jm.trace(call, {"w": x}, x)
        else:
            jm.ptq(call, {"w": x}, [x])


def test_an_nnx_module_as_parameters_is_refused():
    with pytest.raises(ValueError, match=r"params is a Linear.*jm\.functional"):
        jm.trace(lambda m, x: m(x), nnx_module(), jnp.ones((2, 4)))


def test_equinox_wrappers_and_trees_are_fine():
    module = eqx_module()
    apply = eqx.filter_jit(lambda m, x: jax.vmap(m)(x))
    assert len(jm.trace(apply, module, jnp.ones((2, 4))).layers) == 1


@pytest.mark.parametrize("form", ["first", "other name", "by name", "more inputs"])
def test_a_state_is_passed_where_the_module_takes_it(form):
    calls = {
        "first": lambda self, state, x: Net.__call__(self, x, state),
        "other name": lambda self, x, running: Net.__call__(self, x, running),
        "by name": lambda self, x, *, state: Net.__call__(self, x, state),
        "more inputs": lambda self, x, m, s, key=None: Net.__call__(self, x * m, s),
    }
    made = type("Made", (Net,), {"__call__": calls[form]})
    model, state = eqx.nn.make_with_state(made)(jax.random.key(0))
    model = eqx.nn.inference_mode(model)
    inputs = (X, jnp.ones(7)) if form == "more inputs" else (X,)
    apply, params, _ = jm.functional(model, state)
    plain = lambda x: Net.__call__(model, x, state)[0]
    np.testing.assert_allclose(
        apply(params, *inputs), jax.vmap(plain, axis_name="batch")(X), rtol=1e-5
    )
    graph = jm.trace(apply, params, *(x[:1] for x in inputs))
    assert sum(node.is_layer for node in graph.nodes) == 2


def test_a_forgotten_state_is_named():
    pair = eqx.nn.make_with_state(Net)(jax.random.key(0))
    for given in (pair[0], pair):
        with pytest.raises(TypeError, match=r"jm\.functional\(model, state\)"):
            jm.functional(given)


def test_a_state_of_something_else_is_refused():
    with pytest.raises(TypeError, match=r"jaxmet\.functional: state is a dict"):
        jm.functional(eqx_module(), {})
    with pytest.raises(
        TypeError, match=r"jaxmet\.functional: a state came with a Linear"
    ):
        jm.functional(nnx_module(), {})
