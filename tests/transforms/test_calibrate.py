"""Ranges over data, against values collected by hand; every form of batches; refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import by_hand
import jaxmet as jm
import zoo
from jaxmet.tree.named_leaves import replace_leaves

SHAPES = {
    "conv_bn_relu": (8, 8, 3),
    "concatenation": (8, 8, 3),
    "scan": (6,),
    "cond": (6,),
    "tied": (6,),
}


def model(name):
    apply, params, _ = zoo.model(name)
    return apply, params, zoo.traced(name)


def rows(name, number, seed=0):
    rng = np.random.default_rng(seed)
    # later rows are larger, so that no batch speaks for the others
    grow = np.linspace(0.3, 2.0, number).reshape(-1, *(1 for _ in SHAPES[name]))
    return jax.device_put(
        np.float32(grow * rng.normal(0.1, 1.0, (number, *SHAPES[name])))
    )


def split(x, *sizes):
    return [(part,) for part in jnp.split(x, np.cumsum(sizes)[:-1])]


def calibrated(name, batches, config=None, **options):
    _, params, graph = model(name)
    return jm.calibrate(params, graph, batches, config, progress=False, **options)


def same(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)


# Ranges.


@pytest.mark.parametrize("name", ["conv_bn_relu", "scan", "cond"])
def test_ranges_are_those_over_all_batches(name):
    batches = split(rows(name, 7), 3, 3, 1)
    if name == "cond":  # one batch takes each branch, and one is taken twice
        batches = [(x + s,) for (x,), s in zip(batches, (2.0, -2.0, 3.0), strict=True)]
    ranges = by_hand.ranges(name, model(name)[1], batches)
    quantizers = calibrated(name, batches)
    assert {*quantizers.activations} == {*ranges}
    for node, q in quantizers.activations.items():
        scale, zero_point, low, high = by_hand.grid(*ranges[node], 8)
        np.testing.assert_allclose(q.scale, scale, rtol=1e-5, err_msg=node)
        np.testing.assert_array_equal(q.zero_point, zero_point, err_msg=node)
        assert np.shape(q.scale) == ((3,) if node == "stack/dense/relu" else ())
        assert tuple(q.ends) == (low, high) == (0, 255)
    first = calibrated(name, batches[:1])  # the data matters
    assert any(
        first.activations.get(n) is None
        or not np.array_equal(first.activations[n].scale, q.scale)
        for n, q in quantizers.activations.items()
    )


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (12, True), (16, False)])
def test_bits_and_symmetry(bits, symmetric):
    config = jm.QuantConfig(activation_bits=bits, symmetric_activations=symmetric)
    batches = split(rows("conv_bn_relu", 4), 4)
    quantizers = calibrated("conv_bn_relu", batches, config)
    ranges = by_hand.ranges("conv_bn_relu", model("conv_bn_relu")[1], batches)
    for node, q in quantizers.activations.items():
        low, high = np.multiply(ranges[node], 2 if bits == 16 else 1)
        scale, zero_point, *ends = by_hand.grid(low, high, bits, symmetric)
        np.testing.assert_allclose(q.scale, scale, rtol=1e-5)
        assert tuple(q.ends) == tuple(ends)
        if symmetric:
            assert q.zero_point is None and q.signed == (node != "stem/relu")
        else:  # of 65,536 levels; one may be the other side of a tie
            np.testing.assert_allclose(q.zero_point, zero_point, atol=1)


def test_a_concatenation_has_the_range_of_all_that_shares_it():
    batches = split(rows("concatenation", 3), 2, 1)
    quantizers = calibrated("concatenation", batches)
    ranges = by_hand.ranges("concatenation", model("concatenation")[1], batches)
    top = max(ranges["left/relu"][1], ranges["right/relu"][1])
    owner = quantizers.activations["right/concat"]
    np.testing.assert_allclose(owner.scale, top / 255, rtol=1e-5)
    assert "left/relu" not in quantizers.activations
    assert quantizers.activation("left/relu") is owner


def test_weights_follow_until_they_are_pinned():
    _, params, _ = model("conv_bn_relu")
    quantizers = calibrated("conv_bn_relu", split(rows("conv_bn_relu", 2), 2))
    assert all(q.scale is None for q in quantizers.weights.values())
    pinned = quantizers.pin(params)
    w = np.asarray(params["params"]["head"]["kernel"])
    expected = np.abs(w).max((0, 1, 2), keepdims=True) / 127
    np.testing.assert_allclose(pinned.weights["head/kernel"].scale, expected, rtol=1e-6)


def test_a_branch_never_taken_has_no_grid_and_says_so():
    apply, params, _ = model("cond")
    x = jnp.abs(rows("cond", 4))
    config = jm.QuantConfig(bias="int32")
    quantizers = calibrated("cond", [x], config)
    assert "low/relu" not in quantizers.activations
    assert dict(quantizers.skipped)["low/relu"] == "its branch was never taken"
    assert "low/relu: its branch was never taken" in repr(quantizers)
    device = jax.jit(jm.simulate(apply, quantizers))
    head = quantizers.activations["head"]
    low, high = (head.scale * (end - head.zero_point) for end in head.ends)
    for batch in (x, -x):  # the branch runs in float between the quantizers around it
        clipped = jnp.clip(apply(params, jnp.clip(batch, 0.0)), low, high)
        np.testing.assert_allclose(device(params, batch), clipped, atol=0.1)


def test_only_what_is_selected_is_quantized():
    _, params, graph = model("conv_bn_relu")
    batch = [rows("conv_bn_relu", 2)]
    quantizers = jm.calibrate(params, graph.only("stem"), batch, progress=False)
    assert [*quantizers.weights] == ["stem/kernel"]
    assert [*quantizers.activations] == ["stem/relu"]
    assert dict(quantizers.skipped)["head/kernel"] == "not selected"


def test_keyword_arguments_reach_the_model():
    def apply(params, x, *, gain, double=False):
        y = x @ params["w"]["kernel"] * gain
        return y * 2.0 if double else y

    params, x = {"w": {"kernel": jnp.eye(4)}}, rows("tied", 5)[:, :4]
    graph = jm.trace(apply, params, x, gain=jnp.float32(1.0))
    for gain, double in ((1.0, False), (3.0, False), (3.0, True)):
        quantizers = jm.calibrate(
            params, graph, [x], gain=jnp.float32(gain), double=double, progress=False
        )
        ends = np.minimum(x.min(), 0.0), np.maximum(x.max(), 0.0)
        q = quantizers.activations["w"]
        np.testing.assert_allclose(q.scale, (ends[1] - ends[0]) / 255, rtol=1e-5)


# Batches.


class Loader:
    """What grain and tf.data look like: iterable again and again, length unknown."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def forms(x):
    parts = [x[i : i + 2] for i in range(0, len(x), 2)]  # the last is shorter
    labels = [np.arange(len(p)) for p in parts]
    pairs = [*zip(parts, labels, strict=True)]
    return {
        "batched": (jm.batched(x, batch_size=2), {}),
        "batched numpy": (jm.batched(np.asarray(x), batch_size=2), {}),
        "batched tuple": (jm.batched((x,), batch_size=2), {}),
        "whole": (jm.batched(x, batch_size=len(x)), {}),
        "too few": (jm.batched(x, batch_size=64), {}),
        "tuples": ([(p,) for p in parts], {}),
        "generator": ((p for p in parts), {}),
        "loader": (Loader(parts), {}),
        "numpy": ([np.asarray(p) for p in parts], {}),
        "pairs": (pairs, {"inputs": lambda batch: batch[0]}),
        "batched pairs": (
            jm.batched((x, jnp.arange(len(x))), batch_size=2),
            {"inputs": lambda batch: (batch[0],)},
        ),
        "dicts": ([{"image": p} for p in parts], {"inputs": lambda b: b["image"]}),
    }


