"""A table of scores whose process is killed and started again."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

import jaxmet as jm

SCRIPT = r"""
import os, sys, pathlib, time
os.environ["JAX_PLATFORMS"] = "cpu"
import jax, jax.numpy as jnp
import jaxmet as jm

folder = pathlib.Path(sys.argv[1])
x = jax.random.normal(jax.random.key(0), (16, 12))

def apply(params, x):
    for kernel in params.values():
        x = jnp.tanh(x @ kernel)
    return x

keys = jax.random.split(jax.random.key(1), 6)
params = {f"layer{i}": jax.random.normal(k, (12, 12)) for i, k in enumerate(keys)}
graph, wanted = jm.trace(apply, params, x[:1]), apply(params, x)

def score(apply, params):
    time.sleep(0.02)  # so that a kill meets a run that still goes on
    found = float(-jnp.mean((apply(params, x) - wanted) ** 2))  # not to be traced
    with (folder / "cells").open("a") as file:
        print("cell", file=file, flush=True)
    return found

table = jm.score_ratios(
    params, graph, score, batches=[x], progress=False,
    ratios=[i / 10 for i in range(1, 10)], checkpoint=folder / "kept",
)
jm.save(folder / "table.npz", table=table)
"""


def cells(folder):
    path = folder / "cells"
    return len(path.read_text().splitlines()) if path.exists() else 0


def run(folder):
    folder.mkdir(exist_ok=True)
    script = folder / "score.py"
    script.write_text(SCRIPT)
    return subprocess.Popen([sys.executable, str(script), str(folder)])


@pytest.mark.slow
def test_a_killed_run_loses_no_finished_cell(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(whole).wait(timeout=600) == 0
    rng, kills = random.Random(0), 2
    for _ in range(kills):
        process, before = run(broken), cells(broken)
        stop = before + rng.randint(3, 12)
        while cells(broken) < stop:
            assert process.poll() is None
            time.sleep(rng.random() * 1e-3)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        kept = len(list((broken / "kept").glob("*.npz")))
        assert 0 < kept < cells(whole)
    assert run(broken).wait(timeout=600) == 0
    tables = [jm.load(folder / "table.npz").table for folder in (whole, broken)]
    assert tables[0] is not None and tables[1] is not None
    assert tables[0].columns == tables[1].columns
    # A kill costs the one cell that was being computed.
    assert cells(whole) <= cells(broken) <= cells(whole) + kills
