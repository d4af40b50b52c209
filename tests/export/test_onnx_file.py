"""ONNX files in onnxruntime against the simulation, and how many operations are integer ones."""

from collections import Counter

import flax.linen as nn
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmet as jm
from jaxmet.demo import data
from jaxmet.demo.network import Network
from zoo import CASES

pytestmark = pytest.mark.slow
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("jax2onnx")

quiet = {"progress": False}


def ran(path, *inputs, optimized=None, plain=False, exact=True):
    """Outputs of onnxruntime, and its operations after fusion."""
    options = onnxruntime.SessionOptions()
    if exact:
        # Without VNNI sums of two 8-bit products saturate in 16 bits, unless it is told not to;
        # then it loads no file in which one weight is read twice.
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 3
    if plain:  # as the file says
        level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.graph_optimization_level = level
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    session = onnxruntime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"]
    )
    names = [i.name for i in session.get_inputs()]
    outputs = session.run(None, dict(zip(names, map(np.asarray, inputs), strict=True)))
    if optimized is None:
        return outputs, Counter()
    nodes = onnx.load(optimized).graph.node
    return outputs, Counter(node.op_type for node in nodes)


def demo(config=None, **equalize):
    images = jnp.asarray(data.load()[0][:256])
    apply, params = Network().apply, data.weights()
    graph = jm.trace(apply, params, images[:1])
    params = jm.fold_batch_norm(params, graph)
    batches = jm.batched(images, batch_size=64)
    if equalize:
        params = jm.equalize(params, graph, batches=batches, **equalize, **quiet)
    config = config or jm.QuantConfig(bias="int32")
    return (
        apply,
        params,
        graph,
        jm.calibrate(params, graph, batches, config, **quiet),
        images,
    )


def steps_apart(made, wanted, quantizers):
    """How many steps of the last grid two outputs differ by."""
    step = float(np.ravel(list(quantizers.activations.values())[-1].scale)[0])
    return np.rint(np.abs(np.asarray(made) - np.asarray(wanted)) / step)


