"""Tables out of what was measured: the candidates, and the targets with what they ask for."""

import statistics
from dataclasses import dataclass, field
from typing import Any

from decode_burst import Burst, Decoder, Spread, ratio, steps
from decode_candidates import (
    EXPERTS,
    FORWARD,
    LLAMA,
    LLAMA_BFLOAT16,
    LLAMA_FLOAT32,
    OURS,
    OURS_ALONE,
    OURS_BFLOAT16,
    OURS_FLOAT32,
    OURS_LARGE,
    REFERENCE,
    SAME_WEIGHTS,
    expert_name,
)
from decode_process import MEGABYTE

Row = dict[str, Any]
MILLI = 1e3


@dataclass
class Measurements:
    """Everything that one run measured.

    Attributes:
        limits: bytes a second of memory, and float32 operations a second.
        headline: bursts of the candidates with 4 experts and a PCM, and of what they are held against.
        work: for each of them what a step reads and computes.
        experts: bursts by number of experts, see ``expert_name``.
        batch: for every turn, seconds of the steps by number of requests.
        one_request: bursts of the reference with one such request.
        memory: "peak" and "stored" bytes by candidate.
        cold: seconds to the first byte of the command.
        torch_imported: whether the command imports torch.
    """

    limits: tuple[float, float]
    headline: dict[str, list[Burst]] = field(default_factory=dict)
    work: dict[str, tuple[int, int]] = field(default_factory=dict)
    experts: dict[str, list[Burst]] = field(default_factory=dict)
    batch: list[dict[int, list[float]]] = field(default_factory=list)
    one_request: list[Burst] = field(default_factory=list)
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    cold: Spread | None = None
    torch_imported: bool | None = None

    def note_work(self, decoders: dict[str, Decoder]) -> None:
        self.work |= {name: (decoder.step_bytes, decoder.flops) for name, decoder in decoders.items()}


def candidate_rows(measured: Measurements) -> list[Row]:
    """The headline: a row for each candidate."""
    return [_candidate(measured, name) for name in measured.headline if name != FORWARD]


def _candidate(measured: Measurements, name: str) -> Row:
    bandwidth, peak_flops = measured.limits
    bursts = measured.headline[name]
    step, seconds = _milliseconds(bursts), statistics.median(steps(bursts))
    faster = ratio(steps(measured.headline[REFERENCE]), steps(bursts))
    same = measured.headline.get(SAME_WEIGHTS.get(name, LLAMA if name.startswith(OURS) else ""))
    num_bytes, flops = measured.work[name]
    memory = measured.memory.get(name)
    return {
        "decoder": name,
        "ms a token": step.median,
        "lowest and highest turn": step.range(),
        "tokens/s": 1 / seconds,
        "times faster than the reference": faster.median,
        "steps of llama.cpp on the same weights": ratio(steps(bursts), steps(same)).median if same else None,
        "share of the read bandwidth": num_bytes / bandwidth / seconds,
        "share of the float32 peak": flops / peak_flops / seconds,
        "peak memory (MB)": memory["peak"] / MEGABYTE if memory else None,
        "ms to the first token": statistics.median(burst.first for burst in bursts) * MILLI,
    }


@dataclass(frozen=True)
class Target:
    """What is asked for, and what came out; None where it was not measured."""

    text: str
    bound: float
    measured: Spread | None
    at_least: bool = False
    condition: bool = True

    def row(self) -> Row:
        met: str | bool = "not measured"
        if self.measured is not None:
            reached = self.measured.median >= self.bound if self.at_least else self.measured.median <= self.bound
            met = reached and self.condition
        return {
            "measure": self.text,
            "target": f"{'≥' if self.at_least else '≤'} {self.bound:.4g}",
            "measured": self.measured.median if self.measured else None,
            "lowest and highest": self.measured.range() if self.measured else "",
            "met": met,
        }


def target_rows(measured: Measurements) -> list[Row]:
    """The targets, in their order."""
    return [target.row() for target in (*_step_targets(measured), *_other_targets(measured))]


