"""Decode steps as CUDA graphs: captured once for each (batch bucket, draft length), replayed while sequences go on."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple, Protocol
from weakref import WeakValueDictionary

import torch

from pcm_fast._native import GraphStore
from pcm_fast.backends.torch_step import StepBuffers, StepShape

DRAFT = 1  # tokens that a row reads in a step
WARM_UPS = 2  # the first compiles kernels and makes the libraries allocate, the second runs as all others will
MAX_SHAPES = 8  # kinds of steps whose graphs are kept; beyond them those not run for the longest time go
BUDGET_BYTES = 512 << 20  # of the graphs and buffers of one shape: 4 GiB for all of them

MakeBuffers = Callable[[StepShape, int], StepBuffers]
Step = Callable[[StepBuffers], None]


class GraphApi(Protocol):
    """What is asked of CUDA."""

    def warm_up(self) -> AbstractContextManager[Any]:
        """To run a step in before it is captured: on a stream of its own, before and after which others wait."""

    def capture(self, graph: Any) -> AbstractContextManager[Any]:
        """What is launched inside goes into the graph and is not run."""

    def make_graph(self) -> Any:
        """An empty graph."""

    def replay(self, graph: Any) -> None:
        """Launch a graph."""

    def reserved(self) -> int:
        """Bytes of device memory that torch holds."""


class CudaGraphs:
    """CUDA's graphs as torch gives them, all in one memory pool: they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # One for all, so that what a capture leaves free is found by the next.
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    @contextlib.contextmanager
    def warm_up(self) -> Iterator[None]:
        """See ``GraphApi``."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def capture(self, graph: Any) -> AbstractContextManager[Any]:
        """See ``GraphApi``. Other threads may go on using CUDA meanwhile."""
        return torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")

    def make_graph(self) -> Any:
        """See ``GraphApi``."""
        return torch.cuda.CUDAGraph()

    def replay(self, graph: Any) -> None:
        """See ``GraphApi``."""
        graph.replay()

    def reserved(self) -> int:
        """See ``GraphApi``."""
        return torch.cuda.memory_reserved(self._device)


class DecodeGraphs:
    """The graphs of one engine, for each shape of its steps."""

    def __init__(self, api: GraphApi, make_buffers: MakeBuffers, step: Step, buckets: Items[int]) -> None:
        self._api, self._make_buffers, self._step, self._buckets = api, make_buffers, step, list(buckets)
        self._shapes: OrderedDict[StepShape, ShapeGraphs] = OrderedDict()

    def buffers(self, shape: StepShape, batch: int) -> StepBuffers:
        """Buffers for so many sequences, to be filled before ``run``."""
        graphs = self._shapes.get(shape)
        if graphs is None:
            if len(self._shapes) == MAX_SHAPES:
                self._shapes.popitem(last=False)
            graphs = ShapeGraphs(self._api, partial(self._make_buffers, shape), self._step, self._buckets)
            self._shapes[shape] = graphs
        return graphs.buffers(batch)

    def run(self, buffers: StepBuffers) -> bool:
        """Make the step that the buffers hold; whether there was a graph of it already."""
        graphs = self._shapes[buffers.shape]
        self._shapes.move_to_end(buffers.shape)
        return graphs.store.run(buffers.bucket, DRAFT)

    def stats(self) -> dict[str, int]:
        """Graphs and their bytes; captures, replays and evictions so far: of the shapes that are kept."""
        total = dict.fromkeys(("graphs", "bytes", "captures", "replays", "evictions"), 0)
        for graphs in self._shapes.values():
            for name, value in graphs.store.stats().items():
                total[name] += value
        return total


class CapturedStep(NamedTuple):
    """A graph, and the buffers that it reads and writes, which live as long as it."""

    graph: Any
    buffers: StepBuffers


class ShapeGraphs:
    """The graphs of one shape, by bucket and draft length.

    Attributes:
        store: what keeps them (csrc/graph_store.h).
    """

    def __init__(
        self, api: GraphApi, make_buffers: Callable[[int], StepBuffers], step: Step, buckets: list[int],
        budget_bytes: int = BUDGET_BYTES,
    ) -> None:  # fmt: skip
        self._api, self._make_buffers, self._step = api, make_buffers, step
        self._buffers: WeakValueDictionary[int, StepBuffers] = WeakValueDictionary()
        self.store = GraphStore(self._capture, self._launch, buckets, budget_bytes)

    def buffers(self, batch: int) -> StepBuffers:
        """The buffers of the bucket for so many sequences: those of its graph, or those that it will be made with."""
        bucket = self.store.bucket(batch)
        buffers = self._buffers.get(bucket)
        if buffers is None:
            buffers = self._buffers[bucket] = self._make_buffers(bucket)
        return buffers

    def _capture(self, bucket: int, draft: int) -> tuple[CapturedStep, int]:
        assert draft == DRAFT
        buffers = self._buffers[bucket]  # filled already: only a replay may run on them
        with self._api.warm_up():
            spare = self._make_buffers(bucket)
            for _ in range(WARM_UPS):
                self._step(spare)
        before = self._api.reserved()
        graph = self._api.make_graph()
        with self._api.capture(graph):
            self._step(buffers)
        own = sum(tensor.nbytes for tensor in buffers.tensors.values())
        return CapturedStep(graph, buffers), own + max(0, self._api.reserved() - before)

    def _launch(self, captured: CapturedStep) -> None:
        self._api.replay(captured.graph)
