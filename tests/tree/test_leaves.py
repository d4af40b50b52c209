"""A compressed leaf lives in every tree function and refuses to be an array."""

import copy
import operator
import pickle

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmet import Compressed, LowRank, Pruned, densify, load, save
from jaxmet.tree.leaves import from_state, is_compressed, to_state
from jaxmet.tree.named_leaves import flatten
from jaxmet.tree.structures import Keep


def leaf(**fields):
    weight = jnp.arange(6.0).reshape(2, 3)
    return Compressed(weight, **({"upper": jnp.full(3, 6.0)} | fields))


def params():
    return {"params": {"stem": {"kernel": leaf(), "bias": jnp.ones(3)}}}


USES = {
    "asarray": jnp.asarray,
    "numpy": np.asarray,
    "item": lambda w: w[0],
    "iterate": list,
    "len": len,
    "float": float,
    "bool": bool,
    "einsum": lambda w: jnp.einsum("ij,kj->ik", w, w),
    "dot": lambda w: jnp.dot(jnp.ones((1, 2)), w),
    "jax ufunc": jnp.exp,
    "numpy matmul": lambda w: np.ones((1, 2)) @ w,
    "jax matmul": lambda w: jnp.ones((1, 2)) @ w,
    "numpy add": lambda w: np.ones((2, 3)) + w,
    "reshape": lambda w: w.reshape(-1),
    "transpose": lambda w: w.T,
    "update": lambda w: w.at[0].set(1.0),
    "negate": operator.neg,
    "compare": lambda w: w == 0.0,
    "linen": lambda w: nn.Dense(3, use_bias=False).apply(
        {"params": {"kernel": w}}, jnp.ones((1, 2))
    ),
}
BINARY = "add sub mul truediv floordiv mod pow matmul and_ or_ xor lt le gt ge ne"


@pytest.mark.parametrize("use", USES)
def test_use_as_an_array_names_the_cure(use):
    with pytest.raises(TypeError, match=r"jm\.lift"):
        USES[use](leaf())


def test_numpy_functions_refuse():
    with pytest.raises(TypeError, match="Compressed"):
        np.exp(leaf())


@pytest.mark.parametrize("name", BINARY.split())
@pytest.mark.parametrize("other", [2.0, np.ones((2, 3)), jnp.ones((2, 3))], ids=type)
def test_operators_refuse_from_both_sides(name, other):
    function = getattr(operator, name)
    for operands in [(leaf(), other), (other, leaf()), (leaf(), leaf())]:
        with pytest.raises(TypeError, match=r"jm\.lift"):
            function(*operands)


def test_it_presents_the_dense_array():
    w = leaf()
    assert (w.shape, w.dtype, w.ndim, w.size) == ((2, 3), jnp.float32, 2, 6)
    assert not hasattr(w, "reshape") and not hasattr(w, "nonsense")
    assert repr(w) == "Compressed(weight=float32[2,3], upper=float32[3])"
    assert "upper" in str(params())


def test_it_shows_itself_in_notebooks():
    page = leaf()._repr_html_()
    assert "<td>weight</td><td>float32[2,3]</td>" in page and "<td>upper</td>" in page
    factors = LowRank(jnp.ones((4, 2)), leaf(), "weight", (4, 3), (0,), (1,))
    assert repr(Compressed(factors)) == (
        "Compressed(weight=LowRank(float32[4,2], Compressed(weight=float32[2,3], "
        "upper=float32[3])))"
    )
    page = Compressed(factors)._repr_html_()
    assert "LowRank" in page and "<td>first</td><td>float32[4,2]</td>" in page
    assert "<td>second</td><td>Compressed(weight=float32[2,3]" in page
    assert "<td>stands for</td><td>float32[4, 3]</td>" in page


def test_tree_functions():
    tree = params()
    assert sum(x.size for x in jax.tree.leaves(tree)) == 6 + 3 + 3
    doubled = jax.tree.map(lambda x: 2 * x, tree)
    w = doubled["params"]["stem"]["kernel"]
    assert is_compressed(w) and w.lower is None
    np.testing.assert_array_equal(w.weight, 2 * np.arange(6.0).reshape(2, 3))
    np.testing.assert_array_equal(w.upper, np.full(3, 12.0))
    paths, leaves, treedef = flatten(tree)
    assert [jax.tree_util.keystr(p[1:]) for p in paths] == [
        "['stem']['bias']",
        "['stem']['kernel']",
    ]
    assert leaves[1] is tree["params"]["stem"]["kernel"]
    assert jax.tree.structure(treedef.unflatten(leaves)) == jax.tree.structure(tree)
    on_host = jax.device_get(tree)["params"]["stem"]["kernel"]
    assert isinstance(on_host.weight, np.ndarray)
    jax.tree.map(lambda _: object(), tree)  # nothing is validated
    inside = jax.jit(lambda t: t["params"]["stem"]["kernel"].weight.sum())(tree)
    assert inside == 15.0
    for clone in (copy.deepcopy(w), pickle.loads(pickle.dumps(w))):
        np.testing.assert_array_equal(clone.weight, w.weight)
    (key, _), *_ = jax.tree_util.tree_leaves_with_path(leaf())
    assert key == (jax.tree_util.GetAttrKey("weight"),)


