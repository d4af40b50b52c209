"""The formulations for CPU are the convolutions they stand for, and stay on CPU.

The oracles are the primitive itself, in value and derivatives, and a loop in float64.
"""

import itertools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxmet import evaluate
from jaxmet.engine.backend.cpu import computed_once
from jaxmet.engine.backend.shifts import (
    multiply_and_shift,
    place_by_place,
    shift_and_multiply,
)
from zoo import model

NHWC = ("NHWC", "HWIO", "NHWC")
NCHW = ("NCHW", "OIHW", "NCHW")
MIXED = ("HWNC", "OHWI", "NCHW")


def idle(node, run, operands):
    return run(*operands), None


def replayed(apply, **kw):
    return lambda *args: evaluate(apply, idle, **kw)(*args)[0]


def conv(
    window=(3, 3), inputs=6, outputs=6, groups=1, size=(8, 9), layout=NHWC, **options
):
    """A convolution as a model, with its arrays."""
    options = {"window_strides": (1,) * len(window), "padding": "SAME", **options}
    sizes = {"N": 2, "C": inputs, "I": inputs // groups, "O": outputs}
    rng = np.random.default_rng(5)

    def drawn(letters, space):
        places = sizes | dict(zip("DHW"[-len(window) :], space, strict=True))
        shape = [places[c] for c in letters]
        return jax.device_put(np.float32(rng.normal(size=shape)))

    def apply(p, x):
        return lax.conv_general_dilated(
            x, p["w"], dimension_numbers=layout, feature_group_count=groups, **options
        )

    return apply, {"w": drawn(layout[1], window)}, drawn(layout[0], size)


POINTWISE = {"window": (1, 1), "outputs": 5}
DEPTHWISE = {"groups": 6}
COLOURS = {"inputs": 3, "outputs": 4}
SAID = {
    "1x1": POINTWISE,
    "1x1, strided": {**POINTWISE, "window_strides": (2, 3)},
    "1x1, padded": {**POINTWISE, "padding": ((1, 0), (0, 2)), "window_strides": (2, 2)},
    "1x1, cropped": {**POINTWISE, "padding": ((-1, 0), (0, -2))},
    "1x1, dilated": {**POINTWISE, "rhs_dilation": (2, 2)},
    "1x1, channels first": {**POINTWISE, "layout": NCHW},
    "1x1, mixed": {**POINTWISE, "layout": MIXED, "window_strides": (1, 2)},
    "1x1, one pixel": {**POINTWISE, "size": (1, 1)},
    "depthwise": DEPTHWISE,
    "depthwise, cropped": {**DEPTHWISE, "padding": ((-1, 2), (1, -2))},
    "depthwise, lopsided": {**DEPTHWISE, "padding": ((2, 0), (0, 3))},
    "depthwise, 5x3": {**DEPTHWISE, "window": (5, 3), "window_strides": (2, 1)},
    "depthwise, 1x1": {**DEPTHWISE, "window": (1, 1)},
    "depthwise, multiplier": {"groups": 6, "outputs": 18},
    "groups of two": {"groups": 3, "outputs": 9, "window_strides": (2, 2)},
    "groups, channels first": {"groups": 3, "outputs": 9, "layout": NCHW},
    "colours": COLOURS,
    "colours, strided": {**COLOURS, "window_strides": (2, 2)},
    "colours, channels first": {**COLOURS, "layout": NCHW},
    "grey": {"inputs": 1, "outputs": 4, "window": (5, 5)},
    "1d": {
        "window": (3,), "groups": 6, "size": (11,), "layout": ("NWC", "WIO", "NWC"),
    },
    "3d": {
        "window": (2, 3, 1), "groups": 6, "size": (4, 5, 3), "rhs_dilation": (2, 1, 1),
        "layout": ("NDHWC", "DHWIO", "NDHWC"),
    },
}  # fmt: skip
SWEEP = itertools.product(
    (1, 2), ("SAME", "VALID"), (1, 2), (1, 2), (NHWC, NCHW, MIXED)
)
SAID |= {
    f"sweep: stride {stride}, {padding}, dilation {apart}, x{outputs}, {layout[0]}": {
        "groups": 4, "inputs": 4, "outputs": 4 * outputs, "padding": padding,
        "window_strides": (stride, stride), "rhs_dilation": (apart, 1),
        "layout": layout, "size": (7, 6),
    }
    for stride, padding, apart, outputs, layout in SWEEP
    if (stride, apart) != (2, 2) or layout == MIXED
}  # fmt: skip
LEFT = {
    "many inputs": {"inputs": 4, "outputs": 4},
    "many products": {"inputs": 2, "window": (5, 5)},
    "wide window": {"groups": 6, "window": (8, 8)},
    "transposed": {
        "groups": 6, "lhs_dilation": (2, 2), "padding": ((1, 1), (1, 1)),
    },
    "other sum": {"groups": 6, "preferred_element_type": jnp.float64},
}  # fmt: skip


def with_gradient(apply):
    def loss(p, x):
        y = apply(p, x)
        return jnp.sum(jnp.sin(y)), y

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def close(found, expected, tolerance=1e-4):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, tolerance, tolerance)


def lowered(f, *args, platform="cpu"):
    """The text of a program, as lowered for a platform."""
    return jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.one_in(5)
@pytest.mark.parametrize("name", SAID)
def test_it_is_the_convolution(name):
    apply, p, x = conv(**SAID[name])
    text = lowered(replayed(apply), p, x)
    assert text.count("stablehlo.convolution") == 0
    wrap = jax.jit if name.startswith("sweep") else with_gradient
    close(wrap(replayed(apply))(p, x), wrap(apply)(p, x))