def _step_targets(measured: Measurements) -> list[Target]:
    def quotient(ours: str, theirs: str) -> Spread | None:
        found = {**measured.experts, **measured.headline}
        return ratio(steps(found[ours]), steps(found[theirs])) if ours in found and theirs in found else None

    many, one = expert_name(OURS, 8), expert_name(OURS, 1)
    return [
        Target(f"1. {OURS}: step ÷ llama.cpp on the same file", 1.0, quotient(OURS, LLAMA)),
        Target(f"2. {OURS_LARGE}: step ÷ llama.cpp on the same file", 1.3, quotient(OURS_LARGE, LLAMA)),
        Target(f"3. {OURS}: step ÷ reference decoder", 1 / 16, quotient(OURS, REFERENCE)),
        Target("4. float32 weights: step ÷ llama.cpp F32", 1.5, quotient(OURS_FLOAT32, LLAMA_FLOAT32)),
        Target("4. bfloat16 weights: step ÷ llama.cpp BF16", 1.3, quotient(OURS_BFLOAT16, LLAMA_BFLOAT16)),
        Target("5. step with 8 experts ÷ step with 1", 2.3, quotient(many, one)),
        Target("6. 1 expert, no PCM: step ÷ llama.cpp on the same file", 0.6, quotient(OURS_ALONE, LLAMA)),
    ]


def _other_targets(measured: Measurements) -> list[Target]:
    ours, theirs = measured.headline[OURS], measured.headline[FORWARD]
    prefill = ratio([burst.first for burst in theirs], [burst.first for burst in ours])  # of the same rows
    size = max(measured.batch[0])
    pairs = zip(measured.batch, measured.one_request, strict=True)
    throughput = Spread.of([size * alone.step / statistics.median(turn[size]) for turn, alone in pairs])
    over = [(memory["peak"] - memory["stored"]) / MEGABYTE for memory in measured.memory.values() if memory["stored"]]
    imported = {True: "imported", False: "not imported", None: "not looked for"}[measured.torch_imported]
    return [
        Target(
            f"7. prefill of {EXPERTS + 1} rows: row-tokens/s ÷ transformers float32 forward",
            1.2,
            prefill,
            at_least=True,
        ),
        Target(
            f"8. {size} concurrent requests (3 of 6 experts each, PCM): tokens/s ÷ reference with one request",
            25,
            throughput,
            at_least=True,
        ),
        Target(
            f"9. cold start of `pcm-fast generate` to the first token (s); torch is {imported}",
            2.0,
            measured.cold,
            condition=measured.torch_imported is False,
        ),
        Target(
            "10. peak memory over weights, adapters and KV cache as stored, the worst format (MB)",
            200,
            Spread(max(over), min(over), max(over)) if over else None,
        ),
    ]


def expert_rows(measured: Measurements) -> list[Row]:
    """Cost against the number of experts, for the plot."""
    return [_cost(name, bursts) for name, bursts in measured.experts.items()]


def batch_rows(measured: Measurements) -> list[Row]:
    """Cost of a step and of a token against the number of requests, for the plot."""
    rows = []
    for size in sorted(measured.batch[0]):
        step = Spread.of([statistics.median(turn[size]) * MILLI for turn in measured.batch])
        rows.append({"requests": size, "ms a step": step.median, "ms a token": step.median / size})
    return rows


def part_rows(measured: Measurements) -> list[Row]:
    """Milliseconds of each part of a step, for the plot: median of the turns, for candidates that tell."""
    rows = []
    for name, bursts in measured.headline.items():
        parts = {part: statistics.median(burst.parts[part] for burst in bursts) * MILLI for part in bursts[0].parts}
        if parts:
            parts["merge, draw and the rest"] = max(0.0, _milliseconds(bursts).median - sum(parts.values()))
            rows.append({"decoder": name, "parts (ms)": parts})
    return rows


def _cost(name: str, bursts: list[Burst]) -> Row:
    step = _milliseconds(bursts)
    decoder, _, count = name.partition(", K = ")
    return {
        "decoder": decoder,
        "experts": int(count) if count else None,
        "ms a token": step.median,
        "lowest": step.lowest,
        "highest": step.highest,
    }


def _milliseconds(bursts: list[Burst]) -> Spread:
    """A token of every turn."""
    return Spread.of([value * MILLI for value in steps(bursts)])
