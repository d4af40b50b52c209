"""The one call, with data and with nothing but shapes."""

import dataclasses
import sys
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmet as jm
from zoo import model

CONFIG = jm.QuantConfig(per_channel=False, placement="products")


@pytest.fixture(scope="module")
def case() -> tuple[Any, Any, list]:
    """A trained-looking network: its norms' statistics are those of its data."""
    apply, params, inputs = model("inverted_residual")
    shape = (8, *inputs[0].shape[1:])
    batches = [(jax.random.normal(jax.random.key(k), shape),) for k in range(4)]
    graph = jm.trace(apply, params, *batches[0])
    return (
        apply,
        jm.reestimate_batch_norm(params, graph, batches, progress=False),
        batches,
    )


def decibels(case: Any, params: Any, quantizers: jm.Quantizers) -> float:
    apply, trained, batches = case
    device = jax.jit(jm.simulate(apply, quantizers))
    signal = noise = 0.0
    for (x,) in batches:
        y = np.asarray(apply(trained, x), np.float64)
        signal += np.sum(y**2)
        noise += np.sum((np.asarray(device(params, x)) - y) ** 2)
    return 10 * np.log10(signal / noise)


@pytest.mark.slow
def test_its_steps_and_what_they_were_worth(case: Any) -> None:
    apply, trained, batches = case
    before = jax.tree.map(np.array, trained)
    params, quantizers, table = jm.ptq(
        apply, trained, batches, CONFIG, rounding=False, progress=False
    )
    jax.tree.map(np.testing.assert_array_equal, before, trained)
    steps = ["as trained", "fold_batch_norm", "equalize", "correct_bias"]
    assert table["step"] == steps or list(table["step"]) == steps
    found = decibels(case, params, quantizers)
    np.testing.assert_allclose(table["SQNR (dB)"][-1], found, atol=1e-2)
    graph = jm.trace(apply, trained, *batches[0])
    plain = jm.calibrate(trained, graph, batches, CONFIG, progress=False)
    np.testing.assert_allclose(
        table["SQNR (dB)"][0], decibels(case, trained, plain), atol=1e-2
    )
    assert found > table["SQNR (dB)"][0] + 1


@pytest.mark.slow
def test_shapes_alone_are_enough_where_norms_tell_the_rest(case: Any) -> None:
    apply, trained, batches = case
    shape = jax.ShapeDtypeStruct(batches[0][0].shape, jnp.float32)
    params, quantizers, table = jm.ptq(apply, trained, shape, CONFIG, progress=False)
    assert set(table["SQNR (dB)"]) == {None}
    assert "no norm tells" in dict(quantizers.skipped)["input"]
    graph = jm.trace(apply, trained, *batches[0])
    plain = jm.calibrate(trained, graph, batches, CONFIG, progress=False)
    assert quantizers.activations.keys() >= plain.activations.keys() - {"input"}
    assert decibels(case, params, quantizers) > decibels(case, trained, plain) - 3


def test_data_free_ranges_are_near_those_of_data(case: Any) -> None:
    apply, trained, batches = case
    graph = jm.trace(apply, trained, *batches[0])
    config = jm.QuantConfig()
    seen = jm.calibrate(trained, graph, batches, config, progress=False)
    reported = jm.calibrate(trained, graph, None, config)
    by_shape = jm.calibrate(trained, graph, jax.ShapeDtypeStruct((1,), jnp.float32))
    assert len(reported.activations) == 3
    for name, quantizer in reported.activations.items():
        ratio = float(quantizer.scale / seen.activations[name].scale)
        assert 0.4 < ratio < 2.5, name
        assert quantizer.scale == by_shape.activations[name].scale
    assert reported.weights.keys() == seen.weights.keys()


def test_without_data_and_without_norms_it_is_refused() -> None:
    apply, params, inputs = model("concatenation")
    graph = jm.trace(apply, params, *inputs)
    with pytest.raises(ValueError, match=r"jaxmet\.calibrate: .*no norm.*batches="):
        jm.calibrate(params, graph)


