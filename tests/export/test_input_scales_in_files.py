"""Files of trees whose weights divide or rotate their inputs, beside the simulation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmet as jm

pytestmark = pytest.mark.slow
QUIET = {"progress": False}


def normed(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * p["g"][None, None]


def dense(p, x):
    return x @ p["w"] + p["b"][None, None]


def model(p, x):
    x = normed(p["norm"], dense(p["embed"], x))
    y = dense(
        p["down"], jax.nn.gelu(dense(p["up"], x)) * jax.nn.sigmoid(dense(p["gate"], x))
    )
    return dense(p["head"], normed(p["last"], x + y))


@pytest.fixture(scope="module", params=["divided", "rotated"])
def quantized(request):
    rng = np.random.default_rng(0)
    sizes = {
        "embed": (8, 8),
        "up": (8, 12),
        "gate": (8, 12),
        "down": (12, 8),
        "head": (8, 4),
    }
    params = {
        n: {"w": rng.normal(size=s) / 3, "b": rng.normal(size=s[1])}
        for n, s in sizes.items()
    }
    params |= {n: {"g": rng.lognormal(0, 1, 8)} for n in ("norm", "last")}
    params = jax.tree.map(lambda a: a.astype(np.float32), params)
    x = rng.normal(size=(16, 4, 8)).astype(np.float32)
    graph = jm.trace(model, params, x)
    stated = {"up", "gate", "down"}
    if request.param == "divided":
        new = jm.smooth(params, graph, [x], alpha="noise", input_scales=True, **QUIET)
    else:
        new, stated = jm.rotate(params, graph), stated | {"head"}
    assert {
        n for n, p in new.items() if isinstance(p.get("w"), jm.Compressed)
    } == stated
    q = jm.calibrate(new, graph, [x], jm.QuantConfig(bias="int32"), **QUIET)
    return new, q, x, np.asarray(jax.jit(jm.simulate(model, q))(new, x))


def test_in_onnxruntime(quantized, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("jax2onnx")
    new, q, x, _ = quantized
    path = tmp_path / "model.onnx"
    jm.export.onnx(path, model, new, q, x)
    table = jm.export.check(path, model, new, q, [x])
    assert {"norm", "down", "output"} & {*table["value"]}
    assert min(v for v in table["identical (%)"] if v is not None) > 97
    if new["up"]["w"].input_signs is not None:
        return
    # Both layers that read the norm have one division.
    made = {n.output[0]: n for n in onnx.load(path).graph.node}
    read = [n for n in made.values() if n.op_type == "QuantizeLinear"]
    divisions = {n.input[0] for n in read if made.get(n.input[0]) is not None}
    factors = [n for n in divisions if made[n].op_type == "Mul"]
    assert len(factors) >= 2


def test_encodings_are_of_what_enters(quantized, tmp_path):
    onnx = pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("jax2onnx")
    new, q, x, _ = quantized
    jm.export.encodings(tmp_path, model, new, q, x)
    file = onnx.load(tmp_path / "model.onnx")
    names = [n for n, v in q.activations.items() if v.products_only and n != "last"]
    assert "norm" in names
    known = {o for node in file.graph.node for o in node.output}
    file.graph.output.extend(
        onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None)
        for n in names
        if n in known
    )
    run = ort.InferenceSession(file.SerializeToString())
    found = run.run(["norm"], {run.get_inputs()[0].name: x})[0]
    read = q.activations["norm"]
    scale, zero = (float(v) for v in read.grid(None))
    low, high = ((end - zero) * scale for end in read.ends)
    # The file has what enters of the norm by this name: it fills the grid.
    assert low - scale <= found.min() and found.max() <= high + scale
    assert found.max() > high - 0.1 * (high - low) or found.min() < low + 0.1 * (
        high - low
    )


def test_in_litert(quantized, tmp_path):
    pytest.importorskip("ai_edge_litert")
    new, _, x, _ = quantized
    config = jm.QuantConfig.for_target("litert")
    q = jm.calibrate(new, jm.trace(model, new, x), [x], config, **QUIET)
    assert q.activations["norm"].products_only
    path = tmp_path / "model.tflite"
    jm.export.litert(path, model, new, q, x)
    table = jm.export.check(path, model, new, q, [x])
    (row,) = (r for r in table if r["value"] == "output")
    assert row["identical (%)"] > 97


def test_stablehlo_integers_and_safetensors(quantized, tmp_path):
    new, q, x, simulated = quantized
    step = float(q.activations["head"].scale)
    integer = np.asarray(jax.jit(jm.lift(model, q))(new, x))
    assert np.abs(integer - simulated).max() <= 1.01 * step
    table = jm.export.integers(tmp_path / "model.npz", model, new, q, x)
    integers = {
        r["layer"] for r in table if r["operation"] == "dot" and r["integers"] == "yes"
    }
    assert integers == {"embed", "up", "gate", "down", "head"}
    pytest.importorskip("safetensors")
    jm.export.safetensors(tmp_path / "tree.safetensors", new, q)
    found = jm.export.read_safetensors(tmp_path / "tree.safetensors")
    tree = found.params if hasattr(found, "params") else found[0]
    lifted = jax.jit(jm.lift(model))
    np.testing.assert_array_equal(lifted(tree, x), lifted(new, x))
