"""Rewards: the scorers of all dimensions on one scale, less what a guard takes off for babble."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pcm_fast.loader import load_checkpoint
from pcm_fast.train.config import Config
from pcm_fast.train.fluency import Fluency
from pcm_fast.train.scorers import load_scorer, words

Floats = npt.NDArray[np.float64]

FILE = "rewards.json"
DISTINCT = 0.6  # distinct bigrams over bigrams, under which an answer repeats itself
COPIED = 0.5  # of an answer's 5-word sequences from the prompt, above which it is a copy
STEEPNESS = 4.0  # standard deviations taken off where all of an answer repeats or copies


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of a scorer over the base's own answers to the training prompts."""

    mean: float
    std: float


class Rewards:
    """What answers are worth on each dimension, in standard deviations of the base's answers, whose mean is 0.

    A guard takes off up to 4 for an answer that repeats itself or copies the prompt, and 1 for every nat a token by
    which its likelihood under the base falls short of ``fluency_floor``.

    Attributes:
        dimensions: names, in the order of the configuration.
        scales: of each dimension's scorer.
        fluency_floor: nats a token; the base's own mean less the margin of the configuration.
    """

    def __init__(self, config: Config, scales: Mapping[str, Scale], fluency_mean: float) -> None:
        """Rewards on scales that are known."""
        self.dimensions = tuple(config.dimensions)
        self.scales = dict(scales)
        self.fluency_mean = fluency_mean
        self.fluency_floor = fluency_mean - config.fluency_margin
        self._scorers = {name: load_scorer(dimension.reward) for name, dimension in config.dimensions.items()}
        self._base, self._activations = config.base, config.activations
        self._fluency: Fluency | None = None

    @staticmethod
    def calibrate(
        config: Config, prompts: Sequence[str], answers: Sequence[str], fluency: Floats, plain: Sequence[int]
    ) -> tuple[Rewards, dict[str, Floats]]:
        """Rewards on the scale of the base's own answers, which are at these places among all; and what all get."""
        raw = {name: load_scorer(entry.reward)(prompts, answers) for name, entry in config.dimensions.items()}
        scales = {}
        for name, dimension in config.dimensions.items():
            values = raw[name][list(plain)]
            spread = float(values.std())
            if not spread > 0:
                raise ValueError(f"reward: {dimension.reward}: gives every answer of the base the same, {values[0]:g}")
            scales[name] = Scale(float(values.mean()), spread)
        rewards = Rewards(config, scales, float(fluency[list(plain)].mean()))
        return rewards, rewards._standardised(raw, prompts, answers, fluency)

    @staticmethod
    def load(config: Config, directory: str | Path) -> Rewards:
        """Rewards as ``save`` wrote them.

        Raises:
            ValueError: the file is missing or lacks a dimension.
        """
        path = Path(directory) / FILE
        if not path.is_file():
            raise ValueError(f"{path}: expected the rewards that train-experts writes, and it does not exist")
        stored = json.loads(path.read_text())
        missing = [name for name in config.dimensions if name not in stored["scales"]]
        if missing:
            raise ValueError(f"{path}: expected a scale for the dimension {missing[0]!r}, got none")
        scales = {name: Scale(**stored["scales"][name]) for name in config.dimensions}
        return Rewards(config, scales, stored["fluency_mean"])

    def save(self, directory: str | Path) -> None:
        """Write scales and the fluency of the base."""
        scales = {name: asdict(scale) for name, scale in self.scales.items()}
        text = json.dumps({"fluency_mean": self.fluency_mean, "scales": scales}, indent=1)
        (Path(directory) / FILE).write_text(text + "\n")

    def score(self, prompts: Sequence[str], answers: Sequence[str], fluency: Floats | None = None) -> dict[str, Floats]:
        """Rewards [N] of N answers by dimension.

        Args:
            prompts: user messages.
            answers: an answer to each.
            fluency: what ``fluency`` gives for them, if it is known; without it, likelihood is not guarded.
        """
        raw = {name: scorer(prompts, answers) for name, scorer in self._scorers.items()}
        return self._standardised(raw, prompts, answers, fluency)

    def _standardised(
        self, raw: Mapping[str, Floats], prompts: Sequence[str], answers: Sequence[str], fluency: Floats | None
    ) -> dict[str, Floats]:
        off = guard(prompts, answers)
        if fluency is not None:
            off = off + np.maximum(0.0, self.fluency_floor - fluency)
        return {name: (raw[name] - scale.mean) / scale.std - off for name, scale in self.scales.items()}

    def fluency(self, prompts: Sequence[str], answers: Sequence[str]) -> Floats:
        """Mean log-likelihood a token under the base [N], nats."""
        if self._fluency is None:
            self._fluency = Fluency(load_checkpoint(self._base), activations=self._activations)
        return self._fluency(prompts, answers)


def bradley_terry(rewards: Floats, reference: Floats) -> Floats:
    """Probability that an answer beats the reference: sigmoid of the difference of their rewards."""
    return 1.0 / (1.0 + np.exp(reference - rewards))


def guard(prompts: Sequence[str], answers: Sequence[str]) -> Floats:
    """What is taken off the rewards of an answer that repeats itself, copies its prompt, or is empty."""
    return np.array([_guard(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)])


def _guard(prompt: str, answer: str) -> float:
    tokens = words(answer)
    if not tokens:
        return STEEPNESS
    off = 0.0
    bigrams = list(itertools.pairwise(tokens))
    if len(bigrams) >= 10:
        off += STEEPNESS * max(0.0, DISTINCT - len(set(bigrams)) / len(bigrams)) / DISTINCT
    asked, given = _sequences(words(prompt)), _sequences(tokens)
    if given:
        copied = sum(count for sequence, count in given.items() if sequence in asked) / sum(given.values())
        off += STEEPNESS * max(0.0, copied - COPIED) / (1 - COPIED)
    return off


def _sequences(tokens: Sequence[str], length: int = 5) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1))