@pytest.mark.parametrize("optimizer", [optax.adam(0.1), optax.sgd(0.1, momentum=0.9)])
def test_optax_updates(optimizer):
    tree = params()

    def loss(tree):
        return jnp.sum(tree["params"]["stem"]["kernel"].weight ** 2)

    with jax.numpy_dtype_promotion("standard"):  # which adam's step count needs
        updates, _ = optimizer.update(jax.grad(loss)(tree), optimizer.init(tree), tree)
    new = optax.apply_updates(tree, updates)["params"]["stem"]["kernel"]
    assert loss({"params": {"stem": {"kernel": new}}}) < loss(tree)
    np.testing.assert_array_equal(new.upper, np.full(3, 6.0))


def test_states_go_through_msgpack():
    state = jax.tree.map(to_state, {"kernel": leaf()}, is_leaf=is_compressed)
    blob = flax.serialization.msgpack_serialize(jax.device_get(state))
    state = flax.serialization.msgpack_restore(blob)["kernel"]
    back = from_state(Compressed(), state)
    assert sorted(back.stated()) == ["upper", "weight"]
    np.testing.assert_array_equal(back.weight, leaf().weight)
    np.testing.assert_array_equal(back.upper, leaf().upper)
    with pytest.raises(ValueError, match=r"unknown fields \['mask'\].*update jaxmet"):
        from_state(Compressed(), {"weight": 1.0, "mask": 2.0})


def test_densify_gives_arrays_or_says_why_not():
    plain = {"params": {"a": Compressed(jnp.ones(2)), "b": jnp.zeros(2)}}
    dense = densify(plain)
    assert isinstance(dense["params"]["a"], jax.Array)
    np.testing.assert_array_equal(dense["params"]["a"], np.ones(2))
    with pytest.raises(ValueError, match=r"jaxmet\.densify: 'stem/kernel'.*upper"):
        densify(params())


def structured():
    pair = LowRank(jnp.ones((2, 1)), jnp.ones((1, 3)), "weight", (2, 3), (0,), (1,))
    bounded = Compressed(jnp.ones((2, 2)), upper=jnp.full(2, 6.0))
    return {
        "params": {
            "a": {"kernel": Compressed(pair)},
            "b": {"kernel": Compressed(Pruned(bounded, (Keep(1, 3, (0, 2)),)))},
        }
    }


@pytest.mark.filterwarnings("ignore")  # the checkpointer's own
@pytest.mark.parametrize("make", [params, structured])
def test_orbax_restores_with_a_target(tmp_path, make):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    tree = make()
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "tree", tree)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "tree", tree)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(a, b)


def test_structured_leaves_survive_every_way_of_writing(tmp_path):
    tree = structured()
    assert tree["params"]["a"]["kernel"].shape == (2, 3)
    assert tree["params"]["b"]["kernel"].shape == (2, 3)
    save(tmp_path / "tree.npz", params=tree)
    for again in (
        load(tmp_path / "tree.npz").params,
        load(tmp_path / "tree.npz", like=tree).params,
        flax.serialization.from_bytes(tree, flax.serialization.to_bytes(tree)),
        pickle.loads(pickle.dumps(tree)),
        jax.tree.map(lambda a: a, tree),
    ):
        assert jax.tree.structure(again) == jax.tree.structure(tree)
        jax.tree.map(np.testing.assert_array_equal, again, tree)


def test_densify_multiplies_and_puts_back():
    tree = structured()
    np.testing.assert_array_equal(
        densify({"a": tree["params"]["a"]})["a"]["kernel"], np.ones((2, 3))
    )
    with pytest.raises(ValueError, match=r"jaxmet\.densify: 'b/kernel'.*upper"):
        densify(tree)
    part = tree["params"]["b"]["kernel"].weight.part.weight
    plain = {"b": Compressed(Pruned(part, (Keep(1, 3, (0, 2)),)))}
    np.testing.assert_array_equal(densify(plain)["b"], [[1, 0, 1], [1, 0, 1]])
