"""What an answer is worth to someone with several wishes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pcm_fast.train.pool import Pool
from pcm_fast.train.preferences import Stated
from pcm_fast.train.rewards import Rewards, bradley_terry


def answer_rewards(
    pool: Pool,
    rewards: Rewards,
    prompt_ids: Sequence[str],
    stated: Sequence[Stated],
    answers: Sequence[str],
    normalised: bool = True,
) -> npt.NDArray[np.float64]:
    """Rewards [N] of answers to prompts of the pool.

    The mean over the stated dimensions, weighted by their strengths, of the probability of beating the base's plain
    answers to the same prompt (Bradley-Terry).

    Args:
        pool: holds the plain answers.
        rewards: the scorers.
        prompt_ids, stated, answers: N of each.
        normalised: False takes standard scores in place of probabilities.
    """
    scores = rewards.score([pool.prompts[i].text for i in prompt_ids], answers)
    values = np.zeros(len(answers))
    for n, (prompt_id, wish) in enumerate(zip(prompt_ids, stated, strict=True)):
        plain = pool.plain(prompt_id)
        for dimension, share in wish.shares.items():
            mine = scores[dimension][n]
            value = bradley_terry(mine, pool.rewards[dimension][plain]).mean() if normalised else mine
            values[n] += share * float(value)
    return values
