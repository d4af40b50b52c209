"""Bias correction, against means measured apart from it and against plain arithmetic."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

import jaxmet as jm
import zoo
from folds import affine
from jaxmet.engine.run.segments import Segment
from jaxmet.tree.named_leaves import named_leaves, replace_leaves

KEY = jax.random.key(5)
correct = partial(jm.correct_bias, progress=False)


def model(name, front=None):
    apply, params, _ = zoo.model(name, front)
    return apply, params, zoo.traced(name, front)


def weights_only(graph, bits=4, **fields):
    """Grids for every weight and for nothing else; coarse, so that means move."""
    return jm.Quantizers(
        {
            s.weight.name or s.name: jm.Quantizer(
                bits=bits, axis=s.weight.out_axes or None, **fields
            )
            for s in graph.layers
        },
        derived=tuple(s.name for s in graph.layers if s.weight.name is None),
    )


def data(name, batches, size=8, seed=0):
    """Batches like the inputs of a case, not centred."""
    _, _, inputs = zoo.model(name)
    rng = np.random.default_rng(seed)
    shape = (batches, size, *inputs[0].shape[1:])
    return [jax.device_put(np.float32(x)) for x in rng.normal(0.3, 1.0, shape)]


class Watch:
    """What nodes compute over all batches, run as one program: (…, channels), float64."""

    def __init__(self, apply, graph, batches, nodes):
        self.nodes, self.batches = list(nodes), batches
        self.features = {n: graph[n].features for n in self.nodes}

        def hook(node, run, operands):
            result = run(*operands)
            return result, (result if node.name in self.nodes else None)

        self.run = jax.jit(jm.evaluate(apply, hook))

    def __call__(self, params):
        seen = [self.run(params, batch)[1] for batch in self.batches]
        return {n: np.concatenate([np.float64(s[n]) for s in seen]) for n in self.nodes}

    def shifts(self, reference, params):
        """By node the largest mean error of a channel in that channel's deviations."""
        exact, noisy, found = self(reference), self(params), {}
        for name in self.nodes:
            y, error = exact[name], noisy[name] - exact[name]
            rest = tuple(i for i in range(y.ndim) if i not in self.features[name])
            found[name] = np.max(np.abs(error.mean(rest)) / y.std(rest))
        return found


def kept_at(graph):
    """The node at which each layer's mean is kept: itself, or the norm that reads it."""
    return {s.name: s.name if s.bias else s.only_consumers[0] for s in graph.layers}


# With data


CORRECTED = [
    "inverted_residual",
    "remat",
    "standardized",
    "einsum_biased",
]


def einsum_biased():
    """Heads with a bias for each of two feature axes."""

    def apply(p, x):
        y = jnp.einsum("bi,ihd->bhd", x, p["heads"]["w"]) + p["heads"]["b"][None]
        return (
            jnp.einsum("bhd,hdo->bo", jax.nn.relu(y), p["out"]["w"])
            + p["out"]["b"][None]
        )

    rng = np.random.default_rng(2)
    shapes = {
        "heads": {"w": (6, 3, 4), "b": (3, 4)},
        "out": {"w": (3, 4, 5), "b": (5,)},
    }
    draw = lambda shape: jax.device_put(np.float32(rng.normal(size=shape)))
    params = jax.tree.map(draw, shapes, is_leaf=lambda s: isinstance(s, tuple))
    x = [jax.device_put(np.float32(rng.normal(0.4, 1, (16, 6)))) for _ in range(2)]
    return apply, params, jm.trace(apply, params, x[0]), x


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", CORRECTED)
def test_no_mean_is_shifted_afterwards(name):
    """Measured by whole programs, in float64, in units of each channel's deviation."""
    if name == "einsum_biased":
        apply, params, graph, batches = einsum_biased()
    else:
        apply, params, graph = model(name)
        batches = data(name, 3, size=4)
    if name == "standardized":  # its convolution has no bias and no norm
        graph = graph.without("conv")
    quantizers = weights_only(graph)
    at = kept_at(graph)
    watch = Watch(apply, graph, batches, at.values())
    before = watch.shifts(params, jm.round_weights(params, quantizers))
    new, report = correct(params, graph, quantizers, batches, with_report=True)
    after = watch.shifts(params, jm.round_weights(new, quantizers))
    assert max(before.values()) > 1e-2
    assert all(v < 1e-5 for v in after.values()), after
    rows = {r["layer"]: r for r in report}
    assert {n for n, r in rows.items() if r["note"] is None} == set(at)
    biases = {r["into"] for r in report}
    old = named_leaves(params)
    for leaf, value in named_leaves(new).items():
        assert (leaf in biases) == (not np.array_equal(value, old[leaf]))
    first = graph.layers[0].name
    assert rows[first]["in deviations"] == pytest.approx(before[at[first]], rel=1e-3)


