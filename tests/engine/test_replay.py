"""The replay is the model: its equations where nothing is asked of it, hooked where it is.

Two oracles stand beside the model itself: linen's method interceptors, which edit and
record a module's output after the library's back, and functions that are written with a
tap at every node.
"""

import functools
import importlib
import sys
import time
from collections import Counter, namedtuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from equations import Program
from jaxmet import Compressed, evaluate, functional, trace
from jaxmet.engine.run.replay import Counted
from jaxmet.tree.named_leaves import replace_leaves
from zoo import CASES, model, traced

RUNS = [(name, front) for name, case in CASES.items() for front in case.frontends]
TRAINED = """
    conv_bn_relu-linen conv_bn_relu-nnx pre_activation-nnx inverted_residual-linen
    dropout-linen
""".split()
EDITED = """
    conv_bn_relu inverted_residual residual concatenation flatten grouped transposed
    pre_activation group_norm slopes squeeze_excite dense_norm transformer embedding
    tied_embedding tied outputs_in_a_tree remat jit cond scan rnn
""".split()
REGIONS = ("remat", "jit", "cond", "scan", "rnn", "lstm")


def idle(node, run, operands):
    return run(*operands), None


def replayed(apply, **kw):
    """The model run by a hook that does nothing."""
    return lambda *args, **kwargs: evaluate(apply, idle, **kw)(*args, **kwargs)[0]


def recording(node, run, operands):
    y = run(*operands)
    return y, y


def bits(tree):
    """Every array of a tree, so that equal means equal to the last bit."""
    leaves = [x for x in jax.tree.leaves(tree) if x.dtype != jax.dtypes.float0]
    return [(x.dtype, x.shape, np.asarray(x).tobytes()) for x in leaves]


def close(one, two, rtol=1e-5, atol=1e-5):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def inexact(x):
    return jnp.issubdtype(x.dtype, jnp.inexact)


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype) if inexact(x) else x, tree)


def with_gradient(apply):
    """Outputs, and the gradient of a scalar of all of them."""

    def loss(params, *inputs):
        outputs = apply(params, *inputs)
        wide = [x.astype(jnp.float32) for x in jax.tree.leaves(outputs) if inexact(x)]
        return sum([jnp.sum(jnp.sin(x)) for x in wide], jnp.float32(0)), outputs

    return jax.jit(jax.value_and_grad(loss, has_aux=True, allow_int=True))


# The order of the hook's calls.


@pytest.mark.parametrize(("name", "front"), RUNS)
def test_the_hook_is_called_at_every_node_in_order(name, front):
    apply, params, inputs = model(name, front)
    case, order = CASES[name], []

    def hook(node, run, operands):
        order.append(node.name)
        return run(*operands), None

    jax.eval_shape(evaluate(apply, hook), params, *inputs)
    if case.ordered:
        assert order == [*case.nodes]
    else:  # q, k and v, or two branches, in the order of the front-end
        assert sorted(order) == sorted(case.nodes)
        assert order[0] == "input" and order[-1] == "output"
        reads = {n.name: n.inputs for n in traced(case.name, front).nodes}
        for i, name in enumerate(order):
            assert all(edge.node in order[:i] for edge in reads[name])


# To the bit.

GRADIENTS = """
    conv_bn_relu-nnx inverted_residual-linen clip_after_add-nnx pooling-linen
    group_norm-linen slopes-nnx transformer-nnx tied_embedding-linen remat-linen
    remat-nnx cond-linen scan-nnx rnn-nnx lstm-linen einsum_heads-plain
    standardized-plain
""".split()


# Every model once, linen and nnx in turn: twins are one program but for their names.
VALUES = [
    f"{name}-{case.frontends[i % len(case.frontends)]}"
    for i, (name, case) in enumerate(CASES.items())
    if not any(run.startswith(f"{name}-") for run in GRADIENTS)
]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("run", GRADIENTS)
def test_an_idle_hook_changes_no_bit(run):
    """Of the outputs and of the gradient; the equations below are those of every model."""
    name, front = run.split("-")
    apply, params, inputs = model(name, front)
    one, two = map(with_gradient, (replayed(apply, cpu_formulations=False), apply))
    assert bits(one(params, *inputs)) == bits(two(params, *inputs))


def test_the_tables_hold_every_model():
    runs = [run.split("-") for run in (*GRADIENTS, *VALUES)]
    assert {name for name, _ in runs} == {*CASES}
    assert {front for _, front in runs} == {f for c in CASES.values() for f in c.make}
    assert {name for name, _ in runs[: len(GRADIENTS)]} >= {*REGIONS} - {"jit"}


# What makes that so, and where it ends: the same equations on the same values, calls inlined.
# XLA, which promises no bits, then gets one program, but for the order of equations.


def programs(*functions, args):
    return [Program(jax.make_jaxpr(f)(*args)) for f in functions]


def same_equations(one, two):
    return one.outputs == two.outputs and Counter(one.equations) == Counter(
        two.equations
    )


@pytest.mark.one_in(3)
@pytest.mark.parametrize("run", [*GRADIENTS, *VALUES])
def test_an_idle_hook_replays_the_equations_of_the_model(run):
    name, front = run.split("-")
    apply, params, inputs = model(name, front)
    again = replayed(apply, cpu_formulations=False)
    assert same_equations(*programs(apply, again, args=(params, *inputs)))


