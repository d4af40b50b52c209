"""The networks of `benchmarks/compression.py`, with their committed weights."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmet as jm
from jaxmet.demo import data

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import residual

IMAGES = 300


class Case:
    """One network: traced, and compiled once as it is."""

    def __init__(self, name):
        self.name = name
        self.network, self.variables = residual.load(name)
        _, images, labels = data.load()
        self.images, self.labels = images[:IMAGES], labels[:IMAGES]
        self.graph = jm.trace(self.network.apply, self.variables, self.images[:1])
        self.logits = jax.jit(self.network.apply)(self.variables, self.images)


@pytest.fixture(
    scope="module",
    params=["resnet18", pytest.param("resnet50", marks=pytest.mark.slow)],
)
def case(request):
    return Case(request.param)


def test_the_file_holds_the_leaves_of_the_module(case):
    drawn = jax.eval_shape(case.network.init, jax.random.key(0), case.images[:1])
    assert jax.tree.structure(drawn) == jax.tree.structure(case.variables)
    for found, wanted in zip(jax.tree.leaves(case.variables), jax.tree.leaves(drawn)):
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
        np.testing.assert_array_equal(found.astype(jnp.float16), found)


def test_the_network_is_trained(case):
    assert case.logits.shape == (IMAGES, 10)
    right = jnp.argmax(case.logits, axis=-1) == case.labels
    assert np.mean(right) > 0.9


def test_every_kernel_is_a_layer_and_every_norm_folds(case):
    paths, _ = jax.tree.flatten_with_path(case.variables["params"])
    names = ["/".join(key.key for key in path) for path, _ in paths]
    kernels = [n.removesuffix("/kernel") for n in names if n.endswith("/kernel")]
    assert sorted(layer.name for layer in case.graph.layers) == sorted(kernels)
    assert not case.graph.unread
    folded = jm.fold_batch_norm(case.variables, case.graph)
    logits = jax.jit(case.network.apply)(folded, case.images)
    np.testing.assert_allclose(logits, case.logits, rtol=0, atol=1e-3)


def test_depth_and_width_are_those_of_its_name(case):
    layers = [layer for layer in case.graph.layers if "shortcut" not in layer.name]
    assert len(layers) == int(case.name.removeprefix("resnet"))
    stem = case.variables["params"]["stem"]["kernel"]
    assert stem.shape == (3, 3, 1, case.network.width)
