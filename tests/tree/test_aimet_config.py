"""AIMET's quantsim configuration: what is read, what cannot be expressed, what is malformed."""

import copy
import json

import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import pytest
from hypothesis import strategies as st

import jaxmet as jm
from jaxmet.tree.aimet_config import LARGEST

CONFIG = {
    "defaults": {
        "ops": {"is_output_quantized": "True", "is_symmetric": "False"},
        "params": {"is_quantized": "True", "is_symmetric": "True"},
        "strict_symmetric": "False",
        "unsigned_symmetric": "False",
        "per_channel_quantization": "True",
    },
    "params": {"bias": {"is_quantized": "False"}},
    "op_type": {
        "Squeeze": {"is_output_quantized": "False"},
        "Mean": {"is_output_quantized": "False"},
        "ReduceMean": {"is_output_quantized": "False"},
        "GlobalAveragePool": {"is_output_quantized": "False"},
        "Relu": {"encoding_constraints": {"min": 0.0}},
        "Softmax": {"encoding_constraints": {"min": 0.0, "max": 1.0}},
        "Tanh": {"encoding_constraints": {"min": -1.0, "max": 1.0}},
    },
    "supergroups": [
        {"op_list": ["Conv", "Relu"]},
        {"op_list": ["Conv", "BatchNormalization", "PRelu"]},
        {"op_list": ["Add", "Relu"]},
    ],
    "model_input": {"is_input_quantized": "True"},
    "model_output": {},
}


def changed(path, value):
    """The configuration with one entry set."""
    config = copy.deepcopy(CONFIG)
    *sections, last = path.split("/")
    inside = config
    for section in sections:
        inside = inside.setdefault(section, {})
    inside[last] = value
    return config


def test_a_file_and_its_content_say_the_same(tmp_path):
    path = tmp_path / "quantsim.json"
    path.write_text(json.dumps(CONFIG), encoding="utf-8")
    config = jm.QuantConfig.from_aimet(path)
    assert config == jm.QuantConfig.from_aimet(str(path))
    assert config == jm.QuantConfig.from_aimet(CONFIG)
    assert (config.bias, config.per_channel) == ("float", True)
    assert config.symmetric_weights and not config.symmetric_activations
    assert not config.unsigned_symmetric
    target = config.target
    assert target is not None and target.name == "aimet"
    assert {("conv", "relu"), ("add", "relu"), ("norm", "prelu")} <= target.fuses
    assert ("add", "clip") not in target.fuses
    assert target.range_of("softmax") == (0, 1) and target.range_of("tanh") == (-1, 1)
    assert "mean" in target.no_output and "conv" not in target.no_output
    four = jm.QuantConfig.from_aimet(CONFIG, weight_bits=4, bias="int32")
    assert (four.weight_bits, four.bias) == (4, "int32")


