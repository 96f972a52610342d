"""Breaks csrc/cuda one line at a time and expects the drivers of tests/cuda to notice every time.

    python tests/cuda/mutate.py [parts of descriptions]

Each mutation is made in a copy of csrc/cuda; the driver is built from that copy under a sanitizer and run. A mutation
that nothing notices, that does not compile, or that no longer fits the source is a failure of this script.
"""

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import copytree

from cuda_mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++20", "-O0", "-fno-sanitize-recover=all", "-pthread", "-Icsrc", "-Itests/cuda"]
SANITIZERS = {"asan": "-fsanitize=address,undefined", "tsan": "-fsanitize=thread"}
SOURCES = [f"csrc/{noun}.cpp" for noun in ("graph_store", "kv_cache", "kv_moves", "prefix_index")]
ROUNDS = "16"
PATIENCE = 300  # seconds: threads that wait for each other forever have noticed too


def notice(mutation: Mutation | None, sanitizer: str, driver: str, kernel: str) -> str:
    """What a driver says of mutated kernels; nothing if it finds nothing wrong."""
    with tempfile.TemporaryDirectory(prefix="mutant") as name:
        folder = Path(name)
        copytree(ROOT / "csrc" / "cuda", folder / "cuda")
        if mutation:
            file = folder / "cuda" / mutation.file
            source = file.read_text()
            if source.count(mutation.old) != 1:
                raise SystemExit(f"{mutation}: found {source.count(mutation.old)} times, expected once")
            file.write_text(source.replace(mutation.old, mutation.new))
        compiler = [os.environ.get("CXX", "c++"), f"-I{folder}", *FLAGS, SANITIZERS[sanitizer]]
        built = subprocess.run(
            [*compiler, "-o", folder / "driver", f"tests/cuda/{driver}_driver.cpp", *SOURCES],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        if built.returncode != 0:
            raise SystemExit(f"{mutation}: does not compile\n{built.stderr}")
        arguments = [ROUNDS, "1", kernel] if kernel else []
        try:
            run = subprocess.run([folder / "driver", *arguments], capture_output=True, text=True, timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            return "it did not end"
        return (run.stdout + run.stderr) if run.returncode != 0 else ""


def main() -> int:
    """Run every mutation, as many at a time as there are cores; 1 if one survives."""
    wanted = [m for m in MUTATIONS if any(word in str(m) for word in sys.argv[1:] or [""])]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for sanitizer in SANITIZERS:
            said = notice(None, sanitizer, "kv_ops", "all")
            if said:
                raise SystemExit(f"the drivers fail without a mutation:\n{said}")
        noticed = pool.map(lambda m: notice(m, m.sanitizer, m.driver, m.kernel), wanted)
        survivors = []
        for mutation, said in zip(wanted, noticed, strict=True):
            print("caught  " if said else "SURVIVED", mutation, flush=True)
            survivors += [] if said else [mutation]
    print(f"mutate: {len(wanted)} mutations, {len(survivors)} survived")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
