"""What the answers of a method are worth, kept in a file: likelihoods take long."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pcm_fast.evaluate.answers import Answers
from pcm_fast.evaluate.log import JsonLog
from pcm_fast.evaluate.methods import Method
from pcm_fast.evaluate.mixtures import Preference
from pcm_fast.evaluate.statistics import Float64, distinct_bigrams
from pcm_fast.train.prompts import Prompt
from pcm_fast.train.rewards import Rewards

BATCH = 64


@dataclass(frozen=True)
class Scores:
    """The answers of a method to N prompts under P preferences, in numbers.

    Where the method knows of no preference, its one answer to a prompt stands under all of them.

    Attributes:
        rewards: [D, N, P] by dimension, in the order of the configuration.
        fluency: [N, P] nats a token under the base; NaN for an empty answer.
        tokens: [N, P] length.
        distinct: [N, P] distinct bigrams over bigrams; NaN below two words.
        unfinished: [N, P] 1 where the answer was cut off at max_new_tokens, else 0.
    """

    rewards: Float64
    fluency: Float64
    tokens: Float64
    distinct: Float64
    unfinished: Float64


def score_texts(
    rewards: Rewards,
    scale: Mapping[str, Any],
    texts: Sequence[tuple[str, str]],
    path: Path,
    advance: Callable[[int], None],
) -> dict[str, dict[str, Any]]:
    """Rewards and fluency of (prompt, answer), by ``text_key``. What is in the file already is not computed again.

    Args:
        rewards: who scores.
        scale: what the scores depend on besides the texts.
        texts: prompts and answers.
        path: the file, JSON lines.
        advance: called with the number of texts that have been scored.

    Returns:
        For each text {"rewards": {dimension: number}, "fluency": nats or None if the answer is empty}.
    """
    log = JsonLog(path, scale)
    found = {record["key"] for record in log.records}
    missing = list({text_key(*text): text for text in texts if text_key(*text) not in found}.items())
    advance(len(texts) - len(missing))
    with log:
        for start in range(0, len(missing), BATCH):
            batch = missing[start : start + BATCH]
            prompts, answers = [prompt for _, (prompt, _) in batch], [answer for _, (_, answer) in batch]
            fluency = rewards.fluency(prompts, answers)
            values = rewards.score(prompts, answers, fluency)
            for i, (key, (_, answer)) in enumerate(batch):
                numbers = {name: float(column[i]) for name, column in values.items()}
                log.append({"key": key, "rewards": numbers, "fluency": float(fluency[i]) if answer else None})
            advance(len(batch))
    return {record["key"]: record for record in log.records}


def text_key(prompt: str, answer: str) -> str:
    """Names a prompt with its answer."""
    return hashlib.sha256(f"{len(prompt)} {prompt}{answer}".encode()).hexdigest()[:24]


def lay_out(
    method: Method,
    answers: Answers,
    scored: Mapping[str, Mapping[str, Any]],
    prompts: Sequence[Prompt],
    preferences: Sequence[Preference],
    dimensions: Sequence[str],
) -> Scores:
    """The scores of a method as arrays, prompt by preference."""
    grid = [
        [answers.by_key[prompt.id, "+".join(p) if method.per_preference else ""] for p in preferences]
        for prompt in prompts
    ]
    records = [
        [scored[text_key(prompt.text, answer.text)] for answer in row]
        for prompt, row in zip(prompts, grid, strict=True)
    ]

    def numbers(values: Any) -> Float64:
        return np.array(values, dtype=np.float64)  # None becomes NaN

    return Scores(
        rewards=numbers([[[record["rewards"][name] for record in row] for row in records] for name in dimensions]),
        fluency=numbers([[record["fluency"] for record in row] for row in records]),
        tokens=numbers([[answer.tokens for answer in row] for row in grid]),
        distinct=numbers([[distinct_bigrams(answer.text) for answer in row] for row in grid]),
        unfinished=numbers([[not answer.finished for answer in row] for row in grid]),
    )
