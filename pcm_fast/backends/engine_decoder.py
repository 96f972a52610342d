"""``generate``, ``log_probs`` and engines for backends whose models run the steps of an engine."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from typing import Any, Protocol

import numpy as np

from pcm_fast.backends.scores import score
from pcm_fast.checkpoint import ModelConfig
from pcm_fast.engine import Engine
from pcm_fast.generation import GenerateOptions
from pcm_fast.kv_cache import BLOCK_SIZE
from pcm_fast.request import Request, prepare_request
from pcm_fast.runner import Runner, longest_rows
from pcm_fast.sequence import Reader
from pcm_fast.spec import ModelSpec
from pcm_fast.streaming import streaming
from pcm_fast.teacher_forcing import prepare_forced

# Of the engine behind generate.
MAX_BATCH = 32
PREFILL_CHUNK = 256
USUAL_BYTES = 256 << 20  # of its KV cache, unless one call needs more to run at once,
MOST_BYTES = 2 << 30  # which is granted up to here, and beyond for one sequence


class Model(Protocol):
    """A checkpoint and its adapters, ready to run."""

    @property
    def config(self) -> ModelConfig:
        """Its shape."""


class Models(Protocol):
    """The models of a mixture."""

    @property
    def models(self) -> Items[Model]:
        """One for each distinct checkpoint that anybody reads with."""

    @property
    def experts(self) -> tuple[Reader, ...]:
        """The reader of each of the K experts."""

    @property
    def pcm(self) -> Reader | None:
        """The reader of a learned PCM, None for another kind."""

    @property
    def kv_dtype(self) -> str:
        """What keys and values are kept in, "float32" or "bfloat16"."""

    def rows_of_model(self, model: int) -> int:
        """Rows that a sequence with all experts has on one of the models."""

    def kv_memory(self) -> int:
        """Bytes that the KV caches of an engine take at most unless somebody asks for more."""


MakeRunner = Callable[[Items[int], int], Runner]  # from the blocks of each model's KV cache, and sequences at once


class EngineDecoder:
    """A mixture whose every answer comes from an engine.

    Attributes:
        spec: the mixture.
        model: its models.
    """

    def __init__(self, spec: ModelSpec, models: Models, make_runner: MakeRunner) -> None:
        self.spec, self.model, self._make_runner = spec, models, make_runner
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
            blocks = self._within(wanted, self.model.kv_memory())
        return Engine(self.spec, self._make_runner(blocks, max_batch), max_batch, prefill_chunk)

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
        forced = prepare_forced(self.spec, input_ids, attention_mask, **options)
        return score(forced, self.model.experts, self.model.pcm, lambda blocks: self._make_runner(blocks, 1))

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
        return Engine(self.spec, self._make_runner(blocks, MAX_BATCH), MAX_BATCH, PREFILL_CHUNK), blocks

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
