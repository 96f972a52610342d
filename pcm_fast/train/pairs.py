"""Pairs of a better and a worse answer, for one dimension, out of the pool."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pcm_fast.train.answers import Answer
from pcm_fast.train.config import ExpertConfig
from pcm_fast.train.pool import Pool
from pcm_fast.train.rewards import Rewards


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt.

    Attributes:
        prompt: the user's message.
        chosen, rejected: the better and the worse answer.
        gap: by how much it is better, in standard deviations of the base's rewards.
    """

    prompt: str
    chosen: Answer
    rejected: Answer
    gap: float


def choose_pairs(pool: Pool, rewards: Rewards, dimension: str, config: ExpertConfig) -> list[Pair]:
    """For each prompt the best of all answers against the worst; those with the greatest gap.

    Good is what has the reward and, by ``config.fluency``, is likely under the base. An answer less fluent than the
    floor is never chosen, and one that is off the subject loses by ``relevance``. What may be chosen and rejected say
    ``config.cut_short`` and ``config.rejected``; what was cut short on purpose is never rejected, or all experts but
    one would learn to be long.
    """
    scores = pool.rewards[dimension] + config.fluency * pool.fluency
    off_subject = config.relevance * np.minimum(pool.relevance, 0.0)
    fluent = pool.fluency >= rewards.fluency_floor
    styles = np.array(pool.styles)
    in_full = ~np.isin(styles, list(pool.shortened))
    choosable = fluent & (config.cut_short | in_full | (styles == dimension))
    fault = -scores
    rejectable = styles == "" if config.rejected == "plain" else in_full
    if config.rejected == "alike":
        rejectable, fault = rejectable & fluent, fault + off_subject
    pairs = []
    for prompt_id in dict.fromkeys(pool.prompt_ids):
        mine = np.array([i for i, other in enumerate(pool.prompt_ids) if other == prompt_id])
        best, worst = mine[choosable[mine]], mine[rejectable[mine]]
        if not len(best) or not len(worst):
            continue
        chosen = best[np.argmax((scores + off_subject)[best])]
        rejected = worst[np.argmax(fault[worst])]
        gap = float(scores[chosen] - scores[rejected])
        if gap > 0:
            pairs.append(Pair(pool.prompts[prompt_id].text, pool.answers[chosen], pool.answers[rejected], gap))
    if not pairs:
        raise ValueError(f"{dimension}: no prompt has an answer that is better than the worst; draw more answers")
    return sorted(pairs, key=lambda pair: -pair.gap)[: config.pairs]
