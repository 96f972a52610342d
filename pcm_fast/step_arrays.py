"""What a step of an engine asks of a backend, and gives, as arrays: one entry for each sequence that is due a token."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pcm_fast import ops
from pcm_fast.step_plan import StepPlan

Float32 = npt.NDArray[np.float32]


class StepArrays:
    """The arguments and results of a step; S counts sequences that are due a token, R experts of one of them.

    Attributes:
        hidden: [S, R, 2] int32, reading and index among its wanted of every expert's hidden state; -1 past the last
            one.
        weights: [S, R] float32, mixture weights, written by the step where there is a PCM.
        pcm: [S, 2] int32, likewise the state of the PCM; -1 where the weights are given.
        head_rows: [S, R] int32, which row of the PCM's head belongs to which expert.
        merge, exponent, combine, report: [S], how to merge, and whether expert_logprobs are wanted.
        greedy, temperature, top_k, top_p, min_p, seeds, sequences, positions: [S], how to draw.
        logits: for every sequence None, or [R, V] float32 to be filled in place of a draw.
        asked: the sequences whose weights are set before every step.
        tokens, logprobs: [S] int64 and float32; expert_logprobs: [S, R] float32; statuses: [S], 0 where all is well.
        arguments: what the runner keeps with them.
    """

    def __init__(self, count: int, experts: int) -> None:
        self.hidden = np.full((count, experts, 2), -1, np.int32)
        self.weights = np.zeros((count, experts), np.float32)
        self.pcm = np.full((count, 2), -1, np.int32)
        self.head_rows = np.zeros((count, experts), np.int32)
        self.merge = np.zeros(count, np.int32)
        self.exponent = np.ones(count, np.float32)
        self.combine = np.zeros(count, np.bool_)
        self.report = np.zeros(count, np.bool_)
        self.greedy = np.zeros(count, np.bool_)
        self.temperature = np.ones(count, np.float32)
        self.top_k = np.zeros(count, np.int64)
        self.top_p = np.ones(count, np.float64)
        self.min_p = np.zeros(count, np.float64)
        self.seeds = np.zeros(count, np.uint64)
        self.sequences = np.zeros(count, np.uint64)
        self.positions = np.zeros(count, np.uint64)
        self.tokens = np.zeros(count, np.int64)
        self.logprobs = np.zeros(count, np.float32)
        self.expert_logprobs = np.full((count, experts), np.nan, np.float32)
        self.logits: list[Float32 | None] = [None] * count
        self.asked: list[int] = []
        self.statuses: list[int] = []
        self.arguments: tuple[Any, ...] = ()

    @staticmethod
    def of(plan: StepPlan, vocabulary: int) -> StepArrays:
        """The arrays of a plan, for V tokens."""
        arrays = StepArrays(len(plan.draws), max((len(sequence.experts) for sequence in plan.draws), default=1))
        for s, (sequence, states) in enumerate(zip(plan.draws, plan.states, strict=True)):
            mixture, options = sequence.submission.request.mixture, sequence.submission.request.options
            count = len(sequence.experts)
            arrays.hidden[s, :count] = states[:count]
            if len(states) > count:
                arrays.pcm[s] = states[count]
                arrays.head_rows[s, :count] = mixture.running
            elif mixture.weights is not None:
                arrays.weights[s, :count] = sequence.weights
            else:
                arrays.asked.append(s)
            arrays.merge[s] = ops.MERGES[mixture.rule.kind]
            arrays.exponent[s] = mixture.rule.exponent
            arrays.combine[s] = sequence.combine
            arrays.report[s] = sequence.submission.report
            params = options.sampling
            arrays.greedy[s] = params.greedy
            arrays.temperature[s] = params.temperature
            arrays.top_k[s] = params.top_k
            arrays.top_p[s] = params.top_p
            arrays.min_p[s] = params.min_p
            arrays.seeds[s] = params.seed
            arrays.sequences[s] = options.first_sequence + sequence.index
            arrays.positions[s] = len(sequence.tokens)
            if sequence.submission.draws_in_python:
                arrays.logits[s] = np.empty((count, vocabulary), np.float32)
        return arrays

    def repeat(self) -> None:
        """The step of a steady plan becomes the next one."""
        places = self.positions.data  # item by item: see StepPlan.repeat
        for s in range(len(self.tokens)):
            places[s] += 1

    def ask(self, plan: StepPlan) -> None:
        """Take the weights that callable PCMs have just given."""
        for s in self.asked:
            sequence = plan.draws[s]
            self.weights[s, : len(sequence.experts)] = sequence.weights
