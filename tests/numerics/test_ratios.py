"""The choice of ratios, against all there is to choose from."""

import itertools

import numpy as np
import pytest
import scipy.optimize

from jaxmet.layers.asked_ratios import check_ratio
from jaxmet.numerics.ratios import greedy, monotone, optimal

RATIOS = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
AIMET = np.array([[11.0, 23.0, 47.0, 85.0, 89.0]])


def table(seed, layers=4, ratios=4, whole=False):
    """Scores that mostly rise with the ratio, costs that do, and that of the full layers."""
    rng = np.random.default_rng(seed)
    part = np.arange(1, ratios + 1) / (ratios + 1)
    full = np.floor(rng.uniform(100, 1000, size=layers))
    scores = 1 - rng.uniform(0, 1, size=(layers, 1)) * (1 - part)
    scores = scores + 0.05 * rng.normal(size=(layers, ratios))
    scores = np.rint(5 * scores) if whole else scores
    return part, scores, np.floor(full[:, None] * part), full


def picked(v, index):
    return v[np.arange(len(index)), index].sum()


# Scores that rise


@pytest.mark.parametrize("weighted", [False, True])
def test_monotone_is_the_nearest_rising_row(weighted):
    rng = np.random.default_rng(0)
    scores = np.cumsum(rng.normal(size=(20, 9)), axis=1)
    scores[0, :5] = 1.0  # ties
    weights = rng.uniform(0.1, 3, size=scores.shape) if weighted else None
    found = monotone(scores, weights)
    for i, row in enumerate(scores):
        w = None if weights is None else weights[i]
        expected = scipy.optimize.isotonic_regression(row, weights=w).x
        assert np.allclose(found[i], expected, atol=1e-12)
    assert (np.diff(found, axis=1) >= 0).all() and not np.allclose(found, scores)
    assert np.array_equal(monotone(np.sort(scores, axis=1)), np.sort(scores, axis=1))


# One threshold for all


@pytest.mark.parametrize(
    ("target", "index"),
    [(0.95, 4), (0.75, 3), (0.5, 2), (0.49, 1), (0.3, 1), (0.1, 0), (1.0, -1)],
)
def test_one_layer_stops_where_the_target_says(target, index):
    costs = 1000 * RATIOS[None]
    found = greedy(RATIOS, AIMET, costs, np.array([1000.0]), target)
    assert found.tolist() == [index]
    # The order of the columns says nothing.
    turn = np.array([2, 0, 4, 1, 3])
    found = greedy(
        RATIOS[turn], AIMET[:, turn], costs[:, turn], np.array([1e3]), target
    )
    assert [turn[i] if i >= 0 else -1 for i in found] == [index]


@pytest.mark.parametrize(("threshold", "index"), [(45, 2), (48, 3), (90, -1), (11, 0)])
def test_the_reference_thresholds_of_aimet(threshold, index):
    """A second layer, whose one score of that size is the threshold, sets the first."""
    scores = np.concatenate([AIMET, np.full((1, 5), float(threshold))])
    costs = np.concatenate([RATIOS[None], np.full((1, 5), 1.0)])
    rest = {2: 0.5, 3: 0.7, -1: 1.0, 0: 0.1}[index]
    full = np.array([1.0, 1000.0])
    found = greedy(RATIOS, scores, costs, full, (rest + 1.0) / 1001 + 1e-12)
    assert found.tolist() == [index, 0]


def as_far_as(row, threshold):
    """Walked by hand, from the mildest."""
    if row[0] >= threshold:
        return 0
    index = -1
    for j in range(len(row) - 1, -1, -1):
        if row[j] < threshold:
            return index
        index = j
    return index


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("other", [0.0, 300.0])
def test_greedy_is_the_highest_threshold_within_the_target(seed, other):
    ratios, scores, costs, full = table(seed)
    whole = other + full.sum()
    for target in (0.4, 0.55, 0.7, 0.95):
        choices = {}
        for threshold in np.linspace(scores.min(), scores.max() + 1e-3, 4001):
            index = np.array([as_far_as(row, threshold) for row in scores])
            both = np.concatenate([costs, full[:, None]], axis=1)
            choices[threshold] = index, other + picked(both, index)
        fit = [t for t, (_, cost) in choices.items() if cost <= target * whole]
        if not fit:
            with pytest.raises(ValueError, match="smallest"):
                greedy(ratios, scores, costs, full, target, other=other)
            continue
        found = greedy(ratios, scores, costs, full, target, other=other)
        assert found.tolist() == choices[max(fit)][0].tolist()


