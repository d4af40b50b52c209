"""The one call, with data and with nothing but shapes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmet as jm
from zoo import CASES

CONFIG = jm.QuantConfig(per_channel=False, placement="products")


@pytest.fixture(scope="module")
def case() -> tuple[Any, Any, list]:
    """A trained-looking network: its norms' statistics are those of its data."""
    apply, params, inputs = CASES["inverted_residual"].make["linen"](jax.random.key(0))
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
    params, quantizers, table = jm.ptq(apply, trained, batches, CONFIG, progress=False)
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
    assert "no norm tells" in dict(quantizers.left)["input"]
    graph = jm.trace(apply, trained, *batches[0])
    plain = jm.calibrate(trained, graph, batches, CONFIG, progress=False)
    assert quantizers.activations.keys() >= plain.activations.keys() - {"input"}
    assert decibels(case, params, quantizers) > decibels(case, trained, plain) - 3


def test_data_free_ranges_are_near_those_of_data(case: Any) -> None:
    apply, trained, batches = case
    graph = jm.trace(apply, trained, *batches[0])
    config = jm.QuantConfig()
    seen = jm.calibrate(trained, graph, batches, config, progress=False)
    told = jm.calibrate(trained, graph, None, config)
    by_shape = jm.calibrate(trained, graph, jax.ShapeDtypeStruct((1,), jnp.float32))
    assert len(told.activations) == 3
    for name, quantizer in told.activations.items():
        ratio = float(quantizer.scale / seen.activations[name].scale)
        assert 0.4 < ratio < 2.5, name
        assert quantizer.scale == by_shape.activations[name].scale
    assert told.weights.keys() == seen.weights.keys()


def test_without_data_and_without_norms_it_is_refused() -> None:
    apply, params, inputs = CASES["concatenation"].make["linen"](jax.random.key(0))
    graph = jm.trace(apply, params, *inputs)
    with pytest.raises(ValueError, match=r"jaxmet\.calibrate: .*no norm.*batches="):
        jm.calibrate(params, graph)


def test_an_iterator_that_can_be_read_once_is_refused(case: Any) -> None:
    apply, trained, batches = case
    with pytest.raises(ValueError, match=r"jaxmet\.ptq: .*read once"):
        jm.ptq(apply, trained, iter(batches))


@pytest.mark.slow
def test_few_bits_are_rounded_by_the_data(case: Any) -> None:
    apply, trained, batches = case
    config = jm.QuantConfig(weight_bits=4)
    with pytest.raises(ValueError, match="jaxmet.ptq: .*less than 8 bits.*key"):
        jm.ptq(apply, trained, batches, config, progress=False)
    params, quantizers, table = jm.ptq(
        apply, trained, batches, config, key=jax.random.key(0), progress=False
    )
    assert table["step"][-1] == "adaround"
    assert table["SQNR (dB)"][-1] > table["SQNR (dB)"][1] + 2
    np.testing.assert_allclose(
        table["SQNR (dB)"][-1], decibels(case, params, quantizers), atol=1e-2
    )
    kept = [q.scale is not None for q in quantizers.weights.values()]
    assert all(kept)
    shape = jax.ShapeDtypeStruct(batches[0][0].shape, jnp.float32)
    _, _, blind = jm.ptq(apply, trained, shape, config, progress=False)
    assert blind["step"][-1] == "correct_bias"


def test_weight_grids_of_another_model_are_not_kept(case: Any) -> None:
    apply, trained, batches = case
    graph = jm.trace(apply, trained, *batches[0])
    strange = jm.Quantizers({"elsewhere": jm.Quantizer(scale=jnp.float32(1.0))})
    with pytest.raises(ValueError, match="jaxmet.calibrate.*elsewhere"):
        jm.calibrate(trained, graph, batches, weights=strange, progress=False)
