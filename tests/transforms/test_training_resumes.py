"""Training that is saved, killed and taken up again."""

import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from test_training import COARSE, images, start

import jaxmet as jm

SCRIPT = r"""
import os, sys, pathlib
os.environ["JAX_PLATFORMS"] = "cpu"
import jax, jax.numpy as jnp, optax
import jaxmet as jm

folder, last = pathlib.Path(sys.argv[1]), int(sys.argv[2])
x = jax.random.normal(jax.random.key(0), (16, 6))

def apply(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"]

key = jax.random.key(1)
params = {"a": jax.random.normal(key, (6, 8)), "b": jax.random.normal(key, (8, 3))}
graph = jm.trace(apply, params, x[:1])
quantizers = jm.calibrate(params, graph, [x], progress=False).pin(params)
optimizer = optax.adam(1e-2)
state, first = optimizer.init((params, quantizers)), 0

path = folder / "state.npz"
if path.exists():
    saved = jm.load(path, like={"params": params, "state": state, "step": jnp.int32(0)})
    params, state = saved.params["params"], saved.params["state"]
    quantizers, first = saved.quantizers, int(saved.params["step"])

@jax.jit
def step(params, quantizers, state, number):
    def loss(params, quantizers):
        noise = jax.random.normal(jax.random.fold_in(key, number), x.shape)
        return jnp.mean(jm.simulate(apply, quantizers)(params, x + 0.1 * noise) ** 2)
    grads = jax.grad(loss, argnums=(0, 1))(params, quantizers)
    updates, state = optimizer.update(grads, state)
    return *optax.apply_updates((params, quantizers), updates), state

for number in range(first, last):
    params, quantizers, state = step(params, quantizers, state, number)
    tree = {"params": params, "state": state, "step": jnp.int32(number + 1)}
    jm.save(path, params=tree, quantizers=quantizers)
    print(number + 1, flush=True)
"""


def run(folder, steps):
    script = folder / "train.py"
    script.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(script), str(folder), str(steps)],
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_bits(tmp_path):
    steps = 60
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    process = run(whole, steps)
    process.communicate(timeout=120)
    assert process.returncode == 0
    rng, done = random.Random(0), 0
    for after in (7, 19):
        process = run(broken, steps)
        assert process.stdout is not None
        first = int(process.stdout.readline())
        assert first == done + 1  # taken up where it was
        for _ in range(after):
            process.stdout.readline()
        time.sleep(rng.random() * 0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        done = int(jm.load(broken / "state.npz").params["step"])
        assert first + after <= done < steps
    process = run(broken, steps)
    process.communicate(timeout=120)
    assert process.returncode == 0
    a, b = (jm.load(folder / "state.npz") for folder in (whole, broken))
    leaves = [jax.tree.leaves((s.params, s.quantizers)) for s in (a, b)]
    assert len(leaves[0]) == len(leaves[1]) > 20
    for x, y in zip(*leaves, strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_orbax_restores_params_and_quantizers(tmp_path):
    model, params, graph = start(cap=True)
    params = jm.fold_batch_norm(params, graph)
    params = jm.equalize(params, graph, objective="range", progress=False)
    quantizers = jm.calibrate(params, graph, [images()], COARSE, progress=False)
    quantizers = quantizers.pin(params).set("conv1*", learn="minmax")
    tree = {"params": params, "quantizers": quantizers}
    with jax.numpy_dtype_promotion("standard"):
        tree["state"] = optax.adam(1e-3).init((params, quantizers))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", tree)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
        restored = checkpointer.restore(tmp_path / "step", abstract)
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    run = jax.jit(jm.simulate(model.apply, restored["quantizers"]))
    expected = jax.jit(jm.simulate(model.apply, quantizers))(params, images())
    np.testing.assert_array_equal(run(restored["params"], images()), expected)
