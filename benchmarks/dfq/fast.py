"""The layers of the two networks in training, in forms that XLA's CPU back end likes.

Depthwise convolutions are sums of shifted inputs, forward and backward; norms are two
products and an affine map; 1x1 convolutions are matrix products.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

TAPS = [(i, j) for i in range(3) for j in range(3)]


def _windows(
    padded: jax.Array, kernel: jax.Array, stride: int, rate: int, sides: tuple[int, ...]
) -> jax.Array:
    """The depthwise sum over 3x3 windows of an input that is padded already."""
    spans = [stride * (side - 1) + 1 for side in sides]
    total = jnp.float32(0)
    for i, j in TAPS:
        rows = slice(i * rate, i * rate + spans[0], stride)
        columns = slice(j * rate, j * rate + spans[1], stride)
        total += padded[:, rows, columns] * kernel[i, j]
    return total


def _pads(x: jax.Array, stride: int, rate: int) -> list[tuple[int, int]]:
    window = (2 * rate + 1,) * 2
    return list(lax.padtype_to_pads(x.shape[1:3], window, (stride, stride), "SAME"))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise(x: jax.Array, kernel: jax.Array, stride: int, rate: int) -> jax.Array:
    """A 3x3 'SAME' depthwise convolution of images, kernel `(3, 3, 1, channels)`."""
    padded = jnp.pad(x, ((0, 0), *_pads(x, stride, rate), (0, 0)))
    sides = tuple(-(-side // stride) for side in x.shape[1:3])
    return _windows(padded, kernel, stride, rate, sides)


def _forward(x: jax.Array, kernel: jax.Array, stride: int, rate: int) -> Any:
    return depthwise(x, kernel, stride, rate), (x, kernel)


def _backward(stride: int, rate: int, saved: Any, g: jax.Array) -> Any:
    x, kernel = saved
    pads = _pads(x, stride, rate)
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    batch, *sides, channels = g.shape
    spans = [stride * (side - 1) + 1 for side in sides]
    edges = [
        (2 * rate - low, size + low - span, stride - 1)
        for (low, _), size, span in zip(pads, x.shape[1:3], spans, strict=True)
    ]
    spread = lax.pad(g, jnp.float32(0), ((0, 0, 0), *edges, (0, 0, 0)))
    dx = _windows(spread, kernel[::-1, ::-1], 1, rate, x.shape[1:3])

    # One tap at a time: fused into one kernel, the nine sums take four times as long.
    def tap(at: jax.Array) -> jax.Array:
        start = (0, at[0] * rate, at[1] * rate, 0)
        part = lax.dynamic_slice(padded, start, (batch, *spans, channels))
        return jnp.sum(part[:, ::stride, ::stride] * g, axis=(0, 1, 2))

    return dx, lax.map(tap, jnp.asarray(TAPS)).reshape(kernel.shape)


depthwise.defvjp(_forward, _backward)


def norm(layer: nn.BatchNorm, x: jax.Array) -> jax.Array:
    """A batch norm in training: its sums as products, one multiply and one add."""
    flat = x.reshape(-1, x.shape[-1])
    mean = jnp.einsum("nc->c", flat) / len(flat)
    variance = jnp.einsum("nc,nc->c", flat, flat) / len(flat) - mean**2
    for name, new in (("mean", mean), ("var", variance)):
        old = layer.get_variable("batch_stats", name)
        moved = layer.momentum * old + (1 - layer.momentum) * new
        layer.put_variable("batch_stats", name, moved)
    gain = layer.get_variable("params", "scale") * lax.rsqrt(variance + layer.epsilon)
    shift = layer.get_variable("params", "bias") - mean * gain
    return (flat * gain[None] + shift[None]).reshape(x.shape)


def convolution(layer: nn.Conv, x: jax.Array) -> jax.Array | None:
    """A depthwise 3x3 or a 1x1 convolution; None for another one."""
    kernel = layer.get_variable("params", "kernel")
    if layer.feature_group_count > 1:
        return depthwise(x, kernel, layer.strides[0], layer.kernel_dilation[0])
    if layer.kernel_size != (1, 1):
        return None
    down, across = layer.strides or (1, 1)
    x = x[:, ::down, ::across]
    y = (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:3], -1)
    return y + layer.get_variable("params", "bias") if layer.use_bias else y


def fast_layers(
    call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], info: Any
) -> Any:
    """For `nn.intercept_methods`."""
    result = None
    if info.method_name == "__call__" and isinstance(info.module, nn.BatchNorm):
        result = norm(info.module, *args)
    if info.method_name == "__call__" and isinstance(info.module, nn.Conv):
        result = convolution(info.module, *args)
    return call(*args, **kwargs) if result is None else result