def test_an_iterator_that_can_be_read_once_is_refused(case: Any) -> None:
    apply, trained, batches = case
    with pytest.raises(ValueError, match=r"jaxmet\.ptq: .*read once"):
        jm.ptq(apply, trained, iter(batches))


# Rounding


def dense(p: Any, x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ p["a"] + p["bias"][None]) @ p["b"]


@pytest.fixture(scope="module")
def small() -> tuple[Any, list[jax.Array]]:
    rng = np.random.default_rng(3)
    shapes = {"a": (6, 8), "b": (8, 5), "bias": (8,)}
    params = {
        n: jax.device_put(np.float32(rng.normal(size=s))) for n, s in shapes.items()
    }
    mixed = rng.normal(size=(6, 6))  # inputs that depend on each other
    x = (rng.normal(size=(2, 32, 6)) @ mixed).astype(np.float32)
    return params, [jnp.asarray(one) for one in x]


def run(small: Any, *config: Any, **options: Any) -> Any:
    params, batches = small
    config = config or (jm.QuantConfig(per_channel=False),)
    return jm.ptq(dense, params, batches, *config, progress=False, **options)


def steps_from(weight: Any, quantizer: jm.Quantizer) -> np.ndarray:
    """A weight in steps of its quantizer, whose scale must be a number already."""
    assert quantizer.scale is not None
    return np.asarray(weight, np.float64) / np.asarray(quantizer.scale, np.float64)


@pytest.fixture(scope="module")
def rounded(small: Any) -> Any:
    return run(small)


def test_eight_bits_are_rounded_by_the_data(small: Any, rounded: Any) -> None:
    params, quantizers, table = rounded
    assert list(table["step"])[-3:] == ["equalize", "adaround", "correct_bias"]
    for name in "ab":
        steps = steps_from(params[name], quantizers.weights[name])
        np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3)
        assert 64 < np.abs(steps).max() < 128  # 8 bits, and not fewer


def test_rounding_false_corrects_biases_only(small: Any, rounded: Any) -> None:
    params, quantizers, table = run(small, rounding=False)
    assert list(table["step"])[-2:] == ["equalize", "correct_bias"]
    assert all(q.scale is None for q in quantizers.weights.values())
    steps = np.asarray(params["a"]) / np.abs(params["a"]).max() * 127
    assert np.abs(steps - np.rint(steps)).max() > 0.1  # still the float weights
    np.testing.assert_allclose(*(t["SQNR (dB)"][:3] for t in (table, rounded[2])))
    # Weights alone: activations are in float, so that what differs is the rounding.
    found = []
    x = jnp.concatenate(small[1])
    y = np.asarray(dense(small[0], x), np.float64)
    for new, q in ((params, quantizers), rounded[:2]):
        q = dataclasses.replace(q, activations={}, shared=())
        z = np.asarray(jax.jit(jm.simulate(dense, q))(new, x), np.float64)
        found.append(np.sum((z - y) ** 2) / np.sum(y**2))
    assert found[1] < 0.5 * found[0]


@pytest.mark.slow
def test_the_key_is_key_zero_and_reaches_the_steps(small: Any, rounded: Any) -> None:
    same = run(small, key=jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, rounded[:2], same[:2])
    other, _, _ = run(small, key=jax.random.key(1))
    assert np.any(other["a"] != rounded[0]["a"])


@pytest.mark.slow
@pytest.mark.parametrize("bits", [16, 32])
def test_more_than_eight_bits_are_not_rounded_by_data(small: Any, bits: int) -> None:
    _, _, table = run(small, jm.QuantConfig(weight_bits=bits, per_channel=False))
    assert "adaround" not in table["step"]
    rule = jm.Rule("b", weight_bits=4)
    some = jm.QuantConfig(weight_bits=bits, per_channel=False, rules=[rule])
    assert "adaround" in run(small, some)[2]["step"]


