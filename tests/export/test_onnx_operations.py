"""Operations beside others in integers: which of them onnxruntime computes in integers."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxmet as jm
from jaxmet.export.onnx_passes import fused

pytestmark = pytest.mark.slow
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("jax2onnx")

RNG = np.random.default_rng(0)
SIZES = {
    "a": (3, 3, 3, 8),
    "b": (3, 3, 8, 8),
    "wide": (3, 3, 16, 8),
    "dense": (8, 8),
    "bias": (8,),
    "heads": (8, 2, 4),
    "heads_bias": (2, 4),
    "out": (2, 4, 8),
    "table": (20, 8),
}
PARAMS = {
    name: jnp.asarray(RNG.normal(size=size) / 2, jnp.float32)
    for name, size in SIZES.items()
}
INPUTS = jnp.asarray(RNG.normal(size=(16, 8, 8, 3)), jnp.float32)
LAID = {"Transpose", "Reshape", "Flatten", "Slice", "Gather", "Tile", "Identity"}
LAID |= {
    "QuantizeLinear",
    "DequantizeLinear",
    "Shape",
    "Concat",
    "Squeeze",
    "Unsqueeze",
}


def conv(x, w):
    places = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=places)


def after(operation):
    """Between two convolutions."""
    return lambda p, x: conv(operation(conv(x, p["a"])), p["b"])


def of_two(operation, last="b"):
    """Of two convolutions, the second by a weight that the model derives."""
    both = lambda p, x: (conv(x, p["a"]), conv(x, 0.5 * p["a"]))
    return lambda p, x: conv(operation(*both(p, x)), p[last])


def tokens(p, x):
    return conv(x, p["a"]).reshape(x.shape[0], -1, 8)


def total(x):
    return lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def average(x):
    return total(x) / 4


def largest(x):
    sizes = (1, 2, 2, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, sizes, sizes, "VALID")


def dense(p, x):
    return tokens(p, x) @ p["dense"] + p["bias"][None, None]


def attention(p, x):
    t = tokens(p, x)
    heads = jnp.einsum("btd,dhc->bthc", t, p["heads"])
    q = heads + p["heads_bias"][None, None]
    k = jnp.einsum("btd,dhc->bthc", t, 1.1 * p["heads"])
    scores = jax.nn.softmax(jnp.einsum("bthc,bshc->bhts", q / 2.0, k))
    return jnp.einsum(
        "bthc,hcd->btd", jnp.einsum("bhts,bshc->bthc", scores, k), p["out"]
    )


def scores(p, x):
    t = tokens(p, x)
    return jax.nn.softmax(t @ t.swapaxes(1, 2) / 8) @ t @ p["dense"]


INTEGERS = {
    "relu": (after(jax.nn.relu), {"QLinearConv": 2}),
    "clip": (after(lambda x: jnp.clip(x, -1, 2)), {"QLinearConv": 2}),
    "leaky relu": (after(jax.nn.leaky_relu), {"QLinearLeakyRelu": 1}),
    "sigmoid": (after(jax.nn.sigmoid), {"QLinearSigmoid": 1}),
    "softmax": (after(jax.nn.softmax), {"QLinearSoftmax": 1}),
    "average pool": (after(average), {"QLinearAveragePool": 1}),
    "max pool": (after(largest), {"QLinearConv": 2}),
    "mean": (
        lambda p, x: jnp.mean(conv(x, p["a"]), (1, 2)) @ p["dense"],
        {"QLinearGlobalAveragePool": 1, "QGemm": 1},
    ),
    "add": (of_two(jnp.add), {"QLinearConv": 3, "QLinearAdd": 1}),
    "multiply": (of_two(jnp.multiply), {"QLinearMul": 1}),
    "concatenate": (
        of_two(lambda *x: jnp.concatenate(x, -1), "wide"),
        {"QLinearConcat": 1},
    ),
    "transpose": (after(lambda x: x.swapaxes(1, 2)), {"QLinearConv": 2}),
    "slice": (after(lambda x: x[:, 2:6]), {"QLinearConv": 2}),
    "repeat": (after(lambda x: jnp.repeat(x, 2, 1)), {"QLinearConv": 2}),
    "resize": (
        after(lambda x: jax.image.resize(x, (x.shape[0], 16, 16, 8), "nearest")),
        {"QLinearConv": 2},
    ),
    "dense on tokens": (dense, {"QGemm": 1}),
    "attention": (attention, {"QGemm": 3, "QLinearMatMul": 2, "QLinearSoftmax": 1}),
    "scaled scores": (scores, {"QGemm": 1, "QLinearMatMul": 2, "QLinearSoftmax": 1}),
}
FLOAT = {
    "tanh": (after(jnp.tanh), {"Tanh"}),
    "silu": (after(jax.nn.silu), {"Sigmoid", "Mul"}),
    "subtract": (of_two(jnp.subtract), {"Sub"}),
    "sum": (
        lambda p, x: jnp.sum(conv(x, p["a"]), (1, 2)) @ p["dense"],
        {"ReduceSum"},
    ),
    "sum of a window": (after(total), {"AveragePool", "Mul"}),
    "linear resize": (
        after(lambda x: jax.image.resize(x, (x.shape[0], 16, 16, 8), "linear")),
        {"Einsum"},
    ),
}


NOTED = {"tanh": "tanh", "silu": "silu", "sum": "sum", "sum of a window": "sum"}
"""The others share a name with what is in integers: additions, and nearest resizing."""


def written(model, tmp_path, **options):
    """The file, its quantizers, and onnxruntime's operations."""
    graph = jm.trace(model, PARAMS, INPUTS)
    config = jm.QuantConfig.for_target("onnxruntime", **options)
    quantizers = jm.calibrate(PARAMS, graph, [INPUTS], config, progress=False)
    path = tmp_path / "model.onnx"
    table = jm.export.onnx(path, model, PARAMS, quantizers, INPUTS[:1])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    return path, quantizers, table, Counter(n.op_type for n in nodes)