CONFIGS = {
    "per channel": (None, {}),
    "per tensor": (jm.QuantConfig(bias="int32", per_channel=False), {}),
    "exact clips": (None, {"clip": "exact"}),
    "4 bits": (jm.QuantConfig(bias="int32", weight_bits=4), {}),
    "asymmetric": (jm.QuantConfig(bias="int32", symmetric_weights=False), {}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_operation_of_the_demo_is_an_integer_one(name, tmp_path):
    config, options = CONFIGS[name]
    apply, params, graph, quantizers, images = demo(config, **options)
    before = jax.tree.map(np.asarray, params)
    path = tmp_path / "demo.onnx"
    table = jm.export.onnx(path, apply, params, quantizers, images[:1])
    jax.tree.map(np.testing.assert_array_equal, before, params)
    assert set(table["integers"]) == {"yes"} and len(table) == 22
    (made,), kinds = ran(path, images, optimized=tmp_path / "optimized.onnx")
    wanted = jax.jit(jm.simulate(apply, quantizers))(params, images)
    apart = steps_apart(made, wanted, quantizers)
    assert np.mean(apart == 0) >= 0.97 and np.mean(apart <= 1) >= 0.999
    assert np.mean(made.argmax(1) == np.argmax(wanted, 1)) >= 0.995
    if (
        name != "asymmetric"
    ):  # onnxruntime keeps zero points of weights a channel in float
        fused = {"QLinearConv": 17, "QLinearAdd": 3, "QGemm": 1}
        assert {k: kinds[k] for k in fused} == fused
        assert kinds["QLinearGlobalAveragePool"] == 1
        assert not kinds["Conv"] + kinds["Gemm"] + kinds["Add"]


def test_a_float_file_and_a_fixed_batch(tmp_path):
    apply, params, graph, _, images = demo()
    path = tmp_path / "float.onnx"
    table = jm.export.onnx(path, apply, params, None, images[:4], batch="fixed")
    assert set(table["integers"]) == {"no"}
    (made,), _ = ran(path, images[:4])
    np.testing.assert_allclose(made, apply(params, images[:4]), rtol=1e-4, atol=1e-4)
    (shape,) = [i.type.tensor_type.shape for i in onnx.load(path).graph.input]
    assert shape.dim[0].dim_value == 4


def test_jax_is_as_it_was_after_an_export(tmp_path):
    path = tmp_path / "sums.onnx"
    model = lambda params, x: jnp.cumsum(x @ params["w"], 1)
    jm.export.onnx(path, model, {"w": jnp.eye(3)}, None, jnp.ones((2, 3)))
    np.testing.assert_array_equal(jnp.cumsum(jnp.ones((2, 3)), 1), [[1, 2, 3]] * 2)
    (made,), _ = ran(path, np.ones((4, 3), np.float32))
    np.testing.assert_array_equal(made, [[1, 2, 3]] * 4)


def test_a_tree_of_integers_gives_the_same_file(tmp_path):
    apply, params, graph, quantizers, images = demo()
    quantizers = quantizers.pin(params)
    integers = jm.quantize(params, graph, quantizers)
    made = []
    for i, tree in enumerate((params, integers)):
        jm.export.onnx(tmp_path / f"{i}.onnx", apply, tree, quantizers, images[:1])
        made.append(ran(tmp_path / f"{i}.onnx", images[:32])[0][0])
    np.testing.assert_array_equal(*made)


@pytest.mark.parametrize("name", CASES)
def test_models_of_the_zoo(name, tmp_path):
    """The file computes the simulation and shows every layer, or its export is refused."""
    case = CASES[name]
    apply, params, inputs = case.make[case.frontends[0]](jax.random.key(0))
    graph = jm.trace(apply, params, *inputs)
    params = jm.fold_batch_norm(params, graph)
    quantizers = jm.calibrate(params, graph, [tuple(inputs)], **quiet)
    path = tmp_path / "model.onnx"
    try:
        jm.export.onnx(path, apply, params, quantizers, *inputs, batch="fixed")
    except (ValueError, NotImplementedError) as error:
        assert not path.exists()
        pytest.skip(f"refused: {error}")
    made, _ = ran(path, *jax.tree.leaves(inputs), exact="tied" not in name)
    wanted = jax.tree.leaves(jm.simulate(apply, quantizers)(params, *inputs))
    for one, two in zip(made, wanted, strict=True):
        two = np.asarray(two)
        scale = np.abs(two).max(initial=1e-6)
        assert np.mean(np.abs(one - two) > 0.05 * scale) <= 0.05
    table = jm.export.check(
        path, apply, params, quantizers, [tuple(inputs)], against_float=False
    )
    layers = {v for v in table["value"] if "output" not in v}
    assert layers <= {n.name for n in graph.nodes}
    assert set(quantizers.activations) <= set(table["value"])


def test_an_nnx_model_with_several_inputs(tmp_path):
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.left, self.right = (
                nnx.Linear(4, 6, rngs=rngs),
                nnx.Linear(5, 6, rngs=rngs),
            )

        def __call__(self, x, y):
            return {"sum": nnx.relu(self.left(x)) + self.right(y)}

    apply, params, _ = jm.functional(Two(nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=(64, n)), jnp.float32) for n in (4, 5))
    graph = jm.trace(apply, params, x, y)
    quantizers = jm.calibrate(params, graph, [(x, y)], **quiet)
    jm.export.onnx(tmp_path / "two.onnx", apply, params, quantizers, x[:1], y[:1])
    model = onnx.load(tmp_path / "two.onnx")
    assert [o.name for o in model.graph.output] == ["output_sum"]
    (made,), _ = ran(tmp_path / "two.onnx", x, y)
    wanted = jm.simulate(apply, quantizers)(params, x, y)["sum"]
    assert np.mean(steps_apart(made, wanted, quantizers) == 0) > 0.95


def test_what_is_refused(tmp_path):
    apply, params, graph, quantizers, images = demo()
    path = tmp_path / "there.onnx"
    path.write_text("mine")
    with pytest.raises(ValueError, match=r"export\.onnx: there is a file .*overwrite"):
        jm.export.onnx(path, apply, params, quantizers, images[:1])
    assert path.read_text() == "mine"
    free = tmp_path / "free.onnx"
    with pytest.raises(ValueError, match=r"export\.onnx: batch is 'some'"):
        jm.export.onnx(free, apply, params, quantizers, images[:1], batch="some")
    other = nn.Dense(3)
    tree = other.init(jax.random.key(0), images[:1])
    with pytest.raises(ValueError, match=r"export\.onnx: .*no parameter"):
        jm.export.onnx(free, other.apply, tree, quantizers, images[:1])

    def counted(params, x):
        return x @ params["w"] * float(x.shape[0])

    w = {"w": jnp.ones((3, 2))}
    with pytest.raises(
        ValueError, match=r"export\.onnx: the model cannot be exported for any batch"
    ):
        jm.export.onnx(free, counted, w, None, jnp.ones((2, 3)))

    def centred(params, x):
        return (x - x.mean(0, keepdims=True)) @ params["w"]

    with pytest.raises(ValueError, match=r"any batch size .* Pass batch='fixed'"):
        jm.export.onnx(free, centred, w, None, jnp.ones((2, 3)))
    assert not free.exists()


def chain(params, x):
    x = jax.nn.relu(x @ params["one"] + params["bias"][None])
    return jnp.clip(x @ params["two"] + params["last"][None], -1, 2)


def chain_params():
    rng = np.random.default_rng(0)
    draw = lambda *n: jnp.asarray(rng.normal(size=n), jnp.float32)
    return {"one": draw(8, 6), "bias": draw(6), "two": draw(6, 4), "last": draw(4)}


WIDTHS = {
    "4 bits": {"activation_bits": 4},
    "12 bits": {"activation_bits": 12},
    "symmetric": {"symmetric_activations": True},
    "blocks": {"block": 4, "weight_bits": 4},
    "one block": {"block": 8},
    "float bias": {"bias": "float"},
}


@pytest.mark.parametrize("name", WIDTHS)
def test_values_beyond_the_data_and_other_grids(name, tmp_path):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(64, 8)), jnp.float32)
    config = jm.QuantConfig(**{"bias": "int32"} | WIDTHS[name])
    params = chain_params()
    if name == "float bias":  # a channel whose bias no int32 holds
        params["two"] = params["two"].at[:, 1].multiply(1e-9)
        params["last"] = jnp.asarray([0.0, 1.0, 0.5, -0.5])
    graph = jm.trace(chain, params, x)
    quantizers = jm.calibrate(params, graph, [x], config, **quiet)
    jm.export.onnx(tmp_path / "m.onnx", chain, params, quantizers, x[:1])
    # dense layers of 16 bits are computed less exactly by default
    (made,), _ = ran(tmp_path / "m.onnx", 3 * x, plain=name == "12 bits")
    wanted = jm.simulate(chain, quantizers)(params, 3 * x)
    apart = steps_apart(made, wanted, quantizers)
    assert np.mean(apart <= 1) >= 0.97 and apart.max() <= 3


