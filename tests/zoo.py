"""The table of models that every law is tested on.

    case = CASES['inverted_residual']
    apply, params, inputs = case.make['linen'](jax.random.key(0))
    apply(params, *inputs)

A case that linen and nnx share has equal names and, from equal keys, equal numbers in
both. The nodes are written by hand from the rules of naming: an oracle, no recording.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.nn import gelu, relu

import zoo_models as z
from jaxmet import Graph, trace
from zoo_nets import (
    Factory,
    Inputs,
    Layer,
    Model,
    attention,
    batch_norm,
    conv,
    conv_transpose,
    dense,
    dropout,
    embed,
    group_norm,
    image,
    layer_norm,
    linen_factory,
    lstm,
    net,
    normal,
    parts,
    prelu,
    repeat,
    simple_rnn,
    stacked,
    tokens,
    twins,
)


@dataclass(frozen=True)
class Case:
    """One model: how each front-end makes it, and what a trace of it has to find."""

    name: str
    make: Mapping[str, Factory]  # front-end -> key -> (apply, params, inputs)
    nodes: tuple[str, ...]
    layers: tuple[str, ...]
    ordered: bool = True  # whether `nodes` is in the order of the run, or just a set
    train: tuple[str, ...] = ()  # what training needs: 'batch_stats', 'dropout'
    has_norm: bool = False  # a batch norm that can be folded into the product before it
    has_relu6: bool = False
    stacked: bool = False  # a weight that scan slices
    tied: bool = False  # a weight that is used twice
    derived: bool = False  # a weight computed from parameters
    branches: bool = False  # a `cond`
    recurrent: bool = False  # a `scan` over time

    @property
    def frontends(self) -> tuple[str, ...]:
        return tuple(self.make)

    def train_kwargs(self, frontend: str = "linen") -> dict[str, Any]:
        """What `apply` takes in training; empty where there is no such mode."""
        if not self.train or (frontend != "linen" and "dropout" in self.train):
            return {}
        if frontend != "linen":
            return {"train": True}
        rngs = {"dropout": jax.random.key(7)} if "dropout" in self.train else {}
        mutable = [name for name in self.train if name == "batch_stats"]
        return {"train": True, "mutable": mutable, "rngs": rngs}


def twin(case: Case, params: Any) -> Any:
    """The nnx state of a case, with the numbers of its linen variables."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    by_name = {parts(path)[1:]: leaf for path, leaf in leaves}
    _, state, _ = case.make["nnx"](jax.random.key(0))
    return jax.tree_util.tree_map_with_path(lambda p, _: by_name[parts(p)], state)


def model(name: str, frontend: str | None = None) -> Model:
    """A case with the numbers of key 0, in its first front-end unless another is named."""
    return _made(name, frontend or CASES[name].frontends[0])


def traced(name: str, frontend: str | None = None) -> Graph:
    """The graph of `model`. All tests of a worker share it, and so what it compiled."""
    return _traced(name, frontend or CASES[name].frontends[0])


@functools.cache
def redrawn(name: str, frontend: str | None = None, seed: int = 1) -> Model:
    """`model` with other numbers: what was compiled for its `apply` and graph serves both."""
    apply, frontend = model(name, frontend)[0], frontend or CASES[name].frontends[0]
    return apply, *CASES[name].make[frontend](jax.random.key(seed))[1:]


@functools.cache
def _made(name: str, frontend: str) -> Model:
    return CASES[name].make[frontend](jax.random.key(0))


@functools.cache
def _traced(name: str, frontend: str) -> Graph:
    apply, params, inputs = _made(name, frontend)
    return trace(apply, params, *inputs)


CASES: dict[str, Case] = {}
NORMED: dict[str, Any] = {"train": ("batch_stats",), "has_norm": True}


def add_other(
    name: str, make: Mapping[str, Factory], *, nodes: str, layers: str, **kw: Any
) -> None:
    CASES[name] = Case(name, make, tuple(nodes.split()), tuple(layers.split()), **kw)