def notes(model):
    """What `jm.plan` says of tensors on this target."""
    graph = jm.trace(model, PARAMS, INPUTS)
    table = jm.plan(PARAMS, graph, jm.QuantConfig.for_target("onnxruntime"))
    return [note for note in table["note"] if note]


@pytest.mark.parametrize("name", INTEGERS)
def test_it_is_computed_in_integers(name, tmp_path):
    model, wanted = INTEGERS[name]
    path, quantizers, table, kinds = written(model, tmp_path)
    assert set(table["integers"]) == {"yes"}
    assert {k: kinds[k] for k in wanted} == wanted
    others = {k for k in kinds if not k.startswith("QLinear") and k not in LAID}
    assert others <= {"QGemm", "NhwcMaxPool", "MaxPool"}
    checked = jm.export.check(
        path, model, PARAMS, quantizers, [INPUTS], against_float=False
    )
    assert set(checked["value"][1:]) >= set(quantizers.activations)
    assert max(checked["largest (steps)"][1:]) <= 1
    # Its softmax rounds otherwise; halves of 0.5 a lie between two steps of a.
    assert min(checked["identical (%)"][1:]) >= 95
    assert not [note for note in notes(model) if "computed in float" in note]


@pytest.mark.parametrize("name", FLOAT)
def test_it_is_computed_in_float_and_right(name, tmp_path):
    model, wanted = FLOAT[name]
    path, quantizers, _, kinds = written(model, tmp_path)
    assert wanted <= set(kinds)
    checked = jm.export.check(
        path, model, PARAMS, quantizers, [INPUTS], against_float=False
    )
    assert max(checked["largest (steps)"][1:]) <= 1
    assert min(checked["identical (%)"][1:]) >= 99
    said = f"{NOTED.get(name)} is computed in float on onnxruntime"
    assert (name in NOTED) == any(said in note for note in notes(model))