@pytest.mark.parametrize(
    "change",
    [
        lambda p, x: jnp.tanh(x @ p["a"]) * 2 + x @ p["b"],
        lambda p, x: x @ p["b"] + jnp.tanh(x @ p["a"]),
        lambda p, x: jnp.tanh(x @ p["a"]) + jnp.tanh(x @ p["a"]) * 0 + x @ p["b"],
        lambda p, x: jnp.tanh(x @ p["b"]) + x @ p["a"],
        lambda p, x: jnp.tanh(x @ p["a"] * 1.0) + x @ p["b"],
    ],
)
def test_other_equations_are_seen(change):
    p, x = {"a": jnp.ones((3, 2)), "b": jnp.ones((3, 2))}, jnp.ones((4, 3))
    right = lambda p, x: jax.jit(jnp.tanh)(x @ p["a"]) + x @ p["b"]
    plain = lambda p, x: jnp.tanh(x @ p["a"]) + x @ p["b"]
    assert same_equations(*programs(right, plain, args=(p, x)))
    assert not same_equations(*programs(plain, change, args=(p, x)))


def interleaved(p, x):
    """Three products that read one value, their biases added in another order."""
    a, b, c = x @ p["a"], x @ p["b"], x @ p["c"]
    c, a, b = (y + p["bias"][None] for y in (c, a, b))
    return jnp.tanh(a) * jnp.sin(b) + c


def called(p, x):
    """A value that is read three times, twice of them in a call."""
    inner = jax.jit(lambda p, x: jnp.tanh(x @ p["a"]) * jnp.sin(x @ p["b"]))
    return inner(p, x) + x @ p["c"] + p["bias"][None]


@pytest.mark.parametrize("apply", [interleaved, called])
def test_a_gradient_is_summed_in_another_order(apply):
    """Values are equal to the bit; of three uses or more the gradient is equal to rounding."""
    rng = np.random.default_rng(5)
    p = {k: jax.device_put(np.float32(rng.normal(size=(6, 6)))) for k in "abc"}
    p["bias"] = jax.device_put(np.float32(rng.normal(size=6)))
    x = jax.device_put(np.float32(rng.normal(size=(4, 6))))
    again = replayed(apply, cpu_formulations=False)
    one, two = programs(apply, again, args=(p, x))
    assert same_equations(one, two)
    assert (one.equations == two.equations) == (apply is called)
    assert bits(jax.jit(again)(p, x)) == bits(jax.jit(apply)(p, x))
    slope = lambda f: jax.grad(lambda p, x: jnp.sum(jnp.cos(f(p, x))), (0, 1))
    assert not same_equations(*programs(slope(apply), slope(again), args=(p, x)))
    close(jax.jit(slope(again))(p, x), jax.jit(slope(apply))(p, x), 1e-5, 1e-5)


@pytest.mark.parametrize(
    ("name", "plain"), [("transformer", True), ("inverted_residual", False)]
)
def test_formulations_of_the_cpu_are_the_only_other_equations(name, plain):
    apply, params, inputs = model(name, "linen")
    args = (params, *inputs)
    assert same_equations(*programs(apply, replayed(apply), args=args)) == plain
    close(jax.jit(replayed(apply))(*args), jax.jit(apply)(*args))


@pytest.mark.parametrize("name", ["conv_bn_relu", "transformer", "scan"])
def test_bfloat16_changes_no_bit_either(name):
    apply, params, inputs = model(name, "linen")
    params, inputs = cast(params, jnp.bfloat16), cast(inputs, jnp.bfloat16)
    wrap = with_gradient if name == "conv_bn_relu" else jax.jit
    with jax.numpy_dtype_promotion("standard"):  # flax normalizes in float32
        before = wrap(apply)(params, *inputs)
        after = wrap(replayed(apply))(params, *inputs)
    assert any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(after))
    assert bits(after) == bits(before)


# Op by op there is no compiler to make both sides one program: equal to rounding,
# a few units in the last place of the largest intermediate value.
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 5e-2}


@pytest.mark.parametrize(
    ("name", "dtype"), [("conv_bn_relu", jnp.float32), ("gelu_mlp", jnp.bfloat16)]
)
def test_without_jit_it_is_equal_to_rounding(name, dtype):
    apply, params, inputs = model(name, "linen")
    params, inputs = cast(params, dtype), cast(inputs, dtype)
    bound = TOLERANCE[dtype]
    close(replayed(apply)(params, *inputs), apply(params, *inputs), bound, bound)


@pytest.mark.parametrize("name", ["residual", "transformer", "scan", "tied_embedding"])
def test_in_float64_it_is_the_oracle_of_float32(name):
    apply, params, inputs = model(name, "linen")
    rough = jax.jit(apply)(params, *inputs)
    # flax promotes to at least float32 where it normalizes
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        wide = cast(params, jnp.float64), *cast(inputs, jnp.float64)
        exact, statistics = jax.jit(evaluate(apply, recording))(*wide)
        assert bits(exact) == bits(jax.jit(apply)(*wide))
        assert exact.dtype == jnp.float64
        kinds = {x.dtype for x in jax.tree.leaves(statistics) if inexact(x)}
        assert kinds == {jnp.dtype(jnp.float64)}
        np.testing.assert_allclose(np.asarray(rough), np.asarray(exact), 1e-4, 1e-4)


