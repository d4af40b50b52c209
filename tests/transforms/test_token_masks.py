"""Padded positions count nowhere: masked statistics are those of the sequences by themselves."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmet as jm
from jaxmet import evaluate
from jaxmet.engine.run.replay import Counted
from jaxmet.layers.grams import grams
from jaxmet.tree.batches import BatchInfo, as_batches

RNG = np.random.default_rng(0)
LENGTHS = np.array([3, 8, 6, 8, 6, 3])  # each length compiles once
KEEP = np.arange(8)[None] < LENGTHS[:, None]
PAD, GARBAGE = 15, 14  # tokens that occur in padded positions alone


class Block(nn.Module):
    """Attention under a padding mask, a feed-forward part, and the mean of real tokens."""

    @nn.compact
    def __call__(self, ids, keep):
        x = nn.Embed(16, 8, name="tokens")(ids)
        x = x + nn.Embed(8, 8, name="places")(jnp.arange(ids.shape[1])[None])
        seen = nn.make_attention_mask(keep, keep)
        y = nn.LayerNorm(name="first")(x)
        y = nn.MultiHeadDotProductAttention(2, name="attention")(y, mask=seen)
        x = x + y
        y = nn.Dense(12, name="up")(nn.LayerNorm(name="second")(x))
        x = x + nn.Dense(8, name="down")(nn.gelu(y))
        weight = keep[..., None].astype(x.dtype)
        pooled = (x * weight).sum(1) / jnp.maximum(weight.sum(1), 1.0)
        return nn.Dense(5, name="head")(pooled), x


MODEL = Block()
IDS = np.where(KEEP, RNG.integers(0, 14, KEEP.shape), PAD)
BAD = np.where(KEEP, IDS, GARBAGE)
ALONE = [(IDS[i : i + 1, :n], KEEP[i : i + 1, :n]) for i, n in enumerate(LENGTHS)]


def _params():
    params = jax.jit(MODEL.init)(jax.random.key(0), IDS, KEEP)
    leaves = params["params"]
    table = np.array(leaves["tokens"]["embedding"])
    table[PAD] *= 5.0
    table[GARBAGE] = 1e3 * np.sign(table[GARBAGE])
    leaves["tokens"]["embedding"] = jnp.asarray(table)
    for name in ("up", "down", "head"):
        bias = leaves[name]["bias"]
        leaves[name]["bias"] = jax.random.normal(jax.random.key(1), bias.shape)
    return params


PARAMS = _params()
GRAPH = jm.trace(MODEL.apply, PARAMS, IDS, KEEP)
PADDED = jm.batched((IDS, KEEP), batch_size=3)
WORSE = jm.batched((BAD, KEEP), batch_size=3)


def where(batch):
    return batch[1]


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@functools.cache
def counting(apply):
    """The results of all nodes, and which of their values count."""

    def hook(node, run, operands):
        result = run(*operands)
        if not jnp.issubdtype(result.dtype, jnp.floating):
            return result, None
        own = np.True_ if run.counts is None else run.counts
        return result, (result, jnp.broadcast_to(own, result.shape))

    return jax.jit(evaluate(apply, hook))


def counted(apply, params, *inputs, mask=None):
    """What counts of each node's result, as one sorted row."""
    info = () if mask is None else (BatchInfo(mask=jnp.asarray(mask)),)
    found = counting(apply)(params, *inputs, *info)[1]
    taken = {
        name: one.value if isinstance(one, Counted) else one
        for name, one in found.items()
        if not isinstance(one, Counted) or one.count > 0
    }
    return {
        name: np.sort(np.asarray(values)[np.asarray(own)])
        for name, (values, own) in taken.items()
    }


def check_like_alone(apply, params, padded, lengths, keep, *, without=()):
    """Values that count in a padded batch are those of the sequences run one by one."""
    together = counted(apply, params, *padded, mask=keep)
    singles = [
        counted(apply, params, *(x[i : i + 1, :n] for x in padded))
        for i, n in enumerate(lengths)
    ]
    for name, values in together.items():
        alone = np.sort(np.concatenate([one[name] for one in singles]))
        if name not in without:
            assert values.shape == alone.shape, name
            np.testing.assert_allclose(
                values, alone, rtol=2e-4, atol=2e-5, err_msg=name
            )
    return together


