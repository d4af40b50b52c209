"""Channels chosen from products alone, against least squares on the rows in float64."""

import itertools

import jax
import numpy as np
import pytest
import scipy.optimize

from jaxmet.numerics.channel_selection import (
    by_block_obs,
    by_lasso,
    by_magnitude,
    reconstruct,
    removal_order,
)
from jaxmet.numerics.lasso import lasso, sparse

TAPS, CHANNELS, OUTS = 2, 6, 3
POOR = ("dead", "few rows", "copies", "nothing", "tiny", "huge")


def only(kept):
    return np.isin(np.arange(CHANNELS), kept)


def narrow(x):
    return np.asarray(x, np.float32)


def layer(seed, noise=0.0):
    """Rectified inputs whose channels go together, a weight, and what it is to make."""
    rng = np.random.default_rng(seed)
    ins = TAPS * CHANNELS
    mix = np.eye(ins) + rng.normal(size=(ins, ins)) * rng.uniform(0, 1, size=ins)
    x = np.maximum(rng.normal(size=(80, ins)) @ mix + 0.3, 0)
    weight = (
        rng.normal(size=(ins, OUTS))
        * np.tile(rng.uniform(0.2, 1, CHANNELS), TAPS)[:, None]
    )
    return x, weight, x @ weight + noise * rng.normal(size=(80, OUTS))


def products(x, y):
    return narrow(x.T @ x / len(x)), narrow(x.T @ y / len(x))


def rows_of(channels):
    return [t * CHANNELS + i for t in range(TAPS) for i in channels]


def least(x, y, channels):
    """What the best weights on these channels leave, and they themselves."""
    rows = rows_of(channels)
    weight = np.linalg.lstsq(x[:, rows], y)[0]
    return ((y - x[:, rows] @ weight) ** 2).sum() / len(x), weight


def without(channels, gone):
    return [i for i in channels if i != gone]


def poor(kind):
    x, weight, _ = layer(0)
    if kind == "dead":
        x[:, rows_of([1, 4])] = 0
    if kind == "few rows":
        x = x[:5]
    if kind == "copies":
        x[:, rows_of([3])] = 2 * x[:, rows_of([0])]
    x = x * {"nothing": 0.0, "tiny": 1e-12, "huge": 1e12}.get(kind, 1.0)
    return x, weight, x @ weight


def test_magnitude_sums_all_taps():
    _, weight, _ = layer(0)
    found = by_magnitude(narrow(weight), CHANNELS)
    expected = [(weight[rows_of([i])] ** 2).sum() for i in range(CHANNELS)]
    assert np.allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_block_obs_is_what_least_squares_loses(noise):
    x, _, y = layer(1, noise)
    every = range(CHANNELS)
    before = least(x, y, every)[0]
    expected = [least(x, y, without(every, i))[0] - before for i in every]
    found = by_block_obs(*products(x, y), CHANNELS, damping=0.0)
    assert np.allclose(found, expected, rtol=2e-3)
    damped = by_block_obs(*products(x, y), CHANNELS)
    assert np.allclose(damped, expected, rtol=2e-2)


@pytest.mark.parametrize("seed", range(4))
def test_channels_go_in_the_order_of_their_losses(seed):
    x, _, y = layer(seed, 0.1)
    left, expected = list(range(CHANNELS)), []
    while left:
        losses = [least(x, y, without(left, i))[0] for i in left]
        expected.append(left.pop(int(np.argmin(losses))))
    assert removal_order(*products(x, y), CHANNELS).tolist() == expected


def test_greedy_removal_beside_all_subsets():
    over = []
    for seed in range(6):
        x, weight, y = layer(seed)
        order = removal_order(*products(x, y), CHANNELS)
        light = np.argsort(by_magnitude(narrow(weight), CHANNELS))
        for keep in (2, 3, 4):
            subsets = itertools.combinations(range(CHANNELS), keep)
            best = min(least(x, y, s)[0] for s in subsets)
            kept = [v[CHANNELS - keep :].tolist() for v in (order, light)]
            over.append([least(x, y, s)[0] / best for s in kept])
    greedy, magnitude = np.array(over).T
    assert (greedy > 1 - 1e-6).all() and (magnitude > 1 - 1e-6).all()
    assert greedy.mean() < 1.1 and greedy.mean() - 1 < 0.5 * (magnitude.mean() - 1)


