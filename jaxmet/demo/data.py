"""The demo's files: a part of Fashion-MNIST, and the network's trained weights.

Fashion-MNIST: Xiao, Rasul and Vollgraf, [a Novel Image Dataset for Benchmarking
Machine Learning Algorithms](https://arxiv.org/abs/1708.07747), 2017; its licence is in
`DATA-LICENSE`. `benchmarks/train_demo.py` makes both files.
"""

from importlib.resources import files
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


def _read(name: str) -> dict[str, np.ndarray]:
    source = files("jaxmet.demo").joinpath(name)
    with source.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def _as_input(images: np.ndarray) -> Float[Array, "batch 28 28 1"]:
    return jnp.asarray(images, jnp.float32)[..., None] / 255


def load() -> tuple[
    Float[Array, "calibration 28 28 1"],
    Float[Array, "test 28 28 1"],
    Int[Array, " test"],
]:
    """Calibration images, test images and test labels; images lie in 0 to 1.

    The calibration images are training images, without their labels. The test images
    are a random part of the official test set: nothing was trained or chosen on them.
    """
    arrays = _read("data.npz")
    return (
        _as_input(arrays["calibration"]),
        _as_input(arrays["test"]),
        jnp.asarray(arrays["labels"], jnp.int32),
    )


def weights() -> dict[str, Any]:
    """The trained variables of `Network`: `{'params': ..., 'batch_stats': ...}`."""
    variables: dict[str, Any] = {}
    for name, array in _read("weights.npz").items():
        *path, leaf = name.split("/")
        branch = variables
        for key in path:
            branch = branch.setdefault(key, {})
        branch[leaf] = jnp.asarray(array, jnp.float32)
    return variables