@pytest.mark.parametrize("run", TRAINED)
def test_training_changes_no_bit(run):
    """Updated statistics, dropout's bits and all: the outputs are those of `apply`."""
    name, front = run.split("-")
    apply, params, inputs = model(name, front)
    kwargs = CASES[name].train_kwargs(front)
    again = replayed(apply, cpu_formulations=False)
    before = jax.jit(lambda p, *x: apply(p, *x, **kwargs))(params, *inputs)
    after = jax.jit(lambda p, *x: again(p, *x, **kwargs))(params, *inputs)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert bits(before) == bits(after)


# A hand-edited model: every module of linen, edited and recorded by an interceptor.


def edited(apply, nodes, factors):
    """`apply` with module outputs multiplied by `factors`; what they were before."""
    calls, seen = Counter(), {}

    def edit(call, args, kwargs, context):
        y = call(*args, **kwargs)
        path = "/".join(context.module.path)
        if context.method_name not in ("__call__", "attend"):
            return y
        name = f"{path}:{calls[path]}" if f"{path}:0" in nodes else path
        calls[path] += 1
        if name not in nodes:
            return y
        seen[name] = y
        return y * factors[nodes.index(name)]

    def run(params, *inputs):
        with nn.intercept_methods(edit):
            return apply(params, *inputs), dict(seen)

    return run


def modules_of(name):
    """The nodes of a case that are linen modules: layers, norms, a learned slope."""
    apply, params, inputs = model(name, "linen")
    nodes = [n for n in trace(apply, params, *inputs).nodes if n.parameters]
    return [
        n.name for n in nodes if n.kind in ("product", "lookup", "norm", "activation")
    ]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", EDITED)
def test_editing_a_node_equals_editing_the_module(name):
    apply, params, inputs = model(name, "linen")
    nodes = modules_of(name)

    def hook_of(factors):
        def hook(node, run, operands):
            y = run(*operands)
            if node.name not in nodes:
                return y, None
            return y * factors[nodes.index(node.name)], y

        return hook

    @jax.jit
    def both(factors):
        by_hand, seen = edited(apply, nodes, factors)(params, *inputs)
        outputs, statistics = evaluate(apply, hook_of(factors))(params, *inputs)
        if name in REGIONS:  # what an interceptor sees there, it must not keep
            return by_hand, outputs, {}, {}
        assert seen.keys() == statistics.keys() == {*nodes}
        return by_hand, outputs, seen, statistics

    count = len(nodes)
    plain = both(jnp.ones(count))
    close(plain[0], plain[1])
    close(plain[2], plain[3])
    for i in range(count):
        by_hand, outputs, *_ = both(jnp.ones(count).at[i].set(-0.5))
        close(by_hand, outputs)
        pairs = zip(jax.tree.leaves(outputs), jax.tree.leaves(plain[0]), strict=True)
        moved = max(float(jnp.max(jnp.abs(a - b))) for a, b in pairs)
        taken = "high" if float(jnp.sum(inputs[0])) > 0 else "low"
        runs = name != "cond" or nodes[i] in (taken, "head")
        assert (moved > 1e-4) == runs, nodes[i]


# A hand-edited function: a tap at every node, those without parameters too.


def convolved(x, w, **kw):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=layout, **kw
    )


def vision(tap, p, x):
    x = tap("input", x)
    x = tap("a/clip", jax.nn.relu6(tap("a", convolved(x, p["a"]))))
    y = tap(
        "b/relu", jax.nn.relu(tap("b", convolved(x, p["b"]) + p["c"][None, None, None]))
    )
    y = tap("b/concat", jnp.concatenate([x, y], axis=-1))
    y = jax.lax.reduce_window(
        y, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME"
    )
    y = tap("b/pool", y)
    y = tap("b/resize", jax.image.resize(y, (2, 8, 8, 12), "bilinear"))
    gate = tap("b/pool:1", jnp.mean(y, axis=(1, 2)))
    gate = tap("gate/sigmoid", jax.nn.sigmoid(tap("gate", gate @ p["gate"])))
    y = tap("gate/multiply", y * gate[:, None, None])
    y = tap("gate/add", y[..., :6] - y[..., 6:])
    return tap("output", tap("d", convolved(y, p["d"])))


def attending(tap, p, x):
    x = tap("input", x)
    q, k, v = (tap(n, x @ p[n]) for n in "qkv")
    scores = tap("k/matmul", jnp.einsum("btd,bsd->bts", q, k)) / 2.0
    weights = tap("k/softmax", jax.nn.softmax(scores))
    y = tap("v/matmul", jnp.einsum("bts,bsd->btd", weights, v))
    y = tap("o/add", x + tap("o", y @ p["o"]))
    mean = jnp.mean(y, axis=-1, keepdims=True)
    spread = jnp.mean((y - mean) ** 2, axis=-1, keepdims=True)
    y = (y - mean) * jax.lax.rsqrt(spread + 1e-3) * p["gain"][None, None]
    y = tap("norm", y)
    return tap("output", tap("o/gelu", jax.nn.gelu(y)))


