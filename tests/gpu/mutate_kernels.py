"""Breaks the Triton kernels one line at a time and expects the tests of tests/gpu/test_*.py to notice every time.

    python tests/gpu/mutate_kernels.py [parts of descriptions]

Each mutation is made in a copy of the package, and the tests run on that copy until one fails. A mutation that no test
notices, or that no longer fits the source, is a failure of this script.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
os.environ["PCM_FAST_TRITON_CASES"] = "4"
os.environ["OMP_NUM_THREADS"] = "1"  # one process for each core is enough

# Imported before the fork, and so once for all mutations.
import numpy  # noqa: F401
import pytest
import torch  # noqa: F401
import triton.runtime.interpreter  # noqa: F401

ROOT = Path(__file__).parents[2]
from mix_sample_mutations import OF_MIX_SAMPLE  # noqa: E402
from mutations import OF_THE_DECODER, Mutation  # noqa: E402


def copy_package(where: Path, mutation: Mutation | None) -> None:
    """The Python files of the package, with one file of kernels/ changed."""
    only_python = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "pcm_fast", where / "pcm_fast", ignore=only_python)
    shutil.copytree(ROOT / "kernels", where / "pcm_fast" / "kernels", ignore=only_python)
    if mutation:
        file = where / "pcm_fast" / "kernels" / mutation.file
        source = file.read_text()
        if source.count(mutation.old) != 1:
            raise SystemExit(f"{mutation}: found {source.count(mutation.old)} times, expected once")
        file.write_text(source.replace(mutation.old, mutation.new))


def start(mutation: Mutation | None, where: Path) -> int:
    """Start the tests on a mutated copy; the process id."""
    copy_package(where, mutation)
    process = os.fork()
    if process:
        return process
    log = os.open(where / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.path.insert(0, str(where))
    os.chdir(ROOT)
    what = [mutation.tests, "-k", f"not ({mutation.but})"] if mutation else ["tests/gpu/test_attention.py"]
    os._exit(pytest.main([*what, "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]))


def main() -> int:
    """Run every mutation, as many at a time as there are cores; 1 if one survives."""
    wanted = [m for m in OF_MIX_SAMPLE + OF_THE_DECODER if any(word in str(m) for word in sys.argv[1:] or [""])]
    waiting: list[Mutation | None] = [None, *wanted]  # first the tests on the kernels as they are
    running: dict[int, tuple[Mutation | None, tempfile.TemporaryDirectory[str]]] = {}
    survivors = []
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            mutation = waiting.pop(0)
            directory = tempfile.TemporaryDirectory(prefix="mutant")
            running[start(mutation, Path(directory.name))] = mutation, directory
        process, status = os.wait()
        mutation, directory = running.pop(process)
        code = os.waitstatus_to_exitcode(status)
        log = (Path(directory.name) / "log").read_text()
        directory.cleanup()
        if mutation is None:
            if code != 0:
                raise SystemExit(f"the tests fail without a mutation:\n{log}")
        else:
            caught = code == 1 or code < 0  # a test failed, or the kernel read where there is no memory
            print("caught  " if caught else "SURVIVED", mutation, flush=True)
            if not caught:
                survivors.append(mutation)
                print(log)
    print(f"mutate_kernels: {len(wanted)} mutations, {len(survivors)} survived")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
