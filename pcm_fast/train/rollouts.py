"""Answers of a mixture, with everything that a gradient of their likelihood needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pcm_fast.model import MixtureModel
from pcm_fast.train.drawing import answer_tokens, draw


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
    contexts: dict[int, list[int]] = {}

    def request(index: int) -> dict[str, Any]:
        wish = wishes[index]
        inputs = model.chat_inputs(wish.prompt, preference=wish.preference, active=wish.active)
        contexts[index] = list((inputs["pcm_input_ids"] or [[]])[0])
        asked = {"preference": wish.preference, "active": wish.active, "seed": wish.seed}
        return {**inputs, **asked, "expert_logprobs": True, **options}

    requests = ((index, request(index)) for index in range(len(wishes)))
    found: dict[int, Rollout] = {}
    for index, output, _ in draw(model.engine(max_batch=max_batch), requests, 2 * max_batch):
        tokens = answer_tokens(output)
        found[index] = Rollout(
            text=model.tokenizer.decode(tokens).strip(),
            tokens=tokens,
            weights=np.asarray(output.mixture_weights[0, : len(tokens)]),
            expert_logprobs=np.asarray(output.expert_logprobs[0, : len(tokens)]),
            context=contexts[index],
        )
        advance(1)
    return [found[index] for index in range(len(wishes))]
