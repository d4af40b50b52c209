"""A transformer block in flax linen, with drawn weights: attention and MLP, norms in front."""

import flax.linen as nn
import jax


class TransformerBlock(nn.Module):
    """Tokens `(batch, tokens, width)` to tokens of the same shape.

    Xiong et al., [On Layer Normalization in the Transformer
    Architecture](https://arxiv.org/abs/2002.04745), ICML 2020: the norms come first.
    """

    heads: int = 4
    expansion: int = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.LayerNorm(name="attention_norm")(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="attention")(y)
        y = nn.LayerNorm(name="mlp_norm")(x)
        y = nn.gelu(nn.Dense(self.expansion * x.shape[-1], name="expand")(y))
        return x + nn.Dense(x.shape[-1], name="project")(y)


def drawn(batch: int) -> tuple[dict, jax.Array]:
    """Variables and inputs of one key: 32 tokens of width 64."""
    weights, values = jax.random.split(jax.random.key(0))
    tokens = jax.random.normal(values, (batch, 32, 64))
    return TransformerBlock().init(weights, tokens[:1]), tokens
