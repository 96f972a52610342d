"""mix_sample with one program for each row: the shape for batches that fill the chip."""

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
    clear_histograms,
    fill_histogram,
    find_digit,
    find_token,
    least_mass,
    least_worth_counting,
    most_likely,
    random_threshold,
    settle_top_k,
    settle_top_p,
    sum_above,
)  # fmt: skip
from .exp_log import log32, total_of
from .merge import (
    ALL_EXCLUDED,
    LINEAR,
    NOT_A_NUMBER,
    TERM,
    WEIGHT,
    count_active,
    expert_log_prob,
    merge_tokens,
    scan_mass,
    scan_merge,
    scan_temper,
    scan_top,
    scan_total,
    store_term,
)  # fmt: skip


@triton.jit
def status_of(bad, excluded, merge_bad, merged_top):
    """0, or why a row cannot be sampled from: NaN or +inf in its logits, or no token left."""
    empty = (excluded != 0) | (merge_bad != 0) | (merged_top == float("-inf"))
    return tl.where(bad != 0, NOT_A_NUMBER, tl.where(empty, ALL_EXCLUDED, 0))


@triton.jit
def report(
    logits, terms, token, status, shift, log_total, stride_k, stride_v, exponent, active,
    token_out, logprob_out, expert_logprobs, status_out,
    K: tl.constexpr, MERGE: tl.constexpr, EXPERT_LOGPROBS: tl.constexpr,
):  # fmt: skip
    """Write down a row's token, log p and every log p_i of it, and the status. Without a token: -1 and NaN."""
    one = tl.arange(0, 1)
    v = one + token
    well = (status + one) == 0
    merged = merge_tokens(logits, terms, v, well, stride_k, stride_v, exponent, active, K, MERGE)
    tl.store(token_out + one, tl.where(well, v, -1).to(tl.int64))
    tl.store(logprob_out + one, tl.where(well, (merged - shift) - log_total, float("nan")))
    tl.store(status_out + one, one + status)
    if EXPERT_LOGPROBS:
        for i in range(K):
            log_p = expert_log_prob(logits + i * stride_k, terms + i * TERM, v, well, stride_v)
            known = tl.where(well, tl.load(terms + i * TERM + WEIGHT), 0.0) != 0
            tl.store(expert_logprobs + i + one, tl.where(known, log_p, float("nan")))


