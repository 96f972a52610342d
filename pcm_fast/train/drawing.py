"""Many requests through one engine, as many at a time as it runs."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from typing import Any, TypeVar

from pcm_fast.engine import Engine
from pcm_fast.generation import GenerateOutput

Name = TypeVar("Name")


def draw(
    engine: Engine, requests: Iterable[tuple[Name, Mapping[str, Any]]], most: int
) -> Generator[tuple[Name, GenerateOutput, bool], None, None]:
    """Results as they are finished, each with whether it ended by itself.

    Args:
        engine: runs them.
        requests: the keywords of ``add_request``, one row each, under any name; asked for as places are free.
        most: requests in the engine at once; more than run, so that none of its places stays empty.
    """
    waiting, running = iter(requests), dict[int, Name]()
    while True:
        while len(running) < most and (entry := next(waiting, None)) is not None:
            running[engine.add_request(**entry[1])] = entry[0]
        if not running:
            return
        for output in engine.step():
            if output.finish_reason is not None:
                name, finished = running.pop(output.request_id), output.finish_reason != "length"
                yield name, engine.result(output.request_id), finished


def answer_tokens(output: GenerateOutput) -> list[int]:
    """The ids of an answer, its end of sequence included."""
    length = int(output.lengths[0])
    start = output.sequences.shape[1] - output.logprobs.shape[1]
    return [int(index) for index in output.sequences[0][start : start + length]]
