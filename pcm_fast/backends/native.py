"""The mixture on C++ decoders: the experts and the PCM are rows of one pass over one set of weights a token."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from pcm_fast.backends.native_models import NativeModels
from pcm_fast.backends.native_runner import BLOCK_SIZE, NativeRunner
from pcm_fast.backends.native_scores import score
from pcm_fast.engine import Engine
from pcm_fast.generation import GenerateOptions
from pcm_fast.request import Request, prepare_request
from pcm_fast.runner import longest_rows
from pcm_fast.spec import ModelSpec
from pcm_fast.streaming import streaming
from pcm_fast.teacher_forcing import prepare_forced

# Of the engine behind generate.
MAX_BATCH = 32
PREFILL_CHUNK = 256
USUAL_BYTES = 256 << 20  # of its KV cache, unless one call needs more to run at once,
MOST_BYTES = 2 << 30  # which is granted up to here, and beyond for one sequence


class NativeDecoder:
    """A mixture on C++ decoders.

    Attributes:
        spec: the mixture.
        model: its models.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: str = "auto",
        num_threads: int | None = None,
        kv_dtype: str = "float32",
        activations: str = "float32",
    ) -> None:
        self.spec = spec
        self.model = NativeModels(spec, weights, num_threads, kv_dtype, activations)
        self._engine: tuple[Engine, list[int]] | None = None  # and the blocks of its caches
        self._turn = threading.RLock()  # of that engine
        self._busy = False

    def engine(self, max_batch: int, kv_blocks: int | None, prefill_chunk: int) -> Engine:
        """See ``MixtureModel.engine``."""
        models = range(len(self.model.models))
        if kv_blocks is not None:
            blocks = [kv_blocks for _ in models]
        else:
            wanted = [max(1, max_batch * self.model.rows_of_model(i)) * 1024 // BLOCK_SIZE for i in models]
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            blocks = self._within(wanted, memory // 4)
        return Engine(self.spec, NativeRunner(self.model, blocks, max_batch), max_batch, prefill_chunk)

    def generate(self, input_ids: Any, attention_mask: Any, options: GenerateOptions) -> Any:
        """See ``MixtureModel.generate``."""
        request = prepare_request(self.spec, input_ids, attention_mask, options)
        with self._engine_for(request) as engine:
            request_id = engine.add(request, report=options.return_dict_in_generate)
            try:
                with streaming(options.streamer, request.batch.input_ids) as stream:
                    while not engine.is_finished(request_id):
                        for output in engine.step():
                            if output.finish_reason != "error":
                                stream(np.array([output.token]))
                return engine.result(request_id)
            finally:
                engine.abort(request_id)

    def log_probs(self, input_ids: Any, attention_mask: Any = None, **options: Any) -> Any:
        """See ``MixtureModel.log_probs``."""
        return score(self.model, prepare_forced(self.spec, input_ids, attention_mask, **options))

    @contextlib.contextmanager
    def _engine_for(self, request: Request) -> Iterator[Engine]:
        """An engine that has room for a request, for this thread alone.

        It is the same one from call to call, so that it finds the prompts of earlier calls in its cache, as long as it
        is large enough. A call from inside of another, say by a callable PCM, gets one of its own.
        """
        with self._turn:
            if self._busy:
                yield self._make(self._blocks_for(request))[0]
                return
            blocks = self._blocks_for(request)
            if self._engine is None or any(a < b for a, b in zip(self._engine[1], blocks, strict=True)):
                self._engine = None  # its memory goes first
                self._engine = self._make(blocks)
            self._busy = True
            try:
                yield self._engine[0]
            except Exception:
                raise
            except BaseException:  # interrupted anywhere
                self._engine = None
                raise
            finally:
                self._busy = False

    def _make(self, blocks: list[int]) -> tuple[Engine, list[int]]:
        return Engine(self.spec, NativeRunner(self.model, blocks, MAX_BATCH), MAX_BATCH, PREFILL_CHUNK), blocks

    def _blocks_for(self, request: Request) -> list[int]:
        """Blocks for each model: what is usual, or enough for the request to run at once if that is not too much."""
        models = range(len(self.model.models))
        _, one, rows = longest_rows(request, self.model.experts, self.model.pcm, BLOCK_SIZE)
        usual = self._within([1 << 30 for _ in models], USUAL_BYTES)
        whole = self._within([(one.get(i, 0) + 1) * min(rows, MAX_BATCH) for i in models], MOST_BYTES)
        return [max(1, usual[i], whole[i], one.get(i, 0)) for i in models]

    def _within(self, blocks: list[int], num_bytes: int) -> list[int]:
        """The blocks wanted for each model, fewer where all of them together would take more than num_bytes."""
        sizes = []
        for model in self.model.models:
            config = model.config
            item = 4 if self.model.kv_dtype == "float32" else 2
            sizes.append(config.num_layers * 2 * config.num_kv_heads * config.head_dim * BLOCK_SIZE * item)
        share = num_bytes // len(sizes)
        return [max(1, min(count, share // size)) for count, size in zip(blocks, sizes, strict=True)]
