"""Names of parameters by path, and what globs select."""

import collections

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax.core import freeze

from jaxmet import Compressed
from jaxmet.tree.globs import match, select
from jaxmet.tree.named_leaves import named_leaves, parameter_names, replace_leaves

Pair = collections.namedtuple("Pair", "left right")
Leaf = collections.namedtuple("Leaf", "value")


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(2, (1, 1), name="stem")(x)
        return nn.BatchNorm(use_running_average=True, name="stem_bn")(x)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(1, 2, (1, 1), rngs=rngs)
        self.stem_bn = nnx.BatchNorm(2, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs)])


def test_linen_names_have_no_collection():
    variables = jax.jit(Linen().init)(jax.random.key(0), jnp.ones((1, 2, 2, 1)))
    names = {"stem/kernel", "stem/bias", "stem_bn/scale", "stem_bn/bias"}
    statistics = {"stem_bn/mean", "stem_bn/var"}
    assert set(parameter_names(variables)) == names | statistics
    assert set(parameter_names(variables["params"])) == names
    assert set(parameter_names(freeze(variables))) == names | statistics


def test_nnx_names_equal_linen_names():
    _, state = nnx.split(Nnx(nnx.Rngs(0)))
    assert {n for n in parameter_names(state) if n.startswith("stem")} == {
        *("stem/kernel", "stem/bias", "stem_bn/scale", "stem_bn/bias"),
        *("stem_bn/mean", "stem_bn/var"),
    }
    assert "layers/0/kernel" in parameter_names(state)


def test_value_is_dropped_by_key_type_not_by_text():
    tree = {"attn": {"value": 1.0, "query": 2.0}}
    assert parameter_names(tree) == ["attn/query", "attn/value"]
    assert parameter_names([Leaf(1.0)]) == ["0/value"]


def test_equinox_haiku_and_plain_names():
    mlp = eqx.filter(eqx.nn.MLP(2, 2, 3, 1, key=jax.random.key(0)), eqx.is_array)
    assert parameter_names(mlp)[0] == "layers/0/weight"
    assert parameter_names({"net/~/conv2d_d": {"w": 1.0}}) == ["net/~/conv2d_d/w"]
    assert parameter_names({"w": [1.0, 2.0]}) == ["w/0", "w/1"]
    assert parameter_names({"p": Pair(1.0, 2.0)}) == ["p/left", "p/right"]
    assert parameter_names({"w": 1.0}) == ["w"]
    assert parameter_names(jnp.ones(2)) == ["params"]


def test_a_params_key_below_the_top_is_no_collection():
    assert parameter_names({"a": {"params": {"w": 1.0}}}) == ["a/params/w"]
    both = {"params": {"w": 1.0}, "state": {"m": 2.0}}
    assert parameter_names(both) == ["w", "m"]


def test_a_compressed_leaf_is_one_leaf():
    leaf = Compressed(jnp.ones(2), lower=jnp.zeros(2), upper=jnp.ones(2))
    tree = {"params": {"a": {"kernel": leaf, "bias": jnp.ones(2)}}}
    assert list(named_leaves(tree)) == ["a/bias", "a/kernel"]
    assert named_leaves(tree)["a/kernel"] is leaf


def test_clashing_names_say_their_collection_and_parameters_keep_theirs():
    tree = {
        "batch_stats": {"n": {"s": 1.0}},
        "other": {"n": {"s": 2.0}},
        "params": {"n": {"s": 3.0}},
    }
    assert named_leaves(tree) == {"batch_stats/n/s": 1.0, "other/n/s": 2.0, "n/s": 3.0}
    del tree["params"]["n"]
    assert named_leaves(tree) == {"batch_stats/n/s": 1.0, "other/n/s": 2.0}
    assert named_leaves({"a/b": 1.0, "a": {"b": 2.0}}) == {"a|b": 1.0, "a/b": 2.0}


def test_replace_leaves_keeps_the_tree():
    tree = {"params": {"a": {"w": 1.0, "b": 2.0}}, "batch_stats": {"m": 3.0}}
    new = replace_leaves(tree, {"a/w": 5.0, "m": 7.0})
    assert new == {"params": {"a": {"w": 5.0, "b": 2.0}}, "batch_stats": {"m": 7.0}}
    assert tree["params"]["a"]["w"] == 1.0
    _, state = nnx.split(Nnx(nnx.Rngs(0)))
    other = replace_leaves(state, {"stem/bias": jnp.full(2, 9.0)})
    assert jax.tree.structure(other) == jax.tree.structure(state)
    assert named_leaves(other)["stem/bias"].tolist() == [9.0, 9.0]
    with pytest.raises(ValueError, match=r"replace_leaves.*'a/v'.*'a/w'"):
        replace_leaves(tree, {"a/v": 1.0})


@pytest.mark.parametrize(
    ("glob", "name", "expected"),
    [
        ("stem", "stem", True),
        ("stem", "stem/kernel", True),
        ("stem", "stem:0", True),
        ("stem", "stem_bn/scale", False),
        ("stem", "block/stem", False),
        ("*/kernel", "a/b/kernel", True),
        ("a*", "a/b/c", True),
        ("a?", "ab", True),
        ("a?", "a", False),
        ("conv_[12]/*", "conv_2/kernel", True),
        ("conv_[12]/*", "conv_3/kernel", False),
        ("Stem", "stem", False),
        ("['a/b']", "['a/b']", True),
    ],
)
def test_match(glob, name, expected):
    assert match(glob, name) is expected


def test_select_keeps_the_order_of_the_names_and_refuses_the_unknown():
    names = ["b/kernel", "a/kernel", "a/bias", "stem/kernel"]
    assert select("*/kernel", names) == ["b/kernel", "a/kernel", "stem/kernel"]
    assert select(["a", "b"], iter(names)) == ["b/kernel", "a/kernel", "a/bias"]
    with pytest.raises(ValueError, match=r"jaxmet\.only: .*'stem/kernal'.*'stem/ker"):
        select("stem/kernal", names, caller="only")
    with pytest.raises(ValueError, match="nothing to choose from"):
        select("stem", [])
    with pytest.raises(ValueError, match=r"Names look like 'b/kernel'"):
        select("zzzz", names)
