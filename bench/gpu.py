"""Everything that needs a GPU, in one run: are the kernels right, how fast are they, and what does a token cost.

    python bench/gpu.py                   on a machine with a GPU; writes bench/results/gpu.json and gpu.md
    python bench/gpu.py --output FOLDER   writes there
    python bench/gpu.py --dry             every line of it on the CPU, tiny and interpreted: its numbers mean nothing

It ends with 1 if a kernel or the backend is wrong.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = str(int("--dry" in sys.argv))  # triton reads it when it is imported

import gpu_decode
import gpu_kernels
import torch
import triton
from gpu_clock import CpuClock, CudaClock
from machine import conditions
from table import table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
DRY_LABEL = "DRY RUN on the CPU: no number here is a measurement"


def device_conditions(device: torch.device) -> dict[str, Any]:
    """What ran it."""
    known: dict[str, Any] = {**conditions(torch.get_num_threads()), "triton": triton.__version__}
    if device.type != "cuda":
        return {"run": DRY_LABEL, **known}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory (GiB)": properties.total_memory / 2**30,
        "CUDA of torch": torch.version.cuda,
        **known,
    }


def measure(device: torch.device, dry: bool) -> dict[str, Any]:
    """The whole run."""
    clock = CpuClock() if dry else CudaClock(device)
    copied = gpu_kernels.copy_bandwidth(clock, device, megabytes=1 if dry else 1024)
    parts = [
        ("Kernels against the oracle and torch", gpu_kernels.correctness(device, dry)),
        ("Kernels: time and bandwidth (medians)", gpu_kernels.times(clock, device, copied, dry)),
    ]
    with tempfile.TemporaryDirectory() as directory:
        decode = gpu_decode.Decode(Path(directory), device, dry)
        parts.append(("The torch backend against the reference", decode.tolerances()))
        parts.append(("One token (medians)", decode.latencies()))
    return {
        "name": f"{DRY_LABEL}: GPU" if dry else "GPU",
        "dry": dry,
        "conditions": {**device_conditions(device), "copy bandwidth (GB/s)": copied / 1e9},
        "tables": [{"name": f"{DRY_LABEL}. {name}" if dry else name, "rows": rows} for name, rows in parts],
    }


def markdown(result: dict[str, Any]) -> str:
    """The report as text."""
    lines = [f"# {result['name']}", ""]
    lines += [f"* {name}: {value}" for name, value in result["conditions"].items()]
    for part in result["tables"]:
        lines += ["", f"## {part['name']}", "", table(part["rows"], Path("gpu.json"))]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, write, print; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="on the CPU, for the code's sake")
    parser.add_argument("--output", type=Path, help="the folder of the report")
    arguments = parser.parse_args()
    if not arguments.dry and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --dry runs the code without one")
    if arguments.dry and arguments.output is None:
        parser.error("--dry: say with --output where a report that means nothing may go")
    device = torch.device("cpu" if arguments.dry else f"cuda:{torch.cuda.current_device()}")
    result = measure(device, arguments.dry)
    folder = arguments.output or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "gpu.md").write_text(markdown(result), encoding="utf-8")
    print(markdown(result))
    wrong = [row for part in result["tables"] for row in part["rows"] if row.get("well") is False]
    for row in wrong:
        print("BREACH", row)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
