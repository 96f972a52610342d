"""A call of ``log_probs`` held against the model: text that is given is read as if it had been generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pcm_fast.pcm import LearnedPCM
from pcm_fast.preference import Preference
from pcm_fast.processors import check_count
from pcm_fast.prompts import Batch, Rows, expert_contexts, pcm_contexts, read_batch, to_numpy
from pcm_fast.request import Mixture, check_lengths, resolve_mixture
from pcm_fast.sampling import MergeRule
from pcm_fast.spec import ModelSpec
from pcm_fast.vocabulary import pad_token_id, vocab_size

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ForcedRequest:
    """Everything a backend needs for ``log_probs``.

    Attributes:
        mixture: who takes part.
        batch: B rows of text, prompt and answer.
        prompt_lengths: tokens of each row that are its prompt.
        contexts: per expert, all that it reads: K tuples of B arrays. The last tokens of a row's contexts are the same.
        pcm_contexts: the same for a learned PCM, None for another kind.
        own_prompts: whether some reader's prompt is its own, so that positions inside of it mean nothing to the others.
        vocab_size: V.
    """

    mixture: Mixture
    batch: Batch
    prompt_lengths: tuple[int, ...]
    contexts: tuple[Rows, ...]
    pcm_contexts: Rows | None
    own_prompts: bool
    vocab_size: int

    def num_positions(self, row: int) -> int:
        """Positions at the end of a row that have a distribution: all, or from the last token of its prompt on."""
        length = len(self.batch.rows[row])
        return length - self.prompt_lengths[row] + 1 if self.own_prompts else length

    def position_weights(self, row: int, hidden: Float32 | None) -> Float32:
        """Mixture weights [num_positions, K] of one row; hidden [num_positions, d] are the states of a learned PCM."""
        count, mixture = self.num_positions(row), self.mixture
        if isinstance(mixture.pcm, LearnedPCM) and hidden is not None:
            return mixture.pcm.weights(hidden, mixture.preference.active)
        text, prompt = self.batch.rows[row], self.prompt_lengths[row]
        weights = []
        for t in range(len(text) - count, len(text)):
            read = text[: t + 1]
            weights.append(mixture.step_weights((read[:prompt],), [read[prompt:]], None))
        return np.concatenate(weights)

    def empty_output(self) -> Float32:
        """[B, T, V] float32, NaN everywhere."""
        return np.full((*self.batch.input_ids.shape, self.vocab_size), np.nan, dtype=np.float32)

    def result(self, output: Float32) -> Any:
        """What ``log_probs`` returns: a NumPy array, or a torch tensor if the text came as one."""
        if not self.batch.torch:
            return output
        import torch

        return torch.from_numpy(output)


def prepare_forced(
    spec: ModelSpec,
    input_ids: Any,
    attention_mask: Any = None,
    *,
    preference: Preference = None,
    active: Sequence[str] | None = None,
    merge: str | MergeRule = "linear",
    prompt_length: int | Sequence[int] = 1,
    expert_input_ids: Mapping[str, Any] | None = None,
    pcm_input_ids: Any = None,
) -> ForcedRequest:
    """Hold a call of ``log_probs`` against the model; see ``MixtureModel.log_probs`` for the arguments.

    Raises:
        TypeError, ValueError: the message names the argument, what was expected and what came.
    """
    size = vocab_size(spec.checkpoint)
    mixture = resolve_mixture(spec, preference, active, MergeRule.parse(merge))
    batch = read_batch(input_ids, attention_mask, size, pad_token_id(spec.checkpoint))
    lengths = _prompt_lengths(prompt_length, batch.rows)
    prompts = tuple(row[:length] for row, length in zip(batch.rows, lengths, strict=True))
    answers = tuple(row[length:] for row, length in zip(batch.rows, lengths, strict=True))
    contexts = tuple(_joined(rows, answers) for rows in expert_contexts(spec, prompts, expert_input_ids))
    pcm_prompts = pcm_contexts(spec, prompts, mixture.preference, pcm_input_ids)
    pcm_rows = None if pcm_prompts is None else _joined(pcm_prompts, answers)
    check_lengths(spec, mixture, contexts, pcm_rows, 0)
    return ForcedRequest(
        mixture=mixture,
        batch=batch,
        prompt_lengths=lengths,
        contexts=contexts,
        pcm_contexts=pcm_rows,
        own_prompts=bool(expert_input_ids) or pcm_input_ids is not None,
        vocab_size=size,
    )


def _joined(prompts: Rows, answers: Rows) -> Rows:
    return tuple(np.concatenate(pair) for pair in zip(prompts, answers, strict=True))


def _prompt_lengths(value: Any, rows: Rows) -> tuple[int, ...]:
    values = to_numpy(value)
    if isinstance(values, (Sequence, np.ndarray)) and not isinstance(values, str) and np.ndim(values) == 1:
        lengths = list(values)
    else:
        lengths = [values] * len(rows)
    if len(lengths) != len(rows):
        raise ValueError(f"prompt_length: expected an integer or {len(rows)} of them, got {len(lengths)}")
    for row, length in zip(rows, lengths, strict=True):
        check_count("prompt_length", length)
        if not 1 <= length <= len(row):
            raise ValueError(f"prompt_length: expected 1 to the {len(row)} tokens of the row, got {length}")
    return tuple(int(length) for length in lengths)
