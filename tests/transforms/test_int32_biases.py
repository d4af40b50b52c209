"""Biases as integers, in folded norms too, against integer arithmetic by hand."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmet as jm
from jaxmet.tree.named_leaves import named_leaves, replace_leaves

INT32 = jm.QuantConfig(bias="int32")


class Net(nn.Module):
    """Convolutions with and without a bias of their own, norms with and without one."""

    own: bool = True
    shift: bool = True
    gain: bool = True

    @nn.compact
    def __call__(self, x):
        for i, width in enumerate((6, 5)):
            x = nn.Conv(width, (3, 3), use_bias=self.own, name=f"conv{i}")(x)
            x = nn.BatchNorm(
                use_running_average=True,
                use_bias=self.shift,
                use_scale=self.gain,
                name=f"bn{i}",
            )(x)
            x = nn.relu(x)
        return nn.Dense(3, name="head")(jnp.mean(x, axis=(1, 2)))


@functools.cache
def made(seed=0, **options):
    rng = np.random.default_rng(seed)
    x = jax.device_put(np.float32(rng.normal(size=(4, 6, 6, 3))))
    net = Net(**options)
    variables = jax.jit(net.init)(jax.random.key(seed), x)

    def random(path, a):
        name = jax.tree_util.keystr(path)
        a = rng.normal(size=a.shape)
        if "var" in name or ("bn" in name and "scale" in name):
            a = 0.5 + np.abs(a)
        return jax.device_put(np.float32(a if "kernel" not in name else a / 3))

    variables = jax.tree_util.tree_map_with_path(random, variables)
    return net.apply, variables, x


def calibrated(apply, params, x, config=INT32):
    graph = jm.trace(apply, params, x)
    return graph, jm.calibrate(params, graph, [x], config, progress=False)


def grid(q):
    zero = 0 if q.zero_point is None else int(q.zero_point)
    return np.float64(q.scale), zero, q.ends


def integer_forward(params, q, x, top=127):
    """The two convolutions in int64 with int32 biases; the codes after each rectifier."""
    leaves = {n: np.asarray(a, np.float64) for n, a in named_leaves(params).items()}
    s, z, ends = grid(q.activations["input"])
    codes = np.clip(np.rint(np.asarray(x, np.float64) / s) + z, *ends).astype(np.int64)
    found = []
    for i in (0, 1):
        w = leaves[f"conv{i}/kernel"]
        s_w = np.abs(w).max((0, 1, 2)) / top
        least = q.weights[f"conv{i}/kernel"].least
        if least is not None:
            s_w = np.maximum(s_w, np.float64(least).reshape(-1))
        levels = np.rint(w / s_w).astype(np.int64)
        zero = np.zeros(w.shape[-1])
        bias = leaves.get(f"bn{i}/bias", zero) - leaves[f"bn{i}/mean"]
        bias = bias + leaves.get(f"conv{i}/bias", zero)
        bias = np.rint(bias / (s * s_w)).astype(np.int64)
        padded = np.pad(codes - z, ((0, 0), (1, 1), (1, 1), (0, 0)))
        n = codes.shape[1]
        acc = bias + sum(
            padded[:, a : a + n, b : b + n] @ levels[a, b]
            for a in range(3)
            for b in range(3)
        )
        assert np.abs(bias).max() < 2**31 and np.abs(acc).max() < 2**31
        y, z_y, ends = grid(q.activations[f"conv{i}/relu"])
        real = np.maximum(acc, 0) * (s * s_w)
        codes = np.clip(np.rint(real / y) + z_y, *ends).astype(np.int64)
        s, z = y, z_y
        found.append(codes)
    return found


def codes_of(apply, params, q, x):
    """What the simulation puts on the quantizers after the rectifiers."""

    def hook(node, run, operands):
        result = run(*operands)
        one = q.activation(node.name)
        result = result if one is None else one(result)
        return result, result if node.name.endswith("relu") else None

    rounded = jm.round_weights(params, q)
    _, seen = jax.jit(jm.evaluate(apply, hook))(rounded, x)
    found = []
    for i in (0, 1):
        s, z, _ = grid(q.activations[f"conv{i}/relu"])
        found.append(np.rint(np.float64(seen[f"conv{i}/relu"]) / s) + z)
    return found


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"own": False},
        {"shift": False},
        {"own": False, "shift": False, "gain": False},
    ],
    ids=str,
)
def test_a_folded_network_is_integer_arithmetic(options):
    apply, params, x = made(**options)
    graph = jm.trace(apply, params, x)
    params = jm.fold_batch_norm(params, graph)
    config = jm.QuantConfig(weight_bits=4, bias="int32")
    graph, q = calibrated(apply, params, x, config)
    holder = "bias" if options.get("shift", True) else "mean"
    for i in (0, 1):
        one = q.weights[f"bn{i}/{holder}"]
        source = "input" if i == 0 else "conv0/relu"
        assert one.product == (f"conv{i}/kernel", source)
        assert f"conv{i}/bias" not in q.weights
    exact = integer_forward(params, q, x, 7)
    for a, b in zip(codes_of(apply, params, q, x), exact, strict=True):
        assert np.mean(a != b) < 1e-3 and np.abs(a - b).max() <= 1
    # and float biases are something else
    plain = calibrated(apply, params, x, jm.QuantConfig(weight_bits=4))[1]
    other = codes_of(apply, params, plain, x)
    assert max(np.mean(a != b) for a, b in zip(other, exact, strict=True)) > 1e-2
    # the shift is a whole number of steps, half a step at most from what it was
    leaves = named_leaves(params)
    new = named_leaves(jm.round_weights(params, q))
    for i in (0, 1):
        s = np.float64(q.activations["input" if i == 0 else "conv0/relu"].scale)
        s = s * np.abs(np.float64(leaves[f"conv{i}/kernel"])).max((0, 1, 2)) / 7
        shift = lambda t, i=i: sum(
            sign * np.float64(t[n])
            for n, sign in (
                (f"bn{i}/bias", 1),
                (f"bn{i}/mean", -1),
                (f"conv{i}/bias", 1),
            )
            if n in t
        )
        steps = shift(new) / s
        np.testing.assert_allclose(steps, np.rint(steps), atol=2e-2)
        assert np.all(np.abs(shift(new) - shift(leaves)) <= 0.51 * s)
    table = jm.plan(params, graph, config)
    assert len(table.where(kind="bias")) == 3
    assert {r["name"] for r in table.where(kind="bias")} == {
        n for n, one in q.weights.items() if one.product
    }


def test_an_unfolded_norm_keeps_its_reason():
    apply, params, x = made()
    graph, q = calibrated(apply, params, x)
    left = dict(q.skipped)
    for i in (0, 1):
        assert left[f"bn{i}"].startswith("the parameters of a norm stay in float")
        assert "fold_batch_norm" in left[f"bn{i}"]
        assert q.weights[f"conv{i}/bias"].product and f"bn{i}/bias" not in q.weights
    plain = dict(calibrated(apply, params, x, jm.QuantConfig())[1].skipped)
    assert plain["bn0"] == "the parameters of a norm stay in float"
    shapes = jax.eval_shape(lambda: params)
    (row,) = jm.plan(shapes, graph, INT32).where(name="bn0")
    assert "not folded" in row["note"]


def test_a_dead_channel_gets_a_scale_that_holds_its_bias():
    apply, params, x = made(own=False)
    leaves = named_leaves(params)
    kernel = leaves["conv1/kernel"].at[..., 2].multiply(1e-12)
    params = replace_leaves(
        params,
        {"conv1/kernel": kernel, "bn1/mean": 0 * leaves["bn1/mean"],
         "bn1/bias": leaves["bn1/bias"].at[2].set(-3.0)},
    )  # fmt: skip
    params = jm.fold_batch_norm(params, jm.trace(apply, params, x))
    graph, q = calibrated(apply, params, x)
    s_x = np.float64(q.activations["conv0/relu"].scale)
    weight = q.weights["conv1/kernel"]
    found = np.float64(weight.grid(named_leaves(params)["conv1/kernel"])[0]).reshape(-1)
    w = np.abs(np.float64(named_leaves(params)["conv1/kernel"])).max((0, 1, 2)) / 127
    np.testing.assert_allclose(found[2], 3.0 / (2.0**30 * s_x), rtol=1e-5)
    np.testing.assert_allclose(np.delete(found, 2), np.delete(w, 2), rtol=1e-5)
    np.testing.assert_allclose(
        named_leaves(jm.round_weights(params, q))["bn1/bias"][2], -3.0, rtol=1e-6
    )
    stated = dict(q.skipped)["conv1/kernel (channels)"]
    assert stated.endswith(": channels 2") and "int32" in stated
    assert "conv0/kernel (channels)" not in dict(q.skipped)
    for a, b in zip(
        codes_of(apply, params, q, x), integer_forward(params, q, x), strict=True
    ):
        assert np.mean(a != b) < 1e-3 and np.abs(a - b).max() <= 1
    # whatever follows keeps it: pinning, other widths, rounding, one scale per tensor, files
    pinned = q.pin(params)
    np.testing.assert_allclose(
        np.asarray(pinned.weights["conv1/kernel"].scale).reshape(-1), found, rtol=1e-6
    )
    for other in (q, pinned):
        narrow = other.set("*/kernel", bits=16).weights["conv1/kernel"]
        scale = narrow.grid(named_leaves(params)["conv1/kernel"])[0]
        np.testing.assert_allclose(scale.reshape(-1)[2], found[2], rtol=1e-5)
    whole = q.set("conv1/kernel", axis=None).weights["conv1/kernel"]
    assert whole.grid(named_leaves(params)["conv1/kernel"])[0].size == 1


@pytest.mark.slow
def test_a_raised_scale_survives_adaptive_rounding():
    apply, params, x = made(own=False)
    leaves = named_leaves(params)
    params = replace_leaves(
        params,
        {
            "conv1/kernel": leaves["conv1/kernel"].at[..., 2].multiply(1e-12),
            "bn1/mean": 0 * leaves["bn1/mean"],
            "bn1/bias": leaves["bn1/bias"].at[2].set(-3.0),
        },
    )
    params = jm.fold_batch_norm(params, jm.trace(apply, params, x))
    graph, q = calibrated(apply, params, x)
    new, after = jm.adaround(
        params, graph, q, [x], key=jax.random.key(0), progress=False
    )
    rounded = named_leaves(jm.round_weights(new, after))
    np.testing.assert_allclose(rounded["bn1/bias"][2], -3.0, rtol=1e-4)


def test_the_largest_bias_by_one_scale_a_tensor():
    """Nothing is raised where the largest weight decides, however small the others are."""
    apply, params, x = made(own=False)
    params = jm.fold_batch_norm(params, jm.trace(apply, params, x))
    _, q = calibrated(apply, params, x, jm.QuantConfig(per_channel=False, bias="int32"))
    assert all(one.least is None for one in q.weights.values())
    for a, b in zip(
        jax.tree.leaves(jm.round_weights(params, q)),
        jax.tree.leaves(params),
        strict=True,
    ):
        assert np.isfinite(a).all() and a.dtype == b.dtype


def test_saved_edited_and_seen(tmp_path):
    apply, params, x = made()
    params = jm.fold_batch_norm(params, jm.trace(apply, params, x))
    _, q = calibrated(apply, params, x)
    jm.save(tmp_path / "q.npz", quantizers=q)
    again = jm.load(tmp_path / "q.npz")["quantizers"]
    assert jax.tree.structure(again) == jax.tree.structure(q)
    off = q.set("bn0/bias", enabled=False)
    rounded = named_leaves(jm.round_weights(params, off))
    np.testing.assert_array_equal(rounded["bn0/bias"], named_leaves(params)["bn0/bias"])
    with pytest.raises(ValueError, match=r"'bn0/bias' is a sum with 'bn0/mean'"):
        jm.round_weights({"params": params["params"]}, q)
    gradient = jax.jit(jax.grad(
        lambda p: jnp.sum(jm.simulate(apply, q)(p, x) ** 2)
    ))(params)  # fmt: skip
    assert np.any(named_leaves(gradient)["bn0/bias"] != 0)


@pytest.mark.slow
def test_the_noise_of_a_shift_is_told():
    apply, params, x = made()
    params = jm.fold_batch_norm(params, jm.trace(apply, params, x))
    graph, q = calibrated(apply, params, x)
    table = jm.noise(params, graph, q, [x], progress=False)
    assert "bn0/bias" in table["tensor"]
    assert np.isfinite([r["SQNR (dB)"] for r in table]).all()


def test_training_beside_the_norms_rounds_the_folded_shift():
    """simulate(fold=graph) of the unfolded tree is the simulation of the folded one."""
    apply, params, x = made()
    graph = jm.trace(apply, params, x)
    folded = jm.fold_batch_norm(params, graph)
    _, q = calibrated(apply, folded, x)
    one = jax.jit(jm.simulate(apply, q, fold=graph))(params, x)
    two = jax.jit(jm.simulate(apply, q))(folded, x)
    step = float(q.activations["head"].scale)
    assert np.abs(np.asarray(one - two)).max() < 2.01 * step
    assert np.mean(np.abs(np.asarray(one - two)) > 0.01 * step) < 0.2


@pytest.mark.parametrize("rule", ["bn0", "conv0", "bn0/bias", "conv0/bias"])
def test_rules_for_a_bias_in_a_norm(rule):
    apply, params, x = made()
    params = jm.fold_batch_norm(params, jm.trace(apply, params, x))
    config = jm.QuantConfig(rules=[jm.Rule(rule, bias="int32")])
    graph, q = calibrated(apply, params, x, config)
    assert [n for n, one in q.weights.items() if one.product] == ["bn0/bias"]
    other = jm.QuantConfig(bias="int32", rules=[jm.Rule(rule, bias="float")])
    table = jm.plan(params, graph, other)
    assert {r["name"] for r in table.where(kind="bias")} == {"bn1/bias", "head/bias"}
