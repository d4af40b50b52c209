"""Analysis is linear: a model of twice as many layers takes twice as many steps."""

import contextlib
import inspect
import pickle
import random
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jaxmet as jm
from jaxmet.engine.graph.analyse import analyse
from jaxmet.engine.graph.describe import describe
from jaxmet.engine.program.calls import make_call
from jaxmet.engine.run.machine import Machine

D = 4
X = jnp.linspace(-1, 1, 2 * D).reshape(2, D)
PACKAGE = str(Path(jm.__file__).parent)


def spec(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def chain(p, x):
    for w, b in zip(p["w"], p["b"], strict=True):
        x = jax.nn.relu(x @ w + b[None])
    return x


def residual(p, x):
    for w, b in zip(p["w"], p["b"], strict=True):
        x = x + jax.nn.relu(x @ w + b[None])
    return x


def shared(p, x):
    for _ in p["w"]:
        x = jax.nn.relu(x @ p["w"][0] + p["b"][0][None])
    return x


def skips(p, x):
    """A directed graph with additions from anywhere among the ten values before."""
    drawn, values = random.Random(0), [x]
    for w in p["w"]:
        new = jax.nn.relu(values[-1] @ w)
        for _ in range(drawn.randint(0, 2)):
            new = new + drawn.choice(values[-10:])
        values.append(new)
    return values[-1]


def reads(p, x):
    """Values of the input's own making that read each other twice."""
    x = x @ p["w"][0]
    for _ in p["w"]:
        x = jnp.where(x[::-1] > 0, x[::-1], x[:, ::-1])
    return x @ p["w"][1]


def pointwise(p, x):
    x = x @ p["w"][0]
    for _ in p["w"]:
        x = jnp.tanh(x) * 2.0 + jnp.sin(x)
    return x @ p["w"][1]


def read_on_the_way(p, x):
    x, total = x @ p["w"][0], 0.0
    for w in p["w"]:
        x = jnp.tanh(x) + jnp.sin(x)
        total = total + x @ w
    return total


def diamonds(p, x):
    """What a normalized activation is split into and joined from again."""
    x = x @ p["w"][0]
    x = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-3) * p["b"][0][None]
    x = jax.nn.relu(x)
    for _ in p["w"]:
        one, two = jnp.split(x, 2, -1)
        x = jnp.concatenate([two, one], -1)
    return x @ p["w"][1]


def branches(p, x):
    for w in p["w"]:
        x = lax.cond(x.sum() > 0, lambda v: v * 2.0, lambda v: v[::-1], x)
        x = lax.cond(x.sum() < 0, lambda v, w=w: v @ w, lambda v: v, x)
    return x


def normed(p, x):
    for w, b in zip(p["w"], p["b"], strict=True):
        x = x @ w
        x = (x - b[None]) * lax.rsqrt(jnp.square(b) + 1e-3)[None]
        x = jax.nn.relu(x)
    return x


def shifted(p, x):
    x = x @ p["w"][0]
    for b in p["b"]:
        x = (x + b[None])[::-1]
    return jax.nn.softmax(x) @ p["w"][1]


def joined(p, x):
    """A concatenation of concatenations, that no layer reads on the way."""
    x = x @ p["w"][0]
    for _ in p["w"]:
        x = jnp.concatenate([x, jax.nn.relu(x[:, :1])], -1)
    return x[:, -D:] @ p["w"][1]


def added(p, x):
    """Values that are put beside each other, then added in that form."""
    x = x @ p["w"][0]
    for b in p["b"]:
        x = x + jnp.concatenate([jax.nn.relu(x[:, :1]), x[:, 1:]], -1) * b[None]
    return x @ p["w"][1]


