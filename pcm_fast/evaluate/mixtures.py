"""The mixtures that the methods draw from: the trained experts plain, averaged, or under a trained PCM."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pcm_fast.checkpoint import Checkpoint, LoadError
from pcm_fast.evaluate.soup import average_adapters
from pcm_fast.experts import Expert, load_experts
from pcm_fast.loader import load_checkpoint
from pcm_fast.pcm import LearnedPCM, NamedPCM
from pcm_fast.pcm_file import read_pcm
from pcm_fast.spec import ModelSpec
from pcm_fast.train.config import Config

BASE = "base"  # the name of the base among the experts
Preference = tuple[str, ...]  # names of dimensions


class Mixtures:
    """The mixtures that can be made of a directory of trained artefacts.

    Attributes:
        config: what the artefacts were trained with.
        directory: holds ``experts/<dimension>/``, and may hold ``pcm/`` and ``fixed_weights.json``.
    """

    def __init__(self, config: Config, directory: Path) -> None:
        """Look what is there.

        Raises:
            ValueError: no directory, or it lacks the expert of a dimension.
        """
        if not directory.is_dir():
            raise ValueError(f"artefacts: expected a directory of trained artefacts, and {directory} does not exist")
        if BASE in config.dimensions:
            raise ValueError(f"{config.path}: dimensions: {BASE!r} is the base itself; expected another name")
        for name in config.dimensions:
            if not (directory / "experts" / name).is_dir():
                raise ValueError(f"artefacts: expected the expert {name!r} in {directory / 'experts'}, got none")
        self.config, self.directory = config, directory

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The base."""
        return load_checkpoint(self.config.base)

    @cached_property
    def experts(self) -> dict[str, Expert]:
        """The expert of each dimension, and the base."""
        paths = {name: self.directory / "experts" / name for name in self.config.dimensions}
        return {expert.name: expert for expert in load_experts({BASE: None, **paths}, self.checkpoint)}

    @cached_property
    def fixed_weights(self) -> dict[frozenset[str], dict[str, float]]:
        """The best weights that ignore the context, by preference; empty if none were learned.

        Raises:
            ValueError: the file is malformed.
        """
        path = self.directory / "fixed_weights.json"
        if not path.is_file():
            return {}
        try:
            return {
                frozenset(key.split("+")): {str(name): float(weight) for name, weight in weights.items()}
                for key, weights in json.loads(path.read_text(encoding="utf-8")).items()
            }
        except (ValueError, TypeError, AttributeError):
            raise ValueError(
                f'{path}: expected {{"concise+friendly": {{"concise": 0.6, "friendly": 0.4}}, ...}}'
            ) from None

    def plain(self) -> ModelSpec:
        """The experts and the base, weighed by name."""
        return ModelSpec(self.checkpoint, tuple(self.experts.values()), NamedPCM())

    def soup(self, preference: Preference) -> ModelSpec:
        """One expert, "soup": the mean of the adapters of a preference."""
        adapters = []
        for name in preference:
            adapter = self.experts[name].adapter
            if adapter is None:
                raise ValueError(
                    f"artefacts: expected an adapter as the expert {name!r}, since a soup averages adapters"
                )
            adapters.append(adapter)
        return ModelSpec(self.checkpoint, (Expert("soup", average_adapters(adapters)),), NamedPCM())

    def learned(self, directory: Path) -> ModelSpec:
        """The experts under a trained PCM.

        Raises:
            LoadError: the PCM cannot be read, or was trained for other experts.
        """
        pcm = read_pcm(directory, self.checkpoint)
        unknown = [name for name in pcm.experts if name not in self.experts]
        if unknown:
            raise LoadError(
                f"{directory}: expected a PCM for the experts {', '.join(map(repr, self.experts))}, "
                f"got one that also weighs {unknown[0]!r}"
            )
        return ModelSpec(self.checkpoint, tuple(self.experts[name] for name in pcm.experts), pcm)


def identity(spec: ModelSpec, used: Container[str]) -> dict[str, Any]:
    """What a mixture is made of, so that answers of another one are not taken for its own.

    Args:
        spec: the mixture.
        used: names of the experts that take part; the others may change without harm.
    """
    parts = {e.name: e.adapter.identity if e.adapter else "base" for e in spec.experts if e.name in used}
    described: dict[str, Any] = {"base": spec.checkpoint.identity, "experts": parts}
    if isinstance(spec.pcm, LearnedPCM):
        digest = hashlib.sha256(spec.pcm.template.encode())
        for array in (spec.pcm.weight, spec.pcm.bias):
            digest.update(np.ascontiguousarray(array).tobytes())
        for part in (spec.pcm.adapter, spec.pcm.checkpoint):
            digest.update((part.identity if part is not None else "none").encode())
        described["pcm"] = digest.hexdigest()[:32]
    return described
