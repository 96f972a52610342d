"""A request in an engine: its sequences, and all that has come of them."""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pcm_fast import ops
from pcm_fast.processors import Processors
from pcm_fast.request import Request
from pcm_fast.sequence import FinishReason, Reader, Row, Sequence, TokenOutput

Float32 = npt.NDArray[np.float32]


@dataclass(eq=False, slots=True)
class Submission:
    """A request in an engine.

    Attributes:
        id: its id.
        request: what was asked for.
        report: whether expert_logprobs are wanted.
        sequences: one for each row of the request.
        outputs: every token, in the order in which they were drawn.
        error: why it failed.
        finished: whether nothing more happens to it.
        eos: the tokens that end a sequence.
        draws_in_python: whether somebody wants to see log p before a draw.
        static_weights: [K] float32, the mixture weights if they hold throughout, else None.
        no_report: [K] float32, NaN.
        submitted, first, all_first, last: when it came in; when the first token was drawn, the first one of the last
            row to have one, and the last one (``time.perf_counter``).
    """

    id: int
    request: Request
    report: bool
    sequences: list[Sequence] = field(default_factory=list)
    outputs: list[TokenOutput] = field(default_factory=list)
    error: BaseException | None = None
    finished: bool = False
    eos: frozenset[int] = frozenset()
    draws_in_python: bool = False
    static_weights: Float32 | None = None
    no_report: Float32 | None = None
    submitted: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    all_first: float = 0.0
    last: float = 0.0

    def __post_init__(self) -> None:
        request = self.request
        self.eos = frozenset(request.eos_token_ids)
        self.draws_in_python = needs_python(request)
        if request.mixture.weights is not None:
            self.static_weights = _frozen(request.mixture.weights.copy())
        self.no_report = _frozen(np.full(len(request.mixture.expert_names), np.nan, np.float32))

    def accept(
        self, sequence: Sequence, token: int, logprob: float, expert_logprobs: Float32, stopped: bool, now: float
    ) -> TokenOutput:
        """One more token of a sequence; stopped: whether a stopping criterion ends it here."""
        position = len(sequence.tokens)
        reason: FinishReason | None = None
        if token in self.eos:
            reason = "eos"
        elif stopped:
            reason = "stop"
        elif position + 1 == self.request.options.max_new_tokens:
            reason = "length"
        weights, reported = self.static_weights, self.no_report
        if weights is None:
            assert sequence.weights is not None
            weights = self._spread(sequence.weights, 0.0)
        if self.report:
            reported = self._spread(expert_logprobs, np.nan)
        assert reported is not None
        output = TokenOutput(self.id, sequence.index, position, token, logprob, weights, reported, reason)
        sequence.tokens.append(token)
        sequence.outputs.append(output)
        sequence.finished = reason is not None
        self.outputs.append(output)
        if position == 0:
            self.first = self.first or now
            self.all_first = now
        self.last = now
        return output

    def failure(self, error: BaseException) -> TokenOutput:
        """The request fails; returns what ``step`` says about that."""
        self.error, self.finished = error, True
        assert self.no_report is not None
        return TokenOutput(self.id, 0, 0, -1, np.nan, self.no_report, self.no_report, "error")

    def result(self) -> Any:
        """What ``generate`` returns for it."""
        sequences, count = self.sequences, len(self.request.mixture.expert_names)
        lengths = np.array([len(sequence.outputs) for sequence in sequences], dtype=np.int64)
        shape = (len(sequences), int(lengths.max()))
        tokens = np.full(shape, self.request.pad_token_id, np.int64)
        logprobs = np.zeros(shape, np.float32)
        weights, expert_logprobs = (np.zeros((*shape, count), np.float32) for _ in range(2))
        for b, sequence in enumerate(sequences):
            tokens[b, : lengths[b]] = sequence.tokens
            logprobs[b, : lengths[b]] = [output.logprob for output in sequence.outputs]
            weights[b, : lengths[b]] = [output.mixture_weights for output in sequence.outputs]
            expert_logprobs[b, : lengths[b]] = [output.expert_logprobs for output in sequence.outputs]
        timings = {
            "prefill": self.all_first - self.submitted,
            "decode": self.last - self.all_first,
            "time_to_first_token": self.first - self.submitted,
        }
        return self.request.result(tokens, lengths, logprobs, weights, expert_logprobs, timings)

    def _spread(self, values: Float32, fill: float) -> Float32:
        """[K] from [R]: what holds for the running experts, and `fill` for the others."""
        mixture = self.request.mixture
        if len(values) == len(mixture.expert_names):
            return _frozen(values.copy())
        spread = np.full(len(mixture.expert_names), fill, np.float32)
        spread[list(mixture.running)] = values
        return _frozen(spread)


def make_sequences(submission: Submission, experts: Items[Reader], pcm: Reader | None, order: int) -> list[Sequence]:
    """The sequences of a request; experts and pcm are who reads, order is where the first of them came in."""
    request = submission.request
    mixture, copies = request.mixture, request.options.num_return_sequences
    readers = [experts[i] for i in mixture.running]
    contexts = [[row.astype(np.int32) for row in request.contexts[i]] for i in mixture.running]
    pcm_contexts = None if request.pcm_contexts is None else [row.astype(np.int32) for row in request.pcm_contexts]
    one_head = len({reader.model for reader in readers}) == 1 and not any(reader.adapts_head for reader in readers)
    sequences: list[Sequence] = []
    for b in range(len(request.batch.rows)):
        pcm_row = None
        if pcm_contexts is not None:
            assert pcm is not None
            pcm_row = Row(pcm, pcm_contexts[b], pcm_contexts[b])
        sequences.append(
            Sequence(
                submission,
                index=b,
                order=order + b,
                leader=sequences[b - b % copies] if b % copies else None,
                experts=tuple(Row(reader, rows[b], rows[b]) for reader, rows in zip(readers, contexts, strict=True)),
                pcm=pcm_row,
                combine=mixture.rule.kind == "log_linear" and one_head,
                weights=None if mixture.weights is None else mixture.weights[list(mixture.running)],
            )
        )
    return sequences


def needs_python(request: Request) -> bool:
    """Whether somebody wants to see log p before a draw, so that it cannot be part of the native step."""
    plain = Processors(eos_token_ids=request.processors.eos_token_ids)
    options = request.options
    return bool(
        request.processors != plain
        or options.logits_processors
        or options.criteria
        or ops.backend() == "reference"  # PCM_FAST_FORCE
    )


def _frozen(array: Float32) -> Float32:
    array.setflags(write=False)
    return array
