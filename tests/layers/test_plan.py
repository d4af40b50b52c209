"""What gets a quantizer, against lists written by hand from what an integer device stores."""

import jax
import jax.numpy as jnp
import pytest

import jaxmet as jm
import zoo
from jaxmet.layers.placement.placement import place

# placement='operations': what an operation stores, with norm and rectifier fused into it;
# placement='products': what enters a product, or a matmul of two activations.
OPERATIONS = {
    "conv_bn_relu": "input stem/relu head",
    "inverted_residual": "input expand/clip depthwise/clip project_bn project/add",
    "residual": "input conv1/relu bn2 conv2/relu",
    "clip_after_add": "input stem/relu branch branch/clip head",
    "concatenation": "input stem/relu right/concat merge",
    "pooling": "input first/relu second/relu second/pool third",
    "pre_activation": "input input/relu conv1/relu conv2",
    "slopes": "input first/leaky_relu act third",
    "resize": "input stem/relu stem/resize head",
    "transformer": """ln1 attn/query attn/key attn/value attn/key/matmul
        attn/key/softmax attn/value/matmul ln2 up/gelu""",
    "embedding": "embed first/relu second",
    "tied": "input shared:0/relu shared:1/relu head",
    "tied_embedding": "embed:0 middle/gelu embed:1",
    "remat": "input stem/relu block/first/relu block/second head",
    "cond": "input low/relu high/relu head",
    "scan": "input stack/dense/relu head",
    "two_inputs": "input:0 input:1 left/relu right right/add head",
    "gated": "input gate/silu up up/multiply down",
    "standardized": "input conv/relu conv/pool head",
}
PRODUCTS = {
    "conv_bn_relu": "input stem/relu",
    "inverted_residual": "input expand/clip depthwise/clip",
    "residual": "input conv1/relu",
    "clip_after_add": "input stem/relu branch/clip",
    "concatenation": "input stem/relu right/concat",
    "pooling": "input first/relu second/pool",
    "pre_activation": "input/relu conv1/relu",
    "slopes": "input first/leaky_relu act",
    "resize": "input stem/resize",
    "transformer": """ln1 attn/query attn/key attn/value attn/key/softmax
        attn/value/matmul ln2 up/gelu""",
    "embedding": "embed first/relu",
    "tied": "input shared:0/relu shared:1/relu",
    "tied_embedding": "embed:0 middle/gelu",
    "remat": "input stem/relu block/first/relu block/second",
    "cond": "input low/relu high/relu",
    "scan": "input stack/dense/relu",
    "two_inputs": "input:0 input:1 right/add",
    "gated": "input up/multiply",
    "standardized": "input conv/pool",
}
# The axes with a scale of their own, where it is not just the last one of a kernel.
AXES = {
    "scan": {"stack/dense/kernel": (0, 2), "head/kernel": (1,)},
    "embedding": {"embed/embedding": (0,), "first/kernel": (1,), "second/kernel": (1,)},
    "tied_embedding": {"embed/embedding": (0,), "middle/kernel": (1,)},
    "tied": {"shared/kernel": (1,), "head/kernel": (1,)},
    "transformer": {
        **{f"attn/{n}/kernel": (1, 2) for n in ("query", "key", "value")},
        "attn/out/kernel": (2,),
        "up/kernel": (1,),
        "down/kernel": (1,),
    },
    "lstm": {"rnn/cell": (1,), "rnn/cell:1": (1,), "head/kernel": (1,)},
    "equinox_conv": {f"layers/{i}/weight": (0,) for i in (0, 2, 5)},
    "einsum_heads": {"project": (1, 2), "merge": (2,)},
    "standardized": {"conv": (3,), "head/w": (1,)},
    "inverted_residual": {
        f"{n}/kernel": (3,) for n in ("expand", "depthwise", "project")
    },
}
# An int32 bias and the two quantizers whose scales multiply to its own.
BIASES = {
    "conv_bn_relu": {
        "stem": ("stem/kernel", "input"),
        "head": ("head/kernel", "stem/relu"),
    },
    "concatenation": {
        "stem": ("stem/kernel", "input"),
        "left": ("left/kernel", "stem/relu"),
        "right": ("right/kernel", "stem/relu"),
        "merge": ("merge/kernel", "right/concat"),
    },
    "pooling": {
        "first": ("first/kernel", "input"),
        "second": ("second/kernel", "first/relu"),
        "third": ("third/kernel", "second/pool"),
    },
    "cond": {"low": ("low/kernel", "input"), "high": ("high/kernel", "input")},
    "tied": {"head": ("head/kernel", "shared:1/relu")},
    "embedding": {
        "first": ("first/kernel", "embed"),
        "second": ("second/kernel", "first/relu"),
    },
}


