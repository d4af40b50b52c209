"""A ResNet18 and a ResNet50 for 28x28 grey images, both narrow.

He et al., [Deep Residual Learning for Image Recognition](https://arxiv.org/abs/1512.03385),
CVPR 2016: the blocks and their numbers are those of the paper. Images are small, so the
stem is one 3x3 convolution and the stages halve three times in all. Bottlenecks stride
in their 3x3 convolution. Norms are named after the convolution before them, `X_bn`
after `X`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

EXPANSION = 4


def unit(
    x: jax.Array, name: str, features: int, window: int, *, train: bool, stride: int = 1
) -> jax.Array:
    """Convolution and batch norm: inside a compact module."""
    x = nn.Conv(
        features,
        (window, window),
        strides=(stride, stride),
        use_bias=False,
        kernel_init=nn.initializers.he_normal(),
        name=name,
    )(x)
    return nn.BatchNorm(
        use_running_average=not train, momentum=0.9, epsilon=1e-5, name=f"{name}_bn"
    )(x)


def shortcut(x: jax.Array, y: jax.Array, *, train: bool) -> jax.Array:
    """What is added to y: x, or a 1x1 convolution of it where shapes differ."""
    if x.shape == y.shape:
        return x
    stride = -(-x.shape[1] // y.shape[1])
    return unit(x, "shortcut", y.shape[-1], 1, train=train, stride=stride)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y = unit(x, "conv1", self.features, 3, train=train, stride=self.stride)
        y = unit(nn.relu(y), "conv2", self.features, 3, train=train)
        return nn.relu(shortcut(x, y, train=train) + y)


class Bottleneck(nn.Module):
    """Narrow, a 3x3 convolution, widen again, and a shortcut."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y = nn.relu(unit(x, "conv1", self.features, 1, train=train))
        y = unit(y, "conv2", self.features, 3, train=train, stride=self.stride)
        y = unit(nn.relu(y), "conv3", EXPANSION * self.features, 1, train=train)
        return nn.relu(shortcut(x, y, train=train) + y)


class ResNet(nn.Module):
    """Images `(batch, 28, 28, 1)` in 0 to 1, to logits `(batch, classes)`.

    Stage i has `blocks[i]` blocks on `width * 2**i` channels; the first of them strides
    by `strides[i]`.
    """

    block: type[BasicBlock] | type[Bottleneck]
    blocks: tuple[int, ...]
    strides: tuple[int, ...]
    width: int
    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        x = nn.relu(unit(x, "stem", self.width, 3, train=train))
        for stage, count in enumerate(self.blocks):
            for index in range(count):
                features = self.width * 2**stage
                stride = self.strides[stage] if index == 0 else 1
                name = f"stage{stage + 1}_block{index + 1}"
                x = self.block(features, stride, name=name)(x, train=train)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.classes, name="classifier")(x)


class ResNet18(ResNet):
    """Stages on maps of 14, 14, 7 and 4 pixels a side."""

    block: type[BasicBlock] | type[Bottleneck] = BasicBlock
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    strides: tuple[int, ...] = (2, 1, 2, 2)
    width: int = 16


class ResNet50(ResNet):
    """Stages on maps of 14, 7, 7 and 4 pixels a side."""

    block: type[BasicBlock] | type[Bottleneck] = Bottleneck
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    strides: tuple[int, ...] = (2, 2, 1, 2)
    width: int = 12


NETWORKS = {"resnet18": ResNet18, "resnet50": ResNet50}