@pytest.fixture(scope="module")
def many():
    """33 rows: 16 batches of two, which run in chunks, and one of one."""
    x = rows("tied", 33, seed=1)
    x = x.at[-1].set(4.0 * x[-1])  # the ranges need the last row
    quantizers = calibrated("tied", [x[i : i + 2] for i in range(0, 33, 2)])
    without_rest = calibrated("tied", [x[:32]])
    for name in ("input", "head"):
        found, less = (q.activations[name].scale for q in (quantizers, without_rest))
        assert found > 1.1 * less
    return x, quantizers


@pytest.mark.parametrize("form", forms(np.zeros((4, 1), np.float32)))
def test_every_form_of_batches_gives_the_same_quantizers(many, form):
    x, expected = many
    batches, options = forms(x)[form]
    found = calibrated("tied", batches, **options)
    if form in ("whole", "too few"):  # other shapes compile to other programs
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)
    else:
        same(found, expected)


def test_sharded_batches_give_the_same_ranges(many):
    x, name = rows("conv_bn_relu", 32), "conv_bn_relu"
    _, params, graph = model(name)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    params = jax.device_put(params, sharded())
    expected = calibrated(name, [x[:16], x[16:]])
    parts = [jax.device_put(p, sharded("data")) for p in (x[:16], x[16:])]
    whole = jm.batched(x, batch_size=16)
    for batches in (parts, jax.device_put(whole, sharded(None, "data"))):
        found = jm.calibrate(params, graph, batches, progress=False)
        assert found.activations.keys() == expected.activations.keys()
        for n, q in found.activations.items():
            np.testing.assert_allclose(
                q.scale, expected.activations[n].scale, rtol=1e-6
            )
            np.testing.assert_array_equal(
                q.zero_point, expected.activations[n].zero_point
            )


