"""Rounding of weights, each piece against float64 numpy or all there is to choose from."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmet.numerics.fake_quant import fake_quant
from jaxmet.numerics.grid import grid_ends
from jaxmet.numerics.ranges import grid_between
from jaxmet.numerics.rounding.coordinate import BLOCK, coordinate_descent
from jaxmet.numerics.rounding.levels import LevelGrid, nearest
from jaxmet.numerics.rounding.quadratic import (
    Products,
    best_weight,
    bias_correction,
    centred,
    damped,
    output_error,
)
from jaxmet.numerics.rounding.scales import refit_scales
from jaxmet.numerics.rounding.search import search_scales, search_scales_by_rows
from jaxmet.numerics.rounding.soft_rounding import (
    GramData,
    RowData,
    Schedule,
    adaround,
    beta_at,
    hard_weight,
    initial_alpha,
    inverse_rectified_sigmoid,
    rectified_sigmoid,
    regulariser,
    row_error,
    soft_weight,
    start_adaround,
)

STARTS = ("nearest", "gptq")


# Data and oracles, in float64.


def inputs(rng, groups, rows, ins, offset=0.3):
    """Correlated, rectified inputs."""
    mix = rng.normal(size=(groups, ins, ins)) / np.sqrt(ins) + 0.3 * np.eye(ins)
    return np.maximum(rng.normal(size=(groups, rows, ins)) @ mix + offset, 0)


def mean_product(a, b):
    return np.einsum("gni,gnj->gij", a, b) / a.shape[1]


def narrow(x):
    return None if x is None else jax.device_put(np.float32(x))


def wide(x):
    return np.asarray(x, np.float64)


def grid_for(weight, bits, symmetric=True, blocks=1, share=1.0):
    groups, ins, outs = weight.shape
    apart = share * weight.reshape(groups, blocks, -1, outs)
    low, high = grid_ends(bits, signed=symmetric)
    ends = narrow(apart.min(2)), narrow(apart.max(2))
    scale, zero = grid_between(*ends, low, high, symmetric=symmetric)
    return LevelGrid(scale, zero, low, high)


def repeated(v, ins):
    return np.repeat(wide(v), ins // v.shape[1], axis=1)


def rounded_by_hand(weight, grid):
    ins = weight.shape[1]
    s, z = repeated(grid.scale, ins), repeated(grid.zero_point, ins)
    return s * (np.clip(np.rint(weight / s) + z, float(grid.low), float(grid.high)) - z)


def form(error, gram):
    return np.einsum("gio,gij,gjo->go", error, gram, error)


def layer(seed, groups=2, rows=200, ins=12, outs=5, offset=0.3):
    rng = np.random.default_rng(seed)
    weight = narrow(rng.normal(size=(groups, ins, outs)))
    return weight, inputs(rng, groups, rows, ins, offset)


def on_grid(rounded, grid):
    ins = rounded.shape[1]
    s, z = repeated(grid.scale, ins), repeated(grid.zero_point, ins)
    level = wide(rounded) / s + z
    whole = np.abs(level - np.rint(level)).max() < 1e-4
    return whole and level.min() > grid.low - 0.1 and level.max() < grid.high + 0.1


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("blocks", [1, 3])
def test_nearest_is_fake_quant(symmetric, blocks):
    weight, _ = layer(0)
    grid = grid_for(weight, 4, symmetric, blocks, 0.8)
    steps = (narrow(repeated(v, 12)) for v in (grid.scale, grid.zero_point))
    expected = fake_quant(weight, *steps, grid.low, grid.high)
    assert np.array_equal(nearest(weight, grid), expected)
    assert np.allclose(expected, rounded_by_hand(weight, grid), atol=1e-5)


# The quadratic form


def two_inputs(seed):
    weight, x = layer(seed)
    rng = np.random.default_rng(seed + 1)
    xq = x + 0.1 * rng.normal(size=x.shape) + 0.05
    products = mean_product(xq, xq), mean_product(xq, x), mean_product(x, x)
    return weight, x, xq, Products(*map(narrow, products))


def test_output_error_is_that_of_the_outputs():
    weight, x, xq, products = two_inputs(0)
    rounded = rounded_by_hand(weight, grid_for(weight, 3))
    expected = ((x @ weight - xq @ rounded) ** 2).mean(1)
    found = output_error(weight, narrow(rounded), products)
    assert np.allclose(found, expected, rtol=1e-4)
    unmoved = ((x @ weight - xq @ weight) ** 2).mean(1)
    found = output_error(weight, narrow(rounded), products._replace(energy=None))
    assert np.allclose(found, expected - unmoved, rtol=1e-4, atol=1e-5)
    same = output_error(weight, narrow(rounded), Products(products.gram))
    assert np.allclose(same, ((xq @ (weight - rounded)) ** 2).mean(1), rtol=1e-4)


def test_centred_error_is_what_the_best_bias_leaves():
    weight, x, xq, products = two_inputs(0)
    rounded = rounded_by_hand(weight, grid_for(weight, 3))
    means = narrow(xq.mean(1)), narrow(x.mean(1))
    bias = bias_correction(weight, narrow(rounded), *means)
    error = x @ weight - xq @ rounded
    assert np.allclose(bias, error.mean(1), atol=1e-5)
    left = output_error(weight, narrow(rounded), centred(products, *means))
    assert np.allclose(left, error.var(1), rtol=1e-3)
    alone = bias_correction(weight, narrow(rounded), means[0])
    assert np.allclose(alone, (xq @ (weight - rounded)).mean(1), atol=1e-5)
    left = output_error(
        weight, narrow(rounded), centred(Products(products.gram), means[0])
    )
    assert np.allclose(left, (xq @ (weight - rounded)).var(1), rtol=1e-3)


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_best_weight_is_the_minimum(damping):
    weight, x, xq, products = two_inputs(0)
    found = wide(best_weight(weight, products, damping))
    gram, cross = wide(products.gram), wide(products.cross)
    size = np.trace(gram, axis1=1, axis2=2)[:, None, None] / 12
    expected = np.linalg.solve(
        gram + damping * size * np.eye(12), cross @ weight + damping * size * weight
    )
    assert np.allclose(found, expected, atol=2e-3)
    if damping == 0:
        fitted = [np.linalg.lstsq(q, f @ w)[0] for q, f, w in zip(xq, x, weight)]
        assert np.allclose(found, fitted, atol=2e-3)
    # One form counts what both the data and the damping say.
    rounded = rounded_by_hand(weight, grid_for(weight, 3))
    both = form(rounded - expected, wide(damped(products.gram, damping)))
    error = ((x @ weight - xq @ rounded) ** 2).mean(1)
    error += damping * size[:, 0] * ((rounded - weight) ** 2).sum(1)
    least = ((x @ weight - xq @ expected) ** 2).mean(1)
    least += damping * size[:, 0] * ((expected - weight) ** 2).sum(1)
    assert np.allclose(both, error - least, rtol=1e-3, atol=1e-4)
    assert np.array_equal(best_weight(weight, Products(products.gram)), weight)


def poor(kind):
    """Inputs whose Gram matrix says little or nothing, float and quantized."""
    rng = np.random.default_rng(0)
    x = inputs(rng, 2, 50, 12)
    if kind == "few rows":
        x = x[:, :3]
    if kind == "dead":
        x[:, :, ::2] = 0
    if kind == "constant":
        x[:] = 2.5
    if kind == "nothing":
        x[:] = 0
    if kind == "copies":
        x[:, :, 6:] = x[:, :, :6]
    scale = {"tiny": 1e-12, "huge": 1e12}.get(kind, 1.0)
    return scale * x, scale * x * (1 + 0.1 * rng.normal(size=x.shape))


POOR = ("few rows", "dead", "constant", "nothing", "copies", "tiny", "huge")


@pytest.mark.parametrize("kind", POOR)
@pytest.mark.parametrize("centre", [False, True])
def test_singular_inputs_leave_everything_finite(kind, centre):
    x, xq = poor(kind)
    weight, _ = layer(1)
    products = Products(narrow(mean_product(xq, xq)), narrow(mean_product(xq, x)))
    if centre:
        products = centred(products, narrow(xq.mean(1)), narrow(x.mean(1)))
    for damping in (0.0, 0.01):
        target = best_weight(weight, products, damping)
        assert np.isfinite(target).all()
        if kind == "dead":
            assert np.array_equal(target[:, ::2], weight[:, ::2])
        if damping:
            assert np.abs(target - weight).max() < 10
    grid = grid_for(weight, 3)
    for start in STARTS:
        found = coordinate_descent(weight, grid, products.gram, start=start, refit=True)
        assert all(np.isfinite(v).all() for v in jax.tree.leaves(found))
        assert (found.loss <= found.nearest_loss).all()
        if kind == "dead":
            fixed = coordinate_descent(weight, grid, products.gram, start=start)
            plain = nearest(weight, grid)
            assert np.array_equal(fixed.weight[:, ::2], plain[:, ::2])


# Coordinate descent


def by_force(target, gram, grid):
    """The least error of each output over all integers."""
    groups, ins, outs = target.shape
    levels = range(int(grid.low), int(grid.high) + 1)
    every = np.array(list(itertools.product(levels, repeat=ins)), np.float64)
    best = np.empty((groups, outs))
    for g in range(groups):
        for o in range(outs):
            s, z = (wide(v)[g, 0, o] for v in (grid.scale, grid.zero_point))
            error = s * (every - z) - wide(target)[g, :, o]
            best[g, o] = np.einsum("ni,ij,nj->n", error, gram[g], error).min()
    return best


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("ins", [2, 6])
def test_descent_beside_all_there_is(start, symmetric, ins):
    weight, x = layer(ins, groups=4, rows=60, ins=ins, outs=24)
    gram = mean_product(x, x)
    grid = grid_for(weight, 2, symmetric)
    found = coordinate_descent(weight, grid, narrow(gram), start=start)
    error = form(wide(found.weight) - weight, gram)
    plain = form(rounded_by_hand(weight, grid) - weight, gram)
    best = by_force(weight, gram, grid)
    assert np.allclose(found.loss, error, rtol=1e-3, atol=1e-5)
    assert np.allclose(found.nearest_loss, plain, rtol=1e-3, atol=1e-5)
    assert on_grid(found.weight, grid)
    assert (error <= plain * 1.0001).all() and (error >= best * 0.999 - 1e-6).all()
    over, over_plain = error.sum() / best.sum(), plain.sum() / best.sum()
    assert over < {"nearest": 1.2, "gptq": 1.1}[start]
    assert over - 1 < 0.75 * (over_plain - 1)


def test_diagonal_gram_is_nearest_rounding():
    """Nothing to make good for: each weight stands alone, ties and clipped ones too."""
    rng = np.random.default_rng(0)
    ins = 2 * BLOCK + 3
    weight = rng.normal(size=(2, ins, 7)).astype(np.float32)
    grid = grid_for(weight, 3, share=0.7)
    weight[:, ::4] = (np.rint(weight / grid.scale) * grid.scale)[:, ::4]
    weight[:, 1::4] = (weight[:, ::4] + 0.5 * grid.scale)[:, : weight[:, 1::4].shape[1]]
    gram = np.zeros((2, ins, ins))
    gram[:, range(ins), range(ins)] = rng.uniform(0.01, 10, size=(2, ins))
    weight = narrow(weight)
    for start, order in itertools.product(STARTS, ("diagonal", "natural")):
        found = coordinate_descent(
            weight, grid, narrow(gram), start=start, order=order, damping=0.0
        )
        assert np.array_equal(found.weight, nearest(weight, grid))


def test_gptq_is_error_feedback_by_the_inverse():
    """No sweep of descent: exactly the textbook algorithm, in order of energy."""
    ins = BLOCK + 7
    weight, x = layer(3, groups=2, rows=400, ins=ins, outs=9)
    gram = mean_product(x, x)
    grid = grid_for(weight, 3)
    for order in ("diagonal", "natural"):
        found = coordinate_descent(
            weight, grid, narrow(gram), start="gptq", sweeps=0, order=order
        )
        for g in range(2):
            h = gram[g] + 0.01 * np.trace(gram[g]) / ins * np.eye(ins)
            turn = np.argsort(-np.diag(gram[g]))
            turn = turn if order == "diagonal" else np.arange(ins)[::-1]
            upper = np.linalg.cholesky(np.linalg.inv(h[np.ix_(turn, turn)])).T
            w, scale = wide(weight[g])[turn], wide(grid.scale)[g, 0]
            q = np.empty_like(w)
            for i in range(ins):
                q[i] = scale * np.clip(np.rint(w[i] / scale), grid.low, grid.high)
                w[i:] -= np.outer(upper[i, i:], (w[i] - q[i]) / upper[i, i])
            same = np.isclose(wide(found.weight)[g][turn], q, atol=1e-4).mean()
            assert same > 0.99  # some near ties fall to the other side


@pytest.mark.one_in(4)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(("blocks", "symmetric"), [(1, True), (1, False), (5, True)])
def test_descent_ends_where_no_single_weight_gains(start, blocks, symmetric):
    """More inputs than one inner block, a target of its own, fewer rows than inputs."""
    ins = 2 * BLOCK + 7
    weight, x = layer(4, groups=2, rows=ins - 40, ins=ins, outs=6)
    rng = np.random.default_rng(5)
    target = narrow(weight + 0.05 * rng.normal(size=weight.shape))
    grid = grid_for(weight, 3, symmetric, blocks)
    gram = mean_product(x, x)
    found = coordinate_descent(
        weight, grid, narrow(gram), target, start=start, sweeps=200
    )
    assert found.sweeps < 200
    assert on_grid(found.weight, grid)
    error = wide(found.weight) - target
    before, plain = (
        form(error, gram),
        form(rounded_by_hand(weight, grid) - target, gram),
    )
    assert np.allclose(found.loss, before, rtol=1e-3)
    assert np.allclose(found.nearest_loss, plain, rtol=1e-3)
    assert (before < plain).all() and before.sum() < 0.5 * plain.sum()
    step, zero = repeated(grid.scale, ins), repeated(grid.zero_point, ins)
    level = np.rint(wide(found.weight) / step + zero)
    slope = gram @ error
    own = np.diagonal(gram, axis1=1, axis2=2)[:, :, None]
    for move in (-1, 1):
        allowed = (level + move >= grid.low) & (level + move <= grid.high)
        gain = 2 * move * step * slope + own * step**2
        assert (gain[allowed] > -1e-4 * before.mean()).all()


@pytest.mark.slow
def test_descent_is_the_same_for_each_group_alone():
    weight, x = layer(6, groups=3)
    gram, grid = narrow(mean_product(x, x)), grid_for(weight, 3)
    for start in STARTS:
        together = coordinate_descent(weight, grid, gram, start=start).weight
        for g in range(3):
            one = slice(g, g + 1)
            own = LevelGrid(grid.scale[one], grid.zero_point[one], grid.low, grid.high)
            alone = coordinate_descent(weight[one], own, gram[one], start=start)
            assert np.allclose(alone.weight, together[one], atol=1e-6)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.slow
def test_refit_scales_are_least_squares(blocks):
    weight, x = layer(7, rows=300)
    gram, grid = mean_product(x, x), grid_for(weight, 4, blocks=blocks, share=0.8)
    step = repeated(grid.scale, 12)
    levels = np.rint(rounded_by_hand(weight, grid) / step)
    scale = grid.scale
    for _ in range(30 if blocks > 1 else 1):
        scale = refit_scales(narrow(levels), scale, narrow(gram), weight)
    for g, o in itertools.product(range(2), range(5)):
        columns = np.zeros((12, blocks))
        for b in range(blocks):
            rows = slice(b * 12 // blocks, (b + 1) * 12 // blocks)
            columns[rows, b] = levels[g, rows, o]
        expected = np.linalg.lstsq(x[g] @ columns, x[g] @ wide(weight)[g, :, o])[0]
        assert np.allclose(scale[g, :, o], expected, rtol=2e-3)


def test_one_scale_for_a_tensor_stays_one():
    weight, x = layer(8)
    gram, grid = narrow(mean_product(x, x)), grid_for(weight, 3)
    whole = jnp.full_like(grid.scale, float(jnp.max(grid.scale)))
    grid = grid._replace(scale=whole)
    found = coordinate_descent(weight, grid, gram, refit=True, shared=(0, 2))
    scale = np.unique(found.grid.scale)
    assert scale.size == 1 and scale[0] != whole[0, 0, 0]
    assert on_grid(found.weight, found.grid)
    assert found.loss.sum() < coordinate_descent(weight, grid, gram).loss.sum()


@pytest.mark.parametrize("blocks", [1, 3])
def test_refit_lowers_the_error_of_descent(blocks):
    weight, x = layer(9, groups=3, rows=300, outs=30)
    gram, grid = mean_product(x, x), grid_for(weight, 3, blocks=blocks)
    fixed = coordinate_descent(weight, grid, narrow(gram))
    found = coordinate_descent(weight, grid, narrow(gram), refit=True, sweeps=40)
    assert found.loss.sum() < 0.95 * fixed.loss.sum()
    assert (found.loss <= found.nearest_loss).all()
    assert np.array_equal(found.nearest_loss, fixed.nearest_loss)
    assert (found.grid.scale > 0).all()
    assert on_grid(found.weight, found.grid)
    assert np.allclose(found.loss, form(wide(found.weight) - weight, gram), rtol=1e-3)


# Search of scales


def candidates_by_hand(weight, bits, symmetric, blocks, shared, number):
    groups, ins, outs = weight.shape
    apart = wide(weight).reshape(groups, blocks, -1, outs)
    low, high = grid_ends(bits, signed=symmetric)
    least = apart.min(2).min(shared, keepdims=True)
    most = apart.max(2).max(shared, keepdims=True)
    for k in range(1, number + 1):
        a, b = np.minimum(least, 0) * k / number, np.maximum(most, 0) * k / number
        if symmetric:
            scale = np.maximum(b / high, a / low)
            zero = np.zeros_like(scale)
        else:
            scale = (b - a) / (high - low)
            zero = np.clip(np.rint(low - a / scale), low, high)
        every = (groups, blocks, outs)
        scale, zero = np.broadcast_to(scale, every), np.broadcast_to(zero, every)
        yield LevelGrid(scale, zero, low, high)


def errors_by_hand(weight, x, xf, loss, blocks, shared, grids):
    groups, ins, outs = weight.shape
    length, errors = ins // blocks, []
    for grid in grids:
        rounded = rounded_by_hand(wide(weight), grid)
        each = np.empty((groups, blocks, outs))
        for b in range(blocks):
            part = slice(b * length, (b + 1) * length)
            y = xf[:, :, part] @ wide(weight)[:, part]
            e = y - x[:, :, part] @ rounded[:, part]
            each[:, b] = {
                "mse": (e**2).mean(1),
                "l1": np.abs(e).mean(1),
                "sqnr": -10 * np.log10((y**2).sum(1) / (e**2).sum(1)),
            }[loss]
        errors.append(each.sum(shared, keepdims=True))
    return np.array(errors)


SEARCHES = [
    # symmetric, blocks, shared, other float inputs
    (True, 1, (), False),
    (False, 1, (), True),
    (True, 3, (), True),
    (False, 3, (0,), False),
    (True, 1, (0, 2), True),
    (False, 3, (0, 1, 2), False),
]


@pytest.mark.one_in(5)
@pytest.mark.parametrize(("symmetric", "blocks", "shared", "moved"), SEARCHES)
@pytest.mark.parametrize("loss", ["gram", "mse", "l1", "sqnr"])
def test_search_finds_the_best_share(symmetric, blocks, shared, moved, loss):
    weight, x = layer(10, rows=120)
    weight = weight.at[0, 0].multiply(
        4.0
    )  # an outlier, so that the whole range is not the best
    rng = np.random.default_rng(11)
    xq = x + 0.1 * rng.normal(size=x.shape) * moved
    low, high = grid_ends(3, signed=symmetric)
    options = {"symmetric": symmetric, "blocks": blocks, "shared": shared}
    number = 12
    if loss == "gram":
        cross = mean_product(xq, x) if moved else None
        given = narrow(mean_product(xq, xq)), narrow(cross)
        search = search_scales
    else:
        given = narrow(xq), narrow(x) if moved else None
        search, options = search_scales_by_rows, options | {"loss": loss}
    found = search(weight, low, high, *given, candidates=number, **options)
    grids = list(candidates_by_hand(weight, 3, symmetric, blocks, shared, number))
    exact = "mse" if loss == "gram" else loss
    expected = errors_by_hand(weight, xq, x, exact, blocks, shared, grids)
    errors = wide(found.errors)
    if loss == "gram":  # up to a constant for each
        errors = errors - errors[-1:] + expected[-1:]
    # A weight on a tie may fall to either side.
    assert np.isclose(errors, expected, rtol=1e-3, atol=1e-4).mean() > 0.98
    chosen = np.take_along_axis(expected, np.asarray(found.best)[None] - 1, 0)[0]
    gap = chosen - expected.min(0)
    assert np.mean(gap <= 1e-3 * np.abs(expected.min(0))) > 0.95
    assert len(np.unique(found.best)) > (1 if len(shared) < 2 else 0)
    assert (np.asarray(found.best) < number).any()
    best = np.broadcast_to(found.best, found.grid.scale.shape)
    for k, grid in enumerate(grids, 1):
        assert np.allclose(
            found.grid.scale[best == k], grid.scale[best == k], rtol=1e-5
        )
        assert np.allclose(found.grid.zero_point[best == k], grid.zero_point[best == k])


def test_search_towards_a_target_is_the_search_with_cross():
    weight, x, xq, products = two_inputs(12)
    low, high = grid_ends(3, signed=True)
    target = best_weight(weight, products, 0.0)
    search = lambda **given: search_scales(
        weight, low, high, products.gram, symmetric=True, **given
    )
    one, two = search(target=target), search(cross=products.cross)
    assert np.mean(one.best == two.best) > 0.9
    falls = [v.errors - v.errors[-1:] for v in (one, two)]
    assert np.allclose(*falls, rtol=1e-2, atol=1e-2)
    assert not np.array_equal(one.best, search().best)


@pytest.mark.slow
def test_search_in_parts_is_the_search_at_once(monkeypatch):
    weight, x = layer(13)
    low, high = grid_ends(4, signed=True)
    search = lambda: search_scales(
        weight, low, high, narrow(mean_product(x, x)), symmetric=True, candidates=7
    )
    once = search()
    monkeypatch.setattr("jaxmet.numerics.rounding.search.AT_ONCE", 2 * weight.size)
    search_scales.clear_cache()  # it is read while tracing
    assert np.array_equal(search().best, once.best)


# AdaRound


def test_schedule_and_regulariser_of_the_reference():
    """Numbers that AIMET's own tests hold: 10,000 iterations, beta from 20 to 2."""
    schedule = Schedule(10_000)
    assert np.isclose(beta_at(8000, schedule), 4.636038969321072, rtol=1e-6)
    assert beta_at(100, schedule) == 20 and np.isclose(beta_at(10_000, schedule), 2)
    alpha = np.random.RandomState(0).rand(1, 3, 12, 12)
    alpha = narrow(alpha.reshape(3, 12, 12))
    at = lambda step: np.sum(regulariser(alpha, step, schedule))
    assert np.isclose(at(8000), 4.266156963161077, rtol=1e-6)
    assert at(1999) == 0 and at(2000) > 0
    assert np.isclose(at(8000), jax.jit(regulariser)(alpha, 8000, schedule).sum())


