"""REBEL: regression of relative rewards (arXiv 2404.16767), for a PCM.

For two answers a, b to one prompt and preference, drawn from the mixture under the PCM as it was (old), the loss is

    ((log pi(a) - log pi_old(a)) - (log pi(b) - log pi_old(b)) - eta (r(a) - r(b)))^2

with log pi(y) = sum over t of log sum_i w_i,t p_i(y_t). Of more than two answers it is the mean over all pairs. Experts
are black boxes: their log-probabilities are numbers that came with the rollouts, and the gradient goes through the
weights alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pcm_fast.train.policy import Policy, mixture_log_likelihood
from pcm_fast.train.rollouts import Rollout


@dataclass(frozen=True, eq=False)
class Contest:
    """Answers to one prompt and preference, two or more.

    Attributes:
        answers: all of them.
        rewards: theirs.
        active: indices of the experts that wrote them.
    """

    answers: tuple[Rollout, ...]
    rewards: tuple[float, ...]
    active: tuple[int, ...]


def rebel_loss(policy: Policy, contests: Sequence[Contest], eta: float) -> torch.Tensor:
    """The mean loss over these contests."""
    rollouts = [answer for contest in contests for answer in contest.answers]
    rows = iter(policy.log_weights([rollout.context for rollout in rollouts], [rollout.tokens for rollout in rollouts]))
    losses = []
    for contest in contests:
        off = [
            _log_ratio(next(rows), answer, contest.active) - eta * reward
            for answer, reward in zip(contest.answers, contest.rewards, strict=True)
        ]
        losses.append(2 * torch.stack(off).var())  # the mean of (a - b)^2 over all pairs
    return torch.stack(losses).mean()


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    contests: Sequence[Contest],
    eta: float,
    batch_size: int,
    seed: int,
    anchor: Callable[[random.Random], torch.Tensor] | None = None,
) -> float:
    """One pass over the contests in an order drawn at random; the mean loss on the way.

    anchor: a loss that is added in every step, given what draws for it.
    """
    chance = random.Random(seed)
    order = chance.sample(range(len(contests)), len(contests))
    losses = []
    for start in range(0, len(order), batch_size):
        loss = rebel_loss(policy, [contests[i] for i in order[start : start + batch_size]], eta)
        total = loss if anchor is None else loss + anchor(chance)
        optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(policy.trained(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses) / len(losses)


def _log_ratio(log_weights: torch.Tensor, answer: Rollout, active: Sequence[int]) -> torch.Tensor:
    logprobs = torch.from_numpy(answer.expert_logprobs)
    old = torch.from_numpy(answer.weights).log()
    return mixture_log_likelihood(log_weights, logprobs, active) - mixture_log_likelihood(old, logprobs, active)
