"""Personalized Soups: the mean of several adapters, as one adapter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pcm_fast.adapter import Adapter, AdapterSite


def average_adapters(adapters: Sequence[Adapter]) -> Adapter:
    """The adapter whose change of every weight is the mean of the given adapters' changes, up to rounding.

    The mean of low-rank products is one product of their ranks together:
    ``sum_i s_i B_i A_i / n = [s_i B_i / n] [A_i]``.
    (The mean of the A times the mean of the B, which is cheaper, is another thing.) An adapter that leaves a layer
    alone counts as a change of zero there.

    Args:
        adapters: one or more, on the same base.
    """
    assert adapters
    modules = list(dict.fromkeys(module for adapter in adapters for module in adapter.sites))
    sites = {}
    for module in modules:
        parts = [adapter.sites[module] for adapter in adapters if module in adapter.sites]
        a = np.concatenate([part.A for part in parts])
        b = np.concatenate([part.B * np.float32(part.scaling / len(adapters)) for part in parts], axis=1)
        sites[module] = AdapterSite(a, b, scaling=1.0)
    return Adapter(None, sites)