def test_grids_in_a_row_and_outputs_that_are_one_value(tmp_path):
    def model(params, x):
        x = jnp.clip(x, -1, 2)
        y = x @ params["w"]
        return {"y": y, "again": y, "x": x}

    x = jnp.asarray(3 * np.random.default_rng(0).normal(size=(64, 5)), jnp.float32)
    params = {
        "w": jnp.asarray(np.random.default_rng(1).normal(size=(5, 3)), jnp.float32)
    }
    graph = jm.trace(model, params, x)
    quantizers = jm.calibrate(params, graph, [x], **quiet)
    jm.export.onnx(tmp_path / "m.onnx", model, params, quantizers, x[:1])
    made, _ = ran(tmp_path / "m.onnx", x)
    wanted = jax.tree.leaves(jm.simulate(model, quantizers)(params, x))
    for one, two in zip(made, wanted, strict=True):
        np.testing.assert_allclose(one, two, atol=0.05)
        assert np.mean(np.abs(one - two) > 1e-4) < 0.02
    with pytest.raises(ValueError, match=r"opset is 99"):
        jm.export.onnx(tmp_path / "n.onnx", model, params, None, x[:1], opset=99)
    config = jm.QuantConfig(activation_bits=16)
    wide = jm.calibrate(params, graph, [x], config, **quiet)
    with pytest.raises(
        ValueError, match=r"opset 19 has no integers of more or fewer than 8"
    ):
        jm.export.onnx(tmp_path / "n.onnx", model, params, wide, x[:1], opset=19)


SMALL = {
    "per channel": {},
    "per tensor": {"per_channel": False},
    "asymmetric": {"symmetric_weights": False},
    "blocks": {"block": 4},
    "3 bits": {"weight_bits": 3},
}