# Refusals.


def spoiled(name, parameter, value):
    _, params, _ = model(name)
    leaf = by_hand.named(params)[parameter]
    return replace_leaves(params, {parameter: leaf.at[(0,) * leaf.ndim].set(value)})


def untouchable():
    raise AssertionError("the data was read before the arguments were checked")
    yield


X = np.zeros((2, 8, 8, 3), np.float32)
NAN = np.full_like(X, np.nan)


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        (
            X,
            {},
            r"ndarray of shape \(2, 8, 8, 3\), which could be.*jm\.batched\(x, batch_size",
        ),
        ((X, X), {}, r"tuple of 2, which could be.*jm\.batched"),
        ([], {}, r"batches is empty.*jm\.batched"),
        (iter([]), {}, r"batches is empty"),
        ([NAN], {}, r"input 0 of the first batch has NaN.*Clean the data"),
        ([X[:0]], {}, r"input 0 of the first batch is empty"),
        (
            [(X, np.arange(2))],
            {},
            r"a batch of 2 inputs.*inputs=lambda batch: batch\[0\]",
        ),
        (
            [{"image": X}],
            {},
            r"did not accept a batch.*inputs=lambda batch: batch\['image'\]",
        ),
        ([["a", "b"]], {}, r"where an array belongs"),
    ],
)
def test_bad_batches_are_refused(batches, options, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        calibrated("conv_bn_relu", batches, **options)
    if not options:
        assert error.type is ValueError and str(error.value).startswith(
            "jaxmet.calibrate: "
        )


@pytest.mark.parametrize(
    ("params", "config", "message"),
    [
        (
            None,
            {"rules": [jm.Rule("bottle*", weight_bits=4)]},
            "no node.*Correct its glob",
        ),
        (("stem/kernel", np.nan), {}, "parameter 'stem/kernel' holds NaN.*from before"),
        (("head/bias", np.inf), {}, "parameter 'head/bias' holds NaN or inf"),
        ("concatenation", {}, "shape|no parameter"),
        ("tied", {}, "the model does not run with this tree"),
        (None, {"placement": "everywhere"}, "placement is 'everywhere'.*'operations'"),
        (None, {"weight_bits": 1}, "weight_bits is 1.*2 to 16, or 32"),
    ],
)
def test_bad_arguments_are_refused_before_the_data_is_touched(params, config, message):
    _, own, graph = model("conv_bn_relu")
    if isinstance(params, tuple):
        own = spoiled("conv_bn_relu", *params)
    elif params is not None:
        own = model(params)[1]
    with pytest.raises(ValueError, match=rf"jaxmet\.\w+: .*({message})"):
        jm.calibrate(own, graph, untouchable(), jm.QuantConfig(**config))


def test_nan_in_a_later_batch_names_the_first_node_that_holds_it():
    x = rows("conv_bn_relu", 4)
    with pytest.raises(
        ValueError, match=r"jaxmet\.calibrate: the values of 'input' hold"
    ):
        calibrated("conv_bn_relu", [x, x.at[0, 0, 0, 0].set(jnp.nan)])


def test_float16_overflow_names_the_node():
    apply, params, _ = model("tied")
    params = jax.tree.map(lambda a: (8 * a).astype(jnp.float16), params)
    x = rows("tied", 4).astype(jnp.float16)
    graph = jm.trace(apply, params, x)
    jm.calibrate(params, graph, [x], progress=False)
    with pytest.raises(ValueError, match=r"'shared:0/relu' hold.*float16.*bfloat16"):
        jm.calibrate(params, graph, [x / jnp.max(jnp.abs(x)) * 60000.0], progress=False)


def test_a_batch_that_runs_another_program_is_refused():
    def apply(params, x):
        if x.shape[-1] == 4:
            x = jnp.tanh(x @ params["extra"]["kernel"])
        return x[..., :3] @ params["head"]["kernel"]

    params = {
        n: {"kernel": jnp.ones(s)} for n, s in (("extra", (4, 3)), ("head", (3, 2)))
    }
    long, short = jnp.ones((2, 4)), jnp.ones((2, 3))
    graph = jm.trace(apply, params, long)
    jm.calibrate(params, graph, [long], progress=False)
    message = r"jaxmet\.calibrate: .*another program.*'extra'.*Trace again"
    for batches in ([short], [long, short]):
        with pytest.raises(ValueError, match=message):
            jm.calibrate(params, graph, batches, progress=False)


def test_values_that_were_all_zero_stay_in_float():
    """A scale of nothing would clip what comes later to nothing."""

    def apply(p, x, y):
        return jax.nn.relu(x @ p["x"]["w"]) @ p["one"]["w"] + y @ p["y"]["w"]

    rng = np.random.default_rng(0)
    names = {"x": (4, 6), "one": (6, 3), "y": (5, 3)}
    params = {
        n: {"w": jnp.asarray(rng.normal(size=s), jnp.float32)} for n, s in names.items()
    }
    x = jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)
    y = jnp.asarray(rng.normal(size=(8, 5)), jnp.float32)
    graph = jm.trace(apply, params, x, y)
    batches = [(x, 0 * y)]
    for method in ("minmax", "mse", "percentile", "sqnr", "entropy"):
        config = jm.QuantConfig(activation_range=method, placement="products")
        found = jm.calibrate(params, graph, batches, config, progress=False)
        why = dict(found.skipped)["input:1"]
        assert "input:1" not in found.activations and "zero" in why
        assert {"input:0", "x/relu"} <= {*found.activations}
        given = jm.simulate(apply, found)(params, x, y)
        np.testing.assert_allclose(given, apply(params, x, y), rtol=0, atol=0.5)


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_a_layer_of_zeros_has_the_range_of_the_others(method):
    def apply(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(3, 4, 4)), jnp.float32).at[2].set(0.0)
    x = jnp.asarray(rng.normal(size=(16, 4)), jnp.float32)
    graph = jm.trace(apply, {"w": w}, x)
    config = jm.QuantConfig(activation_range=method)
    found = jm.calibrate({"w": w}, graph, [x], config, progress=False)
    scales = np.asarray(found.activations["w/tanh"].scale)
    assert scales.shape == (3,) and scales[2] >= max(scales[:2]) > 1e-3