@pytest.mark.parametrize("name", ["attention", "scaled scores", "repeat", "relu"])
def test_encodings_have_the_grids_as_they_are(name, tmp_path):
    """What is moved into other grids in integers stays where it is in a float file."""
    model, _ = INTEGERS[name]
    _, quantizers, *_ = written(model, tmp_path)
    jm.export.encodings(tmp_path, model, PARAMS, quantizers, INPUTS[:1], overwrite=True)
    grids = jm.export.read_encodings(tmp_path / "model.encodings")
    scales = {float(g["scale"].ravel()[0]) for g in grids.values() if g["axis"] is None}
    assert scales == {
        float(np.ravel(q.grid(None)[0])[0]) for q in quantizers.activations.values()
    }
    kinds = Counter(n.op_type for n in onnx.load(tmp_path / "model.onnx").graph.node)
    assert kinds["Relu"] == (name == "relu")  # a Clip where there are grids
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (made,) = session.run(None, {"input": np.asarray(INPUTS)})
    wanted = model(jm.round_weights(PARAMS, quantizers), INPUTS)
    np.testing.assert_allclose(made, wanted, rtol=1e-3, atol=1e-3)


def test_bounds_of_a_float_file_are_what_quantizers_know(tmp_path):
    """relu6, a clip written in the other order, and bounds that leave one number."""

    def model(p, x):
        y = jax.nn.relu6(conv(x, p["a"]))
        y = jnp.maximum(jnp.minimum(conv(y, p["b"]), 2.0), -1.0)
        y = jax.nn.relu(conv(y, p["b"]))
        z = jnp.minimum(jnp.maximum(y, 3.0), 1.0)
        return jnp.minimum(conv(y, p["b"]), 0.5) + z

    path = tmp_path / "float.onnx"
    jm.export.onnx(path, model, PARAMS, None, INPUTS[:1])
    kinds = Counter(n.op_type for n in onnx.load(path).graph.node)
    assert kinds["Relu"] == 1 and kinds["Clip"] == 4
    assert not kinds["Max"] + kinds["Min"]
    session = onnxruntime.InferenceSession(path)
    (made,) = session.run(None, {"input": np.asarray(INPUTS)})
    np.testing.assert_allclose(made, model(PARAMS, INPUTS), rtol=1e-3, atol=1e-3)


def built(*nodes, **arrays):
    """A float model of one value, its operations given by kind and second input."""
    helper, name, made = onnx.helper, "x", []
    for i, (kind, *others) in enumerate(nodes):
        made.append(helper.make_node(kind, [name, *others], [name := f"y{i}"]))
    value = lambda n: helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [4, 8])
    constants = [
        onnx.numpy_helper.from_array(np.asarray(a, np.float32), n)
        for n, a in arrays.items()
    ]
    graph = helper.make_graph(made, "g", [value("x")], [value(name)], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


def test_a_relu_of_the_graph_is_a_bound_like_others():
    six = {"six": 6.0, "many": np.arange(8.0)}
    kinds = lambda model: [n.op_type for n in fused(model).graph.node]
    assert kinds(built(("Relu",), ("Min", "six"), **six)) == ["Clip"]
    assert kinds(built(("Min", "six"), ("Relu",), **six)) == ["Clip"]
    assert kinds(built(("Relu",), ("Relu",))) == ["Relu"]
    each = built(("Min", "many"), ("Relu",), **six)  # a Clip has no bound per channel
    assert kinds(each) == ["Min", "Relu"]


def test_sums_that_lie_along_another_axis_are_no_softmax(tmp_path):
    """Of a square matrix both ways have the same shapes."""

    def model(p, x):
        y = tokens(p, x)[:, :8] @ p["dense"]
        y = jnp.exp(y - jnp.max(y, 2)[:, None, :])
        return y / jnp.sum(y, 2)[:, None, :]

    path = tmp_path / "model.onnx"
    jm.export.onnx(path, model, PARAMS, None, INPUTS[:1])
    session = onnxruntime.InferenceSession(path)
    (made,) = session.run(None, {"input": np.asarray(INPUTS)})
    wanted = model(PARAMS, INPUTS)
    np.testing.assert_allclose(made, wanted, rtol=1e-2, atol=1e-3)
