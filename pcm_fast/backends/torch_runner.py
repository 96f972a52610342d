"""Steps of an engine on torch: decode steps on static buffers, as CUDA graphs where possible; others as they are."""

from __future__ import annotations

import logging
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch

from pcm_fast.backends import torch_mixed
from pcm_fast.backends.torch_graphs import CudaGraphs, DecodeGraphs, GraphApi
from pcm_fast.backends.torch_kv import DeviceKv
from pcm_fast.backends.torch_models import TorchModels
from pcm_fast.backends.torch_step import StepBuffers, StepShape, decode_step
from pcm_fast.kv_cache import KvCacheManager, managers
from pcm_fast.sequence import Reader
from pcm_fast.step_arrays import StepArrays
from pcm_fast.step_plan import Reading, StepPlan

LOGGER = logging.getLogger(__name__)


@dataclass(slots=True)
class Prepared:
    """What is kept with a plan while it is repeated.

    Attributes:
        arrays: arguments and results.
        buffers: of a decode step; None for another.
        extensions: those of the plan that the buffers know of.
    """

    arrays: StepArrays
    buffers: StepBuffers | None
    extensions: int


class TorchRunner:
    """Runs the steps of one engine.

    Attributes:
        models: the models, shared with other engines.
        caches: the KV cache manager of each model.
        kv: the memory that it manages.
        graphs: captured decode steps; None on the CPU, and after a capture has failed.
    """

    def __init__(
        self, models: TorchModels, kv_blocks: Items[int], max_batch: int, graph_api: GraphApi | None = None
    ) -> None:
        """Caches of kv_blocks[i] blocks for model i, for max_batch sequences at once; graph_api: by default CUDA's."""
        self.models = models
        self.caches: list[KvCacheManager] = managers(
            (blocks, max_batch * models.rows_of_model(index), model.config.max_position_embeddings)
            for index, (model, blocks) in enumerate(zip(models.models, kv_blocks, strict=True))
        )
        self._noted: set[str] = set()
        self._on_gpu = models.device.type == "cuda"
        dtype = torch.float32 if models.kv_dtype == "float32" else torch.bfloat16
        with models.running():
            self.kv = [
                DeviceKv(model.config, blocks, dtype, models.device)
                for model, blocks in zip(models.models, kv_blocks, strict=True)
            ]
            if graph_api is None and models.device.type == "cuda":
                graph_api = CudaGraphs(models.device)
        self.graphs: DecodeGraphs | None = None
        if graph_api is not None:
            self.graphs = DecodeGraphs(graph_api, self._make_buffers, self._decode, _buckets(max_batch))

    @property
    def num_threads(self) -> int:
        """Threads that the host computes on."""
        return self.models.num_threads

    def expert(self, index: int) -> Reader:
        """Who reads for an expert."""
        return self.models.experts[index]

    @property
    def pcm(self) -> Reader | None:
        """Who reads for a learned PCM."""
        return self.models.pcm

    def reserve_positions(self, model: int, count: int) -> None:
        """Nothing to do: rotary factors are computed in every step."""

    def copy_blocks(self, model: int, copies: Items[tuple[int, int]]) -> None:
        """Copy blocks (from, to) of a model's cache."""
        with self.models.running():
            self.kv[model].copy_blocks(copies)

    def run(self, plan: StepPlan) -> StepArrays:
        """Run a step; its results are valid until the next."""
        with self.models.running():
            if plan.prepared is None:
                plan.prepared = self._prepare(plan)
            else:
                plan.prepared.arrays.repeat()
            prepared: Prepared = plan.prepared
            arrays, buffers = prepared.arrays, prepared.buffers
            arrays.ask(plan)
            if buffers is None:
                torch_mixed.read(self.models, self.caches, self.kv, plan.readings, arrays)
                return arrays
            if prepared.extensions != plan.extensions:
                buffers.update_tables(plan, self.caches)
                prepared.extensions = plan.extensions
            self._launch(buffers)
            buffers.take(arrays)
            return arrays

    def read(self, readings: Items[Reading], arrays: StepArrays) -> None:
        """Run a step that no scheduler has planned, and fill the results of its arrays."""
        with self.models.running():
            torch_mixed.read(self.models, self.caches, self.kv, readings, arrays)

    def _prepare(self, plan: StepPlan) -> Prepared:
        arrays = StepArrays.of(plan, self.models.vocab_size)
        reason = _reason_against_buffers(plan, arrays)
        if reason is not None:
            self._note(reason)
        if reason is not None or not plan.steady:
            return Prepared(arrays, None, plan.extensions)
        shape = StepShape.of(plan, arrays, len(self.models.models))
        if self.graphs is not None:
            buffers = self.graphs.buffers(shape, len(plan.draws))
        else:
            buffers = self._make_buffers(shape, len(plan.draws))
        buffers.fill(plan, arrays, self.caches)
        return Prepared(arrays, buffers, plan.extensions)

    def _launch(self, buffers: StepBuffers) -> None:
        """The decode step, replayed where that is possible."""
        if self.graphs is not None:
            try:
                self.graphs.run(buffers)
                return
            except (RuntimeError, ValueError) as error:  # ValueError: it is larger than the budget
                self.graphs = None
                self._note(f"no graph could be captured ({error})")
        self._decode(buffers)

    def _decode(self, buffers: StepBuffers) -> None:
        decode_step(self.models, self.kv, buffers)

    def _make_buffers(self, shape: StepShape, bucket: int) -> StepBuffers:
        return StepBuffers(shape, bucket, self.models, max(cache.max_blocks_per_row for cache in self.caches))

    def _note(self, reason: str) -> None:
        """Say once why steps are launched operator by operator."""
        if self._on_gpu and reason not in self._noted:
            self._noted.add(reason)
            LOGGER.warning("decode steps run without a CUDA graph: %s", reason)


def _reason_against_buffers(plan: StepPlan, arrays: StepArrays) -> str | None:
    """Why a step that only decodes cannot run on static buffers; None if it can, or if it reads prompts."""
    if plan.callables:
        return "a callable PCM is asked before every token"
    if any(logits is not None for logits in arrays.logits):
        return "processors or criteria see log p before the draw"
    if any(sequence.keeps_weights and sequence.pcm is not None for sequence in plan.draws):
        return "a PCM that is asked every few tokens only reads more than one token at a time"
    if len({*zip(arrays.merge.tolist(), arrays.exponent.tolist(), strict=True)}) > 1:
        return "sequences with different merge rules"
    return None


def _buckets(max_batch: int) -> list[int]:
    """Batch sizes that graphs are captured for: powers of two to 8, then multiples of 8."""
    sizes = [1, 2, 4, *range(8, max_batch, 8)]
    return [size for size in sizes if size < max_batch] + [max_batch]
