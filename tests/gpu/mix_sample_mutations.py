"""One-line mistakes in mix_sample, for tests/gpu/mutate_kernels.py."""

from mutations import Mutation

OF_MIX_SAMPLE = [
    Mutation("exp_log.py", "masses are not rounded", "(x + 8388608.0) - 8388608.0, x)", "x, x)"),
    Mutation("exp_log.py", "exp is cut off too early", "tl.maximum(x, -87.0)", "tl.maximum(x, -80.0)"),
    Mutation("exp_log.py", "log splits off the wrong exponent", "bits - 0x3F3504F3", "bits - 0x3F800000"),
    Mutation(
        "merge.py",
        "off-by-one mask in the greatest logit",
        'v < end, other=float("-inf")).to(tl.float32)\n        bad |=',
        'v < end - 1, other=float("-inf")).to(tl.float32)\n        bad |=',
    ),
    Mutation("merge.py", "NaN is not looked for", "((x != x) | (x ==", "((x == "),
    Mutation("merge.py", "the greatest logit is not subtracted", "exp32(x - top)", "exp32(x)"),
    Mutation(
        "merge.py",
        "strides swapped in the linear merge",
        "logits + i * stride_k + v.to(tl.int64) * stride_v",
        "logits + i * stride_v + v.to(tl.int64) * stride_k",
    ),
    Mutation(
        "merge.py",
        "rare tokens are not merged in log space",
        "p < 7.888609052210118e-31",
        "p < 0.0",
    ),
    Mutation("merge.py", "a single expert is merged like several", "active == 1", "active == 0"),
    Mutation(
        "merge.py",
        "the wrong experts exclude tokens",
        "weight > 0, log_p",
        "weight < 0, log_p",
    ),
    Mutation("merge.py", "power forgets its root", "tl.div_rn(total, exponent)", "total", but="not (sweep and power)"),
    Mutation(
        "merge.py",
        "approximate division",
        "tl.div_rn(weight, total)",
        "weight * (1.0 / total)",
    ),
    Mutation(
        "merge.py", "temperature without the greatest log p", "tl.div_rn(log_p - top, heat)", "tl.div_rn(log_p, heat)"
    ),
    Mutation("merge.py", "what is off the end is counted", "counted = (whole >= floor) & mask", "counted = whole >= 0"),
    Mutation("cut.py", "part of the histograms is not cleared", "range(part * CLEARED", "range((part + 1) * CLEARED"),
    Mutation("cut.py", "a product rounded down", "tl.where(rest != 0, one, one - one)", "(one - one)"),
    Mutation(
        "cut.py", "the shift within the high word is off", "tl.maximum(shift - 64, 0)", "tl.maximum(shift - 63, 0)"
    ),
    Mutation(
        "cut.py", "tokens of the wrong prefix", "(key >> (SHIFT + 9)) == prefix", "(key >> (SHIFT + 9)) >= prefix"
    ),
    Mutation("cut.py", "min-p excludes its own bound", "inside = whole >= least", "inside = whole > least"),
    Mutation("cut.py", "a digit too high", "- up_to + x >= target", "- up_to >= target"),
    Mutation(
        "cut.py", "top-k keeps one tie too many", "ties = top_k - (before + more)", "ties = top_k - (before + more) + 1"
    ),
    Mutation(
        "cut.py", "top-p rounds its ties down", "(target - before + mass - 1) // mass", "(target - before) // mass"
    ),
    Mutation("cut.py", "the tail is cut too high", "(kept - target) // tl", "kept // tl"),
    Mutation("cut.py", "all ties are kept", "tl.minimum(tl.maximum(ties, 0), found)", "found"),
    Mutation("cut.py", "the first token is missed", "(threshold >= 0)", "(threshold > 0)"),
    Mutation("cut.py", "the token before", "running <= left", "running < left"),
    Mutation("cut.py", "one tie less in the block", "<= ties_left", "< ties_left"),
    Mutation("cut.py", "wrong counter", "(position >> 32) & low", "(position >> 31) & low"),
    Mutation(
        "cut.py",
        "random words swapped",
        "(c1.to(tl.uint64) << 32) | c0.to(tl.uint64)",
        "(c0.to(tl.uint64) << 32) | c1.to(tl.uint64)",
    ),
    Mutation("cut.py", "min-p's bound rounded down", "(whole.to(tl.float64) < product).to(tl.int64)", "0"),
    Mutation("mix_sample_row.py", "top-k of 1 ignored", "(k > 0) & (k < count)", "(k > 1) & (k < count)"),
    Mutation(
        "mix_sample_row.py",
        "normalised twice",
        "top = (top - shift) - log_total",
        "top = top - log_total",
        but="not (sweep and power)",
    ),
    Mutation(
        "mix_sample_row.py",
        "mass before the digit forgotten",
        "P_MASS_2, target - before, DIGITS",
        "P_MASS_2, target, DIGITS",
    ),
    Mutation(
        "mix_sample_row.py",
        "strides of the weights swapped",
        "weights += b * weights_stride_b",
        "weights += b * weights_stride_k",
    ),
    Mutation(
        "mix_sample_row.py",
        "expert log-probabilities of another row",
        "expert_logprobs + b * K, status",
        "expert_logprobs + b, status",
        but="not dtypes",
    ),
    Mutation("mix_sample_row.py", "statuses exchanged", "bad != 0, NOT_A_NUMBER", "bad != 0, ALL_EXCLUDED"),
    Mutation(
        "mix_sample_split.py",
        "one split too many",
        "tl.sum(tl.load(parts + s, mask=s < splits",
        "tl.sum(tl.load(parts + s, mask=s <= splits",
    ),
    Mutation(
        "mix_sample_split.py",
        "one split too few",
        "tl.max(tl.load(parts + s, mask=s < splits",
        "tl.max(tl.load(parts + s, mask=s < splits - 1",
    ),
    Mutation(
        "mix_sample_split.py", "experts share a place", "EXPERT_TOP + i * LANES + s, top", "EXPERT_TOP + i + s, top"
    ),
    Mutation(
        "mix_sample_split.py",
        "terms of another split",
        "terms = numbers + TERMS + s * (K * TERM)",
        "terms = numbers + TERMS + s * K",
    ),
    Mutation("cut.py", "top-k forgets the tokens before the third digit", "top_k - before, DIGITS", "top_k, DIGITS"),
    Mutation(
        "cut.py", "top-p forgets the mass before the third digit", "P_MASS_3, target - before", "P_MASS_3, target"
    ),
    Mutation(
        "mix_sample_search.py", "mass before the digit forgotten", "P_MASS_2, target - before", "P_MASS_2, target"
    ),
    Mutation(
        "mix_sample_search.py",
        "tokens before the digit forgotten",
        "K_COUNT_2, k - before, DIGITS",
        "K_COUNT_2, k, DIGITS",
    ),
    Mutation(
        "mix_sample_search.py",
        "the second prefix for the first",
        "prefix = tl.load(integers + K_SECOND)",
        "prefix = tl.load(integers + K_FIRST)",
    ),
    Mutation(
        "mix_sample_search.py",
        "ties of a split counted before it",
        "tl.cumsum(found, 0) - found",
        "tl.cumsum(found, 0)",
    ),
    Mutation(
        "mix_sample_search.py",
        "mass of earlier splits not taken off",
        "threshold -= tl.sum(tl.where(s < split, here, 0), 0)",
        "threshold -= 0",
    ),
    Mutation("mix_sample_search.py", "top-p with top-k counts the whole tail", "if k == 0:", "if k >= 0:"),
]
