"""The work of an engine, step by step, for one thread: plan, ask, run, draw, and what becomes of failures."""

from __future__ import annotations

import time
from collections.abc import Iterable

import numpy as np

from pcm_fast import python_draw
from pcm_fast.runner import Runner
from pcm_fast.scheduler import Scheduler
from pcm_fast.sequence import Sequence, TokenOutput
from pcm_fast.step_plan import StepPlan
from pcm_fast.submission import Submission

_STATUS = {1: "NaN or +inf among the experts' logits", 2: "no token left: all are excluded under these weights"}


class EngineCore:
    """Requests in, tokens out.

    Attributes:
        scheduler: who runs, and who waits.
        steps, tokens: how many were made so far.
    """

    def __init__(self, runner: Runner, max_batch: int, prefill_chunk: int) -> None:
        self._runner = runner
        self.scheduler = Scheduler(runner, max_batch, prefill_chunk)
        self.steps = self.tokens = 0

    def add(self, submission: Submission) -> None:
        """Put the sequences of a request into the queue."""
        for sequence in submission.sequences:
            self.scheduler.add(sequence)

    def remove(self, submission: Submission) -> None:
        """End a request, and free its rows."""
        submission.finished = True
        for sequence in submission.sequences:
            self.scheduler.remove(sequence)

    def step(self) -> list[TokenOutput]:
        """Make a step; returns the new tokens, and one output for each request that failed.

        What one request is to blame for fails that request alone. Any other exception fails all and is raised.
        """
        failures: list[TokenOutput] = []
        try:
            plan = self.scheduler.plan()
            while plan is not None and (failed := self._ask_callables(plan)):
                failures += failed
                plan = self.scheduler.plan()  # without them
            if plan is None:
                return failures
            results = self._runner.run(plan)
            self.scheduler.commit(plan)
        except BaseException as error:
            self._fail_all(error)
            raise
        self.steps += 1
        outputs: list[TokenOutput] = []
        now = time.perf_counter()
        tokens, logprobs, statuses = results.tokens.tolist(), results.logprobs.tolist(), results.statuses
        for s, sequence in enumerate(plan.draws):
            submission, count = sequence.submission, len(sequence.experts)
            if submission.finished:  # another of its sequences has failed
                continue
            token, logprob, expert_logprobs, stopped = tokens[s], logprobs[s], results.expert_logprobs[s, :count], False
            if submission.static_weights is None:
                sequence.weights = results.weights[s, :count]  # which the next step may overwrite
                if sequence.keeps_weights:
                    sequence.weights = sequence.weights.copy()
            try:
                if submission.draws_in_python:
                    logits = results.logits[s]
                    assert logits is not None
                    drawn = python_draw.draw(sequence, logits, self._runner.num_threads)
                    token, logprob, expert_logprobs, stopped = drawn
                elif statuses[s]:
                    place = f"row {sequence.index}, token {len(sequence.tokens)}"
                    raise ValueError(f"{place}: {_STATUS[statuses[s]]}")
            except Exception as error:
                failures.append(self._fail(submission, error))
                continue
            outputs.append(submission.accept(sequence, token, logprob, expert_logprobs, stopped, now))
            if sequence.finished:
                self.scheduler.remove(sequence)
                submission.finished = all(other.finished for other in submission.sequences)
        self.tokens += len(outputs)
        return outputs + failures

    def _ask_callables(self, plan: StepPlan) -> list[TokenOutput]:
        """Have callable PCMs weigh the experts of those that draw; returns what came of requests that failed."""
        failures = []
        for sequence in plan.callables:
            submission, mixture = sequence.submission, sequence.submission.request.mixture
            if submission.finished or not sequence.asks_pcm or sequence.weighed == len(sequence.tokens):
                continue
            prompt, answer = submission.request.batch.rows[sequence.index], np.array(sequence.tokens, dtype=np.int64)
            try:
                weights = mixture.step_weights((prompt,), [answer], None, rows=(sequence.index,))
            except Exception as error:
                failures.append(self._fail(submission, error))
                continue
            sequence.weights, sequence.weighed = weights[0, list(mixture.running)], len(sequence.tokens)
        return failures

    def _fail(self, submission: Submission, error: BaseException) -> TokenOutput:
        output = submission.failure(error)
        self.remove(submission)
        return output

    def _fail_all(self, error: BaseException) -> None:
        sequences: Iterable[Sequence] = (*self.scheduler.running, *self.scheduler.waiting)
        for submission in {id(sequence.submission): sequence.submission for sequence in sequences}.values():
            self._fail(submission, error)
