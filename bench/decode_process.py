"""What only a process of its own can tell: peak memory, and how long the command takes to its first token."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from decode_burst import Candidate, Spread

MEGABYTE = 1e6
COMMAND = ("generate", "Hi", "--max-new-tokens", "1")


def memory_of(candidate: Candidate) -> dict[str, int]:
    """Build and run a candidate once: bytes that this process holds at its peak, beyond those it held before.

    Meant for a fresh process that has imported everything, see ``memory_in_child``.
    """
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    before = _status("VmRSS")
    decoder = candidate.build()
    decoder.run(0)
    return {"peak": _status("VmHWM") - before, "stored": decoder.stored_bytes}


def memory_in_child(script: Path, *arguments: str) -> dict[str, Any]:
    """What a script prints as JSON on its last line."""
    command = [sys.executable, str(script), *arguments]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def cold_start(rounds: int) -> Spread:
    """Seconds from the start of `pcm-fast generate` to the first byte of its answer.

    The tokenizer's cache has to be filled, as any run of the command leaves it.
    """
    return Spread.of([_first_byte() for _ in range(rounds)])


def imports_torch() -> bool:
    """Whether `pcm-fast generate` imports torch."""
    command = [sys.executable, "-X", "importtime", str(_console_script()), *COMMAND]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return any(line.rpartition("|")[2].strip() == "torch" for line in listing.splitlines())


def _first_byte() -> float:
    start = time.perf_counter()
    with subprocess.Popen([str(_console_script()), *COMMAND], stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        byte = process.stdout.read(1)
        seconds = time.perf_counter() - start
        process.stdout.read()
    if process.returncode or not byte:
        raise RuntimeError(f"pcm-fast {' '.join(COMMAND)}: exit code {process.returncode}")
    return seconds


def _console_script() -> Path:
    return Path(sys.executable).parent / "pcm-fast"


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path(f"/proc/{os.getpid()}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