def add(name: str, layer: Layer, inputs: Inputs, **kw: Any) -> None:
    add_other(name, twins(layer, inputs), **kw)


# Convolutional.

add(
    "conv_bn_relu",
    net(z.conv_bn_relu, stem=conv(3, 8, 3), stem_bn=batch_norm(8), head=conv(8, 6, 3)),
    image(),
    nodes="input stem stem_bn stem/relu head output",
    layers="stem head",
    **NORMED,
)
add(
    "inverted_residual",
    z.inverted(4, 8),
    image(channels=4),
    nodes="""input expand expand_bn expand/clip depthwise depthwise_bn depthwise/clip
        project project_bn project/add output""",
    layers="expand depthwise project",
    has_relu6=True,
    **NORMED,
)
add(
    "mobile",
    net(
        z.mobile,
        stem=conv(3, 6, 3, strides=(2, 2), use_bias=False),
        stem_bn=batch_norm(6),
        block1=z.inverted(6, 12),
        block2=z.inverted(6, 12),
        last=conv(6, 16, 1, use_bias=False),
        last_bn=batch_norm(16),
        head=dense(16, 5),
    ),
    image(12, batch=3),
    nodes="""input stem stem_bn stem/clip
        block1/expand block1/expand_bn block1/expand/clip
        block1/depthwise block1/depthwise_bn block1/depthwise/clip
        block1/project block1/project_bn block1/project/add
        block2/expand block2/expand_bn block2/expand/clip
        block2/depthwise block2/depthwise_bn block2/depthwise/clip
        block2/project block2/project_bn block2/project/add
        last last_bn last/clip last/pool head output""",
    layers="""stem block1/expand block1/depthwise block1/project
        block2/expand block2/depthwise block2/project last head""",
    has_relu6=True,
    **NORMED,
)
add(
    "residual",
    net(
        z.residual,
        conv1=conv(6, 6, 3),
        bn1=batch_norm(6),
        conv2=conv(6, 6, 3),
        bn2=batch_norm(6),
    ),
    image(channels=6),
    nodes="input conv1 bn1 conv1/relu conv2 bn2 conv2/add conv2/relu output",
    layers="conv1 conv2",
    **NORMED,
)
add(
    "resnet",
    net(
        z.resnet,
        stem=conv(3, 6, 3),
        block1=net(
            z.residual,
            conv1=conv(6, 6, 3, use_bias=False),
            bn1=batch_norm(6),
            conv2=conv(6, 6, 3, use_bias=False),
            bn2=batch_norm(6),
        ),
        block2=net(
            z.projected,
            conv1=conv(6, 8, 3, strides=(2, 2), use_bias=False),
            bn1=batch_norm(8),
            conv2=conv(8, 8, 3, use_bias=False),
            bn2=batch_norm(8),
            proj=conv(6, 8, 1, strides=(2, 2), use_bias=False),
            proj_bn=batch_norm(8),
        ),
        head=dense(8, 5),
    ),
    image(batch=3),
    nodes="""input stem stem/relu
        block1/conv1 block1/bn1 block1/conv1/relu
        block1/conv2 block1/bn2 block1/conv2/add block1/conv2/relu
        block2/conv1 block2/bn1 block2/conv1/relu block2/conv2 block2/bn2
        block2/proj block2/proj_bn block2/proj/add block2/proj/relu block2/proj/pool
        head output""",
    layers="""stem block1/conv1 block1/conv2 block2/conv1 block2/conv2 block2/proj
        head""",
    **NORMED,
)
add(
    "clip_after_add",
    net(z.clip_after_add, stem=conv(3, 6, 3), branch=conv(6, 6, 3), head=conv(6, 4, 1)),
    image(),
    nodes="input stem stem/relu branch branch/add branch/clip head output",
    layers="stem branch head",
    has_relu6=True,
)
add(
    "grouped",
    net(
        z.chain("stem", "grouped", "depthwise", "point"),
        stem=conv(3, 8, 3),
        grouped=conv(8, 8, 3, feature_group_count=2),
        depthwise=conv(8, 16, 3, feature_group_count=8),
        point=conv(16, 6, 1),
    ),
    image(),
    nodes="""input stem stem/relu grouped grouped/relu depthwise depthwise/relu point
        output""",
    layers="stem grouped depthwise point",
)
add(
    "dilated",
    net(
        z.chain("first", "second"),
        first=conv(3, 8, 3, kernel_dilation=(2, 2)),
        second=conv(8, 4, 3, kernel_dilation=(2, 1), padding="VALID"),
    ),
    image(),
    nodes="input first first/relu second output",
    layers="first second",
)
add(
    "strided",
    net(
        z.chain("first", "second"),
        first=conv(3, 8, 3, strides=(2, 2), padding="SAME"),
        second=conv(8, 4, 3, strides=(2, 1), padding="SAME"),
    ),
    image(),
    nodes="input first first/relu second output",
    layers="first second",
)
add(
    "transposed",
    net(
        z.chain("down", "up", "head"),
        down=conv(3, 8, 3, strides=(2, 2)),
        up=conv_transpose(8, 6, 3, strides=(2, 2)),
        head=conv(6, 4, 1),
    ),
    image(),
    nodes="input down down/relu up up/relu head output",
    layers="down up head",
)
add(
    "concatenation",
    net(
        z.concatenation,
        stem=conv(3, 6, 3),
        left=conv(6, 4, 1),
        right=conv(6, 8, 3),
        merge=conv(12, 5, 3),
    ),
    image(),
    nodes="""input stem stem/relu left left/relu right right/relu right/concat merge
        output""",
    layers="stem left right merge",
)
add(
    "flatten",
    net(z.flatten, stem=conv(3, 4, 3, strides=(2, 2)), head=dense(64, 5)),
    image(),
    nodes="input stem stem/relu head output",
    layers="stem head",
)
add(
    "global_pool",
    net(z.global_pool, stem=conv(3, 8, 3), head=dense(8, 5)),
    image(),
    nodes="input stem stem/relu stem/pool head output",
    layers="stem head",
)
add(
    "pooling",
    net(z.pooling, first=conv(3, 8, 3), second=conv(8, 8, 3), third=conv(8, 4, 1)),
    image(),
    nodes="""input first first/relu first/pool second second/relu second/pool third
        output""",
    layers="first second third",
)
add(
    "resize",
    net(z.resized, stem=conv(3, 6, 3), head=conv(6, 4, 3)),
    image(),
    nodes="input stem stem/relu stem/resize head output",
    layers="stem head",
)
add(
    "pre_activation",
    net(
        z.pre_activation,
        bn1=batch_norm(4),
        conv1=conv(4, 8, 3),
        bn2=batch_norm(8),
        conv2=conv(8, 4, 3),
    ),
    image(channels=4),
    nodes="input bn1 input/relu conv1 bn2 conv1/relu conv2 output",
    layers="conv1 conv2",
    **NORMED,
)
add(
    "group_norm",
    net(z.group_normed, stem=conv(3, 8, 3), gn=group_norm(8, 4), head=conv(8, 4, 3)),
    image(),
    nodes="input stem gn stem/relu head output",
    layers="stem head",
)
add(
    "slopes",
    net(
        z.slopes,
        first=conv(3, 8, 3),
        second=conv(8, 8, 3),
        act=prelu(),
        third=conv(8, 4, 1),
    ),
    image(),
    nodes="input first first/leaky_relu second act third output",
    layers="first second third",
)
add(
    "squeeze_excite",
    net(
        z.squeeze_excite,
        stem=conv(3, 8, 3),
        reduce=conv(8, 4, 1),
        grow=conv(4, 8, 1),
        head=conv(8, 4, 1),
    ),
    image(),
    nodes="""input stem stem/relu stem/pool reduce reduce/relu grow grow/sigmoid
        grow/multiply head output""",
    layers="stem reduce grow head",
)

