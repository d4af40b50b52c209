"""Which axis is which channel: the algebra of labels, and the groups that come of it.

Labels are checked against index arithmetic in numpy; channel groups against lists
written by hand and against the law that defines them: rescaling a free group leaves the
model's function alone.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmet import evaluate, trace
from jaxmet.engine.axes import labels as lb
from jaxmet.engine.graph.channel_groups import Joined, Span, indices_of, layout_size
from jaxmet.tree.named_leaves import named_leaves, replace_leaves
from zoo import CASES, model, traced

RUNS = [(name, front) for name, case in CASES.items() for front in case.frontends]
TWINS = [name for name, case in CASES.items() if {"linen", "nnx"} <= {*case.make}]


# Reshapes, against index arithmetic.


def coordinates(axes, shape):
    """For each atom its coordinate at every flat position of an array of this shape."""
    found, flat = {}, np.arange(math.prod(shape))
    for place, axis in zip(np.unravel_index(flat, shape), axes, strict=True):
        atoms = lb.expand(axis)
        sizes = tuple(atom.size for atom in atoms)
        if sizes:
            found |= zip(atoms, np.unravel_index(place, sizes), strict=True)
    return found


def suffixes(shape):
    return {math.prod(shape[i:]) for i in range(len(shape))}


@st.composite
def reshapes(draw):
    """Two shapes of one size: the same primes, cut at different places."""
    primes = draw(st.lists(st.sampled_from([2, 2, 3, 5]), min_size=1, max_size=5))

    def shape(order):
        out = [1]
        for p in order:
            if draw(st.booleans()):
                out.append(p)
            else:
                out[-1] *= p
        return tuple(out)

    return shape(primes), shape(draw(st.permutations(primes)))


@given(reshapes())
def test_a_reshape_moves_every_index_with_its_atom(shapes):
    old, new = shapes
    axes = [lb.fresh(n) for n in old]
    out = lb.regroup(axes, old, new)
    ends = sorted(suffixes(old) | suffixes(new))
    refines = all(b % a == 0 for a, b in zip(ends, ends[1:], strict=False))
    assert (out is not None) == refines
    if out is None:
        return
    assert [lb.size(axis) for axis in out] == [*new]
    before, after = coordinates(axes, old), coordinates(out, new)
    assert before.keys() == after.keys()
    for atom, index in before.items():
        np.testing.assert_array_equal(index, after[atom])


def test_a_flattened_axis_carries_its_factors():
    h, w, c = (lb.fresh(n) for n in (4, 5, 6))
    flat = lb.regroup([h, w, c], (4, 5, 6), (120,))
    assert flat == [(*h, *w, *c)]
    back = lb.regroup(flat, (120,), (4, 5, 6))
    assert back == [h, w, c]


def test_an_axis_of_one_keeps_the_batch_of_one():
    batch, channel = (lb.Atom(1, batch=True),), lb.fresh(6)
    out = lb.regroup([batch, channel], (1, 6), (1, 2, 3))
    assert lb.carries_batch(out[0])
    assert not lb.carries_batch(out[1]) and not lb.carries_batch(out[2])


# Unions.


def same(one, two):
    return lb.expand(one) == lb.expand(two)


def test_union_is_transitive_and_keeps_what_froze_either_side():
    a, b, c, d = (lb.fresh(4) for _ in range(4))
    lb.unify(a, b)
    lb.unify(c, d)
    assert same(a, b) and same(c, d) and not same(a, c)
    lb.freeze(d, "because")
    lb.unify(b, c)
    assert same(a, d)
    assert [lb.frozen(x) for x in (a, b, c, d)] == ["because"] * 4


def test_union_splits_a_product_where_the_other_side_is_cut():
    whole, outer, inner = lb.fresh(6), lb.fresh(2), lb.fresh(3)
    lb.unify(whole, (*outer, *inner))
    assert [atom.size for atom in lb.expand(whole)] == [2, 3]
    assert same(whole, (*outer, *inner))
    lb.freeze(inner, "inner")
    assert lb.frozen(whole) == "inner" and lb.frozen(outer) is None


def test_union_freezes_all_of_two_axes_that_do_not_line_up():
    left = (*lb.fresh(3), *lb.fresh(4))
    right = (*lb.fresh(4), *lb.fresh(3))
    lb.unify(left, right)
    for atom in (*left, *right):
        assert lb.frozen((atom,))


def test_union_of_concatenations_ties_their_parts():
    parts = [lb.fresh(n) for n in (2, 3, 2, 3)]
    one = lb.concatenate(parts[:2], (2, 3))
    two = lb.concatenate(parts[2:], (2, 3))
    lb.unify(one, two)
    assert same(parts[0], parts[2]) and same(parts[1], parts[3])
    assert not same(parts[0], parts[1])
    assert lb.frozen(one) is None


def test_union_of_concatenations_with_other_borders_freezes_all_parts():
    parts = [lb.fresh(n) for n in (2, 3, 3, 2)]
    lb.unify(lb.concatenate(parts[:2], (2, 3)), lb.concatenate(parts[2:], (3, 2)))
    assert all(lb.frozen(part) for part in parts)


def test_freezing_reaches_through_products_and_concatenations():
    a, b = lb.fresh(2), lb.fresh(3)
    joined = lb.concatenate([a, b], (2, 3))
    lb.freeze((*lb.fresh(4), *joined), "all")
    assert lb.frozen(a) == lb.frozen(b) == "all"
    assert {*lb.leaves(joined)} == {*a, *b}


# Slices, against index sets.


def ranges(axis, start=0):
    """Atom at the bottom → the range of the axis that it stands for."""
    found = {}
    for atom in lb.expand(axis):
        pieces = atom.parts or ()
        offset = start
        for part in pieces:
            found |= ranges(part, offset)
            offset += lb.size(part)
        if not pieces:
            found[atom] = (start, start + atom.size)
    return found


@given(st.lists(st.tuples(st.integers(0, 11), st.integers(1, 12)), max_size=5))
def test_a_slice_holds_the_indices_that_it_says(slices):
    axis = lb.fresh(12)
    earlier = []
    for start, length in slices:
        stop = min(12, start + length)
        part = lb.cut(axis, start, stop)
        nested = all(
            b <= start or stop <= a or (a <= start and stop <= b) for a, b in earlier
        )
        if part is None:
            assert not nested
            continue
        earlier.append((start, stop))
        assert lb.size(part) == stop - start
        where = ranges(axis)
        held = sorted(where[atom] for atom in lb.leaves(part))
        assert held[0][0] == start and held[-1][1] == stop
        assert all(a[1] == b[0] for a, b in zip(held, held[1:], strict=False))


def test_a_slice_of_a_batch_has_no_label():
    assert lb.cut((lb.Atom(8, batch=True),), 2, 4) is None


def test_slices_of_a_concatenation_are_its_parts_again():
    a, b = lb.fresh(3), lb.fresh(5)
    joined = lb.concatenate([a, b], (3, 5))
    assert same(lb.cut(joined, 0, 3), a) and same(lb.cut(joined, 3, 8), b)
    assert lb.cut(joined, 2, 5) is None


# Groups by hand: (producers) -> (consumers), of those that may be rescaled.

FREE = {
    "conv_bn_relu": "stem -> head",
    "inverted_residual": "expand -> depthwise; depthwise -> project",
    "mobile": """stem block1/project block2/project -> block1/expand block2/expand last;
        block1/expand -> block1/depthwise; block1/depthwise -> block1/project;
        block2/expand -> block2/depthwise; block2/depthwise -> block2/project;
        last -> head""",
    "residual": "conv1 -> conv2",
    "resnet": """stem block1/conv2 -> block1/conv1 block2/conv1 block2/proj;
        block1/conv1 -> block1/conv2; block2/conv1 -> block2/conv2;
        block2/conv2 block2/proj -> head""",
    "clip_after_add": "stem branch -> branch head",
    "grouped": "stem -> grouped; grouped -> depthwise; depthwise -> point",
    "dilated": "first -> second",
    "strided": "first -> second",
    "transposed": "down -> up; up -> head",
    "concatenation": "stem -> left right; left -> merge; right -> merge",
    "flatten": "stem -> head",
    "global_pool": "stem -> head",
    "pooling": "first -> second; second -> third",
    "resize": "stem -> head",
    "pre_activation": "conv1 -> conv2",
    "group_norm": "",
    "slopes": "first -> second; second -> third",
    "squeeze_excite": "stem -> reduce head; reduce -> grow",
    "dense_norm": "",
    "transformer": "",
    "embedding": "first -> second",
    "tied_embedding": "",
    "gelu_mlp": "",
    "tied": "",
    "dropout": "first -> second",
    "outputs_in_a_tree": "stem -> centre size logits",
    "remat": "stem -> block/first; block/first -> block/second; block/second -> head",
    "jit": "stem -> block/first; block/first -> block/second; block/second -> head",
    "cond": "",
    "scan": "",
    "rnn": "",
    "lstm": "",
    "matmul_mlp": "",
    "einsum_heads": "",
    "gated": "up -> down",
    "two_inputs": "left right -> head",
    "plain_cond": "",
    "standardized": "",
    "equinox_conv": "layers/0 -> layers/2; layers/2 -> layers/5",
    "haiku_conv": "net/~/stem -> net/~/head",
}


def free_groups(graph):
    return {
        (frozenset(g.producers), frozenset(g.consumers)) for g in graph.groups if g.free
    }


@pytest.mark.parametrize(("name", "front"), RUNS)
def test_free_groups_are_those_written_by_hand(name, front):
    rows = [row.split("->") for row in FREE[name].split(";") if row]
    wanted = {(frozenset(m.split()), frozenset(r.split())) for m, r in rows}
    graph = traced(name, front)
    assert free_groups(graph) == wanted
    assert sum(g.free for g in graph.groups) == len(wanted)


@pytest.mark.parametrize("name", TWINS)
def test_twins_have_equal_groups(name):
    groups, members = [], []
    for front in ("linen", "nnx"):
        graph = traced(name, front)
        names = {
            g.index: (
                g.size,
                frozenset(g.producers),
                frozenset(g.consumers),
                g.clips,
                g.free,
            )
            for g in graph.groups
        }
        groups.append(sorted(map(repr, map(sorted_text, names.values()))))
        members.append({(m.parameter, m.axis, m.role, m.node) for m in graph.members})
    assert groups[0] == groups[1] and members[0] == members[1]


def sorted_text(row):
    return [sorted(x) if isinstance(x, frozenset) else x for x in row]


# The law: dividing what makes a group and multiplying what reads it changes nothing.


def along(layout, scales):
    """The scale of every index of an axis, from those of the groups in its layout."""
    out = np.ones(1)
    for item in layout:
        if isinstance(item, Joined):
            part = np.concatenate([along(p, scales) for p in item.parts])
        else:
            part = scales.get(item.group, np.ones(item.size))
        out = np.outer(out, part).ravel()
    return out


def shaped(vector, axis, ndim):
    return vector.reshape([-1 if i == axis else 1 for i in range(ndim)])


def epsilon_of(graph, parameter):
    [norm] = [n.norm for n in graph.nodes if n.norm and n.norm.variance == parameter]
    return norm.epsilon


def rescaled(graph, leaves, scales):
    """The leaves with every free group divided by its scale, in float64 numpy."""
    out = {name: np.asarray(leaf, np.float64) for name, leaf in leaves.items()}
    for m in graph.members:
        s, w = along(m.layout, scales), out[m.parameter]
        if m.role == "in" and m.groups > 1:
            # the columns of a group of outputs read that group's own inputs
            each, columns = w.shape[m.axis], w.shape[m.out_axis] // m.groups
            for k in range(m.groups):
                at = [slice(None)] * w.ndim
                at[m.out_axis] = slice(k * columns, (k + 1) * columns)
                mine = s[k * each : (k + 1) * each]
                w[tuple(at)] *= shaped(mine, m.axis, w.ndim)
            continue
        s = shaped(s, m.axis, w.ndim)
        if m.role == "in":
            w = w * s
        elif m.role == "variance":
            epsilon = epsilon_of(graph, m.parameter)
            w = (w + epsilon) / s**2 - epsilon
        else:
            assert m.role in ("out", "shift", "scale"), m.role
            w = w / s
        out[m.parameter] = w
    return out


LAW = [(name, next(iter(CASES[name].make))) for name, rows in FREE.items() if rows]


def check_law(graph, apply, params, inputs):
    """Rescale every free group at random and compare the outputs.

    Powers of two: floating-point rounding, that of casts too, commutes with them.
    """
    rng = np.random.default_rng(0)
    free = [g for g in graph.groups if g.free]
    scales = {g.index: rng.choice([0.25, 0.5, 2.0, 4.0], g.size) for g in free}
    leaves = named_leaves(params)
    new = {
        n: jnp.asarray(v, leaves[n].dtype)
        for n, v in rescaled(graph, leaves, scales).items()
    }
    for g in free:  # or nothing is tested
        for m in graph.members:
            if g.index in indices_of(m.layout):
                assert np.any(np.asarray(new[m.parameter]) != leaves[m.parameter])

    # a clip is run between its own scale and back: bounds are not part of this law
    clips = {c: scales[g.index] for g in free for c in g.clips}

    def hook(node, run, operands):
        if node.name not in clips:
            return run(*operands), None
        s = jax.device_put(np.float32(clips[node.name]))
        s = s.reshape((1,) * (operands[0].ndim - 1) + (-1,))
        return run(operands[0] * s) / s, None

    plain = jax.jit(apply)
    f = jax.jit(lambda p, *x: evaluate(apply, hook)(p, *x)[0]) if clips else plain
    before, after = plain(params, *inputs), f(replace_leaves(params, new), *inputs)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("name", "front"), LAW)
def test_rescaling_every_free_group_leaves_the_function_alone(name, front):
    check_law(traced(name, front), *model(name, front))


@pytest.mark.parametrize("name", ["resnet", "concatenation", "grouped", "flatten"])
def test_members_are_as_long_as_their_axes(name):
    graph, leaves = traced(name, "linen"), named_leaves(model(name, "linen")[1])
    assert graph.members
    for m in graph.members:
        size = leaves[m.parameter].shape[m.axis]
        assert layout_size(m.layout) == size * m.groups


def test_layouts_by_hand():
    def layout(name, parameter, role="in"):
        graph = traced(name, "linen")
        names = {g.index: g.name if g.free else None for g in graph.groups}
        [m] = [m for m in graph.members if (m.parameter, m.role) == (parameter, role)]

        def text(items):
            return [
                [text(p) for p in i.parts]
                if isinstance(i, Joined)
                else (names.get(i.group), i.size)
                for i in items
            ]

        return m, text(m.layout)

    assert layout("concatenation", "merge/kernel")[1] == [
        [[("left", 4)], [("right", 8)]]
    ]
    assert layout("flatten", "head/kernel")[1] == [(None, 4), (None, 4), ("stem", 4)]
    m, text = layout("grouped", "grouped/kernel")
    assert (text, m.groups, m.axis, m.out_axis) == ([("stem", 8)], 2, 2, 3)
    assert layout("grouped", "grouped/bias", "shift")[1] == [("grouped", 8)]


FROZEN = [  # (case, a layer that makes the group, a word of the reason)
    ("conv_bn_relu", "head", "output of the model"),
    ("residual", "conv2", "input of the model"),
    ("group_norm", "stem", "a norm over the data"),
    ("squeeze_excite", "grow", "sigmoid is not homogeneous"),
    ("dense_norm", "first", "a norm over the data"),
    ("gelu_mlp", "first", "gelu is not homogeneous"),
    ("transformer", "attn/value", "a product of two activations"),
    ("transformer", "up", "gelu is not homogeneous"),
]


@pytest.mark.parametrize(("name", "producer", "why"), FROZEN)
def test_a_frozen_group_says_why(name, producer, why):
    graph = traced(name, "linen")
    reasons = [g.frozen for g in graph.groups if producer in g.producers]
    assert reasons and all(reasons)
    assert any(why in reason for reason in reasons), reasons


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("tied", "shared:0 shared:1"),
        ("tied_embedding", "embed:0 embed:1 middle"),
        ("scan", "stack/dense"),
        ("cond", "low high"),
        ("rnn", "rnn/cell/i rnn/cell/h"),
        ("lstm", "rnn/cell rnn/cell:1"),
    ],
)
def test_shared_stacked_and_derived_weights_join_no_free_group(name, layers):
    graph = traced(name, "linen")
    for group in graph.groups:
        if group.free:
            assert not {*group.producers, *group.consumers} & {*layers.split()}


# Groups of small models that the zoo does not have.


def conv(x, w, **kw):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=layout, **kw
    )


def small(body, cin=6):
    """x -> a -> body -> b with 6 channels out of a, and its graph."""
    rng = np.random.default_rng(1)
    shapes = {"a": (3, 3, 3, 6), "b": (1, 1, cin, 4), "x": (2, 8, 8, 3)}
    p = {
        k: jax.device_put(np.float32(rng.normal(0, 0.5, s))) for k, s in shapes.items()
    }
    x = p.pop("x")

    def apply(p, x):
        return conv(body(conv(x, p["a"])), p["b"])

    return trace(apply, p, x), apply, p, (x,)


@pytest.mark.parametrize(
    "body",
    [
        jax.nn.relu,
        lambda x: jnp.abs(x),
        lambda x: -2.0 * x,
        lambda x: jnp.where(x > 0.0, x, 0.1 * x),
        lambda x: jnp.where(0.0 >= x, 0.1 * x, x),
        lambda x: jnp.maximum(x, 0.3 * x),
        lambda x: jax.nn.relu6(x),
        lambda x: jnp.clip(x, -1.0, 2.0),
        lambda x: jnp.transpose(x, (0, 2, 1, 3)),
        lambda x: jax.lax.stop_gradient(x),
        lambda x: x.reshape(2, 64, 6).reshape(2, 8, 8, 6),
        lambda x: x[:, ::2, 1:, :],
        lambda x: x[:, ::-1],
        lambda x: jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))),
        lambda x: x.astype(jnp.float16).astype(jnp.float32),
        lambda x: jnp.einsum("bhwc,hk->bkwc", x, jnp.tril(jnp.ones((8, 8)))),
        jax.jit(lambda x: jax.nn.relu(x)),
        jax.checkpoint(lambda x: jax.nn.relu(x)),
    ],
)
def test_what_is_homogeneous_leaves_a_group_free(body):
    graph, *rest = small(body)
    assert free_groups(graph) == {(frozenset("a"), frozenset("b"))}
    check_law(graph, *rest)


@pytest.mark.parametrize(
    "body",
    [
        jnp.tanh,
        jax.nn.silu,
        jnp.exp,
        lambda x: x * x,
        lambda x: x + 1.0,
        lambda x: jnp.where(x > 1.0, x, 0.0),
        lambda x: jnp.where(x > 0.5, x, 0.1 * x),
        lambda x: x / jnp.sum(x, axis=-1, keepdims=True),
        lambda x: jnp.sort(x, axis=-1),
        lambda x: jnp.cumsum(x, axis=-1),
        lambda x: x[..., ::-1],
        lambda x: x.reshape(2, 8, 6, 8).reshape(2, 8, 8, 6),
        lambda x: jnp.transpose(x.reshape(2, 8, 8, 2, 3), (0, 1, 2, 4, 3)).reshape(
            x.shape
        ),
        lambda x: jax.nn.softmax(x),
        lambda x: jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1.0),
        lambda x: jax.lax.fori_loop(0, 3, lambda i, x: 0.5 * x, x),
        lambda x: jnp.round(x),
    ],
)
def test_what_is_not_freezes_it(body):
    graph, *_ = small(body)
    groups = [g for g in graph.groups if "a" in g.producers or "b" in g.consumers]
    assert groups
    # a channel shuffle may leave finer groups free, never one that it mixes up
    for g in groups:
        if g.free:
            assert g.size in (2, 3)
            assert (g.producers, g.consumers) == (("a",), ("b",))
        else:
            assert g.frozen


def test_a_channel_shuffle_leaves_its_two_factors_free():
    """Channels (2, 3) become (3, 2): scales a_i·b_j commute with the transposition."""

    def shuffle(x):
        split = x.reshape(*x.shape[:3], 2, 3)
        return jnp.transpose(split, (0, 1, 2, 4, 3)).reshape(x.shape)

    graph, *rest = small(shuffle)
    sizes = {(m.parameter, m.role): [i.size for i in m.layout] for m in graph.members}
    assert sizes["a", "out"] == [2, 3] and sizes["b", "in"] == [3, 2]
    assert sum(g.free for g in graph.groups) == 2
    check_law(graph, *rest)


def test_channels_that_are_rolled_are_two_groups():
    graph, *rest = small(lambda x: jnp.roll(x, 2, axis=-1))
    assert sorted(g.size for g in graph.groups if g.free) == [2, 4]
    check_law(graph, *rest)


def test_a_split_makes_two_groups_and_a_slice_across_them_freezes():
    def body(x):
        left, right = jnp.split(x, [2], axis=-1)
        return jnp.concatenate([jax.nn.relu(right), left], axis=-1)

    graph, *rest = small(body)
    free = [g for g in graph.groups if g.free]
    assert sorted(g.size for g in free) == [2, 4]
    layouts = {(m.parameter, m.role): m.layout for m in graph.members}
    [out], [into] = layouts["a", "out"], layouts["b", "in"]
    assert isinstance(out, Joined) and isinstance(into, Joined)
    assert out.parts == into.parts[::-1]
    assert [layout_size(p) for p in out.parts] == [2, 4]
    check_law(graph, *rest)

    across, *_ = small(
        lambda x: body(x) + jnp.concatenate([x[..., 1:], x[..., :1]], -1)
    )
    assert not [g for g in across.groups if g.free]


def test_a_padded_channel_axis_is_read_after_its_zeros():
    """The shortcut of a small ResNet: zero channels appended before an addition."""
    pad = ((0, 0), (0, 0), (0, 0), (1, 3))
    graph, *rest = small(lambda x: jnp.pad(x, pad), cin=10)
    [group] = [g for g in graph.groups if g.free and g.producers]
    assert (group.size, group.consumers) == (6, ("b",))
    [layout] = [m.layout for m in graph.members if (m.parameter, m.role) == ("b", "in")]
    assert [layout_size(p) for p in layout[0].parts] == [1, 6, 3]
    assert layout[0].parts[1] == (Span(group.index, 6),)
    check_law(graph, *rest)


@pytest.mark.parametrize(("filler", "free"), [(jnp.ones, False), (jnp.zeros, True)])
def test_a_concatenation_with_a_constant_freezes_unless_it_is_zero(filler, free):
    graph, *rest = small(
        lambda x: jnp.concatenate([x, filler((2, 8, 8, 2))], axis=-1), cin=8
    )
    assert any(g.free for g in graph.groups if "a" in g.producers) == free
    check_law(graph, *rest)
