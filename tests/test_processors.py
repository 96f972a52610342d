"""Processors against transformers' own where there is one, and against their definition where there is none."""

import math

import numpy as np
import pytest
import torch
import transformers

from pcm_fast.processors import Processors

VOCABULARY = 37


@pytest.fixture(params=range(5))
def row(request):
    """Log-probabilities, and a text with repetitions in it."""
    rng = np.random.default_rng(request.param)
    logits = rng.normal(size=VOCABULARY) * 3
    log_p = (logits - np.log(np.exp(logits).sum())).astype(np.float32)
    return log_p, rng.integers(0, 6, size=rng.integers(1, 12)), rng.integers(0, 6, size=rng.integers(0, 12))


def by_transformers(processor, log_p, *text):
    return processor(torch.from_numpy(np.concatenate(text)[None]), torch.from_numpy(log_p.copy()[None]))[0].numpy()


def test_the_defaults_change_nothing(row):
    log_p, prompt, generated = row
    np.testing.assert_array_equal(Processors().apply(log_p, prompt, generated), log_p)


def test_the_input_is_left_alone(row):
    log_p, prompt, generated = row
    before = log_p.copy()
    Processors(logit_bias={1: 2.0}, banned_tokens=(3,), repetition_penalty=2.0).apply(log_p, prompt, generated)
    np.testing.assert_array_equal(log_p, before)


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty_is_transformers(row, penalty):
    log_p, prompt, generated = row
    log_p = log_p + np.float32(4)  # both signs occur
    expected = by_transformers(transformers.RepetitionPenaltyLogitsProcessor(penalty), log_p, prompt, generated)
    np.testing.assert_array_equal(Processors(repetition_penalty=penalty).apply(log_p, prompt, generated), expected)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_no_repeat_ngram_is_transformers(row, size):
    log_p, prompt, generated = row
    expected = by_transformers(transformers.NoRepeatNGramLogitsProcessor(size), log_p, prompt, generated)
    np.testing.assert_array_equal(Processors(no_repeat_ngram_size=size).apply(log_p, prompt, generated), expected)


def test_banned_tokens_are_transformers_bad_words(row):
    log_p, prompt, generated = row
    processor = transformers.NoBadWordsLogitsProcessor([[3], [11]], eos_token_id=0)
    expected = by_transformers(processor, log_p, prompt, generated)
    np.testing.assert_array_equal(Processors(banned_tokens=[3, 11]).apply(log_p, prompt, generated), expected)


def test_logit_bias_is_transformers_sequence_bias(row):
    log_p, prompt, generated = row
    processor = transformers.SequenceBiasLogitsProcessor([[[3], 1.5], [[11], -2.0]])
    expected = by_transformers(processor, log_p, prompt, generated)
    np.testing.assert_array_equal(Processors(logit_bias={3: 1.5, 11: -2}).apply(log_p, prompt, generated), expected)


def test_min_new_tokens_is_transformers(row):
    log_p, prompt, generated = row
    processor = transformers.MinNewTokensLengthLogitsProcessor(len(prompt), 5, [2, 30], device="cpu")
    expected = by_transformers(processor, log_p, prompt, generated)
    processors = Processors(min_new_tokens=5, eos_token_ids=(2, 30))
    np.testing.assert_array_equal(processors.apply(log_p, prompt, generated), expected)


def test_presence_and_frequency_count_what_was_generated(row):
    log_p, prompt, generated = row
    expected = log_p.astype(np.float64)
    for token in range(VOCABULARY):
        count = int((generated == token).sum())
        expected[token] -= 0.5 * (count > 0) + 0.25 * count
    processed = Processors(presence_penalty=0.5, frequency_penalty=0.25).apply(log_p, prompt, generated)
    np.testing.assert_allclose(processed, expected, rtol=1e-6)


def test_a_bias_comes_before_the_repetition_penalty():
    log_p = np.log(np.array([0.5, 0.5], dtype=np.float32))
    processed = Processors(logit_bias={0: 3.0}, repetition_penalty=2.0).apply(log_p, np.array([0]), np.array([], int))
    np.testing.assert_allclose(processed, [(np.log(0.5) + 3) / 2, np.log(0.5)], rtol=1e-6)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"logit_bias": [1]}, TypeError, "logit_bias: expected a mapping"),
        ({"logit_bias": {"a": 1.0}}, TypeError, "logit_bias: expected an integer >= 0, got 'a'"),
        (
            {"logit_bias": {1: math.nan}},
            ValueError,
            "logit_bias: expected a finite number or -inf for token 1, got nan",
        ),
        (
            {"logit_bias": {1: math.inf}},
            ValueError,
            "logit_bias: expected a finite number or -inf for token 1, got inf",
        ),
        ({"logit_bias": {1: "x"}}, TypeError, "logit_bias: expected a number for token 1"),
        ({"banned_tokens": 3}, TypeError, "banned_tokens: expected a sequence of token ids, got 3"),
        ({"banned_tokens": [-1]}, ValueError, "banned_tokens: expected an integer >= 0, got -1"),
        ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty: expected a number > 0"),
        ({"repetition_penalty": math.nan}, ValueError, "repetition_penalty: expected a finite number"),
        ({"presence_penalty": "1"}, TypeError, "presence_penalty: expected a number, got '1'"),
        ({"frequency_penalty": math.inf}, ValueError, "frequency_penalty: expected a finite number, got inf"),
        ({"no_repeat_ngram_size": -1}, ValueError, "no_repeat_ngram_size: expected an integer >= 0"),
        ({"no_repeat_ngram_size": 1.5}, TypeError, "no_repeat_ngram_size: expected an integer >= 0, got 1.5"),
        ({"min_new_tokens": True}, TypeError, "min_new_tokens: expected an integer >= 0, got True"),
    ],
)
def test_bad_settings(arguments, error, message):
    with pytest.raises(error, match=message):
        Processors(**arguments)


@pytest.mark.parametrize("arguments", [{"logit_bias": {37: 1.0}}, {"banned_tokens": [37]}])
def test_tokens_outside_the_vocabulary(arguments):
    with pytest.raises(
        ValueError, match=f"{next(iter(arguments))}: expected token ids below the vocabulary size 37, got 37"
    ):
        Processors(**arguments).check_vocabulary(VOCABULARY)
