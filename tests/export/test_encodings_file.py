"""A float ONNX file and its encodings give what the integer file gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmet as jm
from jaxmet.demo import data
from jaxmet.demo.network import Network
from jaxmet.tree.leaves import dense
from jaxmet.tree.named_leaves import named_leaves

pytestmark = pytest.mark.slow
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("jax2onnx")

VERSIONS = ("2.0.0", "1.0.0", "0.6.1")
quiet = {"progress": False}


def ran(model, x):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {session.get_inputs()[0].name: np.asarray(x)})[0]


def with_pairs(model, grids):
    """A float model with a QuantizeLinear and a DequantizeLinear at each of its grids."""
    graph = model.graph
    weights = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    outputs = {o.name for o in graph.output}
    for name, grid in grids.items():
        axis = grid["axis"]
        signed, most = grid["symmetric"] and name in weights, 2 ** grid["bits"]
        shift = 0 if name in weights or not grid["symmetric"] else most // 2
        kind = {True: "int", False: "uint"}[signed] + str(8 if most <= 256 else 16)
        scale = onnx.numpy_helper.from_array(
            grid["scale"].astype(np.float32), f"{name}_s"
        )
        zero = onnx.numpy_helper.from_array(
            (grid["zero_point"] + shift).astype(kind), f"{name}_z"
        )
        graph.initializer.extend([scale, zero])
        options = {} if axis is None else {"axis": axis}
        if grid["block_size"]:
            options["block_size"] = grid["block_size"]
        given = name
        if name in outputs:
            given = f"{name}_float"
            for node in graph.node:
                node.output[:] = [given if o == name else o for o in node.output]
        out = name if name in outputs else f"{name}_on_grid"
        for node in graph.node:
            node.input[:] = [out if i == name else i for i in node.input]
        make = onnx.helper.make_node
        more = [scale.name, zero.name]
        nodes = [make("QuantizeLinear", [given, *more], [f"{name}_q"], **options)]
        nodes += [make("DequantizeLinear", [f"{name}_q", *more], [out], **options)]
        made = [i for i, n in enumerate(graph.node) if given in n.output]
        place = made[0] + 1 if made else 0
        for node in reversed(nodes):
            graph.node.insert(place, node)
    return model


def demo():
    images = jnp.asarray(data.load()[0][:128])
    apply, params = Network().apply, data.weights()
    graph = jm.trace(apply, params, images[:1])
    params = jm.fold_batch_norm(params, graph)
    config = jm.QuantConfig(bias="int32")
    quantizers = jm.calibrate(
        params, graph, jm.batched(images, batch_size=64), config, **quiet
    )
    return apply, params, graph, quantizers, images


def test_every_version_has_the_grids_of_the_quantizers_to_the_bit(tmp_path):
    apply, params, graph, quantizers, images = demo()
    read = []
    for version in VERSIONS:
        folder = tmp_path / version
        folder.mkdir()
        table = jm.export.encodings(
            folder, apply, params, quantizers, images[:1], version=version
        )
        assert sorted(p.name for p in folder.iterdir()) == [
            "model.encodings",
            "model.onnx",
        ]
        grids = jm.export.read_encodings(folder / "model.encodings")
        assert set(table["tensor"]) == set(grids)
        model = onnx.load(folder / "model.onnx")
        kinds = {n.op_type for n in model.graph.node}
        assert not kinds & {"QuantizeLinear", "DequantizeLinear"}
        read.append(grids)
    new, *older = read
    leaves = named_leaves(params)
    for name, q in quantizers.weights.items():
        if q.product is None and name in new:
            scale, _ = q.grid(dense(leaves[name]))
            np.testing.assert_array_equal(np.ravel(scale), np.ravel(new[name]["scale"]))
    assert sum(name in new for name in quantizers.weights) >= 18
    for name, q in quantizers.activations.items():
        if name in new:
            assert np.float32(new[name]["scale"]) == np.float32(np.ravel(q.scale)[0])
    assert sum(name in new for name in quantizers.activations) >= 20
    for grids in older:
        assert set(grids) == set(new)
        for name, grid in new.items():
            for key in ("scale", "zero_point"):
                np.testing.assert_array_equal(grid[key], grids[name][key])
            assert grid["bits"] == grids[name]["bits"]
            assert grid["symmetric"] is grids[name]["symmetric"]


def test_pairs_put_back_give_the_integer_file(tmp_path):
    apply, params, graph, quantizers, images = demo()
    jm.export.encodings(tmp_path, apply, params, quantizers, images[:1])
    jm.export.onnx(tmp_path / "ours.onnx", apply, params, quantizers, images[:1])
    ours = ran(onnx.load(tmp_path / "ours.onnx"), images)
    grids = jm.export.read_encodings(tmp_path / "model.encodings")
    theirs = ran(with_pairs(onnx.load(tmp_path / "model.onnx"), grids), images)
    np.testing.assert_array_equal(ours, theirs)
    table = jm.export.onnx(
        tmp_path / "ours.onnx", apply, params, quantizers, images[:1], overwrite=True
    )
    assert set(table["layer"]) & set(quantizers.activations)


def chain(params, x):
    x = jax.nn.relu(x @ params["one"] + params["bias"][None])
    return x @ params["two"]


GRIDS = {
    "4 bits": {"weight_bits": 4},
    "16 bits": {"activation_bits": 16},
    "symmetric": {"symmetric_activations": True},
    "asymmetric": {"symmetric_weights": False},
    "blocks": {"block": 4, "weight_bits": 4},
    "per tensor": {"per_channel": False},
}


@pytest.mark.parametrize("name", GRIDS)
def test_other_grids(name, tmp_path):
    rng = np.random.default_rng(0)
    draw = lambda *n: jnp.asarray(rng.normal(size=n), jnp.float32)
    params = {"one": draw(8, 6), "bias": draw(6), "two": draw(6, 4)}
    x = draw(64, 8)
    graph = jm.trace(chain, params, x)
    config = jm.QuantConfig(**{"bias": "int32"} | GRIDS[name])
    quantizers = jm.calibrate(params, graph, [x], config, **quiet)
    for version in VERSIONS:
        folder = tmp_path / version
        folder.mkdir()
        write = lambda: jm.export.encodings(
            folder, chain, params, quantizers, x[:1], version=version
        )
        if name == "blocks" and version != "2.0.0":
            with pytest.raises(
                ValueError, match=r"export\.encodings: 'one' has blocks"
            ):
                write()
            assert not list(folder.iterdir())
            continue
        write()
        with pytest.raises(ValueError, match=r"export\.encodings: there is a file"):
            write()
        grids = jm.export.read_encodings(folder / "model.encodings")
        assert set(grids) >= {"one", "two"} and grids["one"]["bits"] == (
            config.weight_bits
        )
        if version != "2.0.0":
            continue
        jm.export.onnx(folder / "ours.onnx", chain, params, quantizers, x[:1])
        ours = ran(onnx.load(folder / "ours.onnx"), x)
        theirs = ran(with_pairs(onnx.load(folder / "model.onnx"), grids), x)
        np.testing.assert_array_equal(ours, theirs)


def test_what_is_refused(tmp_path):
    apply, params, graph, quantizers, images = demo()
    args = (apply, params, quantizers, images[:1])
    with pytest.raises(ValueError, match=r"export\.encodings: version is '3'"):
        jm.export.encodings(tmp_path, *args, version="3")
    with pytest.raises(ValueError, match=r"export\.encodings: there is no folder"):
        jm.export.encodings(tmp_path / "none", *args)
    assert not list(tmp_path.iterdir())
