"""What the zoo is made of: drawn numbers, layers in two libraries, forward passes.

A `Layer` builds one module in linen and in nnx; `net` makes a layer of a forward pass
and named layers, so that one description gives both twins, with equal paths.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

Model = tuple[Callable[..., Any], Any, tuple[Any, ...]]  # apply, params, inputs
Factory = Callable[[jax.Array], Model]
Inputs = Callable[[jax.Array], tuple[jax.Array, ...]]


# Numbers. Every leaf is drawn from its path, so twins agree, and nothing is zero.


def generator(key: jax.Array, name: str) -> np.random.Generator:
    seed = np.asarray(jax.random.key_data(key)).ravel().tolist()
    return np.random.default_rng([*seed, zlib.crc32(name.encode())])


def draw(key: jax.Array, name: str, like: Any) -> jax.Array:
    """Values for the parameter `name`; a quarter of the gains of a norm is negative."""
    rng, shape, leaf = generator(key, name), like.shape, name.rsplit("/", 1)[-1]
    if not jnp.issubdtype(like.dtype, jnp.floating):
        return jnp.zeros(shape, like.dtype)  # a counter of haiku's
    if "var_ema" in name or leaf == "var":
        values = rng.uniform(0.3, 3.0, shape)
    elif "mean_ema" in name or leaf in ("bias", "offset", "b", "mean"):
        values = rng.normal(0.0, 0.3, shape) + 0.1
    elif leaf in ("scale", "gain"):
        signs = np.where(np.arange(np.prod(shape)) % 4 == 2, -1.0, 1.0)
        values = rng.uniform(0.5, 1.5, shape) * signs.reshape(shape)
    elif leaf == "negative_slope":
        values = np.full(shape, 0.2)
    else:  # a weight; equinox puts its outputs first, all others last
        window = shape[1:] if leaf == "weight" else shape[:-1]
        values = rng.normal(0.0, np.sqrt(1.5 / max(1, np.prod(window))), shape)
    return jnp.asarray(np.asarray(values, like.dtype), like.dtype)


def parts(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The keys of a path as text, without the `.value` that nnx ends its paths in."""
    last, field = path[-1], jax.tree_util.GetAttrKey
    if isinstance(last, field) and last.name == "value" and len(path) > 1:
        path = path[:-1]
    fields = ("key", "idx", "name")
    return tuple(str(getattr(k, f)) for k in path for f in fields if hasattr(k, f))


def fill(tree: Any, key: jax.Array) -> Any:
    """The tree with every leaf drawn; its name leaves out the collection."""
    start = int(isinstance(tree, Mapping) and "params" in tree)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: draw(key, "/".join(parts(path)[start:]), leaf), tree
    )


def normal(*shape: int) -> Inputs:
    def inputs(key: jax.Array) -> tuple[jax.Array, ...]:
        values = generator(key, "input").normal(0.2, 1.0, shape)
        return (jax.device_put(np.float32(values)),)

    return inputs


def image(size: int = 8, channels: int = 3, batch: int = 2) -> Inputs:
    return normal(batch, size, size, channels)


def tokens(*shape: int, vocabulary: int) -> Inputs:
    def inputs(key: jax.Array) -> tuple[jax.Array, ...]:
        values = generator(key, "input").integers(0, vocabulary, shape)
        return (jax.device_put(np.int32(values)),)

    return inputs


# One description, two libraries.


@dataclass(frozen=True)
class Layer:
    linen: Callable[[], nn.Module]
    nnx: Callable[[nnx.Rngs], nnx.Module]


class LinenNet(nn.Module):
    forward: Callable[..., Any]
    layers: tuple[tuple[str, Layer], ...]

    def setup(self) -> None:
        for name, layer in self.layers:
            setattr(self, name, layer.linen())

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        return self.forward(self, *inputs, **kwargs)


class NnxNet(nnx.Module):
    def __init__(
        self, forward: Callable[..., Any], layers: Mapping[str, Layer], rngs: nnx.Rngs
    ) -> None:
        self.forward = forward
        for name, layer in layers.items():
            setattr(self, name, layer.nnx(rngs))

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        return self.forward(self, *inputs, **kwargs)


def net(forward: Callable[..., Any], **layers: Layer) -> Layer:
    """A module of `layers` whose call is `forward(module, *inputs, **kwargs)`."""
    return Layer(
        lambda: LinenNet(forward, tuple(layers.items())),
        lambda rngs: NnxNet(forward, layers, rngs),
    )


def functional(module: nnx.Module) -> tuple[Callable[..., Any], Any]:
    """The module as `apply, params`; to be replaced by `jaxmet.functional`."""
    graphdef, state = nnx.split(module)

    def apply(state: Any, *inputs: Any, **kwargs: Any) -> Any:
        return nnx.merge(graphdef, state)(*inputs, **kwargs)

    return apply, state


