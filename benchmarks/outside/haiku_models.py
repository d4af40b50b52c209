"""Haiku's nets and the models of its examples."""

from typing import Any

import jax
import jax.numpy as jnp

from outside.model import Built, drawn, images, model, tokens, vectors


def plain(function: Any, inputs: Any, key: jax.Array) -> Built:
    """A haiku function without state."""
    import haiku as hk

    f = hk.without_apply_rng(hk.transform(function))
    return Built(f.apply, drawn(jax.jit(f.init)(key, *inputs(key, 4)), key), inputs)


def normed(function: Any, inputs: Any, key: jax.Array) -> Built:
    """A haiku function of (x, is_training) with batch norms, as (params, state)."""
    import haiku as hk

    f = hk.without_apply_rng(hk.transform_with_state(function))
    some = inputs(key, 16)[0]
    params, state = jax.jit(lambda k, x: f.init(k, x, True))(key, some)
    params = drawn(params, key)
    # the first update of an average is the batch's own, debiased
    _, state = jax.jit(lambda p, s, x: f.apply(p, s, x, True))(params, state, some)
    for i, (module, average) in enumerate(state.items()):
        noise = jax.random.normal(jax.random.fold_in(key, i), average["average"].shape)
        if module.endswith("var_ema"):
            average["average"] = (average["average"] + 1e-3) * jnp.exp(0.2 * noise)
        else:
            average["average"] += 0.1 * noise
    norms = sum(module.endswith("var_ema") for module in state)
    apply = lambda v, x: f.apply(*v, x, False)[0]
    return Built(apply, (params, state), inputs, norms)


@model("haiku MLP", "haiku")
def mlp(key):
    import haiku as hk

    return plain(lambda x: hk.nets.MLP([32, 32, 10])(x), vectors(20), key)


@model("haiku ResNet v1", "haiku")
def resnet(key, v2=False):
    import haiku as hk

    def net(x, train):
        return hk.nets.ResNet(
            (1, 1, 1, 1), 10, resnet_v2=v2, channels_per_group=(8, 16, 16, 32)
        )(x, train)

    return normed(net, images(32), key)


@model(
    "haiku ResNet v2",
    "haiku",
    unfoldable=5,
    why="of five the input is a sum or a pooling, the output an activation",
)
def resnet_v2(key):
    return resnet(key, v2=True)


@model("haiku MobileNetV1", "haiku")
def mobilenet(key):
    import haiku as hk

    def net(x, train):
        return hk.nets.MobileNetV1(
            (1, 2, 1, 2, 1), (8, 16, 16, 32, 32), num_classes=10
        )(x, train)

    return normed(net, images(32), key)


@model("haiku LSTM", "haiku")
def lstm(key):  # haiku examples/rnn
    import haiku as hk

    def net(ids):
        x = hk.Embed(50, 16)(ids)
        x, _ = hk.dynamic_unroll(
            hk.DeepRNN([hk.LSTM(16), jax.nn.relu, hk.LSTM(16)]),
            x,
            hk.DeepRNN([hk.LSTM(16), jax.nn.relu, hk.LSTM(16)]).initial_state(
                ids.shape[0]
            ),
            time_major=False,
        )
        return hk.Linear(50)(x)

    return plain(net, tokens(8, 50), key)


@model("haiku transformer", "haiku")
def transformer(key):  # haiku examples/transformer: causal and padding mask
    import haiku as hk

    def net(ids):
        x = hk.Embed(50, 32)(ids)
        x = x + hk.get_parameter(
            "pos", x.shape[1:], init=hk.initializers.TruncatedNormal()
        )
        mask = (ids != 0)[:, None, None, :] * jnp.tril(jnp.ones((1, 1, 12, 12)))
        init = hk.initializers.VarianceScaling(4.0)
        norm = lambda x: hk.LayerNorm(-1, True, True)(x)
        for _ in range(2):
            y = norm(x)
            x = x + hk.MultiHeadAttention(4, 8, model_size=32, w_init=init)(
                y, y, y, mask=mask
            )
            x = x + hk.Linear(32)(jax.nn.gelu(hk.Linear(64)(norm(x))))
        return hk.Linear(50)(norm(x))

    def padded(key, n):
        ids, length = jax.random.split(key)
        lengths = jax.random.randint(length, (n, 1), 6, 13)
        return (jax.random.randint(ids, (n, 12), 1, 50) * (jnp.arange(12) < lengths),)

    return plain(net, padded, key)


@model("haiku conv GRU", "haiku")
def conv_gru(key):
    import haiku as hk

    def net(x):
        x = jax.nn.relu(hk.Conv1D(16, 3)(x))
        core = hk.GRU(16)
        x, _ = hk.dynamic_unroll(
            core, x, core.initial_state(x.shape[0]), time_major=False
        )
        return hk.Linear(5)(x[:, -1])

    return plain(net, vectors(10, 6), key)
