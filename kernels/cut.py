"""top-k, min-p and top-p as a *cut*, found by a radix select on integer masses, and the draw of a token under it.

Tokens are ordered by mass descending, then id ascending, and what is kept is the beginning of that order: the tokens of
more mass than ``cut``, and the first ``ties`` in id order of those that have exactly that mass.

A positive mass as float32 is ordered as its bits are. Counted from those of 1.0 they are 29 bits, which the select
finds in three digits: one of 11 bits (1281 values occur), then two of 9. For each digit a histogram in memory (int64,
integer atomic additions) holds the mass, and for top-k also the number, of tokens that agree with the digits before.
"""

import triton
import triton.language as tl

from .exp_log import LARGEST_MASS

ONE_BITS = tl.constexpr(0x3F800000)
BUCKETS = tl.constexpr(2048)  # of the first digit
DIGITS = tl.constexpr(512)  # of the second and third

# Where a row's histograms are, in int64 numbers.
MASS_1 = tl.constexpr(0)
COUNT_1 = tl.constexpr(2048)
K_MASS_2 = tl.constexpr(4096)
K_COUNT_2 = tl.constexpr(4608)
K_MASS_3 = tl.constexpr(5120)
K_COUNT_3 = tl.constexpr(5632)
P_MASS_2 = tl.constexpr(6144)
P_MASS_3 = tl.constexpr(6656)
HISTOGRAMS = tl.constexpr(7168)
CLEARED = tl.constexpr(1024)  # numbers set to 0 at a time


@triton.jit
def clear_histograms(histograms, part, parts):
    """Set every `parts`-th stretch of a row's histograms to 0, beginning with number `part`."""
    for at in range(part * CLEARED, HISTOGRAMS, parts * CLEARED):
        tl.store(histograms + at + tl.arange(0, CLEARED), tl.zeros([CLEARED], tl.int64))


@triton.jit
def ceil_product(bits, mass):
    """ceil(fraction * mass), exactly; `bits` are those of a float64 in [0, 1), 0 <= mass < 2^62. Scalars, int64."""
    exponent = (bits >> 52) & 0x7FF
    whole = ((bits & 0xFFFFFFFFFFFFF) | tl.where(exponent > 0, 0x10000000000000, 0)).to(tl.uint64)
    shift = 1075 - tl.maximum(exponent, 1)  # fraction = whole / 2^shift, and shift >= 53
    mass = mass.to(tl.uint64)
    low = whole * mass
    high = tl.umulhi(whole, mass)
    near = tl.minimum(shift, 63).to(tl.uint64)  # the shift while it stays within the low word
    far = tl.minimum(tl.maximum(shift - 64, 0), 63).to(tl.uint64)  # and what is left of it beyond
    one = tl.full([], 1, tl.uint64)
    floor_near = (high << (64 - near)) | (low >> near)
    rest_near = low & ((one << near) - one)
    rest_far = low | (high & ((one << far) - one))
    floor = tl.where(shift < 64, floor_near, high >> far)
    rest = tl.where(shift < 64, rest_near, rest_far)
    return (floor + tl.where(rest != 0, one, one - one)).to(tl.int64)