def traced(name):
    _, params, inputs = zoo.model(name)
    return params, zoo.traced(name), inputs


def planned(name, **config):
    params, graph, _ = traced(name)
    return jm.plan(params, graph, jm.QuantConfig(**config))


def names(table, what):
    return [row["name"] for row in table.where(kind=what)]


def refused(config, *parts, case="conv_bn_relu", params=None):
    own, graph, _ = traced(case)
    with pytest.raises(ValueError, match=r"jaxmet\.plan: ") as error:
        jm.plan(own if params is None else params, graph, config)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("placement", ["operations", "products"])
def test_what_is_stored_gets_a_grid(name, placement):
    expected = (OPERATIONS if placement == "operations" else PRODUCTS)[name].split()
    table = planned(name, placement=placement)
    owners = [r["name"] for r in table.where(kind="activation") if r["note"] is None]
    assert sorted(owners) == sorted(expected)


@pytest.mark.parametrize("name", AXES)
def test_one_scale_an_output_channel(name):
    _, graph, _ = traced(name)
    weights = place(graph, jm.QuantConfig(), {}, "plan").weights
    assert {w.name: w.axis for w in weights} == AXES[name]
    whole = place(graph, jm.QuantConfig(per_channel=False), {}, "plan").weights
    stacked = {"stack/dense/kernel": (0,)}  # each layer keeps a scale of its own
    assert {w.name: w.axis for w in whole} == {n: stacked.get(n) for n in AXES[name]}


@pytest.mark.parametrize("name", BIASES)
def test_int32_biases_name_the_two_grids_of_their_scale(name):
    table = planned(name, bias="int32")
    expected = {
        f"{node}/bias": f"scales of {weight} and {source}"
        for node, (weight, source) in BIASES[name].items()
    }
    assert {r["name"]: r["note"] for r in table.where(kind="bias")} == expected
    assert names(planned(name), "bias") == []


@pytest.mark.parametrize(
    ("name", "bias", "why"),
    [
        ("scan", "stack/dense/bias", "no quantizer of known scale"),
        ("cond", "head/bias", "no quantizer of known scale"),
        ("tied", "shared/bias", "different quantizers"),
    ],
)
def test_a_bias_without_one_scale_stays_in_float_and_says_why(name, bias, why):
    (row,) = planned(name, bias="int32").where(name=bias)
    assert row["kind"] == "float" and why in row["note"]


def test_operands_of_a_concatenation_share_its_grid():
    table = planned("concatenation")
    shared = {r["name"]: r["note"] for r in table.where(kind="activation") if r["note"]}
    assert shared == {"left/relu": "as right/concat", "right/relu": "as right/concat"}


def test_concatenations_of_concatenations_share_one_grid():
    def dense_block(p, x):
        x = x @ p["stem"]["kernel"]
        a = jnp.concatenate([x, jnp.tanh(x @ p["one"]["kernel"])], -1)
        b = jnp.concatenate([a, jnp.tanh(a @ p["two"]["kernel"])], -1)
        return b @ p["head"]["kernel"]

    shapes = {"stem": (3, 4), "one": (4, 4), "two": (8, 4), "head": (12, 2)}
    params = {n: {"kernel": jnp.ones(s)} for n, s in shapes.items()}
    table = jm.plan(params, jm.trace(dense_block, params, jnp.ones((2, 3))))
    notes = {r["name"]: r["note"] for r in table.where(kind="activation")}
    last = "as two/concat"
    assert notes["one/concat"] == notes["two/tanh"] == notes["one/tanh"] == last
    assert notes["stem"] == last and notes["two/concat"] is None