def test_rounding_is_true_or_false(small: Any) -> None:
    stated = r"jaxmet\.ptq: rounding is 'gram'.*True or False"
    with pytest.raises(ValueError, match=stated):
        run(small, rounding="gram")


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_a_convolutional_network_is_rounded_by_the_data(case: Any, bits: int) -> None:
    apply, trained, batches = case
    config = jm.QuantConfig(weight_bits=bits)
    params, quantizers, table = jm.ptq(apply, trained, batches, config, progress=False)
    assert list(table["step"])[-2:] == ["adaround", "correct_bias"]
    found = decibels(case, params, quantizers)
    np.testing.assert_allclose(table["SQNR (dB)"][-1], found, atol=1e-2)
    ratios = dict(zip(table["step"], table["SQNR (dB)"], strict=True))
    assert ratios["adaround"] > ratios["equalize"] + {4: 2, 8: -0.2}[bits]
    assert ratios["correct_bias"] > ratios["adaround"] - 0.2
    kept = [q.scale is not None for q in quantizers.weights.values()]
    assert all(kept)
    shape = jax.ShapeDtypeStruct(batches[0][0].shape, jnp.float32)
    _, _, blind = jm.ptq(apply, trained, shape, config, progress=False)
    assert list(blind["step"])[-2:] == ["equalize", "correct_bias"]


def test_weight_grids_of_another_model_are_not_kept(case: Any) -> None:
    apply, trained, batches = case
    graph = jm.trace(apply, trained, *batches[0])
    strange = jm.Quantizers({"elsewhere": jm.Quantizer(scale=jnp.float32(1.0))})
    with pytest.raises(ValueError, match="jaxmet.calibrate.*elsewhere"):
        jm.calibrate(trained, graph, batches, weights=strange, progress=False)


def test_arrays_among_the_keywords_reach_every_step() -> None:
    """As if the model had them inside: a scale, and the key of its noise."""
    rng = np.random.default_rng(0)
    draw = lambda *n: jax.device_put(np.float32(rng.normal(size=n)))
    params, x = {"one": draw(5, 6), "two": draw(6, 3)}, draw(8, 5)
    given = {"gain": draw(6), "seed": jax.random.key(3)}

    def apply(params: Any, x: Any, *, gain: Any, seed: Any, twice: bool) -> Any:
        x = jax.nn.relu(x @ params["one"]) * gain[None]
        x = x + 0.1 * jax.random.normal(seed, x.shape)
        return (2.0 if twice else 1.0) * (x @ params["two"])

    inside = lambda params, x: apply(params, x, **given, twice=True)
    found = jm.ptq(apply, params, [x], progress=False, **given, twice=True)
    wanted = jm.ptq(inside, params, [x], progress=False)
    jax.tree.map(np.testing.assert_array_equal, found[:2], wanted[:2])
    assert found[2]["SQNR (dB)"] == wanted[2]["SQNR (dB)"]


@pytest.mark.slow
def test_what_loses_is_named() -> None:
    """A value with one huge channel: outputs that are mostly noise are warned of, with a cure."""

    def apply(params: Any, x: jax.Array) -> jax.Array:
        x = jnp.maximum(x @ params["first"]["kernel"], 0)
        return x @ params["second"]["kernel"]

    kernels = jax.random.normal(jax.random.key(0), (2, 16, 16))
    params = {"first": {"kernel": kernels[0]}, "second": {"kernel": kernels[1]}}
    # Its neighbours have all that the outputs are made of.
    params["first"]["kernel"] = params["first"]["kernel"].at[:, 0].multiply(1e4)
    params["second"]["kernel"] = params["second"]["kernel"].at[0].set(0)
    x = jax.random.normal(jax.random.key(1), (64, 16))
    graph = jm.trace(apply, params, x)
    (bad,) = (n.name for n in graph.nodes if n.kind == "activation")
    batches = [x[:32], x[32:]]
    options: dict[str, Any] = {"progress": False, "rounding": False}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, _, table = jm.ptq(apply, params, batches, **options)
    assert table["SQNR (dB)"][-1] > 20 and not caught  # equalizing mends it
    config = jm.QuantConfig(activation_bits=2)
    with pytest.warns(UserWarning, match=r"jaxmet\.ptq: the outputs keep") as seen:
        jm.ptq(apply, params, batches, config, **options)
    (text,) = {str(w.message) for w in seen}
    assert f"jm.Rule({bad!r}, activation_bits=4)" in text
    assert "dB with" in text


