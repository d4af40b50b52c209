"""LiteRT (TensorFlow Lite): the int8 specification."""

from jaxmet.tree.targets.target import NORMS, Target, pairs

TARGET = Target(
    "litert",
    source="https://www.tensorflow.org/lite/performance/quantization_spec",
    fuses=NORMS
    | pairs(("conv", "dense", "norm", "add", "multiply", "avg_pool"), "relu", "clip"),
    # Also max pool, pad, reshape, transpose, slice and gather, as on every target. MEAN is free.
    shares=frozenset({"concat", "avg_pool", "resize"}),
    # Scale 1/256 at zero point −128 of int8, and 1/128 at zero point 0.
    fixed=(
        ("softmax", 0.0, 255 / 256),
        ("sigmoid", 0.0, 255 / 256),
        ("logistic", 0.0, 255 / 256),
        ("tanh", -1.0, 127 / 128),
    ),
    # An integer FULLY_CONNECTED has an integer output, of the width of its input.
    residual_bits=None,
    integers=frozenset(
        {"conv", "dense", "matmul", "add", "multiply", "concat", "resize", "relu"}
        | {"clip", "leaky_relu", "sigmoid", "logistic", "tanh", "softmax", "avg_pool"}
        | {"mean", "sum", "max_pool", "max", "min", "lookup"}
    ),
)
"""int8 activations with a zero point (uint8 less 128), int8 weights, int32 biases."""