def layered(tap, p, x):
    def layer(x, w):
        y = tap("w/relu", jax.nn.relu(tap("w", x @ w)))
        return tap("w/add", x + y), None

    x, _ = jax.lax.scan(layer, tap("input", x), p["w"])
    return tap("output", tap("head", x @ p["head"]))


def branching(tap, p, x):
    def high(x):
        return tap("high/tanh", jnp.tanh(tap("high", x @ p["high"])))

    def low(x):
        return tap("low/abs", jnp.abs(tap("low", x @ p["low"])))

    x = tap("input", x)
    y = jax.lax.cond(jnp.sum(x) > 0, high, low, x)
    return tap("output", tap("head", y @ p["head"]))


def wrapped(tap, p, x):
    @jax.checkpoint
    def again(p, x):
        return tap("a/tanh", jnp.tanh(tap("a", x @ p["a"])))

    @jax.jit
    def inside(p, x):
        return tap("b/sin", jnp.sin(tap("b", again(p, x) @ p["b"])))

    x = jax.lax.fori_loop(0, 3, lambda i, x: inside(p, x), tap("input", x))
    return tap("output", tap("head", x @ p["head"]))


def awaiting(tap, p, x):
    def body(state):
        i, x = state
        return i + 1, tap("w/tanh", jnp.tanh(tap("w", x @ p["w"])))

    x = tap("input", x)
    _, x = jax.lax.while_loop(lambda s: s[0] < p["steps"], body, (0, x))
    return tap("output", tap("head", x @ p["head"]))


WINDOW = {"a": (3, 3, 3, 6), "b": (3, 3, 6, 6), "c": (6,), "gate": (12, 12)}
TAPPED = {
    "vision": (vision, {**WINDOW, "d": (1, 1, 6, 4)}, (2, 8, 8, 3)),
    "attending": (
        attending,
        {**dict.fromkeys("qkvo", (8, 8)), "gain": (8,)},
        (2, 5, 8),
    ),
    "layered": (layered, {"w": (3, 6, 6), "head": (6, 4)}, (4, 6)),
    "branching": (branching, dict.fromkeys(("high", "low", "head"), (6, 6)), (4, 6)),
    "wrapped": (wrapped, dict.fromkeys(("a", "b", "head"), (6, 6)), (4, 6)),
    "awaiting": (awaiting, dict.fromkeys(("w", "head"), (6, 6)), (4, 6)),
}
STRAIGHT = ("vision", "attending")


def tapped(name):
    forward, shapes, shape = TAPPED[name]
    rng = np.random.default_rng(3)

    def draw(shape):
        return jax.device_put(np.float32(rng.normal(0.1, 0.5, shape)))

    p = {key: draw(shape) for key, shape in shapes.items()}
    if name == "attending":
        p["norm"] = {"scale": p.pop("gain")}
        plain = forward
        forward = lambda tap, p, x: plain(tap, {**p, "gain": p["norm"]["scale"]}, x)
    if name == "awaiting":
        p["steps"] = 3
    return forward, p, draw(shape)


def no_tap(name, value):
    return value


@pytest.mark.parametrize("name", TAPPED)
def test_editing_any_node_equals_editing_the_function(name):
    forward, p, x = tapped(name)
    apply = functools.partial(forward, no_tap)
    nodes = [n.name for n in trace(apply, p, x).nodes]

    def by_hand(factors, p, x):
        values, met = {}, []

        def tap(node, value):
            met.append(node)
            values[node] = value
            return value * factors[nodes.index(node)]

        out = forward(tap, p, x)
        assert {*met} == {*nodes}, "the taps are where the nodes are"
        return out, values if name in STRAIGHT else {}

    def by_hook(factors, p, x):
        def hook(node, run, operands):
            y = run(*operands)
            kept = y if name in STRAIGHT else None
            return y * factors[nodes.index(node.name)], kept

        return evaluate(apply, hook)(p, x)

    @jax.jit
    def both(factors, x):
        return by_hand(factors, p, x), by_hook(factors, p, x)

    plain, _ = both(jnp.ones(len(nodes)), x)
    for i, node in enumerate(nodes):
        one, two = both(jnp.ones(len(nodes)).at[i].set(0.5), x)
        close(one, two)
        if name != "branching" or not node.startswith(("low", "high")):
            assert np.max(np.abs(np.asarray(one[0] - plain[0]))) > 1e-4, node
    if name == "branching":
        for sign in (x, -x):
            close(*both(jnp.linspace(0.5, 1.5, len(nodes)), sign))


def test_run_takes_other_operands_and_the_hook_another_result():
    def apply(p, x):
        return jnp.tanh(x @ p["w"] + p["b"][None])

    def hook(node, run, operands):
        if node.kind != "product":
            return run(*operands), None
        x, w, b = operands
        assert (w.shape, b.shape) == ((6, 4), (4,))
        twice = run(2.0 * x, w, 0.0 * b)
        return twice + run(x, -w, b), {"twice": twice, "sizes": (x.size, w.size)}

    rng = np.random.default_rng(0)
    x, w, b = (rng.normal(size=s).astype(np.float32) for s in ((2, 6), (6, 4), 4))
    y, statistics = jax.jit(evaluate(apply, hook))({"w": w, "b": b}, x)
    np.testing.assert_allclose(y, np.tanh(x @ w + b[None]), 1e-5, 1e-5)
    np.testing.assert_allclose(statistics["w"]["twice"], 2 * x @ w, 1e-5, 1e-5)
    assert statistics["w"]["sizes"] == (12, 24) and statistics.keys() == {"w"}


