"""Integers of layers in a file, computed with NumPy alone; and the artefact of `jax.export`."""

import json
import re
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmet as jm

quiet = {"progress": False}


class Net(nn.Module):
    """A convolution with a norm, one over groups, a residual, a mean and a head."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), strides=2, use_bias=False, name="stem")(x)
        x = nn.relu6(nn.BatchNorm(use_running_average=True, name="bn")(x))
        y = nn.Conv(8, (3, 3), feature_group_count=4, name="grouped")(x)
        x = nn.relu(x + y)
        return nn.Dense(5, name="head")(jnp.mean(x, axis=(1, 2)))


def made():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(0.2, 1, (6, 9, 9, 3)), jnp.float32)
    model = Net()
    params = model.init(jax.random.key(0), x)
    noise = lambda a: a + jnp.asarray(0.3 * rng.random(size=a.shape), a.dtype)
    params = jax.tree.map(noise, params)
    graph = jm.trace(model.apply, params, x)
    params = jm.fold_batch_norm(params, graph)
    config = jm.QuantConfig(bias="int32")
    quantizers = jm.calibrate(params, graph, [x], config, **quiet)
    return model.apply, params, graph, quantizers, x


def test_the_page_on_integers_computes_the_network_with_numpy(tmp_path, monkeypatch):
    apply, params, graph, quantizers, x = made()
    monkeypatch.chdir(tmp_path)
    scope = {"apply": apply, "params": params, "graph": graph, "quantizers": quantizers}
    text = (Path(__file__).parents[2] / "docs/integers.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    scope |= {"x": x, "jax": jax, "jm": jm}
    for block in blocks:
        exec(block, scope)
    assert len(blocks) == 2 and scope["logits"].shape == (6, 5)


def test_layers_are_plain_arrays(tmp_path):
    apply, params, _, quantizers, x = made()
    path = tmp_path / "layers.npz"
    table = jm.export.integers(path, apply, params, quantizers, x[:1])
    assert set(table["integers"]) == {"yes"} and len(table) == 5
    with np.load(path) as file:
        assert file["stem/weight"].dtype == np.int8
        assert file["stem/bias"].dtype == np.int32 and file["stem/bias"].shape == (8,)
    with pytest.raises(ValueError, match="there is a file"):
        jm.export.integers(path, apply, params, quantizers, x[:1])


def test_what_is_in_float_is_listed(tmp_path):
    apply = lambda p, x: jax.nn.softmax(x @ p["w"]) @ p["v"]
    params = {"w": jnp.eye(4), "v": jnp.eye(4)}
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
    graph = jm.trace(apply, params, x)
    quantizers = jm.calibrate(params, graph, [x], **quiet)
    quantizers = quantizers.set("v", enabled=False)
    table = jm.export.integers(tmp_path / "a.npz", apply, params, quantizers, x)
    notes = dict(zip(table["layer"], table["note"], strict=True))
    assert notes["v"] == "the weight is in float" and "softmax" in str(table)


def test_the_artefact_runs_without_jaxmet(tmp_path):
    pytest.importorskip("flatbuffers")
    apply, params, graph, quantizers, x = made()
    path = tmp_path / "model.jax"
    integers = jm.quantize(params, graph, quantizers)
    shape = jax.ShapeDtypeStruct((1, 9, 9, 3), jnp.float32)
    table = jm.export.stablehlo(path, apply, integers, quantizers, shape)
    assert set(table["integers"]) == {"yes"}
    found = jax.jit(jm.lift(apply, quantizers))(integers, x)
    np.save(tmp_path / "x.npy", x)
    code = (
        "import sys, jax.export, numpy as np\n"
        "model = jax.export.deserialize(bytearray(open('model.jax', 'rb').read()))\n"
        "assert set(model.platforms) == {'cpu', 'tpu', 'cuda'}\n"
        "np.save('y.npy', model.call(np.load('x.npy')))\n"
        "assert not {m for m in sys.modules if m.startswith(('jaxmet', 'flax'))}\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), found)
    with pytest.raises(ValueError, match="there is a file"):
        jm.export.stablehlo(path, apply, integers, quantizers, shape)
    with pytest.raises(ValueError, match="platforms"):
        jm.export.stablehlo(
            tmp_path / "b", apply, integers, quantizers, shape, platforms=["npu"]
        )
    counted = lambda p, x: apply(p, x) * float(x.shape[0])
    with pytest.raises(ValueError, match=r"for any batch size .* batch='fixed'"):
        jm.export.stablehlo(tmp_path / "b", counted, integers, quantizers, shape)


def test_weights_that_the_model_lays_out_are_numbers(tmp_path):
    """A transposed weight and a bias that is spread, as the model writes them."""
    rng = np.random.default_rng(0)
    draw = lambda *n: jax.device_put(np.float32(rng.normal(size=n)))
    params = {"w": draw(8, 3, 3), "b": draw(8), "head": draw(5, 8)}

    def model(params, x):
        places = ("NCW", "OIW", "NCW")
        x = jax.lax.conv_general_dilated(
            x, params["w"], (1,), "SAME", dimension_numbers=places
        )
        x = jax.nn.relu(x + params["b"][None, :, None])
        return jnp.mean(x, 2) @ params["head"].T

    x = draw(4, 3, 8)
    graph = jm.trace(model, params, x)
    config = jm.QuantConfig(bias="int32")
    quantizers = jm.calibrate(params, graph, [x], config, progress=False)
    path = tmp_path / "layers.npz"
    jm.export.integers(path, model, params, quantizers, x[:1])
    integers = jm.quantize(params, graph, quantizers)
    with np.load(path) as file:
        wanted = integers["head"].weight.values
        np.testing.assert_array_equal(file["head/weight"], np.transpose(wanted))
        s_w, s_x = file["w/weight_scale"], file["w/input_scale"]
        bias = np.rint(np.asarray(params["b"], np.float64) / (s_w * s_x))
        assert np.max(np.abs(file["w/bias"] - bias)) <= 1


def test_a_bias_is_in_the_file_where_the_result_is_in_float(tmp_path):
    """Before a GELU nothing rounds the sums, and the bias is a part of them all the same."""
    rng = np.random.default_rng(0)
    draw = lambda *n: jnp.asarray(rng.normal(size=n), jnp.float32)
    params = {"a": {"w": draw(8, 8), "b": draw(8)}, "h": {"w": draw(8, 3)}}

    def apply(p, x):
        return jax.nn.gelu(x @ p["a"]["w"] + p["a"]["b"][None]) @ p["h"]["w"]

    x = draw(16, 8)
    graph = jm.trace(apply, params, x)
    config = jm.QuantConfig(bias="int32")
    quantizers = jm.calibrate(params, graph, [x], config, **quiet)
    path = tmp_path / "layers.npz"
    table = jm.export.integers(path, apply, params, quantizers, x[:1])
    assert "the result is in float" in table["note"]
    with np.load(path) as file:
        scale = file["a/input_scale"] * file["a/weight_scale"]
        bias = np.rint(np.asarray(params["a"]["b"]) / scale)
        np.testing.assert_array_equal(file["a/bias"], bias)
        assert file["a/bias"].dtype == np.int32


def test_max_pools_are_listed_with_their_windows(tmp_path):
    rng = np.random.default_rng(0)
    draw = lambda *n: jnp.asarray(rng.normal(size=n), jnp.float32)
    params = {"a": draw(3, 4), "h": draw(4, 5)}

    def apply(p, x):
        x = nn.max_pool(jax.nn.relu(x @ p["a"]), (2, 3), strides=(2, 1))
        return jnp.mean(x, (1, 2)) @ p["h"]

    x = draw(2, 6, 6, 3)
    graph = jm.trace(apply, params, x)
    quantizers = jm.calibrate(params, graph, [x], **quiet)
    path = tmp_path / "layers.npz"
    table = jm.export.integers(path, apply, params, quantizers, x[:1])
    assert table["operation"] == ["dot", "max pool", "sum", "dot"]
    assert set(table["integers"]) == {"yes"} and set(table["note"]) == {None}
    with np.load(path) as file:
        pool = json.loads(str(file["operations"]))[1]
    assert pool["window"] == [1, 2, 3, 1] and pool["strides"] == [1, 2, 1, 1]
    assert pool["reads"] == [pool["result"]] == ["a/relu"]
