"""Flax models of diffusers and flaxmodels."""

import jax
import jax.numpy as jnp

from outside.model import Built, count, drawn, images, model, settled


@model("diffusers U-Net", "diffusers")
def unet(key):
    from diffusers import FlaxUNet2DConditionModel

    net = FlaxUNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    params = drawn(net.init_weights(key), key)

    def apply(params, sample, time, text):
        return net.apply({"params": params}, sample, time, text).sample

    def inputs(key, n):
        a, b, c = jax.random.split(key, 3)
        sample = jax.random.uniform(a, (n, 4, 8, 8), minval=-1.0)
        time = jax.random.randint(b, (n,), 0, 1000)
        return sample, time, jax.random.uniform(c, (n, 6, 16), minval=-1.0)

    return Built(apply, params, inputs)


@model("diffusers autoencoder", "diffusers")
def autoencoder(key):
    from diffusers import FlaxAutoencoderKL

    net = FlaxAutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    )
    params = drawn(net.init_weights(key), key)

    def apply(params, x):
        mean = net.apply({"params": params}, x, method=net.encode).latent_dist.mean
        mean = jnp.transpose(mean, (0, 3, 1, 2))
        return net.apply({"params": params}, mean, method=net.decode).sample

    pictures = lambda key, n: (jnp.transpose(images(16)(key, n)[0], (0, 3, 1, 2)),)
    return Built(apply, params, pictures)


@model("flaxmodels ResNet", "flaxmodels")
def resnet(key):
    import flax.linen as nn
    from flaxmodels.resnet.resnet import BasicBlock, Bottleneck

    class ResNet(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.relu(nn.BatchNorm(not train)(nn.Conv(8, (3, 3), use_bias=False)(x)))
            x, _ = BasicBlock(8, block_name="a")(x, {}, train), None
            x = x[0] if isinstance(x, tuple) else x
            x = BasicBlock(16, downsample=True, block_name="b")(x, {}, train)
            x = x[0] if isinstance(x, tuple) else x
            x = Bottleneck(8, downsample=True, expansion=2, block_name="c")(
                x, {}, train
            )
            x = x[0] if isinstance(x, tuple) else x
            return nn.Dense(10)(jnp.mean(x, (1, 2)))

    net, inputs = ResNet(), images(32)
    (some,) = inputs(key, 16)
    variables = drawn(net.init(key, some), key)

    def train(variables):
        return {
            **variables,
            **net.apply(variables, some, train=True, mutable=["batch_stats"])[1],
        }

    variables = settled(train, variables, key)
    return Built(net.apply, variables, inputs, count(variables))