@pytest.mark.parametrize("result", [None, 1.0, (None, 1.0), (1.0, 2.0, 3.0)])
def test_a_hook_that_returns_no_pair_is_refused(result):
    with pytest.raises(
        ValueError, match=r"^jaxmet\.evaluate: the hook returned .*'input'"
    ):
        evaluate(small, lambda node, run, operands: result)(drawn(), X)


# The price.


@pytest.mark.parametrize("name", ["mobile", "resnet", "transformer", "scan", "remat"])
def test_the_compiled_replay_costs_what_the_model_costs(name):
    apply, params, inputs = model(name, "linen")

    def flops(f):
        return jax.jit(f).lower(params, *inputs).compile().cost_analysis()["flops"]

    plain = flops(apply)
    assert plain > 0 and flops(replayed(apply, cpu_formulations=False)) == plain


def test_lowering_takes_at_most_twice_as_long():
    apply, params, inputs = model("resnet", "linen")
    replay = unchecked("jaxmet.engine.run.replay").evaluate

    def fastest(f):
        seconds = []
        for _ in range(7):
            start = time.thread_time()
            jax.jit(lambda *args: f(*args)).lower(params, *inputs)
            seconds.append(time.thread_time() - start)
        return min(seconds)

    fastest(apply)
    plain = fastest(apply)
    assert fastest(lambda *args: replay(apply, idle)(*args)[0]) < 2 * plain


def unchecked(module):
    """A fresh import without the check of annotations, which only the tests pay for."""
    found, kept = [*sys.meta_path], dict(sys.modules)
    sys.meta_path[:] = [f for f in found if "jaxtyping" not in type(f).__module__]
    for name in [name for name in kept if name.split(".")[0] == "jaxmet"]:
        del sys.modules[name]
    try:
        return importlib.import_module(module)
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "jaxmet"]:
            del sys.modules[name]
        sys.modules |= {n: m for n, m in kept.items() if n not in sys.modules}
        sys.meta_path[:] = found


def test_a_sharded_batch_stays_sharded():
    apply, params, (x,) = model("conv_bn_relu", "linen")
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, P("batch"))
    whole = jnp.tile(x, (4, 1, 1, 1))
    batch = jax.device_put(whole, rows)
    params = jax.device_put(params, NamedSharding(mesh, P()))
    step = jax.jit(evaluate(apply, largest), out_shardings=(rows, None))
    compiled = step.lower(params, batch).compile()
    text = compiled.as_text()
    assert "all-gather" not in text and "all-to-all" not in text
    assert "all-reduce" in text  # the statistics are reduced over the devices
    y, statistics = compiled(params, batch)
    assert len(y.sharding.device_set) == 8
    single, expected = jax.jit(evaluate(apply, largest))(params, whole)
    close(y, single)
    close(statistics, expected)


def largest(node, run, operands):
    y = run(*operands)
    return y, jnp.max(jnp.abs(y))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_shards_and_explicit_axes_change_no_bit(kind):
    def apply(p, x):
        return jnp.tanh(x @ p["w"] + p["b"][None]) @ p["v"]

    rng = np.random.default_rng(0)
    shapes = {"w": (6, 6), "v": (6, 4), "b": (6,), "x": (16, 6)}
    p = {k: jax.device_put(np.float32(rng.normal(size=s))) for k, s in shapes.items()}
    x = p.pop("x")
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        rows = jax.device_put(x, NamedSharding(mesh, P("batch")))
        before, after = jax.jit(apply)(p, rows), jax.jit(replayed(apply))(p, rows)
        assert bits(after) == bits(before)
        assert after.sharding == before.sharding

        def mapped(f):
            specs = {"in_specs": (P(), P("batch")), "out_specs": P("batch")}
            return jax.jit(jax.shard_map(f, mesh=mesh, **specs))

        assert bits(mapped(replayed(apply))(p, rows)) == bits(mapped(apply)(p, rows))


# Inside other transformations.


def small(p, x):
    return jax.nn.relu(x @ p["w"] + p["b"][None]) @ p["v"]


def drawn(*lead):
    rng = np.random.default_rng(1)
    shapes = {"w": (6, 8), "b": (8,), "v": (8, 6)}
    p = {k: rng.normal(size=(*lead, *s)) for k, s in shapes.items()}
    return cast(jax.tree.map(jnp.asarray, p), jnp.float32)


X = jnp.linspace(-1.0, 1.0, 24).reshape(4, 6)

