"""Many requests at once: seconds a step by the number of live requests."""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from decode_mixture import Prompts
from decode_native import DRAW

from pcm_fast.model import MixtureModel
from pcm_fast.spec import ModelSpec

EXPERTS_EACH = 3
ROOM = 1024  # tokens a request may get: the first ones answer on while the prompts of the last are read


@dataclass(frozen=True)
class Request:
    """One user: a prompt, and the experts that answer it."""

    prompt: list[int]
    active: tuple[str, ...]


class ConcurrentRequests:
    """Requests with different experts on one native model."""

    def __init__(self, spec: ModelSpec, prompts: Prompts, sizes: Sequence[int], tokens: int, threads: int) -> None:
        """Batches of these sizes, `tokens` steps in each."""
        self._model = MixtureModel(spec, backend="native", num_threads=threads)
        self._choices = list(itertools.combinations(spec.expert_names, EXPERTS_EACH))
        self._prompts, self._sizes, self._tokens = prompts, sorted(sizes, reverse=True), tokens

    def run(self, turn: int) -> dict[int, list[float]]:
        """Seconds of every step, by size."""
        count = self._sizes[0]
        requests = [
            Request(self._prompts.prompt(turn * count + i), self._choices[i % len(self._choices)]) for i in range(count)
        ]
        return in_engine(self._model, requests, self._sizes, self._tokens)


def in_engine(model: Any, requests: Sequence[Request], sizes: Sequence[int], tokens: int) -> dict[int, list[float]]:
    """All requests start together; when each has its first token the steps are timed, and some requests leave."""
    engine = model.engine(max_batch=len(requests))
    live = [
        engine.add_request(
            [request.prompt], active=request.active, pcm_input_ids=[request.prompt], max_new_tokens=ROOM, **DRAW
        )
        for request in requests
    ]
    started: set[Any] = set()
    while len(started) < len(live):
        started.update(output.request_id for output in engine.step())
    steps: dict[int, list[float]] = {}
    for size in sizes:
        for surplus in live[size:]:
            engine.abort(surplus)
        live = live[:size]
        times = steps[size] = []
        for _ in range(tokens):
            start = time.perf_counter()
            outputs = engine.step()
            times.append(time.perf_counter() - start)
            if len(outputs) != size:
                raise RuntimeError(f"engine: expected a token for each of {size} requests, got {len(outputs)}")
    for request in live:
        engine.abort(request)
    return steps
