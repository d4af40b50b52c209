"""What to quantize and how, as one typed value with a default for everything."""

import dataclasses
import enum
from collections.abc import Iterable
from typing import Any

from jaxmet.numerics.calibrators import CALIBRATORS, is_percentile
from jaxmet.numerics.grid import check_bits
from jaxmet.tree.names import match

PLACEMENTS = ("operations", "products")
BIASES = ("float", "int32")
KINDS = ("weight", "activation", "bias")


class _Keep(enum.Enum):
    KEEP = "keep"

    def __repr__(self) -> str:
        return "KEEP"


KEEP = _Keep.KEEP


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a configuration and its rules say about one tensor."""

    quantize: bool
    bits: int
    symmetric: bool
    per_channel: bool
    block: int | None
    calibrator: str
    percentile: float


@dataclasses.dataclass(frozen=True)
class Rule:
    """An exception for the parameters and nodes that a glob means.

    Fields that are not given keep what the configuration, or an earlier rule, says.
    `quantize=False` leaves the tensor in float.
    """

    glob: str
    _: dataclasses.KW_ONLY
    quantize: bool | _Keep = KEEP
    weight_bits: int | _Keep = KEEP
    activation_bits: int | _Keep = KEEP
    per_channel: bool | _Keep = KEEP
    block: int | None | _Keep = KEEP
    symmetric_weights: bool | _Keep = KEEP
    symmetric_activations: bool | _Keep = KEEP
    weight_range: str | _Keep = KEEP
    activation_range: str | _Keep = KEEP
    percentile: float | int | _Keep = KEEP
    bias: str | _Keep = KEEP

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
        _check(self.overrides(), "Rule")

    def overrides(self) -> dict[str, Any]:
        """The fields that this rule changes."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {n: v for n, v in fields.items() if n != "glob" and v is not KEEP}

    def __repr__(self) -> str:
        said = (f"{name}={value!r}" for name, value in self.overrides().items())
        return f"Rule({', '.join([repr(self.glob), *said])})"


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """How a model is quantized; the default is W8A8 with one weight scale a channel.

    `weight_range` and `activation_range` say where a grid ends: 'minmax' at the smallest
    and largest value; 'percentile' where `percentile` percent of the values lie below and
    as many above the other end; 'mse' and 'sqnr' where the squared error is least, with
    clipping three times as dear in 'sqnr'; 'entropy' where the histogram changes least.
    `rules` are exceptions, applied in their order: the later one wins.
    """

    weight_bits: int = 8
    activation_bits: int = 8
    per_channel: bool = True
    block: int | None = None
    symmetric_weights: bool = True
    symmetric_activations: bool = False
    weight_range: str = "minmax"
    activation_range: str = "minmax"
    percentile: float | int = 99.99
    bias: str = "float"
    placement: str = "operations"
    rules: tuple[Rule, ...] | list[Rule] = ()

    def __post_init__(self) -> None:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        _check(fields, "QuantConfig")
        if not isinstance(self.rules, list | tuple):
            raise ValueError(
                f"jaxmet.QuantConfig: rules is {self.rules!r}. Give a list of them."
            )
        for rule in self.rules:
            if not isinstance(rule, Rule):
                raise ValueError(
                    f"jaxmet.QuantConfig: {rule!r} among the rules is no Rule. Write "
                    "jm.Rule('glob', field=value)."
                )
        object.__setattr__(self, "rules", tuple(self.rules))

    def resolve(self, name: str, kind: str) -> Settings:
        """What holds for the 'weight', 'activation' or 'bias' of this name."""
        if kind not in KINDS:
            raise ValueError(
                f"jaxmet.QuantConfig.resolve: the kind is {kind!r}. It is one of "
                f"{', '.join(KINDS)}."
            )
        say = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        say["quantize"] = True
        for rule in self.rules:
            if match(rule.glob, name):
                say |= rule.overrides()
        quantize = say["quantize"]
        if kind == "bias":
            quantize = quantize and say["bias"] == "int32"
            return Settings(
                quantize, 32, True, say["per_channel"], None, "minmax", 100.0
            )
        is_weight = kind == "weight"
        return Settings(
            quantize=quantize,
            bits=say[f"{kind}_bits"],
            symmetric=say[
                "symmetric_weights" if is_weight else "symmetric_activations"
            ],
            per_channel=is_weight and say["per_channel"],
            block=say["block"] if is_weight else None,
            calibrator=say[f"{kind}_range"],
            percentile=float(say["percentile"]),
        )

    def unused(self, names: Iterable[str]) -> list[Rule]:
        """The rules that mean none of these names."""
        names = list(names)
        return [r for r in self.rules if not any(match(r.glob, n) for n in names)]


_CHOICES = {
    "weight_range": CALIBRATORS,
    "activation_range": CALIBRATORS,
    "bias": BIASES,
    "placement": PLACEMENTS,
}
_FLAGS = ("quantize", "per_channel", "symmetric_weights", "symmetric_activations")


def _check(fields: dict[str, Any], caller: str) -> None:
    for name, value in fields.items():
        if name in ("weight_bits", "activation_bits"):
            check_bits(value, caller=caller, name=name)
        elif name in _FLAGS and not isinstance(value, bool):
            raise ValueError(
                f"jaxmet.{caller}: {name} is {value!r}. Use True or False."
            )
        elif name in _CHOICES and value not in _CHOICES[name]:
            raise ValueError(
                f"jaxmet.{caller}: {name} is {value!r}. It is one of "
                f"{', '.join(map(repr, _CHOICES[name]))}."
            )
        elif name == "percentile" and not is_percentile(value):
            raise ValueError(
                f"jaxmet.{caller}: percentile is {value!r}. Give a number above 50, up to "
                "100 for smallest to largest."
            )
        elif name == "block" and not (value is None or _is_block(value)):
            raise ValueError(
                f"jaxmet.{caller}: block is {value!r}. Give the number of neighbours "
                "that share a scale, at least 2, or None for no blocks."
            )


def _is_block(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 1
