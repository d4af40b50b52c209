"""What the tests of folding share: comparisons, the formulas, a norm as a function."""

import jax
import jax.numpy as jnp
import numpy as np

from zoo_nets import normal

KEY = jax.random.key(0)
ONE_ULP = 2.0**-23
EPSILON = 1e-3  # of every norm in the zoo


def close(got, wanted, rtol, atol=0.0):
    np.testing.assert_allclose(np.asarray(got, np.float64), wanted, rtol, atol)


def same_function(apply, before, after, *inputs, rtol=1e-5):
    """Outputs equal relative to the largest one."""
    run = jax.jit(apply)
    want, got = (np.asarray(run(p, *inputs), np.float64) for p in (before, after))
    assert np.all(np.isfinite(got))
    close(got, want, 0.0, rtol * np.max(np.abs(want)))


def same_outputs(apply, before, after, *inputs, rtol=1e-5):
    """Each of several outputs by name, relative to its own largest number."""
    run = jax.jit(apply)
    wanted, found = run(before, *inputs), run(after, *inputs)
    assert wanted.keys() == found.keys()
    for name, y in wanted.items():
        y = np.asarray(y, np.float64)
        close(found[name], y, 0.0, rtol * np.max(np.abs(y)))


def same_bits(one, two):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def wide(leaves):
    return {name: np.asarray(leaf, np.float64) for name, leaf in leaves.items()}


def keys_of(norm, leaves):
    """The leaves of a norm by role, in the spelling of its front-end."""
    spellings = {
        "mean": ("mean", "~/mean_ema/average"),
        "var": ("var", "~/var_ema/average"),
        "scale": ("scale",),
        "bias": ("bias", "offset"),
    }
    return {
        role: next((f"{norm}/{e}" for e in ends if f"{norm}/{e}" in leaves), None)
        for role, ends in spellings.items()
    }


def gain_of(norm, leaves, epsilon=EPSILON):
    k = keys_of(norm, leaves)
    return leaves[k["scale"]] / np.sqrt(leaves[k["var"]] + epsilon)


def check_folded(norm, product, before, after, epsilon=EPSILON):
    """The tree after a fold into the product before, against the formulas."""
    a, b, k = wide(before), wide(after), keys_of(norm, before)
    g = gain_of(norm, a, epsilon)
    kernel = next(n for n in a if n in (f"{product}/kernel", f"{product}/w"))
    close(b[kernel], a[kernel] * g, 1e-6)
    for bias in (f"{product}/bias", f"{product}/b"):
        if bias in a:
            close(b[bias], a[bias] * g.ravel(), 1e-6)
    close(gain_of(norm, b, epsilon), np.ones_like(g), ONE_ULP)
    close(b[k["mean"]], a[k["mean"]] * g, 1e-6)
    close(b[k["var"]], a[k["var"]] * g**2, 1e-6, 1e-37)
    np.testing.assert_array_equal(b[k["bias"]], a[k["bias"]])


def affine(p, x, epsilon=EPSILON, shape=(1, -1)):
    """A batch norm over the last axis, whichever of its leaves there are."""
    gain = jax.lax.rsqrt(p["var"] + epsilon) * p.get("scale", jnp.float32(1))
    y = (
        (x - p["mean"].reshape(shape)) * gain.reshape(shape)
        if "mean" in p
        else (x * gain.reshape(shape))
    )
    return y + p["bias"].reshape(shape) if "bias" in p else y


def numbers(seed, **shapes):
    """A norm's leaves by name, or weights; shapes are tuples."""
    rng = np.random.default_rng(seed)
    draw = {
        "var": lambda s: rng.uniform(0.2, 3.0, s),
        "scale": lambda s: rng.uniform(0.3, 2.0, s) * rng.choice([-1.0, 1.0], s),
    }
    other = lambda s: rng.normal(size=s)
    return {
        k: jax.device_put(np.float32(draw.get(k, other)(s))) for k, s in shapes.items()
    }


def norm_leaves(n, seed=1, leave_out=()):
    roles = [r for r in ("mean", "var", "scale", "bias") if r not in leave_out]
    return numbers(seed, **dict.fromkeys(roles, (n,)))


def mlp(norm=affine):
    """dense, norm, relu, dense; params as a plain dict."""

    def apply(p, x):
        h = norm(p["norm"], x @ p["one"]["w"] + p["one"]["b"][None])
        return jnp.maximum(h, 0) @ p["two"]["w"]

    params = {
        "one": numbers(2, w=(6, 5), b=(5,)),
        "norm": norm_leaves(5),
        "two": numbers(3, w=(5, 4)),
    }
    return apply, params, normal(7, 6)(KEY)[0]
