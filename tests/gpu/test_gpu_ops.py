"""``ops`` on the Triton kernels: what is forced, what is refused, and the same answers as everywhere."""

import numpy as np
import pytest
import torch
import triton_interpreter  # noqa: F401  (before triton)
from random_mixture import random_case, random_params

from pcm_fast import ops, sampling


@pytest.fixture
def forced(monkeypatch):
    monkeypatch.setenv("PCM_FAST_FORCE", "triton")


@pytest.mark.parametrize("seed", range(6))
def test_forced_kernels_give_what_the_oracle_gives(forced, seed):
    rng = np.random.default_rng(seed)
    logits, weights, rule = random_case(rng, 3, 200)
    params = random_params(rng)
    given = {name: getattr(params, name) for name in ("do_sample", "temperature", "top_k", "top_p", "min_p", "seed")}
    for kind in (np.asarray, torch.from_numpy):
        tokens, logprobs, each = ops.mix_sample(
            kind(logits[None]), kind(weights[None]), merge=rule, sequence=np.array([5]), position=2,
            return_expert_logprobs=True, **given,
        )  # fmt: skip
        assert type(tokens) is type(kind(logits))
        expected = sampling.mix_sample(logits, weights, params, merge=rule, sequence=5, position=2)
        assert (int(tokens[0]), float(logprobs[0])) == expected
        for i in np.flatnonzero(weights):
            assert float(each[0, i]) == sampling.merge_log_probs(logits[i : i + 1], [1.0])[expected[0]]


def test_forced_draws_from_log_probs(forced):
    rng = np.random.default_rng(1)
    log_probs = sampling.merge_log_probs(rng.normal(size=(1, 150)).astype(np.float32), [1.0])[None].repeat(9, 0)
    seeds = np.arange(9)
    tokens, logprobs = ops.sample(log_probs, seed=seeds, top_p=0.8, sequence=np.zeros(9, np.int64))
    expected = [sampling.sample(log_probs[0], sampling.SamplingParams(top_p=0.8, seed=s)) for s in range(9)]
    assert tokens.tolist() == expected
    assert (logprobs == log_probs[0][expected]).all()


def test_bad_rows_are_named(forced):
    logits = np.zeros((2, 1, 40), np.float32)
    logits[1, 0, 3] = np.nan
    with pytest.raises(ValueError, match=r"expert_logits: row 1: NaN or \+inf"):
        ops.mix_sample(logits, np.ones((2, 1), np.float32))


def test_what_cannot_be_forced_is_refused(forced, monkeypatch):
    with pytest.raises(ValueError, match="expert_logits: there is no Triton kernel of merge_log_probs"):
        ops.merge_log_probs(np.zeros((1, 1, 9), np.float32), np.ones((1, 1), np.float32))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"log_probs: expected a tensor on a GPU \(PCM_FAST_FORCE=triton\), got cpu"):
        ops.sample(torch.zeros(1, 9))
    monkeypatch.setenv("PCM_FAST_FORCE", "cuda")
    if not ops.backends()["cuda"].startswith("available"):
        with pytest.raises(RuntimeError, match="PCM_FAST_FORCE=cuda: not available: this build has no CUDA extension"):
            ops.sample(torch.zeros(1, 9))


def test_backends_say_what_they_are(monkeypatch):
    assert "interpreted on the CPU" in ops.backends()["triton"]
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "for tensors on a GPU" in ops.backends()["triton"]
    assert ops.backend() == "cpu"
