"""What is saved comes back the same, and what is no such file is refused."""

import collections
import json
import os
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze

import jaxmet as jm
from jaxmet import Compressed, Pruned, Quantizer, Quantizers, Table, load, save
from jaxmet.tree import files, stored_trees
from jaxmet.tree.named_leaves import named_leaves
from jaxmet.tree.structures import Keep


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert isinstance(x, jax.Array) == isinstance(y, jax.Array)
        if hasattr(x, "dtype"):
            assert isinstance(x, np.generic) == isinstance(y, np.generic)
            assert x.dtype == y.dtype and x.shape == y.shape
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                x, y = jax.random.key_data(x), jax.random.key_data(y)
            np.testing.assert_array_equal(x, y)
        else:
            assert type(x) is type(y) and x == y


def params():
    return {
        "params": {
            "stem": {
                "kernel": Compressed(jnp.ones((2, 3)), upper=jnp.full(3, 6.0)),
                "bias": jnp.full(3, 1.5, jnp.bfloat16),
            },
            "blocks": [(jnp.arange(3), None), (), [], {}],
        },
        "other": {
            "int4": jnp.asarray([-8, 3, 7], jnp.int4),
            "float8": jnp.asarray([0.5, -2], jnp.float8_e4m3fn),
            "scalar": jnp.asarray(2.5, jnp.bfloat16),
            "key": jax.random.key(3),
            "numpy": np.linspace(0, 1, 5),
            "empty": np.zeros((0, 2), np.int8),
            "flag": np.asarray([True, False]),
            "number": 0.1,
            "generic": np.float64(0.1),
            "point": np.asarray(3, np.int16),
            "step": 3,
            "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        },
    }


def quantizers():
    return Quantizers(
        {
            "stem/kernel": Quantizer(jnp.ones((1, 3)), bits=4, axis=(1,)),
            "stem/bias": Quantizer(bits=32, product=("stem/kernel", "input")),
        },
        {"input": Quantizer(jnp.float32(0.1), jnp.float32(8), symmetric=False)},
        shared=(("a", "input"),),
        skipped=(("b", "why"),),
    )


def test_everything_comes_back(tmp_path):
    path = tmp_path / "model.any"
    table = Table({"layer": ["a", "b"], "sqnr": [1.5, None], "n": [1, 2]}, "title")
    save(path, params=params(), quantizers=quantizers(), table=table)
    saved = load(path)
    assert_same(saved.params, params())
    assert_same(saved.quantizers, quantizers())
    assert saved.table.columns == table.columns and saved.table.title == "title"
    assert set(saved) == {"params", "quantizers", "table"}
    assert saved["table"] is saved.table and len(saved) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["model.any"]


def test_parts_and_integer_keys(tmp_path):
    path = tmp_path / "model.npz"
    save(str(path), params={0: jnp.ones(2), 1: [jnp.ones(1)]})
    saved = load(str(path))
    assert list(saved) == ["params"] and saved.quantizers is None
    assert_same(saved.params, {0: jnp.ones(2), 1: [jnp.ones(1)]})
    save(path, quantizers=quantizers())  # over the old file
    assert list(load(path)) == ["quantizers"]
    save(path, params=jnp.ones(3))
    assert_same(load(path).params, jnp.ones(3))
    with pytest.raises(ValueError, match="nothing to save"):
        save(path)
    assert list(load(path)) == ["params"]


Pair = collections.namedtuple("Pair", "left right")


def containers():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.stem = nnx.Param(jnp.ones((2, 3)))
            self.blocks = nnx.List([nnx.Param(jnp.full(3, i)) for i in range(11)])
            self.drop = nnx.Dropout(0.5, rngs=rngs)  # keeps a key

    mlp = eqx.nn.MLP(2, 2, 3, 2, key=jax.random.key(0))
    return {
        "nnx": nnx.split(Model(nnx.Rngs(0)))[1],
        "equinox": eqx.filter(mlp, eqx.is_array),
        "frozen": freeze(
            {"params": {"a": {"w": jnp.ones(2)}}, "s": {"m": jnp.ones(1)}}
        ),
        "namedtuple": {"params": {"p": Pair(jnp.ones(1), [jnp.zeros(2)])}},
    }


@pytest.mark.parametrize("name", ["nnx", "equinox", "frozen", "namedtuple"])
def test_other_containers_become_dicts_by_name_or_like_a_given_tree(name, tmp_path):
    tree = containers()[name]
    path = tmp_path / "model.npz"
    save(path, params=tree)
    assert_same(load(path, like=tree).params, tree)
    shapes = jax.eval_shape(lambda: tree)
    assert_same(load(path, like=shapes).params, tree)
    plain = load(path).params
    assert type(plain) is dict
    old, new = named_leaves(tree), named_leaves(plain)
    assert set(old) == set(new)
    assert_same(dict(old), dict(new))


def test_a_tree_unlike_the_file_is_refused(tmp_path):
    path = tmp_path / "model.npz"
    save(path, params={"a": jnp.ones(1), "b": jnp.ones(1)})
    with pytest.raises(ValueError, match=r"lacks \['c'\].*like lacks \['b'\]"):
        load(path, like={"a": 0, "c": 0})


def test_unsuitable_leaves_and_keys_are_refused_and_leave_no_file(tmp_path):
    path = tmp_path / "model.npz"
    for tree, message in [
        ({"f": print}, "builtin_function"),
        ({(1, 2): jnp.ones(1)}, r"the key \(1, 2\)"),
    ]:
        with pytest.raises(ValueError, match=rf"jaxmet\.save: .*{message}"):
            save(path, params=tree)
    with pytest.raises(ValueError, match="traced"):
        jax.jit(lambda x: save(path, params=x))(jnp.ones(1))
    assert not list(tmp_path.iterdir())


def test_paths_and_tables_that_cannot_be_saved(tmp_path):
    path = tmp_path / "model.npz"
    with pytest.raises(ValueError, match=r"jaxmet\.save: .* is a folder"):
        save(tmp_path, params=jnp.ones(1))
    with pytest.raises(ValueError, match=r"jaxmet\.save: there is no folder"):
        save(tmp_path / "none" / "x.npz", params=jnp.ones(1))
    with pytest.raises(ValueError, match=r"jaxmet\.save: the path is of type dict"):
        save({"a": jnp.ones(1)}, params=jnp.ones(1))
    with pytest.raises(ValueError, match=r"jaxmet\.save: table is of type list"):
        save(path, table=[Table({"a": [1]})])
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.npz"
    save(path, params=jnp.ones(1))

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(files.np, "savez", fail)
    with pytest.raises(OSError, match="disk full"):
        save(path, params=jnp.zeros(1))
    monkeypatch.undo()
    assert_same(load(path).params, jnp.ones(1))
    assert len(list(tmp_path.iterdir())) == 1


def with_manifest(path, manifest, **arrays):
    text = np.frombuffer(json.dumps(manifest).encode(), np.uint8)
    with open(path, "wb") as file:
        np.savez(file, manifest=text, **arrays)


def test_foreign_damaged_and_newer_files_are_refused(tmp_path):
    path = tmp_path / "model.npz"
    save(path, params={"w": jnp.arange(1000.0)})
    whole = path.read_bytes()

    def refused(message):
        with pytest.raises(ValueError, match=rf"jaxmet\.load: .*model\.npz {message}"):
            load(path)

    for size in (10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused("is cut short or damaged")
    middle = len(whole) // 2
    path.write_bytes(
        whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    )
    refused("is cut short or damaged")
    path.write_bytes(b"")
    refused("is empty")
    path.write_bytes(b"\x80\x04pickle")
    refused("starts with b'.x80.*no npz")
    np.save(path.with_suffix(".npy"), np.ones(3))
    path.write_bytes(path.with_suffix(".npy").read_bytes())
    refused("starts with")
    np.savez(path, weights=np.ones(3))
    refused(r"is an npz of \['weights'\] and has no manifest")
    np.savez(path, manifest=np.frombuffer(b"{", np.uint8))
    refused("has no readable manifest")
    with_manifest(path, {"format": "other", "version": 1})
    refused("has the format 'other'")
    with_manifest(path, {"format": "jaxmet", "version": stored_trees.VERSION + 1})
    refused(f"has version {stored_trees.VERSION + 1} of the format.*Update jaxmet")
    leaf = {"array": "0", "dtype": "float32", "numpy": True, "scalar": False}
    params = {"names": ["w"], "leaves": [leaf], "tree": {"ref": 0}}
    with_manifest(path, {"format": "jaxmet", "version": 1, "params": params})
    refused("is damaged: KeyError '0'")
    params["leaves"] = [{"type": "Gadget", "fields": {}}]
    with_manifest(path, {"format": "jaxmet", "version": 1, "params": params})
    refused("is damaged: KeyError 'Gadget'")
    with pytest.raises(
        FileNotFoundError, match=r"jaxmet\.load: .*absent\.npz.*jm\.save"
    ):
        load(tmp_path / "absent.npz")
    wrong: Any
    for wrong, message in (
        (3, "the path is 3"),
        (None, "the path is None"),
        (b"model", "of type bytes"),
        ({}, "of type dict"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(
            ValueError, match=rf"jaxmet\.load: .*{message}.*Give the name"
        ):
            load(wrong)


def test_quantizers_and_tables_are_not_saved_as_parameters(tmp_path):
    path, leaf = tmp_path / "model.npz", jnp.ones(2)
    for wrong, cure in (
        (
            Quantizers({"w": Quantizer()}),
            "params is of type Quantizers. Write quantizers=",
        ),
        (Table({"a": [1]}), "params is of type Table. Write table="),
        (jm.trace(lambda p, x: x @ p, jnp.ones((2, 2)), leaf), "of type Graph"),
    ):
        with pytest.raises(ValueError, match=rf"jaxmet\.save: .*{cure}"):
            save(path, params=wrong)
    assert not path.exists()


def test_quantizers_inside_a_tree_come_back_with_their_static_fields(tmp_path):
    path = tmp_path / "state.npz"
    numbers = dict(
        zip(("scale", "zero_point", "minimum", "maximum", "least"), range(5))
    )
    numbers = {name: jnp.float32(value + 2) for name, value in numbers.items()}
    one = Quantizer(bits=4, axis=(1,), **numbers)
    free = Quantizer(bits=5)  # no array at all: it follows the weight
    whole = Quantizers({"a/w": free}, {"in": one}, skipped=(("b", "not selected"),))
    state = optax.adam(1e-3).init((jnp.ones(2), whole))
    for tree in ({"p": jnp.ones(2), "q": whole}, {"q": {"w": free}}, [one], (whole,)):
        save(path, params=tree)
        found = load(path).params
        assert jax.tree.structure(found) == jax.tree.structure(tree)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True):
            np.testing.assert_array_equal(a, b)
    assert found[0].weights["a/w"].bits == 5 and found[0].skipped == whole.skipped
    save(path, params={"state": state})
    again = load(path, like={"state": state}).params["state"]
    assert jax.tree.structure(again) == jax.tree.structure(state)


CHANGED = {
    "bits": (4, 8),
    "axis": ((1,), (0,)),
    "symmetric": (True, False),
    "learn": ("lsq", "minmax"),
    "enabled": (True, False),
    "product": (("w", "in"), ("w", "a/relu")),
}


@pytest.mark.parametrize("field", CHANGED)
@pytest.mark.parametrize("within", ["dict", "optax"])
def test_quantizers_that_differ_from_those_of_the_tree_it_is_like_are_named(
    tmp_path, field, within
):
    """Also within a container of optax, where a file holds names alone."""

    def tree(value):
        one = Quantizer(jnp.ones((1, 3)), **{field: value})
        whole = Quantizers({"a/w": one}, {"in": Quantizer(jnp.ones(()))})
        tree = {"w": jnp.ones(2), "q": whole}
        return tree if within == "dict" else {"state": optax.adam(1e-3).init(tree)}

    ours, theirs = CHANGED[field]
    save(tmp_path / "state.npz", params=tree(ours))
    found = load(tmp_path / "state.npz", like=tree(ours)).params
    assert jax.tree.structure(found) == jax.tree.structure(tree(ours))
    path = "q/weights/a/w" if within == "dict" else "state/0/mu/q/weights/a/w"
    words = (
        f"jaxmet.load: at {path!r} the file has {field}={ours!r}, and like= has "
        f"{field}={theirs!r}."
    )
    with pytest.raises(ValueError, match=re.escape(words)):
        load(tmp_path / "state.npz", like=tree(theirs))


def test_a_quantizer_without_arrays_is_missed_in_the_tree_it_is_like(tmp_path):
    path, free = tmp_path / "state.npz", Quantizer(bits=5)
    save(path, params={"w": jnp.ones(2), "q": {"w": free}})
    with pytest.raises(
        ValueError, match="at 'q/w' the file has a quantizer, and like="
    ):
        load(path, like={"w": jnp.zeros(2), "q": {}})
    save(path, params={"w": jnp.ones(2), "q": {}})
    with pytest.raises(
        ValueError, match="at 'q/w' the file has no quantizer, and like="
    ):
        load(path, like={"w": jnp.zeros(2), "q": {"w": free}})
    shared = Quantizers({}, {}, shared=(("a", "b"),))
    save(path, params={"w": jnp.ones(2), "q": shared})
    with pytest.raises(
        ValueError, match=r"at 'q' the file has shared=\(\('a', 'b'\),\)"
    ):
        load(path, like={"w": jnp.zeros(2), "q": Quantizers()})


def test_a_function_that_found_the_range_is_no_difference(tmp_path):
    of = lambda values, target: (-1.0, 1.0)
    q = Quantizers({"w": Quantizer(jnp.ones(()), calibrator=of)})
    tree = {"w": jnp.ones(2), "q": q}
    save(tmp_path / "state.npz", params=tree)
    found = load(tmp_path / "state.npz", like=tree).params
    assert found["q"].weights["w"].calibrator is of


def test_masks_of_optax_in_a_structured_leaf_come_back_like_a_given_tree(tmp_path):
    def leaf(value):
        return Compressed(Pruned(value, (Keep(0, 4, (0, 2)),)))

    state = optax.masked(optax.adam(1e-3), {"a": False, "b": True})
    state = state.init({"a": leaf(jnp.ones(2)), "b": leaf(jnp.ones(2))})
    save(tmp_path / "state.npz", params={"state": state})
    like = {"state": jax.tree.map(jnp.zeros_like, state)}
    found = load(tmp_path / "state.npz", like=like).params["state"]
    assert jax.tree.structure(found) == jax.tree.structure(state)


def test_links_are_followed_and_pipes_refused(tmp_path):
    target, link, pipe = (tmp_path / n for n in ("target.npz", "link.npz", "pipe.npz"))
    save(target, params=jnp.ones(1))
    link.symlink_to(target)
    save(link, params=jnp.ones(2))
    assert link.is_symlink() and load(target).params.shape == (2,)
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match=r"jaxmet\.save: .* is no ordinary file"):
        save(pipe, params=jnp.ones(1))
    assert pipe.is_fifo()
