"""Fake quantization against its definition, and under every transformation."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxmet.numerics.fake_quant import fake_quant
from jaxmet.numerics.grid import check_bits, grid_ends

floats = functools.partial(st.floats, width=32, allow_subnormal=False)
values = hnp.arrays(np.float32, (12,), elements=floats(-100, 100))
scales = st.sampled_from([0.0078125, 0.1, 0.3, 1.0, 1.7])
points = st.integers(0, 15)
quick = hypothesis.settings(max_examples=50)


@jax.jit
def quant(x, scale, zero_point):
    return fake_quant(x, scale, zero_point, 0, 15)


def definition(x, scale, zero_point, low, high):
    """The definition, in float64."""
    x, scale, zero_point = (np.asarray(a, np.float64) for a in (x, scale, zero_point))
    return scale * (np.clip(np.rint(x / scale) + zero_point, low, high) - zero_point)


def away_from_ties(x, scale):
    ratio = np.asarray(x, np.float64) / np.asarray(scale, np.float64)
    return np.abs(np.abs(ratio - np.floor(ratio)) - 0.5) > 1e-3


@pytest.mark.parametrize(
    ("bits", "options", "expected"),
    [
        (8, {"signed": True}, (-128, 127)),
        (8, {"signed": True, "narrow": True}, (-127, 127)),
        (2, {"signed": True, "narrow": True}, (-1, 1)),
        (4, {"signed": False}, (0, 15)),
        (4, {"signed": False, "narrow": True}, (0, 15)),
        (16, {"signed": True}, (-32768, 32767)),
        (np.int64(8), {"signed": True}, (-128, 127)),
    ],
)
def test_grid_ends(bits, options, expected):
    assert grid_ends(int(bits), **options) == expected
    assert check_bits(bits) == bits


@pytest.mark.parametrize("bits", [1, 0, -8, 17, 24, 31, 33, 8.0, "8", None, True])
def test_bad_bits_are_refused(bits):
    with pytest.raises(ValueError, match="2 to 16, or 32"):
        check_bits(bits)


@quick
@hypothesis.given(values, scales, points)
def test_it_is_the_definition(x, scale, zero_point):
    q = np.asarray(quant(x, scale, zero_point))
    clear = away_from_ties(x, np.float32(scale))
    expected = definition(x, np.float32(scale), zero_point, 0, 15)
    np.testing.assert_allclose(q[clear], expected[clear], rtol=1e-6)


def test_ties_go_to_even_and_division_is_exact():
    x = jnp.arange(-40, 41, dtype=jnp.float32) / 2
    np.testing.assert_array_equal(
        fake_quant(x, 1, 0, -15, 15), definition(x, 1, 0, -15, 15)
    )
    # x = (k + 1/2) s in float32, where a reciprocal decides many ties otherwise
    scale = np.random.default_rng(0).uniform(0.01, 1, 400).astype(np.float32)
    x = (np.arange(400, dtype=np.float32) % 100 + np.float32(0.5)) * scale
    q = np.rint(x / scale)  # float32 division
    assert (q != np.rint(x * (np.float32(1) / scale))).any()
    fn = jax.jit(lambda x, s: fake_quant(x, s, 0, -128, 127) / s)
    np.testing.assert_array_equal(np.rint(fn(x, scale)), q)


@pytest.mark.parametrize("run", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("many", [1, 32])
def test_a_scale_that_is_spread_out_divides_too(run, many):
    """Weights halfway between two steps of a scale per channel, and of one."""
    rng = np.random.default_rng(0)
    scale = rng.uniform(1e-3, 2e-3, (1, many)).astype(np.float32)
    x = (rng.integers(-120, 120, (512, 32)) + 0.5).astype(np.float32) * scale
    wanted = np.clip(np.rint(x / scale), -127, 127) * scale
    found = run(lambda x, s: fake_quant(x, s, jnp.zeros_like(s), -127, 127))(x, scale)
    np.testing.assert_array_equal(found, wanted)


@quick
@hypothesis.given(values, scales, points)
def test_idempotent_monotone_exact_zero_and_near(x, scale, zero_point):
    q = np.asarray(quant(x, scale, zero_point))
    np.testing.assert_array_equal(quant(q, scale, zero_point), q)
    order = np.argsort(x)
    assert (np.diff(q[order]) >= 0).all()
    assert quant(jnp.zeros(3), scale, zero_point).tolist() == [0, 0, 0]
    inside = (x >= -scale * zero_point) & (x <= scale * (15 - zero_point))
    assert (np.abs(x - q)[inside] <= scale / 2 * (1 + 1e-5)).all()


@quick
@hypothesis.given(values, scales, st.integers(-8, 8))
def test_powers_of_two_scale_through(x, scale, exponent):
    c = np.float32(2.0**exponent)
    left = np.asarray(quant(c * x, c * np.float32(scale), 3))
    np.testing.assert_array_equal(left, c * np.asarray(quant(x, np.float32(scale), 3)))


def case(seed=0, shape=(2, 6, 4)):
    rng = np.random.default_rng(seed)
    x = jax.device_put(np.float32(rng.normal(size=shape)))
    scale = jax.device_put(np.float32(rng.uniform(0.05, 0.3, (1, 1, 4))))
    return x, scale, jax.device_put(np.float32([[[0.0, 3, 5, 8]]]))


def per_channel(x, scale, zero_point):
    return fake_quant(x, scale, zero_point, 0, 15, axis=(2,))


def test_per_channel_is_a_loop_of_per_tensor():
    x, scale, zero_point = case()
    q = per_channel(x, scale, zero_point)
    for c in range(4):
        one = fake_quant(x[..., c], scale[0, 0, c], zero_point[0, 0, c], 0, 15)
        np.testing.assert_array_equal(q[..., c], one)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("block", [2, 3, 6, 4, 5, 7])
def test_blocks_are_a_loop_too_and_one_block_is_per_channel(block):
    x, scale, zero_point = case()
    blocks = -(-6 // block)  # the last may be shorter
    scale = scale * jnp.arange(1.0, 1 + blocks).reshape(1, -1, 1)

    def blocked(x, scale):
        return fake_quant(x, scale, zero_point, 0, 15, axis=(1, 2), block=block)

    def loop(x, scale):
        parts = [
            per_channel(
                x[:, i * block : (i + 1) * block], scale[:, i : i + 1], zero_point
            )
            for i in range(blocks)
        ]
        return jnp.concatenate(parts, 1)

    blocked, loop = jax.jit(blocked), jax.jit(loop)
    np.testing.assert_array_equal(blocked(x, scale), loop(x, scale))
    for argument in (0, 1):
        gradient, expected = (
            jax.jit(jax.grad(lambda *a, f=f: (f(*a) ** 2).sum(), argument))(x, scale)
            for f in (blocked, loop)
        )
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)
    batched = jax.vmap(blocked, (None, 0))(x, jnp.stack([scale, 2 * scale]))
    np.testing.assert_array_equal(batched[1], blocked(x, 2 * scale))


def surrogate(x, scale, zero_point, at):
    """The same function with the rounding residual of one point held fixed."""
    x0, s0, z0 = (np.asarray(a, np.float64) for a in at)
    residual = np.rint(x0 / s0) - x0 / s0
    q0 = np.rint(x0 / s0) + z0
    q = np.where(q0 < 0, 0, np.where(q0 > 15, 15, x / scale + residual + zero_point))
    return scale * (q - zero_point)


def test_gradients_are_those_of_the_surrogate():
    at = case(1)
    x0, s0, _ = at
    assert away_from_ties(x0, s0).all()
    weights = np.random.default_rng(2).normal(size=x0.shape)

    def loss(*args):
        return (jax.device_put(np.float32(weights)) * per_channel(*args) ** 2).sum()

    def oracle(*args):
        return (weights * surrogate(*args, at) ** 2).sum()

    wide = [np.asarray(a, np.float64) for a in at]
    for i, gradient in enumerate(jax.jit(jax.grad(loss, (0, 1, 2)))(*at)):
        expected = np.zeros(wide[i].shape)
        for index in np.ndindex(*wide[i].shape):
            ends = []
            for h in (1e-6, -1e-6):
                moved = [a.copy() for a in wide]
                moved[i][index] += h
                ends.append(oracle(*moved))
            expected[index] = (ends[0] - ends[1]) / 2e-6
        assert np.abs(expected).max() > 0
        np.testing.assert_allclose(gradient, expected, rtol=2e-4, atol=2e-4)


def test_grid_ends_get_no_gradient():
    x, scale, zero_point = case()
    f = lambda low, high: fake_quant(x, scale, zero_point, low, high).sum()
    assert jax.grad(f, (0, 1))(0.0, 15.0) == (0.0, 0.0)


def test_second_order_is_that_of_the_surrogate():
    x, s, z = jnp.float32(1.03), jnp.float32(0.1), jnp.float32(2)
    f = lambda *a: fake_quant(*a, 0, 15) ** 2
    residual = round(1.03 / 0.1) - 1.03 / 0.1
    # inside: (x + s r)^2 with r fixed
    expected = 2 * np.array([[1, residual, 0], [residual, residual**2, 0], [0, 0, 0]])
    hessian = jax.jit(jax.hessian(f, (0, 1, 2)))
    np.testing.assert_allclose(hessian(x, s, z), expected, atol=1e-5)
    # outside: s^2 (15 - z)^2
    n = 13.0
    cross = -4 * 0.1 * n
    expected = np.array([[0, 0, 0], [0, 2 * n**2, cross], [0, cross, 2 * 0.1**2]])
    np.testing.assert_allclose(hessian(9.0, s, z), expected, rtol=1e-4, atol=1e-5)


def loss(x, scale, zero_point):
    return (per_channel(x, scale, zero_point) ** 2).sum()


@pytest.mark.parametrize("batched", [(0, None, None), (None, 0, 0), (0, 0, None)])
def test_vmapped_gradients_are_a_loop(batched):
    x = jax.device_put(np.float32([[-0.3, 0.17], [0.42, 3.1], [0.9, -2.0]]))
    s, z = jnp.asarray([0.1, 0.2, 0.3]), jnp.asarray([0.0, 1.0, 2.0])

    def loss(x, s, z):
        return jnp.sum(fake_quant(x, s, z, 0, 7) ** 2)

    args = [a if d == 0 else a[0] for a, d in zip((x, s, z), batched, strict=True)]
    gradient = jax.grad(loss, argnums=(0, 1, 2))
    found = jax.vmap(gradient, batched)(*args)
    for i in range(3):
        one = [a[i] if d == 0 else a for a, d in zip(args, batched, strict=True)]
        for a, b in zip(found, gradient(*one), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-6)


def test_a_gradient_keeps_the_values_and_nothing_of_their_size_beside_them():
    x = jnp.linspace(-2, 2, 1000)
    chain = lambda x, s: fake_quant(jnp.sin(x), s, jnp.float32(0), -7, 7)
    _, back = jax.vjp(chain, x, jnp.float32(0.1))
    kept = [a for a in jax.tree.leaves(back) if jnp.size(a) == x.size]
    assert len(kept) == 2  # cos(x) of the sine, and sin(x)


def test_what_the_backward_pass_needs_is_computed_there():
    """On CPU too, where XLA heeds no barrier: not one more array a layer than in float."""

    def loss(quantize, x, w, s):
        for _ in range(8):
            x = quantize(jnp.tanh(x @ w), s)
        return jnp.sum(x)

    def peak(quantize):
        gradient = jax.jit(jax.grad(loss, argnums=(1, 2, 3)), static_argnums=0)
        args = jnp.ones((512, 64)), jnp.ones((64, 64)), jnp.float32(0.1)
        compiled = gradient.lower(quantize, *args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    floats = peak(lambda x, s: jnp.sin(s * x))
    found = peak(lambda x, s: fake_quant(x, s, jnp.float32(0), -7, 7))
    assert found <= 1.1 * floats


def test_forward_reverse_linearize_and_remat_agree():
    at = case()
    reverse = jax.grad(loss, (0, 1, 2))(*at)  # the one that is not compiled whole
    for other in (
        jax.jit(jax.jacfwd(loss, (0, 1, 2)))(*at),
        jax.jit(jax.grad(jax.checkpoint(loss), (0, 1, 2)))(*at),
        jax.jit(jax.grad(loss, (0, 1, 2)))(*at),
    ):
        for a, b in zip(reverse, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    _, tangent = jax.linearize(loss, *at)
    ones = [jnp.ones_like(a) for a in at]
    total = sum(np.asarray(a, np.float64).sum() for a in reverse)
    np.testing.assert_allclose(tangent(*ones), total, rtol=1e-4)


@pytest.mark.parametrize(
    "dims", [(0, None, None), (None, 0, None), (1, None, 2), (2, 0, 1)]
)
def test_vmap_is_a_loop(dims):
    x, scale, zero_point = case()
    factors = [1.0, 2.0, 0.5]
    args = [
        a if d is None else jnp.stack([a * c for c in factors], d)
        for a, d in zip((x, scale, zero_point), dims, strict=True)
    ]
    gradient = jax.grad(loss, (0, 1, 2))
    out = jax.jit(jax.vmap(per_channel, dims))(*args)
    grad = jax.jit(jax.vmap(gradient, dims))(*args)
    gradient = jax.jit(gradient)
    for i in range(3):
        one = [
            a if d is None else jnp.take(a, i, d)
            for a, d in zip(args, dims, strict=True)
        ]
        np.testing.assert_array_equal(out[i], per_channel(*one))
        for a, b in zip(grad, gradient(*one), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-5)


def test_nested_vmap_shifts_the_axis():
    x, scale, zero_point = case()
    inner = jax.vmap(per_channel, (0, None, None))
    nested = jax.vmap(inner, (None, 0, None))
    xs, scales = jnp.stack([x, -x]), jnp.stack([scale, scale / 2, 2 * scale])
    out = nested(xs, scales, zero_point)
    for i in range(3):
        for j in range(2):
            one = per_channel(xs[j], scales[i], zero_point)
            np.testing.assert_array_equal(out[i, j], one)
    jaxpr = jax.make_jaxpr(nested)(xs, scales, zero_point)
    (eqn,) = [e for e in jaxpr.eqns if e.primitive.name == "fake_quant"]
    assert eqn.params == {"axis": (4,), "block": None}
    assert [v.aval.ndim for v in eqn.invars] == [5] * 5
    assert [v.aval.shape for v in eqn.invars[1:]][:2] == [
        (3, 1, 1, 1, 4),
        (1, 1, 1, 1, 4),
    ]


def test_scan():
    x, scale, zero_point = case()
    total, _ = jax.lax.scan(
        lambda c, s: (c + per_channel(x, s, zero_point), None),
        jnp.zeros_like(x),
        jnp.stack([scale, 2 * scale]),
    )
    expected = sum(per_channel(x, c * scale, zero_point) for c in (1, 2))
    np.testing.assert_allclose(total, expected, rtol=1e-6)


def test_shard_map_values_gradients_and_wrong_specs():
    x, scale, zero_point = case(3, (8, 6, 4))
    mesh = jax.make_mesh((4,), ("i",), axis_types=(AxisType.Auto,))
    split, whole = PartitionSpec("i"), PartitionSpec()

    def sharded(out):
        specs = {"in_specs": (split, whole, whole), "out_specs": out}
        return jax.shard_map(per_channel, mesh=mesh, **specs)

    out = jax.jit(sharded(split))(x, scale, zero_point)
    np.testing.assert_array_equal(out, per_channel(x, scale, zero_point))
    gradient = jax.jit(
        jax.grad(lambda s: (sharded(split)(x, s, zero_point) ** 2).sum())
    )
    gradient = gradient(scale)
    expected = jax.jit(jax.grad(loss, 1))(x, scale, zero_point)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="out_specs"):
        sharded(whole)(x, scale, zero_point)


def test_explicit_sharding_is_kept():
    x, scale, zero_point = case(3, (8, 6, 4))
    mesh = jax.make_mesh((4,), ("i",), axis_types=(AxisType.Explicit,))
    expected = per_channel(x, scale, zero_point)
    gradient = jax.jit(jax.grad(loss, 1))(x, scale, zero_point)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, PartitionSpec("i")))
        out = jax.jit(per_channel)(x, scale, zero_point)
        assert jax.typeof(out).sharding.spec[0] == "i"
        np.testing.assert_array_equal(out, expected)
        sharded = jax.jit(jax.grad(loss, 1))(x, scale, zero_point)
        np.testing.assert_allclose(sharded, gradient, rtol=1e-4, atol=1e-4)


def test_symbolic_batch_export():
    x, scale, zero_point = case()
    (b,) = export.symbolic_shape("b")
    spec = jax.ShapeDtypeStruct((b, 6, 4), jnp.float32)
    exported = export.export(jax.jit(per_channel))(spec, scale, zero_point)
    assert exported.out_avals[0].shape[0] == b
    out = exported.call(x, scale, zero_point)
    np.testing.assert_array_equal(out, per_channel(x, scale, zero_point))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_in_float32(dtype):
    x, scale, zero_point = case()
    x = x.astype(dtype)
    q = per_channel(x, scale, zero_point)
    assert q.dtype == dtype
    expected = per_channel(x.astype(jnp.float32), scale, zero_point).astype(dtype)
    np.testing.assert_array_equal(q, expected)
    gradient = jax.grad(lambda *a: loss(*a).astype(jnp.float32), (0, 1))(
        x, scale, zero_point
    )
    assert [g.dtype for g in gradient] == [dtype, jnp.float32]


def test_a_grid_that_does_not_fit_is_refused():
    x, scale, zero_point = case()
    for bad in (scale[0, 0], scale[..., :2], jnp.ones((2, 6, 4, 1))):
        with pytest.raises(ValueError, match=r"jaxmet\.fake_quant: a grid of shape"):
            fake_quant(x, bad, 0, -7, 7)
    with pytest.raises(ValueError, match="in blocks of 4"):
        fake_quant(x, jnp.ones((1, 3, 1)), 0, -7, 7, block=4)


def test_values_and_ends_that_make_no_grid_are_refused():
    x, scale, zero_point = case()
    for low, high in (
        (7, -7),
        (np.ones((1, 1, 1)), 0),
        (jnp.asarray(2), jnp.asarray(1)),
    ):
        with pytest.raises(
            ValueError, match=r"fake_quant: low is .* and high .*Give the"
        ):
            fake_quant(x, scale, zero_point, low, high)
    last = jnp.zeros_like(scale).at[..., -1].set(1)
    with pytest.raises(ValueError, match="low is 1 and high 0"):
        fake_quant(x, scale, zero_point, last, 0)
    for whole in (jnp.arange(3), np.arange(3, dtype=np.int8), 3):
        with pytest.raises(ValueError, match=r"fake_quant: x is of int.*astype"):
            fake_quant(whole, 0.5, 0, -7, 7)
    one_point = fake_quant(x, scale, zero_point, 3, 3)  # a grid may have one point
    expected = np.broadcast_to(scale * (3 - np.asarray(zero_point)), x.shape)
    np.testing.assert_allclose(one_point, expected, rtol=1e-6)
    traced = jax.jit(fake_quant)(x, scale, zero_point, 7, -7)  # as data: not known
    assert traced.shape == x.shape
