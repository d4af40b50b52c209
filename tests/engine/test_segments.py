"""A model in pieces, against the model in one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import by_hand
import jaxmet as jm
import zoo
from jaxmet.engine.run.segments import cut
from jaxmet.tree.named_leaves import named_leaves, replace_leaves
from zoo import CASES

NAMES = [
    "residual",
    "concatenation",
    "transformer",
    "tied",
    "jit",
    "remat",
    "outputs_in_a_tree",
    "two_inputs",
    "standardized",
    "embedding",
]


def model(name, front=None):
    return *zoo.model(name, front), zoo.traced(name, front)


def composed(pieces, params, *inputs, **kwargs):
    environment = pieces.begin(*inputs, **kwargs)
    for piece in pieces:
        environment = jax.jit(piece)(params, environment)
    return pieces.finish(environment)


def close(found, expected, tolerance=1e-5):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_cut_at_every_layer(name):
    """Composed it is the model, and each piece holds exactly the product before its cut."""
    apply, params, inputs, graph = model(name)
    layers = [n.name for n in graph.layers]
    pieces = jm.segments(graph, params, *inputs, cuts=layers)
    assert [p.name for p in pieces] == [*layers, None] and len(pieces) == len(
        layers
    ) + 1
    for piece, layer in zip(pieces, layers, strict=False):
        assert [n for n in piece.nodes if n in layers] == [layer]
        assert piece.nodes[-1] == layer
    assert not {*pieces[-1].nodes} & {*layers}
    # every node runs once, in one of the pieces
    ran = [n for p in pieces for n in p.nodes]
    assert sorted(ran) == sorted(n.name for n in graph.nodes)
    close(composed(pieces, params, *inputs), jax.jit(apply)(params, *inputs))


def test_pieces_hold_the_values_that_they_say():
    """Against the same pieces by hand: what lives between them is no more than needed."""
    _, params, (x,), graph = model("residual")
    pieces = jm.segments(graph, params, x, cuts=["conv1/relu", "conv2"])
    get = by_hand.named(params).get
    y = jax.nn.relu(by_hand.norm(get, "bn1", by_hand.conv(get, "conv1", x)))
    first = pieces[0](params, pieces.begin(x))
    assert len(first) == 2 and {"conv1/relu"} < {*first}
    np.testing.assert_allclose(first["conv1/relu"], y, atol=1e-5)
    (skip,) = [v for k, v in first.items() if k != "conv1/relu"]
    np.testing.assert_array_equal(skip, x)
    second = pieces[1](params, first)
    np.testing.assert_allclose(
        second["conv2"], by_hand.conv(get, "conv2", y), atol=1e-5
    )
    # a piece depends on its environment, and on its own parameters
    changed = pieces[1](params, {**first, "conv1/relu": 0.0 * y})
    bias = np.broadcast_to(get("conv2/bias"), y.shape)
    np.testing.assert_allclose(changed["conv2"], bias, atol=1e-6)
    half = jax.tree.map(lambda a: a * 0.5, params)
    np.testing.assert_allclose(
        pieces[1](half, first)["conv2"], 0.5 * second["conv2"], atol=1e-5
    )


def test_what_depends_on_parameters_alone_is_computed_again():
    """A normalized kernel is no part of an environment, though two pieces use it."""

    def apply(params, x):
        kernel = params["w"]["kernel"] / jnp.sum(params["w"]["kernel"])
        return jnp.tanh(x @ kernel) @ kernel

    params, x = {"w": {"kernel": jnp.eye(3) + 0.3}}, jnp.ones((2, 3))
    graph = jm.trace(apply, params, x)
    first, second = (n.name for n in graph.layers)
    pieces = jm.segments(graph, params, x, cuts=[first])
    environment = pieces[0](params, pieces.begin(x))
    assert [*environment] == [first]
    close(composed(pieces, params, x), apply(params, x))


@pytest.mark.parametrize("front", ["linen", "nnx"])
@pytest.mark.parametrize("name", ["jit", "remat"])
def test_cuts_inside_calls_that_are_inlined(name, front):
    apply, params, inputs, graph = model(name, front)
    pieces = jm.segments(
        graph, params, *inputs, cuts=["block/first", "block/first/relu"]
    )
    assert pieces[0].nodes[-1] == "block/first" and pieces[1].nodes == (
        "block/first/relu",
    )
    close(composed(pieces, params, *inputs), jax.jit(apply)(params, *inputs))


@pytest.mark.parametrize("name", ["scan", "rnn", "cond"])
def test_loops_and_branches_stay_whole(name):
    apply, params, inputs, graph = model(name)
    pieces = jm.segments(graph, params, *inputs, cuts=["input", "head"])
    close(composed(pieces, params, *inputs), jax.jit(apply)(params, *inputs))
    inside = next(n.name for n in graph.nodes if n.region)
    body = {"rnn": "scan"}.get(name, name)
    message = (
        rf"jaxmet\.segments: '{inside}' runs inside a {body} body.*Cut before or after"
    )
    with pytest.raises(ValueError, match=message):
        jm.segments(graph, params, *inputs, cuts=["head", inside])


def test_an_unknown_cut_is_refused_with_the_nearest_names():
    _, params, inputs, graph = model("residual")
    with pytest.raises(
        ValueError, match=r"jaxmet\.segments: .*'conv3'.*'conv1'|'conv2'"
    ):
        jm.segments(graph, params, *inputs, cuts=["conv3"])


def test_shapes_are_enough_and_cuts_may_come_in_any_order():
    apply, params, inputs, graph = model("concatenation")
    shapes = jax.eval_shape(lambda: (params, *inputs))
    pieces = jm.segments(graph, *shapes, cuts=["merge", "stem"])
    assert [p.name for p in pieces] == ["stem", "merge", None]
    close(composed(pieces, params, *inputs), jax.jit(apply)(params, *inputs))
    whole = jm.segments(graph, *shapes, cuts=[])
    assert len(whole) == 1
    close(composed(whole, params, *inputs), jax.jit(apply)(params, *inputs))


def test_a_hook_sees_every_node_and_changes_it():
    apply, params, inputs, graph = model("scan")
    seen = []

    def hook(node, run, operands):
        seen.append(node.name)
        result = run(*operands)
        return (result * 2.0 if node.name == "head" else result), None

    pieces = jm.segments(graph, params, *inputs, cuts=["head"], hook=hook)
    found = composed(pieces, params, *inputs)
    close(found, 2.0 * jax.jit(apply)(params, *inputs))
    assert {*seen} == {n.name for n in graph.nodes}


def test_float_and_quantized_copies_in_lock_step():
    """What the pieces are for: a simulated copy of each piece, beside the float one."""
    apply, params, inputs, graph = model("concatenation")
    quantizers = jm.calibrate(params, graph, [inputs], progress=False)
    layers = [n.name for n in graph.layers]

    def hook(node, run, operands):
        quantizer = quantizers.activation(node.name)
        result = run(*operands)
        return (result if quantizer is None else quantizer(result)), None

    pieces = jm.segments(graph, params, *inputs, cuts=layers, hook=hook)
    rounded = jm.round_weights(params, quantizers)
    found = composed(pieces, rounded, *inputs)
    expected = jax.jit(jm.simulate(apply, quantizers))(params, *inputs)
    scale = quantizers.activations["merge"].scale
    difference = np.abs(found - expected)
    assert np.mean(difference > 1e-5) < 0.05 and np.max(difference) < 1.5 * scale
    assert np.max(np.abs(found - jax.jit(apply)(params, *inputs))) > 1e-3


def test_bounds_of_compressed_leaves_hold_in_pieces():
    apply, params, inputs, graph = model("inverted_residual")
    kernel = named_leaves(params)["depthwise/kernel"]
    leaf = jm.Compressed(kernel, upper=jnp.linspace(0.1, 2.0, 8))
    tree = replace_leaves(params, {"depthwise/kernel": leaf})
    pieces = jm.segments(graph, tree, *inputs, cuts=["depthwise_bn", "project"])
    found = composed(pieces, tree, *inputs)
    close(found, jax.jit(jm.lift(apply))(tree, *inputs))
    assert np.max(np.abs(found - jax.jit(apply)(params, *inputs))) > 0.05


def test_random_numbers_and_updated_statistics():
    for name in ("dropout", "conv_bn_relu"):
        apply, params, inputs, _ = model(name)
        kwargs = CASES[name].train_kwargs()
        graph = jm.trace(apply, params, *inputs, **kwargs)
        cuts = [n.name for n in graph.layers]
        pieces = jm.segments(graph, params, *inputs, cuts=cuts, **kwargs)
        found = composed(pieces, params, *inputs, **kwargs)
        close(found, jax.jit(lambda p, *x: apply(p, *x, **kwargs))(params, *inputs))


def test_outputs_that_come_from_parameters_or_inputs_alone():
    def apply(params, x):
        kernel = params["w"]["kernel"]
        return {
            "y": x @ kernel,
            "penalty": jnp.sum(kernel**2),
            "kernel": kernel,
            "steps": jnp.arange(3),
            "x": x,
        }

    params, x = {"w": {"kernel": jnp.full((3, 4), 2.0)}}, jnp.ones((2, 3))
    graph = jm.trace(apply, params, x)
    pieces = jm.segments(graph, params, x, cuts=["w"])
    other = {"w": {"kernel": jnp.full((3, 4), 3.0)}}
    close(composed(pieces, other, x), apply(other, x))


def test_gradients_pass():
    apply, params, inputs, graph = model("residual")
    pieces = jm.segments(graph, params, *inputs, cuts=["conv1/relu"])

    def loss(params):
        environment = pieces.begin(*inputs)
        for piece in pieces:
            environment = piece(params, environment)
        return jnp.sum(pieces.finish(environment) ** 2)

    found = jax.jit(jax.grad(loss))(params)
    expected = jax.jit(jax.grad(lambda p: jnp.sum(apply(p, *inputs) ** 2)))(params)
    close(found, expected, 1e-4)


def test_other_inputs_are_refused():
    _, params, inputs, graph = model("two_inputs")
    pieces = jm.segments(graph, params, *inputs, cuts=["head"])
    with pytest.raises(
        ValueError, match=r"begin: got 1 arrays.*for 2.*given to segments"
    ):
        pieces.begin(inputs[0])


@pytest.mark.parametrize("reverse", [False, True])
def test_a_loop_runs_turn_by_turn_as_it_runs_whole(reverse):
    """Its turns are one program, whatever runs before it, after it and beside it."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "first": jax.random.normal(keys[0], (3, 5)),
        "stack": jax.random.normal(keys[1], (4, 5, 5)),
        "last": jax.random.normal(keys[2], (5, 2)),
    }
    x = jax.random.normal(keys[3], (6, 3))

    def apply(p, x):
        def body(carry, w):
            h, count = carry
            h = jnp.tanh(h @ w)
            return (h, count + 1), jnp.sum(h)

        start = (x @ p["first"], jnp.int32(0))
        (h, count), sums = jax.lax.scan(body, start, p["stack"], reverse=reverse)
        return h @ p["last"], count, sums

    graph = jm.trace(apply, params, x)
    [name] = [n.name for n in graph.layers if n.loop is not None]
    pieces = cut(graph, params, (x,), {}, (), (name,))
    before, loop, after = pieces
    live = before(params, pieces.begin(x))
    turn = jax.jit(loop.turn)
    each = loop.enter(params, live)
    assert loop.turns == ((3, 2, 1, 0) if reverse else (0, 1, 2, 3))
    for number in loop.turns:
        each, _ = turn(params, each, number)
    carried = [each[key] for key in each if key not in live]
    whole = loop(params, live)
    exact = apply(params, x)
    h = carried[0] @ params["last"]
    np.testing.assert_allclose(h, exact[0], rtol=1e-5, atol=1e-6)
    assert carried[1] == exact[1] == 4
    found = pieces.finish(after(params, loop(params, each)))
    jax.tree.map(
        np.testing.assert_array_equal, found, pieces.finish(after(params, whole))
    )
    np.testing.assert_allclose(found[2], exact[2], rtol=1e-5, atol=1e-6)
