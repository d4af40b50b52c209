"""TensorRT: explicit quantization, symmetric on both sides."""

from jaxmet.tree.targets.target import CLIPS, GATES, MAKERS, NORMS, Target, pairs

TARGET = Target(
    "tensorrt",
    source="https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html",
    symmetric_activations=True,
    unsigned_symmetric=False,
    # Biases of explicitly quantized layers stay in floating point.
    bias="float",
    fuses=NORMS | pairs(MAKERS, *CLIPS) | pairs(("conv",), "leaky_relu") | GATES,
    # Not demanded: with one scale a concatenation copies integers.
    shares=frozenset({"concat"}),
    integers=frozenset(
        {"conv", "dense", "matmul", "add", "concat", "resize", "relu", "clip"}
        | {"leaky_relu", "avg_pool", "mean", "max_pool"}
    ),
)
"""int8 activations and weights without zero points, float biases."""
