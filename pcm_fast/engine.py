"""The engine: requests come in at any time, and every step gives a token to each sequence that is due one."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import Any

from pcm_fast.engine_core import EngineCore
from pcm_fast.generation import GenerateOptions
from pcm_fast.request import Request, prepare_request
from pcm_fast.runner import Runner, longest_rows
from pcm_fast.sequence import TokenOutput
from pcm_fast.spec import ModelSpec
from pcm_fast.submission import Submission, make_sequences

__all__ = ["KEPT_RESULTS", "Engine", "TokenOutput"]

KEPT_RESULTS = 1024  # finished requests whose results wait to be taken; beyond them the oldest are dropped
_NOT_HERE = {
    "streamer": "use engine.stream",
    "return_dict_in_generate": "engine.result returns a GenerateOutput in any case",
}


class Engine:
    """Continuous batching over requests with different prompts, preferences, experts, merge rules and sampling.

    A request is what ``MixtureModel.generate`` takes; each row of its batch is one sequence. ``add_request`` puts it
    into the queue, ``step`` gives the next token to every sequence that is due one, ``result`` returns the whole. The
    tokens of a request are the same whatever else the engine does at the time, and a request that fails (a callable
    that raises, NaN logits) takes nothing else with it.

    Any thread may call any method: steps take turns. ``step``, ``stream`` and ``astream`` may be mixed; whoever needs a
    token that is not there yet makes the next step for all.

    ``MixtureModel.engine`` makes one.
    """

    def __init__(self, spec: ModelSpec, runner: Runner, max_batch: int, prefill_chunk: int) -> None:
        """An engine for a mixture; see ``MixtureModel.engine`` for the numbers."""
        self._spec, self._runner = spec, runner
        self._core = EngineCore(runner, max_batch, prefill_chunk)
        self._submissions: dict[int, Submission] = {}  # all whose result was not taken
        self._finished: deque[int] = deque()
        self._arrivals: deque[Submission] = deque()
        self._aborted: deque[Submission] = deque()
        self._next_id = self._next_order = 0
        self._registry = threading.Lock()  # of ids and arrivals, never held for long
        self._turn = threading.RLock()  # of the core
        self._stepping = False
        self._task: asyncio.Task[list[TokenOutput]] | None = None

    # --- Requests.

    def add_request(
        self, input_ids: Any, attention_mask: Any = None, *, expert_logprobs: bool = False, **options: Any
    ) -> int:
        """Put a request into the queue.

        Args:
            input_ids: [B, L] token ids, as ``MixtureModel.generate`` takes them.
            attention_mask: [B, L], likewise.
            expert_logprobs: report log p_i of every token. Under ``merge="log_linear"`` that costs more than the token
                itself.
            options: further keywords of ``generate``, less ``streamer`` and ``return_dict_in_generate``.

        Returns:
            The id of the request.

        Raises:
            TypeError, ValueError: the message names the argument, what was expected and what came. Also if one sequence
                alone is too long for the KV cache.
        """
        for name in options:
            if name in _NOT_HERE or name not in GenerateOptions.__dataclass_fields__:
                instead = f"; {_NOT_HERE[name]}" if name in _NOT_HERE else ""
                raise TypeError(f"add_request() got an unexpected keyword argument {name!r}{instead}")
        if not isinstance(expert_logprobs, bool):
            raise TypeError(f"expert_logprobs: expected a bool, got {expert_logprobs!r}")
        checked = GenerateOptions(**options, return_dict_in_generate=True)
        return self.add(prepare_request(self._spec, input_ids, attention_mask, checked), expert_logprobs)

    def add(self, request: Request, report: bool) -> int:
        """``add_request`` for a request that is prepared; report: whether expert_logprobs are wanted."""
        experts = [self._runner.expert(i) for i in range(len(self._spec.experts))]
        caches = self._runner.caches
        tokens, blocks, _ = longest_rows(request, experts, self._runner.pcm, caches[0].block_size)
        for model, count in blocks.items():
            if count > caches[model].num_blocks:
                raise ValueError(
                    f"max_new_tokens: a sequence of this request may need {count} blocks of the KV cache, and it has "
                    f"{caches[model].num_blocks}; expected fewer tokens, or an engine with kv_blocks={count}"
                )
        for model, count in tokens.items():
            self._runner.reserve_positions(model, count)
        with self._registry:
            submission = Submission(self._next_id, request, report)
            submission.sequences = make_sequences(submission, experts, self._runner.pcm, self._next_order)
            self._next_id += 1
            self._next_order += len(submission.sequences)
            self._submissions[submission.id] = submission
            self._arrivals.append(submission)
        return submission.id

    def abort(self, request_id: int) -> bool:
        """End a request, wherever it is, and forget it.

        Its rows of the KV cache are free when this returns; if another thread is making a step, when that ends.

        Returns:
            Whether it was there: False if it was aborted before, or its result was taken.

        Raises:
            ValueError: no request ever had this id.
        """
        submission = self._submissions.get(request_id)
        if submission is None:
            if not isinstance(request_id, int) or not 0 <= request_id < self._next_id:
                raise ValueError(f"request_id: expected the id of a request of this engine, got {request_id!r}")
            return False
        self._abort(submission)
        return True

    def is_finished(self, request_id: int) -> bool:
        """Whether nothing more happens to a request: all of its tokens are there, or it failed."""
        return self._submission(request_id).finished

    def result(self, request_id: int) -> Any:
        """The ``GenerateOutput`` of a finished request, which is then forgotten.

        ``expert_logprobs`` is NaN where ``add_request`` was not asked for it.

        Raises:
            ValueError: there is no such request, or it is not finished.
            Exception: whatever made the request fail.
        """
        submission = self._submission(request_id)
        if not submission.finished:
            raise ValueError(f"request_id: expected a finished request, and {request_id} is not")
        self._submissions.pop(request_id, None)
        if submission.error is not None:
            raise submission.error
        return submission.result()

    @property
    def has_unfinished(self) -> bool:
        """Whether there is anything to do for a step."""
        scheduler = self._core.scheduler
        return bool(self._arrivals or scheduler.running or scheduler.waiting)

    def stats(self) -> dict[str, int]:
        """Steps, tokens and preemptions so far; running and waiting sequences; the KV caches (see csrc/kv_cache.h)."""
        scheduler = self._core.scheduler
        counts = {
            "steps": self._core.steps,
            "tokens": self._core.tokens,
            "preemptions": scheduler.preemptions,
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting) + sum(len(arrived.sequences) for arrived in self._arrivals),
        }
        for cache in self._runner.caches:
            for name, value in cache.stats().items():
                counts[name] = counts.get(name, 0) + value
        return counts

    # --- Steps.

    def step(self) -> list[TokenOutput]:
        """Read on, and draw for every sequence that has read all it has to.

        Returns:
            The new tokens, none while prompts are being read; and for every request that failed one output whose
            finish_reason is "error": ``result`` raises what happened.

        Raises:
            RuntimeError: called from inside of a step, say by a callable PCM.
        """
        with self._turn:
            if self._stepping:
                raise RuntimeError("engine: step was called from inside of a step")
            self._stepping = True
            try:
                while self._arrivals:
                    if not self._arrivals[0].finished:
                        self._core.add(self._arrivals[0])
                    self._arrivals.popleft()
                outputs = self._core.step()
                self._keep(outputs)
            finally:
                self._stepping = False
        self._free_aborted()
        return outputs

    def stream(self, request_id: int) -> Iterator[TokenOutput]:
        """The tokens of a request as they are made, from its first one on; makes the steps that this takes.

        An iterator that is closed early aborts its request. What makes the request fail is raised.
        """
        return self._stream(self._submission(request_id))

    def _stream(self, submission: Submission) -> Iterator[TokenOutput]:
        seen = 0
        try:
            while True:
                finished = submission.finished
                while seen < len(submission.outputs):
                    seen += 1
                    yield submission.outputs[seen - 1]
                if finished:
                    break
                with self._turn:
                    if not submission.finished and len(submission.outputs) == seen:
                        self.step()
        finally:
            self._abort_unfinished(submission)
        if submission.error is not None:
            raise submission.error

    def astream(self, request_id: int) -> AsyncIterator[TokenOutput]:
        """``stream`` for asyncio. Steps are made in a thread, one after the other for all that stream at the time.

        A consumer that is cancelled, or closed early, aborts its request.
        """
        return self._astream(self._submission(request_id))

    async def _astream(self, submission: Submission) -> AsyncIterator[TokenOutput]:
        seen = 0
        try:
            while True:
                finished = submission.finished
                while seen < len(submission.outputs):
                    seen += 1
                    yield submission.outputs[seen - 1]
                if finished:
                    break
                await self._shared_step()
        finally:
            self._abort_unfinished(submission)
        if submission.error is not None:
            raise submission.error

    async def _shared_step(self) -> None:
        task, loop = self._task, asyncio.get_running_loop()
        if task is None or task.done() or task.get_loop() is not loop:
            task = self._task = loop.create_task(asyncio.to_thread(self.step))
        await asyncio.shield(task)  # a consumer that is cancelled takes no step from the others

    # --- What has ended.

    def _abort_unfinished(self, submission: Submission) -> None:
        if not submission.finished:
            self._abort(submission)

    def _abort(self, submission: Submission) -> None:
        self._submissions.pop(submission.id, None)
        self._aborted.append(submission)
        self._free_aborted()

    def _free_aborted(self) -> None:
        """Free the rows of aborted requests, unless a step is being made: whoever makes it does this at its end."""
        while self._aborted and self._turn.acquire(blocking=False):
            try:
                if self._stepping:
                    return
                self._core.remove(self._aborted.popleft())
            finally:
                self._turn.release()

    def _keep(self, outputs: list[TokenOutput]) -> None:
        """Note which requests these outputs end; results that nobody takes are not kept for ever."""
        for output in outputs:
            if output.finish_reason is None:
                continue
            submission = self._submissions.get(output.request_id)
            if submission is not None and submission.finished:
                self._finished.append(output.request_id)
        while len(self._finished) > KEPT_RESULTS:
            self._submissions.pop(self._finished.popleft(), None)

    def _submission(self, request_id: int) -> Submission:
        submission = self._submissions.get(request_id)
        if submission is None:
            raise ValueError(
                "request_id: expected the id of a request that was not aborted and whose result was not taken, "
                f"got {request_id!r}"
            )
        return submission
