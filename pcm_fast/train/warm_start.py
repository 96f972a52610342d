"""A PCM that knows what a preference names, before it learns what serves it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from pcm_fast.model import MixtureModel
from pcm_fast.train.config import Config
from pcm_fast.train.policy import Policy
from pcm_fast.train.pool import Pool
from pcm_fast.train.preferences import composites, state


def warm_start(
    policy: Policy,
    model: MixtureModel,
    pool: Pool,
    config: Config,
    gains: npt.NDArray[np.float32],
    advance: Callable[[float], None],
) -> None:
    """Teach the PCM to weigh the experts by the strengths that the preference states, by cross-entropy.

    Args:
        policy: the PCM.
        model: for the chat template; its PCM is a learned one with the policy's template.
        pool: answers, at whose tokens the weights are asked for.
        config: the configuration.
        gains: see ``targets``.
        advance: called with the loss of every step.
    """
    chance = random.Random(config.seed)
    sets = [(), *composites(config)]
    pcm = config.pcm
    optimizer = torch.optim.AdamW(policy.parameter_groups(pcm.warm_start_rate), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, max(1, pcm.warm_start))
    for _ in range(pcm.warm_start):
        loss = drawn_naming_loss(policy, model, pool, config, gains, sets, chance)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(policy.trained(), 1.0)
        optimizer.step()
        schedule.step()
        advance(float(loss.detach()))


def drawn_naming_loss(
    policy: Policy,
    model: MixtureModel,
    pool: Pool,
    config: Config,
    gains: npt.NDArray[np.float32],
    sets: Sequence[tuple[str, ...]],
    chance: random.Random,
) -> torch.Tensor:
    """The loss on a batch of answers and preferences drawn at random, for any of these sets of dimensions."""
    contexts, answers, wanted = [], [], []
    for _ in range(config.pcm.warm_start_batch):
        i = chance.randrange(len(pool.answers))
        stated = state(config, chance.choice(sets), chance)
        contexts.append(context(model, pool.prompts[pool.prompt_ids[i]].text, stated.text))
        answers.append(pool.answers[i].tokens[: chance.randint(1, 24)])
        wanted.append(targets(stated.strengths, policy.experts, gains))
    return naming_loss(policy.log_weights(contexts, answers), wanted)


def targets(
    strengths: Mapping[str, float], experts: Sequence[str], gains: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """The weights [K] that a preference names: in proportion to the strengths, times exp(gain) of each expert.

    So experts that have to be louder than their share are, among those that are asked for; one alone has it all.
    """
    weights = np.array([strengths.get(name, 0.0) for name in experts]) * np.exp(gains)
    return np.asarray(weights / weights.sum(), dtype=np.float32)


def naming_loss(log_weights: Sequence[torch.Tensor], named: Sequence[npt.NDArray[np.float32]]) -> torch.Tensor:
    """Mean Kullback-Leibler divergence of the weights from those that are named, over the tokens of each answer."""
    losses = []
    for row, target in zip(log_weights, named, strict=True):
        wanted = torch.from_numpy(target)
        entropy = -(wanted[wanted > 0] * wanted[wanted > 0].log()).sum()
        losses.append(-(row * wanted).sum(-1).mean() - entropy)
    return torch.stack(losses).mean()


def context(model: MixtureModel, prompt: str, preference: str) -> list[int]:
    """What a learned PCM reads before the answer."""
    ids = model.chat_inputs(prompt, preference=preference)["pcm_input_ids"]
    assert ids is not None
    return list(ids[0])