def plain_mlp():
    rng = np.random.default_rng(3)
    sizes = [6, 9, 8, 5]
    params = {
        f"layer{i}": {
            "w": jax.device_put(np.float32(rng.normal(size=(a, b)))),
            "b": jax.device_put(np.float32(rng.normal(size=(b,)))),
        }
        for i, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False))
    }

    def apply(p, x):
        for i in range(3):
            x = x @ p[f"layer{i}"]["w"] + p[f"layer{i}"]["b"][None]
            x = jax.nn.relu(x) if i < 2 else x
        return x

    x = jax.device_put(np.float32(rng.normal(0.3, 1.0, (40, 6))))
    return apply, params, jm.trace(apply, params, x), x


def grid(x, q):
    """A tensor on the grid of a calibrated quantizer, in float64."""
    scale = np.float64(q.scale)
    zero = 0.0 if q.zero_point is None else np.float64(q.zero_point)
    low, high = q.ends
    return scale * (np.clip(np.round(x / scale) + zero, low, high) - zero)


@pytest.mark.parametrize("of", ["weights", "both"])
def test_each_layer_sees_corrected_predecessors(of):
    """Against the same by hand, one layer after the other in float64."""
    apply, params, graph, x = plain_mlp()
    config = jm.QuantConfig(weight_bits=3, activation_bits=5, per_channel=False)
    quantizers = jm.calibrate(params, graph, [x], config, progress=False).pin(params)
    new = correct(params, graph, quantizers, jm.batched(x, 16), of=of)
    on = lambda name, y: grid(y, quantizers.activation(name)) if of == "both" else y
    exact, noisy = np.float64(x), on("input", np.float64(x))
    for i in range(3):
        w, b = (np.float64(params[f"layer{i}"][k]) for k in "wb")
        exact = exact @ w + b
        noisy = noisy @ grid(w, quantizers.weights[f"layer{i}/w"]) + b
        shift = (noisy - exact).mean(0)
        assert np.abs(shift).max() > 1e-2
        np.testing.assert_allclose(new[f"layer{i}"]["b"], b - shift, atol=2e-5)
        np.testing.assert_array_equal(new[f"layer{i}"]["w"], params[f"layer{i}"]["w"])
        noisy = noisy - shift
        if i < 2:
            exact = np.maximum(exact, 0)
            noisy = on(f"layer{i}/relu", np.maximum(noisy, 0))


def test_batches_in_every_form_give_the_same():
    apply, params, graph, x = plain_mlp()
    quantizers = weights_only(graph)
    wanted = correct(params, graph, quantizers, jm.batched(x, 16))
    assert not np.array_equal(wanted["layer0"]["b"], params["layer0"]["b"])
    yields = ({"x": x[i : i + 20], "y": 1} for i in (0, 20))
    others = [
        correct(params, graph, quantizers, jm.batched(x, 16), store="host"),
        correct(params, graph, quantizers, [x[:16], np.asarray(x[16:])]),
        correct(params, graph, quantizers, yields, inputs=lambda b: b["x"]),
    ]
    for other in others:
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, atol=3e-6)


def test_several_inputs_and_one_image():
    _, params, graph = model("two_inputs")
    batches = [(jnp.full((1, 6), 0.5), jnp.full((1, 5), -0.5))]
    new, report = correct(params, graph, weights_only(graph), batches, with_report=True)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(new))
    assert [r["into"] for r in report] == ["left/b", "right/b", "head/b"]


