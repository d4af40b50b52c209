"""Running trees with compressed leaves, against the same model written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import by_hand
import jaxmet as jm
from jaxmet.tree.named_leaves import named_leaves, replace_leaves
from zoo import CASES, model, twin


def bounded(params, seed=0):
    """The inverted residual with bounds of its own for each channel of both ReLU6."""
    rng = np.random.default_rng(seed)
    leaves, new = named_leaves(params), {}
    for name in ("expand", "depthwise"):
        lower = jax.device_put(np.float32(rng.uniform(-1.0, 0.3, 8)))
        upper = jax.device_put(np.float32(rng.uniform(0.5, 2.0, 8)))
        new[f"{name}/kernel"] = jm.Compressed(leaves[f"{name}/kernel"], lower, upper)
    return replace_leaves(params, new), new


def by_hand_with(params, new, x):
    p, h, y = by_hand.named(params).get, by_hand, x
    for name, groups in (("expand", 1), ("depthwise", 8)):
        leaf = new[f"{name}/kernel"]
        low = by_hand.along_last(x, leaf.lower) if leaf.lower is not None else 0.0
        high = by_hand.along_last(x, leaf.upper) if leaf.upper is not None else 6.0
        y = h.norm(p, f"{name}_bn", h.conv(p, name, y, groups))
        y = jnp.minimum(jnp.maximum(y, low), high)
    return x + h.norm(p, "project_bn", h.conv(p, "project", y))


def test_bounds_are_those_of_the_leaf():
    apply, params, (x,) = model("inverted_residual")
    tree, new = bounded(params)
    found = jax.jit(jm.lift(apply))(tree, x)
    np.testing.assert_allclose(found, by_hand_with(params, new, x), atol=1e-5)
    assert np.max(np.abs(found - apply(params, x))) > 0.1


@pytest.mark.parametrize("side", ["lower", "upper"])
def test_one_bound_alone(side):
    apply, params, (x,) = model("inverted_residual")
    tree, new = bounded(params)
    new = {n: leaf.replace(**{side: None}) for n, leaf in new.items()}
    found = jax.jit(jm.lift(apply))(replace_leaves(params, new), x)
    np.testing.assert_allclose(found, by_hand_with(params, new, x), atol=1e-5)


def test_gradients_are_those_of_the_model_by_hand():
    apply, params, (x,) = model("inverted_residual")
    tree, new = bounded(params)

    # only the weights: bounds are data that no gradient trains
    def loss(weights):
        leaves = {n: leaf.replace(weight=weights[n]) for n, leaf in new.items()}
        return jnp.sum(jm.lift(apply)(replace_leaves(params, leaves), x) ** 2)

    def by_hand_loss(weights):
        return jnp.sum(by_hand_with(replace_leaves(params, weights), new, x) ** 2)

    weights = {n: leaf.weight for n, leaf in new.items()}
    found, expected = (jax.jit(jax.grad(f))(weights) for f in (loss, by_hand_loss))
    for name, grad in expected.items():
        np.testing.assert_allclose(found[name], grad, rtol=1e-4, atol=1e-4)
        assert np.any(grad != 0)


def test_twins():
    _, params, (x,) = model("inverted_residual")
    other, _, _ = model("inverted_residual", "nnx")
    _, new = bounded(params)
    state = twin(CASES["inverted_residual"], params)
    found = jax.jit(jm.lift(other))(replace_leaves(state, new), x)
    np.testing.assert_allclose(found, by_hand_with(params, new, x), atol=1e-5)


def test_a_leaf_that_says_nothing_more_is_its_weight():
    for name in ("scan", "conv_bn_relu", "lstm"):
        apply, params, inputs = model(name)
        tree = jax.tree.map(jm.Compressed, params)
        # To rounding: on CPU the replay says convolutions otherwise.
        np.testing.assert_allclose(
            jax.jit(jm.lift(apply))(tree, *inputs),
            jax.jit(apply)(params, *inputs),
            rtol=1e-5,
            atol=1e-6,
        )


def test_a_plain_tree_goes_to_the_model_itself():
    calls = []

    def apply(params, x, flag=None):
        calls.append((params, flag))
        return {"out": x * 2.0, "same": params}

    params, x = {"w": jnp.ones(3)}, jnp.ones(3)
    outputs = jm.lift(apply)(params, x, flag="yes")
    assert calls == [(params, "yes")] and outputs["same"] is params


def test_keyword_arguments_pass():
    case = CASES["inverted_residual"]
    apply, params, (x,) = model("inverted_residual")
    tree, _ = bounded(params)
    y, state = jax.jit(lambda p, x: jm.lift(apply)(p, x, **case.train_kwargs()))(
        tree, x
    )
    assert y.shape == x.shape
    assert jax.tree.structure(state["batch_stats"]) == jax.tree.structure(
        params["batch_stats"]
    )
    plain, _ = apply(params, x, **case.train_kwargs())
    assert np.max(np.abs(y - plain)) > 0.05


def test_plain_apply_refuses_and_names_the_cure():
    apply, params, (x,) = model("inverted_residual")
    with pytest.raises(TypeError, match=r"jm\.lift\(apply\)"):
        apply(bounded(params)[0], x)


@pytest.mark.parametrize(
    ("name", "leaf"), [("conv_bn_relu", "stem"), ("clip_after_add", "branch")]
)
def test_bounds_without_a_clip_to_take_them_are_refused(name, leaf):
    """A ReLU has no bounds, and a clip after an addition has no single producer."""
    apply, params, inputs = model(name)
    kernel = named_leaves(params)[f"{leaf}/kernel"]
    ones = jnp.ones(kernel.shape[-1])
    tree = replace_leaves(params, {f"{leaf}/kernel": jm.Compressed(kernel, upper=ones)})
    with pytest.raises(
        ValueError, match=rf"jaxmet\.lift: .*'{leaf}/kernel'.*Run the model"
    ):
        jm.lift(apply)(tree, *inputs)
