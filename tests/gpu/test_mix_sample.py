"""kernels/mix_sample.py in Triton's interpreter, both launch shapes, against the oracle: token by token, bit by bit."""

import os
from fractions import Fraction
from math import ceil

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
import triton_interpreter  # noqa: F401  (before triton)
from pcm_fast.kernels import cut, exp_log
from pcm_fast.kernels.mix_sample import MAX_SPLITS, Workspace, mix_sample, num_splits
from random_mixture import random_case, random_params

from pcm_fast import sampling
from pcm_fast.sampling import MergeRule, SamplingParams

SHAPES = [1, 3]  # programs a row
CASES = int(os.environ.get("PCM_FAST_TRITON_CASES", "6"))  # for each rule and shape


def integers(values):
    """int64 [.] with the bits of unsigned numbers."""
    return torch.tensor(np.array(values, np.uint64).view(np.int64))


def spoilt_workspace(batch, vocabulary):
    """A workspace in which another call has left numbers of its own."""
    room = Workspace.of(batch, vocabulary, "cpu")
    room.numbers.fill_(np.nan)
    room.integers.fill_(12345678901)
    room.scratch.fill_(-3e4)
    return room


def draw(logits, weights, params, *, merge="linear", sequence=None, position=None, splits=1, block=128, **more):
    """mix_sample on a row for each of `params`; its tensors as NumPy arrays."""
    rule = MergeRule.parse(merge)
    batch = len(params)
    heat = [0.0 if p.greedy else p.temperature for p in params]
    top_p, min_p = ([getattr(p, name) for p in params] for name in ("top_p", "min_p"))
    columns = {
        "temperature": torch.tensor(heat, dtype=torch.float32),
        "top_k": torch.tensor([p.top_k for p in params]) if any(p.top_k for p in params) else None,
        "top_p": torch.tensor(top_p, dtype=torch.float64) if min(top_p) < 1 else None,
        "min_p": torch.tensor(min_p, dtype=torch.float64) if any(min_p) else None,
        "seeds": integers([p.seed for p in params]),
        "sequences": integers(range(batch) if sequence is None else sequence),
        "positions": integers([0] * batch if position is None else position),
    }
    return mix_sample(
        torch.as_tensor(logits), torch.as_tensor(weights, dtype=torch.float32), merge=rule.kind, exponent=rule.exponent,
        splits=splits, block=block, workspace=spoilt_workspace(batch, logits.shape[-1]), **columns, **more,
    )  # fmt: skip


def check_rows(logits, weights, params, out, *, merge="linear", sequence=None, position=None):
    """Every row of a result is the oracle's, expert log-probabilities included."""
    for b, row in enumerate(params):
        expected = sampling.mix_sample(
            logits[b], weights[b], row, merge=merge,
            sequence=b if sequence is None else int(sequence[b]), position=0 if position is None else int(position[b]),
        )  # fmt: skip
        assert int(out.status[b]) == 0
        assert (int(out.tokens[b]), float(out.logprobs[b])) == expected, (b, row, weights[b], logits.shape)
        for i in range(out.expert_logprobs.shape[1]):
            if weights[b, i] == 0:
                assert out.expert_logprobs[b, i].isnan()
            else:
                alone = sampling.merge_log_probs(logits[b, i : i + 1], [1.0])
                assert float(out.expert_logprobs[b, i]) == alone[expected[0]]


@triton.jit
def elementwise(x, exps, logs, masses, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i)
    tl.store(exps + i, exp_log.exp32(value))
    tl.store(logs + i, exp_log.log32(-value))
    tl.store(masses + i, exp_log.mass_of(exp_log.exp32(value)))


def test_exp_log_and_masses_have_the_bits_of_the_oracle():
    rng = np.random.default_rng(1)
    x = -np.exp(rng.uniform(-90, 90, size=4096)).astype(np.float32)
    x[:8] = [0, -0.0, -1e-45, -1.2e-38, -87, -87.5, -np.inf, -1]
    source = torch.tensor(x)
    exps, logs, masses = (torch.empty(4096) for _ in range(3))
    elementwise[(1,)](source, exps, logs, masses, 4096)
    np.testing.assert_array_equal(exps.numpy(), sampling.exp32(x))
    np.testing.assert_array_equal(logs.numpy(), sampling.log32(-x))
    np.testing.assert_array_equal(masses.numpy().astype(np.uint64), sampling._masses(sampling.exp32(x)))


