"""The second half of mix_sample with a split vocabulary: the cuts of top-k and top-p digit by digit, and the draw.

The kernel that fills the histograms of a digit first reads the digit before it out of the histograms that the kernel
before it has left. Every program of a row does so for itself; the first of them writes it down for the next kernel.
"""

import triton
import triton.language as tl

from .cut import (
    BUCKETS,
    COUNT_1,
    DIGITS,
    K_COUNT_2,
    K_COUNT_3,
    K_MASS_2,
    K_MASS_3,
    MASS_1,
    P_MASS_2,
    P_MASS_3,
    ceil_product,
    fill_histogram,
    find_digit,
    find_token,
    kept_mass,
    least_mass,
    least_worth_counting,
    most_likely,
    random_threshold,
    scan_kept,
    settle_top_k,
    settle_top_p,
    sum_above,
)  # fmt: skip
from .merge import count_active
from .mix_sample_row import report, status_of
from .mix_sample_split import (
    ABOVE,
    BAD,
    COUNT,
    EXPERT_TOP,
    LANES,
    MASS,
    MERGE_BAD,
    MERGE_TOP,
    SEARCH,
    TERMS,
    TIES,
    greatest_of,
    normaliser,
    sum_of,
)  # fmt: skip

# How far a search has come after its first and after its second digit: the prefix, the number (top-k alone) and the
# mass of the tokens before.
K_FIRST = tl.constexpr(SEARCH.value)
K_SECOND = tl.constexpr(SEARCH.value + 4)
P_FIRST = tl.constexpr(SEARCH.value + 8)
P_SECOND = tl.constexpr(SEARCH.value + 12)


@triton.jit
def plan(
    b, temperature, top_k, top_p, min_p, integers, splits, TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr
):  # fmt: skip
    """What is to be done with a row.

    Returns whether anything is drawn, k (0 if top-k cuts nothing), whether top-p is asked for and its bits, the floor
    that min-p sets, and the number and the mass of the tokens above that.
    """
    draws = tl.load(temperature + b) != 0
    count = sum_of(integers + COUNT, splits)
    mass = sum_of(integers + MASS, splits)
    floor = tl.full([], 1, tl.int64)
    k = tl.full([], 0, tl.int64)
    by_mass = count < 0
    bits = tl.full([], 0, tl.int64)
    if MIN_P:
        floor = least_mass(tl.load(min_p + b))
    if TOP_K:
        k = tl.load(top_k + b).to(tl.int64)
        k = tl.where(draws & (k < count), k, 0)
    if TOP_P:
        fraction = tl.load(top_p + b)
        by_mass = draws & (fraction < 1.0)
        bits = fraction.to(tl.int64, bitcast=True)
    return draws, k, by_mass, bits, floor, count, mass


@triton.jit
def note(place, prefix, before, before_mass):
    """Write down how far a search has come."""
    if tl.program_id(1) == 0:
        tl.store(place, prefix.to(tl.int64))
        tl.store(place + 1, before)
        tl.store(place + 2, before_mass)


