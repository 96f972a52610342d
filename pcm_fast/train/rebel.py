"""REBEL: regression of relative rewards (arXiv 2404.16767), for a PCM.

For two answers a, b to one prompt and preference, drawn from the mixture under the PCM as it was (old), the loss is

    ((log pi(a) - log pi_old(a)) - (log pi(b) - log pi_old(b)) - eta (r(a) - r(b)))^2

with log pi(y) = sum over t of log sum_i w_i,t p_i(y_t). Experts are black boxes: their log-probabilities are numbers
that came with the rollouts, and the gradient goes through the weights alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pcm_fast.train.policy import Policy, mixture_log_likelihood
from pcm_fast.train.rollouts import Rollout


@dataclass(frozen=True, eq=False)
class Duel:
    """Two answers to one prompt and preference.

    Attributes:
        answers: the two.
        rewards: theirs.
        active: indices of the experts that wrote them.
    """

    answers: tuple[Rollout, Rollout]
    rewards: tuple[float, float]
    active: tuple[int, ...]


def rebel_loss(policy: Policy, duels: Sequence[Duel], eta: float) -> torch.Tensor:
    """The mean loss over these duels."""
    rollouts = [answer for duel in duels for answer in duel.answers]
    rows = policy.log_weights([rollout.context for rollout in rollouts], [rollout.tokens for rollout in rollouts])
    losses = []
    for i, duel in enumerate(duels):
        ratios = [
            _log_ratio(row, answer, duel.active)
            for row, answer in zip(rows[2 * i : 2 * i + 2], duel.answers, strict=True)
        ]
        wanted = eta * (duel.rewards[0] - duel.rewards[1])
        losses.append((ratios[0] - ratios[1] - wanted) ** 2)
    return torch.stack(losses).mean()


def update(
    policy: Policy, optimizer: torch.optim.Optimizer, duels: Sequence[Duel], eta: float, batch_size: int, seed: int
) -> float:
    """One pass over the duels in an order drawn at random; the mean loss on the way."""
    order = random.Random(seed).sample(range(len(duels)), len(duels))
    losses = []
    for start in range(0, len(order), batch_size):
        loss = rebel_loss(policy, [duels[i] for i in order[start : start + batch_size]], eta)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(policy.trained(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses) / len(losses)


def _log_ratio(log_weights: torch.Tensor, answer: Rollout, active: Sequence[int]) -> torch.Tensor:
    logprobs = torch.from_numpy(answer.expert_logprobs)
    old = torch.from_numpy(answer.weights).log()
    return mixture_log_likelihood(log_weights, logprobs, active) - mixture_log_likelihood(old, logprobs, active)
