"""Rows of arguments run only what a change reaches, and give what the whole program gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmet.engine.run.staged import STAGES, StagedProgram

LAYERS, WIDTH = 12, 8


def network(x):
    def run(weights, gains):
        rounded = [
            jnp.round(w * 8) / 8 for w in weights
        ]  # all of them before any is used
        y = jnp.asarray(x)
        for w, g in zip(rounded, gains, strict=True):
            y = jax.nn.relu(y @ w) * g + y
        return {"sum": jnp.sum(y), "last": weights[-1]}

    return run


def drawn(seed=0):
    rng = np.random.default_rng(seed)
    weights = [rng.normal(size=(WIDTH, WIDTH)).astype("f") for _ in range(LAYERS)]
    return weights, [np.asarray(1 + i / 10, np.float32) for i in range(LAYERS)]


@pytest.fixture
def counted(monkeypatch):
    """How often each stage of a program ran."""

    def of(program):
        runs = [0] * len(program.stages)

        def counting(i, run):
            def again(*args):
                runs[i] += 1
                return run(*args)

            return again

        stages = enumerate(program.stages)
        program.stages = [s._replace(run=counting(i, s.run)) for i, s in stages]
        return runs

    return of


def with_layer(weights, i, factor):
    return [w * np.float32(factor) if i == j else w for j, w in enumerate(weights)]


def test_what_comes_before_a_change_is_not_run_again(counted):
    x = np.random.default_rng(1).normal(size=(5, WIDTH)).astype("f")
    run, (weights, gains) = network(x), drawn()
    program = StagedProgram(run, weights, gains)
    assert LAYERS <= len(program.stages) <= STAGES
    runs = counted(program)
    rows = [(weights, gains)]
    rows += [(with_layer(weights, i, f), gains) for i in range(LAYERS) for f in (2, 3)]
    for found, row in zip(program.rows(iter(rows)), rows, strict=True):
        wanted = run(*row)
        np.testing.assert_allclose(found["sum"], wanted["sum"], rtol=1e-5)
        np.testing.assert_array_equal(found["last"], wanted["last"])
    assert runs == sorted(runs)
    assert runs[0] <= 4 and runs[-1] == len(rows)
    assert sum(runs) < 0.65 * len(rows) * len(runs)


@functools.cache
def compiled():
    x = np.random.default_rng(1).normal(size=(3, WIDTH)).astype("f")
    return StagedProgram(network(x), *drawn())


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(-1, LAYERS - 1), st.integers(0, 2)), min_size=1))
def test_rows_in_any_order(changes):
    x = np.random.default_rng(1).normal(size=(3, WIDTH)).astype("f")
    run, (weights, gains) = network(x), drawn()
    rows = []
    for i, kind in changes:
        if kind == 0:
            rows.append((with_layer(weights, i, 2), gains))
        elif kind == 1:  # the content of a small array
            rows.append((weights, [g + (i == j) for j, g in enumerate(gains)]))
        else:
            rows.append((weights, gains))
    rows = [jax.tree.map(lambda a: np.asarray(a, np.float32), row) for row in rows]
    for found, row in zip(compiled().rows(rows), rows, strict=True):
        np.testing.assert_allclose(found["sum"], run(*row)["sum"], rtol=1e-4)


@pytest.mark.parametrize("form", ["jit", "scan", "nothing closed over", "constant"])
def test_forms(form):
    x = np.random.default_rng(1).normal(size=(4, WIDTH)).astype("f")
    weights, gains = drawn()
    inner = network(x)
    forms = {
        "jit": jax.jit(inner),
        "scan": lambda w, g: jax.lax.map(
            lambda v: network(v[None])(w, g), jnp.array(x)
        ),
        "nothing closed over": lambda w, g: sum(map(jnp.sum, w)) + sum(g),
        "constant": lambda w, g: (3.0, w[0], jnp.asarray(x)),
    }
    run = forms[form]
    program = StagedProgram(run, weights, gains)
    assert 1 <= len(program.stages) + (form == "constant") <= STAGES + 1
    rows = [(weights, gains), (with_layer(weights, 3, 2), gains), (weights, gains)]
    for found, row in zip(program.rows(rows), rows, strict=True):
        wanted = run(*row)
        assert jax.tree.structure(found) == jax.tree.structure(wanted)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4)


def test_functions_of_the_host_see_every_row():
    seen, weights = [], drawn()[0]

    def run(weights):
        first = jnp.sum(weights[0])
        jax.debug.callback(lambda v: seen.append(float(v)), first)
        return first + jnp.sum(weights[1])

    program = StagedProgram(run, weights)
    rows = [(weights,), (with_layer(weights, 1, 2),), (with_layer(weights, 1, 3),)]
    [*program.rows(rows)]
    jax.effects_barrier()
    assert len(seen) == len(rows)


@pytest.mark.parametrize("where", ["literal", "constant", "argument"])
def test_results_that_no_stage_makes_are_jax_arrays(where):
    number = np.float32(2.5).reshape(())
    forms = {
        "literal": lambda x: jnp.float32(2.5),
        "constant": lambda x: jnp.asarray(np.full(3, 2.5, np.float32)),
        "argument": lambda x: x,
    }
    run = forms[where]
    (found,) = StagedProgram(run, number).rows([(number,)])
    assert isinstance(found, jax.Array)
    assert found.dtype == run(number).dtype
    np.testing.assert_array_equal(found, run(number))


def test_zeros_of_another_sign_are_a_change():
    w = jnp.ones((4, 4))
    run = lambda zero, a, b: jnp.sum(jnp.copysign(1.0, zero) * (a @ w) @ b)
    signs = [np.float32(0.0), np.float32(0.0), np.float32(-0.0)]
    rows = [(zero, w, (i + 1) * w) for i, zero in enumerate(signs)]
    found = [float(v) for v in StagedProgram(run, *rows[0]).rows(rows)]
    assert found == [float(run(*row)) for row in rows]