@pytest.mark.parametrize("ids", [IDS, BAD])
def test_what_counts_of_a_transformer_is_what_it_computes_of_each_sequence(ids):
    found = check_like_alone(MODEL.apply, PARAMS, (ids, KEEP), LENGTHS, KEEP)
    assert {"attention/query", "attention/key/softmax", "down/add", "head"} <= set(
        found
    )


TOKENS = RNG.normal(size=(*KEEP.shape, 4)).astype(np.float32)
TOKENS = np.where(KEEP[..., None], TOKENS, 1e3).astype(np.float32)
WIDE = {
    "a": jax.device_put(np.float32(RNG.normal(size=(4, 6)))),
    "b": jax.device_put(np.float32(RNG.normal(size=(6, 6)))),
    "c": jax.device_put(np.float32(RNG.normal(size=(3, 6, 6)))),
    "layers": jax.device_put(np.float32(RNG.normal(size=(3, 6, 6)) / 3)),
}


def merged(p, x):
    y = jnp.tanh(x.reshape(-1, 4) @ p["a"])
    return (y @ p["b"]).reshape(*x.shape[:2], 2, 3)


def heads(p, x):
    y = (x @ p["a"]).reshape(*x.shape[:2], 2, 3).transpose(0, 2, 1, 3)
    return jnp.tanh(y).transpose(2, 0, 1, 3).reshape(x.shape[1], -1, 6) @ p["b"]


def reversed_and_cut(p, x):
    return jnp.tanh((x @ p["a"])[:, ::-1]) @ p["b"]


