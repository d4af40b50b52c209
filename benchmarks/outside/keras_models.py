"""Keras applications and the models of its documentation, on the JAX backend."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from outside.model import Built, count, drawn, images, model, settled, tokens, vectors

# What normalizes the pictures of some applications has a mean too, but no running one.
RUNNING = ("moving_mean", "moving_variance")


def keras_model(net: Any, inputs: Any, key: jax.Array, steps: int = 0) -> Built:
    """A keras model as a function of a dict of its variables, by path; trained for `steps`."""
    lists = net.trainable_variables, net.non_trainable_variables
    paths = [[v.path for v in variables] for variables in lists]
    params = {v.path: v.value for variables in lists for v in variables}

    def run(params: Any, *x: Any, training: bool) -> Any:
        both = [[params[p] for p in of] for of in paths]
        return net.stateless_call(
            *both, x[0] if len(x) == 1 else list(x), training=training
        )

    def train(params: Any) -> Any:
        _, new = run(params, *some, training=True)
        return {**params, **dict(zip(paths[1], new, strict=True))}

    some = inputs(key, 256 if steps else 16)
    params = drawn(params, key, RUNNING)
    if steps:
        params = trained(run, params, paths, inputs, key, steps)
    norms = count(params, "moving_variance")
    if norms:
        params = settled(train, params, key, noise=0.0 if steps else 1.0)
    return Built(lambda p, *x: run(p, *x, training=False)[0], params, inputs, norms)


def trained(
    run: Any, params: Any, paths: Any, inputs: Any, key: jax.Array, steps: int
) -> Any:
    """The parameters after some steps of telling which quarter of a picture is brightest."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.sgd(optax.cosine_decay_schedule(0.1, steps), momentum=0.9),
    )

    def loss(weights: Any, rest: Any, x: Any) -> tuple[jax.Array, Any]:
        logits, new = run({**weights, **rest}, x, training=True)
        n, size, *_ = x.shape
        quarters = x.reshape(n, 2, size // 2, 2, size // 2, -1).mean((2, 4, 5))
        label = jnp.argmax(quarters.reshape(n, 4), -1)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        return losses.mean(), dict(zip(paths[1], new, strict=True))

    @jax.jit
    def step(weights: Any, rest: Any, state: Any, x: Any) -> tuple[Any, Any, Any]:
        (_, rest), slope = jax.value_and_grad(loss, has_aux=True)(weights, rest, x)
        change, state = optimizer.update(slope, state)
        return optax.apply_updates(weights, change), rest, state

    weights, rest = ({p: params[p] for p in of} for of in paths)
    state = optimizer.init(weights)
    for i in range(steps):
        x = inputs(jax.random.fold_in(key, i), 64)[0]
        weights, rest, state = step(weights, rest, state, x)
    return {**weights, **rest}


def application(
    make: Any,
    size: int,
    key: jax.Array,
    *args: Any,
    of_bytes: bool = False,
    steps: int = 0,
    **kwargs: Any,
) -> Built:
    """An application without trained weights, for small pictures and ten classes.

    Some rescale pictures of 0 to 255 themselves (`of_bytes`): numbers about zero would be
    one grey to them, with differences far below the epsilon of the first norm. Deep ones
    are trained for some `steps`: with random weights they magnify whatever is rounded.
    """
    import keras

    keras.utils.set_random_seed(0)
    net = make(
        *args,
        weights=None,
        classes=10,
        classifier_activation=None,
        **{"input_shape": (size, size, 3), **kwargs},
    )
    inputs = pictures(size) if of_bytes else images(size)
    return keras_model(net, inputs, key, steps)


def pictures(size: int) -> Any:
    """The pictures of `images` from 0 to 255."""
    inputs = images(size)
    return lambda key, n: tuple(jnp.clip(128 + 64 * x, 0, 255) for x in inputs(key, n))


@model("keras MobileNet", "keras")
def mobilenet(key):
    from keras.applications import MobileNet

    return application(MobileNet, 32, key, alpha=0.25)


@model("keras MobileNetV2", "keras")
def mobilenet_v2(key):
    from keras.applications import MobileNetV2

    return application(MobileNetV2, 32, key, alpha=0.35)


@model("keras MobileNetV3Small", "keras")
def mobilenet_v3(key):
    from keras.applications import MobileNetV3Small

    return application(
        MobileNetV3Small,
        32,
        key,
        of_bytes=True,
        steps=150,
        alpha=0.35,
        dropout_rate=0.0,
    )


@model("keras EfficientNetB0", "keras")
def efficientnet(key):  # B0's depth at a quarter of its width
    from keras.src.applications.efficientnet import EfficientNet

    return application(
        EfficientNet,
        32,
        key,
        0.25,
        1.0,
        32,
        drop_connect_rate=0.0,
        of_bytes=True,
        steps=600,
    )


@model("keras EfficientNetV2", "keras")
def efficientnet_v2(key):
    from keras.src.applications.efficientnet_v2 import EfficientNetV2

    made = {
        "name": "efficientnetv2-b0",
        "drop_connect_rate": 0.0,
        "of_bytes": True,
        "steps": 400,
    }
    return application(EfficientNetV2, 32, key, 0.25, 0.3, 32, **made)


@model(
    "keras ResNetV2",
    "keras",
    unfoldable=5,
    why="of five the input is a sum or a pooling, the output an activation",
)
def resnet_v2(key):
    from keras.src.applications.resnet import ResNet, stack_residual_blocks_v2

    def stacks(x):
        x = stack_residual_blocks_v2(x, 4, 2, name="conv2")
        return stack_residual_blocks_v2(x, 8, 2, stride1=1, name="conv3")

    return application(ResNet, 32, key, stacks, True, True, weights_name="resnet50v2")


@model("keras ConvNeXt", "keras")
def convnext(key):
    from keras.src.applications.convnext import ConvNeXt

    return application(
        ConvNeXt, 32, key, [1, 1, 1, 1], [8, 16, 16, 32], default_size=32
    )


@model("keras Xception", "keras")
def xception(key):  # keras docs, "Image classification from scratch"
    import keras
    from keras import layers as l

    keras.utils.set_random_seed(0)
    start = keras.Input((32, 32, 3))
    x = l.Activation("relu")(
        l.BatchNormalization()(l.Conv2D(8, 3, 2, padding="same")(start))
    )
    before = x
    for size in (16, 24):
        for _ in range(2):
            x = l.Activation("relu")(x)
            x = l.BatchNormalization()(l.SeparableConv2D(size, 3, padding="same")(x))
        x = l.MaxPooling2D(3, strides=2, padding="same")(x)
        x = before = l.add([x, l.Conv2D(size, 1, strides=2, padding="same")(before)])
    x = l.BatchNormalization()(l.SeparableConv2D(32, 3, padding="same")(x))
    x = l.GlobalAveragePooling2D()(l.Activation("relu")(x))
    net = keras.Model(start, l.Dense(2)(l.Dropout(0.25)(x)))
    return keras_model(net, images(32), key)


@model("keras transformer", "keras")
def transformer(key):  # keras docs, "Text classification with Transformer"; masked
    import keras
    from keras import layers as l

    keras.utils.set_random_seed(0)
    ids = keras.Input((12,), dtype="int32")
    x = l.Embedding(50, 32)(ids)
    for _ in range(2):
        y = l.MultiHeadAttention(4, 8)(x, x, use_causal_mask=True)
        x = l.LayerNormalization(epsilon=1e-6)(x + y)
        y = l.Dense(32)(l.Dense(64, activation="relu")(x))
        x = l.LayerNormalization(epsilon=1e-6)(x + y)
    x = l.Dense(20, activation="relu")(l.GlobalAveragePooling1D()(x))
    return keras_model(keras.Model(ids, l.Dense(2)(x)), tokens(12, 50), key)


@model("keras bidirectional LSTM", "keras")
def lstm(key):  # keras docs, "Bidirectional LSTM on IMDB"
    import keras
    from keras import layers as l

    keras.utils.set_random_seed(0)
    ids = keras.Input((10,), dtype="int32")
    x = l.Embedding(50, 16)(ids)
    x = l.Bidirectional(l.LSTM(8, return_sequences=True))(x)
    x = l.Bidirectional(l.LSTM(8))(x)
    return keras_model(keras.Model(ids, l.Dense(3)(x)), tokens(10, 50), key)


@model("keras conv 1D", "keras")
def conv1d(key):  # keras docs, "Timeseries classification from scratch"
    import keras
    from keras import layers as l

    keras.utils.set_random_seed(0)
    start = x = keras.Input((24, 2))
    for _ in range(3):
        x = l.ReLU()(l.BatchNormalization()(l.Conv1D(16, 3, padding="same")(x)))
    net = keras.Model(start, l.Dense(4)(l.GlobalAveragePooling1D()(x)))
    return keras_model(net, vectors(24, 2), key)


@model("keras U-Net", "keras")
def unet(
    key,
):  # keras docs, "Image segmentation with a U-Net-like architecture", shorter
    import keras
    from keras import layers as l

    keras.utils.set_random_seed(0)
    start = keras.Input((32, 32, 3))
    x = l.Activation("relu")(
        l.BatchNormalization()(l.Conv2D(8, 3, 2, padding="same")(start))
    )
    before = x
    x = l.BatchNormalization()(l.SeparableConv2D(16, 3, padding="same")(x))
    x = l.MaxPooling2D(3, strides=2, padding="same")(l.Activation("relu")(x))
    x = before = l.add([x, l.Conv2D(16, 1, strides=2, padding="same")(before)])
    for size in (16, 8):
        x = l.Conv2DTranspose(size, 3, padding="same")(l.Activation("relu")(x))
        x = l.UpSampling2D(2)(l.BatchNormalization()(x))
        before = l.Conv2D(size, 1, padding="same")(l.UpSampling2D(2)(before))
        x = before = l.add([x, before])
    net = keras.Model(start, l.Conv2D(3, 3, padding="same")(x))
    return keras_model(net, images(32), key)
