"""Random cases of mix_sample: logits, weights, merge rules and parameters, the odd ones often enough."""

import numpy as np

from pcm_fast.sampling import SamplingParams

RULES = ["linear", "linear", "log_linear", "power(-1)", "power(0.5)", "power(2)"]


def random_case(rng, experts, vocabulary, rule=None):
    """Logits, weights and a merge rule, with ties, excluded tokens and zero weights now and then."""
    logits = (rng.normal(size=(experts, vocabulary)) * rng.choice([0.01, 0.3, 1, 3, 10, 60])).astype(np.float32)
    kind = rng.integers(6)
    if kind == 0:
        logits = np.round(logits)
    elif kind == 1:
        logits[rng.random(logits.shape) < rng.choice([0.05, 0.5, 0.95])] = -np.inf
        logits[:, rng.integers(vocabulary)] = 0.5  # one token that nobody excludes
    elif kind == 2:
        logits[:] = rng.normal()
    weights = rng.dirichlet(np.full(experts, rng.choice([0.1, 1, 10]))).astype(np.float32)
    weights[rng.random(experts) < rng.choice([0, 0.4])] = 0
    if weights.sum() == 0:
        weights[rng.integers(experts)] = 1
    weights /= weights.sum()
    rule = rule or str(rng.choice(RULES))
    if rule == "log_linear" and kind != 1:
        weights *= rng.choice([-0.5, 1, 1.5], size=experts).astype(np.float32)
    return logits, weights, rule


def random_params(rng):
    return SamplingParams(
        do_sample=bool(rng.random() < 0.9),
        temperature=float(rng.choice([0, 0.3, 0.7, 1, 1, 1, 1.7, 20])),
        top_k=int(rng.choice([0, 0, 0, 1, 2, 5, 40, 5000])),
        top_p=float(rng.choice([1, 1, 0.95, 0.9, 0.5, 0.1, 0])),
        min_p=float(rng.choice([0, 0, 0, 0.001, 0.1, 1])),
        seed=int(rng.integers(2**63)),
    )