@triton.jit
def mix_sample_row(
    logits, stride_b, stride_k, stride_v, weights, weights_stride_b, weights_stride_k, exponent,
    temperature, top_k, top_p, min_p, seed, sequence, position,
    numbers, numbers_stride, histograms, histograms_stride, scratch, scratch_stride,
    token, logprob, expert_logprobs, status, V,
    K: tl.constexpr, MERGE: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
    EXPERT_LOGPROBS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: every pass in turn, with a barrier wherever one thread reads what another wrote.

    The logits come from memory once; the second and third look find them in L2 (the row's K * V numbers of a program).
    """
    b = tl.program_id(0).to(tl.int64)
    logits += b * stride_b
    weights += b * weights_stride_b
    terms = numbers + b * numbers_stride
    histograms += b * histograms_stride
    row = scratch + b * scratch_stride
    if TOP_K or TOP_P:
        clear_histograms(histograms, 0, 1)

    bad = 0
    excluded = 0
    for i in range(K):
        weight = tl.load(weights + i * weights_stride_k)
        top = float("-inf")
        mass = tl.full([], 0, tl.int64)
        if weight != 0:
            top, worse = scan_top(logits + i * stride_k, stride_v, 0, V, BLOCK)
            mass = scan_mass(logits + i * stride_k, stride_v, top, 0, V, BLOCK)
            bad |= worse
            excluded |= (top == float("-inf")).to(tl.int32)
        store_term(terms + i * TERM, top, mass, weight)
    tl.debug_barrier()

    active = count_active(weights, weights_stride_k, K)
    top, merge_bad = scan_merge(
        logits, terms, row, 0, V, stride_k, stride_v, exponent, active, K, MERGE, BLOCK
    )  # fmt: skip
    status_now = status_of(bad, excluded, merge_bad, top)
    tl.debug_barrier()
    shift = 0.0
    log_total = 0.0
    if MERGE != LINEAR:
        log_total = log32(total_of(scan_total(row, top, 0, V, BLOCK)))
        shift = top
        top = (top - shift) - log_total
        tl.debug_barrier()

    floor = tl.full([], 1, tl.int64)
    if MIN_P:
        floor = least_mass(tl.load(min_p + b))
    heat = tl.load(temperature + b)
    kept, count = scan_temper(row, 0, V, shift, log_total, top, heat, floor, BLOCK)
    tl.debug_barrier()

    draws = heat != 0
    cut = floor - 1
    ties = tl.full([], 0, tl.int64)
    k = tl.full([], 0, tl.int64)
    if TOP_K:
        k = tl.load(top_k + b).to(tl.int64)
    by_count = draws & (k > 0) & (k < count)
    if TOP_K or TOP_P:
        least = floor
        wanted = by_count
        if TOP_P:
            fraction = tl.load(top_p + b)
            by_mass = draws & (fraction < 1.0)
            wanted |= by_mass
            if not by_count:
                target = ceil_product(fraction.to(tl.int64, bitcast=True), kept)
                least = least_worth_counting(floor, kept, target, count)
        if wanted:
            fill_histogram(row, 0, V, least, 0, histograms + MASS_1, histograms + COUNT_1, True, 18, TOP_K, BLOCK)
        tl.debug_barrier()
    if TOP_K and by_count:
        prefix, before = find_digit(histograms + COUNT_1, k, BUCKETS)
        before_mass = sum_above(histograms + MASS_1, prefix, BUCKETS)
        fill_histogram(
            row, 0, V, floor, prefix, histograms + K_MASS_2, histograms + K_COUNT_2, False, 9, True, BLOCK
        )  # fmt: skip
        tl.debug_barrier()
        digit, more = find_digit(histograms + K_COUNT_2, k - before, DIGITS)
        before_mass += sum_above(histograms + K_MASS_2, digit, DIGITS)
        before += more
        prefix = (prefix << 9) | digit
        fill_histogram(
            row, 0, V, floor, prefix, histograms + K_MASS_3, histograms + K_COUNT_3, False, 0, True, BLOCK
        )  # fmt: skip
        tl.debug_barrier()
        cut, ties, kept = settle_top_k(histograms, prefix, before, before_mass, k, floor, count, kept)
    if TOP_P and by_mass:
        target = tl.maximum(ceil_product(fraction.to(tl.int64, bitcast=True), kept), 1)
        prefix, before = find_digit(histograms + MASS_1, target, BUCKETS)
        fill_histogram(row, 0, V, floor, prefix, histograms + P_MASS_2, histograms, False, 9, False, BLOCK)
        tl.debug_barrier()
        digit, more = find_digit(histograms + P_MASS_2, target - before, DIGITS)
        before += more
        prefix = (prefix << 9) | digit
        fill_histogram(row, 0, V, floor, prefix, histograms + P_MASS_3, histograms, False, 0, False, BLOCK)
        tl.debug_barrier()
        cut, ties, kept = settle_top_p(histograms, prefix, before, target)
    if not draws:
        cut, ties, kept = most_likely()

    threshold = random_threshold(tl.load(seed + b), tl.load(sequence + b), tl.load(position + b), kept)
    found = find_token(row, 0, V, cut, ties, threshold, BLOCK)
    report(
        logits, terms, found, status_now, shift, log_total, stride_k, stride_v, exponent, active,
        token + b, logprob + b, expert_logprobs + b * K, status + b, K, MERGE, EXPERT_LOGPROBS,
    )  # fmt: skip