def test_what_another_channel_says_goes_first():
    """A loud copy, which magnitude would keep."""
    x, weight, _ = layer(3)
    x[:, rows_of([4])] = 0.5 * x[:, rows_of([2])]
    weight[rows_of([4])] *= 10
    y = x @ weight
    assert int(np.argmax(by_magnitude(narrow(weight), CHANNELS))) == 4
    order = removal_order(*products(x, y), CHANNELS).tolist()
    assert order[0] in (2, 4)
    assert (
        min(order.index(2), order.index(4)) == 0 < max(order.index(2), order.index(4))
    )


def test_channels_apart_go_by_their_energy():
    """Nothing can make good for another: the order is that of what each contributes."""
    rng = np.random.default_rng(0)
    x = np.linalg.qr(rng.normal(size=(80, TAPS * CHANNELS)))[0] * 9
    weight = rng.normal(size=(TAPS * CHANNELS, OUTS))
    y = x @ weight
    energy = [(weight[rows_of([i])] ** 2).sum() for i in range(CHANNELS)]
    assert (
        removal_order(*products(x, y), CHANNELS).tolist() == np.argsort(energy).tolist()
    )
    for keep in range(1, CHANNELS):
        scores = by_lasso(*products(x, y), narrow(weight), CHANNELS, keep)
        best = np.argsort(energy)[CHANNELS - keep :]
        assert set(np.argsort(scores)[CHANNELS - keep :].tolist()) == set(best.tolist())


# The lasso


def bounded(gram, cross, penalty):
    """The same minimum as a difference of two vectors that are not negative."""
    n = len(cross)

    def value(v):
        beta = v[:n] - v[n:]
        slope = gram @ beta - cross
        total = 0.5 * beta @ gram @ beta - cross @ beta + penalty * v.sum()
        return total, np.concatenate([slope, -slope]) + penalty

    options = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 5000}
    found = scipy.optimize.minimize(
        value, np.zeros(2 * n), jac=True, bounds=[(0, None)] * (2 * n), options=options
    ).x
    return found[:n] - found[n:]


def forms(seed):
    """A and b from the output of each channel by itself."""
    x, weight, y = layer(seed, 0.3)
    each = [rows_of([i]) for i in range(CHANNELS)]
    z = np.stack([(x[:, r] @ weight[r]).reshape(-1) for r in each], axis=1)
    z, target = z / np.sqrt(len(x)), y.reshape(-1) / np.sqrt(len(x))
    return (x, weight, y), z.T @ z, z.T @ target


@pytest.mark.parametrize("seed", range(2))
def test_lasso_is_the_minimum(seed):
    _, gram, cross = forms(seed)
    solve = jax.jit(lasso)
    for share in (0.9, 0.3, 0.03, 0.0):
        penalty = share * np.abs(cross).max()
        start = narrow(np.zeros(CHANNELS))
        found = solve(narrow(gram), narrow(cross), narrow(penalty), start)
        expected = bounded(gram, cross, penalty)
        assert np.allclose(found, expected, atol=2e-4)
        assert np.array_equal(np.abs(expected) > 1e-6, found != 0)


@pytest.mark.parametrize("seed", range(3))
def test_the_penalty_is_the_one_that_leaves_so_many(seed):
    """The survivors share one slope, which is the penalty; no slope is steeper."""
    (x, weight, y), gram, cross = forms(seed)
    for keep in range(1, CHANNELS + 1):
        beta = np.float64(sparse(narrow(gram), narrow(cross), keep))
        alive, slope = beta != 0, cross - gram @ beta
        penalty = np.abs(slope[alive]).mean()
        near = 1e-4 * np.abs(cross).max()
        assert np.allclose(slope[alive], penalty * np.sign(beta[alive]), atol=near)
        assert (np.abs(slope) <= penalty + near).all()
        if alive.sum() != keep:
            assert (
                alive.sum() < keep < (bounded(gram, cross, 0.99 * penalty) != 0).sum()
            )
        scores = by_lasso(*products(x, y), narrow(weight), CHANNELS, keep)
        assert np.array_equal(scores > 1, alive)
        assert np.array_equal(
            np.argsort(scores[alive]), np.argsort(np.abs(beta[alive]))
        )


def test_magnitude_fills_up_what_the_lasso_leaves():
    x, weight, _ = layer(2)
    x[:, rows_of([0, 1, 2, 5])] = 0
    given = *products(x, x @ weight), narrow(weight)
    order = np.argsort(by_lasso(*given, CHANNELS, 4))[::-1].tolist()
    dead = sorted([0, 1, 2, 5], key=lambda i: -(weight[rows_of([i])] ** 2).sum())
    assert set(order[:2]) == {3, 4} and order[2:] == dead


# The best weights on what is kept


