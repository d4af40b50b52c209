"""What nodes are called: by hand, and the same however the model is traced."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState

from jaxmet import functional, trace
from zoo import CASES, model, traced

RUNS = [(name, front) for name, case in CASES.items() for front in case.frontends]
FIRST = [(name, case.frontends[0]) for name, case in CASES.items()]
TWINS = [name for name, case in CASES.items() if {"linen", "nnx"} <= {*case.make}]
TRAINED = [(n, f) for n, f in RUNS if CASES[n].train_kwargs(f)]
IMAGES = """
    conv_bn_relu inverted_residual mobile residual resnet clip_after_add grouped dilated
    strided transposed concatenation global_pool pooling resize pre_activation group_norm
    slopes squeeze_excite standardized haiku_conv
""".split()


def names(graph):
    return tuple(node.name for node in graph.nodes)


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def names_of(apply, params, *inputs, **kwargs):
    return " ".join(names(trace(apply, params, *inputs, **kwargs)))


# The zoo.


@pytest.mark.parametrize(("name", "front"), RUNS)
def test_nodes_are_those_written_by_hand(name, front):
    case, graph = CASES[name], traced(name, front)
    found, layers = names(graph), tuple(node.name for node in graph.layers)
    if not case.ordered:
        found, layers = sorted(found), sorted(layers)
        assert (found, layers) == (sorted(case.nodes), sorted(case.layers))
    else:
        assert (found, layers) == (case.nodes, case.layers)


@pytest.mark.parametrize("name", TWINS)
def test_twins_have_equal_nodes(name):
    linen, nnx = ({n.name: n for n in traced(name, f).nodes} for f in ("linen", "nnx"))
    assert linen.keys() == nnx.keys()
    for key, node in linen.items():
        twin = nnx[key]
        assert (node.kind, node.function) == (twin.kind, twin.function)
        assert {*node.parameters} == {*twin.parameters}
        assert {e.node for e in node.inputs} == {e.node for e in twin.inputs}
        if node.weight is not None:
            assert node.weight.name == twin.weight.name
            assert node.weight.out_axes == twin.weight.out_axes


@pytest.mark.parametrize(("name", "front"), TRAINED)
def test_training_traces_have_equal_names(name, front):
    apply, params, inputs = model(name, front)
    graph = trace(apply, params, *inputs, **CASES[name].train_kwargs(front))
    assert names(graph) == names(traced(name, front))
    assert [n.name for n in graph.layers] == [*CASES[name].layers]


def with_batch(inputs, size):
    return [spec(size, *x.shape[1:], dtype=x.dtype) for x in inputs]


def without_moves(graph):
    """The nodes; a transposition of a batch of one is a reshape, so moves may differ."""
    return [
        dataclasses.replace(
            node, inputs=tuple(dataclasses.replace(e, moves=()) for e in node.inputs)
        )
        for node in graph.nodes
    ]


def same_groups(one, two):
    described = lambda graph: [(g.producers, g.consumers, g.size) for g in graph.groups]
    assert {*one.members} == {*two.members}
    assert described(one) == described(two)


@pytest.mark.parametrize(("name", "front"), RUNS)
def test_a_batch_of_one_gives_an_equal_graph(name, front):
    apply, params, inputs = model(name, front)
    graph = traced(name, front)
    other = trace(apply, params, *with_batch(inputs, 1))
    assert without_moves(other) == without_moves(graph)
    same_groups(other, graph)


@pytest.mark.parametrize("name", IMAGES)
def test_another_image_size_gives_an_equal_graph(name):
    front = CASES[name].frontends[0]
    apply, params, (x,) = model(name, front)
    graph, larger = (
        traced(name, front),
        spec(1, 2 * x.shape[1], 2 * x.shape[2], x.shape[3]),
    )
    other = trace(apply, params, larger)
    assert (other.nodes, other.groups, other.members) == (
        graph.nodes,
        graph.groups,
        graph.members,
    )


@pytest.mark.parametrize(("name", "front"), FIRST)
def test_a_batch_of_any_size_gives_an_equal_graph(name, front):
    apply, params, inputs = model(name, front)
    (b,) = jax.export.symbolic_shape("b")
    graph = trace(apply, params, *with_batch(inputs, b))
    assert graph.nodes == traced(name, front).nodes
    same_groups(graph, traced(name, front))


@pytest.mark.parametrize("name", ["conv_bn_relu", "dense_norm", "transformer", "rnn"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_another_dtype_gives_equal_names(name, dtype):
    def cast(tree):
        return jax.tree.map(lambda x: spec(*x.shape, dtype=dtype), tree)

    apply, params, inputs = model(name, "linen")
    with jax.numpy_dtype_promotion("standard"):  # flax mixes float32 in
        graph = trace(apply, cast(params), *cast(inputs))
    assert names(graph) == names(traced(name, "linen"))


@pytest.mark.parametrize("name", ["resnet", "dense_norm", "scan", "tied", "embedding"])
def test_a_tree_without_its_collection_gives_equal_names(name):
    """`TrainState.params`, with the statistics closed over where there are any."""
    apply, variables, inputs = model(name, "linen")
    rest = {k: v for k, v in variables.items() if k != "params"}
    state = TrainState.create(
        apply_fn=apply, params=variables["params"], tx=_no_optax()
    )

    def with_rest(params, *inputs):
        return state.apply_fn({"params": params, **rest}, *inputs)

    graph, whole = trace(with_rest, state.params, *inputs), traced(name, "linen")
    assert names(graph) == names(whole)
    trained = [p for n in whole.nodes if n.is_layer for p in n.parameters]
    assert [p for n in graph.nodes if n.is_layer for p in n.parameters] == trained
    norms = [n.norm.over for n in graph.nodes if n.norm and name == "resnet"]
    assert norms == ["constant"] * len(norms)


def _no_optax():
    import optax

    return optax.identity()


# Keyword arguments.


class Headed(nn.Module):
    @nn.compact
    def __call__(self, x, train=False, scale=None):
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="bn")(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        x = nn.Dense(4, name="head")(x)
        return x if scale is None else x * scale

    @nn.compact
    def features(self, x):
        return nn.tanh(nn.Dense(4, name="head")(x))


@functools.cache
def headed():
    module = Headed()
    return module, jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((2, 6)))


def test_keyword_arguments_pass_through():
    module, params = headed()
    x = spec(2, 6)
    plain = "input bn input/relu head output"
    assert names_of(module.apply, params, x) == plain
    assert names_of(module.apply, params, x, train=False) == plain
    training = {
        "train": True,
        "mutable": ["batch_stats"],
        "rngs": {"dropout": jax.random.key(0)},
    }
    assert names_of(module.apply, params, x, **training) == plain
    graph = trace(module.apply, params, x, method="features")
    assert names(graph) == ("input", "head", "head/tanh", "output")
    assert names(trace(module.apply, params, x, method=Headed.features)) == names(graph)


def test_an_array_among_keyword_arguments_is_an_input():
    module, params = headed()
    found = names_of(module.apply, params, spec(2, 6), scale=spec(2, 4))
    assert found == "input:0 input:1 bn input/relu head head/multiply output"
    by_number = names_of(module.apply, params, spec(2, 6), scale=2.0)
    assert by_number == "input bn input/relu head output"


def test_static_arguments_stay_with_the_graph():
    module, params = headed()
    graph = trace(module.apply, params, spec(2, 6), method="features")
    again = trace(graph.apply, params, spec(2, 6))
    assert names(again) == names(graph) == ("input", "head", "head/tanh", "output")


def test_an_nnx_module_is_called_by_its_methods():
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.value = nnx.Linear(6, 4, rngs=rngs)

        def __call__(self, x):
            return nnx.relu(self.value(x))

        def features(self, x):
            return nnx.tanh(self.value(x))

    apply, params, _ = functional(Net(nnx.Rngs(0)))
    assert names_of(apply, params, spec(2, 6)) == "input value value/relu output"
    found = names_of(apply, params, spec(2, 6), method="features")
    assert found == "input value value/tanh output"


# Single rules, on functions of a few lines.

W, X = spec(6, 6), spec(2, 6)


def test_two_weights_in_one_module_keep_their_leaf_names():
    def apply(p, x):
        return (x @ p["block"]["one"]) @ p["block"]["two"] @ p["solo"]["w"]

    params = {"block": {"one": W, "two": W}, "solo": {"w": W}}
    assert names_of(apply, params, X) == "input block/one block/two solo output"


def test_a_weight_at_the_top_and_one_in_a_list():
    assert names_of(lambda p, x: x @ p, W, X) == "input params output"
    assert names_of(lambda p, x: x @ p["w"], {"w": W}, X) == "input w output"
    found = names_of(lambda p, x: x @ p[0] @ p[1]["k"], [W, {"k": W}], X)
    assert found == "input 0 1 output"


def test_a_weight_that_is_used_twice_is_numbered_in_the_order_of_its_uses():
    def apply(p, x):
        x = jnp.tanh(x @ p["a"]["w"])
        return jnp.tanh(x @ p["b"]["w"]) @ p["a"]["w"]

    found = names_of(apply, {"a": {"w": W}, "b": {"w": W}}, X)
    assert found == "input a:0 a:0/tanh b b/tanh a:1 output"


def test_each_call_of_one_jitted_function_makes_its_own_nodes():
    layer = jax.jit(lambda w, x: jax.nn.relu(x @ w))

    def apply(p, x):
        return layer(p["b"]["w"], layer(p["a"]["w"], x))

    params = {"a": {"w": W}, "b": {"w": W}}
    assert names_of(apply, params, X) == "input a a/relu b b/relu output"


def test_a_repeated_kind_after_one_product_is_counted():
    def apply(p, x):
        x = x @ p["w"]
        return jnp.tanh(x) + jnp.tanh(2.0 * x[:, ::-1]) + jnp.sin(x)

    found = names_of(apply, {"w": W}, X)
    assert found.split() == [
        *"input w w/tanh w/tanh:1 w/add w/sin w/add:1 output".split()
    ]


def test_what_precedes_every_product_is_named_after_the_input():
    def apply(p, x, y):
        return (jnp.tanh(x) + y) @ p["w"]

    found = names_of(apply, {"w": W}, X, X)
    assert found == "input:0 input:1 input/tanh input/add w output"


def test_several_outputs_and_one_returned_twice():
    def apply(p, x):
        y = x @ p["w"]
        return {"y": y, "again": y, "tanh": jnp.tanh(y), "top": jnp.argmax(y, -1)}

    assert names_of(apply, {"w": W}, X) == "input w w/tanh output:0 output:1"


def test_running_averages_masks_and_index_arithmetic_have_no_names():
    def apply(p, x, lengths):
        y = x @ p["w"]
        mask = jnp.arange(6)[None] < jnp.clip(2 * lengths, 0, 6)[:, None]
        mean = 0.9 * p["mean"] + 0.1 * jnp.tanh(jnp.mean(y, axis=0))
        return jnp.where(mask, y, -1e9), mean

    params = {"w": W, "mean": spec(6)}
    found = names_of(apply, params, X, spec(2, dtype=jnp.int32))
    assert found == "input:0 input:1 w output"


def test_a_key_among_the_inputs_is_no_node():
    def apply(p, x, key):
        keep = jax.random.bernoulli(key, 0.5, x.shape)
        return jnp.tanh(jnp.where(keep, x, 0.0) @ p["w"])

    found = names_of(apply, {"w": W}, X, jax.random.key(0))
    assert found == "input w w/tanh output"


def test_moves_scalings_and_reductions_to_come_have_no_names():
    def apply(p, x):
        y = (2.0 * (x @ p["w"])).reshape(2, 2, 3).transpose(0, 2, 1)[:, 1:]
        return -y.astype(jnp.bfloat16)

    assert names_of(apply, {"w": W}, X) == "input w output"


def test_derived_weights_are_named_by_the_module_that_their_parameters_share():
    def apply(p, x):
        w = p["wn"]["v"] * p["wn"]["g"][None]
        both = jnp.concatenate([p["cell"]["i"]["w"], p["cell"]["f"]["w"]], axis=1)
        return x @ w @ both

    params = {"wn": {"v": W, "g": spec(6)}, "cell": {"i": {"w": W}, "f": {"w": W}}}
    graph = trace(apply, params, X)
    assert names(graph) == ("input", "wn", "cell", "output")
    assert graph["cell"].weight.parameters == ("cell/i/w", "cell/f/w")


def test_regions_do_not_change_names():
    def layer(p, x):
        return jax.nn.relu(x @ p["w"] + p["b"][None])

    @jax.custom_jvp
    def custom(p, x):
        return layer(p, x)

    custom.defjvp(lambda primals, tangents: jax.jvp(layer, primals, tangents))

    @jax.custom_vjp
    def custom_vjp(p, x):
        return layer(p, x)

    custom_vjp.defvjp(lambda p, x: jax.vjp(layer, p, x), lambda f, g: f(g))

    def many(p, x):
        rows = jax.lax.map(lambda row: layer(p, row[None])[0], x)
        return rows

    def looped(p, x):
        return jax.lax.fori_loop(0, 3, lambda i, x: layer(p, x), x)

    def vmapped(p, x):
        return jax.vmap(lambda row: layer(p, row[None])[0])(x)

    wraps = (
        layer,
        jax.jit(layer),
        jax.checkpoint(layer),
        custom,
        custom_vjp,
        many,
        looped,
        vmapped,
        jax.jit(jax.checkpoint(jax.jit(custom))),
    )
    params = {"m": {"w": W, "b": spec(6)}, "head": {"w": W}}
    for wrap in wraps:
        found = names_of(lambda p, x, f=wrap: f(p["m"], x) @ p["head"]["w"], params, X)
        assert found == "input m m/relu head output", wrap
