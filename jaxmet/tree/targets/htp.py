"""Qualcomm's HTP: what AIMET's configurations for it say."""

from jaxmet.tree.targets.target import NORMS, Target, pairs

TARGET = Target(
    "htp",
    source="https://docs.qualcomm.com/doc/80-63442-10/topic/htp_backend.html",
    fuses=NORMS
    | pairs(("conv", "norm"), "relu", "clip", "prelu", "leaky_relu", "hard_swish")
    | pairs(("dense", "add"), "relu"),
    shares=frozenset({"concat"}),
    fixed=(
        ("softmax", 0.0, 1.0),
        ("sigmoid", 0.0, 1.0),
        ("logistic", 0.0, 1.0),
        ("tanh", -1.0, 1.0),
        ("sin", -1.0, 1.0),
        ("cos", -1.0, 1.0),
    ),
    integers=frozenset(
        {"conv", "dense", "matmul", "add", "multiply", "concat", "resize", "relu"}
        | {"clip", "leaky_relu", "prelu", "sigmoid", "logistic", "tanh", "softmax"}
        | {"gelu", "silu", "hard_swish", "norm", "avg_pool", "mean", "sum", "max_pool"}
        | {"max", "min", "lookup", "sin", "cos"}
    ),
    # Products read 16 bits as well as 8.
    residual_bits=16,
    least_multiplier=2.0**-24,
)
"""uint8 activations with a zero point, int8 weights, int32 biases, a limit on requantization."""
