"""Teacher forcing on an engine's models: text that is given is read position by position, all but the draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from pcm_fast import ops
from pcm_fast.kv_cache import BLOCK_SIZE
from pcm_fast.runner import Runner
from pcm_fast.sequence import Reader, Row
from pcm_fast.step_arrays import StepArrays
from pcm_fast.step_plan import Reading
from pcm_fast.teacher_forcing import ForcedRequest

Float32 = npt.NDArray[np.float32]

PREFILL_CHUNK = 256  # row-tokens in one pass over the weights
POSITIONS_AT_ONCE = 32  # whose logits are held at a time


MakeRunner = Callable[[list[int]], Runner]  # from the blocks that each model's cache needs


def score(forced: ForcedRequest, experts: tuple[Reader, ...], pcm: Reader | None, make_runner: MakeRunner) -> Any:
    """See ``MixtureModel.log_probs``; the readers are those of the models that the runner has."""
    output = forced.empty_output()  # [B, T, V]
    readers = [(experts[i], forced.contexts[i]) for i in forced.mixture.running]
    if forced.pcm_contexts is not None:
        assert pcm is not None
        readers.append((pcm, forced.pcm_contexts))
    # Room for the longest text, and as much again for prompts that may come back.
    texts_kept = min(2, len(output))
    blocks = [2] * (1 + max(reader.model for reader in (*experts, *(() if pcm is None else (pcm,)))))
    for reader, contexts in readers:
        blocks[reader.model] += texts_kept * math.ceil(max(map(len, contexts)) / BLOCK_SIZE)
    runner = make_runner(blocks)
    for b in range(len(output)):
        length = forced.num_positions(b)
        texts = [contexts[b].astype(np.int32) for _, contexts in readers]
        rows = [Row(reader, text, text) for (reader, _), text in zip(readers, texts, strict=True)]
        for start, log_p in _Text(forced, b, rows, runner).log_probs(length):
            first = output.shape[1] - length + start
            output[b, first : first + len(log_p)] = log_p
    return forced.result(output)


class _Text:
    """One row of the text, as all of its readers read it."""

    def __init__(self, forced: ForcedRequest, index: int, rows: list[Row], runner: Runner) -> None:
        self._forced, self._index, self._rows, self._runner = forced, index, rows, runner

    def log_probs(self, length: int) -> Iterator[tuple[int, Float32]]:
        """Merged log-probabilities [n, V] of the last `length` positions, n at a time, each with where it starts."""
        forced, mixture, threads = self._forced, self._forced.mixture, self._runner.num_threads
        running = list(mixture.running)
        given = None
        if forced.pcm_contexts is None:
            given = forced.position_weights(self._index, None)[:, running]
        for row in self._rows:
            self._begin(row, len(row.text) - length)
        logits = np.empty((min(POSITIONS_AT_ONCE, length), len(running), forced.vocab_size), np.float32)
        for start in range(0, length, POSITIONS_AT_ONCE):
            count = min(POSITIONS_AT_ONCE, length - start)
            arrays = StepArrays(count, len(running))
            arrays.logits = list(logits[:count])
            if given is not None:
                arrays.weights[:] = given[start : start + count]
            else:
                arrays.head_rows[:] = running
            self._read([(row, count) for row in self._rows], arrays, count)
            yield (
                start,
                ops.merge_log_probs(logits[:count], arrays.weights, merge=mixture.rule, num_threads=threads),
            )
        for row in self._rows:
            self._runner.caches[row.reader.model].free(row.slot)

    def _begin(self, row: Row, count: int) -> None:
        """Have the first `count` tokens of a row read, those that an earlier row left in the cache aside."""
        cache = self._runner.caches[row.reader.model]
        row.slot = cache.create_row(row.reader.namespace, row.text[: count + 1])  # less than it is given is reused
        row.read = cache.length(row.slot)
        cache.append_slots(row.slot, len(row.text) - row.read)
        self._runner.reserve_positions(row.reader.model, len(row.text))
        while row.read < count:
            self._read([(row, min(count - row.read, PREFILL_CHUNK))], StepArrays(0, 1), 0)

    def _read(self, reads: list[tuple[Row, int]], arrays: StepArrays, wanted: int) -> None:
        """Let rows read on; the states of the last `wanted` tokens of each, experts first, go into the arrays."""
        readings: dict[int, Reading] = {}
        places = []
        for row, count in reads:
            reading = readings.setdefault(row.reader.model, Reading(row.reader.model))
            first = reading.add(row, row.text[row.read : row.read + count].tolist(), wanted)
            places.append((list(readings).index(row.reader.model), first))
        for reading in readings.values():
            reading.close()
        experts = arrays.hidden.shape[1]
        for i, (index, first) in enumerate(places if wanted else ()):
            target = arrays.hidden[:, i] if i < experts else arrays.pcm
            target[:, 0], target[:, 1] = index, np.arange(first, first + wanted)
        self._runner.read(list(readings.values()), arrays)
        for reading in readings.values():
            for row, start, count in reading.spans:
                self._runner.caches[reading.model].commit(row.slot, reading.tokens[start : start + count])
                row.read += count
