"""What "the same answer" means: merge rules and the exact sampler, in plain NumPy.

Everything fast in this package is held to this file, token by token. Three choices make that possible on any machine:

* ``exp`` and ``log`` are fixed sequences of IEEE float32 multiplications and additions (no fused ones), so every
  backend that follows the same sequence gets the same bits;
* whatever is summed over the vocabulary is first rounded to an integer *mass*, 2**40 for the most likely token.
  Integers add up the same in every order, so the split over threads, blocks or vector lanes cannot change a token;
* random bits come from Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), a
  function of (seed, sequence, position) and nothing else.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Masses = npt.NDArray[np.uint64]

MASS_BITS = 40


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a token is drawn from the merged distribution.

    Attributes:
        do_sample: draw if true, take the most likely token (ties to the lowest id) if false.
        temperature: divides the log-probabilities before truncation; 0 means greedy.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches top_p; 1 keeps all.
        min_p: keep tokens at least min_p times as likely as the most likely one; 0 keeps all.
        seed: key of the random stream, 64 bits.
    """

    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.do_sample, (bool, np.bool_)):
            raise TypeError(f"do_sample: expected a bool, got {self.do_sample!r}")
        _check_real("temperature", self.temperature, 0.0, math.inf, "a finite number >= 0")
        _check_integer("top_k", self.top_k, 2**31)
        _check_real("top_p", self.top_p, 0.0, 1.0, "a number in [0, 1]")
        _check_real("min_p", self.min_p, 0.0, 1.0, "a number in [0, 1]")
        _check_integer("seed", self.seed, 2**64)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken and nothing is drawn."""
        return not self.do_sample or self.temperature == 0


@dataclass(frozen=True, slots=True)
class MergeRule:
    """How the experts' distributions become one: ``linear``, ``log_linear`` or ``power`` with an exponent."""

    kind: Literal["linear", "log_linear", "power"] = "linear"
    exponent: float = 1.0

    @staticmethod
    def parse(rule: str | MergeRule) -> MergeRule:
        """Read ``"linear"``, ``"log_linear"`` or ``"power(a)"`` with a finite and not 0."""
        if isinstance(rule, MergeRule):
            return rule
        expected = "merge: expected 'linear', 'log_linear' or 'power(a)' with a number a"
        if not isinstance(rule, str):
            raise TypeError(f"{expected}, got {rule!r}")
        if rule == "linear":
            return MergeRule("linear")
        if rule == "log_linear":
            return MergeRule("log_linear")
        match = re.fullmatch(r"power\(\s*([-+0-9.eE]+)\s*\)", rule)
        try:
            exponent = float(match.group(1)) if match else math.nan
        except ValueError:
            exponent = math.nan
        if not math.isfinite(exponent):
            raise ValueError(f"{expected}, got {rule!r}")
        if abs(exponent) < 1e-3:
            raise ValueError(f"merge: power(a) needs |a| >= 0.001, got {rule!r}; its limit at 0 is 'log_linear'")
        return MergeRule("power", exponent)


def mix_sample(
    expert_logits: npt.ArrayLike,
    mixture_weights: npt.ArrayLike,
    params: SamplingParams,
    *,
    merge: str | MergeRule = "linear",
    sequence: int = 0,
    position: int = 0,
) -> tuple[int, float]:
    """Merge K experts and draw one token: the oracle of ``ops.mix_sample``, for one row.

    Args:
        expert_logits: [K, V], any float dtype.
        mixture_weights: [K]; an expert of weight 0 is not looked at.
        params: how to draw.
        merge: the merge rule.
        sequence: index of the row in its batch.
        position: index of the token in its answer, 0 for the first.

    Returns:
        The token, and its log-probability before temperature and truncation.
    """
    log_p = merge_log_probs(expert_logits, mixture_weights, merge)
    token = sample(log_p, params, sequence=sequence, position=position)
    return token, float(log_p[token])


def merge_log_probs(
    expert_logits: npt.ArrayLike, mixture_weights: npt.ArrayLike, merge: str | MergeRule = "linear"
) -> Float32:
    """Log-probabilities [V] of the mixture of expert_logits [K, V] under mixture_weights [K] (steps 1 to 3).

    linear:     p = sum_i w_i p_i                        (Eq. 1 of arXiv 2407.04181)
    log_linear: log p = sum_i w_i log p_i - log Z        (weights may be negative)
    power(a):   p = (sum_i w_i p_i^a)^(1/a) / Z

    Raises:
        ValueError: a NaN or +inf among the logits, no finite logit, or weights that are no weights.
    """
    rule = MergeRule.parse(merge)
    logits = np.asarray(expert_logits).astype(np.float32)
    weights = check_weights(np.asarray(mixture_weights, dtype=np.float32), rule)
    active = np.flatnonzero(weights)
    weights, logits = weights[active], logits[active]
    if np.isnan(logits).any() or np.isposinf(logits).any():
        raise ValueError("expert_logits: NaN or +inf")
    top = logits.max(axis=1, keepdims=True)
    if np.isneginf(top).any():
        raise ValueError("expert_logits: all -inf")
    shifted = logits - top
    totals = _total(exp32(shifted))[:, None]
    log_probs = shifted - log32(totals)
    if rule.kind == "linear":
        return _merge_linear(shifted, totals, log_probs, weights)
    if rule.kind == "log_linear":
        merged = _weighted_sum(log_probs, weights)
    else:
        merged = _merge_power(log_probs, weights, np.float32(rule.exponent))
    if np.isnan(merged).any() or np.isposinf(merged).any() or np.isneginf(merged).all():
        raise ValueError("merge: no token has a finite probability under these weights")
    merged = merged - merged.max()
    result: Float32 = merged - log32(_total(exp32(merged)))
    return result


