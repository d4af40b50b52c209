"""Forward passes of the zoo, and its models from other front-ends than flax.

A forward pass gets a module `m`, linen's or nnx's, whose attributes are named layers.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jax.nn import gelu, leaky_relu, relu, relu6, sigmoid, silu

from zoo_nets import Factory, Inputs, Layer, Model, batch_norm, conv, fill, image, net

Forward = Callable[..., jax.Array]


# Convolutional.


def conv_bn_relu(m: Any, x: jax.Array, train: bool = False) -> jax.Array:
    x = relu(m.stem_bn(m.stem(x), use_running_average=not train))
    return m.head(x)


def inverted_residual(m: Any, x: jax.Array, train: bool = False) -> jax.Array:
    running = not train
    y = relu6(m.expand_bn(m.expand(x), use_running_average=running))
    y = relu6(m.depthwise_bn(m.depthwise(y), use_running_average=running))
    return x + m.project_bn(m.project(y), use_running_average=running)


def inverted(cin: int, mid: int) -> Layer:
    return net(
        inverted_residual,
        expand=conv(cin, mid, 1, use_bias=False),
        expand_bn=batch_norm(mid),
        depthwise=conv(mid, mid, 3, feature_group_count=mid, use_bias=False),
        depthwise_bn=batch_norm(mid),
        project=conv(mid, cin, 1, use_bias=False),
        project_bn=batch_norm(cin),
    )


def mobile(m: Any, x: jax.Array, train: bool = False) -> jax.Array:
    x = relu6(m.stem_bn(m.stem(x), use_running_average=not train))
    x = m.block1(x, train=train)
    x = m.block2(x, train=train)
    x = relu6(m.last_bn(m.last(x), use_running_average=not train))
    return m.head(jnp.mean(x, axis=(1, 2)))


def residual(m: Any, x: jax.Array, train: bool = False) -> jax.Array:
    running = not train
    y = relu(m.bn1(m.conv1(x), use_running_average=running))
    y = m.bn2(m.conv2(y), use_running_average=running)
    return relu(y + x)


def projected(m: Any, x: jax.Array, train: bool = False) -> jax.Array:
    running = not train
    y = relu(m.bn1(m.conv1(x), use_running_average=running))
    y = m.bn2(m.conv2(y), use_running_average=running)
    return relu(y + m.proj_bn(m.proj(x), use_running_average=running))


def resnet(m: Any, x: jax.Array, train: bool = False) -> jax.Array:
    x = relu(m.stem(x))
    x = m.block1(x, train=train)
    x = m.block2(x, train=train)
    return m.head(jnp.mean(x, axis=(1, 2)))


def chain(*names: str, act: Callable[[jax.Array], jax.Array] = relu) -> Forward:
    """Layers one after the other with an activation between them."""

    def forward(m: Any, x: jax.Array) -> jax.Array:
        for name in names[:-1]:
            x = act(getattr(m, name)(x))
        return getattr(m, names[-1])(x)

    return forward


def clip_after_add(m: Any, x: jax.Array) -> jax.Array:
    x = relu(m.stem(x))
    return m.head(relu6(x + m.branch(x)))


def concatenation(m: Any, x: jax.Array) -> jax.Array:
    x = relu(m.stem(x))
    left = relu(m.left(x))
    right = relu(m.right(x))
    return m.merge(jnp.concatenate([left, right], axis=-1))


def flatten(m: Any, x: jax.Array) -> jax.Array:
    x = relu(m.stem(x))
    return m.head(x.reshape(x.shape[0], -1))


def global_pool(m: Any, x: jax.Array) -> jax.Array:
    return m.head(jnp.mean(relu(m.stem(x)), axis=(1, 2)))


def average_pool(x: jax.Array) -> jax.Array:
    """What `nn.avg_pool` does, whose integer divisor strict promotion refuses."""
    window = (1, 2, 2, 1)
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, window, window, "VALID") / 4.0


def pooling(m: Any, x: jax.Array) -> jax.Array:
    x = nn.max_pool(relu(m.first(x)), (2, 2), (2, 2))
    x = average_pool(relu(m.second(x)))
    return m.third(x)


def resized(m: Any, x: jax.Array) -> jax.Array:
    x = relu(m.stem(x))
    b, h, w, c = x.shape
    return m.head(jax.image.resize(x, (b, 2 * h, 2 * w, c), "bilinear"))


def pre_activation(m: Any, x: jax.Array, train: bool = False) -> jax.Array:
    x = relu(m.bn1(x, use_running_average=not train))
    x = relu(m.bn2(m.conv1(x), use_running_average=not train))
    return m.conv2(x)


def group_normed(m: Any, x: jax.Array) -> jax.Array:
    return m.head(relu(m.gn(m.stem(x))))


def slopes(m: Any, x: jax.Array) -> jax.Array:
    x = leaky_relu(m.first(x), 0.1)
    return m.third(m.act(m.second(x)))


def squeeze_excite(m: Any, x: jax.Array) -> jax.Array:
    x = relu(m.stem(x))
    gate = jnp.mean(x, axis=(1, 2), keepdims=True)
    gate = sigmoid(m.grow(relu(m.reduce(gate))))
    return m.head(x * gate)


# Dense.


def dense_norm(m: Any, x: jax.Array) -> jax.Array:
    x = relu(m.ln1(m.first(x)))
    x = relu(m.ln2(m.second(x)))
    return m.third(x)


def transformer(m: Any, x: jax.Array) -> jax.Array:
    x = x + m.attn(m.ln1(x))
    return x + m.down(gelu(m.up(m.ln2(x))))


def embedding(m: Any, ids: jax.Array) -> jax.Array:
    return m.second(relu(m.first(m.embed(ids))))


def tied_embedding(m: Any, ids: jax.Array) -> jax.Array:
    return m.embed.attend(gelu(m.middle(m.embed(ids))))


def tied(m: Any, x: jax.Array) -> jax.Array:
    return m.head(relu(m.shared(relu(m.shared(x)))))


def dropped(m: Any, x: jax.Array, train: bool = False) -> jax.Array:
    x = m.drop(relu(m.first(x)), deterministic=not train)
    return m.second(x)


def outputs_in_a_tree(m: Any, x: jax.Array) -> Any:
    x = relu(m.stem(x))
    box = (m.centre(x), sigmoid(m.size(x)))
    logits = m.logits(x)
    return {"box": box, "logits": logits, "top": jnp.argmax(logits, axis=-1)}


# Regions: remat, jit, cond, scan.


def rematerialised(m: Any, x: jax.Array) -> jax.Array:
    lib = nn if isinstance(m, nn.Module) else nnx
    return m.head(lib.remat(lambda block, x: block(x))(m.block, relu(m.stem(x))))


def jitted(m: Any, x: jax.Array) -> jax.Array:
    lib = nn if isinstance(m, nn.Module) else nnx
    return m.head(lib.jit(lambda block, x: block(x))(m.block, relu(m.stem(x))))


def conditional(m: Any, x: jax.Array) -> jax.Array:
    high, low = (lambda m, x: relu(m.high(x))), (lambda m, x: relu(m.low(x)))
    if not isinstance(m, nn.Module):
        x = jax.lax.cond(jnp.sum(x) > 0, lambda x: high(m, x), lambda x: low(m, x), x)
    elif m.is_initializing():
        x = high(m, x) + low(m, x)
    else:
        x = nn.cond(jnp.sum(x) > 0, high, low, m, x)
    return m.head(x)


def recurrent(m: Any, x: jax.Array) -> jax.Array:
    return m.head(m.rnn(x))


# Plain functions: (numbers of the parameters, apply).


def plain(apply: Callable[..., Any], shapes: Any, inputs: Inputs) -> dict[str, Factory]:
    """A model of `apply` and of parameters given by their shapes."""

    def make(key: jax.Array) -> Model:
        specs = jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
            shapes,
            is_leaf=lambda node: isinstance(node, tuple),
        )
        return apply, fill(specs, key), inputs(key)

    return {"plain": make}


def affine(p: Any, x: jax.Array) -> jax.Array:
    return x @ p["w"] + p["b"][None]


def matmul_mlp(p: Any, x: jax.Array) -> jax.Array:
    x = jnp.tanh(x @ p["w"][0] + p["b"][0][None])
    return x @ p["w"][1] + p["b"][1][None]


def einsum_heads(p: Any, x: jax.Array) -> jax.Array:
    heads = jnp.tanh(jnp.einsum("btd,dhk->bthk", x, p["project"]))
    return jnp.einsum("bthk,hko->bto", heads, p["merge"])


def gated(p: Any, x: jax.Array) -> jax.Array:
    gate = silu(x @ p["gate"])
    return (gate * (x @ p["up"])) @ p["down"]


def two_inputs(p: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    left = relu(affine(p["left"], x))
    return affine(p["head"], left + affine(p["right"], y))


def plain_cond(p: Any, x: jax.Array) -> jax.Array:
    x = jax.lax.cond(
        jnp.sum(x) > 0,
        lambda x: relu(affine(p["high"], x)),
        lambda x: relu(affine(p["low"], x)),
        x,
    )
    return affine(p["head"], x)


def standardized(p: Any, x: jax.Array) -> jax.Array:
    """A convolution whose kernel is normalized over its window, as in BiT."""
    w, layout = p["conv"]["w"], ("NHWC", "HWIO", "NHWC")
    w = w - jnp.mean(w, axis=(0, 1, 2), keepdims=True)
    w = w / jnp.sqrt(jnp.mean(w * w, axis=(0, 1, 2), keepdims=True) + 1e-5)
    w = w * p["conv"]["gain"][None, None, None]
    y = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=layout)
    return affine(p["head"], jnp.mean(relu(y), axis=(1, 2)))


# Other libraries.


def equinox_conv(key: jax.Array) -> Model:
    import equinox as eqx

    def build(key: jax.Array) -> Any:
        k0, k1, k2 = jax.random.split(key, 3)
        layers = [
            eqx.nn.Conv2d(3, 8, 3, padding=1, key=k0),
            eqx.nn.Lambda(relu),
            eqx.nn.Conv2d(8, 6, 3, stride=2, key=k1),
            eqx.nn.Lambda(relu),
            eqx.nn.Lambda(lambda x: jnp.mean(x, axis=(1, 2))),
            eqx.nn.Linear(6, 5, key=k2),
        ]
        return eqx.nn.Sequential(layers)

    abstract = eqx.filter_eval_shape(build, key)
    shapes, static = eqx.partition(
        abstract, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
    )

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return jax.vmap(eqx.combine(params, static))(x)

    (x,) = image()(key)
    return apply, fill(shapes, key), (jnp.transpose(x, (0, 3, 1, 2)),)


def haiku_conv(key: jax.Array) -> Model:
    import haiku as hk

    class Net(hk.Module):
        def __init__(self) -> None:
            super().__init__("net")
            self.stem = hk.Conv2D(8, 3, name="stem")
            self.stem_bn = hk.BatchNorm(True, True, 0.9, eps=1e-3, name="stem_bn")
            self.head = hk.Conv2D(4, 3, stride=2, name="head")

        def __call__(self, x: jax.Array, train: bool) -> jax.Array:
            return self.head(relu(self.stem_bn(self.stem(x), train)))

    model = hk.without_apply_rng(hk.transform_with_state(lambda x, t: Net()(x, t)))

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return model.apply(params["params"], params["state"], x, False)[0]

    (x,) = image()(key)
    with jax.numpy_dtype_promotion("standard"):  # haiku's averages need it in training
        params, state = jax.eval_shape(lambda k: model.init(k, x, True), key)
    return apply, fill({"params": params, "state": state}, key), (x,)
