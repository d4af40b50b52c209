"""Configurations that have a name in the field, for models of products and attention."""

from typing import Any

FOUR_BITS = {
    "weight_bits": 4,
    "block": 32,
    "symmetric_weights": False,
    "embedding_bits": 8,
}
PRESETS: dict[str, dict[str, Any]] = {
    "w8a8": {"dynamic": "token"},
    "w4a8": {**FOUR_BITS, "dynamic": "token"},
    "w8a16": {"activation_bits": 32},
    "w4a16": {**FOUR_BITS, "activation_bits": 32},
}
"""Fields of `QuantConfig`. 16 bits of activations are those of float16 or bfloat16: no grid."""
