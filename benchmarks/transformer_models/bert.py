"""A BERT encoder in flax linen, its layers written out one after another or scanned.

Devlin et al., [BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding](https://arxiv.org/abs/1810.04805), NAACL 2019; sentences are embedded as in
Reimers and Gurevych, [Sentence-BERT](https://arxiv.org/abs/1908.10084), EMNLP 2019: the mean
over the tokens that are no padding, of unit length.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Size:
    """How large a network is. The defaults are those of all-MiniLM-L6-v2."""

    depth: int = 6
    width: int = 384
    heads: int = 12
    inner: int = 1536
    vocabulary: int = 30522
    positions: int = 512
    epsilon: float = 1e-12


class EncoderLayer(nn.Module):
    """Tokens `(batch, tokens, width)` to tokens; each norm comes after its addition."""

    size: Size

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        s = self.size
        x = self.norm("attention_norm")(x + self.attention(x, mask))
        h = nn.gelu(nn.Dense(s.inner, name="up")(x), approximate=False)
        return self.norm("norm")(x + nn.Dense(s.width, name="down")(h)), None

    def attention(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        heads = (*x.shape[:2], self.size.heads, x.shape[2] // self.size.heads)
        q, k, v = (
            nn.Dense(x.shape[2], name=name)(x).reshape(
                heads
            )  # (batch, tokens, heads, each)
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(q.shape[3])
        lowest = jnp.finfo(scores.dtype).min
        scores = jnp.where(mask[:, None, None, :], scores, lowest)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        return nn.Dense(x.shape[2], name="out")(mixed.reshape(x.shape))

    def norm(self, name: str) -> nn.LayerNorm:
        return nn.LayerNorm(epsilon=self.size.epsilon, name=name)


class SentenceEncoder(nn.Module):
    """Token numbers and mask, both `(batch, tokens)`, to embeddings `(batch, width)`.

    The mask is True, or 1, where a token is no padding. All sentences are of type 0, and the
    embedding of that type is part of the positions.
    """

    size: Size = Size()
    scanned: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        s, mask = self.size, mask.astype(bool)
        words = nn.Embed(s.vocabulary, s.width, name="words")(tokens)
        positions = nn.Embed(s.positions, s.width, name="positions")
        x = words + positions(jnp.arange(tokens.shape[1]))[None]
        x = nn.LayerNorm(epsilon=s.epsilon, name="norm")(x)
        if self.scanned:
            x, _ = scanned_layers(s)(x, mask)
        else:
            for i in range(s.depth):
                x, _ = EncoderLayer(s, name=f"layer{i}")(x, mask)
        return unit_length(mean_over_tokens(x, mask))


def scanned_layers(size: Size) -> nn.Module:
    """All layers as one loop, over weights that are stacked along axis 0."""
    loop = nn.scan(
        EncoderLayer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=size.depth,
    )
    return loop(size, name="layers")


def mean_over_tokens(x: jax.Array, mask: jax.Array) -> jax.Array:
    counts = mask[:, :, None].astype(x.dtype)
    return jnp.sum(x * counts, axis=1) / jnp.sum(counts, axis=1)


def unit_length(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=1, keepdims=True)


def stacked(variables: Any) -> Any:
    """The variables of the scanned network, of those of the one that is written out."""
    params = dict(variables["params"])
    layers = [
        params.pop(f"layer{i}") for i in range(len(params)) if f"layer{i}" in params
    ]
    params["layers"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    return {"params": params}


def unstacked(variables: Any) -> Any:
    """The opposite of `stacked`."""
    params = dict(variables["params"])
    layers = params.pop("layers")
    depth = jax.tree.leaves(layers)[0].shape[0]
    for i in range(depth):
        params[f"layer{i}"] = jax.tree.map(lambda leaf: leaf[i], layers)
    return {"params": params}
