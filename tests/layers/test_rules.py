"""Rules: each reaches a tensor of its kind, whichever name it uses, or raises with the cure."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jaxmet as jm
import zoo
from jaxmet import Rule


def traced(name):
    _, params, inputs = zoo.model(name)
    return params, zoo.traced(name), inputs


def planned(name, *rules, **config):
    params, graph, _ = traced(name)
    return jm.plan(params, graph, jm.QuantConfig(rules=list(rules), **config))


def rows(table):
    """What is done to each thing, whatever rule did it."""
    kept = ("name", "kind", "bits", "symmetric", "one scale per", "note")
    return {tuple(row[k] for k in kept) for row in table}


FIELDS = {
    "weight_bits": 5,
    "symmetric_weights": False,
    "per_channel": False,
    "quantize_weights": False,
    "activation_bits": 5,
    "symmetric_activations": True,
    "bias": "int32",
    "block": 2,
    "quantize": True,
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    "model", ["residual", "concatenation", "tied", "pooling", "transformer", "scan"]
)
@pytest.mark.parametrize("placement", ["operations", "products"])
def test_every_rule_changes_something_or_raises(model, placement):
    """Of every name and field; what the error tells to write is accepted and does something."""
    _, graph, _ = traced(model)
    plain = rows(planned(model, placement=placement))
    names = [n.name for n in graph.nodes] + [*graph.parameters]
    raised = 0
    for name in dict.fromkeys(names):
        for field, value in FIELDS.items():
            given: dict[str, Any] = {field: value}
            rule = Rule(name, **given)
            try:
                table = planned(model, rule, placement=placement)
            except ValueError as error:
                raised += 1
                cure = re.search(r"Write (jm\.Rule\(.*?\))[,.]", str(error))
                assert name in str(error) or model == "tied", error
                if cure is None:
                    assert "Drop" in str(error) or "number" in str(error), error
                    continue
                rule = eval(cure[1])
                try:
                    table = planned(model, rule, placement=placement)
                except ValueError as refused:  # what it names cannot be done either
                    assert "is no integer, since" in str(refused)
                    continue
            if field == "quantize":  # it is on already
                continue
            assert rows(table) != plain, (name, field, rule)
    assert raised > 10


def test_calls_of_a_shared_weight_must_agree():
    every = {"shared:0": 4, "shared:1": 4}
    table = planned("tied", *(Rule(n, weight_bits=b) for n, b in every.items()))
    assert table.where(name="shared/kernel")["bits"] == [4]
    assert table.where(name="shared/kernel")["rules"] == ["shared:0, shared:1"]
    for rules in (
        [Rule("shared:1", weight_bits=4)],
        [Rule("shared:0", weight_bits=4), Rule("shared:1", weight_bits=6)],
        [Rule("shared", weight_bits=6), Rule("shared:1", weight_bits=4)],
        [Rule("shared:1", quantize=False)],
        [Rule("*:1", per_channel=False)],
    ):
        with pytest.raises(
            ValueError, match=r"'shared:0' and 'shared:1' are calls"
        ) as e:
            planned("tied", *rules)
        assert "jm.Rule('shared/kernel', " in str(e.value)
    # the later one wins, and repeating what holds is no disagreement
    for rules in (
        [Rule("shared:1", weight_bits=4), Rule("shared", weight_bits=6)],
        [Rule("*", weight_bits=6), Rule("shared:1", weight_bits=6)],
        [Rule("shared", weight_bits=6), Rule("shared:0", quantize_activations=False)],
    ):
        assert planned("tied", *rules).where(name="shared/kernel")["bits"] == [6]
    off = planned("tied", Rule("shared:0", quantize_activations=False))
    assert off.where(name="shared:0/relu")["kind"] == ["float"]
    assert off.where(name="shared:1/relu")["kind"] == ["activation"]


@pytest.mark.parametrize(
    ("model", "rule", "what"),
    [
        ("residual", Rule("bn1", activation_bits=16), "'bn1' is a norm.*'conv1/relu'"),
        ("residual", Rule("bn1", weight_bits=4), "is a norm.*'conv1/kernel'"),
        ("residual", Rule("conv1/kernel", activation_bits=4), "weight.*'conv1/relu'"),
        ("pooling", Rule("second/bias", weight_bits=4), "the bias of.*second/kernel"),
        ("pooling", Rule("second/kernel", bias="int32"), "a weight of.*'second/bias'"),
        ("pooling", Rule("*/relu", weight_bits=4), "is an activation"),
        ("concatenation", Rule("left/relu", activation_bits=4), "shares.*right/concat"),
        ("concatenation", Rule("left", percentile=99), "weight_range='percentile'"),
        ("conv_bn_relu", Rule("input", quantize_weights=False), "is an input"),
    ],
)
def test_a_rule_that_reaches_nothing_raises_everywhere(model, rule, what):
    params, graph, inputs = traced(model)
    config = jm.QuantConfig(rules=[rule])
    x = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in inputs]
    calls = {
        "plan": lambda: jm.plan(params, graph, config),
        "calibrate": lambda: jm.calibrate(params, graph, [inputs], config),
        "dynamic": lambda: jax.eval_shape(
            jm.simulate(graph.apply, jm.dynamic(config=config)), params, *x
        ),
        "equalize": lambda: jm.equalize(params, graph, config=config),
        "calibrate ": lambda: jm.ptq(
            graph.apply, params, [inputs], config, progress=False
        ),
    }
    if rule.overrides().get("bias"):
        del calls["dynamic"]  # has no int32 biases at all
    for caller, call in calls.items():
        stated = rf"jaxmet\.{caller.strip()}: .*reaches nothing: .*{what}"
        with pytest.raises(ValueError, match=stated):
            call()


def test_what_a_rule_may_do():
    """Overridden, repeating the default, off where it is off: no error."""
    for rules in (
        [Rule("stem", weight_bits=4), Rule("*", weight_bits=8)],
        [Rule("stem", weight_bits=8)],
        [Rule("stem", quantize=False), Rule("stem/kernel", quantize=False)],
        [Rule("stem_bn", quantize=False)],
        [Rule("stem/bias", quantize=False)],
        [Rule("*", activation_bits=4)],  # only some of them have a quantizer
        [Rule("head", weight_bits=32), Rule("head", quantize_weights=False)],
        [Rule("stem", weight_range="percentile", percentile=99)],
        [Rule("stem", percentile=99), Rule("*", weight_range="percentile")],
    ):
        planned("conv_bn_relu", *rules)
    part = traced("conv_bn_relu")[1].without("stem")
    config = jm.QuantConfig(rules=[Rule("stem", weight_bits=4)])
    jm.plan(traced("conv_bn_relu")[0], part, config)


def test_weights_and_activations_are_switched_apart():
    def kinds(*rules, **config):
        table = planned("conv_bn_relu", *rules, **config)
        return {row["name"]: row["kind"] for row in table}

    both = ("stem/kernel", "stem/relu", "stem/bias")
    for rule, expected in (
        (Rule("stem", quantize=False), ("float", "float", "float")),
        # a bias has no scale of its own
        (Rule("stem", quantize_weights=False), ("float", "activation", "float")),
        (Rule("stem", quantize_activations=False), ("weight", "float", "bias")),
        (Rule("stem/kernel", quantize=False), ("float", "activation", "float")),
        (Rule("stem/relu", quantize=False), ("weight", "float", "bias")),
        (Rule("stem/bias", quantize=False), ("weight", "activation", "float")),
    ):
        found = kinds(rule, bias="int32")
        assert tuple(found[n] for n in both) == expected, rule
    alone = kinds(Rule("*", quantize_activations=False))
    assert {*alone.values()} == {"weight", "float"}
    again = kinds(Rule("*", quantize=False), Rule("head", quantize_weights=True))
    assert [n for n, what in again.items() if what != "float"] == ["head/kernel"]
    with pytest.raises(ValueError, match=r"quantize, which sets.*quantize_weights too"):
        Rule("stem", quantize=False, quantize_weights=True)
    bad: Any = 1
    with pytest.raises(ValueError, match="quantize_activations is 1"):
        Rule("stem", quantize_activations=bad)


def test_dynamic_has_no_int32_biases():
    """Their scale is that of the input, which is not known before the call."""
    with pytest.raises(ValueError, match=r"jaxmet\.dynamic: .*bias='int32'.*calibrate"):
        jm.dynamic(config=jm.QuantConfig(bias="int32"))
    with pytest.raises(ValueError, match=r"jaxmet\.dynamic: .*bias='int32'.*calibrate"):
        jm.dynamic(config=jm.QuantConfig(rules=[Rule("stem", bias="int32")]))


def test_the_plan_says_what_a_name_covers():
    rules = [Rule("stem", quantize=False), Rule("head", weight_bits=4)]
    table = planned("conv_bn_relu", *rules)
    notes = {row["name"]: row["note"] for row in table.where(kind="float")}
    why = "a rule says so: Rule('stem', quantize=False)"
    assert notes["stem/kernel"] == notes["stem/relu"] == why
    found = {row["name"]: row["rules"] for row in table}
    assert found["head/kernel"] == "head" and found["input"] is None
    assert "rules" not in planned("conv_bn_relu").columns


def test_a_node_and_a_parameter_are_names_of_one_weight():
    """A glob that means the node alone reaches its weight and its bias."""
    params = {"conv1": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}}
    model = lambda p, x: x @ p["conv1"]["kernel"] + p["conv1"]["bias"][None]
    graph = jm.trace(model, params, jnp.ones((2, 3)))
    for glob in ("conv?", "conv1", "*1", "conv1/*"):
        rule = Rule(glob, weight_bits=4, bias="int32")
        table = jm.plan(params, graph, jm.QuantConfig(rules=[rule]))
        assert table.where(name="conv1/kernel")["bits"] == [4], glob
        assert table.where(name="conv1/bias")["kind"] == ["bias"], glob


@pytest.mark.parametrize(
    ("rules", "found"),
    [
        (
            [Rule("first", quantize=False), Rule("first", weight_bits=5)],
            r"weight_bits=5 .* reaches nothing: 'first/kernel' is in float: a rule says so",
        ),
        (
            [Rule("first", quantize_weights=False, bias="int32")],
            r"bias='int32' .* reaches nothing: .* its weight stays in float",
        ),
        (
            [Rule("input", quantize=False), Rule("first", bias="int32")],
            r"bias='int32' .* reaches nothing: .* has no quantizer",
        ),
    ],
)
def test_a_rule_that_another_takes_its_tensor_from_is_refused(rules, found):
    with pytest.raises(ValueError, match=found):
        planned("pooling", *rules)
    planned("pooling", Rule("*", weight_bits=5), *rules[:-1])
