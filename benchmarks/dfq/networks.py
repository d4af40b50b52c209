"""A DeepLabV3+-style segmentation net and an SSD-Lite-style detector, both small.

Both stand on a MobileNetV2: Sandler et al., [MobileNetV2: Inverted Residuals and Linear
Bottlenecks](https://arxiv.org/abs/1801.04381), CVPR 2018, which also describes SSD-Lite.
The decoder is that of Chen et al., [Encoder-Decoder with Atrous Separable Convolution
for Semantic Image Segmentation](https://arxiv.org/abs/1802.02611), ECCV 2018. Norms are
named after the convolution before them, `X_bn` after `X`.
"""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

HERE = Path(__file__).resolve().parent
CLASSES = 11  # class 0 is the background
STEM = 16
# name, output channels, expansion, stride, rate of the depthwise convolution
SHALLOW = (
    ("block1", 16, 1, 2, 1),
    ("block2", 24, 6, 1, 1),
    ("block3", 24, 6, 1, 1),
    ("block4", 32, 6, 2, 1),
    ("block5", 32, 6, 1, 1),
)
# Where the detector strides, DeepLab keeps the resolution and dilates what follows.
ATROUS = (("block6", 80, 6, 1, 1), ("block7", 80, 6, 1, 2), ("block8", 80, 6, 1, 2))
STRIDED = (("block6", 80, 6, 2, 1), ("block7", 80, 6, 1, 1), ("block8", 80, 6, 1, 1))
EXTRA = ("block9", 96, 4, 2, 1)
LOW_LEVEL = "block3"
RATES = (2, 4)
WIDTH = 64
ANCHORS = 6  # a cell

Tree = dict[str, Any]
Block = tuple[str, int, int, int, int]


def unit(
    x: jax.Array,
    name: str,
    features: int,
    *,
    train: bool,
    window: int = 1,
    stride: int = 1,
    rate: int = 1,
    depthwise: bool = False,
    linear: bool = False,
) -> jax.Array:
    """Convolution, batch norm, ReLU6 unless `linear`: inside a compact module."""
    x = nn.Conv(
        features,
        (window, window),
        strides=(stride, stride),
        kernel_dilation=(rate, rate),
        feature_group_count=features if depthwise else 1,
        use_bias=False,
        kernel_init=nn.initializers.he_normal(),
        name=name,
    )(x)
    x = nn.BatchNorm(
        use_running_average=not train, momentum=0.99, epsilon=1e-3, name=f"{name}_bn"
    )(x)
    return x if linear else nn.relu6(x)


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; added to the input where shapes allow."""

    features: int
    expansion: int
    stride: int
    rate: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        wide = self.expansion * x.shape[-1]
        y = unit(x, "expand", wide, train=train) if self.expansion > 1 else x
        y = unit(
            y,
            "depthwise",
            wide,
            train=train,
            window=3,
            stride=self.stride,
            rate=self.rate,
            depthwise=True,
        )
        y = unit(y, "project", self.features, train=train, linear=True)
        return x + y if x.shape == y.shape else y


class Separable(nn.Module):
    """A depthwise and a pointwise convolution, each with norm and ReLU6."""

    features: int
    rate: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        channels = x.shape[-1]
        x = unit(
            x,
            "depthwise",
            channels,
            train=train,
            window=3,
            rate=self.rate,
            depthwise=True,
        )
        return unit(x, "pointwise", self.features, train=train)


class Backbone(nn.Module):
    """Images to the outputs of all blocks, by name."""

    blocks: tuple[Block, ...]

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        x = unit(x, "stem", STEM, train=train, window=3, stride=2)
        outputs = {}
        for name, features, expansion, stride, rate in self.blocks:
            block = InvertedResidual(features, expansion, stride, rate, name=name)
            outputs[name] = x = block(x, train=train)
        return outputs


class AtrousPyramid(nn.Module):
    """One map seen at several rates and as a whole, concatenated and mixed."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        whole = jnp.mean(x, axis=(1, 2), keepdims=True)
        whole = unit(whole, "pooled", WIDTH, train=train)
        branches = [unit(x, "point", WIDTH, train=train)]
        branches += [
            Separable(WIDTH, rate, name=f"rate{rate}")(x, train=train) for rate in RATES
        ]
        branches += [jnp.broadcast_to(whole, branches[0].shape)]
        return unit(jnp.concatenate(branches, -1), "merge", WIDTH, train=train)


def resized(x: jax.Array, like: jax.Array) -> jax.Array:
    """Bilinear, to the height and width of `like`."""
    shape = (x.shape[0], *like.shape[1:3], x.shape[-1])
    return jax.image.resize(x, shape, "bilinear")


class DeepLab(nn.Module):
    """Images `(batch, height, width, 3)` to logits of the same size, for every class."""

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        features = Backbone(SHALLOW + ATROUS, name="backbone")(images, train=train)
        low = features[LOW_LEVEL]
        x = AtrousPyramid(name="aspp")(features["block8"], train=train)
        skip = unit(low, "skip", 24, train=train)
        x = jnp.concatenate([resized(x, low), skip], -1)
        x = Separable(WIDTH, name="decoder")(x, train=train)
        x = nn.Conv(CLASSES, (1, 1), name="classifier")(x)
        return resized(x, images)


class Detector(nn.Module):
    """Images `(batch, 96, 96, 3)` to box codes and class logits of every anchor.

    `(batch, anchors, 4)` and `(batch, anchors, classes)`; `boxes.decode` and
    `boxes.suppress` make detections of them, outside the model.
    """

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        blocks = (*SHALLOW, *STRIDED, EXTRA)
        features = Backbone(blocks, name="backbone")(images, train=train)
        codes, logits = [], []
        for name in ("block5", "block8", "block9"):
            x = features[name]
            found = []
            for head, size in (("box", 4), ("class", CLASSES)):
                y = unit(
                    x,
                    f"{name}_{head}_depthwise",
                    x.shape[-1],
                    train=train,
                    window=3,
                    depthwise=True,
                )
                y = nn.Conv(ANCHORS * size, (1, 1), name=f"{name}_{head}")(y)
                found.append(y.reshape(y.shape[0], -1, size))
            codes.append(found[0])
            logits.append(found[1])
        return jnp.concatenate(codes, 1), jnp.concatenate(logits, 1)


NETWORKS = {"deeplab": DeepLab, "ssd": Detector}


def save_weights(path: Path, variables: Tree) -> None:
    """One float32 array a parameter, named by its path; no pickle."""
    flat, _ = jax.tree.flatten_with_path(variables)
    arrays = {"/".join(key.key for key in path): np.asarray(x) for path, x in flat}
    np.savez_compressed(path, **arrays)


def load_weights(path: Path) -> Tree:
    """The variables of a network: `{'params': …, 'batch_stats': …}`."""
    variables: Tree = {}
    with np.load(path, allow_pickle=False) as arrays:
        for name in arrays.files:
            *above, leaf = name.split("/")
            branch = variables
            for key in above:
                branch = branch.setdefault(key, {})
            branch[leaf] = jnp.asarray(arrays[name], jnp.float32)
    return variables


def trained(name: str) -> Tree:
    """The committed variables of 'deeplab' or 'ssd'; `train_dfq.py` makes them."""
    return load_weights(HERE / f"{name}.npz")
