"""Answers of a mixture, with everything that a gradient of their likelihood needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pcm_fast.model import MixtureModel


@dataclass(frozen=True, eq=False)
class Rollout:
    """One answer.

    Attributes:
        text: the answer.
        tokens: its ids, the end of sequence included.
        weights: [T, K] float32, the mixture weights it was drawn with; 0 for experts that are not active.
        expert_logprobs: [T, K] float32, log p_i of every token; NaN for experts that are not active.
        context: what a learned PCM read before the first token; empty for another kind.
    """

    text: str
    tokens: list[int]
    weights: npt.NDArray[np.float32]
    expert_logprobs: npt.NDArray[np.float32]
    context: list[int]


@dataclass(frozen=True)
class Wish:
    """What to draw an answer to: a prompt, a preference in words, who may take part; and a seed."""

    prompt: str
    preference: str
    active: tuple[str, ...]
    seed: int


def draw_rollouts(
    model: MixtureModel,
    wishes: Sequence[Wish],
    max_batch: int,
    advance: Callable[[int], None] = lambda count: None,
    **options: Any,
) -> list[Rollout]:
    """An answer to each wish, in their order; options are keywords of ``generate``."""
    engine = model.engine(max_batch=max_batch)
    waiting = list(reversed(range(len(wishes))))
    running: dict[int, tuple[int, list[int]]] = {}
    found: dict[int, Rollout] = {}
    while waiting or running:
        while waiting and len(running) < max_batch:
            index = waiting.pop()
            wish = wishes[index]
            inputs = model.chat_inputs(wish.prompt, preference=wish.preference, active=wish.active)
            request = engine.add_request(
                **inputs,
                preference=wish.preference,
                active=wish.active,
                seed=wish.seed,
                expert_logprobs=True,
                **options,
            )
            running[request] = index, list((inputs["pcm_input_ids"] or [[]])[0])
        for output in engine.step():
            if output.finish_reason is None:
                continue
            index, context = running.pop(output.request_id)
            result = engine.result(output.request_id)
            count = int(result.lengths[0])
            tokens = result.sequences[0, -result.logprobs.shape[1] :][:count].tolist()
            found[index] = Rollout(
                text=model.tokenizer.decode(tokens).strip(),
                tokens=tokens,
                weights=np.asarray(result.mixture_weights[0, :count]),
                expert_logprobs=np.asarray(result.expert_logprobs[0, :count]),
                context=context,
            )
            advance(1)
    return [found[index] for index in range(len(wishes))]
