"""Orders that spread, by their statistics."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxmet.numerics.drawn_order import drawn_order, seed_of

orders = jax.jit(jax.vmap(drawn_order, (0, None)), static_argnums=1)


def seeds(number, *more):
    key = jax.random.key(5)
    return jax.vmap(lambda i: seed_of(key, i, *more))(jnp.arange(number))


@pytest.mark.parametrize("total", [1, 2, 7, 196, 3000])
def test_every_position_once(total):
    assert (np.sort(orders(seeds(5), total)) == np.arange(total)).all()


def test_each_position_is_drawn_as_often_as_others_and_with_any_other():
    total, drawn, rounds = 12, 4, 4000
    first = np.asarray(orders(seeds(rounds), total))[:, :drawn]
    often = np.bincount(first.reshape(-1), minlength=total)
    assert scipy.stats.chisquare(often).pvalue > 1e-3
    places = np.bincount(first[:, 0], minlength=total)
    assert scipy.stats.chisquare(places).pvalue > 1e-3
    pairs = np.zeros((total, total))
    for a, b in itertools.permutations(range(drawn), 2):
        np.add.at(pairs, (first[:, a], first[:, b]), 1)
    assert scipy.stats.chisquare(pairs[~np.eye(total, dtype=bool)]).pvalue > 1e-3


def test_neighbours_and_columns_are_no_pattern():
    """Of 14 by 14 places a tenth: rows, columns and parities are met alike."""
    first = np.asarray(orders(seeds(2000), 196))[:, :20]
    for of in (first // 14, first % 14, (first // 14 + first % 14) % 2, first % 7):
        assert scipy.stats.chisquare(np.bincount(of.reshape(-1))).pvalue > 1e-3


def test_seeds_differ_by_key_and_by_each_number():
    every = [seed_of(jax.random.key(k), *n) for k in range(40) for n in [(), (0,)]]
    every += [seed_of(jax.random.key(7), i, j) for i in range(30) for j in range(30)]
    every += [seed_of(jax.random.key(0, impl="rbg"), 3), seed_of(jax.random.key(0), 3)]
    assert len({int(s) for s in every}) == len(every)
    assert seed_of(jax.random.key(1), 2) == seed_of(jax.random.key(1), 2)


def test_those_that_count_come_first():
    first = jnp.asarray(np.random.default_rng(0).random(50) < 0.4)
    found = [np.asarray(drawn_order(s, 50, first)) for s in seeds(4)]
    count = int(first.sum())
    for order in found:
        assert set(order[:count]) == set(np.flatnonzero(first))
        assert set(order[count:]) == set(np.flatnonzero(~np.asarray(first)))
    assert not np.array_equal(found[0], found[1])