@triton.jit
def scalars(bits, mass, seed, sequence, position, products, thresholds, least):
    i = tl.program_id(0)
    tl.store(products + i, cut.ceil_product(tl.load(bits + i), tl.load(mass + i)))
    tl.store(least + i, cut.least_mass(tl.load(bits + i).to(tl.float64, bitcast=True)))
    threshold = cut.random_threshold(tl.load(seed + i), tl.load(sequence + i), tl.load(position + i), tl.load(mass + i))
    tl.store(thresholds + i, threshold)


def test_integer_arithmetic_is_exact():
    rng = np.random.default_rng(2)
    count = 400
    fractions = rng.random(count) ** rng.choice([1, 4, 30, 300], size=count)
    fractions[:6] = [0, 5e-324, np.nextafter(1, 0), 0.5, 1e-308, 2.0**-53]
    mass = rng.integers(1, 2**62, size=count) >> rng.integers(0, 40, size=count)
    key, sequence, position = (rng.integers(0, 2**64, size=count, dtype=np.uint64) for _ in range(3))
    key[:2] = sequence[:2] = position[:2] = [0, 2**64 - 1]
    products, thresholds, least = (torch.empty(count, dtype=torch.int64) for _ in range(3))
    columns = [torch.tensor(fractions.view(np.int64)), torch.tensor(mass), *map(integers, (key, sequence, position))]
    scalars[(count,)](*columns, products, thresholds, least)
    for i in range(count):
        assert int(products[i]) == ceil(Fraction(fractions[i]) * int(mass[i]))
        assert int(least[i]) == max(1, ceil(Fraction(fractions[i]) * 2**40))
        bits = sampling.philox(int(key[i]), int(sequence[i]), int(position[i]))
        assert int(thresholds[i]) == bits * int(mass[i]) >> 64


@triton.jit
def tokens_at(row, end, ties, tokens, BLOCK: tl.constexpr):
    i = tl.program_id(0)
    threshold = tl.full([], 0, tl.int64) + i
    tl.store(tokens + i, cut.find_token(row, 0, end, tl.full([], 2, tl.int64), tl.load(ties), threshold, BLOCK))


@pytest.mark.parametrize("ties", [0, 1, 2, 3, 5, 9])
def test_the_token_of_every_threshold(ties):
    """Every mass drawn once: no token gets more or less than its own, at the edges of blocks or elsewhere."""
    masses = [3, 2, 0, 2, 1, 2, 2, 5, 0, 0, 4, 2, 1]
    at_cut = [v for v, mass in enumerate(masses) if mass == 2][:ties]
    drawn = [v for v, mass in enumerate(masses) for _ in range(mass) if mass > 2 or v in at_cut]
    tokens = torch.empty(len(drawn), dtype=torch.int64)
    row = torch.tensor(masses, dtype=torch.float32)
    tokens_at[(len(drawn),)](row, len(masses), torch.tensor([ties]), tokens, 4)
    assert tokens.tolist() == drawn