def test_a_pool_that_chooses_keeps_the_grid_and_one_that_averages_does_not():
    table = planned("pooling")
    assert "first/pool" not in table["name"]
    assert "second/pool" in names(table, "activation")


def test_both_operands_of_a_matmul_are_on_a_grid():
    for placement in ("operations", "products"):
        table = planned("transformer", placement=placement)
        stored = names(table, "activation")
        assert {"attn/query", "attn/key", "attn/key/softmax", "attn/value"} <= {*stored}
        assert not [n for n in table["name"] if n.startswith("input of")]


@pytest.mark.parametrize("name", sorted({*OPERATIONS, *AXES}))
def test_nothing_is_left_out_in_silence(name):
    """Every parameter has a row of its own, or its norm or derived weight has one."""
    params, graph, _ = traced(name)
    stated = {*planned(name)["name"]}
    for parameter in graph.parameters:
        consumers = {n.name for n in graph.nodes if parameter in n.parameters}
        assert parameter in stated or consumers & stated, parameter


def test_what_stays_in_float_says_why():
    def sine(p, x):
        return (
            jnp.sort(jnp.sin(x @ p["a"]["kernel"]) ** 2, -1)[:, ::-1] @ p["b"]["kernel"]
        )

    def opaque(p, x):
        y = x @ p["a"]["kernel"]
        return jnp.cumsum(y, axis=1) @ p["b"]["kernel"]

    params = {"a": {"kernel": jnp.ones((3, 4))}, "b": {"kernel": jnp.ones((4, 2))}}
    for model, hidden in ((sine, False), (opaque, True)):
        table = jm.plan(params, jm.trace(model, params, jnp.ones((2, 3))))
        rows = table.where(name="input of b")
        assert bool(len(rows)) == hidden
    assert rows["kind"] == ["float"]
    assert "cumsum" in rows["note"][0]


def test_rules_and_selection():
    config = jm.QuantConfig(
        placement="products",
        rules=[
            jm.Rule("*/kernel", weight_bits=4),
            jm.Rule("head", weight_bits=16, per_channel=False),
            jm.Rule("stem/relu", activation_bits=12, symmetric_activations=True),
        ],
    )
    params, graph, _ = traced("conv_bn_relu")
    rows = {r["name"]: r for r in jm.plan(params, graph, config)}
    assert rows["stem/kernel"]["bits"] == 4 and rows["head/kernel"]["bits"] == 16
    assert rows["stem/kernel"]["one scale per"] == "channel"
    assert rows["head/kernel"]["one scale per"] == "tensor"
    assert (rows["stem/relu"]["bits"], rows["stem/relu"]["symmetric"]) == (12, "yes")
    assert (rows["input"]["bits"], rows["input"]["symmetric"]) == (8, "no")
    assert rows["head/kernel"]["shape"] == "3×3×8×6"

    off = jm.plan(
        params, graph, jm.QuantConfig(rules=[jm.Rule("stem", quantize=False)])
    )
    assert {"stem/kernel", "stem/relu"} <= {*names(off, "float")}
    assert "head/kernel" in names(off, "weight")
    (row,) = off.where(name="input of head")
    assert row["note"] == "stays in float: 'stem/relu' has no quantizer"

    part = jm.plan(params, graph.without("stem", "input"))
    notes = {r["name"]: r["note"] for r in part.where(kind="float")}
    assert notes["stem/kernel"] == notes["input"] == "not selected"
    assert names(part, "weight") == ["head/kernel"]


def test_rules_reach_a_parameter_through_its_node():
    """A rule for a node and a rule for its parameter both hold."""
    for glob in ("head", "head/kernel"):
        table = planned("conv_bn_relu", rules=[jm.Rule(glob, quantize=False)])
        assert "head/kernel" in names(table, "float")


def test_blocks():
    table = planned("gated", block=2)
    assert {*table.where(kind="weight")["one scale per"]} == {"block of 2"}
    (row,) = planned("standardized", block=3).where(name="conv")
    assert row["note"] is not None