# Dense.

add(
    "dense_norm",
    net(
        z.dense_norm,
        first=dense(6, 8),
        ln1=layer_norm(8),
        second=dense(8, 8),
        ln2=layer_norm(8),
        third=dense(8, 4),
    ),
    normal(4, 6),
    nodes="input first ln1 first/relu second ln2 second/relu third output",
    layers="first second third",
)
add(
    "transformer",
    net(
        z.transformer,
        ln1=layer_norm(8),
        attn=attention(8, 2),
        ln2=layer_norm(8),
        up=dense(8, 16),
        down=dense(16, 8),
    ),
    normal(2, 5, 8),
    nodes="""input ln1 attn/query attn/key attn/value attn/key/matmul attn/key/softmax
        attn/value/matmul attn/out attn/out/add ln2 up up/gelu down down/add output""",
    layers="attn/query attn/key attn/value attn/out up down",
    ordered=False,
)
add(
    "embedding",
    net(z.embedding, embed=embed(11, 8), first=dense(8, 8), second=dense(8, 4)),
    tokens(3, 5, vocabulary=11),
    nodes="input embed first first/relu second output",
    layers="embed first second",
)
add(
    "tied_embedding",
    net(z.tied_embedding, embed=embed(11, 8), middle=dense(8, 8)),
    tokens(3, 5, vocabulary=11),
    nodes="input embed:0 middle middle/gelu embed:1 output",
    layers="embed:0 middle embed:1",
    tied=True,
)
add(
    "gelu_mlp",
    net(
        z.chain("first", "second", "third", act=gelu),
        first=dense(6, 8),
        second=dense(8, 8),
        third=dense(8, 4),
    ),
    normal(4, 6),
    nodes="input first first/gelu second second/gelu third output",
    layers="first second third",
)
add(
    "tied",
    net(z.tied, shared=dense(6, 6), head=dense(6, 4)),
    normal(4, 6),
    nodes="input shared:0 shared:0/relu shared:1 shared:1/relu head output",
    layers="shared:0 shared:1 head",
    tied=True,
)
add(
    "dropout",
    net(z.dropped, first=dense(6, 16), drop=dropout(0.5), second=dense(16, 4)),
    normal(4, 6),
    nodes="input first first/relu second output",
    layers="first second",
    train=("dropout",),
)
add(
    "outputs_in_a_tree",
    net(
        z.outputs_in_a_tree,
        stem=dense(6, 8),
        centre=dense(8, 2),
        size=dense(8, 2),
        logits=dense(8, 5),
    ),
    normal(4, 6),
    nodes="""input stem stem/relu centre size size/sigmoid logits output:0 output:1
        output:2""",
    layers="stem centre size logits",
)