def test_rectified_sigmoid_and_its_inverse():
    a = np.linspace(-9, 9, 101)
    expected = np.clip(1.2 / (1 + np.exp(-a)) - 0.1, 0, 1)
    assert np.allclose(rectified_sigmoid(narrow(a)), expected, atol=1e-6)
    h = narrow(np.linspace(0, 1, 101))
    assert np.allclose(rectified_sigmoid(inverse_rectified_sigmoid(h)), h, atol=1e-6)
    assert rectified_sigmoid(jnp.float32(0.0)) == 0.5


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("symmetric", [True, False])
def test_soft_and_hard_weights(symmetric, blocks):
    weight, _ = layer(14)
    grid = grid_for(weight, 4, symmetric, blocks, 0.7)
    step, zero = repeated(grid.scale, 12), repeated(grid.zero_point, 12)
    least, most = step * (grid.low - zero), step * (grid.high - zero)
    inside = (weight > least) & (weight < most)
    alpha = initial_alpha(weight, grid)
    soft = soft_weight(weight, grid, alpha)
    assert np.allclose(soft, np.clip(weight, least, most), atol=1e-5)
    assert 0 < inside.mean() < 1
    rng = np.random.default_rng(0)
    alpha = narrow(rng.normal(size=weight.shape)).at[0, 0, 0].set(0.0)
    hard = hard_weight(weight, grid, alpha)
    up = np.floor(wide(weight) / step) + (np.asarray(alpha) >= 0)
    expected = step * np.clip(up, grid.low - zero, grid.high - zero)
    assert np.allclose(hard, expected, atol=1e-5)
    assert on_grid(hard, grid)
    assert (np.abs(hard - weight)[inside] <= step[inside] * 1.0001).all()
    # The nearest neighbours, if each h says which is nearer.
    plain = hard_weight(weight, grid, initial_alpha(weight, grid))
    assert np.allclose(plain, rounded_by_hand(weight, grid), atol=1e-5)


