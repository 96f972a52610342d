"""Statistics against cases that can be worked out by hand, and against SciPy."""

import math

import numpy as np
import pytest
import scipy.stats

from pcm_fast.evaluate import statistics


@pytest.fixture(scope="module")
def shares():
    return statistics.bootstrap_shares(num_prompts=40, num_resamples=4000, seed=3)


def test_samples_are_of_the_size_of_the_data(shares):
    assert shares.shape == (4000, 40)
    np.testing.assert_allclose(shares.sum(axis=1), 1.0)
    np.testing.assert_allclose(shares * 40, np.round(shares * 40), atol=1e-9)
    assert (statistics.bootstrap_shares(40, 4000, 3) == shares).all()
    assert (statistics.bootstrap_shares(40, 4000, 4) != shares).any()


def test_the_interval_of_a_mean_is_scipys(shares):
    values = np.random.default_rng(1).gamma(2.0, size=(40, 5))
    ours = statistics.mean(values, shares)
    theirs = scipy.stats.bootstrap(
        (values.mean(axis=1),), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert ours.value == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.02)
    assert ours.high == pytest.approx(theirs.high, abs=0.02)


def test_prompts_are_drawn_and_not_answers(shares):
    """Answers to a prompt that are all alike are one observation: eight copies make no interval narrower."""
    once = np.random.default_rng(1).normal(size=(40, 1))
    one, eight = (statistics.mean(np.repeat(once, count, axis=1), shares) for count in (1, 8))
    assert (eight.low, eight.high) == pytest.approx((one.low, one.high))


def test_missing_values_are_left_out(shares):
    values = np.full((40, 2), np.nan)
    values[:10, 0], values[10:20, 1] = 1.0, 3.0
    result = statistics.mean(values, shares)
    assert result.value == 2.0
    assert 1.0 < result.low < 2.0 < result.high < 3.0
    assert math.isnan(statistics.mean(np.full((40, 2), np.nan), shares).value)


def test_standard_error():
    assert statistics.standard_error(np.array([1.0, 3.0, 5.0])) == pytest.approx(2 / math.sqrt(3))
    assert math.isnan(statistics.standard_error(np.array([1.0])))


def test_composite_reward():
    rewards = np.array([[1.0, 0.0, 800.0], [0.0, math.log(3), 800.0]])
    base = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    # sigmoid(0) = 1/2; sigmoid(log 3) = 3/4; and nothing overflows
    np.testing.assert_allclose(statistics.composite_reward(rewards, base), [0.5, 0.625, 1.0])


def test_wins_and_ties():
    composite = np.array(
        [
            [[0.5, 0.5], [0.9, 0.1]],  # method 0: two prompts under two preferences
            [[0.5 + 1e-10, 0.6], [0.8, 0.2]],
        ]
    )
    wins = statistics.wins_per_prompt(composite)
    assert wins.shape == (2, 2, 2)
    np.testing.assert_array_equal(wins[:, 0, 1], [0.25, 0.5])  # (tie, loss) and (win, loss)
    np.testing.assert_array_equal(wins[:, 1, 0], [0.75, 0.5])
    np.testing.assert_array_equal(wins[:, 0, 0], [0.5, 0.5])


def test_average_wins_are_over_the_others():
    wins = np.array([[[0.5, 0.2, 0.6], [0.8, 0.5, 1.0], [0.4, 0.0, 0.5]]])
    np.testing.assert_allclose(statistics.average_wins(wins, [0, 1, 2]), [[0.4, 0.9, 0.2]])
    np.testing.assert_allclose(statistics.average_wins(wins, [0, 1]), [[0.2, 0.8, 0.2]])  # 2 is an ablation
    assert np.isnan(statistics.average_wins(wins[:, :1, :1], [0])).all()


def test_cohens_d():
    values, base = np.array([3.0, 4.0, 5.0, 6.0]), np.array([1.0, 2.0, 3.0, 8.0])
    shares = statistics.bootstrap_shares(4, 2000, 0)
    # Means 4.5 and 3.5; variances 5/3 and 29/3; pooled 17/3.
    result = statistics.cohens_d(values, base, shares)
    assert result.value == pytest.approx(1 / math.sqrt(17 / 3))
    assert result.low < result.value < result.high


def test_cohens_d_where_nothing_varies():
    same = np.ones((4, 2))
    same[:, 1] = [0, 1, 2, 3]
    result = statistics.cohens_d(same + 1, same, statistics.bootstrap_shares(4, 100, 0))
    assert math.isnan(result.value[0])
    assert math.isnan(result.low[0])
    assert result.value[1] == pytest.approx(1 / math.sqrt(5 / 3))


def test_cohens_d_covers_what_it_estimates():
    """Of 200 intervals of samples with a true effect of 0.8, about 95 % hold it."""
    rng = np.random.default_rng(7)
    shares = statistics.bootstrap_shares(60, 500, 1)
    samples = rng.normal(size=(60, 200)) + 0.8, rng.normal(size=(60, 200))
    result = statistics.cohens_d(*samples, shares)
    covered = ((result.low <= 0.8) & (result.high >= 0.8)).mean()
    assert 0.88 <= covered <= 0.99


@pytest.mark.parametrize(
    "text, expected", [("a b c", 1.0), ("A b a B a b", 2 / 5), ("one one one one", 1 / 3), ("word", None), ("", None)]
)
def test_distinct_bigrams(text, expected):
    result = statistics.distinct_bigrams(text)
    assert math.isnan(result) if expected is None else result == pytest.approx(expected)
