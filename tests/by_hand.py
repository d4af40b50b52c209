"""Models of the zoo written out by hand, for what puts numbers on a grid.

    MODELS['residual'](get, tap, *inputs)

`get(name)` gives a parameter and `tap(node, value)` sees, and may change, every value that
has a name. Derived weights go through `tap` too. What a tap does makes the oracle: record
ranges, round to quantizers computed in numpy, round with a straight-through gradient.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.nn import relu

from zoo_nets import parts

Get = Callable[[str], Any]
Tap = Callable[..., Any]

x64 = getattr(jax, "enable_x64", None)
if x64 is None:
    from jax.experimental import enable_x64 as x64


def named(params: Any) -> dict[str, Any]:
    """The leaves by their paths without the collection."""
    start = int("params" in params)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(parts(path)[start:]): leaf for path, leaf in leaves}


def wide(tree: Any) -> Any:
    """Floats in float64; under `x64(True)` no rounding is ever close to a tie."""
    return jax.tree.map(
        lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        tree,
    )


# Layers.


def along_last(a: Any, b: Any) -> Any:
    return b.reshape((1,) * (a.ndim - b.ndim) + b.shape)


def conv(get: Get, name: str, x: Any, groups: int = 1) -> Any:
    layout = ("NHWC", "HWIO", "NHWC")
    kernel = get(f"{name}/kernel")
    y = lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=layout, feature_group_count=groups
    )
    bias = get(f"{name}/bias")
    return y if bias is None else y + along_last(y, bias)


def dense(
    get: Get, name: str, x: Any, kernel: str = "kernel", bias: str = "bias"
) -> Any:
    y = x @ get(f"{name}/{kernel}")
    b = get(f"{name}/{bias}")
    return y if b is None else y + along_last(y, b)


def norm(get: Get, name: str, x: Any) -> Any:
    root = jnp.sqrt(get(f"{name}/var") + 1e-3)
    y = (x - along_last(x, get(f"{name}/mean"))) / along_last(x, root)
    return y * along_last(x, get(f"{name}/scale")) + along_last(x, get(f"{name}/bias"))


def layer_norm(get: Get, name: str, x: Any) -> Any:
    y = x - jnp.mean(x, -1, keepdims=True)
    y = y / jnp.sqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-6)
    return y * along_last(x, get(f"{name}/scale")) + along_last(x, get(f"{name}/bias"))


def relu6(x: Any) -> Any:
    return jnp.clip(x, 0.0, 6.0)


# Models.


def conv_bn_relu(get: Get, tap: Tap, x: Any) -> Any:
    y = norm(get, "stem_bn", conv(get, "stem", tap("input", x)))
    return tap("head", conv(get, "head", tap("stem/relu", relu(y))))


def inverted_residual(get: Get, tap: Tap, x: Any) -> Any:
    x = tap("input", x)
    y = tap("expand/clip", relu6(norm(get, "expand_bn", conv(get, "expand", x))))
    y = norm(get, "depthwise_bn", conv(get, "depthwise", y, groups=y.shape[-1]))
    y = conv(get, "project", tap("depthwise/clip", relu6(y)))
    return tap("project/add", x + tap("project_bn", norm(get, "project_bn", y)))


def residual(get: Get, tap: Tap, x: Any) -> Any:
    x = tap("input", x)
    y = tap("conv1/relu", relu(norm(get, "bn1", conv(get, "conv1", x))))
    y = tap("bn2", norm(get, "bn2", conv(get, "conv2", y)))
    return tap("conv2/relu", relu(y + x))


def clip_after_add(get: Get, tap: Tap, x: Any) -> Any:
    x = tap("stem/relu", relu(conv(get, "stem", tap("input", x))))
    y = tap("branch/clip", relu6(x + tap("branch", conv(get, "branch", x))))
    return tap("head", conv(get, "head", y))


def concatenation(get: Get, tap: Tap, x: Any) -> Any:
    x = tap("stem/relu", relu(conv(get, "stem", tap("input", x))))
    left = tap("left/relu", relu(conv(get, "left", x)))
    right = tap("right/relu", relu(conv(get, "right", x)))
    y = tap("right/concat", jnp.concatenate([left, right], -1))
    return tap("merge", conv(get, "merge", y))


def windows(x: Any) -> Any:
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c)


def pooling(get: Get, tap: Tap, x: Any) -> Any:
    x = tap("first/relu", relu(conv(get, "first", tap("input", x))))
    x = jnp.max(windows(x), (2, 4))
    x = tap("second/relu", relu(conv(get, "second", x)))
    x = tap("second/pool", jnp.sum(windows(x), (2, 4)) / 4.0)
    return tap("third", conv(get, "third", x))


def transformer(get: Get, tap: Tap, x: Any) -> Any:
    def heads(name: str, y: Any) -> Any:
        y = jnp.einsum("btd,dhk->bthk", y, get(f"attn/{name}/kernel"))
        return tap(f"attn/{name}", y + along_last(y, get(f"attn/{name}/bias")))

    x = tap("input", x)
    y = tap("ln1", layer_norm(get, "ln1", x))
    q, k, v = heads("query", y), heads("key", y), heads("value", y)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q / np.sqrt(q.shape[-1]), k)
    scores = tap("attn/key/matmul", scores)
    scores = tap("attn/key/softmax", jax.nn.softmax(scores))
    y = tap("attn/value/matmul", jnp.einsum("bhqk,bkhd->bqhd", scores, v))
    y = jnp.einsum("bthk,hko->bto", y, get("attn/out/kernel"))
    y = tap("attn/out", y + along_last(y, get("attn/out/bias")))
    x = tap("attn/out/add", x + y)
    y = tap("up", dense(get, "up", tap("ln2", layer_norm(get, "ln2", x))))
    y = tap("up/gelu", jax.nn.gelu(y))
    return tap("down/add", x + tap("down", dense(get, "down", y)))


def embedding(get: Get, tap: Tap, ids: Any) -> Any:
    x = tap("embed", jnp.take(get("embed/embedding"), ids, axis=0))
    x = tap("first/relu", relu(dense(get, "first", x)))
    return tap("second", dense(get, "second", x))


def scan(get: Get, tap: Tap, x: Any) -> Any:
    x = tap("input", x)
    for i in range(3):
        kernel, bias = get("stack/dense/kernel")[i], get("stack/dense/bias")[i]
        x = tap("stack/dense/relu", relu(x @ kernel + along_last(x, bias)), layer=i)
    return tap("head", dense(get, "head", x))


def conditional(get: Get, tap: Tap, x: Any) -> Any:
    x = tap("input", x)
    high = tap("high/relu", relu(dense(get, "high", x)), taken=jnp.sum(x) > 0)
    low = tap("low/relu", relu(dense(get, "low", x)), taken=jnp.sum(x) <= 0)
    return tap("head", dense(get, "head", jnp.where(jnp.sum(x) > 0, high, low)))


def lstm(get: Get, tap: Tap, x: Any) -> Any:
    """The hidden state's kernels are one derived weight, the input's another."""
    cell, gates = "rnn/cell", "ifgo"
    of_h = np.concatenate([get(f"{cell}/h{g}/kernel") for g in gates], -1)
    of_x = np.concatenate([get(f"{cell}/i{g}/kernel") for g in gates], -1)
    bias = np.concatenate([get(f"{cell}/h{g}/bias") for g in gates])
    of_h, of_x = (
        tap("rnn/cell", of_h, weight=True),
        tap("rnn/cell:1", of_x, weight=True),
    )
    at = "rnn/cell:1/"
    x = tap("input", x)
    h, every = jnp.zeros((x.shape[0], 6), x.dtype), []
    c = h
    for t in range(x.shape[1]):
        a = h @ of_h
        a = tap("rnn/cell", a + along_last(a, bias))
        b = tap("rnn/cell:1", x[:, t] @ of_x)
        both = zip(jnp.split(a, 4, -1), jnp.split(b, 4, -1), strict=True)
        sums = ["add", "add:1", "add:2", "add:3"]
        i, f, g, o = (tap(at + n, p + q) for n, (p, q) in zip(sums, both, strict=True))
        i = tap(at + "sigmoid", jax.nn.sigmoid(i))
        f = tap(at + "sigmoid:1", jax.nn.sigmoid(f))
        g = tap(at + "tanh", jnp.tanh(g))
        o = tap(at + "sigmoid:2", jax.nn.sigmoid(o))
        kept, new = tap(at + "multiply", f * c), tap(at + "multiply:1", i * g)
        c = tap(at + "add:4", kept + new)
        h = tap(at + "multiply:2", o * tap(at + "tanh:1", jnp.tanh(c)))
        every.append(h)
    return tap("head", dense(get, "head", jnp.stack(every, 1)))


MODELS: dict[str, Callable[..., Any]] = {
    "conv_bn_relu": conv_bn_relu,
    "inverted_residual": inverted_residual,
    "residual": residual,
    "clip_after_add": clip_after_add,
    "concatenation": concatenation,
    "pooling": pooling,
    "transformer": transformer,
    "embedding": embedding,
    "scan": scan,
    "cond": conditional,
    "lstm": lstm,
}


# What a tap may do.


def numbers(params: Any) -> dict[str, np.ndarray]:
    """The named leaves in numpy, so that they are concrete inside `jax.jit` too."""
    return {name: np.asarray(leaf) for name, leaf in named(params).items()}


def ranges(name: str, params: Any, batches: list[tuple]) -> dict[str, tuple]:
    """The smallest and largest value of every node over all batches, one pair per layer."""
    leaves = numbers(params)

    @jax.jit
    def seen(*batch):
        found: dict = defaultdict(lambda: defaultdict(list))

        def tap(node, value, layer=0, taken=True, weight=False):
            if not weight:
                low = jnp.where(taken, jnp.min(value), jnp.inf)
                high = jnp.where(taken, jnp.max(value), -jnp.inf)
                found[node][layer].append((low, high))
            return value

        MODELS[name](leaves.get, tap, *batch)
        return {n: [layers[i] for i in sorted(layers)] for n, layers in found.items()}

    every = [jax.device_get(seen(*batch)) for batch in batches]
    both = {}
    for node, layers in every[0].items():
        pairs = [
            np.concatenate([e[node][i] for e in every]) for i in range(len(layers))
        ]
        lows, highs = [p[:, 0].min() for p in pairs], [p[:, 1].max() for p in pairs]
        both[node] = (np.squeeze(lows), np.squeeze(highs))
    return both


def grid(low: Any, high: Any, bits: int, symmetric: bool = False) -> tuple:
    """Scale, zero point, and ends of the activation quantizer of a range, in float64."""
    low = np.minimum(np.asarray(low, np.float64), 0)
    high = np.maximum(np.asarray(high, np.float64), 0)
    if symmetric and np.min(low) < 0:
        half = 2.0 ** (bits - 1)
        return np.maximum(high / (half - 1), -low / half), 0.0 * low, -half, half - 1
    top = 2.0**bits - 1
    scale = np.maximum((high if symmetric else high - low) / top, 2.0**-60)
    zero_point = 0.0 * low if symmetric else np.clip(np.rint(-low / scale), 0, top)
    return scale, zero_point, 0.0, top


def weight_on_grid(w: Any, axes: tuple[int, ...], bits: int) -> Any:
    """Symmetric, narrow, with a scale of its own for each index of `axes`."""
    others = tuple(i for i in range(w.ndim) if i not in axes)
    top = 2.0 ** (bits - 1) - 1
    scale = np.max(np.abs(np.asarray(w)), others, keepdims=True) / top
    return scale * np.rint(np.asarray(w) / scale)


def rounded(x: Any, scale: Any, zero_point: Any, low: float, high: float) -> Any:
    s, z = (jnp.asarray(np.asarray(a), x.dtype) for a in (scale, zero_point))
    return s * (jnp.clip(jnp.round(x / s) + z, low, high) - z)


def best_fit(hidden, wanted, kept, *, bias=True):
    """Least squares on some columns, with an intercept or not: coefficients and loss."""
    rows = np.asarray(hidden, np.float64)[:, list(kept)]
    if bias:
        rows = np.concatenate([rows, np.ones((len(rows), 1))], 1)
    found = np.linalg.lstsq(rows, np.asarray(wanted, np.float64), rcond=None)[0]
    return found, np.sum((rows @ found - wanted) ** 2)