def rows_of(weight, x, shift=0.2):
    bias = jnp.full(weight.shape[::2], shift)
    target = narrow(x @ wide(weight) + shift)
    return RowData(narrow(x), target, bias)


def test_row_error_is_the_loss_of_the_reference():
    weight, x = layer(15)
    data = rows_of(weight, x)
    rounded = rounded_by_hand(weight, grid_for(weight, 3))
    for name, f in {"relu": lambda v: np.maximum(v, 0), "none": lambda v: v}.items():
        output = x @ rounded + 0.2
        expected = ((f(output) - f(wide(data.target))) ** 2).sum(2).mean(1)
        activation = jax.nn.relu if name == "relu" else None
        found = row_error(narrow(rounded), data, activation)
        assert np.allclose(found, expected, rtol=1e-4)


def learnt(weight, grid, data, *, parts=(600,), key=0, **options):
    state = start_adaround(weight, grid, jax.random.key(key))
    schedule, traces = Schedule(sum(parts)), []
    for steps in parts:
        state, trace = adaround(
            state, weight, grid, data, schedule, steps=steps, **options
        )
        traces.append(trace)
    return state, jax.tree.map(lambda *v: np.concatenate(v), *traces)


@pytest.mark.parametrize("form_of_data", ["gram", "rows", "activation"])
def test_adaround_learns_on_its_own_objective(form_of_data):
    weight, x = layer(16, rows=256, ins=16, outs=12)
    x = 0.1 * x  # errors small enough for the regulariser to decide
    grid = grid_for(weight, 3)
    rows = rows_of(weight, x)
    data, options = rows, {"batch": 64}
    if form_of_data == "gram":
        data, options = GramData(narrow(mean_product(x, x)), weight), {}
    if form_of_data == "activation":
        options |= {"activation": jax.nn.relu}
    state, trace = learnt(weight, grid, data, **options)
    hard = hard_weight(weight, grid, state.alpha)
    activation = options.get("activation")
    error = row_error(hard, rows, activation)
    plain = row_error(nearest(weight, grid), rows, activation)
    assert (error < 0.6 * plain).all()
    h = rectified_sigmoid(state.alpha)
    assert np.mean((h < 0.01) | (h > 0.99)) > 0.95
    assert trace.error.shape == trace.regulariser.shape == (600, 2)
    assert (trace.error[0] < 0.01 * plain).all()  # it starts as the float layer
    assert (trace.regulariser[:120] == 0).all() and (trace.regulariser[120] > 0).all()
    assert trace.regulariser[-1].max() < 0.1 * trace.regulariser[120:].max()
    if form_of_data == "gram":
        soft = soft_weight(weight, grid, state.alpha)
        last = form(wide(soft - weight), mean_product(x, x)).sum(1)
        assert np.allclose(trace.error[-1], last, rtol=0.2)