@pytest.mark.parametrize("kept", [[3, 0], [1, 2, 4, 5], [5]])
def test_reconstruction_is_least_squares(kept):
    x, weight, y = layer(4, 0.2)
    loss, expected = least(x, y, kept)
    gram, cross = products(x, y)
    for start in (None, narrow(weight)):
        found = reconstruct(gram, cross, only(kept), start=start)
        assert np.allclose(found.weight[np.array(rows_of(kept))], expected, atol=5e-3)
        gone = np.setdiff1d(np.arange(len(gram)), rows_of(kept))
        assert (np.asarray(found.weight)[gone] == 0).all()
        assert np.allclose((y**2).sum() / len(x) - found.gain.sum(), loss, rtol=1e-3)
    # Far from the optimum the gain is still that of these very weights.
    found = reconstruct(gram, cross, only(kept), damping=1.0)
    own = found.weight[np.array(rows_of(kept))]
    left = y - x[:, rows_of(kept)] @ np.float64(own)
    error = (y**2).mean(0) - found.gain
    assert np.allclose(error, (left**2).mean(0), rtol=1e-3, atol=1e-4)
    assert not np.allclose(own, expected, atol=5e-2)


def test_what_rows_do_not_see_stays():
    x, weight, y = poor("dead")
    left = only([1, 2, 4])
    found = reconstruct(*products(x, y), left, start=narrow(weight)).weight
    rows = np.array(rows_of([1, 2, 4]))
    dead = np.isin(rows % CHANNELS, [1, 4])
    assert np.array_equal(found[rows[dead]], narrow(weight)[rows[dead]])
    bare = reconstruct(*products(x, y), left).weight
    assert (bare[rows[dead]] == 0).all() and (bare[rows[~dead]] != 0).all()


@pytest.mark.parametrize("kind", POOR)
def test_singular_inputs_leave_everything_finite(kind):
    x, weight, y = poor(kind)
    gram, cross = products(x, y)
    size = (y**2).sum() / len(x)
    for damping in (0.0, 1e-5):
        scores = by_block_obs(gram, cross, CHANNELS, damping=damping)
        assert np.isfinite(scores).all() and (np.asarray(scores) >= 0).all()
        order = removal_order(gram, cross, CHANNELS, damping=damping).tolist()
        assert sorted(order) == list(range(CHANNELS))
        if kind == "dead":
            assert sorted(order[:2]) == [1, 4]
        if kind == "copies":
            assert order[0] in (0, 3) and scores[0] < 1e-2 * size > scores[3]
    assert np.isfinite(by_lasso(gram, cross, narrow(weight), CHANNELS, 3)).all()
    every = only(range(CHANNELS))
    for start in (None, narrow(weight)):
        found = reconstruct(gram, cross, every, start=start)
        left = y - x @ np.float64(found.weight)
        assert (left**2).sum() / len(x) <= 1e-4 * size
        assert np.isfinite(found.gain).all()


def test_the_inverse_that_is_never_written_down_again_is_that_of_what_is_left():
    """Three dozen channels: losses from an inverse of the rows and columns that remain."""
    rng = np.random.default_rng(0)
    taps, channels = 3, 36
    x = rng.normal(size=(400, taps * channels)) @ rng.normal(
        size=2 * (taps * channels,)
    )
    y = x @ rng.normal(size=(taps * channels, 5))
    gram, cross = narrow(x.T @ x / 400), narrow(x.T @ y / 400)
    found = removal_order(gram, cross, channels, damping=1e-4)
    size = np.sqrt(np.diagonal(gram)).astype(float)
    unit = gram / np.outer(size, size) + 1e-4 * np.eye(len(gram))
    right, left = cross / size[:, None], list(range(channels))
    for i in found:
        rows = np.array([t * channels + c for t in range(taps) for c in left])
        inverse = np.linalg.inv(unit[np.ix_(rows, rows)])
        weight, losses = inverse @ right[rows], []
        for c in range(len(left)):
            own = np.arange(taps) * len(left) + c
            block = np.linalg.inv(inverse[np.ix_(own, own)])
            losses.append(np.trace(weight[own].T @ block @ weight[own]))
        at = left.index(i)
        assert losses[at] <= min(losses) * (1 + 1e-6) + 1e-9
        left.pop(at)


def test_sizes_share_the_programs_of_the_lasso():
    x, weight, y = layer(0, 0.1)
    by_lasso(*products(x, y), narrow(weight), CHANNELS, 3)
    before = sparse._cache_size()
    ins = TAPS * 7
    gram, cross = narrow(np.eye(ins)), narrow(np.ones((ins, OUTS)))
    scores = by_lasso(gram, cross, narrow(np.ones((ins, OUTS))), 7, 3)
    assert scores.shape == (7,) and sparse._cache_size() == before