# Regions.


def block() -> Layer:
    return net(z.chain("first", "second"), first=dense(8, 12), second=dense(12, 8))


for name, forward in {"remat": z.rematerialised, "jit": z.jitted}.items():
    add(
        name,
        net(forward, stem=dense(6, 8), block=block(), head=dense(8, 4)),
        normal(4, 6),
        nodes="""input stem stem/relu block/first block/first/relu block/second head
            output""",
        layers="stem block/first block/second head",
    )
add(
    "cond",
    net(z.conditional, low=dense(6, 8), high=dense(6, 8), head=dense(8, 4)),
    normal(4, 6),
    nodes="input low low/relu high high/relu head output",
    layers="low high head",
    ordered=False,
    branches=True,
)
add(
    "scan",
    net(
        lambda m, x: m.head(repeat(m.stack, x)),
        stack=stacked(3, lambda m, x: (relu(m.dense(x)), None), dense=dense(6, 6)),
        head=dense(6, 4),
    ),
    normal(4, 6),
    nodes="input stack/dense stack/dense/relu head output",
    layers="stack/dense head",
    stacked=True,
)
add(
    "rnn",
    net(z.recurrent, rnn=simple_rnn(4, 6), head=dense(6, 3)),
    normal(2, 5, 4),
    nodes="input rnn/cell/i rnn/cell/h rnn/cell/h/add rnn/cell/h/tanh head output",
    layers="rnn/cell/i rnn/cell/h head",
    recurrent=True,
)
# The kernels of the hidden state are applied before those of the input.
add_other(
    "lstm",
    {
        "linen": linen_factory(
            net(z.recurrent, rnn=lstm(6), head=dense(6, 3)), normal(2, 5, 4)
        )
    },
    nodes="""input rnn/cell rnn/cell:1
        rnn/cell:1/add rnn/cell:1/sigmoid rnn/cell:1/add:1 rnn/cell:1/sigmoid:1
        rnn/cell:1/add:2 rnn/cell:1/tanh rnn/cell:1/add:3 rnn/cell:1/sigmoid:2
        rnn/cell:1/multiply rnn/cell:1/multiply:1 rnn/cell:1/add:4 rnn/cell:1/tanh:1
        rnn/cell:1/multiply:2 head output""",
    layers="rnn/cell rnn/cell:1 head",
    derived=True,
    recurrent=True,
)