def test_adaround_in_parts_is_adaround():
    weight, x = layer(17)
    grid, data = grid_for(weight, 3), rows_of(weight, x)
    whole, trace = learnt(weight, grid, data, parts=(20,), batch=8)
    parts, again = learnt(weight, grid, data, parts=(10, 10), batch=8)
    assert np.array_equal(whole.alpha, parts.alpha)
    assert np.array_equal(trace.error, again.error)
    same, _ = learnt(weight, grid, data, parts=(20,), batch=8)
    other, _ = learnt(weight, grid, data, parts=(20,), batch=8, key=1)
    assert np.array_equal(whole.alpha, same.alpha)
    assert not np.array_equal(whole.alpha, other.alpha)
    slow, _ = learnt(weight, grid, data, parts=(20,), batch=8, learning_rate=1e-3)
    start = initial_alpha(weight, grid)
    moved = [np.abs(s.alpha - start).mean() for s in (slow, whole)]
    assert moved[1] > 5 * moved[0]


def test_adaround_is_the_same_for_each_group_alone():
    weight, x = layer(18)
    grid = grid_for(weight, 3)
    data = GramData(narrow(mean_product(x, x)), weight)
    together, _ = learnt(weight, grid, data, parts=(50,))
    for g in range(2):
        one = slice(g, g + 1)
        own = LevelGrid(grid.scale[one], grid.zero_point[one], grid.low, grid.high)
        alone, _ = learnt(
            weight[one], own, jax.tree.map(lambda v: v[one], data), parts=(50,)
        )
        assert np.allclose(alone.alpha, together.alpha[one], atol=1e-3)
