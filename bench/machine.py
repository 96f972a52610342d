"""What the numbers of a benchmark hold under, and the physical limits they are held against."""

import platform
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from pcm_fast import ops


def conditions(threads: int) -> dict[str, object]:
    """Machine, threads and versions."""
    models = [line.split(":")[1].strip() for line in _cpu_info() if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": len(models),
        "threads": threads,
        "instruction set": ops.isa(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pcm-fast": version("pcm-fast"),
        "date": time.strftime("%Y-%m-%d"),
    }


def read_bandwidth(threads: int, megabytes: int = 512, rounds: int = 7) -> float:
    """Bytes a second at which `threads` threads read memory that no cache holds: the greatest of some sums in torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    block = torch.ones(megabytes * 2**18)
    best = 0.0
    for _ in range(rounds):
        start = time.perf_counter()
        block.sum()
        best = max(best, block.nbytes / (time.perf_counter() - start))
    torch.set_num_threads(before)
    return best


def peak_flops(threads: int, size: int = 1536, rounds: int = 7) -> float:
    """float32 operations a second (a multiply-add is two) on `threads` threads: the best of some products in torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    a, b, product = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    best = 0.0
    for _ in range(rounds):
        start = time.perf_counter()
        torch.mm(a, b, out=product)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    torch.set_num_threads(before)
    return best


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
