"""OpenVINO on CPUs: low-precision transformations of a model with FakeQuantize or Q and DQ."""

from jaxmet.tree.targets.target import (
    CLIPS,
    GATES,
    MAKERS,
    NORMS,
    SLOPES,
    Target,
    pairs,
)

TARGET = Target(
    "openvino",
    source="https://docs.openvino.ai/2024/documentation/openvino-extensibility/openvino-plugin-library/advanced-guides/low-precision-transformations.html",
    fuses=NORMS | pairs(MAKERS, *CLIPS) | pairs(("conv", "dense"), *SLOPES) | GATES,
    # AlignQuantizationIntervals gives the inputs of a concatenation one interval.
    shares=frozenset({"concat"}),
    # Products of two activations, element by element too, run in float on CPUs (2026.4): both
    # operands are uint8 with a zero point there.
    integers=frozenset(
        {"conv", "dense", "add", "concat", "resize", "relu", "clip", "leaky_relu"}
        | {"prelu", "avg_pool", "mean", "sum", "max_pool"}
    ),
    # The bias of an integer convolution is added to its dequantized result.
    bias="float",
)
"""uint8 activations, int8 weights, float biases."""