def shifted(p, x):
    y = x @ p["a"]
    before = jnp.pad(y, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    return jnp.tanh(y + before) @ p["b"]


def with_a_token(p, x):
    y = x @ p["a"]
    first = jnp.broadcast_to(p["b"][0], (x.shape[0], 1, 6))
    return jnp.tanh(jnp.concatenate([first, y], 1)) @ p["b"]


def layers(p, x):
    def layer(y, w):
        return y + jnp.tanh(y @ w), None

    return jax.lax.scan(layer, x @ p["a"], p["layers"])[0] @ p["b"]


def checkpointed(p, x):
    layer = jax.checkpoint(lambda y, w: y + jnp.tanh(y @ w))
    return layer(layer(x @ p["a"], p["layers"][0]), p["layers"][1]) @ p["b"]


def branched(p, x):
    y = x @ p["a"]
    up = lambda y: jnp.tanh(y @ p["b"])
    return jax.lax.cond(p["b"][0, 0] > -9, up, lambda y: y, y) @ p["b"]


def causal(p, x):
    y = x @ p["a"]
    numbers = ("NWC", "WIO", "NWC")
    conv = jax.lax.conv_general_dilated
    return jnp.tanh(conv(y, p["c"], (1,), [(2, 0)], dimension_numbers=numbers))


def recurrent(p, x):
    def step(h, token):
        h = jnp.tanh(token @ p["a"] + h @ p["b"])
        return h, h

    start = jnp.zeros((x.shape[0], 6))
    return jax.lax.scan(step, start, x.swapaxes(0, 1))[1].swapaxes(0, 1) @ p["b"]


def gathered(p, x):
    order = jnp.arange(x.shape[1])[::-1]
    return jnp.tanh(jnp.take(x @ p["a"], order, axis=1)) @ p["b"]


def grouped(p, x):
    y = jnp.einsum("btc,cd->tbd", x, p["a"])
    return jnp.einsum("tbd,de->ebt", jnp.tanh(y), p["b"])


ARCHITECTURES = [
    merged,
    heads,
    reversed_and_cut,
    shifted,
    with_a_token,
    layers,
    checkpointed,
    branched,
    causal,
    recurrent,
    gathered,
    grouped,
]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("apply", ARCHITECTURES)
def test_tokens_are_followed_wherever_they_are_moved(apply):
    check_like_alone(apply, WIDE, (TOKENS,), LENGTHS, KEEP)


@pytest.mark.parametrize("stride", [1, 2])
def test_windows_count_as_many_outputs_as_each_sequence_has(stride):
    """Without padding, all that a window reads counts."""

    def apply(p, x):
        numbers = ("NWC", "WIO", "NWC")
        conv = jax.lax.conv_general_dilated
        y = conv(x @ p["a"], p["c"], (stride,), "VALID", dimension_numbers=numbers)
        return nn.max_pool(jnp.tanh(y), (2,), (1,))

    long = LENGTHS >= 6
    check_like_alone(apply, WIDE, (TOKENS[long],), LENGTHS[long], KEEP[long])


def test_a_mask_of_examples_leaves_out_whole_ones():
    apply = lambda p, x: jnp.tanh(x.mean(1) @ p["a"]) @ p["b"]
    some = np.array([True, True, False, True, False, False])
    masked = counted(apply, WIDE, TOKENS, mask=some)
    plain = counted(apply, WIDE, TOKENS[some])
    for name, values in plain.items():
        np.testing.assert_allclose(masked[name], values, rtol=1e-5)


# What every pass over data makes of it

RANGES = ["minmax", "percentile", "mse", "sqnr", "entropy"]


@pytest.mark.one_in(5)
@pytest.mark.parametrize("method", RANGES)
def test_ranges_are_those_of_the_sequences_alone(method):
    config = jm.QuantConfig(activation_range=method, residual_bits=None)
    options = {"config": config, "samples": None, "progress": False}
    found = jm.calibrate(PARAMS, GRAPH, PADDED, mask=where, **options)
    alone = jm.calibrate(PARAMS, GRAPH, ALONE, **options)
    assert found.activations.keys() == alone.activations.keys()
    for name, quantizer in alone.activations.items():
        mine = found.activations[name].grid(None)
        for a, b in zip(mine, quantizer.grid(None), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=0.51, err_msg=name)
        np.testing.assert_allclose(mine[0], quantizer.grid(None)[0], rtol=1e-4)
    plain = jm.calibrate(PARAMS, GRAPH, WORSE, **options)
    scale = lambda q: float(q.activations["tokens"].grid(None)[0])
    assert scale(plain) > 10 * scale(found)


def test_extremes_are_those_that_numpy_finds():
    """Of the layers, as flax itself gives their outputs."""
    found = jm.calibrate(PARAMS, GRAPH, PADDED, mask=where, progress=False)
    lows, highs = {}, {}
    shown = jax.jit(lambda *x: MODEL.apply(PARAMS, *x, capture_intermediates=True)[1])
    for ids, keep in ALONE:
        state = shown(ids, keep)
        for name in ("up", "down", "head", "first", "second"):
            (y,) = state["intermediates"][name]["__call__"]
            lows[name] = min(lows.get(name, 0.0), float(y.min()))
            highs[name] = max(highs.get(name, 0.0), float(y.max()))
    checked = 0
    for name in lows:
        if name in found.activations:
            span = float(found.activations[name].grid(None)[0]) * 255
            np.testing.assert_allclose(span, highs[name] - lows[name], rtol=1e-5)
            checked += 1
    assert checked >= 3


@pytest.mark.one_in(2)
@pytest.mark.parametrize("of", ["weights", "both"])
def test_biases_are_corrected_by_real_tokens(of):
    quantizers = jm.calibrate(PARAMS, GRAPH, PADDED, mask=where, progress=False)
    quantizers = quantizers.set("*", bits=4)
    options = {"of": of, "progress": False}
    found = jm.correct_bias(PARAMS, GRAPH, quantizers, PADDED, mask=where, **options)
    alone = jm.correct_bias(PARAMS, GRAPH, quantizers, ALONE, **options)
    tree = jax.tree.map(np.asarray, (found, alone))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), *tree)
    plain = jm.correct_bias(PARAMS, GRAPH, quantizers, PADDED, **options)
    apart = lambda a: float(
        np.abs(a["params"]["down"]["bias"] - alone["params"]["down"]["bias"]).max()
    )
    assert apart(plain) > 20 * apart(found)


