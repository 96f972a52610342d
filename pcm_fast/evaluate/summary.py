"""From scores to what the report says, as plain numbers for JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pcm_fast.evaluate import statistics
from pcm_fast.evaluate.answers import Answers
from pcm_fast.evaluate.methods import Method
from pcm_fast.evaluate.mixtures import BASE, Preference
from pcm_fast.evaluate.scores import Scores
from pcm_fast.evaluate.statistics import Estimate, Float64

RESAMPLES = 10_000
STILL_ANSWERING = 0.25  # share of answers that reach a position for it to be in the figure


@dataclass(frozen=True)
class Result:
    """All that came of one method."""

    method: Method
    answers: Answers
    scores: Scores


def summarise(
    results: Mapping[str, Result],
    prompt_ids: Sequence[str],
    preferences: Sequence[Preference],
    dimensions: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    """Everything that is counted, as lists, mappings and numbers.

    Args:
        results: by method; the base is among them.
        prompt_ids: the N prompts.
        preferences: the P preferences, names of dimensions.
        dimensions: the D dimensions.
        seed: of the bootstrap.
    """
    shares = statistics.bootstrap_shares(len(prompt_ids), RESAMPLES, seed)
    base = results[BASE].scores
    composite = np.stack([_composite(result.scores, base, preferences, dimensions) for result in results.values()])
    wins = statistics.wins_per_prompt(composite)
    opponents = [i for i, result in enumerate(results.values()) if result.method.kind != "ablation"]
    average = statistics.mean(statistics.average_wins(wins, opponents)[:, None], shares)
    pairwise = statistics.mean(wins[:, None], shares)
    methods = []
    for i, result in enumerate(results.values()):
        entry = _method(result, base, composite[i], preferences, dimensions, shares)
        methods.append({**entry, "average_win_rate": estimate(average, i)})
    summary: dict[str, Any] = plain(
        {
            "dimensions": list(dimensions),
            "preferences": [list(p) for p in preferences],
            "methods": methods,
            "win_rates": {
                "methods": list(results),
                **{end: getattr(pairwise, end) for end in ("value", "low", "high")},
            },
            "experts": {
                name: _expert(results[f"expert-{name}"].scores, base, dimensions, shares)
                for name in dimensions
                if f"expert-{name}" in results
            },
            "weights": {
                name: _weights(result.answers, prompt_ids, preferences)
                for name, result in results.items()
                if result.answers.expert_names
            },
        }
    )
    return summary


def _composite(scores: Scores, base: Scores, preferences: Sequence[Preference], dimensions: Sequence[str]) -> Float64:
    """Composite rewards [N, P]."""
    columns = []
    for p, preference in enumerate(preferences):
        stated = [dimensions.index(name) for name in preference]
        columns.append(statistics.composite_reward(scores.rewards[stated, :, p], base.rewards[stated, :, p]))
    return np.stack(columns, axis=1)


def _method(
    result: Result,
    base: Scores,
    composite: Float64,
    preferences: Sequence[Preference],
    dimensions: Sequence[str],
    shares: Float64,
) -> dict[str, Any]:
    method, scores = result.method, result.scores
    asked = {name: [p for p, preference in enumerate(preferences) if name in preference] for name in dimensions}

    def overall(values: Float64) -> dict[str, float]:
        return estimate(statistics.mean(values, shares))

    return {
        "name": method.name,
        "label": method.label,
        "about": method.about,
        "kind": method.kind,
        "composite": overall(composite),
        "composite_by_preference": {"+".join(p): overall(composite[:, [i]]) for i, p in enumerate(preferences)},
        "rewards": {name: _reward(scores.rewards[d]) for d, name in enumerate(dimensions)},
        "rewards_when_asked": {
            name: _reward(scores.rewards[d][:, asked[name]]) for d, name in enumerate(dimensions) if asked[name]
        },
        "fluency": overall(scores.fluency),
        "fluency_change": overall(scores.fluency - base.fluency),
        "tokens": overall(scores.tokens),
        "distinct_2": overall(scores.distinct),
        "cut_off": overall(scores.unfinished),
        "tokens_drawn": result.answers.tokens,
        "tokens_per_second": result.answers.tokens / result.answers.seconds if result.answers.seconds else None,
    }


def _reward(values: Float64) -> dict[str, float]:
    """Mean and standard error of [N, P] rewards; prompts are the independent units."""
    per_prompt = values.mean(axis=1)
    return {"mean": float(per_prompt.mean()), "standard_error": float(statistics.standard_error(per_prompt))}


def _expert(scores: Scores, base: Scores, dimensions: Sequence[str], shares: Float64) -> dict[str, Any]:
    """Effect of a single expert on every dimension; its answers are the same under all preferences."""
    values, before = scores.rewards[:, :, 0].T, base.rewards[:, :, 0].T
    effect = statistics.cohens_d(values, before, shares)
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = before.std(axis=0, ddof=1) if len(before) > 1 else np.full(len(dimensions), np.nan)
        in_base = (values.mean(axis=0) - before.mean(axis=0)) / spread
    return {
        "d": {name: estimate(effect, d) for d, name in enumerate(dimensions)},
        "in_base_standard_deviations": {name: float(in_base[d]) for d, name in enumerate(dimensions)},
        "fluency_change": estimate(statistics.mean(scores.fluency[:, :1] - base.fluency[:, :1], shares)),
    }


def _weights(answers: Answers, prompt_ids: Sequence[str], preferences: Sequence[Preference]) -> dict[str, Any]:
    """Mean weights of a PCM by preference: over all tokens, and by position in the answer."""
    overall: dict[str, Any] = {}
    by_position: dict[str, Any] = {}
    for preference in preferences:
        key = "+".join(preference)
        rows = [np.array(answers.by_key[prompt_id, key].weights) for prompt_id in prompt_ids]
        overall[key] = dict(zip(answers.expert_names, np.concatenate(rows).mean(axis=0), strict=True))
        lengths = np.array([len(row) for row in rows])
        reached = (lengths[:, None] > np.arange(lengths.max())).mean(axis=0)
        last = int((reached >= STILL_ANSWERING).sum())
        means = [np.mean([row[t] for row in rows if len(row) > t], axis=0) for t in range(last)]
        by_position[key] = dict(zip(answers.expert_names, np.stack(means, axis=1), strict=True))
    return {"experts": list(answers.expert_names), "overall": overall, "by_position": by_position}


def estimate(result: Estimate, *index: int) -> dict[str, float]:
    """One number and its interval."""
    return {end: float(getattr(result, end)[index]) for end in ("value", "low", "high")}


def plain(value: Any) -> Any:
    """Arrays as lists, and None for NaN, which JSON lacks."""
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
