"""What fields of a configuration mean: of which tensor, which values, and what they come to."""

import dataclasses
from typing import Any, Literal, TypeAlias, get_args

from jaxmet.numerics.calibrators import RangeMethod, check_calibrator, is_percentile
from jaxmet.numerics.grid import check_bits
from jaxmet.tree.checks import check_choices, check_flags, shown
from jaxmet.tree.targets import Target
from jaxmet.tree.targets.target import BiasFormat, Placing

Kind: TypeAlias = Literal["weight", "activation", "bias"]
DynamicRange: TypeAlias = Literal["tensor", "token"] | int | None


FIELDS: dict[str, frozenset[str]] = {
    "weight": frozenset(
        {
            "quantize_weights",
            "weight_bits",
            "per_channel",
            "block",
            "symmetric_weights",
            "weight_range",
            "percentile",
        }
    ),
    "activation": frozenset(
        {
            "quantize_activations",
            "activation_bits",
            "symmetric_activations",
            "activation_range",
            "percentile",
            "residual_bits",
            "dynamic",
        }
    ),
    "bias": frozenset({"quantize", "bias"}),
}
"""The fields that say something about a tensor of each kind; `quantize` says it of all."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a configuration and its rules say about one tensor.

    `residual_bits` are the bits of an activation if it is a residual stream, `dynamic` says
    what has a range of its own if that is found at every call.
    """

    quantize: bool
    bits: int
    symmetric: bool
    per_channel: bool
    block: int | None
    calibrator: RangeMethod
    percentile: float
    unsigned_symmetric: bool = True
    residual_bits: int = 32
    dynamic: DynamicRange = None

    @property
    def at_products(self) -> bool:
        """Whether a product finds the range of what it reads, for its own rows or blocks."""
        return self.dynamic not in (None, "tensor")


_CHOICES = {
    "bias": get_args(BiasFormat),
    "placement": get_args(Placing),
}
_FLAGS = (
    "quantize",
    "quantize_weights",
    "quantize_activations",
    "per_channel",
    "symmetric_weights",
    "symmetric_activations",
    "unsigned_symmetric",
)


def check_fields(fields: dict[str, Any], caller: str) -> None:
    """Refuse values that fields of a configuration or rule cannot have."""
    for name, value in fields.items():
        if name in ("weight_bits", "activation_bits"):
            check_bits(value, caller=caller, name=name)
        elif name == "dynamic":
            if value not in (None, "tensor", "token") and not _is_block(value):
                raise ValueError(
                    f"jaxmet.{caller}: dynamic is {value!r}. Use None, 'tensor', 'token' or the "
                    "number of neighbours that share a range, at least 2."
                )
        elif name in ("residual_bits", "embedding_bits"):
            if value is not None:
                check_bits(value, caller=caller, name=name)
        elif name in _FLAGS:
            check_flags(caller, **{name: value})
        elif name in ("weight_range", "activation_range"):
            check_calibrator(value, caller, name)
        elif name in _CHOICES:
            check_choices(caller, **{name: (value, _CHOICES[name])})
        elif name == "target" and not isinstance(value, Target | None):
            raise ValueError(
                f"jaxmet.{caller}: target is {shown(value)}. Give a jm.Target or None, or "
                "write jm.QuantConfig.for_target('litert')."
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