def test_gram_matrices_are_sums_over_real_tokens():
    names = ["attention/query", "attention/out", "up", "down", "head"]
    options = {"caller": "test", "key": jax.random.key(0), "progress": False}
    masked = as_batches(PADDED, "test", mask=where)
    found = grams(GRAPH, PARAMS, masked, names, **options)
    rows = {name: [] for name in names}

    def hook(node, run, operands):
        y = run(*operands)
        return y, operands[0] if node.name in rows else None

    run = jax.jit(evaluate(MODEL.apply, hook))
    for one in ALONE:
        for name, x in run(PARAMS, *one)[1].items():
            wide = x.reshape(-1, 8 if x.ndim == 4 else x.shape[-1])
            rows[name].append(np.asarray(wide, np.float64))
    for name, parts in rows.items():
        x = np.concatenate(parts)
        assert float(found[name].number) == len(x)
        np.testing.assert_allclose(found[name].sums[0], x.sum(0), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(
            found[name].products[0], x.T @ x, rtol=1e-3, atol=1e-3
        )


@functools.cache
def coarse():
    found = jm.calibrate(PARAMS, GRAPH, PADDED, mask=where, progress=False)
    return found.set("*", bits=4)


def passes():
    """Every public pass over data, as a function of batches and options."""
    key = jax.random.key(3)
    few = {"rows": 8, "progress": False}
    quiet = {"progress": False}
    mse = jm.QuantConfig(activation_range="mse")
    score = lambda apply, params: -jnp.sum(apply(params, IDS, KEEP)[0] ** 2)
    yield "calibrate", lambda b, o: jm.calibrate(PARAMS, GRAPH, b, mse, **quiet, **o)
    yield (
        "correct_bias",
        lambda b, o: jm.correct_bias(PARAMS, GRAPH, coarse(), b, **quiet, **o),
    )
    short = {"adam": jm.Adam(iterations=20), "gram": jm.Gram(iterations=20)}
    for method in ("coordinate", "gptq", "adam", "gram"):
        yield (
            f"adaround {method}",
            lambda b, o, m=short.get(method, method): jm.adaround(
                PARAMS, GRAPH, coarse(), b, key=key, method=m, rows=30,
                progress=False, **o
            ),
        )  # fmt: skip
    yield (
        "search_scales",
        lambda b, o: jm.search_scales(PARAMS, GRAPH, coarse(), b, **few, **o),
    )
    yield (
        "factorize",
        lambda b, o: jm.factorize(PARAMS, GRAPH, ratios=0.6, batches=b, **few, **o),
    )
    yield "prune", lambda b, o: jm.prune(PARAMS, GRAPH, 0.6, batches=b, **few, **o)
    yield (
        "equalize",
        lambda b, o: jm.equalize(PARAMS, GRAPH, batches=b, **quiet, **o),
    )
    yield "smooth", lambda b, o: jm.smooth(PARAMS, GRAPH, b, **quiet, **o)
    yield (
        "noise",
        lambda b, o: jm.noise(PARAMS, GRAPH, coarse(), b, examples=4, **quiet, **o),
    )
    yield (
        "compare",
        lambda b, o: jm.compare(PARAMS, GRAPH, coarse(), next(iter(b)), **o),
    )
    yield (
        "score_ratios",
        lambda b, o: jm.score_ratios(
            PARAMS, GRAPH, score, batches=b, ratios=(0.5,), **few, **o
        ),
    )


PASSES = dict(passes())


def stated(found):
    """What came out, so that it can be compared bit by bit."""
    if isinstance(found, jm.Table):
        return [repr(list(found))]
    if isinstance(found, tuple):
        return [s for one in found for s in stated(one)]
    return bits(found)


def numbers(found):
    """All numbers of what came out, in one row."""
    if isinstance(found, jm.Table):
        found = [[v for v in row.values() if isinstance(v, float)] for row in found]
    arrays = [np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(found)]
    return np.concatenate(arrays)


@pytest.mark.one_in(8)
@pytest.mark.parametrize("name", sorted({*PASSES} - {"adaround adam"}))
def test_garbage_in_padded_positions_changes_nothing(name):
    run = PASSES[name]
    assert stated(run(PADDED, {"mask": where})) == stated(run(WORSE, {"mask": where}))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", ["noise", "calibrate", "adaround gram", "prune"])
def test_a_mask_that_is_true_everywhere_is_no_mask(name):
    """But for the order of sums, by which a weight on the edge may round the other way."""
    run = PASSES[name]
    every = lambda batch: np.ones(batch[0].shape, bool)
    some, none = (numbers(run(PADDED, options)) for options in ({"mask": every}, {}))
    assert len(some) == len(none) > 0
    same = np.isclose(some, none, rtol=1e-4, atol=1e-5)
    assert same.mean() > 0.99 if name.startswith("adaround") else same.all()


def test_both_forms_of_batches_give_the_same_numbers():
    parts = [(IDS[:4], KEEP[:4]), (IDS[4:], KEEP[4:])]
    loader = [{"ids": i, "attention_mask": k.astype(np.int32)} for i, k in parts]
    uneven = jm.batched((IDS, KEEP), batch_size=4)
    one = jm.calibrate(PARAMS, GRAPH, uneven, mask=where, progress=False)
    even = jm.calibrate(PARAMS, GRAPH, PADDED, mask=where, progress=False)
    assert bits(one) == bits(even)
    two = jm.calibrate(
        PARAMS,
        GRAPH,
        loader,
        inputs=lambda b: (b["ids"], b["attention_mask"] > 0),
        mask=lambda b: b["attention_mask"] > 0,
        progress=False,
    )
    assert bits(one) == bits(two)


@pytest.mark.slow
def test_the_quantized_model_is_as_good_as_if_there_were_no_padding():
    def ratio(quantizers):
        run = jax.jit(jm.simulate(MODEL.apply, quantizers))
        signal = noise = 0.0
        for one in ALONE:
            pairs = zip(MODEL.apply(PARAMS, *one), run(PARAMS, *one), strict=True)
            for y, z in pairs:
                y, z = (np.asarray(v, np.float64) for v in (y, z))
                signal, noise = signal + np.sum(y * y), noise + np.sum((y - z) ** 2)
        return 10 * np.log10(signal / noise)

    config = jm.QuantConfig(residual_bits=None)  # padding is large in the stream
    options = {"config": config, "progress": False}
    masked = ratio(jm.calibrate(PARAMS, GRAPH, PADDED, mask=where, **options))
    alone = ratio(jm.calibrate(PARAMS, GRAPH, ALONE, **options))
    plain = ratio(jm.calibrate(PARAMS, GRAPH, WORSE, **options))
    assert abs(masked - alone) < 0.1
    assert plain < masked - 1


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:jaxmet.ptq. the result has"
)  # biases cost 2 dB here
def test_ptq_counts_real_tokens_in_every_step():
    options = {"mask": where, "progress": False}
    *one, table = jm.ptq(MODEL.apply, PARAMS, PADDED, **options)
    *two, other = jm.ptq(MODEL.apply, PARAMS, WORSE, **options)
    assert bits(one) == bits(two)
    assert table["SQNR (dB)"] == other["SQNR (dB)"]