class Net(nn.Module):
    """A convolution with ReLU, one with a leaky ReLU, a mean and a softmax."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="first")(x))
        x = nn.leaky_relu(nn.Conv(4, (3, 3), name="second")(x))
        return nn.softmax(nn.Dense(3, name="head")(x.mean((1, 2))))


def placed(config):
    x = jnp.ones((1, 6, 6, 3))
    params = jax.jit(Net().init)(jax.random.key(0), x)
    graph = jm.trace(Net().apply, params, x)
    table = jm.plan(params, graph, config)
    kinds = zip(table["name"], table["kind"], strict=True)
    return {name for name, kind in kinds if kind == "activation"}


def test_output_quantizers_are_where_the_file_puts_them():
    found = placed(jm.QuantConfig.from_aimet(CONFIG))
    assert {"input", "first/relu", "second", "head"} <= found
    assert "first" not in found and not [n for n in found if n.endswith("/pool")]
    config = changed("model_input/is_input_quantized", "False")
    assert "input" not in placed(jm.QuantConfig.from_aimet(config))
    config = changed("defaults/ops/is_output_quantized", "False")
    config["op_type"]["Softmax"]["is_output_quantized"] = "True"
    found = placed(jm.QuantConfig.from_aimet(config))
    assert {n.rpartition("/")[2] for n in found} == {"input", "softmax"}


def test_weights_and_biases():
    config = changed("params/weight", {"is_quantized": "False"})
    found = jm.QuantConfig.from_aimet(config)
    assert not found.resolve("first/kernel", "weight").quantize
    config = changed("params/bias", {"is_quantized": "True"})
    assert jm.QuantConfig.from_aimet(config).bias == "int32"
    config = changed("params/weight", {"is_symmetric": "False"})
    assert not jm.QuantConfig.from_aimet(config).symmetric_weights


@pytest.mark.parametrize(
    ("path", "value", "entry"),
    [
        ("supergroup_pass_list", ["MatmulAdd"], "supergroup_pass_list"),
        ("defaults/hw_version", "V81", "defaults.hw_version"),
        ("defaults/supported_kernels", [], "defaults.supported_kernels"),
        (
            "op_type/Conv",
            {"is_input_quantized": "True"},
            "op_type.Conv.is_input_quantized",
        ),
        ("op_type/Conv", {"is_symmetric": "True"}, "op_type.Conv.is_symmetric"),
        ("op_type/Conv", {"params": {}}, "op_type.Conv.params"),
        ("op_type/Einsum", {"is_output_quantized": "True"}, "op_type.Einsum"),
        (
            "op_type/Gemm",
            {"per_channel_quantization": "False"},
            "op_type.Gemm.per_channel_quantization",
        ),
        (
            "op_type/Clip",
            {"encoding_constraints": {"max": 1.0}},
            "op_type.Clip.encoding_constraints",
        ),
        ("params/gamma", {"is_quantized": "True"}, "params.gamma"),
        (
            "model_output",
            {"is_output_quantized": "False"},
            "model_output.is_output_quantized",
        ),
        ("supergroups", [{"op_list": ["Conv", "Einsum"]}], r"supergroups\[0\]"),
    ],
)
def test_what_cannot_be_expressed_raises_unless_ignored(path, value, entry):
    config = changed(path, value)
    with pytest.raises(ValueError, match=f"from_aimet: '{entry}' cannot be expressed"):
        jm.QuantConfig.from_aimet(config)
    ignored = entry.replace("\\", "")
    assert jm.QuantConfig.from_aimet(config, ignore=[ignored]).target is not None


def test_strict_symmetric_activations_cannot_be_expressed():
    config = changed("defaults/strict_symmetric", "True")
    jm.QuantConfig.from_aimet(config)  # weights are strict here already
    config["defaults"]["ops"]["is_symmetric"] = "True"
    with pytest.raises(ValueError, match="strict_symmetric"):
        jm.QuantConfig.from_aimet(config)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("defaults", [], "defaults is"),
        ("defaults/strict_symmetric", "yes", "'yes'. It is 'True' or 'False'"),
        ("defaults/strict_symmetric", None, "is None"),
        ("op_type/Relu", 3, "op_type.Relu is 3"),
        ("op_type/Softmax", {"encoding_constraints": {"min": "0"}}, "It is a number"),
        ("op_type/Softmax", {"encoding_constraints": {"min": 1, "max": 2}}, "has zero"),
        (
            "op_type/Softmax",
            {"encoding_constraints": {"min": 0, "max": float("nan")}},
            "It is a number",
        ),
        ("supergroups", {}, "supergroups is"),
        ("supergroups", [{"op_list": ["Conv"]}], "two names or more"),
        ("supergroups", [{"op_list": [1, 2]}], "two names or more"),
        ("supergroups", [{}], "is None. It is a list"),
    ],
)
def test_wrong_types_are_refused(path, value, message):
    with pytest.raises(ValueError, match="from_aimet") as error:
        jm.QuantConfig.from_aimet(changed(path, value))
    assert message in str(error.value)


@pytest.mark.parametrize("section", list(CONFIG))
def test_all_sections_are_required(section):
    config = {k: v for k, v in CONFIG.items() if k != section}
    with pytest.raises(ValueError, match=f"has no '{section}'"):
        jm.QuantConfig.from_aimet(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "no JSON file"),
        (b"{", "no JSON file"),
        (b"\xff\xfe\x00", "no JSON file"),
        (b"[" * 100_000, "no JSON file"),
        (b"[]", "the configuration is"),
        (b'{"defaults": {}, "defaults": {}}', "says 'defaults' twice"),
        (b" " * (LARGEST + 1), "more than"),
        (b"9" * 10_000, "the configuration is inf"),
    ],
)
def test_malformed_files_are_refused(tmp_path, text, message):
    path = tmp_path / "quantsim.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=f"from_aimet: .*{message}"):
        jm.QuantConfig.from_aimet(path)


def test_other_arguments_are_refused():
    with pytest.raises(ValueError, match="the path of a JSON file"):
        jm.QuantConfig.from_aimet(3)
    with pytest.raises(ValueError, match="ignore is 'params'"):
        jm.QuantConfig.from_aimet(CONFIG, ignore="params")
    with pytest.raises(ValueError, match="ignore is 3"):
        jm.QuantConfig.from_aimet(CONFIG, ignore=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'bits' is no field"):
        jm.QuantConfig.from_aimet(CONFIG, bits=4)
    with pytest.raises(FileNotFoundError):
        jm.QuantConfig.from_aimet("nowhere.json")


ATOMS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["True", "False", "Conv", "min"])
    | st.text(max_size=5)
)
KEYS = st.sampled_from(
    "ops params op_list min max encoding_constraints is_symmetric is_quantized weight bias "
    "is_output_quantized per_channel_quantization Conv Relu Softmax".split()
)
VALUES = st.recursive(
    ATOMS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(KEYS | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=10,
)


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(section=st.sampled_from(list(CONFIG)), value=VALUES)
def test_any_content_is_read_or_refused(section, value):
    try:
        config = jm.QuantConfig.from_aimet(CONFIG | {section: value})
    except ValueError as error:
        assert "jaxmet.QuantConfig.from_aimet" in str(error)
    else:
        assert config.target is not None and hash(config)


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(text=st.binary(max_size=60))
def test_any_file_is_read_or_refused(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match="jaxmet.QuantConfig.from_aimet"):
        jm.QuantConfig.from_aimet(path)