def test_keyword_arguments_reach_the_model():
    def apply(p, x, *, sign):
        return (x * sign) @ p["a"]["w"] + p["a"]["b"][None]

    params = {"a": {"w": jnp.array([[0.3], [1.0]]), "b": jnp.zeros(1)}}
    x = jnp.ones((2, 2))
    graph = jm.trace(apply, params, x, sign=jnp.float32(1))
    quantizers = jm.Quantizers({"a/w": jm.Quantizer(bits=2)})
    for sign in (1.0, -1.0):
        new = correct(params, graph, quantizers, [x], sign=jnp.float32(sign))
        np.testing.assert_allclose(new["a"]["b"], [sign * 0.3], atol=1e-6)


@pytest.mark.parametrize(("of", "programs"), [("weights", 1), ("both", 2)])
def test_each_piece_is_traced_once(of, programs, monkeypatch):
    """Float and quantized copies share a program where only the weights differ."""
    apply, params, graph = model("residual")
    batches = data("residual", 4)
    quantizers = jm.calibrate(params, graph, batches, progress=False)
    traced, call = [], Segment.__call__

    def counted(self, *arguments):
        traced.append(self.name)
        return call(self, *arguments)

    monkeypatch.setattr(Segment, "__call__", counted)
    correct(params, graph, quantizers, batches, of=of)
    assert sorted(traced) == sorted(["conv1", "conv2"] * programs)


def test_each_copy_runs_over_the_data_once():
    """Two float passes' worth of work, of the four that are allowed."""
    runs = []

    def apply(p, x):
        for i in range(3):
            x = jax.nn.relu(x @ p[f"{i}"]["w"] + p[f"{i}"]["b"][None])
            shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
            note = lambda v, i=i: (runs.append(i), np.asarray(v))[1]
            x = jax.pure_callback(note, shape, x)
        return x

    rng = np.random.default_rng(0)
    params = {
        f"{i}": {
            "w": jax.device_put(np.float32(rng.normal(size=(4, 4)))),
            "b": jnp.ones(4),
        }
        for i in range(3)
    }
    x = jax.device_put(np.float32(rng.normal(size=(6, 4))))
    graph = jm.trace(apply, params, x)
    correct(params, graph, weights_only(graph), jm.batched(x, 2))
    jax.effects_barrier()
    assert 0 < max(runs.count(i) for i in range(3)) <= 2 * 3


# Where the shift goes


def test_what_cannot_be_corrected_is_left_alone_and_said():
    expected = {
        "tied": {
            "shared:0": None,
            "shared:1": None,
            "head": None,
        },
        "scan": {"stack/dense": "inside a scan", "head": None},
        "rnn": {
            "rnn/cell/i": "inside a scan",
            "rnn/cell/h": "inside a scan",
            "head": None,
        },
        "cond": {"low": "inside a cond", "high": "inside a cond", "head": None},
        "embedding": {"embed": "a lookup", "first": None, "second": None},
        "einsum_heads": {"project": "no norm alone", "merge": "no norm alone"},
    }
    for name, layers in expected.items():
        apply, params, graph = model(name)
        inputs = zoo.model(name)[2]
        new, report = correct(
            params, graph, weights_only(graph), [inputs], with_report=True
        )
        notes = {r["layer"]: r["note"] for r in report}
        assert set(notes) == set(layers)
        for layer, why in layers.items():
            assert (notes[layer] is None) == (why is None)
            assert why is None or why in notes[layer]
        into = {r["into"] for r in report}
        old = named_leaves(params)
        changed = [
            n for n, v in named_leaves(new).items() if not np.array_equal(v, old[n])
        ]
        assert set(changed) == into - {None}
        done = sum(note is None for note in notes.values())
        assert report.title == f"bias corrected at {done} of {len(notes)} layers"