def test_norms_are_measured_on_real_positions():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(6, name="dense")(x)
            x = nn.BatchNorm(use_running_average=True, name="norm")(x)
            return nn.Dense(3, name="last")(nn.relu(x))

    model = Net()
    params = jax.jit(model.init)(jax.random.key(0), TOKENS)
    graph = jm.trace(model.apply, params, TOKENS)
    found = jm.reestimate_batch_norm(
        params,
        graph,
        jm.batched(TOKENS, 4),
        mask=lambda x: x[..., 0] < 100,
        progress=False,
    )
    dense = jax.tree.map(lambda x: np.asarray(x, np.float64), params["params"]["dense"])
    rows = TOKENS[KEEP].astype(np.float64) @ dense["kernel"] + dense["bias"]
    stats = found["batch_stats"]["norm"]
    np.testing.assert_allclose(stats["mean"], rows.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stats["var"], rows.var(0), rtol=1e-4)


def test_a_batch_without_anything_that_counts_is_harmless():
    nothing = (BAD[:3], np.zeros_like(KEEP[:3]))
    batches = [(IDS[:3], KEEP[:3]), nothing]
    one = jm.calibrate(PARAMS, GRAPH, [batches[0]], mask=where, progress=False)
    two = jm.calibrate(PARAMS, GRAPH, batches, mask=where, progress=False)
    assert bits(one) == bits(two)
    config = jm.QuantConfig(activation_range="mse")
    two = jm.calibrate(PARAMS, GRAPH, batches, config, mask=where, progress=False)
    assert all(np.isfinite(q.grid(None)[0]).all() for q in two.activations.values())


# What cannot be followed, and what is refused


def test_tokens_that_cannot_be_followed_are_named():
    apply = lambda p, x: jnp.tanh(jnp.sort(x @ p["a"], axis=1) @ p["b"])
    graph = jm.trace(apply, WIDE, TOKENS)
    quantizers = jm.calibrate(
        WIDE, graph, [TOKENS], mask=lambda x: x[..., 0] < 100, progress=False
    )
    left = dict(quantizers.skipped)
    assert "sort" in left["mask of b"] and "mask of a" not in left
    found = jm.factorize(
        WIDE, graph, ratios=0.5, batches=[TOKENS], mask=lambda x: x[..., 0] < 100,
        with_report=True, progress=False,
    )  # fmt: skip
    notes = dict(zip(found[1]["layer"], found[1]["note"], strict=True))
    assert "sort" in notes["b"] and notes["a"] is None