def test_greedy_says_what_it_could_reach():
    with pytest.raises(ValueError, match="100 or less.* is 350"):
        greedy(RATIOS, AIMET, 500 * RATIOS[None], np.array([500.0]), 0.125, other=300)


# The best sum


def every_choice(scores, costs, budget):
    options = itertools.product(range(scores.shape[1]), repeat=len(scores))
    options = np.array(list(options))
    rows = np.arange(len(scores))
    score, cost = (v[rows, options].sum(1) for v in (scores, costs))
    score = np.where(cost <= budget, score, -np.inf)
    best = score.max()
    return best, cost[score > best - 1e-9].min()


def with_full(seed, whole=False):
    _, scores, costs, full = table(seed, whole=whole)
    top = 5.0 if whole else 1.0
    scores = np.concatenate([scores, np.full((len(full), 1), top)], axis=1)
    return scores, np.concatenate([costs, full[:, None]], axis=1), full.sum()


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_optimal_is_the_best_of_all(seed, whole):
    """Also where many choices tie: of these it is the cheapest."""
    scores, costs, full = with_full(seed, whole)
    for share in (0.21, 0.35, 0.5, 0.8, 1.0, 2.0):
        score, cost = every_choice(scores, costs, share * full)
        found = optimal(scores, costs, share * full)
        assert np.isclose(found.score, score, rtol=1e-12) and found.gap == 0
        assert found.cost == cost <= share * full
        assert np.isclose(picked(scores, found.options), score, rtol=1e-12)
        assert picked(costs, found.options) == cost


def test_optimal_takes_no_option_that_is_not_there():
    scores, costs, full = with_full(0)
    costs[1, :3] = np.inf
    scores[2, 0] = -np.inf
    found = optimal(scores, costs, 0.6 * full)
    best = every_choice(np.where(np.isinf(costs), -np.inf, scores), costs, 0.6 * full)
    assert np.isclose(found.score, best[0]) and found.cost == best[1]
    assert found.options[1] >= 3 and found.options[2] > 0


def test_optimal_just_fits_or_says_what_would():
    scores, costs, _ = with_full(1)
    least = costs.min(axis=1).sum()
    assert optimal(scores, costs, least).options.tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError, match=f"smallest cost reached is {least:.6g}"):
        optimal(scores, costs, least - 1)


def test_free_and_equal_options():
    scores, costs = np.array([[1.0, 3.0, 2.0]] * 2), np.zeros((2, 3))
    assert optimal(scores, costs, 0).options.tolist() == [1, 1]
    same = optimal(np.zeros((3, 4)), np.array([[4.0, 3.0, 2.0, 9.0]] * 3), 30.0)
    assert same.options.tolist() == [2, 2, 2]


@pytest.mark.parametrize("limit", [2, 5, 50])
def test_few_partial_choices_leave_a_gap_that_is_told(limit):
    """Twelve layers of many equal prices: no bound tells their choices apart."""
    rng = np.random.default_rng(3)
    costs = np.floor(rng.uniform(10, 1000, size=(12, 6)))
    scores = costs + rng.uniform(0, 30, size=costs.shape)
    least, full = costs.min(1).sum(), costs.max(1).sum()
    gaps = []
    for share in (0.1, 0.3, 0.5, 0.9):
        budget = least + share * (full - least)
        best = optimal(scores, costs, budget)
        found = optimal(scores, costs, budget, limit=limit)
        assert best.gap == 0 and found.cost <= budget and best.cost <= budget
        assert found.score <= best.score <= found.score + found.gap + 1e-9
        gaps.append(found.gap)
    assert max(gaps) > 0
    assert max(gaps) < 0.1 * scores.max(1).sum()


def test_the_sum_does_better_than_one_threshold():
    """The threshold looks at no cost; the sum of scores is never less, mostly more."""
    gains = []
    for seed in range(8):
        ratios, scores, costs, full = table(seed, layers=6)
        scores = np.minimum(monotone(scores), 1.0)
        index = greedy(ratios, scores, costs, full, 0.55)
        both = np.concatenate([scores, np.ones((6, 1))], axis=1)
        paid = np.concatenate([costs, full[:, None]], axis=1)
        best = optimal(both, paid, 0.55 * full.sum())
        gains.append(best.score - picked(both, index))
    assert min(gains) > -1e-12 and np.mean(np.array(gains) > 1e-6) > 0.5


def test_numbers_of_numpy_are_ratios():
    check_ratio("ratio", np.float32(0.5), "factorize")
    for bad in (np.float32(1.5), True, "half", np.nan):
        with pytest.raises(ValueError, match=r"jaxmet\.factorize: the ratio is"):
            check_ratio("ratio", bad, "factorize")
