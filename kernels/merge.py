"""Passes over a row's expert logits: the greatest of each expert, its normaliser, and the merged log-probabilities.

Each pass covers the tokens [start, end) of one row, so that one program can walk a whole row or many can share it.
Floats are reduced by maximum alone and sums are of integers: the split leaves no trace in the result.
"""

import triton
import triton.language as tl

from .exp_log import exp32, log32, mass_of, total_of

LINEAR = tl.constexpr(0)
LOG_LINEAR = tl.constexpr(1)
POWER = tl.constexpr(2)

# What is known of an expert once its row has been summed, as float32 numbers side by side.
TERM = tl.constexpr(8)
TOP = tl.constexpr(0)  # its greatest logit
LOG_TOTAL = tl.constexpr(1)  # log of the sum of exp(logit - top)
SCALE = tl.constexpr(2)  # weight / total
WEIGHT = tl.constexpr(3)
LOG_WEIGHT = tl.constexpr(4)

NOT_A_NUMBER = tl.constexpr(1)  # the statuses of a row that cannot be sampled from; 0 is well
ALL_EXCLUDED = tl.constexpr(2)


@triton.jit
def scan_top(logits, stride_v, start, end, BLOCK: tl.constexpr):
    """The greatest logit of one expert, and 1 if there is a NaN or +inf among them, else 0."""
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    bad = tl.zeros([BLOCK], tl.int32)
    for at in range(start, end, BLOCK):
        v = at + tl.arange(0, BLOCK)
        x = tl.load(logits + v.to(tl.int64) * stride_v, mask=v < end, other=float("-inf")).to(tl.float32)
        bad |= ((x != x) | (x == float("inf"))).to(tl.int32)
        top = tl.maximum(top, x)
    return tl.max(top, 0), tl.max(bad, 0)


@triton.jit
def scan_mass(logits, stride_v, top, start, end, BLOCK: tl.constexpr):
    """The sum of the masses of exp(x - top), int64."""
    sums = tl.zeros([BLOCK], tl.int64)
    for at in range(start, end, BLOCK):
        v = at + tl.arange(0, BLOCK)
        x = tl.load(logits + v.to(tl.int64) * stride_v, mask=v < end, other=float("-inf")).to(tl.float32)
        sums += mass_of(exp32(x - top)).to(tl.int64)
    return tl.sum(sums, 0)


@triton.jit
def store_term(term, top, mass, weight):
    """Write down what the merge needs to know of one expert. One of weight 0 gets numbers that add nothing."""
    active = weight != 0
    total = tl.where(active, total_of(mass), 1.0)
    tl.store(term + TOP, tl.where(active, top, 0.0))
    tl.store(term + LOG_TOTAL, log32(total))
    tl.store(term + SCALE, tl.div_rn(weight, total))
    tl.store(term + WEIGHT, weight)
    tl.store(term + LOG_WEIGHT, log32(weight))


@triton.jit
def expert_log_prob(logits, term, v, mask, stride_v):
    """Log p_i of the tokens v; -inf, and nothing read, where the mask is false or the expert has weight 0."""
    reads = tl.where(mask, tl.load(term + WEIGHT), 0.0) != 0
    x = tl.load(logits + v.to(tl.int64) * stride_v, mask=reads, other=float("-inf")).to(tl.float32)
    return (x - tl.load(term + TOP)) - tl.load(term + LOG_TOTAL)


@triton.jit
def merge_in_log_space(logits, terms, v, mask, stride_k, stride_v, exponent, K: tl.constexpr):
    """Log sum_i w_i p_i^exponent; -inf where a term is +inf: a negative exponent lets one expert exclude a token."""
    top = tl.full(v.shape, float("-inf"), tl.float32)
    for i in range(K):
        log_p = expert_log_prob(logits + i * stride_k, terms + i * TERM, v, mask, stride_v)
        weighted = log_p * exponent + tl.load(terms + i * TERM + LOG_WEIGHT)
        top = tl.maximum(top, tl.where(tl.load(terms + i * TERM + WEIGHT) != 0, weighted, float("-inf")))
    excluded = top == float("inf")
    none = top == float("-inf")
    base = tl.where(none, 0.0, top)
    total = tl.zeros(v.shape, tl.float32)
    for i in range(K):
        log_p = expert_log_prob(logits + i * stride_k, terms + i * TERM, v, mask, stride_v)
        weighted = log_p * exponent + tl.load(terms + i * TERM + LOG_WEIGHT)
        total += tl.where(tl.load(terms + i * TERM + WEIGHT) != 0, exp32(weighted - base), 0.0)
    return tl.where(none | excluded, float("-inf"), top + log32(total)), excluded


