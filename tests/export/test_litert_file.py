"""LiteRT files in LiteRT's own runtime against the simulation."""

import importlib.metadata

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmet as jm
from jaxmet.demo import data
from jaxmet.demo.network import Network
from zoo import CASES

pytestmark = pytest.mark.slow
pytest.importorskip("litert_converter")
interpreter = pytest.importorskip("ai_edge_litert.interpreter")

quiet = {"progress": False}


def ran(path, **inputs):
    """Outputs by name, as floats; floats are rounded to where inputs are integers."""
    runner = interpreter.Interpreter(
        model_path=str(path), num_threads=1
    ).get_signature_runner()
    given = {}
    for name, details in runner.get_input_details().items():
        x = np.asarray(inputs[name])
        if details["dtype"] == np.int8:
            step, zero = details["quantization"]
            x = np.rint(x / np.float32(step)) + zero
            x = np.clip(x, -128, 127).astype(np.int8)
        given[name] = x
    made = runner(**given)
    for name, details in runner.get_output_details().items():
        if details["dtype"] == np.int8:
            step, zero = details["quantization"]
            made[name] = (made[name].astype(np.float32) - zero) * np.float32(step)
    return made


def in_batches(path, images, size):
    parts = [images[i : i + size] for i in range(0, len(images), size)]
    return np.concatenate([ran(path, input=part)["output"] for part in parts])


def demo(**fields):
    images = jnp.asarray(data.load()[0][:256])
    apply, params = Network().apply, data.weights()
    graph = jm.trace(apply, params, images[:1])
    params = jm.fold_batch_norm(params, graph)
    batches = jm.batched(images, batch_size=64)
    config = jm.QuantConfig(**{"bias": "int32"} | fields)
    quantizers = jm.calibrate(params, graph, batches, config, **quiet)
    return apply, params, quantizers, images


def steps_apart(made, wanted, quantizers):
    """How many steps of the last grid two outputs differ by."""
    step = float(np.ravel(list(quantizers.activations.values())[-1].scale)[0])
    return np.rint(np.abs(np.asarray(made) - np.asarray(wanted)) / step)


CONFIGS = {
    "per channel": {},
    "per tensor": {"per_channel": False},
    "4 bits": {"weight_bits": 4},
    "symmetric": {"symmetric_activations": True},
    "target": dict(vars(jm.QuantConfig.for_target("litert"))),
}


