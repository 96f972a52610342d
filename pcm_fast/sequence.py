"""A sequence of an engine: the rows that read it, and the tokens drawn so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from pcm_fast.submission import Submission

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
FinishReason = Literal["eos", "length", "stop", "error"]


class TokenOutput(NamedTuple):
    """One token of one sequence, as ``Engine.step`` returns it.

    Attributes:
        request_id: the request.
        sequence: index of the sequence among the rows of the request.
        position: index of the token in its answer, 0 for the first.
        token: its id; -1 where the request failed.
        logprob: its log-probability, before temperature and truncation.
        mixture_weights: [K] float32, read-only; exactly 0 for an expert that took no part.
        expert_logprobs: [K] float32, read-only; NaN for an expert that was not run, or if they were not asked for.
        finish_reason: "eos", "length" or "stop" (a stopping criterion) at the last token of its sequence; "error" where
            the request failed; None otherwise.
    """

    request_id: int
    sequence: int
    position: int
    token: int
    logprob: float
    mixture_weights: Float32
    expert_logprobs: Float32
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class Reader:
    """Who reads a row.

    Attributes:
        model: index of the model among the runner's.
        adapter: index of the adapter among that model's; -1 for none.
        namespace: what its keys and values depend on besides the tokens (``kv_cache.namespace_id``).
        adapts_head: whether the adapter changes the LM head.
    """

    model: int
    adapter: int
    namespace: int
    adapts_head: bool = False


@dataclass(eq=False, slots=True)
class Row:
    """What one expert, or the PCM, reads of a sequence.

    Attributes:
        reader: who reads.
        context: [P] int32, what it reads before the answer.
        text: [P + n] int32, the context and the answer as of when the sequence was admitted.
        slot: its id in the KV cache of its model; -1 while it is not admitted.
        read: tokens whose keys and values are there.
        reserved: tokens that have room there.
    """

    reader: Reader
    context: Int32
    text: Int32
    slot: int = -1
    read: int = 0
    reserved: int = 0


@dataclass(eq=False, slots=True)
class Sequence:
    """One answer in the making.

    Attributes:
        submission: the request it belongs to.
        index: its row in the request.
        order: which of the engine's sequences it is, by arrival.
        leader: the first sequence of the same prompt, whose rows it may share; None if it is that one.
        experts: a row for each running expert.
        pcm: the row of a learned PCM.
        combine: whether the experts' hidden states are merged in place of their logits (``log_linear``, one LM head).
        weights: [R] float32, mixture weights of the running experts for the next token, or the last one; None before.
        weighed: the answer's length that a callable PCM was last asked for.
        tokens: the answer so far.
        outputs: the same with everything known about it.
        finished: whether no more tokens follow.
        rows: the experts' rows, and that of the PCM if there is one.
        keeps_weights: whether weights hold for more than one token.
    """

    submission: Submission
    index: int
    order: int
    leader: Sequence | None
    experts: tuple[Row, ...]
    pcm: Row | None
    combine: bool
    weights: Float32 | None
    weighed: int = -1
    tokens: list[int] = field(default_factory=list)
    outputs: list[TokenOutput] = field(default_factory=list)
    finished: bool = False
    rows: tuple[Row, ...] = ()
    keeps_weights: bool = False

    def __post_init__(self) -> None:
        self.rows = self.experts if self.pcm is None else (*self.experts, self.pcm)
        self.keeps_weights = self.submission.request.options.pcm_interval > 1

    @property
    def asks_pcm(self) -> bool:
        """Whether the next token takes new weights from the PCM; otherwise the last ones stay."""
        return len(self.tokens) % self.submission.request.options.pcm_interval == 0

    def due_rows(self) -> tuple[Row, ...]:
        """The rows that must have been read to the end before the next draw."""
        return self.rows if self.pcm is None or self.asks_pcm else self.experts

    def unread(self, row: Row) -> int:
        """Tokens that a row has yet to read."""
        return len(row.context) + len(self.tokens) - row.read

    def slice(self, row: Row, start: int, stop: int) -> list[int]:
        """Tokens [start, stop) of a row."""
        known = len(row.text)
        head: list[int] = row.text[start:stop].tolist() if start < known else []
        if stop <= known:
            return head
        length = len(row.context)
        return head + self.tokens[max(start, known) - length : stop - length]

    def restart(self) -> None:
        """Fix the texts that the rows are to read, as the sequence is admitted."""
        answer = np.array(self.tokens, dtype=np.int32)
        for row in self.rows:
            row.text = np.concatenate([row.context, answer]) if len(answer) else row.context
