"""How likely texts are under the base: the guard against rewards that are won by babble."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pcm_fast.experts import Expert
from pcm_fast.model import MixtureModel
from pcm_fast.pcm import UniformPCM
from pcm_fast.spec import ModelSpec

Floats = npt.NDArray[np.float64]


class Fluency:
    """Mean log-likelihood of a token of an answer under a base, the prompt given.

    Attributes:
        model: the base alone, on the native engine where it runs.
    """

    def __init__(self, checkpoint: Any, num_threads: int | None = None, activations: str = "float32") -> None:
        """A scorer for one base."""
        base = Expert("base", None, None, None)
        spec = ModelSpec(checkpoint, (base,), UniformPCM())
        self.model = MixtureModel(spec, num_threads=num_threads, activations=activations)

    def __call__(
        self,
        prompts: Sequence[str],
        answers: Sequence[str],
        rows: int = 8,
        advance: Callable[[int], None] = lambda count: None,
    ) -> Floats:
        """Nats a token [N], of all tokens of each answer; 0 for an empty one.

        Args:
            prompts: user messages.
            answers: an answer to each.
            rows: texts read at once.
            advance: called with the number of texts that were scored.
        """
        tokenizer = self.model.tokenizer
        heads = [self.model.chat_inputs(prompt)["input_ids"][0] for prompt in prompts]
        tails = [tokenizer.encode(answer, add_special_tokens=False) for answer in answers]
        scores = np.zeros(len(answers))
        # Answers to one prompt are read together: it is read once for all of them.
        order = sorted((i for i, tail in enumerate(tails) if len(tail)), key=lambda i: (len(heads[i]), prompts[i]))
        for start in range(0, len(order), rows):
            chosen = order[start : start + rows]
            own = [heads[i] for i in chosen]
            # A prompt that is given as the expert's own is read without distributions for its inside.
            log_probs = self.model.log_probs(
                [[*heads[i], *tails[i]] for i in chosen],
                prompt_length=[len(head) for head in own],
                expert_input_ids={"base": own},
            )
            for row, i in zip(log_probs, chosen, strict=True):
                count = len(tails[i])
                scores[i] = row[-count - 1 : -1][np.arange(count), tails[i]].mean()
            advance(len(chosen))
        return scores
