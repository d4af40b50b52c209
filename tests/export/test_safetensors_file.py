"""What `jm.export.safetensors` wrote comes back the same, and other programs read it."""

import collections
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmet as jm
from jaxmet import LowRank, Pruned

library = pytest.importorskip("safetensors")
from safetensors.numpy import load_file, save_file  # noqa: E402

write, read = jm.export.safetensors, jm.export.read_safetensors


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert type(x) is type(y) and x.dtype == y.dtype and x.shape == y.shape
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def model(params, x):
    x = jax.nn.relu(x @ params["one"] + params["bias"][None])
    return x @ params["two"]


def made():
    """A small network, its data, and everything that jaxmet makes of its tree."""
    rng = np.random.default_rng(0)
    draw = lambda *n: jnp.asarray(rng.normal(size=n), jnp.float32)
    params = {"one": draw(8, 6), "bias": draw(6), "two": draw(6, 4)}
    x = draw(32, 8)
    graph = jm.trace(model, params, x)
    quiet = {"progress": False}
    quantizers = {
        bits: jm.calibrate(
            params, graph, [x], jm.QuantConfig(weight_bits=bits, bias="int32"), **quiet
        )
        for bits in (4, 8)
    }
    trees = {
        "float": params,
        "bfloat16": jax.tree.map(lambda a: a.astype(jnp.bfloat16), params),
        "8 bits": jm.quantize(params, graph, quantizers[8]),
        "4 bits": jm.quantize(params, graph, quantizers[4]),
        "pruned": jm.prune(params, graph, ratios={"two": 0.5}),
        "low rank": jm.factorize(params, graph, ratios={"one": 0.5}),
        "equalized": jm.equalize(params, graph, objective="range"),
    }
    return trees, quantizers


def test_every_tree_comes_back_to_the_bit(tmp_path):
    trees, quantizers = made()
    kinds = set()
    for name, tree in trees.items():
        path = tmp_path / f"{name}.safetensors"
        write(path, tree, quantizers[8])
        saved = read(path)
        assert_same(saved.params, tree)
        assert_same(saved.quantizers, quantizers[8])
        whole = jax.tree.leaves(tree, is_leaf=lambda a: isinstance(a, jm.Compressed))
        kinds |= {type(a.weight) for a in whole if isinstance(a, jm.Compressed)}
    assert {jm.Quantized, LowRank, Pruned} <= kinds


def test_types_containers_and_scalars(tmp_path):
    path = tmp_path / "all.safetensors"
    tree = {
        "blocks": [(jnp.arange(3), None), (), [], {}],
        "int4": jnp.asarray([-8, 3, 7], jnp.int4),
        "float8": jnp.asarray([0.5, -2], jnp.float8_e4m3fn),
        "half": jnp.asarray(2.5, jnp.bfloat16),
        "key": jax.random.key(3),
        "numpy": np.linspace(0, 1, 5),
        "empty": np.zeros((0, 2), np.int8),
        "nan": np.asarray([np.nan, -0.0, np.inf], np.float32),
        "flag": np.asarray([True, False]),
        "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "strided": np.arange(10)[::3],
    }
    write(path, tree)
    assert_same(read(path).params, tree)
    assert list(read(path)) == ["params"]
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    write(path, state, overwrite=True)
    assert_same(read(path, like=state).params, state)
    pair = collections.namedtuple("Pair", "left right")(jnp.ones(1), [jnp.zeros(2)])
    write(path, pair, overwrite=True)
    assert_same(read(path, like=pair).params, pair)
    table = jm.Table({"layer": ["a"], "sqnr": [1.5]}, "title")
    write(path, table=table, overwrite=True)
    assert read(path).table.columns == table.columns


def test_other_programs_read_the_tensors_and_the_grids(tmp_path):
    trees, quantizers = made()
    path = tmp_path / "integers.safetensors"
    write(path, trees["8 bits"], quantizers[8])
    tensors = load_file(path)
    assert tensors["params/one/integers"].dtype == np.int8
    one = trees["8 bits"]["one"].weight
    np.testing.assert_array_equal(tensors["params/one/scale"], one.scale)
    with library.safe_open(path, "numpy") as file:
        manifest = json.loads(file.metadata()["jaxmet"])
    weights = dict(manifest["quantizers"]["fields"]["weights"]["dict"])
    assert weights["one"]["fields"]["bits"] == 8


def test_what_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "there.safetensors"
    write(path, {"w": jnp.ones(2)})
    old = path.read_bytes()

    def refused(message, function, *args, **options):
        with pytest.raises(ValueError, match=rf"^jaxmet\.export\.{message}"):
            function(*args, **options)

    refused(r"safetensors: there is a file .*overwrite=True", write, path, {"w": 1})
    refused("safetensors: there is nothing to save", write, tmp_path / "n")
    refused("safetensors: a leaf is of type", write, tmp_path / "n", {"f": print})
    refused("safetensors: .* is a folder", write, tmp_path, {"w": 1})
    refused("safetensors: overwrite is 3", write, path, {"w": 1}, overwrite=3)
    refused(
        "read_safetensors: the file and like= differ",
        read,
        path,
        like={"v": jnp.ones(2)},
    )
    assert path.read_bytes() == old and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(FileNotFoundError, match=r"read_safetensors: .*jm\.export\.saf"):
        read(tmp_path / "absent")
    save_file({"w": np.ones(2)}, path)
    refused(
        r"read_safetensors: .*has no 'jaxmet' in its metadata.*load_file", read, path
    )
    for text, message in (
        ("[" * 10**5, "no readable manifest"),
        ('{"format": "jaxmet", "version": 99}', "has version 99 .*Update jaxmet"),
        ('{"format": "other", "version": 1}', "has the format 'other'"),
        (
            '{"format": "jaxmet", "version": 1, "quantizers": {"type": "Gadget", "fields": {}}}',
            "is damaged",
        ),
    ):
        save_file({"w": np.ones(2)}, path, {"jaxmet": text})
        refused(f"read_safetensors: {re.escape(str(path))}.* ?{message}", read, path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[safetensors\]'"):
        read(path)
