"""The oracle itself, against published vectors, float64 formulas and a draw written another way."""

import math

import numpy as np
import pytest

from pcm_fast import sampling
from pcm_fast.sampling import MergeRule, SamplingParams

EXPERTS = [1, 2, 5]
RULES = ["linear", "log_linear", "power(-1)", "power(0.5)", "power(3)"]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # kat_vectors of Random123, the authors' own library
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_vectors(counter, key, expected):
    assert sampling.philox4x32(counter, key) == expected


def test_philox_depends_on_every_argument():
    draws = {
        sampling.philox(seed, sequence, position)
        for seed in (0, 1, 2**40)
        for sequence in (0, 7, 2**33)
        for position in (0, 1)
    }
    assert len(draws) == 18


def test_exp_and_log_are_accurate():
    rng = np.random.default_rng(0)
    x = -rng.uniform(0, 87, 200_000).astype(np.float32)
    assert np.abs(sampling.exp32(x) / np.exp(x.astype(np.float64)) - 1).max() < 2e-7
    y = np.exp(rng.uniform(-80, 20, 200_000)).astype(np.float32)
    exact = np.log(y.astype(np.float64))
    assert (np.abs(sampling.log32(y) - exact) <= np.spacing(np.abs(exact).astype(np.float32))).all()
    assert sampling.log32(np.float32([0.0, 1.0])).tolist() == [-math.inf, 0.0]
    assert sampling.exp32(np.float32([0.0])).tolist() == [1.0]


def _merge64(logits, weights, rule):
    """The formulas of the design in float64."""
    logits = logits.astype(np.float64)
    log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    rule = MergeRule.parse(rule)
    if rule.kind == "linear":
        return np.logaddexp.reduce(log_p + np.log(weights)[:, None], axis=0)
    if rule.kind == "log_linear":
        merged = (weights[:, None] * log_p).sum(axis=0)
    else:
        merged = np.logaddexp.reduce(rule.exponent * log_p + np.log(weights)[:, None], axis=0) / rule.exponent
    return merged - np.logaddexp.reduce(merged)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("vocabulary", [2, 333, 50_001])
def test_merge_is_the_formula(rule, experts, vocabulary):
    rng = np.random.default_rng(vocabulary + experts)
    logits = rng.normal(scale=4, size=(experts, vocabulary)).astype(np.float32)
    weights = rng.dirichlet(np.ones(experts)).astype(np.float32)
    expected = _merge64(logits, weights.astype(np.float64), rule)
    np.testing.assert_allclose(sampling.merge_log_probs(logits, weights, rule), expected, rtol=2e-6, atol=2e-5)


def test_merge_keeps_the_far_tail_that_float32_probabilities_lose():
    logits = np.float32([[0, -150, -300], [0, -160, -290]])
    expected = _merge64(logits, np.array([0.5, 0.5]), "linear")
    np.testing.assert_allclose(sampling.merge_log_probs(logits, [0.5, 0.5]), expected, rtol=1e-5)


def test_signed_weights_of_log_linear():
    rng = np.random.default_rng(3)
    logits = rng.normal(scale=3, size=(3, 100)).astype(np.float32)
    weights = np.float32([1.0, 0.7, -0.7])
    expected = _merge64(logits, weights.astype(np.float64), "log_linear")
    np.testing.assert_allclose(sampling.merge_log_probs(logits, weights, "log_linear"), expected, rtol=1e-5, atol=2e-5)


def test_an_expert_of_weight_zero_is_not_looked_at():
    logits = np.float32([[0, 1, 2], [np.nan, np.inf, 0]])
    expected = sampling.merge_log_probs(logits[:1], [1.0])
    assert (sampling.merge_log_probs(logits, [1.0, 0.0]) == expected).all()


def test_excluded_tokens():
    logits = np.float32([[0, -np.inf, 1, -np.inf], [0, 1, -np.inf, -np.inf]])
    finite = {rule: np.isfinite(sampling.merge_log_probs(logits, [0.5, 0.5], rule)).tolist() for rule in RULES}
    assert finite["linear"] == finite["power(0.5)"] == finite["power(3)"] == [True, True, True, False]
    assert finite["log_linear"] == finite["power(-1)"] == [True, False, False, False]


