"""Integer operations of XLA: products on int8 with int32 sums, requantized in float."""

from jaxmet.tree.targets.target import Target

TARGET = Target(
    "xla",
    source="https://openxla.org/stablehlo/spec",
    # XLA has no table: a shared scale makes a concatenation a copy of integers.
    shares=frozenset({"concat"}),
    integers=frozenset(
        {"conv", "dense", "matmul", "add", "multiply", "concat", "relu", "clip"}
        | {"mean", "avg_pool", "max_pool", "min_pool", "max", "min", "lookup"}
    ),
)
"""uint8 activations (held as int8 less 128), int8 weights, int32 biases."""
