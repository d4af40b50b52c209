"""What a graph says of a model: weights, biases, norms, clips, edges, and what it left."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmet import Compressed, Graph, evaluate, trace
from jaxmet.engine.graph.node import Convolution
from jaxmet.tree.named_leaves import named_leaves, replace_leaves
from zoo import CASES, model, traced

RUNS = [(name, front) for name, case in CASES.items() for front in case.frontends]
FIRST = [(name, case.frontends[0]) for name, case in CASES.items()]


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def layer(apply, weight, x, **more):
    """The only layer of `apply(p, x)`, whose weight is p['w']."""
    [node] = trace(apply, {"w": weight, **more}, x).layers
    return node


# Weights through views: (use, shape of the parameter, shape of x) and what is found.

NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")


def convolved(x, w, layout=NHWC, strides=(1, 1), padding="SAME", **kw):
    return jax.lax.conv_general_dilated(
        x, w, strides, padding, dimension_numbers=layout, **kw
    )


def in_order(*axes):
    return dict(zip(("out_axes", "in_axes", "window_axes"), axes, strict=True))


VIEWS = {
    "matmul": (lambda w, x: x @ w, (6, 4), (2, 6), (), in_order((1,), (0,), ())),
    "on the left": (
        lambda w, x: w @ x.T,
        (4, 6),
        (2, 6),
        (),
        in_order((0,), (1,), ()),
    ),
    "transposed": (
        lambda w, x: x @ w.T,
        (4, 6),
        (2, 6),
        ("transpose",),
        in_order((0,), (1,), ()),
    ),
    "cast": (
        lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16),
        (6, 4),
        (2, 6),
        ("convert_element_type",),
        in_order((1,), (0,), ()),
    ),
    "stopped": (
        lambda w, x: x @ jax.lax.stop_gradient(w),
        (6, 4),
        (2, 6),
        ("stop_gradient",),
        in_order((1,), (0,), ()),
    ),
    "reshaped": (
        lambda w, x: x @ w.reshape(6, 8),
        (2, 3, 8),
        (2, 6),
        ("reshape",),
        in_order((2,), (0, 1), ()),
    ),
    "several views": (
        lambda w, x: x @ w[0].T.reshape(6, 8),
        (1, 8, 2, 3),
        (2, 6),
        None,
        in_order((1,), (2, 3), (0,)),
    ),
    "heads": (
        lambda w, x: jnp.einsum("btd,dhk->bthk", x, w),
        (6, 2, 4),
        (2, 5, 6),
        (),
        in_order((1, 2), (0,), ()),
    ),
    "heads summed": (
        lambda w, x: jnp.einsum("bthk,hko->bto", x, w),
        (2, 4, 5),
        (2, 3, 2, 4),
        (),
        in_order((2,), (0, 1), ()),
    ),
    "vmapped over rows": (
        lambda w, x: jax.vmap(lambda row: row @ w)(x),
        (6, 4),
        (2, 6),
        (),
        in_order((1,), (0,), ()),
    ),
    "in a jitted call": (
        lambda w, x: jax.jit(jnp.matmul)(x, w),
        (6, 4),
        (2, 6),
        (),
        in_order((1,), (0,), ()),
    ),
    "conv": (convolved, None, None, (), in_order((3,), (2,), (0, 1))),
    "conv, channels first": (
        lambda w, x: convolved(jnp.transpose(x, (0, 3, 1, 2)), w, NCHW),
        (4, 6, 3, 3),
        (2, 8, 8, 6),
        (),
        in_order((0,), (1,), (2, 3)),
    ),
    "conv, kernel transposed": (
        lambda w, x: convolved(x, jnp.transpose(w, (2, 3, 1, 0))),
        (4, 6, 3, 3),
        (2, 8, 8, 6),
        ("transpose",),
        in_order((0,), (1,), (2, 3)),
    ),
    "conv, one dimension": (
        lambda w, x: jax.lax.conv_general_dilated(
            x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        (3, 6, 4),
        (2, 8, 6),
        (),
        in_order((2,), (1,), (0,)),
    ),
    "dense as a convolution": (
        lambda w, x: convolved(x, w[None, None]),
        (6, 4),
        (2, 8, 8, 6),
        ("broadcast_in_dim",),
        in_order((1,), (0,), ()),
    ),
}
VIEWS["conv"] = (
    lambda w, x: convolved(x, w),
    (3, 3, 6, 4),
    (2, 8, 8, 6),
    *VIEWS["conv"][3:],
)


@pytest.mark.parametrize("name", VIEWS)
def test_a_weight_is_found_through_its_views(name):
    use, shape, x, views, axes = VIEWS[name]
    node = layer(lambda p, x: use(p["w"], x), spec(*shape), spec(*x))
    weight = node.weight
    assert (weight.name, weight.parameters) == ("w", ("w",))
    assert not weight.stacked and not weight.shared
    found = {key: getattr(weight, key) for key in axes}
    assert found == axes
    if views is None:
        assert {"reshape", "transpose"} < {*weight.views}
    else:
        assert weight.views == views


@pytest.mark.parametrize("name", VIEWS)
def test_features_are_where_the_outputs_of_the_weight_are(name):
    """Moving one index of an output axis moves that feature alone; in_features too."""
    use, shape, x_shape, _, _ = VIEWS[name]
    rng = np.random.default_rng(0)
    w, x = (jax.device_put(np.float32(rng.normal(size=s))) for s in (shape, x_shape))

    seen = {}

    def hook(node, run, operands):
        if node.is_layer:
            seen["x"] = np.asarray(operands[0], np.float32)
            seen["y"] = np.asarray(run(*operands), np.float32)
        return run(*operands), None

    def apply(p, x):
        return use(p["w"], x)

    node = layer(apply, w, x)
    run = evaluate(apply, hook)

    def result(w):
        run({"w": w}, x)
        return seen["y"]

    before, weight = result(w), node.weight
    assert len(node.features) == len(weight.out_axes)
    for axis, feature in zip(weight.out_axes, node.features, strict=True):
        changed = result(w.at[(slice(None),) * axis + (1,)].multiply(3.0)) != before
        others = tuple(i for i in range(before.ndim) if i != feature)
        expected = np.arange(before.shape[feature]) == 1
        np.testing.assert_array_equal(np.any(changed, axis=others), expected)

    # without one input channel in the weight, that channel of x means nothing
    summed = {seen["x"].shape[i] for i in node.in_features}
    assert np.prod([*summed]) == np.prod([w.shape[i] for i in weight.in_axes])


@pytest.mark.parametrize(("name", "front"), RUNS)
def test_every_parameter_is_read_by_a_node_or_listed(name, front):
    graph = traced(name, front)
    read = {p for node in graph.nodes for p in node.parameters}
    listed = {p for p, _ in graph.unread}
    every = {*named_leaves(model(name, front)[1])}
    assert {*graph.parameters} == every
    assert read | listed == every and not read & listed
    # haiku keeps more of a running average than inference reads
    assert all(p.endswith(("/counter", "/hidden")) and "_ema" in p for p in listed)


@pytest.mark.parametrize(("name", "front"), FIRST)
def test_operands_are_activations_first_and_then_parameters(name, front):
    apply, params, inputs = model(name, front)
    leaves, seen = named_leaves(params), {}

    def hook(node, run, operands):
        seen[node.name] = (node, operands)
        return run(*operands), None

    jax.eval_shape(evaluate(apply, hook), params, *inputs)
    assert {*seen} == {*CASES[name].nodes}
    for node, operands in seen.values():
        weight = node.weight
        if weight is None or weight.name is None or weight.views:
            continue
        shape = leaves[weight.name].shape
        assert operands[weight.operand].shape == shape
        assert operands[0].ndim > max(node.in_features, default=-1)
        if node.bias is not None:
            assert node.bias in node.parameters
            assert operands[-1].size == leaves[node.bias].size


def test_a_weight_that_is_used_twice_is_shared():
    graph = traced("tied")
    for name in ("shared:0", "shared:1"):
        weight = graph[name].weight
        assert weight.shared and weight.name == "shared/kernel"
    assert not graph["head"].weight.shared
    weight = traced("tied_embedding")["embed:1"].weight
    assert weight.shared and weight.name == "embed/embedding"
    assert (weight.out_axes, weight.in_axes) == ((0,), (1,))
    assert traced("tied_embedding")["embed:0"].kind == "lookup"


def test_a_penalty_on_a_weight_is_a_second_use():
    def apply(p, x):
        return x @ p["w"], jnp.sum(p["w"] ** 2)

    assert layer(apply, spec(6, 4), spec(2, 6)).weight.shared
    returned = layer(lambda p, x: (x @ p["w"], p["w"]), spec(6, 4), spec(2, 6))
    assert not returned.weight.shared


def test_a_sliced_weight_is_stacked():
    weight = traced("scan")["stack/dense"].weight
    assert weight.stacked and weight.name == "stack/dense/kernel"
    assert (weight.out_axes, weight.in_axes) == ((2,), (1,))
    assert traced("scan")["stack/dense"].region == ("scan",)
    assert traced("scan")["stack/dense"].layers == 3
    recurrent = traced("rnn")["rnn/cell/h"]
    assert not recurrent.weight.stacked and recurrent.layers is None


DERIVED = {
    "weight norm": lambda p: p["w"] * (p["g"] / jnp.linalg.norm(p["w"], axis=0))[None],
    "sum": lambda p: p["w"] + p["v"],
    "concatenation": lambda p: jnp.concatenate([p["w"][:, :2], p["v"][:, 2:]], axis=1),
    "product": lambda p: p["w"] @ p["w"].T @ p["v"],
    "low rank": lambda p: p["a"] @ p["b"],
    "scaled": lambda p: 2.0 * p["w"],
    "slice": lambda p: p["v"][:, ::2],
    "stack of two": lambda p: jnp.stack([p["w"], p["v"]])[0],
}


@pytest.mark.parametrize("name", DERIVED)
def test_a_weight_computed_from_parameters_is_derived(name):
    params = {
        "w": spec(6, 4),
        "v": spec(6, 4),
        "g": spec(4),
        "a": spec(6, 2),
        "b": spec(2, 4),
    }
    graph = trace(lambda p, x: x @ DERIVED[name](p), params, spec(2, 6))
    [node] = graph.layers
    assert node.weight.name is None and node.weight.parameters
    used = {*node.weight.parameters}
    assert used == {*node.parameters}
    assert {p for p, _ in graph.unread} == {*params} - used
    assert all(why == "unused" for _, why in graph.unread)


# Biases.


@pytest.mark.parametrize(
    ("add", "shape", "found", "derived"),
    [
        (lambda y, b: y + b[None], (4,), "b", False),
        (lambda y, b: b[None] + y, (4,), "b", False),
        (lambda y, b: y + b, (1, 4), "b", False),
        (lambda y, b: y + b.reshape(1, 4), (2, 2), "b", False),
        (lambda y, b: y.reshape(2, 2, 2) + b[None], (2, 2), "b", False),
        (lambda y, b: y + 2.0 * b[None], (4,), None, True),
        (lambda y, b: jax.nn.relu(y) + b[None], (4,), None, False),
        (lambda y, b: y + b, (2, 4), None, False),  # along the batch: no bias
        (lambda y, b: y * b[None], (4,), None, False),
    ],
)
def test_a_bias_belongs_to_its_product(add, shape, found, derived):
    node = layer(
        lambda p, x: add(x @ p["w"], p["b"]), spec(6, 4), spec(2, 6), b=spec(*shape)
    )
    assert (node.bias, node.derived_bias) == (found, derived)


def test_a_bias_that_two_results_share_is_not_taken_from_the_first():
    """The product itself is needed too, so the addition is a node of its own."""

    def apply(p, x):
        y = x @ p["w"]
        return y + p["b"][None], jnp.tanh(y)

    graph = trace(apply, {"w": spec(6, 4), "b": spec(4)}, spec(2, 6))
    assert graph["w"].bias is None
    assert graph["w/add"].parameters == ("b",)


# Norms.


def test_a_batch_norm_has_its_roles():
    norm = traced("conv_bn_relu")["stem_bn"].norm
    assert dataclasses.asdict(norm) == {
        "over": "stored",
        "mean": "stem_bn/mean",
        "variance": "stem_bn/var",
        "scale": "stem_bn/scale",
        "bias": "stem_bn/bias",
        "epsilon": pytest.approx(1e-3),
        "plain": True,
        "factor": 1.0,
        "debias": None,
    }
    assert traced("conv_bn_relu")["stem_bn"].features == (3,)


@pytest.mark.parametrize(
    ("normalize", "plain"),
    [
        (lambda x, m, v, g, b: (x - m) / jnp.sqrt(v + 1e-3) * g + b, True),
        (lambda x, m, v, g, b: (x - m) * (jax.lax.rsqrt(v + 1e-3) * g) + b, True),
        (lambda x, m, v, g, b: (x - m) * (g / jnp.sqrt(v + 1e-3)) + b, True),
        (lambda x, m, v, g, b: g * ((x - m) * jax.lax.rsqrt(1e-3 + v)) + b, True),
        (lambda x, m, v, g, b: (x - m) * (v + 1e-3) ** -0.5 * g + b, True),
        (lambda x, m, v, g, b: (x - m) / jnp.sqrt(v * v + 1e-3) * g + b, False),
    ],
)
def test_a_norm_is_known_in_its_usual_spellings(normalize, plain):
    def apply(p, x):
        y = x @ p["w"]
        return normalize(y, *(p[k][None] for k in ("mean", "var", "gain", "shift")))

    keys = ("mean", "var", "gain", "shift")
    params = {"w": spec(6, 4), **{k: spec(4) for k in keys}}
    graph = trace(apply, params, spec(2, 6))
    [norm] = [n.norm for n in graph.nodes if n.norm]
    assert (norm.over, norm.plain) == ("stored", plain)
    if plain:
        assert (norm.mean, norm.variance, norm.scale, norm.bias) == keys
        assert norm.epsilon == pytest.approx(1e-3)


def test_what_a_norm_runs_over():
    apply, params, inputs = model("conv_bn_relu", "linen")
    training = CASES["conv_bn_relu"].train_kwargs()
    assert trace(apply, params, *inputs, **training)["stem_bn"].norm.over == "batch"
    assert traced("group_norm")["gn"].norm.over == "data"
    assert traced("dense_norm")["ln1"].norm.over == "data"
    statistics = params["batch_stats"]

    def closed(trained, x):
        return apply({"params": trained, "batch_stats": statistics}, x)

    norm = trace(closed, params["params"], *inputs)["stem_bn"].norm
    assert norm.over == "constant"
    assert (norm.mean, norm.variance) == (None, None)
    assert (norm.scale, norm.bias) == ("stem_bn/scale", "stem_bn/bias")


# Activations, pools and convolutions.


def after_a_product(body):
    graph = trace(lambda p, x: body(x @ p["w"]), {"w": spec(6, 4)}, spec(2, 6))
    return [n for n in graph.nodes if n.kind not in ("input", "product", "output")]


@pytest.mark.parametrize(
    ("body", "function", "bounds", "slope"),
    [
        (jax.nn.relu, "relu", None, None),
        (lambda x: jnp.maximum(x, 0.0), "relu", None, None),
        (lambda x: jnp.maximum(0.0, x), "relu", None, None),
        (jax.nn.relu6, "clip", (0, 6), None),
        (lambda x: jnp.clip(x, -1.0, 2.0), "clip", (-1, 2), None),
        (lambda x: jax.lax.clamp(-3.0, x, 3.0), "clip", (-3, 3), None),
        (lambda x: jnp.minimum(jnp.maximum(x, 0.0), 4.0), "clip", (0, 4), None),
        (jax.nn.hard_tanh, "hard_tanh", None, None),
        (lambda x: jax.nn.leaky_relu(x, 0.25), "leaky_relu", None, 0.25),
        (lambda x: jnp.where(x < 0.0, 0.5 * x, x), "leaky_relu", None, 0.5),
        (lambda x: jnp.maximum(0.5 * x, x), "leaky_relu", None, 0.5),
        (jnp.tanh, "tanh", None, None),
        (jax.nn.sigmoid, "sigmoid", None, None),
        (jax.nn.silu, "silu", None, None),
        (lambda x: x * jax.nn.sigmoid(x), "silu", None, None),
        (jax.nn.gelu, "gelu", None, None),
        (lambda x: jax.nn.gelu(x, approximate=False), "gelu", None, None),
        (jax.nn.softmax, "softmax", None, None),
        (jax.nn.hard_swish, "hard_swish", None, None),
        (jax.nn.elu, "elu", None, None),
        (jax.nn.softplus, "softplus", None, None),
        (jax.nn.mish, "mish", None, None),
        (jnp.abs, "abs", None, None),
        (jnp.exp, "exp", None, None),
    ],
)
def test_activations_are_known_by_what_they_compute(body, function, bounds, slope):
    [node] = after_a_product(body)
    assert (node.kind, node.function) == ("activation", function)
    assert node.bounds == (None if bounds is None else pytest.approx(bounds))
    assert node.activation is not None
    assert node.activation.slope == (None if slope is None else pytest.approx(slope))


@pytest.mark.parametrize(
    "body",
    [
        lambda x: jnp.where(x > 0.0, 0.5 * x, x),  # the larger side is scaled
        lambda x: jnp.where(x > 1.0, x, 0.1 * x),
        lambda x: jnp.where(x > 0.0, x, 0.1 * jnp.exp(x)),
    ],
)
def test_what_is_no_leaky_relu_is_not_called_one(body):
    for node in after_a_product(body):
        assert node.function != "leaky_relu"


def test_a_strange_slope_keeps_its_function():
    """max(x, 2 x) is leaky from the other side: 2 x where x > 0."""
    [node] = after_a_product(lambda x: jnp.maximum(x, 2.0 * x))
    assert node.function not in ("leaky_relu", "relu")


def test_the_product_in_front_of_a_clip_carries_its_bounds():
    graph = traced("mobile")
    clips = {n.name: n.carrier for n in graph.nodes if n.bounds}
    assert clips == {name: name.removesuffix("/clip") for name in clips}
    assert len(clips) == 6
    assert graph["stem/clip"].features == graph["stem"].features
    assert traced("clip_after_add")["branch/clip"].carrier is None


@pytest.mark.parametrize(
    ("body", "kind", "function"),
    [
        (lambda x: jnp.mean(x, (1, 2)), "pool", "mean"),
        (lambda x: jnp.max(x, (1, 2)), "pool", "max"),
        (lambda x: jnp.sum(x, (1, 2)), "pool", "sum"),
        (
            lambda x: jax.lax.reduce_window(
                x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
            ),
            "pool",
            "max_pool",
        ),
        (
            lambda x: (
                jax.lax.reduce_window(
                    x, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
                )
                / 4.0
            ),
            "pool",
            "avg_pool",
        ),
        (
            lambda x: jax.image.resize(x, (2, 16, 16, 4), "bilinear"),
            "resize",
            "resize",
        ),
        (lambda x: jnp.concatenate([x, jnp.tanh(x)], -1), "concat", "concat"),
        (lambda x: x[..., :2] * x[..., 2:], "multiply", "mul"),
        (lambda x: x[..., :2] - x[..., 2:], "add", "sub"),
        (lambda x: jnp.einsum("bhwc,bhwd->bcd", x, x), "matmul", "dot"),
    ],
)
def test_other_kinds(body, kind, function):
    def apply(p, x):
        return body(convolved(x, p["w"]))

    graph = trace(apply, {"w": spec(3, 3, 3, 4)}, spec(2, 8, 8, 3))
    assert (kind, function) in [(n.kind, n.function) for n in graph.nodes]


def test_what_a_convolution_says():
    def found(name, node):
        return traced(name)[node].convolution

    plain = Convolution(
        1, (1, 1), (1, 1), (1, 1), ((1, 1), (1, 1)), (0, 3, 1, 2), (3, 2, 0, 1)
    )
    assert found("conv_bn_relu", "stem") == plain and plain.pads
    assert found("grouped", "grouped").groups == 2
    assert found("grouped", "depthwise").groups == 8
    assert found("strided", "second").strides == (2, 1)
    second = found("dilated", "second")
    assert (second.kernel_dilation, second.pads) == ((2, 1), False)
    assert found("transposed", "up").input_dilation == (2, 2)
    assert traced("global_pool")["head"].convolution is None


# Edges.


def reads(graph):
    return {n.name: [e.node for e in n.inputs] for n in graph.nodes if n.inputs}


def test_edges_by_hand():
    assert reads(traced("residual")) == {
        "conv1": ["input"],
        "bn1": ["conv1"],
        "conv1/relu": ["bn1"],
        "conv2": ["conv1/relu"],
        "bn2": ["conv2"],
        "conv2/add": ["bn2", "input"],
        "conv2/relu": ["conv2/add"],
        "output": ["conv2/relu"],
    }
    assert reads(traced("two_inputs", "plain"))["right/add"] == ["left/relu", "right"]
    assert reads(traced("concatenation"))["right/concat"] == ["left/relu", "right/relu"]
    assert reads(traced("transformer"))["attn/key/softmax"] == ["attn/key/matmul"]
    assert reads(traced("embedding"))["embed"] == ["input"]


def test_edges_cross_regions():
    assert reads(traced("remat"))["block/first"] == ["stem/relu"]
    assert {*reads(traced("cond"))["head"]} == {"low/relu", "high/relu"}
    # the first layer reads the input, all others the layer before
    assert {*reads(traced("scan"))["stack/dense"]} == {"input", "stack/dense/relu"}
    assert reads(traced("scan"))["head"] == ["stack/dense/relu"]
    assert reads(traced("rnn"))["rnn/cell/h"] == ["rnn/cell/h/tanh"]


def test_edges_list_the_moves_in_between():
    [edge] = traced("flatten")["head"].inputs
    assert (edge.node, edge.moves) == ("stem/relu", ("reshape",))
    [edge] = traced("residual")["conv1"].inputs
    assert edge.moves == ()


@pytest.mark.parametrize(("name", "front"), RUNS)
def test_edges_come_from_nodes_that_run_before(name, front):
    graph = traced(name, front)
    order = {n.name: i for i, n in enumerate(graph.nodes)}
    for node in graph.nodes:
        for edge in node.inputs:
            assert edge.node is None or edge.node in order
            loops = {"scan", "while"} & {*node.region}
            if edge.node is not None and not loops:
                assert order[edge.node] < order[node.name]
        for consumer in graph.consumers(node.name):
            assert node.name in [e.node for e in consumer.inputs]
    outputs = [n for n in graph.nodes if n.kind == "output"]
    assert all(n.inputs and n.inputs[0].node for n in outputs)


# The graph as an object.


def atoms_of(value):
    """Everything a graph is made of, apart from `apply`."""
    if dataclasses.is_dataclass(value):
        fields = [f.name for f in dataclasses.fields(value) if f.name != "apply"]
        for name in fields:
            yield from atoms_of(getattr(value, name))
    elif isinstance(value, (tuple, frozenset, dict)):
        for item in value:
            yield from atoms_of(item)
    else:
        yield value


@pytest.mark.parametrize(("name", "front"), FIRST)
def test_a_graph_holds_no_values(name, front):
    graph = traced(name, front)
    assert {type(other) for other in graph.others} == {Graph}  # of other trees
    kinds = {type(a) for a in atoms_of(dataclasses.replace(graph, others=()))}
    assert kinds <= {str, int, float, bool, type(None), jax.ShapeDtypeStruct}


def test_it_prints_as_a_table():
    expected = """\