def sample(log_p: npt.ArrayLike, params: SamplingParams, *, sequence: int = 0, position: int = 0) -> int:
    """Draw one token from log_p [V], which need not be normalised (step 5). Sorts; exact to the last integer.

    Raises:
        ValueError: a NaN or +inf, or no finite entry.
    """
    log_p = np.asarray(log_p, dtype=np.float32)
    if np.isnan(log_p).any() or np.isposinf(log_p).any() or np.isneginf(log_p).all():
        raise ValueError("log_p: NaN, +inf or all -inf")
    if params.greedy:
        return int(np.argmax(log_p))
    masses = token_masses(log_p, params.temperature)
    kept = np.sort(kept_tokens(masses, params))
    running = np.cumsum(masses[kept], dtype=np.uint64)
    threshold = (philox(params.seed, sequence, position) * int(running[-1])) >> 64
    return int(kept[np.searchsorted(running, np.uint64(threshold), side="right")])


def token_masses(log_p: Float32, temperature: float) -> Masses:
    """Integer masses [V]: 2**40 * p**(1/temperature), the most likely token having 2**40."""
    with np.errstate(over="ignore"):  # a tiny temperature sends the rest to -inf, as it should
        scaled = (log_p - log_p.max()) / max(np.float32(temperature), np.finfo(np.float32).tiny)
    return _masses(exp32(scaled))


def kept_tokens(masses: Masses, params: SamplingParams) -> npt.NDArray[np.int64]:
    """Ids of the tokens that survive top_k, min_p and top_p, most likely first, ties to the lowest id."""
    order = np.argsort(-masses.astype(np.int64), kind="stable")
    if params.top_k:
        order = order[: params.top_k]
    order = order[masses[order] >= max(1, math.ceil(Fraction(params.min_p) * 2**MASS_BITS))]
    running = np.cumsum(masses[order], dtype=np.uint64)
    target = math.ceil(Fraction(params.top_p) * int(running[-1]))
    kept: npt.NDArray[np.int64] = order[: max(1, int(np.searchsorted(running, np.uint64(target), side="left")) + 1)]
    return kept


