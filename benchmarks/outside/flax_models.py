"""Models of the flax documentation and its examples, linen and nnx."""

from typing import Any

import jax
import jax.numpy as jnp

import jaxmet as jm
from outside.model import Built, count, drawn, images, model, settled, tokens, vectors


def linen(module: Any, inputs: Any, key: jax.Array, **kwargs: Any) -> Built:
    """A linen module with drawn numbers; with norms, statistics measured on data."""
    some = inputs(key, 16)
    variables = drawn(jax.jit(module.init)(key, *some, **kwargs), key)
    norms = count(variables)
    if norms:
        variables = settled(lambda v: linen_step(module, v, some, key), variables, key)
    return Built(lambda v, *x: module.apply(v, *x, **kwargs), variables, inputs, norms)


def linen_step(module: Any, variables: Any, some: Any, key: jax.Array) -> Any:
    _, new = module.apply(
        variables, *some, train=True, mutable=["batch_stats"], rngs={"dropout": key}
    )
    return {**variables, **new}


def nnx_module(module: Any, inputs: Any, key: jax.Array) -> Built:
    """An nnx module in evaluation mode, as jm.functional gives it."""
    apply, params, _ = jm.functional(module)
    return Built(apply, drawn(params, key), inputs)


@model("linen CNN", "flax")
def linen_cnn(key):  # flax docs, "Annotated MNIST"
    from flax import linen as nn

    class CNN(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.avg_pool(nn.relu(nn.Conv(8, (3, 3))(x)), (2, 2), strides=(2, 2))
            x = nn.avg_pool(nn.relu(nn.Conv(16, (3, 3))(x)), (2, 2), strides=(2, 2))
            x = nn.relu(nn.Dense(32)(x.reshape((x.shape[0], -1))))
            return nn.Dense(10)(x)

    return linen(CNN(), images(16, 1), key)


@model("linen ResNet", "flax")
def linen_resnet(key):  # flax examples/imagenet, ResNetBlock
    from flax import linen as nn

    class ResNet(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            norm = lambda **kw: nn.BatchNorm(use_running_average=not train, **kw)
            x = nn.relu(norm()(nn.Conv(8, (3, 3), use_bias=False)(x)))
            for width, stride in ((8, 1), (16, 2), (16, 1)):
                y = nn.Conv(width, (3, 3), (stride, stride), use_bias=False)(x)
                y = nn.relu(norm()(y))
                y = norm(scale_init=nn.initializers.zeros)(
                    nn.Conv(width, (3, 3), use_bias=False)(y)
                )
                if x.shape != y.shape:
                    x = norm()(
                        nn.Conv(width, (1, 1), (stride, stride), use_bias=False)(x)
                    )
                x = nn.relu(x + y)
            return nn.Dense(10)(jnp.mean(x, (1, 2)))

    return linen(ResNet(), images(16), key)


@model("linen causal transformer", "flax")
def linen_transformer(key):  # flax examples/lm1b, in short: masked self-attention
    from flax import linen as nn

    class LM(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(50, 32)(ids) + self.param(
                "pos", nn.initializers.normal(1.0), (12, 32)
            )
            mask = nn.make_causal_mask(ids)
            for _ in range(2):
                y = nn.LayerNorm()(x)
                x = x + nn.MultiHeadDotProductAttention(4)(y, mask=mask)
                x = x + nn.Dense(32)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(x))))
            return nn.Dense(50)(nn.LayerNorm()(x))

    return linen(LM(), tokens(12, 50), key)


@model("linen seq2seq LSTM", "flax")
def linen_lstm(key):  # flax docs, nn.RNN
    from flax import linen as nn

    class Tagger(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(50, 16)(ids)
            x = nn.Bidirectional(
                nn.RNN(nn.OptimizedLSTMCell(16)), nn.RNN(nn.GRUCell(16))
            )(x)
            return nn.Dense(8)(x)

    return linen(Tagger(), tokens(10, 50), key)


@model("linen VAE", "flax")
def linen_vae(key):  # flax examples/vae, its mean path
    from flax import linen as nn

    class VAE(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.relu(nn.Dense(32)(x))
            mean, logvar = nn.Dense(8)(h), nn.Dense(8)(h)
            y = nn.Dense(48)(nn.relu(nn.Dense(32)(mean)))
            return nn.sigmoid(y), mean, logvar

    return linen(VAE(), vectors(48), key)


@model("nnx CNN", "flax")
def nnx_cnn(key):  # flax docs, "MNIST tutorial"
    from flax import nnx

    class CNN(nnx.Module):
        def __init__(self, rngs):
            self.conv1, self.bn1 = (
                nnx.Conv(1, 8, (3, 3), rngs=rngs),
                nnx.BatchNorm(8, rngs=rngs),
            )
            self.conv2, self.bn2 = (
                nnx.Conv(8, 16, (3, 3), rngs=rngs),
                nnx.BatchNorm(16, rngs=rngs),
            )
            self.linear1, self.dropout = (
                nnx.Linear(256, 32, rngs=rngs),
                nnx.Dropout(0.1, rngs=rngs),
            )
            self.linear2 = nnx.Linear(32, 10, rngs=rngs)

        def __call__(self, x):
            x = nnx.avg_pool(nnx.relu(self.bn1(self.conv1(x))), (2, 2), strides=(2, 2))
            x = nnx.avg_pool(nnx.relu(self.bn2(self.conv2(x))), (2, 2), strides=(2, 2))
            return self.linear2(
                nnx.relu(self.dropout(self.linear1(x.reshape(x.shape[0], -1))))
            )

    module, inputs = CNN(nnx.Rngs(0)), images(16, 1)
    module.train()
    for k in jax.random.split(key, 50):
        module(inputs(k, 16)[0])
    module.eval()
    built = nnx_module(module, inputs, key)
    return Built(built.apply, built.params, inputs, count(built.params))


@model("nnx transformer", "flax")
def nnx_transformer(key):  # flax docs, "MiniGPT"
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.mha = nnx.MultiHeadAttention(4, 32, decode=False, rngs=rngs)
            self.ln1, self.ln2 = (
                nnx.LayerNorm(32, rngs=rngs),
                nnx.LayerNorm(32, rngs=rngs),
            )
            self.up, self.down = (
                nnx.Linear(32, 64, rngs=rngs),
                nnx.Linear(64, 32, rngs=rngs),
            )

        def __call__(self, x):
            mask = jnp.tril(jnp.ones((x.shape[1], x.shape[1])))
            x = self.ln1(x + self.mha(x, mask=mask))
            return self.ln2(x + self.down(nnx.relu(self.up(x))))

    class GPT(nnx.Module):
        def __init__(self, rngs):
            self.words, self.places = (
                nnx.Embed(50, 32, rngs=rngs),
                nnx.Embed(12, 32, rngs=rngs),
            )
            self.block, self.head = Block(rngs), nnx.Linear(32, 50, rngs=rngs)

        def __call__(self, ids):
            places = jnp.arange(ids.shape[1])[None]
            return self.head(self.block(self.words(ids) + self.places(places)))

    return nnx_module(GPT(nnx.Rngs(0)), tokens(12, 50), key)