def test_a_loss_that_stays_is_warned_of(case: tuple[Any, Any, list]) -> None:
    """Measured against the model as it is first quantized, every later step loses."""
    apply, params, batches = case
    graph = jm.trace(apply, params, *batches[0])
    config = jm.QuantConfig(bias="int32")
    first = jm.calibrate(params, graph, batches, config, progress=False)
    reference = jm.simulate(apply, first), params
    options: dict[str, Any] = {"progress": False, "rounding": False}
    match = r"after the step as trained it was inf.* without (fold|equalize|correct)"
    with pytest.warns(UserWarning, match=match):
        jm.ptq(apply, params, batches, reference=reference, **options)


def test_equalization_that_loses_is_undone() -> None:
    """A channel behind the mean is dead: its scale is free there, and ruins what is before."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(26, 4, 6)).astype(np.float32)
    rng.normal(size=(26, 6, 6, 3))
    drawn = {n: rng.normal(size=s) for n, s in (("a", (6, 8)), ("c", 8), ("b", (8, 5)))}
    params = {n: a.astype(np.float32) for n, a in drawn.items()}

    def apply(p: Any, x: Any) -> Any:
        return jax.nn.relu((x @ p["a"] + p["c"][None, None]).mean(1)) @ p["b"]

    new, _, table = jm.ptq(apply, params, [x], rounding=False, progress=False)
    rows = {row["step"]: row for row in table}
    assert "undone: it gave" in rows["equalize"]["note"]
    assert rows["equalize"]["SQNR (dB)"] == rows["fold_batch_norm"]["SQNR (dB)"] > 30
    assert np.array_equal(new["a"], params["a"])


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_a_correction_that_loses_is_undone(
    case: Any, shift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply, trained, batches = case
    module = sys.modules["jaxmet.analysis.ptq"]
    correct = module.correct_bias
    seen = []

    def shifted(params: Any, *args: Any, **options: Any) -> Any:
        seen.append(params)
        params, report = correct(params, *args, **options)
        return jax.tree.map(lambda a: a + shift if a.ndim == 1 else a, params), report

    monkeypatch.setattr(module, "correct_bias", shifted)
    options: dict[str, Any] = {"rounding": False, "progress": False}
    params, quantizers, table = jm.ptq(apply, trained, batches, CONFIG, **options)
    same = all(
        np.array_equal(a, b)
        for a, b in zip(*map(jax.tree.leaves, (params, seen[0])), strict=True)
    )
    assert same == (shift > 0)
    assert ("undone: it gave" in table["note"][-1]) == (shift > 0)
    np.testing.assert_allclose(
        table["SQNR (dB)"][-1], decibels(case, params, quantizers), atol=1e-2
    )


def test_bits_are_short_for_a_configuration(case: Any) -> None:
    apply, trained, batches = case
    shape = jax.ShapeDtypeStruct(batches[0][0].shape, jnp.float32)
    given = apply, trained, shape
    config = jm.QuantConfig(weight_bits=4, bias="int32")
    wanted = jm.ptq(*given, config, progress=False)
    found = jm.ptq(*given, bits=4, progress=False)
    for one, two in zip(wanted[:2], found[:2], strict=True):
        assert jax.tree.structure(one) == jax.tree.structure(two)
        jax.tree.map(np.testing.assert_array_equal, one, two)
    kernels = [q.bits for q in found[1].weights.values() if q.product is None]
    assert set(kernels) == {4}
    with pytest.raises(ValueError, match=r"jaxmet\.ptq: bits is 4, and a config is"):
        jm.ptq(*given, config, bits=4)
    with pytest.raises(ValueError, match=r"jaxmet\.ptq: bits is 1"):
        jm.ptq(*given, bits=1)