def philox(seed: int, sequence: int, position: int) -> int:
    """64 random bits: Philox4x32-10 with key = seed and counter = (position, sequence), low words first."""
    low = 0xFFFFFFFF
    words = philox4x32((position & low, position >> 32, sequence & low, sequence >> 32), (seed & low, seed >> 32))
    return words[0] | words[1] << 32


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """The ten rounds of Philox4x32-10 on four 32-bit counter words and two key words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    low = 0xFFFFFFFF
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = b >> 32 ^ c1 ^ k0, b & low, a >> 32 ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def exp32(x: Float32) -> Float32:
    """exp(x) for x <= 0 in float32, the same bits on every backend; exp(-87) below -87. Relative error under 2e-7.

    x = n log 2 + r with n log 2 taken off in two parts, then a polynomial in r, and 2**n added to the exponent.
    """
    f = np.float32
    x = np.maximum(x, f(-87.0))
    shifted = x * f(1.44269504088896341) + f(12582912.0)  # adding 1.5 * 2**23 rounds to a whole number
    n = shifted - f(12582912.0)
    r = (x - n * f(0.693359375)) - n * f(-2.12194440e-4)
    p = np.full_like(r, f(1.3814433478e-3))
    for c in (8.3687966689e-3, 4.1668396443e-2, 1.6666519642e-1, 4.9999994040e-1):
        p = p * r + f(c)
    p = (p * (r * r) + r) + f(1.0)
    result: Float32 = (p.view(np.int32) + (shifted.view(np.int32) << 23)).view(np.float32)
    return result


def log32(x: Float32) -> Float32:
    """log(x) for normal positive x in float32, the same bits on every backend (Cephes logf); -inf at and below 0."""
    f = np.float32
    x = np.asarray(x, dtype=np.float32)
    zero = ~(x >= np.finfo(np.float32).tiny)
    bits = np.where(zero, f(1), x).astype(np.float32).view(np.int32)
    # The mantissa in [sqrt(1/2), sqrt(2)): the exponent counts from there.
    exponent = (bits - 0x3F3504F3) >> 23
    m = (bits - (exponent << 23)).view(np.float32) - f(1.0)
    e = exponent.astype(np.float32)
    p = np.full_like(m, f(7.0376836292e-2))
    for c in (
        -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
        -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
    ):  # fmt: skip
        p = p * m + f(c)
    square = m * m
    y = (p * m) * square
    y = y + e * f(-2.12194440e-4)
    y = y - square * f(0.5)
    result: Float32 = np.where(zero, f(-np.inf), (m + y) + e * f(0.693359375)).astype(np.float32)
    return result


def check_weights(weights: Float32, rule: MergeRule) -> Float32:
    """The weights [..., K], if they can be weights under the rule; else ValueError."""
    rows = np.atleast_2d(weights).tolist()  # quicker than NumPy on a few numbers, and most often all is well
    if rule.kind != "log_linear" and all(min(row) >= 0 and abs(sum(row) - 1) <= 1e-3 for row in rows):
        return weights
    if not np.isfinite(weights).all():
        raise ValueError("mixture_weights: expected finite numbers")
    if not (weights != 0).any(axis=-1).all():
        raise ValueError("mixture_weights: expected at least one weight that is not 0")
    if rule.kind == "log_linear":
        return weights
    if (weights < 0).any():
        raise ValueError(f"mixture_weights: expected no negative weight under merge={rule.kind!r}")
    sums = weights.sum(axis=-1)
    worst = sums.ravel()[np.argmax(np.abs(sums - 1))]
    raise ValueError(f"mixture_weights: expected a sum of 1 under merge={rule.kind!r}, got {worst:.6g}")


def _masses(e: Float32) -> Masses:
    return np.rint(e.astype(np.float64) * 2.0**MASS_BITS).astype(np.uint64)


def _total(e: Float32) -> Float32:
    """Sum over the last axis, of values rounded to multiples of 2**-40."""
    total: Float32 = _masses(e).sum(axis=-1, dtype=np.uint64).astype(np.float32) * np.float32(2.0**-MASS_BITS)
    return total


def _weighted_sum(values: Float32, weights: Float32) -> Float32:
    """Sum of weights[i] * values[i] in order of i; one expert of positive weight, or all together, exclude a token."""
    minus_inf = np.isneginf(values)
    excluded = minus_inf[weights > 0].any(axis=0) | minus_inf.all(axis=0)
    total = values[0] * weights[0]
    with np.errstate(invalid="ignore"):
        for value, weight in zip(values[1:], weights[1:], strict=True):
            total = total + value * weight
    return _exclude(total, excluded)


def _exclude(log_p: Any, excluded: Any) -> Float32:
    result: Float32 = np.where(excluded, np.float32(-np.inf), log_p).astype(np.float32)
    return result


def _log_sum_exp(terms: Float32) -> Float32:
    top = terms.max(axis=0)
    with np.errstate(invalid="ignore"):
        shifted = np.where(np.isneginf(terms), np.float32(-np.inf), terms - top).astype(np.float32)
    total = exp32(shifted[0])
    for row in shifted[1:]:
        total = total + exp32(row)
    with np.errstate(invalid="ignore"):
        return _exclude(top + log32(total), np.isneginf(top))


def _merge_linear(shifted: Float32, totals: Float32, log_probs: Float32, weights: Float32) -> Float32:
    if len(weights) == 1:
        only: Float32 = log_probs[0]
        return only
    scales = weights / totals[:, 0]
    p = exp32(shifted[0]) * scales[0]
    for row, scale in zip(shifted[1:], scales[1:], strict=True):
        p = p + exp32(row) * scale
    # Near the end of float32's range add in log space: a high temperature can bring such tokens back.
    rare = p < np.float32(2.0**-100)
    log_p = log32(p)
    log_p[rare] = _log_sum_exp(log_probs[:, rare] + log32(weights)[:, None])
    return log_p


def _merge_power(log_probs: Float32, weights: Float32, exponent: np.float32) -> Float32:
    terms = log_probs * exponent + log32(weights)[:, None]
    excluded = np.isposinf(terms).any(axis=0)  # a negative exponent lets no token through that one expert excludes
    terms[:, excluded] = -np.inf
    merged = _log_sum_exp(terms) / exponent
    return _exclude(merged, excluded)


def _check_real(name: str, value: float, low: float, high: float, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    if not low <= value <= high or math.isinf(value):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def _check_integer(name: str, value: int, limit: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an integer >= 0, got {value!r}")
    if not 0 <= value < limit:
        raise ValueError(f"{name}: expected an integer in [0, {limit}), got {value!r}")