def test_a_layer_that_was_asked_for_by_name_raises():
    _, params, graph = model("tied")
    with pytest.raises(ValueError, match=r"correct_bias: .*'shared:0'.*used elsewhere"):
        correct(params, graph.only("shared:0"), weights_only(graph), [jnp.ones((2, 6))])
    _, params, graph = model("inverted_residual")
    with pytest.raises(ValueError, match=r"'expand'.*expand_bn: not selected"):
        correct(
            params, graph.only("expand"), weights_only(graph), [jnp.ones((1, 8, 8, 4))]
        )


def test_only_what_is_selected_and_quantized_changes():
    _, params, graph = model("grouped")
    quantizers = weights_only(graph).set("point/kernel", enabled=False)
    new, report = correct(
        params,
        graph.without("stem"),
        quantizers,
        data("grouped", 1),
        with_report=True,
    )
    old = named_leaves(params)
    changed = [n for n, v in named_leaves(new).items() if not np.array_equal(v, old[n])]
    assert changed == ["depthwise/bias", "grouped/bias"]
    assert "not quantized" in report.where(layer="point")["note"][0]


def test_thirty_two_bits_change_nothing():
    _, params, graph = model("residual")
    new = correct(params, graph, weights_only(graph, bits=32), data("residual", 1))
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_before_and_after_equalizing():
    """Both orders run; bounds stay, and after equalizing means are right as well."""
    apply, params, graph = model("inverted_residual")
    images = data("inverted_residual", 2)
    params = jm.fold_batch_norm(params, graph)
    quantizers = weights_only(graph)
    cle = partial(jm.equalize, graph=graph, objective="range", progress=False)
    known = {"graph": graph, "quantizers": quantizers, "progress": False}
    fix = partial(jm.correct_bias, batches=images, **known)
    equalized = cle(params)
    corrected = fix(equalized)
    run = jax.jit(jm.lift(apply))
    for tree in (cle(fix(params)), corrected, jm.correct_bias(equalized, **known)):
        leaf = named_leaves(tree)["expand/kernel"]
        assert isinstance(leaf, jm.Compressed) and leaf.upper is not None
        assert np.all(np.isfinite(run(tree, images[0])))
    watch = Watch(apply, graph, images, kept_at(graph).values())
    found = watch.shifts(equalized, jm.round_weights(corrected, quantizers))
    assert all(v < 1e-5 for v in found.values())


def test_folded_or_not_the_norm_takes_what_its_gain_makes_of_the_shift():
    apply, params, graph = model("conv_bn_relu")
    leaves = named_leaves(params)
    images = data("conv_bn_relu", 1)
    bare = {k: dict(v) for k, v in params["params"].items()}
    bare["stem"].pop("bias")
    apply = without_stem_bias()
    params = {"params": bare, "batch_stats": params["batch_stats"]}
    graph = jm.trace(apply, params, images[0])
    quantizers = weights_only(graph)
    new = named_leaves(correct(params, graph, quantizers, images))
    rounded = jm.round_weights(params, quantizers)
    watch = Watch(apply, graph, images, ["stem"])
    shift = (watch(rounded)["stem"] - watch(params)["stem"]).mean((0, 1, 2))
    gain = np.float64(leaves["stem_bn/scale"]) / np.sqrt(
        np.float64(leaves["stem_bn/var"]) + 1e-3
    )
    expected = np.float64(leaves["stem_bn/bias"]) - gain * shift
    assert np.abs(gain * shift).max() > 1e-3
    np.testing.assert_allclose(new["stem_bn/bias"], expected, atol=1e-6)
    for name in ("stem_bn/mean", "stem_bn/var", "stem_bn/scale", "stem/kernel"):
        np.testing.assert_array_equal(new[name], leaves[name])


def without_stem_bias():
    def apply(variables, x):
        p, s = variables["params"], variables["batch_stats"]["stem_bn"]
        layout = ("NHWC", "HWIO", "NHWC")
        conv = partial(
            jax.lax.conv_general_dilated,
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=layout,
        )
        norm = {**p["stem_bn"], "mean": s["mean"], "var": s["var"]}
        y = affine(norm, conv(x, p["stem"]["kernel"]), shape=(1, 1, 1, -1))
        y = conv(jax.nn.relu(y), p["head"]["kernel"])
        return y + p["head"]["bias"][None, None, None]

    return apply


