"""Time on a device: events of CUDA around launches that find nothing of theirs in L2; or, in a dry run, one call."""

import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Median seconds of a call."""

    def seconds(self, call: Callable[[], Any]) -> float: ...


class CudaClock:
    """The median of some calls, each captured in a graph so that the host's part does not count."""

    def __init__(self, device: torch.device, rounds: int = 50) -> None:
        self._rounds = rounds
        self._flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)  # more than any L2

    def seconds(self, call: Callable[[], Any]) -> float:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, allocates
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        times = []
        for _ in range(self._rounds):
            self._flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(times)


class CpuClock:
    """One call, for the code's sake."""

    def seconds(self, call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
