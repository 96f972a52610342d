"""exp, log and integer masses with the same bits as `pcm_fast.sampling` and ``csrc/cpu/exp_log.h``.

They are fixed sequences of float32 additions and multiplications. Nothing may be fused: every kernel that calls them is
launched with ``enable_fp_fusion=False``, and divisions are `tl.div_rn`, since ``/`` is approximate on a GPU.

A *mass* is a whole number of units of 2^-40, at most 2^40. As float32 it is exact (it has 24 significant bits at most),
so rows of masses are kept as float32, and sums of masses are int64.
"""

import triton
import triton.language as tl

LARGEST_MASS = tl.constexpr(1 << 40)
MASS_UNIT = tl.constexpr(2.0**-40)


@triton.jit
def exp32(x):
    """exp(x) for float32 x <= 0, of any shape; exp(-87) below -87."""
    x = tl.maximum(x, -87.0)
    shifted = x * 1.44269504088896341 + 12582912.0  # 1.5 * 2^23: adding it rounds to a whole number
    n = shifted - 12582912.0
    r = (x - n * 0.693359375) - n * -2.12194440e-4
    p = r * 1.3814433478e-3 + 8.3687966689e-3
    p = p * r + 4.1668396443e-2
    p = p * r + 1.6666519642e-1
    p = p * r + 4.9999994040e-1
    p = (p * (r * r) + r) + 1.0
    bits = p.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def log32(x):
    """log(x) for float32 x, of any shape; -inf below the smallest normal number."""
    normal = x >= 1.1754943508222875e-38
    bits = tl.where(normal, x, 1.0).to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # counted from sqrt(1/2), so that the mantissa lies in [sqrt(1/2), sqrt(2))
    m = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    e = exponent.to(tl.float32)
    p = m * 7.0376836292e-2 + -1.1514610310e-1
    p = p * m + 1.1676998740e-1
    p = p * m + -1.2420140846e-1
    p = p * m + 1.4249322787e-1
    p = p * m + -1.6668057665e-1
    p = p * m + 2.0000714765e-1
    p = p * m + -2.4999993993e-1
    p = p * m + 3.3333331174e-1
    square = m * m
    y = (p * m) * square
    y = y + e * -2.12194440e-4
    y = y - square * 0.5
    return tl.where(normal, (m + y) + e * 0.693359375, float("-inf"))


@triton.jit
def mass_of(e):
    """The mass of probabilities e in [0, 1], float32: round_half_even(2^40 e), as float32."""
    x = e * 1099511627776.0
    # From 2^23 on every float32 is whole; below, adding 2^23 leaves no room for a fraction.
    return tl.where(x < 8388608.0, (x + 8388608.0) - 8388608.0, x)


@triton.jit
def total_of(mass):
    """A sum of masses (int64) as the float32 number it stands for."""
    return mass.to(tl.float32) * MASS_UNIT
