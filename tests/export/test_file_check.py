"""Files checked against the simulation: what is computed elsewhere, layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmet as jm

pytestmark = pytest.mark.slow
quiet = {"progress": False}


def conv(x, w, b):
    places = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=places)
    return jax.nn.relu(y + b[None, None, None])


def network(params, x):
    x = conv(x, params["one"]["kernel"], params["one"]["bias"])
    y = conv(x, params["two"]["kernel"], params["two"]["bias"])
    x = jnp.mean(x + y, (1, 2))
    return x @ params["head"]["kernel"] + params["head"]["bias"][None]


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(0)
    draw = lambda *n: jnp.asarray(rng.normal(size=n) / 4, jnp.float32)
    params = {
        "one": {"kernel": draw(3, 3, 3, 8), "bias": draw(8)},
        "two": {"kernel": draw(3, 3, 8, 8), "bias": draw(8)},
        "head": {"kernel": draw(8, 5), "bias": draw(5)},
    }
    images = np.asarray(rng.normal(size=(24, 9, 9, 3)), np.float32)
    graph = jm.trace(network, params, images[:1])
    batches = jm.batched(images, batch_size=8)
    config = jm.QuantConfig(bias="int32")
    return params, jm.calibrate(params, graph, batches, config, **quiet), batches


def onnx_file(tmp_path, model):
    pytest.importorskip("jax2onnx")
    pytest.importorskip("onnxruntime")
    params, quantizers, batches = model
    path = tmp_path / "model.onnx"
    jm.export.onnx(path, network, params, quantizers, next(iter(batches)))
    return path


def test_an_onnx_file_is_checked_layer_by_layer(tmp_path, model):
    params, quantizers, batches = model
    path = onnx_file(tmp_path, model)
    before = jax.tree.map(np.asarray, params), path.read_bytes()
    table = jm.export.check(path, network, params, quantizers, batches)
    assert path.read_bytes() == before[1]
    jax.tree.map(np.testing.assert_array_equal, before[0], params)
    assert table["value"][0] == "output"
    assert set(table["value"][1:]) == set(quantizers.activations)
    graph = jm.trace(network, params, next(iter(batches)))
    order = [n.name for n in graph.nodes if n.name in quantizers.activations]
    assert table["value"][1:] == order
    assert table["values"][0] == 24 * 5 and table["values"][1] == 24 * 9 * 9 * 3
    assert min(table["identical (%)"][1:]) >= 99.9
    assert not any(table["beyond one step"])
    counts = zip(table["values"], table["differing"], strict=True)
    assert table["identical (%)"] == [100 * (n - k) / n for n, k in counts]
    assert max(table["largest (steps)"]) <= 1
    first = next(iter(table))
    assert first["size / float"] > 0 and first["time / float"] > 0
    assert {row["size / float"] for row in table if row["value"] != "output"} == {None}
    assert "model.onnx" in table.title and "onnxruntime" in table.title


def test_the_row_of_the_outputs_is_what_the_file_computes(tmp_path, model):
    ort = pytest.importorskip("onnxruntime")
    params, quantizers, batches = model
    path = onnx_file(tmp_path, model)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    images = np.concatenate(list(batches))
    (made,) = session.run(None, {session.get_inputs()[0].name: images})
    wanted = np.asarray(jm.simulate(network, quantizers)(params, images))
    exact = np.asarray(network(params, images))
    apart = np.rint(np.abs(made - wanted) / quantizers.activations["head"].scale)
    sqnr = lambda y: 10 * np.log10(np.sum(exact**2) / np.sum((exact - y) ** 2))
    row = next(iter(jm.export.check(path, network, params, quantizers, batches)))
    assert row["identical (%)"] == pytest.approx(100 * np.mean(apart == 0), abs=2)
    assert row["SQNR (dB)"] == pytest.approx(sqnr(made), abs=0.05)
    assert row["simulated (dB)"] == pytest.approx(sqnr(wanted), abs=0.05)
    top = np.mean(made.argmax(1) == wanted.argmax(1))
    assert row["top-1 (%)"] == pytest.approx(100 * top, abs=5)


def test_a_layer_that_computes_something_else_is_the_only_one_that_is_found(
    tmp_path, model
):
    """Each layer is fed what the file computes before it, so errors do not travel."""
    onnx = pytest.importorskip("onnx")
    params, quantizers, batches = model
    path = onnx_file(tmp_path, model)
    damaged = onnx.load(path)
    nodes = {out: n for n in damaged.graph.node for out in n.output}
    convs = [n for n in damaged.graph.node if n.op_type == "Conv"]
    name = nodes[convs[0].input[2]].input[0]
    (bias,) = [t for t in damaged.graph.initializer if t.name == name]
    array = onnx.numpy_helper.to_array(bias)
    bias.CopyFrom(onnx.numpy_helper.from_array(array + 2000, name))
    onnx.save(damaged, path)
    table = jm.export.check(
        path, network, params, quantizers, batches, against_float=False
    )
    (first,) = [n for n in quantizers.activations if n.startswith("one")]
    identical = dict(zip(table["value"], table["identical (%)"], strict=True))
    assert identical[first] < 90 and identical["output"] < 90
    others = set(quantizers.activations) - {first}
    assert min(identical[n] for n in others) >= 99.9
    assert set(table["time / float"]) == {None}


@pytest.mark.parametrize("bits", [None, 32])
def test_files_that_show_no_layers(bits, tmp_path, model):
    """A float file, and one whose activations are in float."""
    pytest.importorskip("jax2onnx")
    params, quantizers, batches = model
    path, x = tmp_path / "model.onnx", next(iter(batches))
    if bits is not None:
        graph = jm.trace(network, params, x)
        config = jm.QuantConfig(activation_bits=bits)
        quantizers = jm.calibrate(params, graph, batches, config, **quiet)
    jm.export.onnx(path, network, params, bits and quantizers, x)
    wide = [np.asarray(b, np.float64) for b in batches]
    table = jm.export.check(
        path, network, params, quantizers, wide, against_float=False
    )
    assert table["value"] == ["output"]
    exact = table["SQNR (dB)"][0]
    assert exact > 80 if bits is None else exact > 20


def test_an_artefact_of_stablehlo(tmp_path, model):
    pytest.importorskip("flatbuffers")
    params, quantizers, batches = model
    path = tmp_path / "model.jax"
    jm.export.stablehlo(path, network, params, quantizers, next(iter(batches)))
    table = jm.export.check(path, network, params, quantizers, batches)
    assert table["value"] == ["output"] and table["largest (steps)"][0] <= 1
    assert table["identical (%)"][0] >= 95 and table["size / float"][0] > 0


def test_a_litert_file(tmp_path, model):
    pytest.importorskip("litert_converter")
    params, quantizers, batches = model
    path = tmp_path / "model.tflite"
    for io in ("int8", "float"):
        jm.export.litert(
            path,
            network,
            params,
            quantizers,
            next(iter(batches)),
            io=io,
            overwrite=True,
        )
        table = jm.export.check(path, network, params, quantizers, batches)
        assert table["value"] == ["output"] and table["largest (steps)"][0] <= 1
        assert table["identical (%)"][0] >= 95
        assert table["time / float"][0] > 0 and table["size / float"][0] < 1


def test_what_is_refused(tmp_path, model):
    params, quantizers, batches = model
    check = lambda path, p=params, q=quantizers, f=network: jm.export.check(
        path, f, p, q, batches
    )
    with pytest.raises(FileNotFoundError, match=r"export\.check: there is no file"):
        check(tmp_path / "absent.onnx")
    other = tmp_path / "model.bin"
    other.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"export\.check: .*model\.bin.*\.onnx"):
        check(other)
    path = onnx_file(tmp_path, model)
    with pytest.raises(ValueError, match=r"export\.check: quantizers is of type dict"):
        check(path, q={})
    fewer = {"head": params["head"]}
    with pytest.raises(ValueError, match=r"export\.check: .*no parameter"):
        check(path, fewer, f=lambda p, x: jnp.mean(x, (1, 2)) @ p["head"]["kernel"][:3])
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"export\.check: .*cut\.onnx"):
        check(cut)

    two = lambda p, x: network(p, x["image"])
    graph = jm.trace(two, params, {"image": next(iter(batches))})
    data = [{"image": b} for b in batches]
    theirs = jm.calibrate(params, graph, data, **quiet)
    with pytest.raises(ValueError, match=r"export\.check: the file has the inputs"):
        jm.export.check(path, two, params, theirs, data)
