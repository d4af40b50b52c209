"""Statistics merged over batches, against a plain loop in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmet as jm
from jaxmet.layers.collect import collect
from jaxmet.tree.batches import as_batches

RNG = np.random.default_rng(0)
KERNELS = {"first": RNG.normal(size=(4, 6)), "second": RNG.normal(size=(6, 3))}
PARAMS = {n: {"kernel": jax.device_put(np.float32(w))} for n, w in KERNELS.items()}
ROWS = np.asarray(RNG.normal(size=(35, 4)), np.float32)


def apply(params, x):
    x = jnp.maximum(x @ params["first"]["kernel"], 0.0)
    return x @ params["second"]["kernel"]


GRAPH = jm.trace(apply, PARAMS, jnp.ones((2, 4)))


def moments(node, run, operands):
    """How many rows, their sum, and the Gram matrix of what enters a product."""
    result = run(*operands)
    if node.kind != "product":
        return result, None
    x = operands[0]
    return result, (jnp.float32(x.shape[0]), jnp.sum(x, 0), x.T @ x)


def added(one, two):
    return jax.tree.map(jnp.add, one, two)


def run(batches, hook=moments, merge=added, **options):
    read = as_batches(batches, "somebody", inputs=options.pop("inputs", None))
    options.setdefault("progress", False)
    return collect(GRAPH, PARAMS, read, hook, merge, caller="somebody", **options)


def expected(rows):
    x = np.asarray(rows, np.float64)
    hidden = np.maximum(x @ np.asarray(PARAMS["first"]["kernel"], np.float64), 0)
    pairs = {"first": x, "second": hidden}
    return {n: (len(v), v.sum(0), v.T @ v) for n, v in pairs.items()}


@pytest.mark.parametrize("size", [1, 2, 4, 5, 35, 64])
@pytest.mark.parametrize("form", ["batched", "list", "generator"])
def test_merged_over_every_batch_and_the_shorter_last_one(size, form):
    parts = [ROWS[i : i + size] for i in range(0, 35, size)]
    batches = {"batched": jm.batched(ROWS, batch_size=size), "list": parts}
    found = run(batches.get(form, iter(parts)))
    assert found.keys() == {"first", "second"}
    for name, statistics in expected(ROWS).items():
        for a, b in zip(found[name], statistics, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_one_program_a_shape():
    """Chunks of stacked data share a program; the rest has another."""
    traces = []

    def counting(node, run, operands):
        traces.append((node.name, operands[0].shape if operands else ()))
        return moments(node, run, operands)

    for batches in (jm.batched(ROWS, 2), [ROWS[i : i + 2] for i in range(0, 35, 2)]):
        traces.clear()
        run(batches, counting)
        assert sorted(s for n, s in traces if n == "first") == [(1, 4), (2, 4)]


def test_merging_takes_its_arguments_in_order():
    """What is associative but not commutative: the first and the last value seen."""

    def hook(node, run, operands):
        result = run(*operands)
        if node.kind != "input":
            return result, None
        return result, (result[0, 0], result[-1, 0])

    ends = lambda one, two: {"input": (one["input"][0], two["input"][1])}
    for batches in (jm.batched(ROWS, 2), [ROWS[:20], ROWS[20:]]):
        first, last = run(batches, hook, ends)["input"]
        assert (first, last) == (ROWS[0, 0], ROWS[-1, 0])


def test_a_hook_may_change_the_run():
    def hook(node, run, operands):
        result = run(*operands)
        if node.name == "first":
            return 0.0 * result, None
        return result, jnp.sum(jnp.abs(result)) if node.name == "second" else None

    assert run([ROWS], hook)["second"] == 0.0


def test_the_bar_counts_batches(capsys):
    run(jm.batched(ROWS, 2), progress=True)
    shown = capsys.readouterr().err
    assert "somebody" in shown and "18/18" in shown
    run(jm.batched(ROWS, 2))
    assert capsys.readouterr().err == ""


def test_what_the_model_does_not_accept_is_explained():
    pairs = [(ROWS, np.arange(35))]
    message = r"jaxmet\.somebody: .* batch of 2 inputs.*inputs=lambda batch: batch\[0\]"
    with pytest.raises(ValueError, match=message):
        run(pairs)
    assert run(pairs, inputs=lambda batch: batch[0]).keys() == {"first", "second"}


def test_own_errors_of_a_hook_pass():
    def hook(node, run, operands):
        raise ValueError("jaxmet.somebody: no. Do otherwise.")

    with pytest.raises(ValueError, match=r"^jaxmet\.somebody: no\. Do otherwise"):
        run([ROWS], hook)