@pytest.mark.parametrize("name", ["concatenation", "scan", "lstm"])
def test_the_plan_is_what_calibrate_does(name):
    """The plan lists the same names as the quantizers, with equal reasons."""
    params, graph, inputs = traced(name)
    config = jm.QuantConfig(bias="int32", weight_bits=5)
    table = jm.plan(params, graph, config)
    quantizers = jm.calibrate(params, graph, [inputs], config, progress=False)
    weights = names(table, "weight") + names(table, "bias")
    assert [*quantizers.weights] == weights
    stored = [*quantizers.activations, *dict(quantizers.shared)]
    assert stored == names(table, "activation")
    rows = {(r["name"], r["note"]) for r in table.where(kind="float")}
    assert {*quantizers.skipped} == rows
    printed = repr(quantizers)
    for row in table:
        assert row["name"] in printed
    for _, why in quantizers.skipped:
        assert why in printed


def test_the_plan_needs_no_numbers():
    """It runs on shapes, and before any data is seen."""
    params, graph, _ = traced("transformer")
    shapes = jax.eval_shape(lambda: params)
    assert repr(jm.plan(shapes, graph)) == repr(jm.plan(params, graph))


def test_refused():
    unknown = jm.QuantConfig(rules=[jm.Rule("bottleneck*", weight_bits=4)])
    refused(unknown, "bottleneck*", "no node and no parameter", "print(graph)")
    own, _, _ = traced("conv_bn_relu")
    other, _, _ = traced("residual")
    refused(None, "no parameter 'stem/kernel'", "trace again", params=other)
    kernel = own["params"]["stem"]["kernel"].at[0, 0, 0, 0].set(jnp.nan)
    nan = {**own, "params": {**own["params"], "stem": {"kernel": kernel}}}
    nan["params"]["stem"]["bias"] = own["params"]["stem"]["bias"]
    refused(None, "NaN", "stem/kernel", "from before", params=nan)
    with pytest.raises(ValueError, match=r"weight_bits is 1\b.*2 to 16, or 32"):
        jm.QuantConfig(weight_bits=1)
    with pytest.raises(ValueError, match="activation_bits is 17"):
        jm.Rule("head", activation_bits=17)


def test_presets_and_embeddings():
    """By the field's names: what is quantized, with how many bits, and one scale for what."""

    def found(**config):
        table = planned("tied_embedding", **config)
        return {
            r["name"]: (r["bits"], r["one scale per"])
            for r in table
            if r["kind"] == "weight"
        }

    params, graph, _ = traced("embedding")
    by_name = {
        name: jm.plan(params, graph, jm.QuantConfig.preset(name))
        for name in ("w8a8", "w4a8", "w8a16", "w4a16")
    }
    bits = {
        name: {r["name"]: r["bits"] for r in table.where(kind="weight")}
        for name, table in by_name.items()
    }
    assert bits["w8a8"] == bits["w8a16"] == dict.fromkeys(bits["w8a8"], 8)
    four = {"embed/embedding": 8, "first/kernel": 4, "second/kernel": 4}
    assert bits["w4a8"] == bits["w4a16"] == four
    (embed,) = by_name["w4a16"].where(name="embed/embedding")
    assert embed["one scale per"] == "channel" and embed["symmetric"] == "no"
    for name in ("w8a16", "w4a16"):
        assert not by_name[name].where(kind="activation")["name"]
    per = set(by_name["w8a8"].where(kind="activation")["one scale per"])
    assert per == {"token"}
    # A table that a product reads too is a weight of that product.
    assert found(embedding_bits=8, weight_bits=4)["embed/embedding"][0] == 4
    rules = [jm.Rule("embed", weight_bits=6)]
    config = jm.QuantConfig.preset("w4a16", rules=rules)
    ruled = jm.plan(params, graph, config).where(name="embed/embedding")
    assert ruled["bits"] == [6]
    with pytest.raises(ValueError, match="preset: the name is 'w4a32'.*'w4a16'"):
        jm.QuantConfig.preset("w4a32")
    with pytest.raises(ValueError, match="preset: 'bits' is no field"):
        jm.QuantConfig.preset("w8a8", bits=4)
