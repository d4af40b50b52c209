"""The same network and weights in Qwix, whose activations have a scale per token at every call."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transformer_models.bert import SentenceEncoder

Embed = Callable[[Any, Any, Any], Any]


def post_training(
    variables: Any,
    weights: str,
    activations: str | None = None,
    block: int | None = None,
) -> tuple[Embed, Any]:
    """All products of `SentenceEncoder()` quantized, and its variables. Types as 'int8', 'int4'.

    `block` neighbours along the inputs of a product share a scale.
    """
    import qwix

    rule = qwix.QuantizationRule(
        weight_qtype=jnp.dtype(weights),
        act_qtype=None if activations is None else jnp.dtype(activations),
        tile_size=block,
    )
    model = qwix.quantize_model(SentenceEncoder(), qwix.PtqProvider([rule]))
    tokens = np.zeros((1, 1), np.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens == 0)
    quantized = qwix.quantize_params(variables["params"], shapes["params"])
    return model.apply, {"params": quantized}