# What counts as float


def test_rounded_weights_need_the_tree_from_before():
    apply, params, graph, x = plain_mlp()
    quantizers = weights_only(graph).pin(params)
    rounded = jm.round_weights(params, quantizers)
    alone = correct(rounded, graph, quantizers, [x])
    wanted = correct(params, graph, quantizers, [x])
    for reference in (params, (lambda p, x: apply(p, x), params)):
        given = correct(rounded, graph, quantizers, [x], reference=reference)
        for i in range(3):
            layer = f"layer{i}"
            np.testing.assert_allclose(given[layer]["b"], wanted[layer]["b"], atol=2e-6)
            np.testing.assert_array_equal(alone[layer]["b"], rounded[layer]["b"])
            assert np.abs(wanted[layer]["b"] - params[layer]["b"]).max() > 1e-3


def test_a_second_correction_finds_nothing_with_the_first_tree_as_reference():
    _, params, graph, x = plain_mlp()
    quantizers = weights_only(graph)
    once = correct(params, graph, quantizers, [x])
    twice = correct(once, graph, quantizers, [x], reference=params)
    for a, b in zip(jax.tree.leaves(twice), jax.tree.leaves(once), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_a_reference_of_other_scales_is_refused():
    _, params, graph, x = plain_mlp()
    other = {**params, "layer1": {**params["layer1"], "w": params["layer1"]["w"] * 3.0}}
    message = r"correct_bias: 'layer1/w' of the reference is scaled in another way"
    with pytest.raises(ValueError, match=message):
        correct(params, graph, weights_only(graph), [x], reference=other)


def test_a_reference_without_the_nodes_is_refused():
    _, params, graph, x = plain_mlp()

    def other(p, x):
        return x @ p["layer0"]["w"] + p["layer0"]["b"][None]

    with pytest.raises(ValueError, match="has no node 'layer1'"):
        correct(params, graph, weights_only(graph), [x], reference=(other, params))


# Without data


def norm_then(product, activation, beta, gamma):
    """A norm with these outputs, an activation, and a product with weight and bias."""
    ones = jnp.ones(len(beta))
    params = {
        "first": {"w": jnp.eye(len(beta))},
        "norm": {
            "mean": 0.0 * ones,
            "var": 1e6 * ones,  # so that epsilon says nothing
            "scale": jax.device_put(np.float32(gamma)),
            "bias": jax.device_put(np.float32(beta)),
        },
    }

    def apply(p, x):
        shape = (1,) * (x.ndim - 1) + (-1,)
        return product(
            p["second"], activation(affine(p["norm"], x @ p["first"]["w"], shape=shape))
        )

    return apply, params


def conv_with_bias(p, x, groups=1):
    y = jax.lax.conv_general_dilated(
        x,
        p["w"],
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    return y + p["b"][None, None, None]


@pytest.mark.parametrize(
    ("activation", "wanted"), [(jax.nn.relu, -0.3135972), (lambda x: x, 8.0)]
)
def test_goldens(activation, wanted):
    """Weights that are all rounded up by one, as in AIMET's own test."""
    apply, params = norm_then(conv_with_bias, activation, [-2, 1], [1, 3])
    integers = np.random.default_rng(0).integers(50, 100, (3, 1, 2, 3))
    kernel = jax.device_put(np.float32(integers))
    exact = kernel - 1.0
    params["second"] = {"w": kernel, "b": jnp.full(3, 5.0)}
    reference = {**params, "second": {"w": exact, "b": jnp.full(3, 5.0)}}
    graph = jm.trace(apply, params, jnp.ones((1, 4, 4, 2)))
    grid = jm.Quantizer(scale=jnp.float32(1.0), bits=8)
    quantizers = jm.Quantizers({"second/w": grid})
    new = correct(params, graph, quantizers, reference=reference)
    np.testing.assert_allclose(new["second"]["b"], [wanted] * 3, atol=2e-6)


def expectation(function, mean, deviation):
    """E f(z) of a normal z, by quadrature in float64."""
    density = lambda z: function(z) * stats.norm.pdf(z, mean, deviation)
    ends = mean - 12 * deviation, mean + 12 * deviation
    points = [p for p in (0.0, 6.0) if ends[0] < p < ends[1]]
    return integrate.quad(density, *ends, points=points, limit=200)[0]


FUNCTIONS = {
    "relu": (jax.nn.relu, lambda z: max(z, 0.0)),
    "relu6": (jax.nn.relu6, lambda z: min(max(z, 0.0), 6.0)),
    "leaky_relu": (jax.nn.leaky_relu, lambda z: z if z > 0 else 0.01 * z),
    "silu": (jax.nn.silu, lambda z: z / (1 + np.exp(-z))),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_mean_inputs_through_activations(name, groups):
    """Against quadrature, with a negative gain and groups of channels."""
    activation, function = FUNCTIONS[name]
    beta, gamma = [0.4, -1.0, 5.0, 0.0], [-1.3, 2.0, 1.5, 0.7]
    product = partial(conv_with_bias, groups=groups)
    apply, params = norm_then(product, activation, beta, gamma)
    rng = np.random.default_rng(1)
    kernel = rng.normal(size=(3, 3, 4 // groups, 8)).astype(np.float32)
    params["second"] = {
        "w": jnp.asarray(kernel),
        "b": jax.device_put(np.float32(rng.normal(size=8))),
    }
    graph = jm.trace(apply, params, jnp.ones((1, 5, 5, 4)))
    step = 0.4
    quantizers = jm.Quantizers(
        {"second/w": jm.Quantizer(scale=jnp.float32(step), bits=8)}
    )
    new, report = correct(params, graph, quantizers, with_report=True)
    error = np.float64(np.float32(step)) * np.round(
        kernel / np.float32(step)
    ) - np.float64(kernel)
    mean = [expectation(function, b, abs(g)) for b, g in zip(beta, gamma, strict=True)]
    error = error.sum((0, 1))  # (inputs of a group, outputs)
    shift = np.zeros(8)
    for o in range(8):
        group = o // (8 // groups)
        inputs = range(group * (4 // groups), (group + 1) * (4 // groups))
        shift[o] = sum(error[k, o] * mean[i] for k, i in enumerate(inputs))
    expected = np.float64(params["second"]["b"]) - shift
    atol = 1e-5 if name != "silu" else 2e-3
    np.testing.assert_allclose(new["second"]["b"], expected, atol=atol)
    assert np.abs(shift).max() > 0.1
    notes = {r["layer"]: r["note"] for r in report}
    assert notes["second"] is None and "not quantized" in notes["first"]


def test_without_data_shifts_go_through_norms_and_unknown_inputs_are_listed():
    apply, params, graph = model("inverted_residual")
    quantizers = weights_only(graph)
    new, report = correct(params, graph, quantizers, with_report=True)
    rows = {r["layer"]: r for r in report}
    assert "skipped" in rows["expand"]["note"] and rows["expand"]["into"] is None
    assert rows["depthwise"]["into"] == "depthwise_bn/bias"
    p, q = named_leaves(params), named_leaves(jm.round_weights(params, quantizers))
    p, q = ({k: np.float64(v) for k, v in x.items()} for x in (p, q))
    error = (q["depthwise/kernel"] - p["depthwise/kernel"]).sum((0, 1, 2))
    share = p["expand_bn/var"] / (p["expand_bn/var"] + 1e-3)
    deviation = np.abs(p["expand_bn/scale"]) * np.sqrt(share)
    relu6 = FUNCTIONS["relu6"][1]
    pairs = zip(p["expand_bn/bias"], deviation, strict=True)
    mean = np.array([expectation(relu6, b, s) for b, s in pairs])
    gain = p["depthwise_bn/scale"] / np.sqrt(p["depthwise_bn/var"] + 1e-3)
    found = named_leaves(new)["depthwise_bn/bias"]
    np.testing.assert_allclose(
        found, p["depthwise_bn/bias"] - gain * error * mean, atol=1e-5
    )
    np.testing.assert_array_equal(
        named_leaves(new)["expand_bn/bias"], p["expand_bn/bias"]
    )


def test_without_data_most_of_the_shift_goes():
    """On data whose statistics the norms know."""
    apply, params, graph = model("inverted_residual")
    images = data("inverted_residual", 4)
    norms = [n for n in graph.nodes if n.norm is not None]
    watch = Watch(apply, graph, images, [n.inputs[0].node for n in norms])
    for node in norms:  # each after those before it
        y = watch(params)[node.inputs[0].node].reshape(-1, 8 if node != norms[2] else 4)
        moments = {node.norm.mean: y.mean(0), node.norm.variance: y.var(0)}
        moments = {name: jax.device_put(np.float32(v)) for name, v in moments.items()}
        params = replace_leaves(params, moments)
    quantizers = weights_only(graph.without("expand"))
    new = correct(params, graph, quantizers)
    watch = Watch(apply, graph, images, ["depthwise_bn", "project_bn"])
    before = watch.shifts(params, jm.round_weights(params, quantizers))
    after = watch.shifts(params, jm.round_weights(new, quantizers))
    assert all(after[n] < 0.5 * before[n] for n in before), (before, after)


# Other numbers


def test_int32_biases():
    """The corrected bias goes on its own quantizer; what is left is half a step of it."""
    apply, params, graph, x = plain_mlp()
    config = jm.QuantConfig(weight_bits=4, bias="int32")
    quantizers = jm.calibrate(params, graph, [x], config, progress=False)
    new = correct(params, graph, quantizers, [x], of="both")
    weights = {n: q for n, q in quantizers.weights.items() if q.product is None}
    assert len(weights) < len(quantizers.weights)
    float_bias = dataclasses.replace(quantizers, weights=weights)
    wanted = correct(params, graph, float_bias, [x], of="both")
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    device = jax.jit(jm.simulate(apply, quantizers))
    exact = np.float64(apply(params, x))
    error = np.float64(device(new, x)) - exact
    old = np.float64(device(params, x)) - exact
    grid = float(quantizers.activations["layer2"].scale)
    assert np.abs(error.mean(0)).max() < 0.3 * grid < np.abs(old.mean(0)).max()


def test_bfloat16_trees_keep_their_type():
    apply, params, graph, x = plain_mlp()
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    x = x.astype(jnp.bfloat16)
    graph = jm.trace(apply, half, x)
    quantizers = weights_only(graph)
    new = correct(half, graph, quantizers, [x])
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(new))
    watch = Watch(apply, graph, [x], ["layer0", "layer1", "layer2"])
    before = watch.shifts(half, jm.round_weights(half, quantizers))
    after = watch.shifts(half, jm.round_weights(new, quantizers))
    assert all(after[n] < 1e-2 and after[n] < 0.2 * before[n] for n in before)


def test_dead_channels_stay_finite():
    _, params, graph, x = plain_mlp()
    dead = params["layer0"]["w"].at[:, 2].set(0.0)
    params = {**params, "layer0": {"w": dead, "b": params["layer0"]["b"]}}
    new, report = correct(params, graph, weights_only(graph), [x], with_report=True)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(new))
    assert all(np.isfinite(v) for v in report["in deviations"])
    assert new["layer0"]["b"][2] == params["layer0"]["b"][2]


# Refusals


def test_refusals():
    _, params, graph, x = plain_mlp()
    quantizers = weights_only(graph)
    for message, arguments, options in [
        (r"of is 'activations'", (quantizers, [x]), {"of": "activations"}),
        (r"store is 'disk'", (quantizers, [x]), {"store": "disk"}),
        (r"of='both' needs batches", (quantizers,), {"of": "both"}),
        (r"batches is", (quantizers, x), {}),
        (r"batches is empty", (quantizers, []), {}),
        (r"did not accept .*inputs=lambda", (quantizers, [(x, x)]), {}),
        (r"NaN", (quantizers, [x * jnp.nan]), {}),
        (r"there is no data.*layer0: .*layer1: ", (quantizers,), {}),
    ]:
        with pytest.raises(ValueError, match=rf"jaxmet\.correct_bias: .*{message}"):
            correct(params, graph, *arguments, **options)
