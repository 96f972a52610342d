"""The keywords of generate and what it returns, as far as no model is needed."""

import inspect
import math
from dataclasses import fields

import numpy as np
import pytest

from pcm_fast.generation import GenerateOptions, GenerateOutput, expert_shares
from pcm_fast.model import MixtureModel
from pcm_fast.sampling import MergeRule


def test_generate_has_the_keywords_of_the_options():
    parameters = dict(list(inspect.signature(MixtureModel.generate).parameters.items())[3:])
    assert {name: p.default for name, p in parameters.items()} == {f.name: f.default for f in fields(GenerateOptions)}
    assert {p.kind for p in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"merge": "mean"}, ValueError, "merge: expected 'linear', 'log_linear' or 'power"),
        ({"merge": 1}, TypeError, "merge: expected"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens: expected an integer >= 1, got 0"),
        ({"max_new_tokens": 1.5}, TypeError, "max_new_tokens: expected an integer >= 0, got 1.5"),
        ({"min_new_tokens": -1}, ValueError, "min_new_tokens: expected an integer >= 0, got -1"),
        (
            {"max_new_tokens": 3, "min_new_tokens": 4},
            ValueError,
            "min_new_tokens: expected at most max_new_tokens=3, got 4",
        ),
        ({"do_sample": 1}, TypeError, "do_sample: expected a bool, got 1"),
        ({"temperature": -0.5}, ValueError, "temperature: expected a finite number >= 0, got -0.5"),
        ({"temperature": math.nan}, ValueError, "temperature: expected a finite number >= 0, got nan"),
        ({"temperature": "hot"}, TypeError, "temperature: expected a finite number >= 0, got 'hot'"),
        ({"top_k": -1}, ValueError, "top_k: expected an integer"),
        ({"top_p": 1.5}, ValueError, r"top_p: expected a number in \[0, 1\], got 1.5"),
        ({"min_p": -0.1}, ValueError, r"min_p: expected a number in \[0, 1\], got -0.1"),
        ({"seed": -1}, ValueError, "seed: expected an integer"),
        ({"seed": 2**64}, ValueError, "seed: expected an integer"),
        ({"banned_tokens": [-3]}, ValueError, "banned_tokens: expected an integer >= 0, got -3"),
        ({"repetition_penalty": 0}, ValueError, "repetition_penalty: expected a number > 0, got 0"),
        ({"pad_token_id": -1}, ValueError, "pad_token_id: expected an integer >= 0, got -1"),
        ({"num_return_sequences": 0}, ValueError, "num_return_sequences: expected an integer >= 1, got 0"),
        ({"first_sequence": -1}, ValueError, "first_sequence: expected an integer >= 0, got -1"),
        ({"streamer": print}, TypeError, "streamer: expected an object with the methods put and end, got"),
        ({"logits_processor": 3}, TypeError, "logits_processor: expected a callable or a sequence of callables, got 3"),
        (
            {"stopping_criteria": [3]},
            TypeError,
            "stopping_criteria: expected a callable or a sequence of callables, got 3",
        ),
        ({"return_dict_in_generate": 1}, TypeError, "return_dict_in_generate: expected a bool, got 1"),
        ({"temprature": 1.0}, TypeError, "unexpected keyword argument 'temprature'"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        GenerateOptions(**options)


def random_output(merge, seed=0):
    """B=3 rows of up to T=5 tokens, K=4 experts of which the last is not run."""
    rng = np.random.default_rng(seed)
    weights = np.zeros((3, 5, 4), np.float32)
    weights[..., :3] = rng.dirichlet(np.ones(3), size=(3, 5))
    if merge == "log_linear":
        weights[..., 0] += 1
        weights[..., 1] -= 1
    expert_logprobs = np.full((3, 5, 4), np.nan, np.float32)
    expert_logprobs[..., :3] = rng.uniform(-12, 0, size=(3, 5, 3))
    lengths = np.array([5, 2, 4])
    past_end = np.arange(5) >= lengths[:, None]
    weights[past_end] = 0
    expert_logprobs[past_end] = 0
    return GenerateOutput(
        sequences=np.zeros((3, 9), np.int64),
        lengths=lengths,
        logprobs=np.zeros((3, 5), np.float32),
        mixture_weights=weights,
        expert_logprobs=expert_logprobs,
        timings={},
        expert_names=("a", "b", "c", "d"),
        merge=MergeRule.parse(merge),
    )


@pytest.mark.parametrize("merge, exponent", [("linear", 1), ("power(-1)", -1), ("power(0.5)", 0.5)])
def test_shares_are_responsibilities(merge, exponent):
    output = random_output(merge)
    shares = expert_shares(output)
    assert shares.dtype == np.float32
    for row, length in enumerate(output.lengths):
        parts = output.mixture_weights[row, :length, :3] * np.exp(
            exponent * output.expert_logprobs[row, :length, :3].astype(np.float64)
        )
        np.testing.assert_allclose(shares[row, :length, :3], parts / parts.sum(-1, keepdims=True), rtol=1e-5)
        assert (shares[row, length:] == 0).all()
    assert (shares[..., 3] == 0).all()


def test_shares_of_a_log_linear_merge_are_the_weights():
    output = random_output("log_linear")
    shares = expert_shares(output)
    for row, length in enumerate(output.lengths):
        np.testing.assert_allclose(shares[row, :length], output.mixture_weights[row, :length], rtol=1e-5)


def test_an_expert_that_excludes_the_token_has_no_share():
    output = random_output("linear")
    output.expert_logprobs[0, 0, 0] = -np.inf
    shares = expert_shares(output)
    assert shares[0, 0, 0] == 0
    assert shares[0, 0].sum() == pytest.approx(1)


def test_an_output_is_a_mapping_of_its_fields():
    output = random_output("linear")
    assert output["lengths"] is output.lengths
    assert dict(output).keys() == {field.name for field in fields(GenerateOutput)}
    with pytest.raises(KeyError, match="__class__"):
        output["__class__"]