@pytest.mark.parametrize("splits", SHAPES)
@pytest.mark.parametrize("vocabulary", [1, 32, 33, 65])
def test_edges_of_blocks_and_splits(splits, vocabulary):
    rng = np.random.default_rng(vocabulary)
    logits = np.round(rng.normal(size=(2, 2, vocabulary))).astype(np.float32)
    weights = np.float32([[0.25, 0.75], [1, 0]])
    params = [SamplingParams(top_k=max(1, vocabulary // 2), top_p=0.8, seed=7), SamplingParams(min_p=0.3, seed=8)]
    check_rows(logits, weights, params, draw(logits, weights, params, splits=splits, block=32))


@pytest.mark.parametrize("splits", SHAPES)
def test_ties_are_kept_in_order_of_their_ids(splits):
    limits = [{"top_k": k} for k in (1, 7, 43, 45)] + [{"top_p": p} for p in (0.001, 0.4, 0.7)]
    limits += [{"top_k": 60, "top_p": 0.5}, {"top_k": 100, "top_p": 0.1}, {"min_p": 1.0, "top_p": 0.5}]
    logits = np.zeros((len(limits), 1, 130), np.float32)
    logits[:, :, ::3] = 1
    weights = np.ones((len(limits), 1), np.float32)
    params = [SamplingParams(seed=b, **limit) for b, limit in enumerate(limits)]
    check_rows(logits, weights, params, draw(logits, weights, params, splits=splits, block=64))


@pytest.mark.parametrize("splits", SHAPES)
def test_unlikely_tokens_keep_their_probability(splits):
    """Below 2^-100, where float32 ends, they are merged in log space, and a high temperature brings them back."""
    logits = np.zeros((8, 2, 40), np.float32)
    logits[:, :, 1:] = -np.linspace(60, 250, 39)
    logits[:, 1, 2::3] -= 20
    weights = np.full((8, 2), 0.5, np.float32)
    params = [SamplingParams(temperature=60.0, seed=b) for b in range(8)]
    check_rows(logits, weights, params, draw(logits, weights, params, splits=splits, block=32))


@pytest.mark.parametrize("span", [20, 0.5, 1e-3])
@pytest.mark.parametrize("splits", SHAPES)
def test_cuts_in_every_digit(splits, span):
    """Tokens that differ in the first, the second and the third digit of their masses. Drawn is the one at the cut."""
    logits = np.tile(np.linspace(-span, 0, 100, dtype=np.float32), (5, 1, 1))
    limits = [{"top_p": 0.9999}, {"top_p": 0.71}, {"top_k": 60}, {"top_k": 83, "top_p": 0.6}, {"min_p": 1e-6}]
    params = [SamplingParams(seed=b, **limit) for b, limit in enumerate(limits)]
    weights = np.ones((5, 1), np.float32)
    position = [next(p for p in range(10_000) if sampling.philox(b, b, p) >> 54 == 0) for b in range(5)]
    out = draw(logits, weights, params, position=position, splits=splits, block=32)
    check_rows(logits, weights, params, out, position=position)


@pytest.mark.parametrize("splits", SHAPES)
def test_rows_without_a_distribution_are_flagged(splits):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(9, 2, 150)).astype(np.float32)
    weights = np.full((9, 2), 0.5, np.float32)
    logits[1, 1, 149] = np.nan
    logits[2, 0, 3] = np.inf
    logits[3, 1] = -np.inf
    logits[4, 0, :75] = logits[4, 1, 75:] = -np.inf  # together they exclude every token
    logits[5, 1] = np.nan
    weights[5] = [1, 0]  # not read
    weights[7:] = [1.5, -0.5]
    logits[7, 1, 3] = -np.inf  # infinitely likely
    logits[8, :, 3] = -np.inf  # excluded by the first, whatever the second says
    params = [SamplingParams(top_k=20, top_p=0.9, seed=b) for b in range(9)]
    out = draw(logits, weights, params, merge="log_linear", splits=splits, return_expert_logprobs=True)
    assert out.status.tolist() == [0, 1, 1, 2, 2, 0, 0, 2, 0]
    for b in range(9):
        if out.status[b] == 0:
            expected = sampling.mix_sample(logits[b], weights[b], params[b], merge="log_linear", sequence=b)
            assert (int(out.tokens[b]), float(out.logprobs[b])) == expected
        else:
            assert out.tokens[b] == -1
            assert out.logprobs[b].isnan()
            assert out.expert_logprobs[b].isnan().all()


@pytest.mark.parametrize("splits", SHAPES)
@pytest.mark.parametrize("rule", ["linear", "log_linear", "power(-1)", "power(0.5)", "power(2)"])
def test_equals_the_oracle_on_a_seeded_sweep(rule, splits):
    rng = np.random.default_rng([splits, len(rule)])
    for case in range(CASES):
        experts = int(rng.integers(1, 17)) if case % 3 == 0 else int(rng.integers(1, 5))
        vocabulary, batch = int(rng.integers(2, 700)), int(rng.integers(1, 4))
        rows = [random_case(rng, experts, vocabulary, rule) for _ in range(batch)]
        logits, weights = np.stack([row[0] for row in rows]), np.stack([row[1] for row in rows])
        params = [random_params(rng) for _ in range(batch)]
        place = {"sequence": rng.integers(2**63, size=batch), "position": rng.integers(2**63, size=batch)}
        out = draw(
            logits, weights, params, merge=rule, splits=splits, block=int(rng.choice([32, 128, 256])),
            return_expert_logprobs=case % 4 == 0, **place,
        )  # fmt: skip
        check_rows(logits, weights, params, out, merge=rule, **place)


def test_the_largest_vocabulary():
    rng = np.random.default_rng(3)
    logits = rng.normal(scale=3, size=(1, 2, 300_000)).astype(np.float32)
    weights = np.float32([[0.3, 0.7]])
    params = [SamplingParams(top_k=1000, top_p=0.95, seed=11)]
    for splits, block in [(1, 32768), (MAX_SPLITS, 4096)]:
        check_rows(logits, weights, params, draw(logits, weights, params, splits=splits, block=block))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded"])
@pytest.mark.parametrize("splits", SHAPES)
def test_dtypes_and_strides(dtype, layout, splits):
    rng = np.random.default_rng(5)
    batch, experts, vocabulary = 2, 3, 301
    logits = torch.tensor(rng.normal(scale=3, size=(batch, experts, vocabulary)), dtype=dtype)
    logits[0, 1, 5] = -torch.inf
    logits[0, 0, 6] = 6e-8  # a subnormal of float16
    if layout == "transposed":
        logits = logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    elif layout == "sliced":
        logits = torch.stack([logits, logits + 9], dim=-1)[..., 0]
    elif layout == "expanded":
        logits = logits[:1].expand(batch, -1, -1)
    weights = torch.tensor(rng.dirichlet(np.ones(batch), size=experts), dtype=torch.float32).T
    weights = weights / weights.sum(1, keepdim=True)  # strides [1, B]
    params = [SamplingParams(top_p=0.9, seed=3)] * batch
    out = draw(logits, weights, params, splits=splits, return_expert_logprobs=True)
    check_rows(logits.float().numpy(), weights.numpy(), params, out)


def test_a_row_depends_neither_on_its_batch_nor_on_the_launch_shape():
    rng = np.random.default_rng(9)
    batch, vocabulary = 33, 200
    logits = rng.normal(scale=2, size=(batch, 3, vocabulary)).astype(np.float32)
    weights = rng.dirichlet(np.ones(3), size=batch).astype(np.float32)
    params = [random_params(rng) for _ in range(batch)]
    together = draw(logits, weights, params, splits=1)
    check_rows(logits, weights, params, together)
    for b in (0, 17, 32):
        for splits in (1, 2, 7):
            alone = draw(
                logits[b : b + 1], weights[b : b + 1], params[b : b + 1], sequence=[b], splits=splits, block=32
            )
            assert alone.tokens[0] == together.tokens[b]
            assert alone.logprobs[0] == together.logprobs[b]


def test_the_launch_shape_follows_the_batch():
    assert num_splits(1, 262_144, 132) == 64
    assert num_splits(16, 262_144, 132) == 8
    assert num_splits(200, 262_144, 132) == 1
    assert num_splits(1, 3000, 132) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"expert_logits": torch.zeros(2, 3, 8, dtype=torch.float64)}, TypeError, "expert_logits: expected float32"),
        ({"expert_logits": torch.zeros(2, 17, 8)}, ValueError, "1 to 16 experts, got 17"),
        ({"expert_logits": torch.zeros(2, 3, 0)}, ValueError, "expected a vocabulary of 1 to"),
        ({"mixture_weights": torch.zeros(2, 2)}, ValueError, "mixture_weights: expected float32"),
        ({"temperature": torch.zeros(2, dtype=torch.float64)}, ValueError, "temperature: expected a contiguous"),
        ({"top_p": torch.zeros(2)}, ValueError, "top_p: expected a contiguous torch.float64"),
        ({"seeds": torch.zeros(3, dtype=torch.int64)}, ValueError, r"seeds: expected a contiguous torch.int64 \[2\]"),
        ({"merge": "mean"}, ValueError, "merge: expected one of linear"),
        ({"splits": 65}, ValueError, "splits: expected 1 to 64"),
    ],
)
def test_bad_arguments(arguments, error, message):
    whole = torch.zeros(2, dtype=torch.int64)
    usual = {
        "expert_logits": torch.zeros(2, 3, 8), "mixture_weights": torch.full((2, 3), 1 / 3), "seeds": whole,
        "sequences": whole, "positions": whole, "temperature": torch.ones(2),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        mix_sample(**{**usual, **arguments})


@pytest.mark.parametrize("splits", SHAPES)
def test_shares_of_experts_are_divided_as_the_oracle_divides(splits):
    """A quotient that is off by its last place shows in the log p of one row in some ten: here are enough rows."""
    rng = np.random.default_rng(12)
    logits = rng.normal(size=(48, 3, 9)).astype(np.float32)
    weights = rng.dirichlet(np.ones(3), size=48).astype(np.float32)
    params = [SamplingParams(seed=int(seed)) for seed in rng.integers(1 << 40, size=48)]
    check_rows(logits, weights, params, draw(logits, weights, params, splits=splits))