SHIFTS = [multiply_and_shift, place_by_place, shift_and_multiply]


@pytest.mark.one_in(5)
@pytest.mark.parametrize("name", [n for n in SAID if not n.startswith("1x1")])
def test_three_ways_to_say_the_sum(name):
    """Derivatives are transposes of the other two."""
    apply, p, x = conv(**SAID[name])
    equations = jax.make_jaxpr(apply)(p, x).eqns
    (found,) = [e for e in equations if e.primitive.name == "conv_general_dilated"]
    ways = jax.jit(lambda x, w: [say(found.params, x, w) for say in SHIFTS])
    plain = jax.jit(lambda x, w: apply({"w": w}, x))
    w = jax.random.normal(jax.random.key(3), p["w"].shape)
    close(ways(x, w), [plain(x, w)] * 3)


def test_the_gradient_of_a_kernel_keeps_one_copy_of_the_input():
    shape = {"groups": 8, "inputs": 8, "outputs": 8, "window": (5, 5), "size": (40, 40)}
    apply, p, x = conv(**shape, padding="SAME")
    compiled = with_gradient(replayed(apply)).lower(p, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * x.nbytes


@pytest.mark.parametrize("name", LEFT)
def test_what_it_does_not_cover_keeps_every_bit(name):
    with jax.enable_x64(name == "other sum"):
        apply, p, x = conv(**LEFT[name])
        assert lowered(replayed(apply), p, x).count("stablehlo.convolution") == 1
        assert np.array_equal(jax.jit(replayed(apply))(p, x), jax.jit(apply)(p, x))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int8])
def test_other_dtypes_keep_the_convolution(dtype):
    apply, p, x = conv(**DEPTHWISE)
    p, x = jax.tree.map(lambda a: (10 * a).astype(dtype), (p, x))
    assert np.array_equal(jax.jit(replayed(apply))(p, x), jax.jit(apply)(p, x))


@pytest.mark.parametrize("name", ["1x1", "depthwise", "colours"])
def test_it_is_switched_off_and_stays_on_cpu(name):
    apply, p, x = conv(**SAID[name])
    off = replayed(apply, cpu_formulations=False)
    assert lowered(off, p, x).count("stablehlo.convolution") == 1
    assert np.array_equal(jax.jit(off)(p, x), jax.jit(apply)(p, x))
    for platform in ("cuda", "tpu"):
        text = lowered(replayed(apply), p, x, platform=platform)
        assert text.count("stablehlo.convolution") == 1
        assert text.count("stablehlo.multiply") == 0


def test_a_strided_depthwise_convolution_by_hand():
    """Two inputs a group, two outputs, stride 2, dilation 2, uneven padding."""
    apply, p, x = conv(
        groups=3, outputs=6, window_strides=(2, 2), rhs_dilation=(2, 1), padding=((1, 2), (0, 1))
    )  # fmt: skip
    image = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 2), (0, 1), (0, 0)))
    kernel = np.asarray(p["w"], np.float64)
    found = np.asarray(jax.jit(replayed(apply))(p, x))
    expected = np.zeros(found.shape)
    for _, row, column, out in np.ndindex(*found.shape):
        group = out // 2
        for i, j, c in np.ndindex(3, 3, 2):
            place = image[:, 2 * row + 2 * i, 2 * column + j, 2 * group + c]
            expected[:, row, column, out] += place * kernel[i, j, c, out] / 2
    np.testing.assert_allclose(found, expected, 1e-5, 1e-5)


@pytest.mark.parametrize("name", ["1x1, strided", "groups of two", "colours, strided"])
def test_forward_and_second_derivatives_and_vmap(name):
    apply, p, x = conv(**SAID[name] | {"size": (4, 5)})
    stated = replayed(apply)

    def curved(f):
        def energy(p, x):
            return jnp.sum(f(p, x) ** 3)

        def push(x, dx):  # forward over reverse
            return jax.jvp(lambda x: jax.grad(energy)(p, x), (x,), (dx,))

        return jax.jit(lambda x, y: (push(x, y), jax.vmap(f, (None, 0))(p, x[:, None])))

    close(curved(stated)(x, x[::-1]), curved(apply)(x, x[::-1]), 1e-3)


def test_it_exports_with_a_symbolic_batch():
    apply, p, x = conv(**SAID["depthwise"])
    (batch,) = jax.export.symbolic_shape("b")
    shape = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
    exported = jax.export.export(jax.jit(replayed(apply)), platforms=("cpu", "tpu"))
    close(exported(p, shape).call(p, x), apply(p, x))


@pytest.mark.parametrize("name", ["inverted_residual", "grouped", "resnet"])
def test_a_model_is_equal_to_rounding(name):
    apply, params, inputs = model(name)
    found = jax.jit(replayed(apply))(params, *inputs)
    close(found, jax.jit(apply)(params, *inputs))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_computing_once_changes_no_bit_and_no_gradient(dtype):
    special = [0.0, -0.0, jnp.inf, -jnp.inf, jnp.nan, 1e-42, 3.0]
    x = jnp.asarray([3, -1, 0] if dtype == jnp.int32 else special, dtype)
    for f in (computed_once, jax.jit(computed_once), jax.vmap(computed_once)):
        assert np.asarray(f(x)).tobytes() == np.asarray(x).tobytes()
    if dtype != jnp.int32:
        gradient = jax.grad(lambda x: jnp.sum(computed_once(x)).astype(jnp.float32))(x)
        assert np.array_equal(gradient, np.ones(len(x)))
    # What keeps fusion from repeating it is there, and on CPU alone.
    count = [
        lowered(computed_once, x, platform=p).count("divide") for p in ("cpu", "tpu")
    ]
    assert count == [dtype != jnp.int32, 0]
