"""A call of ``generate`` or ``log_probs`` held against the model: what every backend is given to run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt

from pcm_fast.generation import GenerateOptions, GenerateOutput
from pcm_fast.pcm import PCM, CallablePCM, LearnedPCM, PCMContext, called_weights, static_weights
from pcm_fast.preference import Preference, ResolvedPreference, resolve_preference
from pcm_fast.processors import Processors, check_count
from pcm_fast.prompts import Batch, Rows, Tokens, expert_contexts, pcm_contexts, read_batch
from pcm_fast.sampling import MergeRule
from pcm_fast.spec import ModelSpec
from pcm_fast.vocabulary import eos_token_ids, max_positions, pad_token_id, vocab_size

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Mixture:
    """Who takes part in a request, and with what weight.

    Attributes:
        preference: the preference, resolved.
        rule: the merge rule.
        expert_names: the K names.
        running: indices of the experts to run, ascending: the active ones, less those whose weight is 0 throughout.
        weights: [K] float32 if the weights hold throughout, else None.
        pcm: where the weights come from.
    """

    preference: ResolvedPreference
    rule: MergeRule
    expert_names: tuple[str, ...]
    running: tuple[int, ...]
    weights: Float32 | None
    pcm: PCM

    def step_weights(
        self, prompts: Rows, generated: Sequence[Tokens], hidden: Float32 | None, rows: Sequence[int] | None = None
    ) -> Float32:
        """Mixture weights [B, K] for the next token of B rows.

        Args:
            prompts: B arrays, the prompts.
            generated: B arrays [step], the tokens so far.
            hidden: [B, d] float32, the last hidden states of a learned PCM; None for another kind.
            rows: which rows of the request these are; None: all of them.
        """
        if self.weights is not None:
            return np.repeat(self.weights[None], len(prompts), axis=0)
        if isinstance(self.pcm, LearnedPCM):
            assert hidden is not None
            return self.pcm.weights(hidden, self.preference.active)
        assert isinstance(self.pcm, CallablePCM)
        indices = tuple(range(len(prompts)) if rows is None else rows)
        context = PCMContext(self.preference, self.expert_names, prompts, tuple(generated), len(generated[0]), indices)
        return called_weights(self.pcm, context, self.rule)


@dataclass(frozen=True)
class Request:
    """Everything a backend needs to generate; B counts rows, num_return_sequences included.

    Attributes:
        options: the keywords, checked.
        mixture: who takes part.
        batch: the prompts as they came in, each row repeated num_return_sequences times.
        contexts: per expert, what it reads before the first token: K tuples of B arrays.
        pcm_contexts: the same for a learned PCM, None for another kind.
        processors: the built-in processors.
        eos_token_ids: tokens that end a sequence.
        pad_token_id: written after the end.
    """

    options: GenerateOptions
    mixture: Mixture
    batch: Batch
    contexts: tuple[Rows, ...]
    pcm_contexts: Rows | None
    processors: Processors
    eos_token_ids: tuple[int, ...]
    pad_token_id: int

    def result(
        self,
        tokens: Tokens,
        lengths: Tokens,
        logprobs: Float32,
        mixture_weights: Float32,
        expert_logprobs: Float32,
        timings: Mapping[str, float],
    ) -> Any:
        """What ``generate`` returns: sequences, or a GenerateOutput, as NumPy arrays or torch tensors.

        Args:
            tokens: [B, T] int64; what stands past the length of a row does not matter, here and below.
            lengths: [B] int64.
            logprobs: [B, T] float32.
            mixture_weights: [B, T, K] float32.
            expert_logprobs: [B, T, K] float32.
            timings: as in GenerateOutput, less the number of tokens.
        """
        past_end = np.arange(tokens.shape[1]) >= lengths[:, None]
        tokens = np.where(past_end, self.pad_token_id, tokens)
        sequences = self._as_given(np.concatenate([self.batch.input_ids, tokens], axis=1))
        if not self.options.return_dict_in_generate:
            return sequences
        return GenerateOutput(
            sequences=sequences,
            lengths=self._as_given(lengths),
            logprobs=self._as_given(np.where(past_end, np.float32(0), logprobs)),
            mixture_weights=self._as_given(np.where(past_end[..., None], np.float32(0), mixture_weights)),
            expert_logprobs=self._as_given(np.where(past_end[..., None], np.float32(0), expert_logprobs)),
            timings={**timings, "tokens": float(lengths.sum())},
            expert_names=self.mixture.expert_names,
            merge=self.mixture.rule,
        )

    def _as_given(self, array: npt.NDArray[Any]) -> Any:
        if not self.batch.torch:
            return array
        import torch

        return torch.from_numpy(array)


def prepare_request(spec: ModelSpec, input_ids: Any, attention_mask: Any, options: GenerateOptions) -> Request:
    """Hold a call of ``generate`` against the model.

    Raises:
        TypeError, ValueError: the message names the argument, what was expected and what came.
    """
    size = vocab_size(spec.checkpoint)
    eos = _eos(options.eos_token_id, spec, size)
    pad = options.pad_token_id
    if pad is not None and pad >= size:
        raise ValueError(f"pad_token_id: expected a token id below the vocabulary size {size}, got {pad}")
    pad = pad_token_id(spec.checkpoint) if pad is None else pad
    processors = options.processors(eos)
    processors.check_vocabulary(size)
    mixture = resolve_mixture(spec, options.preference, options.active, options.rule)
    batch = read_batch(input_ids, attention_mask, size, pad)
    contexts = expert_contexts(spec, batch.rows, options.expert_input_ids)
    pcm_rows = pcm_contexts(spec, batch.rows, mixture.preference, options.pcm_input_ids)
    n = options.num_return_sequences
    if options.streamer is not None and n * len(batch.rows) != 1:
        raise ValueError(f"streamer: expected one sequence, got {n * len(batch.rows)}")
    check_lengths(spec, mixture, contexts, pcm_rows, options.max_new_tokens)
    return Request(
        options=options,
        mixture=mixture,
        batch=Batch(np.repeat(batch.input_ids, n, axis=0), _repeat(batch.rows, n), batch.torch),
        contexts=tuple(_repeat(rows, n) for rows in contexts),
        pcm_contexts=None if pcm_rows is None else _repeat(pcm_rows, n),
        processors=processors,
        eos_token_ids=eos,
        pad_token_id=pad,
    )


def resolve_mixture(spec: ModelSpec, preference: Preference, active: Sequence[str] | None, rule: MergeRule) -> Mixture:
    """Who takes part under this preference, and with what weight if that is known beforehand."""
    names = spec.expert_names
    resolved = resolve_preference(preference, names, active)
    weights = static_weights(spec.pcm, resolved, names, rule)
    running = resolved.active
    if weights is not None:
        running = tuple(i for i in running if weights[i] != 0)
    return Mixture(resolved, rule, names, running, weights, spec.pcm)


def check_lengths(
    spec: ModelSpec, mixture: Mixture, contexts: tuple[Rows, ...], pcm_rows: Rows | None, new_tokens: int
) -> None:
    """ValueError if a model that is run would have to read beyond the positions that it was made for."""
    readers = [(f"expert {spec.expert_names[i]!r}", spec.expert_checkpoint(i), contexts[i]) for i in mixture.running]
    if isinstance(spec.pcm, LearnedPCM) and pcm_rows is not None:
        readers.append(("the PCM", spec.pcm.checkpoint or spec.checkpoint, pcm_rows))
    for reader, checkpoint, rows in readers:
        limit, longest = max_positions(checkpoint), max(map(len, rows))
        if limit is None or longest + new_tokens <= limit:
            continue
        reads = f"{reader} reads {longest} tokens, and its model has {limit} positions"
        if longest >= limit:
            raise ValueError(f"input_ids: {reads}")
        raise ValueError(f"max_new_tokens: {reads}: expected at most {limit - longest} new tokens, got {new_tokens}")


def same_shape(value: Any, like: Any) -> Any:
    """What a logits processor returned, a float32 tensor, if it has the shape of the tensor it was given."""
    shape = list(value.shape) if hasattr(value, "float") else None
    if shape != list(like.shape):
        got = repr(value) if shape is None else shape
        raise ValueError(f"logits_processor: expected it to return a tensor of shape {list(like.shape)}, got {got}")
    return value.float()


def stopped(answer: Any, num_rows: int) -> npt.NDArray[np.bool_]:
    """The answer of a stopping criterion, one bool or one per row, as bool [B]."""
    rows = np.asarray(answer, dtype=bool)
    if rows.shape not in ((), (num_rows,)):
        raise ValueError(f"stopping_criteria: expected a bool or shape [{num_rows}], got {list(rows.shape)}")
    return np.broadcast_to(rows, (num_rows,))


def _eos(value: int | Sequence[int] | None, spec: ModelSpec, size: int) -> tuple[int, ...]:
    if value is None:
        return eos_token_ids(spec.checkpoint)
    ids: Any = (value,) if isinstance(value, Integral) else value
    if isinstance(ids, (str, bytes)) or not isinstance(ids, (Sequence, np.ndarray)):
        raise TypeError(f"eos_token_id: expected a token id, a sequence of them or None, got {value!r}")
    for token in ids:
        check_count("eos_token_id", token)
        if token >= size:
            raise ValueError(f"eos_token_id: expected token ids below the vocabulary size {size}, got {token}")
    return tuple(int(token) for token in ids)


def _repeat(rows: Rows, n: int) -> Rows:
    return tuple(row for row in rows for _ in range(n))
