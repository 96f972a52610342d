"""How far two sets of log-probabilities are apart, as the tolerances of the package count it."""

import numpy as np


def difference(ours, reference):
    """Greatest difference of log p where the reference has p > 1e-6, and the mean KL divergence."""
    ours, reference = (np.asarray(x, np.float64).reshape(-1, np.shape(x)[-1]) for x in (ours, reference))
    ours, reference = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (ours, reference))
    likely = reference > np.log(1e-6)
    return np.abs(ours - reference)[likely].max(), (np.exp(reference) * (reference - ours)).sum(axis=1).mean()