# Other front-ends.

add_other(
    "matmul_mlp",
    z.plain(z.matmul_mlp, {"w": [(6, 8), (8, 4)], "b": [(8,), (4,)]}, normal(4, 6)),
    nodes="input w/0 w/0/tanh w/1 output",
    layers="w/0 w/1",
)
add_other(
    "einsum_heads",
    z.plain(
        z.einsum_heads, {"project": (6, 2, 4), "merge": (2, 4, 5)}, normal(3, 4, 6)
    ),
    nodes="input project project/tanh merge output",
    layers="project merge",
)
add_other(
    "gated",
    z.plain(z.gated, {"gate": (6, 8), "up": (6, 8), "down": (8, 4)}, normal(4, 6)),
    nodes="input gate gate/silu up up/multiply down output",
    layers="gate up down",
)
add_other(
    "two_inputs",
    z.plain(
        z.two_inputs,
        {
            "left": {"w": (6, 8), "b": (8,)},
            "right": {"w": (5, 8), "b": (8,)},
            "head": {"w": (8, 4), "b": (4,)},
        },
        lambda key: (*normal(4, 6)(key), *normal(4, 5)(key)),
    ),
    nodes="input:0 input:1 left left/relu right right/add head output",
    layers="left right head",
)
add_other(
    "plain_cond",
    z.plain(
        z.plain_cond,
        {
            "low": {"w": (6, 8), "b": (8,)},
            "high": {"w": (6, 8), "b": (8,)},
            "head": {"w": (8, 4), "b": (4,)},
        },
        normal(4, 6),
    ),
    nodes="input low low/relu high high/relu head output",
    layers="low high head",
    ordered=False,
    branches=True,
)
add_other(
    "standardized",
    z.plain(
        z.standardized,
        {"conv": {"w": (3, 3, 3, 8), "gain": (8,)}, "head": {"w": (8, 4), "b": (4,)}},
        image(),
    ),
    nodes="input conv conv/relu conv/pool head output",
    layers="conv head",
    derived=True,
)
add_other(
    "equinox_conv",
    {"equinox": z.equinox_conv},
    nodes="""input layers/0 layers/0/relu layers/2 layers/2/relu layers/2/pool layers/5
        output""",
    layers="layers/0 layers/2 layers/5",
)
add_other(
    "haiku_conv",
    {"haiku": z.haiku_conv},
    nodes="input net/~/stem net/~/stem_bn net/~/stem/relu net/~/head output",
    layers="net/~/stem net/~/head",
    has_norm=True,
)
