"""The headline benchmark: `python bench/bench_decode.py`, a quarter of an hour; `make bench` runs it too.

Decodes with K LoRA experts and a PCM on the embedded model, by the reference decoder, PEFT, the native decoder in every
weight format, and llama.cpp with one model as the floor, all in one run and in alternating turns. Prints the table and
the targets, and writes bench/results/decode.json and docs/decode.png. With --quick everything runs, but so briefly that
the numbers mean nothing; then the results go nowhere unless --output says where.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import decode_llama
from decode_burst import Decoder, interleave
from decode_candidates import EXPERTS, FULL, QUICK, Plan, Workspace
from decode_mixture import ATTENTION, TOP_P
from decode_plot import draw
from decode_process import cold_start, imports_torch, memory_in_child, memory_of
from decode_report import Measurements, batch_rows, candidate_rows, expert_rows, part_rows, target_rows
from machine import conditions, peak_flops, read_bandwidth
from table import table

ROOT = Path(__file__).parents[1]
RESULT, PLOT = ROOT / "bench" / "results" / "decode.json", ROOT / "docs" / "decode.png"


def measure(workspace: Workspace, quick: bool) -> Measurements:
    """The whole run."""
    plan = workspace.plan
    measured = Measurements((read_bandwidth(plan.threads), peak_flops(plan.threads)))
    candidates = workspace.headline()
    decoders: dict[str, Decoder] = {}
    for candidate in [*candidates, workspace.forward()]:
        say(f"building {candidate.name}")
        decoders[candidate.name] = candidate.build()
    measured.note_work(decoders)
    measured.headline = interleave(decoders, plan.turns)
    decoders = {c.name: c.build() for c in workspace.by_experts(plan.expert_counts, plan.reference_counts)}
    measured.experts = interleave(decoders, plan.expert_turns)
    decoders.clear()
    measure_batches(workspace, measured)
    for candidate in candidates if plan.all_memory else candidates[:1]:
        say(f"memory of {candidate.name}")
        arguments = ["--memory-of", candidate.name, "--directory", str(workspace.directory)]
        measured.memory[candidate.name] = memory_in_child(Path(__file__), *arguments, *(["--quick"] if quick else []))
    say("cold start")
    measured.torch_imported = imports_torch()
    measured.cold = cold_start(plan.cold_rounds)
    return measured


def measure_batches(workspace: Workspace, measured: Measurements) -> None:
    """Many requests, and one in the reference, in alternation."""
    many, one = workspace.concurrent(), workspace.one_request()
    for turn in range(workspace.plan.batch_turns):
        measured.batch.append(many.run(turn))
        measured.one_request.append(one.run(turn))
        costs = (f"{size}: {statistics.median(times) * 1e3:.1f}" for size, times in measured.batch[-1].items())
        say(f"batches, turn {turn + 1} of {workspace.plan.batch_turns}: ms a step by requests: {', '.join(costs)}")


def report(measured: Measurements, plan: Plan) -> dict[str, Any]:
    """The result file: two tables for the README, and what the plot shows."""
    skipped = [] if decode_llama.installed() else [decode_llama.ABSENT]
    bandwidth, flops = measured.limits
    return {
        "name": "Decoding",
        "conditions": {
            **conditions(plan.threads),
            **(decode_llama.conditions() if decode_llama.installed() else {"llama-cpp-python": "not installed"}),
            "base": "SmolLM2-135M-Instruct",
            "experts": f"random LoRA adapters rounded to bfloat16, {ATTENTION.name} unless said otherwise",
            "context": plan.context,
            "top_p": TOP_P,
            "turns, all in alternation": plan.turns,
            "tokens of a turn": f"{plan.tokens}, or {plan.slow_tokens} of the reference and PEFT",
            "llama.cpp": "reads given tokens, no draw; KV cache float16",
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "unset"),
            "read bandwidth (GB/s)": bandwidth / 1e9,
            "float32 peak (GFLOP/s)": flops / 1e9,
        },
        "tables": [
            {"name": f"One token: {EXPERTS} experts and a PCM (medians)", "rows": candidate_rows(measured)},
            {"name": "Targets", "rows": target_rows(measured)},
        ],
        "experts": expert_rows(measured),
        "batch": batch_rows(measured),
        "parts": part_rows(measured),
        "memory": measured.memory,
        "skipped": skipped,
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    parser.add_argument("--output", type=Path, help="the result file; the plot goes beside it")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # this script in a process of its own
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    plan = QUICK if arguments.quick else FULL
    if arguments.memory_of:
        candidates = {candidate.name: candidate for candidate in Workspace(arguments.directory, plan).headline()}
        print(json.dumps(memory_of(candidates[arguments.memory_of])))
        return
    with tempfile.TemporaryDirectory() as directory:
        workspace = Workspace(Path(directory), plan)
        say("writing adapters and GGUF files")
        workspace.prepare()
        result = report(measure(workspace, arguments.quick), plan)
    for part in result["tables"]:
        print(f"{part['name']}\n{table(part['rows'], RESULT)}\n")
    for line in result["skipped"]:
        print(f"left out: {line}")
    if arguments.output or not arguments.quick:
        target = arguments.output or RESULT
        target.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        draw(result, arguments.output.with_suffix(".png") if arguments.output else PLOT)


if __name__ == "__main__":
    main()
