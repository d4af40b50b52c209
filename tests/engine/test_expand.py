"""Factorized and pruned trees compute what the dense trees that they stand for compute."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxmet as jm
from jaxmet import Compressed, LowRank, Pruned
from jaxmet.engine.program.program import flatten as program
from jaxmet.tree import plain_arrays
from jaxmet.tree.named_leaves import named_leaves, replace_leaves
from jaxmet.tree.structures import Keep, multiplied
from zoo import CASES, model

densify = jax.jit(plain_arrays.densify)  # one program a tree, not one an operation

QUICK = (
    "inverted_residual",
    "concatenation",
    "flatten",
    "squeeze_excite",
    "remat",
    "scan",
)
FRONTS = [
    pytest.param(
        name,
        case.frontends[0],
        marks=[] if name in QUICK else [pytest.mark.slow],
        id=name,
    )
    for name, case in CASES.items()
]


def some(rng, size):
    """A few of so many entries, not all of them."""
    count = rng.integers(1, size)
    return tuple(map(int, np.sort(rng.choice(size, count, replace=False))))


def prune_at_random(params, rng, share=0.6):
    """Each axis of each leaf loses entries, or not, as the dice say."""
    found = {}
    for name, leaf in named_leaves(params).items():
        keep = tuple(
            Keep(axis, n, some(rng, n))
            for axis, n in enumerate(leaf.shape)
            if n > 1
            and rng.random() < share
            and jnp.issubdtype(leaf.dtype, jnp.floating)
        )
        if keep:
            part = np.asarray(leaf)
            for axis, _, indices in keep:
                part = np.take(part, np.array(indices), axis=axis)
            found[name] = Compressed(Pruned(jnp.asarray(part), keep))
    return replace_leaves(params, found), found


def assert_same(found, wanted):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5),
        found,
        wanted,
    )


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("name", "front"), FRONTS)
def test_what_is_pruned_is_as_if_it_were_zero(name, front):
    apply, params, inputs = model(name, front)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    tree, found = prune_at_random(params, rng)
    assert found
    wanted = jax.jit(apply)(densify(tree), *inputs)
    assert_same(jax.jit(jm.lift(apply))(tree, *inputs), wanted)


def counted(apply, tree, *inputs):
    """Operations of the compiled model, as XLA counts them."""
    compiled = jax.jit(jm.lift(apply)).lower(tree, *inputs).compile()
    return compiled.cost_analysis()["flops"]


CONVOLUTIONS = {
    "same": {"padding": "SAME"},
    "strided": {"padding": "SAME", "window_strides": (2, 3)},
    "valid": {"padding": "VALID", "window_strides": (1, 2)},
    "asymmetric": {"padding": ((2, 0), (0, 1))},
    "dilated": {"padding": "SAME", "rhs_dilation": (2, 1)},
    "transposed": {"padding": ((1, 1), (1, 1)), "lhs_dilation": (2, 2)},
    "grouped": {"padding": "SAME", "window_strides": (2, 2), "feature_group_count": 2},
}


def factors(rng, method, shape, groups, rank):
    kh, kw, ins, outs = shape
    first = (kh, 1) if method == "spatial" else (1, 1)
    second = (1, kw) if method == "spatial" else (kh, kw)
    a = rng.normal(size=(*first, ins, groups * rank)).astype(np.float32)
    b = rng.normal(size=(*second, rank, outs)).astype(np.float32)
    return LowRank(jnp.array(a), jnp.array(b), method, shape, (2,), (3,))


@pytest.mark.parametrize("method", ["spatial", "weight"])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_two_convolutions_are_the_one_they_stand_for(kind, method):
    options, rng = CONVOLUTIONS[kind], np.random.default_rng(1)
    groups = options.get("feature_group_count", 1)
    leaf = factors(rng, method, (3, 4, 6 // groups, 8), groups, 2)
    x = jnp.array(rng.normal(size=(2, 9, 11, 6)).astype(np.float32))

    def apply(params, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.nn.relu(
            lax.conv_general_dilated(
                x, params["conv"]["kernel"], dimension_numbers=numbers,
                **({"window_strides": (1, 1)} | options),
            )
        )  # fmt: skip

    tree = {"conv": {"kernel": Compressed(leaf)}}
    dense = densify(tree)
    by_hand = np.zeros(leaf.shape)
    for y, z, g in np.ndindex(3, 4, groups):
        outs = slice(g * 8 // groups, (g + 1) * 8 // groups)
        one = leaf.first[y if method == "spatial" else 0, 0, :, 2 * g : 2 * g + 2]
        two = leaf.second[0 if method == "spatial" else y, z, :, outs]
        by_hand[y, z, :, outs] = np.asarray(one) @ np.asarray(two)
    np.testing.assert_allclose(dense["conv"]["kernel"], by_hand, atol=1e-5)
    wanted = apply(dense, x)
    np.testing.assert_allclose(
        jax.jit(jm.lift(apply))(tree, x), wanted, rtol=1e-4, atol=1e-3
    )
    graph = jm.trace(apply, tree, x)
    assert [n.name for n in graph.layers] == ["conv/in", "conv/out"]
    kernels = [n.weight.name for n in graph.layers if n.weight is not None]
    assert kernels == ["conv/in/kernel", "conv/out/kernel"]


def test_factors_of_a_dense_layer_with_many_axes():
    rng = np.random.default_rng(2)
    first = jnp.array(rng.normal(size=(3, 4, 1, 2)).astype(np.float32))
    second = jnp.array(rng.normal(size=(1, 2, 5, 6)).astype(np.float32))
    leaf = LowRank(first, second, "weight", (3, 4, 5, 6), (0, 1), (2, 3))
    by_hand = np.einsum("abr,rcd->abcd", first[:, :, 0], second[0])
    np.testing.assert_allclose(multiplied(leaf, first, second), by_hand, atol=1e-5)
    x = jnp.array(rng.normal(size=(7, 3, 4)).astype(np.float32))

    def apply(params, x):
        return jnp.einsum("nab,abcd->ncd", x, params["dense"]["kernel"])

    tree = {"dense": {"kernel": Compressed(leaf)}}
    found = jax.jit(jm.lift(apply))(tree, x)
    np.testing.assert_allclose(found, np.einsum("nab,abcd->ncd", x, by_hand), atol=1e-3)
    dense = jnp.array(by_hand)
    assert counted(apply, tree, x) < 0.5 * counted(
        apply, {"dense": {"kernel": dense}}, x
    )


def test_a_pruned_factor():
    rng = np.random.default_rng(3)
    leaf = factors(rng, "spatial", (3, 3, 6, 8), 1, 4)
    ins, ranks, outs = (0, 2, 5), (1, 2), (0, 1, 6, 7)
    first = leaf.first[:, :, list(ins)][..., list(ranks)]
    second = leaf.second[:, :, list(ranks)][..., list(outs)]
    pruned = LowRank(
        Compressed(Pruned(first, (Keep(2, 6, ins), Keep(3, 4, ranks)))),
        Compressed(Pruned(second, (Keep(2, 4, ranks), Keep(3, 8, outs)))),
        "spatial", leaf.shape, (2,), (3,),
    )  # fmt: skip
    x = jnp.array(rng.normal(size=(2, 5, 5, 6)).astype(np.float32))

    def apply(params, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=numbers
        )

    tree = {"conv": {"kernel": Compressed(pruned)}}
    found = jax.jit(jm.lift(apply))(tree, x)
    np.testing.assert_allclose(found, apply(densify(tree), x), atol=1e-3)
    assert np.all(np.asarray(found)[..., [2, 3, 4, 5]] == 0)


def test_nothing_that_was_pruned_is_computed():
    """Both convolutions of a chain run with half of the channels between them."""
    rng = np.random.default_rng(4)
    kernels = [rng.normal(size=(3, 3, 8, 8)).astype(np.float32) for _ in range(2)]
    x = jnp.array(rng.normal(size=(2, 8, 8, 8)).astype(np.float32))

    def apply(params, x):
        for name in ("a", "b"):
            x = lax.conv_general_dilated(
                x, params[name]["kernel"], (1, 1), "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )  # fmt: skip
            x = jax.nn.relu6(x + params[name]["bias"][None, None, None])
        return x

    def leaf(array, axis, keep):
        part = jnp.array(np.take(array, keep, axis=axis))
        return Compressed(Pruned(part, (Keep(axis, 8, keep),)))

    kept = (1, 2, 5, 7)
    bias = np.ones(8, np.float32)
    tree = {
        "a": {"kernel": leaf(kernels[0], 3, kept), "bias": leaf(bias, 0, kept)},
        "b": {"kernel": leaf(kernels[1], 2, kept), "bias": jnp.array(bias)},
    }
    graph = jm.trace(apply, tree, x)
    shapes = {n: v.shape for n, v in named_leaves(tree).items()}
    assert shapes["a/kernel"] == (3, 3, 8, 4) and shapes["b/kernel"] == (3, 3, 4, 8)
    assert [n.name for n in graph.layers] == ["a", "b"]
    dense = {
        k: {n: jnp.array(a) for n, a in v.items()} for k, v in densify(tree).items()
    }
    assert counted(apply, tree, x) < 0.52 * counted(apply, dense, x)
    # The gradient is that of what is kept, through the rectifier's own rule.
    loss = lambda tree: jnp.sum(jm.lift(apply)(tree, x) ** 2)
    grads = jax.jit(jax.grad(loss))(tree)
    full = jax.jit(jax.grad(lambda tree: jnp.sum(apply(tree, x) ** 2)))(dense)
    np.testing.assert_allclose(
        grads["a"]["kernel"].weight.part,
        full["a"]["kernel"][..., list(kept)],
        rtol=1e-3,
    )


def test_names_of_parts_at_the_root_and_in_nnx_paths():
    pair = LowRank(jnp.ones((2, 1)), jnp.ones((1, 3)), "weight", (2, 3), (0,), (1,))
    assert list(named_leaves({"w": Compressed(pair)})) == ["w/in", "w/out"]
    nested = {"params": {"a": {"kernel": Compressed(pair)}, "b": jnp.ones(1)}}
    assert list(named_leaves(nested)) == ["a/in/kernel", "a/out/kernel", "b"]


def test_the_program_of_a_plain_tree_is_untouched():
    apply, params, inputs = model("conv_bn_relu")
    jaxpr = jax.make_jaxpr(jm.lift(apply))(params, *inputs)
    assert str(jaxpr) == str(jax.make_jaxpr(apply)(params, *inputs))
    assert program(jaxpr).equations


def test_a_pruned_factor_that_the_model_casts():
    """Parameters in float32, products in bfloat16: ordinary mixed precision."""

    def apply(params, x):
        a, b = (params[n].astype(jnp.bfloat16) for n in ("a", "b"))
        h = lax.conv(jnp.moveaxis(x, -1, 1).astype(jnp.bfloat16), a, (1, 1), "SAME")
        return jax.nn.relu(h).mean((2, 3)) @ b

    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "a": jax.random.normal(keys[0], (8, 3, 3, 3)),
        "b": jax.random.normal(keys[1], (8, 10)),
    }
    x = jax.random.normal(keys[2], (4, 8, 8, 3))
    small = jm.factorize(params, jm.trace(apply, params, x), ratios=0.6)
    small = jm.prune(small, jm.trace(apply, small, x), 0.5)
    exact, found = apply(densify(small), x), jax.jit(jm.lift(apply))(small, x)
    assert found.dtype == jnp.bfloat16
    off = jnp.linalg.norm((exact - found).astype(jnp.float32))
    assert off < 0.01 * jnp.linalg.norm(exact.astype(jnp.float32))