AROUND = {
    "vmap over the batch": lambda f: lambda p, x: jax.vmap(f, (None, 0))(p, x[:, None]),
    "vmap over params": lambda f: (
        lambda p, x: jax.vmap(f, (0, None))(
            jax.tree.map(lambda w: jnp.stack([w, -w]), p), x
        )
    ),
    "scan": lambda f: (
        lambda p, x: jax.lax.scan(lambda x, _: (f(p, x), jnp.sum(x)), x, length=3)
    ),
    "checkpoint": lambda f: jax.grad(
        lambda p, x: jnp.sum(jax.checkpoint(f)(p, x) ** 2)
    ),
    "grad of the input": lambda f: jax.grad(lambda p, x: jnp.sum(f(p, x) ** 2), 1),
    "jvp": lambda f: lambda p, x: jax.jvp(functools.partial(f, p), (x,), (x + 1.0,)),
    "jacfwd": lambda f: jax.jacfwd(f, 1),
    "hessian": lambda f: (
        lambda p, x: jax.hessian(lambda x: jnp.sum(f(p, x) ** 3))(x[0:1])
    ),
    "cond": lambda f: lambda p, x: jax.lax.cond(x[0, 0] < 0.0, f, lambda p, x: x, p, x),
    "while": lambda f: (
        lambda p, x: jax.lax.fori_loop(0, p["w"].ndim, lambda i, x: f(p, x), x)
    ),
    "itself": lambda f: replayed(f),
}


@pytest.mark.parametrize("name", AROUND)
def test_it_works_inside_other_transformations(name):
    p, around = drawn(), AROUND[name]
    before, after = (jax.jit(around(f))(p, X) for f in (small, replayed(small)))
    assert bits(after) == bits(before)


def test_statistics_come_out_of_vmap_and_scan():
    many, step = drawn(3), evaluate(small, recording)
    each = jax.tree.map(lambda w: w[1], many)
    _, expected = jax.jit(step)(each, X)
    _, found = jax.jit(jax.vmap(step, (0, None)))(many, X)
    close(jax.tree.map(lambda s: s[1], found), expected)
    _, found = jax.jit(lambda p: jax.lax.map(lambda q: step(q, X), p))(many)
    close(jax.tree.map(lambda s: s[1], found), expected)


def test_apply_may_close_over_a_tracer():
    p = drawn()

    def outer(run):
        @jax.jit
        def f(p, x, scale):
            return run(lambda p, x: scale * small(p, jnp.sin(scale) + x))(p, x)

        return f

    scale = jnp.float32(0.7)
    assert bits(outer(replayed)(p, X, scale)) == bits(outer(lambda f: f)(p, X, scale))
    gradient = jax.jit(jax.grad(lambda s: jnp.sum(outer(replayed)(p, X, s))))(scale)
    expected = jax.jit(jax.grad(lambda s: jnp.sum(outer(lambda f: f)(p, X, s))))(scale)
    assert bits(gradient) == bits(expected)


def test_the_hook_may_close_over_tracers_and_be_differentiated():
    p = drawn()

    @jax.jit
    @jax.grad
    def gradient(scale):
        def hook(node, run, operands):
            y = run(*operands)
            return (scale * y if node.name == "w" else y), None

        return jnp.sum(evaluate(small, hook)(p, X)[0])

    def by_hand(scale):
        y = jax.nn.relu(scale * (X @ p["w"] + p["b"][None]))
        return jnp.sum(y @ p["v"])

    close(gradient(1.3), jax.jit(jax.grad(by_hand))(1.3))


def test_a_symbolic_batch_is_exported():
    apply, params, (x,) = model("inverted_residual", "linen")
    (b,) = jax.export.symbolic_shape("b")
    spec = jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype)
    exported = jax.export.export(jax.jit(replayed(apply)))(params, spec)
    for size in (1, 2):
        found, expected = (jax.jit(f) for f in (exported.call, apply))
        close(found(params, x[:size]), expected(params, x[:size]), 1e-4, 1e-4)


# Custom derivative rules.


@jax.custom_jvp
def halved(w, x):
    return jnp.sin(x @ w)


@halved.defjvp
def _(primals, tangents):
    (w, x), (dw, dx) = primals, tangents
    return jnp.sin(x @ w), 0.5 * jnp.cos(x @ w) * (x @ dw + dx @ w)


@jax.custom_vjp
def doubled(w, x):
    return jnp.sin(x @ w)


doubled.defvjp(
    lambda w, x: (jnp.sin(x @ w), (w, x)),
    lambda kept, g: (2.0 * kept[1].T @ g, jnp.ones_like(kept[1])),
)


@jax.custom_jvp
def relu_with_half(x):
    return jnp.maximum(x, 0.0)


@relu_with_half.defjvp
def _(primals, tangents):
    (x,), (dx,) = primals, tangents
    return relu_with_half(x), jnp.where(
        x > 0.0, 1.0, jnp.where(x == 0.0, 0.5, 0.0)
    ) * dx


CUSTOM = {"custom_jvp": halved, "custom_vjp": doubled, "under jit": jax.jit(halved)}


@pytest.mark.parametrize("name", CUSTOM)
@pytest.mark.parametrize("hook", [idle, recording])
def test_a_layer_inside_a_custom_rule_keeps_the_rule(name, hook):
    def apply(p, x):
        return CUSTOM[name](p["w"], x) @ p["v"]

    p = {"w": drawn()["w"], "v": drawn()["v"]}
    assert [n.name for n in trace(apply, p, X).layers] == ["w", "v"]

    def replay(p, x):
        return evaluate(apply, hook)(p, x)[0]

    def gradients(f):
        return jax.jit(jax.value_and_grad(lambda p, x: jnp.sum(f(p, x) ** 2), (0, 1)))

    found, given = gradients(replay)(p, X), gradients(apply)(p, X)
    assert bits(found) == bits(given)
    inlined = gradients(lambda p, x: jnp.sin(x @ p["w"]) @ p["v"])(p, X)
    assert not np.allclose(found[1][0]["w"], inlined[1][0]["w"])
    _, statistics = jax.jit(evaluate(apply, recording))(p, X)
    assert {*statistics} == {"input", "w", "w/sin", "v", "output"}
    np.testing.assert_allclose(statistics["w"], X @ p["w"], 1e-5, 1e-5)


