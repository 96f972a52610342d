"""Compiles every .cu for four generations of GPUs, warnings being errors, and reads what each kernel takes.

Used by gpu_resources.py. No GPU is needed, but nvcc on the path is.
"""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
WARPS = 4  # of a block of threads: kThreads in csrc/cuda/kv_ops.cu
FLAGS = ["-std=c++20", "-O3", "-Icsrc", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror"]
USAGE = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers, used (?P<barriers>\d+) barriers(?:.*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


def version() -> str:
    """Of nvcc."""
    if shutil.which("nvcc") is None:
        raise SystemExit("cuda_resources: nvcc is not on PATH")
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V([\d.]+)", text)[1]


def readable(symbol: str) -> str:
    """The name of a kernel and its template arguments."""
    text = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    return re.search(r"::(\w+(?:<[\w, ]+>)?)\(", text)[1]


def measure(capability: int) -> dict[str, dict[str, int]]:
    """For every kernel, what it takes on one chip. Exits if anything does not compile, or warns."""
    table = {}
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        with tempfile.TemporaryDirectory() as folder:
            target = f"-gencode=arch=compute_{capability},code=[sm_{capability},compute_{capability}]"
            command = ["nvcc", *FLAGS, target, "--resource-usage", "-c", str(source), "-o", f"{folder}/object.o"]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"cuda_resources: {source.name} for sm_{capability}:\n{done.stdout}{done.stderr}")
        text = done.stdout + done.stderr
        for part in text.split("ptxas info    : Compiling")[1:]:
            used = USAGE.search("Compiling" + part)
            if used is None:
                raise SystemExit(f"cuda_resources: what does ptxas say here?\n{part}")
            table[f"{readable(used['name'])} ({source.name})"] = {
                "registers": int(used["registers"]),
                "shared": int(used["shared"] or 0),  # bytes
                "stack": int(used["stack"]),  # bytes a thread
                "local": int(used["stores"]) + int(used["loads"]),  # bytes a thread that spill
                "warps": WARPS,
                "fused": 0,  # no arithmetic on floats that could be
                "barriers": int(used["barriers"]),  # of the hardware's: 1 if there is any __syncthreads
            }
    return table
