"""Steps of an engine on C++ decoders: the KV caches of the models, and a plan as the arrays of one native call."""

from __future__ import annotations

from collections.abc import Sequence as Items

from pcm_fast import _native
from pcm_fast.backends.native_models import NativeModels
from pcm_fast.kv_cache import BLOCK_SIZE, KvCacheManager, KvStorage, managers
from pcm_fast.sequence import Reader
from pcm_fast.step_arrays import StepArrays
from pcm_fast.step_plan import Reading, StepPlan


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
        self.caches: list[KvCacheManager] = managers(
            (blocks, max_batch * models.rows_of_model(index), model.config.max_position_embeddings)
            for index, (model, blocks) in enumerate(zip(models.models, kv_blocks, strict=True))
        )
        self.storages: list[KvStorage] = [
            KvStorage(
                num_layers=model.config.num_layers,
                num_blocks=blocks,
                num_kv_heads=model.config.num_kv_heads,
                head_dim=model.config.head_dim,
                block_size=BLOCK_SIZE,
                dtype=models.kv_dtype,
            )
            for model, blocks in zip(models.models, kv_blocks, strict=True)
        ]
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
            plan.prepared = StepArrays.of(plan, self.models.models[0].config.vocab_size)
            self._close(plan.prepared, plan.readings)
        else:
            plan.prepared.repeat()
        arrays: StepArrays = plan.prepared
        arrays.ask(plan)
        self._call(arrays)
        return arrays

    def read(self, readings: Items[Reading], arrays: StepArrays) -> None:
        """Read, and fill the arrays' results."""
        self._close(arrays, readings)
        self._call(arrays)

    def _call(self, arrays: StepArrays) -> None:
        """The native call itself."""
        with self.models.lock:
            arrays.statuses = self._step.run(*arrays.arguments)

    def _close(self, arrays: StepArrays, readings: Items[Reading]) -> None:
        """Put the arguments of the native step together; what the arrays hold may still change, not which they are."""
        draws = _native.Draws(
            arrays.greedy,
            arrays.temperature,
            arrays.top_k,
            arrays.top_p,
            arrays.min_p,
            arrays.seeds,
            arrays.sequences,
            arrays.positions,
            arrays.tokens,
            arrays.logprobs,
        )
        arrays.arguments = (
            self._passes(readings),
            arrays.hidden,
            arrays.weights,
            arrays.pcm,
            self.models.head,
            arrays.head_rows,
            arrays.merge,
            arrays.exponent,
            arrays.combine,
            arrays.report,
            draws,
            arrays.expert_logprobs,
            arrays.logits,
        )

    def _passes(self, readings: Items[Reading]) -> list[_native.Pass]:
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