def test_an_elementwise_rule_is_bound_as_it_is():
    """An inlined maximum would halve nothing at zero, or everything."""
    p, x = {"w": jnp.eye(3)}, jnp.asarray([[-1.0, 0.0, 2.0]])
    for function, at_zero in ((relu_with_half, 0.5), (jax.nn.relu, 0.0)):
        apply = functools.partial(lambda f, p, x: f(x @ p["w"]), function)
        assert [n.function for n in trace(apply, p, x).nodes][2] == "relu"
        total = lambda x, f: jnp.sum(f(p, x))
        found = jax.grad(total)(x, replayed(apply))
        np.testing.assert_array_equal(found, [[0.0, at_zero, 1.0]])


# Statistics of loops and branches.


def test_statistics_under_scan_are_stacked():
    forward, p, x = tapped("layered")
    apply = functools.partial(forward, no_tap)
    _, found = jax.jit(evaluate(apply, recording))(p, x)
    for i in range(3):
        y = x @ p["w"][i]
        np.testing.assert_allclose(found["w"][i], y, 1e-5, 1e-5)
        x = x + jnp.maximum(y, 0.0)
        np.testing.assert_allclose(found["w/add"][i], x, 1e-5, 1e-5)
    assert found["w"].shape == (3, 4, 6) and found["head"].shape == (4, 4)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_keeps_its_direction_and_counts_its_rounds(reverse):
    def apply(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x), x, p, reverse=reverse)

    rounds = []

    def hook(node, run, operands):
        inside = "scan" in node.region
        rounds.append(len(run.iteration) == inside)
        return run(*operands), run.iteration if inside else None

    p = drawn(3)["w"][:, :, :6]
    outputs, statistics = jax.jit(evaluate(apply, hook))(p, X)
    close(outputs, jax.jit(apply)(p, X))
    assert all(rounds) and {len(counts) for counts in statistics.values()} == {1}
    for (counts,) in statistics.values():
        # by position, as the scan itself stacks: round i is slice i in both directions
        assert [*np.asarray(counts)] == [0, 1, 2]


def test_statistics_under_nested_scans_are_stacked_twice():
    def apply(p, x):
        def outer(x, w):
            inner = lambda x, _: (jnp.tanh(x @ w), None)
            return jax.lax.scan(inner, x, length=2)[0], None

        return jax.lax.scan(outer, x, p)[0]

    p = drawn(3)["w"][:, :, :6]
    _, found = jax.jit(evaluate(apply, recording))(p, X)
    [layer] = trace(apply, p, X).layers
    assert layer.region == ("scan", "scan")
    assert found[layer.name].shape == (3, 2, 4, 6)
    x = jnp.tanh(X @ p[0])
    np.testing.assert_allclose(found[layer.name][0, 1], x @ p[0], 1e-5, 1e-5)


def test_statistics_under_cond_say_which_branch_was_taken():
    forward, p, x = tapped("branching")
    apply = functools.partial(forward, no_tap)
    run = jax.jit(evaluate(apply, recording))
    for sign, taken, other in ((1.0, "high", "low"), (-1.0, "low", "high")):
        y = sign * x
        assert (float(jnp.sum(y)) > 0) == (taken == "high")
        _, found = run(p, y)
        assert isinstance(found[taken], Counted) and not isinstance(
            found["head"], Counted
        )
        assert (int(found[taken].count), int(found[other].count)) == (1, 0)
        np.testing.assert_allclose(found[taken].value, y @ p[taken], 1e-5, 1e-5)
        np.testing.assert_array_equal(found[other].value, 0.0)


def test_a_cond_inside_a_scan_counts_in_each_round():
    def apply(p, x):
        def layer(x, w):
            flipped = lambda x: jnp.tanh(x @ w)
            return jax.lax.cond(x[0, 0] > 0, flipped, lambda x: -x, x), None

        return jax.lax.scan(layer, x, p["w"])[0] @ p["v"]

    p = {"w": drawn(3)["w"][:, :, :6], "v": drawn()["v"][:6]}
    y, found = jax.jit(evaluate(apply, recording))(p, X)
    close(y, jax.jit(apply)(p, X))
    taken, x = [], X
    for w in p["w"]:
        taken.append(int(x[0, 0] > 0))
        x = jnp.tanh(x @ w) if taken[-1] else -x
    assert 0 < sum(taken) < 3
    assert [*np.asarray(found["w"].count)] == taken
    assert found["w"].value.shape == (3, 4, 6)


def test_a_switch_of_three():
    def apply(p, x, i):
        branches = [lambda x, k=k: jnp.tanh(x @ p[k]) for k in "abc"]
        return jax.lax.switch(i, branches, x)

    p = {k: drawn(3)["w"][n] for n, k in enumerate("abc")}
    run = jax.jit(evaluate(apply, recording))
    for i in range(3):
        y, found = run(p, X, jnp.int32(i))
        close(y, jax.jit(apply)(p, X, jnp.int32(i)))
        assert [int(found[k].count) for k in "abc"] == [int(k == i) for k in range(3)]


