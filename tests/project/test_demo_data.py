"""The demo's files: what is in them, how large they are, and that they fit together."""

from importlib.resources import files

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxmet.demo import data
from jaxmet.demo.network import Network


@pytest.fixture(scope="module")
def loaded():
    return data.load()


def test_split(loaded):
    calibration, test, labels = loaded
    assert calibration.shape == (512, 28, 28, 1)
    assert test.shape == (len(labels), 28, 28, 1)
    assert len(labels) >= 3500
    assert calibration.dtype == test.dtype == jnp.float32
    assert labels.dtype == jnp.int32


@pytest.mark.parametrize("which", [0, 1])
def test_images_are_bytes_over_255(loaded, which):
    images = np.asarray(loaded[which], np.float64)
    assert images.min() == 0 and images.max() == 1
    assert np.abs(images * 255 - np.round(images * 255)).max() < 1e-4
    assert images.std(axis=(1, 2, 3)).min() > 0  # no image is blank


def test_classes_are_balanced(loaded):
    counts = np.bincount(np.asarray(loaded[2]), minlength=10)
    # 10,000 test images have 1,000 of each class, the subset is a random one
    assert len(counts) == len(data.CLASSES) == 10
    expected = counts.sum() / 10
    assert np.abs(counts - expected).max() < 4 * np.sqrt(expected)


def test_calibration_is_not_in_test(loaded):
    seen = {image.tobytes() for image in np.asarray(loaded[0])}
    assert not any(image.tobytes() in seen for image in np.asarray(loaded[1]))


@pytest.mark.parametrize("name", ["data.npz", "weights.npz"])
def test_files_are_small(name):
    size = len(files("jaxmet.demo").joinpath(name).read_bytes())
    assert 0 < size <= 3_000_000


def test_licence_is_beside_the_data():
    text = files("jaxmet.demo").joinpath("DATA-LICENSE").read_text("utf-8")
    assert "MIT License" in text and "Zalando SE" in text


def test_weights_fit_the_network():
    image = jnp.zeros((1, 28, 28, 1))
    initial = jax.eval_shape(Network().init, jax.random.key(0), image)
    trained = data.weights()
    assert jax.tree.structure(trained) == jax.tree.structure(initial)
    for path, leaf in jax.tree.leaves_with_path(trained):
        assert leaf.dtype == jnp.float32, path
        assert bool(jnp.all(jnp.isfinite(leaf))), path
    shapes = [
        jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (trained, initial)
    ]
    assert shapes[0] == shapes[1]
    variances = [
        leaf
        for path, leaf in jax.tree.leaves_with_path(trained["batch_stats"])
        if path[-1].key == "var"
    ]
    assert len(variances) == 17
    assert min(float(jnp.min(leaf)) for leaf in variances) >= 0


def test_network_stays_small():
    """At most 10 million multiply-adds an image, counted from the equations."""
    image = jnp.zeros((1, 28, 28, 1))
    jaxpr = jax.make_jaxpr(Network().apply)(data.weights(), image)
    total, convolutions = 0, 0
    for equation in jaxpr.eqns:
        if equation.primitive is lax.conv_general_dilated_p:
            kernel, output = equation.invars[1].aval.shape, equation.outvars[0].aval
            total += int(np.prod(output.shape) * np.prod(kernel[:-1]))
            convolutions += 1
    assert convolutions == 17
    assert 1_000_000 < total <= 10_000_000


def test_training_mode_updates_the_statistics(loaded):
    variables = data.weights()
    forward = jax.jit(
        lambda v, x: Network().apply(v, x, train=True, mutable=["batch_stats"])
    )
    _, updates = forward(variables, loaded[0][:32])
    before, after = variables["batch_stats"], updates["batch_stats"]
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert not np.allclose(before["stem_bn"]["mean"], after["stem_bn"]["mean"])


def test_accuracy(loaded):
    """Plain inference on the first 1,000 test images."""
    _, test, labels = loaded
    predict = jax.jit(lambda v, x: jnp.argmax(Network().apply(v, x), axis=-1))
    variables = data.weights()
    right = [
        np.asarray(predict(variables, test[i : i + 250])) == labels[i : i + 250]
        for i in range(0, 1000, 250)
    ]
    assert np.mean(right) >= 0.90