@pytest.mark.parametrize("io", ["int8", "float"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_operation_of_the_demo_is_an_integer_one(name, io, tmp_path):
    apply, params, quantizers, images = demo(**CONFIGS[name])
    before = jax.tree.map(np.asarray, params)
    path = tmp_path / "demo.tflite"
    table = jm.export.litert(path, apply, params, quantizers, images[:64], io=io)
    jax.tree.map(np.testing.assert_array_equal, before, params)
    assert set(table["integers"]) == {"yes"} and len(table) == 22
    assert {"stem", "block3/project/add", "classifier"} <= set(table["layer"])
    runner = interpreter.Interpreter(model_path=str(path)).get_signature_runner()
    details = [runner.get_input_details(), runner.get_output_details()]
    kinds = {d["dtype"] for part in details for d in part.values()}
    assert kinds == {np.int8 if io == "int8" else np.float32}
    made = in_batches(path, images, 64)
    wanted = jax.jit(jm.simulate(apply, quantizers))(params, images)
    apart = steps_apart(made, wanted, quantizers)
    assert np.mean(apart == 0) >= 0.98 and np.mean(apart <= 1) >= 0.999
    assert np.mean(made.argmax(1) == np.argmax(wanted, 1)) >= 0.99


def test_the_file_gives_what_integers_in_jax_give(tmp_path):
    apply, params, quantizers, images = demo()
    path = tmp_path / "demo.tflite"
    jm.export.litert(path, apply, params, quantizers, images[:64])
    made = in_batches(path, images, 64)
    graph = jm.trace(apply, params, images[:1])
    integers = jm.quantize(params, graph, quantizers)
    wanted = jax.jit(jm.lift(apply, quantizers))(integers, images)
    apart = steps_apart(made, wanted, quantizers)
    assert np.mean(apart == 0) >= 0.98 and apart.max() <= 1


def test_layers_that_are_left_in_float(tmp_path):
    apply, params, quantizers, images = demo()
    quantizers = quantizers.set("block3/*", enabled=False)
    path = tmp_path / "mixed.tflite"
    table = jm.export.litert(path, apply, params, quantizers, images[:64])
    rows = {r["layer"]: r for r in table if r["integers"] == "no"}
    assert {*rows} == {
        "block3/expand",
        "block3/depthwise",
        "block3/project",
        "block3/project/add",
        "block4/expand",
    }
    note = "reads block3/expand in float; its weight is in float; gives its result in float"
    assert rows["block3/depthwise"]["note"] == note
    made = in_batches(path, images, 64)
    wanted = jax.jit(jm.simulate(apply, quantizers))(params, images)
    assert np.mean(steps_apart(made, wanted, quantizers) == 0) >= 0.98


def test_a_float_file_and_a_tree_of_integers(tmp_path):
    apply, params, quantizers, images = demo()
    path = tmp_path / "float.tflite"
    table = jm.export.litert(path, apply, params, None, images[:64], io="float")
    assert set(table["integers"]) == {"no"}
    made, wanted = in_batches(path, images, 64), apply(params, images)
    np.testing.assert_allclose(made, wanted, rtol=1e-3, atol=1e-3)
    quantizers = quantizers.pin(params)
    graph = jm.trace(apply, params, images[:1])
    integers = jm.quantize(params, graph, quantizers)
    files = []
    for tree in (params, integers):
        jm.export.litert(path, apply, tree, quantizers, images[:64], overwrite=True)
        files.append(in_batches(path, images, 64))
    np.testing.assert_array_equal(*files)


LOOPS = {"cond", "plain_cond", "rnn", "lstm", "scan"}
FIXED_RANGES = {
    "squeeze_excite",
    "transformer",
    "outputs_in_a_tree",
}  # sigmoid, softmax
NOT_LOADED = {"transposed", "embedding", "tied_embedding"}


@pytest.mark.parametrize("name", CASES)
def test_models_of_the_zoo(name, tmp_path):
    """Whatever the model, the file computes the simulation, or its export is refused."""
    case = CASES[name]
    apply, params, inputs = case.make[case.frontends[0]](jax.random.key(0))
    graph = jm.trace(apply, params, *inputs)
    params = jm.fold_batch_norm(params, graph)
    path = tmp_path / "model.tflite"

    def export(config):
        quantizers = jm.calibrate(params, graph, [tuple(inputs)], config, **quiet)
        jm.export.litert(path, apply, params, quantizers, *inputs, io="float")
        return quantizers

    config = jm.QuantConfig(bias="int32")
    if name in LOOPS | FIXED_RANGES | NOT_LOADED:
        with pytest.raises(ValueError, match=r"^jaxmet\.export\.litert: .*LiteRT"):
            export(config)
        assert not path.exists()
    if name in LOOPS | NOT_LOADED:
        return
    if name in FIXED_RANGES:
        config = jm.QuantConfig.for_target("litert")
    quantizers = export(config)
    runner = interpreter.Interpreter(model_path=str(path)).get_signature_runner()
    names = (
        sorted(
            runner.get_input_details(), key=lambda n: int("0" + n.rpartition("_")[2])
        )
        if len(inputs) > 1
        else [*runner.get_input_details()]
    )
    made = ran(path, **dict(zip(names, jax.tree.leaves(inputs), strict=True)))
    wanted = jax.tree.leaves(jm.simulate(apply, quantizers)(params, *inputs))
    for one, two in zip(made.values(), wanted, strict=True):
        scale = np.abs(two).max(initial=1e-6)
        assert np.mean(np.abs(one - two) > 0.05 * scale) <= 0.05


def chain(params, x):
    x = jax.nn.relu(x @ params["one"] + params["bias"][None])
    y = jnp.clip(x @ params["two"] + params["last"][None], -1, 2)
    return {"y": y, "again": y, "x": x}


def chain_parts(**fields):
    rng = np.random.default_rng(0)
    draw = lambda *n: jnp.asarray(rng.normal(size=n), jnp.float32)
    params = {"one": draw(8, 6), "bias": draw(6), "two": draw(6, 4), "last": draw(4)}
    x = draw(64, 8)
    graph = jm.trace(chain, params, x)
    config = jm.QuantConfig(**{"bias": "int32"} | fields)
    return params, jm.calibrate(params, graph, [x], config, **quiet), x


@pytest.mark.parametrize("io", ["int8", "float"])
def test_values_beyond_the_data_and_outputs_that_are_one_value(io, tmp_path):
    params, quantizers, x = chain_parts()
    path = tmp_path / "m.tflite"
    jm.export.litert(path, chain, params, quantizers, x, io=io)
    made = ran(path, input=3 * x)
    wanted = jm.simulate(chain, quantizers)(params, 3 * x)
    assert {*made} == {"output_y", "output_again", "output_x"}
    for name, two in wanted.items():
        apart = np.abs(made[f"output_{name}"] - two)
        assert apart.max() <= 0.05 and np.mean(apart > 1e-4) <= 0.03


def test_a_bias_that_no_int32_holds(tmp_path):
    params, _, x = chain_parts()
    params["two"] = params["two"].at[:, 1].multiply(1e-9)
    graph = jm.trace(chain, params, x)
    path = tmp_path / "m.tflite"
    quantizers = jm.calibrate(params, graph, [x], **quiet)
    with pytest.raises(
        ValueError, match=r"bias of 'two' does not fit int32 in 1 channel"
    ):
        jm.export.litert(path, chain, params, quantizers, x)
    assert not path.exists()
    config = jm.QuantConfig(bias="int32")
    quantizers = jm.calibrate(params, graph, [x], config, **quiet)
    jm.export.litert(path, chain, params, quantizers, x)
    made = ran(path, input=x)["output_y"]
    wanted = jm.simulate(chain, quantizers)(params, x)["y"]
    assert np.abs(made - wanted).max() <= 0.02


WITHOUT_INTEGERS = {
    "16 bits": ({"activation_bits": 16}, "more than 8 bits"),
    "4 bits": ({"activation_bits": 4}, "less than 8 bits"),
    "wide weights": ({"weight_bits": 12}, "one' has more than 8 bits"),
    "blocks": ({"block": 4}, "one' has a scale per block"),
    "asymmetric": ({"symmetric_weights": False}, "one' is a weight with a zero point"),
}


@pytest.mark.parametrize("name", WITHOUT_INTEGERS)
def test_quantizers_without_integers_are_refused_by_name(name, tmp_path):
    fields, message = WITHOUT_INTEGERS[name]
    params, quantizers, x = chain_parts(**fields)
    path = tmp_path / "m.tflite"
    with pytest.raises(ValueError, match=rf"^jaxmet\.export\.litert: '.*{message}"):
        jm.export.litert(path, chain, params, quantizers, x)
    assert not path.exists()


def test_what_is_refused(tmp_path, monkeypatch):
    params, quantizers, x = chain_parts()
    path = tmp_path / "there.tflite"
    path.write_text("mine")
    model = (chain, params, quantizers)
    with pytest.raises(
        ValueError, match=r"export\.litert: there is a file .*overwrite"
    ):
        jm.export.litert(path, *model, x)
    assert path.read_text() == "mine"
    free = tmp_path / "free.tflite"
    with pytest.raises(ValueError, match=r"export\.litert: io is 'uint8'"):
        jm.export.litert(free, *model, x, io="uint8")
    (batch,) = jax.export.symbolic_shape("b")
    with pytest.raises(ValueError, match=r"export\.litert: .*fixed batch size"):
        jm.export.litert(free, *model, jax.ShapeDtypeStruct((batch, 8), jnp.float32))
    with pytest.raises(ValueError, match=r"input 0 is computed in float.*io='float'"):
        jm.export.litert(free, chain, params, None, x)
    other = nn.Dense(3)
    tree = other.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"export\.litert: .*no parameter"):
        jm.export.litert(free, other.apply, tree, quantizers, x)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.6.0")
    with pytest.raises(
        ImportError, match=r"litert-converter is 0\.6\.0.*'\.\[litert\]'"
    ):
        jm.export.litert(free, *model, x)
    assert not free.exists() and path.read_text() == "mine"


def test_heads_and_derived_weights_are_integers(tmp_path):
    """Scales along two axes are scales along one; what is made of a weight is a weight."""
    rng = np.random.default_rng(0)
    draw = lambda *n: jnp.asarray(rng.normal(size=n) / 3, jnp.float32)
    params = {"in": draw(8, 2, 4), "bias": draw(2, 4), "out": draw(2, 4, 8)}

    def model(params, x):
        one = jnp.einsum("btd,dhc->bthc", x, params["in"]) + params["bias"][None, None]
        two = jnp.einsum("btd,dhc->bthc", x, 1.1 * params["in"])
        return jnp.einsum("bthc,hcd->btd", jax.nn.relu(one + two), params["out"])

    x = draw(4, 6, 8)
    graph = jm.trace(model, params, x)
    config = jm.QuantConfig.for_target("litert")
    quantizers = jm.calibrate(params, graph, [x], config, **quiet)
    path = tmp_path / "heads.tflite"
    table = jm.export.litert(path, model, params, quantizers, x)
    assert set(table["integers"]) == {"yes"}
    assert list(table["operation"]).count("FULLY_CONNECTED") == 3
    made = ran(path, input=x)["output"]
    wanted = jax.jit(jm.simulate(model, quantizers))(params, x)
    apart = steps_apart(made, wanted, quantizers)
    assert np.mean(apart == 0) >= 0.97 and apart.max() <= 1


def test_a_weight_that_is_spread_out_is_integers(tmp_path):
    """It is larger than what the tree holds, so the program has an equation for it."""
    rng = np.random.default_rng(0)
    draw = lambda *n: jnp.asarray(rng.normal(size=n), jnp.float32)
    params, x = {"one": draw(64, 64), "row": draw(1, 64)}, draw(16, 64)

    def model(params, x):
        return jax.nn.relu(x @ params["one"]) @ jnp.tile(params["row"], (64, 1))

    graph = jm.trace(model, params, x)
    config = jm.QuantConfig.for_target("litert")
    quantizers = jm.calibrate(params, graph, [x], config, **quiet)
    table = jm.export.litert(tmp_path / "m.tflite", model, params, quantizers, x)
    assert [*table["integers"]] == ["yes", "yes"]
    made = ran(tmp_path / "m.tflite", input=x)["output"]
    wanted = jax.jit(jm.simulate(model, quantizers))(params, x)
    assert steps_apart(made, wanted, quantizers).max() <= 1


def test_what_the_runtime_cannot_run_is_refused_with_the_layer(tmp_path):
    """The converter's own transposed convolution, which does not load, in float either."""

    class Up(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.relu(nn.ConvTranspose(4, (3, 3), (2, 2), name="up")(x))

    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 6, 3)), jnp.float32)
    params = Up().init(jax.random.key(0), x)
    path = tmp_path / "up.tflite"
    with pytest.raises(
        ValueError, match=r"export\.litert: LiteRT cannot run .* at 'up'"
    ):
        jm.export.litert(path, Up().apply, params, None, x, io="float")
    assert not path.exists()


