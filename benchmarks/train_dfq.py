"""Trains the networks of `dfq_tables.py` on scenes of Fashion-MNIST garments.

    python benchmarks/train_dfq.py deeplab
    python benchmarks/train_dfq.py ssd

Every step draws fresh scenes from the train split; calibration and test scenes are made
of other garments. AdamW with a high learning rate and no decay of the norms' gains, as
for the demo's network: channels drift apart. A run that was stopped goes on from its
checkpoint and ends with the same weights.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from dfq.boxes import targets
from dfq.fast import fast_layers
from dfq.networks import HERE, NETWORKS, Tree, save_weights
from dfq.scenes import DATA, SIZE, Composer, Scenes

BATCH = 16
STEPS = {"deeplab": 3500, "ssd": 5000}
EVERY = 250  # steps between checkpoints
NEGATIVES = 3  # background anchors in the loss for every one that answers for a box

Loss = Callable[[Any, Scenes], jax.Array]


def segmentation_loss(logits: jax.Array, scenes: Scenes) -> jax.Array:
    """Cross-entropy of all pixels."""
    labels = scenes.labels.astype(jnp.int32)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def detection_loss(outputs: Any, scenes: Scenes) -> jax.Array:
    """Smooth L1 of the codes, cross-entropy of classes with the hardest negatives."""
    codes, logits = outputs
    wanted, kinds = jax.vmap(targets)(scenes.boxes, scenes.classes)
    positive = kinds > 0  # (batch, anchors)
    count = jnp.maximum(jnp.sum(positive, axis=1, keepdims=True), 1)
    far = jnp.sum(optax.losses.huber_loss(codes, wanted), -1)
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, kinds)
    negative = jnp.where(positive, 0.0, entropy)
    rank = jnp.argsort(jnp.argsort(-jax.lax.stop_gradient(negative), axis=1), axis=1)
    counted = positive | (rank < NEGATIVES * count)
    return jnp.sum(jnp.where(positive, far, 0.0) / count) / len(codes) + jnp.sum(
        jnp.where(counted, entropy, 0.0) / count
    ) / len(codes)


LOSSES: dict[str, Loss] = {"deeplab": segmentation_loss, "ssd": detection_loss}


def optimizer(steps: int, learning_rate: float) -> optax.GradientTransformation:
    """AdamW after a short warm-up, with a cosine's decay; only kernels decay."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, steps // 20, steps
    )
    kernels = partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
    return optax.chain(
        optax.clip_by_global_norm(5.0),
        optax.adamw(schedule, weight_decay=0.02, mask=kernels),
    )


def make_step(
    network: nn.Module, optimize: optax.GradientTransformation, loss: Loss
) -> Callable[[Any, Scenes], tuple[Any, jax.Array]]:
    """One update of `(params, batch_stats, optimizer state)`, and the loss."""

    def value(params: Tree, statistics: Tree, scenes: Scenes) -> tuple[jax.Array, Tree]:
        variables = {"params": params, "batch_stats": statistics}
        with nn.intercept_methods(fast_layers):
            outputs, updates = network.apply(
                variables, scenes.images, train=True, mutable=["batch_stats"]
            )
        return loss(outputs, scenes), updates["batch_stats"]

    @partial(jax.jit, donate_argnums=0)
    def step(state: Any, scenes: Scenes) -> tuple[Any, jax.Array]:
        params, statistics, memory = state
        grad = jax.value_and_grad(value, has_aux=True)
        (found, statistics), grads = grad(params, statistics, scenes)
        updates, memory = optimize.update(grads, memory, params)
        return (optax.apply_updates(params, updates), statistics, memory), found

    return step


def save_state(path: Path, step: int, state: Any) -> None:
    """A checkpoint, replaced at once."""
    leaves = {str(i): np.asarray(x) for i, x in enumerate(jax.tree.leaves(state))}
    draft = path.with_suffix(".part.npz")
    np.savez(draft, step=step, **leaves)
    os.replace(draft, path)


def load_state(path: Path, like: Any) -> tuple[int, Any]:
    """The step and state of a checkpoint, or 0 and `like` where there is none."""
    if not path.is_file():
        return 0, like
    leaves, structure = jax.tree.flatten(like)
    with np.load(path, allow_pickle=False) as arrays:
        found = [jnp.asarray(arrays[str(i)]) for i in range(len(leaves))]
        return int(arrays["step"]), jax.tree.unflatten(structure, found)


def train(options: argparse.Namespace) -> Tree:
    """The variables of one network after all steps."""
    network, composer = (
        NETWORKS[options.network](),
        Composer.read("train", options.data),
    )
    image = jnp.zeros((1, SIZE, SIZE, 3))
    variables = network.init(jax.random.key(options.seed), image)
    optimize = optimizer(options.steps, options.learning_rate)
    params, statistics = variables["params"], variables["batch_stats"]
    fresh = (params, statistics, optimize.init(params))
    first, state = load_state(options.checkpoint, fresh)
    step = make_step(network, optimize, LOSSES[options.network])

    def draw(index: int) -> Scenes:
        numbers = range(index * BATCH, (index + 1) * BATCH)
        return composer.scenes(numbers, options.seed)

    total, begin = 0.0, time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(draw, first)
        for index in range(first, options.steps):
            scenes, coming = coming.result(), pool.submit(draw, index + 1)
            state, value = step(state, scenes)
            total += float(value)
            if (index + 1) % EVERY == 0:
                seconds = time.perf_counter() - begin
                mean, total = total / EVERY, 0.0
                print(
                    f"step {index + 1:5d}  loss {mean:.4f}  {seconds:5.0f} s",
                    flush=True,
                )
                save_state(options.checkpoint, index + 1, state)
    return {"params": state[0], "batch_stats": state[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", choices=list(NETWORKS))
    parser.add_argument("--data", type=Path, default=DATA, help="folder of idx files")
    parser.add_argument("--out", type=Path, help="the weights; benchmarks/dfq/…npz")
    parser.add_argument("--checkpoint", type=Path, help="…-checkpoint.npz, here")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=0.005)
    options = parser.parse_args()
    name = options.network
    options.steps = options.steps or STEPS[name]
    options.checkpoint = options.checkpoint or Path(f"{name}-checkpoint.npz")
    variables = train(options)
    path = options.out or HERE / f"{name}.npz"
    save_weights(path, variables)
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    print(json.dumps({"network": name, "steps": options.steps, "parameters": count}))


if __name__ == "__main__":
    main()
