"""ONNX files of the target `openvino` in OpenVINO against the simulation."""

import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxmet as jm
from jaxmet.export import file_check, runtimes

pytestmark = pytest.mark.slow
onnx = pytest.importorskip("onnx")
# With it the import forks a process to send statistics, of which JAX warns.
sys.modules.setdefault("openvino_telemetry", None)  # pyright: ignore
openvino = pytest.importorskip("openvino", reason="files run there with openvino")
pytest.importorskip("jax2onnx")

quiet = {"progress": False}
# Without VNNI OpenVINO computes weights of 8 bits wrongly.
BITS = 8 if runtimes.has_vnni() else 7
RNG = np.random.default_rng(0)
SIZES = {
    "one": (3, 3, 3, 8),
    "two": (3, 3, 3, 8),
    "deep": (3, 3, 8, 8),
    "one_bias": (8,),
    "two_bias": (8,),
    "wide": (16, 5),
    "square": (8, 8),
    "head": (8, 5),
    "head_bias": (5,),
}
PARAMS = {
    name: jnp.asarray(RNG.normal(size=size) / 2, jnp.float32)
    for name, size in SIZES.items()
}
INPUTS = RNG.normal(size=(64, 9, 9, 3)).astype(np.float32)


def conv(x, w, b):
    places = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=places)
    return y + jnp.reshape(b, (1, 1, 1, -1))


def largest(x):
    sizes = (1, 2, 2, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, sizes, sizes, "VALID")


def concatenated(p, x):
    one = largest(jax.nn.relu(conv(x, p["one"], p["one_bias"])))
    two = largest(jax.nn.relu(conv(x, p["two"], p["two_bias"])))
    y = jnp.mean(jnp.concatenate([one, two], -1), (1, 2))
    return y @ p["wide"] + p["head_bias"][None]


def residual(p, x):
    x = jax.nn.relu(conv(x, p["one"], p["one_bias"]))
    y = jax.nn.relu(conv(x, p["deep"], p["two_bias"]) + x)
    return jnp.mean(y, (1, 2)) @ p["head"] + p["head_bias"][None]


def relu_after(p, x):
    """A ReLU of values that are on a grid: before a second one OpenVINO would drop it."""
    x = jnp.concatenate([conv(x, p["one"], 0.0), conv(x, p["two"], 0.0)], -1)
    return jnp.mean(jax.nn.relu(x), (1, 2)) @ p["wide"]


def tokens(p, x):
    """Dense layers on three axes, without biases, and a product of two activations."""
    x = conv(x, p["one"], p["one_bias"]).reshape(x.shape[0], -1, 8)
    y = x @ p["square"]
    scores = jax.nn.softmax(y @ x.swapaxes(1, 2) / 8)
    return jax.nn.relu(scores @ x @ p["square"]) @ p["head"]


def pooled_tokens(p, x):
    """A mean of tokens that may be negative, as in a sentence encoder."""
    y = conv(x, p["one"], p["one_bias"]).reshape(x.shape[0], -1, 8)
    y = y[:, :4] @ p["square"] + p["two_bias"][None, None]
    return jnp.mean(y, 1) @ p["head"]


MODELS = {"concatenated": concatenated, "residual": residual}


def repeated(p, x):
    """Every row twice, as nearest upsampling is written."""
    y = jnp.repeat(conv(x, p["one"], p["one_bias"]), 2, 1)
    return conv(y, p["deep"], p["two_bias"])


def spread(p, x):
    """A mean at every position beside the values, as in a segmentation network."""
    y = jax.nn.relu(conv(x, p["one"], p["one_bias"]))
    mean = jnp.broadcast_to(jnp.mean(y, (1, 2), keepdims=True), y.shape)
    return jnp.mean(jnp.concatenate([y, mean], -1), (1, 2)) @ p["wide"]


OTHERS = {"relu after a grid": relu_after, "tokens": tokens, "repeat": repeated}
OTHERS |= {"spread": spread, "pooled tokens": pooled_tokens}


def written(model, path, **fields):
    """Write the file; its quantizers."""
    graph = jm.trace(model, PARAMS, INPUTS)
    fields = {"weight_bits": BITS} | fields
    config = jm.QuantConfig.for_target("openvino", **fields)
    quantizers = jm.calibrate(PARAMS, graph, [INPUTS], config, **quiet)
    jm.export.onnx(path, model, PARAMS, quantizers, INPUTS[:1])
    return quantizers


def ran(path, *kinds):
    """Outputs of OpenVINO, and the precision of its products, or of operations of `kinds`."""
    options = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    model = openvino.Core().compile_model(path, "CPU", options)
    notes = [n.rt_info for n in model.get_runtime_model().get_ordered_ops()]
    kinds = kinds or ("Convolution", "FullyConnected", "MatMul")
    return model({"input": INPUTS})["output"], [
        n["runtimePrecision"].value for n in notes if n["layerType"].value in kinds
    ]


def steps_apart(made, model, quantizers):
    wanted = np.asarray(jm.simulate(model, quantizers)(PARAMS, INPUTS))
    step = float([*quantizers.activations.values()][-1].scale)
    return np.rint(np.abs(made - wanted) / step)


@pytest.mark.parametrize("bias", ["float", "int32"])
@pytest.mark.parametrize("name", MODELS)
def test_the_file_is_the_simulation_within_a_step(name, bias, tmp_path):
    model, path = MODELS[name], tmp_path / "model.onnx"
    quantizers = written(model, path, bias=bias)
    made, precisions = ran(path)
    apart = steps_apart(made, model, quantizers)
    assert apart.max() <= 1
    # biases of the file are int32 in any case
    assert np.mean(apart == 0) >= {"float": 0.95, "int32": 0.99}[bias]
    assert len(precisions) == 3 and set(precisions) == {"u8"}


