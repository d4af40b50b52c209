"""Fashion-MNIST for the benchmarks: read, split, scored, trained on."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from train_demo import VALIDATION, as_input, augment, read_idx

BATCH = 128
Tree = Any
Predict = Callable[..., jax.Array]


class Fashion:
    """Training images and those that count, with what they show.

    With `validate` 5,000 training images count and are not trained on, and the test images
    are not read.
    """

    def __init__(self, folder: Path, *, validate: bool) -> None:
        images = read_idx(folder / "train-images-idx3-ubyte.gz")
        labels = read_idx(folder / "train-labels-idx1-ubyte.gz")
        order = np.random.default_rng(0).permutation(len(images))  # as in train_demo
        if validate:
            held, order = order[:VALIDATION], order[VALIDATION:]
            self.test = images[held], labels[held]
        else:
            test = read_idx(folder / "t10k-images-idx3-ubyte.gz")
            self.test = test, read_idx(folder / "t10k-labels-idx1-ubyte.gz")
        self.train = images[order], labels[order]

    def right(self, predict: Predict, *trees: Tree) -> np.ndarray:
        """Whether each image that counts is recognised."""
        images, labels = self.test
        found = [
            np.argmax(predict(*trees, as_input(images[i : i + 500])), -1)
            for i in range(0, len(images), 500)
        ]
        return np.concatenate(found) == labels

    def accuracy(self, predict: Predict, *trees: Tree) -> float:
        return float(np.mean(self.right(predict, *trees)))

    def smoothed(self) -> np.ndarray:
        """What the labels say of each training image, as when the networks were trained."""
        return np.asarray(optax.smooth_labels(jax.nn.one_hot(self.train[1], 10), 0.1))

    def told_by(self, predict: Predict, *trees: Tree) -> np.ndarray:
        """What a network says of each training image."""
        run = jax.jit(lambda *a: jax.nn.softmax(predict(*a)))
        images = self.train[0]
        return np.concatenate(
            [
                np.asarray(run(*trees, as_input(images[i : i + 500])))
                for i in range(0, len(images), 500)
            ]
        )

    def trainer(
        self,
        forward: Predict,
        optimizer: optax.GradientTransformation,
        targets: np.ndarray,
        steps: int,
        *,
        moved: bool,
    ) -> Callable[[Tree, int], Tree]:
        """`fit(tree, seed)`: what the steps make of a tree; `forward(tree, x)` gives logits.

        Batches are drawn by the seed, images shifted and flipped if `moved`. One
        compilation serves all seeds.
        """

        def loss(trained: Tree, x: jax.Array, y: jax.Array) -> jax.Array:
            return jnp.mean(optax.softmax_cross_entropy(forward(trained, x), y))

        @partial(jax.jit, donate_argnums=(0, 1))
        def step(
            trained: Tree, state: Any, key: jax.Array, x: jax.Array, y: jax.Array
        ) -> tuple[Tree, Any]:
            grads = jax.grad(loss)(trained, augment(key, x) if moved else x, y)
            updates, state = optimizer.update(grads, state, trained)
            return optax.apply_updates(trained, updates), state

        images = self.train[0]

        def fit(trained: Tree, seed: int) -> Tree:
            rng, key = np.random.default_rng(seed), jax.random.key(seed)
            trained = jax.tree.map(jnp.array, trained)  # donated
            state = optimizer.init(trained)
            for i in range(steps):
                chosen = rng.choice(len(images), BATCH, replace=False)
                x, y = as_input(images[chosen]), jnp.asarray(targets[chosen])
                trained, state = step(trained, state, jax.random.fold_in(key, i), x, y)
            return trained

        return fit
