"""Everything that can be said of the GPU path without a GPU; one table at the end, and 1 if anything is amiss.

python bench/gpu_check.py
"""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARTS = {
    "interpreted, against the oracle and torch": [sys.executable, "-m", "pytest", "-q", "-n", "2", "tests/gpu"],
    "csrc/cuda on the CPU, under sanitizers": ["make", "--silent", "emulate"],
    "mistakes made on purpose: Triton": [sys.executable, "tests/gpu/mutate_kernels.py"],
    "mistakes made on purpose: CUDA": [sys.executable, "tests/cuda/mutate.py"],
    "compiled for four chips": [sys.executable, "bench/gpu_resources.py"],
    "bytes and launches counted": [sys.executable, "bench/gpu_count.py"],
}


def main() -> int:
    """Run all parts, whatever becomes of the others."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    rows = []
    for part, command in PARTS.items():
        started = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
        print(done.stdout, flush=True)
        last = (done.stdout.strip().splitlines() or ["nothing printed"])[-1]
        verdict = "well" if done.returncode == 0 else "BREACH"
        rows.append((verdict, part, f"{time.monotonic() - started:.0f} s", last.strip("= ")))
    for verdict, part, seconds, last in rows:
        print(f"{verdict:8}{part:44}{seconds:>8}   {last}")
    print("Nothing of this has run on a GPU.")
    return int(any(verdict != "well" for verdict, *_ in rows))


if __name__ == "__main__":
    sys.exit(main())