KINDS = {
    "matmul": (lambda y: y @ y.swapaxes(1, 2), "MatMul", "f32"),
    "multiply": (lambda y: y * jnp.flip(y, 1), "Eltwise", "f32"),
    "softmax": (jax.nn.softmax, "Softmax", "f32"),
    "add": (lambda y: y + jnp.flip(y, 1), "Eltwise", "u8"),
    "sum": (lambda y: jnp.sum(y, 1), "Reduce", "u8"),
    "max_pool": (lambda y: largest(y[..., None])[..., 0], "Pooling", "u8"),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_table_of_the_target_says_what_is_in_float(name, tmp_path):
    function, kind, precision = KINDS[name]

    def model(p, x):
        y = conv(x, p["one"], p["one_bias"]).reshape(x.shape[0], -1, 8)[:, :80]
        return function(y)

    path = tmp_path / "model.onnx"
    quantizers = written(model, path, bias="int32")
    made, precisions = ran(path, kind)
    assert precision in precisions
    assert steps_apart(made, model, quantizers).max() <= 1
    assert jm.targets.openvino.computes(name) == (precision == "u8")


@pytest.mark.parametrize("name", OTHERS)
def test_what_openvino_computes_wrongly_is_written_otherwise(name, tmp_path):
    model, path = OTHERS[name], tmp_path / "model.onnx"
    quantizers = written(model, path, bias="int32")
    kinds = [n.op_type for n in onnx.load(path).graph.node]
    assert ("Expand" in kinds) == (name == "spread")
    assert "Relu" not in kinds  # the process would end while the file is loaded
    apart = steps_apart(ran(path)[0], model, quantizers)
    assert apart.max() <= 1 and np.mean(apart == 0) >= 0.98


@pytest.mark.parametrize("name", MODELS)
def test_a_fault_in_the_file_is_seen(name, tmp_path):
    """One weight of the last layer has the other sign."""
    model, path = MODELS[name], tmp_path / "model.onnx"
    quantizers = written(model, path)
    damaged = onnx.load(path)
    (gemm,) = [n for n in damaged.graph.node if n.op_type == "Gemm"]
    made = {out: n for n in damaged.graph.node for out in n.output}
    weight = made[gemm.input[1]].input[0]
    (tensor,) = [t for t in damaged.graph.initializer if t.name == weight]
    array = onnx.numpy_helper.to_array(tensor).copy()
    array.flat[0] = -array.flat[0]
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, weight))
    onnx.save(damaged, path)
    apart = steps_apart(ran(path)[0], model, quantizers)
    assert apart.max() > 1 and np.mean(apart == 0) < 0.95


def test_a_file_is_checked_in_openvino(tmp_path):
    path = tmp_path / "model.onnx"
    quantizers = written(concatenated, path)
    given = path, concatenated, PARAMS, quantizers, jm.batched(INPUTS, batch_size=16)
    table = jm.export.check(*given, runtime="openvino")
    assert "in openvino" in table.title and table["value"] == ["output"]
    apart = steps_apart(ran(path)[0], concatenated, quantizers)
    assert table["identical (%)"] == [100 * np.mean(apart == 0)]
    assert table["largest (steps)"] == [apart.max()]
    assert table["size / float"][0] > 0 and table["time / float"][0] > 0
    with pytest.raises(ValueError, match=r"export\.check: runtime is 'tensorrt'"):
        jm.export.check(*given, runtime="tensorrt")
    other = tmp_path / "model.tflite"
    other.write_bytes(b"a file")
    with pytest.raises(ValueError, match=r"'openvino', and .* is no ONNX file"):
        jm.export.check(other, *given[1:], runtime="openvino")


@pytest.mark.parametrize("vnni", [False, True])
def test_weights_that_saturate_are_warned_of(vnni, tmp_path, monkeypatch):
    monkeypatch.setattr(file_check, "has_vnni", lambda: vnni)
    for bits in (7, 8):
        path = tmp_path / f"{bits}.onnx"
        quantizers = written(residual, path, weight_bits=bits)
        given = path, residual, PARAMS, quantizers, [INPUTS[:4]]
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            jm.export.check(*given, runtime="openvino", against_float=False)
        said = [str(w.message) for w in seen if "VNNI" in str(w.message)]
        assert len(said) == (bits == 8 and not vnni)
        assert all("weight_bits=7" in text for text in said)


def test_batches_that_the_file_cannot_read(tmp_path):
    def model(p, x):
        return residual(p, x.astype(jnp.float32))

    path = tmp_path / "model.onnx"
    given = path, model, PARAMS, written(model, path, weight_bits=7)
    for dtype in (np.int32, np.float16):
        batches = [INPUTS[:4].astype(dtype)]
        with pytest.raises(ValueError, match=rf"float32 there, {dtype.__name__} here"):
            jm.export.check(*given, batches, runtime="openvino", against_float=False)
    with pytest.raises(ValueError, match=r"jaxmet\.export\.check: the model"):
        jm.export.check(*given, [INPUTS[:4, :, :, :2]], runtime="openvino")


def test_what_does_not_load_says_why(tmp_path):
    """A block of 5 of 8 inputs has a shorter one after it, which OpenVINO does not know."""
    path = tmp_path / "model.onnx"

    def model(p, x):
        return jnp.mean(conv(x, p["one"], p["one_bias"]), (1, 2)) @ p["head"]

    quantizers = written(model, path, weight_bits=7, bias="float", block=5)
    with pytest.raises(ValueError, match=r"cannot be loaded \((?!Exception).*lock"):
        jm.export.check(
            path, model, PARAMS, quantizers, [INPUTS[:4]], runtime="openvino"
        )
