"""What an engine asks of a backend: KV caches, and steps."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Protocol

from pcm_fast.kv_cache import KvCacheManager
from pcm_fast.request import Request
from pcm_fast.sequence import Reader
from pcm_fast.step_arrays import StepArrays
from pcm_fast.step_plan import Reading, StepPlan


class Runner(Protocol):
    """What runs the steps of an engine."""

    @property
    def caches(self) -> Items[KvCacheManager]:
        """The KV cache of each model."""

    @property
    def num_threads(self) -> int:
        """Threads to compute on."""

    def expert(self, index: int) -> Reader:
        """Who reads for an expert."""

    @property
    def pcm(self) -> Reader | None:
        """Who reads for a learned PCM; None for another kind."""

    def reserve_positions(self, model: int, count: int) -> None:
        """Have a model ready for rows of so many tokens."""

    def copy_blocks(self, model: int, copies: Items[tuple[int, int]]) -> None:
        """Copy blocks (from, to) of a model's cache, before anything else is written there."""

    def run(self, plan: StepPlan) -> StepArrays:
        """Run a step; its results are valid until the next."""

    def read(self, readings: Items[Reading], arrays: StepArrays) -> None:
        """Run a step that no scheduler has planned, and fill the results of its arrays."""


def longest_rows(
    request: Request, experts: Items[Reader], pcm: Reader | None, block_size: int
) -> tuple[dict[int, int], dict[int, int], int]:
    """What a request asks of the models it runs on, by their index.

    Returns:
        Tokens of the longest row on each model; blocks of the largest sequence on each model; and sequences.
    """
    readers = [(experts[i], request.contexts[i]) for i in request.mixture.running]
    if request.pcm_contexts is not None:
        assert pcm is not None
        readers.append((pcm, request.pcm_contexts))
    more = request.options.max_new_tokens - 1  # the last token is read by nobody
    tokens: dict[int, int] = {}
    blocks: dict[int, int] = {}
    for b in range(len(request.batch.rows)):
        mine: dict[int, int] = {}
        for reader, rows in readers:
            length = len(rows[b]) + more
            tokens[reader.model] = max(tokens.get(reader.model, 0), length)
            mine[reader.model] = mine.get(reader.model, 0) + -(-length // block_size)
        for model, count in mine.items():
            blocks[model] = max(blocks.get(model, 0), count)
    return tokens, blocks, len(request.batch.rows)