10 nodes, 4 layers
node          kind    reads                  weight        channels
input         input   –                      –             –
stem          conv    input                  stem/kernel   stem
stem/relu     relu    stem                   –             –
left          conv    stem/relu              left/kernel   left
left/relu     relu    left                   –             –
right         conv    stem/relu              right/kernel  right
right/relu    relu    right                  –             –
right/concat  concat  left/relu, right/relu  –             –
merge         conv    right/concat           merge/kernel  –
output        output  merge                  –             –"""
    assert str(traced("concatenation")) == expected
    shown = str(traced("concatenation").only("stem", "left"))
    assert shown.splitlines()[0] == "10 nodes, 2 layers"
    assert [line.endswith("not selected") for line in shown.splitlines()[2:]] == [
        name not in ("stem", "stem/relu", "left", "left/relu")
        for name in CASES["concatenation"].nodes
    ]


def test_it_prints_what_is_shared_stacked_derived_and_left():
    assert "shared/kernel (shared)" in str(traced("tied"))
    assert "stack/dense/kernel (stacked)" in str(traced("scan"))
    assert "derived from conv/w, conv/gain" in str(traced("standardized", "plain"))
    assert "clip 0 to 6" in str(traced("clip_after_add"))
    assert "conv, groups 8" in str(traced("grouped"))
    assert "strides (2, 1)" in str(traced("strided"))

    def apply(p, x):
        return jax.lax.pad(x @ p["w"], p["odd"], ((0, 0, 0), (1, 1, 0)))

    params = {"w": spec(6, 4), "odd": spec(), "spare": spec(2)}
    graph = trace(apply, params, spec(2, 6))
    assert {*dict(graph.unread)} == {"odd", "spare"}
    assert dict(graph.unread)["spare"] == "unused"
    assert dict(graph.unread)["odd"] == "used by pad"
    notes = str(graph).partition("\nno layer reads\n")[2].splitlines()
    assert {"  spare (unused)", "  odd (used by pad)"} == {*notes}
    page = graph._repr_html_()
    assert page.startswith("<table>") and "<li>spare (unused)</li>" in page
    assert "<td>w</td>" in page


def test_only_and_without_choose_by_glob():
    graph = traced("resnet")

    def chosen(smaller):
        assert isinstance(smaller, Graph) and smaller.nodes == graph.nodes
        return [n.name for n in smaller.layers]

    block1 = ["block1/conv1", "block1/conv2"]
    assert chosen(graph.only("block1")) == block1
    assert chosen(graph.only("block1/*", "head")) == [*block1, "head"]
    assert chosen(graph.only("*conv2")) == ["block1/conv2", "block2/conv2"]
    rest = ["stem", "block2/conv1", "block2/conv2", "block2/proj", "head"]
    assert chosen(graph.without("block1")) == rest
    assert chosen(graph.only("block1").without("*conv1")) == ["block1/conv2"]
    assert chosen(graph.without("block1").only("*conv1")) == ["block2/conv1"]
    assert chosen(graph) == [*CASES["resnet"].layers]
    assert graph.only("stem", "block1/*").named == {"stem"}
    assert graph["stem"].name == "stem"
    assert [n.name for n in graph.consumers("stem/relu")] == [
        "block1/conv1",
        "block1/conv2/add",
    ]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda g: g.only("stam"), ["Graph.only", "'stam'", "'stem'"]),
        (lambda g: g.only("stem", "nothing*"), ["Graph.only", "'nothing*'"]),
        (lambda g: g.without("haed"), ["Graph.without", "'haed'", "'head'"]),
        (lambda g: g["haed"], ["Graph", "'haed'", "'head'"]),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(call, words):
    with pytest.raises(ValueError) as error:
        call(traced("resnet"))
    assert all(word in str(error.value) for word in ["jaxmet.", *words])


def test_leaves_are_refused_unless_the_graph_can_be_of_them():
    graph, (_, params, _) = traced("conv_bn_relu"), model("conv_bn_relu", "linen")
    leaves = graph.leaves(params, "test")
    assert leaves.keys() == named_leaves(params).keys()

    def refused(tree, *words):
        with pytest.raises(ValueError, match=r"^jaxmet\.test: ") as error:
            graph.leaves(tree, "test")
        assert all(word in str(error.value) for word in words), error.value

    kernel = leaves["stem/kernel"]
    wide = jnp.concatenate([kernel, kernel], axis=-1)
    refused(replace_leaves(params, {"stem/kernel": wide}), "'stem/kernel'", "16")
    bad = kernel.at[0].set(jnp.nan)
    refused(replace_leaves(params, {"stem/kernel": bad}), "'stem/kernel'", "NaN")
    bound = Compressed(kernel * jnp.inf, upper=jnp.full(8, 6.0))
    refused(replace_leaves(params, {"stem/kernel": bound}), "'stem/kernel'", "infinity")
    less = {"params": {"stem": params["params"]["stem"]}}
    refused(less, "'head/", "trace")
    assert graph.only("stem").leaves(less, "test").keys() == {
        "stem/kernel",
        "stem/bias",
    }
    fine = replace_leaves(params, {"stem/kernel": Compressed(kernel, jnp.zeros(8))})
    assert graph.leaves(fine, "test")["stem/kernel"].weight is kernel


# Refusals of trace.


def test_parameters_that_are_closed_over_are_refused():
    w = jnp.ones((6, 4))
    with pytest.raises(ValueError, match=r"^jaxmet\.trace: .*first argument of apply"):
        trace(lambda p, x: x @ w, {}, spec(2, 6))
    with pytest.raises(ValueError, match=r"closing over them"):
        trace(lambda x: x @ w, spec(2, 6))


@pytest.mark.parametrize(
    "apply",
    [
        lambda p, x: jnp.tanh(x),
        lambda p, x: x * p["w"][:1],
        lambda p, x: p["w"] @ p["w"].T,
        lambda p, x: x @ x.T,
    ],
)
def test_a_model_without_a_product_is_refused(apply):
    with pytest.raises(ValueError, match=r"^jaxmet\.trace: .*no product") as error:
        trace(apply, {"w": spec(4, 6)}, spec(2, 6))
    assert "1 parameters, 1 inputs" in str(error.value)


def test_one_product_that_is_closed_over_is_listed():
    w = jnp.ones((6, 5))
    graph = trace(lambda p, x: jnp.tanh(x @ w) @ p["w"], {"w": spec(5, 4)}, spec(2, 6))
    assert [n.name for n in graph.layers] == ["w"]
    [(name, why)] = graph.unread
    assert "6×5" in name and "closed over" in why


def test_a_module_in_place_of_its_apply_is_refused():
    from flax import linen as nn

    with pytest.raises(
        ValueError, match=r"^jaxmet\.trace: .*module\.apply|model\.apply"
    ):
        trace(nn.Dense(4), {}, spec(2, 6))


def test_shapes_do_for_parameters_and_inputs():
    apply, params, inputs = model("resnet", "linen")
    abstract = jax.tree.map(lambda x: spec(*x.shape, dtype=x.dtype), (params, inputs))
    graph = trace(apply, abstract[0], *abstract[1])
    assert graph.nodes == traced("resnet").nodes
    assert graph.groups == traced("resnet").groups