@contextlib.contextmanager
def recursion_limit(more):
    """As many frames as this beyond those that are open; JAX's own go 150 deep."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + more)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


MODELS = (
    chain, residual, shared, skips, reads, pointwise, read_on_the_way, diamonds, branches
)  # fmt: skip


def of_size(count):
    return {"w": [spec(D, D)] * count, "b": [spec(D)] * count}


def steps(run):
    """The lines of jaxmet that a call executes, each round of a loop counted."""
    count = 0

    def line(frame, event, arg):
        nonlocal count
        count += 1
        return line

    def call(frame, event, arg):
        return line if frame.f_code.co_filename.startswith(PACKAGE) else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        run()
    finally:
        sys.settrace(before)
    return count


def idle(node, run, operands):
    return run(*operands), None


def lowered(apply, count):
    replay = jm.evaluate(apply, idle)
    return lambda: jax.make_jaxpr(replay)(of_size(count), spec(2, D))


def planned(apply, count):
    graph = jm.trace(apply, of_size(count), spec(2, D))
    return lambda: jm.plan(of_size(count), graph)


def cut(apply, count):
    """Cut after every layer; its pieces are only made, not run."""
    graph = jm.trace(apply, of_size(count), spec(2, D))
    names = [n.name for n in graph.layers]
    x = spec(2, D)
    return lambda: jm.segments(graph, of_size(count), x, cuts=names)


def traced(apply, count):
    return lambda: jm.trace(apply, of_size(count), spec(2, D))


@pytest.mark.parametrize("apply", MODELS)
def test_twice_the_layers_take_twice_the_steps(apply):
    assert steps(traced(apply, 24)) < 2.2 * steps(traced(apply, 12))


@pytest.mark.parametrize("work", [lowered, planned, cut])
@pytest.mark.parametrize("apply", [chain, residual, normed])
def test_and_so_do_replays_plans_and_segments(apply, work):
    assert steps(work(apply, 24)) < 2.2 * steps(work(apply, 12))


def test_a_replay_copies_no_environment():
    """A copy at each node is one step and takes as long as the model: no count shows it."""

    class Uncopied(dict):
        def __iter__(self):
            raise AssertionError("all values of the model are gone through")

        keys = values = items = __iter__

    call = make_call(chain, {"w": [jnp.eye(D)] * 3, "b": [jnp.ones(D)] * 3}, (X,), {})
    analysis = analyse(call)
    environment = Uncopied()
    for value, array in zip(
        analysis.region.inputs, (*call.leaves, *call.inputs), strict=True
    ):
        environment[value] = array
    machine = Machine(describe(analysis), idle, {})
    machine.run(analysis.region, environment)
    [result] = analysis.region.outputs
    expected = chain({"w": [jnp.eye(D)] * 3, "b": [jnp.ones(D)] * 3}, X)
    assert jnp.array_equal(environment[result], expected)


@pytest.mark.parametrize(
    "apply", [reads, read_on_the_way, diamonds, pointwise, shifted, joined, added]
)
def test_no_recursion_goes_as_deep_as_the_model(apply):
    """Each layer is three calls deep where a function calls itself."""
    params = of_size(90)
    with recursion_limit(260):
        graph = jm.trace(apply, params, spec(2, D))
        jm.plan(params, graph)
    assert pickle.loads(pickle.dumps((graph.nodes, graph.members, graph.groups)))


def test_a_concatenation_of_all_before():
    """Each layer reads all before it: its channels are as many, the steps are not."""

    def dense(p, x):
        for w in p:
            x = jnp.concatenate([x, jax.nn.relu(x @ w)], -1)
        return x

    def traced(count):
        params = [spec(D + 2 * i, 2) for i in range(count)]
        return lambda: jm.trace(dense, params, spec(1, D))

    assert len(traced(100)().layers) == 100
    assert steps(traced(40)) < 2.2 * steps(traced(20))


def test_a_long_formula():
    graph = jm.trace(
        pointwise, {"w": [spec(D, D)] * 500, "b": [spec(D)] * 500}, spec(1, D)
    )
    assert [n.kind for n in graph.nodes].count("activation") >= 1