@triton.jit
def fill_histogram(
    row, start, end, least, prefix, masses, counts,
    FIRST: tl.constexpr, SHIFT: tl.constexpr, COUNTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the tokens of at least the mass `least` that begin with the digits `prefix` to the histograms of the next."""
    for at in range(start, end, BLOCK):
        v = at + tl.arange(0, BLOCK)
        mass = tl.load(row + v, mask=v < end, other=0.0)
        whole = mass.to(tl.int64)
        key = mass.to(tl.int32, bitcast=True) - ONE_BITS
        inside = whole >= least
        if FIRST:
            digit = key >> SHIFT
        else:
            digit = (key >> SHIFT) & (DIGITS - 1)
            inside &= (key >> (SHIFT + 9)) == prefix
        tl.atomic_add(masses + digit, whole, mask=inside, sem="relaxed")
        if COUNTS:
            tl.atomic_add(counts + digit, tl.full([BLOCK], 1, tl.int64), mask=inside, sem="relaxed")


@triton.jit
def find_digit(histogram, target, SIZE: tl.constexpr):
    """The greatest digit at and above which the histogram holds at least `target`, and what it holds above."""
    j = tl.arange(0, SIZE)
    x = tl.load(histogram + j, cache_modifier=".cg")  # atomics act on L2: what L1 holds may be old
    up_to = tl.cumsum(x, 0)
    digit = tl.sum((tl.sum(x, 0) - up_to + x >= target).to(tl.int32), 0) - 1
    return tl.maximum(digit, 0), tl.sum(tl.where(j > digit, x, 0), 0)


@triton.jit
def sum_above(histogram, digit, SIZE: tl.constexpr):
    """What a histogram holds above a digit."""
    j = tl.arange(0, SIZE)
    return tl.sum(tl.where(j > digit, tl.load(histogram + j, cache_modifier=".cg"), 0), 0)


@triton.jit
def mass_at(key):
    """The mass whose digits, all three, are `key`; int64."""
    return (key + ONE_BITS).to(tl.float32, bitcast=True).to(tl.int64)


@triton.jit
def settle_top_k(histograms, prefix, before, before_mass, top_k, floor, count, total):
    """The cut after min-p and top-k, the ties it keeps, and the mass kept.

    `prefix` holds the first two digits of the top_k-th token, found with `before` tokens of mass `before_mass` above;
    `count` tokens of mass `total` have at least the mass `floor`.
    """
    digit, more = find_digit(histograms + K_COUNT_3, top_k - before, DIGITS)
    mass = mass_at((prefix << 9) | digit)
    ties = top_k - (before + more)
    kept = before_mass + sum_above(histograms + K_MASS_3, digit, DIGITS) + ties * mass
    active = (top_k > 0) & (top_k < count)
    return tl.where(active, mass, floor - 1), tl.where(active, ties, 0), tl.where(active, kept, total)


@triton.jit
def settle_top_p(histograms, prefix, before, target):
    """The cut after top-p, the ties it keeps, and the mass kept; prefix and before (a mass) as in settle_top_k."""
    digit, more = find_digit(histograms + P_MASS_3, target - before, DIGITS)
    before += more
    mass = mass_at((prefix << 9) | digit)
    ties = (target - before + mass - 1) // mass
    return mass, ties, before + ties * mass


@triton.jit
def least_worth_counting(floor, kept, target, count):
    """A mass, at least `floor`, under which all tokens together cannot matter to a prefix of mass `target`.

    Tokens under (kept - target) / count have less than kept - target together, so the rest reaches the target. That
    spares the histogram most of a vocabulary's long tail.
    """
    return tl.maximum(floor, (kept - target) // tl.maximum(count, 1))


@triton.jit
def scan_kept(row, start, end, cut, BLOCK: tl.constexpr):
    """The mass of the tokens above the cut, and the number of those at it; int64."""
    above = tl.zeros([BLOCK], tl.int64)
    ties = tl.zeros([BLOCK], tl.int64)
    for at in range(start, end, BLOCK):
        v = at + tl.arange(0, BLOCK)
        mass = tl.load(row + v, mask=v < end, other=0.0).to(tl.int64)
        above += tl.where(mass > cut, mass, 0)
        ties += ((mass == cut) & (v < end)).to(tl.int64)
    return tl.sum(above, 0), tl.sum(ties, 0)


@triton.jit
def kept_mass(above, found, cut, ties):
    """The mass kept of a stretch of tokens, `found` of which are at the cut while `ties` more may be kept."""
    return above + cut * tl.minimum(tl.maximum(ties, 0), found)


@triton.jit
def find_token(row, start, end, cut, ties, threshold, BLOCK: tl.constexpr):
    """The first kept token of [start, end), in id order, whose running mass exceeds the threshold. First its block."""
    block = start
    left = threshold
    ties_left = ties
    for at in range(start, end, BLOCK):
        above, found = scan_kept(row, at, tl.minimum(at + BLOCK, end), cut, BLOCK)
        here = kept_mass(above, found, cut, ties)
        hit = (threshold >= 0) & (threshold < here)  # once it has hit, the threshold stays negative
        block = tl.where(hit, at, block)
        left = tl.where(hit, threshold, left)
        ties_left = tl.where(hit, ties, ties_left)
        threshold -= here
        ties -= found
    v = block + tl.arange(0, BLOCK)
    mass = tl.load(row + v, mask=v < end, other=0.0).to(tl.int64)
    tie = (mass == cut) & (v < end)
    kept = (mass > cut) | (tie & (tl.cumsum(tie.to(tl.int64), 0) <= ties_left))
    running = tl.cumsum(tl.where(kept, mass, 0), 0)
    token = block + tl.sum((running <= left).to(tl.int32), 0)
    return tl.minimum(token, end - 1)  # only a row whose status is not 0 can run past the end


@triton.jit
def random_threshold(seed, sequence, position, kept):
    """floor(u * kept / 2^64) for 64 bits u of Philox4x32-10 with key = seed, counter = (position, sequence)."""
    low = 0xFFFFFFFF
    c0, c1, _, _ = tl.philox(
        seed,
        (position & low).to(tl.uint32),
        ((position >> 32) & low).to(tl.uint32),
        (sequence & low).to(tl.uint32),
        ((sequence >> 32) & low).to(tl.uint32),
    )
    u = (c1.to(tl.uint64) << 32) | c0.to(tl.uint64)
    return tl.umulhi(u, kept.to(tl.uint64)).to(tl.int64)


@triton.jit
def most_likely():
    """The cut, ties and mass kept of a greedy row: the first of the tokens of mass 2^40."""
    return tl.full([], LARGEST_MASS, tl.int64), tl.full([], 1, tl.int64), tl.full([], LARGEST_MASS, tl.int64)


@triton.jit
def least_mass(min_p):
    """max(1, ceil(min_p 2^40)) for a float64 scalar; int64. The product is exact: 2^40 is a power of two."""
    product = min_p * 1099511627776.0
    whole = product.to(tl.int64)
    return tl.maximum(whole + (whole.to(tl.float64) < product).to(tl.int64), 1)
