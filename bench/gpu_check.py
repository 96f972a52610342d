"""Everything that can be said of the GPU path without a GPU; one table at the end, and 1 if anything is amiss.

python bench/gpu_check.py
"""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTEST = [
    "-m",
    "pytest",
    "-q",
    "-n",
    "2",
    *(f"tests/gpu/test_{name}.py" for name in ("mix_sample", "adapters", "attention", "gpu_ops")),
]
BACKEND = [
    *PYTEST[:5],
    *(f"tests/gpu/test_{name}.py" for name in ("torch_backend", "traced_step", "torch_graphs", "gpu_bench")),
]
PARTS = {
    "interpreted, against the oracle and torch": PYTEST,
    "the torch backend, on the CPU and traced": BACKEND,
    "mistakes made on purpose": ["tests/gpu/mutate_kernels.py"],
    "compiled for four chips": ["bench/gpu_resources.py"],
    "bytes and launches counted": ["bench/gpu_count.py"],
}


def main() -> int:
    """Run all parts, whatever becomes of the others."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    rows = []
    for part, command in PARTS.items():
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False
        )
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
