"""Compiles every kernel for four generations of GPUs and compares what it takes with gpu_resources.json.

    python bench/gpu_resources.py             fails if a kernel spills, uses local memory, fuses where it must not,
                                              takes more than recorded, or has lost a barrier
    python bench/gpu_resources.py --update    records anew

No GPU is needed: triton brings its compiler and ptxas; for csrc/cuda nvcc has to be on the path. Numbers depend on the
compiler's version, which is recorded with them; with another version only the rules that need no record are held.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import cuda_resources
import triton
from gpu_cases import CASES
from gpu_launches import Launch, launches_of
from triton import knobs
from triton.backends.compiler import GPUTarget

RECORD = Path(__file__).parent / "gpu_resources.json"
FUSED = re.compile(r"\bfma\.|\.approx|\.ftz|div\.full")  # in PTX: not what the oracle does


class Chip(NamedTuple):
    """What a streaming multiprocessor has room for (CUDA programming guide, table of compute capabilities)."""

    capability: int
    warps: int
    blocks: int
    shared: int  # bytes
    registers: int = 65536


CHIPS = {
    "sm_80": Chip(80, 64, 32, 164 * 1024),
    "sm_90": Chip(90, 64, 32, 228 * 1024),
    "sm_100": Chip(100, 64, 32, 228 * 1024),
    "sm_120": Chip(120, 48, 24, 100 * 1024),
}


def occupancy(chip: Chip, registers: int, shared: int, warps: int) -> float:
    """The share of a multiprocessor's warps that can be resident: registers go out by 256 a warp, and a block's shared
    memory costs 1 KiB more.
    """
    by_registers = chip.registers // (-(-registers * 32 // 256) * 256) // warps
    blocks = min(chip.blocks, chip.warps // warps, by_registers, chip.shared // (shared + 1024))
    return round(blocks * warps / chip.warps, 3)


def resources(launch: Launch, chip: Chip) -> dict[str, float]:
    """What one kernel takes on one chip."""
    target = GPUTarget("cuda", chip.capability, 32)
    compiled = triton.compile(launch.source(), target=target, options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    return {
        "registers": numbers["REG"],
        "shared": shared,  # bytes
        "stack": numbers["STACK"],  # bytes a thread; spills go here
        "local": numbers["LOCAL"],  # bytes a thread
        "warps": warps,
        "occupancy": occupancy(chip, numbers["REG"], shared, warps),
        "fused": len(FUSED.findall(compiled.asm["ptx"])),
        "barriers": compiled.asm["ttir"].count("barrier"),  # those that the source asks for
    }


Table = dict[str, dict]


def measure_cuda() -> Table:
    """For every kernel of csrc/cuda, for every chip, what it takes."""
    table: Table = {}
    for name, chip in CHIPS.items():
        for kernel, used in cuda_resources.measure(chip.capability).items():
            share = occupancy(chip, used["registers"], used["shared"], used["warps"])
            table.setdefault(kernel, {"exact": False})[name] = {**used, "occupancy": share}
    return table


def measure_triton() -> Table:
    """For every case and kernel, for every chip, what it takes."""
    table: Table = {}
    for case, call in CASES.items():
        for launch in launches_of(call):
            name = f"{launch.kernel.__name__} ({case})"
            if launch.arguments.get("THIRD"):
                name = f"{launch.kernel.__name__}, third digit ({case})"
            table[name] = {chip: resources(launch, CHIPS[chip]) for chip in CHIPS}
            table[name]["exact"] = launch.options.get("enable_fp_fusion") is False
            print(
                f"{name}: {[table[name][chip]['registers'] for chip in CHIPS]} registers", file=sys.stderr, flush=True
            )
    return table


def breaches(table: Table, recorded: Table | None) -> list[str]:
    """Everything that must not be."""
    found = []
    for name, chips in table.items():
        for chip in CHIPS:
            now, where = chips[chip], f"{name} on {chip}"
            found += [f"{where}: {now[what]} bytes of {what} a thread" for what in ("stack", "local") if now[what]]
            if chips["exact"] and now["fused"]:
                found.append(f"{where}: {now['fused']} fused or approximate operations")
            if recorded is None:
                continue
            before = recorded.get(name, {}).get(chip)
            if before is None:
                found.append(f"{where}: not recorded (--update)")
                continue
            worse = [what for what in ("registers", "shared") if now[what] > before[what]]
            worse += ["occupancy"] if now["occupancy"] < before["occupancy"] else []
            worse += ["barriers"] if now["barriers"] != before["barriers"] else []
            found += [f"{where}: {what} was {before[what]}, is {now[what]}" for what in worse]
    return found + [f"{name}: recorded, but gone (--update)" for name in (recorded or {}) if name not in table]


def main() -> int:
    """Measure, compare, print; 1 if there is a breach."""
    parser = argparse.ArgumentParser(description="Registers, shared memory and spills of every kernel.")
    parser.add_argument("--update", action="store_true", help="record what is measured")
    update = parser.parse_args().update
    record = json.loads(RECORD.read_text()) if RECORD.exists() and not update else {}
    measured = {
        "triton": {"version": triton.__version__, "kernels": measure_triton()},
        "nvcc": {"version": cuda_resources.version(), "kernels": measure_cuda()},
    }
    found = []
    print(f"{'registers (occupancy), shared bytes':100}" + "".join(f"{chip:>14}" for chip in CHIPS))
    for compiler, now in measured.items():
        before = record.get(compiler, {"version": None})
        same = before["version"] == now["version"]
        found += breaches(now["kernels"], before["kernels"] if same else None)
        for name, chips in now["kernels"].items():
            row = "".join(f"{chips[chip]['registers']:>7} ({chips[chip]['occupancy']:.2f})" for chip in CHIPS)
            print(f"{name[:90]:92}{max(chips[chip]['shared'] for chip in CHIPS):>8}{row}")
        if not same and not update:
            print(f"not compared: no record by {compiler} {now['version']}")
    if update and not found:
        RECORD.write_text(json.dumps(measured, indent=1) + "\n")
    for breach in found:
        print("BREACH", breach)
    kernels = sum(len(now["kernels"]) for now in measured.values())
    print(f"gpu_resources: {kernels} kernels for {len(CHIPS)} chips, {len(found)} breaches")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
