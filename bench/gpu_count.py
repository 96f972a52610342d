"""Counts what mix_sample reads, writes and launches, beside the minimum and the same in torch. Counted, not timed.

    python bench/gpu_count.py             fails if gpu_counts.json or the table in docs/gpu.md is not what is counted
    python bench/gpu_count.py --update    counts the whole grid and writes both

One row runs in triton's interpreter while every load, store and atomic is counted; rows do not depend on each other, so
a batch is that many times as much. torch's operators are counted under a dispatch mode: what goes in and comes out of
each, which is less than a sort really moves.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from pcm_fast.kernels.mix_sample import mix_sample, num_splits
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

PAGE = Path(__file__).parents[1] / "docs" / "gpu.md"
BEGIN, END = "<!-- count:begin -->\n", "<!-- count:end -->\n"
RECORD = Path(__file__).parent / "gpu_counts.json"
Case = tuple[int, int, int]  # K, V, rows
VOCABULARIES = (49_152, 128_256, 262_144)
GRID = [(k, v, rows) for v in VOCABULARIES for k in range(1, 9) for rows in (1, 2, 4, 8, 16, 32, 64)]
SHOWN = [(k, v, rows) for v in VOCABULARIES for k in (1, 2, 4, 8) for rows in (1, 8, 64)]  # in docs/gpu.md
PROCESSORS = 132  # of the chip for which the launch shape is chosen: an H100
BANDWIDTH = {"A100": 2.04e12, "H100": 3.35e12, "B200": 8.0e12}  # bytes a second, from the data sheets
VIEWS = ("view", "expand", "slice", "unsqueeze", "squeeze", "select", "alias", "detach", "t", "transpose", "permute")


class Traffic:
    """Bytes that programs ask for, and launches, while it is entered."""

    def __init__(self, logits: torch.Tensor):
        self.logits = range(logits.data_ptr(), logits.data_ptr() + logits.numel() * logits.element_size())
        self.of_logits = self.read = self.written = self.launches = 0

    def _count(self, pointers: Any, mask: Any, reads: bool, writes: bool) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        asked = (
            np.broadcast_to(mask.data, pointers.data.shape) if mask is not None else np.ones(pointers.data.shape, bool)
        )
        if not asked.any():
            return
        total = int(asked.sum()) * size
        self.read += total * reads
        self.written += total * writes
        self.of_logits += total * (int(pointers.data[asked].min()) in self.logits)

    def __enter__(self) -> "Traffic":
        builder = interpreter.InterpreterBuilder
        self.saved = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw
        load, store, atomic = self.saved
        self.launch = interpreter.GridExecutor.__call__

        def counted_load(self_: Any, pointers: Any, mask: Any, *more: Any) -> Any:
            self._count(pointers, mask, True, False)
            return load(self_, pointers, mask, *more)

        def counted_store(self_: Any, pointers: Any, value: Any, mask: Any, *more: Any) -> Any:
            self._count(pointers, mask, False, True)
            return store(self_, pointers, value, mask, *more)

        def counted_atomic(self_: Any, operation: Any, pointers: Any, value: Any, mask: Any, *more: Any) -> Any:
            self._count(pointers, mask, True, True)
            return atomic(self_, operation, pointers, value, mask, *more)

        def counted_launch(executor: Any, *values: Any, **named: Any) -> Any:
            self.launches += 1
            return self.launch(executor, *values, **named)

        builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
        builder.create_atomic_rmw = counted_atomic
        interpreter.GridExecutor.__call__ = counted_launch
        return self

    def __exit__(self, *_: object) -> None:
        builder = interpreter.InterpreterBuilder
        builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw = self.saved
        interpreter.GridExecutor.__call__ = self.launch


def bytes_of(tree: Any) -> int:
    """Of all tensors in it."""
    return sum(x.numel() * x.element_size() for x in tree_leaves(tree) if isinstance(x, torch.Tensor))


class Operators(TorchDispatchMode):
    """Bytes in and out of every operator that is not a view, and how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.read = self.written = self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operator."""
        result = func(*args, **(kwargs or {}))
        if func._schema.name.split("::")[1].split(".")[0] not in VIEWS:
            self.read += bytes_of((args, kwargs))
            self.written += bytes_of(result)
            self.launches += 1
        return result


def in_torch(logits: torch.Tensor, weights: torch.Tensor, top_p: float) -> torch.Tensor:
    """The same rule, composed: merge, sort, cut, draw."""
    log_p = torch.log_softmax(logits.float(), -1)
    merged = torch.logsumexp(log_p + weights.log()[:, :, None], 1)
    probabilities, order = torch.sort(torch.softmax(merged, -1), -1, descending=True)
    outside = probabilities.cumsum(-1) - probabilities >= top_p
    drawn = torch.multinomial(probabilities.masked_fill(outside, 0), 1)
    return order.gather(-1, drawn)


def count_row(shape: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """One row of bfloat16 logits under top-p 0.9: bytes of logits read, bytes read and written, launches.

    shape: K, V and programs a row.
    """
    experts, vocabulary, splits = shape
    random = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(1, experts, vocabulary, generator=random)).bfloat16()
    whole = partial(torch.zeros, 1, dtype=torch.int64)
    with np.errstate(all="ignore"), Traffic(logits) as traffic:
        mix_sample(
            logits,
            torch.full((1, experts), 1 / experts),
            seeds=whole(),
            sequences=whole(),
            positions=whole(),
            temperature=torch.ones(1),
            top_p=torch.full((1,), 0.9, dtype=torch.float64),
            splits=splits,
            block=1 << 14,
        )
    return traffic.of_logits, traffic.read, traffic.written, traffic.launches


def count(cases: Iterable[Case]) -> dict[str, dict[str, Any]]:
    """All that is said of each case; bytes and launches for a step of so many rows."""
    cases = list(cases)
    shapes = {case: (*case[:2], num_splits(case[2], case[1], PROCESSORS)) for case in cases}
    different = sorted(set(shapes.values()), key=lambda shape: -shape[0] * shape[1])
    with Pool(os.cpu_count()) as pool:
        rows = dict(zip(different, pool.imap(count_row, different), strict=True))
    counted = {}
    for case in cases:
        experts, vocabulary, batch = case
        of_logits, read, written, launches = rows[shapes[case]]
        once = batch * experts * vocabulary * 2
        with Operators() as operators:
            meta: Callable[..., torch.Tensor] = partial(torch.empty, device="meta")
            in_torch(meta(batch, experts, vocabulary, dtype=torch.bfloat16), meta(batch, experts), 0.9)
        asked = batch * (read + written)
        counted[name(case)] = {
            "launches": launches,
            "logits_once": once,
            "logits_read": batch * of_logits,
            "read": batch * read,
            "written": batch * written,
            "torch_operators": operators.launches,
            "torch_read": operators.read,
            "torch_written": operators.written,
            # From the bandwidth of the data sheet: computed, not measured.
            "computed_us": {c: [round(x / speed * 1e6, 2) for x in (once, asked)] for c, speed in BANDWIDTH.items()},
        }
    return counted


def name(case: Case) -> str:
    """A case in the record."""
    return "K={}, V={}, rows={}".format(*case)


def table(counted: dict[str, dict[str, Any]]) -> str:
    """The table of docs/gpu.md."""
    chips = " | ".join(f"{chip} (us)" for chip in BANDWIDTH)
    lines = [
        "| K | V | rows | launches | logits, once (MB) | read, written (MB) | torch: operators; read, written (MB) | "
        f"computed: {chips} |",
        "|" + " ---: |" * (7 + len(BANDWIDTH)),
    ]
    for case in SHOWN:
        row = counted[name(case)]
        megabytes = {key: f"{row[key] / 1e6:.1f}" for key in row if isinstance(row[key], int)}
        cells = [
            *map(str, (case[0], f"{case[1]:,}", case[2], row["launches"])),
            megabytes["logits_once"],
            f"{megabytes['read']}, {megabytes['written']}",
            f"{row['torch_operators']}; {megabytes['torch_read']}, {megabytes['torch_written']}",
            *(f"{least:.2f} to {asked:.2f}" for least, asked in row["computed_us"].values()),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Count, and compare with what is recorded or record it; 1 if they differ."""
    parser = argparse.ArgumentParser(description="Bytes and launches of mix_sample.")
    parser.add_argument("--update", action="store_true", help="count the whole grid; write the record and docs/gpu.md")
    update = parser.parse_args().update
    counted = count(GRID if update else SHOWN)
    if update:
        RECORD.write_text(json.dumps(counted, indent=1) + "\n")
    recorded = json.loads(RECORD.read_text())
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    new = before + BEGIN + table(recorded) + END + rest.split(END)[1]
    if update:
        PAGE.write_text(new)
    wrong = [case for case, row in counted.items() if recorded.get(case) != row]
    wrong += ["the table in docs/gpu.md"] if not update and new != page else []
    for case in wrong:
        print(f"BREACH {case}: recorded is not what is counted (--update)")
    print(f"gpu_count: {len(counted)} of {len(recorded)} recorded cases counted, {len(wrong)} breaches")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
