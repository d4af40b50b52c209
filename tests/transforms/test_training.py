"""Training with fake quantization: an ordinary loss, whatever the front end."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import jaxmet as jm
from jaxmet.tree.leaves import is_compressed
from jaxmet.tree.named_leaves import named_leaves, replace_leaves

STATISTICS = {"bn1/mean", "bn1/var", "bn2/mean", "bn2/var"}
COARSE = jm.QuantConfig(weight_bits=4, activation_bits=6)
TENSOR = jm.QuantConfig(weight_bits=4, activation_bits=8, per_channel=False)


class Net(nn.Module):
    """Two convolutions with norms, dropout, a dense head."""

    dtype: jnp.dtype = jnp.float32
    cap: bool = False

    @nn.compact
    def __call__(self, x, *, train=False):
        act = nn.relu6 if self.cap else nn.relu
        for i, features in ((1, 8), (2, 12)):
            x = nn.Conv(features, (3, 3), dtype=self.dtype, name=f"conv{i}")(x)
            norm = nn.BatchNorm(not train, dtype=self.dtype, name=f"bn{i}")
            x = act(norm(x))
        x = nn.Dropout(0.1, deterministic=not train)(jnp.mean(x, (1, 2)))
        return nn.Dense(4, dtype=self.dtype, name="head")(x)


def images(n=16, seed=0):
    return jax.random.normal(jax.random.key(seed), (n, 6, 6, 3))


def labels(n=16):
    return jnp.arange(n) % 4


@functools.cache
def start(**options):
    """The model, variables with norms that are no identity, and the inference graph."""
    model = Net(**options)
    params = jax.jit(model.init)(jax.random.key(1), images(2))
    rng = np.random.default_rng(3)
    leaves = named_leaves(params)
    new = {}
    for name, leaf in leaves.items():
        if name.startswith("bn"):
            low, high = {"mean": (-1, 1), "bias": (-0.5, 0.5)}.get(
                name.split("/")[1], (0.3, 3)
            )
            new[name] = jax.device_put(np.float32(rng.uniform(low, high, leaf.shape)))
    params = replace_leaves(params, new)
    return model, params, jm.trace(model.apply, params, images(1))


@functools.cache
def quantized(config=COARSE, **options):
    model, params, graph = start(**options)
    return jm.calibrate(params, graph, [images()], config, progress=False)


def cross_entropy(logits, targets):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.mean(losses)


def standard(f):
    """Optax mixes Python numbers' dtypes, which strict promotion refuses."""

    @functools.wraps(f)
    def run(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"):
            return f(*args, **kwargs)

    return run


def close(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


# Labels.


@pytest.mark.slow
def test_labels_name_what_each_leaf_is():
    _, params, graph = start()
    quantizers = quantized()
    of_params, of_ranges = jm.optimizer_labels(params, graph, quantizers)
    assert jax.tree.structure(of_params) == jax.tree.structure(params)
    assert jax.tree.structure(of_ranges) == jax.tree.structure(quantizers)
    found = named_leaves(of_params)
    assert {n for n, label in found.items() if label == "statistics"} == STATISTICS
    assert {*found.values()} == {"weights", "statistics"}
    assert {*jax.tree.leaves(of_ranges)} == {"ranges"}
    alone = jm.optimizer_labels(params["params"], graph)
    assert {*jax.tree.leaves(alone)} == {"weights"}


@pytest.mark.slow
@standard
def test_adamw_with_labels_leaves_bounds_and_statistics():
    model, params, graph = start(cap=True)
    params = jm.fold_batch_norm(params, graph)
    params = jm.equalize(params, graph, objective="range", progress=False)
    quantizers = jm.calibrate(params, graph, [images()], COARSE, progress=False)
    assert any(map(is_compressed, jax.tree.leaves(params, is_leaf=is_compressed)))

    def trained(optimizer):
        tree = params, quantizers.pin(params)
        state = optimizer.init(tree)

        @jax.jit
        def step(tree, state):
            def loss(params, quantizers):
                logits = jm.simulate(model.apply, quantizers)(params, images())
                return cross_entropy(logits, labels())

            grads = jax.grad(loss, argnums=(0, 1))(*tree)
            updates, state = optimizer.update(grads, state, tree)
            return optax.apply_updates(tree, updates), state

        for _ in range(3):
            tree, state = step(tree, state)
        return tree

    each = dict.fromkeys(("statistics", "bounds"), optax.set_to_zero())
    each |= {"weights": optax.adamw(1e-2, weight_decay=0.1), "ranges": optax.adam(1e-3)}
    parts = jm.optimizer_labels(params, graph, quantizers.pin(params))
    new, ranges = trained(optax.multi_transform(each, parts))
    old, label = named_leaves(params), named_leaves(parts[0])
    for name, leaf in named_leaves(new).items():
        before = old[name]
        if is_compressed(leaf):
            for field in ("lower", "upper"):
                if getattr(before, field) is not None:
                    assert getattr(label[name], field) == "bounds"
                    same(getattr(leaf, field), getattr(before, field))
            leaf, before = leaf.weight, before.weight
        elif name in STATISTICS:
            same(leaf, before)
            continue
        assert np.any(np.asarray(leaf) != np.asarray(before)), name
    moved = jax.tree.map(
        lambda a, b: bool(jnp.any(a != b)), ranges, quantizers.pin(params)
    )
    assert sum(jax.tree.leaves(moved)) >= 6

    # Without labels, decay pulls statistics and bounds to zero: why the docs want them.
    loose, _ = trained(optax.adamw(1e-2, weight_decay=0.1))
    assert np.any(np.asarray(named_leaves(loose)["bn1/var"]) != old["bn1/var"])


@pytest.mark.slow
@standard
def test_warm_start_from_adaround_with_an_average_and_a_schedule():
    """The first loss is that of the rounded model, a schedule of widths traces once, and the
    average of the trees is the sum of its parts."""
    model, params, graph = start()
    params = jm.fold_batch_norm(params, graph)
    before = jm.calibrate(params, graph, [images()], COARSE, progress=False)
    key = jax.random.key(0)
    params, quantizers = jm.adaround(
        params, graph, before, [images()], key=key, progress=False
    )
    rounded = jm.round_weights(params, quantizers)
    same(rounded, jax.tree.map(jnp.asarray, params))  # on its grid already
    target = jax.jit(model.apply)(start()[1], images())
    traces = []

    def loss(params, quantizers, number):
        traces.append(1)
        bits = optax.linear_schedule(8.0, 4.0, 6)(number)
        grids = jm.grids(quantizers, weight_bits=bits, activations=number >= 2)
        logits = jm.simulate(model.apply, quantizers, grids=grids)(params, images())
        return jnp.mean((logits - target) ** 2)

    tree, decay = (params, quantizers), 0.7
    each = {"weights": optax.sgd(1e-2), "ranges": optax.sgd(1e-4)}
    each |= dict.fromkeys(("statistics", "bounds"), optax.set_to_zero())
    parts = jm.optimizer_labels(params, graph, quantizers)
    optimizer = optax.multi_transform(each, parts)
    state, average = optimizer.init(tree), tree

    @jax.jit
    def step(tree, state, average, number):
        value, grads = jax.value_and_grad(loss, argnums=(0, 1))(*tree, number)
        updates, state = optimizer.update(grads, state, tree)
        tree = optax.apply_updates(tree, updates)
        return tree, state, optax.incremental_update(tree, average, 1 - decay), value

    trees, losses = [tree], []
    for number in range(12):
        tree, state, average, value = step(tree, state, average, number)
        trees.append(tree)
        losses.append(float(value))
    assert len(traces) == 1

    def final(tree):
        logits = jax.jit(jm.simulate(model.apply, tree[1]))(tree[0], images())
        return float(jnp.mean((logits - target) ** 2))

    weights = [decay**12, *((1 - decay) * decay ** (12 - i) for i in range(1, 13))]
    parts = [jax.tree.map(lambda a, w=w: w * a, t) for w, t in zip(weights, trees)]
    close(average, jax.tree.map(lambda *a: sum(a), *parts), rtol=1e-4, atol=1e-5)
    nearest = before.pin(start_folded := jm.fold_batch_norm(start()[1], graph))
    assert final(trees[0]) < final((start_folded, nearest))
    assert final(tree) < final(trees[0])
    np.testing.assert_allclose(losses[-1], final(trees[-2]), rtol=1e-3)


def test_bad_trees_are_refused():
    model, params, graph = start()
    training = jm.trace(
        functools.partial(model.apply, mutable=["batch_stats"]),
        params,
        images(2),
        train=True,
        rngs={"dropout": jax.random.key(0)},
    )
    with pytest.raises(ValueError, match="optimizer_labels: norm 'bn1' .* train=False"):
        jm.optimizer_labels(params, training)
    with pytest.raises(ValueError, match="simulate: norm 'bn1' of fold="):
        jm.simulate(model.apply, quantized(), fold=training)(params, images(2))
    with pytest.raises(ValueError, match="simulate: the tree has no 'bn1/mean'"):
        apply = lambda p, x: model.apply(
            {"params": p, "batch_stats": params["batch_stats"]}, x
        )
        jm.simulate(apply, jm.Quantizers(), fold=graph)(params["params"], images(2))
    whole = jm.Compressed(weight=jnp.zeros((3, 3, 3, 8), jnp.int8))
    integers = replace_leaves(params, {"conv1/kernel": whole})
    with pytest.raises(ValueError, match="'conv1/kernel' holds integers"):
        jm.optimizer_labels(integers, graph)


@standard
def test_nan_gradients_are_kept_out_or_named():
    model, params, _ = start()
    quantizers = quantized()
    broken = quantizers.set("head", scale=jnp.nan, zero_point=0)
    with pytest.raises(ValueError, match="the quantizer of 'head.*' is NaN"):
        jm.simulate(model.apply, broken)
    optimizer = optax.apply_if_finite(optax.sgd(0.1), 5)
    state = optimizer.init(quantizers)
    nan = jax.tree.map(lambda a: a * jnp.nan, quantizers)
    updates, _ = optimizer.update(nan, state, quantizers)
    same(optax.apply_updates(quantizers, updates), quantizers)


# Front ends.


@standard
def test_linen_in_training_mode_with_dropout_and_a_train_state():
    model, params, _ = start()
    quantizers = quantized()

    class State(TrainState):
        batch_stats: dict

    state = State.create(
        apply_fn=jm.simulate(model.apply, quantizers),
        params=params["params"],
        batch_stats=params["batch_stats"],
        tx=optax.sgd(0.2),
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, key):
        def loss(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            rngs = {"dropout": key}
            logits, updates = state.apply_fn(
                variables, images(), train=True, mutable=["batch_stats"], rngs=rngs
            )
            return cross_entropy(logits, labels()), updates

        (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        state = state.apply_gradients(grads=grads)
        return state.replace(batch_stats=updates["batch_stats"]), value

    state = jax.tree.map(jnp.copy, state)  # donated: the shared fixtures stay
    values = []
    for i in range(40):
        state, value = step(state, jax.random.key(i))
        values.append(float(value))
    assert np.mean(values[-5:]) < 0.8 * values[0]
    before = params["batch_stats"]["bn1"]["mean"]
    assert np.any(np.asarray(state.batch_stats["bn1"]["mean"]) != np.asarray(before))


class Twin(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.bn1 = nnx.BatchNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.mean(nnx.relu(self.bn1(self.conv1(x))), (1, 2)))


@standard
def test_nnx_with_its_own_optimizer_and_statistics():
    model = Twin(nnx.Rngs(0))
    evaluated = (
        nnx.view(model, use_running_average=True) if hasattr(nnx, "view") else model
    )
    evaluated.eval()
    apply, params, _ = jm.functional(evaluated)
    graph = jm.trace(apply, params, images(1))
    quantizers = jm.calibrate(params, graph, [images()], COARSE, progress=False)
    model.train()
    train, _, _ = jm.functional(model)
    simulated = jm.simulate(train, quantizers)
    optimizer = nnx.Optimizer(model, optax.sgd(0.2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            logits, updates = simulated(
                nnx.state(model), images(), mutable=nnx.BatchStat
            )
            return cross_entropy(logits, labels()), updates

        (value, updates), grads = nnx.value_and_grad(loss, has_aux=True)(model)
        optimizer.update(model, grads)
        nnx.update(model, updates)
        return value

    mean = np.asarray(model.bn1.mean[...])
    values = [float(step(model, optimizer)) for _ in range(30)]
    assert values[-1] < 0.95 * values[0]
    assert np.any(np.asarray(model.bn1.mean[...]) != mean)


@pytest.mark.slow
@standard
def test_bfloat16_compute_with_float32_ranges():
    model, params, _ = start()
    half = Net(dtype=jnp.bfloat16)
    quantizers = quantized()

    def loss(apply, params, quantizers):
        logits = jm.simulate(apply, quantizers)(params, images())
        return cross_entropy(logits.astype(jnp.float32), labels())

    grad = jax.jit(jax.value_and_grad(loss, argnums=(1, 2)), static_argnums=0)
    value, (of_params, of_ranges) = grad(half.apply, params, quantizers)
    wide, (expected, _) = grad(model.apply, params, quantizers)
    assert abs(float(value) - float(wide)) < 0.1
    for leaf in jax.tree.leaves((of_params, of_ranges)):
        assert leaf.dtype == jnp.float32 and np.all(np.isfinite(leaf))
    a, b = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(t["params"])])
        for t in (of_params, expected)
    )
    assert np.corrcoef(a, b)[0, 1] > 0.9


@pytest.mark.slow
def test_rematerialization_accumulation_and_boxes_change_nothing():
    model, params, _ = start()
    quantizers = quantized()

    def loss(params, quantizers, x, y, apply=model.apply):
        return cross_entropy(jm.simulate(apply, quantizers)(params, x), y)

    grad = jax.jit(jax.grad(loss, argnums=(0, 1)))
    whole = grad(params, quantizers, images(), labels())
    again = jax.jit(jax.grad(jax.checkpoint(loss), argnums=(0, 1)))
    close(again(params, quantizers, images(), labels()), whole, rtol=1e-4, atol=1e-6)
    halves = [
        grad(params, quantizers, images()[i : i + 8], labels()[i : i + 8])
        for i in (0, 8)
    ]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    # LSQ counts the values of one example, so the batch size does not scale a gradient.
    close(mean, whole, rtol=1e-4, atol=1e-6)

    boxed = jax.tree.map(
        lambda a: nn.Partitioned(a, (None,) * a.ndim), params["params"]
    )
    boxed = {"params": boxed, "batch_stats": params["batch_stats"]}
    graph = jm.trace(lambda p, x: model.apply(nn.unbox(p), x), boxed, images(1))
    assert {n.name for n in graph.layers} == {"conv1", "conv2", "head"}
    boxes = jax.jit(
        jax.grad(
            functools.partial(loss, apply=lambda p, x: model.apply(nn.unbox(p), x))
        )
    )
    close(
        nn.unbox(boxes(boxed, quantizers, images(), labels())),
        whole[0],
        rtol=1e-5,
        atol=1e-7,
    )


def test_no_calibration_at_all():
    model, params, graph = start()
    dynamic = jax.jit(jm.simulate(model.apply, jm.dynamic(bits=6)))
    config = jm.QuantConfig(weight_bits=6, activation_bits=6)
    static = jm.calibrate(params, graph, [images()], config, progress=False)
    expected = jax.jit(jm.simulate(model.apply, static))(params, images())
    # The ranges of the batch itself, found in the model whose inputs are rounded already.
    found = dynamic(params, images())
    plain = model.apply(params, images())
    error, by_hand = (float(jnp.linalg.norm(a - plain)) for a in (found, expected))
    assert 0 < error < 2 * by_hand

    def loss(params):
        apply = jm.simulate(model.apply, jm.dynamic(bits=4))
        rngs = {"dropout": jax.random.key(0)}
        logits, _ = apply(
            params, images(), train=True, mutable=["batch_stats"], rngs=rngs
        )
        return cross_entropy(logits, labels())

    gradient = jax.jit(jax.grad(loss))(params)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradient))
    assert np.any(np.asarray(gradient["params"]["conv1"]["kernel"]))
    with pytest.raises(ValueError, match=r"jaxmet\.dynamic: bits is 1"):
        jm.dynamic(bits=1)
    with pytest.raises(ValueError, match=r"jaxmet\.simulate: jm\.dynamic .* grids="):
        jm.simulate(model.apply, jm.dynamic(bits=6), grids=jm.grids(static))


# Batch norm.


def test_folding_in_the_forward_pass_is_folding_first():
    """In inference the two are the same function, with one scale per tensor too."""
    model, params, graph = start()
    folded = jm.fold_batch_norm(params, graph)
    quantizers = jm.calibrate(folded, graph, [images()], TENSOR, progress=False)
    expected = jax.jit(jm.simulate(model.apply, quantizers))(folded, images())
    simulated = jax.jit(jm.simulate(model.apply, quantizers, fold=graph))
    np.testing.assert_allclose(
        simulated(params, images()), expected, rtol=1e-4, atol=1e-5
    )
    unfolded = jax.jit(jm.simulate(model.apply, quantizers))(params, images())
    assert float(jnp.max(jnp.abs(unfolded - expected))) > 1e-2
    rounded = jm.round_weights(params, quantizers, fold=graph)
    once = jax.jit(jm.simulate(model.apply, quantizers, weights=False))
    np.testing.assert_allclose(once(rounded, images()), expected, rtol=1e-4, atol=1e-5)


def test_folding_in_training_reaches_the_gains():
    model, params, graph = start()
    folded = jm.fold_batch_norm(params, graph)
    quantizers = jm.calibrate(folded, graph, [images()], TENSOR, progress=False)

    def loss(params, fold):
        apply = jm.simulate(model.apply, quantizers, fold=fold)
        rngs = {"dropout": jax.random.key(0)}
        logits, updates = apply(
            params, images(), train=True, mutable=["batch_stats"], rngs=rngs
        )
        return cross_entropy(logits, labels()), updates

    grad = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    gradient, updates = grad(params, graph)
    leaves = named_leaves(gradient)
    assert np.any(np.asarray(leaves["bn1/scale"])) and np.any(
        np.asarray(leaves["conv1/kernel"])
    )
    assert not np.any(np.asarray(leaves["bn1/var"]))
    old = params["batch_stats"]["bn1"]["var"]
    assert np.any(np.asarray(updates["batch_stats"]["bn1"]["var"]) != np.asarray(old))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("learn", ["lsq", "minmax"])
def test_pinned_scales_follow_the_fold(learn):
    """Quantized beside its norms or folded: the same function, on the same quantizers."""
    model, params, graph = start()
    gains = np.array(params["params"]["bn1"]["scale"])
    gains[::3] *= -1
    params = replace_leaves(params, {"bn1/scale": jnp.asarray(gains)})
    skew = jm.QuantConfig(weight_bits=4, symmetric_weights=False)
    for config in (COARSE, skew):
        quantizers = jm.calibrate(params, graph, [images()], config, progress=False)
        quantizers = quantizers.set("*/kernel", learn=learn).pin(params)
        # No scale is that of the weight any more, as after training.
        quantizers = jax.tree.map(lambda a: a * 0.83, quantizers)
        expected = jax.jit(jm.simulate(model.apply, quantizers))(params, images())
        folded, new = jm.fold_batch_norm(params, graph, quantizers=quantizers)
        found = jax.jit(jm.simulate(model.apply, new))(folded, images())
        # A weight in the middle between two integers may go either way.
        apart = np.abs(np.asarray(found - expected))
        assert np.median(apart) < 1e-4 and np.max(apart) < 0.1
        stale = jax.jit(jm.simulate(model.apply, quantizers))(folded, images())
        assert np.median(np.abs(np.asarray(stale - expected))) > 1e-2
    whole = jm.calibrate(params, graph, [images()], TENSOR, progress=False)
    jm.fold_batch_norm(params, graph, quantizers=whole)  # follows the weight: fine
    with pytest.raises(
        ValueError, match="fold_batch_norm: the scale of 'conv1/kernel'"
    ):
        jm.fold_batch_norm(params, graph, quantizers=whole.pin(params))


def test_statistics_are_measured_in_the_quantized_model():
    """A norm alone after coarse weights stores the moments that numpy finds there."""
    model, params, graph = start()
    quantizers = quantized(jm.QuantConfig(weight_bits=2, activation_bits=4))
    batches = [images(seed=s) for s in range(3)]
    measured = jm.reestimate_batch_norm(
        params, graph, batches, quantizers=quantizers, progress=False
    )
    rounded = named_leaves(jm.round_weights(params, quantizers))
    x = quantizers.activation("input")(jnp.concatenate(batches))
    y = jax.lax.conv_general_dilated(
        x,
        rounded["conv1/kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    ) + rounded["conv1/bias"].reshape(1, 1, 1, -1)
    found = named_leaves(measured)
    np.testing.assert_allclose(found["bn1/mean"], np.mean(y, (0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(found["bn1/var"], np.var(y, (0, 1, 2)), rtol=1e-3)
    same(found["conv1/kernel"], named_leaves(params)["conv1/kernel"])
    plain = named_leaves(
        jm.reestimate_batch_norm(params, graph, batches, progress=False)
    )
    assert np.any(np.abs(np.asarray(plain["bn2/var"] - found["bn2/var"])) > 1e-2)
