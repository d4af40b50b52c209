"""The models of equinox's documentation, and equimo's vision models built on equinox."""

from typing import Any

import jax
import jax.numpy as jnp

from outside.model import Built, drawn, images, model, tokens, vectors


def channels_first(size: int, channels: int = 3) -> Any:
    """Pictures with channels before height and width."""
    inputs = images(size, channels)
    return lambda key, n: (jnp.transpose(inputs(key, n)[0], (0, 3, 1, 2)),)


def stateless(module: Any, inputs: Any, key: jax.Array, call: Any = None) -> Built:
    """An equinox module of one example, mapped over a batch."""
    import equinox as eqx

    arrays, static = eqx.partition(eqx.nn.inference_mode(module), eqx.is_array)

    def apply(params, *inputs):
        whole = eqx.combine(params, static)
        return jax.vmap(lambda *x: whole(*x, **(call or {})))(*inputs)

    return Built(apply, drawn(arrays, key), inputs)


def stateful(make: Any, inputs: Any, key: jax.Array, steps: int = 20) -> Built:
    """A module with batch norms after some steps of training, as (arrays, state)."""
    import equinox as eqx

    module, state = eqx.nn.make_with_state(make)()
    arrays, static = eqx.partition(module, eqx.is_array)
    arrays = drawn(arrays, key)

    def run(params, state, x, inference):
        whole = eqx.nn.inference_mode(eqx.combine(params, static), inference)
        return jax.vmap(whole, (0, None), (0, None), axis_name="batch")(x, state)

    step = jax.jit(lambda s, x: run(arrays, s, x, False)[1])
    for k in jax.random.split(key, steps):
        state = step(state, *inputs(k, 16))
    is_norm = lambda x: isinstance(x, eqx.nn.BatchNorm)
    norms = sum(map(is_norm, jax.tree.leaves(module, is_leaf=is_norm)))
    return Built(lambda p, x: run(*p, x, True)[0], (arrays, state), inputs, norms)


@model("equinox MLP", "equinox")
def mlp(key):
    import equinox as eqx

    return stateless(eqx.nn.MLP(20, 10, 32, 2, key=key), vectors(20), key)


@model("equinox CNN", "equinox")
def cnn(key):  # equinox docs, "CNN on MNIST"
    import equinox as eqx

    a, b, c = jax.random.split(key, 3)
    net = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(1, 3, 4, key=a),
            eqx.nn.MaxPool2d(2),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(3 * 24 * 24, 32, key=b),
            eqx.nn.Lambda(jax.nn.sigmoid),
            eqx.nn.Linear(32, 10, key=c),
            eqx.nn.Lambda(jax.nn.log_softmax),
        ]
    )
    return stateless(net, channels_first(28, 1), key)


def with_norm(key: jax.Array, mode: str) -> Built:
    import equinox as eqx

    a, b, c = jax.random.split(key, 3)
    norm = lambda n: eqx.nn.BatchNorm(n, "batch", mode=mode)
    relu = eqx.nn.Lambda(jax.nn.relu)
    make = lambda: eqx.nn.Sequential(
        [
            *(eqx.nn.Conv2d(3, 8, 3, padding=1, key=a), norm(8), relu),
            *(eqx.nn.Conv2d(8, 8, 3, padding=1, use_bias=False, key=b), norm(8), relu),
            *(
                eqx.nn.AdaptiveAvgPool2d(1),
                eqx.nn.Lambda(jnp.ravel),
                eqx.nn.Linear(8, 5, key=c),
            ),
        ]
    )
    return stateful(make, channels_first(16), key)


@model("equinox BatchNorm batch", "equinox")
def batch_norm(key):  # equinox docs, "Stateful operations"
    return with_norm(key, "batch")


@model("equinox BatchNorm ema", "equinox")
def batch_norm_ema(key):
    return with_norm(key, "ema")


@model("equinox GRU", "equinox")
def gru(key):  # equinox docs, "Train RNN"
    import equinox as eqx

    class RNN(eqx.Module):
        cell: Any
        linear: Any
        bias: Any

        def __call__(self, x):
            step = lambda carry, inp: (self.cell(inp, carry), None)
            out, _ = jax.lax.scan(step, jnp.zeros(self.cell.hidden_size), x)
            return jax.nn.sigmoid(self.linear(out) + self.bias)

    linear = eqx.nn.Linear(16, 1, use_bias=False, key=key)
    net = RNN(eqx.nn.GRUCell(2, 16, key=key), linear, jnp.zeros(1))
    return stateless(net, vectors(12, 2), key)