def test_a_negative_weight_on_an_excluded_token_has_no_answer():
    with pytest.raises(ValueError, match="no token has a finite probability"):
        sampling.merge_log_probs(np.float32([[0, 1], [0, -np.inf]]), [1.0, -0.5], "log_linear")


def _draw_by_hand(log_p, params, sequence, position):
    """The draw of the design with Python integers, sharing nothing with the oracle but masses and random bits."""
    masses = [int(m) for m in sampling.token_masses(log_p, params.temperature)]
    kept = sorted((v for v, m in enumerate(masses) if m), key=lambda v: (-masses[v], v))
    if params.top_k:
        kept = kept[: params.top_k]
    kept = [v for v in kept if masses[v] >= params.min_p * 2**40]
    total, prefix = sum(masses[v] for v in kept), []
    for v in kept:
        prefix.append(v)
        if sum(masses[u] for u in prefix) >= params.top_p * total:
            break
    r = sampling.philox(params.seed, sequence, position) * sum(masses[v] for v in prefix) >> 64
    for v in sorted(prefix):
        if r < masses[v]:
            return v
        r -= masses[v]
    raise AssertionError("no token")


def test_sample_is_the_draw_of_the_design():
    rng = np.random.default_rng(11)
    for case in range(600):
        log_p = rng.normal(scale=rng.choice([0.2, 2, 8]), size=rng.integers(2, 40)).astype(np.float32)
        if case % 3 == 0:
            log_p = np.round(log_p)
        params = SamplingParams(
            temperature=float(rng.choice([0.5, 1, 2])),
            top_k=int(rng.choice([0, 1, 3, 100])),
            top_p=float(rng.choice([1, 0.75, 0.5, 0.0])),  # exact in binary, so that the products above are
            min_p=float(rng.choice([0, 0.125, 1])),
            seed=case,
        )
        assert sampling.sample(log_p, params, sequence=case % 5, position=case) == _draw_by_hand(
            log_p, params, case % 5, case
        )


def test_greedy_takes_the_lowest_of_equals():
    log_p = np.float32([-3, -1, -2, -1])
    assert sampling.sample(log_p, SamplingParams(do_sample=False)) == 1
    assert sampling.sample(log_p, SamplingParams(temperature=0)) == 1


def test_a_tiny_temperature_is_greedy_and_does_not_overflow():
    assert sampling.sample(np.float32([-3, -1, -2]), SamplingParams(temperature=1e-40)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, "temperature: expected a finite number >= 0, got -1.0"),
        ({"temperature": math.nan}, "temperature: .* got nan"),
        ({"temperature": math.inf}, "temperature: .* got inf"),
        ({"top_p": 1.5}, r"top_p: expected a number in \[0, 1\], got 1.5"),
        ({"min_p": -0.1}, "min_p: .* got -0.1"),
        ({"top_k": -1}, "top_k: expected an integer .* got -1"),
        ({"seed": 2**64}, "seed: expected an integer"),
    ],
)
def test_bad_parameters_are_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [{"temperature": "1"}, {"top_k": 1.5}, {"top_p": None}, {"do_sample": 1}, {"seed": True}, {"min_p": True}],
)
def test_bad_parameters_of_a_wrong_type(arguments):
    (name,) = arguments
    with pytest.raises(TypeError, match=f"{name}: expected"):
        SamplingParams(**arguments)


@pytest.mark.parametrize("rule", ["mean", "power", "power()", "power(x)", "power(inf)", "power(nan)", "power(0)", ""])
def test_bad_merge_rules(rule):
    with pytest.raises(ValueError, match="merge: "):
        MergeRule.parse(rule)
    with pytest.raises(TypeError, match="merge: expected"):
        MergeRule.parse(3)


@pytest.mark.parametrize("bad", [[np.nan, 0.0], [np.inf, 0.0], [-np.inf, -np.inf]])
def test_bad_log_probs(bad):
    with pytest.raises(ValueError, match="NaN, \\+inf or all -inf"):
        sampling.sample(np.float32(bad), SamplingParams())
