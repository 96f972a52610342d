"""Means, win rates and effect sizes with intervals. What is drawn again for an interval are prompts, never answers.

Answers to one prompt are not independent: an easy prompt is easy under every preference and for every method. So all
answers to a prompt go into a bootstrap sample together, and the same samples serve every number: comparisons
are paired.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]

TIE = 1e-9  # composite rewards that differ by no more are equal
QUANTILES = (0.025, 0.975)


@dataclass(frozen=True)
class Estimate:
    """A number, or an array of numbers, with the ends of its 95 % interval, of the same shape."""

    value: Float64
    low: Float64
    high: Float64


def bootstrap_shares(num_prompts: int, num_resamples: int, seed: int) -> Float64:
    """Bootstrap samples of prompts, [R, N]: how much of sample r is prompt n. Rows sum to 1."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size=num_resamples)
    return counts / num_prompts


def mean(values: Float64, shares: Float64) -> Estimate:
    """Mean of all answers of [N, P, ...], with its percentile interval. NaN entries are left out; all NaN gives NaN."""
    known = np.isfinite(values)
    sums, counts = np.where(known, values, 0.0).sum(axis=1), known.sum(axis=1, dtype=np.float64)
    with np.errstate(invalid="ignore"):  # 0 / 0
        drawn = np.tensordot(shares, sums, axes=1) / np.tensordot(shares, counts, axes=1)
        value = sums.sum(axis=0) / counts.sum(axis=0)
    return Estimate(value, *_interval(drawn))


def _interval(drawn: Float64) -> tuple[Float64, Float64]:
    """Ends of the interval from R values [R, ...]. NaN ones, of samples in which nothing varies, are left out."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice")
        low, high = np.nanquantile(drawn, QUANTILES, axis=0)
    return low, high


def standard_error(per_prompt: Float64) -> Float64:
    """Standard error of the mean over prompts of [N, ...]; NaN for one prompt."""
    if len(per_prompt) < 2:
        return np.full(per_prompt.shape[1:], np.nan)
    result: Float64 = per_prompt.std(axis=0, ddof=1) / np.sqrt(len(per_prompt))
    return result


def composite_reward(rewards: Float64, base_rewards: Float64) -> Float64:
    """Mean over the stated dimensions of the Bradley-Terry probability of beating the base's answer.

    Args:
        rewards: [D, ...] standardised rewards of some answers, for the D stated dimensions.
        base_rewards: [D, ...] those of the base's answers to the same prompts.
    """
    result: Float64 = (0.5 + 0.5 * np.tanh((rewards - base_rewards) / 2)).mean(axis=0)  # the logistic function
    return result


def wins_per_prompt(composite: Float64) -> Float64:
    """How often each method beats each other one, by prompt: [N, M, M] from composite rewards [M, N, P].

    A win is a greater composite reward for the same prompt and preference; a tie is half a win for both.
    """
    difference = composite[:, None] - composite[None, :]
    wins = np.where(np.abs(difference) <= TIE, 0.5, difference > 0)
    result: Float64 = np.moveaxis(wins.mean(axis=-1), -1, 0)
    return result


def average_wins(wins: Float64, opponents: Sequence[int]) -> Float64:
    """Mean over opponents, a method itself aside: [N, M] from [N, M, M]; NaN for a method without opponents."""
    columns = []
    for method in range(wins.shape[1]):
        others = [index for index in opponents if index != method]
        columns.append(wins[:, method, others].mean(axis=1) if others else np.full(len(wins), np.nan))
    return np.stack(columns, axis=1)


def cohens_d(values: Float64, base: Float64, shares: Float64) -> Estimate:
    """Difference of two means in units of the pooled standard deviation: [...] from two arrays [N, ...].

    NaN where neither varies.
    """
    size = len(values)
    unbiased = size / (size - 1) if size > 1 else np.nan

    def effect(weights: Float64) -> Float64:
        with np.errstate(invalid="ignore", divide="ignore"):
            means = [np.tensordot(weights, x, axes=1) for x in (values, base)]
            squares = [np.tensordot(weights, x * x, axes=1) for x in (values, base)]
            variances = [np.maximum(square - m * m, 0.0) * unbiased for square, m in zip(squares, means, strict=True)]
            pooled = np.sqrt((variances[0] + variances[1]) / 2)
            result: Float64 = np.where(pooled > TIE, (means[0] - means[1]) / pooled, np.nan)
            return result

    return Estimate(effect(np.full((1, size), 1 / size))[0], *_interval(effect(shares)))


def distinct_bigrams(text: str) -> float:
    """Distinct-2 of a text: how many of its pairs of neighbouring words are different ones; NaN below two words."""
    words = text.casefold().split()
    pairs = list(pairwise(words))
    return len(set(pairs)) / len(pairs) if pairs else float("nan")