@triton.jit
def merge_linear(logits, terms, v, mask, stride_k, stride_v, active, K: tl.constexpr):
    """Log sum_i w_i p_i; `active` experts have a weight other than 0."""
    p = tl.zeros(v.shape, tl.float32)
    only = tl.full(v.shape, float("-inf"), tl.float32)
    for i in range(K):
        term = terms + i * TERM
        reads = tl.where(mask, tl.load(term + WEIGHT), 0.0) != 0
        x = tl.load(logits + i * stride_k + v.to(tl.int64) * stride_v, mask=reads, other=float("-inf")).to(tl.float32)
        shifted = x - tl.load(term + TOP)
        p += exp32(shifted) * tl.load(term + SCALE)
        only = tl.where(reads, shifted - tl.load(term + LOG_TOTAL), only)
    # Near the end of float32's range add in log space: a high temperature can bring such tokens back.
    rare = (p < 7.888609052210118e-31) & mask
    log_p = log32(p)
    if tl.max(rare.to(tl.int32), 0) != 0:
        exact, _ = merge_in_log_space(logits, terms, v, mask, stride_k, stride_v, 1.0, K)
        log_p = tl.where(rare, exact, log_p)
    return tl.where(active == 1, only, log_p)


@triton.jit
def merge_log_linear(logits, terms, v, mask, stride_k, stride_v, K: tl.constexpr):
    """sum_i w_i log p_i. A token is excluded by any one expert of positive weight, or by all together."""
    total = tl.zeros(v.shape, tl.float32)
    most = tl.full(v.shape, float("-inf"), tl.float32)
    excluded = most > 0
    for i in range(K):
        weight = tl.load(terms + i * TERM + WEIGHT)
        log_p = expert_log_prob(logits + i * stride_k, terms + i * TERM, v, mask, stride_v)
        total += tl.where(weight != 0, log_p * weight, 0.0)
        most = tl.maximum(most, log_p)
        excluded |= tl.where(weight > 0, log_p, 0.0) == float("-inf")
    return tl.where(excluded | (most == float("-inf")), float("-inf"), total)


@triton.jit
def merge_tokens(
    logits, terms, v, mask, stride_k, stride_v, exponent, active, K: tl.constexpr, MERGE: tl.constexpr
):  # fmt: skip
    """Merged log-probabilities of the tokens v, float32; those of log_linear and power are not yet normalised."""
    if MERGE == LINEAR:
        log_p = merge_linear(logits, terms, v, mask, stride_k, stride_v, active, K)
    elif MERGE == LOG_LINEAR:
        log_p = merge_log_linear(logits, terms, v, mask, stride_k, stride_v, K)
    else:
        total, excluded = merge_in_log_space(logits, terms, v, mask, stride_k, stride_v, exponent, K)
        log_p = tl.where(excluded, float("-inf"), tl.div_rn(total, exponent))
    return log_p


@triton.jit
def scan_merge(
    logits, terms, row, start, end, stride_k, stride_v, exponent, active,
    K: tl.constexpr, MERGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the merged log-probabilities into row; returns the greatest, and 1 if one is NaN or +inf, else 0."""
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    bad = tl.zeros([BLOCK], tl.int32)
    for at in range(start, end, BLOCK):
        v = at + tl.arange(0, BLOCK)
        mask = v < end
        log_p = merge_tokens(logits, terms, v, mask, stride_k, stride_v, exponent, active, K, MERGE)
        bad |= ((log_p != log_p) | (log_p == float("inf"))).to(tl.int32)
        top = tl.maximum(top, log_p)
        tl.store(row + v, log_p, mask=mask)
    return tl.max(top, 0), tl.max(bad, 0)


@triton.jit
def count_active(weights, stride, K: tl.constexpr):
    """How many experts have a weight other than 0."""
    active = 0
    for i in range(K):
        active += (tl.load(weights + i * stride) != 0).to(tl.int32)
    return active


@triton.jit
def scan_total(row, top, start, end, BLOCK: tl.constexpr):
    """The sum of the masses of exp(log p - top), int64: what normalises log_linear and power."""
    sums = tl.zeros([BLOCK], tl.int64)
    for at in range(start, end, BLOCK):
        v = at + tl.arange(0, BLOCK)
        log_p = tl.load(row + v, mask=v < end, other=float("-inf"))
        sums += mass_of(exp32(log_p - top)).to(tl.int64)
    return tl.sum(sums, 0)


@triton.jit
def scan_temper(row, start, end, shift, log_total, top, temperature, floor, BLOCK: tl.constexpr):
    """Replace merged log-probabilities by masses at a temperature; temperature 0 leaves the most likely tokens alone.

    A token's log-probability is (merged - shift) - log_total, and the greatest of the row is `top`. Returns the mass
    and the number of the tokens that have at least the mass `floor`, int64.
    """
    sums = tl.zeros([BLOCK], tl.int64)
    counts = tl.zeros([BLOCK], tl.int64)
    heat = tl.maximum(temperature, 1.1754943508222875e-38)
    for at in range(start, end, BLOCK):
        v = at + tl.arange(0, BLOCK)
        mask = v < end
        log_p = (tl.load(row + v, mask=mask, other=float("-inf")) - shift) - log_total
        drawn = mass_of(exp32(tl.div_rn(log_p - top, heat)))
        mass = tl.where(temperature == 0, tl.where(log_p == top, 1099511627776.0, 0.0), drawn)
        tl.store(row + v, mass, mask=mask)
        whole = mass.to(tl.int64)
        counted = (whole >= floor) & mask
        sums += tl.where(counted, whole, 0)
        counts += counted.to(tl.int64)
    return tl.sum(sums, 0), tl.sum(counts, 0)
