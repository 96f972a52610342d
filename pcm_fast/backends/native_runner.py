"""Steps of an engine on C++ decoders: the KV caches of the models, and a plan as the arrays of one native call."""

from __future__ import annotations

import math
from collections.abc import Sequence as Items
from typing import Any

import numpy as np
import numpy.typing as npt

from pcm_fast import _native, ops
from pcm_fast.backends.native_models import NativeModels
from pcm_fast.kv_cache import KvCacheManager, KvStorage
from pcm_fast.sequence import Reader
from pcm_fast.step_plan import Reading, StepPlan

Float32 = npt.NDArray[np.float32]

BLOCK_SIZE = 16


class NativeRunner:
    """Runs the steps of one engine.

    Attributes:
        models: the models, shared with other engines.
        caches: the KV cache manager of each model.
        storages: the memory that it manages.
    """

    def __init__(self, models: NativeModels, kv_blocks: Items[int], max_batch: int) -> None:
        """Caches of kv_blocks[i] blocks of 16 tokens for model i, for max_batch sequences at once."""
        self.models = models
        self.caches: list[KvCacheManager] = []
        self.storages: list[KvStorage] = []
        for index, (model, blocks) in enumerate(zip(models.models, kv_blocks, strict=True)):
            config = model.config
            self.caches.append(
                KvCacheManager(
                    num_blocks=blocks,
                    block_size=BLOCK_SIZE,
                    max_rows=max(1, max_batch * models.rows_of_model(index)),
                    max_blocks_per_row=min(blocks, math.ceil(config.max_position_embeddings / BLOCK_SIZE)),
                )
            )
            self.storages.append(
                KvStorage(
                    num_layers=config.num_layers,
                    num_blocks=blocks,
                    num_kv_heads=config.num_kv_heads,
                    head_dim=config.head_dim,
                    block_size=BLOCK_SIZE,
                    dtype=models.kv_dtype,
                )
            )
        self._step = _native.MixtureStep(models.sampler)

    @property
    def num_threads(self) -> int:
        """Threads to compute on."""
        return self.models.num_threads

    @property
    def sampling_seconds(self) -> float:
        """Seconds spent in merging and drawing so far."""
        return self._step.seconds

    def expert(self, index: int) -> Reader:
        """Who reads for an expert."""
        return self.models.experts[index]

    @property
    def pcm(self) -> Reader | None:
        """Who reads for a learned PCM."""
        return self.models.pcm

    def reserve_positions(self, model: int, count: int) -> None:
        """Have a model ready for rows of so many tokens."""
        with self.models.lock:
            self.models.models[model].reserve_positions(count)

    def copy_blocks(self, model: int, copies: Items[tuple[int, int]]) -> None:
        """Copy blocks (from, to) of a model's cache."""
        for source, target in copies:
            self.storages[model].copy_block(source, target)

    def run(self, plan: StepPlan) -> StepArrays:
        """Run a step; its results are valid until the next."""
        if plan.prepared is None:
            plan.prepared = self._prepare(plan)
        else:
            places = plan.prepared.positions.data
            for s in range(len(plan.draws)):
                places[s] += 1
        arrays: StepArrays = plan.prepared
        for s in arrays.asked:
            sequence = plan.draws[s]
            arrays.weights[s, : len(sequence.experts)] = sequence.weights
        self.call(arrays)
        return arrays

    def call(self, arrays: StepArrays) -> None:
        """The native call itself."""
        with self.models.lock:
            arrays.statuses = self._step.run(*arrays.arguments)

    def passes(self, readings: Items[Reading]) -> list[_native.Pass]:
        """What the models read, as the native step takes it."""
        return [
            (
                self.models.models[reading.model].decoder,
                self.storages[reading.model],
                reading.tokens,
                reading.slots,
                reading.positions,
                reading.adapters,
                self.caches[reading.model].block_tables,
                reading.wanted,
            )
            for reading in readings
        ]

    def _prepare(self, plan: StepPlan) -> StepArrays:
        most = max((len(sequence.experts) for sequence in plan.draws), default=1)
        arrays = StepArrays(len(plan.draws), most)
        arrays.logits = [None] * len(plan.draws)
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
                arrays.logits[s] = np.empty((count, self.models.models[0].config.vocab_size), np.float32)
        arrays.close(self.passes(plan.readings), self.models.head)
        return arrays


class StepArrays:
    """The arguments and results of a native step; S counts sequences that are due a token, R experts of one of them.

    Attributes:
        hidden: [S, R, 2] int32, pass and index among its wanted of every expert's hidden state; -1 past the last one.
        weights: [S, R] float32, mixture weights, written by the step where there is a PCM.
        pcm: [S, 2] int32, likewise the state of the PCM; -1 where the weights are given.
        head_rows: [S, R] int32, which row of the PCM's head belongs to which expert.
        merge, exponent, combine, report: [S], how to merge, and whether expert_logprobs are wanted.
        greedy, temperature, top_k, top_p, min_p, seeds, sequences, positions: [S], how to draw.
        logits: for every sequence None, or [R, V] float32 to be filled in place of a draw.
        asked: the sequences whose weights are set before every step.
        tokens, logprobs: [S] int64 and float32; expert_logprobs: [S, R] float32; statuses: [S], 0 where all is well.
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

    def close(self, passes: list[_native.Pass], head: tuple[Float32, Float32] | None) -> None:
        """Put the arguments together; what the arrays hold may still change, but not which arrays they are."""
        draws = _native.Draws(
            self.greedy,
            self.temperature,
            self.top_k,
            self.top_p,
            self.min_p,
            self.seeds,
            self.sequences,
            self.positions,
            self.tokens,
            self.logprobs,
        )
        self.arguments = (
            passes,
            self.hidden,
            self.weights,
            self.pcm,
            head,
            self.head_rows,
            self.merge,
            self.exponent,
            self.combine,
            self.report,
            draws,
            self.expert_logprobs,
            self.logits,
        )