@model("equinox BERT", "equinox")
def bert(key):  # equinox docs, "BERT"; with a mask of what is padded
    import equinox as eqx

    a, b, c, d, e = jax.random.split(key, 5)

    class Bert(eqx.Module):
        words: Any
        places: Any
        attention: Any
        up: Any
        down: Any
        norms: Any

        def __call__(self, ids):
            x = jax.vmap(self.words)(ids) + jax.vmap(self.places)(jnp.arange(12))
            x = jax.vmap(self.norms[0])(x)
            mask = jnp.broadcast_to(ids > 0, (12, 12))
            x = jax.vmap(self.norms[1])(x + self.attention(x, x, x, mask=mask))
            y = jax.vmap(self.down)(jax.nn.gelu(jax.vmap(self.up)(x)))
            return jax.vmap(self.norms[2])(x + y)

    sharper = lambda w: 3 * w if eqx.is_inexact_array(w) else w
    net = Bert(
        *(eqx.nn.Embedding(50, 32, key=a), eqx.nn.Embedding(12, 32, key=b)),
        jax.tree.map(
            sharper, eqx.nn.MultiheadAttention(4, 32, use_query_bias=True, key=c)
        ),
        *(eqx.nn.Linear(32, 64, key=d), eqx.nn.Linear(64, 32, key=e)),
        [eqx.nn.LayerNorm(32) for _ in range(3)],
    )

    def padded(key, n):
        lengths = jax.random.randint(key, (n, 1), 6, 13)
        return (tokens(12, 50)(key, n)[0] * (jnp.arange(12) < lengths),)

    return stateless(net, padded, key)


@model("equinox ViT", "equinox")
def vit(key):  # equinox docs, "Vision transformer"
    import equinox as eqx

    a, b, c, d, e = jax.random.split(key, 5)

    class ViT(eqx.Module):
        patches: Any
        attention: Any
        mlp: Any
        norms: Any
        head: Any
        cls: Any
        places: Any

        def __call__(self, image):
            x = image.reshape(3, 4, 4, 4, 4).transpose(1, 3, 2, 4, 0).reshape(16, 48)
            x = jnp.concatenate([self.cls, jax.vmap(self.patches)(x)]) + self.places
            y = jax.vmap(self.norms[0])(x)
            x = x + self.attention(y, y, y)
            x = x + jax.vmap(self.mlp)(jax.vmap(self.norms[1])(x))
            return self.head(self.norms[2](x[0]))

    net = ViT(
        *(eqx.nn.Linear(48, 32, key=a), eqx.nn.MultiheadAttention(4, 32, key=b)),
        eqx.nn.MLP(32, 32, 64, 1, activation=jax.nn.gelu, key=c),
        *([eqx.nn.LayerNorm(32) for _ in range(3)], eqx.nn.Linear(32, 10, key=d)),
        *(jax.random.normal(e, (1, 32)), jax.random.normal(e, (17, 32))),
    )
    return stateless(net, channels_first(16), key)


@model("equinox MLP-Mixer", "equinox")
def mixer(
    key,
):  # equinox docs, "Score-based diffusion": an MLP-Mixer with time as a channel
    import equinox as eqx

    a, b, c, d = jax.random.split(key, 4)

    class Mixer(eqx.Module):
        conv_in: Any
        conv_out: Any
        patches: Any
        hidden: Any
        norms: Any

        def __call__(self, y, t):
            y = jnp.concatenate([y, jnp.broadcast_to(t, (1, 16, 16))])
            y = self.conv_in(y)
            shape = y.shape
            y = y.reshape(16, 16)
            y = y + jax.vmap(self.patches)(self.norms[0](y))
            y = y.T
            y = (y + jax.vmap(self.hidden)(self.norms[1](y))).T
            return self.conv_out(self.norms[2](y).reshape(shape))

    net = Mixer(
        eqx.nn.Conv2d(4, 16, 4, stride=4, key=a),
        eqx.nn.ConvTranspose2d(16, 3, 4, stride=4, key=b),
        eqx.nn.MLP(16, 16, 32, 1, key=c),
        eqx.nn.MLP(16, 16, 32, 1, key=d),
        [eqx.nn.LayerNorm((16, 16)) for _ in range(3)],
    )
    pictures = channels_first(16)
    inputs = lambda key, n: (*pictures(key, n), jax.random.uniform(key, (n,)))
    return stateless(net, inputs, key)


@model("equimo ViT", "equimo")
def equimo_vit(key):
    from equimo.models import VisionTransformer

    net = VisionTransformer(
        *(16, 3, 32, 4, 4), [2], num_classes=10, init_values=0.1, qk_norm=True, key=key
    )
    return stateless(net, channels_first(16), key, {"key": jax.random.key(0)})


@model("equimo ConvNeXt", "equimo")
def equimo_convnext(key):
    from equimo.models import ConvNeXt

    net = ConvNeXt(
        3, depths=[1, 1, 1, 1], dims=[8, 16, 16, 32], num_classes=10, key=key
    )
    return stateless(net, channels_first(32), key, {"key": jax.random.key(0)})


@model("equimo MobileNetV3", "equimo")
def equimo_mobilenet(key):
    from equimo.models import MobileNetv3

    layers = [
        (8, 8, 3, 2, True, "relu"),
        (8, 24, 3, 1, False, "relu"),
        (16, 32, 5, 2, True, "hard_swish"),
        (16, 48, 5, 1, True, "hard_swish"),
    ]
    net = MobileNetv3(3, layers, last_channels=32, num_classes=10, key=key)
    return stateless(net, channels_first(32), key, {"key": jax.random.key(0)})


@model("equimo ViT with RoPE", "equimo")
def equimo_rope(key):  # as DINOv3: rotary positions, registers, gated MLP
    from equimo.models import VisionTransformer

    net = VisionTransformer(
        *(16, 3, 32, 4, 4),
        [2],
        num_classes=10,
        use_global_pos_embed=False,
        use_local_pos_embed=True,
        reg_tokens=2,
        ffn_layer="swiglu",
        key=key,
    )
    return stateless(net, channels_first(16), key, {"key": jax.random.key(0)})