@pytest.mark.parametrize("io", ["int8", "float"])
def test_by_way_of_a_float_file(io, tmp_path, monkeypatch):
    """With a converter whose integers are not known."""
    pytest.importorskip("ai_edge_quantizer")
    monkeypatch.setattr("jaxmet.export.litert_file.CONVERTER", "another")
    apply, params, quantizers, images = demo()
    path = tmp_path / "demo.tflite"
    table = jm.export.litert(path, apply, params, quantizers, images[:64], io=io)
    assert "ai-edge-quantizer" in table.title and set(table["integers"]) == {"yes"}
    assert len(table) == 22
    made = in_batches(path, images, 64)
    wanted = jax.jit(jm.simulate(apply, quantizers))(params, images)
    apart = steps_apart(made, wanted, quantizers)
    assert np.mean(apart == 0) >= 0.95 and np.mean(apart <= 1) >= 0.999
    four = demo(weight_bits=4)
    with pytest.raises(ValueError, match=r"export\.litert: the weight .* 8 bits"):
        jm.export.litert(tmp_path / "four.tflite", *four[:3], images[:1])


def test_another_converter_alone_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxmet.export.litert_file.CONVERTER", "another")
    monkeypatch.setattr("jaxmet.export.litert_file._can_requantize", lambda: False)
    apply, params, quantizers, images = demo()
    with pytest.raises(
        ImportError, match=r"export\.litert: litert-converter is .*quantizer"
    ):
        jm.export.litert(tmp_path / "m.tflite", apply, params, quantizers, images[:1])
