"""Grids and rounded weights in NumPy, against the quantizers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmet as jm
from jaxmet.tree.host_rounding import grid_in_numpy, round_in_numpy

QUANTIZERS = {
    "channel": jm.Quantizer(bits=4, axis=(1,)),
    "tensor": jm.Quantizer(bits=8),
    "asymmetric": jm.Quantizer(bits=4, axis=(1,), symmetric=False),
    "wide": jm.Quantizer(bits=3, narrow=False, axis=(0,)),
    "unsigned": jm.Quantizer(bits=4, signed=False),
    "blocks": jm.Quantizer(bits=4, axis=(1,), block=20, block_axis=0),
    "percentile": jm.Quantizer(bits=4, calibrator="percentile", percentile=90.0),
    "stated": jm.Quantizer(scale=0.3, bits=4),
    "stated, with a zero point": jm.Quantizer(
        scale=jnp.full((1, 32), -0.25), zero_point=jnp.full((1, 32), 6.4), bits=4,
        symmetric=False, axis=(1,),
    ),
    "range": jm.Quantizer(maximum=jnp.full((1, 32), 1.5), learn="minmax", axis=(1,)),
    "at least": jm.Quantizer(bits=4, least=jnp.full((1, 1), 0.5)),
    "off": jm.Quantizer(bits=4, enabled=False),
    "float": jm.Quantizer(bits=32),
}  # fmt: skip
ARRAYS = {
    "normal": np.random.default_rng(0).normal(size=(48, 32)),
    "zero": np.zeros((48, 32)),
    "large": 1e30 * np.random.default_rng(1).normal(size=(48, 32)),
    "infinite": np.where(np.eye(48, 32) > 0, np.inf, 1.0),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("array", ARRAYS)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_same_as_the_quantizer(name, array, dtype):
    quantizer = QUANTIZERS[name]
    with np.errstate(over="ignore"):
        x = ARRAYS[array].astype(np.float32).astype(jnp.dtype(dtype))
    found, wanted = grid_in_numpy(quantizer, x), quantizer.grid(jnp.asarray(x))
    for one, two in zip(found, wanted, strict=True):
        assert isinstance(one, np.ndarray)
        assert one.shape == two.shape
        assert one.dtype == two.dtype
        np.testing.assert_allclose(one, two, rtol=3e-7)
    rounded = round_in_numpy(quantizer, x)
    assert rounded.dtype == x.dtype
    wanted = np.asarray(quantizer(jnp.asarray(x))).astype(np.float32)
    near = np.isclose(rounded.astype(np.float32), wanted, rtol=1e-5, equal_nan=True)
    assert np.mean(~near) < 0.005  # and those lie midway between two


def test_layers_of_many_sizes_share_a_program():
    found = []

    def listen(event, duration, **_):
        found.append(event == "/jax/core/compile/backend_compile_duration")

    rng, quantizer = np.random.default_rng(0), jm.Quantizer(bits=5, axis=(1,))
    jax.monitoring.register_event_duration_secs_listener(listen)
    for outs in (3, 17, 300, 999):
        grid_in_numpy(quantizer, rng.normal(size=(9, outs)).astype(np.float32))
    jax.monitoring.unregister_event_duration_listener(listen)
    assert sum(found) <= 1
