"""What a runtime computes in integers, and what its kernels demand of scales."""

import dataclasses
from typing import Literal, TypeAlias

BiasFormat: TypeAlias = Literal["float", "int32"]
Placing: TypeAlias = Literal["operations", "products"]

CLIPS = ("relu", "clip")
SLOPES = ("leaky_relu", "prelu")
MAKERS = ("conv", "dense", "ragged", "norm", "add")
KEEPS = ("max_pool", "min_pool", "max", "min")
"""Pools that choose: they have no quantizer of their own, on any target."""


def pairs(producers: tuple[str, ...], *consumers: str) -> frozenset[tuple[str, str]]:
    """Each of the producers with each of the consumers."""
    return frozenset((p, c) for p in producers for c in consumers)


NORMS = pairs(("conv", "dense"), "norm")
"""A folded batch norm is in the weights and the bias of its product."""

GATES = pairs(("dense",), "gelu", "silu")
"""Computed in float from the sums of a product, where no kernel on integers has them."""


@dataclasses.dataclass(frozen=True, repr=False)
class Target:
    """The integer arithmetic of one runtime, for `jm.QuantConfig.for_target`.

    Operations are named 'conv' and 'dense' (products with a weight), 'ragged', 'matmul' (of two
    activations), 'lookup', 'norm', 'add', 'multiply', 'concat', 'resize', 'input', pools by their
    function ('avg_pool', 'mean', 'max_pool'), and activations by theirs ('relu', 'softmax').

    Layout operations (reshape, transpose, slice, pad, gather) and pools that choose (max, min)
    have the quantizer of their input on every target; `shares` is for the others.

    Args:
        name: what it is called.
        source: where the runtime documents this, a URL.
        weight_bits: bit-width of weights; default 8.
        activation_bits: bit-width of activations; default 8.
        symmetric_weights: whether weights have no zero point; default True. Symmetric weights are
            signed, asymmetric ones are not.
        symmetric_activations: whether activations have no zero point; default False.
        unsigned_symmetric: whether symmetric activations without negative values are unsigned;
            default True.
        per_channel: whether each output channel of a weight has its own scale; default True.
        bias: 'int32' (the default) or 'float'.
        placement: as in `QuantConfig`; default 'operations'.
        fuses: pairs (producer, consumer) that are computed in one operation, so that the
            producer's output has no quantizer.
        shares: operations whose inputs have the scale and zero point of their output.
        fixed: (operation, lowest, highest): outputs whose range the runtime fixes, at 8 bits.
        integers: the operations that run in integers; None: all of them.
        no_output: operations whose output has no quantizer; default none.
        residual_bits: as in `QuantConfig`; default 32: sums that a norm reads stay in float.
        least_multiplier: the limit below which s_x s_w / s_y must not be; default 0: none.

    >>> jm.targets.litert.shares
    """

    name: str
    _: dataclasses.KW_ONLY
    source: str = ""
    weight_bits: int = 8
    activation_bits: int = 8
    symmetric_weights: bool = True
    symmetric_activations: bool = False
    unsigned_symmetric: bool = True
    per_channel: bool = True
    bias: BiasFormat = "int32"
    placement: Placing = "operations"
    fuses: frozenset[tuple[str, str]] = NORMS | pairs(MAKERS, *CLIPS) | GATES
    shares: frozenset[str] = frozenset()
    fixed: tuple[tuple[str, float, float], ...] = ()
    integers: frozenset[str] | None = None
    no_output: frozenset[str] = frozenset()
    residual_bits: int | None = 32
    least_multiplier: float = 0.0

    def computes(self, operation: str) -> bool:
        """Whether the runtime has an integer kernel for this operation."""
        known = self.integers
        return known is None or operation in known or operation in ("input", "output")

    def range_of(self, operation: str) -> tuple[float, float] | None:
        """The range that the output of an operation must have, None for any."""
        found = ((low, high) for name, low, high in self.fixed if name == operation)
        return next(found, None)

    def __repr__(self) -> str:
        return f"<Target {self.name}>"


UNSTATED = Target(
    "unstated",
    bias="float",
    fuses=NORMS | pairs(MAKERS, *CLIPS, *SLOPES) | GATES,
    shares=frozenset({"concat"}),
)
"""What holds where a configuration has no target."""
