"""onnxruntime on CPUs: QLinear operations, made from QuantizeLinear and DequantizeLinear."""

from jaxmet.tree.targets.target import KEEPS, Target

TARGET = Target(
    "onnxruntime",
    source="https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html",
    # QLinearConcat, QLinearAdd and QLinearAveragePool have scales for inputs and outputs; a
    # Resize between Q and DQ runs on the integers themselves.
    shares=frozenset({"resize"}),
    # A sum, of a window too, has no QLinear form: it runs in float, its result is quantized.
    integers=frozenset(
        {"conv", "dense", "matmul", "add", "multiply", "concat", "resize", "relu"}
        | {"clip", "leaky_relu", "sigmoid", "softmax", "avg_pool", "mean", "lookup"}
        | set(KEEPS[:1])
    ),
)
"""uint8 activations, int8 weights, int32 biases; scales are free but for a resize."""
