"""The best weights that depend on nothing but the dimensions asked for: what a PCM has to beat."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pcm_fast.model import MixtureModel
from pcm_fast.pcm import FixedPCM
from pcm_fast.train.config import Config
from pcm_fast.train.pool import Pool
from pcm_fast.train.preferences import Stated
from pcm_fast.train.reward import answer_rewards
from pcm_fast.train.rewards import Rewards
from pcm_fast.train.rollouts import Wish, draw_rollouts

FILE = "fixed_weights.json"
RIDGE = 2.0  # as much as that many pairs that say that two experts shall weigh alike


def find_fixed_weights(
    config: Config,
    experts: Mapping[str, Path],
    pool: Pool,
    rewards: Rewards,
    directory: Path,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, dict[str, float]]:
    """For each composite of the evaluation the weights with the greatest mean reward on training prompts.

    Candidates are a grid over the simplex; the better half is drawn for again, on as many further prompts, until one is
    left. What is found is kept in ``fixed_weights.json`` as it comes, by "concise+friendly".
    """
    path = directory / FILE
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    base = MixtureModel.from_pretrained(config.base, dict(experts), "uniform", activations=config.activations)
    for names in config.evaluate.preferences:
        key = "+".join(names)
        if key not in known:
            known[key] = _search(config, base, pool, rewards, names)
            path.write_text(json.dumps(known, indent=1) + "\n")
        advance(1)
    return known


def gains(known: Mapping[str, Mapping[str, float]], experts: Sequence[str]) -> npt.NDArray[np.float32]:
    """How much more each expert should weigh than its share, as logarithms [K]: what a PCM starts from.

    They fit log(w_i / w_j) = gain_i - gain_j over all pairs of all fixed weights, by least squares. A ridge pulls them
    towards 0, since each of the weights is the winner on a few dozen prompts.
    """
    rows, ratios = [], []
    for weights in known.values():
        for first, second in itertools.combinations(weights, 2):
            row = np.zeros(len(experts))
            row[experts.index(first)], row[experts.index(second)] = 1.0, -1.0
            rows.append(row)
            ratios.append(math.log(weights[first] / weights[second]))
    if not rows:
        return np.zeros(len(experts), dtype=np.float32)
    pairs = np.stack(rows)
    fitted = np.linalg.solve(pairs.T @ pairs + RIDGE * np.eye(len(experts)), pairs.T @ np.array(ratios))
    return np.asarray(fitted, dtype=np.float32)


def grid(count: int, steps: int) -> list[tuple[float, ...]]:
    """Points of the simplex of ``count`` weights above 0 that are multiples of 1/steps."""
    if count == 1:
        return [(1.0,)]
    found = []

    def extend(begun: tuple[int, ...], left: int) -> None:
        if len(begun) == count - 1:
            found.append(tuple(n / steps for n in (*begun, left)))
            return
        for n in range(1, left - (count - len(begun) - 1) + 1):
            extend((*begun, n), left - n)

    extend((), steps)
    return found


def _search(config: Config, base: MixtureModel, pool: Pool, rewards: Rewards, names: Sequence[str]) -> dict[str, float]:
    candidates = grid(len(names), 6 if len(names) == 2 else 5)
    chance = random.Random(f"{config.seed} {'+'.join(names)}")
    prompts = chance.sample(sorted(set(pool.prompt_ids)), len(set(pool.prompt_ids)))
    totals = {candidate: list[float]() for candidate in candidates}
    stated = Stated("", dict.fromkeys(names, 1.0))
    used = 0
    while len(candidates) > 1 and used < len(prompts):
        round_ = prompts[used : used + config.pcm.fixed_prompts]
        used += len(round_)
        seeds = [chance.getrandbits(60) for _ in round_]  # the same for all: their difference is what counts
        for candidate in candidates:
            pcm = FixedPCM(dict(zip(names, candidate, strict=True)))
            model = MixtureModel(replace(base.spec, pcm=pcm), activations=config.activations)
            wishes = [
                Wish(pool.prompts[i].text, "any", tuple(names), seed) for i, seed in zip(round_, seeds, strict=True)
            ]
            rollouts = draw_rollouts(
                model,
                wishes,
                config.pcm.max_batch,
                max_new_tokens=config.pcm.max_new_tokens,
                temperature=config.pcm.temperature,
            )
            texts = [rollout.text for rollout in rollouts]
            totals[candidate] += answer_rewards(pool, rewards, round_, [stated] * len(round_), texts).tolist()
        candidates = sorted(candidates, key=lambda c: -float(np.mean(totals[c])))[: max(1, len(candidates) // 2)]
    return dict(zip(names, candidates[0], strict=True))
