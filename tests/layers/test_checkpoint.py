"""What a checkpoint knows again of the run that it holds."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxmet.layers.checkpoint import Checkpoint, fingerprint

SCRIPT = """
from jaxmet.layers.checkpoint import fingerprint
def score(apply, params):
    return sum(name in {"stem", "head", "body"} for name in params)
print(fingerprint([score]))
"""


def test_the_code_of_a_function_is_known_again():
    ones = jnp.ones(3)
    score = lambda apply, params: apply(params).sum()
    same = lambda apply, params: apply(params).sum()
    other = lambda apply, params: 3 * apply(params).sum()
    inner = lambda apply, params: sum(a + 1 for a in params)
    deeper = lambda apply, params: sum(a + 2 for a in params)
    prints = [fingerprint([ones, f]) for f in (score, other, inner, deeper)]
    assert len(set(prints)) == 4
    assert fingerprint([ones, same]) == prints[0]
    assert fingerprint([2 * ones, score]) != prints[0]


def test_what_stands_around_a_function_is_looked_through():
    def score(apply, params, *, scale=1.0):
        return scale * apply(params)

    def other(apply, params, *, scale=1.0):
        return scale - apply(params)

    class Scored:
        def __call__(self, apply, params):
            return score(apply, params)

    class Otherwise:
        def __call__(self, apply, params):
            return other(apply, params)

    given = [
        *(functools.partial(f, scale=n) for f in (score, other) for n in (2.0, 3.0)),
        *(jax.jit(f, static_argnums=0) for f in (score, other)),
        Scored(),
        Otherwise(),
    ]
    assert len({fingerprint([one]) for one in given}) == len(given)
    again = functools.partial(score, scale=2.0), jax.jit(score), Scored()
    assert [fingerprint([one]) for one in again] == [
        fingerprint([one]) for one in (given[0], given[4], given[6])
    ]


@pytest.mark.slow
def test_another_process_says_the_same_of_it():
    found = set()
    for seed in ("1", "2", "3"):  # sets come in another order
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        found.add(run.stdout)
    assert len(found) == 1


def test_a_folder_whose_mark_was_cut_off_is_refused(tmp_path):
    Checkpoint(tmp_path, "test", ["this run"])
    Checkpoint(tmp_path, "test", ["this run"])
    about = tmp_path / "about.json"
    about.write_text(about.read_text()[:-5])
    with pytest.raises(ValueError, match="holds a run on another"):
        Checkpoint(tmp_path, "test", ["this run"])
