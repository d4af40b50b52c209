"""Small networks drawn block by block, and what their equations hold, counted by hand.

net = Net(("attention @", "residual"), "mean", TOKENS)
net(net.params, tokens)
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax

STEPS, WIDTH = 4, 6  # of a sequence; images are STEPS × STEPS × WIDTH
Weight = Callable[..., Any]


def dense(w: Weight, h: Any, out: int = WIDTH) -> Any:
    return h @ w(h.shape[-1], out)


def along(v: Any, h: Any) -> Any:
    return v.reshape((1,) * (h.ndim - 1) + v.shape)


def with_bias(w, h):
    return dense(w, h) + along(w(WIDTH), h)


def attention_operator(w, h):
    q, k, v = (dense(w, h) for _ in range(3))
    return h + jax.nn.softmax(q @ k.swapaxes(-1, -2) / 2.0) @ v


def attention_einsum(w, h):
    q, k, v = (jnp.einsum("btd,dhe->bthe", h, w(WIDTH, 2, 3)) for _ in range(3))
    scores = jax.nn.softmax(jnp.einsum("bthe,bshe->bhts", q, k))
    out = jnp.einsum("bhts,bshe->bthe", scores, v)
    return h + jnp.einsum("bthe,hed->btd", out, w(2, 3, WIDTH))


def attention_matmul(w, h):
    shape = (h.shape[0], STEPS, 2, 3)
    q, k, v = (dense(w, h).reshape(shape).transpose(0, 2, 1, 3) for _ in range(3))
    scores = jax.nn.softmax(jnp.matmul(q, k.transpose(0, 1, 3, 2)))
    out = jnp.matmul(scores, v).transpose(0, 2, 1, 3).reshape(h.shape)
    return h + dense(w, out)


def attention_of_each(w, h):
    weight = w(WIDTH, WIDTH)
    return jax.vmap(lambda t: t + jax.nn.softmax((t @ weight) @ t.T) @ t)(h)


def residual(w, h):
    return h + dense(w, jax.nn.gelu(dense(w, h, 2 * WIDTH)))


def concatenated(w, h):
    return jnp.concatenate([dense(w, h, 3), jax.nn.relu(dense(w, h, 3))], -1)


def layer_norm(w, h):
    mean = h.mean(-1, keepdims=True)
    spread = jnp.square(h - mean).mean(-1, keepdims=True)
    scale, bias = (along(w(WIDTH), h) for _ in range(2))
    return (h - mean) * lax.rsqrt(spread + 1e-5) * scale + bias


def of_each(w, h):
    weight = w(WIDTH, WIDTH)
    return jax.vmap(lambda t: jnp.tanh(t @ weight))(h)


def scanned(w, h):
    body = lambda carry, weight: (jax.nn.relu(carry @ weight) + carry, None)
    return lax.scan(body, h, w(2, WIDTH, WIDTH))[0]


def experts(w, h):
    gates = jax.nn.softmax(dense(w, h, 2))
    out = jnp.einsum("btd,edf->btef", h, w(2, WIDTH, WIDTH))
    return (out * gates[..., None]).sum(2)


def tiled(w, h):
    both = dense(w, jnp.tile(h, (2, 1, 1)))
    return both[: h.shape[0]] + both[h.shape[0] :]


def halves(w, h):
    one, two = jnp.split(h, 2, axis=1)
    return jnp.concatenate([dense(w, one), dense(w, two)], 1)


def stack_and_sum(w, h):
    return jnp.stack([dense(w, h), jnp.tanh(h)]).sum(0)


def positions(w, h):
    return h + w(1, STEPS, WIDTH)


def class_token(w, h):
    token = jnp.broadcast_to(w(1, 1, WIDTH), (h.shape[0], 1, WIDTH))
    return dense(w, jnp.concatenate([token, h], 1))[:, 1:]


def gated(w, h):
    gate = dense(w, jax.nn.relu(dense(w, h.mean(1), 2)))
    return h * jax.nn.sigmoid(gate)[:, None]


def looked_up(w, h):
    return h + w(9, WIDTH)[jnp.argmax(h, -1)]


def products_of_activations(w, h):
    return dense(w, jnp.matmul(jnp.matmul(h, h.swapaxes(1, 2)), h))


def merged(w, h):
    return dense(w, h.reshape(-1, WIDTH)).reshape(h.shape)


def mixer(w, h):
    return h + jax.nn.relu(h.transpose(0, 2, 1) @ w(STEPS, STEPS)).transpose(0, 2, 1)


def pooled_by_attention(w, h):
    scores = jax.nn.softmax(dense(w, h, 1).squeeze(-1))
    return h + scores[:, None, :] @ h


def convolution(w, h, stride=1, groups=1):
    spatial = "HW"[: h.ndim - 2]
    layout = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    kernel = w(*(3,) * len(spatial), h.shape[-1] // groups, WIDTH)
    return lax.conv_general_dilated(
        h,
        kernel,
        (stride,) * len(spatial),
        "SAME",
        dimension_numbers=layout,
        feature_group_count=groups,
    )


def batch_norm(w, h):
    mean, spread, scale, bias = (along(w(WIDTH), h) for _ in range(4))
    return (h - mean) * (lax.rsqrt(jnp.square(spread) + 1e-3) * scale) + bias


def convolved(w, h):
    return jax.nn.relu(batch_norm(w, convolution(w, h)))


def depthwise(w, h):
    return jax.nn.relu6(batch_norm(w, convolution(w, h, groups=WIDTH)))


def conv_residual(w, h):
    return h + jax.nn.relu(convolution(w, h))


def squeeze_excite(w, h):
    gate = dense(w, jax.nn.relu(dense(w, h.mean((1, 2)), 2)))
    return h * jax.nn.sigmoid(gate)[:, None, None, :]


def max_pool(w, h):
    del w
    window = (1, 3, 3, 1)
    return lax.reduce_window(h, -jnp.inf, lax.max, window, (1, 1, 1, 1), "SAME")


def conv_of_each(w, h):
    kernel = w(3, 3, WIDTH, WIDTH)
    return jax.vmap(lambda t: convolution(lambda *_: kernel, t[None])[0])(h)


def group_norm(w, h):
    grouped = h.reshape(*h.shape[:-1], 2, WIDTH // 2)
    mean = grouped.mean((1, 2, 4), keepdims=True)
    spread = jnp.square(grouped - mean).mean((1, 2, 4), keepdims=True)
    normal = ((grouped - mean) * lax.rsqrt(spread + 1e-5)).reshape(h.shape)
    return normal * along(w(WIDTH), h)


def attention_over_pixels(w, h):
    t = h.reshape(h.shape[0], STEPS**2, WIDTH)
    return h + (jax.nn.softmax(dense(w, t) @ t.swapaxes(1, 2)) @ t).reshape(h.shape)


def rematerialised(w, h):
    weight = w(WIDTH, WIDTH)
    return jax.checkpoint(lambda h, weight: jax.nn.relu(h @ weight))(h, weight)


def spatial_gate(w, h):
    both = [h.mean(-1, keepdims=True), h.max(-1, keepdims=True)]
    return h * jax.nn.sigmoid(dense(w, jnp.concatenate(both, -1), 1))


TOKENS = {
    f.__name__: f
    for f in (
        with_bias, attention_operator, attention_einsum, attention_matmul,
        attention_of_each, residual, concatenated, layer_norm, of_each, scanned, experts,
        tiled, halves, stack_and_sum, positions, class_token, gated, looked_up,
        products_of_activations, merged, mixer, pooled_by_attention, convolution,
    )
}  # fmt: skip
IMAGES = {
    f.__name__: f
    for f in (
        convolved, depthwise, conv_residual, squeeze_excite, max_pool, conv_of_each,
        group_norm, attention_over_pixels, rematerialised, spatial_gate, scanned, concatenated,
    )
}  # fmt: skip


def flattened(h: Any) -> Any:
    return h.reshape(h.shape[0], -1)


READOUTS = {
    "mean": lambda h: h.mean(tuple(range(1, h.ndim - 1))),
    "first": lambda h: h[:, 0].reshape(h.shape[0], -1),
    "flat": flattened,
}


class Net:
    """Blocks one after another, a readout and a head; `params` are shapes."""

    def __init__(self, blocks: Sequence[str], readout: str, images: bool = False):
        table = IMAGES if images else TOKENS
        self.blocks = [table[name] for name in blocks]
        self.readout = READOUTS[readout]
        self.shape = (STEPS, STEPS, WIDTH) if images else (STEPS, WIDTH)
        self.params: dict[str, Any] = {}
        jax.eval_shape(lambda x: self.run(self.made, x), self.inputs(2))

    def __call__(self, params, x):
        names = iter(self.params)
        return self.run(lambda *shape: params[next(names)], x)

    def run(self, weight: Weight, x: Any) -> Any:
        for block in self.blocks:
            x = block(weight, x)
        return dense(weight, self.readout(x), 3)

    def made(self, *shape: int) -> jax.Array:
        name = f"w{len(self.params):02}"
        self.params[name] = jax.ShapeDtypeStruct(shape, jnp.float32)
        return jnp.zeros(shape)

    def inputs(self, size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size, *self.shape), jnp.float32)


NETWORKS = st.builds(
    Net,
    blocks=st.lists(st.sampled_from([*TOKENS]), min_size=1, max_size=3),
    readout=st.sampled_from([*READOUTS]),
)
"""Drawn networks of one to three blocks over tokens."""


def random_values(tree: Any) -> Any:
    """Normal numbers of the given shapes."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(0)
    values = [rng.standard_normal(x.shape, np.float32) / 2 for x in leaves]
    return structure.unflatten(map(jnp.asarray, values))


def products_with_a_parameter(apply: Any, params: Any, *inputs: Any) -> int:
    """Products and lookups that read a parameter on one side and an input on the other."""
    closed = jax.make_jaxpr(apply)(params, *inputs)
    count = len(jax.tree.leaves(params))
    free = len(closed.jaxpr.invars) - count
    return _count(closed.jaxpr, ["p"] * count + ["x"] * free)


def _count(jaxpr: Any, sides: Sequence[str]) -> int:
    known = dict(zip(jaxpr.invars, sides, strict=True))
    total = 0
    for eqn in jaxpr.eqns:
        literal = jax.extend.core.Literal
        read = ["" if isinstance(v, literal) else known.get(v, "") for v in eqn.invars]
        side = max(read, default="")
        body = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if body is not None:
            total += _count(getattr(body, "jaxpr", body), read)
        elif eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            total += sorted(read[:2]) == ["p", "x"]
        elif eqn.primitive.name == "gather":
            total += read[:2] == ["p", "x"]
        known.update((v, side) for v in eqn.outvars)
    return total