def test_statistics_under_while_are_refused():
    forward, p, x = tapped("awaiting")
    apply = functools.partial(forward, no_tap)
    assert trace(apply, p, x)["w"].region == ("while",)
    with pytest.raises(ValueError, match=r"^jaxmet\.evaluate: .*while_loop") as error:
        jax.jit(lambda w, x: evaluate(apply, recording)({**p, "w": w}, x))(p["w"], x)
    assert "'w'" in str(error.value) and "lax.scan" in str(error.value)

    def outside(node, run, operands):
        y = run(*operands)
        return y, None if "while" in node.region else y

    run = jax.jit(lambda w, x: evaluate(apply, outside)({**p, "w": w}, x))
    y, found = run(p["w"], x)
    assert {*found} == {"input", "head", "output"}
    close(y, apply(p, x))


# Inputs and outputs of any form.

Pair = namedtuple("Pair", "first second")


def test_any_pytree_goes_in_and_comes_out():
    def apply(p, batch, *, scale, flag, name):
        y = batch["image"] @ p["w"]
        if flag:
            y = -y
        tokens = jnp.argmax(y, -1)
        return Pair(
            {"y": y, name: [scale * y, None]}, (tokens, batch["id"], 3.0, p["w"])
        )

    p, batch = drawn(), {"image": X, "id": jnp.arange(4)}
    kwargs = {"scale": jnp.float32(0.5), "flag": True, "name": "scaled"}
    found = replayed(apply)(p, batch, **kwargs)
    expected = apply(p, batch, **kwargs)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    close(jax.tree.map(jnp.asarray, found), jax.tree.map(jnp.asarray, expected))
    _, statistics = evaluate(apply, recording)(p, batch, **kwargs)
    assert {*statistics} >= {"input:0", "input:1", "w", "output:0"}


def test_keyword_arguments_reach_the_model():
    def both(name, **kwargs):
        apply, params, inputs = model(name, "linen")

        @jax.jit
        def run(params, *inputs, **arrays):
            more = {**kwargs, **arrays}
            return apply(params, *inputs, **more), replayed(apply)(
                params, *inputs, **more
            )

        return lambda **arrays: run(params, *inputs, **arrays)

    expected, found = both("conv_bn_relu", train=True, mutable=["batch_stats"])()
    close(expected, found)
    plain = both("conv_bn_relu")()[1]
    assert isinstance(found, tuple) and not np.allclose(found[0], plain, atol=1e-3)

    train = both("dropout", train=True)
    dropped = []
    for seed in (5, 6):
        expected, found = train(rngs={"dropout": jax.random.key(seed)})
        close(expected, found)
        dropped.append(found)
    assert not np.allclose(*dropped, atol=1e-3)


def test_an_nnx_module_and_its_updated_statistics():
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(6, 4, rngs=rngs)
            self.bn = nnx.BatchNorm(4, rngs=rngs)

        def __call__(self, x):
            return nnx.relu(self.bn(self.dense(x)))

        def features(self, x):
            return self.dense(x)

    module = Net(nnx.Rngs(0))
    apply, params, merge = functional(module)
    run = jax.jit(lambda p, x: evaluate(apply, recording)(p, x, mutable=nnx.BatchStat))
    (y, updated), found = run(params, X)
    assert {*found} == {"input", "dense", "bn", "dense/relu", "output"}
    close(y, module(X))  # which moves its own statistics
    close(updated, nnx.state(module, nnx.BatchStat))
    close(found["dense"], merge(params).dense(X))
    features = replayed(apply)(params, X, method="features")
    close(features, merge(params).features(X))


# Compressed leaves.


def clipped(p, x):
    return jax.nn.relu6(x @ p["w"] + p["b"][None]) @ p["v"]


def test_a_compressed_leaf_refuses_the_model_and_runs_in_the_replay():
    p, upper = drawn(), jnp.linspace(0.1, 0.8, 8)
    lower = -0.5 * upper
    bounded = {**p, "w": Compressed(p["w"], lower, upper)}
    with pytest.raises(TypeError, match=r"jm\.lift"):
        clipped(bounded, X)
    y = jax.jit(replayed(clipped))(bounded, X)
    by_hand = jnp.clip(X @ p["w"] + p["b"][None], lower[None], upper[None]) @ p["v"]
    close(y, by_hand)
    half = jax.jit(replayed(clipped))({**p, "w": Compressed(p["w"], upper=upper)}, X)
    x = jnp.maximum(X @ p["w"] + p["b"][None], 0.0)
    close(half, jnp.minimum(x, upper[None]) @ p["v"])
    plain = jax.jit(replayed(clipped))({**p, "w": Compressed(p["w"])}, X)
    close(plain, jax.jit(clipped)(p, X))


@pytest.mark.parametrize("leaf", ["v", "b"])
def test_bounds_without_their_clip_are_refused(leaf):
    p = drawn()
    tree = replace_leaves(p, {leaf: Compressed(p[leaf], upper=jnp.ones(6))})
    with pytest.raises(ValueError, match=rf"^jaxmet\..*'{leaf}' states bounds"):
        replayed(clipped)(tree, X)
