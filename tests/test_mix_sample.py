"""ops.mix_sample, on every instruction set of this machine, against the oracle: token by token, bit by bit."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_mixture import random_case, random_params
from scipy import stats

from pcm_fast import _native, ops, sampling
from pcm_fast.sampling import SamplingParams

ISAS = _native.isas()


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("PCM_FAST_ISA", request.param)
    return request.param


def keywords(params):
    return {name: getattr(params, name) for name in ("do_sample", "temperature", "top_k", "top_p", "min_p", "seed")}


def check_case(rng, experts, vocabulary, isas=ISAS):
    logits, weights, rule = random_case(rng, experts, vocabulary)
    params, position, sequence = random_params(rng), int(rng.integers(2**40)), int(rng.integers(2**40))
    token, logprob = sampling.mix_sample(logits, weights, params, merge=rule, sequence=sequence, position=position)
    for name in isas:
        os.environ["PCM_FAST_ISA"] = name
        tokens, logprobs = ops.mix_sample(
            logits[None], weights[None], merge=rule, sequence=sequence, position=position,
            num_threads=int(rng.integers(1, 4)), **keywords(params),
        )  # fmt: skip
        assert (tokens[0], logprobs[0]) == (token, np.float32(logprob)), (name, experts, vocabulary, rule, params)


@pytest.fixture
def restore_isa(monkeypatch):
    monkeypatch.setenv("PCM_FAST_ISA", "auto")


@pytest.mark.parametrize("part", range(5))
def test_equals_the_oracle_on_a_seeded_sweep(part, restore_isa):
    rng = np.random.default_rng(1000 + part)
    for _ in range(20_000):
        check_case(
            rng, int(rng.integers(1, 17)) if rng.random() < 0.3 else int(rng.integers(1, 5)), int(rng.integers(2, 700))
        )


def test_equals_the_oracle_on_large_vocabularies(restore_isa):
    rng = np.random.default_rng(7)
    for _ in range(30):
        check_case(rng, int(rng.integers(1, 7)), int(rng.integers(10_000, 300_001)))
    check_case(rng, 16, 300_000)


@settings(max_examples=1000, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 16), st.integers(2, 2000))
def test_equals_the_oracle_wherever_hypothesis_looks(seed, experts, vocabulary):
    before = os.environ.get("PCM_FAST_ISA", "auto")
    try:
        check_case(np.random.default_rng(seed), experts, vocabulary)
    finally:
        os.environ["PCM_FAST_ISA"] = before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded"])
def test_dtypes_and_strides(isa, dtype, layout):
    rng = np.random.default_rng(5)
    batch, experts, vocabulary = 3, 4, 777
    logits = torch.tensor(rng.normal(scale=3, size=(batch, experts, vocabulary)), dtype=dtype)
    logits[0, 1, 5] = -torch.inf
    logits[0, 0, 6] = 6e-8  # a subnormal of float16
    if layout == "transposed":
        logits = logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    elif layout == "sliced":
        logits = torch.stack([logits, logits + 9], dim=-1)[..., 0]
    elif layout == "expanded":
        logits = logits[:1].expand(batch, -1, -1)
    weights = torch.tensor(rng.dirichlet(np.ones(experts), size=batch), dtype=torch.float64)
    tokens, logprobs, expert_logprobs = ops.mix_sample(
        logits, weights, top_p=0.9, seed=3, position=np.arange(batch), return_expert_logprobs=True
    )
    assert isinstance(tokens, torch.Tensor)
    assert tokens.dtype == torch.int64
    assert logprobs.dtype == expert_logprobs.dtype == torch.float32
    for b in range(batch):
        row = logits[b].float().numpy()
        expected = sampling.mix_sample(
            row, weights[b].numpy(), SamplingParams(top_p=0.9, seed=3), sequence=b, position=b
        )
        assert (int(tokens[b]), float(logprobs[b])) == expected
        for i in range(experts):
            assert float(expert_logprobs[b, i]) == sampling.merge_log_probs(row[i : i + 1], [1.0])[tokens[b]]


def test_numpy_bfloat16_and_float16(isa):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    logits = np.random.default_rng(0).normal(size=(1, 2, 300))
    for dtype in (np.float16, ml_dtypes.bfloat16):
        rounded = logits.astype(dtype)
        tokens, logprobs = ops.mix_sample(rounded, [[0.5, 0.5]])
        assert (tokens[0], logprobs[0]) == sampling.mix_sample(
            rounded[0].astype(np.float32), [0.5, 0.5], SamplingParams()
        )


def test_a_row_does_not_depend_on_its_batch_or_on_threads(isa):
    rng = np.random.default_rng(9)
    logits = rng.normal(scale=2, size=(9, 3, 20_000)).astype(np.float32)
    weights = rng.dirichlet(np.ones(3), size=9)
    settings_of = {"top_p": 0.8, "seed": 4, "position": 12}
    tokens, logprobs = ops.mix_sample(logits, weights, **settings_of)
    for b in range(9):
        for threads in (1, 2, 5):
            alone = ops.mix_sample(
                logits[b : b + 1], weights[b : b + 1], sequence=np.array([b]), num_threads=threads, **settings_of
            )
            assert (alone[0][0], alone[1][0]) == (tokens[b], logprobs[b])


def test_every_parameter_can_differ_by_row(isa):
    rng = np.random.default_rng(2)
    batch = 40
    logits = rng.normal(scale=2, size=(batch, 3, 500)).astype(np.float32)
    weights = rng.dirichlet(np.ones(3), size=batch).astype(np.float32)
    rows = [random_params(rng) for _ in range(batch)]
    columns = {name: np.array([keywords(row)[name] for row in rows]) for name in keywords(rows[0])}
    position, sequence = rng.integers(1000, size=batch), rng.integers(1000, size=batch)
    tokens, logprobs = ops.mix_sample(logits, weights, position=position, sequence=sequence, **columns)
    for b in range(batch):
        expected = sampling.mix_sample(
            logits[b], weights[b], rows[b], sequence=int(sequence[b]), position=int(position[b])
        )
        assert (tokens[b], logprobs[b]) == (expected[0], np.float32(expected[1]))


@pytest.mark.parametrize("rule", ["linear", "log_linear", "power(-1)"])
def test_merge_then_sample_is_mix_sample(isa, rule):
    rng = np.random.default_rng(21)
    logits = rng.normal(scale=3, size=(5, 4, 3001)).astype(np.float32)
    weights = rng.dirichlet(np.ones(4), size=5).astype(np.float32)
    log_probs = ops.merge_log_probs(logits, weights, merge=rule)
    for b in range(5):
        assert (log_probs[b] == sampling.merge_log_probs(logits[b], weights[b], rule)).all()
    fused = ops.mix_sample(logits, weights, merge=rule, top_k=30, seed=5, position=3)
    apart = ops.sample(log_probs, top_k=30, seed=5, position=3)
    assert (fused[0] == apart[0]).all()
    assert (fused[1] == apart[1]).all()


def test_forcing_the_reference_gives_the_same_answer(monkeypatch):
    rng = np.random.default_rng(8)
    logits = rng.normal(size=(4, 3, 900)).astype(np.float32)
    weights = [[0.2, 0.3, 0.5], [1, 0, 0], [0, 0.5, 0.5], [0.1, 0.1, 0.8]]
    native = ops.mix_sample(logits, weights, top_p=0.7, return_expert_logprobs=True)
    merged, drawn = ops.merge_log_probs(logits, weights), ops.sample(logits[:, 0], min_p=0.1)
    monkeypatch.setenv("PCM_FAST_FORCE", "reference")
    for ours, theirs in zip(
        native, ops.mix_sample(logits, weights, top_p=0.7, return_expert_logprobs=True), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(merged, ops.merge_log_probs(logits, weights))
    for ours, theirs in zip(drawn, ops.sample(logits[:, 0], min_p=0.1), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_million_draws_have_the_exact_distribution():
    rng = np.random.default_rng(31)
    experts, vocabulary, batch = 3, 60, 20_000
    logits = np.broadcast_to(
        rng.normal(scale=1.5, size=(experts, vocabulary)).astype(np.float32), (batch, experts, vocabulary)
    )
    weights = np.broadcast_to(np.float32([0.5, 0.3, 0.2]), (batch, experts))
    params = SamplingParams(temperature=1.3, top_p=0.95)
    masses = sampling.token_masses(sampling.merge_log_probs(logits[0], weights[0]), params.temperature)
    kept = sampling.kept_tokens(masses, params)
    counts = np.zeros(vocabulary, np.int64)
    for position in range(50):
        tokens, _ = ops.mix_sample(logits, weights, temperature=1.3, top_p=0.95, seed=2024, position=position)
        counts += np.bincount(tokens, minlength=vocabulary)
    assert counts.sum() == 1_000_000
    assert counts.sum() == counts[kept].sum()
    expected = masses[kept] / masses[kept].sum() * 1_000_000
    assert expected.min() > 5
    assert stats.chisquare(counts[kept], expected).pvalue > 1e-4


@pytest.mark.parametrize("vocabulary", [2, 255, 256, 257, 70_000])
def test_bad_rows_are_named(isa, vocabulary):
    good = np.random.default_rng(0).normal(size=(5, 2, vocabulary)).astype(np.float32)
    weights = np.full((5, 2), 0.5)
    for value, message in [(np.nan, "NaN or \\+inf"), (np.inf, "NaN or \\+inf"), (-np.inf, "all -inf")]:
        bad = good.copy()
        bad[3, 1, :] = -np.inf if value == -np.inf else bad[3, 1, :]
        bad[3, 1, vocabulary - 1] = value
        for batch in (bad, bad[3:4]):
            row = 3 if len(batch) == 5 else 0
            with pytest.raises(ValueError, match=f"expert_logits: row {row}: .*{message}"):
                ops.mix_sample(batch, weights[: len(batch)])
            with pytest.raises(ValueError, match=f"log_probs: row {row}: .*{message}"):
                ops.sample(batch[:, 1])
    ignored = good.copy()
    ignored[:, 1] = np.nan
    ops.mix_sample(ignored, np.tile([1.0, 0.0], (5, 1)))


def test_an_empty_batch_is_fine():
    tokens, logprobs = ops.mix_sample(np.zeros((0, 2, 10), np.float32), np.zeros((0, 2)))
    assert tokens.shape == logprobs.shape == (0,)


LOGITS = np.zeros((2, 3, 8), np.float32)
WEIGHTS = np.full((2, 3), 1 / 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"expert_logits": LOGITS[0]}, ValueError, r"expert_logits: expected shape \[B, K, V\], got \[3, 8\]"),
        (
            {"expert_logits": LOGITS.tolist()},
            TypeError,
            "expert_logits: expected a NumPy array or a torch tensor, got list",
        ),
        ({"expert_logits": LOGITS.astype(np.float64)}, TypeError, "expert_logits: expected float32, .* got float64"),
        ({"expert_logits": np.zeros((2, 17, 8), np.float32)}, ValueError, "expected 1 to 16 experts, got 17"),
        ({"expert_logits": np.zeros((2, 3, 0), np.float32)}, ValueError, "expected a vocabulary of 1 to .* got 0"),
        (
            {"expert_logits": torch.zeros(2, 3, 8, device="meta")},
            ValueError,
            "expected a tensor on the CPU .* got meta",
        ),
        ({"mixture_weights": WEIGHTS[:1]}, ValueError, r"mixture_weights: expected shape \[2, 3\] .* got \[1, 3\]"),
        ({"mixture_weights": WEIGHTS * 2}, ValueError, "mixture_weights: expected a sum of 1 .* got 2"),
        ({"mixture_weights": WEIGHTS * 0}, ValueError, "mixture_weights: expected at least one weight that is not 0"),
        ({"mixture_weights": [[2, -1, 0]] * 2}, ValueError, "mixture_weights: expected no negative weight"),
        ({"mixture_weights": WEIGHTS * np.nan}, ValueError, "mixture_weights: expected finite"),
        ({"merge": "mean"}, ValueError, "merge: expected 'linear'"),
        ({"temperature": -1.0}, ValueError, "temperature: expected .* got -1.0"),
        ({"temperature": [1.0, np.nan]}, ValueError, "temperature: expected"),
        ({"temperature": "hot"}, TypeError, "temperature: expected float"),
        ({"top_p": [0.5, 0.5, 0.5]}, ValueError, r"top_p: expected one value or shape \[2\], got shape \[3\]"),
        ({"top_p": 1.01}, ValueError, "top_p: expected .* got 1.01"),
        ({"top_k": -1}, ValueError, "top_k: expected"),
        ({"top_k": 1.5}, TypeError, "top_k: expected int"),
        ({"min_p": 2}, ValueError, "min_p: expected"),
        ({"seed": -1}, ValueError, "seed: expected"),
        ({"position": -1}, ValueError, "position: expected"),
        ({"do_sample": 3}, TypeError, "do_sample: expected bool"),
        ({"num_threads": 0}, ValueError, "num_threads: expected an integer >= 1, got 0"),
        ({"top_q": 0.5}, TypeError, "top_q"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.mix_sample(**{"expert_logits": LOGITS, "mixture_weights": WEIGHTS, **arguments})


def test_dispatch_is_visible_and_forcible(monkeypatch):
    assert set(ops.backends()) == set(ops.BACKENDS)
    assert ops.isa() in ops.backends()["cpu"]
    assert ops.backend() == "cpu"
    monkeypatch.setenv("PCM_FAST_FORCE", "tpu")
    with pytest.raises(ValueError, match=r"PCM_FAST_FORCE: expected one of .* got 'tpu'"):
        ops.backend()
    monkeypatch.setenv("PCM_FAST_FORCE", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises((RuntimeError, ValueError), match=r"not available|expected a tensor on a GPU"):
        ops.mix_sample(LOGITS, WEIGHTS)
    monkeypatch.delenv("PCM_FAST_FORCE")
    monkeypatch.setenv("PCM_FAST_ISA", "sse9")
    with pytest.raises(ValueError, match=r"PCM_FAST_ISA: expected auto or one of generic.* got 'sse9'"):
        ops.mix_sample(LOGITS, WEIGHTS)


def test_works_after_a_fork():
    script = (
        "import os, numpy as np; from pcm_fast import ops\n"
        "logits, weights = np.ones((1, 4, 50000), np.float32), [[0.25] * 4]\n"
        "first = ops.mix_sample(logits, weights, num_threads=2)[0][0]\n"
        "pid = os.fork()\n"
        "if pid == 0: os._exit(int(ops.mix_sample(logits, weights, num_threads=2)[0][0] != first))\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0
