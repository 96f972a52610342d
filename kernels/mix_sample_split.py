"""mix_sample with the vocabulary split over many programs a row: the shape for batches too small to fill the chip.

Each kernel is one pass over the row's tokens, shared out in equal stretches. A program leaves what it found in its
stretch (a maximum or a sum of integers) in memory, and every program of the next kernel puts those few numbers together
for itself: that needs no barrier between the programs of a row, nor that all of them are resident at once.
"""

import triton
import triton.language as tl

from .cut import HISTOGRAMS, clear_histograms, least_mass
from .exp_log import log32, total_of
from .merge import (
    LINEAR,
    TERM,
    count_active,
    scan_mass,
    scan_merge,
    scan_temper,
    scan_top,
    scan_total,
    store_term,
)  # fmt: skip

LANES = tl.constexpr(64)  # the most splits of a row

# Where the numbers of a row are, LANES for its splits at each place. In int64 numbers, after the histograms:
BAD = tl.constexpr(HISTOGRAMS.value)
MERGE_BAD = tl.constexpr(HISTOGRAMS.value + 64)
TOTAL = tl.constexpr(HISTOGRAMS.value + 2 * 64)
MASS = tl.constexpr(HISTOGRAMS.value + 3 * 64)
COUNT = tl.constexpr(HISTOGRAMS.value + 4 * 64)
ABOVE = tl.constexpr(HISTOGRAMS.value + 5 * 64)
TIES = tl.constexpr(HISTOGRAMS.value + 6 * 64)
SEARCH = tl.constexpr(HISTOGRAMS.value + 7 * 64)  # how far the searches for the cuts have come
EXPERT_MASS = tl.constexpr(HISTOGRAMS.value + 8 * 64)  # for each expert
INTEGERS = tl.constexpr(HISTOGRAMS.value + 8 * 64 + 16 * 64)
# In float32 numbers:
MERGE_TOP = tl.constexpr(0)
EXPERT_TOP = tl.constexpr(64)  # for each expert
TERMS = tl.constexpr(64 + 16 * 64)  # for each split, for each expert
NUMBERS = tl.constexpr(64 + 16 * 64 + 64 * 16 * TERM.value)


@triton.jit
def sum_of(parts, splits):
    """The sum of what each split left."""
    s = tl.arange(0, LANES)
    return tl.sum(tl.load(parts + s, mask=s < splits, other=0), 0)


@triton.jit
def greatest_of(parts, splits):
    """The greatest of what each split left."""
    s = tl.arange(0, LANES)
    return tl.max(tl.load(parts + s, mask=s < splits, other=float("-inf")), 0)


@triton.jit
def split_tops(
    logits, stride_b, stride_k, stride_v, weights, weights_stride_b, weights_stride_k,
    numbers, numbers_stride, integers, integers_stride, V, CHUNK,
    K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The greatest logit of every expert. Also clears the histograms."""
    b = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1)
    start = s * CHUNK
    integers += b * integers_stride
    clear_histograms(integers, s, tl.num_programs(1))
    bad = 0
    for i in range(K):
        if tl.load(weights + b * weights_stride_b + i * weights_stride_k) != 0:
            top, worse = scan_top(
                logits + b * stride_b + i * stride_k, stride_v, start, tl.minimum(start + CHUNK, V), BLOCK
            )  # fmt: skip
            bad |= worse
            tl.store(numbers + b * numbers_stride + EXPERT_TOP + i * LANES + s, top)
    tl.store(integers + BAD + s, bad.to(tl.int64))


@triton.jit
def split_masses(
    logits, stride_b, stride_k, stride_v, weights, weights_stride_b, weights_stride_k,
    numbers, numbers_stride, integers, integers_stride, V, CHUNK,
    K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The mass of every expert."""
    b = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1)
    start = s * CHUNK
    for i in range(K):
        if tl.load(weights + b * weights_stride_b + i * weights_stride_k) != 0:
            top = greatest_of(numbers + b * numbers_stride + EXPERT_TOP + i * LANES, tl.num_programs(1))
            mass = scan_mass(
                logits + b * stride_b + i * stride_k, stride_v, top, start, tl.minimum(start + CHUNK, V), BLOCK
            )  # fmt: skip
            tl.store(integers + b * integers_stride + EXPERT_MASS + i * LANES + s, mass)


