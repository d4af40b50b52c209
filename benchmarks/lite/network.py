"""EfficientNet-Lite in flax linen and nnx: one table of stages, widths and depths as data.

Tan and Le, [EfficientNet](https://arxiv.org/abs/1905.11946), ICML 2019, without
squeeze-and-excitation and with ReLU6 in place of swish; stem and head keep their size.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

EPSILON = 1e-3
CLASSES = 1000
STEM, HEAD = 32, 1280
STAGES = (  # repeats, kernel, stride, expansion, width
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


@dataclasses.dataclass(frozen=True)
class Variant:
    """Factors of width and depth, and the side of the pictures in pixels."""

    width: float
    depth: float
    pixels: int


FAMILY = {
    "lite0": Variant(1.0, 1.0, 224),
    "lite1": Variant(1.0, 1.1, 240),
    "lite2": Variant(1.1, 1.2, 260),
    "lite3": Variant(1.2, 1.4, 280),
    "lite4": Variant(1.4, 1.8, 300),
}


@dataclasses.dataclass(frozen=True)
class Block:
    """Expand by 1x1, filter each channel, project by 1x1; add the input where it fits."""

    ins: int
    outs: int
    kernel: int
    stride: int
    expansion: int

    @property
    def wide(self) -> int:
        return self.ins * self.expansion

    @property
    def residual(self) -> bool:
        return self.stride == 1 and self.ins == self.outs


def blocks(variant: Variant) -> list[Block]:
    """All blocks in order. The first and the last stage are not repeated more often."""
    found, ins = [], STEM
    for i, (repeats, kernel, stride, expansion, width) in enumerate(STAGES):
        outs = _rounded(width * variant.width)
        fixed = i in (0, len(STAGES) - 1)
        number = repeats if fixed else math.ceil(repeats * variant.depth)
        for j in range(number):
            found.append(Block(ins, outs, kernel, stride if j == 0 else 1, expansion))
            ins = outs
    return found


def _rounded(width: float) -> int:
    """The nearest multiple of 8 that is not more than 10 % smaller."""
    nearest = max(8, int(width + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * width else nearest


def relu6(x: jax.Array) -> jax.Array:
    return jnp.clip(x, 0.0, 6.0)


class LinenBlock(nn.Module):
    block: Block
    train: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, y = self.block, x
        if b.expansion != 1:
            y = relu6(self.conv_bn(y, "expand", b.wide, 1))
        y = relu6(self.conv_bn(y, "depthwise", b.wide, b.kernel, b.stride, b.wide))
        y = self.conv_bn(y, "project", b.outs, 1)
        return x + y if b.residual else y

    def conv_bn(
        self,
        x: jax.Array,
        name: str,
        outs: int,
        k: int,
        stride: int = 1,
        groups: int = 1,
    ) -> jax.Array:
        return conv_bn(x, name, outs, k, stride, groups, self.train)


def conv_bn(
    x: jax.Array, name: str, outs: int, k: int, stride: int, groups: int, train: bool
) -> jax.Array:
    """Convolution without bias and batch norm, inside a compact linen module."""
    x = nn.Conv(
        outs, (k, k), stride, feature_group_count=groups, use_bias=False, name=name
    )(x)
    return nn.BatchNorm(not train, epsilon=EPSILON, name=f"{name}_bn")(x)


class LinenLite(nn.Module):
    """`[batch, pixels, pixels, 3]` float32 -> `[batch, 1000]` logits."""

    variant: Variant = FAMILY["lite0"]
    train: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = relu6(conv_bn(x, "stem", STEM, 3, 2, 1, self.train))
        for i, block in enumerate(blocks(self.variant)):
            x = LinenBlock(block, self.train, name=f"block{i}")(x)
        x = relu6(conv_bn(x, "head", HEAD, 1, 1, 1, self.train))
        return nn.Dense(CLASSES, name="classifier")(jnp.mean(x, axis=(1, 2)))


class ConvNorm(nnx.Module):
    """Adds a convolution and its batch norm to a module, under linen's names."""

    def add(
        self,
        name: str,
        ins: int,
        outs: int,
        k: int,
        stride: int,
        groups: int,
        rngs: Any,
    ) -> None:
        conv = nnx.Conv(
            ins,
            outs,
            (k, k),
            stride,
            feature_group_count=groups,
            use_bias=False,
            rngs=rngs,
        )
        setattr(self, name, conv)
        norm = nnx.BatchNorm(outs, use_running_average=True, epsilon=EPSILON, rngs=rngs)
        setattr(self, f"{name}_bn", norm)

    def conv_bn(self, x: jax.Array, name: str) -> jax.Array:
        return getattr(self, f"{name}_bn")(getattr(self, name)(x))


class NnxBlock(ConvNorm):
    def __init__(self, block: Block, rngs: nnx.Rngs):
        b = self.block = block
        if b.expansion != 1:
            self.add("expand", b.ins, b.wide, 1, 1, 1, rngs)
        self.add("depthwise", b.wide, b.wide, b.kernel, b.stride, b.wide, rngs)
        self.add("project", b.wide, b.outs, 1, 1, 1, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x
        if self.block.expansion != 1:
            y = relu6(self.conv_bn(y, "expand"))
        y = relu6(self.conv_bn(y, "depthwise"))
        y = self.conv_bn(y, "project")
        return x + y if self.block.residual else y


class NnxLite(ConvNorm):
    """`[batch, pixels, pixels, 3]` float32 -> `[batch, 1000]` logits."""

    def __init__(self, variant: Variant, rngs: nnx.Rngs):
        every = blocks(variant)
        self.number = len(every)
        self.add("stem", 3, STEM, 3, 2, 1, rngs)
        for i, block in enumerate(every):
            setattr(self, f"block{i}", NnxBlock(block, rngs))
        self.add("head", every[-1].outs, HEAD, 1, 1, 1, rngs)
        self.classifier = nnx.Linear(HEAD, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = relu6(self.conv_bn(x, "stem"))
        for i in range(self.number):
            x = getattr(self, f"block{i}")(x)
        x = relu6(self.conv_bn(x, "head"))
        return self.classifier(jnp.mean(x, axis=(1, 2)))


def nnx_of(variant: Variant, variables: dict[str, Any]) -> NnxLite:
    """The nnx module that holds the values of linen variables."""
    model = nnx.eval_shape(lambda: NnxLite(variant, nnx.Rngs(0)))
    graph, state = nnx.split(model)
    flat = {"/".join(map(str, path)): v for path, v in nnx.to_flat_state(state)}
    values = {}
    for collection in variables.values():
        for path, leaf in jax.tree_util.tree_leaves_with_path(collection):
            values["/".join(str(key.key) for key in path)] = leaf
    missing = flat.keys() ^ values.keys()
    if missing:
        raise ValueError(f"linen and nnx differ in {sorted(missing)[0]!r}")
    new = [
        (path, v.replace(values["/".join(map(str, path))]))
        for path, v in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(new))
