"""A rule: fields of a configuration for the parameters and nodes that a glob names."""

import dataclasses
import enum
from typing import Any, Literal, TypeAlias

from jaxmet.numerics.calibrators import RangeMethod, calibrator_name
from jaxmet.tree.config_fields import DynamicRange, check_fields
from jaxmet.tree.targets.target import BiasFormat


class _Keep(enum.Enum):
    KEEP = "keep"

    def __repr__(self) -> str:
        return "KEEP"


KEEP = _Keep.KEEP
Kept: TypeAlias = Literal[_Keep.KEEP]


@dataclasses.dataclass(frozen=True)
class Rule:
    """An override for the parameters and nodes that a glob names.

    A name without a wildcard means that node and everything below it: 'conv1' means the
    weight 'conv1/kernel', the bias 'conv1/bias' and the output of the activation function
    'conv1/relu', so `Rule('conv1', quantize=False)` takes the quantizers off weight and
    activation alike (`jm.plan` lists the rules of each tensor). `quantize_weights` and
    `quantize_activations` switch one kind, `quantize` sets both, and biases.

    Fields that are not given keep what the configuration, or an earlier rule, says. Each
    field must reach a tensor of its kind: `weight_bits` a weight, `activation_bits` an
    activation that has a quantizer. The calls of a shared weight ('w:0', 'w:1') have one
    quantizer, so rules must say the same of all of them: name the weight ('w').

    Args:
        glob: names of parameters or nodes, with or without wildcards.
        quantize: whether weights, activations and biases are quantized; sets the next two as
            well.
        quantize_weights: whether weights are quantized.
        quantize_activations: whether activations are quantized.
        weight_bits: as in `QuantConfig`.
        activation_bits: as in `QuantConfig`.
        per_channel: as in `QuantConfig`.
        block: as in `QuantConfig`.
        symmetric_weights: as in `QuantConfig`.
        symmetric_activations: as in `QuantConfig`.
        weight_range: as in `QuantConfig`.
        activation_range: as in `QuantConfig`.
        percentile: as in `QuantConfig`.
        bias: as in `QuantConfig`.
        residual_bits: as in `QuantConfig`.
        dynamic: as in `QuantConfig`.

    Raises:
        ValueError: for a rule that changes nothing, and for impossible values.

    >>> jm.Rule("head", weight_bits=16)
    >>> jm.Rule("*", quantize_activations=False)  # weights alone
    """

    glob: str
    _: dataclasses.KW_ONLY
    quantize: bool | Kept = KEEP
    quantize_weights: bool | Kept = KEEP
    quantize_activations: bool | Kept = KEEP
    weight_bits: int | Kept = KEEP
    activation_bits: int | Kept = KEEP
    per_channel: bool | Kept = KEEP
    block: int | None | Kept = KEEP
    symmetric_weights: bool | Kept = KEEP
    symmetric_activations: bool | Kept = KEEP
    weight_range: RangeMethod | Kept = KEEP
    activation_range: RangeMethod | Kept = KEEP
    percentile: float | int | Kept = KEEP
    bias: BiasFormat | Kept = KEEP
    residual_bits: int | None | Kept = KEEP
    dynamic: DynamicRange | Kept = KEEP

    def __post_init__(self) -> None:
        if not self.glob or not isinstance(self.glob, str):
            raise ValueError(
                f"jaxmet.Rule: the glob is {self.glob!r}. Give the name of a parameter "
                "or node, or a pattern such as '*/kernel'."
            )
        if not self.overrides():
            raise ValueError(
                f"jaxmet.Rule: the rule for {self.glob!r} changes nothing. Give a "
                "field, for example weight_bits=16 or quantize=False."
            )
        check_fields(self.overrides(), "Rule")
        both = {"quantize_weights", "quantize_activations"} & self.overrides().keys()
        if both and self.quantize is not KEEP:
            raise ValueError(
                f"jaxmet.Rule: the rule for {self.glob!r} gives quantize, which sets "
                f"weights and activations, and {sorted(both)[0]} too. Give one of them."
            )

    def overrides(self) -> dict[str, Any]:
        """The fields that this rule changes."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {n: v for n, v in fields.items() if n != "glob" and v is not KEEP}

    def says(self) -> dict[str, Any]:
        """What the rule changes, with `quantize` spelt out for weights and activations."""
        fields = self.overrides()
        if "quantize" in fields:
            both = ("quantize_weights", "quantize_activations")
            fields |= dict.fromkeys(both, fields["quantize"])
        return fields

    def __repr__(self) -> str:
        said = (
            f"{name}={calibrator_name(value) if callable(value) else repr(value)}"
            for name, value in self.overrides().items()
        )
        return f"Rule({', '.join([repr(self.glob), *said])})"