@pytest.mark.parametrize(
    ("mask", "what"),
    [
        (lambda b: b[1].astype(np.int32), "int32"),
        (lambda b: b[1][:, :-1], r"\(3, 7\)"),
        (lambda b: b[1][:-1], r"\(2, 8\)"),
        (lambda b: b[1].T, r"\(8, 3\)"),
        (lambda b: np.zeros_like(b[1]), "none of its values"),
        (lambda b: True, "not an array"),
        (lambda b: np.True_, r"\(\)"),
        (KEEP, "is a function"),
    ],
)
def test_masks_that_are_none_are_refused_before_the_pass(mask, what):
    ran = []

    def apply(params, ids, keep):
        ran.append(1)
        return MODEL.apply(params, ids, keep)

    graph = jm.trace(apply, PARAMS, IDS, KEEP)
    ran.clear()
    with pytest.raises(ValueError, match=rf"jaxmet\.calibrate: .*{what}"):
        jm.calibrate(PARAMS, graph, PADDED, mask=mask, progress=False)
    assert not ran


# Positions that are looked at differ from batch to batch


def far(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


FAR = jm.trace(far, WIDE, jnp.ones((2, 64, 4)))


def gram_rank(batches, **options):
    """How many positions were looked at: inputs are the digits of theirs."""
    read = as_batches(batches, "test")
    options = {"caller": "test", "key": jax.random.key(0), "progress": False, **options}
    return grams(FAR, WIDE, read, ["a"], **options)["a"]


def test_later_batches_show_other_positions():
    """Each position has an angle of its own, so a Gram matrix of few has few directions."""
    one = np.zeros((1, 64, 4), np.float32)
    one[0, np.arange(64), np.arange(64) % 4] = 4.0 ** (np.arange(64) // 4 % 4)
    first = gram_rank([one], rows=2)
    assert float(first.number) == 2
    again = gram_rank([one], rows=2)
    assert bits(first) == bits(again)
    other = gram_rank([one], rows=2, key=jax.random.key(1))
    assert bits(first) != bits(other)
    many = gram_rank([one] * 40, rows=2)
    assert np.linalg.matrix_rank(np.asarray(many.products[0])) == 4
    assert np.linalg.matrix_rank(np.asarray(first.products[0])) <= 2
    joined = gram_rank(jm.batched(np.repeat(one, 40, 0), 1), rows=2)
    np.testing.assert_allclose(joined.products, many.products, rtol=1e-6)


def test_what_only_later_batches_show_decides_about_factors():
    """All that counts lies in one half of the positions, of which a fixed draw sees little."""
    x = np.zeros((1, 64, 4), np.float32)
    x[0, :, 0] = 1.0
    x[0, 5, :] = [0.0, 30.0, 0.0, 0.0]
    error = []
    for number in (1, 200):
        small = jm.factorize(
            WIDE,
            FAR.only("a"),
            ranks={"a": 1},
            batches=[x] * number,
            rows=4,
            progress=False,
        )
        y = np.asarray(jm.densify(small)["a"], np.float64)
        error.append(np.abs(x[0] @ y - x[0] @ np.asarray(WIDE["a"], np.float64)).max())
    assert error[1] < 0.2 * error[0]


def test_histograms_count_other_positions_in_other_batches():
    """Batches go on where the one before stopped: after a round all count equally often."""
    x = jnp.arange(1.0, 31.0)
    tally = jm.numerics.histogram.tally
    whole = np.asarray(tally(x).counts)
    total = np.zeros_like(whole)
    for k in range(30):
        total = total + np.asarray(tally(x, 5, number=k).counts)
        each = total[whole > 0]
        assert each.max() - each.min() <= 1
    np.testing.assert_array_equal(total, 5 * whole)
    config = jm.QuantConfig(activation_range="percentile", rules=())
    wide = np.zeros((1, 64, 4), np.float32)
    wide[0, ::7] = np.linspace(-3, 3, 40, dtype=np.float32).reshape(10, 4)
    options = {"samples": 16, "progress": False}
    one, two = (jm.calibrate(WIDE, FAR, [wide] * n, config, **options) for n in (1, 40))
    assert bits(one.activations) != bits(two.activations)