@triton.jit
def split_merge(
    logits, stride_b, stride_k, stride_v, weights, weights_stride_b, weights_stride_k, exponent,
    numbers, numbers_stride, integers, integers_stride, scratch, scratch_stride, V, CHUNK,
    K: tl.constexpr, MERGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The merged log-probabilities, and the greatest of them."""
    b = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1)
    splits = tl.num_programs(1)
    start = s * CHUNK
    weights += b * weights_stride_b
    numbers += b * numbers_stride
    integers += b * integers_stride
    terms = numbers + TERMS + s * (K * TERM)
    for i in range(K):
        weight = tl.load(weights + i * weights_stride_k)
        top = 0.0
        mass = tl.full([], 0, tl.int64)
        if weight != 0:
            top = greatest_of(numbers + EXPERT_TOP + i * LANES, splits)
            mass = sum_of(integers + EXPERT_MASS + i * LANES, splits)
        store_term(terms + i * TERM, top, mass, weight)
    tl.debug_barrier()
    top, bad = scan_merge(
        logits + b * stride_b, terms, scratch + b * scratch_stride, start, tl.minimum(start + CHUNK, V),
        stride_k, stride_v, exponent, count_active(weights, weights_stride_k, K), K, MERGE, BLOCK,
    )  # fmt: skip
    tl.store(numbers + MERGE_TOP + s, top)
    tl.store(integers + MERGE_BAD + s, bad.to(tl.int64))


@triton.jit
def split_total(
    numbers, numbers_stride, integers, integers_stride, scratch, scratch_stride, V, CHUNK, BLOCK: tl.constexpr
):  # fmt: skip
    """The mass of what the merge left, by which log_linear and power are normalised."""
    b = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1)
    start = s * CHUNK
    top = greatest_of(numbers + b * numbers_stride + MERGE_TOP, tl.num_programs(1))
    mass = scan_total(scratch + b * scratch_stride, top, start, tl.minimum(start + CHUNK, V), BLOCK)
    tl.store(integers + b * integers_stride + TOTAL + s, mass)


@triton.jit
def normaliser(numbers, integers, splits, MERGE: tl.constexpr):
    """What is taken off the merged log-probabilities (shift and log_total), and the greatest of them after that."""
    top = greatest_of(numbers + MERGE_TOP, splits)
    shift = 0.0
    log_total = 0.0
    if MERGE != LINEAR:
        log_total = log32(total_of(sum_of(integers + TOTAL, splits)))
        shift = top
        top = (top - shift) - log_total
    return shift, log_total, top


@triton.jit
def split_temper(
    temperature, min_p, numbers, numbers_stride, integers, integers_stride, scratch, scratch_stride, V, CHUNK,
    MERGE: tl.constexpr, MIN_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Masses in place of log-probabilities; the mass and the number of the tokens that min-p lets through."""
    b = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1)
    start = s * CHUNK
    numbers += b * numbers_stride
    integers += b * integers_stride
    shift, log_total, top = normaliser(numbers, integers, tl.num_programs(1), MERGE)
    floor = tl.full([], 1, tl.int64)
    if MIN_P:
        floor = least_mass(tl.load(min_p + b))
    mass, count = scan_temper(
        scratch + b * scratch_stride, start, tl.minimum(start + CHUNK, V), shift, log_total, top,
        tl.load(temperature + b), floor, BLOCK,
    )  # fmt: skip
    tl.store(integers + MASS + s, mass)
    tl.store(integers + COUNT + s, count)