def linen_factory(layer: Layer, inputs: Inputs) -> Factory:
    def make(key: jax.Array) -> Model:
        module, arrays = layer.linen(), inputs(key)
        shapes = jax.eval_shape(module.init, jax.random.key(0), *arrays)
        return module.apply, fill(shapes, key), arrays

    return make


def nnx_factory(layer: Layer, inputs: Inputs) -> Factory:
    def make(key: jax.Array) -> Model:
        module = nnx.eval_shape(lambda: layer.nnx(nnx.Rngs(0)))
        apply, shapes = functional(module)
        return apply, fill(shapes, key), inputs(key)

    return make


def twins(layer: Layer, inputs: Inputs) -> dict[str, Factory]:
    return {"linen": linen_factory(layer, inputs), "nnx": nnx_factory(layer, inputs)}


# Layers.


def conv(cin: int, cout: int, size: int, **kw: Any) -> Layer:
    window = (size, size)
    return Layer(
        lambda: nn.Conv(cout, window, **kw),
        lambda rngs: nnx.Conv(cin, cout, window, rngs=rngs, **kw),
    )


def conv_transpose(cin: int, cout: int, size: int, **kw: Any) -> Layer:
    window = (size, size)
    return Layer(
        lambda: nn.ConvTranspose(cout, window, **kw),
        lambda rngs: nnx.ConvTranspose(cin, cout, window, rngs=rngs, **kw),
    )


def dense(cin: int, cout: int, **kw: Any) -> Layer:
    return Layer(
        lambda: nn.Dense(cout, **kw),
        lambda rngs: nnx.Linear(cin, cout, rngs=rngs, **kw),
    )


def embed(vocabulary: int, features: int) -> Layer:
    return Layer(
        lambda: nn.Embed(vocabulary, features),
        lambda rngs: nnx.Embed(vocabulary, features, rngs=rngs),
    )


def attention(features: int, heads: int) -> Layer:
    return Layer(
        lambda: nn.MultiHeadDotProductAttention(heads, qkv_features=features),
        lambda rngs: nnx.MultiHeadAttention(heads, features, decode=False, rngs=rngs),
    )


def batch_norm(channels: int) -> Layer:
    return Layer(
        lambda: nn.BatchNorm(epsilon=1e-3),
        lambda rngs: nnx.BatchNorm(channels, epsilon=1e-3, rngs=rngs),
    )


def layer_norm(channels: int) -> Layer:
    return Layer(nn.LayerNorm, lambda rngs: nnx.LayerNorm(channels, rngs=rngs))


def group_norm(channels: int, groups: int) -> Layer:
    return Layer(
        lambda: nn.GroupNorm(groups),
        lambda rngs: nnx.GroupNorm(channels, groups, rngs=rngs),
    )


def prelu() -> Layer:
    return Layer(nn.PReLU, lambda _: nnx.PReLU())


def dropout(rate: float) -> Layer:
    return Layer(
        lambda: nn.Dropout(rate), lambda _: nnx.Dropout(rate, deterministic=True)
    )


# Layers that repeat: over a stack of weights, over time.


def stacked(length: int, forward: Callable[..., Any], **layers: Layer) -> Layer:
    """Weights for `length` nets `(module, carry) -> (carry, None)`; see `repeat`."""
    scanned = nn.scan(
        LinenNet,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=length,
    )

    @nnx.split_rngs(splits=length)
    @nnx.vmap
    def build(rngs: nnx.Rngs) -> nnx.Module:
        return net(forward, **layers).nnx(rngs)

    return Layer(lambda: scanned(forward, tuple(layers.items())), build)


def repeat(stack: Any, x: jax.Array) -> jax.Array:
    if isinstance(stack, nn.Module):
        return stack(x)[0]
    graphdef, state = nnx.split(stack)
    return jax.lax.scan(lambda h, s: nnx.merge(graphdef, s)(h), x, state)[0]


def simple_rnn(cin: int, features: int) -> Layer:
    """`nn.RNN` of a `SimpleCell`, and the same recurrence by hand for nnx."""

    def step(m: Any, h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = jnp.tanh(m.i(x) + m.h(h))
        return h, h

    def over_time(m: Any, x: jax.Array) -> jax.Array:
        first = jnp.zeros((x.shape[0], features), x.dtype)
        _, hidden = jax.lax.scan(m.cell, first, jnp.swapaxes(x, 0, 1))
        return jnp.swapaxes(hidden, 0, 1)

    gates = {"i": dense(cin, features), "h": dense(features, features, use_bias=False)}
    return Layer(
        lambda: nn.RNN(nn.SimpleCell(features)),
        net(over_time, cell=net(step, **gates)).nnx,
    )


def lstm(features: int) -> Layer:
    """The cell whose eight kernels are concatenated into two; linen only."""

    def refuse(rngs: nnx.Rngs) -> nnx.Module:
        raise NotImplementedError("nnx keeps the gates of its LSTM in one kernel")

    return Layer(lambda: nn.RNN(nn.OptimizedLSTMCell(features)), refuse)
