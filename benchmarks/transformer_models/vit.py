"""A small vision transformer in flax linen for Fashion-MNIST, its layers scanned.

Dosovitskiy et al., [An Image is Worth 16x16 Words](https://arxiv.org/abs/2010.11929), ICLR 2021,
with patches of 4 by 4 pixels and the mean of all tokens in place of a class token.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

WIDTH, HEADS, INNER, DEPTH, PATCH, CLASSES = 64, 4, 128, 4, 4, 10


class Layer(nn.Module):
    """Norms before attention and before the MLP; `(x, None)` for a scan."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        y = nn.LayerNorm(name="attention_norm")(x)
        heads = (*x.shape[:2], HEADS, WIDTH // HEADS)
        q, k, v = (
            nn.Dense(WIDTH, name=n)(y).reshape(heads) for n in ("query", "key", "value")
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / (WIDTH // HEADS) ** 0.5
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        x = x + nn.Dense(WIDTH, name="out")(mixed.reshape(x.shape))
        y = nn.LayerNorm(name="norm")(x)
        h = nn.gelu(nn.Dense(INNER, name="up")(y), approximate=False)
        return x + nn.Dense(WIDTH, name="down")(h), None


class VisionTransformer(nn.Module):
    """Images (batch, 28, 28, 1) to logits."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        size = (PATCH, PATCH)
        x: Any = nn.Conv(WIDTH, size, size, padding="VALID", name="patches")(images)
        x = x.reshape(x.shape[0], -1, WIDTH)
        drawn = nn.initializers.normal(0.02)
        x = x + self.param("positions", drawn, (1, x.shape[1], WIDTH))
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=DEPTH,
        )
        x, _ = layers(name="layers")(x, None)
        x = nn.LayerNorm(name="norm")(x)
        return nn.Dense(CLASSES, name="head")(jnp.mean(x, axis=1))
