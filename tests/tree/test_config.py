"""Configurations: defaults, what rules change, what is refused."""

import dataclasses

import pytest

from jaxmet import QuantConfig, Rule


def test_defaults_are_w8a8():
    config = QuantConfig()
    weight, activation = (
        config.resolve("a/kernel", "weight"),
        config.resolve("a", "activation"),
    )
    assert (weight.bits, weight.symmetric, weight.per_channel) == (8, True, True)
    assert (activation.bits, activation.symmetric) == (8, False)
    assert not activation.per_channel and activation.block is None
    assert weight.calibrator == activation.calibrator == "minmax"
    assert weight.quantize and activation.quantize
    assert not config.resolve("a/bias", "bias").quantize
    assert QuantConfig(bias="int32").resolve("a/bias", "bias").bits == 32
    assert hash(config) == hash(QuantConfig())


def test_rules_apply_in_order_and_only_where_they_match():
    config = QuantConfig(
        block=32,
        rules=[
            Rule("*", weight_bits=4, activation_range="mse"),
            Rule("head", weight_bits=16, block=None, symmetric_activations=True),
            Rule("head/bias", quantize=False),
        ],
    )
    assert config.resolve("stem/kernel", "weight").bits == 4
    assert config.resolve("stem/kernel", "weight").block == 32
    head = config.resolve("head/kernel", "weight")
    assert (head.bits, head.block, head.symmetric) == (16, None, True)
    activation = config.resolve("head/relu", "activation")
    assert (activation.bits, activation.calibrator) == (8, "mse")
    assert activation.symmetric
    assert not config.resolve("head/bias", "weight").quantize
    assert config.resolve("head/kernel", "weight").quantize


def test_unused_rules_are_listed():
    rules = (Rule("stem", weight_bits=4), Rule("nothing/*", quantize=False))
    config = QuantConfig(rules=rules)
    assert config.unused(iter(["stem/kernel", "head"])) == [rules[1]]
    assert config.unused(["stem", "nothing/at/all"]) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight_bits": 1}, "weight_bits is 1.*2 to 16, or 32"),
        ({"activation_bits": 24}, "activation_bits is 24"),
        ({"placement": "everywhere"}, "placement is 'everywhere'.*'operations'"),
        ({"bias": "int8"}, "bias is 'int8'.*'float' or 'int32'"),
        ({"weight_range": "max"}, "weight_range is 'max'.*'percentile'"),
        ({"activation_range": ""}, "activation_range is ''"),
        ({"block": 1}, "block is 1.*at least 2"),
        ({"block": 0}, "block is 0"),
    ],
)
def test_bad_values_are_refused_at_once(fields, message):
    with pytest.raises(ValueError, match=rf"jaxmet\.QuantConfig: {message}"):
        QuantConfig(**fields)
    if "placement" not in fields:
        with pytest.raises(ValueError, match=rf"jaxmet\.Rule: {message}"):
            Rule("stem", **fields)


def test_rules_say_something():
    with pytest.raises(ValueError, match="'stem' changes nothing"):
        Rule("stem")
    with pytest.raises(ValueError, match="the glob is ''"):
        Rule("", quantize=False)
    assert repr(Rule("a", block=None)) == "Rule('a', block=None)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantConfig().bias = "int32"
    with pytest.raises(ValueError, match="the kind is 'layer'"):
        QuantConfig().resolve("a", "layer")
