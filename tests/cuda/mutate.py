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
COMPILER = [os.environ.get("CXX", "c++"), "-std=c++20", "-O0", "-fno-sanitize-recover=all", "-pthread"]
INCLUDES = ["-Icsrc", "-Itests/cuda"]
SANITIZERS = {"asan": "-fsanitize=address,undefined", "tsan": "-fsanitize=thread"}
NOUNS = ("graph_store", "kv_cache", "kv_moves", "prefix_index")
DRIVERS = {"kv_ops.cu": "kv_ops_driver", "stream_capture.cu": "stream_capture_driver"}
ROUNDS = "60"
PATIENCE = 300  # seconds: threads that wait for each other forever have noticed too


def compile_one(sanitizer: str, source: str, target: Path, *includes: str) -> None:
    """A source to an object file."""
    command = [*COMPILER, SANITIZERS[sanitizer], *includes, *INCLUDES, "-c", "-o", target, "-x", "c++", source]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{source} does not compile:\n{done.stderr}")


def compile_drivers(folder: Path) -> None:
    """The object files that no mutation changes, in a folder for each sanitizer."""
    sources = [f"csrc/{noun}.cpp" for noun in NOUNS] + [f"tests/cuda/{driver}.cpp" for driver in DRIVERS.values()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = []
        for sanitizer in SANITIZERS:
            (folder / sanitizer).mkdir()
            for source in sources:
                jobs.append(pool.submit(compile_one, sanitizer, source, folder / sanitizer / f"{Path(source).stem}.o"))
        for job in jobs:
            job.result()


def notice(objects: Path, file: str, sanitizer: str, kernel: str, mutation: Mutation | None = None) -> str:
    """What a driver says of a mutated source; nothing if it finds nothing wrong."""
    with tempfile.TemporaryDirectory(prefix="mutant") as name:
        folder = Path(name)
        copytree(ROOT / "csrc" / "cuda", folder / "cuda")
        mutated = folder / "cuda" / file
        if mutation:
            source = mutated.read_text()
            if source.count(mutation.old) != 1:
                raise SystemExit(f"{mutation}: found {source.count(mutation.old)} times, expected once")
            mutated.write_text(source.replace(mutation.old, mutation.new))
        compile_one(sanitizer, str(mutated), folder / "mutated.o", f"-I{folder}")
        parts = [objects / sanitizer / f"{name}.o" for name in (DRIVERS[file], *NOUNS)]
        link = [*COMPILER, SANITIZERS[sanitizer], "-o", folder / "driver", folder / "mutated.o", *parts]
        subprocess.run(link, check=True)
        arguments = [ROUNDS, "1", kernel] if kernel else []
        try:
            run = subprocess.run([folder / "driver", *arguments], capture_output=True, text=True, timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            return "it did not end"
        return (run.stdout + run.stderr) if run.returncode != 0 else ""


def main() -> int:
    """Run every mutation, as many at a time as there are cores; 1 if one survives."""
    wanted = [m for m in MUTATIONS if any(word in str(m) for word in sys.argv[1:] or [""])]
    with tempfile.TemporaryDirectory(prefix="drivers") as name, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = Path(name)
        compile_drivers(objects)
        for file, kernel in (("kv_ops.cu", "all"), ("stream_capture.cu", "")):
            for said in pool.map(
                lambda kind, file=file, kernel=kernel: notice(objects, file, kind, kernel), SANITIZERS
            ):
                if said:
                    raise SystemExit(f"the drivers fail without a mutation:\n{said}")
        noticed = pool.map(lambda m: notice(objects, m.file, m.sanitizer, m.kernel, m), wanted)
        survivors = []
        for mutation, said in zip(wanted, noticed, strict=True):
            print("caught  " if said else "SURVIVED", mutation, flush=True)
            survivors += [] if said else [mutation]
    print(f"mutate: {len(wanted)} mutations, {len(survivors)} survived")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