@triton.jit
def split_first_digit(
    temperature, top_k, top_p, min_p, integers, integers_stride, scratch, scratch_stride, V, CHUNK,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Fill the histograms of the first digit, which top-k and top-p share."""
    b = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * CHUNK
    integers += b * integers_stride
    _, k, by_mass, bits, floor, count, mass = plan(
        b, temperature, top_k, top_p, min_p, integers, tl.num_programs(1), TOP_K, TOP_P, MIN_P
    )  # fmt: skip
    least = floor
    if k == 0:
        least = least_worth_counting(floor, mass, ceil_product(bits, mass), count)
    if (k > 0) | by_mass:
        fill_histogram(
            scratch + b * scratch_stride, start, tl.minimum(start + CHUNK, V), least, 0,
            integers + MASS_1, integers + COUNT_1, True, 18, TOP_K, BLOCK,
        )  # fmt: skip


@triton.jit
def split_top_k(
    temperature, top_k, top_p, min_p, integers, integers_stride, scratch, scratch_stride, V, CHUNK,
    TOP_P: tl.constexpr, MIN_P: tl.constexpr, THIRD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Find a digit of the top_k-th token, and fill the histograms of the next, the second or the third."""
    b = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * CHUNK
    integers += b * integers_stride
    row = scratch + b * scratch_stride
    end = tl.minimum(start + CHUNK, V)
    _, k, _, _, floor, _, _ = plan(
        b, temperature, top_k, top_p, min_p, integers, tl.num_programs(1), True, TOP_P, MIN_P
    )  # fmt: skip
    if k > 0:
        if THIRD:
            before = tl.load(integers + K_FIRST + 1)
            digit, more = find_digit(integers + K_COUNT_2, k - before, DIGITS)
            prefix = (tl.load(integers + K_FIRST).to(tl.int32) << 9) | digit
            mass = tl.load(integers + K_FIRST + 2) + sum_above(integers + K_MASS_2, digit, DIGITS)
            note(integers + K_SECOND, prefix, before + more, mass)
            fill_histogram(
                row, start, end, floor, prefix, integers + K_MASS_3, integers + K_COUNT_3, False, 0, True, BLOCK
            )
        else:
            prefix, before = find_digit(integers + COUNT_1, k, BUCKETS)
            note(integers + K_FIRST, prefix, before, sum_above(integers + MASS_1, prefix, BUCKETS))
            fill_histogram(
                row, start, end, floor, prefix, integers + K_MASS_2, integers + K_COUNT_2, False, 9, True, BLOCK
            )


@triton.jit
def after_top_k(integers, k, floor, count, mass, TOP_K: tl.constexpr):
    """The cut after min-p and top-k, the ties it keeps, and the mass kept."""
    cut = floor - 1
    ties = tl.full([], 0, tl.int64)
    kept = mass
    if TOP_K and k > 0:
        prefix = tl.load(integers + K_SECOND).to(tl.int32)
        before = tl.load(integers + K_SECOND + 1)
        before_mass = tl.load(integers + K_SECOND + 2)
        cut, ties, kept = settle_top_k(integers, prefix, before, before_mass, k, floor, count, mass)
    return cut, ties, kept


@triton.jit
def split_top_p(
    temperature, top_k, top_p, min_p, integers, integers_stride, scratch, scratch_stride, V, CHUNK,
    TOP_K: tl.constexpr, MIN_P: tl.constexpr, THIRD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Find a digit of the last token of the nucleus, and fill the histogram of the next, the second or the third."""
    b = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * CHUNK
    integers += b * integers_stride
    row = scratch + b * scratch_stride
    end = tl.minimum(start + CHUNK, V)
    _, k, by_mass, bits, floor, count, mass = plan(
        b, temperature, top_k, top_p, min_p, integers, tl.num_programs(1), TOP_K, True, MIN_P
    )  # fmt: skip
    if by_mass:
        _cut, _ties, kept = after_top_k(integers, k, floor, count, mass, TOP_K)
        target = tl.maximum(ceil_product(bits, kept), 1)
        if THIRD:
            before = tl.load(integers + P_FIRST + 2)
            digit, more = find_digit(integers + P_MASS_2, target - before, DIGITS)
            prefix = (tl.load(integers + P_FIRST).to(tl.int32) << 9) | digit
            note(integers + P_SECOND, prefix, before, before + more)
            fill_histogram(row, start, end, floor, prefix, integers + P_MASS_3, integers, False, 0, False, BLOCK)
        else:
            prefix, before = find_digit(integers + MASS_1, target, BUCKETS)
            note(integers + P_FIRST, prefix, before, before)
            fill_histogram(row, start, end, floor, prefix, integers + P_MASS_2, integers, False, 9, False, BLOCK)


@triton.jit
def final_cut(
    b, temperature, top_k, top_p, min_p, integers, splits, TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr
):  # fmt: skip
    """The cut of a row, the ties it keeps, and the mass kept."""
    draws, k, by_mass, bits, floor, count, mass = plan(
        b, temperature, top_k, top_p, min_p, integers, splits, TOP_K, TOP_P, MIN_P
    )  # fmt: skip
    cut, ties, kept = after_top_k(integers, k, floor, count, mass, TOP_K)
    if TOP_P and by_mass:
        target = tl.maximum(ceil_product(bits, kept), 1)
        prefix = tl.load(integers + P_SECOND).to(tl.int32)
        cut, ties, kept = settle_top_p(integers, prefix, tl.load(integers + P_SECOND + 2), target)
    if not draws:
        cut, ties, kept = most_likely()
    return cut, ties, kept


@triton.jit
def split_kept(
    temperature, top_k, top_p, min_p, integers, integers_stride, scratch, scratch_stride, V, CHUNK,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The mass above the cut in each split, and the number of ties at it."""
    b = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1)
    start = s * CHUNK
    integers += b * integers_stride
    cut, _, _ = final_cut(
        b, temperature, top_k, top_p, min_p, integers, tl.num_programs(1), TOP_K, TOP_P, MIN_P
    )  # fmt: skip
    above, ties = scan_kept(scratch + b * scratch_stride, start, tl.minimum(start + CHUNK, V), cut, BLOCK)
    tl.store(integers + ABOVE + s, above)
    tl.store(integers + TIES + s, ties)


@triton.jit
def split_draw(
    logits, stride_b, stride_k, stride_v, weights, weights_stride_b, weights_stride_k, exponent,
    temperature, top_k, top_p, min_p, seed, sequence, position,
    numbers, numbers_stride, integers, integers_stride, scratch, scratch_stride,
    token, logprob, expert_logprobs, status, V, CHUNK, splits,
    K: tl.constexpr, MERGE: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
    EXPERT_LOGPROBS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row: draw, look for the token in the one split that holds it, and report."""
    b = tl.program_id(0).to(tl.int64)
    logits += b * stride_b
    weights += b * weights_stride_b
    numbers += b * numbers_stride
    integers += b * integers_stride
    cut, ties, kept = final_cut(b, temperature, top_k, top_p, min_p, integers, splits, TOP_K, TOP_P, MIN_P)
    threshold = random_threshold(tl.load(seed + b), tl.load(sequence + b), tl.load(position + b), kept)

    s = tl.arange(0, LANES)
    found = tl.load(integers + TIES + s, mask=s < splits, other=0)
    ties_before = tl.cumsum(found, 0) - found
    here = kept_mass(tl.load(integers + ABOVE + s, mask=s < splits, other=0), found, cut, ties - ties_before)
    running = tl.cumsum(here, 0)
    split = tl.minimum(tl.sum((running <= threshold).to(tl.int32), 0), splits - 1)
    threshold -= tl.sum(tl.where(s < split, here, 0), 0)
    ties -= tl.sum(tl.where(s < split, found, 0), 0)
    start = split * CHUNK
    at = find_token(scratch + b * scratch_stride, start, tl.minimum(start + CHUNK, V), cut, ties, threshold, BLOCK)

    excluded = 0
    for i in range(K):
        if tl.load(weights + i * weights_stride_k) != 0:
            excluded |= (greatest_of(numbers + EXPERT_TOP + i * LANES, splits) == float("-inf")).to(tl.int32)
    bad = sum_of(integers + BAD, splits)
    status_now = status_of(
        bad, excluded, sum_of(integers + MERGE_BAD, splits), greatest_of(numbers + MERGE_TOP, splits)
    )
    shift, log_total, _ = normaliser(numbers, integers, splits, MERGE)
    report(
        logits, numbers + TERMS, at, status_now, shift, log_total, stride_k, stride_v, exponent,
        count_active(weights, weights_stride_k, K), token + b, logprob + b, expert_logprobs + b * K, status + b,
        K, MERGE, EXPERT_LOGPROBS,
    )  # fmt: skip
