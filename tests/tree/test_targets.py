"""Targets: what each says, and configurations made from them."""

import dataclasses
from pathlib import Path

import pytest

import jaxmet as jm
from jaxmet.tree.targets import TARGETS
from jaxmet.tree.targets.target import UNSTATED


def test_there_are_six_and_each_has_a_source():
    assert set(TARGETS) == {
        "onnxruntime",
        "openvino",
        "litert",
        "xla",
        "htp",
        "tensorrt",
    }
    for name, target in TARGETS.items():
        assert getattr(jm.targets, name) is target and target.name == name
        assert target.source.startswith("https://")
        assert {hash(target), hash(jm.QuantConfig.for_target(name))}
        with pytest.raises(dataclasses.FrozenInstanceError):
            target.bias = "float"  # type: ignore[misc]


@pytest.mark.parametrize("name", list(TARGETS))
def test_a_configuration_has_the_fields_of_its_target(name):
    config = jm.QuantConfig.for_target(name)
    target = TARGETS[name]
    assert config == jm.QuantConfig.for_target(target)
    assert config.target is target and config.device is target
    assert config.bias == target.bias
    assert config.symmetric_activations == target.symmetric_activations
    other = jm.QuantConfig.for_target(
        name, bias="float", weight_bits=4, per_channel=False
    )
    assert (other.bias, other.weight_bits, other.per_channel) == ("float", 4, False)
    assert other.target is target


def test_a_target_of_your_own_is_a_value():
    mine = dataclasses.replace(jm.targets.litert, name="mine", activation_bits=16)
    assert jm.QuantConfig.for_target(mine).activation_bits == 16


def test_without_a_target_nothing_changes():
    assert jm.QuantConfig().target is None
    assert jm.QuantConfig().device is UNSTATED
    assert jm.QuantConfig().bias == "float"


@pytest.mark.parametrize(
    ("given", "fields", "message"),
    [
        ("litret", {}, "the target is 'litret'. The nearest names are 'litert'"),
        (3, {}, "the target is 3. Use 'onnxruntime'"),
        (None, {}, "the target is None"),
        ("litert", {"bits": 4}, "'bits' is no field"),
        ("litert", {"target": None}, "'target'"),
    ],
)
def test_what_is_unknown_is_refused(given, fields, message):
    with pytest.raises((ValueError, TypeError)) as error:
        jm.QuantConfig.for_target(given, **fields)
    if "target" not in fields:
        assert message in str(error.value)


def test_the_field_takes_targets_only():
    with pytest.raises(ValueError, match="target is 'litert'.*for_target"):
        jm.QuantConfig(target="litert")  # type: ignore[arg-type]


def test_the_table_of_the_docs_says_what_the_targets_say():
    page = Path(__file__).parents[2] / "docs" / "deploy.md"
    text = page.read_text(encoding="utf-8").split("\n## Targets\n")[1]
    table = [line for line in text.splitlines() if line.startswith("| `")]
    assert table == [row(target) for target in TARGETS.values()]


def row(target):
    asymmetric = "uint8, zero point"
    cells = [
        f"`{target.name}`",
        "int8, symmetric" if target.symmetric_activations else asymmetric,
        "int8, per channel" if target.per_channel else "int8",
        target.bias,
        ", ".join(sorted(target.shares)) or "none",
        ", ".join(sorted(name for name, _, _ in target.fixed)) or "none",
    ]
    assert target.symmetric_weights and target.weight_bits == 8
    assert target.activation_bits == 8
    assert not (target.symmetric_activations and target.unsigned_symmetric)
    return f"| {' | '.join(cells)} |"