@pytest.mark.parametrize("name", SMALL)
def test_weights_of_four_bits_take_half_a_byte(name, tmp_path):
    """The same integers in other types, so the same values."""
    draw = lambda *n: jnp.asarray(np.random.default_rng(0).normal(size=n), jnp.float32)
    params = {
        "one": draw(64, 32),
        "bias": draw(32),
        "two": draw(32, 4),
        "last": draw(4),
    }
    x = jnp.asarray(np.random.default_rng(1).normal(size=(64, 64)), jnp.float32)
    config = jm.QuantConfig(**{"bias": "int32", "weight_bits": 4} | SMALL[name])
    graph = jm.trace(chain, params, x)
    quantizers = jm.calibrate(params, graph, [x], config, **quiet)
    sizes, outputs = {}, []
    for kind in ("int8", "int4"):
        path = tmp_path / f"{kind}.onnx"
        jm.export.onnx(path, chain, params, quantizers, x[:1], weights=kind)
        outputs.append(ran(path, x, plain=True)[0][0])
        model = onnx.load(path)
        sizes[kind] = {i.name: len(i.raw_data) for i in model.graph.initializer}
    np.testing.assert_array_equal(*outputs)
    halved = [n for n in sizes["int8"] if n.startswith("weight")]
    assert sorted(sizes["int8"][n] for n in halved) == [32 * 4, 64 * 32]
    assert all(2 * sizes["int4"][n] == sizes["int8"][n] for n in halved)
    made = ran(tmp_path / "int4.onnx", x)[0][0]
    wanted = jm.simulate(chain, quantizers)(params, x)
    apart = steps_apart(made, wanted, quantizers)
    assert np.mean(apart == 0) >= 0.97 and apart.max() <= 1


def test_four_bits_are_refused_where_there_are_none(tmp_path):
    apply, params, graph, quantizers, images = demo()
    path = tmp_path / "small.onnx"
    with pytest.raises(ValueError, match=r"export\.onnx: weights is 'int2'"):
        jm.export.onnx(path, apply, params, quantizers, images[:1], weights="int2")
    four = jm.QuantConfig(bias="int32", weight_bits=4)
    apply, params, graph, quantizers, images = demo(four)
    with pytest.raises(ValueError, match=r"opset 19 has no integers of more or fewer"):
        jm.export.onnx(
            path, apply, params, quantizers, images[:1], weights="int4", opset=19
        )
    assert not path.exists()
    jm.export.onnx(path, apply, params, quantizers, images[:1], weights="int4")
    (made,), _ = ran(path, images)
    wanted = jax.jit(jm.simulate(apply, quantizers))(params, images)
    apart = steps_apart(made, wanted, quantizers)
    assert np.mean(apart == 0) >= 0.97 and np.mean(apart <= 1) >= 0.999


def test_products_of_bfloat16_are_refused(tmp_path):
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), chain_params())
    x = jnp.ones((4, 8), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"export\.onnx: .* bfloat16.*float32"):
        jm.export.onnx(tmp_path / "m.onnx", chain, params, None, x)
    assert not (tmp_path / "m.onnx").exists()


class PostNorm(nn.Module):
    """Blocks of BERT's kind: the norm stands behind the addition, its result in both."""

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            y = nn.gelu(nn.Dense(32, name=f"up{i}")(x), approximate=False)
            x = nn.LayerNorm(name=f"norm{i}")(x + nn.Dense(16, name=f"down{i}")(y))
        return nn.Dense(4, name="head")(x)


def test_a_residual_stream_between_integer_products(tmp_path):
    """Its products run on integers and give floats; the norms between them are in float."""
    model = PostNorm()
    x = jax.random.normal(jax.random.key(0), (16, 5, 16))
    variables = model.init(jax.random.key(1), x)
    graph = jm.trace(model.apply, variables, x[:2])
    config = jm.QuantConfig.for_target("onnxruntime")
    batches = jm.batched(x, batch_size=8)
    quantizers = jm.calibrate(variables, graph, batches, config, progress=False)
    assert quantizers.activation("norm0").products_only
    path = tmp_path / "model.onnx"
    table = jm.export.onnx(path, model.apply, variables, quantizers, x)
    products = [r for r in table if r["operation"] == "Gemm"]
    assert [r["integers"] for r in products] == ["yes"] * 5
    (made,), kinds = ran(path, np.asarray(x), optimized=tmp_path / "optimized.onnx")
    assert kinds["QGemm"] == 5 and not kinds["Gemm"]
    wanted = jax.jit(jm.simulate(model.apply, quantizers))(variables, x)
    scale = float(quantizers.activation("head").scale)
    assert np.mean(np.abs(made - wanted) < scale / 2) > 0.97
    assert np.abs(made - wanted).max() < 1.5 * scale
    dynamic = jm.QuantConfig(dynamic="token")
    found = jm.calibrate(variables, graph, batches, dynamic, progress=False)
    for name in ("onnx", "encodings", "integers"):
        path = tmp_path / {"onnx": "a.onnx", "encodings": "", "integers": "a.npz"}[name]
        with pytest.raises(ValueError, match=f"{name}: .*found at every call"):
            write = getattr(jm.export, name)
            write(path, model.apply, variables, found, x[:2], overwrite=True)
