"""A small MobileNetV2 for 28x28 grey images: what the demo quantizes.

Every block widens its input six times, filters each channel by itself and narrows
again, without an activation after the narrow layer (Sandler et al., [MobileNetV2:
Inverted Residuals and Linear Bottlenecks](https://arxiv.org/abs/1801.04381), CVPR
2018). Depthwise kernels see one channel each, so their ranges drift far apart in
training: one scale for the whole tensor serves most of them badly.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

EXPANSION = 6
STEM = 16
HEAD = 128
# name, output channels, stride
BLOCKS = (
    ("block1", 16, 1),
    ("block2", 24, 2),
    ("block3", 24, 1),
    ("block4", 40, 1),
    ("block5", 40, 1),
)


def _conv(
    features: int, window: int, stride: int, name: str, groups: int = 1
) -> nn.Conv:
    """A convolution without a bias: the norm after it has one."""
    return nn.Conv(
        features,
        (window, window),
        strides=(stride, stride),
        feature_group_count=groups,
        use_bias=False,
        kernel_init=nn.initializers.he_normal(),
        name=name,
    )


def _norm(train: bool, name: str) -> nn.BatchNorm:
    return nn.BatchNorm(
        use_running_average=not train, momentum=0.99, epsilon=1e-3, name=name
    )


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; added to the input where shapes allow."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        channels = x.shape[-1]
        wide = EXPANSION * channels
        norm = partial(_norm, train)
        y = _conv(wide, 1, 1, "expand")(x)
        y = nn.relu6(norm("expand_bn")(y))
        y = _conv(wide, 3, self.stride, "depthwise", groups=wide)(y)
        y = nn.relu6(norm("depthwise_bn")(y))
        y = norm("project_bn")(_conv(self.features, 1, 1, "project")(y))
        return x + y if x.shape == y.shape else y


class Network(nn.Module):
    """Images `(batch, 28, 28, 1)` in 0 to 1, to logits `(batch, classes)`."""

    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        x = _conv(STEM, 3, 2, "stem")(x)
        x = nn.relu6(_norm(train, "stem_bn")(x))
        for name, features, stride in BLOCKS:
            x = InvertedResidual(features, stride, name=name)(x, train=train)
        x = _conv(HEAD, 1, 1, "head")(x)
        x = nn.relu6(_norm(train, "head_bn")(x))
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.classes, name="classifier")(x)
